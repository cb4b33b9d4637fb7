"""A user's files become a prepared data set: streamed, counted, and resumed where it was stopped.

Two passes. The first reads what tells which rows belong together and counts the rows of every
group. The second reads everything, in order; a group is made and written when its last row has
come, and rows that wait for others lie in memory up to a limit, then on the disk. Nothing grows in
memory with the number of rows.

All that a killed build needs to go on stands in one SQLite file: place in the source, complete
shards, waiting rows, counts, problems. It is committed once per shard, after the shard's file is
complete, and shards are cut by what they hold; so a resumed build writes what an undisturbed one
writes, byte for byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jrm_jax.data import store
from jrm_jax.data.ingest import card
from jrm_jax.data.ingest.layout import Layout, Member, Options, Problems, Result
from jrm_jax.data.ingest.rows import find, read_rows
from jrm_jax.data.schema import (
    DEFAULT_DIMENSIONS,
    Image,
    PreferenceExample,
    in_dimensions,
    to_record,
)
from jrm_jax.errors import RecordError, UserError

VERSION = 2  # raise it when the same files give other data sets
STATE, LOCK, PROBLEMS = "state.sqlite", "lock", "problems.txt"
WAITING_BYTES = 128 * 2**20  # of rows in memory that wait for the others of their group
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS groups (key TEXT PRIMARY KEY, rows INTEGER, label TEXT, differs INTEGER)
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS waiting (key TEXT, number INTEGER, content BLOB);
CREATE INDEX IF NOT EXISTS waiting_key ON waiting (key);
CREATE TABLE IF NOT EXISTS problems (kept INTEGER, kind TEXT, detail TEXT);
"""

def build(
    layout: Layout,
    name: str,
    source: Path,
    out: Path,
    options: Options,
    progress: Callable[[str, int, int, Counter], None] = lambda *_: None,
) -> Result:
    """Write the data set `out`; goes on where an earlier call with the same arguments was stopped.

    Args:
        name: of the layout, for the card and for messages.
        progress: called now and then with (what is done, rows done, rows there are, counts).

    Raises:
        UserError: `out` exists, a file cannot be read, a bad row (see `Options`), no usable row,
            or a half-made data set of other files lies there.
    """
    store.check_absent(out)
    files = find(source, layout.suffixes)
    folder = out.with_name(f"{out.name}.building")
    with store.disk_errors(out):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{folder} is being written by another process") from error
            work = _Work(layout, name, files, folder, options, progress)
            try:
                result = work.run(source)
                folder.rename(out)
            except BaseException as error:
                work.close()
                if isinstance(error, sqlite3.OperationalError):
                    raise OSError(str(error)) from error
                if not isinstance(error, UserError):
                    raise
                if work.shards.done:
                    words = f"{error} ({folder} keeps what is done: the same command goes on there)"
                    raise UserError(words) from error
                shutil.rmtree(folder, ignore_errors=True)
                raise
    work.close()
    for left in (STATE, LOCK):
        (out / left).unlink(missing_ok=True)
    return result


