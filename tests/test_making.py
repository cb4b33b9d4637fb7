"""Groups made in worker processes: the same bytes in the same order, whatever happens."""

import argparse
import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest
from test_building import ROOT, build, contents, png, stop_at, write_pairs

from jrm_jax.data import builders
from jrm_jax.data.ingest import building, making, waiting
from jrm_jax.data.ingest.layout import Options
from jrm_jax.data.ingest.pairs import Pairs
from jrm_jax.errors import UserError


class Late(Future):
    """Made only when it is waited for: as much is under way as there may be."""

    def __init__(self, call, *arguments):
        super().__init__()
        self._call, self._arguments = call, arguments

    def done(self):
        return False

    def result(self, timeout=None):
        return pickle.loads(pickle.dumps(self._call(*pickle.loads(self._arguments[0]))))


class LatePool:
    def __init__(self, *_):
        pass

    def submit(self, call, *arguments):
        return Late(call, pickle.dumps(arguments))

    def shutdown(self, **_):
        pass


@pytest.fixture
def late(monkeypatch):
    """Two workers that are as late as may be, for any number of rows."""
    monkeypatch.setattr(making.workers, "ProcessPoolExecutor", LatePool)
    monkeypatch.setattr(building, "PARALLEL", 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("rows") / "pairs.parquet")


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    build(source, out, valid_fraction=0.3)
    return contents(out)


def build_with(workers, source, out, skip_bad=True, **options):
    options = Options(skip_bad, shard_examples=2, **options)
    layout = Pairs("editreward", source.parent)
    return building.build(layout, "editreward", source, out, options, workers=workers)


def test_real_processes_give_the_same_bytes(source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "PARALLEL", 0)
    build_with(2, source, tmp_path / "out", valid_fraction=0.3)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("large", [0, 1000])
def test_what_is_large_goes_through_files(source, whole, tmp_path, monkeypatch, late, large):
    monkeypatch.setattr(making, "LARGE", large)
    between = tmp_path / "out.building" / making.BETWEEN
    stop_at(monkeypatch, 50)
    with pytest.raises(KeyboardInterrupt):
        build_with(2, source, tmp_path / "out", valid_fraction=0.3)
    assert not between.exists()
    between.mkdir()
    (between / "of a killed build").write_text("half a gro")
    build_with(1, source, tmp_path / "out", valid_fraction=0.3)
    assert contents(tmp_path / "out") == whole


