"""The numbers of the study's second part, by hand: gains, verdict, intervals, label efficiency,
what is recommended."""

import numpy as np
import pytest

from configs import study
from jrm_jax.study import analysis, regimes_numbers, regimes_report
from jrm_jax.study.advice import advice
from jrm_jax.study.regimes import ARMS, Point


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

    config = study.get_config("regimes_tiny")
    config.sizes, config.flips = (100, 400, 1600), (0.35,)
    config.headline.labelled = 400
    config.points = ((tuple(ARMS), config.sizes, (0.35,), 3),)
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
    "joint, words, shuffled, words_shuffled, holds",
    [
        (8, 8, 4, 4, True), (8, 4, 4, 4, False), (8, 8, 8, 4, False), (8, 8, 4, 8, False),
        (4, 4, 4, 4, False),
    ],
)  # fmt: skip
def test_the_verdict_needs_both_arms_and_no_placebo(
    hand, joint, words, shuffled, words_shuffled, holds
):
    counts = {
        "discriminative": 4, "joint": joint, "joint_words": words, "joint_shuffled": shuffled,
        "words_shuffled": words_shuffled,
    }  # fmt: skip
    found = {
        Point(arm, 400, 0.35, seed): made(right(count))
        for arm, count in counts.items() for seed in (0, 1)
    }  # fmt: skip
    verdict = regimes_numbers.verdict(hand, regimes_numbers.Table(hand, found))
    assert verdict["holds"] is holds and verdict["seeds"] == 2
    assert verdict["confidence"] == pytest.approx(0.975)  # two comparisons
    for arm in ("joint", "words_shuffled"):
        less = {p: r for p, r in found.items() if p.arm != arm}
        missing = regimes_numbers.verdict(hand, regimes_numbers.Table(hand, less))
        assert missing["holds"] is None and None in (
            *missing["arms"].values(), *missing["placebos"].values()
        )  # fmt: skip


def bounds(row):
    return row["least"], row["most"]


def test_label_efficiency_by_hand(hand):
    curve = {100: 2, 400: 4, 1600: 6}
    found = {
        Point("discriminative", size, 0.35, 0): made(right(n)) for size, n in curve.items()
    } | {
        Point("joint", size, 0.35, 0): made(right(3 + 2 * (size > 100))) for size in curve
    }  # fmt: skip
    table = regimes_numbers.Table(hand, found)

    def factor(arm, accuracy):
        return bounds(table.efficiency(arm, 0.35, accuracy))

    # discriminative is at one half with 400 labels, joint half way from 100 to 400
    assert factor("joint", 4 / 8) == pytest.approx((2.0, 2.0))
    # five of eight: half way from 400 to 1600, by the logarithm; joint has it at 400
    assert factor("joint", 5 / 8) == pytest.approx((2.0, 2.0))
    # joint has three of eight with the fewest labels: it needs 100 at most, discriminative 200
    assert factor("joint", 3 / 8) == (pytest.approx(2.0), None)
    # joint never has six: it needs more than 1600, which discriminative needs
    assert factor("joint", 6 / 8) == (0.0, pytest.approx(1.0))
    for accuracy in (0.9, 0.2):  # neither has it, and both have it from the beginning
        row = table.efficiency("joint", 0.35, accuracy)
        assert bounds(row) == (0.0, None) and (row["low"], row["high"]) == (0.0, None)
        assert "not measurable (no bound to no bound" in regimes_report._factor(row)
    assert table.efficiency("joint", 0.35, 0.9)["open"] > 0.8
    assert table.efficiency("teacher", 0.35, 0.5) is None  # not run
    assert factor("discriminative", 0.5) == pytest.approx((1.0, 1.0))
    assert table.efficiency("joint", 0.35, 0.5)["sizes"] == [100, 400, 1600]


