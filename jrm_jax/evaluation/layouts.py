"""The benchmarks by name: how each is read, how predictions are written and read, what counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jrm_jax.evaluation import (
    edits,
    editscore,
    mer,
    mmrb2,
    preferences,
    tiger,
    tiger_metrics,
    tiger_predictions,
)


class Layout(NamedTuple):
    """read(path, issues, images) -> Benchmark; read_predictions(benchmark, paths) -> [Judged];
    measure(benchmark, judged, threshold) -> [Metric]; write(judged, folder, model, threshold).

    download: the commands that bring the benchmark's complete files to a disk, '' where there are
    none. needs_data: False where the predictions alone tell what is right.
    """

    read: Callable
    read_predictions: Callable
    measure: Callable
    write: Callable
    download: str = ""
    needs_data: bool = True


def _hub(name: str, more: str = "") -> str:
    return f"hf download {name} --repo-type dataset{more} --local-dir DIR"


LAYOUTS = {
    "mmrb2": Layout(
        mmrb2.read, mmrb2.read_predictions, mmrb2.measure, mmrb2.write,
        "git clone https://github.com/facebookresearch/MMRB2 && cd MMRB2/benchmark"
        " && python build_from_hf.py --output-dir DIR",
    ),
    "editreward_bench": Layout(
        tiger.read, tiger_predictions.read_predictions, tiger_metrics.measure,
        tiger_predictions.write, _hub("TIGER-Lab/EditReward-Bench"),
    ),
    "editscore_bench": Layout(
        editscore.read, editscore.read_predictions, editscore.measure, editscore.write,
        _hub("EditScore/EditReward-Bench"), needs_data=False,
    ),
    "mer_bench": Layout(
        mer.read, mer.read_predictions, mer.measure, mer.write, _hub("SpatialReward/MER-Bench"),
    ),
    "genai_bench": Layout(
        edits.reader("genai_bench", ("pair", "vote")),
        edits.read_predictions, edits.measure, edits.write,
        _hub("TIGER-Lab/GenAI-Bench", " --include 'image_edition/test_v1-*'"),
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
