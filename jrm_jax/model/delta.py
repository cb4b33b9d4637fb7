"""Gated DeltaNet: the layer that keeps a state of fixed size instead of keys and values.

Per token, with a float32 state S [d, e] of each value head (Yang et al., 2024, arXiv 2412.06464):
S <- exp(g) S;  u = beta (v - S^T k);  S <- S + k u^T;  o = S^T q. Nothing in it knows a position.

Over the packed prompt-sharing layout the prompt runs once, and each candidate starts from the
prompt's last state and from its last real rows before the convolution. Padding may only stand
behind what is real; it is inert (g = 0, beta = 0), so a state is that of the last real token.

Letters: B groups, K candidates, P prompt slots, C candidate slots, S = P + K*C packed slots,
X = B*K sequences, D width; R rows, T slots of a row, L slots of a chunk, N chunks; H key heads, M
value heads of a key head, V = H*M value heads, d key width, e value width; W taps of the
convolution, c channels.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jrm_jax.model.config import TextConfig
from jrm_jax.model.layers import GatedRMSNorm, Linear, precision

CHUNK = 64  # slots that are solved at once; a power of two
NORM_EPS = 1e-6

# Of the rule's float32 products where the compute dtype is bfloat16. On TPU these are three passes
# in bfloat16, which cost 7e-6 of a result; one, JAX's default, costs 4e-3, with nearly equal keys
# 3e-2. On NVIDIA's cards they are TF32, which was not measured.
BESIDE_BFLOAT16 = jax.lax.Precision.HIGH


class DeltaCache(NamedTuple):
    """What a sequence remembers of its tokens so far. Stacks lead with layers."""

    window: Array  # [X, W - 1, c]: the last rows before the convolution, compute dtype
    state: Array  # [X, V, d, e] float32


def unit_norm(x: Array) -> Array:
    """x / |x| over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), -1, keepdims=True) + NORM_EPS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def invert(lower: Array, precision: jax.lax.Precision) -> Array:
    """(I + A)^-1 of a strictly lower triangular A [..., L, L], L a power of two.

    By doubling blocks: with X the inverse of the diagonal blocks of width b, X - X E X is that of
    width 2b, E the part of A in the lower left quarters. Each step is the inverse of a part of the
    chunk, which the delta rule keeps bounded; powers of A are not.
    """
    size = lower.shape[-1]
    place = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    width = 1
    while width < size:
        row, column = place[:, None] // width, place[None, :] // width
        corner = (row == column + 1) & (row % 2 == 1)
        step = jnp.matmul(inverse, jnp.where(corner, lower, 0), precision=precision)
        inverse = inverse - jnp.matmul(step, inverse, precision=precision)
        width *= 2
    return inverse


def _invert_forward(lower: Array, precision: jax.lax.Precision) -> tuple[Array, Array]:
    inverse = invert(lower, precision)
    return inverse, inverse


def _invert_backward(precision: jax.lax.Precision, inverse: Array, grad: Array) -> tuple[Array]:
    turned = inverse.swapaxes(-1, -2)
    left = jnp.matmul(turned, grad, precision=precision)
    return (jnp.tril(-jnp.matmul(left, turned, precision=precision), -1),)


invert.defvjp(_invert_forward, _invert_backward)