def test_a_full_disk_between_processes_is_one_line(source, tmp_path, monkeypatch, late):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(making, "LARGE", 0)
    monkeypatch.setattr(making.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(UserError, match="could not be written"):
        build_with(2, source, tmp_path / "out")


@pytest.mark.parametrize("memory", [0, waiting.MEMORY])
@pytest.mark.parametrize("ahead", [1, 4, 100])
def test_however_far_the_rows_are_ahead(source, whole, tmp_path, monkeypatch, late, memory, ahead):
    monkeypatch.setattr(waiting, "MEMORY", memory)
    monkeypatch.setattr(making, "AHEAD", ahead)
    build_with(2, source, tmp_path / "out", valid_fraction=0.3)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("stop", [1, 20, 33, 50, 60, 71])
def test_stopped_anywhere_and_gone_on_with_other_workers(
    source, whole, tmp_path, monkeypatch, late, stop, before
):
    """Rows are read ahead of the last complete shard; none is lost, none comes twice."""
    stop_at(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        build_with(before, source, tmp_path / "out", valid_fraction=0.3)
    build_with(3 - before, source, tmp_path / "out", valid_fraction=0.3)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("commits", [1, 2, 4])
def test_stopped_right_after_a_shard(source, whole, tmp_path, monkeypatch, late, commits):
    commit, calls = building._Work._commit, []

    def stopping(work, position):
        commit(work, position)
        calls.append(position)
        if len(calls) == commits:
            raise KeyboardInterrupt

    monkeypatch.setattr(building._Work, "_commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_with(2, source, tmp_path / "out", valid_fraction=0.3)
    build_with(2, source, tmp_path / "out", valid_fraction=0.3)
    assert contents(tmp_path / "out") == whole
    assert calls[commits] > calls[commits - 1]  # it went on


def test_a_bad_row_stops_where_one_process_stops(source, tmp_path, late):
    """Not before what stands before it is written, though the rows are read ahead."""
    found = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        with pytest.raises(UserError, match="left_output_image.*keeps what is done") as raised:
            build_with(workers, source, out, skip_bad=False)
        shards = sorted(p.name for p in out.with_name(f"{out.name}.building").glob("*-0000*"))
        found.append((str(raised.value).replace(str(out), "OUT"), len(shards) > 1))
    assert found[0] == found[1]


def test_rows_that_are_none_are_told_in_their_place(tmp_path, late):
    """Bad rows, ids that come again, and groups that are made: one list, in the rows' order."""
    lines = []
    for number in range(12):
        name = f"p{number}.png"
        (tmp_path / name).write_bytes(png(number) if number != 4 else b"none")
        lines.append(
            f'{{"id": "r{number % 7}", "prompt": [{{"text": "Edit {number}"}}], "candidates":'
            f' [{{"parts": [{{"image": "{name}"}}]}}, {{"parts": [{{"image": "p0.png"}}]}}],'
            ' "ranks": [1, 2]}'
        )
        if number in (2, 9):
            lines.append("{broken")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    args = argparse.Namespace(command="jsonl", data=path, images=None)
    for workers in (1, 2):
        options = Options(True, shard_examples=3)
        layout, out = builders.make_layout(args), tmp_path / f"out{workers}"
        building.build(layout, "jsonl", path, out, options, workers=workers)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    told = (tmp_path / "out2" / building.PROBLEMS).read_text()
    assert told.count("not JSON") == 2 and told.count("id that occurs more than once") == 10


def test_every_layout_can_be_sent_to_a_worker(tmp_path):
    for name, kind in builders.LAYOUTS.items():
        flags = {flag.name.lstrip("-"): flag.options.get("default", False) for flag in kind.flags}
        args = argparse.Namespace(command=name, data=tmp_path, images=None, **flags)
        maker = making.Maker(builders.make_layout(args), ("overall",), Options())
        assert pickle.loads(pickle.dumps(maker)) == maker


def test_a_picture_that_several_rows_hold_is_sent_once():
    rows = [(f"w{i}", {"a": {"bytes": bytes(100_000)}, "b": bytes(100_000)}) for i in range(9)]
    shared = making._shared(rows)
    assert shared == rows and len(pickle.dumps(shared, 5)) < 110_000


CODE = """
import sys, time
from jrm_jax.data import builders
from jrm_jax.data.ingest import building
building.PARALLEL = 0
take = building._Work._take
def slow_take(*row):
    time.sleep({seconds})
    take(*row)
building._Work._take = slow_take
if __name__ == '__main__':
    sys.exit(builders.main(sys.argv[1:]))
"""


def start_command(source, folder, seconds=0.0) -> subprocess.Popen:
    """The same build each time, with two workers; `seconds` a row."""
    script = folder / "command.py"
    script.write_text(CODE.format(seconds=seconds))
    command = [sys.executable, str(script), "editreward", f"--data={source}", "--skip_bad",
               f"--out={folder / 'out'}", "--shard_examples=2", "--valid_fraction=0.3",
               "--workers=2"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def test_a_killed_worker_is_one_line_and_the_same_command_goes_on(source, whole, tmp_path):
    """The worker is killed as the kernel does it where the memory is full."""
    process = start_command(source, tmp_path, seconds=0.1)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and error.strip().count("\n") == 0, error
    assert "a process that checks pictures was ended" in error and "--workers" in error
    process = start_command(source, tmp_path)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert contents(tmp_path / "out") == whole


def test_ctrl_c_ends_the_workers_and_the_same_command_goes_on(source, whole, tmp_path):
    """A terminal gives it to all processes of the command."""
    process = start_command(source, tmp_path, seconds=0.1)
    found = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped; the same command goes on" in error, error
    assert "Traceback" not in error
    deadline = time.monotonic() + 20
    while any(map(is_there, found)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_there, found))
    process = start_command(source, tmp_path)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert contents(tmp_path / "out") == whole


def test_a_worker_that_is_killed_while_another_is_started_is_not_waited_for(
    source, tmp_path, monkeypatch
):
    """The library ends all that it knows of, and then waits for one more."""
    start, started = multiprocessing.process.BaseProcess.start, []

    def late(process):
        start(process)
        started.append(process)
        if len(started) == 2:
            os.kill(started[0].pid, signal.SIGKILL)
            time.sleep(1)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", late)
    monkeypatch.setattr(building, "PARALLEL", 0)
    ended = threading.Event()

    def help_out():  # or the test would never end
        if not ended.wait(30):
            for process in started:
                process.kill()

    threading.Thread(target=help_out).start()
    began = time.monotonic()
    with pytest.raises(UserError, match="a process that checks pictures was ended"):
        build_with(2, source, tmp_path / "out")
    assert time.monotonic() - began < 30
    ended.set()


def workers_of(process) -> list[int]:
    """The fork server's two, when both are there."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        for child in children(process.pid):
            if len(found := children(child)) == 2:
                return found
        time.sleep(0.005)
    raise AssertionError("there are no two workers")


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return list(map(int, file.read().split()))
    except OSError:
        return []
