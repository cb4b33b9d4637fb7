"""What the compute dtype means: float32 products are full ones, bfloat16 kernels are cast once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrm_jax import step
from jrm_jax.benchmarks.accelerator import case as accelerator
from jrm_jax.model.backbone import Backbone, cast_projections, init_backbone
from jrm_jax.optim import flatten
from jrm_jax.step import LossConfig, make_forward

HALF = (0.5, 0.5, 0.5)
MODEL = "qwen3_vl_2b"
SMALL = accelerator.architecture(MODEL, tiny=True)
SMALL = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, layers=3))


@pytest.fixture(scope="module")
def case():
    """(params, batch, dtype -> loss of the joint step), rolled loops of two layers."""
    params = jax.jit(lambda key: init_backbone(key, SMALL))(jax.random.key(0))
    width = SMALL.text.hidden
    params["reward_head"] = {"kernel": jnp.full((width, 1), 0.1)}
    params["reward_embedding"] = jnp.full((width,), 0.1)

    def loss(dtype):
        backbone = Backbone(SMALL, dtype=dtype, attention="xla", reward_token_id=511)
        forward = make_forward(backbone, HALF, HALF, LossConfig(chunk=8))
        return lambda params, batch: sum(t.sum for t in forward(params, batch).terms.values())

    config = accelerator.make_config(MODEL, accelerator.TINY)
    return params, accelerator.make_batch(config, SMALL, accelerator.TINY), loss


def test_kernels_cast_once_give_the_same_gradients(case, monkeypatch):
    params, batch, loss = case
    found = {}
    for name in ("once", "by each layer"):
        if name != "once":
            monkeypatch.setattr(step, "cast_projections", lambda params, dtype: params)
        gradients = jax.jit(jax.grad(loss(jnp.bfloat16)))(params, batch)
        found[name] = {path: np.asarray(x) for path, x in flatten(gradients).items()}
    for path, one in found["once"].items():
        assert one.dtype == np.float32, path
        np.testing.assert_array_equal(one, found["by each layer"][path], path)
    assert np.abs(found["once"]["backbone/decoder/layers/mlp/down/kernel"]).max() > 0


def test_no_loop_over_layers_writes_a_float32_gradient_of_a_projection(case):
    params, batch, loss = case
    text = str(jax.make_jaxpr(jax.grad(loss(jnp.bfloat16)))(params, batch))
    stacked = f"[{SMALL.text.layers - 1},{SMALL.text.hidden},{SMALL.text.mlp}]"
    casts = [line for line in text.splitlines() if f":f32{stacked} = convert" in line]
    assert len(casts) == 2  # the gradients of gate and up, after the loop
    assert f":bf16{stacked}" in text


def test_what_is_used_in_float32_is_not_cast(case):
    params, _, _ = case
    cast = flatten(cast_projections(params["backbone"], jnp.bfloat16))
    wide = {path for path, leaf in cast.items() if leaf.dtype == jnp.float32}
    assert {"vision/patch_embed/kernel", "vision/position/embedding", "embed/embedding"} <= wide
    assert all(path in wide for path in cast if path.endswith(("scale", "bias")))
    assert not [path for path in wide if "kernel" in path and "patch_embed" not in path]
    same = cast_projections(params["backbone"], jnp.float32)
    leaves = zip(*map(jax.tree.leaves, (same, params["backbone"])), strict=True)
    assert all(one is other for one, other in leaves)


def test_products_of_a_float32_step_are_full_ones(case):
    """JAX's default would be TF32 on NVIDIA's cards, bfloat16 on TPUs."""
    params, batch, loss = case

    def products(dtype):
        text = str(jax.make_jaxpr(jax.grad(loss(dtype)))(params, batch))
        return [part.split("] ")[0] for part in text.split("dot_general[")[1:]]

    full, half = products(jnp.float32), products(jnp.bfloat16)
    assert len(full) > 30 and all("HIGHEST" in product for product in full)
    # heads, and the table of places, stay in float32
    assert 0 < sum("HIGHEST" in product for product in half) < len(full) / 3
