"""Encoded groups through the programs of a model: one call, a set, a stream. Thread-safe.

Letters: B rows, K candidates, X what a program finds of a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jrm_jax.data.buckets import Bucket
from jrm_jax.data.encode import EncodedExample, Encoder
from jrm_jax.data.pipeline import assemble_batch, empty_batch
from jrm_jax.errors import UserError
from jrm_jax.model.config import BackboneConfig
from jrm_jax.run.flops import group_cost
from jrm_jax.serving.device_call import DeviceCall
from jrm_jax.serving.ladder import UNIT, UNITS, joined, make_ladder
from jrm_jax.serving.planned import LAG, Calls, T, in_order, run_all
from jrm_jax.serving.programs import LIMIT, Program, Programs, Work
from jrm_jax.serving.rows import Needs, apart, need_of, split


class Runner:
    """
    Args:
        batch_size: groups at a time on each place of the devices.
        limit: programs for each kind of output.
        trained: the buckets of the model's training, as far as they are known.

    Attributes:
        rows, one: rows of the programs for many groups, and for few: one for each place.
        ladder: buckets of single calls. cost: of a group in a bucket.
        work: what was computed so far.

    Raises:
        UserError: a batch size below 1.
    """

    def __init__(
        self,
        device: DeviceCall,
        encoder: Encoder,
        config: BackboneConfig,
        batch_size: int,
        limit: int = LIMIT,
        trained: Sequence[Bucket] = (),
    ):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, must be at least 1")
        self.device, self.encoder = device, encoder
        self.rows, self.one = batch_size * device.places, device.places
        self._unit = UNITS.get(device.platform, UNIT)
        self.cost, self._limit, self.work = group_cost(config), limit, Work()
        self.ladder = make_ladder(encoder, self.cost, trained, self._unit)
        self._shelves: dict[tuple, Programs] = {}

    def shelf(self, kind: tuple) -> Programs:
        """The programs of a kind of output, see `DeviceCall`.

        Raises:
            UserError: a limit below 1.
        """
        if kind not in self._shelves:
            processor = self.encoder.processor
            new = Programs(self.ladder, self.cost, processor, self._limit, self._unit)
            self._shelves.setdefault(kind, new)
        return self._shelves[kind]

    def warm(self, kind: tuple, buckets: Sequence[Bucket], rows: int) -> None:
        """Compile programs.

        Raises:
            UserError: one too many.
        """
        for bucket in buckets:
            self.shelf(kind).take(Program(bucket, rows))
            self.device(kind, empty_batch(rows, bucket, self.encoder)).block_until_ready()

    def call(
        self, kind: tuple, program: Program, groups: Sequence[EncodedExample], *more: Any
    ) -> list[np.ndarray]:
        """[K, X] of each group, by one call."""
        array_BKX = np.asarray(self.device(kind, self._lay(program, groups), *more))
        counts = [len(group.candidates) for group in groups]
        return [row_KX[:count] for row_KX, count in zip(array_BKX, counts, strict=False)]

    def planned(
        self,
        kind: tuple,
        needs: Sequence[Needs],
        encode: Callable[[int], EncodedExample],
        one_bucket: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> list[np.ndarray]:
        """[K, X] of each group of a set; few groups go one after another through one program.

        Args:
            needs: of each group. encode: of a group by its number, in threads.
            one_bucket: all go into one that holds them all.
            advance: told how many groups are done.

        Raises:
            UserError: a group cannot be encoded, or no program holds it.
        """
        shelf, rows, program = self.shelf(kind), (self.rows, self.one), None
        few = len(needs) == 1 or 2 * len(needs) <= self.rows
        cut = split
        if needs and (few or one_bucket):
            whole = joined([need.together for need in needs])
            program = shelf.choose(whole, rows[::-1] if few else rows)
        elif shelf.settle(needs, self.rows):
            cut = apart
        items = ((index, index) for index in range(len(needs)))
        calls, found = self._calls(kind, cut, program), {}
        for index, array_KX in run_all(items, lambda index, _: encode(index), calls, rows[0]):
            if isinstance(array_KX, UserError):
                raise array_KX
            found[index] = array_KX
            if advance is not None:
                advance(1)
        return [found[index] for index in range(len(needs))]

    def streamed(
        self,
        kind: tuple,
        like: Iterable[Needs],
        items: Iterable[T],
        encode: Callable[[int, T], EncodedExample],
    ) -> Iterator[np.ndarray | UserError]:
        """[K, X] of each item, in order; or the error of one that cannot be encoded, or that no
        program holds.

        Args:
            like: needs by which buckets are planned.
            encode: of (number, item), in threads.
        """
        cut = apart if self.shelf(kind).settle(list(like), self.rows) else split
        lag = LAG * self.rows
        every = enumerate(items)
        return in_order(run_all(every, encode, self._calls(kind, cut), self.rows, lag))

    def _calls(self, kind: tuple, cut: Callable, program: Program | None = None) -> Calls:
        """`program`: into which all groups go; default: each into one that suits it."""

        def fit(need: Bucket) -> Program:
            return program or self.shelf(kind).fit(need, (self.rows, self.one))

        return Calls(cut, fit, self._lay, lambda batch: self.device(kind, batch))

    def _lay(self, program: Program, groups: Sequence[EncodedExample]) -> dict[str, np.ndarray]:
        fillers = [None] * (program.rows - len(groups))
        batch = assemble_batch([*groups, *fillers], program.bucket, self.encoder)
        self.work.add(program, [need_of(group) for group in groups], self.cost)
        return batch
