"""Edits with written judgements, as EditScore's training data has them -> critiques and scores.

Two kinds of rows:

    {instruction, input_image | input_images | source_image, output_image | output_images,
     SC_reasoning, PQ_reasoning, SC_score, PQ_score}       one edit, or a list of each
    {conversations: [{from, value}, ..], images: [..]}     a question to a judge and its answer

A judge writes twice about an edit: does it follow the instruction and keep the rest (SC: scores for
success and for preservation), and does it look right (PQ: naturalness, artifacts). Both become one
critique of that candidate, the scores its last line. Rows of the first kind with the same source
and instruction become one group, ranked by the scores in each dimension. Of conversations, the two
about one edit are put together, and the edit stands alone: only the language loss learns from it.

Letters: K candidates, R reward dimensions.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jrm_jax.data.ingest.layout import Member, Problems, read_each
from jrm_jax.data.ingest.pictures import GroupPictures, picture_name
from jrm_jax.data.ingest.rows import SUFFIXES
from jrm_jax.data.labels import check_type, field_error, parse_labels
from jrm_jax.data.schema import Candidate, Image, PreferenceExample, Text, validate

DIMENSIONS = ("overall", "instruction_following", "consistency", "visual_quality")
LARGEST = 25  # of EditScore's scales
_SOURCES = ("input_images", "input_image", "source_image")
_EDITS = ("output_images", "output_image")
_NAMES = {"SC": ("success", "preservation"), "PQ": ("naturalness", "artifacts")}
_WORDS = {"SC": "Instruction", "PQ": "Quality"}
_INSTRUCTION = re.compile(r"editing instruction:\s*(.+)\Z", re.IGNORECASE | re.DOTALL)
_IMAGE = re.compile(r"<image>\s*", re.IGNORECASE)
_ASKED, _ANSWERED = ("human", "user"), ("gpt", "assistant")


class Judgement(NamedTuple):
    """Of one edit. reasons and scores: {'SC' or 'PQ': text / two numbers}, either may lack."""

    edit: bytes
    reasons: dict[str, str]
    scores: dict[str, tuple[float, float]]


class Judged(NamedTuple):
    """Layout. folder: where pictures' names lead. labels: rank edits by the judge's scores."""

    folder: Path
    labels: bool = True
    suffixes: tuple[str, ...] = SUFFIXES
    gathers: bool = True

    def columns(self, names: list[str]) -> list[str]:
        """Of parquet, what `key` needs."""
        return [n for n in names if n in ("instruction", "conversations", "images", *_SOURCES)]

    def key(self, row: dict[str, Any], where: str) -> str:
        if "conversations" in row:
            images = _images(row, where)
            return f"edit\0{picture_name(images[-1])}"
        check_type(row.get("instruction"), str, where, "instruction", "a string")
        sources = _listed(row, _SOURCES, where)
        return "\0".join([row["instruction"], *map(picture_name, sources)])

    def label(self, row: dict[str, Any]) -> str:
        return ""

    def dimensions(self, row: dict[str, Any]) -> tuple[str, ...]:
        return DIMENSIONS

    def make(self, members: list[Member], problems: Problems) -> list[PreferenceExample]:
        pictures = GroupPictures(self.folder)

        def read(row: dict[str, Any], where: str) -> Said:
            return (_of_talk if "conversations" in row else _of_row)(row, where, pictures)

        instruction, sources, judgements, used = "", (), [], []
        for where, said in read_each(members, problems, read):
            used.append(where)
            instruction, sources = said[0] or instruction, said[1] or sources
            judgements += said[2]
        if not used:
            return []
        where = used[0]
        if not instruction:
            raise field_error(
                where, "conversations", "no question about this edit tells its instruction",
                "judgement of quality without the instruction",
            )  # fmt: skip
        merged = _merge(judgements, where, problems)
        candidates = tuple(_candidate(one) for one in merged)
        labels = {name: [_value(one, name) for one in merged] for name in DIMENSIONS}
        shown = {"scores": labels} if self.labels else {}
        preference, weight = parse_labels(shown, len(candidates), DIMENSIONS, where)
        if not weight.any() and not any(c.critique for c in candidates):
            raise field_error(where, "SC_reasoning", "neither reasoning nor two edits with scores",
                              "judgement without reasoning or comparison")  # fmt: skip
        example = PreferenceExample(
            id=Path(where).name, prompt=(Text(instruction), *map(Image, sources)),
            candidates=candidates, preference=preference, weight=weight, dimensions=DIMENSIONS,
        )  # fmt: skip
        validate(example, where)
        return [example]


Said = tuple[str, tuple[bytes, ...], list[Judgement]]  # instruction, sources, judgements


def _of_row(row: dict[str, Any], where: str, read: GroupPictures) -> Said:
    if not row["instruction"].strip():
        raise field_error(where, "instruction", "is empty")
    edits = _listed(row, _EDITS, where)
    sources = tuple(read(value, where, "input_image") for value in _listed(row, _SOURCES, where))
    judgements = []
    for index, edit in enumerate(edits):
        reasons, scores = {}, {}
        for side in _NAMES:
            text = _own(row.get(f"{side}_reasoning"), index, len(edits), where, f"{side}_reasoning")
            if text is not None and str(text).strip():
                check_type(text, str, where, f"{side}_reasoning", "a string")
                reasons[side] = text
            value = row.get(f"{side}_score")
            if value is not None and len(edits) > 1:
                value = _own(value, index, len(edits), where, f"{side}_score")
            if value is not None:
                scores[side] = _two(value, where, f"{side}_score")
        judgements.append(Judgement(read(edit, where, "output_image"), reasons, scores))
    return row["instruction"], sources, judgements


def _of_talk(row: dict[str, Any], where: str, read: GroupPictures) -> Said:
    turns = row.get("conversations")
    check_type(turns, list, where, "conversations", "a list of turns")
    asked = answered = ""
    for index, turn in enumerate(turns):
        check_type(turn, dict, where, f"conversations[{index}]", "an object")
        speaker = turn.get("from") or turn.get("role")
        text = turn.get("value") or turn.get("content")
        check_type(text, str, where, f"conversations[{index}].value", "a string")
        asked = text if speaker in _ASKED else asked
        answered = text if speaker in _ANSWERED else answered
    images = [read(value, where, "images") for value in _images(row, where)]
    found = _INSTRUCTION.search(_IMAGE.sub("", asked))
    side = "SC" if found else "PQ"
    if found and len(images) < 2:
        raise field_error(where, "images", "has no source picture beside the edit")
    reason, scores = _answer(answered, where)
    judgement = Judgement(images[-1], {side: reason} if reason else {}, {side: scores})
    if not found:
        return "", (), [judgement]
    return found[1].strip(), tuple(images[:-1]), [judgement]


def _answer(text: str, where: str) -> tuple[str, tuple[float, float]]:
    """(reasoning, scores) of the first JSON object in a judge's answer."""
    kind = "judge's answer that cannot be read"
    start = text.find("{")
    try:
        answer = json.JSONDecoder().raw_decode(text[start:])[0] if start >= 0 else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or "score" not in answer:
        words = f"the answer is no JSON with 'reasoning' and 'score': {text[:60]!r}"
        raise field_error(where, "conversations", words, kind)
    return str(answer.get("reasoning") or "").strip(), _two(answer["score"], where, "score")


