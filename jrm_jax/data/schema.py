"""What an example is: a prompt, K candidates, and who was preferred to whom.

K >= 2, or 1 with a critique: then the language loss alone learns from it.

Letters: K candidates, R reward dimensions.

    PreferenceExample <- parse_json(object of a JSON line, read_image, where)
    PreferenceExample <-> record {'id', 'record', 'images'} of a prepared data set

A line of JSON:

    {"id": "cat-7",                              optional
     "prompt": [{"text": "Make the cat white"}, {"image": "cat.png"}],
     "candidates": [{"parts": [{"image": "a.png"}], "critique": "The cat is white now."},
                    {"parts": [{"image": "b.png"}]}],
     "scores": {"overall": [8, 5]}}              or "ranks": [1, 2], or "preference": [[..]]

A part may be a bare string (text), a prompt or a candidate may be one string or a list of parts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jrm_jax.data.labels import check_keys, check_type, field_error, labels_in, parse_labels
from jrm_jax.errors import RecordError

DEFAULT_DIMENSIONS = ("overall",)
SHARE_ERROR = 1e-5  # of float32 shares that are written with six digits
_EXAMPLE_KEYS = (
    "id", "prompt", "candidates", "dimensions", "ranks", "scores", "preference", "weight",
)  # fmt: skip
_LABELS = ("ranks", "scores", "preference")
_CANDIDATE_KEYS = ("parts", "critique", "score_line")


@dataclasses.dataclass(frozen=True)
class Text:
    text: str


@dataclasses.dataclass(frozen=True)
class Image:
    """An encoded picture (PNG, JPEG, ...), as it lies on disk."""

    data: bytes = dataclasses.field(repr=False)


Part = Text | Image


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One answer. `critique` is about this candidate alone.

    `score_line`: the critique's last line states scores, and can be left out of the loss.
    `facts`: of the built-in world, see `facts.FACTS`; None where they are not given.
    """

    parts: tuple[Part, ...]
    critique: str | None = None
    score_line: bool = False
    facts: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class PreferenceExample:
    """One group of candidates and its labels.

    preference[i, j, r] from 0 to 1: the share of the votes that prefer i to j in dimension r, 1/2
    for a tie; preference[i, j, r] + preference[j, i, r] = 1 wherever weight[i, j, r] > 0. The
    weight is symmetric, never negative, and 0 on the diagonal and where there is no label. Votes
    may be partial and even cyclic.
    """

    id: str
    prompt: tuple[Part, ...]
    candidates: tuple[Candidate, ...]
    preference: np.ndarray  # [K, K, R] float32
    weight: np.ndarray  # [K, K, R] float32
    dimensions: tuple[str, ...] = DEFAULT_DIMENSIONS


def validate(example: PreferenceExample, where: str) -> None:
    """Check everything but the pictures (`pictures.check_image` does those).

    Raises:
        UserError: one line '<where>: field <name>: what is wrong'.
    """
    if not isinstance(example.id, str) or not example.id:
        raise field_error(where, "id", "must be a non-empty string")
    _validate_parts(example.prompt, where, "prompt")
    count, dimensions = len(example.candidates), example.dimensions
    _check_count(example.candidates, where)
    for index, candidate in enumerate(example.candidates):
        _validate_parts(candidate.parts, where, f"candidates[{index}].parts")
        critique = candidate.critique
        if critique is not None and (not isinstance(critique, str) or not critique.strip()):
            raise field_error(
                where, f"candidates[{index}].critique", "must be a non-empty string or absent"
            )
    if not dimensions or len(set(dimensions)) != len(dimensions):
        raise field_error(where, "dimensions", "must be distinct names, at least one")
    shape = (count, count, len(dimensions))
    for name in ("preference", "weight"):
        found = np.shape(getattr(example, name))
        if found != shape:
            raise field_error(
                where, name, f"has shape {list(found)}, must be [K, K, R] = {list(shape)}"
            )
    _validate_labels(example.preference, example.weight, where)


def _check_count(candidates: Sequence[Candidate], where: str) -> None:
    """One candidate alone can teach by its critique only."""
    count = len(candidates)
    if count < 2 and not any(candidate.critique for candidate in candidates):
        raise field_error(
            where, "candidates", f"needs at least 2 candidates to compare (or one with a critique),"
            f" has {count}", "too few candidates",
        )  # fmt: skip


