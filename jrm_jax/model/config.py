"""Backbone shapes, read from the config.json of a Hugging Face folder.

Covers the dense Qwen2.5-VL, Qwen3-VL and Qwen3.5 sizes. Hub configs are flat (Qwen2.5-VL: text
fields at the top level) or nested (`text_config`), with `rope_theta` + `rope_scaling` or
`rope_parameters`; all of these are read. Class defaults of the reference code are never used: they
describe no released checkpoint, so a field that is not in the file is an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jrm_jax.errors import UserError

# family -> the family of its vision tower: Qwen3.5 has that of Qwen3-VL, without deepstack
FAMILIES = {"qwen2_5_vl": "qwen2_5_vl", "qwen3_vl": "qwen3_vl", "qwen3_5": "qwen3_vl"}
LINEAR, FULL = "linear_attention", "full_attention"  # words of `layer_types`


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. `family` is a value of FAMILIES, `deepstack` and `full_attention` are layer
    indices, `window` is pixels."""

    family: str
    depth: int
    hidden: int
    mlp: int
    heads: int
    patch: int
    merge: int
    temporal_patch: int
    channels: int
    out_hidden: int
    deepstack: tuple[int, ...] = ()  # Qwen3-VL: layers whose output also feeds the decoder
    full_attention: tuple[int, ...] = ()  # Qwen2.5-VL: layers that see the whole image
    window: int = 0  # Qwen2.5-VL: side of an attention window
    num_positions: int = 0  # Qwen3-VL: rows of the learned (square) position table

    @property
    def features(self) -> int:
        """Numbers per patch of one frame: (channel, row, column)."""
        return self.channels * self.patch**2


@dataclass(frozen=True)
class DeltaConfig:
    """Gated DeltaNet layers: every `interval`-th layer of the decoder is attention, the others
    are these. A key head serves value_heads / key_heads value heads."""

    interval: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int  # of the causal convolution

    @property
    def channels(self) -> int:
        """Width of queries, keys and values together, which the convolution reads."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class TextConfig:
    """The decoder. `mrope_section` counts rotary frequencies for (time, height, width).
    `positions` bounds nothing that is computed: two decoders that differ in it are equal."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    rope_theta: float
    mrope_section: tuple[int, ...]
    mrope_interleaved: bool
    eps: float
    qkv_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    headless: bool = False  # untied, and its files hold no language head: it can score, not speak
    rotary: int = 0  # dimensions of a head that turn, the first ones; 0: all
    gated: bool = False  # attention's output times the sigmoid of a gate, per head and dimension
    zero_centred: bool = False  # norms multiply by 1 + scale
    delta: DeltaConfig | None = None  # None: all layers are attention
    positions: int = field(default=0, compare=False)  # it was made for; 0: not said

    @property
    def separate_head(self) -> bool:
        """Whether the language head has parameters of its own."""
        return not (self.tie_embeddings or self.headless)

    @property
    def turning(self) -> int:
        """Dimensions of a head that turn with the position."""
        return self.rotary or self.head_dim


@dataclass(frozen=True)
class BackboneConfig:
    """One vision-language backbone; hashable, so that it can be a static argument."""

    family: str
    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    vision_start_id: int
    vision_end_id: int

    @property
    def taps(self) -> int:
        """Decoder layers followed by the addition of a deepstack feature."""
        return len(self.vision.deepstack)


def vision_segments(vision: VisionConfig) -> tuple[tuple[int, int, str, int | None], ...]:
    """Cut the tower into runs of layers that one scan can hold.

    Returns (first layer, length, 'full' | 'window', tap) per run; tap is the index of the deepstack
    merger that reads the run's output, or None.
    """
    segments: list[tuple[int, int, str, int | None]] = []
    for layer in range(vision.depth):
        windowed = vision.family == "qwen2_5_vl" and layer not in vision.full_attention
        kind = "window" if windowed else "full"
        tap = vision.deepstack.index(layer) if layer in vision.deepstack else None
        if segments and segments[-1][2] == kind and segments[-1][3] is None:
            first, length = segments.pop()[:2]
            segments.append((first, length + 1, kind, tap))
        else:
            segments.append((layer, 1, kind, tap))
    return tuple(segments)


