"""MER-Bench (MultiEditReward-Bench, of SpatialReward): 2, 3 or 4 edits of a picture, best first.

On disk: the Hugging Face parquet, or JSON lists and lines of its fields: pair_id, label (a category
of edits), instruction, original_image, edited_images. Predictions: one object {pair_id: {'scores',
'pred_rank', ...}}, what its `calculate_accuracy.py` reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from jrm_jax.data.schema import Text
from jrm_jax.errors import UserError
from jrm_jax.evaluation import files
from jrm_jax.evaluation.cases import (
    Benchmark,
    Case,
    Comparison,
    Issues,
    Judged,
    digest,
    note_duplicates,
    tell_apart,
)
from jrm_jax.evaluation.metrics import Metric, accuracy, sections, verdicts
from jrm_jax.evaluation.predictions import Collected

SIZES = (2, 3, 4)
PROTOCOL = (
    "The first edit is the best, the last the worst. Exact match: a group is right if its whole"
    " order is; equal scores are wrong. The other official numbers (calculate_accuracy.py) rank"
    " equal scores the first first."
)


def read(path: str, issues: Issues, images: files.Images | None = None) -> Benchmark:
    """
    Raises:
        UserError: no such files, or a row that lacks a field.
    """
    cases = [_case(row) for row in files.read_rows(path, images)]
    note_duplicates(issues, [(case.id, "") for case in cases])
    return Benchmark("mer_bench", tell_apart(cases), issues, PROTOCOL)


def _case(row: files.Row) -> Case:
    edits = row.field("edited_images", (list, tuple))
    size = len(edits)
    if size not in SIZES:
        raise UserError(f"{row.where}: 'edited_images' has {size} entries, must be 2, 3 or 4")
    # the script that asks paid services reads them as {'edited_image': path, 'quality': ..}
    edits = [e.get("edited_image", e) if isinstance(e, dict) else e for e in edits]
    instruction = str(row.field("instruction"))
    source = row.picture(row.field("original_image"), "original_image")
    label = str(row.fields.get("label") or "")
    return Case(
        id=str(row.field("pair_id")),
        group=digest(instruction, source.key),
        section=f"{size}-Pair",
        subtask=label,
        prompt=(Text(instruction), source),
        candidates=tuple((row.picture(edit, f"edit {i}"),) for i, edit in enumerate(edits)),
        comparisons=tuple(
            Comparison(f"{i}-{j}", i, j, 1) for i, j in combinations(range(size), 2)
        ),
        fields={"instruction": instruction, "label": label},
    )


# Predictions


def write(judged: Sequence[Judged], out: Path, model: str, threshold: float = 0.0) -> None:
    """results.json, in the fields of the official script."""
    content = {}
    for case, answer in judged:
        order, places = _order(answer.scores), list(range(len(answer.scores)))
        content[case.id] = {
            "pair_id": case.given or case.id, "pair_type": len(places), **case.fields,
            "gt_qualities": [len(places) - place for place in places], "num_images": len(places),
            "scores": list(answer.scores), "pred_rank": order, "gt_rank": places,
            "is_correct": order == places, "model": model,
        }  # fmt: skip
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (out / "results.json").write_text(text, encoding="utf-8")


def _order(scores: Sequence[float]) -> list[int]:
    """Edits from best to worst; of equal ones the first first."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def read_predictions(benchmark: Benchmark, paths: Sequence[str]) -> list[Judged]:
    """
    Raises:
        UserError: files of another shape.
    """
    found = Collected(benchmark)
    for path in (file for given in paths for file in files.find(given, (".json",))):
        content = files.read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path} must be an object {{pair_id: {{'scores': [..]}}}}")
        for name, entry in content.items():
            scores = entry.get("scores") if isinstance(entry, dict) else entry
            found.add(name, scores, f"{path}: {name}")
    return found.close()


# Numbers: of one group's order, best to worst, against 0, 1, 2, ..


def _tau(order: Sequence[int]) -> float:
    pairs = list(combinations(order, 2))
    return sum(1 if a < b else -1 for a, b in pairs) / len(pairs)


def _rho(order: Sequence[int]) -> float:
    size = len(order)
    gaps = sum((found - wanted) ** 2 for wanted, found in enumerate(order))
    return 1 - 6 * gaps / (size * (size**2 - 1))


def _ndcg(order: Sequence[int]) -> float:
    """As published: `order[i]` is read as the place of edit i, though it is the edit at place i."""
    gains = len(order) - np.arange(len(order))
    places = np.asarray(order)
    ideal = gains / np.log2(np.arange(len(order)) + 2)
    return float((gains / np.log2(places + 2)).sum() / ideal.sum())


OFFICIAL: dict[str, Callable[[Sequence[int]], float]] = {
    "Kendall's tau": _tau,
    "NDCG": _ndcg,
    "Spearman's rho": _rho,
    "best edit first": lambda order: float(order[0] == 0),
    "best two first": lambda order: float(set(order[:2]) == {0, 1}),
}
BY_SIZE = ("Kendall's tau", "NDCG")


def measure(benchmark: Benchmark, judged: Sequence[Judged], threshold: float) -> list[Metric]:
    """Exact match by size and by category, the other official numbers, and pair accuracy."""
    metrics: list[Metric] = []
    parts = sections(benchmark.cases, lambda case: case.section)
    found = sections(judged, lambda one: one.case.section)
    groups = {"Overall": (judged, benchmark.cases)}
    groups |= {name: (found.get(name, []), parts[name]) for name in sorted(parts)}
    for name, (items, cases) in groups.items():
        metrics.append(_exact(name, items, len(cases), headline=True))
        count = sum(len(case.comparisons) for case in cases)
        metrics.append(
            accuracy(name, "pair accuracy", verdicts(items), total=count, headline=True)
        )
        for words in OFFICIAL if name == "Overall" else BY_SIZE:
            values = [OFFICIAL[words](_order(one.answer.scores)) for one in items]
            metrics.append(_of_groups(name, words, items, values, len(cases)))
    for label, cases in sorted(sections(benchmark.cases, lambda case: case.subtask).items()):
        items = [one for one in judged if one.case.subtask == label]
        metrics.append(_exact(f"Overall / {label}", items, len(cases)))
    return metrics


def _exact(section: str, items: Sequence[Judged], total: int, **more: Any) -> Metric:
    right = [
        len(set(scores)) == len(scores) and _order(scores) == list(range(len(scores)))
        for scores in (one.answer.scores for one in items)
    ]
    return _of_groups(section, "exact match", items, list(map(float, right)), total, **more)


def _of_groups(
    section: str, name: str, items: Sequence[Judged], values: list[float], total: int, **more: Any
) -> Metric:
    return Metric(
        section, name, values, [one.case.group for one in items], [one.case.id for one in items],
        total=total, official=True, **more,
    )  # fmt: skip
