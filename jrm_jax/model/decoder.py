"""The decoder over the packed prompt-sharing layout.

Letters: B groups, K candidates, P prompt slots, C candidate slots, S = P + K*C packed slots,
D width, H heads, G key/value heads, h head width, E visual tokens of a group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import NamedSharding

from jrm_jax.model.attention import Prefix, attention
from jrm_jax.model.config import TextConfig
from jrm_jax.model.delta import DeltaCache, DeltaMixer
from jrm_jax.model.layers import Linear, RMSNorm, rematerialised, stack
from jrm_jax.model.rope import Rotary, apply_rotary


class Layout(NamedTuple):
    """What every layer needs to know about the packed slots."""

    rotary: Rotary  # over S
    prompt_segments: Array  # [B, P]
    candidate_segments: Array  # [B, K, C]
    visual: Array  # [B, S] int32: row among the group's E visual tokens, -1 = text
    barrier: Array | None = None  # [B, K] int32: see `attention.attention`


class Cache(NamedTuple):
    """Keys and values after their rotation, so far; X = B * K sequences. Stacks lead with layers.

    The own slots are a candidate's C followed by those of generated tokens. `delta` is that of the
    layers without attention, which lead with blocks and then with layers of a block.
    """

    prompt_k: Array  # [B, P, G, h]
    prompt_v: Array  # [B, P, G, h]
    own_k: Array  # [X, C + generated, G, h]
    own_v: Array  # [X, C + generated, G, h]
    delta: DeltaCache | None = None


class Generated(NamedTuple):
    """Where one generated token of each sequence stands; it takes the place of `Layout`."""

    rotary: Rotary  # over 1 slot
    slot: Array  # int32 []: its place among the own slots
    prompt_segments: Array  # [B, P]
    own_segments: Array  # [X, C + generated]: 1 up to and including this slot where in use


def gather_visual(features_BED: Array, visual_BS: Array) -> Array:
    """Visual feature of each slot; slots that are not visual get zeros."""
    picked = jnp.take_along_axis(features_BED, jnp.maximum(visual_BS, 0)[..., None], axis=1)
    return jnp.where(visual_BS[..., None] >= 0, picked, 0)


class DecoderAttention(nn.Module):
    """Prompt slots attend to the prompt; a candidate's slots to the prompt and to themselves."""

    text: TextConfig
    dtype: jnp.dtype
    attention: str
    hidden_sharding: NamedSharding | None

    @nn.compact
    def __call__(
        self, x_BSD: Array, layout: Layout | Generated, cache: Cache | None
    ) -> tuple[Array, Cache]:
        """(output, the cache of all slots, or the one given with this token in it)."""
        text = self.text
        groups, slots, _ = x_BSD.shape

        def project(name: str, heads: int, parts: int = 1) -> Array:
            width = parts * text.head_dim
            linear = Linear(
                heads * width, self.dtype, bias=text.qkv_bias, narrow=True, name=name
            )
            return linear(x_BSD).reshape(groups, slots, heads, width)

        q, k, v = (
            project("q", text.heads, 2 if text.gated else 1),
            project("k", text.kv_heads),
            project("v", text.kv_heads),
        )
        q, gate = jnp.split(q, [text.head_dim], axis=-1)  # each head's gate behind its query
        if text.qk_norm:
            q = RMSNorm(text.eps, self.dtype, text.zero_centred, name="q_norm")(q)
            k = RMSNorm(text.eps, self.dtype, text.zero_centred, name="k_norm")(k)
        q, k = apply_rotary(q, layout.rotary), apply_rotary(k, layout.rotary)
        sharding = self.hidden_sharding
        options = {
            "implementation": self.attention,
            "mesh": None if sharding is None else sharding.mesh,
        }

        def project_out(out: Array) -> Array:
            if text.gated:
                out = out * nn.sigmoid(gate).reshape(out.shape)
            gain = (2 * text.layers) ** -0.5
            linear = Linear(
                text.hidden, self.dtype, bias=False, gain=gain, narrow=True, name="o"
            )
            return linear(out)

        if cache is not None:
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
            own_k, own_v = (
                put(held, new.astype(held.dtype), start_index=layout.slot)
                for held, new in ((cache.own_k, k), (cache.own_v, v))
            )
            prefix = Prefix(cache.prompt_k, cache.prompt_v, layout.prompt_segments)
            one = jnp.ones((groups, 1), jnp.int32)
            out = attention(
                q, own_k, own_v, one, layout.own_segments, causal_offset=None, prefix=prefix,
                **options,
            ).reshape(groups, slots, -1)  # fmt: skip
            return project_out(out), cache._replace(own_k=own_k, own_v=own_v)
        candidates, length = layout.candidate_segments.shape[1:]
        prompt = layout.prompt_segments.shape[1]

        def split(x_BSGh: Array) -> tuple[Array, Array]:
            before, own = jnp.split(x_BSGh, [prompt], axis=1)
            return before, own.reshape(groups * candidates, length, *own.shape[2:])

        (prompt_q, q), (prompt_k, k), (prompt_v, v) = split(q), split(k), split(v)
        segments = layout.candidate_segments.reshape(groups * candidates, length)
        prefix = Prefix(prompt_k, prompt_v, layout.prompt_segments) if prompt else None
        barrier = None if layout.barrier is None else layout.barrier.reshape(-1)
        out = attention(
            q, k, v, segments, segments, causal_offset=prompt, prefix=prefix, barrier_B=barrier,
            padded_behind=True, **options,
        ).reshape(groups, candidates * length, -1)  # fmt: skip
        if prompt:
            segments = layout.prompt_segments
            before = attention(
                prompt_q, prompt_k, prompt_v, segments, segments, causal_offset=0,
                padded_behind=True, **options,
            )  # fmt: skip
            out = jnp.concatenate([before.reshape(groups, prompt, -1), out], axis=1)
        return project_out(out), Cache(prompt_k, prompt_v, k, v)


