"""Which examples stand in which batch: the seeded plan step -> batch.

Letters: n examples of a data set. A global example id counts through the data sets of a run in
order: id = offset of the data set + index in it.

The plan knows nothing but sizes, weights, batch size and seed, so every host computes the same one,
and resuming at a step needs no stored state.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from jrm_jax.data.buckets import Bucket, assign, needs
from jrm_jax.data.sizes import Sizes
from jrm_jax.errors import UserError

LOOKED_AT = 1000  # epochs, for the buckets in them


@dataclasses.dataclass(frozen=True)
class Source:
    """One data set of a run. `weight`: times its examples are seen per epoch (may be a fraction).

    `kept` [m]: the indices that take part, default all.
    """

    sizes: Sizes
    weight: float = 1.0
    kept: np.ndarray | None = None


class _Ids:
    """Global ids and buckets of the sources' examples."""

    labelled_rows: int | None = None  # of a batch, whose labels count; None: all

    def __init__(
        self, sources: Sequence[Source], buckets: Sequence[Bucket], batch_size: int, language: bool
    ):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, must be at least 1")
        self.buckets, self.batch_size = tuple(buckets), batch_size
        self.offsets = np.concatenate([[0], np.cumsum([len(s.sizes) for s in sources])])
        self._bucket_of = np.full(self.offsets[-1], -1, np.int16)
        self._members = []
        for source, offset in zip(sources, self.offsets, strict=False):
            kept = np.arange(len(source.sizes)) if source.kept is None else source.kept
            part = Sizes.from_rows(source.sizes.rows()[kept])
            self._bucket_of[offset + kept] = assign(part, buckets, language)
            self._members.append(offset + np.asarray(kept, np.int64))

    def locate(self, example_id: int) -> tuple[int, int]:
        """(data set, index in it) of a global example id."""
        which = int(np.searchsorted(self.offsets, example_id, side="right")) - 1
        return which, int(example_id - self.offsets[which])


