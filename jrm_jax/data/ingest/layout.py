"""What a kind of source has to answer, and what a build tells it: `building` and all layouts meet
here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from jrm_jax.data import store
from jrm_jax.data.schema import PreferenceExample
from jrm_jax.errors import RecordError, UserError

Read = TypeVar("Read")
Member = tuple[str, dict[str, Any]]  # where a row stands, and the row


class Layout(Protocol):
    """What a kind of source looks like. Everything here raises RecordError for a bad row."""

    suffixes: tuple[str, ...]
    columns: Callable[[list[str]], list[str]] | None  # those that `key`, `label` and `dimensions`
    # are shown of a row, in both passes; None: everything
    gathers: bool  # rows with the same key become one group

    def key(self, row: dict[str, Any], where: str) -> str | None:
        """Of the group that a row belongs to (or the record's own id; None: it has none)."""

    def label(self, row: dict[str, Any]) -> str:
        """What must be equal where a key comes again; read where rows are not gathered."""

    def dimensions(self, row: dict[str, Any]) -> Sequence[str]:
        """Reward dimensions that a row has labels in; the data set has those of all its rows."""

    def make(self, members: list[Member], problems: Problems) -> list[PreferenceExample]:
        """Examples of one group; rows that cannot be used are given to `problems.leave`."""


def seen(layout: Layout, row: dict[str, Any]) -> dict[str, Any]:
    """What `key`, `label` and `dimensions` are shown of a row. The first pass reads no more of
    parquet; shown no more in the second, and of any other file, they cannot answer differently."""
    if layout.columns is None:
        return row
    return {name: row[name] for name in layout.columns(list(row))}


def read_each(
    members: list[Member], problems: Problems, read: Callable[[dict[str, Any], str], Read]
) -> Iterator[tuple[str, Read]]:
    """(where, read(row, where)) of the rows of a group; a row that cannot be read is left out."""
    for where, row in members:
        try:
            found = read(row, where)
        except RecordError as error:
            problems.leave(where, error)
            continue
        yield where, found


class Found(NamedTuple):
    """kept: of a row that is kept; else it is left out."""

    kept: bool
    kind: str
    detail: str


class Options(NamedTuple):
    """skip_bad: leave bad rows out instead of stopping at the first.

    valid_fraction: of the prompts, those that go into the split `valid`; all others go to `split`.
    shard_examples: groups after which a file is complete; it may be complete earlier, by its size.
    """

    skip_bad: bool = False
    valid_fraction: float = 0.0
    split: str = "train"
    shard_examples: int = store.SHARD_EXAMPLES


class Problems:
    """Rows that are left out, and oddities of rows that are kept, each with its kind.

    found: them, in order.
    """

    def __init__(self, skip_bad: bool):
        self._skip_bad, self._left = skip_bad, set[str]()
        self.found: list[Found] = []

    def leave(self, where: str, error: UserError) -> None:
        """
        Raises:
            UserError: the error, where bad rows are not to be skipped.
        """
        if not self._skip_bad:
            raise error
        if where not in self._left:
            self._left.add(where)
            kind = getattr(error, "kind", "row that cannot be read")
            self.found.append(Found(False, kind, str(error)))

    def note(self, kind: str, detail: str) -> None:
        self.found.append(Found(True, kind, detail))


class Result(NamedTuple):
    """counts: groups per split. left, notes: {kind: how many}. listed: file that lists them all."""

    counts: dict[str, int]
    dimensions: tuple[str, ...]
    rows: int
    left: dict[str, int]
    notes: dict[str, int]
    listed: Path = Path()
