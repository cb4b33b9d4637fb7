"""A user's own examples: JSON lines, a JSON list, or parquet of what `parsing` describes; and the
rows of a prepared data set ('id', 'record', 'images').

All commands that take such rows read them by the functions here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.data.chosen import SIDES
from jrm_jax.data.ingest.layout import Member, Problems
from jrm_jax.data.ingest.pictures import GroupPictures
from jrm_jax.data.ingest.rows import SUFFIXES
from jrm_jax.data.labels import check_type, field_error, read_id
from jrm_jax.data.parsing import ReadImage, named_dimensions, parse_json, parse_parts
from jrm_jax.data.schema import Candidate, Part, PreferenceExample, from_record, validate
from jrm_jax.errors import RecordError

_LABELS = ("dimensions", "ranks", "scores", "preference", "weight")
IsFile = Callable[[str], bool]


def read_example(
    row: dict[str, Any], where: str, read_image: ReadImage, is_file: IsFile
) -> PreferenceExample:
    """
    Args:
        read_image, is_file: as of `parsing.parse_json`.

    Raises:
        RecordError: no valid example; names file, row and field.
    """
    if _is_prepared(row):
        example = _prepared(row, where, read_image)
        validate(example, where)
        return example
    return parse_json(row, read_image, where, is_file=is_file)


def read_parts(
    row: dict[str, Any], where: str, read_image: ReadImage, is_file: IsFile
) -> tuple[tuple[Part, ...], tuple[Candidate, ...]]:
    """(prompt, candidates) of such a row, with labels or without.

    Raises:
        RecordError: as `read_example`.
    """
    if _is_prepared(row):
        example = _prepared(row, where, read_image)
        return example.prompt, example.candidates
    return parse_parts(row, read_image, where, is_file)


def _is_prepared(row: dict[str, Any]) -> bool:
    return row.get("record") is not None and row.get("images") is not None


def _prepared(row: dict[str, Any], where: str, read_image: ReadImage) -> PreferenceExample:
    images = []
    check_type(row["images"], list, where, "images", "a list of pictures")
    for index, data in enumerate(row["images"]):
        check_type(data, str | bytes, where, f"images[{index}]", "a picture")
        try:
            images.append(read_image(data))
        except RecordError as error:
            raise field_error(where, f"images[{index}]", str(error), error.kind) from error
    try:
        return from_record(row | {"images": images})
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise field_error(where, "record", f"is no record of a prepared set ({error})") from error


class Records(NamedTuple):
    """Layout. folder: where pictures' names lead."""

    folder: Path
    suffixes: tuple[str, ...] = SUFFIXES
    gathers: bool = False

    def columns(self, names: list[str]) -> list[str]:
        """What `key`, `label` and `dimensions` need."""
        return [name for name in names if name in ("id", "record", *_LABELS, *SIDES)]

    def key(self, row: dict[str, Any], where: str) -> str | None:
        return read_id(row.get("id"), where) or None

    def label(self, row: dict[str, Any]) -> str:
        said = row.get("record") or {name: row.get(name) for name in (*_LABELS, *SIDES)}
        return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:16]

    def dimensions(self, row: dict[str, Any]) -> tuple[str, ...]:
        if not isinstance(row.get("record"), str | bytes):
            return named_dimensions(row)
        try:
            return named_dimensions(json.loads(row["record"]))
        except (ValueError, AttributeError):  # told when the row is read
            return ()

    def make(self, members: list[Member], problems: Problems) -> list[PreferenceExample]:
        ((where, row),) = members
        pictures = GroupPictures(self.folder)
        return [read_example(row, where, pictures.read, pictures.is_file)]
