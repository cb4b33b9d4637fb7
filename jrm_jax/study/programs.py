"""What the study computes of a trained model, jitted by the caller. Pure: jax only.

Letters: B groups, K candidates, I image rows of a group, N patch slots, F features of a patch, D
hidden width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jrm_jax.heads import apply_reward_head, gather_hidden
from jrm_jax.model.backbone import Backbone, normalise_patches


def make_probe(
    backbone: Backbone, mean: tuple, std: tuple
) -> Callable[[dict, dict, jax.Array], tuple[jax.Array, jax.Array]]:
    """probe(params, batch, pixels_BINF) -> (reward_BK, state_BKD), float32.

    `pixels` 0..255 stand in for the batch's patches. The state is what the reward head reads.
    """

    def probe(params: dict, batch: dict, pixels_BINF: jax.Array):
        hidden_BSD = backbone.apply(
            {"params": params["backbone"]},
            batch,
            params["reward_embedding"],
            normalise_patches(pixels_BINF, mean, std),
        )
        prompt, slots = batch["prompt_tokens"].shape[1], batch["candidate_tokens"].shape[2]
        state_BKD = gather_hidden(hidden_BSD, batch["reward_index"][..., None], prompt, slots)
        state_BKD = state_BKD[:, :, 0].astype(jnp.float32)
        return apply_reward_head(params["reward_head"], state_BKD)[..., 0], state_BKD

    return probe


def make_attack(
    probe: Callable, radius: float, steps: int
) -> Callable[[dict, dict, jax.Array], tuple[jax.Array, jax.Array]]:
    """attack(params, batch, own_BI) -> (reward_BK before, reward_BK after).

    Every candidate's picture is changed to raise its own reward, by at most `radius` of 255 at any
    pixel, in `steps` steps along the gradient's sign (projected gradient descent: Madry et al.,
    arXiv 1706.06083). `own_BI` is 1 for the candidates' pictures, 0 for the source, which stays as
    it is. Candidates do not see each other, so one gradient of their sum serves all.
    """

    def attack(params: dict, batch: dict, own_BI: jax.Array) -> tuple[jax.Array, jax.Array]:
        clean_BINF = batch["patches"].astype(jnp.float32)

        def total(pixels_BINF):
            reward_BK, _ = probe(params, batch, pixels_BINF)
            return jnp.sum(reward_BK * batch["candidate_mask"])

        def step(_, pixels_BINF):
            ahead_BINF = jnp.sign(jax.grad(total)(pixels_BINF)) * own_BI[..., None, None]
            moved_BINF = pixels_BINF + ahead_BINF * (2.0 * radius / max(2, steps))
            low_BINF, high_BINF = clean_BINF - radius, clean_BINF + radius
            return jnp.clip(jnp.clip(moved_BINF, low_BINF, high_BINF), 0.0, 255.0)

        pushed_BINF = jax.lax.fori_loop(0, steps, step, clean_BINF)
        return probe(params, batch, clean_BINF)[0], probe(params, batch, pushed_BINF)[0]

    return attack
