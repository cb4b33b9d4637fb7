"""What commands write: nothing of the user's is lost, and a disk that refuses is one line."""

import errno
import json
import os
from pathlib import Path

import pytest
from benchmark_case import run
from benchmark_files import write_pairs

from jrm_jax import evaluate, export, score
from jrm_jax.data import builders
from jrm_jax.errors import UserError
from jrm_jax.evaluation import output
from jrm_jax.shell import disk, stop


def write(folder, **files):
    with output.new_predictions(folder) as part:
        for name, text in files.items():
            (part / f"{name}.json").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refuse(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "there")


def test_predictions_replace_those_of_an_earlier_run_alone(tmp_path, monkeypatch):
    folder = tmp_path / "result_predictions"
    write(folder, first="1", second="2")
    write(folder, first="3")
    assert names(folder) == ["first.json", output.MARK] and names(tmp_path) == [folder.name]
    assert (folder / "first.json").read_text() == "3"

    with pytest.raises(ZeroDivisionError), output.new_predictions(folder):
        1 / 0  # noqa: B018  while they are written
    assert (folder / "first.json").read_text() == "3" and names(tmp_path) == [folder.name]

    with monkeypatch.context() as patch:
        patch.setattr(output.shutil, "move", refuse)
        with pytest.raises(UserError, match="free some space; the predictions are in") as raised:
            write(folder, first="5")
    kept = Path(str(raised.value).split(" are in ")[1])
    assert (kept / "first.json").read_text() == "5" and not folder.exists()
    kept.rename(folder)

    (folder / "mine.json").write_text("dear")
    with pytest.raises(UserError, match=r"holds mine\.json, which .* has not written"):
        write(folder, first="4")
    assert (folder / "mine.json").read_text() == "dear"

    (folder / "mine.json").unlink()
    (tmp_path / "link").symlink_to(folder)
    write(tmp_path / "link", first="6")
    assert (folder / "first.json").read_text() == "6" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["gpt4.json", "gpt4.md", "gpt4.html", "gpt4_predictions/a.json"])
def test_a_file_of_the_users_is_refused_before_a_model_is_loaded(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"pair": {"scores": [1, 2]}}')
    with pytest.raises(SystemExit, match=r"error: .*give another --out"):
        evaluate.main(["--benchmark=world", "--checkpoint=/nowhere", f"--out={tmp_path}/gpt4.json"])
    assert path.read_text() == '{"pair": {"scores": [1, 2]}}'


def test_a_result_may_be_made_again_but_not_out_of_itself(tmp_path):
    data, said, out = write_pairs(tmp_path), tmp_path / "said.json", tmp_path / "r.json"
    said.write_text(json.dumps([{"index": i, "scores": [1, 2]} for i in range(7)]))
    for _ in range(2):
        run(out, "genai_bench", data, [said])
    before = out.read_text()
    with pytest.raises(SystemExit, match="is a file that this command reads"):
        evaluate.main(["--compare", str(out), str(out), f"--out={out}"])
    assert out.read_text() == before


def test_files_beside_a_comparison_are_the_users(tmp_path):
    data, said = write_pairs(tmp_path), tmp_path / "said.json"
    said.write_text(json.dumps([{"index": i, "scores": [1, 2]} for i in range(7)]))
    results = [tmp_path / "one.json", tmp_path / "two.json"]
    for out in results:
        run(out, "genai_bench", data, [said])
    out, own = tmp_path / "c.json", tmp_path / "c.md"
    own.write_text("mine")
    for _ in range(2):  # it writes nothing else
        evaluate.main(["--compare", *map(str, results), f"--out={out}"])
    with pytest.raises(SystemExit, match="c.md exists and is no result"):
        evaluate.main(["--benchmark=world", "--checkpoint=/nowhere", f"--out={out}"])
    assert own.read_text() == "mine"


COMMANDS = {
    "score --output": (score.main, ["--model=/nowhere", "--input=a.jsonl", "--output={}/s.jsonl"]),
    "score --sheet": (score.main, ["--model=/nowhere", "--instruction=x", "--sheet={}/s.png", "a"]),
    "evaluate": (evaluate.main, ["--benchmark=world", "--checkpoint=/nowhere", "--out={}/r.json"]),
    "export": (export.main, ["--checkpoint=/nowhere", "--out={}/model"]),
    "world": (builders.main, ["world", "--out={}", "--train=1", "--valid=0", "--test=0",
                              "--hard=0"]),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_where_nothing_can_be_written_is_said_before_a_model_is_loaded(tmp_path, capsys, command):
    (tmp_path / "file").write_text("dear")
    main, words = COMMANDS[command]
    try:
        status = main([word.format(tmp_path / "file") for word in words])
    except SystemExit as stopped:
        status = stopped.code
    said = str(status) if isinstance(status, str) else capsys.readouterr().err
    assert status not in (0, None) and "a part of this path is a file" in said
    assert "\n" not in said.strip() and names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "dear"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_refuses_ends_every_command_in_one_line(monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number), "there/scores.jsonl")

    with pytest.raises(SystemExit) as raised, stop.ending():
        refuse()
    advice = disk.ADVICE[number]
    assert "there/scores.jsonl" in raised.value.code and advice in raised.value.code
    monkeypatch.setattr(builders, "make_world", refuse)
    assert builders.main(["world", "--out=there"]) == 1
    assert advice in capsys.readouterr().err
    with pytest.raises(FileNotFoundError), stop.ending():
        raise FileNotFoundError(errno.ENOENT, "No such file", "a")  # a fault of the program


def test_a_file_that_cannot_be_written_is_found_early(tmp_path):
    disk.check_file(tmp_path / "new" / "out.json")
    assert not names(tmp_path / "new")
    (tmp_path / "new" / "out.json").write_text("dear")
    disk.check_file(tmp_path / "new" / "out.json")
    assert (tmp_path / "new" / "out.json").read_text() == "dear"
    with pytest.raises(UserError, match="give the name of a file, this is a folder"):
        disk.check_file(tmp_path / "new")


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_a_threshold_that_is_no_distance_is_refused_first(tmp_path, value):
    with pytest.raises(SystemExit, match=f"--tie_threshold={value}.* at least 0"):
        evaluate.main(["--benchmark=world", "--checkpoint=/nowhere", f"--out={tmp_path}/r.json",
                       f"--tie_threshold={value}"])  # fmt: skip
    other = {"format": 1, "rows": [], "benchmark": "other", "tie_threshold_tuned_here": value}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="its threshold is .*, no number"):
        evaluate.main(["--benchmark=world", "--checkpoint=/nowhere", f"--out={tmp_path}/r.json",
                       f"--tie_from={tmp_path}/other.json"])  # fmt: skip
