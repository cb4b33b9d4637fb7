"""What the adapters share: single edits of a trainer's batch -> groups -> rewards in its order."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from jrm_jax.client import Group, GroupScores, RewardClient, encode, first_column

MOST = 16  # candidates of a group
REQUEST = 64  # groups of a request
# Bytes of a request's encoded pictures, and their pixels. A server takes twice that, at 3 bytes a
# pixel, unless it was told otherwise (--max_body_bytes, --max_decoded_bytes).
ROOM = np.array([32 << 20, 256 << 20])


def score_edits(
    client: RewardClient,
    instructions: Sequence[str],
    sources: Sequence[Any],
    edits: Sequence[Any],
    failed: float | None = None,
) -> tuple[np.ndarray, list[str | None]]:
    """(rewards float32 [N], what went wrong with each or None).

    Edits of one instruction and one source are sent as one group, its source once. Sources are the
    same where they are the same object or have the same bytes. A request is closed before its
    pictures pass `ROOM`; one picture that is larger goes alone.

    Args:
        sources: of each edit: a picture, a list of them, or None.
        failed: stands for an edit without a score; None: it raises.

    Raises:
        RewardError: an edit has no score, or the service refused.
        TypeError, OSError: a picture that cannot be encoded; nothing was sent.
    """
    if not len(instructions) == len(sources) == len(edits):
        counts = f"{len(instructions)} instructions, {len(sources)} sources, {len(edits)} edits"
        raise ValueError(f"{counts}: give equally many")
    open_groups: dict[Any, int] = {}
    known: dict[Any, list[bytes]] = {}  # encoded sources
    groups: list[Group] = []
    costs: list[np.ndarray] = []  # of each group, in the units of ROOM
    places = []
    for instruction, source, edit in zip(instructions, sources, edits, strict=True):
        same = _key(source)
        if same not in known:
            many = source if isinstance(source, list | tuple) else [source]
            known[same] = [encode(picture) for picture in many if picture is not None]
        candidate = encode(edit)
        cost = _cost([candidate])
        index = open_groups.get((instruction, same))
        if (
            index is None
            or len(groups[index].candidates) >= MOST
            or (costs[index] + cost > ROOM).any()
        ):
            index = open_groups[instruction, same] = len(groups)
            groups.append(Group(instruction, known[same], []))
            costs.append(_cost(known[same]))
        places.append((index, len(groups[index].candidates)))
        groups[index].candidates.append(candidate)
        costs[index] += cost
    scores: list[GroupScores] = []
    for request in _requests(costs):
        scores += client.score_groups(groups[request])
    columns = first_column(scores, failed)
    rewards = np.array([columns[g][k] for g, k in places], np.float32)
    return rewards, [scores[g].errors[k] for g, k in places]


def _cost(pictures: Sequence[bytes]) -> np.ndarray:
    """int64 [2]: bytes, and pixels by the headers; what is not a picture has none."""
    pixels = 0
    for picture in pictures:
        try:
            with PIL.Image.open(io.BytesIO(picture)) as image:
                pixels += image.width * image.height
        except Exception:  # Pillow's readers raise many kinds; the service says what is wrong
            continue
    return np.array([sum(map(len, pictures)), pixels])


def _requests(costs: Sequence[np.ndarray]) -> Iterator[slice]:
    """The groups of each request."""
    start, total = 0, np.zeros(2, np.int64)
    for index, cost in enumerate(costs):
        if index > start and (index - start >= REQUEST or (total + cost > ROOM).any()):
            yield slice(start, index)
            start, total = index, np.zeros(2, np.int64)
        total = total + cost
    if costs:
        yield slice(start, len(costs))


def _key(source: Any) -> Any:
    if isinstance(source, list | tuple):
        return tuple(map(_key, source))
    if isinstance(source, bytes | str | Path) or source is None:
        return source
    if hasattr(source, "detach"):  # a tensor: rows of a batch are new objects each time
        source = source.detach().cpu().float().numpy()
    if isinstance(source, np.ndarray):
        return source.shape, source.dtype.str, source.tobytes()
    if isinstance(source, PIL.Image.Image):  # by what it shows: a palette is no part of its bytes
        return encode(source)
    return id(source)
