"""One training step and one evaluation step: pure functions, jitted by the caller.

Letters: B groups, K candidates, R reward dimensions, P prompt slots, C candidate slots,
S = P + K*C packed slots, T critique targets per candidate, D hidden width.

Order of a step: normalise pixels, backbone, both heads, terms, one division by the global
weights, gradients, optimizer. With `accumulation` microbatches the weights still come from the
whole batch, so the sum of the microbatches' gradients is the gradient of the whole batch. The
evaluation takes the same microbatches, so that it fits where training does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jrm_jax.heads import (
    apply_deviation_head,
    apply_facts_head,
    apply_reward_head,
    critique_nll,
    gather_hidden,
    language_kernel,
    words_nll,
)
from jrm_jax.lora import scale_adapters
from jrm_jax.losses import (
    Term,
    centering_loss,
    combine,
    facts_loss,
    pair_counts,
    preference_loss,
    ranked_candidates,
    teacher_preferences,
    term_weights,
)
from jrm_jax.model.backbone import Backbone, cast_projections, normalise_patches
from jrm_jax.optim import merge_params


class TrainState(NamedTuple):
    """step int32 []; trainable float32; frozen (no gradient, no moments); optax state."""

    step: jax.Array
    trainable: dict
    frozen: dict
    opt_state: optax.OptState


class LossConfig(NamedTuple):
    """Coefficients and options of the losses. A coefficient of 0 leaves its path untraced.

    `first_weight`: weight of a critique's first token, the one that the reward token predicts, in
    training; the others have 1. `language_end`: what the language weight is multiplied by at the
    end of training; it goes there from 1 in a straight line. `gaussian`: see
    `preference_loss`.
    """

    preference_weight: float = 1.0
    language_weight: float = 1.0
    margin: float = 0.0
    centering_weight: float = 0.0
    chunk: int = 0
    first_weight: float = 1.0
    facts_weight: float = 0.0
    language_end: float = 1.0
    words_weight: float = 0.0
    teacher_weight: float = 0.0
    gaussian: str = "off"


class Outputs(NamedTuple):
    """reward_BKR float32, or None for a generative run; terms by name; log_deviation_BKR float32 of
    rewards that are Gaussians, else None."""

    reward_BKR: jax.Array | None
    terms: dict[str, Term]
    log_deviation_BKR: jax.Array | None = None


Forward = Callable[[dict, dict], Outputs]


def make_forward(
    backbone: Backbone, mean: tuple, std: tuple, loss: LossConfig, lora_scale: float | None = None
) -> Forward:
    """forward(params, batch) -> Outputs. `lora_scale`: of the adapters in `params`, if any."""

    def forward(params: dict, batch: dict) -> Outputs:
        if lora_scale is not None:
            params = scale_adapters(params, lora_scale)
        patches_BINF = normalise_patches(batch["patches"], mean, std)
        own = cast_projections(params["backbone"], backbone.dtype)
        hidden_BSD = backbone.apply(
            {"params": own}, batch, params["reward_embedding"], patches_BINF
        )
        prompt, slots = batch["prompt_tokens"].shape[1], batch["candidate_tokens"].shape[2]
        terms, reward_BKR, log_deviation_BKR = {}, None, None
        if loss.preference_weight:
            index_BK1 = batch["reward_index"][:, :, None]
            hidden_BKD = gather_hidden(hidden_BSD, index_BK1, prompt, slots)[:, :, 0]
            reward_BKR = apply_reward_head(params["reward_head"], hidden_BKD)
            log_deviation_BKR = apply_deviation_head(params["reward_head"], hidden_BKD)
            spread = {"log_deviation_BKR": log_deviation_BKR, "gaussian": loss.gaussian}
            terms["preference"] = preference_loss(
                reward_BKR, batch["preference"], batch["preference_weight"], loss.margin, **spread
            )
            if loss.centering_weight:
                terms["centering"] = centering_loss(reward_BKR, ranked_candidates(batch))
            if loss.teacher_weight:
                soft = teacher_preferences(batch["teacher_scores"], batch["teacher_mask"])
                terms["teacher"] = preference_loss(reward_BKR, *soft, **spread)
            if loss.facts_weight:
                logits_BKF = apply_facts_head(params["facts_head"], hidden_BKD)
                terms["facts"] = facts_loss(logits_BKF, batch["facts"], batch["candidate_mask"])
            if loss.words_weight and batch["critique_targets"].shape[-1]:
                terms["words"] = words_nll(
                    params["words_head"], hidden_BKD, language_kernel(params),
                    batch["critique_targets"], batch["critique_weights"],
                    backbone.reward_token_id,
                )  # fmt: skip
        if loss.language_weight and batch["critique_targets"].shape[-1]:
            hidden_BKTD = gather_hidden(hidden_BSD, batch["critique_index"], prompt, slots)
            groups, width = hidden_BKTD.shape[0], hidden_BKTD.shape[-1]
            terms["language"] = critique_nll(
                language_kernel(params),
                hidden_BKTD.reshape(groups, -1, width),
                batch["critique_targets"].reshape(groups, -1),
                batch["critique_weights"].reshape(groups, -1),
                backbone.reward_token_id,
                loss.chunk,
            )
        return Outputs(reward_BKR, terms, log_deviation_BKR)

    return forward


def _measure(outputs: Outputs, batch: dict) -> dict[str, Term]:
    """Terms plus pair accuracy and the moments of the rewards, all as (sum, weight)."""
    measured = dict(outputs.terms)
    if outputs.reward_BKR is not None:
        counts = pair_counts(outputs.reward_BKR, batch["preference"], batch["preference_weight"])
        measured["pair_accuracy"] = Term(counts.correct, counts.pairs)
        measured["ties"] = Term(counts.ties, jnp.float32(1.0))
        mask_BK1 = (batch["candidate_mask"] * (batch["example_index"] >= 0)[:, None])[..., None]
        count = jnp.sum(mask_BK1) * outputs.reward_BKR.shape[-1]
        measured["reward"] = Term(jnp.sum(outputs.reward_BKR * mask_BK1), count)
        measured["reward_square"] = Term(
            jnp.sum(jnp.square(outputs.reward_BKR) * mask_BK1), count
        )
        if outputs.log_deviation_BKR is not None:
            deviation_BKR = jnp.exp(outputs.log_deviation_BKR)
            measured["deviation"] = Term(jnp.sum(deviation_BKR * mask_BK1), count)
    return measured


def _counted(measured: dict[str, Term]) -> dict[str, Term]:
    """Sums over microbatches: ties are a count, whose weight is 1 however many there were."""
    if "ties" in measured:
        return {**measured, "ties": Term(measured["ties"].sum, jnp.float32(1.0))}
    return measured


def _in_parts(
    compute: Callable[[dict], tuple[Any, Any]], batch: dict, parts: int
) -> tuple[Any, Any]:
    """(sums, rows) of `compute(batch)`, whose rows have B first, from so many microbatches, one
    after the other."""
    if parts == 1:
        return compute(batch)
    # Strided, so that every microbatch spans all the devices the batch is sharded over.
    micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

    def add(sums: Any, part: dict) -> tuple[Any, Any]:
        new, rows = compute(part)
        return jax.tree.map(jnp.add, sums, new), rows

    shapes, _ = jax.eval_shape(compute, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, rows = jax.lax.scan(add, zeros, micro)
    return sums, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), rows)


def make_train_step(
    forward: Forward,
    optimizer: optax.GradientTransformation,
    loss: LossConfig,
    accumulation: int = 1,
    total_steps: int = 1,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """train_step(state, batch) -> (state, metrics); metrics are Terms and float32 scalars.

    `metrics['param_norm']` is the norm of the new parameters: not finite where any of them is not.
    `total_steps`: of the run, for `loss.language_end`.
    """
    fixed = {
        "preference": loss.preference_weight,
        "centering": loss.centering_weight,
        "language": loss.language_weight,
        "facts": loss.facts_weight,
        "words": loss.words_weight,
        "teacher": loss.teacher_weight,
    }

    def coefficients_at(step: jax.Array) -> dict[str, float | jax.Array]:
        if loss.language_end == 1.0:
            return fixed
        share = 1.0 + (loss.language_end - 1.0) * jnp.minimum(1.0, step / max(1, total_steps - 1))
        return {**fixed, "language": loss.language_weight * share}

    def gradients(trainable: dict, frozen: dict, batch: dict, weights: dict, coefficients: dict):
        def objective(trainable):
            outputs = forward(merge_params(trainable, frozen), batch)
            return combine(outputs.terms, coefficients, weights), _measure(outputs, batch)

        return jax.value_and_grad(objective, has_aux=True)(trainable)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        if loss.first_weight != 1.0 and batch["critique_weights"].shape[-1]:
            weights_BKT = batch["critique_weights"].at[..., 0].multiply(loss.first_weight)
            batch = {**batch, "critique_weights": weights_BKT}
        weights, coefficients = term_weights(batch), coefficients_at(state.step)
        params = (state.trainable, state.frozen)
        ((total, measured), grads), _ = _in_parts(
            lambda part: (gradients(*params, part, weights, coefficients), None),
            batch,
            accumulation,
        )
        with jax.default_matmul_precision("highest"):  # Muon's products are of float32
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            **_counted(measured),
            "loss": total,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(trainable),
        }
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics

    return train_step


def make_eval_step(
    forward: Forward, accumulation: int = 1
) -> Callable[[dict, dict, dict], tuple[dict, jax.Array | None]]:
    """eval_step(trainable, frozen, batch) -> (Terms by name, reward_BKR); filler rows count 0."""

    def eval_step(trainable: dict, frozen: dict, batch: dict):
        params = merge_params(trainable, frozen)

        def evaluate(part: dict):
            outputs = forward(params, part)
            return _measure(outputs, part), outputs.reward_BKR

        measured, reward_BKR = _in_parts(evaluate, batch, accumulation)
        return _counted(measured), reward_BKR

    return eval_step


def make_score_step(
    backbone: Backbone, mean: tuple, std: tuple
) -> Callable[[dict, dict], jax.Array]:
    """score_step(params, batch) -> reward_BKR float32, from the discriminative path alone; where
    rewards are Gaussians [B, K, 2R]: their means, then their deviations."""
    backbone = backbone.clone(through_reward=False)  # nothing stands behind the reward token
    forward = make_forward(backbone, mean, std, LossConfig(language_weight=0.0))

    def score_step(params: dict, batch: dict) -> jax.Array:
        found = forward(params, batch)
        if found.log_deviation_BKR is None:
            return found.reward_BKR
        return jnp.concatenate([found.reward_BKR, jnp.exp(found.log_deviation_BKR)], axis=-1)

    return score_step


def make_state_step(
    backbone: Backbone, mean: tuple, std: tuple
) -> Callable[[dict, dict], jax.Array]:
    """state_step(params, batch) -> [B, K, D] float32: final-normed states of the reward tokens."""

    backbone = backbone.clone(through_reward=False)  # as in `make_score_step`

    def state_step(params: dict, batch: dict) -> jax.Array:
        patches_BINF = normalise_patches(batch["patches"], mean, std)
        hidden_BSD = backbone.apply(
            {"params": params["backbone"]}, batch, params["reward_embedding"], patches_BINF
        )
        prompt, slots = batch["prompt_tokens"].shape[1], batch["candidate_tokens"].shape[2]
        index_BK1 = batch["reward_index"][:, :, None]
        return gather_hidden(hidden_BSD, index_BK1, prompt, slots)[:, :, 0].astype(jnp.float32)

    return state_step
