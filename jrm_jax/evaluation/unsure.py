"""Whether a model knows how unsure it is: its deviations against how often people agree with it.

Letters: N decided pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jrm_jax.evaluation.cases import Judged
from jrm_jax.evaluation.metrics import Verdict, decided, verdicts
from jrm_jax.evaluation.report import main_dimension
from jrm_jax.evaluation.statistics import (
    bootstrap,
    bootstrap_sums,
    calibration,
    calibration_interval,
)
from jrm_jax.gaussian import log_chances

FEWEST = 20  # pairs, for halves of them


def scored_pairs(judged: Sequence[Judged]) -> list[Verdict]:
    """Pairs that people decided, by scores."""
    return [v for v in decided(verdicts(judged)) if v.gap is not None]


def deviations(pairs: Sequence[Verdict]) -> np.ndarray | None:
    """float [N]: of the difference of both scores; None where scores have no deviation."""
    if not pairs or any(v.judged.answer.deviations is None for v in pairs):
        return None
    return np.array([
        np.hypot(*(v.judged.answer.deviations[i] for i in v.comparison[1:3])) for v in pairs
    ])  # fmt: skip


def calibrated(pairs: Sequence[Verdict], deviation_N: np.ndarray | None) -> dict[str, Any]:
    """`statistics.calibration` of the chance that people prefer what scores higher, and log_loss:
    the mean -log of the chance that the model gives to people's choice. Equal scores count half.
    intervals: [low, high] of `error`, `brier` and `log_loss`, 95 %, over groups.

    deviation_N: of the differences; None: scores count as exact.
    """
    gap_N = np.array([v.gap for v in pairs], np.float32)
    right_N = _right(pairs)
    spread_N = np.zeros_like(gap_N) if deviation_N is None else deviation_N.astype(np.float32)
    toward_N = np.array([v.gap * v.comparison.label for v in pairs], np.float32)
    chance_N = np.exp(log_chances(np.abs(gap_N), spread_N))
    losses_N, groups = -log_chances(toward_N, spread_N).astype(float), _groups(pairs)
    intervals = {
        "error": calibration_interval(chance_N, right_N, groups),
        "brier": bootstrap((chance_N - right_N) ** 2, groups),
        "log_loss": bootstrap(losses_N, groups),
    }
    return calibration(chance_N, right_N) | {
        "log_loss": float(losses_N.mean()) if len(pairs) else None,
        "intervals": {name: [one.low, one.high] for name, one in intervals.items()},
    }


def _right(pairs: Sequence[Verdict]) -> np.ndarray:
    """float [N]: 1 right, 0 wrong; equal scores are half of each."""
    return np.array([0.5 if v.gap == 0 else v.right for v in pairs])


def _groups(pairs: Sequence[Verdict]) -> list[str]:
    return [v.judged.case.group for v in pairs]


def unsure(judged: Sequence[Judged], own: Sequence[str] = ()) -> dict[str, Any] | None:
    """Rows {"name", "value", "meaning"} and the numbers behind them; None where a pair has none.

    own: the model's reward dimensions; pairs of these count, or the main ones where it has none.
    """
    asked = [one for one in judged if one.case.dimension in own]
    asked = asked or (main_dimension(judged) if judged else [])
    pairs = scored_pairs(asked)
    deviation_N = deviations(pairs)
    if deviation_N is None:
        return None
    both = {"with": calibrated(pairs, deviation_N), "without": calibrated(pairs, None)}
    rows = [
        _row(name, "{} with the deviations, {} without",
             [told(b[key], b["intervals"][key]) for b in both.values()], meaning)
        for name, key, meaning in (
            ("calibration error", "error", "mean gap between the predicted and the observed chance"
             " that people prefer what scores higher; 0 is perfect"),
            ("Brier score", "brier", "mean squared error of that chance; always one half: 0.25"),
            ("log loss", "log_loss", "mean -log of the chance given to people's choice; always"
             " one half: 0.693"),
        )
    ]  # fmt: skip
    groups = _groups(pairs)
    middle = bootstrap(deviation_N, groups, np.median)
    numbers: dict[str, Any] = {"median": middle.value}
    rows.append(_row("deviation of a difference", "{}", [told(middle.value, middle[1:3])],
                     "median, in units of the score"))  # fmt: skip
    if len(pairs) >= FEWEST:
        share_N = surer_half(deviation_N)
        halves = [
            bootstrap_sums(np.stack([share * _right(pairs), share], axis=1), groups,
                           lambda sums: sums[..., 0] / sums[..., 1])
            for share in (share_N, 1 - share_N)
        ]  # fmt: skip
        for name, half in zip(("surer", "less_sure"), halves, strict=True):
            numbers |= {f"accuracy_{name}": half.value, f"accuracy_{name}_interval": half[1:3]}
        rows.append(_row("accuracy by deviation", "{} and {}",
                         [told(half.value, half[1:3]) for half in halves],
                         "of the half of the pairs with smaller deviations and of the other half;"
                         " equal: the deviations say nothing about mistakes"))  # fmt: skip
    names = ", ".join(dict.fromkeys(one.case.dimension for one in asked))
    about = f"{len(pairs):,} pairs that people decided ({names})."
    return {"about": about, "rows": rows, **both, **numbers}


def surer_half(deviation_N: np.ndarray) -> np.ndarray:
    """float [N]: the part of each pair that belongs to the half with smaller deviations. Pairs of
    one deviation belong to it alike, whatever their order; where all are equal, by one half."""
    _, place_N, counts = np.unique(deviation_N, return_inverse=True, return_counts=True)
    before = np.cumsum(counts) - counts
    return np.clip((len(deviation_N) / 2 - before) / counts, 0, 1)[place_N]


def told(value: float, interval: Sequence[float]) -> str:
    """'0.812 [0.790, 0.833]'; without the interval where there is none."""
    low, high = interval
    return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else "")


def _row(name: str, words: str, values: Sequence[str], meaning: str) -> dict[str, str]:
    return {"name": name, "value": words.format(*values), "meaning": meaning}
