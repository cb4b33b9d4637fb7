"""config.json of Qwen3.5 folders: what is read, what is refused by name; published sizes."""

import json
import math

import pytest

from jrm_jax.errors import UserError
from jrm_jax.model.config import load_config
from jrm_jax.model.published import PARAMETERS, PUBLISHED, check_variant
from jrm_jax.model.tensors import stays_float32, tensor_table
from jrm_jax.shell.packaged import ASSETS

pytest.importorskip("torch")
pytest.importorskip("transformers")
from hf_models import build  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    build("qwen3_5", True).config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("change, words", [
    ({"layer_types": ["linear_attention", "full_attention"] + ["linear_attention"] * 3
      + ["full_attention"]}, "layer_types"),
    ({"layer_types": ["linear_attention"] * 6}, "layer_types"),
    ({"layer_types": ["full_attention"] * 6}, "layer_types"),
    ({"layer_types": ["linear_attention", "full_attention"] * 2}, "layer_types"),  # four of six
    ({"layer_types": ["sliding_attention", "full_attention"] * 3}, "layer_types"),
    ({"layer_types": None, "full_attention_interval": 4}, "full_attention_interval"),
    ({"attn_output_gate": False}, "'attn_output_gate' is False"),
    ({"output_gate_type": "sigmoid"}, "'output_gate_type' is 'sigmoid'"),
    ({"num_experts": 8}, "'num_experts' is 8"),
    ({"attention_bias": True}, "attention_bias is true"),
    ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ({"linear_num_value_heads": 3}, "must divide linear_num_value_heads"),
    ({"linear_conv_kernel_dim": 1}, "at least 2"),
    ({"linear_key_head_dim": None}, "'linear_key_head_dim' is missing"),
    ({"rope_parameters": {"rope_theta": 1e6, "mrope_section": [2, 1, 1]}},
     "'partial_rotary_factor' is missing"),
    ({"rope_parameters": {"rope_theta": 1e6, "mrope_section": [2, 1, 1],
                          "partial_rotary_factor": 0.25}}, "half of the 4 dimensions"),
])  # fmt: skip
def test_what_is_not_supported_is_named(folder, tmp_path, change, words):
    root = json.loads((folder / "config.json").read_text())
    text = {k: v for k, v in (root["text_config"] | change).items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(root | {"text_config": text}))
    with pytest.raises(UserError, match=words) as error:
        load_config(tmp_path)
    assert "\n" not in str(error.value)