class Plan(_Ids):
    """Training: step -> (bucket, global example ids [batch_size] int64). Endless.

    An epoch holds each source `weight` times: its epochs cut one endless stream of seeded shuffles
    into pieces of weight * n, so a fraction rotates through the whole set. Examples are batched by
    bucket. Where a bucket's examples fill no whole number of batches, examples of cheaper buckets
    that have room there take the places; what is still empty is -1, filler rows that weigh nothing.
    So each example comes as often as its weight says, and a few large ones hardly ever stand alone
    in a batch. Batches come in seeded order.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        buckets: Sequence[Bucket],
        batch_size: int,
        seed: int,
        language: bool = True,
    ):
        super().__init__(sources, buckets, batch_size, language)
        self.seed = seed
        self.weights = tuple(float(source.weight) for source in sources)
        if min(self.weights, default=0) < 0 or not any(
            weight * len(members)
            for weight, members in zip(self.weights, self._members, strict=True)
        ):
            raise UserError("the data mixture is empty: give at least one data set a weight > 0")
        fits = np.concatenate([
            np.stack([bucket.fits(needs(s.sizes, language)) for bucket in self.buckets], axis=1)
            for s in sources
        ])  # fmt: skip
        self._kinds, self._kind_of = np.unique(fits, axis=0, return_inverse=True)
        self._kind_of = self._kind_of.reshape(-1).astype(np.int16)
        self._constant = all(weight.is_integer() for weight in self.weights)
        self._ends = [self._length(0)]  # steps up to the end of each epoch
        self._share()

    def _share(self) -> None:
        """What lets threads use a plan: several of them make batches."""
        self._lengthening = threading.Lock()
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_epoch", "_lengthening")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._share()

    @property
    def steps_per_epoch(self) -> int:
        """Of the first epoch; fractional weights may change it by a few steps later."""
        return max(1, self._ends[0])

    def batch(self, step: int) -> tuple[Bucket, np.ndarray]:
        epoch, start = self._find(step)
        bucket, ids = self._epoch(epoch)[step - start]
        return self.buckets[bucket], ids

    __call__ = batch

    def buckets_met(self, start: int, stop: int) -> set[Bucket]:
        """Of the batches of these steps, of at most the first `LOOKED_AT` epochs among them."""
        weighed = [m for m, weight in zip(self._members, self.weights, strict=True) if weight]
        every = set(np.unique(self._bucket_of[np.concatenate(weighed)]).tolist())
        met: set[int] = set()
        # epochs of the same examples have the same buckets, and the first may be half over
        for _ in range(2 if self._constant else LOOKED_AT):
            if start >= stop or met == every:
                break
            epoch, first = self._find(start)
            batches = self._epoch(epoch)[start - first : stop - first]
            met.update(bucket for bucket, _ in batches)
            start += len(batches)
        return {self.buckets[bucket] for bucket in met}

    def epoch(self, step: int) -> int:
        return self._find(step)[0]

    def _find(self, step: int) -> tuple[int, int]:
        """(epoch, its first step)."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        if self._constant:
            epoch = step // self._ends[0]
            return epoch, epoch * self._ends[0]
        with self._lengthening:
            while self._ends[-1] <= step:
                self._ends.append(self._ends[-1] + self._length(len(self._ends)))
        epoch = bisect.bisect_right(self._ends, step)
        return epoch, self._ends[epoch - 1] if epoch else 0

    def _members_of(self, epoch: int) -> np.ndarray:
        """Global ids of an epoch, data set by data set, in stream order."""
        pieces = []
        for number, (members, weight) in enumerate(zip(self._members, self.weights, strict=True)):
            count = len(members)
            first, last = int(epoch * weight * count), int((epoch + 1) * weight * count)
            while first < last:
                cycle, start = divmod(first, count)
                stop = min(count, start + last - first)
                order = _shuffled(count, self.seed, 1 + number, cycle)
                pieces.append(members[order[start:stop]])
                first += stop - start
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    def _length(self, epoch: int) -> int:
        counts = self._shares(self._kind_of[self._members_of(epoch)]).sum(axis=1)
        return int((-(-counts // self.batch_size)).sum())

    def _shares(self, kinds: np.ndarray) -> np.ndarray:
        """[buckets, kinds] int64: how many examples of each kind stand in a bucket's batches.

        A kind is a set of buckets that have room for an example. By the counts alone, so that
        epochs with the same examples are equally long.

        Args:
            kinds: of an epoch's examples [n].
        """
        left = np.bincount(kinds, minlength=len(self._kinds))
        shares = np.zeros((len(self.buckets), len(self._kinds)), np.int64)
        home = [int(np.argmax(kind)) if kind.any() else -1 for kind in self._kinds]
        for bucket in reversed(range(len(self.buckets))):
            own = [kind for kind, place in enumerate(home) if place == bucket]
            shares[bucket, own], left[own] = left[own], 0
            room = -int(shares[bucket].sum()) % self.batch_size
            guests = [k for k in np.flatnonzero(left) if self._kinds[k, bucket]]
            for kind in sorted(guests, key=lambda k: -home[k]):  # the largest first
                shares[bucket, kind] = min(room, left[kind])
                room -= int(shares[bucket, kind])
                left[kind] -= shares[bucket, kind]
        return shares

    def _make_epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        ids = self._members_of(epoch)
        ids = ids[_shuffled(len(ids), self.seed, 0, 2 * epoch)]
        kinds = self._kind_of[ids]
        bucket_of = np.zeros(len(ids), np.int64)
        for kind, shares in enumerate(self._shares(kinds).T):
            bucket_of[kinds == kind] = np.repeat(np.arange(len(self.buckets)), shares)
        batches = _by_bucket(ids, bucket_of, len(self.buckets), self.batch_size)
        return [batches[i] for i in _shuffled(len(batches), self.seed, 0, 2 * epoch + 1)]


class LabelledPlan:
    """Training where every batch holds equally many groups with labels; used as a `Plan`.

    The first `count` rows are a `Plan` of the groups with labels: the same ones at a step, however
    large the batch. The other rows are a plan of all groups with critiques, of those with labels,
    too; labels do not count there.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        labelled: Sequence[np.ndarray],
        critiqued: Sequence[np.ndarray],
        bucket: Bucket,
        batch_size: int,
        count: int,
        seed: int,
        language: bool = True,
    ):
        """`labelled`, `critiqued` [m] of each source: indices of its groups with such."""

        def make(found: Sequence[np.ndarray], rows: int, seed: int) -> Plan:
            kept = [
                which if source.kept is None else np.intersect1d(source.kept, which)
                for source, which in zip(sources, found, strict=True)
            ]
            own = [dataclasses.replace(s, kept=k) for s, k in zip(sources, kept, strict=True)]
            return Plan(own, (bucket,), rows, seed, language)

        self._first, rest = make(labelled, count, seed), batch_size - count
        # other numbers than the first rows': where all have labels, other groups stand there
        self._others = make(critiqued, rest, seed + 2**32) if rest else None
        self.buckets, self.batch_size, self.labelled_rows = (bucket,), batch_size, count
        self.locate, self.steps_per_epoch = self._first.locate, self._first.steps_per_epoch

    def batch(self, step: int) -> tuple[Bucket, np.ndarray]:
        bucket, ids = self._first.batch(step)
        rest = [self._others.batch(step)[1]] if self._others else []
        return bucket, np.concatenate([ids, *rest])

    def buckets_met(self, start: int, stop: int) -> set[Bucket]:
        """As a `Plan`'s."""
        return set(self.buckets) if start < stop else set()


class EvalPlan(_Ids):
    """Evaluation: each example once, bucket by bucket, the last batch of each filled with -1."""

    def __init__(
        self,
        sources: Sequence[Source],
        buckets: Sequence[Bucket],
        batch_size: int,
        language: bool = True,
    ):
        super().__init__(sources, buckets, batch_size, language)
        ids = np.concatenate([np.zeros(0, np.int64), *self._members])
        bucket_of = self._bucket_of[ids]
        self._batches = _by_bucket(ids, bucket_of, len(self.buckets), batch_size)

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, step: int) -> tuple[Bucket, np.ndarray]:
        bucket, ids = self._batches[step]
        return self.buckets[bucket], ids

    __call__ = batch


def _by_bucket(
    ids: np.ndarray, bucket_of: np.ndarray, buckets: int, batch_size: int
) -> list[tuple[int, np.ndarray]]:
    """(bucket, ids) of the batches of each bucket in turn; its last one is filled with -1."""
    batches = []
    for bucket in range(buckets):
        mine = ids[bucket_of == bucket]
        full = np.full(-(-len(mine) // batch_size) * batch_size, -1, np.int64)
        full[: len(mine)] = mine
        batches += [(bucket, part) for part in full.reshape(-1, batch_size)]
    return batches


def _shuffled(count: int, *seed: int) -> np.ndarray:
    """A permutation of range(count) from raw random bits, which no NumPy release will change."""
    bits = np.random.PCG64(np.random.SeedSequence(list(seed))).random_raw(count)
    return np.argsort(bits, kind="stable")