def _validate_labels(preference: np.ndarray, weight: np.ndarray, where: str) -> None:
    def first(bad: np.ndarray) -> list[int]:
        return np.argwhere(bad)[0].tolist()

    bad = ~((preference >= 0) & (preference <= 1))
    if bad.any():
        i, j, r = first(bad)
        value = preference[i, j, r]
        words = f"is {value:g}; allowed: 0 to 1 (0.5 is a tie)"
        raise field_error(where, f"preference[{i}][{j}][{r}]", words)
    bad = ~(np.isfinite(weight) & (weight >= 0))
    if bad.any():
        i, j, r = first(bad)
        raise field_error(where, f"weight[{i}][{j}][{r}]", f"is {weight[i, j, r]:g}; must be >= 0")
    bad = weight != weight.swapaxes(0, 1)
    if bad.any():
        i, j, r = first(bad)
        raise field_error(where, f"weight[{i}][{j}][{r}]", f"differs from weight[{j}][{i}][{r}]")
    if np.einsum("iir->", weight) != 0:
        raise field_error(where, "weight", "must be 0 on the diagonal (a candidate against itself)")
    bad = (weight > 0) & (np.abs(preference + preference.swapaxes(0, 1) - 1) > SHARE_ERROR)
    if bad.any():
        i, j, r = first(bad)
        raise field_error(
            where,
            f"preference[{i}][{j}][{r}]",
            f"is asymmetric: it and preference[{j}][{i}][{r}] must sum to 1",
        )


def _validate_parts(parts: Sequence[Part], where: str, field: str) -> None:
    if not parts:
        raise field_error(where, field, "is empty: give at least one text or image")
    for index, part in enumerate(parts):
        if isinstance(part, Text):
            if not isinstance(part.text, str) or not part.text:
                raise field_error(where, f"{field}[{index}].text", "must be a non-empty string")
        elif not isinstance(part, Image) or not isinstance(part.data, bytes) or not part.data:
            raise field_error(where, f"{field}[{index}]", "must be a text or an image with data")


# JSON


def parse_json(
    obj: Any,
    read_image: Callable[[str], bytes],
    where: str,
    *,
    default_id: str | None = None,
) -> PreferenceExample:
    """Turn one JSON object (see the top of this file) into a validated example.

    Args:
        read_image: image name -> encoded bytes, e.g. `pictures.image_reader(folder)`.
        where: 'file:line', the beginning of every message.
        default_id: id of an object without one; default: `where`.

    Reward dimensions: `named_dimensions`, else ('overall',).

    Labels, one of: `ranks` (1 = best, equal = tie), `scores` (larger = better), each a list of K
    numbers or {dimension: list}, null = unlabelled; or `preference` [K][K] or [K][K][R]. `weight`
    is a number, [K][K] or [K][K][R]. No label at all: every candidate needs a critique.

    Raises:
        UserError: one line that names file, line and field.
    """
    check_type(obj, dict, where, "(whole line)", "an object")
    if "critique" in obj:
        raise field_error(
            where, "critique", "is comparative (it stands beside the candidates); give one critique"
            " per candidate, as candidates[i].critique, about that candidate alone",
        )  # fmt: skip
    check_keys(obj, _EXAMPLE_KEYS, ("prompt", "candidates"), where, "")
    prompt = _parse_parts(obj["prompt"], read_image, where, "prompt")
    check_type(obj["candidates"], list, where, "candidates", "a list")
    candidates = tuple(
        _parse_candidate(value, read_image, where, f"candidates[{index}]")
        for index, value in enumerate(obj["candidates"])
    )
    _check_count(candidates, where)
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
    name = obj.get("id", where if default_id is None else default_id)
    check_type(name, str, where, "id", "a string")
    example = PreferenceExample(name, prompt, candidates, preference, weight, names)
    validate(example, where)
    return example


