"""What watches a run: the watchdog, heartbeats, traces; and kills at random moments."""

import subprocess
import sys
import time
from types import SimpleNamespace

import jax
from entry_point import QUICK, ROOT

from jrm_jax import watch
from jrm_jax.benchmarks import kill_test
from jrm_jax.data.buckets import Bucket
from jrm_jax.run import programs
from jrm_jax.shell.stop import StopRequest

HANGS = """
import time
from jrm_jax.watch import Watchdog
def stuck():
    time.sleep(60)
with Watchdog(2.0, 0.0, print) as dog:
    for step in range(6):
        dog.beat(step)
        time.sleep(0.4)     # longer than the silence in all, but never silent
    print("alive", flush=True)
    stuck()
"""


def test_a_process_that_hangs_is_ended_with_its_stack():
    done = subprocess.run(
        [sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1 and done.stdout == "alive\n"
    assert "Timeout" in done.stderr and "in stuck" in done.stderr


def timers(monkeypatch):
    """Every time that a timer was started, 'off' where it was stopped."""
    found = []
    monkeypatch.setattr(watch.faulthandler, "dump_traceback_later", lambda s, **_: found.append(s))
    monkeypatch.setattr(
        watch.faulthandler, "cancel_dump_traceback_later", lambda: found.append("off")
    )
    return found


def test_beats_count_while_it_watches_only(monkeypatch):
    """A late one would end the process long after the run."""
    found = timers(monkeypatch)
    dog = watch.Watchdog(7.0, 0.0, print)
    dog.beat()
    with dog:
        dog.beat()
    dog.beat()
    assert found == [7.0, 7.0, "off"]


def test_programs_that_are_compiled_one_after_the_other_are_signs_of_life(monkeypatch):
    """With ten minutes of silence allowed, two programs of six minutes ended the run, each time."""
    dog, beats = watch.Watchdog(0.0, 0.0, print), []
    monkeypatch.setattr(dog, "beat", lambda: beats.append(1))
    monkeypatch.setattr(programs, "compile_within", lambda lowered, limit: None)
    buckets = [Bucket(2, 0, 0, 8 * n, 8, 0) for n in (1, 2, 3)]
    step = SimpleNamespace(lower=lambda: "lowered")
    said = {"say": lambda words: None, "show": lambda words: None}
    found = programs.Programs(
        {"step": step}, {"step": buckets}, buckets, stop=StopRequest(), watchdog=dog, **said
    )
    assert found.prepare({("step", bucket): () for bucket in buckets})
    assert len(beats) == 3


def test_heartbeats_tell_the_step_and_its_time(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with watch.Watchdog(0.0, 10.0, said.append) as dog:
        for step in range(3, 12):
            dog.beat(step)
            now[0] += 4.0
    assert said == [
        "heartbeat: process 0 of 1 at step 6, 4 s a step",
        "heartbeat: process 0 of 1 at step 9, 4 s a step",
    ]


def test_what_is_no_step_counts_for_none(monkeypatch):
    """Compiling was once called 80 s a step."""
    now, said = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with watch.Watchdog(0.0, 10.0, said.append) as dog:
        dog.beat(0)
        with dog.aside("evaluating 'valid'"):
            with dog.aside("compiling"):
                now[0] += 70
                dog.pulse(" for 70 s")
            now[0] += 5
            dog.pulse(", batch 1 of 9")  # not yet
            now[0] += 5
            dog.pulse(", batch 2 of 9")
        for step in range(1, 5):
            now[0] += 3
            dog.beat(step)
    assert said == [
        "heartbeat: process 0 of 1 is compiling for 70 s",
        "heartbeat: process 0 of 1 is evaluating 'valid', batch 2 of 9",
        "heartbeat: process 0 of 1 at step 4, 3 s a step",
    ]


def test_traces_cover_the_chosen_steps(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    trace = watch.Trace((2, 3, 5), tmp_path)
    for step in range(6):
        trace.at(step, ())
        calls.append(step)
    trace.close(())
    assert calls == [0, 1, "start", 2, 3, "stop", 4, "start", 5, "stop"]


def test_memory_is_described_where_it_is_known():
    class Device:
        device_kind = "TPU v5"

        def memory_stats(self):
            return {"bytes_in_use": 12_300_000_000, "bytes_limit": 95_700_000_000}

    assert watch.describe_memory(Device()) == "memory of TPU v5: 12.30 GB in use, 95.70 GB in all"
    assert watch.describe_memory(jax.devices()[0]) == ""


def test_two_kills_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(kill_test, "QUICK", QUICK)
    monkeypatch.setattr(kill_test, "START_UP", 0.0)
    monkeypatch.setattr(kill_test, "SPAN", 0.5)
    monkeypatch.setattr(kill_test, "WRITING", 1.0)
    monkeypatch.setattr(kill_test, "BEGUN", 0.02)
    report = kill_test.run(tmp_path, kills=2, steps=30, seed=1)
    assert report[-1].startswith("2 kills") and "bit for bit" in report[-1]
