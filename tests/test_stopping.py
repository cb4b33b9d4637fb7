"""A run that is told to stop, at whatever moment, ends soon and goes on as if nothing had been."""

import json
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from entry_point import (  # noqa: F401  fixtures among them
    metrics,
    parameters,
    runner,
    small_backbone,
    steps,
)
from save_case import gate  # noqa: F401
from shared_case import on_one_device, share_steps
from test_saving import FULL

from configs import joint
from jrm_jax import train
from jrm_jax.checkpoint import open_checkpoints
from jrm_jax.errors import UserError
from jrm_jax.run.saved import METRICS, complete_steps
from jrm_jax.shell.stop import StopRequest

TOTAL, INTERVAL, HELD_OUT = 4, 2, 8  # two batches a split


class Asked(StopRequest):
    """Asks to stop at the call of `now` with this number; counts them."""

    at, calls = 0, 0

    def now(self):
        Asked.calls += 1
        if Asked.calls == Asked.at:
            self.asked = signal.SIGTERM
        return super().now()


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        share_steps(patch)
        patch.setattr(train, "StopRequest", Asked)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory, small_backbone):  # noqa: F811
    found = joint.get_config()
    found.backbone.path, found.backbone.scan_unroll = str(small_backbone), 1
    found.data.cache = str(tmp_path_factory.mktemp("world"))
    found.data.world.train = 16
    found.data.world.valid = found.data.world.test = found.data.world.hard = HELD_OUT
    found.data.candidate_cuts = (4,)  # one bucket
    found.batch_size, found.total_steps, found.log_interval = 4, TOTAL, 1
    found.eval_interval = found.save_interval = INTERVAL
    found.loss.language_weight = 0.0
    return found


def run(config, workdir, at: int = 0) -> int:
    Asked.at, Asked.calls = at, 0
    return train.run(config, workdir)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """(workdir of a run that was never asked, how often it looked for a request)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert run(config, workdir) == 0
    return workdir, Asked.calls


def numbers(workdir) -> tuple:
    """Everything a run leaves but times."""
    rows = [*metrics(workdir), json.loads((workdir / "results.json").read_text())]
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    with open_checkpoints(workdir / "checkpoints") as checkpoints:
        metas = [checkpoints.read_meta(step) for step in checkpoints.steps()]
        folders = [checkpoints.folder / str(step) for step in checkpoints.steps()]
        return rows, [(folder / METRICS).read_text() for folder in folders], metas


def test_there_are_all_kinds_of_moments(whole):
    """Before each step and the end; in two evaluations and three final ones, of two batches."""
    assert whole[1] == TOTAL + 1 + 2 * (2 + 3)


# 4: in the evaluation of step 2, 5: in its second batch, 8: in that of the last step, 11 and 13:
# in the final one, of the first and of the second split
@pytest.mark.parametrize("at", [1, 3, 4, 5, 8, 11, 13])
def test_what_was_stopped_goes_on_bit_for_bit(config, whole, tmp_path, capsys, at):
    workdir = tmp_path / "run"
    assert run(config, workdir, at) == 143
    out = capsys.readouterr().out
    reached = {1: 0, 3: 2, 4: 2, 5: 2}.get(at, TOTAL)
    where = f"after step {reached}, which is saved" if reached else "before the first step"
    assert f"stopped by SIGTERM {where}; run the same command to go on" in out
    assert steps(workdir) == [s for s in (INTERVAL, TOTAL) if s <= reached]
    assert not (workdir / "results.json").exists()
    before = Asked.calls
    assert before == at  # nothing more was looked at: not a batch, not a step
    assert run(config, workdir) == 0
    assert numbers(workdir) == numbers(whole[0])
    for step in steps(workdir):
        wanted, found = parameters(whole[0], step), parameters(workdir, step)
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    assert not (workdir / "final.json").exists()


def test_splits_that_were_read_are_not_read_again(config, whole, tmp_path):
    workdir = tmp_path / "run"
    assert run(config, workdir, at=13) == 143  # `valid` is read, and half of `test`
    read = json.loads((workdir / "final.json").read_text())
    assert list(read["splits"]) == ["valid"]
    assert run(config, workdir) == 0
    assert Asked.calls == 1 + 2 + 2  # before the end, then `test` and `hard`


def test_stopping_twice_in_the_same_evaluation(config, whole, tmp_path):
    workdir = tmp_path / "run"
    assert run(config, workdir, at=4) == 143
    assert run(config, workdir, at=3) == 143  # again in the evaluation that is owed
    assert run(config, workdir) == 0
    assert numbers(workdir) == numbers(whole[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_first_compilation(runner, tmp_path, number):  # noqa: F811
    """Nothing was trained: it ends at once, and says so in lines, without a trace of an error."""
    own = dict(runner.env)
    runner.env |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "none"), "XLA_FLAGS": ""}
    try:
        process = runner.start(tmp_path / "run", backbone__scan_unroll=0)
    finally:
        runner.env = own
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("compiling 1 of"):
            process.send_signal(number)
            began = time.monotonic()
    assert process.wait(timeout=60) == 128 + number
    assert time.monotonic() - began < 10
    out = "".join(printed)
    assert "stopping: what is being compiled is given up; " in out
    assert f"stopped by {number.name} before the first step; run the same command" in out
    assert "compiled in" not in out and process.stderr.read() == ""
    assert steps(tmp_path / "run") == []


def test_an_evaluation_that_is_owed_changes_nothing_else(config, whole, tmp_path):
    """The checkpoint's parameters are not written anew."""
    workdir = tmp_path / "run"
    assert run(config, workdir, at=4) == 143
    folder = workdir / "checkpoints" / str(INTERVAL)
    kept = shutil.copytree(folder, tmp_path / "kept")
    assert run(config, workdir, at=6) == 143  # the evaluation is made up for, then it stops
    for path in kept.rglob("*"):
        if path.is_file() and path.name not in ("metadata", "metrics"):
            assert (folder / path.relative_to(kept)).read_bytes() == path.read_bytes()
    assert json.loads((folder / METRICS).read_text())["rank"] > -1


