"""What a reward refuses, and the numbers of the page: by hand, and from what was put in."""

import math
from pathlib import Path

import numpy as np
import pytest

from configs import rl
from jrm_jax.data.buckets import Bucket
from jrm_jax.errors import UserError
from jrm_jax.rl import best_of_n, check, figures, fits, numbers, report
from jrm_jax.rl.editing import make_problem
from jrm_jax.rl.reward import Chance, Reward
from jrm_jax.rl.rollout import SPLITS
from jrm_jax.serving.groups import Scores
from jrm_jax.serving.rows import Needs
from jrm_jax.shell.report import json_safe
from jrm_jax.study import analysis

ROOT = Path(__file__).resolve().parents[1]


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


def test_a_deviation_that_is_not_finite_is_never_a_reward(problems):
    """Nor is one that is too large for a number; best of n would take it for the best."""
    for bad in (math.nan, math.inf, 3e38):
        reward = Reward([Fake([0.0, 0.1], 1.0)], "a", problems, 2, 90.0, "deviation")
        reward.settle(problems, black(problems, 2))
        reward._models[0].deviation = bad
        with np.errstate(all="ignore"), pytest.raises(UserError, match="reward is not finite, for"):
            reward(problems, black(problems, 2))


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
    found = fits.with_intervals([kl] * 4, noisy, form, 200, 0.95, range(4))
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
        "iterations": len(gold_T) - 1, "model": [{"path": f"runs/{arm}", "step": 1, "digest": "d"}],
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
    text = report.markdown(own, found, Path("x"), [])
    assert "is not borne out here" in text.splitlines()[2]
    better = [curve("joint", n, 0, (0.5, 0.8, 0.8)) for n in (0, 1)] + runs[2:]
    text = report.markdown(own, numbers.collect(own, better), Path("x"), [])
    assert "is borne out here" in text.splitlines()[2]
    alone = numbers.collect(own, [runs[0], runs[2]])
    assert "is not decided yet" in report.markdown(own, alone, Path("x"), []).splitlines()[2]
    noisy = [{**run, "arm": f"{run['arm']}, noisy"} for run in runs[::2]]
    assert [*numbers.collect(own, [*runs, *noisy])["gains"]] == ["joint", "joint, noisy"]
    half = report.markdown(own, numbers.collect(own, runs[:2]), Path("x"), [])
    assert half.splitlines()[2].endswith("is open.")


def best_of(arm, number, accuracy):
    """A file of best-of-n for the model of `curve`."""
    own = {"gold": [[0.5, 0.6, 0.62]] * 2, "proxy": [[0.0, 1.0, 2.0]] * 2}
    own |= {"spearman": [0.1 * number], "pairs": [0.5]}
    return curve(arm, number, None, (0.5,), (0.0,)) | {
        "test": own, "hard": own, "pair_accuracy": [accuracy],
    }  # fmt: skip


def test_what_is_seen_before_rl_is_ranked_over_all_models_and_by_regime():
    """Better models end higher among those with noisy labels. Their peaks are all at the base."""
    own = rl.get_config("tiny")
    runs = []
    for number in range(4):
        last = 0.2 + 0.05 * number
        runs += [
            curve("joint, noisy", number, 0, (0.5, 0.4, last)),
            best_of("joint, noisy", number, 0.5 + 0.01 * number),
        ]
    few = numbers.collect(own, [curve("joint", 0, 0, (0.5, 0.6, 0.6)), best_of("joint", 0, 0.8)])
    assert few["predictors"]["correlations"] == []
    assert "Too few models" in report.markdown(own, few, Path("x"), [])
    runs += [curve("joint", 0, 0, (0.5, 0.6, 0.6)), best_of("joint", 0, 0.8)]
    found = numbers.collect(own, runs)
    whole, noisy = found["predictors"]["correlations"]
    assert (whole["regime"], whole["models"]) == (None, 5)
    assert (noisy["regime"], noisy["models"]) == ("noisy", 4)
    assert whole["of"]["pair_accuracy"]["last"] == pytest.approx(1.0)
    assert whole["of"]["pair_accuracy"]["peak"] == pytest.approx(0.707, abs=1e-3)
    assert noisy["of"]["pair_accuracy"] == {"peak": None, "last": pytest.approx(1.0)}
    assert noisy["of"]["pairs"] == {"peak": None, "last": None}  # the same for all
    text = report.markdown(own, found, Path("x"), [])
    assert "| noisy labels, 4 models | missing / +1.00 |" in text
    assert "| all, 5 models | +0.71 / +1.00 |" in text


