"""Splash attention, interpreted, against XLA; and what a TPU would be given."""

from __future__ import annotations

import base64
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lib import tpu  # what reads a TPU's kernels has no public name
from jax._src.lib.mlir import ir
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_attention import make_inputs

from jrm_jax.model.attention import Prefix, attention

# a fallback to XLA would warn, and compare XLA with itself
no_fallback = pytest.mark.filterwarnings("error:attention .* replaced")


def compare_with_xla(arrays, offset, prefix=None, **options):
    """Values and gradients of splash (interpreted on CPU) and XLA."""
    segments = arrays[3:]

    def run(implementation, q, k, v, prefix_k, prefix_v):
        before = None if prefix is None else Prefix(prefix_k, prefix_v, prefix.segments)
        return attention(
            q, k, v, *segments, causal_offset=offset, implementation=implementation,
            prefix=before, **(options if implementation == "splash" else {}),
        )  # fmt: skip

    wide = (*arrays[:3], *((0.0, 0.0) if prefix is None else prefix[:2]))
    weights = np.random.default_rng(5).normal(size=arrays[0].shape)

    def loss(implementation, *wide):
        return jnp.sum(run(implementation, *wide) * weights)

    results = {}
    for implementation in ("xla", "splash"):
        value = jax.jit(run, static_argnums=0)(implementation, *wide)
        grads = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4, 5)), static_argnums=0)(
            implementation, *wide
        )
        results[implementation] = (value, *grads)
    for ours, theirs in zip(results["splash"], results["xla"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@no_fallback
@pytest.mark.parametrize("offset", [128, None])
def test_splash_equals_xla(offset):
    compare_with_xla(make_inputs(rows=2, queries=128, keys=256), offset)


@no_fallback
def test_splash_of_several_blocks_equals_xla():
    """5 blocks of queries and 2 of keys, one of them skipped by some; heads of width 72."""
    compare_with_xla(make_inputs(rows=1, queries=640, keys=768, width=72), 128)


@no_fallback
def test_splash_with_a_prefix_on_a_mesh_equals_xla():
    q, k, v, q_segments, kv_segments = make_inputs(rows=4, queries=128, keys=256)
    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Auto,) * 3)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    own = [jax.device_put(x, rows) for x in (q, k[:, 128:], v[:, 128:])]
    prefix = Prefix(k[::2, :128], v[::2, :128], kv_segments[::2, :128])
    compare_with_xla((*own, q_segments, kv_segments[:, 128:]), 128, prefix, mesh=mesh)


@no_fallback
def test_splash_with_a_prefix_of_several_blocks_equals_xla():
    """3 rows share 256 keys; blocks of 384 queries and of 128 keys, some skipped."""
    q, k, v, q_segments, kv_segments = make_inputs(rows=6, queries=384, keys=640, width=64)
    prefix = Prefix(k[::3, :256], v[::3, :256], kv_segments[::3, :256])
    own = (q, k[:, 256:], v[:, 256:], q_segments, kv_segments[:, 256:])
    compare_with_xla(own, 256, prefix)


def products_for_a_tpu(run, *arrays) -> list[str]:
    """All products within the kernels of a function that is lowered for a TPU, as text."""
    lowered = jax.jit(run).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    products = []
    for body in re.findall(r'\\22body\\22: \\22([^\\]+)\\22', lowered):
        with ir.Context() as context:
            tpu.register_dialect(context)
            context.load_all_available_dialects()
            context.allow_unregistered_dialects = True
            kernel = str(ir.Module.parse(base64.b64decode(body)))
        products += [line for line in kernel.splitlines() if "tpu.matmul" in line]
    return products


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_splash_in_float32_is_float32_on_a_tpu_and_bfloat16_is_as_jax_has_it(monkeypatch, dtype):
    """Its products, forward (2) and backward (4 and 3), within a layer that is computed again."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    q, k, v, segments, _ = make_inputs(rows=2, queries=128, keys=128)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    options = {"causal_offset": 128, "prefix": Prefix(k[:1], v[:1], segments[:1])}

    def attend(q, k, v):
        return attention(q, k, v, segments, segments, **options)

    def loss(q, k, v):
        return jnp.sum(jax.checkpoint(attend)(q, k, v).astype(jnp.float32))

    forward = products_for_a_tpu(attend, q, k, v)
    both = products_for_a_tpu(jax.grad(loss, argnums=(0, 1, 2)), q, k, v)
    assert (len(forward), len(both)) == (2, 9)
    full = ["contract_precision<fp32>" in product for product in (*forward, *both)]
    assert all(full) if dtype == jnp.float32 else not any(full)
