"""Builders: EditReward JSON, JSON lines and the built-in world become prepared data sets."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from jrm_jax.data import builders, store
from jrm_jax.data.ingest.judgements import EDITREWARD as DIMENSIONS
from jrm_jax.data.schema import from_record
from jrm_jax.data.world.prepare import prepare_world
from jrm_jax.errors import UserError

EXAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "editreward_example"
PICTURES = ("source.png", "other.png", "a.png", "b.png", "c.png")


def png(seed: int, width: int = 24, height: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pair(path1="a.png", path2="b.png", scores1=(8, 4, 4), scores2=(6, 2, 4), **changes):
    """One record of EditReward's JSON; scores: overall, instruction following, visual quality."""
    record = {
        "prompt": "Add a bowl", "choice_dist": None, "confidence": None, "path_src": "source.png",
        "path1": path1, "path2": path2, "model1": "x", "model2": "y", "tie_case": False,
    }  # fmt: skip
    for side, scores in ((1, scores1), (2, scores2)):
        for name, score in zip(("overall", "dim1", "dim2"), scores, strict=True):
            record[f"model{side}_{name}_score"] = score
    return record | changes


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, name in enumerate(PICTURES):
        (folder / name).write_bytes(png(seed))
    return folder


@pytest.fixture
def build(tmp_path, images, capsys):
    """build(kind, content, *arguments) -> (status, lines printed, lines on stderr)."""

    def run(kind, content, *arguments, out="out"):
        path = tmp_path / ("in.json" if kind == "editreward" else "in.jsonl")
        if kind == "jsonl" and not isinstance(content, str):
            content = "\n".join(line if isinstance(line, str) else json.dumps(line)
                                for line in content)  # fmt: skip
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        capsys.readouterr()
        status = builders.main(
            [kind, f"--json={path}", f"--images={images}", f"--out={tmp_path / out}", *arguments]
        )
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err.splitlines()

    return run


def groups(tmp_path, images, pairs):
    return groups_of("editreward", tmp_path, images, pairs)


def groups_of(kind, tmp_path, images, pairs):
    """What a build of these pairs holds."""
    path, out = tmp_path / "pairs.json", tmp_path / f"groups{len(list(tmp_path.iterdir()))}"
    path.write_text(json.dumps(pairs))
    assert builders.main([kind, f"--data={path}", f"--images={images}", f"--out={out}"]) == 0
    return [from_record(record) for record in store.open_dataset(out)["train"]]


# EditReward


def test_pairs_of_one_source_and_prompt_become_one_group(tmp_path, images):
    pairs = [
        pair("a.png", "b.png"),
        pair(path_src="other.png"),
        pair("c.png", "b.png", (1, 1, 1), (2, 2, 2)),
        pair(prompt="Add a cup"),
    ]
    found = groups(tmp_path, images, pairs)
    # in the order in which they become complete
    assert [len(group.candidates) for group in found] == [2, 3, 2]
    assert len({group.id for group in found}) == 3
    first = found[1]
    assert first.dimensions == DIMENSIONS
    assert first.prompt[0].text == "Add a bowl"
    assert first.prompt[1].data == (images / "source.png").read_bytes()
    names = [name for c in first.candidates for name in PICTURES
             if c.parts[0].data == (images / name).read_bytes()]  # fmt: skip
    assert names == ["a.png", "b.png", "c.png"]
    assert all(c.critique is None for c in first.candidates)
    # a against b: wins, wins, equal; c against b: loses everywhere; a and c were not compared
    assert first.preference[0, 1].tolist() == [1, 1, 0.5]
    assert first.preference[1, 0].tolist() == [0, 0, 0.5]
    assert first.preference[2, 1].tolist() == [0, 0, 0]
    assert first.weight[0, 1].tolist() == first.weight[2, 1].tolist() == [1, 1, 1]
    assert not first.weight[0, 2].any() and not first.weight[2, 0].any()
    assert not np.einsum("iir->ir", first.weight).any()


def test_equal_overall_scores_are_a_tie_whose_dimensions_may_differ(tmp_path, images):
    (group,) = groups(tmp_path, images, [pair(scores1=(5, 2, 3), scores2=(5, 3, 2))])
    assert group.preference[0, 1].tolist() == [0.5, 0, 1]
    assert group.weight[0, 1].tolist() == [1, 1, 1]


