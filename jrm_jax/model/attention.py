"""The one attention interface: segment ids plus a causal offset, and an optional shared prefix.

A key is visible to a query iff their segment ids are equal and, where `causal_offset` is given,
key index j <= query index i + causal_offset. Padding has its own id and attends to itself, so no
query is ever without a key and empty slots stay finite. Where a `barrier` is given, queries behind
it see no own key before it.

Letters: B rows, s queries, t keys, H query heads, G key/value heads (G divides H), M = H / G,
d head width, p prefix keys, J rows that share a prefix (B = J * prefixes).

Implementations: 'xla' (any shape and dtype; the reference), 'splash' (TPU, `splash.py`; interpreted
elsewhere), 'cudnn' (NVIDIA, bfloat16 or float16, `cudnn.py`), 'auto' (by platform). The last three
never build an array of all queries by all keys, and no implementation copies a prefix for its rows.
Where splash or cuDNN cannot run a call, XLA does, and a warning says why where that can be changed.
One query, a step of generation, is always XLA's.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jrm_jax.model import cudnn
from jrm_jax.model.layers import precision

IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn")
MASKED = -1e30  # exp(MASKED - largest) is exactly 0 in float32
SPLASH_BLOCK = 128
BATCH_AXES, HEAD_AXIS = ("data", "fsdp"), "tensor"
PLATFORM_CHOICE = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}


class Prefix(NamedTuple):
    """Keys and values that stand before the own keys of several rows.

    Row r of the queries uses prefix r // J. Key indices count the prefix first.
    """

    k: Array  # [B/J, p, G, d]
    v: Array  # [B/J, p, G, d]
    segments: Array  # [B/J, p]


def attention(
    q_BsHd: Array,
    k_BtGd: Array,
    v_BtGd: Array,
    q_segments_Bs: Array,
    kv_segments_Bt: Array,
    *,
    causal_offset: int | None,
    implementation: str = "auto",
    mesh: Mesh | None = None,
    prefix: Prefix | None = None,
    barrier_B: Array | None = None,
    padded_behind: bool = False,
) -> Array:
    """Scaled dot-product attention, softmax in float32.

    Args:
        q_BsHd, k_BtGd, v_BtGd: one dtype.
        q_segments_Bs, kv_segments_Bt: int32 ids.
        causal_offset: None sees all keys of the segment; with a prefix of p keys, p is the usual
            causal rule.
        implementation: see the module.
        mesh: the mesh of a sharded computation; splash then runs per shard, rows over
            ('data', 'fsdp') and heads over 'tensor' where these divide.
        prefix: equal to repeating it for each of its rows and concatenating it before k and v.
        barrier_B: int32; queries at indices above it see own keys from it on, and the prefix.
            Query and own key indices must count the same slots.
        padded_behind: all ids, the prefix's too, are 1 for real slots and 0 for the padding behind
            them. What padding attends to is then up to the implementation (it stays finite), and
            cuDNN needs no mask.

    Returns:
        [B, s, H, d] in q's dtype.

    Raises:
        ValueError: unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r}: use one of {', '.join(IMPLEMENTATIONS)}")
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    chosen = implementation
    if implementation == "auto":
        chosen = PLATFORM_CHOICE.get(platform, "xla")
    if q_BsHd.shape[1] == 1:
        chosen = "xla"
    if chosen != "xla":
        before = 0 if prefix is None else prefix.k.shape[1]
        shapes = (q_BsHd.shape, k_BtGd.shape[1], before)
        plain = causal_offset == before if prefix is not None else causal_offset in (None, before)
        reason = fallback_reason(chosen, *shapes, q_BsHd.dtype, platform)
        if barrier_B is not None:
            reason = "only 'xla' has barriers"
        elif reason is None and prefix is not None and not plain:
            reason = f"behind {before} shared keys causal_offset must be {before}: {causal_offset}"
        elif reason is None and prefix is not None and chosen == "cudnn" and not padded_behind:
            reason = "shared keys and own ones must be padded at their end only"
        if reason is not None:
            half = q_BsHd.dtype != jnp.float32  # float32 has no other way on a GPU: no warning
            if implementation != "auto" or platform == "tpu" or half:
                warnings.warn(f"attention {chosen!r} replaced by 'xla': {reason}", stacklevel=2)
            chosen = "xla"
    arrays = (q_BsHd, k_BtGd, v_BtGd, q_segments_Bs, kv_segments_Bt)
    if chosen == "xla":
        return _xla(*arrays, causal_offset, prefix, barrier_B)
    if chosen == "splash":
        # imported here: Pallas takes a second to load and only TPUs need it
        from jrm_jax.model import splash

        run = functools.partial(splash.attend, causal_offset, platform != "tpu")
    elif padded_behind and (plain or prefix is not None):
        run = functools.partial(cudnn.attend, causal_offset)
    else:
        return cudnn.attend_masked(*arrays[:3], _visible(*arrays[3:], causal_offset))
    return _per_shard(run, mesh, arrays, prefix)


def _per_shard(
    run: Callable[..., Array], mesh: Mesh | None, arrays: tuple[Array, ...], prefix: Prefix | None
) -> Array:
    """run(q, k, v, q_segments, kv_segments, prefix), on a mesh for each device's rows and heads."""
    if mesh is None:
        return run(*arrays, prefix)
    batch = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    size = math.prod(mesh.shape[axis] for axis in batch)
    shared = arrays[0].shape[0] if prefix is None else prefix.k.shape[0]
    batch = batch if size > 1 and shared % size == 0 else None
    tensor = mesh.shape.get(HEAD_AXIS, 1)
    heads = HEAD_AXIS if tensor > 1 and arrays[1].shape[2] % tensor == 0 else None
    wide, narrow = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, None)
    specs = (wide, wide, wide, narrow, narrow)
    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(*specs, None if prefix is None else Prefix(wide, wide, narrow)),
        out_specs=wide,
        check_vma=False,
    )
    return mapped(*arrays, prefix)