class DecoderMLP(nn.Module):
    text: TextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BSD: Array) -> Array:
        gate = nn.silu(Linear(self.text.mlp, self.dtype, bias=False, name="gate")(x_BSD))
        up = Linear(self.text.mlp, self.dtype, bias=False, name="up")(x_BSD)
        gain = (2 * self.text.layers) ** -0.5
        return Linear(self.text.hidden, self.dtype, bias=False, gain=gain, name="down")(gate * up)


class DecoderLayer(nn.Module):
    """Pre-norm layer, then the deepstack feature of this layer where there is one.

    The second output is the hidden state when `collect` is 'hidden', and the layer's cache when it
    is 'keys'. With `delta` a Gated DeltaNet stands in the place of attention.
    """

    text: TextConfig
    dtype: jnp.dtype
    attention: str
    hidden_sharding: NamedSharding | None
    collect: str
    delta: bool = False

    @nn.compact
    def __call__(self, hidden_BSD: Array, own: tuple, layout: Layout | Generated):
        text = self.text
        feature_BED, cache = own
        x = RMSNorm(text.eps, self.dtype, text.zero_centred, name="norm1")(hidden_BSD)
        if self.delta:
            segments = None
            if cache is None:
                segments = (layout.prompt_segments, layout.candidate_segments)
            mixed, kept = DeltaMixer(text, self.dtype, name="mixer")(x, segments, cache)
        else:
            attend = DecoderAttention(
                text, self.dtype, self.attention, self.hidden_sharding, name="attn"
            )
            mixed, kept = attend(x, layout, cache)
        hidden_BSD = hidden_BSD + mixed
        x = RMSNorm(text.eps, self.dtype, text.zero_centred, name="norm2")(hidden_BSD)
        hidden_BSD = hidden_BSD + DecoderMLP(text, self.dtype, name="mlp")(x)
        if feature_BED is not None:
            hidden_BSD = hidden_BSD + gather_visual(feature_BED, layout.visual)
        hidden_BSD = constrain(hidden_BSD, self.hidden_sharding)
        collected = {"": None, "hidden": hidden_BSD, "keys": kept}
        return hidden_BSD, collected[self.collect]


class Block(nn.Module):
    """Gated DeltaNet layers, all by one body, then one layer with attention."""

    text: TextConfig
    dtype: jnp.dtype
    remat: str
    attention: str
    scan_unroll: int | bool
    hidden_sharding: NamedSharding | None
    collect: str

    @nn.compact
    def __call__(self, hidden_BSD: Array, held: tuple, layout: Layout | Generated):
        fields = (self.text, self.dtype, self.attention, self.hidden_sharding, self.collect)
        many = stack(DecoderLayer, self.text.delta.interval - 1, self.remat, self.scan_unroll)
        one = rematerialised(DecoderLayer, self.remat, self.scan_unroll)
        delta, full = held
        hidden_BSD, others = many(*fields, True, name="delta")(hidden_BSD, (None, delta), layout)
        hidden_BSD, last = one(*fields, name="full")(hidden_BSD, (None, full), layout)
        return hidden_BSD, (others, last)


