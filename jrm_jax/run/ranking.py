"""What a run's checkpoints are ranked by on `valid`."""

from __future__ import annotations

from collections.abc import Collection

from ml_collections import ConfigDict

# What `valid` can be ranked by -> the loss that must be on for it to be measured.
METRICS = {
    "pair_accuracy": "preference_weight",
    "-preference": "preference_weight",
    "-centering": "centering_weight",
    "-language": "language_weight",
    "-words": "words_weight",
    "-facts": "facts_weight",
    "-teacher": "teacher_weight",
}


def best_metric(config: ConfigDict, measured: Collection[str] = tuple(METRICS)) -> str:
    """What `valid` is ranked by: a key of METRICS; `measured`: those for which its groups hold
    something."""
    if config.best_metric != "auto":
        return config.best_metric
    on = [m for m in ("pair_accuracy", "-teacher", "-language") if config.loss[METRICS[m]]]
    return next((metric for metric in on if metric in measured), on[0])
