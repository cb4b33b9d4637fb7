"""Building: streaming, groups whose rows lie apart, kills, resuming, and refusals."""

import errno
import io
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

from jrm_jax.benchmarks import build_scale
from jrm_jax.data import builders, store
from jrm_jax.data.ingest import building, half_made, json_rows, rows, waiting
from jrm_jax.data.ingest.pairs import Pairs
from jrm_jax.data.schema import from_record
from jrm_jax.errors import UserError
from jrm_jax.shell import terminal

ROOT = Path(__file__).resolve().parents[1]


def png(seed, side=12):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# Rows


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 16])
def test_a_json_list_is_read_entry_by_entry(tmp_path, monkeypatch, block):
    """Whatever the size of a block: entries, brackets in texts and numbers at its end are whole."""
    monkeypatch.setattr(json_rows, "BLOCK", block)
    wanted = [{"a": 1, "b": "]},{ \\\" é"}, {"n": [12345, {"x": None}]}, {}, {"long": "y" * 300}]
    path = tmp_path / "list.json"
    for text in (json.dumps(wanted), json.dumps(wanted, indent=3, ensure_ascii=False) + "\n"):
        path.write_text(text, encoding="utf-8")
        assert [row for _, row in rows.read_rows(path)] == wanted
        assert [w for w, _ in rows.read_rows(path, skip=2)] == [f"{path}[2]", f"{path}[3]"]
    for broken, words in (
        ('[{"a": 1} {"b": 2}]', "no comma before entry 1"),
        ('[{"a": 1}, {"b": ', "entry 1"), ('[{"a": 1}, 12', "no end"), ('[{"a": 1},', "entry 1"),
        ('{"a": [1]}', "is an object"), ("17", "must hold a list"),
    ):  # fmt: skip
        path.write_text(broken)
        with pytest.raises(UserError, match=words):
            list(rows.read_rows(path))
    path.write_text('[{"a": 1}, 3, null, {"b": 2}]')
    found = [row for _, row in rows.read_rows(path)]
    assert [isinstance(row, UserError) for row in found] == [False, True, True, False]


def test_parquet_and_csv_rows_can_be_skipped(tmp_path):
    table = pyarrow.table({"n": list(range(10)), "text": [str(i) for i in range(10)]})
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    for skip in range(11):
        found = list(rows.read_rows(path, lambda names: ["n"], skip))
        assert found == [(f"{path}[{i}]", {"n": i}) for i in range(skip, 10)]
    (tmp_path / "t.csv").write_text('\ufeffa,b\n1,"two\nlines"\n3\n4,5\n')
    found = [row for _, row in rows.read_rows(tmp_path / "t.csv")]
    assert found[0] == {"a": "1", "b": "two\nlines"} and found[2] == {"a": "4", "b": "5"}
    assert found[1] == {"a": "3", "b": ""}  # spreadsheets leave out empty cells at the end
    (tmp_path / "t.csv").write_text("a,b\n1,2,3\n4,5,,\n")
    found = [row for _, row in rows.read_rows(tmp_path / "t.csv")]
    assert isinstance(found[0], UserError) and "more cells than the 2 heads" in str(found[0])
    assert found[1] == {"a": "4", "b": "5"}
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="no readable parquet"):
        list(rows.read_rows(path))


# Groups whose rows lie apart


def write_pairs(path, sources=12, seed=0):
    """All pairs of four edits of each source, in any order; one pair has a broken picture."""
    found = []
    for source in range(sources):
        pictures = [png(source * 10 + i) for i in range(5)]
        for i in range(4):
            for j in range(i):
                found.append({
                    "instruction": f"Edit {source}", "source_img": {"bytes": pictures[4]},
                    "left_output_image": {"bytes": pictures[i]},
                    "right_output_image": {"bytes": pictures[j]},
                    "vote_type": "leftvote",
                })  # fmt: skip
    found[7]["left_output_image"] = {"bytes": found[7]["left_output_image"]["bytes"][:-90]}
    np.random.default_rng(seed).shuffle(found)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), path, row_group_size=5)
    return path


