"""Wire formats of other projects: UniRL's `POST /score` and Flow-Factory's `POST /compute`.

Both send one edit at a time, with its source again and again. Edits of one source and instruction
are put into one group, so that instruction and source are encoded once for all of them; a score
does not depend on the other candidates.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic

from jrm_jax.service.limits import Limits
from jrm_jax.service.pictures import Fault, from_text
from jrm_jax.service.refusals import Refused
from jrm_jax.service.wire import Ask, Bounded, Scored, Words, check_counts

REWARD = "jrm"  # the reward's name
MAIN = "reward"  # its first sub-metric; the others are the dimensions


class Edit(NamedTuple):
    """One candidate as these formats send it: texts that hold pictures."""

    instruction: str
    sources: tuple[str, ...]
    candidate: str


def regroup(edits: Sequence[Edit], limits: Limits) -> tuple[list[Ask], list[tuple[int, int]]]:
    """Groups of at most `limits.max_candidates`, and where each edit went: (group, candidate).

    Raises:
        Refused: more than the limits allow.
    """
    most = limits.max_candidates
    open_groups: dict[Hashable, int] = {}
    members: list[list[Edit]] = []
    places = []
    for edit in edits:
        key = (edit.instruction, edit.sources)
        index = open_groups.get(key)
        if index is None or len(members[index]) >= most:
            index = open_groups[key] = len(members)
            members.append([])
        places.append((index, len(members[index])))
        members[index].append(edit)
    check_counts([(m[0].instruction, len(m[0].sources), len(m)) for m in members], limits)
    asks = [
        Ask(
            group[0].instruction,
            tuple(map(from_text, group[0].sources)),
            tuple(from_text(edit.candidate) for edit in group),
        )
        for group in members
    ]
    return asks, places


class Turn(pydantic.BaseModel):
    """Of a history: a text and a picture; without a picture it is refused."""

    text: Words
    image_b64: str


class UniRLItem(pydantic.BaseModel):
    """A history of one turn is text to image; of two turns an edit: the source, then the result."""

    history: Annotated[list[Turn], pydantic.Field(min_length=1, max_length=2)]
    required_rewards: Annotated[list[str], Bounded]
    metadata: dict[str, Any] | None = None


class UniRLIn(pydantic.BaseModel):
    """Body of POST /score."""

    requests: Annotated[list[UniRLItem], Bounded]


def unirl_edits(body: UniRLIn) -> list[Edit]:
    """
    Raises:
        Refused: a reward that this service does not have.
    """
    for item in body.requests:
        for name in item.required_rewards:
            if name != REWARD:
                raise Refused("unknown_reward", f"no reward {name[:80]!a} here; it is {REWARD!r}")
    return [
        Edit(
            item.history[-1].text,
            tuple(turn.image_b64 for turn in item.history[:-1]),
            item.history[-1].image_b64,
        )
        for item in body.requests
        if item.required_rewards
    ]


def sub_metrics(dimensions: Sequence[str]) -> list[str]:
    """Names, as in GET /health."""
    return list(dict.fromkeys((MAIN, *dimensions)))


def unirl_reply(
    body: UniRLIn, answers: Sequence[Scored | Fault], dimensions: Sequence[str]
) -> dict[str, Any]:
    """`answers`: of those requests that asked for the reward, in their order."""
    results, errors, waiting = [], [], iter(answers)
    for item in body.requests:
        answer = next(waiting) if item.required_rewards else None
        fault = isinstance(answer, Fault)
        errors.append({REWARD: answer.message} if fault else {})
        results.append({REWARD: _metrics(answer, dimensions)} if answer and not fault else {})
    return {"results": results, "errors": errors}


def _metrics(scored: Scored, dimensions: Sequence[str]) -> dict[str, float]:
    reward_R = np.asarray(scored.reward_R).tolist()
    # a dimension that is itself called `reward` and is not the first does not hide the first
    return {**dict(zip(dimensions, reward_R, strict=True)), MAIN: reward_R[0]}


Pictures = Annotated[list[str], Bounded]


class FlowFactoryIn(pydantic.BaseModel):
    """Body of POST /compute. Videos are not scored."""

    prompt: Annotated[list[Words], Bounded]
    image: Annotated[list[str], Bounded] | None = None
    video: Annotated[list[Any], Bounded] | None = None
    condition_images: Annotated[list[Pictures], Bounded] | None = None
    condition_videos: Annotated[list[Any], Bounded] | None = None


def flow_factory_edits(body: FlowFactoryIn) -> list[Edit]:
    """
    Raises:
        Refused: videos, no pictures, or lists of different lengths.
    """
    if body.video or body.condition_videos:
        raise Refused("invalid", "this reward scores pictures, not videos")
    if not body.image and body.prompt:
        raise Refused("invalid", "image: give one edited picture for each prompt")
    images = body.image or []
    sources = body.condition_images or [[] for _ in body.prompt]
    if not len(body.prompt) == len(images) == len(sources):
        raise Refused(
            "invalid",
            f"{len(body.prompt)} prompts, {len(images)} images, {len(sources)} condition_images:"
            " give equally many",
        )
    return [
        Edit(text, tuple(pictures), image)
        for text, pictures, image in zip(body.prompt, sources, images, strict=True)
    ]


def flow_factory_reply(answers: Sequence[Scored | Fault]) -> dict[str, Any]:
    """
    Raises:
        Refused: an edit that cannot be scored: the format has no place for one error, and zeros
            would be taken for rewards.
    """
    for index, answer in enumerate(answers):
        if isinstance(answer, Fault):
            raise Refused("unscorable", f"image[{index}]: {answer.message}")
    return {"rewards": [float(answer.reward_R[0]) for answer in answers]}
