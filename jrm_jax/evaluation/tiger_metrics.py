"""Numbers of TIGER-Lab's EditReward-Bench: by our rule, and by the published one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from jrm_jax.evaluation.cases import Benchmark, Case, Judged
from jrm_jax.evaluation.metrics import Metric, accuracy, sections, strict, verdicts
from jrm_jax.evaluation.statistics import accuracy_with_ties, tune_threshold
from jrm_jax.evaluation.tiger import LETTERS, SIZES

OFFICIAL_TIES = ("A=B=Good", "A=B=Bad")
TUNED = "threshold for ties tuned on these very groups, as published"


def measure(benchmark: Benchmark, judged: Sequence[Judged], threshold: float) -> list[Metric]:
    """Strict and pairwise accuracies; the published ones only where there are scores of groups."""
    wanted = sections(benchmark.cases, lambda case: case.section)
    found = sections(judged, lambda one: one.case.section)
    parts = [name for name in SIZES.values() if name in wanted]
    fixed = f"ties where scores differ by <= {threshold:g}"
    metrics = []
    everything = [one for name in parts for one in found.get(name, [])]
    groups = {"Overall": everything, **{name: found.get(name, []) for name in parts}}
    totals = {"Overall": len(benchmark.cases), **{name: len(wanted[name]) for name in parts}}
    for name, items in groups.items():
        rights = [float(_right(one, threshold)) for one in items]
        metrics.append(
            _of_groups(name, "strict accuracy", items, rights, total=totals[name],
                       headline=True, note=fixed)
        )  # fmt: skip
        pairs = verdicts(items, threshold)
        count = sum(len(case.comparisons) for case in wanted.get(name, benchmark.cases))
        metrics.append(
            accuracy(name, "pair accuracy, three answers", pairs, total=count, note=fixed)
        )
        decided = strict(verdicts(items))
        metrics.append(accuracy(name, "pair accuracy, people's ties left out", decided))
    if everything and all(one.answer.scores and "vote" in one.case.fields for one in everything):
        metrics += _published(everything, parts, totals)
    return metrics


def _of_groups(section: str, name: str, items: Sequence[Judged], values, **more) -> Metric:
    return Metric(
        section, name, values, [one.case.group for one in items], [one.case.id for one in items],
        **more,
    )  # fmt: skip


def _right(one: Judged, threshold: float) -> bool:
    """Every comparison right. Ties exist between two candidates only."""
    case = one.case
    size = next(size for size, name in SIZES.items() if name == case.section)
    found = verdicts([one], threshold if size == 2 else 0.0)
    pairs = {item.comparison.id.split("#")[0] for item in found}
    complete = len(pairs) == size * (size - 1) // 2
    return complete and all(item.right for item in found)


# The published rule, number by number


def _published(
    items: Sequence[Judged], parts: Sequence[str], totals: dict[str, int]
) -> list[Metric]:
    metrics, rights = [], []
    for name in parts:
        members = [one for one in items if one.case.section == name]
        labels, gaps, groups, ids = _pairs(members)
        values = np.stack([labels, gaps], axis=1) if len(labels) else np.zeros((0, 2))
        tuned = tuned_threshold(members) if name == SIZES[2] else 0.0
        statistic = _tuned if name == SIZES[2] else _without_ties
        note = f"{TUNED}: {tuned:.6g}" if name == SIZES[2] else ""
        metrics.append(
            Metric(name, "pair accuracy, published rule", values, groups, ids, statistic,
                   official=True, note=note)
        )  # fmt: skip
        hits = [float(official_right(one, tuned)) for one in members]
        rights += hits
        metrics.append(
            _of_groups(name, "strict accuracy, published rule", members, hits, official=True,
                       total=totals[name], note=note)
        )  # fmt: skip
    ordered = [one for name in parts for one in items if one.case.section == name]
    labels, gaps, groups, ids = _pairs(ordered)
    overall = [
        _of_groups("Overall", "strict accuracy, published rule", ordered, rights, official=True,
                   total=totals["Overall"], note=TUNED),
        Metric("Overall", "pair accuracy, published rule", np.stack([labels, gaps], axis=1), groups,
               ids, _tuned, official=True, note=TUNED),
    ]  # fmt: skip
    return overall + metrics


def _pairs(items: Sequence[Judged]) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    labels, gaps, groups, ids = [], [], [], []
    for case, answer in items:
        scores = answer.scores
        for i, j in combinations(range(len(scores)), 2):
            labels.append(_official_label(case, i, j))
            gaps.append(scores[i] - scores[j])
            groups.append(case.group)
            ids.append(f"{case.id}/{i}-{j}")
    return np.asarray(labels, float), np.asarray(gaps, float), groups, ids


def tuned_threshold(pairs: Sequence[Judged]) -> float:
    """For ties: the one that is best on these groups of two edits, by the published rule."""
    labels, gaps, _, _ = _pairs(pairs)
    return tune_threshold(labels, gaps)[0]


def _official_ranking(case: Case) -> str:
    """'' where there is none, or no text."""
    text = case.fields["vote"].get("ranking")
    return text if isinstance(text, str) else ""


def _official_label(case: Case, i: int, j: int) -> int:
    """By the place of the letters in the text: 'A=B' and 'A=B=Good ' so read as A above B."""
    text = _official_ranking(case)
    if text in ("B>A", "A<B"):
        return -1
    if text in OFFICIAL_TIES:
        return 0
    first, second = text.find(LETTERS[i]), text.find(LETTERS[j])
    return 0 if -1 in (first, second) else (1 if first < second else -1)


def official_right(one: Judged, tuned: float) -> bool:
    """A group's strict accuracy as published: blanks in a ranking make it unreadable, and 'A<B<C'
    has A first. Equal scores are ranked the last first."""
    scores, text = one.answer.scores, _official_ranking(one.case)
    if text in OFFICIAL_TIES:
        return abs(scores[0] - scores[1]) <= tuned
    if "=" in text:
        return False
    letters = "BA" if text == "A<B" else text.replace(">", "").replace("<", "")
    return list(letters) == [LETTERS[i] for i in np.argsort(scores)[::-1]]


def _tuned(values_N2: np.ndarray) -> float:
    return tune_threshold(values_N2[:, 0], values_N2[:, 1])[1]


def _without_ties(values_N2: np.ndarray) -> float:
    decided = values_N2[values_N2[:, 0] != 0]
    return accuracy_with_ties(decided[:, 0], decided[:, 1], -1.0)
