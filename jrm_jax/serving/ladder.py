"""The buckets of single calls: a short ladder, agreed upon when a model is loaded. Pure.

A set of groups is planned by its sizes (`planned.py`). What comes one by one cannot be: it goes to
the cheapest rung that holds it, so that few programs serve whatever is asked.

Letters: K candidates, v visual tokens of a picture.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jrm_jax.data.buckets import Bucket, Cost, as_table
from jrm_jax.data.encode import Encoder
from jrm_jax.data.processor import Processor
from jrm_jax.data.schema import Candidate, Text
from jrm_jax.serving.rows import MOST

CANDIDATES = (2, 4, MOST)  # of a rung; a group of more is laid into several rows
SIZES = 3  # rungs of picture sizes at most: the largest picture, a quarter of its tokens, ...
SMALL = 64  # ... but no rung for pictures of fewer visual tokens than this
WORDS = 128  # token slots for an instruction
SLACK = 8  # token slots for what stands around a picture
STEP = 16  # what no rung holds is rounded up to multiples of this, ever larger ones
UNITS = {"tpu": 128}  # platform -> slots come in multiples of this, which its attention needs
UNIT = 8  # elsewhere


def make_ladder(encoder: Encoder, unit: int = UNIT) -> tuple[Bucket, ...]:
    """Rungs for one source picture, an instruction and one picture for each candidate.

    The smallest come first. Picture sizes go down from the processor's largest.

    Args:
        unit: slots come in multiples of it.
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
            patches=_up(tokens * processor.merge**2, patch_unit(unit, processor)),
            prompt=_up(words + WORDS + tokens + SLACK, unit),
            candidate=_up(own + tokens + SLACK, unit),
            critique=0,
        )
        for tokens in reversed(visual)
        for count in CANDIDATES
    )


def rung_of(
    need: Bucket, ladder: Sequence[Bucket], cost: Cost, processor: Processor, unit: int = UNIT
) -> Bucket:
    """The cheapest rung that holds `need`; what none holds gets a bucket of its own, rounded up."""
    return cheapest(need, ladder, cost) or rounded(need, processor, unit)


def cheapest(need: Bucket, buckets: Sequence[Bucket], cost: Cost) -> Bucket | None:
    """Of those that hold `need`; None where none does."""
    fit = [bucket for bucket in buckets if holds(bucket, need)]
    if not fit:
        return None
    costs = cost(as_table(fit))
    return fit[int(np.argmin(costs))]


def holds(bucket: Bucket, need: Bucket) -> bool:
    return bool(bucket.fits(as_table([need]))[0])


def joined(buckets: Sequence[Bucket]) -> Bucket:
    """The least bucket that holds all of these."""
    return Bucket(*map(max, zip(*map(dataclasses.astuple, buckets), strict=True)))


def rounded(need: Bucket, processor: Processor, unit: int = UNIT) -> Bucket:
    """`need` in coarse steps, so that needs of about one size share a program."""
    step = math.lcm(STEP, unit)
    return Bucket(
        candidates=_step(need.candidates),
        images=_step(need.images),
        patches=_step(need.patches, math.lcm(4 * processor.merge**2, patch_unit(unit, processor))),
        prompt=_step(need.prompt, step),
        candidate=_step(need.candidate, step),
        critique=need.critique,
    )


def patch_unit(unit: int, processor: Processor) -> int:
    """Multiple of patch slots: whole visual tokens, and what a platform's attention needs."""
    return processor.merge**2 if unit <= UNIT else math.lcm(unit, processor.merge**2)


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _step(count: int, unit: int = 1) -> int:
    """The smallest of unit * (0, 1, 2, 3, 4, 6, 8, 12, ...) that holds `count`."""
    units = -(-count // unit)
    if units < 2:
        return units * unit
    power = 2 ** math.ceil(math.log2(units))
    return unit * (power * 3 // 4 if units <= power * 3 // 4 else power)
