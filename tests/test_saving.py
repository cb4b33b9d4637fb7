"""Saves beside training: what is written, when it counts, and what becomes of one that fails."""

import asyncio
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P
from save_case import gate  # noqa: F401
from test_checkpoint import abstract, assert_holds, copy, save, saved  # noqa: F401

from jrm_jax import checkpoint
from jrm_jax.checkpoint import open_checkpoints
from jrm_jax.errors import UserError
from jrm_jax.run import saved as saved_files
from jrm_jax.run.saved import complete_steps, pick
from jrm_jax.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[1]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def begin(checkpoints, gate, step: int, metric: float = 0.0) -> None:
    """A save that is being written when this returns."""
    gate.shut()
    save(checkpoints, step, metric)
    assert gate.reached.wait(60)


def until_ended(checkpoints) -> None:
    """As the loop does it."""
    while not checkpoints.check():
        time.sleep(0.01)


@pytest.mark.parametrize("spec", [P(), P("fsdp")], ids=["replicated", "split"])
def test_the_state_at_the_save_is_written_though_the_next_step_has_its_memory(
    tmp_path,
    gate,
    spec,
):
    sharding = jax.NamedSharding(make_mesh(1, 8, 1), spec)
    wanted = np.arange(2.0**16, dtype=np.float32).reshape(256, 256)
    # made by a program, and not looked at: nothing else holds its memory
    state = jax.jit(lambda: jnp.arange(2.0**16).reshape(256, 256), out_shardings=sharding)()
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0, out_shardings=sharding)
    with open_checkpoints(tmp_path) as checkpoints:
        gate.shut()
        checkpoints.save(1, {"kernel": state}, {"mu": state + 1}, {}, 0.0)
        for _ in range(3):
            state = jax.block_until_ready(overwrite(state))
        assert not checkpoints.check()
        gate.open()
        target = {"kernel": jax.ShapeDtypeStruct(wanted.shape, wanted.dtype, sharding=sharding)}
        _, trainable, opt_state, _ = checkpoints.restore(target, {"mu": target["kernel"]})
    np.testing.assert_array_equal(state, -1)
    np.testing.assert_array_equal(trainable["kernel"], wanted)
    np.testing.assert_array_equal(opt_state["mu"], wanted + 1)


def test_what_a_checkpoint_says_is_of_its_step_though_the_loop_counts_on(tmp_path, monkeypatch):
    """Orbax writes the words later, in a thread of its own."""
    given = {"totals": {"reward": [1.0, 2.0]}, "taught": {"language": 3}}
    wanted, counted = json.dumps(given), threading.Event()
    write = ocp.JsonCheckpointHandler._save_fn

    async def late(self, *arguments):
        while not counted.is_set():
            await asyncio.sleep(0.01)
        await write(self, *arguments)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", late)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"kernel": jnp.zeros(2)}, {"mu": jnp.zeros(2)}, given, 0.0)
        given["totals"]["reward"][0], given["taught"]["words"] = 9.0, 1
        counted.set()
        assert checkpoints.read_meta(1) == json.loads(wanted)


def test_a_save_that_gets_on_is_a_sign_of_life(copy, gate, monkeypatch):
    """A last save of more than `watchdog_seconds` ended the process, at every start."""
    beats, sizes, measure = [], [], saved_files.unfinished_bytes

    def look(folder):
        sizes.append(measure(folder))
        return sizes[-1]

    monkeypatch.setattr(checkpoint, "LOOK", 0.01)
    monkeypatch.setattr(saved_files, "unfinished_bytes", look)

    def write():
        (half,) = copy.glob("3.*tmp*")
        for more in ("a", "b"):
            until(lambda: len(set(sizes[-5:])) == 1 < 5 <= len(sizes))  # nothing is written
            seen = len(beats)
            (half / more).write_text("more")
            until(lambda seen=seen: len(beats) > seen)
        for more in ("a", "b"):
            (half / more).unlink()
        gate.open()

    def until(so):
        end = time.monotonic() + 60
        while not so() and time.monotonic() < end:
            time.sleep(0.01)

    with open_checkpoints(copy) as checkpoints:
        begin(checkpoints, gate, 3)
        checkpoints.alive = lambda: beats.append(1)
        threading.Thread(target=write).start()
        checkpoints.wait()
    # Orbax writes a little of its own meanwhile: so many signs as changes, none of a look alone
    changes = sum(a != b for a, b in itertools.pairwise((-1, *sizes)))
    assert 3 <= len(beats) == changes <= len(sizes) - 8


