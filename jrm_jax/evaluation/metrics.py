"""From answers to numbers: verdicts of comparisons, full orders, and the rows of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jrm_jax.evaluation.cases import Comparison, Judged
from jrm_jax.evaluation.statistics import DRAWS, Statistic, bootstrap


class Metric(NamedTuple):
    """One number before it is computed.

    values: [N] (1 right, 0 wrong; the mean is taken) or [N, F] with a `statistic`.
    groups, ids: of the judgements. total: how many there should be, where some are missing.
    official: the benchmark's own published rule; else ours. note: what a reader must know.
    headline: shown first, and compared by `--compare`.
    """

    section: str
    name: str
    values: Sequence[Any]
    groups: Sequence[str]
    ids: Sequence[str]
    statistic: Statistic | None = None
    total: int | None = None
    official: bool = False
    note: str = ""
    headline: bool = False


def to_row(metric: Metric, draws: int = DRAWS) -> dict[str, Any]:
    """A row of the table in JSON types; NaN becomes None."""
    spread = bootstrap(np.asarray(metric.values, float), metric.groups, metric.statistic, draws)
    count = len(metric.values)
    row = {
        "section": metric.section,
        "metric": metric.name,
        "value": _finite(spread.value),
        "low": _finite(spread.low),
        "high": _finite(spread.high),
        "count": count,
        "total": count if metric.total is None else metric.total,
        "groups": spread.groups,
        "official": metric.official,
        "headline": metric.headline,
        "note": metric.note,
    }
    if metric.statistic is None:
        row["right"] = float(math.fsum(np.asarray(metric.values, float))) if count else 0.0
    return row


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def point_value(metric: Metric) -> float:
    """The number alone."""
    values = np.asarray(metric.values, float)
    if metric.statistic is not None:
        return float(metric.statistic(values)) if len(values) else math.nan
    return math.fsum(values) / len(values) if len(values) else math.nan


class Verdict(NamedTuple):
    """What was said of one comparison: said and label are 1, 0 or -1; gap is None for votes."""

    judged: Judged
    comparison: Comparison
    said: int
    gap: float | None

    @property
    def right(self) -> float:
        return float(self.said == self.comparison.label)


def verdicts(judged: Iterable[Judged], threshold: float = 0.0) -> list[Verdict]:
    """One per comparison and vote. |gap| <= threshold says tie."""
    found = []
    for one in judged:
        scores = one.answer.scores
        for comparison in one.case.comparisons:
            if scores is not None:
                gap = scores[comparison.first] - scores[comparison.second]
                said = 0 if abs(gap) <= threshold else (1 if gap > 0 else -1)
                found.append(Verdict(one, comparison, said, gap))
            else:
                votes = (one.answer.votes or {}).get(comparison.id, ())
                found += [Verdict(one, comparison, vote, None) for vote in votes]
    return found


def sections(items: Iterable[Any], key: Callable[[Any], str]) -> dict[str, list]:
    """Items by key, in order of appearance; '' is left out."""
    found: dict[str, list] = {}
    for item in items:
        name = key(item)
        if name:
            found.setdefault(name, []).append(item)
    return found


def accuracy(section: str, name: str, items: Sequence[Verdict], **more: Any) -> Metric:
    """Share of verdicts that agree with people's."""
    return Metric(
        section,
        name,
        [item.right for item in items],
        [item.judged.case.group for item in items],
        [f"{item.judged.case.id}/{item.comparison.id}" for item in items],
        **more,
    )


def strict(items: Sequence[Verdict]) -> list[Verdict]:
    """Those that are no tie of people's; one that cannot be read is wrong whatever is said."""
    return [item for item in items if item.comparison.label]


def decided(items: Sequence[Verdict]) -> list[Verdict]:
    """Those that people decided."""
    return [item for item in items if item.comparison.label in (1, -1)]