def fallback_reason(
    implementation: str,
    q_shape: tuple[int, ...],
    keys: int,
    prefix: int,
    dtype: jnp.dtype,
    platform: str,
) -> str | None:
    """Why `implementation` cannot run these shapes, or None if it can."""
    queries, width = q_shape[1], q_shape[3]
    if implementation == "splash":
        if any(length % SPLASH_BLOCK for length in (queries, keys, prefix)):
            before = f" and {prefix} keys before them" if prefix else ""
            return (
                f"{queries} queries, {keys} keys{before} are not all multiples of {SPLASH_BLOCK}"
            )
    elif implementation == "cudnn":
        if platform not in ("gpu", "cuda"):
            return f"cuDNN needs an NVIDIA device, the platform is {platform}"
        if dtype not in (jnp.bfloat16, jnp.float16):
            return f"cuDNN needs bfloat16 or float16, the dtype is {jnp.dtype(dtype).name}"
        if width % 8 or width > 128:
            return f"cuDNN needs a head width that is a multiple of 8 up to 128, not {width}"
        if queries % 2 or keys % 2 or prefix % 2:
            return f"cuDNN needs even lengths for gradients, not {queries} queries, {keys} keys"
    return None


def _visible(
    q_segments_Bs: Array,
    kv_segments_Bt: Array,
    causal_offset: int | None,
    barrier_B: Array | None = None,
) -> Array:
    """[B, s, t] bool: the rule at the top of this file."""
    visible = q_segments_Bs[:, :, None] == kv_segments_Bt[:, None, :]
    query, key = jnp.arange(visible.shape[1])[:, None], jnp.arange(visible.shape[2])[None, :]
    if causal_offset is not None:
        visible &= key <= query + causal_offset
    if barrier_B is not None:
        barrier_B11 = barrier_B[:, None, None]
        visible &= (query <= barrier_B11) | (key >= barrier_B11)
    return visible


def _xla(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array,
    kv_segments: Array,
    causal_offset: int | None,
    prefix: Prefix | None,
    barrier_B: Array | None,
) -> Array:
    """Plain products, without repeating heads or prefixes.

    Layout: a prefixes (or rows, without one), G key/value heads, J rows of a prefix, x = queries
    and the M query heads of a key/value head together, t keys. The softmax runs over the prefix's
    and the own keys as two blocks with a common maximum and total, so they are never joined, and
    the total divides the result instead of the (larger) weights.
    """
    rows, queries, heads, width = q.shape
    kv_heads, per_head = k.shape[2], heads // k.shape[2]
    shared = rows if prefix is None else prefix.k.shape[0]
    each = rows // shared
    q_aJsGMd = q.reshape(shared, each, queries, kv_heads, per_head, width)
    q_aGJsMd = q_aJsGMd.transpose(0, 3, 1, 2, 4, 5)
    q_aGJxd = q_aGJsMd.reshape(shared, kv_heads, each, queries * per_head, width)
    # the scale goes into the queries: a product smaller than the logits
    q_aGJxd = (q_aGJxd.astype(jnp.float32) * width**-0.5).astype(q.dtype)

    def masked(logits_aGJxt: Array, visible_aJst: Array) -> Array:
        visible_aJxt = jnp.repeat(visible_aJst, per_head, axis=2)
        return jnp.where(visible_aJxt[:, None], logits_aGJxt, MASKED)

    k_aGJtd, v_aGJtd = (
        x.reshape(shared, each, -1, kv_heads, width).transpose(0, 3, 1, 2, 4) for x in (k, v)
    )
    before = 0 if prefix is None else prefix.k.shape[1]
    offset = None if causal_offset is None else causal_offset - before
    visible = _visible(q_segments, kv_segments, offset, barrier_B)
    visible = visible.reshape(shared, each, queries, -1)
    products = [("agjxd,agjtd->agjxt", "agjxt,agjtd->agjxd", k_aGJtd, v_aGJtd, visible)]
    if prefix is not None:
        k_aGpd, v_aGpd = prefix.k.swapaxes(1, 2), prefix.v.swapaxes(1, 2)
        segments = jnp.repeat(prefix.segments, each, axis=0)
        # the usual causal rule lets every query see all of the prefix
        offset = None if causal_offset is None or causal_offset >= before - 1 else causal_offset
        visible = _visible(q_segments, segments, offset)
        visible = visible.reshape(shared, each, queries, before)
        products.append(("agjxd,agpd->agjxp", "agjxp,agpd->agjxd", k_aGpd, v_aGpd, visible))

    product = functools.partial(
        jnp.einsum, precision=precision(q.dtype), preferred_element_type=jnp.float32
    )
    logits = [
        masked(product(equation, q_aGJxd, keys), visible)
        for equation, _, keys, _, visible in products
    ]
    largest = functools.reduce(jnp.maximum, [x.max(-1, keepdims=True) for x in logits])
    largest = jax.lax.stop_gradient(largest)
    weights = [jnp.exp(x - largest) for x in logits]
    total = sum(x.sum(-1, keepdims=True) for x in weights)
    out_aGJxd = sum(
        product(equation, weight.astype(v.dtype), values)
        for weight, (_, equation, _, values, _) in zip(weights, products, strict=True)
    )
    out = (out_aGJxd / total).astype(q.dtype)
    out = out.reshape(shared, kv_heads, each, queries, per_head, width)
    return out.transpose(0, 2, 3, 1, 4, 5).reshape(rows, queries, heads, width)
