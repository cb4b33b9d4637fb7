"""Which Hugging Face tensors make up each leaf of the backbone's tree.

Files hold one tensor per layer, linears as [out, in] and the patch embedding as a 3-D convolution.
The tree holds stacks of layers, linears as [in, out] and the patch embedding as one matrix per
frame. Reading and writing (weights.py) go through `tensor_table`: a name or a shape stands once.

Sizes in the tables: D decoder width, Q and KV query and key widths, QG queries with their gates, M
decoder MLP, hd head width, vocab; of a Gated DeltaNet layer qkv its channels, v its values, heads
its value heads, ve the width of one, taps of its convolution; d tower width, m tower MLP, 3d fused
query-key-value, md merged group of tower tokens (merge^2 * d), out tower output, pos rows of the
position table, t frames, F features of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrm_jax.model.config import BackboneConfig, vision_segments

TEXT, VISION = "model.language_model.", "model.visual."
EMBEDDING, HEAD = TEXT + "embed_tokens.weight", "lm_head.weight"

Params = dict[str, Any]


def _rows(text: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """Lines of 'tree path, tensor name, sizes in the tree'."""
    split = [line.split() for line in text.strip().splitlines()]
    return [(path, name, tuple(sizes)) for path, name, *sizes in split]


DECODER_LAYER = _rows("""
    norm1/scale         input_layernorm.weight           D
    norm2/scale         post_attention_layernorm.weight  D
    mlp/gate/kernel     mlp.gate_proj.weight             D M
    mlp/up/kernel       mlp.up_proj.weight               D M
    mlp/down/kernel     mlp.down_proj.weight             M D
""")
ATTENTION = _rows("""
    attn/q/kernel       self_attn.q_proj.weight          D QG
    attn/k/kernel       self_attn.k_proj.weight          D KV
    attn/v/kernel       self_attn.v_proj.weight          D KV
    attn/o/kernel       self_attn.o_proj.weight          Q D
""")
DELTA = _rows("""
    mixer/qkv/kernel    linear_attn.in_proj_qkv.weight   D qkv
    mixer/z/kernel      linear_attn.in_proj_z.weight     D v
    mixer/a/kernel      linear_attn.in_proj_a.weight     D heads
    mixer/b/kernel      linear_attn.in_proj_b.weight     D heads
    mixer/conv          linear_attn.conv1d.weight        taps qkv
    mixer/A_log         linear_attn.A_log                heads
    mixer/dt_bias       linear_attn.dt_bias              heads
    mixer/norm/scale    linear_attn.norm.weight          ve
    mixer/out/kernel    linear_attn.out_proj.weight      v D
""")
QKV_BIAS = _rows("""
    attn/q/bias         self_attn.q_proj.bias            Q
    attn/k/bias         self_attn.k_proj.bias            KV
    attn/v/bias         self_attn.v_proj.bias            KV
""")
QK_NORM = _rows("""
    attn/q_norm/scale   self_attn.q_norm.weight          hd
    attn/k_norm/scale   self_attn.k_norm.weight          hd
""")
VISION_ONCE = {
    "qwen2_5_vl": _rows("""
        patch_embed/kernel  patch_embed.proj.weight  t F d
        merger/norm/scale   merger.ln_q.weight       d
        merger/fc1/kernel   merger.mlp.0.weight      md md
        merger/fc1/bias     merger.mlp.0.bias        md
        merger/fc2/kernel   merger.mlp.2.weight      md out
        merger/fc2/bias     merger.mlp.2.bias        out
    """),
    "qwen3_vl": _rows("""
        patch_embed/kernel  patch_embed.proj.weight    t F d
        patch_embed/bias    patch_embed.proj.bias      d
        position/embedding  pos_embed.weight           pos d
        merger/norm/scale   merger.norm.weight         d
        merger/norm/bias    merger.norm.bias           d
        merger/fc1/kernel   merger.linear_fc1.weight   md md
        merger/fc1/bias     merger.linear_fc1.bias     md
        merger/fc2/kernel   merger.linear_fc2.weight   md out
        merger/fc2/bias     merger.linear_fc2.bias     out
    """),
}
DEEPSTACK = _rows("""
    norm/scale          norm.weight                      md
    norm/bias           norm.bias                        md
    fc1/kernel          linear_fc1.weight                md md
    fc1/bias            linear_fc1.bias                  md
    fc2/kernel          linear_fc2.weight                md out
    fc2/bias            linear_fc2.bias                  out
""")
VISION_ATTENTION = _rows("""
    attn/qkv/kernel     attn.qkv.weight                  d 3d
    attn/qkv/bias       attn.qkv.bias                    3d
    attn/proj/kernel    attn.proj.weight                 d d
    attn/proj/bias      attn.proj.bias                   d
""")
VISION_BLOCK = {
    "qwen2_5_vl": VISION_ATTENTION
    + _rows("""
        norm1/scale         norm1.weight             d
        norm2/scale         norm2.weight             d
        mlp/gate/kernel     mlp.gate_proj.weight     d m
        mlp/gate/bias       mlp.gate_proj.bias       m
        mlp/up/kernel       mlp.up_proj.weight       d m
        mlp/up/bias         mlp.up_proj.bias         m
        mlp/down/kernel     mlp.down_proj.weight     m d
        mlp/down/bias       mlp.down_proj.bias       d
    """),
    "qwen3_vl": VISION_ATTENTION
    + _rows("""
        norm1/scale         norm1.weight             d
        norm1/bias          norm1.bias               d
        norm2/scale         norm2.weight             d
        norm2/bias          norm2.bias               d
        mlp/fc1/kernel      mlp.linear_fc1.weight    d m
        mlp/fc1/bias        mlp.linear_fc1.bias      m
        mlp/fc2/kernel      mlp.linear_fc2.weight    m d
        mlp/fc2/bias        mlp.linear_fc2.bias      d
    """),
}


@dataclass(frozen=True)
class Leaf:
    """One leaf of the tree and the tensors it is made of.

    names: one tensor per layer if stacked, else exactly one (native names).
    shape: in the tree, with the layer axis first if stacked.
    kind: 'same'; 'transpose' (a linear); 'patch' (disk [d, channels, t, p, p], tree [t, F, d]);
        'conv' (disk [channels, 1, taps], tree [taps, channels]).
    disk_shape: of each tensor.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    stacked: bool
    disk_shape: tuple[int, ...]