class _Fields:
    """Looks fields up in the sections of one config.json and reports what is missing or odd."""

    def __init__(self, path: Path, where: str, *sections: Any):
        self.path, self.where, self.sections = path, where, sections
        if not all(isinstance(section, dict) for section in sections):
            raise self.fail("should be an object of fields, {...}")

    def fail(self, message: str) -> UserError:
        return UserError(f"{self.path}: {self.where}: {message}")

    def get(self, *names: str, default: Any = None) -> Any:
        for section in self.sections:
            for name in names:
                if section.get(name) is not None:
                    return section[name]
        return default

    def need(self, *names: str) -> Any:
        value = self.get(*names)
        if value is None:
            raise self.fail(f"field {' or '.join(map(repr, names))} is missing")
        return value

    def integer(self, *names: str, low: int = 1, default: int | None = None) -> int:
        value = self.need(*names) if default is None else self.get(*names, default=default)
        if not _is_whole(value, low):
            words = f"a whole number from {low} that fits 32 bits"
            raise self.fail(f"field {names[0]!r} should be {words}, found {value!r}")
        return value

    def number(self, *names: str) -> float:
        value = self.need(*names)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.fail(f"field {names[0]!r} should be a number above 0, found {value!r}")
        return float(value)

    def integers(self, *names: str) -> tuple[int, ...]:
        value = self.need(*names)
        if not isinstance(value, list) or not all(_is_whole(item, 0) for item in value):
            raise self.fail(
                f"field {names[0]!r} should be a list of whole numbers, found {value!r}"
            )
        return tuple(value)

    def require(self, name: str, *allowed: Any, default: Any = None) -> None:
        value = self.get(name, default=default)
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise self.fail(f"field {name!r} is {value!r}; only {expected} is supported")


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**31


def _vision_config(model: str, fields: _Fields) -> VisionConfig:
    family = FAMILIES[model]
    qwen3 = family == "qwen3_vl"
    deepstack = model == "qwen3_vl"
    if qwen3 and not deepstack:
        fields.require("deepstack_visual_indexes", [], default=[])
    fields.require("hidden_act", "gelu_pytorch_tanh" if qwen3 else "silu")
    vision = VisionConfig(
        family=family,
        depth=fields.integer("depth"),
        hidden=fields.integer("hidden_size"),
        mlp=fields.integer("intermediate_size"),
        heads=fields.integer("num_heads"),
        patch=fields.integer("patch_size"),
        merge=fields.integer("spatial_merge_size"),
        temporal_patch=fields.integer("temporal_patch_size"),
        channels=fields.integer("in_channels", "in_chans", default=3),
        out_hidden=fields.integer("out_hidden_size"),
        deepstack=fields.integers("deepstack_visual_indexes") if deepstack else (),
        full_attention=() if qwen3 else fields.integers("fullatt_block_indexes"),
        window=0 if qwen3 else fields.integer("window_size"),
        num_positions=fields.integer("num_position_embeddings") if qwen3 else 0,
    )
    if vision.hidden % (4 * vision.heads):
        raise fields.fail("hidden_size / num_heads must be a multiple of 4 (2-D rotary)")
    if list(vision.deepstack) != sorted(set(vision.deepstack)):
        raise fields.fail("deepstack_visual_indexes must increase")
    if vision.deepstack and vision.deepstack[-1] >= vision.depth:
        raise fields.fail("deepstack_visual_indexes names a layer beyond depth")
    if qwen3 and int(vision.num_positions**0.5) ** 2 != vision.num_positions:
        raise fields.fail("num_position_embeddings must be a square")
    if not qwen3 and vision.window // (vision.merge * vision.patch) < 1:
        raise fields.fail("window_size is smaller than one merged token")
    return vision


