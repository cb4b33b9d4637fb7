"""Examples: JSON in, labels expanded, bad input named, records and back."""

import copy
import io
import json
import random

import numpy as np
import pytest
from PIL import Image as Pillow

from jrm_jax.data.ingest.pictures import GroupPictures, check_image
from jrm_jax.data.parsing import parse_json
from jrm_jax.data.schema import (
    Candidate,
    Image,
    PreferenceExample,
    Text,
    from_record,
    in_dimensions,
    to_record,
    validate,
)
from jrm_jax.errors import UserError


def png(colour=(10, 20, 30), size=(40, 30)) -> bytes:
    file = io.BytesIO()
    Pillow.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


GOOD = {
    "id": "cat",
    "prompt": [{"text": "Make the cat white"}, {"image": "cat.png"}],
    "candidates": [
        {"parts": [{"image": "a.png"}], "critique": "White.\nscore nine", "score_line": True},
        {"parts": [{"image": "b.png"}], "critique": "Still black."},
        {"parts": ["I cannot do that"]},
    ],
    "ranks": [1, 2, 2],
}


def parse(obj, **kwargs):
    return parse_json(obj, lambda name: name.encode(), "train.jsonl:7", **kwargs)


def test_parse_json():
    example = parse(GOOD)
    assert example.id == "cat" and example.dimensions == ("overall",)
    assert example.prompt == (Text("Make the cat white"), Image(b"cat.png"))
    assert example.candidates[0] == Candidate((Image(b"a.png"),), "White.\nscore nine", True)
    assert example.candidates[2] == Candidate((Text("I cannot do that"),))
    np.testing.assert_array_equal(
        example.preference[..., 0], [[0.5, 1, 1], [0, 0.5, 0.5], [0, 0.5, 0.5]]
    )
    np.testing.assert_array_equal(example.weight[..., 0], 1 - np.eye(3))
    assert example.preference.dtype == example.weight.dtype == np.float32


def labelled(**labels):
    return parse({"prompt": "p", "candidates": ["x", "y", "z"], **labels})


def test_scores_of_several_dimensions_with_gaps():
    example = labelled(scores={"following": [3, None, 1], "quality": [2, 2, 5]})
    assert example.dimensions == ("following", "quality")
    np.testing.assert_array_equal(
        example.preference[:, :, 1], labelled(ranks=[2, 2, 1]).preference[..., 0]
    )
    expected = np.zeros((3, 3))
    expected[0, 2] = expected[2, 0] = 1  # the middle one is unlabelled
    np.testing.assert_array_equal(example.weight[:, :, 0], expected)
    assert example.preference[0, 2, 0] == 1 and example.preference[2, 0, 0] == 0
    assert example.preference[0, 1, 0] == 0.5


def test_an_example_over_other_dimensions():
    example = parse({"prompt": "p", "candidates": ["x", "y"], "scores": {"b": [1, 2]}})
    wide = in_dimensions(example, ("a", "b"))
    assert wide.dimensions == ("a", "b")
    assert wide.weight[..., 0].sum() == 0 and wide.weight[..., 1].sum() == 2
    assert wide.preference[0, 1].tolist() == [0.5, 0]
    assert in_dimensions(wide, ("b",)).preference.tolist() == example.preference.tolist()
    with pytest.raises(UserError, match=r"scores\.b'?: is unknown"):
        parse({"prompt": "p", "candidates": ["x", "y"], "scores": {"b": [1, 2]},
               "dimensions": ["a"]})  # fmt: skip


