"""The service's own format, v1: JSON, or a form with the pictures as files.

    {"groups": [{"instruction": "Make it red.", "sources": [PICTURE], "candidates": [PICTURE]}]}

A PICTURE is base64 of a file or a data: URI. In a form (`multipart/form-data`) the field `request`
holds the same JSON and a PICTURE is the name of a part that holds the file; one group can also be
given as fields `instruction`, `source` (none or several) and `candidate`.

The answer has one object for each candidate, in the order of the request: `reward`, `normalised`
(null where the model does not know its training rewards), of a model whose rewards are Gaussians
also `deviation`, and these for every dimension by its name; or `error` with `code` and `message`.
It never holds a number for what was not scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import pydantic

from jrm_jax.data.labels import BROKEN_TEXT, is_text
from jrm_jax.service.limits import MOST, Limits
from jrm_jax.service.pictures import Fault, from_text
from jrm_jax.service.refusals import Refused


class Ask(NamedTuple):
    """One group of a request. A picture that cannot be had stands as its fault."""

    instruction: str
    sources: tuple[bytes | Fault, ...]
    candidates: tuple[bytes | Fault, ...]


class Scored(NamedTuple):
    """One candidate. Columns stand in the order of the dimensions; normalised may be NaN;
    deviation_R is None where rewards are plain numbers."""

    reward_R: np.ndarray
    normalised_R: np.ndarray
    deviation_R: np.ndarray | None = None


def _check_text(text: str) -> str:
    if not is_text(text):
        raise ValueError(f"the text {BROKEN_TEXT[0]}")
    return text


# What an object, an entry or a fault takes is many times its bytes: a body may have so many of
# these characters, and of a list nothing is looked at behind its first fault. `limits.py` has the
# limits that are meant.
MARKS, MOST_MARKS = '{[,"', 1_000_000
Bounded = pydantic.Field(max_length=MOST, fail_fast=True)
TOLD, TOLD_OF = 3, 100  # faults that are told, and at most so many are looked at for them
Words = Annotated[str, pydantic.Field(min_length=1), pydantic.AfterValidator(_check_text)]


class Strict(pydantic.BaseModel):
    """A field that is not known is refused: a mistyped one would be left out in silence."""

    model_config = pydantic.ConfigDict(extra="forbid")


class GroupIn(Strict):
    """One edit and its candidates."""

    instruction: Words
    sources: Annotated[list[str], Bounded] = []
    candidates: Annotated[list[str], pydantic.Field(min_length=1), Bounded]


class ScoreIn(Strict):
    """Body of POST /v1/score."""

    groups: Annotated[list[GroupIn], pydantic.Field(min_length=1), Bounded]


class CritiqueIn(ScoreIn):
    """Body of POST /v1/critique: one group. `temperature` 0 takes the likeliest words; `max_tokens`
    null: as many as the service gives."""

    groups: Annotated[list[GroupIn], pydantic.Field(min_length=1, max_length=1)]
    max_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
    temperature: Annotated[float, pydantic.Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0


Model = TypeVar("Model", bound=pydantic.BaseModel)


def parse(kind: type[Model], body: bytes | str) -> Model:
    """JSON -> a model.

    Raises:
        Refused: not that JSON; says where and what, never what the value was.
    """
    marks = MARKS if isinstance(body, str) else map(str.encode, MARKS)
    if sum(map(body.count, marks)) > MOST_MARKS:
        raise Refused("invalid", "the JSON has more objects, entries and texts than are ever read")
    return _checked(kind.model_validate_json, body)


def parse_fields(kind: type[Model], fields: dict[str, Any]) -> Model:
    """The same from fields, whose numbers may be texts."""
    return _checked(kind.model_validate, fields)


def _checked(validate: Callable[[Any], Model], given: Any) -> Model:
    try:
        return validate(given)
    except pydantic.ValidationError as error:
        count = error.error_count()
        if count > TOLD_OF:  # unknown fields, likely
            words = f"{count:,} fields are not as /docs says"
            raise Refused("invalid", words) from None
        told = error.errors(include_url=False, include_context=False, include_input=False)
        lines = [f"{_place(one['loc'])}{one['msg']}" for one in told[:TOLD]]
        more = f" (and {count - TOLD} more)" if count > TOLD else ""
        raise Refused("invalid", "; ".join(lines) + more) from None


def _place(where: Sequence[str | int]) -> str:
    """('groups', 0, 'sources') -> 'groups[0].sources: '."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in where)
    return f"{text.lstrip('.')}: " if text else ""


def from_json(groups: Sequence[GroupIn], limits: Limits) -> list[Ask]:
    """
    Raises:
        Refused: more than the limits allow.
    """
    return _asks(groups, limits, from_text)


def from_form(groups: Sequence[GroupIn], files: Mapping[str, bytes], limits: Limits) -> list[Ask]:
    """The same, pictures being names of `files`.

    Raises:
        Refused: more than the limits allow, or a name that no part has.
    """

    def find(name: str) -> bytes:
        if name not in files:
            raise Refused("invalid", f"no part of the form has the name {name[:80]!a}")
        return files[name]

    return _asks(groups, limits, find)


def _asks(
    groups: Sequence[GroupIn], limits: Limits, read: Callable[[str], bytes | Fault]
) -> list[Ask]:
    check_counts([(g.instruction, len(g.sources), len(g.candidates)) for g in groups], limits)
    return [
        Ask(g.instruction, tuple(map(read, g.sources)), tuple(map(read, g.candidates)))
        for g in groups
    ]


def check_counts(groups: Sequence[tuple[str, int, int]], limits: Limits) -> None:
    """
    Args:
        groups: (instruction, sources, candidates) of each.

    Raises:
        Refused: more than the limits allow; names the group and the limit.
    """
    if len(groups) > limits.max_groups:
        words = f"{len(groups):,} groups; at most {limits.max_groups:,} in a request"
        raise Refused("too_many", words)
    for index, (instruction, sources, candidates) in enumerate(groups):
        for count, most, what in (
            (len(instruction), limits.max_instruction, "characters of instruction"),
            (sources, limits.max_sources, "sources"),
            (candidates, limits.max_candidates, "candidates"),
        ):
            if count > most:
                words = f"groups[{index}]: {count:,} {what}; at most {most:,}"
                raise Refused("too_many", words)


def fault_json(fault: Fault) -> dict[str, Any]:
    return {"error": {"code": fault.code, "message": fault.message}}


def scored_json(scored: Scored, dimensions: Sequence[str]) -> dict[str, Any]:
    """`reward`, `normalised` and `deviation` are those of the first dimension."""
    columns = [
        {"reward": float(reward), "normalised": float(n) if math.isfinite(n) else None}
        for reward, n in zip(scored.reward_R, scored.normalised_R, strict=True)
    ]
    if scored.deviation_R is not None:
        for column, deviation in zip(columns, scored.deviation_R.tolist(), strict=True):
            column["deviation"] = deviation
    return {**columns[0], "dimensions": dict(zip(dimensions, columns, strict=True))}


def reply(
    answers: Sequence[Sequence[Scored | Fault]], dimensions: Sequence[str], model: dict[str, Any]
) -> dict[str, Any]:
    """Body of the answer to POST /v1/score."""
    groups = [
        {
            "candidates": [
                fault_json(one) if isinstance(one, Fault) else scored_json(one, dimensions)
                for one in answer
            ]
        }
        for answer in answers
    ]
    return {"model": model, "dimensions": list(dimensions), "groups": groups}
