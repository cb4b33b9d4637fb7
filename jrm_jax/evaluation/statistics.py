"""Numbers with their uncertainty: clustered bootstrap, paired tests, ties, correlations.

Letters: N judgements, F columns of a judgement, G groups (drawn together), S draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

DRAWS = 1000
SIGNS, BLOCK = 20_000, 500  # random signs of every group, and how many are held at a time
Statistic = Callable[[np.ndarray], float]


class Interval(NamedTuple):
    """low and high: 95 % percentile interval; nan with fewer than two groups."""

    value: float
    low: float
    high: float
    groups: int


def bootstrap(
    values_NF: np.ndarray,
    groups: Sequence[Any],
    statistic: Statistic | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """A statistic of judgements, and its interval over draws of whole groups with replacement.

    Args:
        values_NF: [N] or [N, F]; `statistic` takes such an array. None: the mean of [N].
    """
    values_NF = np.asarray(values_NF, np.float64)
    count = len(values_NF)
    if not count:
        return Interval(math.nan, math.nan, math.nan, 0)
    group_N = _places(groups)
    sizes_G = np.bincount(group_N)
    rng = np.random.default_rng(seed)
    if statistic is None:
        value = math.fsum(values_NF) / count
        sums_G = np.bincount(group_N, values_NF)
        picks_SG = rng.multinomial(len(sizes_G), np.full(len(sizes_G), 1 / len(sizes_G)), draws)
        drawn = (picks_SG @ sums_G) / (picks_SG @ sizes_G)
    else:
        value = float(statistic(values_NF))
        order_N = np.argsort(group_N, kind="stable")
        members = np.split(order_N, np.cumsum(sizes_G)[:-1])
        drawn = np.array(
            [
                statistic(values_NF[np.concatenate([members[g] for g in picks])])
                for picks in rng.integers(0, len(sizes_G), (draws, len(sizes_G)))
            ]
        )
    return _interval(value, drawn, len(sizes_G))


def bootstrap_sums(
    values_NF: np.ndarray,
    groups: Sequence[Any],
    of_sums: Callable[[np.ndarray], np.ndarray],
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """As `bootstrap`, of a number that is made of sums over judgements, as ratios are.

    Args:
        of_sums: sums [..., F] of the columns -> the number [...].
    """
    values_NF = np.asarray(values_NF, np.float64)
    if not len(values_NF):
        return Interval(math.nan, math.nan, math.nan, 0)
    group_N = _places(groups)
    sums_GF = np.stack([np.bincount(group_N, column) for column in values_NF.T], axis=1)
    count = len(sums_GF)
    rng = np.random.default_rng(seed)
    picks_SG = rng.multinomial(count, np.full(count, 1 / count), draws)
    with np.errstate(invalid="ignore"):  # a draw may hold nothing of a part: no number
        drawn = of_sums(picks_SG @ sums_GF)
        value = float(of_sums(values_NF.sum(0)))
    return _interval(value, drawn, count)


def _interval(value: float, drawn: np.ndarray, groups: int) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    if groups < 2 or not len(drawn):
        return Interval(value, math.nan, math.nan, groups)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(value, float(low), float(high), groups)


def _places(groups: Sequence[Any]) -> np.ndarray:
    """[N] a number for each group, by first appearance: names may hold paths, and play no part."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(str(name), len(numbers)) for name in groups], int)


class Paired(NamedTuple):
    """difference = second - first; p two-sided. `test` names the test that gave p."""

    difference: float
    low: float
    high: float
    p: float
    test: str
    count: int
    groups: int
    only_first: int  # judgements that only the first had right
    only_second: int


