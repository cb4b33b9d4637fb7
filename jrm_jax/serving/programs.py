"""Which programs a model has: a bucket and a number of rows each, and never too many. Thread-safe.

Compiling one takes seconds on a small model and minutes on a large one, so that what comes later
goes into what is there. No JAX here: `device_call.py` compiles.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from jrm_jax.data.buckets import Bucket
from jrm_jax.data.processor import Processor
from jrm_jax.errors import UserError
from jrm_jax.model.config import BackboneConfig
from jrm_jax.run.flops import forward_flops
from jrm_jax.serving.ladder import CANDIDATES, Cost, cheapest, joined, rounded, rung_of

FIELDS = tuple(field.name for field in dataclasses.fields(Bucket))
LIMIT = 8  # programs in a process's life, unless told otherwise


class Programs:
    """The programs of one kind of output.

    Args:
        ladder: the buckets agreed upon, see `ladder.py`.
        cost: of a group in a bucket.
        limit: programs at most. The last one is made wide, as what comes later must fit.
    """

    def __init__(
        self, ladder: Sequence[Bucket], cost: Cost, processor: Processor, limit: int = LIMIT
    ):
        if limit < 1:
            raise UserError(f"programs is {limit}, must be at least 1")
        self._ladder, self._cost, self._processor = tuple(ladder), cost, processor
        self._limit, self._taken, self._lock = limit, [], threading.Lock()

    @property
    def taken(self) -> list[tuple[Bucket, int]]:
        """(bucket, rows) of every program so far, in the order in which they were asked for."""
        with self._lock:
            return list(self._taken)

    @property
    def left(self) -> int:
        """How many may be added."""
        with self._lock:
            return self._limit - len(self._taken)

    def take(self, bucket: Bucket, rows: int) -> None:
        """
        Raises:
            UserError: it would be one too many.
        """
        with self._lock:
            self._take(bucket, rows)

    def choose(self, need: Bucket, rows: Sequence[int]) -> tuple[Bucket, int]:
        """The program for a group: its rung with rows[0] rows, as long as programs may be added.

        Args:
            need: the least bucket that holds it.
            rows: numbers of rows that will do, the first is wanted.

        Raises:
            UserError: none holds it, and no more may be added.
        """
        with self._lock:
            rung = rung_of(need, self._ladder, self._cost, self._processor)
            left = self._limit - len(self._taken)
            if (rung, rows[0]) in self._taken:
                return rung, rows[0]
            if left > 1:
                return self._take(rung, rows[0])
            for count in rows:
                there = [bucket for bucket, has in self._taken if has == count]
                if (found := cheapest(need, there, self._cost)) is not None:
                    return found, count
            there = [bucket for bucket, has in self._taken if has == rows[0]]
            return self._take(self._wide(joined([rung, *there])), rows[0])

    def _take(self, bucket: Bucket, rows: int) -> tuple[Bucket, int]:
        if (bucket, rows) not in self._taken:
            if len(self._taken) >= self._limit:
                raise UserError(
                    f"a program for {bucket.words} would be number {self._limit + 1}, and"
                    f" {self._limit} are allowed: load the model with a larger number of `programs`"
                )
            self._taken.append((bucket, rows))
        return bucket, rows

    def _wide(self, bucket: Bucket) -> Bucket:
        """Twice the room, pictures up to the largest of the ladder, all candidates of a row."""
        more = max(0, CANDIDATES[-1] - bucket.candidates)
        patches = min(2 * bucket.patches, max(rung.patches for rung in self._ladder))
        wide = dataclasses.replace(
            bucket,
            candidates=bucket.candidates + more,
            images=bucket.images + more,
            patches=max(bucket.patches, patches),
            prompt=2 * bucket.prompt,
            candidate=2 * bucket.candidate,
        )
        return rounded(wide, self._processor)


def group_cost(config: BackboneConfig, sizes_m6: np.ndarray) -> np.ndarray:
    """[m] int64: FLOPs of a group's score in buckets of these sizes."""
    columns = SimpleNamespace(**dict(zip(FIELDS, np.asarray(sizes_m6, np.int64).T, strict=True)))
    parts = forward_flops(config, columns)
    return sum(part.linear + part.attention for part in parts.values())


@dataclasses.dataclass
class Work:
    """What the devices were given: costs of a set of programs' slots, and of those in use."""

    slots: int = 0
    used: int = 0
    groups: int = 0

    def __post_init__(self):
        self._lock = threading.Lock()

    def add(self, bucket: Bucket, rows: int, needs: Sequence[Bucket], cost: Cost) -> None:
        sizes = np.array([dataclasses.astuple(each) for each in (bucket, *needs)], np.int64)
        whole, *own = map(int, cost(sizes))
        with self._lock:
            self.slots += rows * whole
            self.used += sum(own)
            self.groups += len(needs)

    @property
    def padded(self) -> float:
        """Share of the slots' cost that was padding, 0 where nothing was done."""
        return 1 - self.used / self.slots if self.slots else 0.0
