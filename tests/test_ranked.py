"""ImageRewardDB: ranks and ratings of all pictures of a prompt."""

import json

import numpy as np
from benchmark_files import png
from layout_case import build, lines, parquet, pictures  # noqa: F401

from jrm_jax.data.schema import Text


def row(picture, rank, alignment=3, fidelity=4, **changes):
    """All fields of ImageRewardDB's train_1.json."""
    return {
        "image_path": f"{picture}.png", "prompt_id": "000864-0061", "prompt": "a holy woman, 8 k ",
        "classification": "People", "image_amount_in_total": 9, "rank": rank, "overall_rating": 4,
        "image_text_alignment_rating": alignment, "fidelity_rating": fidelity,
    } | changes  # fmt: skip


def test_ranks_and_ratings_become_one_group(pictures, build):
    rows = [
        row(0, 2, 3, 7), row(1, 1, 5, 7), row(5, 1, prompt_id="2", prompt="Another"),
        row(2, 3, 3, None), row(3, 2, 2, 1), row(6, 2, prompt_id="2", prompt="Another"),
    ]  # fmt: skip
    (pictures / "train_1.json").write_text(json.dumps(rows))
    (first, other), kinds = build("imagereward", pictures / "train_1.json")
    assert first.dimensions == ("overall", "instruction_following", "visual_quality")
    assert first.prompt == (Text("a holy woman, 8 k "),) and not kinds
    assert [c.parts[0].data for c in first.candidates] == [png(i) for i in range(4)]
    # against the first picture: rank 1, 3 and 2 for its 2; alignment 5, 3, 2; fidelity 7, -, 1
    assert first.preference[0, 1:].tolist() == [[0, 0, 0.5], [1, 0.5, 0.5], [0.5, 1, 1]]
    assert first.weight[0, 1:].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert other.preference[0, 1].tolist() == [1, 0.5, 0.5] and len(other.candidates) == 2


def test_rows_with_their_pictures_rows_of_groups_and_of_the_training_code(pictures, build):
    expected, _ = build("imagereward", lines(pictures / "a.jsonl", [row(0, 2, 5), row(1, 1, 2)]))
    def saved(r):
        picture = (pictures / r.pop("image_path")).read_bytes()
        return r | {"image": {"bytes": picture, "path": None}}

    flat = parquet(pictures / "flat.parquet", [saved(row(0, 2, 5)), saved(row(1, 1, 2))])
    group = row(0, [2, 1], [5, 2], [4, 4], image_path=["0.png", "1.png"])
    for path in (flat, lines(pictures / "group.jsonl", [group])):
        found, kinds = build("imagereward", path)
        assert not kinds and len(found) == 1
        assert found[0].candidates == expected[0].candidates
        np.testing.assert_array_equal(found[0].preference, expected[0].preference)
        np.testing.assert_array_equal(found[0].weight, expected[0].weight)
    code = {"prompt": "A cat", "generations": ["0.png", "1.png", "2.png"], "ranking": [2, 1, 2]}
    ((example,), kinds) = build("imagereward", lines(pictures / "code.jsonl", [code]))
    assert example.dimensions == ("overall",) and not kinds
    assert example.preference[..., 0].tolist() == [[0.5, 0, 0.5], [1, 0.5, 1], [0.5, 0, 0.5]]


def test_bad_rows_of_imagereward(pictures, build):
    rows = [
        row(0, 1), row(1, 2), row(0, 1), row(1, 1), row("gone", 3), row(2, "first"), row(2, True),
        row(2, 3, alignment="good"), row(2, 3, prompt=None), row(2, 3, prompt=" "),
        row(2, 3, prompt="Alone"),
        row(2, None, None, None, prompt="No rank"), row(3, None, None, None, prompt="No rank"),
        row(2, [1], prompt="Lists", image_path=["2.png", "3.png"]),
    ]  # fmt: skip
    (example,), kinds = build("imagereward", lines(pictures / "train.jsonl", rows))
    assert [c.parts[0].data for c in example.candidates] == [png(0), png(1)]
    assert kinds == {
        ("kept", "picture that is listed again with other ranks or ratings (the first counts)"): 1,
        ("left out", "picture that is missing"): 1, ("left out", "field 'rank'"): 3,
        ("left out", "field 'image_text_alignment_rating'"): 1, ("left out", "field 'prompt'"): 2,
        ("left out", "too few candidates"): 1, ("left out", "group without a judgement"): 2,
    }  # fmt: skip
