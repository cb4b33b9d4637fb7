"""From scores to numbers: pairs of the built-in world, paired intervals, what a score is good for.

The world is remade from its seed (`scenes.make_group`), so that a cell's file need hold nothing but
scores. Letters: N pairs, G groups, S seeds, A attempts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from jrm_jax.data.images import open_image
from jrm_jax.data.world import scenes
from jrm_jax.evaluation.statistics import Interval, calibration

Scores = Sequence[Sequence[float | None]]  # per group, per candidate


class Pairs(NamedTuple):
    """Pairs with a gold order, group by group; arrays [N]. `flaw`: of the worse candidate where the
    better one is perfect, else 'both flawed'."""

    group: np.ndarray
    better: np.ndarray
    worse: np.ndarray
    instruction: np.ndarray
    flaw: np.ndarray


@functools.lru_cache(maxsize=8)
def load_pairs(split: str, count: int, seed: int) -> Pairs:
    """All pairs of a split whose overall gold scores differ."""
    rows = []
    for index in range(count):
        group = scenes.make_group(split, index, seed)
        gold = [attempt.gold.overall for attempt in group.attempts]
        kinds = [attempt.kind for attempt in group.attempts]
        for i in range(len(gold)):
            for j in range(len(gold)):
                if gold[i] > gold[j]:
                    flaw = kinds[j] if kinds[i] == "perfect" else "both flawed"
                    rows.append((index, i, j, group.kind, flaw))
    return Pairs(*(np.array(column) for column in zip(*rows, strict=True)))


@functools.lru_cache(maxsize=4)
def load_distances(split: str, count: int, seed: int) -> tuple[tuple[float, ...], ...]:
    """Per group, per candidate: mean absolute difference of the pixels from the source, 0..1."""

    def pixels(part) -> np.ndarray:
        return np.asarray(open_image(part.data).convert("RGB"), np.float32) / 255

    found = []
    for index in range(count):
        example = scenes.make_example(split, index, seed)
        source = pixels(example.prompt[-1])
        found.append(
            tuple(float(np.abs(pixels(c.parts[0]) - source).mean()) for c in example.candidates)
        )
    return tuple(found)


@functools.lru_cache(maxsize=4)
def load_damage(split: str, count: int, seed: int) -> tuple[tuple[float, ...], ...]:
    """Per group, per candidate: 1 where the picture has lost quality, else 0."""
    groups = (scenes.make_group(split, index, seed) for index in range(count))
    return tuple(tuple(float(a.quality is not None) for a in g.attempts) for g in groups)


def preference_loss(pairs: Pairs, scores: Scores) -> float:
    """Mean of -log sigmoid(difference), nats a pair: what the preference loss is on true labels."""
    return float(np.logaddexp(0.0, -gaps(pairs, scores)).mean())


def gaps(pairs: Pairs, scores: Scores) -> np.ndarray:
    """[N]: score of the better minus that of the worse; NaN where either has none."""
    rows = [[math.nan if s is None else s for s in row] for row in scores]
    triples = zip(pairs.group, pairs.better, pairs.worse, strict=True)
    return np.array([rows[g][i] - rows[g][j] for g, i, j in triples])


def correct(pairs: Pairs, scores: Scores) -> np.ndarray:
    """[N]: 1 for the right order, 0 for the wrong one, 1/2 for equal or absent scores."""
    return (1 + np.sign(np.nan_to_num(gaps(pairs, scores)))) / 2


def unparsable(scores: Scores) -> float:
    """Share of candidates without a score."""
    every = [score is None for row in scores for score in row]
    return sum(every) / max(1, len(every))


# Intervals


def interval(
    values_SN: np.ndarray, group_N: np.ndarray, draws: int, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean over seeds and pairs; its percentile interval from drawing seeds and whole groups with
    replacement, both at once.

    Give differences of two arms, seed by seed and pair by pair, for a paired comparison. One seed:
    the interval is of groups alone.
    """
    values_SN = np.atleast_2d(np.asarray(values_SN, np.float64))
    seeds, count = values_SN.shape
    if not count or not seeds:
        return Interval(math.nan, math.nan, math.nan, 0)
    place_N = np.unique(group_N, return_inverse=True)[1]
    sizes_G = np.bincount(place_N)
    sums_SG = np.stack([np.bincount(place_N, row) for row in values_SN])
    rng = np.random.default_rng(seed)
    groups = len(sizes_G)
    picks_DG = rng.multinomial(groups, np.full(groups, 1 / groups), draws)
    picks_DS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws)
    totals_DS = picks_DG @ sums_SG.T
    drawn_D = (totals_DS * picks_DS).sum(1) / (seeds * (picks_DG @ sizes_G))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(drawn_D, (tail, 100 - tail))
    return Interval(float(values_SN.mean()), float(low), float(high), groups)


class Spread(NamedTuple):
    """How much seeds differ: standard deviation of one seed's mean, and its degrees of freedom."""

    deviation: float
    freedom: int


def pooled_spread(samples: Sequence[Sequence[float]]) -> Spread | None:
    """Of values that vary alike around a mean of each sample's own; None where no sample has two.

    Samples must not share seeds: else they tell less than their degrees of freedom say.
    """
    freedom = sum(len(sample) - 1 for sample in samples if len(sample))
    if not freedom:
        return None
    squares = sum(float(np.var(sample)) * len(sample) for sample in samples if len(sample))
    return Spread(math.sqrt(squares / freedom), freedom)


