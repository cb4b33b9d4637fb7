"""The functional heads: a reward for each candidate, critique tokens, and, in training alone, the
words of a critique or its facts. Pure: jax only.

Letters: B groups, K candidates, R reward dimensions, P prompt slots, C candidate slots,
S = P + K*C packed slots, T critique targets per candidate, X = K*T, D hidden width, W vocabulary
(of the reward head: the width that its last layer reads), F facts.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jrm_jax.gaussian import bounded
from jrm_jax.losses import Term
from jrm_jax.model.layers import precision

TRAINING_HEADS = ("facts_head", "words_head")  # what a trained model does without


def init_reward_head(
    key: jax.Array,
    width: int,
    dimensions: int,
    scale: float = 1.0,
    hidden: Sequence[int] = (),
    deviation: bool = False,
) -> dict:
    """{'kernel': [W, R]}, normal with deviation scale / sqrt(W); float32, as all of the head.

    hidden: widths of the layers before it, the last of which is W; none: W is D. Layer n is
        {'hidden': {'n': {'kernel', 'bias'}}}, normal with deviation sqrt(2 / input) (He et al.,
        arXiv 1502.01852). With them every layer has a bias, which begins at 0.
    deviation: rewards are Gaussians. 'deviation' holds a second {'kernel'}, of log-deviations,
        which begins at 0: at first every deviation is 1.
    """
    sizes = (width, *hidden)

    def layer(kernel: jax.Array) -> dict:
        bias = {"bias": jnp.zeros(kernel.shape[1:], jnp.float32)} if hidden else {}
        return {"kernel": kernel, **bias}

    def normal(key: jax.Array, inputs: int, outputs: int, gain: float) -> jax.Array:
        kernel = jax.random.normal(key, (inputs, outputs), jnp.float32)
        return kernel * (gain / jnp.sqrt(jnp.float32(inputs)))

    layers = {
        str(n): layer(normal(jax.random.fold_in(key, n), *sizes[n : n + 2], math.sqrt(2.0)))
        for n in range(len(hidden))
    }
    last = sizes[-1], dimensions
    return {
        **({"hidden": layers} if hidden else {}),
        **layer(normal(key, *last, scale)),
        **({"deviation": layer(jnp.zeros(last, jnp.float32))} if deviation else {}),
    }


def apply_reward_head(params: dict, hidden_BKD: jax.Array) -> jax.Array:
    """[B, K, R] float32, from the final-normed state of the reward token: one bias-free linear, or
    that after hidden layers with ReLU."""
    return _linear(params, _features(params, hidden_BKD))


def apply_deviation_head(params: dict, hidden_BKD: jax.Array) -> jax.Array | None:
    """[B, K, R] float32: the rewards' log-deviations; None where rewards are plain numbers."""
    if "deviation" not in params:
        return None
    return bounded(_linear(params["deviation"], _features(params, hidden_BKD)))


def _features(params: dict, hidden_BKD: jax.Array) -> jax.Array:
    features_BKW = hidden_BKD.astype(jnp.float32)
    for n in range(len(params.get("hidden", ()))):
        features_BKW = jax.nn.relu(_linear(params["hidden"][str(n)], features_BKW))
    return features_BKW


def _linear(params: dict, features_BKW: jax.Array) -> jax.Array:
    kernel = params["kernel"].astype(jnp.float32)
    product = jnp.dot(features_BKW, kernel, precision=precision(kernel.dtype))
    return product + params["bias"] if "bias" in params else product


def init_facts_head(width: int, facts: int) -> dict:
    """{'kernel': [D, F], 'bias': [F]}, float32: every fact begins unlikely (one in fifty)."""
    return {
        "kernel": jnp.zeros((width, facts), jnp.float32),
        "bias": jnp.full((facts,), -3.9, jnp.float32),
    }


def init_training_heads(width: int, facts: int, words: bool) -> dict:
    """Those of TRAINING_HEADS that a run's losses have."""
    return ({"facts_head": init_facts_head(width, facts)} if facts else {}) | (
        {"words_head": init_words_head(width)} if words else {}
    )


def apply_facts_head(params: dict, hidden_BKD: jax.Array) -> jax.Array:
    """[B, K, F] float32: a logit per fact, from the final-normed state of the reward token."""
    logits_BKF = _logits(hidden_BKD, params["kernel"].astype(hidden_BKD.dtype))
    return logits_BKF + params["bias"].astype(jnp.float32)


def init_words_head(width: int) -> dict:
    """{'kernel': [D, D] float32}, the identity: at first the language head reads the bare state."""
    return {"kernel": jnp.eye(width, dtype=jnp.float32)}


def gather_hidden(
    hidden_BSD: jax.Array, index_BKT: jax.Array, prompt: int, slots: int
) -> jax.Array:
    """[B, K, T, D]: the states at slots `index` (0..C-1) of each candidate in the packed axis."""
    groups, candidates, count = index_BKT.shape
    start_K = prompt + slots * jnp.arange(candidates)
    flat_BX = (index_BKT + start_K[None, :, None]).reshape(groups, candidates * count)
    picked_BXD = jnp.take_along_axis(hidden_BSD, flat_BX[:, :, None], axis=1)
    return picked_BXD.reshape(groups, candidates, count, hidden_BSD.shape[-1])


