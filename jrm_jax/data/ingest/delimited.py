"""Tables as spreadsheets write them (CSV): the delimiter is found, and a quote that is never closed
costs its own row only."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jrm_jax.data.ingest.texts import open_text, printable
from jrm_jax.errors import RecordError, UserError

DELIMITERS = ",;\t|"
CELL = 1 << 26  # characters: a cell may hold a picture as a data: URI
_SAID = "sep="  # how Excel says the delimiter in a line of its own


def read_cells(path: Path, columns: Any, skip: int) -> Iterator[tuple[str, Any]]:
    """(where, {head: cell} or the error) of each row; see `rows.read_rows`.

    Raises:
        UserError: the heads cannot be read.
    """
    csv.field_size_limit(CELL)
    shown = printable(path)
    with open_text(path, newline="") as file:
        lines = _Lines(file)
        first = next(lines, "")
        if first.lower().startswith(_SAID):
            delimiter = first[len(_SAID) :].rstrip("\r\n")[:1] or DELIMITERS[0]
        else:
            delimiter = max(DELIMITERS, key=first.count)
            lines.again(len(lines.taken))
        records = _records(lines, delimiter)
        _, heads = next(records, (0, []))
        if isinstance(heads, csv.Error):
            raise UserError(f"{shown}:1: the heads cannot be read ({heads})")
        heads = [head.strip() for head in heads]
        while heads and not heads[-1]:  # of empty columns at the right
            heads.pop()
        twice = next((head for head in heads if heads.count(head) > 1), None)
        if twice is not None:
            raise UserError(f"{shown}:1: column {twice!r} is there twice; rename or remove one")
        for index, (number, cells) in enumerate(records):
            if index >= skip:
                where = f"{shown}:{number}"
                yield where, _row(heads, cells, where)


def _row(heads: list[str], cells: list[str] | csv.Error, where: str) -> dict | UserError:
    if isinstance(cells, csv.Error):
        words = f"{where}: a quote (\") opens here and is not closed as it must be ({cells})"
        return RecordError(words, "quote that is not closed")
    if any(cells[len(heads) :]):
        return UserError(f"{where}: has more cells than the {len(heads)} heads")
    # spreadsheets leave out empty cells at the end of a row
    return dict(zip(heads, [*cells, *[""] * (len(heads) - len(cells))], strict=False))


def _records(lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """(line, cells) of each row, its last line; of one that cannot be read its first line and the
    error, and what follows that line is read again. Rows of empty cells, as spreadsheets leave them
    below a table, are none."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.taken.clear()
        begin = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.again(len(lines.taken) - 1)
            yield begin, error
            continue
        if any(map(str.strip, cells)):
            yield lines.number, cells


class _Lines:
    """Lines of a file, some of which can be had again. number: of the line that came last."""

    def __init__(self, file: Iterator[str]):
        self._file, self._waiting = file, deque()
        self.taken: list[str] = []
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._file)
        self.taken.append(line)
        self.number += 1
        return line

    def again(self, count: int) -> None:
        """Give the last lines again."""
        self._waiting.extendleft(reversed(self.taken[len(self.taken) - count :]))
        self.number -= count
