"""Worker processes that are killed: the run says so and ends, and leaves nothing behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from entry_point import Runner, small_backbone, steps  # noqa: F401  fixtures among them
from test_iterator import run  # noqa: F401
from test_pipeline import encoder, folder  # noqa: F401

from jrm_jax.data import workers
from jrm_jax.data.pipeline import make_iterator
from jrm_jax.data.workers import WatchedIterator, WorkerDied
from jrm_jax.run import lock


def children(parent: int) -> list[int]:
    """Processes of a process that prepare batches."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            words = path.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z" and b"spawn_main" in words:
            found.append(int(path.parent.name))
    return found


def assert_they_end(processes: list[int]) -> None:
    ends = time.monotonic() + 30
    while any(lock._began(process) for process in processes):
        assert time.monotonic() < ends
        time.sleep(0.2)


def test_a_killed_worker_ends_the_iteration(run):
    plan, records, encoder = run
    with make_iterator(plan, [records], encoder, workers=2, prefetch=1) as batches:
        for _ in range(20):  # a worker may still be starting when the other's first batch is there
            next(batches)
            there = multiprocessing.active_children()
            ours = [child for child in there if child.name.startswith(workers.NAME)]
            if len(ours) == 2:
                break
            time.sleep(0.2)
        assert len(ours) == 2
        os.kill(ours[0].pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(WorkerDied, match=rf"\({ours[0].pid}\) was ended by SIGKILL"):
            for _ in range(100):
                next(batches)
        assert time.monotonic() - began < 30
        with pytest.raises(WorkerDied):
            next(batches)
    for process in ours:
        process.join(30)
        assert not process.is_alive()


def test_a_read_that_never_returns_is_not_waited_for(monkeypatch):
    """As from a process that was killed with half a batch in its pipe."""

    class Stuck:
        def __iter__(self):
            return self

        def __next__(self):
            threading.Event().wait()

    class Process:
        name, pid, exitcode, killed = "grain-1", 77, None, False

        def kill(self):
            self.killed = True

    process = Process()
    monkeypatch.setattr(workers, "LOOK", 0.05)
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [process])
    iterator = WatchedIterator(Stuck())
    threading.Timer(0.2, lambda: setattr(process, "exitcode", -9)).start()
    with pytest.raises(WorkerDied, match="SIGKILL, perhaps because the memory is full"):
        next(iterator)
    assert process.killed
    iterator.close()  # does not wait either


def _large(_: int) -> bytes:
    return bytes(1 << 20)  # more than a pipe holds


def test_a_pool_that_is_given_up_ends_whatever_its_processes_write():
    """One that is killed with half a result in the pipe leaves a reader that waits for the rest."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from jrm_jax.data import workers
from test_workers import _large
for _ in range(8):
    try:
        with workers.pool(2, "fork", int, (), "lost") as pool:
            asked = [pool.submit(_large, i) for i in range(400)]
            asked[3].result()
            raise KeyError
    except KeyError:
        print("ended", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240
    )
    assert done.stdout.count("ended") == 8, done.stderr


def test_a_full_dev_shm_is_told(monkeypatch):
    class Process:
        name, pid, exitcode = "grain-1", 77, -signal.SIGBUS

        def kill(self):
            pass

    process = Process()
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [process])
    with pytest.raises(WorkerDied, match="SIGBUS, perhaps because /dev/shm is full"):
        next(WatchedIterator("ab"))


def test_what_ends_an_iterator_is_told_every_time():
    iterator = WatchedIterator("ab")
    assert [next(iterator), next(iterator)] == ["a", "b"]
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(iterator)


@pytest.fixture(scope="module")
def started(tmp_path_factory, small_backbone):
    """start(name): a run with two workers that has made a step and saved."""
    runner = Runner(tmp_path_factory.mktemp("workers"), small_backbone)
    splits = {f"data__world__{split}": 0 for split in ("valid", "test", "hard")}

    def start(name):
        process = runner.start(
            runner.folder / name, "discriminative", data__workers=2, data__prefetch=1,
            total_steps=100_000, save_interval=1, eval_interval=0, optimizer__name="adam", **splits,
        )  # fmt: skip
        for line in process.stdout:
            if line.startswith("step 3/"):
                break
        return runner.folder / name, process

    return start


def test_a_run_ends_with_one_line_when_a_worker_is_killed(started):
    workdir, process = started("killed worker")
    try:
        ours = children(process.pid)
        assert len(ours) == 2
        os.kill(ours[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    lines = errors.strip().splitlines()
    assert len(lines) == 1 and "was ended by SIGKILL" in lines[0], errors
    assert "run the same command to go on from the last checkpoint" in lines[0]
    assert len(steps(workdir)) == 2 and not (workdir / "lock.json").exists()
    assert_they_end(ours)


def test_workers_end_with_a_run_that_is_killed(started):
    _, process = started("killed run")
    ours = children(process.pid)
    assert len(ours) == 2
    process.kill()
    process.communicate()
    assert_they_end(ours)


def test_ctrl_c_is_for_the_run_alone(started):
    """A terminal sends it to all processes; the run saves, and its workers wait for that."""
    workdir, process = started("interrupted")
    try:
        for pid in (*children(process.pid), process.pid):
            os.kill(pid, signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and not errors, errors
    assert f"stopped by SIGINT after step {steps(workdir)[-1]}, which is saved" in printed
