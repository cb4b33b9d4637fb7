"""The attention interface: every implementation against a direct NumPy evaluation of its rule."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrm_jax.model import cudnn
from jrm_jax.model.attention import Prefix, attention, fallback_reason

HEADS, KV_HEADS, WIDTH = 4, 2, 16


def make_inputs(rows: int, queries: int, keys: int, seed: int = 0, width: int = WIDTH):
    """Queries, keys, values and ids; two segments and padding (0) at the end."""
    rng = np.random.default_rng(seed)

    def normal(length: int, heads: int):
        return rng.normal(size=(rows, length, heads, width)).astype(np.float32)

    def segments(length: int):
        ids = np.ones((rows, length), np.int32)
        for row in range(rows):
            cut, end = sorted(rng.integers(length // 2, length, 2))
            ids[row, cut:end], ids[row, end:] = 2, 0
        return ids

    q, k, v = normal(queries, HEADS), normal(keys, KV_HEADS), normal(keys, KV_HEADS)
    kv_segments = segments(keys)
    return q, k, v, kv_segments[:, keys - queries :], kv_segments


def direct(q, k, v, q_segments, kv_segments, causal_offset, barrier=None, prefix=0):
    """The rule, written as loops over rows and heads in float64."""
    out = np.zeros(q.shape)
    for row in range(q.shape[0]):
        visible = q_segments[row][:, None] == kv_segments[row][None, :]
        if causal_offset is not None:
            i, j = np.indices(visible.shape)
            visible &= j <= i + causal_offset
            if barrier is not None:
                behind, before = i > barrier[row], (j >= prefix) & (j < prefix + barrier[row])
                visible &= ~(behind & before)
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            logits = q[row, :, head].astype(float) @ k[row, :, kv_head].T / WIDTH**0.5
            weights = np.where(visible, np.exp(logits - logits.max()), 0)
            out[row, :, head] = weights / weights.sum(1, keepdims=True) @ v[row, :, kv_head]
    return out


@pytest.mark.parametrize("causal", [True, False])
def test_xla_follows_the_rule(causal):
    arrays = make_inputs(rows=3, queries=10, keys=17)
    offset = 7 if causal else None
    ours = attention(*arrays, causal_offset=offset, implementation="xla")
    np.testing.assert_allclose(ours, direct(*arrays, offset), atol=2e-6)
    if causal:  # the offset matters
        assert np.abs(ours - direct(*arrays, 8)).max() > 0.1


@pytest.mark.parametrize("offset", [7, 3, None])
def test_a_prefix_is_the_same_as_repeating_it(offset):
    q, k, v, q_segments, kv_segments = make_inputs(rows=6, queries=10, keys=17)
    if offset == 3:  # hides part of the prefix; with segments some queries would see no key
        q_segments[:], kv_segments[:] = 1, 1
    shared = [x.reshape(2, 3, *x.shape[1:])[:, 0, :7] for x in (k, v, kv_segments)]
    repeated = [np.repeat(x, 3, axis=0) for x in shared]
    joined = [
        np.concatenate([a, b[:, 7:]], axis=1)
        for a, b in zip(repeated, (k, v, kv_segments), strict=True)
    ]
    expected = direct(q, joined[0], joined[1], q_segments, joined[2], offset)
    own = (q, k[:, 7:], v[:, 7:], q_segments, kv_segments[:, 7:])
    prefix = Prefix(*map(jnp.asarray, shared))
    ours = attention(*own, causal_offset=offset, implementation="xla", prefix=prefix)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_behind_a_barrier_only_it_and_the_prefix_are_seen():
    q, k, v, _, _ = make_inputs(rows=6, queries=10, keys=17)
    ones = np.ones((6, 17), np.int32)
    barrier = np.array([0, 3, 4, 5, 8, 9], np.int32)
    for x in (k, v):  # three rows share a prefix of 7
        x[:, :7] = np.repeat(x[::3, :7], 3, axis=0)
    expected = direct(q, k, v, ones[:, :10], ones, 7, barrier, prefix=7)
    prefix = Prefix(*(jnp.asarray(x[::3, :7]) for x in (k, v, ones)))
    own = (q, k[:, 7:], v[:, 7:], ones[:, :10], ones[:, 7:])
    options = {"causal_offset": 7, "prefix": prefix, "barrier_B": jnp.asarray(barrier)}
    ours = attention(*own, implementation="xla", **options)
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    assert np.abs(ours - direct(q, k, v, ones[:, :10], ones, 7)).max() > 0.1
    with pytest.warns(UserWarning, match="barrier"):  # never a wrong mask
        again = attention(*own, implementation="splash", **options)
    np.testing.assert_array_equal(ours, again)


def test_masked_keys_and_empty_rows():
    """Masked keys, even huge ones, change no bit; padding stays finite, values and gradients."""
    q, k, v, q_segments, kv_segments = make_inputs(rows=2, queries=9, keys=9)
    q_segments[1], kv_segments[1] = 0, 0  # an absent row

    def run(k, v):
        return attention(q, k, v, q_segments, kv_segments, causal_offset=0, implementation="xla")

    other_k, other_v = k.copy(), v.copy()
    other_k[0][kv_segments[0] == 0], other_v[0][kv_segments[0] == 0] = 1e6, -1e6
    real = q_segments[0] > 0
    np.testing.assert_array_equal(run(k, v)[0][real], run(other_k, other_v)[0][real])
    grads = jax.grad(lambda k, v: jnp.sum(jnp.square(run(k, v))), argnums=(0, 1))(k, v)
    assert all(np.isfinite(grad).all() for grad in grads)
    assert np.isfinite(run(k, v)).all()


# ---- cuDNN: its two kernels are stood in for by what they are documented to compute


def part_logits(part):
    heads = part.q.shape[2] // part.k.shape[2]
    k, v = (jnp.repeat(x, heads, axis=2) for x in (part.k, part.v))
    logits = jnp.einsum("nshd,nthd->nhst", part.q, k) * part.q.shape[-1] ** -0.5
    key = jnp.arange(k.shape[1])
    visible = key[:, None] >= key if part.lengths is None else key < part.lengths[:, None, None]
    return jnp.where(visible if visible.ndim == 2 else visible[:, None], logits, -jnp.inf), v


def forward_part(part):
    logits, v = part_logits(part)
    out = jnp.einsum("nhst,nthd->nshd", jax.nn.softmax(logits), v)
    return out, jax.nn.logsumexp(logits, axis=-1)


def backward_part(part, out, lse, grad):
    def use(q, k, v):
        logits, v = part_logits(part._replace(q=q, k=k, v=v))
        weights = jnp.exp(logits - lse[..., None])
        values = jnp.einsum("nhst,nthd->nshd", jax.lax.stop_gradient(weights), v)
        delta = jnp.einsum("nshd,nshd->nhs", grad, out)
        pulled = jnp.einsum("nshd,nthd->nhst", grad, jax.lax.stop_gradient(v)) - delta[..., None]
        logits = jnp.where(weights > 0, logits, 0)
        slopes = jax.lax.stop_gradient(weights * pulled)
        return jnp.sum(values * grad) + jnp.sum(logits * slopes)

    return jax.grad(use, argnums=(0, 1, 2))(part.q, part.k, part.v)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(cudnn, "forward_part", forward_part)
    monkeypatch.setattr(cudnn, "backward_part", backward_part)


def test_cudnn_parts_join_to_the_whole(kernels):
    """Values and gradients where 3 rows share a prefix; one group is absent."""
    q, k, v, _, _ = make_inputs(rows=9, queries=10, keys=17)
    prefix_segments = (np.arange(7) < np.array([[7], [3], [0]])).astype(np.int32)
    lengths = np.array([10, 9, 4, 10, 6, 1, 0, 0, 0])
    segments = (np.arange(10) < lengths[:, None]).astype(np.int32)
    real = jnp.asarray(segments)[..., None, None]
    weights = np.random.default_rng(5).normal(size=q.shape) * real

    def ours(q, k, v, prefix_k, prefix_v):
        prefix = Prefix(prefix_k, prefix_v, prefix_segments)
        return cudnn.attend(7, q, k, v, segments, segments, prefix)

    def theirs(q, k, v, prefix_k, prefix_v):
        prefix = Prefix(prefix_k, prefix_v, jnp.asarray(prefix_segments))
        options = {"causal_offset": 7, "prefix": prefix, "implementation": "xla"}
        return attention(q, k, v, segments, segments, **options)

    wide = (q, k[:, 7:], v[:, 7:], k[::3, :7], v[::3, :7])
    np.testing.assert_allclose(ours(*wide) * real, theirs(*wide) * real, atol=2e-6)
    assert np.isfinite(ours(*wide)).all()
    gradients = [
        jax.grad(lambda *wide, run=run: jnp.sum(run(*wide) * weights), argnums=range(5))(*wide)
        for run in (ours, theirs)
    ]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
        assert np.abs(other).max() > 0.1


def lowered_for_a_gpu(run, *arrays) -> str:
    return jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_lowered_for_a_gpu_there_is_no_mask_and_no_copy(monkeypatch):
    """2 groups of 3 candidates: 62 prompt slots, 96 own ones."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91000)
    shapes = {"own": (6, 96), "prefix": (2, 62)}
    q, k, v, before_k, before_v = (
        jax.ShapeDtypeStruct((*shapes[name], heads, 64), jnp.bfloat16)
        for name, heads in (("own", 4), ("own", 2), ("own", 2), ("prefix", 2), ("prefix", 2))
    )
    own, before = (jax.ShapeDtypeStruct(shapes[name], jnp.int32) for name in ("own", "prefix"))

    def candidates(q, k, v, own, before_k, before_v, before):
        prefix = Prefix(before_k, before_v, before)
        options = {"causal_offset": 62, "prefix": prefix, "padded_behind": True}
        return jnp.sum(attention(q, k, v, own, own, **options).astype(jnp.float32))

    def alone(offset, q, k, v, own):
        out = attention(q, k, v, own, own, causal_offset=offset, padded_behind=True)
        return jnp.sum(out.astype(jnp.float32))

    arrays = (q, k, v, own, before_k, before_v, before)
    shared = lowered_for_a_gpu(jax.grad(candidates, argnums=(0, 1, 2, 4, 5)), *arrays)
    for kernel in ("__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("):
        assert shared.count(f"custom_call @{kernel}") == 2
    assert "6x62x2x64x" not in shared and "6x158x" not in shared  # the prefix, copied or joined
    for text in (
        shared,
        lowered_for_a_gpu(functools.partial(alone, 0), q, k, v, own),
        lowered_for_a_gpu(functools.partial(alone, None), q, k, v, own),
    ):
        assert "__cudnn$fmhaSoftmax" in text
        for queries, keys in ((96, 96), (288, 62), (96, 62), (96, 158)):
            assert f"x{queries}x{keys}x" not in text
    masked = functools.partial(attention, causal_offset=None)
    text = lowered_for_a_gpu(masked, q, k, v, own, own)
    assert "x96x96x" in text  # what the search above would have found


