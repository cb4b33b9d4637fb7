"""A line of JSON -> an example, checked. The form of a line:

    {"id": "cat-7",                              optional; a number is read as text
     "prompt": [{"text": "Make the cat white"}, {"image": "cat.png"}],
     "candidates": [{"parts": [{"image": "a.png"}], "critique": "The cat is white now."},
                    {"parts": [{"image": "b.png"}]}],
     "scores": {"overall": [8, 5]}}              or "ranks": [1, 2], or "preference": [[..]]

A part may be a bare string (text), a prompt or a candidate may be one string or a list of parts.
Pairs may be written with `chosen` and `rejected`, see `chosen.py`. As parquet brings such objects,
a null field is an absent one, and a picture may be bytes or {'bytes', 'path'} (an image column of
Hugging Face) in place of its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from jrm_jax.data.chosen import as_group, is_pair
from jrm_jax.data.labels import check_keys, check_type, field_error, parse_labels, read_id
from jrm_jax.data.picture_names import ends_like_picture, name_or_bytes, short
from jrm_jax.data.schema import (
    DEFAULT_DIMENSIONS,
    Candidate,
    Image,
    Part,
    PreferenceExample,
    Text,
    check_count,
    validate,
)
from jrm_jax.errors import RecordError

_EXAMPLE_KEYS = (
    "id", "prompt", "candidates", "dimensions", "ranks", "scores", "preference", "weight",
)  # fmt: skip
_LABELS = ("ranks", "scores", "preference")
_CANDIDATE_KEYS = ("parts", "critique", "score_line")
ReadImage = Callable[[str | bytes], bytes]


def parse_json(
    obj: Any,
    read_image: ReadImage,
    where: str,
    *,
    default_id: str | None = None,
    is_file: Callable[[str], bool] = lambda name: False,
) -> PreferenceExample:
    """Turn one JSON object (see the top of this file) into a validated example.

    Args:
        read_image: a picture's name, or its encoded bytes where they stand in the object, -> the
            bytes that the example keeps, e.g. `pictures.GroupPictures(folder).read`.
        where: 'file:line', the beginning of every message.
        default_id: id of an object without one; default: `where`.
        is_file: whether a text names a picture's file; then it must be said which is meant.

    Reward dimensions: `named_dimensions`, else ('overall',).

    Labels, one of: `ranks` (1 = best, equal = tie), `scores` (larger = better), each a list of K
    numbers or {dimension: list}, null = unlabelled; or `preference` [K][K] or [K][K][R]. `weight`
    is a number, [K][K] or [K][K][R]. No label at all: every candidate needs a critique.

    Raises:
        UserError: one line that names file, line and field.
    """
    check_type(obj, dict, where, "(whole line)", "an object")
    obj = _plain(obj)
    if "critique" in obj:
        raise field_error(
            where, "critique", "is comparative (it stands beside the candidates); give one critique"
            " per candidate, as candidates[i].critique, about that candidate alone",
        )  # fmt: skip
    obj = as_group(obj, where)
    check_keys(obj, _EXAMPLE_KEYS, (), where, "")
    prompt, candidates = _prompt_and_candidates(obj, read_image, where, is_file)
    check_count(candidates, where)
    if obj.get("dimensions") is not None:
        check_type(obj["dimensions"], list, where, "dimensions", "a list of names")
        for name in obj["dimensions"]:
            check_type(name, str, where, "dimensions", "a list of names")
    names = named_dimensions(obj) or DEFAULT_DIMENSIONS
    preference, weight = parse_labels(obj, len(candidates), names, where)
    if not weight.any() and not all(candidate.critique for candidate in candidates):
        raise field_error(
            where, "ranks", "no labels: give 'ranks', 'scores' or 'preference' (or a critique for"
            " every candidate)",
        )  # fmt: skip
    name = read_id(obj.get("id"), where)
    if name is None:
        name = where if default_id is None else default_id
    example = PreferenceExample(name, prompt, candidates, preference, weight, names)
    validate(example, where)
    return example


def parse_parts(
    obj: Any, read_image: ReadImage, where: str, is_file: Callable[[str], bool]
) -> tuple[tuple[Part, ...], tuple[Candidate, ...]]:
    """(prompt, candidates) of such an object, whatever else it says: no labels are needed.

    Raises:
        UserError: as `parse_json`.
    """
    check_type(obj, dict, where, "(whole line)", "an object")
    return _prompt_and_candidates(as_group(_plain(obj), where), read_image, where, is_file)


def _plain(value: Any) -> Any:
    """Without nulls in objects, with pictures as their names or bytes."""
    value = name_or_bytes(value)
    if isinstance(value, dict):
        plain = ((name, _plain(item)) for name, item in value.items())
        return {name: item for name, item in plain if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _prompt_and_candidates(
    obj: Mapping[str, Any], read_image: ReadImage, where: str, is_file: Callable[[str], bool]
) -> tuple[tuple[Part, ...], tuple[Candidate, ...]]:
    for name in ("prompt", "candidates"):
        if name not in obj:
            raise field_error(where, name, "is missing")
    read = _Parts(read_image, is_file, where)
    prompt = read(obj["prompt"], "prompt")
    check_type(obj["candidates"], list, where, "candidates", "a list")
    return prompt, tuple(
        _parse_candidate(value, read, where, f"candidates[{index}]")
        for index, value in enumerate(obj["candidates"])
    )


def _parse_candidate(value: Any, read: _Parts, where: str, field: str) -> Candidate:
    if not isinstance(value, dict) or "text" in value or "image" in value:
        return Candidate(read(value, field, answer=True))
    check_keys(value, _CANDIDATE_KEYS, ("parts",), where, field)
    critique, score_line = value.get("critique"), value.get("score_line", False)
    if critique is not None:
        check_type(critique, str, where, f"{field}.critique", "a string")
    check_type(score_line, bool, where, f"{field}.score_line", "true or false")
    parts = read(value["parts"], f"{field}.parts", answer=True)
    return Candidate(parts, critique, score_line)


class _Parts:
    """Reads the parts of one line."""

    def __init__(self, read_image: ReadImage, is_file: Callable[[str], bool], where: str):
        self._read_image, self._is_file, self._where = read_image, is_file, where

    def __call__(self, value: Any, field: str, answer: bool = False) -> tuple[Part, ...]:
        if isinstance(value, str | bytes | dict):
            value = [value]
        check_type(value, list, self._where, field, "text or a list of parts")
        return tuple(
            self._part(part, f"{field}[{index}]", answer) for index, part in enumerate(value)
        )

    def _part(self, part: Any, name: str, answer: bool) -> Part:
        where = self._where
        if isinstance(part, str):
            self._check_text_is_meant(part, name, answer)
            part = {"text": part}
        if isinstance(part, bytes):
            part = {"image": part}
        check_type(part, dict, where, name, 'a string, {"text": ...} or {"image": ...}')
        check_keys(part, ("text", "image"), (), where, name)
        if len(part) != 1:
            raise field_error(where, name, "needs exactly one of 'text' and 'image'")
        ((kind, content),) = part.items()
        if kind == "text":
            check_type(content, str, where, f"{name}.text", "a string")
            return Text(content)
        check_type(content, str | bytes, where, f"{name}.image", "a string")
        try:
            return Image(self._read_image(content))
        except RecordError as error:
            raise field_error(where, f"{name}.image", str(error), error.kind) from error

    def _check_text_is_meant(self, text: str, name: str, answer: bool) -> None:
        """A bare string is text; where it looks like a picture's name that was hardly meant.

        A sentence of an instruction may well end in 'logo.png'; an answer hardly does.
        """
        like = ends_like_picture(text) and (answer or len(text.split()) == 1)
        if like or self._is_file(text):
            shown = json.dumps(short(text))
            raise field_error(
                self._where, name, f'looks like a picture\'s name: write {{"image": {shown}}} for'
                f' the picture, or {{"text": {shown}}} for these words',
                "text that looks like a picture's name",
            )  # fmt: skip


def named_dimensions(obj: Mapping[str, Any]) -> tuple[str, ...]:
    """Reward dimensions that a line of JSON names: its `dimensions`, else the names in `scores` or
    `ranks`, else 'overall' where it has labels without names or is a pair, else none. The same of
    the raw line and of the one that `parse_json` makes of it, and without its candidates."""
    names = obj.get("dimensions")
    if names is not None:
        right = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return tuple(names) if right else ()
    if is_pair(obj):
        return DEFAULT_DIMENSIONS
    for label in (obj[key] for key in _LABELS if obj.get(key) is not None):
        if not isinstance(label, dict):
            return DEFAULT_DIMENSIONS
        if named := tuple(name for name, values in label.items() if values is not None):
            return named
    return ()
