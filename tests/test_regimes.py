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
from entry_point import QUICK, small_backbone  # noqa: F401

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
    trials = [p for p in plan if p.is_trial]
    assert plan[0].is_trial and {p.flip for p in trials} == {0.0, 0.35}
    assert {p.arm for p in trials} == {"discriminative", *(arm for arm, _ in config.verdict.arms)}
    known = [arm for arms, _ in config.rates for arm in arms]
    assert len(known) == len(set(known)) and set(known) <= set(ARMS)
    rate = {arm: rate for arms, rate in config.rates for arm in arms}
    for arm, control in config.verdict.arms:  # at the same rate
        assert rate[arm] == rate[control] == rate[f"{arm.removeprefix('joint_')}_masked"]
    headline = [p for p in points if (p.labelled, p.flip) == (1600, 0.35)]
    compared = [arm for pair in config.verdict.arms for arm in pair]
    assert compared == ["joint", "joint_shuffled", "joint_words", "words_shuffled"]
    for arm in (*compared, "discriminative", "teacher"):
        assert {p.seed for p in headline if p.arm == arm} == set(range(5))
    for arm in ("discriminative", "joint", "joint_words", "joint_through", "teacher",
                "joint_teacher", "regression", "staged", "staged_joint"):  # fmt: skip
        places = {(p.labelled, p.flip) for p in points if p.arm == arm}
        assert places == {(n, f) for n in (100, 400, 1600, 6400) for f in (0.0, 0.2, 0.35)}
    assert [p.arm for p in points[:5]] == ["discriminative", *study.HEADLINE_ARMS[1:]]
    assert set(study.HEADLINE_ARMS[1:]) == set(compared)
    for arm in study.CURVES:  # else nothing could be recommended from them
        assert {p.seed for p in points if p.arm == arm} >= set(range(config.verdict.advice_seeds))
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
    before = cells.fingerprint(config, point._replace(arm="discriminative"))
    config.rates = ((("joint", "staged_joint"), 1e-3),)  # critiques first: at joint's rate
    assert cells.fingerprint(config, point) != first
    assert cells.fingerprint(config, point._replace(arm="discriminative")) == before


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
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            runner.run(config, jobs=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [process.poll() for process in started] == [-signal.SIGTERM] * 2


def held_locks(tmp_path, monkeypatch):
    """(config, names of the locks that each process started is handed)."""
    config = settings("regimes_tiny")
    config.out, config.workdir = str(tmp_path / "out"), str(tmp_path / "runs")
    handed = []

    class Process:
        pid = os.getpid()

        def __init__(self, command, pass_fds=(), **_):
            handed.append({Path(os.readlink(f"/proc/self/fd/{fd}")).name for fd in pass_fds})

        def poll(self):
            return 0

    monkeypatch.setattr(runner.subprocess, "Popen", Process)
    return config, handed


def test_who_makes_a_first_run_hands_on_its_lock(tmp_path, monkeypatch):
    """So that processes that outlive a killed runner are left to it."""
    config, handed = held_locks(tmp_path, monkeypatch)
    monkeypatch.setattr(runner.shutil, "rmtree", lambda folder: None)
    cell = Point("staged", 8, 0.35, 0)
    with runner._locked(config, cell.name) as claim:
        found = runner._start(config, cell, runner.Place((claim,)))
    name = found["backbone.path"].name.removesuffix("-export")
    assert handed == [{cell.name, name}] * 2  # training and export


def test_a_first_run_is_known_by_its_whole_config(monkeypatch):
    config, cell = settings(), Point("staged", 400, 0.2, 0)
    first = cells.first_fingerprint(config, cell)
    assert first == cells.first_fingerprint(config, cell._replace(labelled=100))
    assert first != cells.first_fingerprint(config, cell._replace(seed=1))
    base = cells._base()
    base.loss.first_weight = 9.0  # a default that no arm names
    monkeypatch.setattr(cells, "_base", lambda: base.copy_and_resolve_references())
    assert first != cells.first_fingerprint(config, cell)


def test_a_cell_alone_is_not_made_beside_another_command(tmp_path, monkeypatch):
    config, _ = held_locks(tmp_path, monkeypatch)
    cell, seen = Point("staged", 8, 0.35, 0), []
    monkeypatch.setattr(runner, "make_cell", lambda *arguments: seen.append(arguments[-1]))
    with runner._locked(config, cell.name), pytest.raises(UserError, match="another command"):
        runner.remake(config, cell)
    assert not seen
    runner.remake(config, cell)
    assert len(seen) == 1 and len(seen[0].claims) == 1


def test_jobs_take_cores_that_are_free(tmp_path, monkeypatch):
    config, handed = held_locks(tmp_path, monkeypatch)
    bound, barrier = [], threading.Barrier(2, timeout=60)
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda pid: {4, 5, 6})
    monkeypatch.setattr(runner.os, "sched_setaffinity", lambda pid, cores: bound.append(cores))
    monkeypatch.setattr(runner, "may_use_an_accelerator", lambda: False)

    def make(config, cell, keep, place):
        barrier.wait()  # both jobs are at work
        runner._call(["x"], cell, place)
        cells.save_cell(config, cell, {"fingerprint": cells.fingerprint(config, cell),
                                       "seconds": {"train": 1.0, "measure": 1.0}})  # fmt: skip

    monkeypatch.setattr(runner, "make_cell", make)
    with runner._locked(config, "core-5"):  # of another command
        runner.run(config, jobs=2)
    assert sorted(map(min, bound)) == [4, 6]
    assert sorted(name for names in handed for name in names if "core" in name) == [
        "core-4", "core-6"
    ]  # fmt: skip