def test_draws_without_an_answer_are_not_left_out(hand):
    """An accuracy that a curve reaches in a part of the draws: the interval has no bound there."""
    found = {
        Point(arm, size, 0.35, 0): made(right(n + more))
        for arm, more in (("discriminative", 0), ("joint", 1))
        for size, n in {100: 2, 400: 4, 1600: 5}.items()
    }
    row = regimes_numbers.Table(hand, found).efficiency("joint", 0.35, 5 / 8)
    assert row["least"] == row["most"] > 1 and row["high"] is None and row["open"] > 0
    words = regimes_report._factor(row)
    assert "to no bound, not measurable in " in words and words.endswith("of the draws), 1 seed")


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds):
    """No gain, 2 points between seeds, 300 groups; by draws of seeds it was 72, 83 and 90 %."""
    rng = np.random.default_rng(0)
    group_N, held, tries = np.repeat(np.arange(300), 3), {0.95: 0, 0.975: 0}, 400
    for _ in range(tries):
        gain_S1 = rng.normal(0, 0.02, (seeds, 1))
        shared_N = np.repeat(rng.normal(0, 0.1, 300), 3)
        values_SN = gain_S1 + shared_N + rng.normal(0, 0.1, (seeds, 900))
        for confidence in held:
            found = analysis.seeds_interval(values_SN, group_N, 200, confidence)
            held[confidence] += found.low <= 0 <= found.high
    for confidence, count in held.items():
        assert confidence - 0.025 < count / tries


def test_a_spread_known_of_other_places_makes_few_seeds_honest():
    """No gain, 2 points between seeds: nine places of one, two or three seeds, each with the spread
    of all, hold the truth as often as they say."""
    rng, group_N, seeds = np.random.default_rng(0), np.repeat(np.arange(100), 2), (1, 2, 3) * 3
    held, tries, draws = {1: 0, 2: 0, 3: 0}, 150, 100
    for _ in range(tries):
        places = []
        for count in seeds:
            gain_S1 = rng.normal(0, 0.02, (count, 1))
            shared_N = np.repeat(rng.normal(0, 0.1, 100), 2)
            places.append(gain_S1 + shared_N + rng.normal(0, 0.05, (count, 200)))
        known = analysis.pooled_spread([values_SN.mean(1) for values_SN in places])
        assert known.freedom == 9
        for count, values_SN in zip(seeds, places, strict=True):
            found = analysis.seeds_interval(values_SN, group_N, draws, 0.95, known)
            held[count] += found.low <= 0 <= found.high
    for count in held.values():
        assert 0.92 < count / (3 * tries) < 0.995


def test_pooled_spread_by_hand():
    # around 2 and around 10: squares 2 and 8, three of five values are free
    found = analysis.pooled_spread([[1.0, 3.0], [8.0, 12.0, 10.0], [7.0]])
    assert found == (pytest.approx((10 / 3) ** 0.5), 3)
    assert analysis.pooled_spread([[1.0], [], [2.0]]) is None


def test_seeds_differ_as_much_as_with_as_many_labels(hand):
    """The gain's interval at a place with one seed is as wide as other places tell, or the arm's
    own other flips, until there are seeds enough."""
    counts = {0: (4, 5), 1: (4, 7), 2: (4, 6)}
    found = {
        Point(arm, 400, 0.35, seed): made(right(pair[arm == "joint"]))
        for seed, pair in counts.items() for arm in ("discriminative", "joint")
    }  # fmt: skip
    found[Point("teacher", 400, 0.35, 0)] = made(right(6))
    for arm in ("discriminative", "joint"):
        found[Point(arm, 100, 0.35, 0)] = made(right(4))
    table = regimes_numbers.Table(hand, found)
    assert table.known_spread("teacher", 400, "hard", True) == (pytest.approx(0.125), 2)
    assert table.known_spread("joint", 100, "hard", True) is None  # one seed, and no other place
    gain, few = table.gain("teacher", 400, 0.35, "hard"), table.gain("joint", 100, 0.35, "hard")
    assert gain["seeds"] == 1 and gain["low"] < gain["value"] - 4.3 * 0.125  # Student's t, two free
    assert few["low"] == few["high"] == 0.0
    hand.verdict.seeds = 1  # as many as are wanted: by themselves
    enough = regimes_numbers.Table(hand, found).gain("teacher", 400, 0.35, "hard")
    assert enough["low"] > gain["low"]


def test_arms_that_begin_with_a_run_of_their_own_are_a_pool_apart(hand):
    """Their seeds differ by that run, too, and say nothing of the others."""
    counts = {"discriminative": (4, 4, 4), "teacher": (5, 6, 5), "staged": (2, 8, 4)}
    found = {
        Point(arm, 400, 0.35, seed): made(right(count))
        for arm, own in counts.items() for seed, count in enumerate(own)
    }  # fmt: skip
    table = regimes_numbers.Table(hand, found)
    teacher, staged = (table.known_spread(a, 400, "hard", True) for a in ("teacher", "staged"))
    assert staged.deviation > 4 * teacher.deviation and staged.freedom == teacher.freedom == 2
    before = {p: r for p, r in found.items() if p.arm != "staged"}
    alone = regimes_numbers.Table(hand, before)
    assert alone.known_spread("teacher", 400, "hard", True) == teacher
    assert table.known_spread("staged_joint", 400, "hard", True) == staged