def paired_test(
    first_N: Sequence[float], second_N: Sequence[float], groups: Sequence[Any], seed: int = 0
) -> Paired:
    """Two models on the same judgements. Under the null the sign of each group's sum is chance.

    Where all sums that are not 0 have the same size, p is the exact binomial one (McNemar's test
    when every group is one judgement); else from `SIGNS` random signs of each group.
    """
    first_N, second_N = np.asarray(first_N, float), np.asarray(second_N, float)
    gap_N = second_N - first_N
    spread = bootstrap(gap_N, groups, seed=seed)
    group_N = _places(groups)
    sums_G = np.bincount(group_N, gap_N)
    moved_G = sums_G[np.abs(sums_G) > 1e-12]
    if not len(moved_G):
        p, test = 1.0, "no judgement differs"
    elif np.allclose(np.abs(moved_G), np.abs(moved_G[0])):
        wins = int((moved_G > 0).sum())
        p, test = float(stats.binomtest(wins, len(moved_G)).pvalue), "exact sign test (McNemar)"
    else:
        rng = np.random.default_rng(seed)
        reached = 0
        for _ in range(SIGNS // BLOCK):  # a block of signs at a time
            signs = rng.integers(0, 2, (BLOCK, len(moved_G)), np.int8) * 2.0 - 1
            reached += int((np.abs(signs @ moved_G) >= abs(moved_G.sum()) - 1e-12).sum())
        p, test = (reached + 1) / (SIGNS + 1), "sign flips of groups"
    return Paired(
        spread.value, spread.low, spread.high, p, test, len(gap_N), spread.groups,
        int((gap_N < 0).sum()), int((gap_N > 0).sum()),
    )  # fmt: skip


# Ties


def accuracy_with_ties(label_N: np.ndarray, gap_N: np.ndarray, threshold: float) -> float:
    """Share right of three answers; |gap| <= threshold says tie. Labels 1, 0, -1."""
    said_N = np.where(np.abs(gap_N) <= threshold, 0, np.sign(gap_N))
    return float(np.mean(said_N == label_N)) if len(label_N) else math.nan


def tune_threshold(
    label_N: np.ndarray, gap_N: np.ndarray, zero: bool = True, whole: bool = True
) -> tuple[float, float]:
    """(threshold, accuracy) that is best on these data: Deutsch et al., arXiv 2305.14324.

    The smallest threshold wins among equals. zero: 0 is tried too, also where no gap is 0.
    whole: pairs with equal gaps cross the threshold together; False reads the accuracy after each
    of them in file order, as EditReward's script for GenAI-Bench does.
    """
    label_N, gap_N = np.asarray(label_N), np.asarray(gap_N, float)
    if not len(label_N):
        return 0.0, math.nan
    size_N = np.abs(gap_N)
    order_N = np.argsort(size_N, kind="stable")
    size_N, tie_N = size_N[order_N], label_N[order_N] == 0
    right_N = (np.sign(gap_N) * label_N)[order_N] > 0
    hits_N = np.cumsum(tie_N) + right_N.sum() - np.cumsum(right_N)
    last_N = np.append(size_N[1:] > size_N[:-1], True) if whole else np.ones(len(size_N), bool)
    thresholds, hits = size_N[last_N], hits_N[last_N]
    if zero and thresholds[0] > 0:
        thresholds = np.concatenate([[0.0], thresholds])
        hits = np.concatenate([[right_N.sum()], hits])
    best = int(np.argmax(hits))
    return float(thresholds[best]), float(hits[best] / len(label_N))


# Correlations


def spearman(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """nan where one of them is constant."""
    first_N, second_N = np.asarray(first_N, float), np.asarray(second_N, float)
    if len(first_N) < 2 or np.ptp(first_N) == 0 or np.ptp(second_N) == 0:
        return math.nan
    first_N, second_N = stats.rankdata(first_N), stats.rankdata(second_N)
    first_N, second_N = first_N - first_N.mean(), second_N - second_N.mean()
    return float(first_N @ second_N / math.sqrt((first_N @ first_N) * (second_N @ second_N)))


def fisher_mean(rhos: Sequence[float]) -> float:
    """tanh(mean(atanh(rho))) of the finite ones; rho is kept 1e-9 away from 1."""
    rhos = np.asarray([rho for rho in rhos if math.isfinite(rho)])
    if not len(rhos):
        return math.nan
    limit = 1 - 1e-9
    return float(np.tanh(np.arctanh(np.clip(rhos, -limit, limit)).mean()))


def published_mean(rhos: Sequence[float]) -> float:
    """tanh(mean(rho)): what EditReward's script calls Fisher's z, without the atanh."""
    return math.tanh(math.fsum(rhos) / len(rhos)) if len(rhos) else math.nan


# A model's insides


def effective_rank(states_ND: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values, rows centred.

    Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    states_ND = np.asarray(states_ND, np.float64)
    singular = np.linalg.svd(states_ND - states_ND.mean(0), compute_uv=False)
    share = singular / singular.sum() if singular.sum() else singular
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else math.nan


def calibration_interval(
    probability_N: np.ndarray, outcome_N: np.ndarray, groups: Sequence[Any], bins: int = 10
) -> Interval:
    """The `error` of `calibration`, with its interval."""
    place_N = _bins(probability_N, bins)
    gap_NB = np.zeros((len(place_N), bins))
    gap_NB[np.arange(len(place_N)), place_N] = np.asarray(probability_N, float) - outcome_N
    columns = np.concatenate([gap_NB, np.ones((len(place_N), 1))], axis=1)
    return bootstrap_sums(
        columns, groups, lambda sums: np.abs(sums[..., :-1]).sum(-1) / sums[..., -1]
    )


def _bins(probability_N: np.ndarray, bins: int) -> np.ndarray:
    return np.minimum((np.asarray(probability_N, float) * bins).astype(int), bins - 1)


def calibration(probability_N: np.ndarray, outcome_N: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Predicted against observed. Bins of equal width over [0, 1].

    Each labelled pair belongs in once, seen from the side the model prefers, or the plot would be
    symmetric by construction; so probabilities are >= 1/2.

    Returns:
        bins: [{'predicted', 'observed', 'count'}], those that hold something; error: mean gap,
        weighted by count; brier.
    """
    probability_N, outcome_N = np.asarray(probability_N, float), np.asarray(outcome_N, float)
    place_N = _bins(probability_N, bins)
    rows = []
    for place in np.unique(place_N):
        inside = place_N == place
        rows.append(
            {
                "predicted": float(probability_N[inside].mean()),
                "observed": float(outcome_N[inside].mean()),
                "count": int(inside.sum()),
            }
        )
    total = max(len(probability_N), 1)
    error = sum(row["count"] * abs(row["predicted"] - row["observed"]) for row in rows) / total
    brier = float(np.mean((probability_N - outcome_N) ** 2)) if len(probability_N) else math.nan
    return {"bins": rows, "error": error, "brier": brier, "count": len(probability_N)}
