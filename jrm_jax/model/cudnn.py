"""cuDNN's flash attention (NVIDIA), without masks, and with rows that share a prefix.

Rows with a prefix need two calls: all queries of a prefix against its keys up to its length, and
each row's queries against its own keys, causal. Each call gives its part of the result and the
logarithm of its part of the softmax's total (log-sum-exp), by which the parts are joined:

    out = sum_i out_i exp(lse_i - lse),    lse = log(sum_i exp(lse_i))

The backward kernel computes exp(logit - lse) (dout . v - dout . out), so each part's gradients are
right when it is given the joined out and lse instead of its own, as in ring attention (Liu et al.,
2023). JAX has the forward call with its log-sum-exp in public, the backward call not: it is taken
from where `jax.nn.dot_product_attention` takes it.

Letters: see `attention.py`; a prefixes, x = J * s queries of a prefix.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo as fused

LAYOUT = fused.AttentionLayout.BTNH.value


class Part(NamedTuple):
    """One call. `lengths` of the keys; None is causal over as many queries as keys."""

    q: Array  # [n, queries, H, d]
    k: Array  # [n, keys, G, d]
    v: Array  # [n, keys, G, d]
    lengths: Array | None  # [n] int32


def attend(causal_offset: int | None, q, k, v, q_segments, kv_segments, prefix) -> Array:
    """See `attention.attention`, of slots that are padded behind: `causal_offset` is None or the
    prefix's length (0 without one)."""
    if prefix is not None:
        return _with_prefix(q, k, v, prefix.k, prefix.v, _lengths(prefix.segments))
    options = {"is_causal": True}  # hides the padding, too, which stands behind
    if causal_offset is None:
        options = {"key_value_seq_lengths": _lengths(kv_segments)}
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)


def attend_masked(q, k, v, visible_Bst: Array) -> Array:
    """Of slots in segments of any kind; the mask is an array."""
    options = {"mask": visible_Bst[:, None], "implementation": "cudnn"}
    return jax.nn.dot_product_attention(q, k, v, **options)


def _lengths(segments: Array) -> Array:
    """Rows that are padding altogether keep a key, so that nothing is divided by zero."""
    return jnp.maximum(jnp.sum(segments, axis=1, dtype=jnp.int32), 1)


@jax.custom_vjp
def _with_prefix(q_BsHd, k_BsGd, v_BsGd, prefix_k_apGd, prefix_v_apGd, lengths_a) -> Array:
    return _forward(q_BsHd, k_BsGd, v_BsGd, prefix_k_apGd, prefix_v_apGd, lengths_a)[0]


def _forward(q, k, v, prefix_k, prefix_v, lengths):
    shared = prefix_k.shape[0]
    own, own_lse_BHs = forward_part(Part(q, k, v, None))
    grouped = q.reshape(shared, -1, *q.shape[2:])
    before, before_lse_aHx = forward_part(Part(grouped, prefix_k, prefix_v, lengths))
    before_lse_BHs = _to_rows(before_lse_aHx, q.shape)
    lse_BHs = jnp.logaddexp(own_lse_BHs, before_lse_BHs)

    def share(part_BsHd: Array, part_lse_BHs: Array) -> Array:
        weight_BHs = jnp.exp(part_lse_BHs - lse_BHs)
        return part_BsHd.astype(jnp.float32) * weight_BHs.swapaxes(1, 2)[..., None]

    joined = share(own, own_lse_BHs) + share(before.reshape(q.shape), before_lse_BHs)
    out = joined.astype(q.dtype)
    return out, (q, k, v, prefix_k, prefix_v, lengths, out, lse_BHs)


def _backward(saved, grad_BsHd):
    q, k, v, prefix_k, prefix_v, lengths, out, lse_BHs = saved
    own = backward_part(Part(q, k, v, None), out, lse_BHs, grad_BsHd)
    shape = (prefix_k.shape[0], -1, *q.shape[2:])
    grouped, out, grad = (x.reshape(shape) for x in (q, out, grad_BsHd))
    before = backward_part(
        Part(grouped, prefix_k, prefix_v, lengths), out, _to_groups(lse_BHs, shape[0]), grad
    )
    parts = (own[0], before[0].reshape(q.shape))
    q_grad = sum(part.astype(jnp.float32) for part in parts).astype(q.dtype)
    return q_grad, own[1], own[2], before[1], before[2], None


_with_prefix.defvjp(_forward, _backward)


def _to_rows(lse_aHx: Array, q_shape: tuple[int, ...]) -> Array:
    rows, queries, heads, _ = q_shape
    lse_aHJs = lse_aHx.reshape(lse_aHx.shape[0], heads, -1, queries)
    return lse_aHJs.swapaxes(1, 2).reshape(rows, heads, queries)


def _to_groups(lse_BHs: Array, shared: int) -> Array:
    _, heads, queries = lse_BHs.shape
    lse_aJHs = lse_BHs.reshape(shared, -1, heads, queries)
    return lse_aJHs.swapaxes(1, 2).reshape(shared, heads, -1)


def _call(part: Part) -> tuple[tuple[Array, ...], dict]:
    """The positional arrays and options that both calls take."""
    unused = jnp.zeros(0, part.q.dtype)
    mask_type, lengths = fused.MaskType.CAUSAL, (unused, unused)
    if part.lengths is not None:
        mask_type = fused.MaskType.PADDING
        lengths = (jnp.full_like(part.lengths, part.q.shape[1]), part.lengths)
    arrays = (part.q, part.k, part.v, unused, *lengths, unused, unused, unused, unused)
    return arrays, {
        "scale": part.q.shape[-1] ** -0.5,
        "seed": 42,  # of dropout, which there is none of
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # neither a bias nor its gradient
        "mask_type": mask_type,
        "layout": LAYOUT,
        "sliding_window_length": None,
    }


def forward_part(part: Part) -> tuple[Array, Array]:
    """(out [n, queries, H, d], log-sum-exp float32 [n, H, queries])."""
    arrays, options = _call(part)
    out, lse = fused._dot_product_attention_fwd_p_wrapper.bind(
        *arrays, **options, is_training=True
    )
    return out, lse


def backward_part(part: Part, out: Array, lse: Array, grad: Array) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v, given the joined `out` and `lse`."""
    arrays, options = _call(part)
    return tuple(
        fused._dot_product_attention_bwd_p_wrapper.bind(*arrays, lse, out, grad, **options)
    )
