"""What every benchmark becomes: cases with candidates, comparisons and people's verdicts.

A case is one prompt with its candidates. What a model says of it is an `Answer`; a `Judged` is a
case with one answer. `Issues` collects what is odd in the files: counted and listed, never dropped
in silence.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.data.images import open_image
from jrm_jax.data.schema import Text
from jrm_jax.errors import UserError
from jrm_jax.evaluation.held import Held

SHOWN = 10  # examples of one kind of issue in a report; the JSON file lists all


class Picture(NamedTuple):
    """A picture as the benchmark's files name it: a path, or bytes that stand in the file itself,
    which are held elsewhere or at hand.

    like: resize to this picture's size before it is judged (a rule of EditScore's benchmark).
    """

    name: str
    data: Held | bytes | None = None
    like: Picture | None = None

    def read(self) -> bytes:
        """Encoded bytes.

        Raises:
            UserError: missing, unreadable, or no picture.
        """
        return _read(self)

    def digest(self) -> str:
        """Of the encoded bytes, wherever they lie; of the name where they cannot be read."""
        if self.data is not None:
            return self._own()
        try:
            data = Path(self.name).read_bytes()
        except OSError:
            data = self.name.encode()
        return hashlib.sha256(data).hexdigest()

    def _own(self) -> str:
        held = isinstance(self.data, Held)
        return self.data.digest if held else hashlib.sha256(self.data).hexdigest()

    @property
    def key(self) -> tuple:
        """Equal for equal pictures."""
        own = self.name if self.data is None else self._own()
        return own, self.like.key if self.like else None


@functools.lru_cache(maxsize=256)
def _read(picture: Picture) -> bytes:
    data = picture.data.read() if isinstance(picture.data, Held) else picture.data
    if data is None:
        try:
            data = Path(picture.name).read_bytes()
        except OSError as error:
            raise UserError(f"{picture.name}: {error.strerror or error}") from error
    try:
        opened = open_image(data)
    except ValueError as error:
        raise UserError(f"{picture.name}: {error}") from error
    if picture.like is None:
        return data
    size = open_image(picture.like.read()).size
    if opened.size == size:
        return data
    file = io.BytesIO()
    opened.resize(size).save(file, "PNG", compress_level=1)
    return file.getvalue()


Part = Text | Picture


class Comparison(NamedTuple):
    """label: 1 = people prefer candidate `first`, -1 = `second`, 0 = a tie."""

    id: str
    first: int
    second: int
    label: int


class Case(NamedTuple):
    """One prompt and its candidates.

    group: what is drawn together in the bootstrap (same prompt, same source picture).
    section: the benchmark's own split or task; subtask: its finer division ('' = none).
    dimension: the reward asked for. targets: people's scores per candidate, where there are any.
    fields: of the row in the benchmark's file, for files that repeat them. given: the id in the
    benchmark's file, where that stands for several cases with other content ('' = `id` does).
    headline: whether its dimension is the one, or one of those, that headline numbers are of.
    """

    id: str
    group: str
    section: str
    subtask: str
    prompt: tuple[Part, ...]
    candidates: tuple[tuple[Part, ...], ...]
    comparisons: tuple[Comparison, ...] = ()
    dimension: str = "overall"
    names: tuple[str, ...] = ()
    targets: tuple[float, ...] | None = None
    fields: dict[str, Any] = {}  # noqa: RUF012
    given: str = ""
    headline: bool = True

    @property
    def pictures(self) -> list[Picture]:
        parts = [*self.prompt, *(part for parts in self.candidates for part in parts)]
        return [part for part in parts if isinstance(part, Picture)]


class Answer(NamedTuple):
    """scores: one per candidate, larger is better. votes: {comparison id: verdicts 1, 0, -1}.

    A benchmark uses one of them. A verdict that is none of the allowed answers is 0. deviations: of
    scores that are means of Gaussians.
    """

    scores: tuple[float, ...] | None = None
    votes: dict[str, list[int]] | None = None
    deviations: tuple[float, ...] | None = None


class Judged(NamedTuple):
    case: Case
    answer: Answer


def in_order(cases: Sequence[Case], judged: Sequence[Judged]) -> list[Judged]:
    """Answers in the benchmark's own order, whatever the order of the predictions.

    Published thresholds are tuned in that order, and intervals are drawn by it.
    """
    places = {id(case): place for place, case in enumerate(cases)}
    return sorted(judged, key=lambda one: places.get(id(one.case), len(places)))


class Issues:
    """Oddities of the files, by kind."""

    def __init__(self):
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, what: Any) -> None:
        self.found.setdefault(kind, []).append(str(what))

    def report(self) -> dict[str, dict[str, Any]]:
        kinds = sorted(self.found.items())
        return {kind: {"count": len(items), "items": items} for kind, items in kinds}


class Benchmark(NamedTuple):
    """protocol: how the numbers are computed, in a sentence or two. cut: cases that are left out on
    request; what is predicted of them is passed over."""

    name: str
    cases: list[Case]
    issues: Issues
    protocol: str
    cut: Sequence[Case] = ()


def note_duplicates(issues: Issues, ids_and_labels: list[tuple[str, Any]]) -> None:
    """Ids that occur more than once, and those whose labels contradict each other."""
    labels: dict[str, set] = {}
    for name, label in ids_and_labels:
        labels.setdefault(name, set()).add(label)
    for name, count in Counter(name for name, _ in ids_and_labels).items():
        if count > 1:
            issues.add("id that occurs more than once", f"{name} ({count} times)")
            if len(labels[name]) > 1:
                said = ", ".join(sorted(map(str, labels[name])))
                issues.add("id with contradicting labels", f"{name}: {said}")


def tell_apart(cases: Sequence[Case]) -> list[Case]:
    """The same with ids that stand for one prompt and its candidates each: predictions go by id.

    Where an id has several contents they become 'ID (1 of 2)', 'ID (2 of 2)'; rows of one content
    share their id, and so their answer.
    """
    groups: dict[str, set[int]] = {}  # a group's cases, of several dimensions, share one prompt
    for case in cases:
        groups.setdefault(case.id, set()).add(id(case.prompt))
    keys = [content_key(case) if len(groups[case.id]) > 1 else None for case in cases]
    places: dict[str, dict[Any, int]] = {}
    for case, key in zip(cases, keys, strict=True):
        known = places.setdefault(case.id, {})
        known.setdefault(key, len(known) + 1)
    found = []
    for case, key in zip(cases, keys, strict=True):
        known = places[case.id]
        name = f"{case.id} ({known[key]} of {len(known)})"
        found.append(case._replace(id=name, given=case.id) if len(known) > 1 else case)
    return found


def content_key(case: Case) -> Any:
    """Equal for equal prompts with equal candidates."""

    def one(parts: Sequence[Part]) -> tuple:
        return tuple(part.key if isinstance(part, Picture) else part.text for part in parts)

    return one(case.prompt), tuple(map(one, case.candidates))


def content_id(prompt: Sequence[Part], candidates: Sequence[Sequence[Part]]) -> str:
    """A name for a case that has none: the same for the same texts and pictures anywhere."""

    def one(parts: Sequence[Part]) -> list:
        return [p.digest() if isinstance(p, Picture) else ["text", p.text] for p in parts]

    return f"content-{digest(one(prompt), list(map(one, candidates)))}"


def missing_pictures(case: Case) -> list[str]:
    """Why pictures of a case cannot be read; empty where all can."""
    problems = []
    for picture in dict.fromkeys(case.pictures):
        try:
            picture.read()
        except UserError as error:
            problems.append(str(error))
    return problems


def digest(*parts: Any) -> str:
    """A short name for whatever is equal."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
