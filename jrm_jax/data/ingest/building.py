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

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jrm_jax.data import store
from jrm_jax.data.ingest import card
from jrm_jax.data.ingest.half_made import LOCK, STATE, Useless, hold, how_to_go_on, state_errors
from jrm_jax.data.ingest.json_rows import NoRows
from jrm_jax.data.ingest.layout import Found, Layout, Options, Problems, Result, seen
from jrm_jax.data.ingest.making import Item, Maker, Queue
from jrm_jax.data.ingest.rows import find, read_rows
from jrm_jax.data.ingest.texts import printable
from jrm_jax.data.ingest.waiting import Waiting
from jrm_jax.data.labels import is_text
from jrm_jax.data.schema import DEFAULT_DIMENSIONS
from jrm_jax.errors import RecordError, UserError

VERSION = 5  # raise it when the same files give other data sets
PARALLEL = 256  # rows from which on worker processes are worth their start, some seconds
CARD, PROBLEMS = "README.md", "problems.txt"
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS groups (key TEXT PRIMARY KEY, rows INTEGER, label TEXT, differs INTEGER)
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS problems (kept INTEGER, kind TEXT, detail TEXT);
"""


def build(
    layout: Layout,
    name: str,
    source: Path,
    out: Path,
    options: Options,
    progress: Callable[[str, int, int, Counter], None] = lambda *_: None,
    workers: int = 1,
) -> Result:
    """Write the data set `out`, or add splits to it; goes on where an earlier call with the same
    arguments was stopped.

    Args:
        name: of the layout, for the card and for messages.
        workers: processes that make groups; the result is the same, byte for byte.
        progress: called now and then with (what is done, rows done, rows there are, counts).

    Raises:
        UserError: `out` exists and has the split, a file cannot be read, a bad row (see `Options`),
            no usable row, or a half-made data set of other files, or a damaged one, lies there.
    """
    if not is_text(str(out)):
        raise UserError(f"--out={printable(out)}: give a name that UTF-8 can hold")
    if out.name in ("", "..") or out.is_symlink():  # files are made beside it, on the same disk
        out = out.resolve()
    splits = (options.split, "valid") if options.valid_fraction else (options.split,)
    base = store.check_splits(out, splits)
    files = find(source, layout.suffixes)
    folder = out.with_name(f"{out.name}.building")
    with store.disk_errors(out):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("w") as lock:
            hold(lock, folder)
            with state_errors(folder):
                work = _Work(layout, name, files, folder, options, progress, base, workers)
                try:
                    with contextlib.closing(work):
                        result = work.run(source)
                except UserError as error:
                    if work.shards.done and not isinstance(error, Useless):
                        raise UserError(f"{error} ({how_to_go_on(folder, options)})") from error
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
            texts = _texts(base, result.counts)
            if base is None:
                folder.rename(out)
            else:
                store.add_splits(out, folder, texts)
        for left in (STATE, LOCK):
            (out / left).unlink(missing_ok=True)
    return result._replace(listed=out / texts[PROBLEMS])


def _texts(base: store.Existing | None, splits: Iterable[str]) -> dict[str, str]:
    """Names of the card and of the list of problems in the data set; beside those of an earlier
    build they have others."""
    if base is None:
        return {CARD: CARD, PROBLEMS: PROBLEMS}
    added = "-".join(splits)
    return {CARD: f"README-{added}.md", PROBLEMS: f"problems-{added}.txt"}


class _Work:
    """One build: its state on the disk, and the rows that wait in memory."""

    def __init__(self, layout, name, files, folder, options, progress, base, workers):
        self.layout, self.name, self.files, self.folder = layout, name, files, folder
        self.options, self.progress, self.base, self.workers = options, progress, base, workers
        self.state = sqlite3.connect(folder / STATE, isolation_level=None)
        self.state.executescript(_TABLES)
        self._check_fingerprint()
        self.shards = store.Shards(
            folder, base.name if base else "preferences", self._get("shards", {}),
            options.shard_examples,
        )  # fmt: skip
        self.counts = Counter(self._get("counts", {}))
        self.dimensions = tuple(self._get("dimensions", ()))
        self.waiting = Waiting(self.state)

    def close(self) -> None:
        self.shards.abandon()
        self.state.close()

    def _get(self, name: str, default: Any) -> Any:
        row = self.state.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        try:
            return default if row is None else json.loads(row[0])
        except ValueError as error:
            raise sqlite3.DatabaseError(f"{name}: {error}") from error

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            self.state.execute("REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))

    def _check_fingerprint(self) -> None:
        facts = [VERSION, self.name, *self.options._replace(skip_bad=None)]
        facts += [repr(self.layout), self.base and self.base.dimensions]
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
        position = self._get("position", 0)
        self.state.execute("BEGIN")
        self.waiting.forget_from(position)
        workers = self.workers if sum(total) - position >= PARALLEL else 1
        maker = Maker(self.layout, tuple(self.dimensions), self.options)
        with Queue(maker, self.folder, workers) as self.queue:
            for number, where, row in self._rows(total, position):
                self._take(number, where, row)
                self._write(self.queue.take())
                if number % 64 == 0:
                    self.progress("writing", number, sum(total), self.counts)
            self._write(self.queue.take(every=True))
            for key in self.waiting.keys():  # of groups one of whose rows could not be read
                self.queue.put(None, self.waiting.take(key), key)
                self._write(self.queue.take())
            self._write(self.queue.take(every=True))
        self._commit(sum(total))
        return self._finish(source, sum(total))

    def _index(self) -> None:
        """First pass: rows of each group and of each file, and the reward dimensions."""
        self.state.execute("BEGIN")
        self.state.execute("DELETE FROM groups")
        rows_of_files, done, named = [], 0, {}
        for file in self.files:
            count = 0
            for where, row in self._read(file, self.layout.columns):
                count += 1
                if isinstance(row, UserError):
                    continue  # told in the second pass
                row = seen(self.layout, row)
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
            raise self._nothing(self.files[0], " (the file is empty)")
        self.dimensions = tuple(named) or DEFAULT_DIMENSIONS
        if self.base:
            more = [name for name in named if name not in self.base.dimensions]
            if more:
                raise UserError(
                    f"{self.base.path} has the dimensions {', '.join(self.base.dimensions)}, these"
                    f" files also {', '.join(more)}: build them as a data set of their own"
                )
            self.dimensions = self.base.dimensions
        self._set(**{"rows of files": rows_of_files, "dimensions": self.dimensions})
        self.state.execute("COMMIT")

    def _rows(self, total: Sequence[int], position: int) -> Iterator[tuple[int, str, Any]]:
        first = 0
        for file, count in zip(self.files, total, strict=True):
            if count and position < first + count:
                number = max(first, position)
                for where, row in self._read(file, None, number - first):
                    yield number, where, row
                    number += 1
                if number != first + count:
                    words = "has changed while it was read: give the command again"
                    raise Useless(f"{printable(file)} {words}")
            first += count

    def _read(
        self, file: Path, columns: Any, skip: int = 0
    ) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
        """`read_rows`; where a file cannot be read on, the error is its last row. Of several files
        one that is no list of rows is passed over."""
        try:
            yield from read_rows(file, columns, skip)
        except NoRows as error:
            if len(self.files) == 1:
                raise
            words = "JSON file that holds no list of rows (passed over)"
            self._tell([Found(True, words, str(error))])
        except UserError as error:
            yield printable(file), RecordError(str(error), "file that cannot be read on")

    def _take(self, number: int, where: str, row: dict[str, Any] | UserError) -> None:
        problems = Problems(self.options.skip_bad)
        try:
            try:
                if isinstance(row, UserError):
                    raise row
                key = self.layout.key(seen(self.layout, row), where)
                found = self._group(key, where)
            except UserError as error:
                problems.leave(where, error)
                self.queue.put(number, [], found=problems.found)
                return
        except UserError as error:  # told when all before it is written
            self.queue.put(number, [], error=error)
            return
        if key is None:
            self.queue.put(number, [(where, row)])
            return
        wanted, differs = found
        if not self.layout.gathers:
            if wanted > 1:
                problems.note("id that occurs more than once", f"{where}: {key}")
            if differs:
                problems.note("id with contradicting labels", f"{where}: {key}")
            self.queue.put(number, [(where, row)], found=problems.found)
        elif self.waiting.add(key, number, (where, row)) == wanted:
            self.queue.put(number, self.waiting.take(key), key)

    def _group(self, key: str | None, where: str) -> tuple[int, int]:
        """(rows, whether their labels differ) of a group, as the first pass counted them."""
        if key is None:
            return 1, 0
        query = "SELECT rows, differs FROM groups WHERE key = ?"
        found = self.state.execute(query, (key,)).fetchone()
        if found is None:
            words = "belongs to a group that was not there when the file was read first"
            raise RecordError(f"{where}: {words}", "row that has changed while it was read")
        return found

    def _write(self, items: Iterator[Item]) -> None:
        """What became of groups, in their order, and whatever became complete by it."""
        for item in items:
            self._tell(item.found + item.made.found)
            if item.made.error is not None:
                raise item.made.error
            for split, data in item.made.rows:
                self.shards.add(split, data)
            self.counts.update(item.made.counts)
            if item.key is not None:
                self.waiting.done(item.key)
            if item.number is not None and self.shards.full:
                self._commit(item.number + 1)

    def _tell(self, found: Sequence[Found]) -> None:
        self.counts["rows left out"] += sum(not each.kept for each in found)
        self.state.executemany("INSERT INTO problems VALUES (?, ?, ?)", found)

    def _commit(self, position: int) -> None:
        self.waiting.spill()
        self.shards.close_files()
        self._set(shards=self.shards.done, counts=self.counts, position=position)
        self.state.execute("COMMIT")
        self.state.execute("BEGIN")

    def _nothing(self, source: Path, why: str = "") -> UserError:
        first = self.state.execute("SELECT detail FROM problems LIMIT 1").fetchone()
        return UserError(f"{source}: no usable record{f'; first: {first[0]}' if first else why}")

    def _finish(self, source: Path, rows: int) -> Result:
        kinds = {
            kept: dict(self.state.execute(
                "SELECT kind, count(*) FROM problems WHERE kept = ? GROUP BY kind ORDER BY kind",
                (kept,),
            ).fetchall())
            for kept in (0, 1)
        }  # fmt: skip
        counts = self.shards.counts
        if not counts:
            raise self._nothing(source)
        if self.options.valid_fraction and len(counts) < 2:
            raise Useless(
                f"--valid_fraction={self.options.valid_fraction} puts all {sum(counts.values())}"
                f" groups into {next(iter(counts))!r}: too few different prompts to divide; give"
                " another fraction"
            )
        result = Result(counts, self.dimensions, rows, *kinds.values())
        with (self.folder / PROBLEMS).open("w", encoding="utf-8") as file:
            for kept, kind, detail in self.state.execute("SELECT * FROM problems ORDER BY rowid"):
                file.write(f"{'kept' if kept else 'left out'}\t{kind}\t{detail}\n")
        self.shards.describe(self.dimensions, {"layout": self.name, "source": str(source),
                                               "rows": rows, "left_out": kinds[0]})  # fmt: skip
        sizes = [(printable(file), os.stat(file).st_size) for file in self.files]
        listed = _texts(self.base, counts)[PROBLEMS]
        text = card.text(self.name, sizes, self.options, result, self.counts, listed)
        (self.folder / CARD).write_text(text, encoding="utf-8")
        self.state.execute("COMMIT")
        return result

