"""Text files in whatever encoding they come, and rows whose text nothing can hold."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any, TextIO

from jrm_jax.data.labels import BROKEN_TEXT, field_error, is_text
from jrm_jax.errors import RecordError

DEPTH = 32  # of objects and lists in one another; no layout needs ten
_MARKS = (  # the longest first: UTF-32's mark begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)  # fmt: skip


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """UTF-8, or what the mark at the beginning of the file says.

    Bytes that are no UTF-8 come as halves of surrogate pairs: `check_row` finds them, and one bad
    row does not end the file.
    """
    with path.open("rb") as file:
        start = file.read(4)
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
    return path.open(encoding=encoding, errors="surrogateescape", newline=newline)


def printable(path: Path) -> str:
    """A path as text that can be written anywhere; file names may hold any bytes."""
    return str(path).encode(errors="backslashreplace").decode()


def check_row(row: Any, where: str, any_text: bool = False) -> None:
    """Of JSON's types. any_text: texts that cannot be encoded may pass.

    Raises:
        RecordError: a text in it cannot be encoded, or it is nested beyond reason; names the field.
    """
    waiting = [("", row, 0)]
    while waiting:
        field, value, depth = waiting.pop()
        if depth > DEPTH:
            raise RecordError(f"{where}: is nested more than {DEPTH} deep", "row nested too deep")
        if isinstance(value, str):
            if not any_text and not is_text(value):
                raise field_error(where, field, *BROKEN_TEXT)
        elif isinstance(value, dict):
            for key, item in value.items():
                if not any_text and not is_text(key):
                    raise field_error(where, field, *BROKEN_TEXT)
                waiting.append((f"{field}.{key}" if field else key, item, depth + 1))
        elif isinstance(value, list):
            waiting += [(f"{field}[{i}]", item, depth + 1) for i, item in enumerate(value)]
