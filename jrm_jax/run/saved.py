"""Which checkpoints a folder holds: by their names, and by the two small files that tell the rank
and what it was. The arrays are `checkpoint`'s business."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jrm_jax.errors import UserError

RANK = "rank"  # the number by which checkpoints are ranked; always finite
WORST = -1e30
METRICS, META = "metrics/metrics", "meta/metadata"  # Orbax's files in a checkpoint


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending: those that have their final name."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal())


def best_of(folder: Path, steps: Sequence[int]) -> int | None:
    """The step with the best finite metric, else None. (Orbax's own falls back to the latest.)"""
    ranks = {step: rank_of(folder / str(step)) for step in steps}
    ranked = {step: rank for step, rank in ranks.items() if rank is not None and rank > WORST}
    return max(ranked, key=lambda step: (ranked[step], -step)) if ranked else None


def rank_of(checkpoint: Path) -> float | None:
    """None where it cannot be read."""
    try:
        return float(json.loads((checkpoint / METRICS).read_text())[RANK])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def pick(folder: Path, which: int | str) -> int:
    """The step meant by a number, 'best' (without ranks: the latest) or 'latest'.

    Raises:
        UserError: there is no such checkpoint.
    """
    steps = complete_steps(folder)
    if not steps:
        raise UserError(f"{folder}: there is no checkpoint yet")
    if which == "latest":
        return steps[-1]
    if which == "best":
        best = best_of(folder, steps)
        return steps[-1] if best is None else best
    if which not in steps:
        raise UserError(f"{folder}: no step {which}; there are {', '.join(map(str, steps))}")
    return int(which)
