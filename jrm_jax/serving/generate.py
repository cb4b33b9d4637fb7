"""Critiques from the language head, token by token with a key/value cache. Pure: jax only.

Letters: B groups, K candidates, X = B * K sequences, C candidate slots, T new tokens, W vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jrm_jax.heads import gather_hidden, language_kernel
from jrm_jax.model.backbone import Backbone, normalise_patches
from jrm_jax.model.layers import precision


def make_generate(
    backbone: Backbone, mean: tuple, std: tuple, max_tokens: int, sample: bool, end_id: int
) -> Callable[[dict, dict, jax.Array, jax.Array], jax.Array]:
    """generate(params, batch, key, temperature) -> int32 [B, K, T], `end_id` from the end on.

    The batch holds no critiques. `sample` False takes the likeliest token and ignores key and
    temperature. The first token is predicted at the reward token, as in training.
    """

    def generate(params: dict, batch: dict, key: jax.Array, temperature: jax.Array) -> jax.Array:
        groups, candidates, length = batch["candidate_tokens"].shape
        prompt, count = batch["prompt_tokens"].shape[1], groups * candidates
        kernel_DW = language_kernel(params)

        def choose(hidden_XD: jax.Array, key: jax.Array) -> jax.Array:
            logits_XW = jnp.dot(
                hidden_XD, kernel_DW.astype(hidden_XD.dtype),
                precision=precision(hidden_XD.dtype), preferred_element_type=jnp.float32,
            )  # fmt: skip
            reward = jnp.arange(logits_XW.shape[-1]) == backbone.reward_token_id
            logits_XW = jnp.where(reward, -jnp.inf, logits_XW)
            if sample:
                return jax.random.categorical(key, logits_XW / temperature).astype(jnp.int32)
            return jnp.argmax(logits_XW, axis=-1).astype(jnp.int32)

        patches_BINF = normalise_patches(batch["patches"], mean, std)
        variables = {"params": params["backbone"]}
        hidden_BSD, cache = backbone.apply(
            variables, batch, params["reward_embedding"], patches_BINF, max_tokens, method="prefill"
        )
        at_reward = gather_hidden(
            hidden_BSD, batch["reward_index"][:, :, None], prompt, length
        ).reshape(count, -1)
        present_X = batch["candidate_mask"].reshape(count) > 0
        first_X = jnp.where(present_X, choose(at_reward, jax.random.fold_in(key, 0)), end_id)
        last_X = jnp.take_along_axis(
            batch["candidate_positions"][:, :, 0], batch["reward_index"][..., None], axis=2
        ).reshape(count)
        own = batch["candidate_segments"].reshape(count, length)
        if backbone.through_reward:
            own = own * (jnp.arange(length) >= batch["reward_index"].reshape(count, 1))
        filled = jnp.arange(length + max_tokens)

        def going(carry):
            step, _, tokens_XT, _ = carry
            ended_X = jnp.any(tokens_XT == end_id, axis=1)
            return (step < max_tokens) & ~jnp.all(ended_X)

        def advance(carry):
            step, token_X, tokens_XT, cache = carry
            slot = length + step - 1
            segments = jnp.where(
                filled < length,
                jnp.pad(own, ((0, 0), (0, max_tokens))),
                (filled <= slot).astype(jnp.int32),
            )
            hidden_X1D, cache = backbone.apply(
                variables,
                token_X[:, None],
                (last_X + step)[:, None],
                slot,
                batch["prompt_segments"],
                segments,
                cache,
                method="decode",
            )
            token_X = choose(hidden_X1D[:, 0], jax.random.fold_in(key, step))
            ended_X = jnp.any((tokens_XT == end_id) & (jnp.arange(max_tokens) < step), axis=1)
            token_X = jnp.where(ended_X, end_id, token_X)
            return step + 1, token_X, tokens_XT.at[:, step].set(token_X), cache

        # -1 is no token: what has not been written has not ended
        tokens_XT = jnp.full((count, max_tokens), -1, jnp.int32).at[:, 0].set(first_X)
        start = (jnp.int32(1), first_X, tokens_XT, cache)
        _, _, tokens_XT, _ = jax.lax.while_loop(going, advance, start)
        tokens_XT = jnp.where(tokens_XT < 0, end_id, tokens_XT)
        return tokens_XT.reshape(groups, candidates, max_tokens)

    return generate
