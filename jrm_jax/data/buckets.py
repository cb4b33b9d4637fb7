"""Buckets: the static sizes of batches, chosen from what the examples of a run need.

Letters: n examples of a data set, K candidates, I images, P prompt and C candidate token slots, T
critique target slots, N patch slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jrm_jax.data.sizes import Sizes
from jrm_jax.errors import UserError

# sizes [m, 6] int64, fields in the order of `Bucket` -> what a group in such a bucket costs [m]
Cost = Callable[[np.ndarray], np.ndarray]
OUTLIER = 4  # times the median of its class: such an example would widen all the others' batches


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """One set of static sizes: K, I, N, P, C, T. `critique` is 0 where no critique is fed."""

    candidates: int
    images: int
    patches: int
    prompt: int
    candidate: int
    critique: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """The fields in their order; dataclasses.astuple takes ten times as long."""
        return (
            self.candidates, self.images, self.patches, self.prompt, self.candidate, self.critique
        )  # fmt: skip

    @property
    def decoder_slots(self) -> int:
        """Of a group."""
        return self.prompt + self.candidates * self.candidate

    @property
    def tower_slots(self) -> int:
        """Of a group."""
        return self.images * self.patches

    @property
    def words(self) -> str:
        """For a person."""
        return (
            f"up to {self.candidates} candidates, {self.images} pictures of {self.patches} patches;"
            f" tokens: prompt {self.prompt}, candidate {self.candidate}, critique {self.critique}"
        )

    def fits(self, needs_n6: np.ndarray) -> np.ndarray:
        """[n] bool: which examples have room in this bucket."""
        return (needs_n6 <= np.asarray(self.sizes)).all(axis=1)


def needs(sizes: Sizes, language: bool) -> np.ndarray:
    """[n, 6] int32: the bucket each example asks for, fields in the order of `Bucket`."""
    tokens = sizes.answer if language else sizes.candidate
    critique = sizes.critique if language else np.zeros_like(sizes.critique)
    columns = (sizes.candidates, sizes.images, sizes.patches, sizes.prompt, tokens, critique)
    return np.stack(columns, axis=1)


def select(
    sizes: Sizes, caps: Bucket, language: bool, skip: bool, name: str
) -> tuple[np.ndarray, str | None]:
    """Leave out what is larger than `caps` (a field of 0 is no cap).

    Returns:
        (indices kept [m] int64, one line that counts and lists what was left out, or None).

    Raises:
        UserError: something is too large and `skip` is false, or nothing is left.
    """
    limits = np.asarray(caps.sizes)
    excess = (needs(sizes, language) > limits) & (limits > 0)
    bad = np.flatnonzero(excess.any(axis=1))
    if not len(bad):
        return np.arange(len(sizes)), None
    names = [field.name for field in dataclasses.fields(Bucket)]
    fields = ", ".join(
        f"{names[f]} up to {needs(sizes, language)[:, f].max()} > {limits[f]}"
        for f in np.flatnonzero(excess.any(axis=0))
    )
    shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
    words = f"{name}: {len(bad)} of {len(sizes)} examples are too large ({fields}): {shown}"
    if not skip or len(bad) == len(sizes):
        raise UserError(
            f"{words}; raise the limits (config.data.max_...), lower the pixel cap, or leave such"
            " examples out with --config.data.skip_large=True"
        )
    kept = np.flatnonzero(~excess.any(axis=1))
    return kept, f"{words}; left out"


def make_buckets(
    sizes: Sequence[Sizes],
    *,
    language: bool,
    merge: int = 2,
    candidate_cuts: Sequence[int] = (2, 4),
    visual_cuts: Sequence[int] = (),
    round_to: int = 8,
    round_patches: int = 0,
    min_examples: int = 1,
) -> tuple[Bucket, ...]:
    """Static sizes that hold every example of all given (kept) sizes: by classes, not by cost.

    For runs that must have the same batches whatever they feed (the study's arms), and for one
    bucket that holds all; else see `choosing`.

    Examples fall into classes by the cuts: K <= 2, <= 4, more; largest image <= each visual cut (in
    visual tokens), more; what needs more than `OUTLIER` times the slots of its class's median is
    a class of its own. A class's maxima, rounded up, are its bucket. Give the sizes of all splits
    of a run, so that training and evaluation share their compilations.

    Args:
        round_to: multiple for P, C and T.
        round_patches: multiple for N; 0 = merge^2, the least.
        min_examples: a smaller class joins its neighbour, which saves a compilation.

    Returns:
        Buckets by growing cost.
    """
    table = np.concatenate([needs(part, language) for part in sizes])
    if not len(table):
        raise UserError("no examples: the data set is empty")
    unit = round_patches or merge**2
    if unit % merge**2:
        raise UserError(f"patch rounding {unit} must be a multiple of merge^2 = {merge**2}")
    by_count = np.searchsorted(np.sort(candidate_cuts), table[:, 0])
    by_visual = np.searchsorted(np.sort(visual_cuts), table[:, 2] // merge**2)
    k, i, n, p, c, _ = table.astype(np.int64).T
    slots_n = p + k * c + i * n
    by_slots = np.zeros(len(table), np.int64)
    for one in np.unique(np.stack([by_count, by_visual], axis=1), axis=0):
        mine = (by_count == one[0]) & (by_visual == one[1])
        by_slots[mine] = slots_n[mine] > OUTLIER * np.median(slots_n[mine])
    classes, inverse = np.unique(
        np.stack([by_count, by_visual, by_slots], axis=1), axis=0, return_inverse=True
    )
    inverse = inverse.reshape(-1)
    groups = [(table[inverse == c].max(axis=0), (inverse == c).sum()) for c in range(len(classes))]
    groups.sort(key=lambda group: int(group[0][0]) * int(group[0][4]) + int(group[0][2]))
    merged: list[tuple[np.ndarray, int]] = []
    for maxima, count in groups:
        if merged and (merged[-1][1] < min_examples or count < min_examples):
            last, number = merged.pop()
            maxima, count = np.maximum(maxima, last), count + number
        merged.append((maxima, count))

    def up(value: int, unit: int) -> int:
        return -(-int(value) // unit) * unit

    buckets = {
        Bucket(int(k), int(i), up(n, unit), up(p, round_to), up(c, round_to), up(t, round_to))
        for (k, i, n, p, c, t), _ in merged
    }
    return tuple(sorted(buckets, key=lambda b: (b.decoder_slots + b.tower_slots, b)))


def assign(sizes: Sizes, buckets: Sequence[Bucket], language: bool) -> np.ndarray:
    """[n] int32: the first bucket that holds each example; they come by growing cost.

    Raises:
        UserError: an example fits none.
    """
    table = needs(sizes, language)
    chosen = np.full(len(table), -1, np.int32)
    for index in reversed(range(len(buckets))):
        chosen[buckets[index].fits(table)] = index
    if (chosen < 0).any():
        raise UserError(
            f"{(chosen < 0).sum()} examples fit no bucket, the first is {np.argmin(chosen)}: make"
            " the buckets from the sizes of all splits"
        )
    return chosen


def as_table(buckets: Iterable[Bucket]) -> np.ndarray:
    """[n, 6] int64, as `needs` makes it."""
    return np.array([bucket.sizes for bucket in buckets], np.int64).reshape(-1, 6)


def by_cost(buckets: Iterable[Bucket], cost: Cost) -> tuple[Bucket, ...]:
    """Each once, by growing cost."""
    each = sorted(set(buckets))
    costs = cost(as_table(each))
    return tuple(each[i] for i in np.argsort(costs, kind="stable"))