def test_tie_case_overrules_overall_scores_only(tmp_path, images):
    scores = {"scores1": (9, 2, 3), "scores2": (5, 3, 2)}
    (group,) = groups(tmp_path, images, [pair(**scores, tie_case=True)])
    assert group.preference[0, 1].tolist() == [0.5, 0, 1]
    scores = {"scores1": (None, 2, None), "scores2": (None, 3, 4)}
    (group,) = groups(tmp_path, images, [pair(**scores, tie_case=True)])
    assert group.preference[0, 1, :2].tolist() == [0.5, 0]
    assert group.weight[0, 1].tolist() == [1, 1, 0]


def test_repeated_pairs(tmp_path, images):
    """Agreeing votes weigh more; of differing ones the share counts; order means nothing."""
    better, worse = {"scores1": (8, 4, 4), "scores2": (5, 2, 2)}, (5, 2, 2)
    agree = [pair("a.png", "b.png", **better), pair("b.png", "a.png", worse, (8, 4, 4))]
    (group,) = groups(tmp_path, images, agree)
    assert len(group.candidates) == 2
    assert group.preference[0, 1].tolist() == [1, 1, 1]
    assert group.weight[0, 1].tolist() == group.weight[1, 0].tolist() == [2, 2, 2]
    (group,) = groups(tmp_path, images, [agree[0], pair("b.png", "a.png", **better)])
    assert group.preference[0, 1].tolist() == group.preference[1, 0].tolist() == [0.5] * 3
    assert group.weight[0, 1].tolist() == [2, 2, 2]


NOTHING = {f"model1_{name}_score": None for name in ("overall", "dim1", "dim2")}
BAD_PAIRS = {
    "missing image": (pair(path1="gone.png"), "path1", "gone.png cannot be read (No such file"),
    "missing source": (pair(path_src="gone.png"), "path_src", "gone.png"),
    "truncated": (pair(path2="truncated.png"), "path2", "truncated.png is"),
    "not a picture": (pair(path2="text.png"), "path2", "text.png is"),
    "same edit": (pair("a.png", "a.png"), "path2", "same edit"),
    "prompt type": (pair(prompt=7), "prompt", "is 7, must be a string"),
    "prompt empty": (pair(prompt=""), "prompt", "is empty"),
    "path absent": (pair(path1=None), "path1", "holds no picture"),
    "score type": (pair(model2_dim1_score="4"), "model2_dim1_score", "must be a number"),
    "no judgement": (pair(**NOTHING), "model1_overall_score", "no dimension is judged"),
    "unknown vote": (pair(vote_type="leftish"), "vote_type", "is 'leftish'; known: leftvote"),
    "not an object": (["a.png"], "(whole row)", "must be an object"),
}


@pytest.fixture
def bad_images(images):
    (images / "truncated.png").write_bytes(png(9, 200, 100)[:-5000])
    (images / "text.png").write_text("no picture")


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_bad_pair_is_one_line_with_file_index_and_field(build, bad_images, tmp_path, name):
    record, field, words = BAD_PAIRS[name]
    status, out, err = build("editreward", [pair(), record, pair("b.png", "c.png")])
    assert status == 1 and not out and len(err) == 1
    assert err[0].startswith(f"error: {tmp_path / 'in.json'}[1]: field '{field}': ")
    assert words in err[0]
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{", "is not JSON"),
        ('{"prompt": "x"}', "must hold a list of objects, is an object"),
        ('[{"prompt": "x"}', "is not JSON"),
        ("[]]", "something follows the list"),
        ("[]", "no usable record"),
    ],
)
def test_a_bad_file_is_one_line(build, tmp_path, content, words):
    status, out, err = build("editreward", content)
    assert status == 1 and not out and len(err) == 1
    assert err[0].startswith(f"error: {tmp_path / 'in.json'}") and words in err[0]


def test_an_absent_file_is_one_line(tmp_path, capsys):
    for kind in ("editreward", "jsonl"):
        arguments = [f"--json={tmp_path}/gone", f"--images={tmp_path}", f"--out={tmp_path}/out"]
        assert builders.main([kind, *arguments]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path}/gone is not there; expected one of *.")
        assert said.count("\n") == 1


