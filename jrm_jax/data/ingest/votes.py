"""Judgements of pairs of edits -> preferences and weights of one group. No files here.

A label is a share of votes. The loss is linear in it, so votes on one pair that differ cost exactly
what their share costs with the sum of their weights (`losses.preference_loss`, without a margin).

Letters: K candidates, R reward dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Vote(NamedTuple):
    """On two edits, given by their encoded pictures.

    shares: of the vote that the first edit has in each dimension, from 0 to 1; None = not judged.
    weight: how much the vote counts, > 0.
    """

    where: str
    first: bytes
    second: bytes
    shares: tuple[float | None, ...]
    weight: float = 1.0


class Tally(NamedTuple):
    """preference, weight: [K, K, R] float32, K in the order of `edits`.

    odd: what is to be told, as (kind, detail).
    """

    edits: list[bytes]
    preference: np.ndarray
    weight: np.ndarray
    odd: list[tuple[str, str]]


def tally(votes: Sequence[Vote]) -> Tally:
    """All votes of one group; edits in the order in which they appear."""
    edits = list(dict.fromkeys(edit for vote in votes for edit in (vote.first, vote.second)))
    place = {edit: k for k, edit in enumerate(edits)}
    shape = (len(edits), len(edits), len(votes[0].shares))
    for_KKR, cast_KKR = np.zeros(shape), np.zeros(shape)  # i < j: votes for i, votes on the pair
    sides: dict[tuple[int, int, int], set[float]] = {}
    odd, seen = [], set()
    for vote in votes:
        i, j = place[vote.first], place[vote.second]
        if frozenset((i, j)) in seen:
            odd.append(("pair that is judged more than once (its weight grows)", vote.where))
        seen.add(frozenset((i, j)))
        for r, share in enumerate(vote.shares):
            if share is None:
                continue
            at, share = ((i, j, r), share) if i < j else ((j, i, r), 1 - share)
            for_KKR[at] += share * vote.weight
            cast_KKR[at] += vote.weight
            sides.setdefault(at, set()).add(round(share, 6))
    differing = {at[:2] for at, shares in sides.items() if len(shares) > 1}
    for i, j in sorted(differing):
        words = f"{votes[0].where}: edits {i} and {j} of its group"
        odd.append(("pair with differing judgements (the share of the votes counts)", words))
    share_KKR = np.divide(for_KKR, cast_KKR, out=np.full(shape, 0.5), where=cast_KKR > 0)
    share_KKR = share_KKR.astype(np.float32)
    upper_KK1 = np.triu(np.ones(shape[:2], bool), 1)[..., None]
    preference_KKR = np.where(upper_KK1, share_KKR, 1 - share_KKR.swapaxes(0, 1))
    weight_KKR = (cast_KKR + cast_KKR.swapaxes(0, 1)).astype(np.float32)
    return Tally(edits, preference_KKR, weight_KKR, odd)


def connected(votes: Sequence[Vote]) -> list[list[Vote]]:
    """Votes that hang together by a shared edit, in the order in which their parts begin.

    Without a source picture nothing is shared by edits that nobody compared, and a common prompt
    ("a cat") would otherwise make one huge group.
    """
    leader: dict[bytes, bytes] = {}

    def find(edit: bytes) -> bytes:
        while (above := leader.setdefault(edit, edit)) != edit:
            leader[edit] = edit = leader[above]
        return edit

    for vote in votes:
        leader[find(vote.second)] = find(vote.first)
    parts: dict[bytes, list[Vote]] = {}
    for vote in votes:
        parts.setdefault(find(vote.first), []).append(vote)
    return list(parts.values())