def constrain(hidden_BSD: Array, sharding: NamedSharding | None) -> Array:
    """Pin the sharding of the hidden state between layers; None leaves it to the compiler."""
    if sharding is None:
        return hidden_BSD
    return jax.lax.with_sharding_constraint(hidden_BSD, sharding)


class Decoder(nn.Module):
    """Layers and final norm. `taps` layers lead, in a stack of their own.

    With Gated DeltaNet layers there is one stack of blocks. Its parameters are stacks by kind of
    layer, in the order of the layers.
    """

    text: TextConfig
    taps: int
    dtype: jnp.dtype
    remat: str
    attention: str
    scan_unroll: int | bool
    hidden_sharding: NamedSharding | None

    @nn.compact
    def __call__(
        self,
        hidden_BSD: Array,
        deepstack: Array | None,
        layout: Layout | Generated,
        collect: str = "",
        cache: Cache | None = None,
    ) -> tuple[Array, Any]:
        """deepstack: [taps, B, E, D] or None; cache: of all layers. Returns the normed hidden state
        and what each layer collects (see DecoderLayer), stacked over layers.

        Raises:
            ValueError: a barrier, with layers that hand on a state: it would pass the barrier.
        """
        run = self._layers if self.text.delta is None else self._blocks
        hidden_BSD, collected = run(hidden_BSD, deepstack, layout, collect, cache)
        norm = RMSNorm(self.text.eps, self.dtype, self.text.zero_centred, name="norm")
        return norm(hidden_BSD), collected

    def _layers(self, hidden_BSD, deepstack, layout, collect, cache) -> tuple[Array, Any]:
        collected, first = [], 0
        for name, length, features in (
            ("taps", self.taps, deepstack),
            ("layers", self.text.layers - self.taps, None),
        ):
            if length:
                layers = stack(DecoderLayer, length, self.remat, self.scan_unroll)(
                    self.text, self.dtype, self.attention, self.hidden_sharding, collect, name=name
                )
                held = jax.tree.map(lambda x, at=first, n=length: x[at : at + n], cache)
                hidden_BSD, outputs = layers(hidden_BSD, (features, held), layout)
                collected.append(outputs)
                first += length
        return hidden_BSD, jax.tree.map(lambda *parts: jnp.concatenate(parts), *collected)

    def _blocks(self, hidden_BSD, deepstack, layout, collect, cache) -> tuple[Array, Any]:
        if deepstack is not None or (cache is None and layout.barrier is not None):
            raise ValueError("Gated DeltaNet layers have neither deepstack features nor barriers")
        count = self.text.layers // self.text.delta.interval
        # [layers of a kind, ...] on the outside, [blocks, layers of a block, ...] in the loops
        blocks = nn.map_variables(
            stack(Block, count, "none", self.scan_unroll),
            "params",
            trans_in_fn=lambda tree: _in_delta(
                tree, lambda x: x.reshape(count, -1, *x.shape[1:])
            ),
            trans_out_fn=lambda tree: _in_delta(tree, lambda x: x.reshape(-1, *x.shape[2:])),
            init=self.is_initializing(),
            mutable=self.is_initializing(),
        )(
            self.text, self.dtype, self.remat, self.attention, self.scan_unroll,
            self.hidden_sharding, collect, name="blocks",
        )  # fmt: skip
        held = (None, None) if cache is None else (cache.delta, cache._replace(delta=None))
        hidden_BSD, (others, last) = blocks(hidden_BSD, held, layout)
        if collect == "keys":
            return hidden_BSD, last._replace(delta=others)
        if collect == "hidden":
            layers = jnp.concatenate([others, last[:, None]], axis=1)
            return hidden_BSD, layers.reshape(-1, *hidden_BSD.shape)
        return hidden_BSD, None


def _in_delta(tree: dict, change: Callable[[Array], Array]) -> dict:
    """The variables of the blocks, with `change` made to every leaf of their delta layers."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: change(x) if any(key.key == "delta" for key in keys) else x, tree
    )
