"""Sets and streams: every group once, in order, in few programs, and never all in memory."""

import dataclasses
import itertools
import threading
import time
import weakref
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from jrm_jax.data.buckets import Bucket
from jrm_jax.errors import UserError
from jrm_jax.serving import files
from jrm_jax.serving.groups import Group, Scores, all_finite, finite
from jrm_jax.serving.planned import THREADS, Calls, ahead, in_order, run_all
from jrm_jax.serving.programs import Program
from jrm_jax.serving.reward_model import RewardModel
from jrm_jax.serving.rows import Needs

EMPTY = SimpleNamespace
WHOLE = Bucket(9, 9, 9, 9, 9, 9)


def a_group(number, candidates, size):
    """What `need_of`, `split` and the calls below look at."""
    rows = [EMPTY(tokens=[0] * size) for _ in range(candidates)]
    return EMPTY(number=number, candidates=rows, images=[], prompt=EMPTY(tokens=[0]))


class Machine:
    """Programs of four rows for each size; counts calls, and rows that wait."""

    def __init__(self):
        self.calls = []

    def fit(self, need):
        return Program(dataclasses.replace(WHOLE, candidate=need.candidate), 4)

    def lay(self, program, groups):
        return {"rows": [(g.number, len(g.candidates)) for g in groups], "program": program}

    def run(self, batch):
        self.calls.append((batch["program"], len(batch["rows"])))
        found = np.full((4, 8, 1), np.nan, np.float32)
        for row, (number, count) in enumerate(batch["rows"]):
            found[row, :count, 0] = number + np.arange(count) / 8
        return found

    @property
    def as_calls(self):
        return Calls(lambda group: [group], self.fit, self.lay, self.run)


def test_what_is_prepared_ahead_comes_in_order_and_no_further_than_asked():
    taken = []

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    def slow(i):
        time.sleep(0.002 * (i % 3))
        return i * i

    found = []
    for value in ahead(slow, items(), 5):
        found.append(value)
        assert len(taken) <= len(found) + 6
    assert found == [i * i for i in range(50)]
    before = threading.active_count()
    stream = ahead(slow, itertools.count(), 5)
    assert next(stream) == 0
    stream.close()
    assert threading.active_count() <= before


def test_an_error_comes_in_its_place():
    def fail(i):
        if i == 3:
            raise KeyError(i)
        return i

    stream = ahead(fail, range(10), 4)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError):
        next(stream)


@pytest.mark.parametrize("lag", [None, 12])
def test_every_group_is_scored_once_in_full_batches(lag):
    rng, machine = np.random.default_rng(0), Machine()
    groups = [a_group(i, int(rng.integers(1, 8)), int(rng.integers(1, 4))) for i in range(203)]
    found = list(in_order(run_all(enumerate(groups), lambda _, g: g, machine.as_calls, 4, lag)))
    assert len(found) == len(groups)
    for group, array_KX in zip(groups, found, strict=True):
        count = len(group.candidates)
        np.testing.assert_array_equal(array_KX[:, 0], group.number + np.arange(count) / 8)
    partial = [call for call in machine.calls if call[1] < 4]
    assert len(partial) <= (1 if lag is None else 15)  # a set's last batches are joined


def test_a_rare_size_does_not_hold_up_a_stream():
    machine, held = Machine(), []
    groups = (a_group(i, 1, 2 if i == 5 else 1) for i in range(10**9))
    stream = in_order(run_all(enumerate(groups), lambda _, g: g, machine.as_calls, 4, 40))
    for wanted, array_KX in enumerate(itertools.islice(stream, 200)):
        held.append(sum(count for _, count in machine.calls) - wanted)
        assert array_KX[0, 0] == wanted
    assert max(held) < 40 + 8 * 4


def test_parts_of_a_large_group_come_back_as_one():
    machine, big = Machine(), a_group(7, 9, 1)

    def cut(group):
        return [a_group(7, 5, 1), a_group(107, 4, 1)] if group is big else [group]

    calls = machine.as_calls._replace(cut=cut)
    (found,) = list(in_order(run_all([(0, big)], lambda _, g: g, calls, 4)))
    wanted = [*(7 + np.arange(5) / 8), *(107 + np.arange(4) / 8)]
    np.testing.assert_array_equal(found[:, 0], np.float32(wanted))


