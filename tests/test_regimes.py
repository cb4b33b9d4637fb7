"""The second part of the study: its points, what they share, its numbers by hand, its page."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from entry_point import small_backbone  # noqa: F401

from configs import study
from jrm_jax import build_data
from jrm_jax.errors import UserError
from jrm_jax.study import (
    cells,
    design,
    measure,
    regimes,
    regimes_numbers,
    regimes_report,
    runner,
)
from jrm_jax.study.regimes import ARMS, Point

ROOT = Path(__file__).resolve().parents[1]


def settings(variant="regimes"):
    return study.get_config(variant)


def test_the_design_covers_what_it_must():
    config = settings()
    plan = design.plan(config)
    points = [p for p in plan if not p.is_trial]
    assert {p.arm for p in points} == set(ARMS) and len(plan) == len(set(plan))
    assert plan[0].is_trial and {p.arm for p in plan if p.is_trial} == {"discriminative"}
    assert {p.flip for p in plan if p.is_trial} == {0.0, 0.35}
    headline = [p for p in points if (p.labelled, p.flip) == (1600, 0.35)]
    for arm in (*config.verdict.arms, config.verdict.placebo, "discriminative", "teacher"):
        assert {p.seed for p in headline if p.arm == arm} == set(range(5))
    for arm in ("discriminative", "joint", "joint_words", "joint_through", "teacher",
                "joint_teacher", "regression", "staged", "staged_joint"):  # fmt: skip
        places = {(p.labelled, p.flip) for p in points if p.arm == arm}
        assert places == {(n, f) for n in (100, 400, 1600, 6400) for f in (0.0, 0.2, 0.35)}
    first = [p.arm for p in points[:4]]
    assert first == ["discriminative", "joint", "joint_words", "joint_shuffled"]
    with pytest.raises(UserError, match="no arm 'jiont'"):
        config.points = ((("jiont",), (8,), (0.0,), 1),)
        design.plan(config)


def test_labels_are_seen_equally_often_in_every_arm():
    config = settings()
    for arm, what in ARMS.items():
        training = cells.training_config(config, Point(arm, 1600, 0.35, 3))
        world = training.data.world
        assert training.data.labelled == config.labelled_rows
        assert training.batch_size == config.labelled_rows * (1 if what.changes == regimes.ALONE
                                                              else 2)  # fmt: skip
        assert (world.labelled * world.train, world.pairs, world.flip) == (1600, 1, 0.35)
        assert (world.test, world.hard) == (0, 0)
        assert training.total_steps == config.train.total_steps
        build_data.check_data.reads_critiques(training)
    learns = cells.training_config(config, Point("teacher", 1600, 0.0, 0)).loss
    assert learns.teacher_weight == 1.0 and learns.language_weight == 0.0


def test_what_is_left_out_of_a_point():
    config = settings()
    parts = {
        name: point.measures(config)["parts"]
        for name, point in (
            ("trial", Point("discriminative", 1600, 0.0, 0, 1e-3, 9)),
            ("point", Point("joint", 1600, 0.35, 0)), ("whole", Point("joint", 1600, 0.35, 1)),
            ("other", Point("joint", 400, 0.35, 1)),
        )
    }  # fmt: skip
    assert parts["trial"] == ["valid"] and parts["point"] == parts["other"]
    assert {"attack", "critiques", "contests"} <= set(parts["whole"]) - set(parts["point"])
    assert set(parts["whole"]) == set(measure.PARTS)


def test_a_point_is_known_by_everything_its_numbers_depend_on():
    config, point = settings(), Point("staged", 400, 0.2, 0)
    first = cells.fingerprint(config, point)
    others = [point._replace(seed=1), point._replace(labelled=100), point._replace(flip=0.0),
              point._replace(arm="staged_joint"), point._replace(rate=1e-3, steps=9)]  # fmt: skip
    assert len({cells.fingerprint(config, p) for p in others} | {first}) == 6
    config.stage_steps = 5
    assert cells.fingerprint(config, point) != first
    plain = Point("joint", 400, 0.2, 0)
    assert cells.fingerprint(config, plain) == cells.fingerprint(settings(), plain)
    config = settings()
    config.verdict.gain, config.trials = 99.0, ()
    assert cells.fingerprint(config, point) == first


# Numbers by hand


def made(scores, split="hard", **more):
    """The result of a cell; scores by group."""
    return {
        "scores/test": [[0.0, 1.0]] * 4, "scores/hard": scores, "valid": 0.6, "step": 2,
        "ranks": {"2": {"effective_rank": 3.0}}, "says": {"2": {"verdict": 0.7}},
        "seconds": {"train": 10.0, "measure": 2.0},
        "machine": {"device": "d", "cpu": "c", "jax": "j"}, **more,
    }  # fmt: skip


@pytest.fixture
def hand(monkeypatch):
    """(config, gold order by group): candidate 0 is the better one of each of eight groups."""
    from jrm_jax.study.analysis import Pairs

    config = settings("regimes_tiny")
    config.sizes, config.flips = (100, 400, 1600), (0.35,)
    config.headline.labelled = 400
    config.points = ((tuple(ARMS), config.sizes, (0.35,), 2),)
    config.trials = ()
    config.world.update({"test": 4, "hard": 8})

    def pairs(split, count, seed):
        zero = np.zeros(count, int)
        return Pairs(np.arange(count), zero, zero + 1, zero, zero)

    monkeypatch.setattr(regimes_numbers.analysis, "load_pairs", pairs)
    for name in ("load_distances", "load_damage"):
        rule = lambda split, count, seed: ((0.0, 1.0),) * count  # noqa: E731
        monkeypatch.setitem(
            regimes_numbers.RULES,
            next(k for k, v in regimes_numbers.RULES.items() if v.__name__ == name), rule,
        )  # fmt: skip
    return config


def right(count):
    """Scores that order the first `count` of eight groups."""
    return [[1.0, 0.0]] * count + [[0.0, 1.0]] * (8 - count)


def test_gains_are_of_the_same_place_and_seed(hand):
    found = {
        Point("discriminative", 400, 0.35, 0): made(right(4)),
        Point("discriminative", 400, 0.35, 1): made(right(5)),
        Point("discriminative", 1600, 0.35, 0): made(right(8)),
        Point("joint", 400, 0.35, 0): made(right(7)),
        Point("joint", 400, 0.35, 2): made(right(0)),
    }
    table = regimes_numbers.Table(hand, found)
    gain = table.gain("joint", 400, 0.35, "hard")
    assert (gain["value"], gain["seeds"]) == (3 / 8, 1)
    assert table.gain("joint", 1600, 0.35, "hard") is None
    assert table.gain("discriminative", 400, 0.35, "hard") is None
    place = table.place("discriminative", 400, 0.35)
    assert place["hard"]["value"] == 9 / 16 and place["rank"] == 3.0
    by_hand = np.mean([np.log1p(np.exp(-1.0))] * 9 + [np.log1p(np.exp(1.0))] * 7)
    assert place["preference"] == pytest.approx(by_hand)


@pytest.mark.parametrize(
    "joint, words, shuffled, holds",
    [(8, 8, 4, True), (8, 4, 4, False), (8, 8, 8, False), (4, 4, 4, False)],
)
def test_the_verdict_needs_both_arms_and_no_placebo(hand, joint, words, shuffled, holds):
    counts = {"discriminative": 4, "joint": joint, "joint_words": words, "joint_shuffled": shuffled}
    found = {
        Point(arm, 400, 0.35, seed): made(right(count))
        for arm, count in counts.items() for seed in (0, 1)
    }  # fmt: skip
    verdict = regimes_numbers.verdict(hand, regimes_numbers.Table(hand, found))
    assert verdict["holds"] is holds and verdict["seeds"] == 2
    assert verdict["confidence"] == pytest.approx(0.975)  # two comparisons
    del found[Point("joint", 400, 0.35, 0)], found[Point("joint", 400, 0.35, 1)]
    missing = regimes_numbers.verdict(hand, regimes_numbers.Table(hand, found))
    assert missing["holds"] is None and missing["arms"]["joint"] is None


def test_label_efficiency_by_hand(hand):
    curve = {100: 2, 400: 4, 1600: 6}
    found = {
        Point("discriminative", size, 0.35, 0): made(right(n)) for size, n in curve.items()
    } | {
        Point("joint", size, 0.35, 0): made(right(4 + (size > 100))) for size in curve
    }  # fmt: skip
    table = regimes_numbers.Table(hand, found)
    # discriminative is at one half with 400 labels, joint with 100
    assert table.efficiency("joint", 0.35, 0.5)["value"] == pytest.approx(4.0)
    # five of eight: half way from 400 to 1600, by the logarithm; joint has it at 400
    assert table.efficiency("joint", 0.35, 5 / 8)["value"] == pytest.approx(2.0)
    reached = table.efficiency("joint", 0.35, 6 / 8)
    assert reached["value"] == 0.0 and reached["sizes"] == [100, 400, 1600]  # joint never does
    assert table.efficiency("joint", 0.35, 0.9) is None  # neither does
    assert table.efficiency("teacher", 0.35, 0.5) is None  # not run
    exact = table.efficiency("discriminative", 0.35, 0.5)
    assert exact["value"] == pytest.approx(1.0)


def test_advice_is_of_what_was_measured(hand):
    found = {}
    text = "\n".join(regimes_report.advice(hand, regimes_numbers.collect(hand, found)))
    assert "Not measured yet: 3 of 3 places" in text and "| use |" not in text
    for seed in (0, 1):
        found[Point("discriminative", 400, 0.35, seed)] = made(right(3))
        found[Point("joint", 400, 0.35, seed)] = made(right(8))
    collected = regimes_numbers.collect(hand, found)
    text = "\n".join(regimes_report.advice(hand, collected))
    assert "| good ones, for all groups | joint +62.5" in text and "2 of 3 places" in text
    one = {p: r for p, r in found.items() if p.seed == 0}
    text = "\n".join(regimes_report.advice(hand, regimes_numbers.collect(hand, one)))
    assert "too few seeds to say" in text
    for seed in (0, 1):
        found[Point("joint", 400, 0.35, seed)] = made(right(3))
    text = "\n".join(regimes_report.advice(hand, regimes_numbers.collect(hand, found)))
    assert "discriminative; no gain can be told from zero" in text
    page = regimes_report.markdown(hand, collected, [])
    assert "**Nothing is decided yet**: with 400 pairs" in page.splitlines()[2]
    assert "Not yet run: joint_words" in page and "None" not in page and "nan" not in page


# Several at a time


def test_no_cell_is_made_twice(tmp_path, monkeypatch):
    config = settings("regimes_tiny")
    config.out, config.workdir = str(tmp_path / "out"), str(tmp_path / "runs")
    begun, running, most = [], [], []
    lock = threading.Lock()

    def make(config, cell, keep, place):
        with lock:
            begun.append(cell)
            running.append(cell)
            most.append(len(running))
        time.sleep(0.3)
        cells.save_cell(config, cell, {"fingerprint": cells.fingerprint(config, cell),
                                       "seconds": {"train": 1.0, "measure": 1.0}})  # fmt: skip
        with lock:
            running.remove(cell)

    monkeypatch.setattr(runner, "make_cell", make)
    two = [threading.Thread(target=runner.run, args=(config, 0.0, False, jobs)) for jobs in (2, 1)]
    for thread in two:
        thread.start()
    for thread in two:
        thread.join()
    assert sorted(begun) == sorted(design.plan(config)) and max(most) > 1


def test_a_cell_that_fails_ends_the_others(tmp_path, monkeypatch):
    config = settings("regimes_tiny")
    config.out, config.workdir = str(tmp_path / "out"), str(tmp_path / "runs")
    seen = []

    def make(config, cell, keep, place):
        seen.append(cell)
        if len(seen) == 1:
            raise UserError("no room left")
        while True:
            runner._check_time(place)
            time.sleep(0.05)

    monkeypatch.setattr(runner, "make_cell", make)
    with pytest.raises(UserError, match="no room left"):
        runner.run(config, jobs=3)
    assert len(seen) <= 3


def test_processes_do_not_outlive_their_runner(tmp_path, monkeypatch):
    config = settings("regimes_tiny")
    config.out, config.workdir = str(tmp_path / "out"), str(tmp_path / "runs")
    started, start = [], subprocess.Popen

    def note(*args, **kwargs):
        started.append(start(*args, **kwargs))
        return started[-1]

    def make(config, cell, keep, place):
        runner._call(["timeit", "-n1", "-r1", "import time; time.sleep(600)"], cell, place)

    def interrupt():
        while len(started) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runner, "make_cell", make)
    monkeypatch.setattr(runner.subprocess, "Popen", note)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        runner.run(config, jobs=2)
    assert [process.poll() for process in started] == [-signal.SIGTERM] * 2


@pytest.fixture(scope="module")
def again(tmp_path_factory, small_backbone):  # noqa: F811
    """(config, what the command said): every point of the tiny design, made by two jobs."""
    folder = tmp_path_factory.mktemp("regimes")
    done = subprocess.run(
        [
            sys.executable, "-m", "jrm_jax.study", "--config=configs/study.py:regimes_tiny",
            f"--config.out={folder}/regimes", f"--config.workdir={folder}/runs",
            f"--config.train.backbone.path={small_backbone}", "--jobs=2",
        ],
        capture_output=True, text=True, cwd=ROOT, timeout=1800, env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    config = settings("regimes_tiny")
    config.out, config.workdir = f"{folder}/regimes", f"{folder}/runs"
    config.train.backbone.path = str(small_backbone)
    return config, done.stdout


def test_a_point_made_again_has_the_same_numbers(again):
    """Against a file that another run wrote. If the world, the tiny config or the tests' small
    backbone is changed on purpose, copy the new cell there."""
    config, _ = again
    found = design.load(config)
    assert set(found) == set(design.plan(config))
    kept = json.loads((ROOT / "tests" / "regimes_cell.json").read_text())
    ours = found[Point("joint_teacher", 8, 0.35, 0)]
    assert (ours["steps"], ours["world"], ours["valid"]) == (
        kept["steps"], kept["world"], pytest.approx(kept["valid"], abs=0.1)
    )  # fmt: skip
    for split in ("valid", "test", "hard"):
        for a, b in zip(ours[f"scores/{split}"], kept[f"scores/{split}"], strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)
    assert ours["ranks"]["2"]["effective_rank"] == pytest.approx(
        kept["ranks"]["2"]["effective_rank"], rel=0.01
    )
    assert not {"attack", "contests", "critiques", "cost", "pulls"} & set(ours)  # left out


def test_a_run_begins_where_critiques_alone_have_led(again):
    """Its backbone is the first run's, with the reward token's embedding, and has no head."""
    from jrm_jax.data.template import load_tokenizer, names_reward
    from jrm_jax.model.tensor_files import TensorFiles

    config, said = again
    (folder,) = Path(config.workdir).glob("first-s0-*-export")
    begun, led = (TensorFiles(Path(f)) for f in (config.train.backbone.path, folder))
    assert set(begun.tensors) == set(led.tensors)  # no score.weight
    (name,) = (n for n in led.tensors if n.endswith("embed_tokens.weight"))
    shape = led.describe(name)[0]
    before, after = (files.read(name, [(0, size) for size in shape]) for files in (begun, led))
    tokenizer = load_tokenizer(folder, shape[0])
    moved = np.flatnonzero((before != after).any(axis=1))
    assert tokenizer.reward_id in moved  # it learns, in a spare row
    # where a run's reward token begins without such a row
    assert np.abs(after[tokenizer.reward_id] - before[tokenizer.end_id]).max() < 0.1
    assert names_reward(folder) and not names_reward(config.train.backbone.path)
    assert said.count("cell staged-n8-f0.35-s0") == 1
    assert not [*Path(config.workdir).glob("staged*")]  # measured, hence removed


def test_the_page_is_made_of_its_cells(again):
    config, _ = again
    page = Path(config.out).with_suffix(".md").read_text()
    numbers = json.loads((Path(config.out) / "numbers.json").read_text())
    assert numbers == json.loads(json.dumps(regimes_numbers.collect(config, design.load(config))))
    assert page.splitlines()[2].startswith("**Nothing is decided yet**")
    assert "| joint_teacher-n8-f0.35-s0 |" in page and "a degraded picture is worse" in page
    assert numbers["budget"]["missing"] == [] and numbers["trials"] == []


def test_committed_cells_count(monkeypatch):
    """A change that makes them void must be meant: cells are hours of computing."""
    monkeypatch.chdir(ROOT)
    config = settings()
    paths = {path.stem for path in (ROOT / config.out / "cells").glob("*.json")}
    assert {cell.name for cell in design.load(config)} == paths


def test_the_readme_says_what_the_page_says():
    """README shows the page's table, word by word."""
    table = (ROOT / "docs" / "regimes" / regimes_report.TABLE).read_text().strip()
    assert table and table in (ROOT / "README.md").read_text()
    assert table in (ROOT / "docs" / "regimes.md").read_text()
