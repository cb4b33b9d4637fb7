"""Splash attention, JAX's block-sparse kernel for TPUs, with rows that share a prefix.

The rows of a prefix become the queries of one kernel: its keys are the prefix followed by all these
rows' own keys, and a fixed mask says which blocks are skipped. So the prefix is read, not copied.

The kernels' products state no precision of their own, and a TPU would round their operands to
bfloat16. In float32 they are traced where JAX's default is the highest one, both passes.

Letters: see `attention.py`; a = prefixes (or rows, where there are none), x = J * s queries,
y = p + J * t keys.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from jrm_jax.model.layers import ATTENTION, precision

BLOCKS = (512, 384, 256, 128)


class SharedPrefixMask(splash_attention_mask.Mask):
    """Every query sees the prefix, and of its own row's keys those up to its own place."""

    def __init__(self, prefix: int, rows: int, length: int):
        self.sizes = (prefix, rows, length)

    @property
    def shape(self) -> tuple[int, int]:
        prefix, rows, length = self.sizes
        return rows * length, prefix + rows * length

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        prefix, _, length = self.sizes
        query, key = (np.arange(size)[part] for size, part in zip(self.shape, index, strict=True))
        own_x1, own_1y = query[:, None], key[None, :] - prefix
        same_row = own_x1 // length == own_1y // length
        return (own_1y < 0) | (same_row & (own_1y <= own_x1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharedPrefixMask) and self.sizes == other.sizes

    def __hash__(self) -> int:
        return hash((type(self), self.sizes))


def attend(
    causal_offset: int | None, interpret: bool, q, k, v, q_segments, kv_segments, prefix
) -> Array:
    """See `attention.attention`; with a prefix `causal_offset` must be its length."""
    rows, queries, heads, width = q.shape
    if prefix is not None:
        shared, before = prefix.k.shape[:2]
        mask = SharedPrefixMask(before, rows // shared, queries)

        def group(x: Array) -> Array:
            return x.reshape(shared, -1, *x.shape[2:])

        own = (group(k), group(v), group(kv_segments))
        k, v, kv_segments = (
            jnp.concatenate([first, x], axis=1) for first, x in zip(prefix, own, strict=True)
        )
        q, q_segments = group(q), group(q_segments)
    elif causal_offset is None:
        mask = splash_attention_mask.FullMask((queries, k.shape[1]))
    else:
        mask = splash_attention_mask.CausalMask((queries, k.shape[1]), offset=causal_offset)
    q = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
    full = precision(q.dtype) == jax.lax.Precision.HIGHEST
    run = _run_in_float32 if full else _run
    return run(mask, interpret, q, k, v, q_segments, kv_segments).reshape(
        rows, queries, heads, width
    )


def _run(mask, interpret: bool, q_axHd, k_ayGd, v_ayGd, q_segments_ax, kv_segments_ay) -> Array:
    """[a, x, H, d]; the queries are scaled."""
    kernel = _kernel(mask, q_axHd.shape[2], interpret)

    def one(q_Hxd, k_Gyd, v_Gyd, q_segments_x, kv_segments_y):
        segments = splash_attention_kernel.SegmentIds(q=q_segments_x, kv=kv_segments_y)
        return kernel(q_Hxd, k_Gyd, v_Gyd, segment_ids=segments)

    wide = (x.swapaxes(1, 2) for x in (q_axHd, k_ayGd, v_ayGd))
    return jax.vmap(one)(*wide, q_segments_ax, kv_segments_ay).swapaxes(1, 2)


# A rule of its own: JAX traces the backward kernels when the loss is differentiated, where the
# forward pass's default precision is no longer in force.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run_in_float32(mask, interpret: bool, q, k, v, q_segments, kv_segments) -> Array:
    """As `_run`, all products in float32."""
    with jax.default_matmul_precision("highest"):
        return _run(mask, interpret, q, k, v, q_segments, kv_segments)


def _forward(mask, interpret: bool, q, k, v, q_segments, kv_segments):
    def run(q, k, v):
        return _run(mask, interpret, q, k, v, q_segments, kv_segments)

    with jax.default_matmul_precision("highest"):
        return jax.vjp(run, q, k, v)  # what pulls back is a pytree of what it needs


def _backward(mask, interpret: bool, pull, grad):
    with jax.default_matmul_precision("highest"):
        return *pull(grad), None, None


_run_in_float32.defvjp(_forward, _backward)


def _kernel(mask: splash_attention_mask.Mask, heads: int, interpret: bool):
    queries, keys = mask.shape
    q_block, kv_block = (
        next(size for size in BLOCKS if length % size == 0) for length in (queries, keys)
    )
    names = ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq")
    sizes = {"block_q": q_block, "block_q_dkv": q_block, "block_q_dq": q_block}
    make = functools.partial(
        splash_attention_kernel.make_splash_mha,
        block_sizes=splash_attention_kernel.BlockSizes(**sizes, **dict.fromkeys(names, kv_block)),
        residual_checkpoint_name=ATTENTION,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    return make(splash_attention_mask.MultiHeadMask([mask] * heads))
