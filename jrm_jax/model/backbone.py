"""Vision tower + decoder = the backbone: a batch's arrays in, final hidden states out.

Letters: B groups, K candidates, P prompt slots, C candidate slots, S = P + K*C packed slots,
I image rows per group, N patch slots, V visual tokens per image, F patch features, D width.
"""

from __future__ import annotations

import re
import threading
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jrm_jax.model.config import BackboneConfig
from jrm_jax.model.decoder import Cache, Decoder, Generated, Layout, constrain, gather_visual
from jrm_jax.model.rope import decoder_rotary
from jrm_jax.model.vision import VisionInputs, VisionOutputs, VisionTower, normalise_patches

__all__ = ["Backbone", "cast_projections", "init_backbone", "normalise_patches"]

EMBEDDING_SPREAD = 0.1
# flax makes classes while it traces, and takes fields out of the classes they derive from for a
# moment. Two threads that traced at once (programs compiled side by side, critiques beside scores)
# ended in "dictionary changed size during iteration" now and then.
_TRACING = threading.RLock()
# what `layers.Linear` multiplies with, and casts first of all
_PROJECTIONS = re.compile(r"\['(q|k|v|o|z|a|b|out|gate|up|down|qkv|proj|fc1|fc2)'\]\['kernel'\]$")


def cast_projections(params: dict, dtype: Any) -> dict:
    """The backbone's parameters with the kernels of its projections in the compute dtype.

    The layers would cast them, too, but each its own, in the forward and again in the backward
    pass, and would write every layer's gradient in float32. Cast once, before the loops over
    layers, they are read and written in half of the bytes. The numbers are the same.
    """

    def cast(path: tuple, leaf: Array) -> Array:
        found = _PROJECTIONS.search(jax.tree_util.keystr(path))
        return leaf.astype(dtype) if found else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


class Embed(nn.Module):
    """Token embedding table.

    Its width is split over `fsdp`, like the batch. The looked-up rows are pinned to that split
    first: one exchange among the devices of `fsdp` then turns it into a split of rows. Left to
    itself, the compiler copies the rows of all devices to all devices on the way back.
    """

    vocab: int
    width: int
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        init = nn.initializers.normal(EMBEDDING_SPREAD)
        table = self.param("embedding", init, (self.vocab, self.width), jnp.float32)
        # an id outside the table gives NaN, which stops the run, instead of a wrong row
        rows = jnp.take(table, tokens, axis=0, mode="fill", fill_value=jnp.nan)
        if self.mesh is None or self.width % self.mesh.shape["fsdp"]:
            return rows
        return constrain(rows, NamedSharding(self.mesh, PartitionSpec("data", None, "fsdp")))


