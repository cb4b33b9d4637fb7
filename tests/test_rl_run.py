"""Runs under a reward: the same after a stop, nothing for a failure, a page from files alone."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from export_case import family_run

from configs import rl
from jrm_jax import RewardModel
from jrm_jax.checkpoint import read_arrays
from jrm_jax.errors import UserError
from jrm_jax.rl import known as of_model
from jrm_jax.rl import training
from jrm_jax.rl.known import known, lacks
from jrm_jax.rl.reward import Reward
from jrm_jax.rl.rollout import SPLITS
from jrm_jax.rl.settings import protocol

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "tests" / "rl_run.json"  # a run of `gold` that another process made


class Stop:
    """Asks to stop at the given question."""

    def __init__(self, after=math.inf):
        self.left = after

    def now(self):
        self.left -= 1
        return 15 if self.left < 0 else 0


def silent(words):
    pass


@pytest.fixture(scope="module")
def config():
    return rl.get_config("tiny")


@pytest.fixture(scope="module")
def pools(config):
    return training.pools(config)


@pytest.fixture(scope="module")
def model():
    return RewardModel.load(family_run("qwen3_vl"), batch_size=2, devices=jax.devices()[:1])


def all_problems(pools):
    return [problem for pool in pools.values() for problem in pool.problems]


def make_run(config, pools, folder, reward=None, seed=0):
    settings = {
        "arm": "gold" if reward is None else "model", "model": [], "number": 0, "seed": seed,
        "iterations": config.iterations, "protocol": protocol(config), "pair_accuracy": [],
    }  # fmt: skip
    return training.Run(config, "gold-0-s0", folder, seed, settings, reward, pools)


def trained(run, stop=None):
    status = run.train(stop or Stop(), silent)
    return status, status or json.loads((run.folder / training.RUN).read_text())


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def without_times(result):
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.parametrize("scored", [False, True])
def test_a_stopped_run_goes_on_bit_for_bit(config, pools, tmp_path, model, scored):
    def make(name):
        reward = Reward([model], ["m"], all_problems(pools), config.edits) if scored else None
        return make_run(config, pools, tmp_path / name, reward)

    _, whole = trained(make("whole"))
    assert trained(make("cut"), Stop(after=3))[0] == 15  # between two evaluations
    assert not (tmp_path / "cut" / training.RUN).exists()
    _, cut = trained(make("cut"))
    assert without_times(cut) == without_times(whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    last = [read_arrays(tmp_path / name, config.iterations) for name in ("whole", "cut")]
    assert all((last[0][path] == last[1][path]).all() for path in last[0])
    assert [row["ratio_off"] for row in lines(tmp_path / "cut") if row["split"] == "train"] == [
        0
    ] * config.iterations
    other = rl.get_config("tiny")
    other.optimizer.clip = 0.5
    with pytest.raises(UserError, match="other settings.*clip"):
        trained(make_run(other, pools, tmp_path / "cut"))


def test_a_kept_run_is_made_again(config, pools, tmp_path):
    """Against a file that another process wrote. If the world, the base policy or the tiny config
    is changed on purpose, copy the new file there."""
    _, found = trained(make_run(config, pools, tmp_path / "run"))
    kept = json.loads(KEPT.read_text())
    assert len(found["evaluations"]) == len(kept["evaluations"]) == 6
    for mine, theirs in zip(found["evaluations"], kept["evaluations"], strict=True):
        assert (mine["step"], mine["split"]) == (theirs["step"], theirs["split"])
        for name in ("gold", "kl", "entropy_choices", "entropy_knobs"):
            assert mine[name] == pytest.approx(theirs[name], abs=2e-3), name
    assert found["lost_start"] == pytest.approx(kept["lost_start"], abs=0.1)


def test_gold_as_the_reward_raises_gold(tmp_path):
    config = rl.get_config()
    config.iterations = config.eval_interval = 30
    config.problems, config.eval_problems = 128, 16
    _, found = trained(make_run(config, training.pools(config), tmp_path / "run"))
    first, last = (
        np.mean([row["gold"] for row in found["evaluations"] if row["step"] == step])
        for step in (0, 30)
    )
    assert last > first + 0.1


def test_a_run_whose_score_fails_ends_and_keeps_nothing(config, pools, tmp_path):
    class Breaks:
        """Scores twice, as for the scale and the first evaluation."""

        def __init__(self):
            self.calls, self.scale = 0, None

        def settle(self, problems, pictures):
            return None

        def __call__(self, problems, pictures):
            self.calls += 1
            if self.calls > 2:
                raise UserError("the disk is on fire")
            rows = np.float32([[0, 1]] * len(problems))
            return rows, rows

    with pytest.raises(UserError, match="on fire"):
        trained(make_run(config, pools, tmp_path / "run", Breaks()))
    assert not (tmp_path / "run" / training.RUN).exists()


def test_nothing_is_compiled_after_the_first_time(config, pools, model):
    reward = Reward([model], ["m"], all_problems(pools), config.edits)
    pool = pools["train"]
    rng = np.random.default_rng(0)

    def pictures(count):
        return rng.integers(0, 255, (count * config.edits, 96, 96, 3)).astype(np.uint8)

    reward.settle(pool.problems[:4], pictures(4))
    before = len(model._runner.device.compiled)
    for split in ("train", *SPLITS):
        problems = pools[split].problems[:2]
        reward_GK, proxy_GK = reward(problems, pictures(2))
        assert reward_GK.shape == (2, config.edits) and (reward_GK == proxy_GK).all()
    assert len(model._runner.device.compiled) == before
    normal = reward(pool.problems[:4], pictures(4))[0]
    assert abs(normal.mean()) < 3 and normal.std() > 0.1


def test_more_edits_than_a_row_holds_take_several_rows(pools, model):
    problems, rng = pools["test"].problems[:2], np.random.default_rng(0)
    pictures = rng.integers(0, 255, (2 * 9, 96, 96, 3)).astype(np.uint8)
    scores_MGK, own = Reward([model], ["m"], problems, 9).raw(problems, pictures)
    alone = Reward([model], ["m"], problems, 3)
    parts = [alone.raw(problems[:1], pictures[first : first + 3])[0][0, 0] for first in (0, 3, 6)]
    np.testing.assert_allclose(scores_MGK[0, 0], np.concatenate(parts), atol=1e-4)
    assert scores_MGK.shape == (1, 2, 9) and own is None


# The command


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "jrm_jax.rl", "--config=configs/rl.py:tiny", *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=500, env=os.environ,
    )  # fmt: skip


def test_the_command_makes_a_page_and_makes_it_again_from_files(tmp_path):
    model, workdir = family_run("qwen3_vl"), tmp_path / "rl"
    done = command(f"--model={model}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stdout + done.stderr
    page = (workdir / "report.md").read_text()
    assert (workdir / "report" / "exploits.png").is_file()
    files = sorted(p.name for p in (workdir / "report" / "results").iterdir())
    assert files == [
        "chance-0-s0.json", "gold-0-best.json", "gold-0-s0.json", f"{model.name}-0-best.json",
        f"{model.name}-0-s0.json",
    ]  # fmt: skip
    best = workdir / "report" / "results" / f"{model.name}-0-best.json"
    whole = best.read_bytes()
    assert json.loads(whole)["attack_gain"][0] > 0
    first = {p.name: p.read_bytes() for p in (workdir / "report").iterdir() if p.is_file()}
    for path in (workdir / "report").iterdir():
        if path.is_file():
            path.unlink()
    again = command(f"--workdir={workdir}", "--report")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (workdir / "report.md").read_text() == page
    assert {p.name: p.read_bytes() for p in (workdir / "report").iterdir() if p.is_file()} == first
    best.write_text(json.dumps(json.loads(whole) | {"attack_gain": [None]}))  # as it once was
    done = command(f"--model={model}", f"--workdir={workdir}")
    assert done.returncode == 0 and "5 runs are made, 0 to go" in done.stdout
    assert best.read_bytes() == whole and (workdir / "report.md").read_text() == page


def no_room(model):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")


def test_what_is_known_of_a_model_without_a_policy_is_filled_in(config, tmp_path):
    run, said = shutil.copytree(family_run("qwen3_vl"), tmp_path / "run"), []
    (row,) = [{"path": str(run), "step": 0}]
    found = known([row, {**row, "path": str(tmp_path)}], config.known, said.append)
    assert found["pair_accuracy"] == [None, None]  # nothing was measured on `valid`
    assert found["attack_gain"][0] > 0 and found["attack_gain"][1] is None
    assert 1 <= found["effective_rank"][0] <= 64 and len(said) == 1
    kept = {"model": [row], **{name: values[:1] for name, values in found.items()}}
    assert not lacks(kept)  # nor is it measured at every start
    assert lacks(kept | {"attack_gain": [None]}) and lacks({"model": [row]})
    assert not lacks({"model": []})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_model, "measure_attack", no_room)
        assert known([row], config.known, said.append)["attack_gain"] == [None]
    assert said.pop() == f"{run}: not measured: RESOURCE_EXHAUSTED: no room" and said.pop()
    # the study's own file is not measured again, but one of another step is
    attack = {"before": [[0, 2]], "after": [[1, 3]]}
    kept = {"ranks": {"0": {"effective_rank": 2.5}}, "attack": attack}
    (run / "measured.json").write_text(json.dumps({"step": 0, **kept}))
    (run / "results.json").write_text(json.dumps({"step": 0, "valid/pair_accuracy": 0.75}))
    assert known([row], config.known, said.append) == {
        "pair_accuracy": [0.75], "attack_gain": [1.0], "effective_rank": [2.5],
    }  # fmt: skip
    assert len(said) == 1
    (run / "measured.json").write_text(json.dumps({"step": 7, **kept}))
    assert known([row], config.known, said.append)["attack_gain"][0] == found["attack_gain"][0]


def test_the_command_says_what_is_wrong_in_a_line(tmp_path):
    for arguments, words in (
        ((), "give --model=FOLDER"),
        (("--model=nowhere",), "no such folder"),
        (("--report", f"--workdir={tmp_path}"), "no runs to report"),
        (("--config.iteratons=3",), "iterations"),
    ):
        done = command(*arguments)
        assert done.returncode == 1 and words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 2
