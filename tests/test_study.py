"""The study: its table of cells, its statistics by hand, a cell made again, a page with gaps."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from entry_point import QUICK, small_backbone  # noqa: F401

from configs import study
from jrm_jax.errors import UserError
from jrm_jax.study import analysis, cells, measure, numbers, report, runner
from jrm_jax.study.cells import ARMS, Cell

ROOT = Path(__file__).resolve().parents[1]
CELL = "joint-n16-w1-s0"


def test_the_design_covers_what_it_must():
    config = study.get_config()
    plan = cells.plan(config)
    full = max(config.sizes)
    assert {c.arm for c in plan} == set(ARMS)
    for arm in ("discriminative", "joint"):
        assert {c.seed for c in plan if c[:3] == (arm, full, 1.0)} == set(range(5))
        assert {c.size for c in plan if c.arm == arm} == set(config.sizes)
    assert len({c.weight for c in plan if c.arm == "joint" and c.size == full}) >= 3
    assert full >= 4 * min(config.sizes)
    pairs = analysis.load_pairs("hard", config.world.hard, config.world.seed)
    assert len(pairs.group) >= config.verdict.pairs
    assert len(plan) == len(set(plan)) and plan[0].arm == "discriminative"


def test_arms_differ_in_what_they_must_only():
    config = study.get_config()
    flat = {}
    for arm in ARMS:
        settings = cells.training_config(config, Cell(arm, 6400, 1.0, 3)).to_dict()
        flat[arm] = {f"{a}.{b}" if isinstance(v, dict) else a: (v[b] if isinstance(v, dict) else v)
                     for a, v in settings.items() for b in (v if isinstance(v, dict) else (a,))}
        flat[arm]["data.world"] = tuple(flat[arm]["data.world"].items())
    base = flat["joint"]
    differing = {
        arm: {key for key in base if base[key] != own[key]} for arm, own in flat.items()
    }  # fmt: skip
    assert differing == {
        "joint": set(),
        "discriminative": {"loss.language_weight"},
        "joint_masked": {"loss.score_line"},
        "joint_shuffled": {"data.world"},
        "regression": {"loss.language_weight", "loss.facts_weight", "data.world"},
        "generative": {"loss.preference_weight", "loss.centering_weight"},
        "discriminative_x2": {"loss.language_weight", "total_steps"},
        "discriminative_x4": {"loss.language_weight", "total_steps"},
        "joint_words": {"loss.words_weight"},
        "joint_through": {"loss.through_reward"},
        "joint_fade": {"loss.language_weight", "loss.language_end"},
        "joint_rate": {"optimizer.learning_rate"},
        "discriminative_rate": {"loss.language_weight", "optimizer.learning_rate"},
        "joint_head": {"head.scale"},
        "discriminative_head": {"loss.language_weight", "head.scale"},
        "joint_long": {"data.world", "total_steps"},
        "discriminative_long": {"loss.language_weight", "data.world", "total_steps"},
    }


@pytest.mark.parametrize("variant, groups", [(None, 12_800), ("large", 204_800)])
def test_long_arms_have_twice_the_steps_and_twice_the_groups(variant, groups):
    config = study.get_config(variant)
    changes = [cell.changes(config) for cell in cells.plan(config) if cell.arm.endswith("_long")]
    assert {each["data.world.train"] for each in changes} == {groups}
    assert {each["total_steps"] for each in changes} == {2 * config.train.total_steps}


def test_a_cell_is_known_by_everything_its_numbers_depend_on():
    config = study.get_config()
    cell = cells.plan(config)[0]
    first = cells.fingerprint(config, cell)
    assert cells.fingerprint(config, cell._replace(seed=9)) != first
    for section, name, value in (
        ("train", "total_steps", 5), ("measure", "attack_steps", 9), ("world", "hard", 2048),
    ):  # fmt: skip
        other = study.get_config()
        other[section][name] = value
        assert cells.fingerprint(other, cell) != first, name
    words = cells.fingerprint(config, cell._replace(arm="joint_words"))
    assert words != cells.fingerprint(config, cell._replace(arm="joint"))
    same = study.get_config()
    same.verdict.gain, same.out = 99.0, "elsewhere"
    assert cells.fingerprint(same, cell) == first


def test_only_cells_of_this_config_count(tmp_path):
    config = study.get_config("tiny")
    config.out = str(tmp_path / "study")
    cell = cells.plan(config)[0]
    result = {"fingerprint": cells.fingerprint(config, cell), "scores/hard": [[1.0]]}
    cells.save_cell(config, cell, result)
    assert cells.load_cells(config) == {cell: result}
    config.train.total_steps = 3
    assert cells.load_cells(config) == {}
    with pytest.raises(UserError, match="no such cell"):
        runner.find_cell(config, "joint-n5-w1-s0")


def test_longer_runs_end_where_the_other_arm_is_reached():
    plain, twice, four, joint = (
        Cell(arm, 10, 1.0, 0)
        for arm in ("discriminative", "discriminative_x2", "discriminative_x4", "joint")
    )
    found = {plain: {"valid": 0.6}}
    assert not cells.unneeded(twice, found)  # joint is not there yet
    found[joint] = {"valid": 0.7}
    assert not cells.unneeded(twice, found) and not cells.unneeded(plain, found)
    found[twice] = {"valid": 0.71}
    assert "discriminative_x2" in cells.unneeded(four, found)
    assert not cells.unneeded(four._replace(seed=1), found)


def test_the_time_a_cell_will_take():
    found = {Cell("joint", 10, 1.0, s): {"seconds": {"train": 10.0 + s, "measure": 4.0}}
             for s in range(3)}  # fmt: skip
    config = study.get_config()
    assert cells.estimate(config, Cell("joint", 10, 1.0, 7), found) == 15.0
    assert cells.estimate(config, Cell("discriminative_x2", 10, 1.0, 0), found) == 26.0
    assert cells.estimate(config, Cell("joint", 10, 1.0, 7), {}) is None
    assert "2 to go, about 0:41" in runner.budget(
        config, [Cell("joint", 10, 1.0, 7), Cell("discriminative_x2", 10, 1.0, 0)], found
    )


# Statistics


def hand_pairs():
    """Two groups: three candidates in order, and two."""
    rows = [(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 1, 0)]
    columns = (np.array(c) for c in zip(*rows, strict=True))
    kinds = np.array(["move", "move", "move", "add"])
    return analysis.Pairs(*columns, kinds, np.array(["partial"] * 4))


def test_accuracy_by_hand():
    pairs = hand_pairs()
    right_N = analysis.correct(pairs, [[3.0, 1.0, 2.0], [5.0, None]])
    assert right_N.tolist() == [1, 1, 0, 0.5]
    assert analysis.correct(pairs, [[1.0, 1.0, 0.0], [0.0, 1.0]]).tolist() == [0.5, 1, 1, 1]
    mean, whole = analysis.within_groups(pairs, np.array([1, 1, 0, 1.0]))
    assert (mean, whole) == (pytest.approx(5 / 6), 0.5)
    assert analysis.unparsable([[None, 1.0], [2.0, 3.0]]) == 0.25
    distances = [[0.0, 0.5, 0.2], [0.3, 0.1]]
    assert analysis.agreement(pairs, [[3.0, 1.0, 2.0], [0.0, 1.0]], distances) == 1.0


def test_best_of_n_by_hand_and_against_every_subset():
    import itertools

    gold, proxy = [10.0, 50.0, 30.0, 0.0], [0.1, 0.2, 0.9, None]
    assert analysis.best_of_n(proxy, gold, 1) == pytest.approx(22.5)
    assert analysis.best_of_n(proxy, gold, 4) == 30.0
    best = [max(s, key=lambda i: -9 if proxy[i] is None else proxy[i])
            for s in itertools.combinations(range(4), 2)]  # fmt: skip
    assert analysis.best_of_n(proxy, gold, 2) == pytest.approx(np.mean([gold[i] for i in best]))
    assert analysis.best_of_n([1.0, 1.0], [0.0, 10.0], 2) == 5.0


def test_the_interval_covers_what_it_should():
    """Groups that agree within themselves, seeds with an effect of their own."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 4)
    covered, alone = 0, 0
    for trial in range(100):
        shared = rng.normal(size=60)[groups]
        values_SN = 0.3 + shared + rng.normal(size=(6, 240)) + 0.5 * rng.normal(size=(6, 1))
        found = analysis.interval(values_SN, groups, 400, seed=trial)
        covered += found.low <= 0.3 <= found.high
        found = analysis.interval(values_SN, np.arange(240), 400, seed=trial)
        alone += found.low <= 0.3 <= found.high
    assert 82 <= covered <= 100 and alone < covered
    found = analysis.interval(np.full((3, 8), 0.25), np.arange(8), 50)
    assert (found.value, found.low, found.high, found.groups) == (0.25, 0.25, 0.25, 8)
    assert math.isnan(analysis.interval(np.zeros((1, 0)), np.zeros(0), 10).value)