class _Work:
    """One build: its state on the disk, and the rows that wait in memory."""

    def __init__(self, layout, name, files, folder, options, progress):
        self.layout, self.name, self.files, self.folder = layout, name, files, folder
        self.options, self.progress = options, progress
        self.state = sqlite3.connect(folder / STATE, isolation_level=None)
        self.state.executescript(_TABLES)
        self._check_fingerprint()
        self.shards = store.Shards(
            folder, "preferences", self._get("shards", {}), options.shard_examples
        )
        self.counts = Counter(self._get("counts", {}))
        self.dimensions = tuple(self._get("dimensions", ()))
        self.problems = Problems(self.state, options.skip_bad, self.counts)
        self.waiting: dict[str, list[tuple[int, Member]]] = {}
        self.waiting_bytes = 0

    def close(self) -> None:
        self.shards.abandon()
        self.state.close()

    def _get(self, name: str, default: Any) -> Any:
        row = self.state.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            self.state.execute("REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))

    def _check_fingerprint(self) -> None:
        facts = [VERSION, self.name, *self.options._replace(skip_bad=None)]
        facts.append(repr(self.layout))
        facts += [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in self.files]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        if self._get("fingerprint", digest) != digest:
            self.state.close()
            raise UserError(
                f"{self.folder} was begun with other files or options: remove it to begin anew"
            )
        self._set(fingerprint=digest)

    def run(self, source: Path) -> Result:
        if self._get("rows of files", None) is None:
            self._index()
        total = self._get("rows of files", [])
        self.state.execute("BEGIN")
        for number, where, row in self._rows(total, self._get("position", 0)):
            self._take(number, where, row)
            if self.shards.full:
                self._commit(number + 1)
            if number % 64 == 0:
                self.progress("writing", number, sum(total), self.counts)
        self._commit(sum(total))
        return self._finish(source, sum(total))

    def _index(self) -> None:
        """First pass: rows of each group and of each file, and the reward dimensions."""
        self.state.execute("BEGIN")
        self.state.execute("DELETE FROM groups")
        rows_of_files, done, named = [], 0, {}
        for file in self.files:
            count = 0
            for where, row in read_rows(file, self.layout.columns):
                count += 1
                if isinstance(row, UserError):
                    continue  # told in the second pass
                try:
                    key = self.layout.key(row, where)
                except RecordError:
                    continue
                named |= dict.fromkeys(self.layout.dimensions(row))
                if key is not None:
                    label = "" if self.layout.gathers else self.layout.label(row)
                    self.state.execute(
                        "INSERT INTO groups VALUES (?, 1, ?, 0) ON CONFLICT (key) DO UPDATE SET"
                        " rows = rows + 1, differs = differs OR label != excluded.label",
                        (key, label),
                    )
                if count % 64 == 0:
                    self.progress("looking through the files", done + count, 0, self.counts)
            rows_of_files.append(count)
            done += count
        if not done:
            raise UserError(f"{self.files[0]}: no usable record (the file is empty)")
        self.dimensions = tuple(named) or DEFAULT_DIMENSIONS
        self._set(**{"rows of files": rows_of_files, "dimensions": self.dimensions})
        self.state.execute("COMMIT")

    def _rows(self, total: Sequence[int], position: int) -> Iterator[tuple[int, str, Any]]:
        first = 0
        for file, count in zip(self.files, total, strict=True):
            if position < first + count:
                skip = max(0, position - first)
                for number, (where, row) in enumerate(read_rows(file, None, skip), first + skip):
                    yield number, where, row
            first += count

    def _take(self, number: int, where: str, row: dict[str, Any] | UserError) -> None:
        self.problems.left.clear()
        try:
            if isinstance(row, UserError):
                raise row
            key = self.layout.key(row, where)
        except UserError as error:
            self.problems.leave(where, error)
            return
        if key is None:
            self._emit([(where, row)])
            return
        wanted, differs = self.state.execute(
            "SELECT rows, differs FROM groups WHERE key = ?", (key,)
        ).fetchone()
        if not self.layout.gathers:
            if wanted > 1:
                self.problems.note("id that occurs more than once", f"{where}: {key}")
            if differs:
                self.problems.note("id with contradicting labels", f"{where}: {key}")
            self._emit([(where, row)])
            return
        self.waiting.setdefault(key, []).append((number, (where, row)))
        self.waiting_bytes += _size(row)
        found = self.state.execute(
            "SELECT count(*) FROM waiting WHERE key = ?", (key,)
        ).fetchone()[0]
        if found + len(self.waiting[key]) == wanted:
            self._emit(self._gather(key, found))
        elif self.waiting_bytes > WAITING_BYTES:
            self._spill()

    def _gather(self, key: str, found: int) -> list[Member]:
        """The rows of a complete group in the order of the files."""
        members = self.waiting.pop(key)
        self.waiting_bytes -= sum(_size(row) for _, (_, row) in members)
        if found:
            stored = self.state.execute("SELECT content FROM waiting WHERE key = ?", (key,))
            members += [pickle.loads(content) for (content,) in stored]
            self.state.execute("DELETE FROM waiting WHERE key = ?", (key,))
        return [member for _, member in sorted(members, key=lambda item: item[0])]

    def _spill(self) -> None:
        """Waiting rows go to the disk."""
        for key, members in self.waiting.items():
            self.state.executemany(
                "INSERT INTO waiting VALUES (?, ?, ?)",
                [(key, member[0], pickle.dumps(member, 5)) for member in members],
            )
        self.waiting, self.waiting_bytes = {}, 0

    def _emit(self, members: list[Member]) -> None:
        try:
            examples = self.layout.make(members, self.problems)
        except RecordError as error:
            for where, _ in members:
                self.problems.leave(where, error)
            return
        for example in examples:
            example = in_dimensions(example, self.dimensions)
            record, split = to_record(example), self._split(example)
            self.shards.add(split, record)
            card.count(self.counts, split, example, record)

    def _split(self, example: PreferenceExample) -> str:
        """By the prompt's pictures (its text where it has none): a source is in one split only."""
        fraction = self.options.valid_fraction
        if not fraction:
            return self.options.split
        pictures = [part.data for part in example.prompt if isinstance(part, Image)]
        texts = [part.text.encode() for part in example.prompt if not isinstance(part, Image)]
        digest = hashlib.sha256(b"\0".join(pictures or texts)).digest()
        chosen = int.from_bytes(digest[:8], "big") < fraction * 2**64
        return "valid" if chosen else self.options.split

    def _commit(self, position: int) -> None:
        self._spill()
        self.shards.close_files()
        self._set(shards=self.shards.done, counts=self.counts, position=position)
        self.state.execute("COMMIT")
        self.state.execute("BEGIN")

    def _finish(self, source: Path, rows: int) -> Result:
        if self.state.execute("SELECT count(*) FROM waiting").fetchone()[0]:
            raise RuntimeError("rows wait for others that do not come: the files have changed")
        kinds = {
            kept: dict(self.state.execute(
                "SELECT kind, count(*) FROM problems WHERE kept = ? GROUP BY kind ORDER BY kind",
                (kept,),
            ).fetchall())
            for kept in (0, 1)
        }  # fmt: skip
        counts = self.shards.counts
        if not counts:
            first = self.state.execute("SELECT detail FROM problems LIMIT 1").fetchone()
            detail = f"; first: {first[0]}" if first else ""
            raise UserError(f"{source}: no usable record{detail}")
        if self.options.valid_fraction and len(counts) < 2:
            raise UserError(
                f"--valid_fraction={self.options.valid_fraction} puts all {sum(counts.values())}"
                f" groups into {next(iter(counts))!r}: too few different prompts to divide"
            )
        result = Result(counts, self.dimensions, rows, *kinds.values())
        with (self.folder / PROBLEMS).open("w", encoding="utf-8") as file:
            for kept, kind, detail in self.state.execute("SELECT * FROM problems ORDER BY rowid"):
                file.write(f"{'kept' if kept else 'left out'}\t{kind}\t{detail}\n")
        self.shards.describe(self.dimensions, {"layout": self.name, "source": str(source),
                                               "rows": rows, "left_out": kinds[0]})  # fmt: skip
        sizes = [(file, os.stat(file).st_size) for file in self.files]
        text = card.text(self.name, sizes, self.options, result, self.counts)
        (self.folder / "README.md").write_text(text, encoding="utf-8")
        self.state.execute("COMMIT")
        return result


def _size(row: dict[str, Any]) -> int:
    """Bytes of a row, about."""
    total = 0
    for value in row.values():
        if isinstance(value, dict):
            total += _size(value)
        elif isinstance(value, list):
            total += sum(_size(v) if isinstance(v, dict) else len(str(v)) for v in value)
        else:
            total += len(value) if isinstance(value, bytes | str) else 50
    return total + 200
