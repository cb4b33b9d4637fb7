"""Which checkpoints a folder holds: by their names, and by the two small files that tell the rank
and what it was; and what becomes of damaged ones. The arrays are `checkpoint`'s business."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from jrm_jax.errors import UserError
from jrm_jax.shell import disk

RANK = "rank"  # the number by which checkpoints are ranked; always finite
WORST = -1e30
METRICS, META = "metrics/metrics", "meta/metadata"  # Orbax's files in a checkpoint
UNFINISHED = "*.orbax-checkpoint-tmp*"
DAMAGED = ".damaged"


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending: those that have their final name."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal())


def ranked(folder: Path, steps: Sequence[int]) -> list[int]:
    """The steps: by their metrics, the best first; then, the latest first, those without a finite
    one. The first is what 'best' means."""
    ranks = {step: rank_of(folder / str(step)) for step in steps}
    measured = {step: rank for step, rank in ranks.items() if rank is not None and rank > WORST}
    first = sorted(measured, key=lambda step: (-measured[step], step))
    return first + sorted(set(steps) - set(first), reverse=True)


def best_rank(folder: Path, steps: Sequence[int]) -> float:
    """The largest of their metrics; -inf where none was measured."""
    ranks = (rank_of(folder / str(step)) for step in steps)
    return max((rank for rank in ranks if rank is not None and rank > WORST), default=-math.inf)


def rank_of(checkpoint: Path) -> float | None:
    """None where there is none, or it is damaged.

    Raises:
        OSError: the disk does not answer: another checkpoint must not become the best by that.
    """
    try:
        return float(json.loads((checkpoint / METRICS).read_text())[RANK])
    except OSError as error:
        # a stale handle: the trainer has removed it meanwhile
        if error.errno in disk.FAULTS and error.errno != errno.ESTALE:
            raise
    except (ValueError, KeyError, TypeError):
        pass
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
        return ranked(folder, steps)[0]
    if which not in steps:
        raise UserError(f"{folder}: no step {which}; there are {', '.join(map(str, steps))}")
    return int(which)


def unfinished_bytes(folder: Path) -> int:
    """What half-written checkpoints hold by now."""
    total = 0
    for path in folder.glob(f"{UNFINISHED}/**/*"):
        with contextlib.suppress(OSError):  # it has its final name meanwhile
            total += path.stat().st_size
    return total


def set_aside(path: Path) -> Path:
    """Give what is damaged another name, which is returned: nothing is removed.

    Raises:
        UserError: it cannot be renamed.
    """
    names = (path.with_name(f"{path.name}{DAMAGED}{n or ''}") for n in itertools.count())
    place = next(name for name in names if not name.exists())
    try:
        return path.rename(place)
    except OSError as error:
        words = disk.explain(error, path)
        raise UserError(f"{path} is damaged: move it elsewhere by hand ({words})") from error


def clean(folder: Path, say: Callable[[str], None]) -> None:
    """Remove half-written checkpoints; set damaged metrics aside, which Orbax could not open."""
    for path in folder.glob(UNFINISHED):
        say(f"WARNING: {path.name} was never finished: that checkpoint does not count")
        shutil.rmtree(path, ignore_errors=True)
    for step in complete_steps(folder):
        path = folder / str(step) / METRICS
        if rank_of(folder / str(step)) is None and path.exists():
            say(f"WARNING: {path} is damaged: that checkpoint ranks last")
            set_aside(path)