# Saves beside steps


def trained(workdir) -> list[int]:
    path = workdir / "metrics.jsonl"
    rows = metrics(workdir) if path.exists() and path.read_text().endswith("\n") else []
    return [row["step"] for row in rows if row["split"] == "train"]


def test_steps_go_on_while_a_checkpoint_is_written(config, whole, tmp_path, gate):
    """It is written once the next step has been seen, and the run ends with the same numbers."""
    workdir, seen = tmp_path / "run", []

    def watch():
        while gate.reached.wait() and trained(workdir)[-1:] != [INTERVAL + 1]:
            time.sleep(0.01)
        seen.append(complete_steps(workdir / "checkpoints"))
        gate.open()

    gate.shut()
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    assert run(config, workdir) == 0
    watching.join()
    assert seen == [[]]
    assert numbers(workdir) == numbers(whole[0])


def test_a_full_disk_ends_the_run_at_the_next_turn(
    config, whole, tmp_path, gate, monkeypatch
):
    workdir, now = tmp_path / "run", Asked.now

    def patient(self):  # these steps are over before a disk has said anything
        if gate.error and gate.reached.is_set():
            time.sleep(1)
        return now(self)

    monkeypatch.setattr(Asked, "now", patient)
    gate.open(FULL)
    with pytest.raises(UserError, match="^checkpoint 2 could not be written .*free some space"):
        run(config, workdir)
    assert trained(workdir)[-1] in (INTERVAL, INTERVAL + 1) and steps(workdir) == []
    gate.open()
    assert run(config, workdir) == 0
    assert numbers(workdir) == numbers(whole[0])


def test_a_stop_waits_for_what_is_being_written(config, tmp_path, gate, monkeypatch):
    workdir, there, say = tmp_path / "run", [], train._last_words

    def last_words(*said):
        there.append(complete_steps(workdir / "checkpoints"))
        return say(*said)

    monkeypatch.setattr(train, "_last_words", last_words)
    gate.shut()
    threading.Timer(2.0, gate.open).start()
    assert run(config, workdir, at=6) == 143  # in the turn of step 3; step 2 is being written
    assert there == [[2, 3]] == [steps(workdir)]