def _delta_config(fields: _Fields, layers: int) -> DeltaConfig:
    fields.require("attn_output_gate", True, default=True)
    fields.require("output_gate_type", "swish", default="swish")
    fields.require("num_experts", 0, default=0)
    kinds = fields.get("layer_types")
    if kinds is None:
        interval = fields.integer("full_attention_interval")
    else:
        interval = kinds.index(FULL) + 1 if isinstance(kinds, list) and FULL in kinds else 0
    regular = [LINEAR] * (interval - 1) + [FULL]
    if interval < 2 or layers % interval or kinds not in (None, regular * (layers // interval)):
        raise fields.fail(
            f"layer_types (or full_attention_interval) must repeat some {LINEAR!r} and then one "
            f"{FULL!r} evenly over the {layers} layers; no other order is supported"
        )
    delta = DeltaConfig(
        interval=interval,
        key_heads=fields.integer("linear_num_key_heads"),
        value_heads=fields.integer("linear_num_value_heads"),
        key_dim=fields.integer("linear_key_head_dim"),
        value_dim=fields.integer("linear_value_head_dim"),
        taps=fields.integer("linear_conv_kernel_dim"),
    )
    if delta.value_heads % delta.key_heads:
        raise fields.fail("linear_num_key_heads must divide linear_num_value_heads")
    if delta.taps < 2:
        raise fields.fail("linear_conv_kernel_dim must be at least 2")
    return delta


def _text_config(family: str, fields: _Fields, tied: bool) -> TextConfig:
    qwen3, hybrid = family != "qwen2_5_vl", family == "qwen3_5"
    fields.require("hidden_act", "silu", default="silu")
    if fields.get("use_sliding_window", default=False):
        raise fields.fail("use_sliding_window is true; only full attention is supported")
    if qwen3 and fields.get("attention_bias", default=False):
        raise fields.fail("attention_bias is true; no checkpoint of this family has it")
    rope = fields.get("rope_parameters", "rope_scaling", default={})
    _Fields(fields.path, "rope_parameters or rope_scaling", rope)
    ropes = _Fields(fields.path, fields.where, rope, *fields.sections)
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
        raise fields.fail(
            f"rotary type {rope.get('rope_type', rope.get('type'))!r} is not supported"
        )
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    layers, longest = fields.integer("num_hidden_layers"), "max_position_embeddings"
    if hidden < heads:
        raise fields.fail("hidden_size is smaller than num_attention_heads")
    head_dim = fields.integer("head_dim", default=hidden // heads) if qwen3 else hidden // heads
    text = TextConfig(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", default=heads),
        head_dim=head_dim,
        mlp=fields.integer("intermediate_size"),
        vocab=fields.integer("vocab_size"),
        rope_theta=ropes.number("rope_theta"),
        mrope_section=ropes.integers("mrope_section"),
        mrope_interleaved=qwen3,
        eps=fields.number("rms_norm_eps"),
        qkv_bias=not qwen3,
        qk_norm=qwen3,
        tie_embeddings=tied,
        rotary=int(head_dim * ropes.number("partial_rotary_factor")) if hybrid else 0,
        gated=hybrid,
        zero_centred=hybrid,
        delta=_delta_config(fields, layers) if hybrid else None,
        positions=fields.integer(longest) if fields.get(longest) is not None else 0,
    )
    if text.turning > head_dim:
        raise fields.fail("partial_rotary_factor should be from 0 to 1")
    if len(text.mrope_section) != 3 or 2 * sum(text.mrope_section) != text.turning:
        raise fields.fail(
            f"mrope_section {list(text.mrope_section)} must be three counts that sum to half of "
            f"the {text.turning} dimensions of a head that turn"
        )
    if heads % text.kv_heads:
        raise fields.fail("num_key_value_heads must divide num_attention_heads")
    return text


def load_config(folder: str | Path) -> BackboneConfig:
    """Read `folder/config.json`.

    Raises:
        UserError: the file is missing or not JSON, the model family is not supported, or a field
            is missing or has a value this implementation does not cover; names file and field.
    """
    path = Path(folder) / "config.json"
    try:
        root = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} not found: give a Hugging Face model folder") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    top = _Fields(path, "config", root)
    family = root.get("model_type")
    if family not in tuple(FAMILIES):
        raise top.fail(f"field 'model_type' is {family!r}; supported: {', '.join(FAMILIES)}")
    nested, vision_fields = top.get("text_config", default={}), top.need("vision_config")
    _Fields(path, "text_config", nested)
    # the head's tying belongs to the whole model: the top level decides where both state it, but
    # files of Qwen2.5-VL from before transformers 5 state it in text_config
    inner = bool(nested.get("tie_word_embeddings", False))
    tied = bool(root.get("tie_word_embeddings", inner)) or (family == "qwen2_5_vl" and inner)
    text = _text_config(family, _Fields(path, "text_config", nested or root), tied)
    vision = _vision_config(family, _Fields(path, "vision_config", vision_fields))
    if vision.out_hidden != text.hidden:
        raise top.fail("vision_config.out_hidden_size differs from the decoder's hidden_size")
    if len(vision.deepstack) > text.layers:
        raise top.fail("more deepstack taps than decoder layers")
    return BackboneConfig(
        family=family,
        vision=vision,
        text=text,
        image_token_id=top.integer("image_token_id", low=0),
        vision_start_id=top.integer("vision_start_token_id", low=0),
        vision_end_id=top.integer("vision_end_token_id", low=0),
    )
