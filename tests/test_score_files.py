"""Scores of a file of groups: row by row, goes on after a stop, errors in their rows."""

import datetime
import decimal
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from benchmark_files import png
from layout_case import parquet
from test_score import files, groups, model, workdir  # noqa: F401  fixtures

from jrm_jax import RewardModel, score
from jrm_jax.errors import UserError
from jrm_jax.serving import files as scored_files
from jrm_jax.serving import trained
from jrm_jax.serving.groups import Scores


def many(files, tmp_path, rows):
    """A JSON line file of `rows`; pictures stand beside it."""
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_groups_is_scored_row_by_row(workdir, model, files, tmp_path, capsys):
    text, source, candidates = files
    names = [path.name for path in candidates]
    wanted = model.score(text, source, candidates)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    record = {"id": "r", "prompt": [{"text": text}, {"image": "source.png"}],
              "candidates": [{"parts": [{"image": name}]} for name in names], "ranks": [1, 2]}
    path = many(files, tmp_path, [
        {"id": 5, "instruction": text, "source": "source.png", "candidates": names},
        {"instruction": text, "source": ["source.png"], "candidates": [names[0], "broken.png"]},
        {"instruction": text, "source": "nowhere.png", "candidates": names},
        {"instruction": "", "candidates": names},
        {"instruction": text, "source": "source.png", "edit": names[1]},
        record,
    ])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        score.main([f"--model={workdir}", f"--input={path}", f"--output={tmp_path / 'out.jsonl'}"])
    assert ended.value.code == 1  # some rows have errors
    assert "6 rows, 3 of them with an error" in capsys.readouterr().out
    rows = lines_of(tmp_path / "out.jsonl")
    assert [row["row"] for row in rows] == list(range(6)) and rows[0]["id"] == 5
    for row in (rows[0], rows[5]):
        assert [one["picture"] for one in row["candidates"]] == names
        found = [one["reward"] for one in row["candidates"]]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    good, bad = rows[1]["candidates"]
    assert abs(good["reward"] - wanted[0]) < 1e-5 and "reward" not in bad
    assert "candidates[1]" in bad["error"]
    assert "nowhere.png" in rows[2]["error"] and "instruction" in rows[3]["error"]
    assert abs(rows[4]["candidates"][0]["reward"] - wanted[1]) < 1e-5
    with pytest.raises(SystemExit, match="exists and is complete"):
        score.main([f"--model={workdir}", f"--input={path}", f"--output={tmp_path / 'out.jsonl'}"])


def test_a_stopped_file_goes_on(model, files, tmp_path, monkeypatch):
    text, _, candidates = files
    row = {"instruction": text, "source": "source.png", "candidates": [candidates[0].name]}
    path = many(files, tmp_path, [{**row, "id": str(i)} for i in range(10)])
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    assert scored_files.score_file(model, path, whole) == (10, 0)
    ask, taken = model.iter_found, []

    def dies(groups, like):
        for scores in ask(groups, like):
            if len(taken) == 4:
                raise KeyboardInterrupt
            taken.append(scores)
            yield scores

    with monkeypatch.context() as patch:
        patch.setattr(model, "iter_found", dies)
        with pytest.raises(KeyboardInterrupt):
            scored_files.score_file(model, path, torn)
    assert len(lines_of(torn)) == 4
    with torn.open("a") as file:
        file.write('{"row": 4, "id"')  # as a kill leaves it
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="begun with other files"):
        scored_files.score_file(model, other, torn)
    with pytest.raises(UserError, match="or other options"):
        scored_files.score_file(model, path, torn, made={"compute_dtype": "bfloat16"})
    assert scored_files.score_file(model, path, torn) == (10, 0)
    assert torn.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.state.json"))


def test_a_row_that_no_program_holds_has_its_error(workdir, files, tmp_path):
    text, _, candidates = files
    row = {"instruction": text, "source": "source.png", "candidates": [candidates[0].name]}
    long = {**row, "instruction": "Make it red. " * 2000, "id": "x"}
    path = many(files, tmp_path, [row, long, {**row, "instruction": "\ud800"}, {**row, "id": "y"}])
    model = RewardModel.load(workdir, batch_size=1, programs=1, devices=jax.devices()[:1])
    assert scored_files.score_file(model, path, tmp_path / "out.jsonl") == (4, 2)
    good, bad, broken, after = lines_of(tmp_path / "out.jsonl")
    assert "1 are allowed" in bad.pop("error") and bad == {"row": 1, "id": "x"}
    assert "no valid text" in broken["error"] and after["id"] == "y"
    assert good["candidates"] == after["candidates"] and "reward" in good["candidates"][0]
    group = (long["instruction"], files[1], candidates[:1])
    with pytest.raises(UserError, match="--programs"):
        list(model.iter_scores([group]))