class Backbone(nn.Module):
    """A Qwen2.5-VL, Qwen3-VL or Qwen3.5 model without its language head.

    Fields:
        dtype: compute dtype.
        remat: see `layers.rematerialised`.
        attention: see `attention.IMPLEMENTATIONS`.
        scan_unroll: layers per loop iteration; True unrolls every stack.
        hidden_sharding: pins the hidden state [B, S, D] between layers; its mesh also tells
            attention how rows and heads are spread.
        reward_token_id: the token whose input embedding is `reward_embedding_D`; -1 for none.
        through_reward: what stands behind the reward token sees nothing of its candidate but that
            token (and the prompt).
    """

    config: BackboneConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    scan_unroll: int | bool = 1
    hidden_sharding: NamedSharding | None = None
    reward_token_id: int = -1
    through_reward: bool = False

    @nn.nowrap
    def apply(self, *arguments: Any, **options: Any) -> Any:
        """As flax's; of several threads one at a time."""
        with _TRACING:
            return super().apply(*arguments, **options)

    def setup(self):
        config = self.config
        mesh = None if self.hidden_sharding is None else self.hidden_sharding.mesh
        shared = (self.dtype, self.remat, self.attention, self.scan_unroll)
        self.embed = Embed(config.text.vocab, config.text.hidden, mesh)
        self.vision = VisionTower(config.vision, *shared, mesh)
        self.decoder = Decoder(config.text, config.taps, *shared, self.hidden_sharding)

    def __call__(
        self, inputs: dict[str, Array], reward_embedding_D: Array, patches_BINF: Array
    ) -> Array:
        """Final-normed hidden states [B, S, D] in the compute dtype.

        Args:
            inputs: the batch's prompt_*, candidate_*, patch_*, window_* and position_* arrays;
                other keys are ignored, but for `reward_index` with `through_reward`. P may be 0.
            reward_embedding_D: input embedding of the reward token.
            patches_BINF: normalised pixels (`normalise_patches`), differentiable; I or N may be 0.
        """
        return self._forward(inputs, reward_embedding_D, patches_BINF)["hidden"]

    def intermediates(
        self, inputs: dict[str, Array], reward_embedding_D: Array, patches_BINF: Array
    ) -> dict[str, Array]:
        """The same forward pass with its inner states; call with `apply(..., method=...)`.

        Returns:
            hidden [B, S, D]; embedded [B, S, D] (input of the first layer); decoder_layers
            [L, B, S, D] (after each layer and its deepstack addition, before the final norm); with
            images also vision_blocks [depth, B*I, N, d], visual_tokens [B, I*V, D] and, for
            Qwen3-VL, deepstack [taps, B, I*V, D].
        """
        states = self._forward(inputs, reward_embedding_D, patches_BINF, "hidden")
        return {"decoder_layers" if k == "collected" else k: v for k, v in states.items()}

    def prefill(
        self, inputs: dict[str, Array], reward_embedding_D: Array, patches_BINF: Array, room: int
    ) -> tuple[Array, Cache]:
        """(hidden [B, S, D], cache of all layers with `room` slots for tokens to come)."""
        states = self._forward(inputs, reward_embedding_D, patches_BINF, "keys")
        cache = states["collected"]
        own_k, own_v = (
            jnp.pad(x_LXCGh, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0)))
            for x_LXCGh in (cache.own_k, cache.own_v)
        )
        return states["hidden"], cache._replace(own_k=own_k, own_v=own_v)

    def decode(
        self,
        tokens_X1: Array,
        positions_X1: Array,
        slot: Array,
        prompt_segments_BP: Array,
        own_segments: Array,
        cache: Cache,
    ) -> tuple[Array, Cache]:
        """(hidden [X, 1, D], cache) after one more token of each of the X = B * K sequences.

        Args:
            positions_X1: the same on all three axes, as for any text.
            slot, own_segments: see `decoder.Generated`.
        """
        hidden = self.embed(tokens_X1).astype(self.dtype)
        positions_X31 = jnp.repeat(positions_X1[:, None], 3, axis=1)
        place = Generated(
            decoder_rotary(positions_X31, self.config.text), slot, prompt_segments_BP, own_segments
        )
        hidden, cache = self.decoder(hidden, None, place, "keys", cache)
        return hidden, cache

    def _forward(self, inputs, reward_embedding_D, patches_BINF, collect=""):
        groups = inputs["candidate_tokens"].shape[0]

        def pack(name: str) -> Array:
            own = inputs[f"candidate_{name}"].reshape(groups, -1)
            return jnp.concatenate([inputs[f"prompt_{name}"], own], axis=1)

        tokens_BS, visual_BS = pack("tokens"), pack("visual")
        own_B3KC = inputs["candidate_positions"].swapaxes(1, 2).reshape(groups, 3, -1)
        positions_B3S = jnp.concatenate([inputs["prompt_positions"], own_B3KC], axis=2)

        hidden = self.embed(tokens_BS)
        hidden = constrain(hidden, self.hidden_sharding)
        if self.reward_token_id >= 0:
            is_reward = (tokens_BS == self.reward_token_id)[..., None]
            hidden = jnp.where(is_reward, reward_embedding_D.astype(hidden.dtype), hidden)
        hidden = hidden.astype(self.dtype)

        states, deepstack = {}, None
        if patches_BINF.shape[1] * patches_BINF.shape[2]:
            seen = self._see(inputs, patches_BINF, collect == "hidden")
            per_group = (groups, -1, self.config.text.hidden)
            tokens_BED = seen.tokens.reshape(per_group)
            is_visual = visual_BS[..., None] >= 0
            hidden = jnp.where(is_visual, gather_visual(tokens_BED, visual_BS), hidden)
            if seen.deepstack is not None:
                deepstack = seen.deepstack.reshape(seen.deepstack.shape[0], *per_group)
            states = {"vision_blocks": seen.blocks, "visual_tokens": tokens_BED}
            if deepstack is not None:
                states["deepstack"] = deepstack

        hidden = constrain(hidden, self.hidden_sharding)
        layout = Layout(
            rotary=decoder_rotary(positions_B3S, self.config.text),
            prompt_segments=inputs["prompt_segments"],
            candidate_segments=inputs["candidate_segments"],
            visual=visual_BS,
            barrier=inputs["reward_index"] if self.through_reward else None,
        )
        states["embedded"] = hidden
        states["hidden"], states["collected"] = self.decoder(hidden, deepstack, layout, collect)
        return states

    def _see(self, inputs, patches_BINF, collect) -> VisionOutputs:
        def rows(array: Array | None) -> Array | None:
            return None if array is None else array.reshape(-1, *array.shape[2:])

        tables = ("window_segments", "position_index", "position_weight")
        vision_inputs = VisionInputs(
            rows(patches_BINF),
            rows(inputs["patch_segments"]),
            rows(inputs["patch_positions"]),
            *(rows(inputs.get(name)) for name in tables),
        )
        return self.vision(vision_inputs, collect)