@pytest.mark.parametrize(
    "gain, shuffled, holds",
    [
        ((0.05, 0.01, 0.09), (0.0, -0.02, 0.02), True),
        ((0.02, 0.01, 0.03), (0.0, -0.02, 0.02), False),
        ((0.05, -0.01, 0.09), (0.0, -0.02, 0.02), False),
        ((0.05, 0.01, 0.09), (0.04, 0.02, 0.06), False),
        ((0.05, 0.01, 0.09), None, None),
    ],
)
def test_the_verdict(gain, shuffled, holds):
    settings = study.get_config().verdict
    shuffled = shuffled and analysis.Interval(*shuffled, 9)
    assert analysis.verdict(analysis.Interval(*gain, 9), shuffled, settings)["holds"] is holds


def test_attack_numbers_by_hand():
    pairs = hand_pairs()
    attack = {"before": [[3.0, 2.0, 1.0]], "after": [[4.0, 3.5, 1.5]]}
    found = analysis.attack_numbers(pairs, attack)
    assert found["pairs"] == 3 and found["turned"] == pytest.approx(1 / 3)
    assert found["gain"] == pytest.approx(1.0) and analysis.attack_numbers(pairs, None) is None


def test_reading_a_score_from_words():
    said = "Correct: it is gone as asked.\nfollowing ten preservation two"
    assert measure.read_score(said) == 68.0
    for bad in ("", "following ten", said + " and", "following ten preservation many"):
        assert measure.read_score(bad) is None