def test_what_the_optimiser_can_do_is_said_by_split(config):
    run = curve("gold", 0, 0, (0.5, 0.9, 0.875))
    for row in run["evaluations"]:
        if row["split"] == "hard":
            row["gold_G"] = [gold - 0.25 for gold in row["gold_G"]]
    found = numbers.collect(config, [run])
    assert found["arms"]["gold"]["rl"]["by_split"]["hard"] == pytest.approx([0.25, 0.65, 0.625])
    text = report.markdown(config, found, Path("x"), [])
    assert "from 0.500 to 0.875 on `test` and 0.250 to 0.625 on `hard`" in text
    assert "higher than before at 1 of 2 evaluations" in text
    assert text.splitlines()[2].startswith("What optimisation makes of gold, where")


def test_two_policy_seeds_of_a_model_are_one_model(config):
    """Runs that differ by model only: the interval is as wide as with one run of each."""
    rng = np.random.default_rng(0)
    golds = [(0.5, *rng.normal(0.6, 0.1, 2)) for _ in range(4)]
    once, twice = (
        numbers.collect(config, [curve("joint", n, seed, golds[n]) for n in range(4)
                                 for seed in range(seeds)])["arms"]["joint"]["rl"]
        for seeds in (1, 2)
    )  # fmt: skip
    for name in ("peak", "last", "fall"):
        assert {**twice[name], "runs": 4} == once[name] and twice[name]["runs"] == 8, name
    for name in ("alpha", "beta"):
        assert twice["fit"][name] == pytest.approx(once["fit"][name])


def test_runs_are_read_as_far_as_all_of_them_go(config):
    long = curve("joint", 0, 0, (0.5, 0.7, 0.6, 0.1, 0.9), (0.0, 1.0, 4.0, 9.0, 16.0))
    short = curve("discriminative", 0, 0, (0.5, 0.6, 0.6))
    long["lost_end"], short["lost_end"] = {"blurred": 9.0}, {"noisy": 1.0}
    found = numbers.collect(config, [long, short])
    joint = found["arms"]["joint"]["rl"]
    assert joint["steps"] == [0, 1, 2] and joint["last"]["value"] == pytest.approx(0.6)
    assert found["longer"] == ["joint-0-s0"] and found["iterations"] == 2
    assert joint["lost"]["end"] == {}
    text = report.markdown(config, found, Path("x"), [])
    assert "2 iterations of" in text and "read up to there" in text and "blurred" not in text
    assert "--config.iterations=2" in text


def test_the_page_that_ships_is_what_its_files_say():
    config, out = rl.get_config("comparison"), ROOT / "docs" / "rl"
    found = json_safe(numbers.collect(config, numbers.load(config, out)))
    said = [(out / name).read_text() for name in (report.USERS, report.NOTES)]
    shown = [path.name for path in out.iterdir()]
    text = report.markdown(config, found, Path("docs/rl"), shown, *said)
    assert text == (ROOT / "docs" / "rl.md").read_text()


def test_the_command_of_a_page_has_what_was_set(tmp_path):
    own = rl.get_config("comparison")
    own.optimizer.kl_weight = 0.01
    runs = [curve("joint", 0, 0, (0.5, 0.7, 0.6)), curve("mine", 0, 0, (0.5, 0.7, 0.6))]
    own.out = "docs/rl-0.5"
    found = numbers.collect(own, runs)
    words = report.command(own, found, Path(own.out))
    assert words == (
        "python -m jrm_jax.rl --config=configs/rl.py:comparison --model=runs/mine "
        "--config.iterations=2 --config.optimizer.kl_weight=0.01 --config.out=docs/rl-0.5"
    )
    plain = rl.get_config()
    assert "--workdir=here" in report.command(plain, found, Path("here/report"))