def test_arms_that_share_seeds_tell_their_spread_once(hand):
    """Two more arms of the same seeds add no degree of freedom, another flip does."""
    found = {
        Point(arm, 400, flip, seed): made(right(4 + seed * (arm == "joint")))
        for arm in ("discriminative", "joint", "teacher", "joint_words")
        for flip in (0.2, 0.35) for seed in (0, 1, 2)[: 3 - (flip == 0.2)]
    }  # fmt: skip
    table = regimes_numbers.Table(hand, found)
    joint, teacher = (table.known_spread(a, 400, "hard", True) for a in ("joint", "teacher"))
    assert joint.freedom == teacher.freedom == 2 + 1
    squares = 2 * 0.125**2 + 0.5 * 0.125**2  # of joint alone
    assert joint.deviation == pytest.approx((squares / 3) ** 0.5)
    assert teacher.deviation == pytest.approx((squares / 9) ** 0.5)


def test_a_cell_made_again_elsewhere_is_shown_beside(hand):
    point = Point("discriminative", 400, 0.35, 0)
    other = made(right(5), machine={"device": "gpu", "cpu": "c", "jax": "j"})
    numbers = regimes_numbers.collect(hand, {point: made(right(4))}, {point: other})
    row = numbers["again"][point.name]
    assert row["hard"] == {"accuracies": [4 / 8, 5 / 8], "differ": 1} and row["test"]["differ"] == 0
    page = regimes_report.markdown(hand, numbers, [])
    trial = point._replace(rate=1e-3, steps=10)
    both = {point: made(right(4)), trial: made(right(4), curve=[[2, 0.6]])}
    assert list(regimes_numbers.collect(hand, both, both)["again"]) == [point.name]
    row = f"| {point.name} | 2 and 2 | 0.00 and 0.00; 0 | 50.00 and 62.50; 1 | d, c, jax j | gpu, c"
    assert row in page
    assert "another machine" not in regimes_report.markdown(hand, numbers | {"again": {}}, [])


def test_one_seed_has_the_interval_of_groups():
    values_N, group_N = np.arange(12.0) % 5, np.arange(12) // 2
    assert analysis.seeds_interval(values_N, group_N, 300) == analysis.interval(
        values_N, group_N, 300
    )


def test_advice_is_of_what_was_measured(hand):
    def say(found):
        return "\n".join(advice(hand, regimes_numbers.collect(hand, found, {})))

    text = say({})
    assert text.startswith("No gain is measured yet") and "| use |" not in text
    assert "100, 400 or 1,600 pairs with 35 % of them wrong" in text
    found = {
        Point(arm, 400, 0.35, seed): made(right(count))
        for arm, count in (("discriminative", 3), ("joint", 8)) for seed in range(3)
    }  # fmt: skip
    collected = regimes_numbers.collect(hand, found, {})
    assert "| good ones, for all groups | joint +62.5" in say(found)
    assert "2 of 3 kinds of labels" in say(found)
    # for eight comparisons, an arm of controls for none
    place = collected["curves"]["0.35"]["400"]["joint"]
    assert place["advice"]["low"] < place["gain"]["hard"]["low"] < place["advice"]["value"]
    found[Point("joint_shuffled", 400, 0.35, 0)] = made(right(8))
    place = regimes_numbers.collect(hand, found, {})["curves"]["0.35"]["400"]["joint_shuffled"]
    assert place["advice"] is None and place["gain"]["hard"]
    for count in (1, 2):
        few = {p: r for p, r in found.items() if p.seed < count}
        assert "too few seeds to say" in say(few)
    # more of one seed is no reason to prefer it to what is known
    few = found | {Point("teacher", 400, 0.35, 0): made(right(8))}
    assert "teacher" not in say(few)
    for seed in range(3):
        found[Point("joint", 400, 0.35, seed)] = made(right(3))
    assert "discriminative; no gain can be told from zero" in say(found)
    page = regimes_report.markdown(hand, collected, [])
    assert "**Nothing is decided yet**: with 400 pairs" in page.splitlines()[2]
    assert "Not yet run: joint_words" in page and "None" not in page and "nan" not in page
