"""Reading what lies on disk after a download: JSON, JSON lines, parquet, folders of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jrm_jax.errors import UserError
from jrm_jax.evaluation.cases import Picture

SUFFIXES = (".json", ".jsonl", ".parquet")


def read_json(path: str | Path) -> Any:
    """
    Raises:
        UserError: missing, or no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error


def find(path: str | Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The file itself, or all of a folder's files of these kinds, sorted.

    Raises:
        UserError: there are none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix in suffixes) if path.is_dir() else []
    if not found:
        what = "holds none of" if path.is_dir() else "is not there; expected one of"
        raise UserError(f"{path} {what} {', '.join('*' + s for s in suffixes)}")
    return found


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file: a JSON list, JSON lines, or parquet (a batch at a time).

    Raises:
        UserError: unreadable, or a row that is no object; names file and row.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    if path.suffix == ".jsonl":
        rows = _read_lines(path)
    else:
        rows = enumerate(as_list(read_json(path), path), 1)
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: must be an object, is {type(row).__name__}")
        yield row


def as_list(content: Any, path: Path) -> list:
    if not isinstance(content, list):
        raise UserError(f"{path} must hold a list of objects, holds {type(content).__name__}")
    return content


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:
                        raise UserError(f"{path}:{number}: not JSON ({error})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from error


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=16):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable parquet file ({error})") from error


def field(row: dict[str, Any], name: str, where: str, kind: type | tuple = object) -> Any:
    """
    Raises:
        UserError: the field is missing, or of another kind; names file, row and field.
    """
    if name not in row:
        raise UserError(f"{where}: field {name!r} is missing; there are {', '.join(row)}")
    if not isinstance(row[name], kind):
        raise UserError(f"{where}: field {name!r} is a {type(row[name]).__name__}")
    return row[name]


def number(row: dict[str, Any], name: str, where: str) -> float:
    value = field(row, name, where, (int, float, str))
    try:
        return float(value)
    except ValueError as error:
        raise UserError(f"{where}: field {name!r} is {value!r}, not a number") from error


def picture(value: Any, folder: Path, where: str, like: Picture | None = None) -> Picture:
    """A path (relative to `folder`), or the {'bytes', 'path'} of a Hugging Face image column."""
    if isinstance(value, str) and value:
        return Picture(str(folder / value), None, like)
    if isinstance(value, dict) and (value.get("bytes") or value.get("path")):
        name, data = value.get("path"), value.get("bytes")
        return Picture(f"{where} ({name})" if data else str(folder / name), data, like)
    if isinstance(value, bytes):
        return Picture(where, value, like)
    return Picture(f"{where}: no picture", b"", like)  # counted as missing when it is read
