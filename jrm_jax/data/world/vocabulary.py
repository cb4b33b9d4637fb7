"""The built-in world: its colours, shapes, sizes, places and scenes, and what is held out.

A scene is a background and two to four objects, each in its own cell of a 3 x 3 grid. No two
objects of a scene share both colour and shape, so colour and shape name an object.

Held out from training, validation, test and pretraining alike, and met only in `hard`: some
(colour, shape) pairs and some (instruction kind, colour) pairs. Every colour and every shape on
its own does occur in training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (50, 90, 230),
    "yellow": (245, 215, 50),
    "purple": (150, 60, 190),
    "orange": (245, 130, 30),
    "cyan": (70, 210, 220),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "black": (20, 20, 20),
    "tan": (205, 180, 140),
    "navy": (25, 35, 85),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = ("small", "medium", "large")  # ordered: a resize may stop half way
PLACES = (
    "top left", "top", "top right",
    "left", "middle", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
QUALITIES = ("noisy", "blurred", "blocky")
KINDS = ("recolour", "remove", "add", "replace", "move", "resize", "background", "swap")

SPLITS = ("train", "valid", "test", "hard")
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("green", "cross"),
        ("blue", "diamond"),
        ("yellow", "triangle"),
        ("purple", "square"),
    }
)
# (instruction kind, colour it names): asked for only in `hard`.
HELD_OUT_KINDS = frozenset({("recolour", "orange"), ("remove", "cyan"), ("add", "red")})
JITTER = 3  # largest offset of an object from the middle of its cell, in 1/32 of the cell


@dataclasses.dataclass(frozen=True)
class Thing:
    """One drawn object. `key` identifies it across the edits of one scene; it is never drawn."""

    key: int
    colour: str
    shape: str
    size: str
    cell: int  # index into PLACES, row by row
    dx: int  # offset from the middle of the cell, in 1/32 of the cell
    dy: int

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclasses.dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]  # in reading order of their cells

    def get(self, key: int) -> Thing | None:
        return next((thing for thing in self.things if thing.key == key), None)

    def visible(self) -> object:
        """Equal for two scenes that draw the same picture."""
        return self.background, tuple(dataclasses.replace(thing, key=0) for thing in self.things)

    def free_cells(self) -> list[int]:
        taken = {thing.cell for thing in self.things}
        return [cell for cell in range(len(PLACES)) if cell not in taken]


def make_scene(background: str, things) -> Scene | None:
    """The scene with its objects in reading order, or None where two share a cell or a name."""
    things = tuple(sorted(things, key=lambda thing: thing.cell))
    if len({thing.cell for thing in things}) < len(things):
        return None
    if len({thing.pair for thing in things}) < len(things):
        return None
    return Scene(background, things)


@dataclasses.dataclass(frozen=True)
class Pool:
    """The (colour, shape) pairs a split may show, and the instructions it may give."""

    pairs: tuple[tuple[str, str], ...]
    closed: bool  # True: held-out combinations may not occur

    def allows(self, scene: Scene | None) -> bool:
        if scene is None or not scene.things:
            return False
        return not self.closed or not any(t.pair in HELD_OUT_PAIRS for t in scene.things)


def pool_of(split: str) -> Pool:
    every = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    if split == "hard":
        return Pool(tuple(every), closed=False)
    return Pool(tuple(pair for pair in every if pair not in HELD_OUT_PAIRS), closed=True)


def sample_thing(rng: random.Random, key: int, pair: tuple[str, str], cell: int) -> Thing:
    return Thing(
        key=key,
        colour=pair[0],
        shape=pair[1],
        size=rng.choice(SIZES),
        cell=cell,
        dx=rng.randint(-JITTER, JITTER),
        dy=rng.randint(-JITTER, JITTER),
    )


def sample_scene(rng: random.Random, pool: Pool, include: tuple[str, str] | None = None) -> Scene:
    """Two to four objects with distinct pairs and cells; `include` forces one pair in."""
    count = rng.choice((2, 3, 3, 4))
    pairs = rng.sample(pool.pairs, count)
    if include is not None and include not in pairs:
        pairs[rng.randrange(count)] = include
    cells = rng.sample(range(len(PLACES)), count)
    things = [sample_thing(rng, key, pairs[key], cells[key]) for key in range(count)]
    return make_scene(rng.choice(tuple(BACKGROUNDS)), things)


def scene_split(scene: Scene) -> str:
    """The split whose source pictures may show this scene, whatever the small offsets.

    A hash decides, so that no source scene of one split is ever the source of another:
    one scene in sixteen belongs to `valid`, one to `test`, the others to `train`. `hard` needs no
    share of its own, since its instructions are about objects no other split has.
    """
    things = (f"/{t.colour} {t.shape} {t.size} {t.cell}" for t in scene.things)
    text = scene.background + "".join(things)
    bucket = hashlib.sha256(text.encode()).digest()[0] % 16
    return {0: "valid", 1: "test"}.get(bucket, "train")
