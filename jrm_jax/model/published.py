"""The published architecture of every backbone that a config variant names.

With these numbers a run can be planned without its weights; a folder that is trained as a variant
must agree with them. Sources: config.json of the Hugging Face repositories Qwen/Qwen2.5-VL-*
-Instruct, Qwen/Qwen3-VL-*-Instruct and Qwen/Qwen3.5-*. PARAMETERS was counted by instantiating
them in transformers 5.23 (tied tables once); a test compares it with this implementation's count.
"""

from __future__ import annotations

import dataclasses

from jrm_jax.errors import UserError
from jrm_jax.model.config import BackboneConfig, DeltaConfig, TextConfig, VisionConfig

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# mean and deviation of the preprocessor
PIXELS = {"qwen2_5_vl": _CLIP, "qwen3_vl": _HALF, "qwen3_5": _HALF}
# a row of the vocabulary that no tokenizer of the family uses
UNUSED_TOKEN = {"qwen2_5_vl": 151_900, "qwen3_vl": 151_900, "qwen3_5": 248_200}


def _qwen3(layers, hidden, heads, kv_heads, mlp, tied, depth, width, vision_mlp, taps):
    text = TextConfig(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=128, mlp=mlp,
        vocab=151_936, rope_theta=5e6, mrope_section=(24, 20, 20), mrope_interleaved=True,
        eps=1e-6, qkv_bias=False, qk_norm=True, tie_embeddings=tied,
    )  # fmt: skip
    vision = VisionConfig(
        family="qwen3_vl", depth=depth, hidden=width, mlp=vision_mlp, heads=16, patch=16, merge=2,
        temporal_patch=2, channels=3, out_hidden=hidden, deepstack=taps, num_positions=48 * 48,
    )  # fmt: skip
    return BackboneConfig("qwen3_vl", vision, text, 151_655, 151_652, 151_653)


def _qwen3_5(
    layers, hidden, heads, kv_heads, mlp, value_heads, tied, depth, width, vision_mlp, vision_heads
):
    text = TextConfig(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=256, mlp=mlp,
        vocab=248_320, rope_theta=1e7, mrope_section=(11, 11, 10), mrope_interleaved=True,
        eps=1e-6, qkv_bias=False, qk_norm=True, tie_embeddings=tied, rotary=64, gated=True,
        zero_centred=True,
        delta=DeltaConfig(
            interval=4, key_heads=16, value_heads=value_heads, key_dim=128, value_dim=128, taps=4
        ),
    )  # fmt: skip
    vision = VisionConfig(
        family="qwen3_vl", depth=depth, hidden=width, mlp=vision_mlp, heads=vision_heads, patch=16,
        merge=2, temporal_patch=2, channels=3, out_hidden=hidden, num_positions=48 * 48,
    )  # fmt: skip
    return BackboneConfig("qwen3_5", vision, text, 248_056, 248_053, 248_054)


def _qwen2_5(layers, hidden, heads, kv_heads, mlp, vocab, tied):
    text = TextConfig(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=128, mlp=mlp,
        vocab=vocab, rope_theta=1e6, mrope_section=(16, 24, 24), mrope_interleaved=False,
        eps=1e-6, qkv_bias=True, qk_norm=False, tie_embeddings=tied,
    )  # fmt: skip
    vision = VisionConfig(
        family="qwen2_5_vl", depth=32, hidden=1280, mlp=3420, heads=16, patch=14, merge=2,
        temporal_patch=2, channels=3, out_hidden=hidden, full_attention=(7, 15, 23, 31), window=112,
    )  # fmt: skip
    return BackboneConfig("qwen2_5_vl", vision, text, 151_655, 151_652, 151_653)


PUBLISHED: dict[str, BackboneConfig] = {
    "qwen3_vl_8b": _qwen3(36, 4096, 32, 8, 12_288, False, 27, 1152, 4304, (8, 16, 24)),
    "qwen3_vl_4b": _qwen3(36, 2560, 32, 8, 9728, True, 24, 1024, 4096, (5, 11, 17)),
    "qwen3_vl_2b": _qwen3(28, 2048, 16, 8, 6144, True, 24, 1024, 4096, (5, 11, 17)),
    "qwen2_5_vl_7b": _qwen2_5(28, 3584, 28, 4, 18_944, 152_064, False),
    "qwen2_5_vl_3b": _qwen2_5(36, 2048, 16, 2, 11_008, 151_936, True),
    "qwen3_5_27b": _qwen3_5(64, 5120, 24, 4, 17_408, 48, False, 27, 1152, 4304, 16),
    "qwen3_5_9b": _qwen3_5(32, 4096, 16, 4, 12_288, 32, False, 27, 1152, 4304, 16),
    "qwen3_5_4b": _qwen3_5(32, 2560, 16, 4, 9216, 32, True, 24, 1024, 4096, 16),
    "qwen3_5_2b": _qwen3_5(24, 2048, 8, 2, 6144, 16, True, 24, 1024, 4096, 16),
    "qwen3_5_0_8b": _qwen3_5(24, 1024, 8, 2, 3584, 16, True, 12, 768, 3072, 12),
}
PARAMETERS: dict[str, int] = {
    "qwen3_vl_8b": 8_767_123_696,
    "qwen3_vl_4b": 4_437_815_808,
    "qwen3_vl_2b": 2_127_532_032,
    "qwen2_5_vl_7b": 8_292_166_656,
    "qwen2_5_vl_3b": 3_754_622_976,
    "qwen3_5_27b": 27_356_728_560,
    "qwen3_5_9b": 9_409_813_744,
    "qwen3_5_4b": 4_539_265_536,
    "qwen3_5_2b": 2_213_241_664,
    "qwen3_5_0_8b": 852_985_920,
}


def check_variant(variant: str, found: BackboneConfig, folder: str) -> None:
    """Raise UserError unless a folder's architecture is the published one of `variant`.

    Variants without published numbers (none, or the packaged backbone) pass.
    """
    if variant not in PUBLISHED:
        return
    wrong = _differences(PUBLISHED[variant], found)
    if wrong:
        raise UserError(
            f"{folder}/config.json is no {variant}: {'; '.join(wrong)}. Name the variant of this "
            "folder in --config, or give the folder of this variant"
        )


def _differences(wanted, found, prefix: str = "") -> list[str]:
    wrong = []
    for field in dataclasses.fields(wanted):
        name = f"{prefix}{field.name}"
        a, b = getattr(wanted, field.name), getattr(found, field.name)
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            wrong += _differences(a, b, f"{name}.")
        elif dataclasses.is_dataclass(a) or dataclasses.is_dataclass(b):
            if a != b:  # a part that one of them has not at all
                wrong.append(f"{name} is {_absent(b)}, published {_absent(a)}")
        elif a != b:
            wrong.append(f"{name} is {b}, published {a}")
    return wrong


def _absent(part: object) -> str:
    return "absent" if part is None else "there"
