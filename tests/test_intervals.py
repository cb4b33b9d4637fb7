"""When a run evaluates and saves: the loop with steps that do nothing."""

import contextlib
import math
from types import SimpleNamespace

import pytest

from configs import joint
from jrm_jax import build_data, train
from jrm_jax.run import saved


class Batches(contextlib.nullcontext):
    def __next__(self):
        return None


def loop(monkeypatch, scores, begun=0, saved_before=(), resumed=False, **fields):
    """[(step saved, its metric or None)] of a run whose `valid` gives `scores` by step."""
    config = joint.get_config()
    config.update(fields)
    run, made = train._Run.__new__(train._Run), []
    nothing = SimpleNamespace(**dict.fromkeys(
        ("begin", "beat", "at", "close", "say", "check"), lambda *_: None
    ))  # fmt: skip
    run.config, run.start, run.owed, run.data, run.best_metric = config, begun, False, None, "x"
    run.resumed = resumed or bool(begun)
    run.best = max(saved_before, default=-math.inf)
    run.window = SimpleNamespace(begin=nothing.begin, timed=lambda _: contextlib.nullcontext())
    run.watchdog = contextlib.nullcontext()
    run.watchdog.beat = nothing.beat
    run.trace = run.writer = nothing
    run.stop = SimpleNamespace(now=lambda: False, asked=0)
    run.seconds, run.mesh = 0.0, SimpleNamespace(local_devices=[None])
    run.checkpoints = SimpleNamespace(
        check=lambda: True,
        save=lambda step, _, __, meta, metric: made.append((step, metric)),
        rate=lambda step, meta, metric: made.append(("rated", step)),
    )
    run.held, run.state = None, SimpleNamespace(trainable=None, opt_state=None)
    for name in ("_prepare", "_compile"):
        monkeypatch.setattr(run, name, lambda *_: True, raising=False)
    for name in ("_check", "_log", "_finish", "_meta"):
        monkeypatch.setattr(run, name, lambda *_: None, raising=False)
    run._evaluate = lambda step: {"x": scores[step]}
    run.train_step = lambda state, _: (state, {})
    monkeypatch.setattr(train, "describe_memory", lambda _: "")
    monkeypatch.setattr(build_data, "batches", lambda *_: Batches())
    monkeypatch.setattr(build_data, "place", lambda *_: None)
    run.train()
    return [(step, None if math.isnan(metric) else metric) for step, metric in made]


SCORES = {150: 0.5, 300: 0.7, 450: 0.6, 600: 0.65}


def test_the_best_step_is_saved_wherever_it_falls(monkeypatch):
    times = {"total_steps": 600, "eval_interval": 150, "save_interval": 100}
    made = loop(monkeypatch, SCORES, **times)
    assert made == [(100, None), (150, 0.5), (200, None), (300, 0.7), (400, None), (500, None),
                    (600, 0.65)]  # fmt: skip
    made = loop(monkeypatch, SCORES, **times | {"save_interval": 600})
    assert made == [(150, 0.5), (300, 0.7), (600, 0.65)]
    # a run that goes on knows what it has; what is no better, or not a number, is not saved
    assert loop(monkeypatch, SCORES, 300, (0.7,), **times | {"save_interval": 600}) == [(600, 0.65)]
    worse = {150: math.nan, 300: 0.2, 450: 0.2, 600: 0.1}
    assert [step for step, _ in loop(monkeypatch, worse, **times | {"save_interval": 600})] == [
        300, 600
    ]  # fmt: skip


def test_intervals_that_divide_each_other_save_what_they_always_did(monkeypatch):
    same = {"total_steps": 600, "eval_interval": 150, "save_interval": 150}
    assert loop(monkeypatch, SCORES, **same) == list(SCORES.items())
    often = loop(monkeypatch, SCORES, **same | {"save_interval": 50})
    assert [step for step, _ in often] == list(range(50, 601, 50))


def test_a_run_of_no_steps_that_goes_on_has_saved_its_start(monkeypatch):
    none = {"total_steps": 0, "eval_interval": 150, "save_interval": 100}
    assert loop(monkeypatch, {0: 0.5}, **none) == [(0, 0.5)]
    assert loop(monkeypatch, {0: 0.5}, resumed=True, **none) == []


def test_never_but_at_the_end_is_kept_to(monkeypatch):
    never = {"total_steps": 600, "eval_interval": 150, "save_interval": 0}
    assert loop(monkeypatch, SCORES, **never) == [(600, 0.65)]


@pytest.mark.parametrize("save", [0, 150])
def test_what_is_to_be_kept_is_saved(monkeypatch, save):
    times = {"total_steps": 300, "eval_interval": 0, "save_interval": save, "keep_interval": 50}
    made = loop(monkeypatch, SCORES, **times)
    assert [step for step, _ in made] == list(range(50, 301, 50))


def test_a_run_that_goes_on_reads_its_best_rank(tmp_path):
    assert saved.best_rank(tmp_path, []) == -math.inf
    for step, rank in ((1, "0.5"), (2, "0.75"), (3, "-1e30"), (4, "{")):
        place = tmp_path / str(step) / saved.METRICS
        place.parent.mkdir(parents=True)
        place.write_text(f'{{"{saved.RANK}": {rank}}}')
    assert saved.best_rank(tmp_path, [1, 2, 3, 4, 5]) == 0.75
    assert saved.best_rank(tmp_path, [3, 4]) == -math.inf
