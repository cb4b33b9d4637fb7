"""Scores of cases: from a trained model, and from rules that any model must beat."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import PIL.Image

from jrm_jax.data.images import open_image
from jrm_jax.data.schema import Candidate, Image, Text
from jrm_jax.errors import UserError
from jrm_jax.evaluation.cases import (
    Answer,
    Case,
    Issues,
    Judged,
    Part,
    Picture,
    content_key,
    missing_pictures,
)
from jrm_jax.evaluation.metrics import Metric, point_value
from jrm_jax.serving.planned import ahead
from jrm_jax.shell.terminal import Bar

CHUNK = 128  # cases encoded at a time
SIDE = 64  # pixel distance: pictures are compared at this size
RANDOM_DRAWS = 20
UNSCORED = "case with a picture that cannot be read (not scored)"
# the model's own names for what a benchmark asks; without any of them its first dimension answers
ALIASES = {
    "prompt_following": ("prompt_following", "instruction_following", "following"),
    "consistency": ("consistency", "preservation"),
}

Change = Callable[[PIL.Image.Image], PIL.Image.Image]


def column(dimensions: Sequence[str], wanted: str) -> int:
    """Which of the model's reward dimensions answers for `wanted`."""
    for name in ALIASES.get(wanted, (wanted,)):
        if name in dimensions:
            return list(dimensions).index(name)
    return 0


def encode_case(model: Any, case: Case, change: Change | None = None):
    """The case, each picture changed by `change`, as the model's encoder makes it."""
    return model.encoder.encode_group(*_parts(case, change))


def _parts(case: Case, change: Change | None = None) -> tuple[list, list[Candidate]]:
    """(prompt, candidates) as encoders take them."""

    def part(item: Part) -> Text | Image:
        if isinstance(item, Text):
            return item
        data = item.read()
        if change is not None:
            file = io.BytesIO()
            change(open_image(data)).save(file, "PNG", compress_level=1)
            data = file.getvalue()
        return Image(data)

    empty = (Text(" "),)  # an answer without content is judged as such
    prompt = [part(item) for item in case.prompt] or list(empty)
    candidates = [
        Candidate(tuple(part(item) for item in parts) or empty) for parts in case.candidates
    ]
    return prompt, candidates


def score_cases(
    model: Any, cases: Sequence[Case], issues: Issues, download: str = ""
) -> list[Judged]:
    """Cases whose pictures can be read, in order; equal cases are scored once.

    Args:
        download: how complete files of the benchmark are made, for a message.

    Raises:
        UserError: the files hold no prompts, or no answers (labels only).
    """
    bare = [case for case in cases if not case.prompt or not any(case.candidates)]
    if bare:
        first = bare[0]
        raise UserError(
            f"{len(bare):,} of {len(cases):,} cases have no prompts or no answers in these files"
            f" (first: {first.section} {first.id}), and a model cannot judge without them; complete"
            f" files: {download or 'see docs/evaluation.md'}. Or give --predictions"
        )
    first = list({content_key(case): case for case in reversed(cases)}.values())[::-1]

    def look(case: Case) -> tuple[list[str], Any]:
        problems = missing_pictures(case)
        return problems, None if problems else model.measure(*_parts(case))

    readable: list[Case] = []
    needs = []
    with Bar("reading", len(first)) as bar:
        for case, (problems, need) in zip(first, ahead(look, first, CHUNK), strict=True):
            bar.advance()
            for problem in problems:
                issues.add(UNSCORED, f"{case.id}: {problem}")
            if not problems:
                readable.append(case)
                needs.append(need)
    with Bar("scoring", len(readable)) as bar:
        found = model.score_lazily(
            needs, lambda index: encode_case(model, readable[index]), bar.advance
        )
    known = dict(zip(map(content_key, readable), found, strict=True))
    judged = []
    for case in cases:
        if content_key(case) in known:
            scores, place = known[content_key(case)], column(model.dimensions, case.dimension)
            own_K, deviation_KR = scores.reward_KR[:, place], scores.deviation_KR
            unsure = None if deviation_KR is None else tuple(deviation_KR[:, place].tolist())
            judged.append(Judged(case, Answer(tuple(own_K.tolist()), deviations=unsure)))
    return judged


# Rules that any model must beat


def pixel_distance(case: Case) -> tuple[float, ...]:
    """Mean absolute difference (0 to 1) of each candidate's first picture from the prompt's first.

    0 where there is none to compare.
    """

    def first(parts: Iterable[Part]) -> Picture | None:
        return next((part for part in parts if isinstance(part, Picture)), None)

    source, edits = first(case.prompt), [first(parts) for parts in case.candidates]
    if source is None:
        return (0.0,) * len(edits)
    before = _small(source)
    return tuple(
        0.0 if edit is None else float(np.abs(_small(edit) - before).mean()) for edit in edits
    )


def _small(picture: Picture) -> np.ndarray:
    opened = open_image(picture.read()).resize((SIDE, SIDE), PIL.Image.Resampling.BOX)
    return np.asarray(opened, np.float32) / 255


def _distances(cases: Sequence[Case]) -> dict[Any, tuple[float, ...]]:
    """{content: distances} where all pictures can be read."""

    def look(item: tuple[Any, Case]) -> tuple[Any, tuple[float, ...] | None]:
        key, case = item
        return key, None if missing_pictures(case) else pixel_distance(case)

    first = {content_key(case): case for case in cases}
    found = {}
    with Bar("comparing pixels", len(first)) as bar:
        for key, distances in ahead(look, first.items(), CHUNK):
            bar.advance()
            if distances is not None:
                found[key] = distances
    return found


def baselines(cases: Sequence[Case], measure: Callable[[list[Judged]], list[Metric]]) -> dict:
    """{rule: {(section, metric): value}}; pixel distance only where pictures can be read."""

    def values(score: Callable[[Case], tuple[float, ...]]) -> dict:
        found = measure([Judged(case, Answer(score(case))) for case in cases])
        return {(metric.section, metric.name): point_value(metric) for metric in found}

    def first(case: Case) -> tuple[float, ...]:
        return tuple(-float(i) for i in range(len(case.candidates)))

    rng = np.random.default_rng(0)
    draws = [
        values(lambda case: tuple(rng.random(len(case.candidates)).tolist()))
        for _ in range(RANDOM_DRAWS)
    ]
    rules = {
        "random": {key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]},
        "always the first": values(first),
    }
    distances = _distances([case for case in cases if case.pictures])
    if distances:
        keys = map(content_key, cases)
        found = measure([
            Judged(case, Answer(tuple(-distance for distance in distances[key])))
            for case, key in zip(cases, keys, strict=True)
            if key in distances
        ])  # fmt: skip
        rules["fewest changed pixels"] = {(m.section, m.name): point_value(m) for m in found}
    return rules