def test_fields_of_newer_and_older_files(folder, tmp_path):
    root, wanted = json.loads((folder / "config.json").read_text()), load_config(folder)
    text, vision = root["text_config"], root["vision_config"]
    rope = text["rope_parameters"]
    for changed in (
        root | {"text_config": text | {"output_gate_type": "swish"}},
        root | {"text_config": text | {"full_attention_interval": 3, "layer_types": None}},
        root | {"vision_config": {k: v for k, v in vision.items() if "deepstack" not in k}},
        root | {"vision_config": vision | {"model_type": "qwen3_5_vision"}},
        root | {"text_config": text | {"mtp_num_hidden_layers": 1, "mlp_only_layers": []}},
        root | {"text_config": text | {
            "partial_rotary_factor": rope["partial_rotary_factor"],
            "rope_parameters": {k: v for k, v in rope.items() if k != "partial_rotary_factor"}}},
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert load_config(tmp_path) == wanted
    vision = vision | {"deepstack_visual_indexes": [1]}
    for changed, words in (
        (root | {"vision_config": vision}, "'deepstack_visual_indexes' is .1."),
        (root | {"model_type": "qwen3_5_moe"}, "is 'qwen3_5_moe'; supported: .*qwen3_5"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=words):
            load_config(tmp_path)


DAMAGED = [  # (path of a field of config.json, its value)
    ("", []), ("", "text"), ("", 5), ("model_type", ["qwen3_vl"]), ("model_type", {}),
    ("text_config", 5), ("text_config", [1]), ("vision_config", "none"), ("vision_config", None),
    ("image_token_id", -1), ("image_token_id", 2.5),
    *((f"text_config/{name}", value)
      for name in ("num_key_value_heads", "num_attention_heads", "hidden_size", "head_dim",
                   "num_hidden_layers", "vocab_size", "intermediate_size")
      for value in (0, -1, "4", 2.5, True, [4], 10**400)),
    *((f"text_config/{name}", value)
      for name in ("rope_parameters", "rope_scaling") for value in ("mrope", 5, [1])),
    ("text_config/rope_theta", math.nan), ("text_config/rope_theta", 0),
    ("text_config/rms_norm_eps", -1e-6), ("text_config/rms_norm_eps", "1e-6"),
    *((f"vision_config/{name}", value)
      for name in ("depth", "num_heads", "patch_size", "spatial_merge_size", "in_channels",
                   "temporal_patch_size", "num_position_embeddings", "out_hidden_size")
      for value in (0, "4", {})),
    ("vision_config/deepstack_visual_indexes", [-1]), ("vision_config/deepstack_visual_indexes", 1),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), DAMAGED, ids=lambda x: str(x)[:30])
def test_a_damaged_config_is_one_line_that_names_the_file(tmp_path, place, value):
    root = json.loads((ASSETS / "tiny_qwen3_vl" / "config.json").read_text())
    *parents, name = place.split("/")
    part = root
    for parent in parents:
        part = part[parent]
    if name:
        part.pop("rope_parameters" if name.startswith("rope") else name, None)
        part[name] = value
    (tmp_path / "config.json").write_text(json.dumps(root if name else value))
    with pytest.raises(UserError) as error:
        load_config(tmp_path)
    words = str(error.value)
    assert words.startswith(f"{tmp_path / 'config.json'}: ") and "\n" not in words
    assert not name or name in words or parents and parents[-1] in words


def test_layer_types_that_are_no_list_and_a_share_above_1_are_refused(folder, tmp_path):
    root = json.loads((folder / "config.json").read_text())
    text = root["text_config"]
    wide = {**text["rope_parameters"], "partial_rotary_factor": 2.0, "mrope_section": [4, 4, 8]}
    for change, words in (
        ({"layer_types": "full_attention"}, "layer_types"), ({"layer_types": 5}, "layer_types"),
        ({"linear_num_key_heads": 0}, "linear_num_key_heads"),
        ({"rope_parameters": wide}, "partial_rotary_factor"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(root | {"text_config": text | change}))
        with pytest.raises(UserError, match=words):
            load_config(tmp_path)


@pytest.mark.parametrize(("variant", "other"), [
    ("qwen3_5_4b", "qwen3_vl_4b"), ("qwen3_vl_4b", "qwen3_5_4b"), ("qwen3_5_9b", "qwen3_5_4b"),
    ("qwen2_5_vl_3b", "qwen3_5_2b"),
])  # fmt: skip
def test_a_folder_of_another_family_is_told_in_one_line(variant, other):
    with pytest.raises(UserError, match=f"is no {variant}: ") as error:
        check_variant(variant, PUBLISHED[other], "folder")
    words = str(error.value)
    assert "Config(" not in words and "\n" not in words
    mixed = (variant in ("qwen3_5_4b", "qwen3_5_9b")) != other.startswith("qwen3_5")
    absent = "is absent, published there" if variant[:7] == "qwen3_5" else "is there, published abs"
    assert (f"text.delta {absent}" in words) == mixed
    check_variant(variant, PUBLISHED[variant], "folder")


# bytes of the published files of Qwen3.5, from their index
TOTAL_SIZES = {
    "qwen3_5_0_8b": 1_746_882_752, "qwen3_5_2b": 4_548_144_832, "qwen3_5_4b": 9_319_737_856,
    "qwen3_5_9b": 19_306_216_416, "qwen3_5_27b": 55_562_872_800,
}  # fmt: skip


@pytest.mark.parametrize("variant", PUBLISHED)
def test_table_counts_the_released_sizes(variant):
    config = PUBLISHED[variant]
    table = tensor_table(config)
    assert sum(math.prod(leaf.shape) for leaf in table.values()) == PARAMETERS[variant]
    if variant not in TOTAL_SIZES:
        return
    stored = sum(
        math.prod(leaf.shape) * (4 if stays_float32(path) else 2) for path, leaf in table.items()
    )
    # the module that guesses several tokens ahead: a layer with attention, a product, three norms
    text = config.text
    full = [leaf for path, leaf in table.items() if path.startswith("backbone/decoder/blocks/full")]
    ahead = sum(math.prod(leaf.disk_shape) for leaf in full)
    ahead += 2 * text.hidden**2 + 3 * text.hidden
    assert len(full) + 4 == 15
    assert stored + 2 * ahead == TOTAL_SIZES[variant]
