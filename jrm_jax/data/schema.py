"""What an example is: a prompt, K candidates, and who was preferred to whom.

K >= 2, or 1 with a critique: then the language loss alone learns from it.

Letters: K candidates, R reward dimensions.

    PreferenceExample <- parsing.parse_json(object of a JSON line, read_image, where)
    PreferenceExample <-> record {'id', 'record', 'images'} of a prepared data set
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jrm_jax.data.labels import (
    check_text,
    field_error,
    labels_in,
)

DEFAULT_DIMENSIONS = ("overall",)
SHARE_ERROR = 1e-5  # of float32 shares that are written with six digits


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
    check_text(example.id, where, "id")
    _validate_parts(example.prompt, where, "prompt")
    count, dimensions = len(example.candidates), example.dimensions
    check_count(example.candidates, where)
    for index, candidate in enumerate(example.candidates):
        _validate_parts(candidate.parts, where, f"candidates[{index}].parts")
        critique = candidate.critique
        if critique is not None:
            blank = isinstance(critique, str) and not critique.strip()
            field, words = f"candidates[{index}].critique", "a non-empty string or absent"
            check_text("" if blank else critique, where, field, words)
    if not dimensions or len(set(dimensions)) != len(dimensions):
        raise field_error(where, "dimensions", "must be distinct names, at least one")
    for name in dimensions:
        check_text(name, where, "dimensions", "distinct names, at least one")
    shape = (count, count, len(dimensions))
    for name in ("preference", "weight"):
        found = np.shape(getattr(example, name))
        if found != shape:
            raise field_error(
                where, name, f"has shape {list(found)}, must be [K, K, R] = {list(shape)}"
            )
    _validate_labels(example.preference, example.weight, where)


def check_count(candidates: Sequence[Candidate], where: str) -> None:
    """One candidate alone can teach by its critique only.

    Raises:
        RecordError: there are too few.
    """
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
            check_text(part.text, where, f"{field}[{index}].text")
        elif not isinstance(part, Image) or not isinstance(part.data, bytes) or not part.data:
            raise field_error(where, f"{field}[{index}]", "must be a text or an image with data")


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
