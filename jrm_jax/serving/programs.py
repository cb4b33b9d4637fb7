"""Which programs a model has: a bucket and a number of rows each, and never too many. Thread-safe.

Compiling one takes seconds on a small model and minutes on a large one, so that what comes later
goes into what is there. No JAX here: `device_call.py` compiles.

Letters: n groups of a set, 6 the fields of `Bucket`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jrm_jax.data.buckets import Bucket, Cost, as_table
from jrm_jax.data.choosing import choose_buckets
from jrm_jax.data.processor import Processor
from jrm_jax.errors import UserError
from jrm_jax.serving.ladder import (
    UNIT,
    cheapest,
    joined,
    patch_unit,
    rounded,
    rung_of,
)
from jrm_jax.serving.rows import Needs

LIMIT = 8  # programs in a process's life, unless told otherwise
APART = 0.95  # of the cost with candidates together, where candidates are to be laid apart
GOOD = 1.25  # times the cost of a set's own sizes: nothing better is looked for
BETTER = 0.9  # of what a set would cost in the programs that are there: then it gets its own
COARSE = 16  # batches: sizes of a smaller set are rounded up, as the next such set is a bit larger
SOURCES = 8  # source pictures that the last program has room for: as many as the service takes
WASTE = 2  # times the cost of its own rung: a group goes into a program that is there
KNOWN = 4096  # answers that are kept
BATCHES = 2  # as long as so many batches take, a program's compilation may take for a set


class Program(NamedTuple):
    bucket: Bucket
    rows: int


class Programs:
    """The programs of one kind of output.

    Args:
        ladder: the buckets agreed upon, see `ladder.py`.
        cost: of a group in a bucket.
        limit: programs at most. One is made wide, when a group finds no other: what comes later
            must fit, so it holds whatever a rung holds.
        unit: token slots come in multiples of it.

    Raises:
        UserError: a limit below 1.
    """

    def __init__(
        self,
        ladder: Sequence[Bucket],
        cost: Cost,
        processor: Processor,
        limit: int = LIMIT,
        unit: int = UNIT,
    ):
        if limit < 1:
            raise UserError(f"programs is {limit}, must be at least 1")
        self._ladder, self._cost, self._processor = tuple(ladder), cost, processor
        self._unit = unit
        self._limit, self._lock = limit, threading.RLock()
        self._taken: list[Program] = []
        self._last: Program | None = None  # the wide one
        self._known: dict[tuple, Program] = {}  # what `fit` answered last
        self._rung = functools.lru_cache(KNOWN)(self._find_rung)

    @property
    def taken(self) -> list[Program]:
        """Every program so far, in the order in which they were asked for."""
        with self._lock:
            return list(self._taken)

    @property
    def left(self) -> int:
        """How many may be added."""
        return self._limit - len(self.taken)

    @property
    def spare(self) -> int:
        """How many may be added while one is kept for what the others do not hold."""
        return max(0, self.left - (self._last is None))

    def take(self, program: Program) -> Program:
        """
        Raises:
            UserError: it would be one too many.
        """
        with self._lock:
            if program not in self._taken:
                if not self.left:
                    raise self._too_many(program)
                self._taken.append(program)
                self._known.clear()  # it may suit better
        return program

    def choose(self, need: Bucket, rows: Sequence[int]) -> Program:
        """The program for a group: its rung with rows[0] rows, as long as programs may be added.

        What no rung holds gets one of its own only from what all rungs with rows[0] rows leave, so
        that a rung has its place whatever came before it.

        Args:
            need: the least bucket that holds it.
            rows: numbers of rows that will do, the first is wanted.

        Raises:
            UserError: none holds it, and no more may be added.
        """
        with self._lock:
            rungs = set(self._ladder)
            odd = self._rung(need) not in rungs
            kept = len(rungs.difference(self._with(rows[0]))) if odd else 0
            return self._choose(need, rows, kept)

    def _choose(self, need: Bucket, rows: Sequence[int], kept: int) -> Program:
        """As `choose`. kept: places that are not for this group."""
        wanted = Program(self._rung(need), rows[0])
        if wanted in self._taken or self.spare > kept:
            return self.take(wanted)
        for count in rows:
            if (found := cheapest(need, self._with(count), self._cost)) is not None:
                return Program(found, count)
        if self._last is not None:
            raise self._too_many(wanted)
        wide = self._wide([wanted.bucket, *self._with(rows[0])])
        self._last = self.take(Program(wide, rows[0]))
        return self._last

    def _too_many(self, program: Program) -> UserError:
        return UserError(
            f"a program for {program.bucket.words} would be number {self._limit + 1}, and"
            f" {self._limit} are allowed, those of the usual sizes among them: load the model with"
            " a larger number of `programs` (--programs of the commands)"
        )

    def fit(self, need: Bucket, rows: Sequence[int]) -> Program:
        """As `choose`, for a group of a set: one that is there, unless it is far too large.

        Raises:
            UserError: as `choose`.
        """
        with self._lock:
            found = self._known.get((need, *rows)) or self._fit(need, rows)
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[need, *rows] = found
            return found

    def _fit(self, need: Bucket, rows: Sequence[int]) -> Program:
        found = cheapest(need, self._with(rows[0]), self._cost)
        if found is not None:
            there, own = self._cost(as_table([found, self._rung(need)]))
            if there <= WASTE * own:
                return Program(found, rows[0])
        return self._choose(need, rows, 0)  # the places are the set's

    def settle(self, needs: Sequence[Needs], rows: int) -> bool:
        """Add the programs that a set is worth, where those that are there would waste more.

        Returns:
            Whether its groups are best laid candidate by candidate, see `rows.apart`.
        """
        if not needs:
            return False
        worth = BATCHES * rows / len(needs)  # a share of what the set costs
        ways = (
            as_table(need.together for need in needs),
            as_table(row for need in needs for row in need.apart),
        )
        with self._lock:
            together, apart = (self._plan(needs_n6, rows, worth) for needs_n6 in ways)
            better = apart[0] < APART * together[0]
            for bucket in (apart if better else together)[1]:
                self.take(Program(bucket, rows))
            return better

    def _plan(
        self, needs_n6: np.ndarray, rows: int, worth: float
    ) -> tuple[float, Sequence[Bucket]]:
        """(what a set costs, buckets that are to be added for it)."""
        there, room = self._with(rows), self.spare
        known = self._total(needs_n6, there, worth, room)
        if room < 1 or known <= GOOD * float(self._cost(needs_n6).sum()):
            return known, ()
        planned = choose_buckets(
            needs_n6, room, self._cost, round_to=self._unit,
            round_patches=patch_unit(self._unit, self._processor), rows=rows, worth=worth,
        )  # fmt: skip
        if len(needs_n6) < COARSE * rows:
            planned = tuple({self._rounded(bucket): None for bucket in planned})
        new = self._total(needs_n6, planned, worth, 0) * (1 + worth * len(planned))
        return (new, planned) if new < BETTER * known or not there else (known, ())

    def _find_rung(self, need: Bucket) -> Bucket:
        return rung_of(need, self._ladder, self._cost, self._processor, self._unit)

    def _rounded(self, need: Bucket) -> Bucket:
        return rounded(need, self._processor, self._unit)

    def _with(self, rows: int) -> list[Bucket]:
        return [bucket for bucket, count in self._taken if count == rows]

    def _total(
        self, needs_n6: np.ndarray, buckets: Sequence[Bucket], worth: float, room: int
    ) -> float:
        """Cost of a set in these buckets; what fits none goes to a rung, which must be compiled.
        Infinite where there is no room for these rungs."""
        least_n = np.full(len(needs_n6), np.inf)
        for bucket, cost in zip(buckets, self._cost(as_table(buckets)), strict=True):
            least_n = np.where(bucket.fits(needs_n6), np.minimum(least_n, cost), least_n)
        others, count = np.unique(needs_n6[np.isinf(least_n)], axis=0, return_counts=True)
        rungs = [self._rung(Bucket(*map(int, need))) for need in others]
        if len(set(rungs)) > room:
            return math.inf
        more = (self._cost(as_table(rungs)) * count).sum() if rungs else 0
        whole = float(least_n[np.isfinite(least_n)].sum() + more)
        return whole * (1 + worth * len(set(rungs)))

    def _wide(self, buckets: Sequence[Bucket]) -> Bucket:
        """Holds all these and every rung, twice their tokens, `SOURCES` pictures in a prompt."""
        bucket = joined([*buckets, *self._ladder])
        tokens = bucket.patches // self._processor.merge**2
        wide = dataclasses.replace(
            bucket,
            images=max(bucket.images, bucket.candidates + SOURCES),
            prompt=max(2 * bucket.prompt, bucket.prompt + (SOURCES - 1) * tokens),
            candidate=2 * bucket.candidate,
        )
        return self._rounded(wide)


@dataclasses.dataclass
class Work:
    """What the devices were given.

    slots: cost of all slots of all calls, empty rows included; used: of the rows in use at their
    own sizes (of their longest candidate and largest picture, copies of prompts included); rows: in
    use.
    """

    slots: int = 0
    used: int = 0
    rows: int = 0

    def __post_init__(self):
        self._lock = threading.Lock()

    def add(self, program: Program, needs: Sequence[Bucket], cost: Cost) -> None:
        whole, *own = map(int, cost(as_table([program.bucket, *needs])))
        with self._lock:
            self.slots += program.rows * whole
            self.used += sum(own)
            self.rows += len(needs)

    @property
    def padded(self) -> float:
        """Share of the slots' cost that was padding, 0 where nothing was done."""
        return 1 - self.used / self.slots if self.slots else 0.0