# Cells and page


def _run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "jrm_jax.study", *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=500,
        env={**os.environ, "XLA_FLAGS": QUICK},  # one device, as the file that it is compared with
    )  # fmt: skip


@pytest.fixture(scope="module")
def again(tmp_path_factory, small_backbone):
    """(the study's command line, its config, result of one cell made from scratch)"""
    folder = tmp_path_factory.mktemp("study")
    arguments = (
        "--config=configs/study.py:tiny", f"--config.out={folder}/study",
        f"--config.workdir={folder}/runs", f"--config.train.backbone.path={small_backbone}",
    )  # fmt: skip
    done = _run(*arguments, f"--cell={CELL}")
    assert done.returncode == 0, done.stdout + done.stderr
    # measured, hence removed
    assert [path.name for path in (folder / "runs").iterdir()] == ["locks"]
    config = study.get_config("tiny")
    config.out, config.train.backbone.path = str(folder / "study"), str(small_backbone)
    return arguments, config, json.loads(cells.path_of(config, cells.plan(config)[1]).read_text())


def test_a_cell_made_again_has_the_same_numbers(again):
    """Against a file that another run wrote. If the world, the tiny config or the tests' small
    backbone is changed on purpose, copy the new cell there."""
    kept, found = json.loads((ROOT / "tests" / "study_cell.json").read_text()), again[2]
    assert (found["world"], found["steps"]) == (kept["world"], kept["steps"])
    for name in ("scores/test", "scores/hard", "contests"):
        for ours, theirs in zip(found[name], kept[name], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-3)
    assert found["cost"]["bucket"] == kept["cost"]["bucket"]
    assert found["cost"]["flops_per_group"] == pytest.approx(kept["cost"]["flops_per_group"], 0.02)
    ranks = [r["ranks"]["2"]["effective_rank"] for r in (found, kept)]
    assert ranks[0] == pytest.approx(ranks[1], rel=0.01)
    # of a few candidates: one that changes its place moves an area by a tenth
    assert found["says"]["2"] == pytest.approx(kept["says"]["2"], abs=0.15)
    assert found["pulls"] == pytest.approx(kept["pulls"], abs=0.05)
    assert found["training"][-1] == pytest.approx(kept["training"][-1], rel=0.01)
    gain = np.array(found["attack"]["after"][0]) - found["attack"]["before"][0]
    assert (gain > 0).all()  # one step along the gradient