def test_fallbacks_say_why():
    bfloat16 = jnp.dtype(jnp.bfloat16)
    shape = (1, 128, 4, 64)
    assert fallback_reason("splash", shape, 256, 128, bfloat16, "tpu") is None
    assert "multiples of 128" in fallback_reason("splash", shape, 200, 0, bfloat16, "tpu")
    assert "72 keys before" in fallback_reason("splash", shape, 128, 72, bfloat16, "tpu")
    assert fallback_reason("cudnn", shape, 256, 0, bfloat16, "gpu") is None
    assert "NVIDIA" in fallback_reason("cudnn", shape, 256, 0, bfloat16, "cpu")
    assert "float32" in fallback_reason("cudnn", shape, 256, 0, jnp.dtype("float32"), "gpu")
    assert "even" in fallback_reason("cudnn", (1, 127, 4, 64), 256, 0, bfloat16, "gpu")
    arrays = make_inputs(rows=1, queries=10, keys=17)
    for implementation, reason in (("splash", "multiples of 128"), ("cudnn", "NVIDIA")):
        with pytest.warns(UserWarning, match=reason):
            ours = attention(*arrays, causal_offset=7, implementation=implementation)
        np.testing.assert_allclose(ours, direct(*arrays, 7), atol=2e-6)
    with pytest.raises(ValueError, match="use one of"):
        attention(*arrays, causal_offset=7, implementation="flash")


