"""What the adapters share: single edits of a trainer's batch -> groups -> rewards in its order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jrm_jax.client import Group, GroupScores, RewardClient, first_column

MOST = 16  # candidates of a group
REQUEST = 64  # groups of a request


def score_edits(
    client: RewardClient,
    instructions: Sequence[str],
    sources: Sequence[Any],
    edits: Sequence[Any],
    failed: float | None = None,
) -> tuple[np.ndarray, list[str | None]]:
    """(rewards float32 [N], what went wrong with each or None).

    Edits of one instruction and one source are sent as one group, its source once. Sources are the
    same where they are the same object or have the same bytes.

    Args:
        sources: of each edit: a picture, a list of them, or None.
        failed: stands for an edit without a score; None: it raises.

    Raises:
        RewardError: an edit has no score, or the service refused.
    """
    if not len(instructions) == len(sources) == len(edits):
        counts = f"{len(instructions)} instructions, {len(sources)} sources, {len(edits)} edits"
        raise ValueError(f"{counts}: give equally many")
    open_groups: dict[Any, int] = {}
    groups: list[Group] = []
    places = []
    for instruction, source, edit in zip(instructions, sources, edits, strict=True):
        key = (instruction, _key(source))
        index = open_groups.get(key)
        if index is None or len(groups[index].candidates) >= MOST:
            index = open_groups[key] = len(groups)
            groups.append(Group(instruction, source, []))
        places.append((index, len(groups[index].candidates)))
        groups[index].candidates.append(edit)
    scores: list[GroupScores] = []
    for start in range(0, len(groups), REQUEST):
        scores += client.score_groups(groups[start : start + REQUEST])
    columns = first_column(scores, failed)
    rewards = np.array([columns[g][k] for g, k in places], np.float32)
    return rewards, [scores[g].errors[k] for g, k in places]


def _key(source: Any) -> Any:
    if isinstance(source, list | tuple):
        return tuple(map(_key, source))
    if isinstance(source, bytes | str | Path) or source is None:
        return source
    if hasattr(source, "detach"):  # a tensor: rows of a batch are new objects each time
        source = source.detach().cpu().float().numpy()
    if isinstance(source, np.ndarray):
        return source.shape, source.dtype.str, source.tobytes()
    if hasattr(source, "tobytes"):  # a Pillow image
        return source.size, source.mode, source.tobytes()
    return id(source)