def test_each_regime_has_its_sentence_from_the_arm_with_most_models(config):
    own = rl.get_config("tiny")
    own.verdict.nats = (1.0, 3.0, 9.0)
    low, high = (0.5, 0.6, 0.6), (0.5, 0.8, 0.8)
    runs = [curve("joint", 0, 0, high), curve("discriminative", 0, 0, low)]
    for n in range(3):
        runs += [curve("joint, clean", n, 0, low), curve("discriminative, clean", n, 0, low)]
        runs += [curve("joint, noisy", n, s, high) for s in range(n < 2)]
        runs += [curve("discriminative, noisy", n, 0, low)]
    found = numbers.collect(own, runs)
    line = report.markdown(own, found, Path("x"), []).splitlines()[2]
    clean, noisy, default = line.split("With ")[1:]
    assert clean.startswith("3 models of each kind trained on clean labels")
    assert "is not borne out here" in clean and "at 3 nats" in clean
    assert noisy.startswith("2 models of each kind trained on noisy labels")
    assert "is borne out here" in noisy
    assert default.startswith("1 model of each kind, the claim") and "not decided yet" in default
    # higher at the peak and at the end, but not where both are equally far
    near = [curve("joint", n, 0, high, (0.0, 1.0, 6.0)) for n in range(2)]
    far = [curve("discriminative", n, 0, (0.5, 0.7, 0.6), (0.0, 0.5, 3.0)) for n in range(2)]
    own.verdict.nats = (0.5,)
    found = numbers.collect(own, near + far)
    assert found["gains"]["joint"]["equal"]["nats"] == 0.5
    assert found["gains"]["joint"]["equal"]["value"] < 0 < found["gains"]["joint"]["peak"]["value"]
    assert found["verdicts"][0]["holds"] is False
    own.verdict.nats = (50.0,)
    found = numbers.collect(own, near + far)
    assert found["verdicts"][0]["holds"] is None


def test_noise_alone_is_no_fall():
    rng, falls, naive = np.random.default_rng(0), [], []
    for _ in range(400):
        gold_TG = rng.normal(0.5, 0.2, (11, 64))
        falls.append((numbers.peak_of(gold_TG)[0] - gold_TG[-1]).mean())
        naive.append(gold_TG.mean(1).max() - gold_TG[-1].mean())
    assert abs(np.mean(falls)) < 0.006 < 0.03 < np.mean(naive)


def test_arms_look_different():
    looks = [tuple(figures.look(place).values()) for place in range(40)]
    assert len(set(looks)) == 40


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("iterations", 0, "at least 1"), ("edits", 1, "compared"), ("groups", 99, "problems"),
        ("optimizer.clip", 0.0, "above 0"), ("optimizer.scale", "x", "batch, group"),
        ("reward.penalty", -1.0, "0 or more"), ("reward.unsure", "x", "spread, deviation"),
        ("optimizer.learning_rate", math.nan, "above 0"), ("best_of.attempts", 0, "at least 1"),
        ("optimizer.clip", math.inf, "finite"), ("optimizer.kl_weight", math.inf, "finite"),
        ("reward.penalty", math.inf, "finite"), ("seed", -1, "0 or more"),
        ("seed", 2**31, "at most"), ("verdict.confidence", 95.0, "a share"),
        ("verdict.confidence", 1.0, "a share"), ("verdict.draws", 3, "at least 40"),
        ("verdict.nats", (2.0, -1.0), "above 0"), ("verdict.gain", math.nan, "0 or more"),
        ("eval_problems", 1001, "1000 at most"), ("edits", 5001, "10000 at"),
        ("optimizer.momentum", 1.0, "below 1"), ("optimizer.slower", -1.0, "0 or more"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_a_line(name, value, words):
    config = rl.get_config("tiny")
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=words):
        check.check_config(config)