def _two(value: Any, where: str, field: str) -> tuple[float, float]:
    numbers = value if isinstance(value, list | tuple) else [value]
    right = len(numbers) == 2 and all(
        isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers
    )
    if not right:
        raise field_error(where, field, f"is {str(value)[:40]}, must be two numbers")
    if min(numbers) < 0 or max(numbers) > LARGEST:
        words = f"is {str(value)[:40]}, must be from 0 to {LARGEST}"
        raise field_error(where, field, words, "score out of its range")
    return float(numbers[0]), float(numbers[1])


def _listed(row: dict[str, Any], names: tuple[str, ...], where: str) -> list:
    for name in names:
        value = row.get(name)
        if value:
            return value if isinstance(value, list) else [value]
    raise field_error(where, names[-1], f"is missing (or one of {', '.join(names[:-1])})")


def _images(row: dict[str, Any], where: str) -> list:
    images = row.get("images")
    if not isinstance(images, list) or not images:
        raise field_error(where, "images", "must be a list of pictures")
    return images


def _own(value: Any, index: int, count: int, where: str, field: str) -> Any:
    """The entry of one edit, where there is a list with one for each."""
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise field_error(where, field, f"has {len(value)} entries for {count} edits")
    return value[index]


def _merge(judgements: list[Judgement], where: str, problems: Problems) -> list[Judgement]:
    """One for each edit: the first reasoning of either kind, and the mean of the scores."""
    by_edit: dict[bytes, list[Judgement]] = {}
    for one in judgements:
        by_edit.setdefault(one.edit, []).append(one)
    merged = []
    for edit, several in by_edit.items():
        reasons: dict[str, str] = {}
        scores: dict[str, tuple[float, float]] = {}
        for side in _NAMES:
            texts = [one.reasons[side] for one in several if side in one.reasons]
            pairs = [one.scores[side] for one in several if side in one.scores]
            if max(len(texts), len(pairs)) > 1:
                words = "edit that is judged more than once (mean scores, first reasoning)"
                problems.note(words, f"{where}: {side}")
            if texts:
                reasons[side] = texts[0]
            if pairs:
                scores[side] = tuple(np.mean(pairs, axis=0).tolist())
        merged.append(Judgement(edit, reasons, scores))
    return merged


def _candidate(one: Judgement) -> Candidate:
    lines = [
        f"{_WORDS[side]}: {' '.join(one.reasons[side].split())}"
        for side in _NAMES
        if side in one.reasons
    ]
    numbers = [
        f"{name} {score:g}"
        for side in _NAMES
        for name, score in zip(_NAMES[side], one.scores.get(side, ()), strict=False)
    ]
    if not lines:
        return Candidate((Image(one.edit),))
    if numbers:
        lines.append(f"Scores: {', '.join(numbers)}.")
    return Candidate((Image(one.edit),), "\n".join(lines), bool(numbers))


def _value(one: Judgement, dimension: str) -> float | None:
    """As EditScore computes them (its 'prompt following' has EditReward's name here, so that both
    can be mixed): SC and PQ are the smaller of their two scores, overall is the geometric
    mean of both."""
    follows, looks = one.scores.get("SC"), one.scores.get("PQ")
    if dimension == "overall":
        both = follows and looks
        return math.sqrt(max(0.0, min(follows)) * max(0.0, min(looks))) if both else None
    if dimension == "visual_quality":
        return min(looks) if looks else None
    return follows[DIMENSIONS.index(dimension) - 1] if follows else None
