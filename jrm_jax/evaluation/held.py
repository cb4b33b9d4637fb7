"""Pictures that stand in a benchmark's files: until they are scored they lie on the disk, each
once. A benchmark has thousands of cases, whose pictures need not fit into memory together."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.errors import UserError
from jrm_jax.shell import disk

IN_MEMORY = 2**26  # bytes of a spool before it becomes a file


class Held(NamedTuple):
    """A picture in a store. digest: sha256 of its encoded bytes, in hexadecimal digits."""

    store: Any
    place: tuple[int, int]
    digest: str

    def read(self) -> bytes:
        return self.store.get(self.place)


class Spool:
    """Encoded pictures in a temporary file, which goes away with it; equal ones once."""

    def __init__(self):
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115
        self._held: dict[str, Held] = {}
        self._lock, self._end = threading.Lock(), 0

    def put(self, data: bytes) -> Held:
        """
        Raises:
            UserError: the disk does not take it.
        """
        digest = hashlib.sha256(data).hexdigest()
        with self._lock:
            if digest not in self._held:
                try:
                    self._file.seek(self._end)
                    self._file.write(data)
                except OSError as error:
                    folder = Path(tempfile.gettempdir())
                    raise UserError(
                        f"the benchmark's pictures cannot be kept in {folder}"
                        f" ({disk.explain(error, folder)}); TMPDIR=FOLDER names another folder"
                    ) from error
                self._held[digest] = Held(self, (self._end, len(data)), digest)
                self._end += len(data)
            return self._held[digest]

    def get(self, place: tuple[int, int]) -> bytes:
        start, size = place
        with self._lock:
            self._file.seek(start)
            return self._file.read(size)


class Records:
    """The pictures of a split of a prepared data set, where they lie."""

    def __init__(self, records: Sequence[Any]):
        self._records = records

    def held(self, index: int, images: Sequence[bytes]) -> list[Held]:
        """Of the record `index`, which has these."""
        digests = (hashlib.sha256(data).hexdigest() for data in images)
        return [Held(self, (index, number), digest) for number, digest in enumerate(digests)]

    def get(self, place: tuple[int, int]) -> bytes:
        index, number = place
        return bytes(self._records[index]["images"][number])