def test_skip_bad_counts_and_lists(build, bad_images, tmp_path):
    bad = [record for record, *_ in BAD_PAIRS.values()]
    status, out, err = build("editreward", [pair(), *bad, pair("b.png", "c.png")], "--skip_bad")
    assert status == 0 and not err
    assert out[0] == (
        f"{tmp_path}/out: 1 groups in train; dimensions overall, instruction_following, "
        "visual_quality"
    )
    assert out[1] == f"{len(bad) + 2} rows: 2 kept, {len(bad)} left out"
    kinds = dict(line.strip().split(" left out: ")[::-1] for line in out if " left out: " in line)
    assert kinds == {
        "picture that is missing": "3", "picture that cannot be decoded": "2",
        "pair of equal edits": "1", "pair without a judgement": "1", "vote of an unknown kind": "1",
        "field 'prompt'": "2", "field 'model2_dim1_score'": "1",
        "row that cannot be read": "1",
    }  # fmt: skip
    problems = (tmp_path / "out" / "problems.txt").read_text().splitlines()
    assert len(problems) == len(bad)
    for index, (_, field, words) in enumerate(BAD_PAIRS.values(), 1):
        at = f"\t{tmp_path}/in.json[{index}]: field '{field}'"
        (found,) = [line for line in problems if at in line]
        assert words in found and found.startswith("left out\t")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{len(bad) + 2} rows were read: 2 kept, {len(bad)} left out" in card
    assert "| picture that is missing | 3 |" in card
    assert "| train | 1 | 3 | 1 of 3 | 4 |" in card  # one group of three, four pictures
    assert "| train | overall | 2 | 0 |" in card and "| train | visual_quality | 2 | 2 |" in card
    (record,) = store.open_dataset(tmp_path / "out")["train"]
    assert len(from_record(record).candidates) == 3
    status, out, err = build("editreward", bad, "--skip_bad", out="other")
    assert status == 1 and "no usable record; first: " in err[0] and len(err) == 1


