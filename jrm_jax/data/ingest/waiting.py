"""Rows that wait for the others of their group: in memory up to a limit, then on the disk."""

from __future__ import annotations

import pickle
import sqlite3
from typing import Any

from jrm_jax.data.ingest.layout import Member

MEMORY = 128 * 2**20  # bytes
_TABLES = """
CREATE TABLE IF NOT EXISTS waiting (key TEXT, number INTEGER, content BLOB);
CREATE INDEX IF NOT EXISTS waiting_key ON waiting (key);
"""


class Waiting:
    """By key of their group. What is on the disk after `spill` is committed with the database."""

    def __init__(self, state: sqlite3.Connection):
        self._state = state
        state.executescript(_TABLES)
        self._held: dict[str, list[tuple[int, Member]]] = {}  # with the rows' numbers
        self._taken: dict[str, list[tuple[int, Member]]] = {}  # and not on the disk
        self._bytes = 0

    def forget_from(self, number: int) -> None:
        """Of a build that goes on: rows from there on were read ahead, and will be read again."""
        self._state.execute("DELETE FROM waiting WHERE number >= ?", (number,))

    def add(self, key: str, number: int, member: Member) -> int:
        """Keep a row; how many wait for this group now."""
        self._held.setdefault(key, []).append((number, member))
        self._bytes += size_of(member[1])
        if self._bytes > MEMORY:
            self._store(self._held)
            self._held, self._bytes = {}, 0
        query = "SELECT count(*) FROM waiting WHERE key = ?"
        stored = self._state.execute(query, (key,)).fetchone()[0]
        return stored + len(self._held.get(key, ()))

    def take(self, key: str) -> list[Member]:
        """The rows of a group in the order of the files; they are kept until it is `done`."""
        members = self._held.pop(key, [])
        self._bytes -= sum(size_of(row) for _, (_, row) in members)
        self._taken[key] = members
        stored = self._state.execute("SELECT content FROM waiting WHERE key = ?", (key,))
        members = members + [pickle.loads(content) for (content,) in stored]
        return [member for _, member in sorted(members, key=lambda item: item[0])]

    def done(self, key: str) -> None:
        """What became of a group is written: nobody needs its rows any more."""
        del self._taken[key]
        self._state.execute("DELETE FROM waiting WHERE key = ?", (key,))

    def spill(self) -> None:
        """All rows go to the disk, those too that are taken and not done."""
        self._store(self._held)
        self._store(self._taken)
        self._held, self._bytes = {}, 0
        self._taken = {key: [] for key in self._taken}

    def _store(self, rows: dict[str, list[tuple[int, Member]]]) -> None:
        for key, members in rows.items():
            self._state.executemany(
                "INSERT INTO waiting VALUES (?, ?, ?)",
                [(key, member[0], pickle.dumps(member, 5)) for member in members],
            )

    def keys(self) -> list[str]:
        """Of all groups that wait, in the order of their first rows."""
        self.spill()
        found = self._state.execute("SELECT key FROM waiting GROUP BY key ORDER BY min(number)")
        return [key for (key,) in found]


def size_of(row: dict[str, Any]) -> int:
    """Bytes of a row, about."""
    total = 0
    for value in row.values():
        if isinstance(value, dict):
            total += size_of(value)
        elif isinstance(value, list):
            total += sum(size_of(v) if isinstance(v, dict) else len(str(v)) for v in value)
        else:
            total += len(value) if isinstance(value, bytes | str) else 50
    return total + 200
