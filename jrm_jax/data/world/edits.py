"""Edits of a scene, and the gold scores of a candidate, computed by comparing scenes.

An edit is one instruction's worth of change; a compound instruction is two of them. `compare`
never looks at how a candidate was made: it reads the source scene, the target scene and the
candidate's scene (and whether its picture was degraded), and nothing else.
"""

from __future__ import annotations

import dataclasses
import random

from jrm_jax.data.world.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_KINDS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    Pool,
    Scene,
    make_scene,
    sample_thing,
)

# What a degraded picture and an unwanted change cost, out of ten points of preservation.
DEGRADED_COST = 8
THING_COST = 3
BACKGROUND_COST = 4


@dataclasses.dataclass(frozen=True)
class Edit:
    kind: str  # one of world.KINDS
    key: int | None  # the object edited or added; None for the background
    value: object = None  # the new colour, shape, size, cell, background or Thing
    other: int | None = None  # swap: the second object


def apply(scene: Scene, edit: Edit) -> Scene | None:
    """The edited scene, or None where the edit changes nothing or leaves no legal scene."""
    things = {thing.key: thing for thing in scene.things}
    if edit.kind == "background":
        changed = make_scene(edit.value, scene.things)
    elif edit.kind == "add":
        if edit.key in things:
            return None
        changed = make_scene(scene.background, [*scene.things, edit.value])
    elif edit.key not in things:
        return None
    else:
        thing = things[edit.key]
        if edit.kind == "remove":
            del things[edit.key]
        elif edit.kind == "swap":
            if edit.other not in things:
                return None
            other = things[edit.other]
            things[edit.key] = dataclasses.replace(thing, cell=other.cell)
            things[edit.other] = dataclasses.replace(other, cell=thing.cell)
        else:
            field = {"recolour": "colour", "replace": "shape", "move": "cell", "resize": "size"}
            things[edit.key] = dataclasses.replace(thing, **{field[edit.kind]: edit.value})
        changed = make_scene(scene.background, things.values())
    return None if changed == scene else changed


def apply_all(scene: Scene | None, edits) -> Scene | None:
    for edit in edits:
        if scene is None:
            return None
        scene = apply(scene, edit)
    return scene


def keeps_names(source: Scene, scene: Scene) -> bool:
    """False where an object has taken a colour and shape that were another's in the source.

    The picture alone would then not tell which object is which.
    """
    owner = {thing.pair: thing.key for thing in source.things}
    return all(owner.get(thing.pair, thing.key) == thing.key for thing in scene.things)


def propose(
    rng: random.Random, scene: Scene, kind: str, pool: Pool, key: int | None = None
) -> Edit:
    """One edit of this kind, of object `key` or a random one; it may turn out illegal."""
    if kind == "background":
        return Edit(kind, None, _other(rng, BACKGROUNDS, scene.background))
    if kind == "add":
        new = max([thing.key for thing in scene.things], default=0) + 1
        cell = rng.choice(scene.free_cells())
        return Edit(kind, new, sample_thing(rng, new, rng.choice(pool.pairs), cell))
    thing = rng.choice(scene.things) if key is None else scene.get(key)
    if kind == "recolour":
        return Edit(kind, thing.key, _other(rng, COLOURS, thing.colour))
    if kind == "replace":
        return Edit(kind, thing.key, _other(rng, SHAPES, thing.shape))
    if kind == "resize":
        return Edit(kind, thing.key, _other(rng, SIZES, thing.size))
    if kind == "move":
        return Edit(kind, thing.key, rng.choice(scene.free_cells()))
    if kind == "swap":
        others = [t.key for t in scene.things if t.key != thing.key]
        return Edit(kind, thing.key, other=rng.choice(others)) if others else Edit(kind, -1)
    return Edit(kind, thing.key)  # remove


def _other(rng: random.Random, values, current):
    return rng.choice([value for value in values if value != current])


def held_out(edit: Edit, source: Scene, target: Scene) -> bool:
    """True where the edit's object, before or after it, is a held-out pair."""
    keys = {edit.key, edit.other} - {None}
    seen = [t for scene in (source, target) for t in scene.things if t.key in keys]
    return any(thing.pair in HELD_OUT_PAIRS for thing in seen)


def held_out_kind(edit: Edit, source: Scene) -> bool:
    """True where this kind of edit with this colour is asked for in `hard` only."""
    if edit.kind == "recolour":
        return (edit.kind, edit.value) in HELD_OUT_KINDS
    thing = edit.value if edit.kind == "add" else source.get(edit.key)
    return thing is not None and (edit.kind, thing.colour) in HELD_OUT_KINDS