def test_what_is_being_written_does_not_count_yet_and_removes_nothing(copy, gate):
    """Checkpoint 1 is the best, 2 the latest; 3 becomes both."""
    with open_checkpoints(copy) as checkpoints:
        begin(checkpoints, gate, 3, 1.0)
        assert not checkpoints.check()
        assert complete_steps(copy) == [1, 2]
        assert (pick(copy, "best"), pick(copy, "latest")) == (1, 2)
        gate.open()
        until_ended(checkpoints)
        assert complete_steps(copy) == checkpoints.steps() == [2, 3]
        assert checkpoints.ranked()[0] == pick(copy, "best") == 3
        assert_holds(checkpoints, 3)


@pytest.mark.parametrize("read", ["steps", "ranked", "wait", "restore", "read_meta"])
def test_who_reads_waits(copy, gate, read):
    with open_checkpoints(copy) as checkpoints:
        begin(checkpoints, gate, 3, 1.0)
        gate.open()
        arguments = {"restore": [abstract({"x": jnp.zeros(3)})], "read_meta": [3]}.get(read, [])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints._manager, "restore", lambda step, args: {
                "trainable": step, "meta": {"step": step}})  # fmt: skip
            found = getattr(checkpoints, read)(*arguments)
        assert complete_steps(copy) == [2, 3] and checkpoints.check()
        wanted = {"steps": [2, 3], "ranked": [3, 2], "restore": (3, 3, None, {"step": 3})}
        assert found == (wanted | {"read_meta": {"step": 3}}).get(read)


def test_the_next_save_waits_for_the_one_before(copy, gate):
    with open_checkpoints(copy) as checkpoints:
        begin(checkpoints, gate, 3)
        gate.open()
        save(checkpoints, 4, 0.0)
        assert 3 in complete_steps(copy)
    assert complete_steps(copy) == [1, 3, 4]  # closing has waited


@pytest.mark.parametrize("when", ["check", "wait", "steps", "save", "close"])
def test_a_full_disk_is_told_as_soon_as_anyone_looks(copy, gate, when):
    words = r"^checkpoint 3 could not be written to .*No space left on device: free some space\); "
    words += "then run the same command again; complete checkpoints: 1, 2$"
    with pytest.raises(UserError, match=words):
        with open_checkpoints(copy) as checkpoints:
            begin(checkpoints, gate, 3)
            gate.open(FULL)
            {
                "check": lambda: until_ended(checkpoints),
                "save": lambda: save(checkpoints, 4, 0.0),
                "close": lambda: None,
            }.get(when, getattr(checkpoints, when, None))()
            assert when == "close"
    gate.open()
    with open_checkpoints(copy) as checkpoints:
        assert checkpoints.steps() == [1, 2] and checkpoints.ranked()[0] == 1
        save(checkpoints, 3, 0.5)
        assert_holds(checkpoints, 3)


def test_what_ends_the_run_costs_no_checkpoint(copy, gate):
    said = []
    with pytest.raises(UserError, match="not finite"):
        with open_checkpoints(copy, said.append) as checkpoints:
            begin(checkpoints, gate, 3)
            gate.open()
            raise UserError("loss not finite")
    assert complete_steps(copy) == [1, 2, 3] and said == []


def test_a_failed_save_does_not_hide_what_ends_the_run(copy, gate):
    said = []
    with pytest.raises(UserError, match="not finite"):
        with open_checkpoints(copy, said.append) as checkpoints:
            begin(checkpoints, gate, 3)
            gate.open(FULL)
            raise UserError("loss not finite")
    assert len(said) == 1 and said[0].startswith("WARNING: checkpoint 3 could not be written")


def test_only_the_loop_asks_jax_whether_to_stop(tmp_path, monkeypatch):
    """JAX takes the last number that it was asked with for the place where the process is."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
    assert asked == []


KILLED = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import pytest
from save_case import hold
from test_checkpoint import *

with pytest.MonkeyPatch.context() as patch, open_checkpoints(Path({folder!r})) as checkpoints:
    gate = hold(patch)
    save(checkpoints, 3, 1.0)
    gate.reached.wait()
    print("writing", checkpoints.check(), flush=True)
    gate.wait()
"""


def test_killed_while_it_is_written_it_does_not_count(copy):
    script = KILLED.format(tests=str(ROOT / "tests"), root=str(ROOT), folder=str(copy))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout.readline() == "writing False\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (half,) = copy.glob("3.*tmp*")
    said = []
    with open_checkpoints(copy, said.append) as checkpoints:
        assert checkpoints.steps() == [1, 2] and checkpoints.ranked()[0] == 1
        assert_holds(checkpoints, 2)
    assert not half.exists() and f"{half.name} was never finished" in said[0]
