"""The static sizes that cost a set of examples least: few boxes over many sizes.

Letters: n examples, m cells (examples of about one size, taken together), b boxes; 6 the fields of
`Bucket`. A box holds every example that needs no more than it has in any field, and an example
costs what the cheapest box costs that holds it.

The search has three parts: the examples are cut into cells where that saves most, cells are merged
where that costs least, and the boxes that are left hand parts of what they hold to each other as
long as that helps. It is no proof of the least cost. All sums are whole numbers, so that every
machine chooses the same.
"""

from __future__ import annotations

import heapq
import itertools
import math
from typing import NamedTuple

import numpy as np

from jrm_jax.data.buckets import Bucket, Cost, by_cost
from jrm_jax.errors import UserError

CELLS = 384  # more are hardly better and take longer
CUTS = 24  # places to cut at that are tried in one field
NEAR = 6  # boxes that a part may go to
PARTS = 6  # of a box, in one field, that may go to another box
FRUITLESS, RESTARTS = 3, 10  # restarts in a row without gain, and all
GAIN = 1.1  # the search makes boxes that were merged cheaper by less than this
LARGEST = 2**62
ROOM = 2**56  # for the cost of a whole set; sums and differences of several stay below LARGEST


def choose_buckets(
    needs_n6: np.ndarray,
    programs: int,
    cost: Cost,
    *,
    round_to: int = 8,
    round_patches: int = 4,
    weights_n: np.ndarray | None = None,
    rows: int = 1,
    worth: float = 0.0,
    refine: bool = True,
) -> tuple[Bucket, ...]:
    """At most `programs` buckets that hold all examples at the least cost that was found.

    Args:
        needs_n6: what each example asks for, whole numbers; `buckets.needs`.
        cost: sizes [m, 6] int64 -> cost [m] of a group with them; it never falls where a size
            grows. `run.flops.group_cost`.
        round_to: multiple for P, C and T; `round_patches`: for N.
        weights_n: how often each example counts, whole numbers; default once.
        rows: of a batch; a bucket with fewer examples costs a batch all the same.
        worth: the share of the whole cost that a bucket must save, or it is not made: what it
            takes to compile its programs.
        refine: False: just so many boxes as cells were merged into; for few examples that takes
            hundredths of a second and costs a few per cent more.

    Returns:
        Buckets by growing cost.

    Raises:
        UserError: there are no examples.
    """
    table = np.asarray(needs_n6, np.int64).reshape(-1, len(Bucket.__dataclass_fields__))
    if not len(table):
        raise UserError("no examples: the data set is empty")
    weights = np.ones(len(table), np.int64) if weights_n is None else np.asarray(weights_n)
    units = np.array([1, 1, round_patches, round_to, round_to, round_to])
    table, inverse = np.unique(-(-table // units) * units, axis=0, return_inverse=True)
    count = np.zeros(len(table), np.int64)
    np.add.at(count, inverse.reshape(-1), weights.astype(np.int64))
    largest = int(cost(table.max(axis=0)[None])[0]) * max(int(count.sum()), rows)
    search = _Search(cost, max(1, -(-largest // ROOM)), rows)
    cells_m6, count_m = search.cut(table, count)
    limit = max(1, min(programs, len(cells_m6)))
    boxes, chosen, least = search.merge(cells_m6, count_m, limit), None, math.inf
    if not refine:
        chosen, limit = search.settle(boxes, cells_m6, count_m), 0
    while limit:  # what a box saves grows as they become fewer: the first loss is the end
        if least < search.settle(boxes, cells_m6, count_m).total * (1 + worth * limit) / GAIN:
            break
        now = search.improve(boxes, limit, cells_m6, count_m)
        whole = now.total * (1 + worth * len(now.boxes))
        if whole >= least:
            break
        chosen, least, limit = now, whole, len(now.boxes) - 1
        boxes = search.merge(now.boxes, now.count_b, limit) if limit else now.boxes
    boxes = search.settle(chosen.boxes, table, count).boxes
    return by_cost((Bucket(*map(int, box)) for box in boxes), cost)


class _Settled(NamedTuple):
    """boxes [b, 6], no larger than what they hold; what that costs; which box holds a cell [m]; and
    how many examples a box holds [b]."""

    boxes: np.ndarray
    total: int
    box_m: np.ndarray
    count_b: np.ndarray


class _Search:
    def __init__(self, cost: Cost, unit: int, rows: int):
        self._cost, self._unit, self._rows = cost, unit, rows

    def cost(self, sizes: np.ndarray) -> np.ndarray:
        """[..., 6] -> [...], in units that let the whole sum stay within 64 bits."""
        flat = sizes.reshape(-1, sizes.shape[-1])
        return (np.asarray(self._cost(flat), np.int64) // self._unit).reshape(sizes.shape[:-1])

    def charge(self, count: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """A box's cost: that of its examples, at least of one batch."""
        return np.maximum(count, self._rows) * cost

    # Examples into cells

    def cut(self, table_n6: np.ndarray, count_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sizes [m, 6], how many examples [m]) of at most `CELLS` cells.

        Always that cell is cut in two, at that value of one field, which saves most.
        """
        queue: list[tuple[int, int, np.ndarray, np.ndarray]] = []
        done, number = [], itertools.count()

        def add(members: np.ndarray) -> None:
            saved, left, right = self._best_cut(table_n6, count_n, members)
            if saved > 0:
                heapq.heappush(queue, (-saved, next(number), left, right))
            else:
                done.append(members)

        add(np.arange(len(table_n6)))
        while queue and len(queue) + len(done) < CELLS:
            _, _, left, right = heapq.heappop(queue)
            add(left)
            add(right)
        cells = done + [np.concatenate(each[2:]) for each in queue]
        return (
            np.stack([table_n6[members].max(axis=0) for members in cells]),
            np.array([count_n[members].sum() for members in cells]),
        )

    def _best_cut(
        self, table_n6: np.ndarray, count_n: np.ndarray, members: np.ndarray
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """(what it saves, members below, members above)."""
        own, count = table_n6[members], count_n[members]
        whole = int(count.sum()) * int(self.cost(own.max(axis=0)[None])[0])
        best: tuple[int, np.ndarray, np.ndarray] = (0, members, members[:0])
        for field in range(own.shape[1]):
            order = np.argsort(own[:, field], kind="stable")
            column = own[order, field]
            starts = np.flatnonzero(column[1:] != column[:-1]) + 1
            if not len(starts):
                continue
            starts = np.concatenate([[0], starts[_spread(len(starts), CUTS)]])
            ordered, counts = own[order], np.add.reduceat(count[order], starts)
            maxima = np.maximum.reduceat(ordered, starts, axis=0)
            below = np.maximum.accumulate(maxima, axis=0)[:-1]
            above = np.maximum.accumulate(maxima[::-1], axis=0)[::-1][1:]
            number = np.cumsum(counts)[:-1]
            costs = number * self.cost(below) + (counts.sum() - number) * self.cost(above)
            least = int(np.argmin(costs))
            if whole - int(costs[least]) > best[0]:
                at = starts[least + 1]
                best = (whole - int(costs[least]), members[order[:at]], members[order[at:]])
        return best

    # Cells into boxes

    def merge(self, sizes_m6: np.ndarray, count_m: np.ndarray, boxes: int) -> np.ndarray:
        """[b, 6]: of the two whose merging costs least one is made, until so few are left."""
        sizes, count = sizes_m6.copy(), count_m.copy()
        charge = self.charge(count, self.cost(sizes))
        alive = np.ones(len(sizes), bool)

        def extra(i: int) -> np.ndarray:
            joined = self.cost(np.maximum(sizes, sizes[i]))
            more = self.charge(count + count[i], joined) - charge - charge[i]
            more[~alive] = LARGEST
            more[i] = LARGEST
            return more

        table = np.stack([extra(i) for i in range(len(sizes))])
        for _ in range(len(sizes) - boxes):
            i, j = divmod(int(np.argmin(table)), len(sizes))
            sizes[i], count[i] = np.maximum(sizes[i], sizes[j]), count[i] + count[j]
            alive[j] = False
            charge[i] = self.charge(count[i], self.cost(sizes[i][None])[0])
            table[j], table[:, j] = LARGEST, LARGEST
            table[i] = extra(i)
            table[:, i] = table[i]
        return sizes[alive]

    # Boxes among each other

    def settle(self, boxes: np.ndarray, sizes_m6: np.ndarray, count_m: np.ndarray) -> _Settled:
        """Every cell into the cheapest box that holds it, every box as small as what it holds."""
        while True:
            placed = self._place(boxes[None], sizes_m6, count_m)
            box_m, count_b, total = (part[0] for part in placed)
            used = np.unique(box_m)
            shrunk = np.stack([sizes_m6[box_m == box].max(axis=0) for box in used])
            if len(used) == len(boxes) and (shrunk == boxes).all():
                return _Settled(boxes, int(total), box_m, count_b)
            boxes = shrunk

    def _place(
        self, boxes_qb6: np.ndarray, sizes_m6: np.ndarray, count_m: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(cheapest box that holds each cell [q, m], examples in a box [q, b], cost [q])."""
        queries, boxes, fields = boxes_qb6.shape
        cost_qb = self.cost(boxes_qb6)
        fits_qbm = np.ones((queries, boxes, len(sizes_m6)), bool)
        for field in range(fields):
            fits_qbm &= sizes_m6[:, field] <= boxes_qb6[:, :, field, None]
        box_qm = np.where(fits_qbm, cost_qb[:, :, None], LARGEST).argmin(axis=1)
        slot_qm = box_qm + boxes * np.arange(queries)[:, None]
        counts = np.tile(count_m, queries)  # as floats they are exact up to 2^53
        count_qb = np.bincount(slot_qm.reshape(-1), counts, queries * boxes).astype(np.int64)
        count_qb = count_qb.reshape(queries, boxes)
        total_q = np.where(count_qb > 0, self.charge(count_qb, cost_qb), 0).sum(axis=1)
        return box_qm, count_qb, total_q

    def improve(
        self, boxes: np.ndarray, limit: int, sizes_m6: np.ndarray, count_m: np.ndarray
    ) -> _Settled:
        """At most `limit` boxes that neither handing over a part makes cheaper nor beginning again
        from two of them made one."""
        now, tried = self._descend(boxes, limit, sizes_m6, count_m), 0
        for _ in range(RESTARTS):
            pairs = np.array([*itertools.combinations(range(len(now.boxes)), 2)])
            if tried == min(FRUITLESS, len(pairs)):
                break
            joined = now.boxes[pairs].max(axis=1)
            extra = self.charge(now.count_b[pairs].sum(axis=1), self.cost(joined))
            extra -= self.charge(now.count_b, self.cost(now.boxes))[pairs].sum(axis=1)
            pair = np.argsort(extra, kind="stable")[tried]
            boxes = np.concatenate([np.delete(now.boxes, pairs[pair], axis=0), joined[pair][None]])
            then = self._descend(boxes, limit, sizes_m6, count_m)
            now, tried = (then, 0) if then.total < now.total else (now, tried + 1)
        return now

    def _descend(
        self, boxes: np.ndarray, limit: int, sizes_m6: np.ndarray, count_m: np.ndarray
    ) -> _Settled:
        now = self.settle(boxes, sizes_m6, count_m)
        while True:
            before = now.total
            for giver, field in itertools.product(range(limit), range(boxes.shape[1])):
                changed = self._hand_over(now, giver, field, limit, sizes_m6)
                if len(changed):
                    least = self._place(changed, sizes_m6, count_m)[2].argmin()
                    then = self.settle(changed[least], sizes_m6, count_m)
                    now = min(now, then, key=lambda settled: settled.total)
            if now.total == before:
                return now

    def _hand_over(
        self, now: _Settled, giver: int, field: int, limit: int, sizes_m6: np.ndarray
    ) -> np.ndarray:
        """[q, limit, 6]: the boxes if another, or a new one, took from `giver` what is large, or
        small, in one field. A box that is not there is 0."""
        own = sizes_m6[now.box_m == giver]
        if not len(own):
            return np.zeros((0, limit, sizes_m6.shape[1]), np.int64)
        boxes = np.zeros((limit, sizes_m6.shape[1]), np.int64)
        boxes[: len(now.boxes)] = now.boxes
        near = np.argsort(self.cost(np.maximum(boxes, boxes[giver])), kind="stable")
        there = [taker for taker in near if taker != giver and taker <= len(now.boxes)]
        takers = [int(taker) for taker in there[:NEAR]]
        values, found = np.unique(own[:, field]), []
        for value in values[_spread(len(values) - 1, PARTS)]:
            above = own[:, field] > value
            for part in (above, ~above):
                taken, left = own[part].max(axis=0), own[~part].max(axis=0)
                for taker in takers:
                    changed = boxes.copy()
                    changed[taker], changed[giver] = np.maximum(boxes[taker], taken), left
                    found.append(changed)
        return np.array(found).reshape(-1, *boxes.shape)


def _spread(count: int, most: int) -> np.ndarray:
    """At most so many of range(count), evenly, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