def empty_inputs(config: BackboneConfig) -> tuple[dict[str, Array], Array, Array]:
    """The smallest arguments of `Backbone.__call__`; only their shapes matter."""
    patches = config.vision.merge**2
    ones = jnp.ones
    inputs = {
        "prompt_tokens": ones((1, 1), jnp.int32),
        "prompt_positions": ones((1, 3, 1), jnp.int32),
        "prompt_segments": ones((1, 1), jnp.int32),
        "prompt_visual": ones((1, 1), jnp.int32),
        "candidate_tokens": ones((1, 1, 1), jnp.int32),
        "candidate_positions": ones((1, 1, 3, 1), jnp.int32),
        "candidate_segments": ones((1, 1, 1), jnp.int32),
        "candidate_visual": ones((1, 1, 1), jnp.int32),
        "patch_segments": ones((1, 1, patches), jnp.int32),
        "patch_positions": ones((1, 1, patches, 2), jnp.int32),
    }
    if config.vision.family == "qwen2_5_vl":
        inputs["window_segments"] = ones((1, 1, patches), jnp.int32)
    else:
        inputs["position_index"] = ones((1, 1, patches, 4), jnp.int32)
        inputs["position_weight"] = ones((1, 1, patches, 4), jnp.float32)
    pixels = ones((1, 1, patches, config.vision.features), jnp.float32)
    return inputs, ones((config.text.hidden,), jnp.float32), pixels


def init_backbone(key: Array, config: BackboneConfig) -> dict[str, Any]:
    """Random float32 parameters {'backbone': ..., 'language_head': ...}.

    Pure in `key`, so it works under `jit` with `out_shardings` and under `eval_shape`. The head is
    {} where it is tied to the embedding.
    """
    body_key, head_key = jax.random.split(key)
    backbone = Backbone(config, attention="xla")
    params = {
        "backbone": backbone.init(body_key, *empty_inputs(config))["params"],
        "language_head": {},
    }
    if config.text.separate_head:
        shape = (config.text.hidden, config.text.vocab)
        kernel = EMBEDDING_SPREAD * jax.random.normal(head_key, shape, jnp.float32)
        params["language_head"] = {"kernel": kernel}
    return params
