"""Real groups of the built-in world and a small backbone, for the tests of the step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entry_point import deepstack_backbone  # noqa: F401  a fixture

from jrm_jax import sharding
from jrm_jax.data.buckets import Bucket
from jrm_jax.data.pipeline import assemble_batch, make_encoder
from jrm_jax.data.world import scenes
from jrm_jax.heads import init_reward_head
from jrm_jax.model.backbone import Backbone, init_backbone
from jrm_jax.model.config import load_config

BUCKET = Bucket(candidates=4, images=5, patches=36, prompt=64, candidate=96, critique=64)
HALF = (0.5, 0.5, 0.5)
OPTIONS = sharding.compiler_options(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
jit = functools.partial(jax.jit, compiler_options=OPTIONS)


@pytest.fixture(scope="module")
def world(deepstack_backbone):
    """(encoder, backbone, params, groups)"""
    config = load_config(deepstack_backbone)
    encoder = make_encoder(deepstack_backbone, config)
    backbone = Backbone(config, attention="xla", reward_token_id=encoder.tokenizer.reward_id)
    params = init_params(config)
    groups = [scenes.make_example("train", index, 3) for index in range(8)]
    return encoder, backbone, params, groups


@pytest.fixture(scope="module")
def plain(world):
    """(backbone, params) without deepstack and with one stack of layers in each tower."""
    _, whole, *_ = world
    config = without_deepstack(whole.config, 2)
    backbone = dataclasses.replace(whole, config=config)
    return backbone, init_params(config)


def without_deepstack(config, layers):
    text = dataclasses.replace(config.text, layers=layers)
    return dataclasses.replace(
        config, text=text, vision=dataclasses.replace(config.vision, deepstack=())
    )


def init_params(config):
    params = jax.jit(lambda key: init_backbone(key, config))(jax.random.key(0))
    params["reward_head"] = init_reward_head(jax.random.key(1), config.text.hidden, 1)
    params["reward_embedding"] = jax.random.normal(jax.random.key(2), (config.text.hidden,))
    return params


def lay(encoder, groups, bucket=BUCKET):
    encoded = [None if group is None else encoder.encode_example(group) for group in groups]
    return jax.tree.map(jnp.asarray, assemble_batch(encoded, bucket, encoder))


def change(group, index, **fields):
    candidates = list(group.candidates)
    candidates[index] = dataclasses.replace(candidates[index], **fields)
    return dataclasses.replace(group, candidates=tuple(candidates))


def spread(values) -> float:
    return float(np.abs(values).max())
