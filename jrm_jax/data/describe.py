"""The built-in world for pretraining: what pictures show, in words. Nothing is asked to be edited.

    make_description(index, seed, kind)      four pictures, and words for each; no preferences

Two kinds of words, told apart by the request:

    whole    "Describe the picture."                      all of the second picture, by place
    pair     "Describe the red circle and the top left."  objects and places, in both pictures

Pairs make a model look the same thing up in the prompt's picture and in the candidate's, which
single pictures never ask for. They are learnt only once single pictures are: mixed in from the
start, they hold the language loss on its first plateau (0.53 a token after 600 steps, where
single pictures alone have left theirs after 300).

In the third stage, `counts`, words are two numbers, how many of the things asked for differ and
how many other places do, and the names of all places that do. The numbers must be known before
a word is said; short texts leave them a large part of the loss.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jrm_jax.data.draw import PIXELS, draw, encode_png, encode_scene
from jrm_jax.data.schema import Candidate, Image, PreferenceExample, Text
from jrm_jax.data.world import PLACES, QUALITIES, Pool, Scene, pool_of, sample_scene, scene_split
from jrm_jax.data.world_edits import changes, collateral
from jrm_jax.data.world_text import NUMBERS, article, name, noun, place, refer, sentence

DIMENSIONS = ("overall", "following", "preservation")
COUNT = 4  # pictures per example
BACKGROUND = -1  # as a place
PAIR_SHARES = {"descriptions": 0.0, "pairs": 0.6, "counts": 1.0}  # of each kind of data
CHANGED_SHARE = 0.6  # of a pair's subjects: taken from what differs in one of the pictures
DEGRADED_SHARE = 0.2
WHOLE = ("Describe the picture.", "What is in the picture?", "Say what the picture shows.")
PAIR = ("Describe {s}.", "What do the pictures show of {s}?", "Say what the pictures show of {s}.")


class Subject(NamedTuple):
    """Something to describe. Places are cells; the background is one too, -1."""

    asked: str  # as the request has it
    named: str  # as the answer has it
    look: Callable[[Scene], str]
    places: Callable[[Scene], set[int]]


def describe(scene: Scene, quality: str | None = None) -> str:
    """What the picture shows, objects in reading order, each by its place.

    The place comes first: it tells where to look for what follows, which makes pretraining on two
    cores possible at all.
    """
    nouns = [f"{place(thing.cell)} {noun(thing)}" for thing in scene.things]
    text = sentence(", ".join([f"on {article(scene.background)} background", *nouns]))
    return text + _quality(quality)


def describe_pair(
    subjects: list[Subject], first: Scene, second: Scene, quality: str | None = None
) -> str:
    """What each picture shows of the subjects: 'at the top both a red star', 'first ..., second'.

    The word that tells whether the two agree comes before what they show.
    """
    clauses = []
    for subject in subjects:
        one, two = subject.look(first), subject.look(second)
        shown = f"both {one}" if one == two else f"first {one}, second {two}"
        clauses.append(f"{subject.named} {shown}")
    return sentence("; ".join(clauses)) + _quality(quality)


def describe_counts(subjects: list[Subject], first: Scene, second: Scene) -> str:
    """' one and two changed, at the top, in the middle, the background.'

    One of the subjects, and two places that no subject is about; then all places that differ. (It
    begins with a space: numbers are single tokens inside a line.)
    """
    differing = sum(subject.look(first) != subject.look(second) for subject in subjects)
    places = _differing_places(first, second)
    about = {cell for subject in subjects for scene in (first, second)
             for cell in subject.places(scene)}  # fmt: skip
    names = ["the background" if cell == BACKGROUND else place(cell) for cell in sorted(places)]
    counts = f" {NUMBERS[differing]} and {NUMBERS[len(places - about)]} changed"
    return ", ".join([counts, *names]) + "."


def _differing_places(first: Scene, second: Scene) -> set[int]:
    cells = {cell for cell in range(len(PLACES)) if _seen(first, cell) != _seen(second, cell)}
    return cells | ({BACKGROUND} if first.background != second.background else set())


def _seen(scene: Scene, cell: int) -> str:
    return next((noun(thing) for thing in scene.things if thing.cell == cell), "nothing")


def make_description(
    index: int,
    seed: int,
    kind: str = "descriptions",
    pixels: int = PIXELS,
    pair_share: float | None = None,
) -> PreferenceExample:
    """Four pictures and what each shows, for pretraining: no edits, preferences or critiques.

    The text of each sits in `critique`; all weights are 0. `kind`: see PAIR_SHARES, from which
    `pair_share` is taken if it is not given.
    """
    rng = random.Random(f"{seed}/{kind}/{index}")
    pool = pool_of("train")
    source = _train_scene(rng, pool)
    pair = rng.random() < (PAIR_SHARES[kind] if pair_share is None else pair_share)
    scenes = [] if pair else [_train_scene(rng, pool), _train_scene(rng, pool)]
    while len(scenes) < COUNT:
        variant = collateral(rng, source, source, source, pool, rng.choice((1, 1, 2, 2, 3)))
        if variant is not None:
            scenes.append(variant)
    rng.shuffle(scenes)
    if pair:
        subjects = _subjects(rng, source, scenes)
        asked = " and ".join(subject.asked for subject in subjects)
        request = rng.choice(PAIR).format(s=asked)
    else:
        request = rng.choice(WHOLE)
    candidates = []
    for scene in scenes:
        quality = rng.choice(QUALITIES) if rng.random() < DEGRADED_SHARE else None
        picture = encode_scene(scene, quality, rng, pixels)
        words = describe(scene, quality)
        if pair:
            words = describe_pair(subjects, source, scene, quality)
            if kind == "counts":
                words = describe_counts(subjects, source, scene)
        candidates.append(Candidate((Image(picture),), words, score_line=False))
    return PreferenceExample(
        id=f"{kind}-{index:06d}",
        prompt=(Text(request), Image(encode_png(draw(source, pixels)))),
        candidates=tuple(candidates),
        preference=np.full((COUNT, COUNT, 3), 0.5, np.float32),
        weight=np.zeros((COUNT, COUNT, 3), np.float32),
        dimensions=DIMENSIONS,
    )


def _subjects(rng: random.Random, source: Scene, scenes: list[Scene]) -> list[Subject]:
    """Two distinct things to describe: an object of the source, a place, or the background."""
    differing = [
        _subject_of(rng, source, scene, change)
        for scene in scenes
        for change in changes(source, scene)
    ]
    found: dict[str, Subject] = {}
    while len(found) < 2:
        if rng.random() < CHANGED_SHARE:
            subject = rng.choice(differing)
        else:
            options = [_named(rng, source, thing) for thing in source.things]
            subject = rng.choice([*options, _placed(rng.randrange(len(PLACES))), _GROUND])
        found.setdefault(subject.named, subject)
    return list(found.values())


def _subject_of(rng: random.Random, source: Scene, scene: Scene, change) -> Subject:
    key, field = change
    if field == "background":
        return _GROUND
    thing = source.get(key)
    if thing is None:  # new in the second picture
        return _placed(scene.get(key).cell)
    if field == "cell" and rng.random() < 0.5:
        return _placed(scene.get(key).cell)
    return _placed(thing.cell) if rng.random() < 0.4 else _named(rng, source, thing)


_GROUND = Subject(
    "the background", "the background", lambda scene: scene.background, lambda _: {BACKGROUND}
)


def _placed(cell: int) -> Subject:
    return Subject(f"the {PLACES[cell]}", place(cell), lambda s: _seen(s, cell), lambda _: {cell})


def _named(rng: random.Random, source: Scene, thing) -> Subject:
    """The object of this colour and shape, wherever it is: 'the red star both large at the top'."""

    def find(scene: Scene):
        return next((t for t in scene.things if t.pair == thing.pair), None)

    def look(scene: Scene) -> str:
        found = find(scene)
        return "nowhere" if found is None else f"{found.size} {place(found.cell)}"

    def places(scene: Scene) -> set[int]:
        found = find(scene)
        return set() if found is None else {found.cell}

    return Subject(refer(rng, source, thing, by_name=False), name(thing), look, places)


def _quality(quality: str | None) -> str:
    return f" The picture is {quality}." if quality else ""


def _train_scene(rng: random.Random, pool: Pool) -> Scene:
    while True:
        scene = sample_scene(rng, pool)
        if scene_split(scene) == "train":
            return scene
