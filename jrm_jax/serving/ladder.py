"""The buckets of single calls: a short ladder, agreed upon when a model is loaded. Pure.

A set of groups is planned by its sizes (`planned.py`). What comes one by one cannot be: it goes to
the cheapest rung that holds it, so that few programs serve whatever is asked. The rungs are chosen
as a set's buckets are, by the sizes that requests are expected to have; they follow from the model
and its training alone.

Letters: K candidates, v visual tokens of a picture.
"""

from __future__ import annotations

import collections
import math
import operator
from collections.abc import Sequence

import numpy as np

from jrm_jax.data.buckets import Bucket, Cost, as_table
from jrm_jax.data.choosing import choose_buckets
from jrm_jax.data.encode import Encoder
from jrm_jax.data.processor import Processor
from jrm_jax.data.schema import Candidate, Image, Text
from jrm_jax.serving.groups import read_size
from jrm_jax.serving.rows import MOST

RUNGS = 7  # at most: one less than the programs of a model, so that each can be compiled
CANDIDATES = (2, 4, MOST)  # of a request; a group of more is laid into several rows
SIZES = 6  # of pictures: the largest, half as many visual tokens, a quarter, ...
# Tokens of an instruction, and how many of 18 have so many and no fewer: most are short.
WORDS = {16: 4, 32: 8, 64: 5, 128: 1}
FINE = 16  # parts of the costliest kind of request, by which the others are weighed
STEP = 16  # what no rung holds is rounded up to multiples of this, ever larger ones
UNITS = {"tpu": 128}  # platform -> slots come in multiples of this, which its attention needs
UNIT = 8  # elsewhere


def make_ladder(
    encoder: Encoder, cost: Cost, trained: Sequence[Bucket] = (), unit: int = UNIT
) -> tuple[Bucket, ...]:
    """At most `RUNGS` buckets, by growing cost: those that waste least of what is expected.

    Expected are an instruction, one source picture and one picture for each candidate, in all
    sizes that the processor makes; and as often pictures and prompts as long as in training. Every
    kind of request is taken to be an equal part of the work, however small it is. Without a source
    the instruction stands in every candidate: such groups mostly get a bucket of their own.

    Args:
        cost: of a group in a bucket.
        trained: the buckets of the model's training, if they are known.
        unit: slots come in multiples of it.
    """
    processor = encoder.processor
    block = processor.merge**2
    side = processor.patch * processor.merge
    picture = Image(read_size(np.zeros((side, side, 3), np.uint8)))
    prompt, own = (
        part.tokens - part.patches[0] // block  # what stands around a picture
        for part in encoder.part_sizes((Text(" "), picture), [Candidate((picture,))])
    )
    visual = [max(1, processor.max_pixels // side**2)]
    while len(visual) < SIZES and visual[-1] // 2 * side**2 >= processor.min_pixels:
        visual.append(visual[-1] // 2)
    often: collections.Counter[Bucket] = collections.Counter()
    for v in visual:
        for words, times in WORDS.items():
            for count in CANDIDATES:
                often[Bucket(count, count + 1, v * block, prompt + words + v, own + v, 0)] += times
    known = [bucket for bucket in trained if bucket.patches >= block]
    each = max(1, often.total() // max(1, len(CANDIDATES) * len(known)))
    for bucket in known:
        v = bucket.patches // block
        sources = max(1, min(bucket.images - bucket.candidates, bucket.prompt // v))
        for count in CANDIDATES:
            like = Bucket(count, count + sources, v * block, bucket.prompt, own + v, 0)
            often[like] += each
    needs_n6 = as_table(often)
    cost_n = cost(needs_n6)
    times_n = np.array(list(often.values())) * (FINE * cost_n.max() // cost_n)
    return choose_buckets(
        needs_n6,
        RUNGS,
        cost,
        round_to=unit,
        round_patches=patch_unit(unit, processor),
        weights_n=times_n,
        refine=False,
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
    return all(map(operator.le, need.sizes, bucket.sizes))


def joined(buckets: Sequence[Bucket]) -> Bucket:
    """The least bucket that holds all of these."""
    return Bucket(*map(max, zip(*(bucket.sizes for bucket in buckets), strict=True)))


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


def _step(count: int, unit: int = 1) -> int:
    """The smallest of unit * (0, 1, 2, 3, 4, 6, 8, 12, ...) that holds `count`."""
    units = -(-count // unit)
    if units < 2:
        return units * unit
    power = 2 ** math.ceil(math.log2(units))
    return unit * (power * 3 // 4 if units <= power * 3 // 4 else power)
