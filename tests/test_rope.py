"""Index tables, MRoPE positions and config reading, against `transformers` and by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jrm_jax.errors import UserError
from jrm_jax.model.config import TextConfig, VisionConfig, load_config, vision_segments
from jrm_jax.model.rope import apply_rotary, decoder_rotary, image_tables, mrope_positions

QWEN2_5 = VisionConfig(
    "qwen2_5_vl", 32, 1280, 3420, 16, 14, 2, 2, 3, 2048,
    full_attention=(7, 15, 23, 31), window=112,
)  # fmt: skip
QWEN3 = VisionConfig(
    "qwen3_vl", 24, 1024, 4096, 16, 16, 2, 2, 3, 2048,
    deepstack=(5, 11, 17), num_positions=2304,
)  # fmt: skip
GRIDS = [(2, 2), (8, 8), (10, 26), (16, 6), (34, 18)]


@pytest.mark.parametrize("grid", GRIDS)
def test_window_tables_match_transformers(grid):
    torch = pytest.importorskip("torch")
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    tables = image_tables(grid, QWEN2_5)
    thw = torch.tensor([[1, *grid]])
    index, bounds = get_vision_window_index(
        thw, spatial_merge_size=2, window_size=112, patch_size=14
    )
    order = (index.numpy()[:, None] * 4 + np.arange(4)).reshape(-1)
    np.testing.assert_array_equal(tables.order, order)
    np.testing.assert_array_equal(tables.token_slots, np.argsort(index.numpy()))
    lengths = np.diff(bounds.numpy())
    np.testing.assert_array_equal(tables.windows, np.repeat(1 + np.arange(len(lengths)), lengths))
    positions = get_vision_position_ids(thw, 2).numpy()
    np.testing.assert_array_equal(tables.positions, positions[order])


@pytest.mark.parametrize("grid", GRIDS)
def test_position_taps_match_transformers(grid):
    torch = pytest.importorskip("torch")
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    tables = image_tables(grid, QWEN3)
    index, weight = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, *grid]]), 48, "bilinear", align_corners=True, spatial_merge_size=2
    )
    np.testing.assert_array_equal(tables.position_index, index.numpy())
    np.testing.assert_allclose(tables.position_weight, weight.numpy(), atol=1e-6)
    np.testing.assert_array_equal(tables.order, np.arange(grid[0] * grid[1]))
    assert tables.windows is None and not tables.order.flags.writeable


def test_a_grid_must_be_whole_tokens():
    with pytest.raises(ValueError, match="multiple of merge"):
        image_tables((3, 4), QWEN3)


def test_mrope_positions_by_hand():
    positions, following = mrope_positions([2, (2, 3), 1, (2, 2), 2], start=5)
    assert positions.dtype == np.int32 and following == 15
    np.testing.assert_array_equal(
        positions,
        [
            [5, 6, 7, 7, 7, 7, 7, 7, 10, 11, 11, 11, 11, 13, 14],
            [5, 6, 7, 7, 7, 8, 8, 8, 10, 11, 11, 12, 12, 13, 14],
            [5, 6, 7, 8, 9, 7, 8, 9, 10, 11, 12, 11, 12, 13, 14],
        ],
    )
    flat, following = mrope_positions([2, (2, 3), 1], start=5, mode="1d")
    np.testing.assert_array_equal(flat, np.broadcast_to(5 + np.arange(9), (3, 9)))
    assert following == 14 and mrope_positions([])[0].shape == (3, 0)
    with pytest.raises(ValueError, match="position mode"):
        mrope_positions([1], mode="2d")


def text_config(interleaved: bool) -> TextConfig:
    return TextConfig(2, 32, 4, 2, 8, 48, 72, 1e4, (2, 1, 1), interleaved, 1e-6, False, True, True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_keeps_lengths_and_depends_on_differences(interleaved):
    text = text_config(interleaved)
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(1, 1, 1, 8)).astype(np.float32) for _ in range(2))

    def product(q_position, k_position):
        turned = [
            apply_rotary(x, decoder_rotary(jnp.array(p, jnp.int32).reshape(1, 3, 1), text))
            for x, p in ((q, q_position), (k, k_position))
        ]
        np.testing.assert_allclose(jnp.linalg.norm(turned[0]), np.linalg.norm(q), rtol=1e-6)
        return float(jnp.sum(turned[0] * turned[1]))

    assert product((3, 4, 5), (1, 7, 2)) == pytest.approx(product((13, 5, 9), (11, 8, 6)), abs=1e-5)
    assert abs(product((3, 4, 5), (1, 7, 2)) - product((3, 4, 95), (1, 7, 2))) > 1e-3


def test_segments_of_the_towers():
    assert vision_segments(QWEN3) == (
        (0, 6, "full", 0), (6, 6, "full", 1), (12, 6, "full", 2), (18, 6, "full", None),
    )  # fmt: skip
    assert vision_segments(QWEN2_5)[:3] == (
        (0, 7, "window", None), (7, 1, "full", None), (8, 7, "window", None),
    )  # fmt: skip
    for vision in (QWEN3, QWEN2_5, replace(QWEN3, depth=27, deepstack=(8, 16, 24))):
        segments = vision_segments(vision)
        assert sum(length for _, length, _, _ in segments) == vision.depth


FLAT = {
    "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008,
    "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
    "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "use_sliding_window": False, "tie_word_embeddings": True,
    "image_token_id": 151655, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "out_hidden_size": 2048, "window_size": 112, "hidden_act": "silu",
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}  # fmt: skip


def write(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_flat_and_nested_configs_agree(tmp_path):
    flat = load_config(write(tmp_path, FLAT))
    assert flat.vision == QWEN2_5 and flat.text.head_dim == 128 and flat.text.tie_embeddings
    assert hash(flat) == hash(load_config(tmp_path))
    text_fields = ("hidden_size", "intermediate_size", "vocab_size", "rms_norm_eps", "hidden_act")
    text = {key: FLAT[key] for key in FLAT if key.startswith("num_") or key in text_fields}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    nested = {key: value for key, value in FLAT.items() if key not in text and "rope" not in key}
    nested["text_config"] = text | {"rope_parameters": rope}
    assert load_config(write(tmp_path, nested)) == flat


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"model_type": "llava"}, "'model_type' is 'llava'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"rope_scaling": {"type": "yarn"}}, "'yarn' is not supported"),
        ({"rope_scaling": {"mrope_section": [16, 24]}}, "mrope_section"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"num_hidden_layers": "36"}, "should be a whole number"),
        ({"vision_config": FLAT["vision_config"] | {"hidden_act": "gelu"}}, "hidden_act"),
        ({"vision_config": FLAT["vision_config"] | {"window_size": 14}}, "window_size"),
    ],
)
def test_bad_configs_are_named(tmp_path, change, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        load_config(write(tmp_path, FLAT | change))
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_missing_and_broken_config(tmp_path):
    with pytest.raises(UserError, match="not found"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_config(tmp_path)
