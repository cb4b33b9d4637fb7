"""What a run's checkpoints are ranked by on `valid`."""

from __future__ import annotations

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


def best_metric(config: ConfigDict, judged: bool = True) -> str:
    """What `valid` is ranked by: a key of METRICS; `judged`: whether it has labels."""
    if config.best_metric != "auto":
        return config.best_metric
    ranks, loss = config.loss.preference_weight, config.loss
    if ranks and not judged and loss.teacher_weight:
        return "-teacher"
    return "pair_accuracy" if ranks and (judged or not loss.language_weight) else "-language"
