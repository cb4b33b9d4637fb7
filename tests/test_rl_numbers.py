"""What a reward refuses, and the numbers of the page: by hand, and from what was put in."""

import math

import numpy as np
import pytest

from configs import rl
from jrm_jax.data.buckets import Bucket
from jrm_jax.errors import UserError
from jrm_jax.rl import best_of_n, check, fits, numbers, report
from jrm_jax.rl.editing import make_problem
from jrm_jax.rl.reward import Chance, Reward
from jrm_jax.rl.rollout import SPLITS
from jrm_jax.serving.groups import Scores
from jrm_jax.serving.rows import Needs
from jrm_jax.study import analysis


@pytest.fixture(scope="module")
def config():
    return rl.get_config("tiny")


@pytest.fixture(scope="module")
def problems():
    return [make_problem("train", index, "rl-tests") for index in range(2)]


# The reward


class Fake:
    """Scores by number; like RewardModel as far as `Reward` looks at it."""

    batch_size = 2

    def __init__(self, values, deviation=None):
        self.values, self.deviation = values, deviation

    def need(self, group):
        return Needs(Bucket(2, 3, 36, 40, 20, 0), ())

    def encode(self, group):
        return group

    def score_rows(self, bucket, groups):
        found = []
        for group in groups:
            value = np.float32(self.values)[: len(group.candidates), None]
            own = None if self.deviation is None else np.full_like(value, self.deviation)
            found.append(Scores(value, value, ("overall",), own))
        return found  # fmt: skip


def black(problems, count):
    return np.zeros((len(problems) * count, 96, 96, 3), np.uint8)


def test_a_failure_is_never_a_reward(problems):
    for bad in (math.nan, math.inf):
        reward = Reward([Fake([0.0, 1.0])], ["m"], problems, 2)
        reward.settle(problems, black(problems, 2))
        reward._models[0].values = [0.0, bad]
        with pytest.raises(UserError, match="m: a score is not finite, for '"):
            reward(problems, black(problems, 2))
    with pytest.raises(UserError, match="m gives every edit the same score"):
        Reward([Fake([1.0, 1.0])], ["m"], problems, 2).settle(problems, black(problems, 2))


def test_an_ensemble_and_its_doubts(problems):
    models = [Fake([0.0, 2.0]), Fake([5.0, 5.5])]
    reward = Reward(models, "ab", problems, 2, penalty=0.5)
    scale = reward.settle(problems, black(problems, 2))
    assert scale.mean == [1.0, 5.25] and scale.deviation == [1.0, 0.25]
    models[1].values = [5.5, 5.0]
    found_GK, proxy_GK = reward(problems, black(problems, 2))
    # normalised -1, 1 and 1, -1: they agree on nothing
    np.testing.assert_allclose(proxy_GK, 0, atol=1e-6)
    np.testing.assert_allclose(found_GK, -0.5, atol=1e-6)
    with pytest.raises(UserError, match="needs several models"):
        Reward(models[:1], "a", problems, 2, penalty=0.5)
    alone = Reward(models[:1], "a", problems, 2, penalty=0.5, unsure="deviation")
    with pytest.raises(UserError, match="no predicted deviation"):
        alone.settle(problems, black(problems, 2))


def test_a_predicted_deviation_is_taken_off(problems):
    reward = Reward([Fake([0.0, 2.0], 3.0)], "a", problems, 2, penalty=0.5, unsure="deviation")
    reward.settle(problems, black(problems, 2))
    found_GK, proxy_GK = reward(problems, black(problems, 2))
    np.testing.assert_allclose(proxy_GK - found_GK, 0.5 * 3.0)


# Numbers


def test_best_of_n_is_without_bias():
    rng = np.random.default_rng(0)
    gold = rng.normal(size=12)
    proxy = gold + rng.normal(size=12)
    assert best_of_n.sizes(256) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    found = best_of_n._numbers(proxy[None], proxy[None], gold[None])
    assert best_of_n.sizes(12) == [1, 2, 4, 8] and len(found["gold"][0]) == 4
    draws = np.argsort(rng.random((20_000, 12)), 1)[:, :4]
    best = np.take_along_axis(draws, proxy[draws].argmax(1)[:, None], 1)[:, 0]
    assert found["gold"][0][2] == pytest.approx(gold[best].mean(), abs=0.02)
    assert found["gold"][0][0] == pytest.approx(gold.mean(), abs=1e-4)
    assert best_of_n.divergence(1) == 0
    assert best_of_n.divergence(4) == pytest.approx(math.log(4) - 0.75)
    assert analysis.best_of_n(proxy, gold, 12) == gold[proxy.argmax()]