@pytest.mark.parametrize("options, words", [
    (["--input={path}"], "give both"),
    (["--input={path}", "--output={out}", "--json"], "leave out json"),
    (["--input=/nowhere", "--output={out}"], "is not there"),
    ([], "give --instruction, or --input"),
])  # fmt: skip
def test_options_of_files_that_do_not_fit_are_one_line(workdir, files, tmp_path, options, words):
    path = many(files, tmp_path, [])
    filled = [option.format(path=path, out=tmp_path / "out.jsonl") for option in options]
    with pytest.raises(SystemExit, match=words) as ended:
        score.main([f"--model={workdir}", *filled])
    assert "\n" not in str(ended.value)


# Rows, without a model


class Lengths:
    """Stands in for a model: a picture's score is the number of its bytes."""

    batch_size, card = 2, {"stamp": {}}

    def problem(self, picture):
        return None

    def need(self, group):
        return None

    def iter_found(self, groups, like):
        for group in groups:
            reward_K1 = np.asarray([[len(data)] for data in group.candidates], np.float32)
            yield Scores(reward_K1, reward_K1, ("overall",))


@pytest.fixture
def folder(tmp_path):
    """A folder of groups' pictures; a.png and b.png differ in their scores."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate(("cat", "a", "b")):
        (folder / f"{name}.png").write_bytes(png(number) + bytes(number))
    return folder


def scored(source, out, **options):
    scored_files.score_file(Lengths(), source, out, **options)
    return lines_of(out)


def stop(monkeypatch, source, out):
    """Scoring that ends before its first row."""
    with monkeypatch.context() as patch:
        patch.setattr(Lengths, "iter_found", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scored(source, out)


def test_the_same_command_given_twice_is_refused(folder, tmp_path):
    source, out = folder / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(PLAIN) + "\n" for _ in range(3)))
    refused = []

    class Slow(Lengths):
        def iter_found(self, groups, like):
            for found in super().iter_found(groups, like):
                with pytest.raises(UserError, match="is being written by another process"):
                    scored(source, out)
                refused.append(out.read_text())
                yield found

    assert scored_files.score_file(Slow(), source, out) == (3, 0)
    assert len(refused) == 3 and [row["row"] for row in lines_of(out)] == [0, 1, 2]
    with pytest.raises(UserError, match="exists and is complete"):
        scored(source, out)


PARTS = [{"text": "Make it white", "image": None}, {"text": None, "image": "cat.png"}]
PLAIN = {"instruction": "Make it white", "source": "cat.png", "candidates": ["a.png", "b.png"]}


@pytest.mark.parametrize("row", [
    PLAIN,
    {"prompt": PARTS, "candidates": [{"parts": [{"text": None, "image": f"{n}.png"}],
                                      "critique": None} for n in "ab"], "critique": None},
    {"prompt": ["Make it white", {"image": {"bytes": None, "path": "cat.png"}}],
     "candidates": [{"image": "a.png"}, {"image": "b.png"}], "chosen": None},
    {"instruction": "Make it white", "source": "cat.png", "chosen": "a.png", "rejected": "b.png",
     "candidates": None},
    {**PLAIN, "chosen": 1, "prompt": None},
])  # fmt: skip
def test_every_form_of_a_record_is_scored(folder, row):
    (folder / "in.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = scored(folder, folder.parent / "out.jsonl")
    sizes = [(folder / f"{name}.png").stat().st_size for name in "ab"]
    assert [one["reward"] for one in found["candidates"]] == sizes
    assert [one["picture"] for one in found["candidates"]] == ["a.png", "b.png"]


def test_rows_of_a_prepared_set_and_pictures_in_parquet_are_scored(folder):
    data = {name: (folder / f"{name}.png").read_bytes() for name in ("cat", "a", "b")}
    record = json.dumps({"prompt": ["Make it white", 0], "dimensions": ["overall"],
                         "candidates": [[[1], None, False], [[2], None, False]],
                         "preference": [[[0.5], [1]], [[0], [0.5]]],
                         "weight": [[[0], [1]], [[1], [0]]]})  # fmt: skip
    parquet(folder / "a.parquet", [{"id": "x", "record": record, "images": list(data.values())}])
    parquet(folder / "b.parquet", [{
        "id": "y", "prompt": [{"text": "Make it white", "image": None},
                              {"text": None, "image": {"bytes": data["cat"], "path": None}}],
        "candidates": [{"bytes": data["a"], "path": "a"}, {"bytes": data["b"], "path": None}],
    }])  # fmt: skip
    found = scored(folder, folder.parent / "out.jsonl")
    assert [row["id"] for row in found] == ["x", "y"]
    for row in found:
        assert [one["reward"] for one in row["candidates"]] == [len(data["a"]), len(data["b"])]


@pytest.mark.parametrize("changes, words", [
    ({"prompt": [{"text": 5}], "candidates": [{"image": "a.png"}]}, "prompt[0].text"),
    ({"prompt": [{"image": 5}], "candidates": [{"image": "a.png"}]}, "prompt[0].image"),
    ({"prompt": "Add", "candidates": [{"image": "a.png"}, "b"]}, "candidates[1]"),
    ({"prompt": "Add", "candidates": None}, "candidates"), ({"record": "x"}, "is missing"),
    ({"record": "[]", "images": []}, "record"), ({"record": "1", "images": 3}, "images"),
    ({"candidates": {"a": 1}}, "holds no picture"), ({"source": 3}, "source"),
    ({"chosen": "a.png"}, "rejected"), ({"id": [1]}, "'id'"), ({"id": True}, "'id'"),
])  # fmt: skip
def test_a_bad_row_has_its_error_and_the_rest_is_scored(folder, changes, words):
    plain = {} if "prompt" in changes or "record" in changes or "chosen" in changes else PLAIN
    rows = [{**plain, **changes}, {**PLAIN, "id": 8.0}]
    (folder / "in.json").write_text(json.dumps(rows))
    bad, good = scored(folder, folder.parent / "out.jsonl")
    said = bad["error"] if "error" in bad else bad["candidates"][0]["error"]
    assert words in said and good["id"] == 8 and "reward" in good["candidates"][0]


def test_ids_of_parquet_that_json_cannot_hold(folder):
    for number, name in enumerate((b"x", datetime.date(2026, 1, 1), decimal.Decimal("1.5"))):
        parquet(folder / f"{number}.parquet", [{**PLAIN, "id": name}])
    found = scored(folder, folder.parent / "out.jsonl")
    assert len(found) == 3 and all("field 'id'" in row["error"] for row in found)


def test_an_output_may_lie_in_the_folder_of_the_input(folder, monkeypatch, capsys):
    (folder / "in.jsonl").write_text(json.dumps(PLAIN) + "\n" + json.dumps(PLAIN) + "\n")
    (folder / "about.json").write_text('{"made": "by us"}')
    out = folder / "scores.jsonl"
    stop(monkeypatch, folder, out)
    assert out.exists() and (folder / "scores.jsonl.state.json").exists()
    assert len(scored(folder, out)) == 2
    again = scored(folder, folder / "again.jsonl")  # scores.jsonl is no input
    assert len(again) == 2 and "reward" in again[1]["candidates"][0]
    said = capsys.readouterr().err
    assert "about.json must hold" in said and "scores.jsonl holds scores" in said
    (folder / "in.jsonl").unlink()
    with pytest.raises(UserError, match="no file of groups"):
        scored(folder, folder / "more.jsonl")


@pytest.mark.parametrize("line", [
    '{"row": 1, "candi\n', "\0\0\0\n", '{"row": 7, "error": ""}\n', "3\n",
])  # fmt: skip
def test_damaged_files_of_a_stopped_scoring(folder, monkeypatch, line):
    source, out = folder / "in.jsonl", folder.parent / "out.jsonl"
    source.write_text((json.dumps(PLAIN) + "\n") * 3)
    whole = scored(source, folder.parent / "whole.jsonl")
    stop(monkeypatch, source, out)
    state = out.with_name("out.jsonl.state.json")
    first, _, last = (folder.parent / "whole.jsonl").read_text().splitlines(True)
    out.write_text(first + line + last)
    assert scored(source, out) == whole and not state.exists()
    state.write_text('{"files": ')
    with pytest.raises(UserError, match="state.json is not JSON .*: give another --output, or"):
        scored(source, out)


def test_an_output_that_cannot_be_written_is_one_line(folder):
    (folder / "in.jsonl").write_text(json.dumps(PLAIN) + "\n")
    with pytest.raises(UserError, match="cannot be written: .*a part of this path is a file"):
        scored(folder, folder / "cat.png" / "new" / "out.jsonl")


def test_an_output_belongs_to_weights_and_options(tmp_path, monkeypatch):
    told, step = [], 7
    model = SimpleNamespace(card={"step": step}, describe_work=lambda: "")
    monkeypatch.setattr(score, "_load", lambda args: model)
    monkeypatch.setattr(trained, "identify", lambda path, at: trained.Identity(at, f"{path} {at}"))
    monkeypatch.setattr(scored_files, "score_file", lambda *given: told.append(given[-1]) or (1, 0))
    given = ["--model=run", f"--input={tmp_path}/a.jsonl", f"--output={tmp_path}/b.jsonl"]
    for options in ([], ["--compute_dtype=bfloat16"], ["--programs=2"], ["--model=other"], []):
        with pytest.raises(SystemExit):
            score.main([*given, *options])
    assert told[0] == told[-1] and told[0]["weights"] == "run 7"
    assert all(one != other for i, one in enumerate(told[:4]) for other in told[:i])
