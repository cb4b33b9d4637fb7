"""A build reads its files twice, parquet only in part at first: both readings answer alike."""

import pytest
from benchmark_files import png
from layout_case import build, hub_row, lines, parquet, pictures  # noqa: F401
from test_rationales import ANSWER, TWO
from test_rationales import row as talk

from jrm_jax.data import builders
from jrm_jax.data.ingest import building
from jrm_jax.data.ingest.layout import seen

ALPACA = {"instruction": TWO.format("Add a hat"), "input": "", "output": ANSWER,
          "images": [png(i) for i in range(3)]}  # fmt: skip
JUDGED = {"instruction": "Add a hat", "input_image": png(0), "output_image": png(1),
          "SC_reasoning": "Fine.", "SC_score": [20, 21], "PQ_reasoning": "Sharp.",
          "PQ_score": [9, 8], "conversations": None}  # fmt: skip
RECORD = {"id": "a", "prompt": [{"text": "Add", "image": None}, {"text": None, "image": png(0)}],
          "candidates": [{"image": png(1)}, {"image": png(2)}], "chosen": None,
          "scores": {"quality": [1, 2]}, "ranks": None, "dimensions": None}  # fmt: skip
PAIR = {"id": "a", "instruction": "Add", "source": png(0), "chosen": png(1), "rejected": png(2),
        "candidates": None}  # fmt: skip
RANKED = {"image": [png(1), png(2)], "prompt_id": "p", "prompt": "A cat", "rank": [1, 2],
          "image_text_alignment_rating": [6, 3], "fidelity_rating": None}  # fmt: skip
ROWS = {
    "editreward": hub_row(), "rationalrewards": ALPACA, "editscore": JUDGED, "jsonl": RECORD,
    "imagereward": RANKED,
    "hpdv3": {"prompt": "A cat", "path1": png(1), "path2": png(2), "choice_dist": [3, 1],
              "confidence": 0.5},
    "pair": PAIR, "talk": talk(TWO, [png(i) for i in range(3)], ANSWER),
}  # fmt: skip
LAYOUTS = {"pair": "jsonl", "talk": "rationalrewards"}


@pytest.mark.parametrize("kind", ROWS)
def test_any_field_may_be_null(pictures, build, monkeypatch, kind):
    """Beside rows that are whole; and what is read first is what both readings see."""
    row, layout = ROWS[kind], LAYOUTS.get(kind, kind)
    rows = [row, *({**row, name: None} for name in row), *({**row, name: None} for name in row)]
    examples, kinds = build(layout, parquet(pictures / "own.parquet", rows))
    assert examples
    assert not [words for _, words in kinds if "while it was read" in words or "dimension" in words]
    made = builders.LAYOUTS[layout].make(pictures, builders.parse_args(
        [layout, "--data=x", "--out=y"]))  # fmt: skip
    first = {name: row[name] for name in made.columns(list(row))}
    assert seen(made, first) == seen(made, row)


@pytest.mark.parametrize("key", [0, 0.0, "", None])
def test_keys_that_mean_nothing_to_python(pictures, build, key):
    rows = [hub_row(0, 1, 2, key=key), hub_row(0, 1, 3, key=key), hub_row(1, 1, 2, key=key)]
    examples, kinds = build("editreward", parquet(pictures / "own.parquet", rows))
    assert sorted(len(one.candidates) for one in examples) == [2, 3]
    assert kinds == {("kept", "one key and instruction with several sources (kept apart)"): 1}


@pytest.mark.parametrize("layout", ["jsonl", "csv"])
def test_a_group_without_labels_beside_labels_of_another_name(pictures, build, layout):
    """Its own unlabelled 'overall' is no dimension of the data set."""
    if layout == "csv":
        (pictures / "data").mkdir()
        (pictures / "data" / "1.csv").write_text(
            "source,instruction,edit,score_quality\n0.png,Add,1.png,2\n0.png,Add,2.png,1\n")
        (pictures / "data" / "2.csv").write_text(
            "source,instruction,edit,critique\n0.png,B,3.png,No.\n")
        path = pictures / "data"
    else:
        path = lines(pictures / "own.jsonl", [
            {"prompt": "Add", "scores": {"quality": [1, 2]}, "candidates": ["a", "b"]},
            {"prompt": "B", "candidates": [{"parts": "a", "critique": "No."}],
             "scores": {"quality": None}},
        ])  # fmt: skip
    examples, kinds = build(layout, path, f"--images={pictures}")
    assert [one.dimensions for one in examples] == [("quality",)] * 2 and not kinds
    assert examples[1].candidates[0].critique == "No." and not examples[1].weight.any()


def test_a_row_that_has_changed_since_it_was_read_first(pictures, monkeypatch, capsys):
    read, calls = building._Work._read, []

    def changing(work, file, columns, skip=0):
        calls.append(file)
        for where, row in read(work, file, columns, skip):
            yield where, row | {"prompt": f"{row['prompt']} {len(calls)}"}

    rows = [{**ROWS["hpdv3"], "path1": "1.png", "path2": "2.png"}]
    path = lines(pictures / "own.jsonl", rows)
    monkeypatch.setattr(building._Work, "_read", changing)
    arguments = [f"--data={path}", f"--out={pictures / 'no'}"]
    assert builders.main(["hpdv3", *arguments, "--skip_bad"]) == 1
    assert "not there when the file was read first" in capsys.readouterr().err