def gated_delta(
    q_RTHd: Array,
    k_RTHd: Array,
    v_RTVe: Array,
    g_RTV: Array,
    beta_RTV: Array,
    state_RVde: Array,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
) -> tuple[Array, Array]:
    """The rule over all slots of each row, L slots at a time.

    Everything of a chunk is made inside the loop's body, and again in the backward pass: only the
    inputs, the outputs and one state a chunk lie in memory.

    Args:
        q_RTHd, k_RTHd: of any length; they are brought to unit length here, and q to d^-0.5. Key
            head h serves value heads M h to M h + M - 1.
        g_RTV: float32, at most 0; beta_RTV: float32. A slot where both are 0 changes nothing.
        state_RVde: float32, before the first slot.
        precision: of all products.

    Returns:
        o [R, T, V, e] float32 and the state after the last slot.
    """
    rows, slots, heads, width = q_RTHd.shape
    value_heads, value_width = v_RTVe.shape[2:]
    shared, count = value_heads // heads, -(-slots // CHUNK)
    matmul = functools.partial(jnp.matmul, precision=precision)

    def chunks(x_RT: Array, *tail: int) -> Array:  # [R, T, ...] -> [N, R, L, ...]
        x = x_RT.reshape(rows, slots, *tail)
        x = jnp.pad(x, ((0, 0), (0, count * CHUNK - slots)) + ((0, 0),) * len(tail))
        return x.reshape(rows, count, CHUNK, *tail).swapaxes(0, 1)

    causal_LL = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))

    def body(state_RHMde: Array, parts: tuple) -> tuple[Array, Array]:
        q, k, v, g, beta = (jnp.moveaxis(x.astype(jnp.float32), 1, -2) for x in parts)
        q, k = (unit_norm(x)[:, :, None] for x in (q, k))  # [R, H, 1, L, d]
        keys = k.swapaxes(-1, -2)
        decay = jnp.cumsum(g, -2)  # [R, H, M, L, 1], of the chunk so far
        # masked before exp: where a later slot decays much, exp would be infinite, its gradient NaN
        between = jnp.exp(jnp.where(causal_LL, decay - decay.swapaxes(-1, -2), -jnp.inf))
        lower = jnp.where(jnp.tril(causal_LL, -1), beta * between * matmul(k, keys), 0)
        kept = jnp.exp(decay)
        written = beta * (v - kept * matmul(k, state_RHMde))
        new = matmul(invert(lower, precision), written)
        q = q * width**-0.5
        out = kept * matmul(q, state_RHMde) + matmul(between * matmul(q, keys), new)
        last = decay[..., -1:, :]
        added = matmul((jnp.exp(last - decay) * k).swapaxes(-1, -2), new)
        return jnp.exp(last) * state_RHMde + added, jnp.moveaxis(out, -2, 1)

    parts = (
        chunks(q_RTHd, heads, width),
        chunks(k_RTHd, heads, width),
        chunks(v_RTVe, heads, shared, value_width),
        chunks(g_RTV, heads, shared, 1),
        chunks(beta_RTV, heads, shared, 1),
    )
    state = state_RVde.reshape(rows, heads, shared, width, value_width)
    body = jax.checkpoint(body, prevent_cse=False)
    state, out = jax.lax.scan(body, state, parts)
    out = out.swapaxes(0, 1).reshape(rows, count * CHUNK, value_heads, value_width)
    return out[:, :slots], state.reshape(state_RVde.shape)


def gated_delta_step(
    q_R1Hd: Array,
    k_R1Hd: Array,
    v_R1Ve: Array,
    g_R1V: Array,
    beta_R1V: Array,
    state_RVde: Array,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
) -> tuple[Array, Array]:
    """`gated_delta` of a single slot, as the rule is written at the top."""
    shared = v_R1Ve.shape[2] // q_R1Hd.shape[2]
    q, k = (jnp.repeat(unit_norm(x[:, 0]), shared, axis=1) for x in (q_R1Hd, k_R1Hd))
    read = functools.partial(jnp.einsum, "rvd,rvde->rve", precision=precision)
    state = state_RVde * jnp.exp(g_R1V[:, 0])[..., None, None]
    new = beta_R1V[:, 0][..., None] * (v_R1Ve[:, 0].astype(jnp.float32) - read(k, state))
    state = state + k[..., None] * new[..., None, :]
    return read(q * q.shape[-1] ** -0.5, state)[:, None], state


def convolve(window_RWc: Array, x_RTc: Array, taps_Wc: Array) -> Array:
    """silu of a causal convolution of each channel by itself; the oldest tap comes first.

    window: the W - 1 rows before x. Sums in float32, returned in x's dtype.
    """
    slots = x_RTc.shape[1]
    rows = jnp.concatenate([window_RWc, x_RTc], axis=1)
    terms = (
        rows[:, at : at + slots].astype(jnp.float32) * tap.astype(jnp.float32)
        for at, tap in enumerate(taps_Wc)
    )
    return nn.silu(sum(terms)).astype(x_RTc.dtype)


def last_rows(window_RWc: Array, x_RTc: Array, lengths_R: Array) -> Array:
    """The window behind the first `lengths_R` rows of x, which may reach into the one before."""
    rows = jnp.concatenate([window_RWc, x_RTc], axis=1)
    index = lengths_R[:, None] + jnp.arange(window_RWc.shape[1])
    return jnp.take_along_axis(rows, index[..., None], axis=1)


