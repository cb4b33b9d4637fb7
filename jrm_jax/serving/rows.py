"""How groups are laid into rows of a batch, and the least bucket that holds a row. Pure.

Letters: k of K candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jrm_jax.data.buckets import Bucket
from jrm_jax.data.encode import EncodedExample, PartSizes, TokenRow

MOST = 8  # candidates of a row


def need_of(encoded: EncodedExample) -> Bucket:
    """The least bucket that holds a group when it is scored."""
    return Bucket(
        candidates=len(encoded.candidates),
        images=len(encoded.images),
        patches=max((len(patches) for patches, _ in encoded.images), default=0),
        prompt=len(encoded.prompt.tokens),
        candidate=max(len(row.tokens) for row in encoded.candidates),
        critique=0,
    )


class Needs(NamedTuple):
    """The least buckets that hold a group, in either way in which a set lays its groups into rows.

    together: of a row that `split` makes. apart: of each row that `apart` makes.
    """

    together: Bucket
    apart: tuple[Bucket, ...]


def part_sizes(encoded: EncodedExample) -> list[PartSizes]:
    """As `Encoder.part_sizes`, of what is encoded already."""
    return [
        PartSizes(tuple(len(encoded.images[i][0]) for _, i, _ in row.visual), len(row.tokens))
        for row in (encoded.prompt, *encoded.candidates)
    ]


def needs_from(sizes: Sequence[PartSizes]) -> Needs:
    """From `Encoder.part_sizes`."""
    prompt, *own = sizes
    rows = [own[first:last] for first, last in _ends(len(own), MOST)]
    pictures = max(sum(len(part.patches) for part in row) for row in rows)
    together = Bucket(
        candidates=max(map(len, rows)),
        images=len(prompt.patches) + pictures,
        patches=max((number for part in sizes for number in part.patches), default=0),
        prompt=prompt.tokens,
        candidate=max(part.tokens for part in own),
        critique=0,
    )
    return Needs(together, tuple(_apart(prompt, part) for part in own))


def _apart(prompt: PartSizes, own: PartSizes) -> Bucket:
    patches = prompt.patches + own.patches
    return Bucket(1, len(patches), max(patches, default=0), 0, prompt.tokens + own.tokens, 0)


def split(encoded: EncodedExample, most: int = MOST) -> list[EncodedExample]:
    """The group as rows of about equally many candidates, `most` at most; each keeps the prompt.

    Candidates do not see each other, so their scores are the same.
    """
    ends = _ends(len(encoded.candidates), most)
    return [encoded] if len(ends) == 1 else [_part(encoded, range(*pair)) for pair in ends]


def apart(encoded: EncodedExample) -> list[EncodedExample]:
    """A row for each candidate, which begins with a copy of the prompt.

    More slots than together, but they differ in one length only, so that fewer of them are padding
    where prompts and candidates are of all lengths.
    """
    rows = []
    for k in range(len(encoded.candidates)):
        part = _part(encoded, range(k, k + 1))
        before, own = part.prompt, part.candidates[0]
        start = len(before.tokens)
        joined_row = own._replace(
            tokens=[*before.tokens, *own.tokens],
            positions=np.concatenate([before.positions, own.positions], axis=1),
            visual=[*before.visual, *((start + at, i, slots) for at, i, slots in own.visual)],
            reward=start + own.reward,
        )
        nothing = TokenRow([], before.positions[:, :0], [])
        rows.append(part._replace(prompt=nothing, candidates=[joined_row]))
    return rows


def _ends(count: int, most: int) -> list[tuple[int, int]]:
    """(first, last + 1) of about equal parts of range(count)."""
    number = -(-count // most)
    return list(itertools.pairwise(count * i // number for i in range(number + 1)))


def _part(encoded: EncodedExample, which: range) -> EncodedExample:
    candidates = [encoded.candidates[k] for k in which]
    kept = sorted({i for row in (encoded.prompt, *candidates) for _, i, _ in row.visual})
    place = {image: new for new, image in enumerate(kept)}

    def moved(row: TokenRow) -> TokenRow:
        return row._replace(visual=[(first, place[i], slots) for first, i, slots in row.visual])

    own = slice(which.start, which.stop)
    return encoded._replace(
        prompt=moved(encoded.prompt),
        candidates=[moved(row) for row in candidates],
        images=[encoded.images[i] for i in kept],
        preference=encoded.preference[own, own],
        weight=encoded.weight[own, own],
        facts=None if encoded.facts is None else encoded.facts[own],
        teacher=None if encoded.teacher is None else encoded.teacher[own],
    )
