"""The vision towers of Qwen2.5-VL and Qwen3-VL, one image per row.

Letters: b image rows (groups x images), N patch slots, F patch features, d tower width, V merged
tokens (N / merge^2), D decoder width, H heads, X half a head.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jrm_jax.model.attention import BATCH_AXES, attention
from jrm_jax.model.config import VisionConfig, vision_segments
from jrm_jax.model.layers import Linear, RMSNorm, matmul, precision, stack
from jrm_jax.model.rope import Rotary, apply_rotary, vision_rotary

EPS = 1e-6


class VisionInputs(NamedTuple):
    """One image per row, in tower order (`rope.image_tables`)."""

    patches: Array  # [b, N, F] float, normalised
    segments: Array  # [b, N] int32: 1 real, 0 padding
    positions: Array  # [b, N, 2] int32
    windows: Array | None  # [b, N] int32, Qwen2.5-VL
    position_index: Array | None  # [b, N, 4] int32, Qwen3-VL
    position_weight: Array | None  # [b, N, 4] float32, Qwen3-VL


class VisionOutputs(NamedTuple):
    """Visual tokens in tower order; `blocks` only when asked for."""

    tokens: Array  # [b, V, D]
    deepstack: Array | None  # [taps, b, V, D]
    blocks: Array | None  # [depth, b, N, d]


def _norm(vision: VisionConfig, dtype: jnp.dtype, name: str) -> nn.Module:
    if vision.family == "qwen3_vl":
        return nn.LayerNorm(epsilon=EPS, dtype=dtype, use_fast_variance=False, name=name)
    return RMSNorm(EPS, dtype, name=name)


class VisionAttention(nn.Module):
    vision: VisionConfig
    dtype: jnp.dtype
    attention: str
    mesh: Mesh | None
    windows: bool

    @nn.compact
    def __call__(self, hidden_bNd: Array, segments_bN: Array, rotary: Rotary) -> Array:
        rows, slots, width = hidden_bNd.shape
        heads = self.vision.heads
        qkv = Linear(3 * width, self.dtype, narrow=True, name="qkv")(hidden_bNd)
        qkv = qkv.reshape(rows, slots, 3, heads, width // heads)
        q, k, v = (x[:, :, 0] for x in jnp.split(qkv, 3, axis=2))
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        out = attention(
            q, k, v, segments_bN, segments_bN,
            causal_offset=None, implementation=self.attention, mesh=self.mesh,
            padded_behind=not self.windows,
        )  # fmt: skip
        gain = (2 * self.vision.depth) ** -0.5
        project_out = Linear(width, self.dtype, gain=gain, narrow=True, name="proj")
        return project_out(out.reshape(rows, slots, width))


class VisionMLP(nn.Module):
    vision: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, wide, gain = x.shape[-1], self.vision.mlp, (2 * self.vision.depth) ** -0.5
        if self.vision.family == "qwen3_vl":
            x = nn.gelu(Linear(wide, self.dtype, name="fc1")(x), approximate=True)
            return Linear(width, self.dtype, gain=gain, name="fc2")(x)
        gate = nn.silu(Linear(wide, self.dtype, name="gate")(x))
        up = Linear(wide, self.dtype, name="up")(x)
        return Linear(width, self.dtype, gain=gain, name="down")(gate * up)


class VisionBlock(nn.Module):
    """Pre-norm transformer block; the second output is the hidden state when `collect`."""

    vision: VisionConfig
    dtype: jnp.dtype
    attention: str
    mesh: Mesh | None
    windows: bool
    collect: bool

    @nn.compact
    def __call__(self, hidden_bNd: Array, _: None, shared: tuple[Array, Rotary]):
        segments_bN, rotary = shared
        attend = VisionAttention(
            self.vision, self.dtype, self.attention, self.mesh, self.windows, name="attn"
        )
        x = _norm(self.vision, self.dtype, "norm1")(hidden_bNd)
        hidden_bNd = hidden_bNd + attend(x, segments_bN, rotary)
        x = _norm(self.vision, self.dtype, "norm2")(hidden_bNd)
        hidden_bNd = hidden_bNd + VisionMLP(self.vision, self.dtype, name="mlp")(x)
        hidden_bNd = _pin(hidden_bNd, self.mesh, BATCH_AXES)
        return hidden_bNd, hidden_bNd if self.collect else None


class PatchEmbed(nn.Module):
    """Linear map of a patch. The frames of a still are equal, so their kernels are summed."""

    vision: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, patches_bNF: Array) -> Array:
        vision = self.vision
        shape = (vision.temporal_patch, vision.features, vision.hidden)
        init = nn.initializers.variance_scaling(1 / shape[0], "fan_in", "normal", in_axis=-2,
                                                out_axis=-1, batch_axis=0)  # fmt: skip
        kernel = self.param("kernel", init, shape, jnp.float32).astype(jnp.float32).sum(0)
        hidden = matmul(patches_bNF.astype(self.dtype), kernel.astype(self.dtype))
        if vision.family == "qwen3_vl":
            bias = self.param("bias", nn.initializers.zeros, (vision.hidden,), jnp.float32)
            hidden = hidden + bias.astype(self.dtype)
        return hidden


class PositionTable(nn.Module):
    """Learned square table, resampled to each image's grid by four taps per patch (Qwen3-VL)."""

    vision: VisionConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, index_bN4: Array, weight_bN4: Array) -> Array:
        shape = (self.vision.num_positions, self.vision.hidden)
        # As large as the patches it is added to: what a random start has to tell places by.
        table = self.param("embedding", nn.initializers.normal(0.5), shape, jnp.float32)
        # a split table would be looked up for the rows of all devices; whole, it is small
        table = _pin(table, self.mesh)
        taps_bN4d = jnp.take(table, index_bN4, axis=0).astype(jnp.float32)
        exact = precision(taps_bN4d.dtype)
        return jnp.einsum("bnk,bnkd->bnd", weight_bN4, taps_bN4d, precision=exact)


