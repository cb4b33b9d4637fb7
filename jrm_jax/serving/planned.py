"""Many groups in few programs: pictures are prepared in threads while the devices work.

What is held in memory does not grow with the number of groups: some that are being prepared, and
for each program fewer than its rows that wait for others of their size.

Letters: B rows, K candidates, X whatever a program finds of a candidate.
"""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jrm_jax.data.encode import EncodedExample
from jrm_jax.errors import UserError
from jrm_jax.serving.ladder import holds
from jrm_jax.serving.programs import Program
from jrm_jax.serving.rows import need_of
from jrm_jax.shell import cores

THREADS = min(16, cores.usable())
LAG = 64  # batches of a stream: no row waits longer for others of its size

T, Made = TypeVar("T"), TypeVar("Made")


class Row(NamedTuple):
    """A group, or one of the rows that it was cut into; or why there is none."""

    group: int
    part: int
    parts: int
    encoded: EncodedExample | UserError


class Calls(NamedTuple):
    """What runs programs.

    cut: a group -> its rows. fit: the least bucket that holds a row -> the program that takes it.
    lay: (program, its rows) -> a batch. run: a batch -> [B, K, X], which may still be computed when
    it returns.
    """

    cut: Callable[[EncodedExample], list[EncodedExample]]
    fit: Callable[..., Program]
    lay: Callable[[Program, list[EncodedExample]], dict]
    run: Callable[[dict], Any]


def ahead(make: Callable[[T], Made], items: Iterable[T], depth: int) -> Iterator[Made]:
    """make(item) of each item, in order, prepared in threads while the caller does something else.

    Items are taken by the caller's thread, `depth` of them ahead. What `make` raises is raised in
    the place of its result.
    """
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    waiting: collections.deque = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def run_all(
    items: Iterable[tuple[int, T]],
    encode: Callable[[int, T], EncodedExample],
    calls: Calls,
    rows: int,
    lag: int | None = None,
) -> Iterator[tuple[int, np.ndarray | UserError]]:
    """(group, [K, X]) for each (group, item), when its batch is done.

    Of a group that cannot be encoded, or that no program holds, it is (group, the error).

    Args:
        rows: of most programs; what is prepared ahead is measured in them.
        lag: no row waits longer than for so many others until its program has rows enough.
    """

    def prepare(item: tuple[int, T]) -> list[Row]:
        try:
            parts = calls.cut(encode(*item))
        except UserError as error:
            return [Row(item[0], 0, 1, error)]
        return [Row(item[0], place, len(parts), part) for place, part in enumerate(parts)]

    def lay(full: tuple[Program | None, list[Row]]) -> tuple[list[Row], dict | None]:
        program, own = full
        return own, program and calls.lay(program, [row.encoded for row in own])

    every = (row for found in ahead(prepare, items, 2 * rows) for row in found)
    batches = ahead(lay, _full(every, calls.fit, lag), 1)
    parts_of: dict[int, dict[int, np.ndarray | UserError]] = collections.defaultdict(dict)
    for own, array_BKX in _computed(batches, calls.run):
        for number, row in enumerate(own):
            failed = isinstance(row.encoded, UserError)
            found = parts_of[row.group]
            found[row.part] = (
                row.encoded if failed else array_BKX[number][: len(row.encoded.candidates)]
            )
            if len(found) == row.parts:
                yield row.group, _whole([found[part] for part in range(row.parts)])
                del parts_of[row.group]


def _whole(parts: list[np.ndarray | UserError]) -> np.ndarray | UserError:
    errors = (part for part in parts if isinstance(part, UserError))
    return next(errors, None) or np.concatenate(parts)


def _full(
    rows: Iterable[Row], fit: Callable[..., Program], lag: int | None
) -> Iterator[tuple[Program | None, list[Row]]]:
    """Rows of one program, when these fill it, when the first of them has waited for `lag` others,
    and at the end. What no program takes comes at once, by itself, with the error."""
    waiting: dict[Program, list[Row]] = {}  # in the order of their first rows
    since: dict[Program, int] = {}
    for number, row in enumerate(rows):
        try:
            program = None if isinstance(row.encoded, UserError) else fit(need_of(row.encoded))
        except UserError as error:
            program, row = None, row._replace(encoded=error)
        if program is None:
            yield None, [row]
            continue
        since.setdefault(program, number)
        waiting.setdefault(program, []).append(row)
        first = next(iter(waiting))
        for each in dict.fromkeys((program, first)):
            late = lag is not None and number - since[each] >= lag
            if late or len(waiting[each]) == each.rows:
                del since[each]
                yield each, waiting.pop(each)
    # where a stream goes on, its rows must go where they went before
    yield from (_merged(waiting) if lag is None else waiting).items()


def _merged(waiting: dict[Program, list[Row]]) -> dict[Program, list[Row]]:
    """The same rows in fewer batches: where all of one find room in what others leave free."""
    left = dict(waiting)
    for program in sorted(waiting, key=lambda each: len(waiting[each])):
        others = {each: list(rows) for each, rows in left.items() if each != program}
        for row in left[program]:
            need = need_of(row.encoded)
            free = (p for p in others if len(others[p]) < p.rows and holds(p.bucket, need))
            if (found := next(free, None)) is None:
                break
            others[found].append(row)
        else:
            left = others
    return left


def _computed(
    batches: Iterable[tuple[list[Row], dict | None]], run: Callable[[dict], Any]
) -> Iterator[tuple[list[Row], np.ndarray]]:
    """The arrays of batches, empty where there is nothing to run. The devices have the next one
    before an array is waited for."""
    last = None
    for own, batch in batches:
        now = own, [] if batch is None else run(batch)
        if last is not None:
            yield last[0], np.asarray(last[1])
        last = now
    if last is not None:
        yield last[0], np.asarray(last[1])


def in_order(found: Iterable[tuple[int, T]]) -> Iterator[T]:
    """Values by their numbers, 0 first, as soon as that is possible."""
    early: dict[int, T] = {}
    wanted = 0
    for number, value in found:
        early[number] = value
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1