@pytest.mark.filterwarnings("error:attention .* replaced")
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("implementation", ["auto", "cudnn", "splash"])
def test_a_step_of_generation_needs_no_words(monkeypatch, platform, implementation):
    """One query, own keys behind a prefix: as `decoder.py` asks."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    q, k, v, q_segments, segments = make_inputs(rows=2, queries=1, keys=128)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    prefix = Prefix(*half[1:], segments)
    options = {"causal_offset": None, "prefix": prefix, "implementation": implementation}
    run = functools.partial(attention, **options)
    assert jax.eval_shape(run, *half, q_segments, segments).shape == q.shape


@pytest.mark.parametrize(("queries", "offset", "padded", "reason"), [
    (9, 16, True, "even lengths for gradients, not 9 queries"),
    (9, None, False, "even lengths for gradients, not 9 queries"),
    (8, None, True, "behind 16 shared keys causal_offset must be 16: None"),
    (8, 3, True, "behind 16 shared keys causal_offset must be 16: 3"),
    (8, 16, False, "must be padded at their end only"),
])  # fmt: skip
def test_the_reason_that_is_told_is_the_true_one(monkeypatch, queries, offset, padded, reason):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q, k, v, segments, _ = make_inputs(rows=2, queries=queries, keys=queries)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    prefix = Prefix(*(jnp.zeros((2, 16, KV_HEADS, WIDTH), jnp.bfloat16),) * 2, np.ones((2, 16)))
    run = functools.partial(
        attention, causal_offset=offset, prefix=prefix, padded_behind=padded
    )
    with pytest.warns(UserWarning, match=reason):
        jax.eval_shape(run, *half, segments, segments)


def test_half_precision_keeps_a_float32_softmax():
    arrays = make_inputs(rows=2, queries=10, keys=17)
    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays[:3]]
    ours = attention(*half, *arrays[3:], causal_offset=7, implementation="xla")
    assert ours.dtype == jnp.bfloat16
    rounded = [np.asarray(x, np.float32) for x in half]
    expected = direct(*rounded, *arrays[3:], 7)
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, atol=2e-2)
    program = str(jax.make_jaxpr(lambda *x: attention(*x, causal_offset=7))(*half, *arrays[3:]))
    exponentials = [line for line in program.splitlines() if "= exp " in line]
    assert exponentials and all(":f32[" in line for line in exponentials)
