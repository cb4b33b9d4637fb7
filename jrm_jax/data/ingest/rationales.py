"""A judge's rationale about two candidates, or one, as RationalRewards' training data has them.

A row is a talk (see `talks`): a request and the pictures, and an answer of this form:

    # Detailed Judgement
    1. Text Faithfulness:
    ## Justification: Image A .. Image B ..
    ## Score A: 3.5
    ## Score B: 2
    ## Winner: Image A
    2. ..
    # Summary: ..

or with "## Score" alone, about one candidate. The scores of an aspect become a preference in its
dimension, their mean over the aspects becomes `overall`; N/A is unlabelled. The critique ends with
these scores, by the names of the dimensions, so that `config.loss.teacher_weight` can learn them.
A rationale about two is cut into one for each (`comparisons`), and refused where nothing is left
for one of them. Summaries, analyses of the request and refined requests are not used. Every row is
a group of its own: a candidate of several pairs has several rationales, and a group has room for
one.

From the repository: the files' fields (rationalrewards_sft/data/dataset_info.json), both questions
and the form of the answers (reward_model_evaluation, test_time_prompt_tuning), scores of 1 to 4.
Assumed: that the answers of the training data have that form, with 0 as the lowest score that a
deduction leads to; the data was not at hand.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.data.ingest import talks
from jrm_jax.data.ingest.aspects import (
    ASPECTS,
    UNREADABLE,
    Aspect,
    read_aspects,
    share_of,
    shares_of,
)
from jrm_jax.data.ingest.comparisons import SIDES, split
from jrm_jax.data.ingest.layout import Member, Problems, read_each
from jrm_jax.data.ingest.pictures import GroupPictures
from jrm_jax.data.ingest.rows import SUFFIXES
from jrm_jax.data.ingest.votes import Vote, tally
from jrm_jax.data.labels import field_error, parse_labels
from jrm_jax.data.schema import (
    DEFAULT_DIMENSIONS,
    Candidate,
    Image,
    PreferenceExample,
    Text,
    validate,
)
from jrm_jax.data.stated import score_line
from jrm_jax.errors import RecordError

_AFTER = r"You are provided with"
_REQUEST = re.compile(
    rf"User Instruction:\s*(?!\s|{_AFTER})(.+?)\s*(?:\n\s*{_AFTER}|\Z)", re.DOTALL
)
_ROLE = re.compile(r"\b(Source|Edited|Generated) Image(?: ([AB]))?\W*<image>", re.IGNORECASE)


class Rationales(NamedTuple):
    """Layout. folder: where pictures' names lead. critiques: keep them, not scores alone."""

    folder: Path
    critiques: bool = True
    suffixes: tuple[str, ...] = SUFFIXES
    gathers: bool = False

    def columns(self, names: list[str]) -> list[str]:
        """What `key` and `dimensions` need."""
        return [name for name in names if name in talks.TEXTS]

    def key(self, row: dict[str, Any], where: str) -> None:
        if not talks.has_texts(row):
            raise field_error(where, "messages", "is missing (a request and a rationale)")

    def label(self, row: dict[str, Any]) -> str:
        return ""

    def dimensions(self, row: dict[str, Any]) -> tuple[str, ...]:
        try:
            aspects = read_aspects(talks.read_texts(row, "")[1], "")
        except RecordError:  # told when the row is read
            return ()
        judged = tuple(ASPECTS[a.name][0] for a in aspects if share_of(a) is not None)
        return ("overall", *judged) if judged else ()

    def make(self, members: list[Member], problems: Problems) -> list[PreferenceExample]:
        read = GroupPictures(self.folder)
        found = read_each(members, problems, lambda row, where: self._example(row, where, read))
        examples = []
        for where, (example, odd) in found:
            for kind, detail in odd:
                problems.note(kind, f"{where}: {detail}")
            examples.append(example)
        return examples

    def _example(
        self, row: dict[str, Any], where: str, read: GroupPictures
    ) -> tuple[PreferenceExample, list[tuple[str, str]]]:
        talk = talks.read_talk(row, where)
        request = _REQUEST.search(talk.asked)
        if not request:
            raise field_error(where, "messages", "the question has no 'User Instruction:'",
                              UNREADABLE)  # fmt: skip
        aspects = read_aspects(talk.answered, where)
        sides = SIDES if any(set(a.scores) & set(SIDES) for a in aspects) else ("",)
        sources, edits = _places(talk, len(sides), where)
        pictures = [read(name, where, "images") for name in edits]
        critiques, odd = [()] * len(sides), []
        if self.critiques:
            critiques, odd = _critiques(aspects, sides, bool(sources), where)
        dimensions = DEFAULT_DIMENSIONS
        preference, weight = parse_labels({}, 1, dimensions, where)
        if len(sides) > 1:
            if pictures[0] == pictures[1]:
                raise field_error(where, "images", "A and B are the same picture",
                                  "pair of equal edits")  # fmt: skip
            shares, said = shares_of(aspects, where)
            odd += said
            dimensions = tuple(shares)
            vote = Vote(where, *pictures, tuple(shares.values()))
            _, preference, weight, _ = tally([vote])
        example = PreferenceExample(
            id=Path(where).name,
            prompt=(Text(request[1]), *(Image(read(name, where, "images")) for name in sources)),
            candidates=tuple(
                Candidate((Image(picture),), *critique)
                for picture, critique in zip(pictures, critiques, strict=True)
            ),
            preference=preference, weight=weight, dimensions=dimensions,
        )  # fmt: skip
        validate(example, where)
        return example, odd


