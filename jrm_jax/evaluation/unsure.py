"""Whether a model knows how unsure it is: its deviations against how often people agree with it.

Letters: N decided pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jrm_jax.evaluation.cases import Judged
from jrm_jax.evaluation.metrics import Verdict, strict, verdicts
from jrm_jax.evaluation.report import main_dimension
from jrm_jax.evaluation.statistics import calibration
from jrm_jax.gaussian import log_expected_sigmoid

FEWEST = 20  # pairs, for halves of them


def scored_pairs(judged: Sequence[Judged]) -> list[Verdict]:
    """Pairs that people decided, by scores."""
    return [v for v in strict(verdicts(judged)) if v.gap is not None]


def deviations(pairs: Sequence[Verdict]) -> np.ndarray | None:
    """float [N]: of the difference of both scores; None where scores have no deviation."""
    if not pairs or any(v.judged.answer.deviations is None for v in pairs):
        return None
    return np.array([
        np.hypot(*(v.judged.answer.deviations[i] for i in v.comparison[1:3])) for v in pairs
    ])  # fmt: skip


def calibrated(pairs: Sequence[Verdict], deviation_N: np.ndarray | None) -> dict[str, Any]:
    """`statistics.calibration` of the chance that people prefer what scores higher, and log_loss:
    the mean -log of the chance that the model gives to people's choice.

    deviation_N: of the differences; None: scores count as exact.
    """
    gap_N = np.array([v.gap for v in pairs], np.float32)
    right_N = np.array([0.5 if v.gap == 0 else v.right for v in pairs])
    spread_N = np.zeros_like(gap_N) if deviation_N is None else deviation_N.astype(np.float32)
    toward_N = np.array([v.gap * v.comparison.label for v in pairs], np.float32)
    found = calibration(np.exp(log_expected_sigmoid(np.abs(gap_N), spread_N)), right_N)
    losses_N = -np.asarray(log_expected_sigmoid(toward_N, spread_N), float)
    return found | {"log_loss": float(losses_N.mean()) if len(pairs) else None}


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
        _row(name, "{:.3f} with the deviations, {:.3f} without", [b[key] for b in both.values()],
             meaning)
        for name, key, meaning in (
            ("calibration error", "error", "mean gap between the predicted and the observed chance"
             " that people prefer what scores higher; 0 is perfect"),
            ("Brier score", "brier", "mean squared error of that chance; always one half: 0.25"),
            ("log loss", "log_loss", "mean -log of the chance given to people's choice; always"
             " one half: 0.693"),
        )
    ]  # fmt: skip
    numbers: dict[str, Any] = {"median": float(np.median(deviation_N))}
    rows.append(_row("deviation of a difference", "{:.3f}", [numbers["median"]],
                     "median, in units of the score"))  # fmt: skip
    if len(pairs) >= FEWEST:
        right_N = np.array([v.right for v in pairs])
        surer_N = np.argsort(np.argsort(deviation_N, kind="stable")) < len(pairs) // 2
        halves = [float(right_N[part].mean()) for part in (surer_N, ~surer_N)]
        numbers |= {"accuracy_surer": halves[0], "accuracy_less_sure": halves[1]}
        rows.append(_row("accuracy by deviation", "{:.3f} and {:.3f}", halves,
                         "of the half of the pairs with smaller deviations and of the other half;"
                         " equal: the deviations say nothing about mistakes"))  # fmt: skip
    names = ", ".join(dict.fromkeys(one.case.dimension for one in asked))
    about = f"{len(pairs):,} pairs that people decided ({names})."
    return {"about": about, "rows": rows, **both, **numbers}


def _row(name: str, words: str, values: Sequence[float], meaning: str) -> dict[str, str]:
    return {"name": name, "value": words.format(*values), "meaning": meaning}
