"""The buckets of single calls: a short ladder, agreed upon when a model is loaded. Pure.

A set of groups is planned by its sizes (`planned.py`). What comes one by one cannot be: it goes to
the cheapest rung that holds it, so that few programs serve whatever is asked.

Letters: K candidates, v visual tokens of a picture.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from jrm_jax.data.buckets import Bucket
from jrm_jax.data.encode import EncodedExample, Encoder, TokenRow
from jrm_jax.data.processor import Processor
from jrm_jax.data.schema import Candidate, Text

CANDIDATES = (2, 4, 8)  # of a rung; a group of more is laid into several rows
SIZES = 3  # rungs of picture sizes at most: the largest picture, a quarter of its tokens, ...
SMALL = 64  # ... but no rung for pictures of fewer visual tokens than this
WORDS = 128  # token slots for an instruction
SLACK = 8  # token slots for what stands around a picture
TOKENS = 16  # token slots are rounded up to steps of this

Cost = Callable[[np.ndarray], np.ndarray]  # sizes [m, 6] as in `Bucket` -> cost of a group [m]


def make_ladder(encoder: Encoder) -> tuple[Bucket, ...]:
    """Rungs for one source picture, an instruction and one picture for each candidate.

    The smallest come first. Picture sizes go down from the processor's largest.
    """
    processor = encoder.processor
    bare = encoder.encode_group((Text(" "),), [Candidate((Text(" "),))])
    words, own = len(bare.prompt.tokens), len(bare.candidates[0].tokens)
    visual = [max(1, processor.max_pixels // (processor.patch * processor.merge) ** 2)]
    while len(visual) < SIZES and visual[-1] // 4 >= SMALL:
        visual.append(visual[-1] // 4)
    return tuple(
        Bucket(
            candidates=count,
            images=count + 1,
            patches=tokens * processor.merge**2,
            prompt=_up(words + WORDS + tokens + SLACK, TOKENS),
            candidate=_up(own + tokens + SLACK, TOKENS),
            critique=0,
        )
        for tokens in reversed(visual)
        for count in CANDIDATES
    )


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


def rung_of(need: Bucket, ladder: Sequence[Bucket], cost: Cost, processor: Processor) -> Bucket:
    """The cheapest rung that holds `need`; what none holds gets a bucket of its own, rounded up."""
    return cheapest(need, ladder, cost) or rounded(need, processor)


def cheapest(need: Bucket, buckets: Sequence[Bucket], cost: Cost) -> Bucket | None:
    """Of those that hold `need`; None where none does."""
    fit = [bucket for bucket in buckets if holds(bucket, need)]
    if not fit:
        return None
    costs = cost(np.array([dataclasses.astuple(bucket) for bucket in fit], np.int64))
    return fit[int(np.argmin(costs))]


def holds(bucket: Bucket, need: Bucket) -> bool:
    return bool(bucket.fits(np.array([dataclasses.astuple(need)]))[0])


def joined(buckets: Sequence[Bucket]) -> Bucket:
    """The least bucket that holds all of these."""
    return Bucket(*map(max, zip(*map(dataclasses.astuple, buckets), strict=True)))


def rounded(need: Bucket, processor: Processor) -> Bucket:
    """`need` in coarse steps, so that needs of about one size share a program."""
    return Bucket(
        candidates=_step(need.candidates),
        images=_step(need.images),
        patches=_step(need.patches, 4 * processor.merge**2),
        prompt=_step(need.prompt, TOKENS),
        candidate=_step(need.candidate, TOKENS),
        critique=need.critique,
    )


def split(encoded: EncodedExample, most: int = CANDIDATES[-1]) -> list[EncodedExample]:
    """The group as rows of about equally many candidates, `most` at most; each keeps the prompt.

    Candidates do not see each other, so their scores are the same.
    """
    count = len(encoded.candidates)
    number = -(-count // most)
    edges = [count * i // number for i in range(number + 1)]
    if number == 1:
        return [encoded]
    return [_part(encoded, range(*ends)) for ends in itertools.pairwise(edges)]


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
    )


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _step(count: int, unit: int = 1) -> int:
    """The smallest of unit * (0, 1, 2, 3, 4, 6, 8, 12, ...) that holds `count`."""
    units = -(-count // unit)
    if units < 2:
        return units * unit
    power = 2 ** math.ceil(math.log2(units))
    return unit * (power * 3 // 4 if units <= power * 3 // 4 else power)