def test_chance_is_the_same_for_the_same_pictures(problems):
    pictures = np.random.default_rng(0).integers(0, 255, (4, 96, 96, 3)).astype(np.uint8)
    first, again, other = (Chance()(problems, x)[0] for x in (pictures, pictures, 255 - pictures))
    assert (first == again).all() and (first != other).any() and first.shape == (2, 2)


@pytest.mark.parametrize("form", [fits.BEST_OF_N, fits.RL])
def test_fits_find_what_was_put_in(form):
    kl = [0.0, 0.5, 1, 2, 4, 8, 16]
    gain = [fits.value(0.3, 0.06, nats, form) for nats in kl]
    assert fits.fit(kl, gain, form) == pytest.approx((0.3, 0.06))
    top = fits.top(0.3, 0.06, form)
    near = [fits.value(0.3, 0.06, nats, form) for nats in (0.99 * top, top, 1.01 * top)]
    assert near[1] == max(near)
    assert math.isnan(fits.top(0.3, -0.1, form)) and math.isnan(fits.fit([0, 1], [0, 1], form)[0])
    rng = np.random.default_rng(0)
    noisy = [np.array(gain)[:, None] + rng.normal(size=(7, 40)) * 0.2 for _ in range(4)]
    found = fits.with_intervals([kl] * 4, noisy, form, 200, 0.95)
    for name, true in (("alpha", 0.3), ("beta", 0.06)):
        assert found[name]["low"] < true < found[name]["high"], name


def curve(arm, number, seed, gold_T, kl_T=(0.0, 1.0, 4.0)):
    """A run's file; all problems alike."""
    rows = []
    for step, (gold, kl) in enumerate(zip(gold_T, kl_T, strict=True)):
        for split in SPLITS:
            values = dict.fromkeys(numbers.CURVES, 0.5) | {"gold": gold, "kl": kl}
            values |= {"gold_G": [gold, gold], "step": step, "split": split, "spearman": None}
            rows.append(values)
    return {
        "arm": arm, "number": number, "seed": seed, "name": f"{arm}-{number}-s{seed}",
        "iterations": 2,
        "evaluations": rows, "seconds": 1.0, "lost_start": {"noisy": 2.0}, "lost_end": {},
        "pair_accuracy": [0.8], "worst": [],
    }  # fmt: skip


def test_numbers_by_hand(config):
    own = rl.get_config("tiny")
    own.verdict.nats = (2.5, 9.0)
    runs = [
        curve("joint", 0, 0, (0.5, 0.7, 0.6)), curve("joint", 1, 0, (0.5, 0.9, 0.4)),
        curve("discriminative", 0, 0, (0.5, 0.6, 0.6)),
        curve("discriminative", 1, 0, (0.5, 0.6, 0.6)),
    ]  # fmt: skip
    found = numbers.collect(own, runs)
    joint = found["arms"]["joint"]["rl"]
    assert joint["peak"]["value"] == pytest.approx(0.8) and joint["peak_kl"] == 1.0
    assert joint["fall"]["value"] == pytest.approx(0.3)
    assert joint["collapsed"] == ["joint-1-s0"]
    assert joint["at"]["2.5"]["value"] == pytest.approx((0.65 + 0.65) / 2)
    assert joint["at"]["9"] is None
    gains = found["gains"]["joint"]
    assert gains["peak"]["value"] == pytest.approx(0.2) and gains["peak"]["runs"] == 2
    assert gains["last"]["value"] == pytest.approx(-0.1)
    assert gains["at"]["2.5"]["value"] == pytest.approx(0.05)
    text = report.markdown(own, found, "x", [])
    assert "is not borne out here" in text.splitlines()[2]
    better = [curve("joint", n, 0, (0.5, 0.8, 0.8)) for n in (0, 1)] + runs[2:]
    text = report.markdown(own, numbers.collect(own, better), "x", [])
    assert "is borne out here" in text.splitlines()[2]
    alone = numbers.collect(own, [runs[0], runs[2]])
    assert "is not decided yet" in report.markdown(own, alone, "x", []).splitlines()[2]
    noisy = [{**run, "arm": f"{run['arm']}, noisy"} for run in runs[::2]]
    assert [*numbers.collect(own, [*runs, *noisy])["gains"]] == ["joint", "joint, noisy"]
    half = report.markdown(own, numbers.collect(own, runs[:2]), "x", [])
    assert half.splitlines()[2].endswith("is open.")


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("iterations", 0, "at least 1"), ("edits", 1, "compared"), ("groups", 99, "problems"),
        ("optimizer.clip", 0.0, "above 0"), ("optimizer.scale", "x", "batch, group"),
        ("reward.penalty", -1.0, "0 or more"), ("reward.unsure", "x", "spread, deviation"),
        ("optimizer.learning_rate", math.nan, "above 0"), ("best_of.attempts", 0, "at least 1"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_a_line(name, value, words):
    config = rl.get_config("tiny")
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=words):
        check.check_config(config)
