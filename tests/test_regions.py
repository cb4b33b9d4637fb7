"""SpatialReward's boxes: in words, or as a line of their own."""

import json

import pytest
from benchmark_files import png
from layout_case import build, lines, parquet, pictures  # noqa: F401

from jrm_jax.data import builders
from jrm_jax.data.ingest.regions import as_line, in_words, read_regions, unknown_regions
from jrm_jax.errors import RecordError

REGIONS = [
    {"id": 0, "label": "red hat", "bbox_2d": [120, 80, 340, 400]},
    {"id": 1, "label": "sky", "bbox_2d": [0, 0, 1000, 212.5]},
]
RULES = "Two images will be provided.\n\nEditing instruction: \n"
REASON = ("<|bbox_0|> The hat is there. <|bbox_1|>: Colour has shifted, as at <|bbox_0|>."
          " <|global|> Otherwise unchanged.")  # fmt: skip
SCORES = (
    "Scores: overall 11.22, instruction following 20, consistency 14, visual quality 9"
    " (naturalness 18, artifacts 9)."
)


def row(images, asked, answer):
    """As SpatialReward's card and prompts have it: the key `image`, one picture or two."""
    turns = [{"from": "human", "value": "<image>" * 2 + asked},
             {"from": "gpt", "value": json.dumps(answer)}]  # fmt: skip
    return {"image": images, "conversations": turns}


@pytest.fixture
def rows(pictures):
    """Two rows about one edit, whose picture has a name for each of them."""
    folder = pictures / "images"
    folder.mkdir()
    for name, seed in (("0_0", 0), ("0_1", 1), ("1_0", 1)):
        (folder / f"{name}.jpg").write_bytes(png(seed))
    follows = {"edit_region": REGIONS, "reasoning": REASON, "score": [20, 14]}
    looks = {"reasoning": "A seam.", "score": [18, 9]}
    return [
        row(["images/0_0.jpg", "images/0_1.jpg"], RULES + "Add a <|bbox_0|> hat", follows),
        row("images/1_0.jpg", "The image is an AI-generated image.", looks),
    ]


@pytest.mark.parametrize("style", ["words", "line"])
def test_both_rows_are_one_critique_with_its_boxes(pictures, build, rows, style):
    critiques = {
        "words": "Instruction: At red hat (left 120, top 80, right 340, bottom 400): The hat is"
        " there. At sky (left 0, top 0, right 1000, bottom 212.5): Colour has shifted, as at red"
        f" hat. Overall: Otherwise unchanged.\nQuality: A seam.\n{SCORES}",
        "line": "Regions: <|bbox_0|> red hat [120, 80, 340, 400]; <|bbox_1|> sky [0, 0, 1000,"
        f" 212.5].\nInstruction: {REASON}\nQuality: A seam.\n{SCORES}",
    }
    (example,), kinds = build(
        "spatialreward", lines(pictures / "data.jsonl", rows), f"--boxes={style}"
    )
    assert example.prompt[0].text == "Add a <|bbox_0|> hat" and example.prompt[1].data == png(0)
    (candidate,) = example.candidates
    assert candidate.parts[0].data == png(1) and candidate.score_line
    assert candidate.critique == critiques[style] and not kinds
    by_default = build("spatialreward", pictures / "data.jsonl")[0][0].candidates[0].critique
    assert by_default == critiques["words"]


def test_messages_and_parquet_of_them(pictures, build, rows):
    expected, _ = build("spatialreward", lines(pictures / "data.jsonl", rows))
    table = [
        {"image": [{"bytes": (pictures / name).read_bytes(), "path": name} for name in
                   ([r["image"]] if isinstance(r["image"], str) else r["image"])],
         "messages": [{"role": "user", "content": r["conversations"][0]["value"]},
                      {"role": "assistant", "content": r["conversations"][1]["value"]}]}
        for r in rows
    ]  # fmt: skip
    found, kinds = build("spatialreward", parquet(pictures / "data.parquet", table))
    assert [(e.prompt, e.candidates) for e in found] == [
        (e.prompt, e.candidates) for e in expected
    ] and not kinds  # fmt: skip


def test_bad_regions_are_left_out_and_unknown_ones_told(pictures, build, rows, capsys):
    def answer(number, regions, reason="Fine.", **more):
        said = {"edit_region": regions, "reasoning": reason, "score": [1, 2]} | more
        return row(["0.png", f"{number}.png"], RULES + "Add", said)

    bad = [
        answer(2, [{"id": 0, "bbox_2d": [1, 2, 3]}]),
        answer(2, [{"id": 0, "label": "hat"}]),
        answer(2, [{"id": 0, "bbox_2d": [340, 80, 120, 400]}]),
        answer(2, [{"id": 0, "bbox_2d": [0, 0, 1200, 400]}]),
        answer(2, [{"id": 0, "bbox_2d": [0, 0, "9", 400]}]),
        answer(2, REGIONS + REGIONS[:1]),
        answer(2, "everywhere"),
    ]
    good = [
        answer(3, [], "<|global|> Nothing was edited."),
        answer(4, json.dumps(REGIONS[:1]), "<|bbox_0|> A hat. <|bbox_7|> A bow."),
        row(["0.png", "5.png"], RULES + "Add", {"reasoning": "Plain.", "score": [1, 2]}),
    ]
    found, kinds = build("spatialreward", lines(pictures / "data.jsonl", [*bad, *good]))
    assert [e.candidates[0].critique.split("\n")[0] for e in found] == [
        "Instruction: Overall: Nothing was edited.",
        "Instruction: At red hat (left 120, top 80, right 340, bottom 400): A hat."
        " At region 7: A bow.",
        "Instruction: Plain.",
    ]
    assert kinds == {
        ("left out", "edit region that cannot be read"): len(bad),
        ("kept", "region that is referred to and has no box"): 1,
    }
    found, _ = build("spatialreward", lines(pictures / "data.jsonl", good), "--boxes=line")
    assert [e.candidates[0].critique.split("\n")[0] for e in found] == [
        "Regions: none.", "Regions: <|bbox_0|> red hat [120, 80, 340, 400].", "Instruction: Plain.",
    ]  # fmt: skip
    path = lines(pictures / "data.jsonl", rows)
    assert builders.main(["editscore", f"--data={path}", f"--out={pictures / 'no'}"]) == 1
    assert "read these rows with the layout spatialreward" in capsys.readouterr().err


def test_words():
    found = read_regions(REGIONS, "f:1")
    assert unknown_regions("<|bbox_2|><|bbox_0|> and <|bbox_2|>", found) == [2]
    assert in_words("No token.", found) == "No token."
    assert in_words("<|bbox_1|><|bbox_1|>, <|bbox_0|> Both changed.", {}) == (
        "At region 1 and region 0: Both changed."
    )
    assert in_words("Better at <|global|>!", found) == "Better at the whole!"
    assert as_line({}) == "Regions: none."
    with pytest.raises(RecordError, match=r"f:1: field 'edit_region\[0\]': is 3; needs 'bbox_2d'"):
        read_regions([3], "f:1")
