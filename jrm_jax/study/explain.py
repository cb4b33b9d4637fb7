"""The part of the study's page that looks for reasons: changes tried, and what they did inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jrm_jax.study.cells import ARMS, CHANGES
from jrm_jax.study.tables import MISSING, absent, number, points, share, table
from jrm_jax.study.why import TOPICS

Numbers = Mapping[str, Any]


def changes(numbers: Numbers) -> list[str]:
    """What was tried after the first results, and what it did to the score."""
    rows = []
    for name in CHANGES:
        found = numbers["arms"][name]
        cells_of = [absent(numbers, name)] * 4
        if found:
            cells_of = [
                share(found["test"]), share(found["hard"]), points(found["gain"]["hard"]),
                points(found["over_joint"]),
            ]  # fmt: skip
        rows.append((f"{name}: {ARMS[name].words}", ARMS[name].idea, *cells_of))
    head = ("change", "idea", "test", "hard", "points over discriminative, hard",
            "points over joint, hard")  # fmt: skip
    return ["## Changes tried", "", *table(head, rows)]


def reasons(numbers: Numbers) -> list[str]:
    """What the reward token's state says, and which way the two losses pull."""
    rows = []
    for name, found in numbers["arms"].items():
        why = found["why"] if found else None
        if not why or not why["seeds"]:
            continue
        # gradients were weighted as at the start; of a loss that fades nothing is left at the end
        fades = ARMS[name].changes.get("loss.language_end", 1.0) != 1.0
        says, pulls = why["says"], why["pulls"]
        rows.append(
            (
                name,
                str(why["seeds"]),
                *(number(says.get(topic), ".3f") for topic in TOPICS),
                *(
                    "-" if fades else number(pulls.get(key), ".2f")
                    for key in ("ratio", "cosine", "kept")
                ),
                _course(why["training"]),
            )
        )
    if not rows:
        return ["## Reasons", "", f"All {MISSING}.", ""]
    head = ("arm", "seeds", *(f"reads {topic}" for topic in TOPICS), "language / preference",
            "cosine", "step kept", "language loss, nats")  # fmt: skip
    return [
        "## Reasons",
        "",
        "Reads: mean area under the ROC curve (0.5 is chance) of linear readers of the facts that "
        "critiques state, from the reward token's final state, at the last step; learnt on half of "
        "the groups of `test`, read on the others. Language / preference: norms of the two losses' "
        "weighted gradients in the backbone's kernels on 64 groups of `valid`; cosine between "
        "them; step kept: cosine between Muon's step for both and its step for preferences alone; "
        "not of an arm whose language loss has faded by the last step. "
        "Language loss of training: in the first ten steps, around step 100, in the last ten. "
        "Cells from before these measures were taken are not in the table.",
        "",
        *table(head, rows),
    ]


def _course(training: Sequence[Sequence[float | None]]) -> str:
    """'14.3 / 1.2 / 0.4'; '-' without a language loss."""
    losses = {step: language for step, _, language in training if language is not None}
    if not losses:
        return "-"
    middle = min(losses, key=lambda step: abs(step - 100))
    shown = (losses[min(losses)], losses[middle], losses[max(losses)])
    return " / ".join(f"{loss:.1f}" if loss >= 10 else f"{loss:.2f}" for loss in shown)