def _parse_candidate(value: Any, read_image, where: str, field: str) -> Candidate:
    if not isinstance(value, dict) or "text" in value or "image" in value:
        return Candidate(_parse_parts(value, read_image, where, field))
    check_keys(value, _CANDIDATE_KEYS, ("parts",), where, field)
    critique, score_line = value.get("critique"), value.get("score_line", False)
    if critique is not None:
        check_type(critique, str, where, f"{field}.critique", "a string")
    check_type(score_line, bool, where, f"{field}.score_line", "true or false")
    parts = _parse_parts(value["parts"], read_image, where, f"{field}.parts")
    return Candidate(parts, critique, score_line)


def _parse_parts(value: Any, read_image, where: str, field: str) -> tuple[Part, ...]:
    if isinstance(value, (str, dict)):
        value = [value]
    check_type(value, list, where, field, "text or a list of parts")
    parts = []
    for index, part in enumerate(value):
        name = f"{field}[{index}]"
        if isinstance(part, str):
            part = {"text": part}
        check_type(part, dict, where, name, 'a string, {"text": ...} or {"image": ...}')
        check_keys(part, ("text", "image"), (), where, name)
        if len(part) != 1:
            raise field_error(where, name, "needs exactly one of 'text' and 'image'")
        ((kind, content),) = part.items()
        check_type(content, str, where, f"{name}.{kind}", "a string")
        if kind == "text":
            parts.append(Text(content))
            continue
        try:
            parts.append(Image(read_image(content)))
        except RecordError as error:
            raise field_error(where, f"{name}.image", str(error), error.kind) from error
    return tuple(parts)


def named_dimensions(obj: Mapping[str, Any]) -> tuple[str, ...]:
    """Reward dimensions that a line of JSON names: its `dimensions`, else the names in `scores` or
    `ranks`, else 'overall' where it has labels without names, else none."""
    names = obj.get("dimensions")
    if names is not None:
        right = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return tuple(names) if right else ()
    labels = [obj[key] for key in _LABELS if obj.get(key) is not None]
    named = [tuple(value) for value in labels if isinstance(value, dict) and value]
    return named[0] if named else DEFAULT_DIMENSIONS if labels else ()


def in_dimensions(example: PreferenceExample, dimensions: tuple[str, ...]) -> PreferenceExample:
    """The same example over these dimensions; those that it does not have are unlabelled."""
    if example.dimensions == dimensions:
        return example
    labels = example.preference, example.weight
    preference, weight = labels_in(*labels, example.dimensions, dimensions)
    return dataclasses.replace(
        example, preference=preference, weight=weight, dimensions=dimensions
    )


# Records of a prepared data set


def to_record(example: PreferenceExample) -> dict[str, Any]:
    """{'id': str, 'record': JSON str, 'images': list of bytes}; equal pictures are kept once."""
    images: dict[bytes, int] = {}

    def parts(items: Sequence[Part]) -> list:
        return [
            item.text if isinstance(item, Text) else images.setdefault(item.data, len(images))
            for item in items
        ]

    record = {
        "prompt": parts(example.prompt),
        "candidates": [
            [parts(c.parts), c.critique, c.score_line, *([] if c.facts is None else [c.facts])]
            for c in example.candidates
        ],
        "preference": example.preference.tolist(),
        "weight": example.weight.tolist(),
        "dimensions": list(example.dimensions),
    }
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return {"id": example.id, "record": text, "images": list(images)}


def from_record(record: Mapping[str, Any]) -> PreferenceExample:
    """Inverse of `to_record`; text may come back as bytes. Nothing is decoded or validated."""
    fields, images = json.loads(record["record"]), record["images"]

    def parts(items: list) -> tuple[Part, ...]:
        return tuple(
            Text(item) if isinstance(item, str) else Image(bytes(images[item])) for item in items
        )

    name = record["id"]
    return PreferenceExample(
        id=name.decode() if isinstance(name, bytes) else str(name),
        prompt=parts(fields["prompt"]),
        candidates=tuple(
            Candidate(parts(items), critique, bool(score_line), *map(tuple, stated))
            for items, critique, score_line, *stated in fields["candidates"]
        ),
        preference=np.asarray(fields["preference"], np.float32),
        weight=np.asarray(fields["weight"], np.float32),
        dimensions=tuple(fields["dimensions"]),
    )