def _places(talk: talks.Talk, count: int, where: str) -> tuple[list[Any], list[Any]]:
    """(sources, candidates in the order A, B) of the pictures: by the words before each <image>,
    else the candidates are the last ones."""
    marks = talk.asked.lower().count("<image>")
    if marks not in (0, len(talk.images)):
        raise field_error(where, "images", f"has {len(talk.images)} pictures for {marks} <image>")
    roles = [(kind.lower(), side) for kind, side in _ROLE.findall(talk.asked)]
    if len(roles) == len(talk.images):
        sources = [i for i, (kind, _) in zip(talk.images, roles, strict=True) if kind == "source"]
        edits = [(side, i) for i, (kind, side) in zip(talk.images, roles, strict=True)
                 if kind != "source"]  # fmt: skip
        edits = [image for _, image in sorted(edits, key=lambda item: item[0])]
    else:
        sources, edits = talk.images[:-count], talk.images[-count:]
    if len(edits) != count:
        raise field_error(where, "images", f"has {len(edits)} pictures of {count} candidates")
    return sources, edits


def _critiques(
    aspects: list[Aspect], sides: tuple[str, ...], edited: bool, where: str
) -> tuple[list[tuple[str, bool]], list[tuple[str, str]]]:
    """([(critique, whether its last line states scores), ..], what is to be told)."""
    called = "the edited image" if edited else "the image"
    lines: dict[str, list[str]] = {side: [] for side in sides}
    left = 0
    for aspect in aspects:
        word = ASPECTS[aspect.name][1]
        if sides == SIDES:
            texts, rest = split(aspect.text, called)
            left += len(rest)
        else:
            texts = {"": " ".join(aspect.text.split())}
        for side in sides:
            if texts[side]:
                lines[side].append(f"{word}: {texts[side]}")
    empty = [side for side in sides if not lines[side]]
    if empty:
        words = "the rationale says nothing"
        if sides == SIDES:
            words = (f"the rationale is about both candidates and cannot be split: nothing names"
                     f" Image {' or '.join(empty)} alone (--no_critiques keeps the preferences)")
        kind = "rationale about two candidates that cannot be split"
        raise field_error(where, "messages", words, kind if sides == SIDES else UNREADABLE)
    stated = []
    for side in sides:
        scores = {
            ASPECTS[a.name][0]: a.scores[side] for a in aspects if a.scores.get(side) is not None
        }
        # as the preference is made: of aspects in which all sides have a score
        whole = [a.scores[side] for a in aspects if all(a.scores.get(s) is not None for s in sides)]
        if scores:
            overall = {"overall": statistics.fmean(whole)} if whole else {}
            lines[side].append(score_line({**overall, **scores}))
        stated.append(("\n".join(lines[side]), bool(scores)))
    odd = [("rationale with sentences about both candidates (left out of it)", str(left))]
    return stated, odd if left else []