class DeltaMixer(nn.Module):
    """Takes attention's place in a decoder layer."""

    text: TextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x_BSD: Array, segments: tuple[Array, Array] | None, cache: DeltaCache | None
    ) -> tuple[Array, DeltaCache]:
        """(output, what each sequence remembers then).

        Args:
            x_BSD: packed slots; with a cache one slot of each sequence, [X, 1, D].
            segments: of the prompt [B, P] and of the candidates [B, K, C], 0 = padding; not read
                with a cache.
        """
        delta = self.text.delta
        linear = functools.partial(Linear, dtype=self.dtype, bias=False, narrow=True)
        mixed = linear(delta.channels, name="qkv")(x_BSD)
        z = linear(delta.value_heads * delta.value_dim, name="z")(x_BSD)
        a, b = (linear(delta.value_heads, name=name)(x_BSD) for name in ("a", "b"))
        taps_Wc = self.param("conv", _taps, (delta.taps, delta.channels), jnp.float32)
        log_rate_V = self.param("A_log", _log_rates, (delta.value_heads,), jnp.float32)
        bias_V = self.param("dt_bias", _step_biases, (delta.value_heads,), jnp.float32)
        rate_V = jnp.exp(log_rate_V.astype(jnp.float32))
        g = -rate_V * jax.nn.softplus(a.astype(jnp.float32) + bias_V.astype(jnp.float32))
        beta = jax.nn.sigmoid(b).astype(jnp.float32)
        of_rule = precision(self.dtype) or BESIDE_BFLOAT16

        def run(rule, mixed_RTc, g_RTV, beta_RTV, before: DeltaCache) -> tuple[Array, Array]:
            rows, slots, _ = mixed_RTc.shape
            keys = delta.key_heads * delta.key_dim
            q, k, v = jnp.split(convolve(before.window, mixed_RTc, taps_Wc), [keys, 2 * keys], -1)
            q, k = (x.reshape(rows, slots, delta.key_heads, delta.key_dim) for x in (q, k))
            v = v.reshape(rows, slots, delta.value_heads, delta.value_dim)
            return rule(q, k, v, g_RTV, beta_RTV, before.state, of_rule)

        if cache is not None:
            out, state = run(gated_delta_step, mixed, g, beta, cache)
            window = jnp.concatenate([cache.window[:, 1:], mixed.astype(cache.window.dtype)], 1)
            cache = DeltaCache(window, state)
        else:
            out, cache = self._shared(run, mixed, g, beta, segments)
        out = GatedRMSNorm(self.text.eps, self.dtype, name="norm")(out, z.reshape(out.shape))
        gain = (2 * self.text.layers) ** -0.5
        out = out.reshape(*x_BSD.shape[:2], -1)
        return linear(self.text.hidden, gain=gain, name="out")(out), cache

    def _shared(self, run, mixed_BSc, g_BSV, beta_BSV, segments) -> tuple[Array, DeltaCache]:
        """The prompts, then every candidate from where its prompt ends."""
        delta = self.text.delta
        prompt_BP, own_BKC = segments
        groups, candidates, length = own_BKC.shape
        prompt, own_XC = prompt_BP.shape[1], own_BKC.reshape(-1, length)
        real_BS = jnp.concatenate([prompt_BP, own_BKC.reshape(groups, -1)], axis=1) > 0
        g_BSV, beta_BSV = (jnp.where(real_BS[..., None], x, 0) for x in (g_BSV, beta_BSV))

        def split(x_BS: Array) -> tuple[Array, Array]:
            before, own = jnp.split(x_BS, [prompt], axis=1)
            return before, own.reshape(groups * candidates, length, *own.shape[2:])

        (prompt_mixed, mixed), (prompt_g, g), (prompt_beta, beta) = map(
            split, (mixed_BSc, g_BSV, beta_BSV)
        )
        state_shape = (groups, delta.value_heads, delta.key_dim, delta.value_dim)
        window = jnp.zeros((groups, delta.taps - 1, delta.channels), mixed.dtype)
        before = DeltaCache(window, jnp.zeros(state_shape, jnp.float32))
        outs = []
        if prompt:
            out, state = run(gated_delta, prompt_mixed, prompt_g, prompt_beta, before)
            window = last_rows(window, prompt_mixed, jnp.sum(prompt_BP > 0, axis=1))
            before = DeltaCache(window, state)
            outs = [out]
        before = DeltaCache(*(jnp.repeat(x, candidates, axis=0) for x in before))
        out, state = run(gated_delta, mixed, g, beta, before)
        window = last_rows(before.window, mixed, jnp.sum(own_XC > 0, axis=1))
        outs.append(out.reshape(groups, candidates * length, *out.shape[2:]))
        return jnp.concatenate(outs, axis=1), DeltaCache(window, state)


def _taps(key: Array, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    return jax.random.normal(key, shape, dtype) * shape[0] ** -0.5


def _log_rates(key: Array, shape: tuple[int], dtype: jnp.dtype) -> Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def _step_biases(key: Array, shape: tuple[int], dtype: jnp.dtype) -> Array:
    """Their softplus lies between 0.001 and 0.1, evenly in its logarithm, as in Mamba-2 (Dao and
    Gu, 2024): a state that forgot within a token would leave a head nothing but a sign."""
    steps = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return steps + jnp.log(-jnp.expm1(-steps))