def build(source, out, shard_examples=2, **options):
    options = building.Options(skip_bad=True, shard_examples=shard_examples, **options)
    return building.build(Pairs("editreward", source.parent), "editreward", source, out, options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_that_lie_apart_become_one_group_however_little_memory_there_is(tmp_path, monkeypatch):
    source = write_pairs(tmp_path / "pairs.parquet")
    result = build(source, tmp_path / "roomy")
    assert result.counts == {"train": 12} and result.rows == 72
    assert result.left == {"picture that cannot be decoded": 1}
    examples = list(map(from_record, store.open_dataset(tmp_path / "roomy")["train"]))
    assert [len(example.candidates) for example in examples] == [4] * 12
    assert sorted(int((e.weight[..., 0] > 0).sum() // 2) for e in examples) == [5] + [6] * 11
    assert len({example.prompt[1].data for example in examples}) == 12
    monkeypatch.setattr(waiting, "MEMORY", 0)  # every row waits on the disk
    build(source, tmp_path / "tight")
    assert contents(tmp_path / "tight") == contents(tmp_path / "roomy")


def test_a_source_is_in_one_split_only(tmp_path):
    found = [
        {"instruction": f"Edit {number}", "source_img": {"bytes": png(number // 3)},
         "left_output_image": {"bytes": png(100 + number)},
         "right_output_image": {"bytes": png(200 + number)}, "vote_type": "tie"}
        for number in range(90)
    ]  # fmt: skip
    source = tmp_path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), source)
    result = build(source, tmp_path / "out", valid_fraction=0.3)
    data = store.open_dataset(tmp_path / "out")
    assert {split: len(records) for split, records in data.items()} == result.counts
    sources = {split: {from_record(r).prompt[1].data for r in data[split]} for split in data}
    assert not sources["train"] & sources["valid"]
    assert len(sources["train"] | sources["valid"]) == 30
    assert 3 <= len(sources["valid"]) <= 15
    with pytest.raises(UserError, match="too few different prompts to divide; give another") as no:
        build(source, tmp_path / "none", valid_fraction=1e-9)
    assert "same command" not in str(no.value) and not (tmp_path / "none.building").exists()
    assert build(source, tmp_path / "test", split="test").counts == {"test": 90}


# Stopped and resumed


def stop_at(monkeypatch, stop: int) -> list:
    """The row with this number, from 1, interrupts the build; the numbers of those taken so far."""
    take, calls = building._Work._take, []

    def stopping(work, *args):
        calls.append(args[0])
        if len(calls) == stop:
            raise KeyboardInterrupt
        take(work, *args)

    monkeypatch.setattr(building._Work, "_take", stopping)
    return calls


@pytest.mark.parametrize("stop", [1, 20, 33, 50, 71])
def test_a_build_that_was_stopped_anywhere_ends_the_same(tmp_path, monkeypatch, stop):
    source = write_pairs(tmp_path / "pairs.parquet")
    build(source, tmp_path / "whole", valid_fraction=0.3)
    calls = stop_at(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "out", valid_fraction=0.3)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.building").is_dir()
    before = len(calls)
    build(source, tmp_path / "out", valid_fraction=0.3)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    if stop > 40:
        assert len(calls) - before < 72, "it began anew"
    assert not list(tmp_path.glob("*.building"))


def test_kill_9_and_the_same_command_again(tmp_path, monkeypatch):
    """As `benchmarks.build_scale` measures it with 50,000 records, and with two workers."""
    monkeypatch.setattr(build_scale, "SHARD_EXAMPLES", 10)
    report = build_scale.run(tmp_path, records=2600, small=0, side=12)
    assert "equal those of the undisturbed build byte for byte" in report[-1]


def test_other_files_or_options_are_refused(tmp_path, monkeypatch):
    source = write_pairs(tmp_path / "pairs.parquet")
    monkeypatch.setattr(building._Work, "_finish", lambda *_: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        build(source, tmp_path / "out")
    with pytest.raises(UserError, match="begun with other files or options: remove it"):
        build(source, tmp_path / "out", valid_fraction=0.5)
    os.utime(source, (1, 1))
    with pytest.raises(UserError, match="begun with other files or options"):
        build(source, tmp_path / "out")
    assert (tmp_path / "out.building" / half_made.STATE).is_file()


def test_a_bad_row_keeps_what_is_done_and_can_then_be_skipped(tmp_path):
    source = write_pairs(tmp_path / "pairs.parquet")
    build(source, tmp_path / "whole")
    strict = building.Options(shard_examples=2)
    arguments = (Pairs("editreward", tmp_path), "editreward", source, tmp_path / "out")
    with pytest.raises(UserError, match="left_output_image.*keeps what is done: .*--skip_bad"):
        building.build(*arguments, strict)
    assert building.build(*arguments, strict._replace(skip_bad=True)).counts == {"train": 12}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_spares_what_is_saved(tmp_path):
    """A limit on the size of a file stands in for the full disk."""
    source = write_pairs(tmp_path / "pairs.parquet", sources=40)
    command = [sys.executable, "-m", "jrm_jax.data.builders", "editreward", f"--data={source}",
               f"--out={tmp_path / 'out'}", "--skip_bad", "--shard_examples=10"]  # fmt: skip

    def confine():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = subprocess.run(command, cwd=ROOT, preexec_fn=confine, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "could not be written" in done.stderr and "free some space" in done.stderr
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    build(source, tmp_path / "whole", shard_examples=10)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_processes_do_not_write_the_same_data_set(tmp_path):
    source = write_pairs(tmp_path / "pairs.parquet")
    (tmp_path / "out.building").mkdir()
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); "
        "fcntl.flock(f, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(60)"
    )
    lock = tmp_path / "out.building" / half_made.LOCK
    other = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(UserError, match="being written by another process"):
            build(source, tmp_path / "out")
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert build(source, tmp_path / "out").counts == {"train": 12}


@pytest.mark.parametrize("damage", ["head", "middle", "words"])
def test_a_damaged_state_is_one_line(tmp_path, monkeypatch, damage):
    source = write_pairs(tmp_path / "pairs.parquet")
    stop_at(monkeypatch, 60)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "out")
    state = tmp_path / "out.building" / half_made.STATE
    content = bytearray(state.read_bytes())
    if damage == "words":
        with sqlite3.connect(state) as database:
            database.execute("UPDATE meta SET value = '[1, ' WHERE name = 'counts'")
    else:
        begin = 0 if damage == "head" else 4096  # of the file's second page on
        content[begin:] = bytes(len(content) - begin)
        state.write_bytes(content)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"state.sqlite is damaged \(.*\): remove .*building and"):
        build(source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out.building")
    assert build(source, tmp_path / "out").counts == {"train": 12}


def test_a_disk_that_is_full_at_the_start_is_no_damage(tmp_path, monkeypatch):
    source = write_pairs(tmp_path / "pairs.parquet", sources=2)

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(building._Work, "_check_fingerprint", full)
    with pytest.raises(UserError, match="could not be written: .*free some space"):
        build(source, tmp_path / "out")


@pytest.mark.parametrize(("number", "words"), [
    (errno.EWOULDBLOCK, "by another process"), (errno.ENOLCK, "cannot be locked.*another file"),
])  # fmt: skip
def test_a_lock_that_is_taken_and_one_that_cannot_be(tmp_path, monkeypatch, number, words):
    source = write_pairs(tmp_path / "pairs.parquet", sources=2)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(half_made.fcntl, "flock", refuse)
    with pytest.raises(UserError, match=words):
        build(source, tmp_path / "out")


def test_a_file_that_changes_while_it_is_read_leaves_nothing_behind(tmp_path, monkeypatch):
    source = write_pairs(tmp_path / "pairs.parquet")
    read = building._Work._rows

    def shorter(work, total, position):
        return read(work, [total[0] + 1], position)

    monkeypatch.setattr(building._Work, "_rows", shorter)
    with pytest.raises(UserError, match="has changed while it was read: give the command again$"):
        build(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_card_of_an_added_split_names_its_own_list(tmp_path):
    source = write_pairs(tmp_path / "pairs.parquet", sources=2)
    for split, names in (("train", ("README.md", "problems.txt")),
                         ("test", ("README-test.md", "problems-test.txt"))):  # fmt: skip
        build(source, tmp_path / "out", split=split)
        card, listed = (tmp_path / "out" / name for name in names)
        assert f"listed in `{listed.name}`" in card.read_text() and listed.is_file()


def test_long_work_says_where_it_is(tmp_path, monkeypatch, capsys):
    source = write_pairs(tmp_path / "pairs.parquet")
    monkeypatch.setattr(terminal, "TELL_SECONDS", -1)
    out = tmp_path / "out"
    assert builders.main(["editreward", f"--data={source}", f"--out={out}", "--skip_bad"]) == 0
    said = capsys.readouterr().err
    assert "looking through the files: 64 rows, 0 left out" in said
    assert "writing: 64 of 72 rows, 1 left out" in said
