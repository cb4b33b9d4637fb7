"""Names and numbers of the rewards that are compared: files and pairs are known by them."""

import pytest

from configs import rl
from jrm_jax.errors import UserError
from jrm_jax.rl import models, runner
from jrm_jax.run.workdir import CHECKPOINTS, RESULTS


@pytest.fixture(scope="module")
def config():
    return rl.get_config("tiny")


def folders(parent, *names):
    for name in names:
        (parent / name).mkdir(parents=True, exist_ok=True)
    return [str(parent / name) for name in names]


def of_arms(parent, **arms):
    config = rl.get_config("tiny")
    config.arms = tuple((n, tuple(str(parent / p) for p in own)) for n, own in arms.items())
    return config


def arms_of(config, given):
    return [m.arm for m in models.models(config, given)[0] if m.folders]


def test_models_have_names_of_their_own(config, tmp_path):
    given = folders(tmp_path, "a/run", "b/run", "c")
    found, missing = models.models(config, [*given, given[2]])
    assert [m.arm for m in found] == ["a/run", "b/run", f"{tmp_path.name}/c", "gold", "chance"]
    assert len({m.name for m in found}) == 5 and not missing
    together = rl.get_config("tiny")
    together.reward.ensemble = True
    assert models.models(together, given[::-1])[0][0].folders == tuple(given)
    for few in (given[:1], [given[0], given[0] + "/"]):
        with pytest.raises(UserError, match="two or more"):
            models.models(together, few)
    with pytest.raises(UserError, match="give --model"):
        models.models(config, [])
    with pytest.raises(UserError, match="no such folder"):
        models.models(config, [str(tmp_path / "x")])
    other = rl.get_config("tiny")
    other.controls = ("luck",)
    with pytest.raises(UserError, match="none of gold, chance"):
        models.models(other, given)
    jobs = [*runner.jobs(config, found)]
    assert [job.seed for job in jobs] == [None] * 4 + [0] * 5  # chance chooses nothing of n


def test_a_model_is_run_seed_after_seed(config, tmp_path):
    """It is loaded for its best of n, and once more for all its runs."""
    config = rl.get_config("tiny")
    config.seeds = 2
    found, _ = models.models(config, folders(tmp_path, "a", "b"))
    jobs = [(job.model.arm, job.seed) for job in runner.jobs(config, found)]
    arms = ("a", "b", "gold", "chance")
    assert jobs == [(arm, None) for arm in arms[:3]] + [(a, seed) for a in arms for seed in (0, 1)]


def test_one_folder_is_one_model_however_it_is_spelled(config, tmp_path, monkeypatch):
    folders(tmp_path, "runs/joint", "other")
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "joint")
    monkeypatch.chdir(tmp_path)
    given = ["runs/joint", "runs/joint/", "./runs/../runs/joint", "link"]
    assert arms_of(config, given) == ["joint"]
    assert models.models(config, given)[0][0].folders == ("runs/joint",)
    own = of_arms(tmp_path, joint=["runs/joint"])
    assert arms_of(own, ["runs/joint/", "other"]) == ["other", "joint"]


def test_names_of_models_meet_no_others(config, tmp_path):
    """Neither arms of the config, nor what rewards without a model are called, nor what becomes
    the same as a file's name, also where upper and lower case are one."""
    own = of_arms(tmp_path, joint=["runs/joint"])
    given = folders(tmp_path, "runs/joint", "x/joint", "y/gold", "z/chance", "u/ensemble", "v/Gold")
    found, _ = models.models(own, given[1:])
    assert [m.arm for m in found][:5] == ["x/joint", "y/gold", "z/chance", "u/ensemble", "v/Gold"]
    assert len({m.name.casefold() for m in found}) == len(found) == 8
    assert arms_of(own, given[1:2]) == ["x/joint", "joint"]
    given = folders(tmp_path, "p/a run", "q/a-run", "r/A-RUN")
    assert arms_of(config, given) == ["p/a run", "q/a-run", "r/A-RUN"]
    with pytest.raises(UserError, match="would both be joint-clean-0"):
        models.models(of_arms(tmp_path, **{"joint, clean": ["runs/joint"], "joint-clean": ["q/*"]}),
                      [])  # fmt: skip


def test_a_models_number_is_its_seed_whatever_else_is_there(tmp_path):
    """Best of n and pairs go by it."""
    mine = 16 * "a"
    own = of_arms(tmp_path, joint=["joint-n64-w1-s?-*"], discriminative=["discriminative-s*"])
    for names, numbers in (
        ([f"joint-n64-w1-s1-{mine}"], [1]),
        ([f"joint-n64-w1-s0-{mine}", "discriminative-s10", "discriminative-s2"], [0, 1, 2, 10]),
    ):
        folders(tmp_path, *names)
        found = [m for m in models.models(own, [])[0] if m.folders]
        assert [m.number for m in found] == numbers
    assert [m.name for m in found][-1] == "discriminative-10"
    listed = of_arms(tmp_path, both=["x/one", "y/two"])  # no seeds: by their place in the list
    folders(tmp_path, "y/two")
    assert models.models(listed, [])[0][0].number == 1
    folders(tmp_path, f"joint-n64-w1-s1-{16 * 'b'}")
    with pytest.raises(UserError, match="s1-a+ and .*s1-b+ would both be joint-1"):
        models.models(own, [])


def test_a_run_that_trains_still_is_no_model(tmp_path, capsys):
    """Its best step is not yet known."""
    own = of_arms(tmp_path, joint=["joint-s?"])
    folders(tmp_path, "joint-s0", "joint-s1")
    for number in (0, 1):
        (tmp_path / f"joint-s{number}" / CHECKPOINTS).mkdir()
    (tmp_path / "joint-s0" / RESULTS).write_text("{}")
    found = [m for m in models.models(own, [])[0] if m.folders]
    assert [m.number for m in found] == [0]
    assert "joint-s1 is a run that has not finished yet" in capsys.readouterr().err