@pytest.mark.parametrize("lag", [None, 12])
def test_what_no_program_takes_is_an_error_in_its_place(lag):
    machine = Machine()

    def encode(number, group):
        if number == 3:
            raise UserError("broken")
        return group

    def cut(group):
        return [group, a_group(100, 1, 9)] if group.number == 20 else [group]

    def fit(need):
        if need.candidate == 9:
            raise UserError("too large")
        return machine.fit(need)

    groups = [a_group(i, 1, 9 if i in (0, 7, 29) else 1) for i in range(30)]
    calls = machine.as_calls._replace(cut=cut, fit=fit)
    found = list(in_order(run_all(enumerate(groups), encode, calls, 4, lag)))
    errors = {i: str(one) for i, one in enumerate(found) if isinstance(one, UserError)}
    assert errors == {3: "broken"} | dict.fromkeys((0, 7, 20, 29), "too large")
    good = [(i, one[0, 0]) for i, one in enumerate(found) if i not in errors]
    assert len(good) == 25 and all(i == value for i, value in good)


def test_pictures_are_kept_no_longer_than_they_are_needed():
    alive = weakref.WeakSet()

    class Picture:
        def __init__(self):
            alive.add(self)

    def streamed(kind, like, items, encode):
        most = [len(alive) for number, _ in enumerate(items) if number >= 64]
        assert len(most) == 136 and max(most) <= 3  # the first 64 are needed to plan
        return [np.zeros((1, 1), np.float32)] * 200

    model = SimpleNamespace(
        batch_size=4, need=lambda *_: None, _scores=lambda found: [Scores(*found, 0, ())],
        _runner=SimpleNamespace(streamed=streamed),
    )  # fmt: skip
    groups = (Group("", None, [Picture()]) for _ in range(200))
    assert len(list(RewardModel.iter_found(model, groups))) == 200

    def found(groups, like):
        most = [len(alive) for _ in groups]
        assert max(most) <= 3
        return [UserError("too large")] * len(most)

    cells = [[{"picture": "a.png"}] for _ in range(50)]
    asked = (files._Asked({"candidates": c}, Group("", None, [Picture()]), c) for c in cells)
    rows = list(files._score(SimpleNamespace(iter_found=found), asked, []))
    assert rows == [{"error": "too large"}] * 50


def test_a_list_is_read_where_it_is_needed_and_its_sizes_take_little():
    alive, most = weakref.WeakSet(), []

    class Picture:
        def __init__(self):
            alive.add(self)

    class Groups(Sequence):
        """Makes a group whenever it is asked for one."""

        def __len__(self):
            return 200

        def __getitem__(self, index):
            if index >= len(self):
                raise IndexError(index)
            return Group("a" * (index % 2), None, [Picture()])

    def need(group, where):
        most.append(len(alive))
        return Needs(dataclasses.replace(WHOLE, prompt=len(group.instruction)), ())

    def score_lazily(needs, encode):
        assert len(needs) == 200 and len({id(one) for one in needs}) == 2
        for index in range(200):
            assert encode(index)[1] == f"group {index}: "
            most.append(len(alive))
        return needs

    model = SimpleNamespace(
        batch_size=2, need=need, encode=lambda *how: how, score_lazily=score_lazily,
        _with_scale=list,
    )  # fmt: skip
    assert len(RewardModel.score_batch(model, Groups())) == 200
    assert max(most) <= 2 + 2 * THREADS


def test_a_score_that_is_not_finite_is_an_error_of_its_group():
    good = np.ones((2, 1), np.float32)
    scores = Scores(good, good * np.nan, ("overall",))  # a run that knows no rewards
    assert finite(scores) is scores and all_finite([scores]) == [scores]
    for value in (np.nan, np.inf, -np.inf):
        bad = np.array([[1], [value]], np.float32)
        for one in (scores._replace(reward_KR=bad), scores._replace(deviation_KR=bad)):
            assert "not finite" in str(finite(one))
            with pytest.raises(UserError, match="^group 1: the model gives a score that is not fi"):
                all_finite([scores, one])

    broken = np.array([[np.nan]], np.float32)
    model = SimpleNamespace(
        batch_size=4, need=lambda *_: None, _scores=lambda found: [Scores(*found, 0, ())],
        _runner=SimpleNamespace(streamed=lambda *_: [good, broken, UserError("large"), good]),
    )  # fmt: skip
    found = list(RewardModel.iter_found(model, [Group("", None, [])] * 4))
    assert [isinstance(one, UserError) for one in found] == [False, True, True, False]
