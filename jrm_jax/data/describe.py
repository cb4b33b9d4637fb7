"""The built-in world for pretraining: what pictures show, in words. Nothing is asked to be edited.

    make_description(index, seed, kind)      four pictures, and words for each; no preferences

A first stage describes single pictures: "Describe the picture." -> all of it, by place. A second
one, `pairs`, describes a picture together with the prompt's, by ASPECTS, and a third one,
`differences`, does so without counting:

    second   "Describe the red circle in the second picture."   -> " large at the top left."
    both     "Describe the red circle."                         -> " first ..., second ..."
    rest     "Describe all but the red circle."                 -> " two at the top, ..."
    all      "Describe both pictures."                          -> " three at the left, ..."

Numbers count the places where the pictures differ. Every text starts with what only the
pictures tell, because the reward token has to predict it: where it was the same word in all texts,
that token learnt not to look (between candidates of one group its final state varied by 0.03, the
other tokens' by 0.45), and a joint run of 850 steps did not teach it to. Pairs come second: mixed
in from the start, they hold the language loss on its first plateau.
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
from jrm_jax.data.world_text import NUMBERS, noun, place, refer

DIMENSIONS = ("overall", "following", "preservation")
COUNT = 4  # pictures per example
BACKGROUND = -1  # as a place
PAIR_SHARES = {"descriptions": 0.0, "pairs": 0.95, "differences": 1.0}  # of each kind of data
CHANGED_SHARE = 0.6  # of a pair's subjects: taken from what differs in one of the pictures
DEGRADED_SHARE = 0.2
WHOLE = ("Describe the picture.", "What is in the picture?", "Say what the picture shows.")
PAIR = ("Describe {s}.", "What do the pictures show of {s}?", "Say what the pictures show of {s}.")
# what a pair's request is about: (its share, the words for it)
ASPECTS = {
    "second": (0.25, "{s} in the second picture"),
    "both": (0.3, "{s}"),
    "rest": (0.25, "all but {s}"),
    "all": (0.2, "both pictures"),
}


class Subject(NamedTuple):
    """Something to describe. Places are cells; the background is one too, -1."""

    asked: str  # as the request has it
    look: Callable[[Scene], str]
    places: Callable[[Scene], set[int]]


def describe(scene: Scene, quality: str | None = None) -> str:
    """What the picture shows, objects in reading order, each by its place.

    The place comes first: it tells where to look for what follows, which makes pretraining on two
    cores possible at all. (A space begins it: words are single tokens inside a line.)
    """
    things = [f"{place(thing.cell)} {noun(thing)}" for thing in scene.things]
    return _text(quality, ", ".join([f"{scene.background} background", *things]))


def describe_pair(
    aspect: str,
    subject: Subject,
    first: Scene,
    second: Scene,
    quality: str | None = None,
    counted: bool = True,
) -> str:
    """What the second picture or both show of the subject, or where they differ; see ASPECTS."""
    one, two = subject.look(first), subject.look(second)
    if aspect == "second":
        return _text(quality, two)
    if aspect == "both":
        return _text(quality, f"both {one}" if one == two else f"first {one}, second {two}")
    places = _differing_places(first, second)
    if aspect == "rest":
        places -= subject.places(first) | subject.places(second)
    if not counted:
        return _text(quality, ", ".join(_plain(cell) for cell in sorted(places)) or "nothing")
    names = ["the background" if cell == BACKGROUND else place(cell) for cell in sorted(places)]
    return _text(quality, f"{NUMBERS[len(places)]} {', '.join(names)}".strip())


def _plain(cell: int) -> str:
    return "background" if cell == BACKGROUND else PLACES[cell]


def _text(quality: str | None, words: str) -> str:
    return f" {quality + ' ' if quality else ''}{words}."


def _differing_places(first: Scene, second: Scene) -> set[int]:
    cells = {cell for cell in range(len(PLACES)) if _seen(first, cell) != _seen(second, cell)}
    return cells | ({BACKGROUND} if first.background != second.background else set())


def _seen(scene: Scene, cell: int) -> str:
    """'small red circle', 'nothing'."""
    found = next((thing for thing in scene.things if thing.cell == cell), None)
    return "nothing" if found is None else noun(found).partition(" ")[2]


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
        variant = collateral(rng, source, source, source, pool, rng.choice((0, 1, 1, 2, 2, 3)))
        if variant is not None:
            scenes.append(variant)
    rng.shuffle(scenes)
    request = rng.choice(WHOLE)
    if pair:
        aspect = rng.choices(tuple(ASPECTS), [share for share, _ in ASPECTS.values()])[0]
        subject = _subject(rng, source, scenes)
        request = rng.choice(PAIR).format(s=ASPECTS[aspect][1].format(s=subject.asked))
    candidates = []
    for scene in scenes:
        quality = rng.choice(QUALITIES) if rng.random() < DEGRADED_SHARE else None
        picture = encode_scene(scene, quality, rng, pixels)
        words = describe(scene, quality)
        if pair:
            counted = kind != "differences"
            words = describe_pair(aspect, subject, source, scene, quality, counted)
        candidates.append(Candidate((Image(picture),), words, score_line=False))
    return PreferenceExample(
        id=f"{kind}-{index:06d}" + (f"-{aspect}" if pair else ""),
        prompt=(Text(request), Image(encode_png(draw(source, pixels)))),
        candidates=tuple(candidates),
        preference=np.full((COUNT, COUNT, 3), 0.5, np.float32),
        weight=np.zeros((COUNT, COUNT, 3), np.float32),
        dimensions=DIMENSIONS,
    )


def _subject(rng: random.Random, source: Scene, scenes: list[Scene]) -> Subject:
    """An object of the source, a place, or the background."""
    differing = [
        _subject_of(rng, source, scene, change)
        for scene in scenes
        for change in changes(source, scene)
    ]
    if differing and rng.random() < CHANGED_SHARE:
        return rng.choice(differing)
    options = [_named(rng, source, thing) for thing in source.things]
    return rng.choice([*options, _placed(rng.randrange(len(PLACES))), _GROUND])


def _subject_of(rng: random.Random, source: Scene, scene: Scene, change) -> Subject:
    key, field = change
    if field == "background":
        return _GROUND
    thing = source.get(key)
    if thing is None:  # new in the second picture
        return _placed(scene.get(key).cell)
    if field == "cell" and rng.random() < 0.5:
        return _placed(scene.get(key).cell)
    return _placed(thing.cell) if rng.random() < 0.3 else _named(rng, source, thing)


_GROUND = Subject("the background", lambda scene: scene.background, lambda _: {BACKGROUND})


def _placed(cell: int) -> Subject:
    return Subject(f"the {PLACES[cell]}", lambda scene: _seen(scene, cell), lambda _: {cell})


def _named(rng: random.Random, source: Scene, thing) -> Subject:
    """The object of this colour and shape: 'small at the top', or what stands there instead."""

    def find(scene: Scene):
        return next((t for t in scene.things if t.pair == thing.pair), None)

    def look(scene: Scene) -> str:
        found = find(scene)
        if found is None:
            return f"{_seen(scene, thing.cell)} there"
        return f"{found.size} {place(found.cell)}"

    def places(scene: Scene) -> set[int]:
        found = find(scene)
        return set() if found is None else {found.cell}

    return Subject(refer(rng, source, thing, by_name=False), look, places)


def _train_scene(rng: random.Random, pool: Pool) -> Scene:
    while True:
        scene = sample_scene(rng, pool)
        if scene_split(scene) == "train":
            return scene
