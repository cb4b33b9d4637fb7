"""The built-in world for pretraining: what pictures show, in words. Nothing is asked to be edited.

    make_description(index, seed, kind)      four pictures, and words for each; no preferences

Each kind of data is a stage of its own, in this order:

    descriptions   "Describe the picture."    -> " white background, at the top left a red ..."
    lookups        "Describe the red circle." -> " top left large."
                   "Describe the top left."   -> " small blue star."
    comparisons    with a first picture in the prompt, by ASPECTS:
        first      "Describe the red circle in the first picture."  -> " top left large."
        second     "Describe the red circle in the second picture." -> " nothing."
        both       "Describe the red circle."              -> " both top left large.", " second ..."
        there      "Describe the place of the red circle." -> what the second picture shows there
        all        "Describe both pictures."               -> " two top, left.": where they differ
    changes        as comparisons, with more of what was hardest to learn, place by place:
        all        "Describe both pictures." -> " two kept changed ...": how many places differ;
                   then of the background and of each place, in reading order, whether it does

Every text starts with what only the pictures tell, because the reward token has to predict it:
where it was the same word in all texts, that token learnt not to look (between candidates of one
group its final state varied by 0.03, the other tokens' by 0.45). Lookups come before comparisons:
asked for one thing in one picture, the reward token learns to look it up within 300 steps; in
1,800 steps of comparisons alone it did not.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jrm_jax.data.schema import Candidate, Image, PreferenceExample, Text
from jrm_jax.data.world.draw import PIXELS, draw, encode_png, encode_scene
from jrm_jax.data.world.edits import changes, collateral
from jrm_jax.data.world.text import NUMBERS, name, noun, place, refer
from jrm_jax.data.world.vocabulary import (
    PLACES,
    QUALITIES,
    Pool,
    Scene,
    Thing,
    pool_of,
    sample_scene,
    scene_split,
)

DIMENSIONS = ("overall", "following", "preservation")
COUNT = 4  # pictures per example
BACKGROUND = -1  # as a place
KINDS = ("descriptions", "lookups", "comparisons", "changes")
CHANGED_SHARE = 0.6  # of what is compared: taken from what differs in one of the pictures
PLACE_SHARE = 0.3  # of what is looked up: a place, not an object
DEGRADED_SHARE = 0.2
WHOLE = ("Describe the picture.", "What is in the picture?", "Say what the picture shows.")
# what a request is about: the words for it, and its share of each kind of data
ASPECTS = {
    "first": "{s} in the first picture",
    "second": "{s} in the second picture",
    "both": "{s}",
    "there": "the place of {s}",
    "all": "both pictures",
}
SHARES = {"comparisons": (0.1, 0.1, 0.35, 0.25, 0.2), "changes": (0.05, 0.05, 0.25, 0.15, 0.5)}


class Subject(NamedTuple):
    """Something to look up in a picture."""

    asked: str  # as the request has it
    look: Callable[[Scene], str]
    cell: int  # where it is in the first picture


def describe(scene: Scene, quality: str | None = None) -> str:
    """What the picture shows, objects in reading order, each by its place.

    The place comes first: it tells where to look for what follows, which makes pretraining on two
    cores possible at all. (A space begins it: words are single tokens inside a line.)
    """
    things = [f"{place(thing.cell)} {noun(thing)}" for thing in scene.things]
    return _text(quality, ", ".join([f"{scene.background} background", *things]))


def compare(
    aspect: str,
    subject: Subject,
    first: Scene,
    second: Scene,
    quality: str | None = None,
    spelled: bool = False,
) -> str:
    """What one or both pictures show of the subject, or where they differ; see ASPECTS.

    `spelled`: of all places it is said whether they differ; otherwise those that do are named.
    """
    one, two = subject.look(first), subject.look(second)
    words = {
        "first": one,
        "second": two,
        "both": f"both {one}" if one == two else f"second {two}",
        "there": _seen(second, subject.cell),
    }
    if aspect == "all":
        places = sorted(_differing_places(first, second))
        names = ", ".join(map(_where, places))
        if spelled:
            every = range(BACKGROUND, len(PLACES))
            names = " ".join("changed" if place in places else "kept" for place in every)
        return _text(quality, f"{NUMBERS[len(places)]} {names}".strip())
    return _text(quality, words[aspect])


def _where(cell: int) -> str:
    return "background" if cell == BACKGROUND else PLACES[cell]


def _text(quality: str | None, words: str) -> str:
    return f" {quality + ' ' if quality else ''}{words}."


def _differing_places(first: Scene, second: Scene) -> set[int]:
    cells = {cell for cell in range(len(PLACES)) if _seen(first, cell) != _seen(second, cell)}
    return cells | ({BACKGROUND} if first.background != second.background else set())


def _seen(scene: Scene, cell: int) -> str:
    """'small red circle', 'nothing'; of the background its colour."""
    if cell == BACKGROUND:
        return scene.background
    found = next((thing for thing in scene.things if thing.cell == cell), None)
    return "nothing" if found is None else noun(found).partition(" ")[2]


def make_description(
    index: int, seed: int, kind: str = "descriptions", pixels: int = PIXELS
) -> PreferenceExample:
    """Four pictures and what each shows, for pretraining: no edits, preferences or critiques.

    The text of each sits in `critique`; all weights are 0.
    """
    rng = random.Random(f"{seed}/{kind}/{index}")
    pool = pool_of("train")
    first = _train_scene(rng, pool)
    # descriptions: some pictures of their own beside the variants of one
    scenes = [_train_scene(rng, pool), _train_scene(rng, pool)] if kind == "descriptions" else []
    while len(scenes) < COUNT:
        variant = collateral(rng, first, first, first, pool, rng.choice((0, 1, 1, 2, 2, 3)))
        if variant is not None:
            scenes.append(variant)
    rng.shuffle(scenes)
    if kind == "descriptions":
        aspect, request = kind, rng.choice(WHOLE)
    elif kind == "lookups":
        subject = _lookup(rng, [first, *scenes])
        aspect, request = "second", f"Describe {subject.asked}."
    else:
        aspect = rng.choices(tuple(ASPECTS), SHARES[kind])[0]
        subject = _compared(rng, first, scenes, 0.0 if aspect == "there" else PLACE_SHARE)
        request = f"Describe {ASPECTS[aspect].format(s=subject.asked)}."
    candidates = []
    for scene in scenes:
        quality = rng.choice(QUALITIES) if rng.random() < DEGRADED_SHARE else None
        picture = encode_scene(scene, quality, rng, pixels)
        if kind == "descriptions":
            words = describe(scene, quality)
        else:
            words = compare(aspect, subject, first, scene, quality, kind == "changes")
        candidates.append(Candidate((Image(picture),), words, score_line=False))
    # a lookup is about one picture: the prompt has none
    shown = () if kind == "lookups" else (Image(encode_png(draw(first, pixels))),)
    return PreferenceExample(
        id=f"{kind}-{index:06d}-{aspect}",
        prompt=(Text(request), *shown),
        candidates=tuple(candidates),
        preference=np.full((COUNT, COUNT, 3), 0.5, np.float32),
        weight=np.zeros((COUNT, COUNT, 3), np.float32),
        dimensions=DIMENSIONS,
    )


def _lookup(rng: random.Random, scenes: list[Scene]) -> Subject:
    """An object that one of the pictures has, or a place."""
    thing = rng.choice(rng.choice(scenes).things)
    return _some_place(rng, thing) if rng.random() < PLACE_SHARE else _named(thing, name(thing))


def _compared(rng: random.Random, first: Scene, scenes: list[Scene], place_share: float) -> Subject:
    """An object of the first picture, or a place; CHANGED_SHARE: one that differs somewhere."""
    differing = [
        (scene, key) for scene in scenes for key, _ in changes(first, scene) if key is not None
    ]
    thing = rng.choice(first.things)
    if differing and rng.random() < CHANGED_SHARE:
        scene, key = rng.choice(differing)
        thing = first.get(key) or thing
        if place_share and (first.get(key) is None or rng.random() < place_share):
            return _placed((scene.get(key) or thing).cell)
    elif rng.random() < place_share:
        return _some_place(rng, thing)
    return _named(thing, refer(rng, first, thing, by_name=False))


def _some_place(rng: random.Random, thing: Thing) -> Subject:
    """More often than not an occupied one."""
    return _placed(thing.cell if rng.random() < 0.6 else rng.randrange(BACKGROUND, len(PLACES)))


def _placed(cell: int) -> Subject:
    return Subject(f"the {_where(cell)}", lambda scene: _seen(scene, cell), cell)


def _named(thing: Thing, asked: str) -> Subject:
    """The object of this colour and shape: 'top left small', or 'nothing'."""

    def look(scene: Scene) -> str:
        found = next((t for t in scene.things if t.pair == thing.pair), None)
        return "nothing" if found is None else f"{PLACES[found.cell]} {found.size}"

    return Subject(asked, look, thing.cell)


def _train_scene(rng: random.Random, pool: Pool) -> Scene:
    while True:
        scene = sample_scene(rng, pool)
        if scene_split(scene) == "train":
            return scene
