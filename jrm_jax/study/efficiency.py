"""Label efficiency: how many times fewer labels one arm needs than another for the same accuracy.

Letters: G groups, S seeds, L numbers of labelled groups, D draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jrm_jax.study.analysis import Spread

Curve = Sequence[np.ndarray]  # by number of labelled groups: right pairs [S, G]


def compare(
    arm: Curve,
    base: Curve,
    sizes_G: np.ndarray,
    labelled: Sequence[int],
    accuracy: float,
    draws: int,
    confidence: float,
    spreads: Sequence[Sequence[Spread | None]],
) -> dict[str, Any]:
    """Labels that `base` needs over those that `arm` needs, where their curves first reach the
    accuracy: straight lines between the sizes, by the logarithm of the size.

    Outside the sizes an arm's need is known by a bound alone: at most the smallest, more than the
    largest. Then so is the factor.

    Args:
        sizes_G: pairs of each group.
        spreads: of one seed's accuracy, of `arm` and of `base` by number of labelled groups; None:
            not known, so that seeds are taken to differ by nothing.

    Returns:
        'least', 'most': bounds of the factor, equal where both needs lie between sizes; 0 and None:
        no bound. 'low', 'high': of least and most over draws of whole groups, with Student's t for
        the seeds; 0 and None likewise. 'open': share of the draws that have no bound at all; they
        count in 'low' and 'high'.
    """
    groups, rng = len(sizes_G), np.random.default_rng(0)
    whole_1G = np.ones((1, groups))
    (least,), (most,) = _factors(
        *(_needs(_accuracies(c, whole_1G, sizes_G), labelled, accuracy) for c in (arm, base))
    )
    picks_DG = rng.multinomial(groups, np.full(groups, 1 / groups), draws)
    least_D, most_D = _factors(
        *(
            _needs(_accuracies(c, picks_DG, sizes_G, known, rng), labelled, accuracy)
            for c, known in zip((arm, base), spreads, strict=True)
        )
    )
    tail = 50 * (1 - confidence)
    return {
        "least": float(least), "most": _bounded(most),
        "low": float(np.percentile(least_D, tail, method="lower")),
        "high": _bounded(np.percentile(most_D, 100 - tail, method="higher")),
        "open": float(((least_D == 0) & np.isinf(most_D)).mean()),
    }  # fmt: skip


def _accuracies(
    curve: Curve,
    picks_DG: np.ndarray,
    sizes_G: np.ndarray,
    spreads: Sequence[Spread | None] = (),
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """[D, L]; `rng` moves each by its seeds' error, as Student's t says it may be off."""
    columns = []
    for right_SG, spread in zip(curve, spreads or [None] * len(curve), strict=True):
        column_D = (picks_DG @ right_SG.mean(0)) / (picks_DG @ sizes_G)
        if spread is not None:
            error = spread.deviation / math.sqrt(len(right_SG))
            column_D = column_D + error * rng.standard_t(spread.freedom, len(column_D))
        columns.append(column_D)
    return np.stack(columns, axis=1)


def _needs(
    accuracy_DL: np.ndarray, labelled: Sequence[int], wanted: float
) -> tuple[np.ndarray, np.ndarray]:
    """[D] each: bounds of the labelled groups at which a curve first reaches the accuracy."""
    least = np.full(len(accuracy_DL), float(labelled[-1]))
    most = np.full(len(accuracy_DL), np.inf)
    for row, curve in enumerate(accuracy_DL):
        for at, value in enumerate(curve):
            if value >= wanted and not at:
                least[row], most[row] = 0.0, labelled[0]
                break
            if value >= wanted:
                share = (wanted - curve[at - 1]) / (value - curve[at - 1])
                first, last = math.log(labelled[at - 1]), math.log(labelled[at])
                least[row] = most[row] = math.exp(first + share * (last - first))
                break
    return least, most


def _factors(
    arm: tuple[np.ndarray, np.ndarray], base: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """[D] each: least and most."""
    with np.errstate(divide="ignore"):
        return base[0] / arm[1], base[1] / arm[0]


def _bounded(value: float) -> float | None:
    """Infinity is none of JSON's numbers."""
    return None if math.isinf(value) else float(value)
