"""Reading what lies on disk after a download: rows with checked fields, and their pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.data.ingest import rows as source
from jrm_jax.data.ingest.json_rows import NoRows
from jrm_jax.data.picture_names import inline_picture, is_file, path_of, short
from jrm_jax.errors import UserError
from jrm_jax.evaluation.cases import Picture
from jrm_jax.evaluation.held import Spool
from jrm_jax.shell import disk

find = source.find


def read_json(path: str | Path) -> Any:
    """
    Raises:
        UserError: missing, or no JSON.
    """
    return _readable(disk.read_json(path))


def _readable(value: Any) -> Any:
    """The same with U+FFFD for half surrogate pairs, which JSON can hold and no file or tokenizer
    takes."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_readable(key): _readable(item) for key, item in value.items()}
    return [_readable(item) for item in value] if isinstance(value, list) else value


class Images:
    """A folder of the pictures that files name (`--images`).

    A name is looked for below the folder as it is, then without its first parts: of a path from
    another machine only the end is the same.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"--images={folder} is no folder")
        self._names: dict[Path, list[str]] = {}

    def find(self, name: str) -> Path | None:
        """
        Raises:
            UserError: another name has led to the same file.
        """
        parts = [part for part in re.split(r"[\\/]+", name) if part not in ("", ".")]
        for start in range(len(parts)):
            path = self.folder.joinpath(*parts[start:])
            if not _is_file(path):
                continue
            other = self._names.setdefault(path, parts)
            if other != parts:
                raise UserError(
                    f"--images: {'/'.join(other)} and {'/'.join(parts)} would both be {path}; give"
                    " the folder that holds them under different names"
                )
            return path
        return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for one
        return False


def to_number(value: Any) -> float:
    """Of a number, or of text that says one; nan for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


class Row(NamedTuple):
    """An object of a benchmark's file, or of a file of predictions.

    where: file and place, for messages. folder: of the file, which pictures' names start from.
    spool: of pictures that stand in the file; without one they are kept as they are.
    """

    fields: dict[str, Any]
    where: str
    folder: Path
    images: Images | None = None
    spool: Spool | None = None

    def field(self, name: str, kind: type | tuple = object) -> Any:
        """
        Raises:
            UserError: the field is missing, or of another kind; names file, row and field.
        """
        if name not in self.fields:
            there = ", ".join(self.fields)
            raise UserError(f"{self.where}: field {name!r} is missing; there are {there}")
        value = self.fields[name]
        if not isinstance(value, kind):
            raise UserError(f"{self.where}: field {name!r} is a {type(value).__name__}")
        return value

    def number(self, name: str) -> float:
        """
        Raises:
            UserError: the field is missing, or no finite number.
        """
        value = self.field(name, (int, float, str))
        found = to_number(value)
        if not math.isfinite(found):
            words = f"{self.where}: field {name!r} is {str(value)[:40]!r}, not a number"
            raise UserError(words)
        return found

    def inner(self, value: Any, name: str) -> Row:
        """An object that stands in this one, at `name`.

        Raises:
            UserError: it is none.
        """
        where = f"{self.where}: {name}"
        if not isinstance(value, dict):
            raise UserError(f"{where} must be an object, is a {type(value).__name__}")
        return self._replace(fields=value, where=where)

    def picture(self, value: Any, what: str, like: Picture | None = None) -> Picture:
        """A path, a data: URI, or the {'bytes', 'path'} of a Hugging Face image column.

        Raises:
            UserError: `--images` leads to one file for two names.
        """
        data, name = value, None
        if isinstance(value, dict):
            data, name = value.get("bytes"), value.get("path")
        elif isinstance(value, str):
            data, name = None, value
        words = "no picture"
        try:
            data = data or (inline_picture(name) if isinstance(name, str) else None)
            if isinstance(data, bytes) and data:
                named = f" ({short(name)})" if name else ""
                held = self.spool.put(data) if self.spool is not None else data
                return Picture(f"{self.where} {what}{named}", held, like)
            if isinstance(name, str) and name:
                return Picture(str(self._path(name)), None, like)
        except UserError:
            raise
        except ValueError as error:
            words = f"{short(name)} is {error}"
        # counted as missing when it is read
        return Picture(f"{self.where} {what}: {words}", b"", like)

    def is_file(self, name: str) -> bool:
        """Whether there is a picture of that name; False of any text that is no name."""
        return bool(self.images and self.images.find(name)) or is_file(name, self.folder)

    def _path(self, name: str) -> Path:
        """Where the picture of that name lies: in `--images`, else beside the file."""
        return (self.images and self.images.find(name)) or path_of(name, self.folder)


def read_rows(
    path: str | Path,
    images: Images | None = None,
    suffixes: Sequence[str] = source.SUFFIXES,
    bad: Callable[[UserError], None] | None = None,
) -> Iterator[Row]:
    """Objects of a file or of all files of a folder: JSON lists, JSON lines, parquet, Arrow.

    Args:
        bad: told of rows that are none, and of JSON files beside others that hold no rows, which
            are then passed over; None: they end the reading.

    Raises:
        UserError: no such files, one that cannot be read, or a row that is no object.
    """
    spool, found = Spool(), find(path, suffixes)
    for file in found:
        try:
            for where, row in source.read_rows(file, any_text=True):
                if not isinstance(row, UserError):
                    yield Row(_readable(row), where, file.parent, images, spool)
                elif bad is None:
                    raise row
                else:
                    bad(row)
        except NoRows as error:
            if bad is None or len(found) == 1:
                raise
            bad(error)
