"""A small backbone, unrolled, and its steps with shapes for arrays."""

import dataclasses
from types import SimpleNamespace

import jax

from configs import joint
from jrm_jax import build, sharding
from jrm_jax.model.published import PUBLISHED
from jrm_jax.planning import compiling

_PUBLISHED = PUBLISHED["qwen3_vl_2b"]
SMALL = dataclasses.replace(
    _PUBLISHED,
    text=dataclasses.replace(
        _PUBLISHED.text, layers=3, hidden=32, heads=4, kv_heads=2, head_dim=16, mlp=64, vocab=512,
        mrope_section=(4, 2, 2), tie_embeddings=False,
    ),
    vision=dataclasses.replace(
        _PUBLISHED.vision, depth=3, hidden=32, mlp=48, heads=2, out_hidden=32, deepstack=(1,),
        num_positions=16,
    ),
)  # fmt: skip


_HYBRID = PUBLISHED["qwen3_5_2b"].text
SMALL_HYBRID = dataclasses.replace(
    SMALL,
    family="qwen3_5",
    text=dataclasses.replace(
        _HYBRID, layers=6, hidden=32, heads=4, kv_heads=2, head_dim=16, mlp=64, vocab=512,
        mrope_section=(2, 1, 1), rotary=8, tie_embeddings=False,
        delta=dataclasses.replace(
            _HYBRID.delta, interval=3, key_heads=2, value_heads=4, key_dim=8, value_dim=12
        ),
    ),
    vision=dataclasses.replace(SMALL.vision, deepstack=()),
)  # fmt: skip


def small_case(backbone=SMALL):
    """(config, architecture, bucket) of a small backbone, unrolled, in float32."""
    config = joint.get_config()
    config.batch_size, config.mesh.data, config.mesh.fsdp = 1, 1, 1
    return config, backbone, compiling.make_bucket(backbone, 16, 24, 24, 2, 3, 8)


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def traced(config, backbone, bucket, remat="none"):
    """The train step's program, with shapes for arrays."""
    config.remat = remat
    mesh = one_device()
    encoder = compiling.stand_in_encoder(config, backbone)
    module = build.make_backbone(config, backbone, mesh, encoder.tokenizer.reward_id)
    state, (optimizer, _) = build.abstract_state(config, backbone, mesh)
    data = SimpleNamespace(encoder=encoder)
    step, evaluate = build.make_steps(config, module, data, optimizer, state)
    batch = compiling.abstract_batch(config, backbone, bucket, mesh)
    return step, evaluate, state, batch
