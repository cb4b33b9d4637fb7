"""Records as JSON and parquet bring them are read alike by the builder and by `evaluate`."""

import numpy as np
import pytest
from benchmark_files import png
from layout_case import build, lines, parquet, pictures  # noqa: F401

from jrm_jax.data.parsing import named_dimensions, parse_json
from jrm_jax.data.schema import Text, to_record
from jrm_jax.errors import RecordError
from jrm_jax.evaluation.cases import Issues, Picture
from jrm_jax.evaluation.layouts import LAYOUTS


def image(number):
    return {"text": None, "image": f"{number}.png"}


def column(number, named=False):
    """As an image column of Hugging Face comes."""
    return {"bytes": None if named else png(number), "path": f"{number}.png"}


PROMPT = [{"text": "Add", "image": None}, image(0)]
FORMS = {
    "nulls": {"critique": None, "prompt": PROMPT, "scores": {"overall": [2, 1], "quality": None},
              "candidates": [{"parts": [image(1)], "critique": None, "score_line": None},
                             {"parts": [image(2)], "critique": "Fine.", "score_line": False}],
              "chosen": None, "weight": None},
    "names": {"prompt": [PROMPT[0], {"text": None, "image": column(0, True)}], "ranks": [1, 2],
              "candidates": [{"image": column(1, True)}, {"image": column(2, True)}]},
    "pair": {"instruction": "Add", "source": "0.png", "chosen": "1.png", "rejected": "2.png",
             "prompt": None, "candidates": None},
    "bytes": {"prompt": [{"text": "Add", "image": None}, {"text": None, "image": column(0)}],
              "candidates": [{"image": column(1)}, {"image": column(2)}], "ranks": [1, 2]},
    "columns": {"instruction": "Add", "source": column(0), "chosen": column(1),
                "rejected": column(2)},
    "bare": {"prompt": [{"text": "Add", "image": None}, {"text": None, "image": column(0)}],
             "candidates": [png(1), png(2)], "ranks": [1, 2]},
}  # fmt: skip


def evaluated(path):
    issues = Issues()
    cases = LAYOUTS["jsonl"].read(str(path), issues).cases
    assert not issues.found
    return cases


@pytest.mark.parametrize("form", [*FORMS, "prepared"])
def test_the_builder_and_evaluate_read_the_same(pictures, build, form):
    if form == "prepared":
        made = parse_json(FORMS["bytes"], lambda value: value, "x")
        row = to_record(made)
    else:
        row = {"id": "one"} | FORMS[form]
    files = [parquet(pictures / "own.parquet", [row])]
    if form in ("nulls", "names", "pair"):
        files.append(lines(pictures / "own.jsonl", [row]))
    for path in files:
        (example,), kinds = build("jsonl", path)
        assert not kinds and example.prompt[0].text == "Add" and example.prompt[1].data == png(0)
        assert [one.parts[0].data for one in example.candidates] == [png(1), png(2)]
        (case,) = evaluated(path)
        assert example.dimensions == ("overall",) and case.dimension == "overall"
        assert case.prompt[0] == Text("Add") and isinstance(case.prompt[1], Picture)
        assert [one[0].read() for one in case.candidates] == [png(1), png(2)]
        (comparison,) = case.comparisons
        assert comparison.label == 1 and example.preference[0, 1, 0] == 1


QUESTION = {"role": "user", "content": "Add"}


