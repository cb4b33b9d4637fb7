"""What an edit is worth: the built-in world's gold score, graded.

`edits.compare` knows whole changes only. Here everything between them counts as well: a colour off
the palette, a size or a place a bit off, an object half hidden, a picture a bit noisy. Where
nothing lies between, and following is not rounded, the two are equal.

Grades are linear, so that the score is continuous in all knobs: a value counts fully where it is
met, and not at all at the distance of the nearest two values of its kind. Objects are told apart by
what the picture shows, not by the slots of the program: an object that looks like one that is asked
for, or like one of the source, is that one.

Letters: O slots.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from jrm_jax.data.world.draw import PIXELS, radius_of
from jrm_jax.data.world.edits import BACKGROUND_COST, DEGRADED_COST, THING_COST, changes, credit
from jrm_jax.data.world.vocabulary import BACKGROUNDS, COLOURS, QUALITIES, SIZES, Thing
from jrm_jax.rl.editing import (
    FIELDS,
    SHIFTS,
    TONES,
    Problem,
    Program,
    object_knobs,
    picture_knobs,
    slots_of,
    to_scene,
)

STRANGER = 2000  # keys from here on: objects that are none of the source's and not asked for
_LOG_RADII = {size: np.log(radius_of(size, PIXELS // 3)) for size in SIZES}


def _least(points: Any) -> float:
    """The distance of the nearest two."""
    pairs = itertools.combinations(np.array([*points], float), 2)
    return float(min(np.linalg.norm(a - b) for a, b in pairs))


REACH = {
    "colour": _least(COLOURS.values()), "size": _least(_LOG_RADII.values()), "cell": 1.0,
    "background": _least(BACKGROUNDS.values()),
}  # fmt: skip


class Gold(NamedTuple):
    """following, preservation: 0..10, as of `edits.Gold`. lost: points of 100, by what they were
    lost for; together they are what is missing from 100."""

    following: float
    preservation: float
    lost: dict[str, float]

    @property
    def overall(self) -> float:
        """0..1; the same weights as in the built-in world."""
        return (6 * self.following + 4 * self.preservation) / 100


@dataclasses.dataclass
class _Shown:
    """An object as it is drawn. knobs: in the order of OBJECT_KNOBS."""

    thing: Thing
    visible: float
    knobs: np.ndarray

    def gap(self, field: str, value: Any) -> float:
        """How far it is from `value`: 0 where it has it, 1 from the reach of the field on."""
        if field == "shape":
            return float(self.thing.shape != value)
        red, green, blue, larger, right, down = self.knobs
        if field == "colour":
            own = np.clip(np.array(COLOURS[self.thing.colour]) + (red, green, blue), 0, 255)
            distance = np.linalg.norm(own - COLOURS[value])
        elif field == "size":
            distance = abs(_LOG_RADII[self.thing.size] + larger - _LOG_RADII[value])
        else:
            (row, column), (goal_row, goal_column) = divmod(self.thing.cell, 3), divmod(value, 3)
            distance = np.hypot(row + down - goal_row, column + right - goal_column)
        return min(1.0, float(distance) / REACH[field])


def judge(problem: Problem, program: Program, row: int, visible_O: np.ndarray) -> Gold:
    """The gold score of one program.

    Args:
        visible_O: from `drawing.draw`.
    """
    shown, whole = _read(problem, program, row, visible_O), picture_knobs(program, row)
    wanted = _wanted(problem)
    ground = (to_scene(problem, program, row).background, [whole[name] for name in SHIFTS])
    lost: dict[str, float] = {}

    def lose(name: str, points: float) -> None:
        if points > 0:
            lost[name] = lost.get(name, 0.0) + points

    credits = [
        _credit(problem, change, pair, shown.get(change[0]), ground)
        for change, pair in wanted.items()
    ]
    for (_, field), got in zip(wanted, credits, strict=True):
        lose(f"asked {_word(field)}", 6 * (10 - got) / len(credits))
    costs = dict(_unasked(problem, wanted, shown, ground))
    costs |= _damage(whole)
    scale = min(1.0, 10 / max(1e-9, sum(costs.values())))  # not below zero altogether
    for (_, name), points in costs.items():
        lose(name, 4 * scale * points)
    return Gold(sum(credits) / len(credits), 10 - scale * sum(costs.values()), lost)


@functools.lru_cache(maxsize=8192)
def _wanted(problem: Problem) -> dict:
    return changes(problem.source, problem.target)


def _word(field: str) -> str:
    return {"cell": "place"}.get(field, field)


def _read(problem: Problem, program: Program, row: int, visible_O: np.ndarray) -> dict[int, _Shown]:
    """Objects by key. Whoever looks exactly like an object of the target, then of the source, takes
    its key; others keep their own while it is free."""
    scene = to_scene(problem, program, row)
    knobs_OV, slots = object_knobs(program, row), slots_of(problem, scene)
    left = {
        slot: _Shown(thing, float(visible_O[slot]), knobs_OV[slot])
        for thing, slot in zip(scene.things, slots, strict=True)
    }
    found: dict[int, _Shown] = {}
    for goal in (*problem.target.things, *problem.source.things):
        if goal.key in found:
            continue
        alike = [slot for slot, own in left.items() if _looks(own.thing) == _looks(goal)]
        if alike:
            own = [slot for slot in alike if left[slot].thing.key == goal.key]
            found[goal.key] = left.pop((own or alike)[0])
    for slot, own in left.items():
        key = own.thing.key
        found[STRANGER + slot if key in found else key] = own
    return found


def _looks(thing: Thing) -> tuple:
    return tuple(getattr(thing, field) for field in FIELDS)


def _ground_gap(ground: tuple[str, list[float]], value: str) -> float:
    name, shift = ground
    own = np.clip(np.array(BACKGROUNDS[name]) + shift, 0, 255)
    return min(1.0, float(np.linalg.norm(own - BACKGROUNDS[value])) / REACH["background"])


def _credit(problem: Problem, change: tuple, pair: tuple, own: _Shown | None, ground) -> float:
    """0..10 for one requested change: the best of what its values are worth, each as far as the
    picture has it."""
    (_, field), (old, goal) = change, pair
    if field == "background":
        return max(
            (1 - _ground_gap(ground, value)) * credit(change, pair, (old, value))
            for value in BACKGROUNDS
            if value != old
        )
    if field == "removed":
        return 10.0 * (1 - (own.visible if own else 0.0))
    if own is None:
        return 0.0
    if field == "added":
        equal = sum(1 - own.gap(name, getattr(goal, name)) for name in ("colour", "shape", "cell"))
        points = float(np.interp(equal, (0, 1, 2, 3), (1, 3, 6, 10)))
        points -= 2 * own.gap("size", goal.size) * max(0.0, equal - 2)
        return own.visible * points
    return own.visible * max(
        (1 - own.gap(field, value)) * credit(change, pair, (old, value))
        for value in FIELDS[field]
        if value != old
    )


def _unasked(problem: Problem, wanted: dict, shown: dict[int, _Shown], ground):
    """((object, name), points of ten) of everything that changed and was not to."""
    if (None, "background") not in wanted:
        gap = _ground_gap(ground, problem.source.background)
        yield (None, "unasked background"), BACKGROUND_COST * gap
    for key, own in shown.items():
        before = problem.source.get(key)
        if before is None:
            if (key, "added") not in wanted:
                yield (key, "unasked object"), THING_COST * own.visible
            continue
        if (key, "removed") in wanted:
            hidden = 0.0
        else:
            hidden = 1 - own.visible
        gaps = {
            f"unasked {_word(field)}": own.gap(field, getattr(before, field)) * own.visible
            for field in FIELDS
            if (key, field) not in wanted
        }
        gaps["hidden object"] = hidden
        name = max(gaps, key=gaps.__getitem__)
        yield (key, name), THING_COST * gaps[name]
    for thing in problem.source.things:
        if thing.key not in shown and (thing.key, "removed") not in wanted:
            yield (thing.key, "removed object"), float(THING_COST)


def _damage(whole: dict[str, float]) -> dict[tuple, float]:
    """Points of ten that the picture's quality costs, by knob: the length of their vector counts,
    where 1 is a degraded picture of the built-in world, or the end of a tone's range."""
    parts = {name: whole[name] for name in QUALITIES}
    parts |= {name: abs(whole[name]) / limit for name, limit in TONES.items()}
    squares = {name: value**2 for name, value in parts.items()}
    total = sum(squares.values())
    if not total:
        return {}
    cost = DEGRADED_COST * min(1.0, np.sqrt(total))
    return {(None, name): float(cost * square / total) for name, square in squares.items()}
