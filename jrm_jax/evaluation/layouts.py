"""The benchmarks by name: how each is read, how predictions are written and read, what counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jrm_jax.evaluation import (
    edits,
    editscore,
    mmrb2,
    preferences,
    tiger,
    tiger_metrics,
)


class Layout(NamedTuple):
    """read(path, issues) -> Benchmark; read_predictions(benchmark, paths) -> [Judged];
    measure(benchmark, judged, threshold) -> [Metric]; write(judged, folder, model).

    needs_data: False where the predictions alone tell what is right.
    """

    read: Callable
    read_predictions: Callable
    measure: Callable
    write: Callable
    needs_data: bool = True


LAYOUTS = {
    "mmrb2": Layout(mmrb2.read, mmrb2.read_predictions, mmrb2.measure, mmrb2.write),
    "editreward_bench": Layout(
        tiger.read, tiger.read_predictions, tiger_metrics.measure, tiger.write
    ),
    "editscore_bench": Layout(
        editscore.read, editscore.read_predictions, editscore.measure, editscore.write,
        needs_data=False,
    ),
    "genai_bench": Layout(
        edits.reader("genai_bench", ("pair", "vote")),
        edits.read_predictions, edits.measure, edits.write,
    ),
    "aurora_bench": Layout(
        edits.reader("aurora_bench", ("pair", "aurora")),
        edits.read_predictions, edits.measure, edits.write,
    ),
    "imagenhub": Layout(
        edits.reader("imagenhub", ("imagenhub",)),
        edits.read_predictions, edits.measure, edits.write,
    ),
    "jsonl": Layout(
        preferences.read_jsonl, preferences.read_predictions, preferences.measure,
        preferences.write,
    ),
    "world": Layout(
        preferences.read_jsonl, preferences.read_predictions, preferences.measure,
        preferences.write,
    ),
}  # fmt: skip