@pytest.mark.parametrize(
    "row",
    [
        # the question again before each answer, as chat data has it
        {"prompt": "Add", "source": "0.png", "chosen": [QUESTION, {"role": "assistant", "content":
         [{"type": "image"}]}], "rejected": [QUESTION, {"role": "assistant", "content":
         "<image>"}], "images": ["1.png", "2.png"]},
        {"prompt": "Add", "source": "0.png", "chosen": [QUESTION, {"from": "gpt", "value": "No."},
         QUESTION, {"from": "gpt", "value": "<image>"}], "rejected": "2.png", "images": ["1.png"]},
        # a place in a plain string
        {"instruction": "<image>\nAdd", "images": ["0.png"], "chosen": "1.png",
         "rejected": "2.png"},
        {"instruction": "Add <image>", "images": ["0.png", "1.png", "2.png"], "chosen": "<image>",
         "rejected": "<image>"},
        {"prompt": ["Add", "<image>"], "images": ["0.png", "1.png", "2.png"],
         "chosen": "\n<image>", "rejected": ["<image>"]},
    ],
)  # fmt: skip
def test_questions_and_places_of_pictures_in_pairs(row):
    found = parse_json(row, lambda value: value.encode(), "x")
    assert sorted(part.text for part in found.prompt if isinstance(part, Text)) == ["Add"]
    assert [part.data for part in found.prompt if not isinstance(part, Text)] == [b"0.png"]
    assert [[part.data for part in one.parts] for one in found.candidates] == [
        [b"1.png"], [b"2.png"]
    ]  # fmt: skip


def test_places_without_pictures_and_questions_without_answers():
    pair = {"prompt": "Add", "chosen": "Write <image> here.", "rejected": "b"}
    found = parse_json(pair, lambda value: value.encode(), "x")
    assert found.candidates[0].parts[0].text == "Write <image> here."  # no `images`: a text
    for images, shown in (([], []), (["0.png"], [b"0.png"])):
        row = {"prompt": "Add", "images": images, "chosen": "use an <image> tag", "rejected": "b"}
        found = parse_json(row, lambda value: value.encode(), "x")
        assert found.candidates[0].parts[0].text == "use an <image> tag"
        assert [part.data for part in found.prompt[1:]] == shown
    row = pair | {"prompt": "Write <image> here", "images": []}
    assert parse_json(row, lambda value: value.encode(), "x").prompt[0].text == row["prompt"]
    with pytest.raises(RecordError, match="holds the question, and no answer"):
        parse_json(pair | {"chosen": [QUESTION]}, lambda value: value.encode(), "x")


@pytest.mark.parametrize("row", [
    *FORMS.values(), {"scores": {"a": None}}, {"scores": {"a": None, "b": [1, 2]}}, {"scores": {}},
    {"ranks": [1, 2], "chosen": None}, {"dimensions": ["x"], "chosen": "a", "rejected": "b"},
    {"scores": {"x": [1, 2]}, "chosen": "a", "rejected": "b", "prompt": "Add"},
])  # fmt: skip
def test_the_dimensions_of_a_raw_row_are_those_of_its_example(row):
    whole = {"prompt": "Add", "candidates": [{"parts": ["a"], "critique": "A."},
                                             {"parts": ["b"], "critique": "B."}]}  # fmt: skip
    row = row if "prompt" in row or "chosen" in row and row["chosen"] else whole | row
    row = {"instruction": "Add"} | row if row.get("chosen") else row
    read = parse_json(row, lambda value: value if isinstance(value, bytes) else value.encode(), "x")
    seen = {name: value for name, value in row.items() if name not in ("prompt", "candidates")}
    said = named_dimensions(seen)
    assert said == read.dimensions or not said and not read.weight.any()
    assert np.shape(read.weight)[2] == len(read.dimensions)


def test_what_is_wrong_is_said_alike(pictures, build):
    bad = [{"prompt": "Add", "candidates": [{"text": None, "image": 5}, "b"], "ranks": [1, 2]},
           {"prompt": "Add", "candidates": ["a", "b"], "ranks": [1, 2], "critique": "No."}]
    path = lines(pictures / "own.jsonl", [*bad, {"id": "one"} | FORMS["names"]])
    _, kinds = build("jsonl", path)
    assert sum(kinds.values()) == 2
    issues = Issues()
    assert len(LAYOUTS["jsonl"].read(str(path), issues).cases) == 1
    (pictures / "about.json").write_text('{"made": "by us"}')  # passed over, as the builder does
    assert len(LAYOUTS["jsonl"].read(str(pictures), issues).cases) == 1
    for row, words in zip(bad, ("candidates[0][0].image", "is comparative"), strict=True):
        with pytest.raises(RecordError) as error:
            parse_json(row, lambda value: b"", "x")
        assert words in str(error.value)