class Merger(nn.Module):
    """merge^2 neighbouring patches -> one token of decoder width (exact GELU).

    The norm covers one patch, or the joined patches where `joined` (deepstack mergers).
    """

    vision: VisionConfig
    dtype: jnp.dtype
    joined: bool

    @nn.compact
    def __call__(self, hidden_bNd: Array) -> Array:
        rows, slots, width = hidden_bNd.shape
        unit = self.vision.merge**2
        shape = (rows, slots // unit, width * unit)
        norm = _norm(self.vision, self.dtype, "norm")
        x = norm(hidden_bNd.reshape(shape)) if self.joined else norm(hidden_bNd).reshape(shape)
        x = nn.gelu(Linear(width * unit, self.dtype, name="fc1")(x), approximate=False)
        return Linear(self.vision.out_hidden, self.dtype, name="fc2")(x)


class VisionTower(nn.Module):
    """Patches -> visual tokens (and deepstack features), all rows independent."""

    vision: VisionConfig
    dtype: jnp.dtype
    remat: str
    attention: str
    scan_unroll: int | bool
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, inputs: VisionInputs, collect: bool = False) -> VisionOutputs:
        vision = self.vision
        hidden = PatchEmbed(vision, self.dtype, name="patch_embed")(inputs.patches)
        if vision.family == "qwen3_vl":
            table = PositionTable(vision, self.mesh, name="position")
            hidden = hidden + table(inputs.position_index, inputs.position_weight).astype(
                self.dtype
            )
        hidden = _pin(hidden, self.mesh, BATCH_AXES)
        rotary = vision_rotary(inputs.positions, vision.hidden // vision.heads)
        segment_ids = {"full": inputs.segments, "window": inputs.windows}
        deepstack, blocks = [], []
        for number, (_, length, kind, tap) in enumerate(vision_segments(vision)):
            scanned = stack(VisionBlock, length, self.remat, self.scan_unroll)
            run = scanned(
                vision, self.dtype, self.attention, self.mesh, kind == "window", collect,
                name=f"blocks_{number}",
            )  # fmt: skip
            hidden, outputs = run(hidden, None, (segment_ids[kind], rotary))
            blocks.append(outputs)
            if tap is not None:
                deepstack.append(Merger(vision, self.dtype, True, name=f"deepstack_{tap}")(hidden))
        return VisionOutputs(
            tokens=Merger(vision, self.dtype, False, name="merger")(hidden),
            deepstack=jnp.stack(deepstack) if deepstack else None,
            blocks=jnp.concatenate(blocks) if collect else None,
        )


def _pin(array: Array, mesh: Mesh | None, rows: tuple[str, ...] | None = None) -> Array:
    """Pin the leading axis to mesh axes, or the whole array to every device."""
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(rows)))


def normalise_patches(patches_u8: Array, mean3: Array, std3: Array) -> Array:
    """Pixels 0..255 of patches [..., F] -> (x / 255 - mean) / std, float32.

    F is channel-major: the first third of the features belongs to the first channel.
    """
    each = patches_u8.shape[-1] // len(mean3)
    mean_F = jnp.repeat(jnp.asarray(mean3, jnp.float32), each)
    std_F = jnp.repeat(jnp.asarray(std3, jnp.float32), each)
    return (patches_u8.astype(jnp.float32) / 255.0 - mean_F) / std_F
