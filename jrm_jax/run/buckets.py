"""The buckets of a run: chosen by what they cost, kept with the sizes and in the run's folder, and
how full they are.

A run keeps its buckets: which examples stand in a batch depends on them, and what is chosen depends
on the number of steps, which may grow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jrm_jax.data.buckets import Bucket, Cost, as_table, assign, make_buckets, needs
from jrm_jax.data.choosing import choose_buckets
from jrm_jax.data.encode import Encoder
from jrm_jax.data.plan import Plan, Source
from jrm_jax.data.sizes import Sizes, cache_places, write_cache
from jrm_jax.errors import UserError
from jrm_jax.model.config import BackboneConfig

VERSION = 1  # raise it when `choosing` chooses otherwise
RECORD = "buckets.json"  # in the run's folder
# What one bucket more must save: its two programs take about as long to compile as so many steps.
# The default run on one busy core of an AMD EPYC: 48 s for a training step's program, 25 steps; the
# evaluation's comes on top. Programs of large models take minutes, and their steps seconds.
COMPILE_STEPS = 30
READ_STEPS = 8  # of these, what the evaluation's program takes: 10 to 18 s there
LARGEST = 2**20  # of any size in a record: four times the longest text that a backbone reads
MANY = 64  # buckets of a training from which a ladder is made: ten times what the default may have
ROUNDED = 128  # patch slots are a multiple of it at most, see `choose`
UNIT = 64  # how often an example of weight 1 counts; fractions are rounded to its parts


def choose(
    config: ConfigDict,
    sources: Mapping[str, Sequence[Source]],
    cost: Cost,
    *,
    language: bool,
    merge: int,
    folder: Path,
) -> tuple[Bucket, ...]:
    """The buckets of a new run, by growing cost.

    Examples count as often as the run comes to them, those that are only read at a third: a
    training step has two passes back for each forward.

    Args:
        sources: {split: data sets}; what is kept of them is held by a bucket.
        cost: of a group, `flops.group_cost`.
        folder: the data set beside which the choice is kept.
    """
    data = config.data
    kept = [(split, s, _kept(s)) for split, each in sources.items() for s in each]
    round_patches = merge**2 if data.round_to < ROUNDED else ROUNDED
    if data.candidate_cuts or data.visual_cuts:
        return make_buckets(
            [sizes for _, _, sizes in kept],
            language=language,
            merge=merge,
            candidate_cuts=tuple(data.candidate_cuts),
            visual_cuts=tuple(data.visual_cuts),
            round_to=data.round_to,
            round_patches=round_patches,
        )
    table = np.concatenate([needs(sizes, language) for _, _, sizes in kept])
    passes = _passes(config, sources)
    weights = [
        max(1, round(UNIT * (source.weight if split == "train" else passes[split])))
        for split, source, _ in kept
    ]
    counts = np.repeat(weights, [len(sizes) for _, _, sizes in kept])
    settings = {
        "programs": data.programs,
        "round_to": data.round_to,
        "round_patches": round_patches,
        "rows": UNIT * config.batch_size,
        "worth": COMPILE_STEPS / max(1, config.total_steps),
    }
    probe = cost(np.maximum(table.max(axis=0)[None] // [[1], [2]], 1)).tolist()
    digest = hashlib.sha256(json.dumps([VERSION, settings, probe]).encode())
    for array in (table, counts):
        digest.update(np.ascontiguousarray(array, np.int64).tobytes())
    places = cache_places(folder, f"buckets-{digest.hexdigest()[:16]}.json")
    for place in places:
        if found := _parse(place):
            return found
    chosen = choose_buckets(table, cost=cost, weights_n=counts, **settings)
    for place in places:
        if write_cache(place, as_text(chosen)):
            break
    return chosen


def for_reading(
    config: ConfigDict,
    buckets: tuple[Bucket, ...],
    sources: Mapping[str, Sequence[Source]],
    cost: Cost,
    *,
    language: bool,
) -> tuple[Bucket, ...]:
    """Those of a run's buckets in which held-out splits are read: one is given up as long as the
    padding that this brings into all of a run's evaluations costs less than to compile a program.

    Args:
        buckets: by growing cost; they hold all of `sources`.
        sources: {split: data sets}, 'train' among them: its steps are the measure.
        cost: of a group, `flops.group_cost`.
    """
    if config.data.candidate_cuts or config.data.visual_cuts:
        return buckets
    sizes = {
        split: Sizes.from_rows(np.concatenate([_kept(source).rows() for source in each]))
        for split, each in sources.items()
    }

    def forward(split: str, chosen: Sequence[Bucket]) -> float:
        """What reading a split once costs, in whole batches."""
        counts = np.bincount(assign(sizes[split], chosen, language), minlength=len(chosen))
        rows = -(-counts // config.batch_size) * config.batch_size
        return float(rows @ cost(as_table(chosen)).astype(float))

    def reading(chosen: Sequence[Bucket]) -> float:
        often = config.total_steps // config.eval_interval if config.eval_interval else 0
        return sum(
            forward(split, chosen) * (1 + often * (split == "valid"))
            for split in sizes
            if split != "train"
        )

    step = 3 * config.batch_size * forward("train", buckets) / len(sizes["train"])
    now = reading(buckets)
    while len(buckets) > 1:
        fewer = [(*buckets[:i], *buckets[i + 1 :]) for i in range(len(buckets))]
        held = {split: each for split, each in sources.items() if split != "train"}
        costs = [
            reading(chosen) if hold_all(chosen, held, language) else np.inf for chosen in fewer
        ]
        least = int(np.argmin(costs))
        if costs[least] - now > READ_STEPS * step:
            break
        buckets, now = fewer[least], costs[least]
    return buckets


def _kept(source: Source) -> Sizes:
    kept = source.kept
    return source.sizes if kept is None else Sizes.from_rows(source.sizes.rows()[kept])


def _passes(config: ConfigDict, sources: Mapping[str, Sequence[Source]]) -> dict[str, float]:
    """How often an example of a split is read in an epoch of training, in training steps."""
    epoch = sum(source.weight * len(_kept(source)) for source in sources.get("train", ()))
    epochs = config.total_steps * config.batch_size / max(1, epoch)
    often = config.total_steps // config.eval_interval if config.eval_interval else 0
    times = {split: 1 + often * (split == "valid") for split in sources}
    return {split: count / 3 / epochs if epochs else 1.0 for split, count in times.items()}


def as_text(buckets: Sequence[Bucket]) -> str:
    """What RECORD holds."""
    return json.dumps(as_rows(buckets)) + "\n"


def as_rows(buckets: Sequence[Bucket]) -> list[dict[str, int]]:
    """For JSON."""
    return [dataclasses.asdict(bucket) for bucket in buckets]


def from_rows(rows: Any) -> tuple[Bucket, ...] | None:
    """What `as_rows` gave; None where it is something else, or no group has such sizes."""
    try:
        found = tuple(Bucket(**fields) for fields in rows)
    except TypeError:
        return None
    sizes = [size for bucket in found for size in bucket.sizes]
    if not all(type(size) is int and 0 <= size <= LARGEST for size in sizes):
        return None
    return found if all(min(b.candidates, b.prompt, b.candidate) for b in found) else None


def of_training(
    rows: Any, encoder: Encoder, backbone: BackboneConfig
) -> tuple[Bucket, ...] | None:
    """`from_rows`, of the training of this model; None also of what it cannot have left: more than
    `MANY` buckets, pictures larger than its processor makes them, or one of the other sizes larger
    than the number of positions of its backbone."""
    patches = encoder.processor.most_patches + ROUNDED
    others = backbone.text.positions or LARGEST
    most = Bucket(others, others, patches, others, others, others)
    found = from_rows(rows)
    if found is None or len(found) > MANY or not most.fits(as_table(found)).all():
        return None
    return found


def read_record(workdir: Path) -> tuple[Bucket, ...] | None:
    """The buckets of a run that has begun; None of one that has not.

    Raises:
        UserError: the file is damaged.
    """
    path = workdir / RECORD
    if not path.exists():
        return None
    if found := _parse(path):
        return found
    raise UserError(
        f"{path} is damaged: remove it and the run goes on; its batches stay the same unless it has"
        " got more steps, another split or another version of jrm_jax"
    )


def _parse(path: Path) -> tuple[Bucket, ...] | None:
    try:
        return from_rows(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError):
        return None


def hold_all(
    buckets: Sequence[Bucket], sources: Mapping[str, Sequence[Source]], language: bool
) -> bool:
    """Whether every example has a bucket."""
    tables = [needs(_kept(source), language) for each in sources.values() for source in each]
    return all(np.any([b.fits(table) for b in buckets], axis=0).all() for table in tables)


def real_shares(
    plan: Plan, sources: Sequence[Source], language: bool, share_prompt: bool = True
) -> dict[str, float]:
    """{'decoder': of the slots of an epoch's batches those that hold something, 'tower': the same}.

    Rows and candidates that only fill a batch are padding as well. 1 where there are no slots.

    Args:
        share_prompt: False counts the prompt once for each candidate.
    """
    rows = np.concatenate([source.sizes.rows() for source in sources])
    sizes = Sizes.from_rows(rows)
    tokens = sizes.all_answer if language else sizes.all_candidate
    real = {
        "decoder": sizes.prompt.astype(np.int64) * (1 if share_prompt else sizes.candidates)
        + tokens,
        "tower": sizes.all_patches.astype(np.int64),
    }
    held, slots = dict.fromkeys(real, 0), dict.fromkeys(real, 0)
    for step in range(plan.steps_per_epoch):
        bucket, ids = plan.batch(step)
        again = 0 if share_prompt else (bucket.candidates - 1) * bucket.prompt
        decoder = bucket.decoder_slots + again
        for part, count in (("decoder", decoder), ("tower", bucket.tower_slots)):
            held[part] += int(real[part][ids[ids >= 0]].sum())
            slots[part] += count * len(ids)
    return {part: held[part] / slots[part] if slots[part] else 1.0 for part in real}