def seeds_interval(
    values_SN: np.ndarray,
    group_N: np.ndarray,
    draws: int,
    confidence: float = 0.95,
    spread: Spread | None = None,
) -> Interval:
    """As `interval`, for few seeds: two or three drawn anew hardly vary, so that its intervals hold
    the truth in 72 % and 83 % of cases instead of 95.

    Each half-width is the root of two squares (Zou and Donner 2008, "Construction of confidence
    limits about effect measures"): Student's t interval of the seeds' means, and what `interval`
    finds for whole groups, of the mean over seeds.

    Args:
        spread: of one seed's mean, where more is known of it than these seeds tell. Without it, one
            seed's interval is of groups alone.
    """
    values_SN = np.atleast_2d(np.asarray(values_SN, np.float64))
    spread = spread or pooled_spread([values_SN.mean(1)])
    found = interval(values_SN.mean(0, keepdims=True), group_N, draws, confidence)
    if spread is None:
        return found
    error = spread.deviation / math.sqrt(len(values_SN))
    half = float(stats.t.ppf((1 + confidence) / 2, spread.freedom) * error)
    low = found.value - math.hypot(half, found.value - found.low)
    high = found.value + math.hypot(half, found.high - found.value)
    return found._replace(low=low, high=high)


def verdict(gain: Interval, shuffled: Interval | None, settings: Any) -> dict[str, Any]:
    """Whether the claim holds, by thresholds in points; intervals are shares.

    Returns:
        'gain', 'above_zero', 'shuffled' (True, False, or None where it is missing), 'holds'.
    """
    enough, above = 100 * gain.value >= settings.gain, gain.low > 0
    null = None
    if shuffled is not None:
        null = bool(100 * shuffled.value < settings.null or shuffled.low <= 0)
    holds = None if null is None else bool(enough and above and null)
    return {"gain": bool(enough), "above_zero": bool(above), "shuffled": null, "holds": holds}


# Measures


def within_groups(pairs: Pairs, correct_N: np.ndarray) -> tuple[float, float]:
    """(mean of the groups' accuracies, share of groups ordered without any mistake)."""
    place_N = np.unique(pairs.group, return_inverse=True)[1]
    share_G = np.bincount(place_N, correct_N) / np.bincount(place_N)
    return float(share_G.mean()), float((share_G == 1).mean())


def reliability(pairs: Pairs, scores: Scores) -> dict[str, Any]:
    """`statistics.calibration` of sigmoid(difference), each pair seen from the preferred side."""
    gap_N = gaps(pairs, scores)
    gap_N = gap_N[np.isfinite(gap_N)]
    return calibration(1 / (1 + np.exp(-np.abs(gap_N))), (1 + np.sign(gap_N)) / 2)


def best_of_n(proxy_A: Sequence[float | None], gold_A: Sequence[float], n: int) -> float:
    """Expected gold score of the attempt with the highest proxy among n drawn of A without
    replacement: exact, equal proxies broken evenly; no proxy counts as the lowest."""
    total = len(proxy_A)
    proxy = np.array([-np.inf if p is None else p for p in proxy_A], float)
    order = np.argsort(proxy, kind="stable")
    proxy, gold = proxy[order], np.asarray(gold_A, float)[order]
    # chance that the best of n is the attempt at rank r: C(r, n-1) / C(A, n)
    chance = np.array([math.comb(r, n - 1) for r in range(total)]) / math.comb(total, n)
    for value in np.unique(proxy):
        same = proxy == value
        chance[same] = chance[same].mean()
    return float(chance @ gold)


@functools.lru_cache(maxsize=4)
def contest_gold(count: int, seed: int, attempts: int) -> tuple[tuple[int, ...], ...]:
    """Gold scores 0..100 of the attempts of `measure.measure_contests`."""
    groups = (scenes.make_contest("test", index, seed, attempts) for index in range(count))
    return tuple(tuple(a.gold.overall for a in group.attempts) for group in groups)


def attack_numbers(pairs: Pairs, attack: dict[str, Scores] | None) -> dict[str, float] | None:
    """What raising the worse candidate's score does: share of the rightly ordered pairs that turn
    over, mean gain of a score, and that gain in units of the scores' spread."""
    if attack is None:
        return None
    before, after = attack["before"], attack["after"]
    inside = pairs.group < len(before)
    kept = Pairs(*(column[inside] for column in pairs))
    mixed = []
    for g, i, j in zip(kept.group, kept.better, kept.worse, strict=True):
        mixed.append((before[g][i] - before[g][j], before[g][i] - after[g][j]))
    clean_N, pushed_N = np.array(mixed).T
    right_N = clean_N > 0
    return {
        "pairs": int(right_N.sum()),
        "turned": float((pushed_N[right_N] <= 0).mean()) if right_N.any() else math.nan,
        **attack_gain(attack),
    }


def attack_gain(attack: dict[str, Scores]) -> dict[str, float]:
    """'gain': mean of what an attack adds to a score; 'gain_in_spreads': the same in units of the
    spread of the scores before, NaN where they have none."""
    before, after = (
        np.concatenate([np.asarray(row, float) for row in attack[when]])
        for when in ("before", "after")
    )
    gain, spread = float((after - before).mean()), before.std()
    return {"gain": gain, "gain_in_spreads": float(gain / spread) if spread else math.nan}


def agreement(pairs: Pairs, scores: Scores, distances: Scores) -> float:
    """Share of pairs that the scores order as 'closer to the source in pixels' does."""
    mine, rule = np.nan_to_num(gaps(pairs, scores)), -gaps(pairs, distances)
    return float(((1 + np.sign(mine * rule)) / 2).mean())
