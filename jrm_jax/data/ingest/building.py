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
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jrm_jax.data import store
from jrm_jax.data.images import has_deep_channels
from jrm_jax.data.ingest import card
from jrm_jax.data.ingest.layout import Layout, Member, Options, Problems, Result
from jrm_jax.data.ingest.rows import NoRows, find, read_rows
from jrm_jax.data.ingest.texts import printable
from jrm_jax.data.ingest.waiting import Waiting
from jrm_jax.data.schema import (
    DEFAULT_DIMENSIONS,
    Image,
    PreferenceExample,
    in_dimensions,
    to_record,
)
from jrm_jax.errors import RecordError, UserError

VERSION = 2  # raise it when the same files give other data sets
STATE, LOCK = "state.sqlite", "lock"
DEEP = "picture with more than 8 bits a channel (scaled to 8)"
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
) -> Result:
    """Write the data set `out`, or add splits to it; goes on where an earlier call with the same
    arguments was stopped.

    Args:
        name: of the layout, for the card and for messages.
        progress: called now and then with (what is done, rows done, rows there are, counts).

    Raises:
        UserError: `out` exists and has the split, a file cannot be read, a bad row (see `Options`),
            no usable row, or a half-made data set of other files lies there.
    """
    splits = (options.split, "valid") if options.valid_fraction else (options.split,)
    base = store.check_splits(out, splits)
    files = find(source, layout.suffixes)
    folder = out.with_name(f"{out.name}.building")
    with store.disk_errors(out):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{folder} is being written by another process") from error
            work = _Work(layout, name, files, folder, options, progress, base)
            try:
                result = work.run(source)
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
            texts = {CARD: CARD, PROBLEMS: PROBLEMS}
            if base is None:
                folder.rename(out)
            else:
                added = "-".join(result.counts)
                texts = {CARD: f"README-{added}.md", PROBLEMS: f"problems-{added}.txt"}
                store.add_splits(out, folder, texts)
        for left in (STATE, LOCK):
            (out / left).unlink(missing_ok=True)
    return result._replace(listed=out / texts[PROBLEMS])


class _Work:
    """One build: its state on the disk, and the rows that wait in memory."""

    def __init__(self, layout, name, files, folder, options, progress, base):
        self.layout, self.name, self.files, self.folder = layout, name, files, folder
        self.options, self.progress, self.base = options, progress, base
        self.state = sqlite3.connect(folder / STATE, isolation_level=None)
        self.state.executescript(_TABLES)
        self._check_fingerprint()
        self.shards = store.Shards(
            folder, base.name if base else "preferences", self._get("shards", {}),
            options.shard_examples,
        )  # fmt: skip
        self.counts = Counter(self._get("counts", {}))
        self.dimensions = tuple(self._get("dimensions", ()))
        self.problems = Problems(self.state, options.skip_bad, self.counts)
        self.waiting = Waiting(self.state)

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
        self.state.execute("BEGIN")
        for number, where, row in self._rows(total, self._get("position", 0)):
            self._take(number, where, row)
            if self.shards.full:
                self._commit(number + 1)
            if number % 64 == 0:
                self.progress("writing", number, sum(total), self.counts)
        for key in self.waiting.keys():  # of groups one of whose rows could not be read
            self._emit(self.waiting.take(key))
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
                    raise UserError(f"{printable(file)} has changed while it was read: begin anew")
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
            self.problems.note("JSON file that holds no list of rows (passed over)", str(error))
        except UserError as error:
            yield printable(file), RecordError(str(error), "file that cannot be read on")

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
        if self.waiting.add(key, number, (where, row)) == wanted:
            self._emit(self.waiting.take(key))

    def _emit(self, members: list[Member]) -> None:
        try:
            examples = self.layout.make(members, self.problems)
        except RecordError as error:
            for where, _ in members:
                self.problems.leave(where, error)
            return
        for example in examples:
            assert set(example.dimensions) <= set(self.dimensions)  # `layout.dimensions` named all
            example = in_dimensions(example, self.dimensions)
            record, split = to_record(example), self._split(example)
            for data in filter(has_deep_channels, record["images"]):
                self.problems.note(DEEP, f"{members[0][0]}: {len(data):,} bytes")
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
        sizes = [(printable(file), os.stat(file).st_size) for file in self.files]
        text = card.text(self.name, sizes, self.options, result, self.counts)
        (self.folder / CARD).write_text(text, encoding="utf-8")
        self.state.execute("COMMIT")
        return result

