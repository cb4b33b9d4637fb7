"""Group-relative policy optimisation (Shao et al., arXiv 2402.03300) of edit programs. Pure: jax.

Each problem is edited K times; what counts is how much better an edit is scored than the others of
its problem. The ratio of probabilities is of the whole program and exact, so it is 1 at the first
update, and its expectation under the old policy is 1 at every update.

Letters: G problems, K programs of each, N = G * K; others as in `policy.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jrm_jax.rl import policy
from jrm_jax.rl.editing import Features, Program

FLAT = 1e-6  # a group whose rewards spread less says nothing


class Settings(NamedTuple):
    """clip: of the ratio, either way. kl_weight: of the divergence from the base, nats. updates:
    of one set of programs. scale: 'group' or 'batch', whose spread the advantages are divided by.
    """

    clip: float
    kl_weight: float
    updates: int
    scale: str


def make_optimizer(
    rate: float, clip_norm: float, momentum: float = 0.9, slower: float = 0.0
) -> optax.GradientTransformation:
    """Adam of clipped gradients.

    Args:
        momentum: how much of the mean gradient is kept in an update.
        slower: updates after which the rate is half of the first (0: it stays); it falls as 1 / (1
            + updates / slower), so that a run need not know how long it will become.
    """
    falling = (lambda count: rate / (1 + count / slower)) if slower else rate
    adam = optax.adam(falling, b1=momentum)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adam)


def advantages(reward_GK: jax.Array, scale: str) -> jax.Array:
    """Rewards less their group's mean, over a spread; zero in groups without one."""
    centred_GK = reward_GK - reward_GK.mean(1, keepdims=True)
    spread_G1 = jnp.sqrt(jnp.square(centred_GK).mean(1, keepdims=True))
    whole = jnp.sqrt(jnp.square(centred_GK).mean())
    by = {"group": spread_G1, "batch": whole}[scale]
    # the rounded mean of equal numbers may be another one
    equal_G1 = (reward_GK == reward_GK[:, :1]).all(1, keepdims=True)
    return jnp.where((spread_G1 > FLAT) & ~equal_G1, centred_GK / jnp.maximum(by, FLAT), 0.0)


def repeated(choice: policy.Choice, count: int) -> policy.Choice:
    """Each problem's distribution `count` times in a row: [G, ...] -> [N, ...]."""
    return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), choice)


def draw(params: dict, inputs: Features, key: jax.Array, count: int) -> tuple[Program, jax.Array]:
    """(`count` programs of each problem [N, ...], their log-probabilities [N])."""
    choice = repeated(policy.apply(params, inputs), count)
    program = policy.sample(choice, key)
    return program, policy.log_prob(choice, program)


def make_loss(settings: Settings) -> Callable:
    """loss(params, old, base, inputs, program, advantage_N) -> (loss, measures).

    old: parameters of the policy that drew the programs. All three policies go through one batched
    program, so that equal ones give equal bits: a ratio of exactly 1, a divergence of exactly 0.
    """

    def loss(params, old, base, inputs, program, advantage_N):
        count = advantage_N.shape[0] // inputs.scene_NY.shape[0]
        three = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, old, base)

        def one(params):
            choice = policy.apply(params, inputs)
            return choice, policy.log_prob(repeated(choice, count), program)

        choices, (now_N, before_N, _) = jax.vmap(one)(three)
        now, _, start = (jax.tree.map(lambda x, i=i: x[i], choices) for i in range(3))
        ratio_N = jnp.exp(now_N - before_N)
        near_N = jnp.clip(ratio_N, 1 - settings.clip, 1 + settings.clip)
        gain_N = jnp.minimum(ratio_N * advantage_N, near_N * advantage_N)
        kl_G = policy.divergence(now, start)
        total = -gain_N.mean() + settings.kl_weight * kl_G.mean()
        return total, {
            "kl": kl_G.mean(),
            "ratio_off": jnp.abs(ratio_N - 1).max(),
            "clipped": jnp.mean(jnp.abs(ratio_N - 1) > settings.clip),
        }

    return loss


def make_update(optimizer: optax.GradientTransformation, settings: Settings) -> Callable:
    """update(params, opt_state, base, inputs, program, reward_GK) ->
    (params, opt_state, measures [updates] each). `params` drew the programs."""
    loss = make_loss(settings)

    def update(params, opt_state, base, inputs, program, reward_GK):
        advantage_N = advantages(reward_GK, settings.scale).reshape(-1)
        old = params

        def once(carry, _):
            params, opt_state = carry
            (_, measures), grads = jax.value_and_grad(loss, has_aux=True)(
                params, old, base, inputs, program, advantage_N
            )
            changes, opt_state = optimizer.update(grads, opt_state, params)
            measures["grad_norm"] = optax.tree.norm(grads)
            return (optax.apply_updates(params, changes), opt_state), measures

        carry, measures = jax.lax.scan(once, (params, opt_state), None, settings.updates)
        return *carry, measures

    return update


def describe(params: dict, base: dict, inputs: Features) -> dict[str, Any]:
    """'kl', 'entropy_choices', 'entropy_knobs': float32 [G], nats."""
    choice = policy.apply(params, inputs)
    choices_G, knobs_G = policy.entropy(choice)
    kl_G = policy.divergence(choice, policy.apply(base, inputs))
    return {"kl": kl_G, "entropy_choices": choices_G, "entropy_knobs": knobs_G}