def test_longer_trials_take_longer():
    config = settings()
    found = {Point("discriminative", 1600, 0.0, 0, 1e-3, 400):
             {"seconds": {"train": 100.0, "measure": 4.0}}}  # fmt: skip
    assert cells.estimate(config, Point("discriminative", 1600, 0.0, 0, 1e-3, 1600), found) == 404.0
    steps = config.train.total_steps
    assert cells.estimate(config, Point("joint", 1600, 0.35, 0), found) == 4 + 100 * steps / 400


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
        capture_output=True, text=True, cwd=ROOT, timeout=1800,
        env={**os.environ, "XLA_FLAGS": QUICK},  # one device, as the file that it is compared with
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
    collected = regimes_numbers.collect(config, design.load(config), {})
    assert numbers == json.loads(json.dumps(collected))
    assert page.splitlines()[2].startswith("**Nothing is decided yet**")
    assert "| joint_teacher-n8-f0.35-s0 |" in page and "a degraded picture is worse" in page
    assert numbers["budget"]["missing"] == [] and numbers["trials"] == []


def test_committed_cells_count(monkeypatch):
    """A change that makes them void must be meant: cells are hours of computing."""
    monkeypatch.chdir(ROOT)
    config = settings()
    paths = {path.stem for path in (ROOT / config.out / "cells").glob("*.json")}
    assert {cell.name for cell in design.load(config)} == paths
    again = {path.stem for path in (ROOT / config.out / cells.AGAIN).glob("*.json")}
    assert {cell.name for cell in design.load(config, cells.AGAIN)} == again


def test_the_readme_says_what_the_page_says():
    """README shows the page's table, word by word."""
    table = (ROOT / "docs" / "regimes" / regimes_report.TABLE).read_text().strip()
    assert table and table in (ROOT / "README.md").read_text()
    assert table in (ROOT / "docs" / "regimes.md").read_text()


def test_the_page_is_what_its_numbers_say():
    """A change of the words is a change of the page: `--report` writes it anew."""
    config, out = settings(), ROOT / "docs" / "regimes"
    numbers = json.loads((out / "numbers.json").read_text())
    shown, notes = [path.stem for path in out.glob("*.png")], (out / "notes.md").read_text()
    page = regimes_report.markdown(config, numbers, shown, notes)
    assert page == out.with_suffix(".md").read_text()
    # what a rule without a model reaches is no accuracy to count labels at
    rules = [rule["hard"]["high"] for rule in numbers["rules"].values()]
    assert min(config.verdict.efficiency) > max(rules)
