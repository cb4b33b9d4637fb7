"""Pictures of one prompt with a rank and ratings, as ImageRewardDB has them -> one group.

    {"image_path": "images/train/train_1/X.webp", "prompt_id", "prompt", "rank",
     "overall_rating", "image_text_alignment_rating", "fidelity_rating"}

A row is one picture, or all of a prompt, with lists for pictures, ranks and ratings. From the card
of ImageRewardDB and its loading script: the fields, `image` in place of `image_path` where the rows
were saved with their pictures, and rank 1 as the best. From the training code of ImageReward:
{"prompt", "generations", "ranking"}. The rank orders `overall`; the two ratings beside the overall
one, which is not used, have the names of EditReward-Data's dimensions, so that both can be mixed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.data.ingest.layout import Member, Problems, read_each
from jrm_jax.data.ingest.pictures import GroupPictures
from jrm_jax.data.ingest.rows import SUFFIXES
from jrm_jax.data.labels import check_type, field_error, finite, parse_labels, shown
from jrm_jax.data.schema import Candidate, Image, PreferenceExample, Text, validate

_PICTURES, _RANKS = ("image_path", "image", "generations"), ("rank", "ranking")
_RATINGS = {
    "instruction_following": "image_text_alignment_rating",
    "visual_quality": "fidelity_rating",
}


class Ranked(NamedTuple):
    """Layout. folder: where pictures' names lead."""

    folder: Path
    suffixes: tuple[str, ...] = SUFFIXES
    gathers: bool = True

    def columns(self, names: list[str]) -> list[str]:
        """What `key` and `dimensions` need."""
        return [n for n in names if n in ("prompt_id", "prompt", *_RANKS, *_RATINGS.values())]

    def key(self, row: dict[str, Any], where: str) -> str:
        check_type(row.get("prompt"), str, where, "prompt", "a string")
        if not row["prompt"].strip():
            raise field_error(where, "prompt", "is empty")
        return f"{row.get('prompt_id')}\0{row['prompt']}"

    def label(self, row: dict[str, Any]) -> str:
        return ""

    def dimensions(self, row: dict[str, Any]) -> tuple[str, ...]:
        return ("overall", *(d for d, name in _RATINGS.items() if row.get(name) is not None))

    def make(self, members: list[Member], problems: Problems) -> list[PreferenceExample]:
        pictures = GroupPictures(self.folder)

        def read(row: dict[str, Any], where: str) -> list[tuple[bytes, dict[str, float | None]]]:
            return _read(row, where, pictures)

        found: dict[bytes, dict[str, float | None]] = {}
        used = []
        for where, items in read_each(members, problems, read):
            used.append(where)
            for picture, values in items:
                if found.setdefault(picture, values) != values:
                    problems.note("picture that is listed again with other ranks or ratings"
                                  " (the first counts)", where)  # fmt: skip
        if not used:
            return []
        names = tuple(dict.fromkeys(name for values in found.values() for name in values))
        scores = {name: [values.get(name) for values in found.values()] for name in names}
        preference, weight = parse_labels({"scores": scores}, len(found), names, used[0])
        prompt = members[0][1]["prompt"]
        example = PreferenceExample(
            id=f"{members[0][1].get('prompt_id') or Path(used[0]).name}:{prompt}"[:120],
            prompt=(Text(prompt),),
            candidates=tuple(Candidate((Image(picture),)) for picture in found),
            preference=preference, weight=weight, dimensions=names,
        )  # fmt: skip
        validate(example, used[0])
        if not weight.any():
            raise field_error(used[0], _RANKS[0], "no two pictures of its prompt have a rank or a"
                              " rating", "group without a judgement")  # fmt: skip
        return [example]


def _read(
    row: dict[str, Any], where: str, read: GroupPictures
) -> list[tuple[bytes, dict[str, float | None]]]:
    """(picture, score by dimension) of every picture of a row; a smaller rank is a larger score."""
    field = next((name for name in _PICTURES if row.get(name)), _PICTURES[0])
    rank = next((name for name in _RANKS if name in row), _RANKS[0])
    named = row.get(field)
    named = named if isinstance(named, list | tuple) else [named]
    ranks = _numbers(row, rank, len(named), where)
    scores = {"overall": [None if n is None else -n for n in ranks]}
    for dimension, name in _RATINGS.items():
        if row.get(name) is not None:
            scores[dimension] = _numbers(row, name, len(named), where)
    return [
        (read(picture, where, field), {name: values[k] for name, values in scores.items()})
        for k, picture in enumerate(named)
    ]


def _numbers(row: dict[str, Any], name: str, count: int, where: str) -> list[float | None]:
    value = row.get(name)
    if value is None:
        return [None] * count
    values = list(value) if isinstance(value, list | tuple) else [value]
    if len(values) != count:
        raise field_error(where, name, f"has {len(values)} entries for {count} pictures")
    for value in values:
        if value is not None and finite(value) is None:
            raise field_error(where, name, f"is {shown(value)}, must be a number")
    return values
