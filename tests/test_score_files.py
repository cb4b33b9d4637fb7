"""Scores of a file of groups: row by row, goes on after a stop, errors in their rows."""

import json

import jax
import numpy as np
import pytest
from test_score import files, groups, model, workdir  # noqa: F401  fixtures

from jrm_jax import RewardModel, score
from jrm_jax.errors import UserError
from jrm_jax.serving import files as scored_files


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
