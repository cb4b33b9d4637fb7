"""Splits that are added to a data set that is there."""

import json
import os
import shutil
import signal

import pytest
from layout_case import lines, pictures  # noqa: F401

from jrm_jax.data import builders, store
from jrm_jax.data.schema import from_record
from jrm_jax.data.world.prepare import prepare_world
from jrm_jax.shell.stop import Stopped


def line(name, **changes):
    return {
        "id": name, "prompt": ["Add", {"image": "0.png"}],
        "candidates": [{"image": "1.png"}, {"image": "2.png"}], "ranks": [1, 2],
    } | changes  # fmt: skip


@pytest.fixture
def build(pictures, capsys):  # noqa: F811
    """build(rows, *arguments) -> (status, what was printed)."""

    def run(rows, *arguments):
        path = lines(pictures / f"rows{len(list(pictures.glob('rows*')))}.jsonl", rows)
        arguments = [f"--data={path}", f"--out={pictures / 'out'}", "--skip_bad", *arguments]
        status = builders.main(["jsonl", *arguments])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def ids(out):
    data = store.open_dataset(out)
    return {split: [from_record(r).id for r in records] for split, records in data.items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_splits_are_added_one_by_one(pictures, build):  # noqa: F811
    out = pictures / "out"
    assert build([line("a"), line("b")])[0] == 0
    before = contents(out)
    assert build([line("c"), "bad"], "--split=valid", "--shard_examples=1")[0] == 0
    status, said = build([line(f"d{i}", prompt=f"Add {i}") for i in range(40)],
                         "--split=test", "--shard_examples=7")  # fmt: skip
    assert status == 0 and "40 groups in test" in said
    assert ids(out) == {"train": ["a", "b"], "valid": ["c"], "test": [f"d{i}" for i in range(40)]}
    manifest = store.read_manifest(out)
    assert manifest["counts"] == {"train": 2, "valid": 1, "test": 40}
    assert [added["rows"] for added in manifest["added"]] == [2, 40]
    assert "must be an object" in (out / "problems-valid.txt").read_text()
    assert "| valid | 1 |" in (out / "README-valid.md").read_text()
    after = contents(out)
    kept = [name for name in before if name not in ("dataset_info.json", store.MANIFEST)]
    assert len(kept) > 3 and all(after[name] == before[name] for name in kept)
    assert [path.name for path in pictures.glob("out*")] == ["out"]


def test_what_is_there_is_not_written_again(pictures, build):  # noqa: F811
    assert build([line("a")])[0] == 0
    before = contents(pictures / "out")
    status, said = build([line("b")])
    assert status == 1 and "exists already and has the split 'train'" in said
    status, said = build([line("b")], "--split=test", "--valid_fraction=0.5")
    assert status == 1 and "too few different prompts" in said
    assert not (pictures / "out.building").exists()  # it would lead nowhere
    status, said = build([line("b", scores={"quality": [1, 2]}, ranks=None)], "--split=valid")
    assert status == 1 and "these files also quality" in said
    assert contents(pictures / "out") == before
    assert [path.name for path in pictures.glob("out*")] == ["out"]


def test_a_split_with_fewer_dimensions_has_those_of_the_set(pictures, build):  # noqa: F811
    scores = {"overall": [1, 2], "quality": [2, 1]}
    assert build([line("a", scores=scores, ranks=None)])[0] == 0
    assert build([line("b")], "--split=valid")[0] == 0
    example = from_record(store.open_dataset(pictures / "out")["valid"][0])
    assert example.dimensions == ("overall", "quality")
    assert example.weight[0, 1].tolist() == [1, 0]


def test_adding_may_be_killed_at_any_moment(pictures, build, monkeypatch):  # noqa: F811
    """At every call that changes a file's name: what is there stays whole, and it goes on."""
    rows = [line("b"), line("c"), line("d")]
    out, arguments = pictures / "out", ("--split=valid", "--shard_examples=1")
    assert build([line("a")])[0] == 0
    start = pictures / "start"
    shutil.copytree(out, start)
    assert build(rows, *arguments)[0] == 0
    wanted, replace = contents(out), os.replace
    path = pictures / "rows1.jsonl"
    command = ["jsonl", f"--data={path}", f"--out={out}", "--skip_bad", *arguments]
    for moment in range(20):
        shutil.rmtree(out)
        shutil.copytree(start, out)
        calls = []

        def dies(source, target, moment=moment, calls=calls):
            calls.append(source)
            if len(calls) > moment:
                raise Stopped(signal.SIGINT)
            replace(source, target)

        monkeypatch.setattr(store.os, "replace", dies)
        died = builders.main(command) == 130
        monkeypatch.setattr(store.os, "replace", replace)
        found = ids(out)
        assert found["train"] == ["a"] and found.get("valid", list("bcd")) == list("bcd")
        if not died:
            break
        assert builders.main(command) == 0
        assert contents(out) == wanted
    assert moment > 5


def test_a_split_of_the_users_own_beside_the_built_in_world(pictures, build):  # noqa: F811
    folder = prepare_world(pictures / "cache", {"train": 2}, 0)
    folder.rename(pictures / "out")
    assert build([line("a")], "--split=valid")[0] == 0
    assert ids(pictures / "out")["valid"] == ["a"]
    assert len(store.open_dataset(pictures / "out")["train"]) == 2
    assert json.loads((pictures / "out" / "dataset_info.json").read_text())["name"]