def test_preference_matrix_keeps_cycles_gaps_and_weights():
    cycle = [[None, 1, 0], [0, None, 1], [1, 0, None]]
    example = labelled(preference=cycle, weight=3)
    np.testing.assert_array_equal(
        example.preference[..., 0], [[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]
    )
    np.testing.assert_array_equal(example.weight[..., 0], 3 * (1 - np.eye(3)))
    partial = labelled(preference=[[None, 1, None], [0, None, None], [None, None, None]])
    assert partial.weight.sum() == 2 and partial.preference[2, 0, 0] == 0.5
    several = labelled(
        preference=[[[0.5, 0.5], [1, 0], [1, 1]], [[0, 1], 0.5, [1, 1]], [[0, 0], [0, 0], 0.5]],
        dimensions=["a", "b"],
    )
    assert several.preference[0, 1].tolist() == [1, 0] and several.weight.sum() == 12


def test_critiques_alone_are_enough_labels():
    candidates = [{"parts": ["x"], "critique": "good"}, {"parts": ["y"], "critique": "bad"}]
    example = parse({"prompt": "p", "candidates": candidates}, default_id="7")
    assert example.weight.sum() == 0 and example.id == "7"


def broken(**changes):
    return {**GOOD, **changes}


BAD = [
    ([], "(whole line)", "must be an object"),
    (broken(prompt=3), "prompt", "is 3, must be"),
    (broken(prompt=[]), "prompt", "is empty"),
    (broken(prompt=[""]), "prompt[0].text", "non-empty"),
    (broken(prompt=[{"txt": "a"}]), "prompt[0].txt", "did you mean 'text'"),
    (broken(prompt=[{"text": "a", "image": "b"}]), "prompt[0]", "exactly one"),
    (broken(prompt=[{"image": 4}]), "prompt[0].image", "must be a string"),
    (broken(candidates={"a": 1}), "candidates", "must be a list"),
    (broken(candidates=["only one"]), "candidates", "at least 2"),
    (broken(candidates=["a", None]), "candidates[1]", "is null"),
    (broken(candidates=["a", {"parts": []}], ranks=[1, 2]), "candidates[1].parts", "is empty"),
    (broken(candidates=["a", {"critique": "c"}]), "candidates[1].parts", "is missing"),
    (broken(candidates=["a", {"parts": "b", "critique": 5}]), "candidates[1].critique", "is 5"),
    (
        broken(candidates=["a", {"parts": "b", "critique": " "}], ranks=[1, 2]),
        "candidates[1].critique",
        "non-em",
    ),
    (broken(candidates=["a", {"parts": "b", "score_line": 1}]), "candidates[1].score_line", "true"),
    (broken(critique="b is better"), "critique", "comparative"),
    (broken(rank=[1, 2, 3]), "rank", "did you mean 'ranks'"),
    (broken(ranks=[1, 2]), "ranks.overall", "2 entries for 3"),
    (broken(ranks=[1, 2, "3"]), "ranks.overall[2]", "must be a number"),
    (broken(ranks=[1, 2, True]), "ranks.overall[2]", "must be a number"),
    (broken(ranks=[1, 2, float("nan")]), "ranks.overall[2]", "must be a number"),
    (broken(ranks=7), "ranks", "must be a list"),
    (broken(ranks=None), "ranks", "no labels"),
    (broken(ranks=[None, None, 1]), "ranks", "no labels"),
    (broken(scores=[1, 2, 3]), "scores", "beside 'ranks'"),
    (broken(ranks=None, preference=[[0.5, 1], [0, 0.5]]), "preference", "2 entries, must have 3"),
    (broken(weight=-1), "weight[0][1][0]", "must be >= 0"),
    (broken(weight=[[0, 1, 1], [2, 0, 1], [1, 1, 0]]), "weight[0][1][0]", "differs from"),
    (broken(weight="x"), "weight", "must be a number"),
    (broken(id=[5]), "id", "must be a string"),
    (broken(id=""), "id", "non-empty"),
    (broken(dimensions="a"), "dimensions", "list of names"),
    (broken(dimensions=["a", "a"], ranks={"a": [1, 2, 3]}), "dimensions", "distinct"),
    (broken(dimensions=["a", "b"]), "ranks", "must name its dimensions"),
]


@pytest.mark.parametrize("obj, field, words", BAD, ids=range(len(BAD)))
def test_bad_json_is_one_line_that_names_file_and_field(obj, field, words):
    with pytest.raises(UserError) as error:
        parse(obj)
    message = str(error.value)
    assert message.startswith(f"train.jsonl:7: field '{field}': ") and words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "matrix, field, words",
    [
        ([[0.5, 1.7], [-0.7, 0.5]], "preference[0][1][0]", "is 1.7; allowed"),
        ([[0.5, 1], [1, 0.5]], "preference[0][1][0]", "asymmetric"),
        ([[0.5, 1], [None, 0.5]], "preference[1][0][0]", "mirror"),
        ([[0.5, 1, 0], [0, 0.5, 0]], "preference[0]", "3 entries, must have 2"),
        ([[0.5, "1"], [0, 0.5]], "preference[0][1]", "must be a number"),
    ],
)
def test_bad_preference_matrix(matrix, field, words):
    with pytest.raises(UserError) as error:
        parse({"prompt": "p", "candidates": ["x", "y"], "preference": matrix})
    assert f"field '{field}': " in str(error.value) and words in str(error.value)


