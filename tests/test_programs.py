"""What a run compiles: once each, with words, and no longer than it is wanted."""

import dataclasses
import threading
import time

import pytest

from jrm_jax.data.buckets import Bucket
from jrm_jax.run import programs
from jrm_jax.run.programs import EVALUATE, TRAIN, Programs
from jrm_jax.shell.stop import StopRequest
from jrm_jax.watch import Watchdog

SMALL, LARGE = Bucket(2, 3, 16, 8, 8, 8), Bucket(4, 5, 16, 8, 8, 8)


class Step:
    """Stands in for a jitted function: `lower(...).compile()` waits for `go`."""

    def __init__(self, error=None):
        self.seen, self.error = [], error
        self.go = threading.Event()
        self.go.set()

    def lower(self, *inputs):
        self.seen.append(inputs)
        return self

    def compile(self):
        self.go.wait(20)
        if self.error:
            raise self.error


@dataclasses.dataclass
class Case:
    train: Step
    evaluate: Step
    stop: StopRequest
    programs: Programs
    said: list
    shown: list


def make_case(error=None, every=0.0) -> Case:
    said, shown = [], []
    train, evaluate, stop = Step(error), Step(), StopRequest()
    made = Programs(
        {TRAIN: train, EVALUATE: evaluate},
        {TRAIN: {LARGE, SMALL}, EVALUATE: {LARGE}},
        (SMALL, LARGE),
        stop=stop,
        watchdog=Watchdog(0.0, every, said.append),
        say=said.append,
        show=shown.append,
    )
    return Case(train, evaluate, stop, made, said, shown)


def test_each_is_compiled_once_and_announced():
    case = make_case()
    assert case.programs.wanted == [(TRAIN, LARGE), (TRAIN, SMALL), (EVALUATE, LARGE)]
    assert case.programs.prepare({(TRAIN, LARGE): (1, 2)})
    assert case.said == ["compiling 1 of 3: training step, bucket 2", "compiled in 0 s"]
    assert case.shown == ["compiling 1 of 3", ""]
    assert case.programs.prepare({(TRAIN, LARGE): (3, 4)})  # again: nothing to do, nothing to say
    assert case.train.seen == [(1, 2)] and len(case.said) == 2
    case.programs._last = 31.4
    assert case.programs.prepare({(TRAIN, LARGE): (), (EVALUATE, LARGE): (5,)})
    assert case.said[2:] == [
        "compiling 2 of 3: evaluation, bucket 2; the last took 31 s", "compiled in 0 s",
    ]  # fmt: skip
    assert case.evaluate.seen == [(5,)] and not programs.are_left()


def test_several_at_a_time():
    case = make_case()
    case.train.go.clear()
    wanted = {(TRAIN, SMALL): (), (TRAIN, LARGE): (), (EVALUATE, LARGE): ()}
    threading.Timer(0.5, case.train.go.set).start()
    assert case.programs.prepare(wanted, threads=2)
    assert [words.partition(" of")[0] for words in case.said[:3]] == [
        "compiling 1", "compiling 2", "compiling 3"
    ]  # fmt: skip
    assert len(case.train.seen) == 2 and len(case.evaluate.seen) == 1


def test_what_goes_wrong_is_raised_here():
    case = make_case(error=MemoryError("too large"))
    with pytest.raises(MemoryError, match="too large"):
        case.programs.prepare({(TRAIN, SMALL): ()})
    case.train.error = None
    assert case.programs.prepare({(TRAIN, SMALL): ()})  # it was not taken for done


def test_a_request_to_stop_gives_it_up():
    case = make_case()
    case.train.go.clear()
    wanted = {(TRAIN, SMALL): (), (TRAIN, LARGE): ()}
    threading.Timer(0.3, lambda: setattr(case.stop, "asked", 15)).start()
    began = time.monotonic()
    assert not case.programs.prepare(wanted)
    assert time.monotonic() - began < 5 and programs.are_left()
    assert case.said == ["compiling 1 of 3: training step, bucket 1"]
    case.train.go.set()
    while programs.are_left():
        assert time.monotonic() - began < 20
    assert len(case.train.seen) == 1  # the next was not begun


def test_long_ones_have_a_heartbeat():
    case = make_case(every=0.2)
    case.train.go.clear()
    threading.Timer(1.0, case.train.go.set).start()
    assert case.programs.prepare({(TRAIN, SMALL): ()})
    assert "heartbeat: process 0 of 1 is compiling for 0 s" in case.said