def assert_same(found, wanted):
    assert (found.id, found.prompt, found.candidates, found.dimensions) == (
        wanted.id, wanted.prompt, wanted.candidates, wanted.dimensions
    )  # fmt: skip
    for name in ("preference", "weight"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def test_round_trip(build, tmp_path, images):
    pairs = [pair(), pair("b.png", "c.png", (1, 2, 3), (3, 2, 1)), pair(path_src="other.png")]
    wanted = groups(tmp_path, images, pairs)
    status, out, err = build("editreward", pairs)
    assert status == 0 and not err and "2 groups in train" in out[0]
    records = store.open_dataset(tmp_path / "out")["train"]
    assert len(records) == 2
    for record, example in zip(records, wanted, strict=True):
        assert_same(from_record(record), example)
    manifest = store.read_manifest(tmp_path / "out")
    assert manifest["dimensions"] == list(DIMENSIONS) and manifest["counts"] == {"train": 2}
    assert manifest["rows"] == 3 and manifest["left_out"] == {}


def test_an_existing_folder_is_refused_and_left_as_it_is(build, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    status, _, err = build("editreward", [pair()])
    assert status == 1 and len(err) == 1 and "exists already" in err[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


# JSON lines


def line(**changes):
    return {
        "id": "one", "prompt": ["Add a bowl", {"image": "source.png"}],
        "candidates": [
            {"parts": [{"image": "a.png"}], "critique": "It is there."}, {"image": "b.png"},
        ],
        "ranks": [1, 2],
    } | changes  # fmt: skip


def test_json_lines(build, tmp_path, images):
    lines = [line(id=f"line {i}", ranks=[i % 2, 1]) for i in range(6)]
    status, out, err = build("jsonl", [*lines[:3], "", *lines[3:]])
    assert status == 0 and not err
    assert "6 groups in train; dimensions overall" in out[0]
    assert out[1] == "6 rows: 6 kept, 0 left out" and len(out) == 2
    data = store.open_dataset(tmp_path / "out")
    found = {split: [from_record(r) for r in records] for split, records in data.items()}
    assert [e.id for e in found["train"]] == [f"line {i}" for i in range(6)]
    first = found["train"][0]
    assert first.candidates[0].critique == "It is there." and first.candidates[1].critique is None
    assert first.candidates[1].parts[0].data == (images / "b.png").read_bytes()
    assert first.preference[0, 1, 0] == 1 and found["train"][1].preference[0, 1, 0] == 0.5


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (line(candidates=[{"image": "a.png"}]), "'candidates': needs at least 2 candidates"),
        (line(ranks=[1, 2, 3]), "'ranks.overall': has 3 entries for 2 candidates"),
        (line(rank=[1, 2]), "'rank': is unknown; did you mean 'ranks'?"),
        (line(critique="a is better"), "'critique': is comparative"),
        (line(prompt=[{"image": "truncated.png"}]), "'prompt[0].image': image file"),
        (line(candidates=[{"parts": ["x"], "critique": "Good."}], ranks=[1, 2]), "'ranks.overall'"),
        (line(candidates=[{"image": "gone.png"}, "x"]), "'candidates[0][0].image': image file"),
        ("{", "not JSON"),
        ("3", "must be an object"),
    ],
)
def test_a_bad_line_is_one_line(build, bad_images, tmp_path, bad, words):
    bad = bad | {"id": "bad"} if isinstance(bad, dict) else bad
    status, out, err = build("jsonl", [line(), bad, line()])
    assert status == 1 and not out and len(err) == 1
    assert err[0].startswith(f"error: {tmp_path / 'in.jsonl'}:2: ") and words in err[0]
    assert not list(tmp_path.glob("out*"))
    status, out, err = build("jsonl", [line(), bad, line(id="two")], "--skip_bad")
    assert status == 0 and not err and "2 groups" in out[0]
    assert out[1] == "3 rows: 2 kept, 1 left out"
    assert " 1 left out: " in out[2] and words in out[3] and "problems.txt" in out[4]


# Prepared folders


def test_what_is_no_data_set_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such data folder; make one with"):
        store.open_dataset(tmp_path / "gone")
    with pytest.raises(UserError, match="is no prepared data set"):
        store.open_dataset(tmp_path)
    (tmp_path / store.MANIFEST).write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a TFDS data set") as caught:
        store.open_dataset(tmp_path)
    assert "\n" not in str(caught.value)


def world(path):
    return {
        split: [(r["id"], r["record"], [bytes(i) for i in r["images"]]) for r in records]
        for split, records in store.open_dataset(path).items()
    }


def test_the_world_is_drawn_once_and_the_same_from_the_same_seed(tmp_path, capsys):
    counts = {"train": 40, "valid": 3}
    path = prepare_world(tmp_path / "first", counts, 0)
    stamps = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert prepare_world(tmp_path / "first", counts, 0) == path
    assert stamps == {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    first = world(path)
    assert {split: len(records) for split, records in first.items()} == counts
    assert len({record for _, record, _ in first["train"]}) == 40

    capsys.readouterr()
    sizes = ("--train=40", "--valid=3", "--test=0", "--hard=0")
    assert builders.main(["world", f"--out={tmp_path / 'second'}", *sizes]) == 0
    again = Path(capsys.readouterr().out.strip())
    assert again != path and again.parent == tmp_path / "second"
    assert world(again) == first

    other = prepare_world(tmp_path / "first", counts, 1)
    assert other != path
    assert not {r for _, r, _ in world(other)["train"]} & {r for _, r, _ in first["train"]}


# The example that EditReward's authors published


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason=f"{EXAMPLE} is not here")
def test_the_published_example(tmp_path, capsys):
    arguments = [f"--json={EXAMPLE / 'train.json'}", f"--images={EXAMPLE}"]
    assert builders.main(["editreward", *arguments, f"--out={tmp_path / 'out'}"]) == 0
    assert "1 groups in train" in capsys.readouterr().out
    (record,) = store.open_dataset(tmp_path / "out")["train"]
    group = from_record(record)
    assert len(group.candidates) == 3 and len(record["images"]) == 4
    order = [(EXAMPLE / f"edit_{n}.png").read_bytes() for n in (2, 1, 3)]
    assert [c.parts[0].data for c in group.candidates] == order
    # 2 beats both; 1 and 3 tie overall, 1 follows less and looks better
    overall, following, quality = np.moveaxis(group.preference, -1, 0)
    assert overall[0, 1:].tolist() == [1, 1] and overall[1, 2] == 0.5
    assert following[0, 1:].tolist() == [1, 1] and following[1, 2] == 0
    assert quality[0, 1:].tolist() == [1, 1] and quality[1, 2] == 1
    assert (group.weight.sum((0, 1)) == 6).all()
