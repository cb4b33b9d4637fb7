"""Rows of judges' data, read: what was asked for, of which source, and what is said of each edit.

From EditScore's code and SpatialReward's reward server: the fields, the questions (the instruction
after "Editing instruction:", two scores of 0 to 25) and the JSON of the answers. Assumed: that the
pictures of a talk are the source and the edit, or the edit alone, in this order. Of
SpatialReward-Train's rows the card shows the key `image` alone, and names by row and picture.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from jrm_jax.data.ingest import regions, talks
from jrm_jax.data.ingest.pictures import GroupPictures
from jrm_jax.data.labels import check_type, field_error, finite

LARGEST = 25  # of EditScore's scales
SIDES = ("SC", "PQ")
SOURCES = ("input_images", "input_image", "source_image")
_EDITS = ("output_images", "output_image")
_INSTRUCTION = re.compile(r"editing instruction:\s*(.+)\Z", re.IGNORECASE | re.DOTALL)
_IMAGE = re.compile(r"<image>\s*", re.IGNORECASE)


class Judgement(NamedTuple):
    """Of one edit. reasons and scores: {'SC' or 'PQ': text / two numbers}, either may lack.

    boxes: a line about the edited regions, where it is not part of a reason.
    """

    edit: bytes
    reasons: dict[str, str]
    scores: dict[str, tuple[float, float]]
    boxes: str = ""


class Said(NamedTuple):
    """What a row says. instruction: "" where a judge was asked about the edit alone."""

    instruction: str
    sources: tuple[bytes, ...]
    judgements: list[Judgement]
    odd: list[tuple[str, str]]


def of_row(row: dict[str, Any], where: str, read: GroupPictures) -> Said:
    if not row["instruction"].strip():
        raise field_error(where, "instruction", "is empty")
    edits = listed(row, _EDITS, where)
    sources = tuple(read(value, where, "input_image") for value in listed(row, SOURCES, where))
    judgements = []
    for index, edit in enumerate(edits):
        reasons, scores = {}, {}
        for side in SIDES:
            text = _own(row.get(f"{side}_reasoning"), index, len(edits), where, f"{side}_reasoning")
            if text is not None and str(text).strip():
                check_type(text, str, where, f"{side}_reasoning", "a string")
                if regions.has_tokens(text):
                    words = "is about regions of the edit, whose boxes only talks have"
                    raise field_error(where, f"{side}_reasoning", words)
                reasons[side] = text
            value = row.get(f"{side}_score")
            listed_too = isinstance(value, list) and value and isinstance(value[0], list)
            if value is not None and (len(edits) > 1 or listed_too):
                value = _own(value, index, len(edits), where, f"{side}_score")
            if value is not None:
                scores[side] = _two(value, where, f"{side}_score")
        judgements.append(Judgement(read(edit, where, "output_image"), reasons, scores))
    return Said(row["instruction"], sources, judgements, [])


def of_talk(row: dict[str, Any], where: str, read: GroupPictures, boxes: str) -> Said:
    """
    Args:
        boxes: one of `regions.STYLES`; "": none are expected.

    Raises:
        RecordError: a picture, an answer, a score or a box that cannot be read.
    """
    asked, answered, names = talks.read_talk(row, where)
    images = [read(value, where, "images") for value in names]
    found = _INSTRUCTION.search(_IMAGE.sub("", asked))
    side = "SC" if found else "PQ"
    if found and len(images) < 2:
        raise field_error(where, "images", "has no source picture beside the edit")
    answer = _answer(answered, where)
    reason = str(answer.get("reasoning") or "").strip()
    scores = {side: _two(answer["score"], where, "score")}
    value = answer.get("edit_region", row.get("edit_region"))
    reason, line, odd = _with_boxes(reason, value, where, boxes)
    judgement = Judgement(images[-1], {side: reason} if reason else {}, scores, line)
    if not found:
        return Said("", (), [judgement], odd)
    return Said(found[1].strip(), tuple(images[:-1]), [judgement], odd)


def _with_boxes(
    reason: str, value: Any, where: str, boxes: str
) -> tuple[str, str, list[tuple[str, str]]]:
    """(reason, line about the boxes or "", what is to be told)."""
    if value is None and not regions.has_tokens(reason):
        return reason, "", []
    if not boxes:
        raise field_error(where, "edit_region", "is about regions of the edit: read these rows"
                          " with the layout spatialreward")  # fmt: skip
    found = regions.read_regions(value or [], where)
    unknown = regions.unknown_regions(reason, found)
    words = f"{where}: {', '.join(map(str, unknown))}"
    odd = [("region that is referred to and has no box", words)] if unknown else []
    if boxes == "line":
        return reason, "" if value is None else regions.as_line(found), odd
    return regions.in_words(reason, found), "", odd


def _answer(text: str, where: str) -> dict[str, Any]:
    """The first JSON object in a judge's answer; has 'score'."""
    kind = "judge's answer that cannot be read"
    start = text.find("{")
    try:
        answer = json.JSONDecoder().raw_decode(text[start:])[0] if start >= 0 else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or "score" not in answer:
        words = f"the answer is no JSON with 'reasoning' and 'score': {text[:60]!r}"
        raise field_error(where, "conversations", words, kind)
    return answer


def _two(value: Any, where: str, field: str) -> tuple[float, float]:
    numbers = [finite(n) for n in (value if isinstance(value, list | tuple) else [value])]
    if len(numbers) != 2 or None in numbers:
        raise field_error(where, field, f"is {str(value)[:40]}, must be two numbers")
    if min(numbers) < 0 or max(numbers) > LARGEST:
        words = f"is {str(value)[:40]}, must be from 0 to {LARGEST}"
        raise field_error(where, field, words, "score out of its range")
    return numbers[0], numbers[1]


def listed(row: dict[str, Any], names: tuple[str, ...], where: str) -> list:
    for name in names:
        value = row.get(name)
        if value:
            return value if isinstance(value, list) else [value]
    raise field_error(where, names[-1], f"is missing (or one of {', '.join(names[:-1])})")


def _own(value: Any, index: int, count: int, where: str, field: str) -> Any:
    """The entry of one edit, where there is a list with one for each."""
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise field_error(where, field, f"has {len(value)} entries for {count} edits")
    return value[index]
