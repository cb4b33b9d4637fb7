"""Edits with written judgements, as EditScore's and SpatialReward's training data have them ->
critiques and scores.

Two kinds of rows:

    {instruction, input_image | input_images | source_image, output_image | output_images,
     SC_reasoning, PQ_reasoning, SC_score, PQ_score}       one edit, or a list of each
    a question to a judge and its answer, see `talks`

A judge writes twice about an edit: does it follow the instruction and keep the rest (SC: scores for
success and for preservation), and does it look right (PQ: naturalness, artifacts). Both become one
critique of that candidate, the scores its last line, by the names of the reward dimensions, so that
`config.loss.teacher_weight` can learn them. Rows of the first kind with the same source
and instruction become one group, ranked by the scores in each dimension. Of talks, the two about
one edit are put together, known by the picture's content, and the edit stands alone: only the
language loss learns from it.

Letters: K candidates, R reward dimensions.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jrm_jax.data.ingest import talks
from jrm_jax.data.ingest.judge_rows import SOURCES, Judgement, Said, listed, of_row, of_talk
from jrm_jax.data.ingest.layout import Member, Problems, read_each
from jrm_jax.data.ingest.pictures import GroupPictures, content_digest, picture_name
from jrm_jax.data.ingest.rows import SUFFIXES
from jrm_jax.data.labels import check_type, field_error, parse_labels
from jrm_jax.data.schema import Candidate, Image, PreferenceExample, Text, validate
from jrm_jax.data.stated import score_line
from jrm_jax.errors import RecordError

DIMENSIONS = ("overall", "instruction_following", "consistency", "visual_quality")
_WORDS = {"SC": "Instruction", "PQ": "Quality"}
_LOOKS = ("naturalness", "artifacts")


class Judged(NamedTuple):
    """Layout. folder: where pictures' names lead. labels: rank edits by the judge's scores.

    boxes: how boxes of edited regions are written, one of `regions.STYLES`; "": none are expected.
    """

    folder: Path
    labels: bool = True
    boxes: str = ""
    suffixes: tuple[str, ...] = SUFFIXES
    gathers: bool = True

    def columns(self, names: list[str]) -> list[str]:
        """What `key` needs."""
        return [n for n in names if n in (*talks.FIELDS, *SOURCES)]

    def key(self, row: dict[str, Any], where: str) -> str:
        if talks.is_talk(row):
            edit = talks.images_of(row, where)[-1]
            return f"edit\0{content_digest(self.folder, edit, where, 'images')}"
        check_type(row.get("instruction"), str, where, "instruction", "a string")
        sources = listed(row, SOURCES, where)
        return "\0".join([row["instruction"], *map(picture_name, sources)])

    def label(self, row: dict[str, Any]) -> str:
        return ""

    def dimensions(self, row: dict[str, Any]) -> tuple[str, ...]:
        return DIMENSIONS

    def make(self, members: list[Member], problems: Problems) -> list[PreferenceExample]:
        pictures = GroupPictures(self.folder)

        def read(row: dict[str, Any], where: str) -> Said:
            if talks.is_talk(row):
                return of_talk(row, where, pictures, self.boxes)
            return of_row(row, where, pictures)

        asked: dict[tuple[str, tuple[bytes, ...]], list[tuple[str, Judgement]]] = {}
        alone: list[tuple[str, Judgement]] = []  # about the edit, whatever was asked for
        for where, said in read_each(members, problems, read):
            for kind, detail in said.odd:
                problems.note(kind, detail)
            found = [(where, one) for one in said.judgements]
            if said.instruction:
                asked.setdefault((said.instruction, said.sources), []).extend(found)
            else:
                alone += found
        if alone and not asked:
            raise field_error(
                alone[0][0], "conversations", "no question about this edit tells its instruction",
                "judgement of quality without the instruction",
            )  # fmt: skip
        examples = []
        for (instruction, sources), found in asked.items():
            try:
                examples.append(self._example(instruction, sources, found + alone, problems))
            except RecordError as error:
                if len(asked) == 1:
                    raise
                for where, _ in found:  # what else was asked of the same edit stays
                    problems.leave(where, error)
        return examples

    def _example(
        self,
        instruction: str,
        sources: tuple[bytes, ...],
        found: list[tuple[str, Judgement]],
        problems: Problems,
    ) -> PreferenceExample:
        where = found[0][0]
        merged = _merge([one for _, one in found], where, problems)
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
        return example


def _merge(judgements: list[Judgement], where: str, problems: Problems) -> list[Judgement]:
    """One for each edit: the first reasoning of either kind, and the mean of the scores."""
    by_edit: dict[bytes, list[Judgement]] = {}
    for one in judgements:
        by_edit.setdefault(one.edit, []).append(one)
    merged = []
    for edit, several in by_edit.items():
        reasons: dict[str, str] = {}
        scores: dict[str, tuple[float, float]] = {}
        for side in _WORDS:
            texts = [one.reasons[side] for one in several if side in one.reasons]
            pairs = [one.scores[side] for one in several if side in one.scores]
            if max(len(texts), len(pairs)) > 1:
                words = "edit that is judged more than once (mean scores, first reasoning)"
                problems.note(words, f"{where}: {side}")
            if texts:
                reasons[side] = texts[0]
            if pairs:
                scores[side] = tuple(np.mean(pairs, axis=0).tolist())
        boxes = next((one.boxes for one in several if one.boxes), "")
        merged.append(Judgement(edit, reasons, scores, boxes))
    return merged


def _candidate(one: Judgement) -> Candidate:
    lines = [one.boxes] if one.boxes else []
    lines += [
        f"{_WORDS[side]}: {' '.join(one.reasons[side].split())}"
        for side in _WORDS
        if side in one.reasons
    ]
    if not lines:
        return Candidate((Image(one.edit),))
    scores = {name: score for name in DIMENSIONS if (score := _value(one, name)) is not None}
    if scores:
        looks = zip(_LOOKS, one.scores.get("PQ", ()), strict=False)
        lines.append(score_line(scores, {"visual_quality": dict(looks)}))
    return Candidate((Image(one.edit),), "\n".join(lines), bool(scores))


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
