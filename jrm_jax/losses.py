"""Losses as (sum, weight) terms on plain arrays. Pure: jax only.

Letters: B groups, K candidates, R reward dimensions.

Every loss is divided once, by its weight over the whole global batch (`term_weights`), so that
gradient accumulation, padding and unlabelled entries cannot change what is minimised.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrm_jax.gaussian import expected_softplus, gap_deviation, log_expected_sigmoid

# What a pair costs whose winner leads by `gap`, where rewards are Gaussians and `deviation` is that
# of their difference; 'off': they are numbers
GAUSSIAN = {
    "off": lambda gap, deviation: jax.nn.softplus(-gap),
    "log_of_mean": lambda gap, deviation: -log_expected_sigmoid(gap, deviation),
    "mean_of_log": lambda gap, deviation: expected_softplus(-gap, deviation),
}


class Term(NamedTuple):
    """One loss before its division: both float32 scalars; the mean is sum / weight."""

    sum: jax.Array
    weight: jax.Array


class PairCounts(NamedTuple):
    """Float32 scalars. Human ties stand outside `pairs`; equal predictions count one half."""

    correct: jax.Array
    pairs: jax.Array
    ties: jax.Array


def _upper(weight_BKKR: jax.Array) -> jax.Array:
    """Each pair once: the weights where i < j, zero elsewhere."""
    candidates = weight_BKKR.shape[1]
    return weight_BKKR * jnp.triu(jnp.ones((candidates, candidates)), 1)[None, :, :, None]


def preference_loss(
    reward_BKR: jax.Array,
    preference_BKKR: jax.Array,
    weight_BKKR: jax.Array,
    margin: float = 0.0,
    log_deviation_BKR: jax.Array | None = None,
    gaussian: str = "off",
) -> Term:
    """Bradley-Terry negative log-likelihood over all labelled pairs i < j.

    `preference[i, j]` is the share of votes for i, from 0 to 1 (a tie is half a vote each way):
    cross-entropy with a soft target, which is least where sigmoid(gap) is the share. It is linear
    in the share, so votes that differ cost what their share costs with the sum of their weights.
    A margin is asked of decided pairs only; it fades to zero for a tie.
    Source: Bradley and Terry (1952), Biometrika 39; the margin as in Llama 2 (arXiv 2307.09288).

    Args:
        log_deviation_BKR: of rewards that are Gaussians, with `gaussian` one of GAUSSIAN:
            'log_of_mean', -log of the expected sigmoid of the difference (Joint Reward Modeling,
            arXiv 2602.07533); 'mean_of_log', the expected -log sigmoid (EditReward's code), which
            never falls as a deviation grows. Both are the plain loss at a deviation of 0.
    """
    cost = GAUSSIAN[gaussian]
    deviation_BKKR = None
    if log_deviation_BKR is not None:
        deviation_BKKR = gap_deviation(
            log_deviation_BKR[:, :, None, :], log_deviation_BKR[:, None, :, :]
        )
    gap_BKKR = reward_BKR[:, :, None, :] - reward_BKR[:, None, :, :]
    wanted_BKKR = margin * jnp.abs(2.0 * preference_BKKR - 1.0)
    nll_BKKR = preference_BKKR * cost(gap_BKKR - wanted_BKKR, deviation_BKKR) + (
        1.0 - preference_BKKR
    ) * cost(-gap_BKKR - wanted_BKKR, deviation_BKKR)
    weight_BKKR = _upper(weight_BKKR)
    return Term(jnp.sum(nll_BKKR * weight_BKKR), jnp.sum(weight_BKKR))


def centering_loss(reward_BKR: jax.Array, mask_BK: jax.Array) -> Term:
    """Mean squared reward of the candidates of the mask: pulls the free offset of the scale to
    zero."""
    square_BK = jnp.mean(jnp.square(reward_BKR), axis=-1)
    return Term(jnp.sum(square_BK * mask_BK), jnp.sum(mask_BK))


def teacher_preferences(
    nats_BKR: jax.Array, mask_BKR: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What a teacher's scores say about pairs: (preference, weight), each [B, K, K, R] float32.

    The share for i over j is sigmoid(score_i - score_j), so that a reward trained on it tends to
    the score, up to an offset for each group. Weight 1 where both have a score.
    """
    gap_BKKR = nats_BKR[:, :, None, :] - nats_BKR[:, None, :, :]
    weight_BKKR = mask_BKR[:, :, None, :] * mask_BKR[:, None, :, :]
    return jax.nn.sigmoid(gap_BKKR), weight_BKKR


def facts_loss(logits_BKF: jax.Array, facts_BKF: jax.Array, mask_BK: jax.Array) -> Term:
    """Logistic loss of every fact, stated or not, of the candidates present of whom any is stated;
    divided by the number of facts stated, as a critique's loss is by its tokens."""
    nll_BKF = jax.nn.softplus(logits_BKF) - facts_BKF * logits_BKF
    told_BK = mask_BK * jnp.max(facts_BKF, axis=-1)  # without a critique there are no facts
    return Term(jnp.sum(nll_BKF * told_BK[..., None]), jnp.sum(facts_BKF))


def pair_counts(
    reward_BKR: jax.Array, preference_BKKR: jax.Array, weight_BKKR: jax.Array
) -> PairCounts:
    """How many labelled pairs (per reward dimension) the rewards order as people did."""
    labelled_BKKR = _upper((weight_BKKR > 0).astype(jnp.float32))
    sign_BKKR = jnp.sign(2.0 * preference_BKKR - 1.0)
    decided_BKKR = labelled_BKKR * jnp.abs(sign_BKKR)
    guess_BKKR = jnp.sign(reward_BKR[:, :, None, :] - reward_BKR[:, None, :, :])
    correct_BKKR = 0.5 * (1.0 + guess_BKKR * sign_BKKR)
    pairs = jnp.sum(decided_BKKR)
    return PairCounts(jnp.sum(correct_BKKR * decided_BKKR), pairs, jnp.sum(labelled_BKKR) - pairs)


def ranked_candidates(batch: dict) -> jax.Array:
    """[B, K] float32: 1 = present, in a group that has a labelled pair.

    What rewards are asked of; a group with critiques alone leaves them as they are.
    """
    ranked_B = jnp.sum(batch["preference_weight"], axis=(1, 2, 3)) > 0
    return batch["candidate_mask"] * ranked_B[:, None]


def term_weights(batch: dict) -> dict[str, jax.Array]:
    """The global weight of every term, from the batch alone, before any forward pass."""
    others = {"facts": jnp.sum(batch["facts"])} if "facts" in batch else {}
    if "teacher_mask" in batch:
        mask_BKR = batch["teacher_mask"]
        weight_BKKR = mask_BKR[:, :, None, :] * mask_BKR[:, None, :, :]
        others["teacher"] = jnp.sum(_upper(weight_BKKR))
    return others | {
        "preference": jnp.sum(_upper(batch["preference_weight"])),
        "centering": jnp.sum(ranked_candidates(batch)),
        "language": jnp.sum(batch["critique_weights"]),
        "words": jnp.sum(batch["critique_weights"]),
    }


def combine(
    terms: dict[str, Term], coefficients: dict[str, float], weights: dict[str, jax.Array]
) -> jax.Array:
    """Sum of coefficient * sum / global weight; a term of weight zero adds nothing at all."""
    total = jnp.float32(0.0)
    for name, term in terms.items():
        weight = weights[name]
        # The divisor is replaced before dividing, so that the gradient is zero and not NaN.
        share = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
        total = total + coefficients[name] * term.sum * share
    return total
