"""Batches across requests: full, fair, in time, and nobody's work is lost with another's."""

import threading
import time

import pytest

from jrm_jax.service.batcher import Batcher, Job
from jrm_jax.service.refusals import Refused


class Device:
    """Writes its calls down; they wait while `gate` is closed. Two buckets may be warm."""

    def __init__(self, rows=4, capacity=100, wait=0.0, warm=("a", "b")):
        self.calls, self.seen, self.fails = [], [], set()
        self.gate = threading.Event()
        self.gate.set()
        self.busy = threading.Event()
        self.batcher = Batcher(self.run, rows, capacity, wait, self.observe, warm)

    def run(self, bucket, encoded):
        self.calls.append((bucket, list(encoded)))
        self.busy.set()
        self.gate.wait(5)
        if self.fails & set(encoded):
            raise RuntimeError("the device is on fire")
        return [f"{one}!" for one in encoded]

    def observe(self, bucket, jobs, seconds, error):
        self.seen.append((bucket, len(jobs), error is None))

    def hold(self):
        """Occupies the device until `gate` is set; returns the ticket."""
        self.gate.clear()
        self.busy.clear()
        ticket = self.batcher.ticket(1)
        ticket.submit([Job("a", "holder", "holder")])
        assert self.busy.wait(5)
        return ticket


@pytest.fixture
def device():
    made = []

    def make(**options):
        made.append(Device(**options))
        return made[-1]

    yield make
    for one in made:
        one.gate.set()


def wait_for(condition):
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def put(ticket, *names, bucket="a", caller="me"):
    jobs = [Job(bucket, name, caller) for name in names]
    for job in jobs:
        ticket.submit([job])
    return jobs


def test_groups_of_several_requests_fill_batches_by_bucket(device):
    one = device()
    with one.hold(), one.batcher.ticket(6) as ticket, one.batcher.ticket(3) as other:
        jobs = put(ticket, 1, 2, 3) + put(other, 4, 5, 6) + put(ticket, 7, 8, 9, bucket="b")
        wanted = [f"{job.encoded}!" for job in jobs]
        one.gate.set()
        assert [job.future.result(5) for job in jobs] == wanted
    assert [(bucket, len(batch)) for bucket, batch in one.calls] == [
        ("a", 1), ("a", 4), ("a", 2), ("b", 3)
    ]  # fmt: skip


def test_callers_take_turns(device):
    one = device(rows=2)
    with one.hold(), one.batcher.ticket(8) as ticket:
        jobs = put(ticket, *(f"big{i}" for i in range(6)), caller="big")
        jobs += put(ticket, "small0", "small1", caller="small")
        one.gate.set()
        [job.future.result(5) for job in jobs]
    assert one.calls[1:3] == [("a", ["big0", "small0"]), ("a", ["big1", "small1"])]
    rest = [name for _, batch in one.calls[3:] for name in batch]
    assert rest == [f"big{i}" for i in range(2, 6)]


def test_a_batch_with_room_waits_for_those_on_the_way_and_no_longer(device):
    one = device(rows=3, wait=1.0)
    with one.batcher.ticket(1) as ticket:
        start = time.monotonic()
        (job,) = put(ticket, "alone")
        job.future.result(5)
        assert time.monotonic() - start < 0.9  # nobody else is on the way
    with one.batcher.ticket(2) as ticket:
        start = time.monotonic()
        (job,) = put(ticket, "early")  # the other never comes
        job.future.result(5)
        assert 0.9 < time.monotonic() - start < 4
    with one.batcher.ticket(3) as ticket:
        start = time.monotonic()
        first = put(ticket, 1)
        time.sleep(0.02)
        jobs = first + put(ticket, 2, 3)
        [job.future.result(5) for job in jobs]
        assert time.monotonic() - start < 0.9  # it is full
    assert one.calls[-1] == ("a", [1, 2, 3])
    with one.batcher.ticket(2) as ticket:
        start = time.monotonic()
        (job,) = put(ticket, "early")
        ticket.skip()  # it could not be read
        job.future.result(5)
        assert time.monotonic() - start < 0.9


def test_the_queue_is_bounded_and_what_nobody_waits_for_is_dropped(device):
    one = device(capacity=4)
    with one.hold():
        with one.batcher.ticket(3) as ticket:
            jobs = put(ticket, 1, 2)
            with pytest.raises(Refused) as full:
                one.batcher.ticket(1)
            assert full.value.status == 429 and full.value.retry_after >= 1
            assert one.batcher.waiting == 2
        assert one.batcher.waiting == 0 and all(job.future.cancelled() for job in jobs)
        late = put(ticket, 3)  # its pictures were being read as the request ended
        assert late[0].future.cancelled() and one.batcher.waiting == 0
        assert one.batcher.pending == 1
        one.gate.set()
    with one.batcher.ticket(4) as ticket:
        assert put(ticket, 5)[0].future.result(5) == "5!"
    assert [batch for _, batch in one.calls] == [["holder"], [5]]
    assert one.batcher.pending == 0


def test_a_batch_that_fails_is_alone(device):
    one = device(rows=2)
    one.fails.add("bad")
    with one.hold(), one.batcher.ticket(4) as ticket:
        neighbour, bad, good, last = put(ticket, "neighbour", "bad", "good", "last")
        one.gate.set()
        for job in (neighbour, bad):
            with pytest.raises(RuntimeError, match="on fire"):
                job.future.result(5)
        assert good.future.result(5) == "good!" and last.future.result(5) == "last!"
    wait_for(lambda: len(one.seen) == 3)
    assert one.seen == [("a", 1, True), ("a", 2, False), ("a", 2, True)]


def test_a_program_that_is_compiled_keeps_nobody_else_waiting(device):
    one = device(rows=2, warm=("a",))
    with one.batcher.ticket(4) as ticket:
        one.gate.clear()
        cold = put(ticket, 1, 2, 3, bucket="new")
        assert one.busy.wait(5)
        warm = put(ticket, 4)  # its call is made while the compiler is at work
        wait_for(lambda: len(one.calls) == 2)
        assert one.calls == [("new", [1, 2]), ("a", [4])]
        one.gate.set()
        assert [job.future.result(5) for job in cold + warm] == ["1!", "2!", "3!", "4!"]