def test_any_mutilated_object_is_either_read_or_a_user_error():
    rng = random.Random(0)
    junk = [None, 3, -1.5, "", "x", [], {}, [[]], True, {"text": 1}, [None], {"parts": {}}]
    refused = 0
    for _ in range(400):
        obj = copy.deepcopy(GOOD)
        target = obj
        while True:  # walk to a random place and put junk there
            key = rng.choice(list(target) if isinstance(target, dict) else range(len(target)))
            if not isinstance(target[key], (dict, list)) or not target[key] or rng.random() < 0.3:
                target[key] = rng.choice(junk)
                break
            target = target[key]
        try:
            validate(parse(obj), "x")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 200


def test_validate_arrays():
    good = parse(GOOD)

    def change(**fields):
        return PreferenceExample(**{**vars(good), **fields})

    validate(good, "x")
    share = np.full((3, 3, 1), 0.5, np.float32)
    share[0, 1], share[1, 0] = 0.7, 0.3
    validate(change(preference=share), "x")
    share[1, 0] = 0.31
    with pytest.raises(UserError, match=r"preference\[0\]\[1\]\[0\]': is asymmetric"):
        validate(change(preference=share), "x")
    diagonal = good.weight.copy()
    diagonal[1, 1] = 1
    for example, words in (
        (change(weight=diagonal), "diagonal"),
        (change(preference=good.preference[:2, :2]), r"shape \[2, 2, 1\]"),
        (change(weight=good.weight * np.nan), "must be >= 0"),
        (change(preference=good.preference * 2), "allowed: 0 to 1"),
        (change(candidates=good.candidates[2:]), "at least 2"),
        (change(prompt=(Image(b""),)), "image with data"),
    ):
        with pytest.raises(UserError, match=words):
            validate(example, "x")


def test_image_files(tmp_path):
    (tmp_path / "good.png").write_bytes(png())
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Pillow.fromarray(noise).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    read = GroupPictures(tmp_path).read
    assert read("good.png") == png() and read("whole.png") == whole
    for name, words in (("cut.png", "truncated"), ("text.png", "Pillow knows")):
        obj = broken(prompt=[{"image": name}])
        with pytest.raises(UserError) as error:
            parse_json(obj, read, "f:1")
        assert "f:1: field 'prompt[0].image': " in str(error.value)
        assert name in str(error.value) and words in str(error.value)
    with pytest.raises(UserError, match=r"absent\.png cannot be read \(No such file"):
        read("absent.png")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
        read(".")


def test_decompression_bomb_is_refused():
    bomb = bytearray(png())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    with pytest.raises(UserError, match="bomb.png is a picture of 60000 x 60000 pixels"):
        check_image(bytes(bomb), "bomb.png")


def test_record_round_trip():
    source = png()
    example = PreferenceExample(
        id="ü-1",
        prompt=(Text('say "hi"\n'), Image(source)),
        candidates=(
            Candidate((Image(source),), "same\nnine", True),
            Candidate((Text("0"), Image(png((1, 2, 3))))),
        ),
        preference=np.asarray([[[0.5, 0.5], [0, 1]], [[1, 0], [0.5, 0.5]]], np.float32),
        weight=np.asarray([[[0, 0], [1, 0.25]], [[1, 0.25], [0, 0]]], np.float32),
        dimensions=("a", "b"),
    )
    record = to_record(example)
    assert len(record["images"]) == 2  # the source stands twice, and is kept once
    stored = {"id": record["id"].encode(), "record": record["record"].encode()}
    for back in (from_record(record), from_record({**stored, "images": record["images"]})):
        assert (back.id, back.prompt, back.candidates, back.dimensions) == (
            example.id, example.prompt, example.candidates, example.dimensions,
        )  # fmt: skip
        np.testing.assert_array_equal(back.preference, example.preference)
        np.testing.assert_array_equal(back.weight, example.weight)
        assert back.weight.dtype == np.float32
    json.loads(record["record"])