def test_the_page_shows_what_is_missing(again):
    arguments, config, result = again
    folder = Path(config.out).parent
    (cell,) = cells.load_cells(config)
    assert cell.name == CELL and result["cell"] == CELL
    found = numbers.collect(config, cells.load_cells(config))
    assert found["arms"]["generative"] is None and found["verdict"] is None
    assert found["budget"]["missing"] == ["discriminative-n16-w1-s0"]
    right = analysis.correct(analysis.load_pairs("hard", 8, 0), result["scores/hard"])
    assert found["arms"]["joint"]["hard"]["value"] == pytest.approx(right.mean())
    # as if the other arm had been run too: the same scores, so no gain at all
    other = cell._replace(arm="discriminative")
    cells.save_cell(config, other, {
        **result, "cell": other.name, "fingerprint": cells.fingerprint(config, other),
    })  # fmt: skip
    flipped = cells.load_cells(config)
    gain = numbers.collect(config, flipped)["arms"]["joint"]["gain"]["hard"]
    assert (gain["value"], gain["low"], gain["high"]) == (0, 0, 0)
    turned = {
        **result,
        "scores/hard": [[-s for s in row] for row in result["scores/hard"]],
        "attack": {**result["attack"], "after": result["attack"]["before"]},
    }
    alone = numbers.collect(config, {cell: result, other: turned})["cells"]
    assert alone[CELL]["gain"] == pytest.approx(2 * right.mean() - 1) != 0
    assert alone[CELL]["attack_over"] == pytest.approx(alone[CELL]["attack"]) != 0
    assert alone[other.name]["gain"] is alone[other.name]["attack_over"] is None
    done = _run(*arguments, "--report")
    assert done.returncode == 0, done.stderr
    text = (folder / "study.md").read_text()
    assert "that decide it" not in text and "a cell is missing" in text
    assert f"| {CELL} |" in text
    assert "not planned" in text and "to the last one: yes" in text and "does not hold" not in text
    for name in ("numbers.json", "ranks.png", "best_of_n.png"):
        assert (folder / "study" / name).stat().st_size > 500
    before = (folder / "study.md").read_bytes(), (folder / "study" / "numbers.json").read_bytes()
    _run(*arguments, "--report")
    after = (folder / "study.md").read_bytes(), (folder / "study" / "numbers.json").read_bytes()
    assert before == after


def test_bad_input_is_one_line():
    done = _run("--config=configs/study.py:tiny", "--cell=nothing")
    assert done.returncode == 1 and done.stderr.startswith("error: --cell=nothing: no such cell")
    assert len(done.stderr.strip().splitlines()) == 1


def test_examples_where_arms_disagree_are_shown():
    from jrm_jax.study import examples

    config = study.get_config("tiny")
    pairs = analysis.load_pairs("hard", config.world.hard, 0)
    counts = [len(g.attempts) for g in _groups(config)]
    ranked = [list(range(count)) for count in counts]
    turned = [row[::-1] for row in ranked]
    said = [[f"words {k}" for k in range(count)] for count in counts]
    found = {
        Cell(arm, 16, 1.0, 0): {"scores/hard": scores, "critiques": said}
        for arm, scores in (("discriminative", ranked), ("joint", turned))
    }
    html = examples.page(config, found)
    assert html.count("<div class=case>") >= 1 and "words 1" in html and "data:image/png" in html
    assert "http" not in html  # nothing is fetched
    assert examples.page(config, dict([*found.items()][:1])) == ""
    assert len(pairs.group)


def _groups(config):
    from jrm_jax.data.world import scenes

    return [scenes.make_group("hard", i, config.world.seed) for i in range(config.world.hard)]


def test_committed_cells_count(monkeypatch):
    """A change that makes them void must be meant: cells are hours of computing."""
    monkeypatch.chdir(ROOT)
    config = study.get_config()
    paths = {path.stem for path in (ROOT / config.out / "cells").glob("*.json")}
    assert paths and {cell.name for cell in cells.load_cells(config)} == paths


def test_a_stopped_study_takes_its_run_along(tmp_path, small_backbone):  # noqa: F811
    command = [
        sys.executable, "-m", "jrm_jax.study", "--config=configs/study.py:tiny",
        f"--config.out={tmp_path}/study", f"--config.workdir={tmp_path}/runs",
        f"--config.train.backbone.path={small_backbone}", "--config.train.total_steps=100000",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not (running := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running
    time.sleep(1.0)  # the parent may still be in the middle of starting it
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "goes on" in said
    assert not Path(f"/proc/{running[0]}").exists()


@pytest.mark.parametrize("seeds", [2, 5])
def test_a_verdict_of_few_seeds_says_so(seeds):
    gain = {"value": 0.04, "low": 0.01, "high": 0.07, "seeds": seeds}
    found = {
        "verdict": {"gain": True, "above_zero": True, "shuffled": True, "holds": True},
        "arms": {"joint": {"gain": {"hard": gain}}, "joint_shuffled": None},
        "pairs": {"hard": 5000},
    }
    text = "\n".join(report._claim(study.get_config(), found))
    assert ("After 2 of 5 seeds, so not final" in text) == (seeds == 2)
