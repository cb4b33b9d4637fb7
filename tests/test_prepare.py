"""Drawing the built-in world with as many processes as there are processors for this one."""

import os
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest

from jrm_jax.data import workers
from jrm_jax.data.store import open_dataset
from jrm_jax.data.world import prepare
from jrm_jax.errors import UserError
from jrm_jax.shell import cores


class Pool:
    """In the place of worker processes; `dies`: the calls after which one is killed."""

    calls, most, dies = 0, 0, 10**9

    def __init__(self, workers, *_):
        self.workers, Pool.most, Pool.calls = workers, 0, 0
        self.waiting = set()

    def submit(self, call, *arguments):
        Pool.calls += 1
        future = Future()
        if Pool.calls > Pool.dies:
            future.set_exception(BrokenProcessPool("a process was terminated"))
            return future
        future.set_result(call(*arguments))
        taken = future.result
        self.waiting.add(future)
        Pool.most = max(Pool.most, len(self.waiting))

        def result(timeout=None):
            self.waiting.discard(future)
            return taken(timeout)

        future.result = result
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(prepare, "_world_record", lambda task: {**RECORD, "id": f"x{task[2]}"})
    monkeypatch.setattr(Pool, "dies", 10**9)
    monkeypatch.setattr(prepare, "CHUNK", 2)
    monkeypatch.setattr(cores, "usable", lambda: 3)
    return Pool


RECORD = {"id": "", "record": "{}", "images": []}


def test_examples_come_in_order_and_few_are_drawn_ahead(tmp_path, pool):
    folder = prepare.prepare_world(tmp_path, {"train": 101, "valid": 3}, 0)
    sets = open_dataset(folder)
    assert [sets["train"][i]["id"] for i in range(101)] == [f"x{i}".encode() for i in range(101)]
    assert len(sets["valid"]) == 3
    assert pool.calls == 3 + 51 + 2  # one to start each of the workers
    assert pool.most <= 3 + prepare.AHEAD * 3 + 1


def test_a_killed_worker_is_one_line_and_leaves_nothing(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(pool, "dies", 7)
    with pytest.raises(UserError, match="a process that draws the built-in world was ended"):
        prepare.prepare_world(tmp_path, {"train": 101}, 0)
    assert not list(tmp_path.iterdir())


def test_processors_are_those_of_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 7, 9}, raising=False)
    assert cores.bound() == cores.usable() == 3
    for quota, count in (("max 100000", 3), ("150000 100000", 2), ("20000 100000", 1),
                         ("900000 100000", 3), ("", 3)):  # fmt: skip
        cores.QUOTA.write_text(f"{quota}\n")
        assert cores.usable() == count and cores.bound() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.bound() == os.cpu_count()