def language_kernel(params: dict) -> jax.Array:
    """[D, vocab]: the untied head's kernel, or the transposed embedding table."""
    if "kernel" in params["language_head"]:
        return params["language_head"]["kernel"]
    return params["backbone"]["embed"]["embedding"].T


def _logits(hidden_BXD: jax.Array, kernel_DW: jax.Array) -> jax.Array:
    exact = precision(hidden_BXD.dtype)
    return jnp.dot(hidden_BXD, kernel_DW, precision=exact, preferred_element_type=jnp.float32)


_half_logits = jax.custom_vjp(_logits)


def _half_logits_backward(saved, grad_BXW: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Products in the dtype of what was multiplied. JAX's own rule keeps the logits' float32 and
    makes the kernel's gradient in it, too: gigabytes for a vocabulary of 152k."""
    hidden_BXD, kernel_DW = saved
    grad_BXW = grad_BXW.astype(hidden_BXD.dtype)
    rows = tuple(range(hidden_BXD.ndim - 1))
    kernel_grad_DW = jax.lax.dot_general(hidden_BXD, grad_BXW, ((rows, rows), ((), ())))
    return grad_BXW @ kernel_DW.T, kernel_grad_DW


_half_logits.defvjp(lambda hidden, kernel: (_logits(hidden, kernel), (hidden, kernel)),
                    _half_logits_backward)  # fmt: skip


def _word_logits(kernel_DW: jax.Array, hidden_BXD: jax.Array, suppressed_id: int) -> jax.Array:
    """[B, X, W] float32, minus infinity at `suppressed_id`."""
    multiply = _logits if hidden_BXD.dtype == jnp.float32 else _half_logits
    logits_BXW = multiply(hidden_BXD, kernel_DW.astype(hidden_BXD.dtype))
    return jnp.where(jnp.arange(logits_BXW.shape[-1]) == suppressed_id, -jnp.inf, logits_BXW)


def critique_nll(
    kernel_DW: jax.Array,
    hidden_BXD: jax.Array,
    targets_BX: jax.Array,
    weights_BX: jax.Array,
    suppressed_id: int,
    chunk: int = 0,
) -> Term:
    """Weighted cross-entropy in float32, `chunk` positions of every group at a time (0: all).

    With chunks at most [B, chunk, vocab] logits ever exist, and each is made once: see
    `_chunked_nll`. Chunks run along X and leave B alone, which is the sharded axis. The logit of
    `suppressed_id` (the reward token) is minus infinity.
    """
    weight, positions = jnp.sum(weights_BX), targets_BX.shape[1]
    if chunk > 0:
        arrays = (kernel_DW, hidden_BXD, targets_BX, weights_BX)
        return Term(_chunked_nll(suppressed_id, min(chunk, positions), *arrays), weight)
    logits_BXW = _word_logits(kernel_DW, hidden_BXD, suppressed_id)
    picked_BX = jnp.take_along_axis(logits_BXW, targets_BX[..., None], axis=-1)[..., 0]
    nll_BX = jax.nn.logsumexp(logits_BXW, axis=-1) - picked_BX
    return Term(jnp.sum(jnp.where(weights_BX > 0, nll_BX, 0.0) * weights_BX), weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_nll(suppressed_id, chunk, kernel_DW, hidden_BXD, targets_BX, weights_BX) -> jax.Array:
    parts = _split(chunk, hidden_BXD, targets_BX, weights_BX)
    kernel_DW = kernel_DW.astype(hidden_BXD.dtype)

    def add(total, part):
        return total + _chunk(suppressed_id, kernel_DW, *part)[0], None

    return jax.lax.scan(add, jnp.float32(0.0), parts)[0]


def _chunked_forward(suppressed_id, chunk, kernel_DW, hidden_BXD, targets_BX, weights_BX):
    """The gradients are made along with the loss, which they only have to be scaled for: the sum of
    the cross-entropies is what the losses use, times a number. So the logits of a chunk, and all
    that is computed from them, are read once."""
    learns, hidden_BXD, kernel_DW = kernel_DW.perturbed, hidden_BXD.value, kernel_DW.value
    parts = _split(chunk, hidden_BXD, targets_BX.value, weights_BX.value)
    half_DW, exact = kernel_DW.astype(hidden_BXD.dtype), precision(hidden_BXD.dtype)
    vocab = kernel_DW.shape[1]

    def add(carry, part):
        total, kernel_grad_DW = carry
        hidden_BXD, targets_BX, weights_BX = part
        loss, raw_BXW, logsum_BX = _chunk(suppressed_id, half_DW, *part)
        word = jnp.arange(vocab)
        chance_BXW = jnp.where(word == suppressed_id, 0.0, jnp.exp(raw_BXW - logsum_BX[..., None]))
        slope_BXW = (chance_BXW - (word == targets_BX[..., None])) * weights_BX[..., None]
        slope_BXW = slope_BXW.astype(hidden_BXD.dtype)
        if learns:
            rows = (0, 1)  # where B is sharded, this is summed over devices: in half the bytes
            kernel_grad_DW += jax.lax.dot_general(
                hidden_BXD, slope_BXW, ((rows, rows), ((), ())), precision=exact
            )
        hidden_grad_BXD = jnp.matmul(slope_BXW, half_DW.T, precision=exact)
        return (total + loss, kernel_grad_DW), hidden_grad_BXD

    start = jnp.zeros(kernel_DW.shape if learns else (), jnp.float32)
    (total, kernel_grad_DW), hidden_grads = jax.lax.scan(add, (jnp.float32(0.0), start), parts)
    hidden_grad_BXD = jnp.moveaxis(hidden_grads, 0, 1).reshape(hidden_BXD.shape[0], -1,
                                                               hidden_BXD.shape[2])  # fmt: skip
    hidden_grad_BXD = hidden_grad_BXD[:, : hidden_BXD.shape[1]]
    kernel_grad_DW = kernel_grad_DW.astype(kernel_DW.dtype) if learns else None
    return total, (kernel_grad_DW, hidden_grad_BXD)


def _chunked_backward(suppressed_id, chunk, saved, grad):
    kernel_grad_DW, hidden_grad_BXD = saved
    if kernel_grad_DW is not None:
        kernel_grad_DW = (kernel_grad_DW * grad).astype(kernel_grad_DW.dtype)
    # the number itself would be rounded, and every gradient with it, if this were not in float32
    scaled_BXD = hidden_grad_BXD.astype(jnp.float32) * grad
    return kernel_grad_DW, scaled_BXD.astype(hidden_grad_BXD.dtype), None, None


_chunked_nll.defvjp(_chunked_forward, _chunked_backward, symbolic_zeros=True)


def _chunk(suppressed_id, kernel_DW, hidden_BXD, targets_BX, weights_BX):
    """(sum of the cross-entropies, logits with the suppressed one, log-sum-exp without it)."""
    raw_BXW = _logits(hidden_BXD, kernel_DW)
    suppressed_W = jnp.arange(raw_BXW.shape[-1]) == suppressed_id
    # hidden twice, not once: a compiler would write the array of hidden logits down
    largest_BX = jnp.max(jnp.where(suppressed_W, -jnp.inf, raw_BXW), axis=-1)
    total_BX = jnp.sum(jnp.where(suppressed_W, 0.0, jnp.exp(raw_BXW - largest_BX[..., None])), -1)
    logsum_BX = largest_BX + jnp.log(total_BX)
    picked_BX = jnp.take_along_axis(raw_BXW, targets_BX[..., None], axis=-1)[..., 0]
    picked_BX = jnp.where(targets_BX == suppressed_id, -jnp.inf, picked_BX)
    nll_BX = jnp.where(weights_BX > 0, logsum_BX - picked_BX, 0.0)
    return jnp.sum(nll_BX * weights_BX), raw_BXW, logsum_BX


def _split(chunk: int, *arrays_BX: jax.Array) -> tuple[jax.Array, ...]:
    """Each [chunks, B, chunk, ...], the last one filled up with zeros."""

    def split(array_BX):
        groups, positions = array_BX.shape[:2]
        padding = ((0, 0), (0, -positions % chunk)) + ((0, 0),) * (array_BX.ndim - 2)
        parts = jnp.pad(array_BX, padding).reshape(groups, -1, chunk, *array_BX.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    return tuple(split(array_BX) for array_BX in arrays_BX)


def words_nll(
    params: dict,
    hidden_BKD: jax.Array,
    kernel_DW: jax.Array,
    targets_BKT: jax.Array,
    weights_BKT: jax.Array,
    suppressed_id: int,
) -> Term:
    """Weighted cross-entropy of all tokens of a critique, each predicted by the state of the reward
    token alone: a bag of words, through a map of its own and the language head. float32.

    A decoder that sees everything else has no need of one state; this loss asks that state itself
    for what the critique says (Zhao et al., arXiv 1703.10960, for latent variables of dialogue).
    """
    kernel_DD = params["kernel"].astype(hidden_BKD.dtype)
    mapped_BKD = jnp.matmul(hidden_BKD, kernel_DD, precision=precision(kernel_DD.dtype))
    logits_BKW = _word_logits(kernel_DW, mapped_BKD, suppressed_id)
    picked_BKT = jnp.take_along_axis(logits_BKW, targets_BKT, axis=-1)
    nll_BKT = jax.nn.logsumexp(logits_BKW, axis=-1)[..., None] - picked_BKT
    nll_BKT = jnp.where(weights_BKT > 0, nll_BKT, 0.0)
    return Term(jnp.sum(nll_BKT * weights_BKT), jnp.sum(weights_BKT))
