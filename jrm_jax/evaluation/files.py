"""Reading what lies on disk after a download: JSON, JSON lines, parquet, folders of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jrm_jax.data.ingest import rows
from jrm_jax.errors import UserError
from jrm_jax.evaluation.cases import Picture

find = rows.find


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


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file: a JSON list, JSON lines, or parquet.

    Raises:
        UserError: unreadable, or a row that is no object; names file and row.
    """
    for _, row in rows.read_rows(path):
        if isinstance(row, UserError):
            raise row
        yield row


def as_list(content: Any, path: Path) -> list:
    if not isinstance(content, list):
        raise UserError(f"{path} must hold a list of objects, holds {type(content).__name__}")
    return content


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
