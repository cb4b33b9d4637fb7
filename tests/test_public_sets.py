"""A set of every layout that was added for a public one is built, opened and put into a batch."""

import ast
import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from layout_case import lines, pictures  # noqa: F401

from configs import discriminative, generative, joint
from jrm_jax import build, build_data
from jrm_jax.benchmarks import make_tiny_backbone
from jrm_jax.benchmarks.kill_test import SMALL
from jrm_jax.data import builders, store

EDITED = ("overall", "instruction_following", "consistency", "visual_quality")
DIMENSIONS = {
    "hpdv3": ("overall",),
    "imagereward": ("overall", "instruction_following", "visual_quality"),
    "rationalrewards": ("overall", "instruction_following", "text_rendering"),
    "spatialreward": EDITED,
}


ROOT = Path(__file__).resolve().parents[1]


def talk(images, asked, answered):
    return {"messages": [{"role": "user", "content": asked},
                         {"role": "assistant", "content": answered}], "images": images}  # fmt: skip


def aspect(number, name, scores):
    return (f"{number}. {name}:\n## Justification: Image A fits. Image B does not.\n"
            f"## Score A: {scores[0]}\n## Score B: {scores[1]}\n")  # fmt: skip


SPATIAL = json.dumps(
    {"edit_region": [{"id": 0, "label": "hat", "bbox_2d": [1, 2, 3, 4]}],
     "reasoning": "<|bbox_0|> There it is.", "score": [20, 10]}
)  # fmt: skip
ROWS = {
    "hpdv3": [
        {"prompt": "A cat", "path1": "1.png", "path2": "2.png", "choice_dist": [12, 4],
         "confidence": 0.5, "model1": "flux", "model2": "sd3"},
    ],
    "imagereward": [
        {"prompt": "A dog", "prompt_id": "1", "image_path": f"{i}.png", "rank": rank,
         "image_text_alignment_rating": 3, "fidelity_rating": i}
        for i, rank in ((3, 2), (4, 1), (5, 2))
    ],
    "rationalrewards": [
        talk(["0.png", "1.png", "2.png"], "User Instruction: Add a hat\nYou are provided with three"
             " images:\n1. Source Image <image>\n2. Edited Image A <image>\n3. Edited Image B"
             " <image>",
             aspect(1, "Text Faithfulness", (2, 3)) + aspect(4, "Text Rendering", (4, 1))),
    ],
    "spatialreward": [talk(["0.png", "6.png"], "Editing instruction: Add a bow", SPATIAL)],
}  # fmt: skip


@pytest.fixture
def folders(pictures):
    for name, rows in ROWS.items():
        path = lines(pictures / f"{name}.jsonl", rows)
        assert builders.main([name, f"--data={path}", f"--out={pictures / 'sets' / name}"]) == 0
    return {name: pictures / "sets" / name for name in ROWS}


def test_prepared_sets_have_their_dimensions_and_mix(folders, tmp_path):
    found = {name: tuple(store.read_manifest(path)["dimensions"]) for name, path in folders.items()}
    assert found == DIMENSIONS
    config = joint.get_config()
    make_tiny_backbone.main([f"--out={tmp_path / 'model'}", "--no-weights", *SMALL])
    config.backbone.path, config.backbone.random = str(tmp_path / "model"), True
    config.data.mixture = tuple((str(path), 1.0) for path in folders.values())
    config.data.dimensions = ("overall", "visual_quality", "text_rendering")
    config.data.programs = 1
    config.batch_size = len(folders)
    backbone = build.load_backbone_config(config)
    data = build_data.build_data(config, backbone, print)
    mesh = build.make_mesh(config, backbone, jax.devices()[:1])
    rows = {}
    with build_data.batches(config, data, "train", mesh, 0, 1) as batches:
        (batch,) = batches
    for row, name in enumerate(data.example_names(batch["example_index"])):
        kind = next((k for k in ROWS if k in name), "hpdv3" if "A cat" in name else "imagereward")
        rows[kind] = (
            batch["preference"][row][0, 1], batch["preference_weight"][row][0, 1],
            int(batch["candidate_mask"][row].sum()), bool(batch["critique_weights"][row].any()),
        )  # fmt: skip
    expected = {
        "hpdv3": ([0.75, 0.5, 0.5], [0.5, 0, 0], 2, False),
        "imagereward": ([0, 0, 0.5], [1, 1, 0], 3, False),
        "rationalrewards": ([1, 0.5, 1], [1, 0, 1], 2, True),
        "spatialreward": ([0.5, 0.5, 0.5], [0, 0, 0], 1, True),
    }
    assert set(rows) == set(expected)
    for kind, (share, weight, count, said) in expected.items():
        np.testing.assert_array_equal(rows[kind][0], np.float32(share), kind)
        np.testing.assert_array_equal(rows[kind][1], np.float32(weight), kind)
        assert rows[kind][2:] == (count, said), kind


def test_the_page_has_the_commands_of_every_public_set():
    """Download, build and training in a row; each command is one that the programs take."""
    text = (ROOT / "docs/data.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if "python -m jrm_jax.main" in line]
    configs = {"joint": joint, "discriminative": discriminative, "generative": generative}
    built, named = {}, set()
    for *_, build_cell, train_cell in [row for row in rows if len(row) == 4]:
        if command := re.search("`python -m jrm_jax.data.builders (.*)`", build_cell):
            args = builders.parse_args(shlex.split(command[1]))
            built[str(args.out)] = builders.make_layout(args)
            named.add(args.command)
        words = shlex.split(re.search("`python -m jrm_jax.main (.*)`", train_cell)[1])
        name, variant = re.match(r"--config=configs/(\w+).py:(\w+)", words[0]).groups()
        config = configs[name].get_config(variant)
        for word in words[1:]:
            field, value = word.removeprefix("--config.").split("=", 1)
            parsed = ast.literal_eval(value) if value.startswith("(") else value
            config.update_from_flattened_dict({field: parsed})
        paths = [path for path, _ in config.data.mixture] or [config.data.path]
        assert set(paths) <= set(built)
    assert named == {"editreward", "editscore", *ROWS}
