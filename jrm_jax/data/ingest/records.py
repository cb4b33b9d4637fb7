"""A user's own examples: JSON lines, a JSON list, or parquet of what `schema` describes.

In parquet a picture is a name, bytes, or {'bytes', 'path'} (a Hugging Face image column); null
fields are absent ones. The rows of a prepared data set ('id', 'record', 'images') are read, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.data.chosen import SIDES, as_group
from jrm_jax.data.ingest.layout import Member, Problems
from jrm_jax.data.ingest.pictures import check_image, image_reader
from jrm_jax.data.ingest.rows import SUFFIXES
from jrm_jax.data.labels import field_error, read_id
from jrm_jax.data.parsing import named_dimensions, parse_json
from jrm_jax.data.schema import PreferenceExample, from_record, validate
from jrm_jax.errors import RecordError

_MARK = "\0"  # no file's name begins so
_LABELS = ("dimensions", "ranks", "scores", "preference", "weight")


class Records(NamedTuple):
    """Layout. folder: where pictures' names lead."""

    folder: Path
    suffixes: tuple[str, ...] = SUFFIXES
    gathers: bool = False

    def columns(self, names: list[str]) -> list[str]:
        """Of parquet, what `key` and `label` need."""
        return [name for name in names if name in ("id", "record", *_LABELS, *SIDES)]

    def key(self, row: dict[str, Any], where: str) -> str | None:
        return read_id(row.get("id"), where) or None

    def label(self, row: dict[str, Any]) -> str:
        said = row.get("record") or {name: row.get(name) for name in (*_LABELS, *SIDES)}
        return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:16]

    def dimensions(self, row: dict[str, Any]) -> tuple[str, ...]:
        if not isinstance(row.get("record"), str):
            return named_dimensions(row)
        try:
            return named_dimensions(json.loads(row["record"]))
        except (ValueError, AttributeError):  # told when the row is read
            return ()

    def make(self, members: list[Member], problems: Problems) -> list[PreferenceExample]:
        ((where, row),) = members
        if "record" in row and "images" in row:
            return [_prepared(row, where)]
        pictures: dict[str, bytes] = {}
        plain = _plain(as_group(row, where), pictures)
        read = image_reader(self.folder)

        def picture(name: str) -> bytes:
            if name not in pictures:
                return read(name)
            check_image(pictures[name], "the picture")
            return pictures[name]

        return [parse_json(plain, picture, where, is_file=self._is_file)]

    def _is_file(self, name: str) -> bool:
        return name.startswith(_MARK) or os.path.isfile(self.folder / name)


def _plain(value: Any, pictures: dict[str, bytes]) -> Any:
    """Without nulls in objects; bytes become names of `pictures`."""
    if isinstance(value, dict):
        if set(value) <= {"bytes", "path"} and value:
            return _plain(value.get("bytes") or value.get("path"), pictures)
        return {k: _plain(v, pictures) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(item, pictures) for item in value]
    if isinstance(value, bytes):
        name = f"{_MARK}{len(pictures)}"
        pictures[name] = value
        return name
    return value


def _prepared(row: dict[str, Any], where: str) -> PreferenceExample:
    try:
        example = from_record(row)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise field_error(where, "record", f"is no record of a prepared set ({error})") from error
    for index, data in enumerate(row["images"]):
        try:
            check_image(data, "the picture")
        except RecordError as error:
            raise field_error(where, f"images[{index}]", str(error), error.kind) from error
    validate(example, where)
    return example
