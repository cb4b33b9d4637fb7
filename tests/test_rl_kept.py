"""What is kept of a run: whose it is, what is done of it, and that it goes on from there."""

import functools
import json
import math
import shutil

import jax
import numpy as np
import pytest
from export_case import family_run
from test_rl_run import Stop, make_run, silent, trained

from configs import rl
from jrm_jax.checkpoint import open_checkpoints, read_checkpoint
from jrm_jax.errors import UserError
from jrm_jax.rl import best_of_n, folder, runner, settings, training
from jrm_jax.rl.models import Model
from jrm_jax.serving.trained import Identity, identify


@pytest.fixture(scope="module")
def config():
    return rl.get_config("tiny")


@pytest.fixture(scope="module")
def pools(config):
    return training.pools(config)


def steps(place):
    rows = [json.loads(line) for line in (place / "metrics.jsonl").open()]
    return [row["step"] for row in rows if row["split"] == "test"]


@pytest.mark.parametrize("after", range(4))
def test_wherever_a_run_is_stopped_each_evaluation_is_made_once(config, pools, tmp_path, after):
    make_one = functools.partial(make_run, config, pools, tmp_path / "run")
    trained(make_one(), Stop(after))
    _, found = trained(make_one())
    assert [row["step"] for row in found["evaluations"] if row["split"] == "test"] == [0, 2, 4]
    assert steps(tmp_path / "run") == [0, 2, 4]


def test_a_start_that_saved_nothing_leaves_no_lines(config, pools, tmp_path):
    run = make_run(config, pools, tmp_path / "run")
    trained(run, Stop(0))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    trained(make_run(config, pools, tmp_path / "run"))
    assert steps(tmp_path / "run") == [0, 2, 4]


def test_a_longer_run_is_not_cut(config, pools, tmp_path):
    trained(make_run(config, pools, tmp_path / "run"))
    short = rl.get_config("tiny")
    short.iterations = 2
    with pytest.raises(UserError, match="has had 4 iterations"):
        trained(make_run(short, pools, tmp_path / "run"))


# Best of n


def job_settings(config, arm="model", digest="d", step=1, path="runs/m"):
    job = runner.Job(Model(arm, 0, (path,)), None)
    return runner.settings_of(config, job, lambda folder: Identity(step, digest))


class Counted:
    """A reward that is told apart by its calls."""

    def __init__(self, breaks=math.inf):
        self.scale, self.calls, self.breaks = None, 0, breaks

    def settle(self, problems, pictures):
        return [0.0], [1.0]

    def __call__(self, problems, pictures):
        self.calls += 1
        if self.calls > self.breaks:
            raise UserError("the power is off")
        means = pictures.mean((1, 2, 3)).reshape(len(problems), -1)
        return means, means


def measured(config, pools, place, reward, own, stop=None):
    out = place.parent / f"{place.name}.json"
    args = ("m-0-best", place, own, reward, pools, {}, out)
    status = best_of_n.measure(config, *args, stop or Stop(), silent)
    return status or {n: v for n, v in json.loads(out.read_text()).items() if n != "seconds"}


def test_the_splits_of_best_of_n_are_drawn_apart(config, monkeypatch):
    """Their problems count as independent."""
    seen = []

    def roll(params, pool, count, dice, reward):
        seen.append(dice)
        raise UserError("enough")

    monkeypatch.setattr(best_of_n, "roll", roll)
    for split in best_of_n.SPLITS:
        for block in (0, 1):
            with pytest.raises(UserError, match="enough"):
                best_of_n._block(config, best_of_n.held_out(config, split), split, block, None)
    assert len({(die.seed, die.what, die.number) for die in seen}) == len(seen) == 4


def test_best_of_n_goes_on_where_it_was(config, pools, tmp_path):
    mine = job_settings(config)
    whole = Counted()
    found = measured(config, pools, tmp_path / "whole", whole, mine)
    assert whole.calls == 4  # two blocks of each split
    cut = Counted(breaks=1)
    with pytest.raises(UserError, match="power"):
        measured(config, pools, tmp_path / "cut", cut, mine)
    again = Counted()
    assert measured(config, pools, tmp_path / "cut", again, mine, Stop(1)) == 15
    assert measured(config, pools, tmp_path / "cut", again, mine) == found
    assert again.calls == 3


def test_a_folder_is_of_one_model_and_one_kind_of_settings(config, pools, tmp_path):
    measured(config, pools, tmp_path / "best", Counted(), job_settings(config))
    other = rl.get_config("tiny")
    other.edits = 3
    for changed, words in (
        (job_settings(config, step=2, digest="e"), "step: 1 -> 2"),
        (job_settings(config, digest="e"), "digest: d -> e"),
        (job_settings(other), "edits: 2 -> 3"),
        ({**job_settings(config), "model": ["runs/m"]}, "model 0"),  # as older files have it
    ):
        with pytest.raises(UserError, match=words):
            measured(config, pools, tmp_path / "best", Counted(), changed)
        with pytest.raises(UserError, match=words):
            runner.is_made(tmp_path / "best.json", changed)
    assert runner.is_made(tmp_path / "best.json", job_settings(config, path="moved/m/"))
    scale = tmp_path / "new" / "scale.json"  # of nobody knows which model
    scale.parent.mkdir()
    scale.write_text('{"gold": [9, 9], "reward": [[9], [9]]}')
    measured(config, pools, scale.parent, Counted(), job_settings(config))
    assert json.loads(scale.read_text())["reward"] == [[0.0], [1.0]]
    with (
        pytest.raises(UserError, match="in use"),
        folder.claimed(scale.parent, job_settings(config), silent),
    ):
        measured(config, pools, scale.parent, Counted(), job_settings(config))


def test_settings_are_the_same_after_a_file(config):
    mine = job_settings(config)
    settings.check_same("x", json.loads(json.dumps(mine)), mine)


# Which weights


def test_a_model_is_known_by_its_weights_not_by_its_place(tmp_path):
    run = family_run("qwen3_vl")
    first = identify(run)
    assert first == identify(f"{run}/") and first.step == 0
    moved = shutil.copytree(run, tmp_path / "elsewhere")
    assert identify(moved) == first
    _, trainable, meta = read_checkpoint(run / "checkpoints", None)
    trainable = jax.tree.map(np.asarray, trainable)
    for step, add in ((1, 0.0), (2, 0.5)):
        head = trainable["reward_head"]
        trainable["reward_head"] = jax.tree.map(lambda x, a=add: x + np.asarray(a, x.dtype), head)
        with open_checkpoints(moved / "checkpoints", silent) as kept:
            kept.save(step, trainable, {"n": np.zeros(1)}, meta, float(step))
        found = identify(moved)
        assert found.step == step and (found.digest == first.digest) == (add == 0.0)
    assert identify(moved, 1).digest == first.digest
    with pytest.raises(UserError, match="neither checkpoints nor"):
        identify(tmp_path)


def test_an_export_is_known_by_its_weights(tmp_path):
    """A folder with what `export` writes, as far as is read of it."""
    backbone = family_run("qwen3_vl").parent / "qwen3_vl"
    one = shutil.copytree(backbone, tmp_path / "one")
    (one / "jrm.json").write_text(json.dumps({"step": 7, "stamp": {"rubric": "r", "data": "d"}}))
    two = shutil.copytree(one, tmp_path / "two")
    assert identify(one) == identify(two) and identify(one).step == 7
    from safetensors.numpy import load_file, save_file

    tensors = load_file(two / "model.safetensors")
    tensors["score.weight"] = tensors["score.weight"] + 1
    save_file(tensors, two / "model.safetensors")
    assert identify(one) != identify(two)