def stays_float32(path: str) -> bool:
    """Whether the leaf is float32 where others are bfloat16, on the disk and frozen in memory.

    The rate of a state's decay is an exponential of an exponential of it.
    """
    return path.endswith(("/mixer/A_log", "/mixer/norm/scale"))


def tensor_table(config: BackboneConfig) -> dict[str, Leaf]:
    """Every leaf of {'backbone', 'language_head'} by its '/'-joined path, in a fixed order."""
    text, vision = config.text, config.vision
    sizes = {
        "D": text.hidden, "Q": text.heads * text.head_dim, "KV": text.kv_heads * text.head_dim,
        "M": text.mlp, "hd": text.head_dim, "vocab": text.vocab, "d": vision.hidden,
        "3d": 3 * vision.hidden, "m": vision.mlp, "md": vision.merge**2 * vision.hidden,
        "out": vision.out_hidden, "pos": vision.num_positions, "t": vision.temporal_patch,
        "F": vision.features,
    }  # fmt: skip
    sizes["QG"] = sizes["Q"] * (2 if text.gated else 1)
    if text.delta is not None:
        sizes |= {
            "qkv": text.delta.channels, "v": text.delta.value_heads * text.delta.value_dim,
            "heads": text.delta.value_heads, "ve": text.delta.value_dim, "taps": text.delta.taps,
        }  # fmt: skip
    table: dict[str, Leaf] = {}

    def add(where: str, prefixes: list[str], stacked: bool, rows: list) -> None:
        for path, name, dims in rows:
            shape = tuple(sizes[dim] for dim in dims)
            kind, disk_shape = "same", shape
            if path == "patch_embed/kernel":
                patch = (vision.channels, vision.temporal_patch, vision.patch, vision.patch)
                kind, disk_shape = "patch", (vision.hidden, *patch)
            elif path.rpartition("/")[2] == "kernel":
                kind, disk_shape = "transpose", shape[::-1]
            elif path.rpartition("/")[2] == "conv":
                kind, disk_shape = "conv", (shape[1], 1, shape[0])
            names = tuple(prefix + name for prefix in prefixes)
            full_shape = (len(names), *shape) if stacked else shape
            table[where + path] = Leaf(names, full_shape, kind, stacked, disk_shape)

    add("backbone/", [TEXT], False, _rows("embed/embedding embed_tokens.weight vocab D"))
    add("backbone/vision/", [VISION], False, VISION_ONCE[vision.family])
    for tap in range(config.taps):
        prefix = f"{VISION}deepstack_merger_list.{tap}."
        add(f"backbone/vision/deepstack_{tap}/", [prefix], False, DEEPSTACK)
    for number, (first, length, _, _) in enumerate(vision_segments(vision)):
        prefixes = [f"{VISION}blocks.{layer}." for layer in range(first, first + length)]
        where = f"backbone/vision/blocks_{number}/"
        add(where, prefixes, True, VISION_BLOCK[vision.family])
    attention = DECODER_LAYER + ATTENTION + QKV_BIAS * text.qkv_bias + QK_NORM * text.qk_norm
    prefixes = [f"{TEXT}layers.{layer}." for layer in range(text.layers)]
    if text.delta is None:
        taps = config.taps
        stacks = [("taps", prefixes[:taps], attention), ("layers", prefixes[taps:], attention)]
    else:
        full = prefixes[text.delta.interval - 1 :: text.delta.interval]
        others = [prefix for prefix in prefixes if prefix not in full]
        stacks = [
            ("blocks/delta", others, DECODER_LAYER + DELTA), ("blocks/full", full, attention)
        ]  # fmt: skip
    for stack, part, rows in stacks:
        if part:
            add(f"backbone/decoder/{stack}/", part, True, rows)
    add("backbone/decoder/", [TEXT], False, _rows("norm/scale norm.weight D"))
    if text.separate_head:
        add("language_head/", [""], False, _rows(f"kernel {HEAD} D vocab"))
    return table


def abstract_params(config: BackboneConfig, dtype: Any = jnp.float32) -> Params:
    """The tree `load_params` returns, as jax.ShapeDtypeStructs (for sharding rules)."""
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf_dtype(dtype, path))
        for path, leaf in tensor_table(config).items()
    }
    return params_of(leaves)


def leaf_dtype(dtype: Any, path: str) -> np.dtype:
    """`dtype` itself, or what it says of `path` if it is a function."""
    try:
        return np.dtype(dtype)
    except TypeError:
        return np.dtype(dtype(path))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': x}} -> {'a/b': x}; empty dicts vanish."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat.update(flatten(value, path + "/") if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def params_of(leaves: Mapping[str, Any]) -> Params:
    """Of leaves by path; both top-level keys are there even if one is empty."""
    return {"backbone": {}, "language_head": {}} | unflatten(leaves)
