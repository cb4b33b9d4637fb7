"""How gold grows and falls with the divergence from the base: the forms of Gao et al. (2022).

Scaling laws for reward model overoptimization, arXiv 2210.10760: with d = sqrt(KL), the gain is
d (alpha - beta d) for best-of-n and d (alpha - beta log d) for RL.

Letters: T points of a curve, S runs, G problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

BEST_OF_N, RL = "best of n", "RL"


def fit(kl_T: Sequence[float], gain_T: Sequence[float], form: str) -> tuple[float, float]:
    """(alpha, beta) by least squares; both are linear in the gain. Points at the base are left out.

    NaN where fewer than two points are left.
    """
    d_T = np.sqrt(np.maximum(np.asarray(kl_T, float), 0))
    kept = d_T > 1e-3
    if kept.sum() < 2:
        return math.nan, math.nan
    d_T, gain_T = d_T[kept], np.asarray(gain_T, float)[kept]
    second = -(d_T**2) if form == BEST_OF_N else -d_T * np.log(d_T)
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d_T, second], 1), gain_T, rcond=None)
    return float(alpha), float(beta)


def value(alpha: float, beta: float, kl: float, form: str) -> float:
    """The gain that a fit says at a divergence."""
    d = math.sqrt(kl)
    return d * (alpha - beta * (d if form == BEST_OF_N else math.log(d) if d else 0.0))


def top(alpha: float, beta: float, form: str) -> float:
    """The divergence in nats at which a fit is highest; NaN where it rises for ever."""
    if not (alpha > 0 and beta > 0):
        return math.nan
    try:
        d = alpha / (2 * beta) if form == BEST_OF_N else math.exp(alpha / beta - 1)
    except OverflowError:
        return math.nan
    return d * d


def with_intervals(
    kl_ST: Sequence[Sequence[float]], gain_STG: Sequence[np.ndarray], form: str,
    draws: int, confidence: float, model_S: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """{'alpha', 'beta': {'value', 'low', 'high'}, 'top': nats}: one fit through all runs' points;
    intervals from drawing models (with all of their runs) and problems with replacement, both at
    once.

    Args:
        model_S: each run's model.
        gain_STG: [T, G] of each run, over the base's gold on the same problems.
    """
    problems, rng = gain_STG[0].shape[1], np.random.default_rng(0)

    def once(runs: Sequence[int], rows: Any) -> tuple[float, float]:
        kl = np.concatenate([kl_ST[s] for s in runs])
        gain = np.concatenate([gain_STG[s][:, rows].mean(1) for s in runs])
        return fit(kl, gain, form)

    whole = once(range(len(kl_ST)), slice(None))
    own = [np.flatnonzero(np.asarray(model_S) == model) for model in sorted(set(model_S))]
    drawn = np.array(
        [
            once(
                np.concatenate([own[m] for m in rng.integers(0, len(own), len(own))]),
                rng.integers(0, problems, problems),
            )
            for _ in range(draws)
        ]
    )
    tail = 50 * (1 - confidence)
    found: dict[str, Any] = {"top": top(*whole, form)}
    for place, name in enumerate(("alpha", "beta")):
        low, high = np.nanpercentile(drawn[:, place], (tail, 100 - tail))
        found[name] = {"value": whole[place], "low": float(low), "high": float(high)}
    return found