Change = tuple[int | None, str]  # (object or None for the background, what changed)


def changes(before: Scene, after: Scene) -> dict[Change, tuple[object, object]]:
    """Every difference as {(key, field): (old, new)}; fields as in Thing, plus 'added', 'removed'.

    The small offset inside a cell is not a field: no edit changes it.
    """
    found: dict[Change, tuple[object, object]] = {}
    if before.background != after.background:
        found[None, "background"] = (before.background, after.background)
    for thing in before.things:
        now = after.get(thing.key)
        if now is None:
            found[thing.key, "removed"] = (thing, None)
            continue
        for field in ("colour", "shape", "size", "cell"):
            old, new = getattr(thing, field), getattr(now, field)
            if old != new:
                found[thing.key, field] = (old, new)
    for thing in after.things:
        if before.get(thing.key) is None:
            found[thing.key, "added"] = (None, thing)
    return found


@dataclasses.dataclass(frozen=True)
class Gold:
    following: int  # 0..10: how much of what was asked is there
    preservation: int  # 0..10: how much of the rest is as it was, picture quality included
    credits: dict[Change, int]  # 0..10 for each requested change
    extras: dict[Change, tuple[object, object]]  # changes nobody asked for

    @property
    def overall(self) -> int:
        """0..100: 6 x following + 4 x preservation. Following counts more, as to a user it does."""
        return 6 * self.following + 4 * self.preservation


def compare(source: Scene, target: Scene, candidate: Scene, quality: str | None) -> Gold:
    """Gold scores of a candidate scene, whose picture has lost `quality` (None: it has not).

    Following is the mean credit of the requested changes, rounded half up. Preservation is ten,
    less THING_COST for each object changed in a way nobody asked for, BACKGROUND_COST for the
    background, DEGRADED_COST for a degraded picture, and not below zero.
    """
    wanted, done = changes(source, target), changes(source, candidate)
    credits = {change: credit(change, wanted[change], done.get(change)) for change in wanted}
    extras = {change: pair for change, pair in done.items() if change not in wanted}
    spoiled = {key for key, _ in extras}
    cost = THING_COST * len(spoiled - {None}) + BACKGROUND_COST * (None in spoiled)
    cost += DEGRADED_COST * (quality is not None)
    total, count = sum(credits.values()), len(credits)
    return Gold((2 * total + count) // (2 * count), max(0, 10 - cost), credits, extras)


def credit(change: Change, wanted, done) -> int:
    """0..10 for one requested change, given the (old, new) found in the candidate, if any."""
    if done is None:
        return 0
    (old, goal), (_, new) = wanted, done
    field = change[1]
    if field == "removed":
        return 10
    if field == "added":
        fields = ("colour", "shape", "cell")
        equal = sum(getattr(goal, name) == getattr(new, name) for name in fields)
        return (1, 3, 6, 10)[equal] - 2 * (goal.size != new.size and equal == 3)
    if new == goal:
        return 10
    if field == "size":
        start, middle, end = SIZES.index(old), SIZES.index(new), SIZES.index(goal)
        return 6 if min(start, end) < middle < max(start, end) else 2
    if field == "cell":
        return 5 if _steps(new, goal) < _steps(old, goal) else 3
    return 4  # changed, but into another colour, shape or background


def _steps(a: int, b: int) -> int:
    """Rows plus columns between two cells."""
    (row_a, column_a), (row_b, column_b) = divmod(a, 3), divmod(b, 3)
    return abs(row_a - row_b) + abs(column_a - column_b)


def collateral(
    rng: random.Random, scene: Scene, source: Scene, target: Scene, pool: Pool, count: int
) -> Scene | None:
    """`scene` with `count` more changes that nobody asked for, each of another object."""
    spared = {key for key, _ in changes(source, target)}
    for _ in range(count):
        done = {key for key, _ in changes(source, scene)} | spared
        choices = [t.key for t in scene.things if t.key not in done]
        kinds = ["recolour", "resize", "replace", "move", "remove"] if choices else []
        if None not in done:
            kinds.append("background")
        kinds.append("add")
        kind = rng.choice(kinds)
        edit = propose(rng, scene, kind, pool, rng.choice(choices) if choices else None)
        if kind == "add":
            # A key of its own, never that of an object the instruction asks to add.
            key = 100 + len(scene.things)
            edit = Edit("add", key, dataclasses.replace(edit.value, key=key))
        scene = apply(scene, edit)
        if not pool.allows(scene):
            return None
    return scene
