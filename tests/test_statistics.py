"""Statistics against scipy, against brute force and against cases worked out by hand."""

import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from jrm_jax.evaluation import statistics as ours


def test_the_interval_of_single_judgements_is_the_binomial_one():
    values = np.arange(400) % 10 < 6
    found = ours.bootstrap(values, np.arange(400))
    assert found.value == 0.6 and found.groups == 400
    wide = 1.96 * math.sqrt(0.24 / 400)
    np.testing.assert_allclose((found.low, found.high), (0.6 - wide, 0.6 + wide), atol=0.006)


def test_judgements_of_one_group_are_drawn_together():
    values = np.repeat(np.arange(40) % 2, 10)
    apart = ours.bootstrap(values, np.arange(400))
    together = ours.bootstrap(values, np.repeat(np.arange(40), 10))
    ratio = (together.high - together.low) / (apart.high - apart.low)
    assert 2.7 < ratio < 3.7  # sqrt(10)
    general = ours.bootstrap(values, np.repeat(np.arange(40), 10), np.mean)
    np.testing.assert_allclose(general[:3], together[:3], atol=0.03)


def test_what_a_group_is_called_plays_no_part():
    values = np.random.default_rng(0).normal(size=400)
    groups = np.repeat(np.arange(40), 10)
    names = [f"/far/away/{100 - group}" for group in groups]
    assert ours.bootstrap(values, names) == ours.bootstrap(values, groups)
    assert ours.paired_test(values, values[::-1], names) == ours.paired_test(
        values, values[::-1], groups)  # fmt: skip


def test_no_interval_without_groups_to_draw():
    alone = ours.bootstrap([1.0, 0.0], ["a", "a"])
    assert alone.value == 0.5 and math.isnan(alone.low)
    assert math.isnan(ours.bootstrap([], []).value)


def test_a_number_of_sums_has_the_interval_of_its_mean():
    rng = np.random.default_rng(5)
    values, groups = rng.random(60), rng.integers(0, 12, 60)
    columns = np.stack([values, np.ones(60)], axis=1)
    found = ours.bootstrap_sums(columns, groups, lambda sums: sums[..., 0] / sums[..., 1])
    np.testing.assert_allclose(found, ours.bootstrap(values, groups), rtol=1e-12)
    half = np.where(groups == 0, 1.0, 0.0)  # some draws have none of that group
    found = ours.bootstrap_sums(
        np.stack([half * values, half], axis=1), groups, lambda sums: sums[..., 0] / sums[..., 1]
    )
    np.testing.assert_allclose(found[:3], [values[groups == 0].mean()] * 3)


def test_the_calibration_error_has_an_interval():
    rng = np.random.default_rng(6)
    chance, groups = rng.uniform(0.5, 1, 900), np.arange(900)
    right = rng.random(900) < chance - 0.2 * (chance < 0.8)
    found = ours.calibration_interval(chance, right, groups)
    assert found.value == pytest.approx(ours.calibration(chance, right)["error"])
    assert 0 < found.low < found.value < found.high < 0.3 and found.groups == 900
    assert math.isnan(ours.calibration_interval(chance[:0], right[:0], []).value)


def test_mcnemar_is_exact():
    first = [1] * 9 + [0] * 2 + [1] * 20
    second = [0] * 9 + [1] * 2 + [1] * 20
    found = ours.paired_test(first, second, range(31))
    assert found.p == pytest.approx(stats.binomtest(2, 11).pvalue)
    assert (found.only_first, found.only_second) == (9, 2)
    assert found.difference == pytest.approx(-7 / 31)
    assert "McNemar" in found.test
    assert ours.paired_test(first, first, range(31)).p == 1.0


def test_groups_flip_their_signs_together():
    first = np.zeros(12)
    second = np.repeat([1.0, 0.0, 0.0, 1.0], 3)
    second[5] = 1.0  # sums 3, 1, 0, 3
    found = ours.paired_test(first, second, np.repeat(range(4), 3))
    assert found.test == "sign flips of groups"
    assert found.p == pytest.approx(2 / 8, abs=0.02)  # of 8 sign patterns two reach 7


def test_many_groups_take_little_memory():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=3000), rng.normal(size=3000)
    tracemalloc.start()
    try:
        assert 0 < ours.paired_test(first, second, np.repeat(range(1500), 2)).p < 1
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 50e6


@pytest.mark.parametrize("seed", range(4))
def test_the_tuned_threshold_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    label, gap = rng.integers(-1, 2, 50), np.round(rng.normal(size=50), 1)
    tries = sorted({0.0, *np.abs(gap).tolist()})
    best = max(tries, key=lambda t: ours.accuracy_with_ties(label, gap, t))
    threshold, share = ours.tune_threshold(label, gap)
    assert threshold == best
    assert share == pytest.approx(ours.accuracy_with_ties(label, gap, best))


def test_the_published_tuning_of_genai_bench_reads_after_each_pair():
    # |gap| 1 twice: a tie, then a right pair; whole: 2 -> 1 + 1 of 3; by pair: 3 of 3
    label, gap = np.array([0, 1, 1]), np.array([1.0, 1.0, 2.0])
    assert ours.tune_threshold(label, gap, zero=False)[1] == pytest.approx(2 / 3)
    assert ours.tune_threshold(label, gap, zero=False, whole=False)[1] == 1.0


def test_spearman_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 40), rng.normal(size=40)
    assert ours.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert math.isnan(ours.spearman(np.ones(5), np.arange(5)))


def test_fishers_z_and_what_was_published_instead():
    rhos = [0.9, 0.1]
    by_hand = math.tanh((math.atanh(0.9) + math.atanh(0.1)) / 2)
    assert ours.fisher_mean(rhos) == pytest.approx(by_hand)
    assert ours.fisher_mean([*rhos, math.nan]) == pytest.approx(by_hand)
    z = sum(rhos) / 2
    published = (math.exp(2 * z) - 1) / (math.exp(2 * z) + 1)
    assert ours.published_mean(rhos) == pytest.approx(published, abs=1e-15)
    assert ours.published_mean(rhos) < 0.5 < ours.fisher_mean(rhos)


def test_effective_rank_of_known_spectra():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 8)))[0]
    basis -= basis.mean(0)
    even = np.linalg.svd(basis, full_matrices=False)[0][:, :5]
    assert ours.effective_rank(even) == pytest.approx(5.0, abs=1e-6)
    line = np.outer(np.arange(10.0), np.ones(4))
    assert ours.effective_rank(line) == pytest.approx(1.0)
    share = np.array([0.75, 0.25])
    uneven = even[:, :2] * share
    assert ours.effective_rank(uneven) == pytest.approx(math.exp(-(share * np.log(share)).sum()))


def test_calibration_by_hand():
    found = ours.calibration([0.55, 0.55, 0.95, 0.95], [1, 0, 1, 1])
    assert [row["count"] for row in found["bins"]] == [2, 2]
    assert found["error"] == pytest.approx((0.05 + 0.05) / 2)
    assert found["brier"] == pytest.approx((0.45**2 + 0.55**2 + 2 * 0.05**2) / 4)
