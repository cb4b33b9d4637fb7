"""Groups of rows become serialised examples, in worker processes, and come back in order.

What is long in a build is done here: pictures are read and decoded, examples made and serialised.
Nothing of it depends on other groups, so it may be done anywhere; who takes the groups from the
queue gets them in the order in which they were put, as one process would have made them.

What is large goes from process to process as a file that is written, read once and removed, mostly
before the disk has it. `multiprocessing` reads a pipe 64 KiB at a time, and each time into a new
buffer for all that is missing: 18 ms of processor time for 7.4 MB, a file takes 3.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import multiprocessing
import os
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.data import store, workers
from jrm_jax.data.images import has_deep_channels
from jrm_jax.data.ingest import card
from jrm_jax.data.ingest.layout import Found, Layout, Member, Options, Problems
from jrm_jax.data.ingest.waiting import size_of
from jrm_jax.data.labels import field_error
from jrm_jax.data.schema import Image, PreferenceExample, in_dimensions, to_record
from jrm_jax.errors import RecordError, UserError
from jrm_jax.shell import memory

AHEAD = 4  # groups for each worker that are made or wait to be taken
AHEAD_BYTES = 64 * 2**20  # of their rows, as they are sent to the workers
LARGE = 2**18  # bytes that are no longer sent through a pipe
BETWEEN = "between"  # folder of what is on its way between processes
LOST = (
    "a process that checks pictures was ended, perhaps because the memory is full: give the command"
    " fewer --workers"
)
DEEP = "picture with more than 8 bits a channel (scaled to 8)"


class Made(NamedTuple):
    """What became of a group. rows: (split, serialised example). counts: for the card. found: what
    is to be told. error: it ends the build."""

    rows: list[tuple[str, bytes]] = []
    counts: Counter = Counter()
    found: list[Found] = []
    error: UserError | None = None


class Maker(NamedTuple):
    """make(members) -> `Made`; picklable."""

    layout: Layout
    dimensions: tuple[str, ...]
    options: Options

    def make(self, members: list[Member]) -> Made:
        problems = Problems(self.options.skip_bad)
        made = Made([], Counter(), problems.found)
        try:
            for example in self._examples(members, problems):
                example = in_dimensions(example, self.dimensions)
                record, split = to_record(example), self._split(example)
                for data in filter(has_deep_channels, record["images"]):
                    problems.note(DEEP, f"{members[0][0]}: {len(data):,} bytes")
                made.rows.append((split, store.serialize(record)))
                card.count(made.counts, split, example, record)
        except UserError as error:
            return made._replace(error=error)
        return made

    def _examples(self, members: list[Member], problems: Problems) -> list[PreferenceExample]:
        try:
            examples = self.layout.make(members, problems)
            for example in examples:
                self._check_dimensions(example, members[0][0])
            return examples
        except RecordError as error:
            for where, _ in members:
                problems.leave(where, error)
            return []

    def _check_dimensions(self, example: PreferenceExample, where: str) -> None:
        """A data set has the dimensions that its rows named when they were read first."""
        for r, name in enumerate(example.dimensions):
            if name not in self.dimensions and example.weight[..., r].any():
                words = f"has labels in {name!r}; the data set has {', '.join(self.dimensions)}"
                raise field_error(where, "dimensions", words)

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


def start_server() -> None:
    """Begin to start what starts workers: a process without threads, which ends with this one,
    whatever ends it. It imports for seconds, while this process goes on.

    Raises:
        UserError: it cannot be started.
    """
    multiprocessing.set_forkserver_preload([__name__, "tensorflow_datasets"])
    try:
        forkserver.ensure_running()
    except OSError as error:  # it makes a socket in the folder for temporary files
        raise UserError(
            f"worker processes cannot be started ({error}): set TMPDIR to a folder with a short "
            "name that can be written, or give --workers=1"
        ) from error


class Item(NamedTuple):
    """number: of the row after which the group was complete; None: after all rows. key: of the
    group, where its rows were gathered. found: what is to be told before it."""

    number: int | None
    key: str | None
    found: list[Found]
    made: Made


class Queue:
    """Use it in a `with`: inside it has its processes. With one worker there are none.

    Args:
        folder: where what is large may lie for a moment; what a killed build left there is removed.

    Raises:
        UserError: at the end of the `with`: a process was ended from outside.
    """

    def __init__(self, maker: Maker, folder: Path, count: int = 1):
        self._maker, self._workers = maker, count
        self._between = folder / BETWEEN
        shutil.rmtree(self._between, ignore_errors=True)
        self._items: collections.deque[tuple[Item, Future | None, int]] = collections.deque()
        self._bytes, self._pool = 0, None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Queue:
        if self._workers > 1:
            self._between.mkdir()
            self._open.callback(shutil.rmtree, self._between, ignore_errors=True)
            start_server()
            self._pool = self._open.enter_context(
                workers.pool(self._workers, "forkserver", _begin, (self._workers,), LOST)
            )
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def put(
        self,
        number: int | None,
        members: list[Member],
        key: str | None = None,
        found: list[Found] | None = None,
        error: UserError | None = None,
    ) -> None:
        """A group, or no members where something is to be told alone."""
        item = Item(number, key, found or [], Made(error=error))
        future, size = None, 0
        if members and self._pool is None:
            item = item._replace(made=self._maker.make(members))
        elif members:
            size = sum(size_of(row) for _, row in members)
            sent = _send(_shared(members), size, self._between)
            future = self._pool.submit(_make, self._maker, sent, self._between)
        self._bytes += size
        self._items.append((item, future, size))

    def take(self, every: bool = False) -> Iterator[Item]:
        """What is ready, in order; waits while too much is under way, or until there is nothing."""
        while self._items:
            item, future, size = self._items[0]
            much = len(self._items) > AHEAD * self._workers or self._bytes > AHEAD_BYTES
            if not (every or much or future is None or future.done()):
                return
            if future is not None:
                item = item._replace(made=_receive(future.result()))
            self._items.popleft()
            self._bytes -= size
            yield item


def _begin(count: int) -> None:
    """In each worker. Its decoded pictures are as large as the last ones: a tenth of its time was
    the faults of their pages."""
    memory.keep_freed()
    workers.init_worker(0, count)


def _make(maker: Maker, members: bytes | str, between: Path) -> bytes | str:
    made = maker.make(_receive(members))
    return _send(made, sum(len(data) for _, data in made.rows), between)


def _send(value: Any, size: int, between: Path) -> bytes | str:
    """What goes through a pipe: the pickled value, or the name of a file that holds it.

    Args:
        size: about how many bytes it has.
    """
    if size < LARGE:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    with tempfile.NamedTemporaryFile(dir=between, delete=False) as file:
        pickle.dump(value, file, pickle.HIGHEST_PROTOCOL)
    return file.name


def _receive(sent: bytes | str) -> Any:
    if isinstance(sent, bytes):
        return pickle.loads(sent)
    with open(sent, "rb") as file:  # long values go straight from it to where they will be
        value = pickle.load(file)
    os.unlink(sent)
    return value


def _shared(members: list[Member]) -> list[Member]:
    """Equal pictures of a group's rows as one object, which is sent once."""
    known: dict[bytes, bytes] = {}

    def one(value):
        if isinstance(value, bytes):
            return known.setdefault(value, value)
        return {k: one(v) for k, v in value.items()} if isinstance(value, dict) else value

    return [(where, one(row)) for where, row in members]
