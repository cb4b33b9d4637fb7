"""Several processes on this machine: the losses, rows and checkpoints of one."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from entry_point import Runner, free_port, metrics, parameters, small_backbone, steps  # noqa: F401

from jrm_jax import distributed
from jrm_jax.errors import UserError

TOTAL, HALF = 6, 3
SLOW = pytest.mark.skipif(
    not os.environ.get("JRM_SLOW"), reason="minutes on two cores: set JRM_SLOW=1 to run it"
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory, small_backbone):
    runner = Runner(tmp_path_factory.mktemp("processes"), small_backbone)
    runner.fields |= {
        "total_steps": TOTAL, "save_interval": HALF, "eval_interval": TOTAL,
        "data.world.test": 0, "data.world.hard": 0, "optimizer.name": "adam",
        "optimizer.warmup_steps": 2, "optimizer.learning_rate": 3e-4,
        # a run of more steps is the same program: one rate, one bucket
        "optimizer.schedule": "constant", "data.candidate_cuts": "(4,)",
    }  # fmt: skip
    return runner


def rows(record) -> dict[int, list[int]]:
    """{step: example ids of all rows, in the order of processes}"""
    found = {}
    for path in sorted(record.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            step, ids = json.loads(line)
            found.setdefault(step, []).extend(ids)
    return found


def losses(workdir) -> list[float]:
    return [row["loss"] for row in metrics(workdir) if row["split"] == "train"]


def go(runner, count, name, since=None):
    """A run of `count` processes; `since`: from a copy of that run's folder, cut at step HALF."""
    workdir, record = runner.folder / name, runner.folder / f"{name}-rows"
    if since is not None:
        shutil.copytree(since, workdir)
        shutil.rmtree(workdir / "checkpoints" / str(TOTAL))
        (workdir / "results.json").unlink()
    statuses = runner.run_several(count, workdir, record)
    printed = [path.read_text() for path in sorted(record.glob("*.out"))]
    assert statuses == [0] * count, "\n".join(printed)
    return workdir, rows(record), printed


@pytest.fixture(scope="module")
def one(runner):
    return go(runner, 1, "one")


@pytest.fixture(scope="module")
def two(runner, one):
    return go(runner, 2, "two")


@pytest.fixture(scope="module")
def four(runner, one):
    return go(runner, 4, "four")


def check(found, wanted, first=0):
    """Losses within 1e-5 and the same examples in the same rows, from step `first`."""
    assert found[1] == {step: ids for step, ids in wanted[1].items() if step >= first}
    assert len(found[1]) == TOTAL - first and len(found[1][first]) == 4
    np.testing.assert_allclose(losses(found[0]), losses(wanted[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["two", pytest.param("four", marks=SLOW)])
def test_several_processes_train_as_one(one, request, name):
    found = request.getfixturevalue(name)
    check(found, one)
    count = len(found[2])
    assert count == {"two": 2, "four": 4}[name]
    assert "step 1/6" in found[2][0] and not any("step 1/6" in out for out in found[2][1:])
    for index, out in enumerate(found[2]):
        assert f"process {index} of {count} holds 1 of {count} devices" in out
    # `valid` stands at its step, once in each run
    held_out = [row for w in (one[0], found[0]) for row in metrics(w) if row["split"] == "valid"]
    assert [row["groups"] for row in held_out] == [8] * 2
    assert len({row["pairs"] for row in held_out}) == 1
    assert all(np.isfinite(leaf).all() for leaf in parameters(found[0], TOTAL).values())


@pytest.mark.parametrize(
    ("before", "after"),
    [("two", 1), pytest.param("four", 1, marks=SLOW), pytest.param("four", 2, marks=SLOW),
     pytest.param("one", 4, marks=SLOW)],
)  # fmt: skip
def test_resuming_on_another_number_of_processes(runner, one, request, before, after):
    started = request.getfixturevalue(before)
    found = go(runner, after, f"{before}-on-{after}", since=started[0])
    assert f"resuming {found[0]} from step {HALF}" in found[2][0]
    check(found, one, HALF)


def test_sigterm_to_one_of_two_stops_both_after_the_same_saved_step(runner, one):
    workdir, record = runner.folder / "stopped", runner.folder / "stopped-rows"
    many = {"total_steps": 5000, "save_interval": 5000, "eval_interval": 5000}
    processes = runner.start_several(2, workdir, record, port=free_port(), **many)
    try:
        deadline = time.monotonic() + 300
        while "step 2/" not in (record / "0.out").read_text():
            assert time.monotonic() < deadline and processes[0].poll() is None
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
        statuses = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    printed = (record / "0.out").read_text()
    assert statuses == [143, 143], printed
    (step,) = steps(workdir)
    assert f"stopped by SIGTERM after step {step}, which is saved" in printed


def test_the_environment_decides():
    full = dict(zip(distributed.VARIABLES, ("host:1", "4", "3"), strict=True))
    assert distributed.read_environment(full) == {
        "coordinator_address": "host:1", "num_processes": 4, "process_id": 3
    }  # fmt: skip
    assert distributed.read_environment({}) == {}
    wanted = distributed.is_wanted
    assert wanted("auto", full) and wanted("auto", {"TPU_WORKER_HOSTNAMES": "a,b"})
    assert not wanted("auto", {"TPU_WORKER_HOSTNAMES": "localhost"}) and not wanted("off", full)
    assert wanted("on", {})
    for change in ({"JAX_PROCESS_ID": ""}, {"JAX_PROCESS_ID": "4"}, {"JAX_NUM_PROCESSES": "x"}):
        with pytest.raises(UserError, match="JAX_PROCESS_ID"):
            distributed.read_environment(full | change)
