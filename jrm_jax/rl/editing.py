"""Edit programs: what a policy is told and what it chooses, as arrays, and their scenes.

A program says of every object of the source whether it is still there, its colour, shape, size and
place; of up to two new objects the same; and the background. So it keeps, removes, recolours,
replaces, resizes or moves, in any combination. Beside these choices it has knobs, real numbers that
stand for what editors do to pictures without being asked.

Letters: N programs or problems, O slots for objects, F fields of an object, V knobs of an object,
W knobs of the picture, X and Y features of a slot and of a problem.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jrm_jax.data.world import scenes
from jrm_jax.data.world.edits import Edit
from jrm_jax.data.world.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PLACES,
    QUALITIES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
)

OLD, NEW = 4, 2  # slots: objects of the source in reading order, then new ones
SLOTS = OLD + NEW
NEW_KEYS = (1001, 1002)  # of objects that nobody asked for; the first slot may hold the asked one
FIELDS: dict[str, tuple] = {
    "colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES, "cell": tuple(range(len(PLACES))),
}  # fmt: skip
GROUNDS = tuple(BACKGROUNDS)
EDITED = {"recolour": "colour", "replace": "shape", "move": "cell", "resize": "size"}

# Knobs, each with its range at values -1 and 1; values beyond are cut where they are drawn.
# Of an object: off its colour (of 255), larger (logarithm of the factor), off its place (cells).
OBJECT_KNOBS = {"red": 60.0, "green": 60.0, "blue": 60.0, "larger": 0.4, "right": 0.3, "down": 0.3}
# Of the picture: the background off its colour (of 255); how noisy, blurred and blocky it is, where
# 1 is as the built-in world's degraded candidates are, and 0 and less is not at all; logarithms of
# contrast and saturation.
SHIFTS = {"back_red": 60.0, "back_green": 60.0, "back_blue": 60.0}
TONES = {"contrast": 0.7, "saturation": 1.0}
PICTURE_KNOBS = {**SHIFTS, **dict.fromkeys(QUALITIES, 1.0), **TONES}
KNOBS, WHOLE = len(OBJECT_KNOBS), len(PICTURE_KNOBS)


class Problem(NamedTuple):
    """An instruction about a scene, and what it asks for."""

    source: Scene
    target: Scene
    edits: tuple[Edit, ...]
    instruction: str
    kind: str


class Features(NamedTuple):
    """What the network is given of problems."""

    slots_NOX: Any  # float32: the object, and what is asked of it
    scene_NY: Any  # float32: the background, and what is asked of it
    possible_NO: Any  # bool: there is such an object in the source, or it is a slot for a new one


class Program(NamedTuple):
    """Edits, one a row. Choices are indices; what an absent object holds has no meaning."""

    present_NO: Any  # int32, 0 or 1
    fields_NOF: Any  # int32, into the values of FIELDS
    ground_N: Any  # int32, into GROUNDS
    knobs_NOV: Any  # float32, in the order of OBJECT_KNOBS
    picture_NW: Any  # float32, in the order of PICTURE_KNOBS


def make_problem(split: str, index: int, seed: int | str) -> Problem:
    """The instruction of an example of the built-in world."""
    group = scenes.make_group(split, index, seed)
    return Problem(group.source, group.target, group.edits, group.instruction, group.kind)


# What the network is told


def features(problems: Sequence[Problem]) -> Features:
    """NumPy arrays; see `Features`."""
    rows = [_features(problem) for problem in problems]
    return Features(*(np.stack(column) for column in zip(*rows, strict=True)))


def _features(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    things = [*problem.source.things, *[None] * (OLD - len(problem.source.things)), None, None]
    asked = _asked(problem)
    rows = []
    for slot, thing in enumerate(things):
        kinds, wanted = asked.get(slot, (set(), {}))
        now = {} if thing is None else {name: getattr(thing, name) for name in FIELDS}
        jitter = (0, 0) if thing is None else (thing.dx / 3, thing.dy / 3)
        row = [np.float32([thing is not None, slot == OLD, slot == OLD + 1, *jitter])]
        row += [_one_hot(FIELDS[name], {now.get(name)}) for name in FIELDS]
        row += [_one_hot(KINDS, kinds)]
        row += [_one_hot(FIELDS[name], {wanted.get(name)}) for name in FIELDS]
        rows.append(np.concatenate(row))
    ground = next((e.value for e in problem.edits if e.kind == "background"), None)
    free = set(problem.source.free_cells())
    kinds = {edit.kind for edit in problem.edits}
    scene = [_one_hot(GROUNDS, {problem.source.background}), _one_hot(GROUNDS, {ground})]
    scene += [_one_hot(KINDS, kinds), _one_hot(FIELDS["cell"], free)]
    possible = np.array([t is not None for t in things[:OLD]] + [True] * NEW)
    return np.stack(rows), np.concatenate(scene), possible


def _one_hot(values: Sequence[Any], chosen: set) -> np.ndarray:
    return np.float32([value in chosen for value in values])


def _asked(problem: Problem) -> dict[int, tuple[set[str], dict[str, Any]]]:
    """Slot -> the kinds of edits that are asked of it, and the values that it is to have."""
    slots = {thing.key: slot for slot, thing in enumerate(problem.source.things)}
    asked: dict[int, tuple[set[str], dict[str, Any]]] = {}
    for edit in problem.edits:
        if edit.kind == "background":
            continue
        keys = [edit.key, edit.other] if edit.kind == "swap" else [edit.key]
        for key in keys:
            kinds, wanted = asked.setdefault(slots.get(key, OLD), (set(), {}))
            kinds.add(edit.kind)
            goal = problem.target.get(key)
            names = {"add": tuple(FIELDS), "swap": ("cell",), "remove": ()}
            for name in names.get(edit.kind) or (EDITED.get(edit.kind),):
                if name and goal is not None:
                    wanted[name] = getattr(goal, name)
    return asked


# Programs and scenes


def new_key(problem: Problem) -> int:
    """Of the first slot for new objects: the object that the instruction asks to add, if any."""
    return next((e.key for e in problem.edits if e.kind == "add"), NEW_KEYS[0])


def to_scene(problem: Problem, program: Program, row: int) -> Scene:
    """What a program makes of the source, without its knobs. Objects stand in the order of slots,
    and two may share a cell or a name."""
    old = problem.source.things
    keys = [*(thing.key for thing in old), *[None] * (OLD - len(old))]
    keys += [new_key(problem), NEW_KEYS[1]]
    things = []
    for slot, key in enumerate(keys):
        if key is None or not program.present_NO[row, slot]:
            continue
        picks = program.fields_NOF[row, slot]
        values = {name: FIELDS[name][pick] for name, pick in zip(FIELDS, picks, strict=True)}
        before = old[slot] if slot < OLD else Thing(key, **values, dx=0, dy=0)
        things.append(dataclasses.replace(before, **values))
    return Scene(GROUNDS[program.ground_N[row]], tuple(things))


def slots_of(problem: Problem, scene: Scene) -> list[int]:
    """The slot of each object of a scene that `to_scene` made."""
    keys = [thing.key for thing in problem.source.things]
    new = {new_key(problem): OLD, NEW_KEYS[1]: OLD + 1}
    return [keys.index(t.key) if t.key in keys else new[t.key] for t in scene.things]


def from_scene(problem: Problem, scene: Scene) -> Program | None:
    """The program, one row without knobs, that makes this scene of the source; None where it has
    more new objects than slots."""
    program = empty(1)
    slots = {thing.key: slot for slot, thing in enumerate(problem.source.things)}
    new = [thing for thing in scene.things if thing.key not in slots]
    asked = new_key(problem)
    free = [slot for slot in (OLD, OLD + 1) if slot != OLD or asked == NEW_KEYS[0]]
    for thing in new:
        slots[thing.key] = OLD if thing.key == asked else free.pop(0) if free else -1
    for thing in scene.things:
        slot = slots[thing.key]
        if slot < 0:
            return None
        program.present_NO[0, slot] = 1
        program.fields_NOF[0, slot] = [FIELDS[n].index(getattr(thing, n)) for n in FIELDS]
    program.ground_N[0] = GROUNDS.index(scene.background)
    return program


def empty(count: int) -> Program:
    """Programs without objects, all knobs at 0."""
    return Program(
        np.zeros((count, SLOTS), np.int32),
        np.zeros((count, SLOTS, len(FIELDS)), np.int32),
        np.zeros(count, np.int32),
        np.zeros((count, SLOTS, KNOBS), np.float32),
        np.zeros((count, WHOLE), np.float32),
    )


def take(program: Program, rows: Any) -> Program:
    return Program(*(array[rows] for array in program))


def joined(programs: Sequence[Program]) -> Program:
    return Program(*(np.concatenate(column) for column in zip(*programs, strict=True)))


# Knobs as they are drawn and judged


def object_knobs(program: Program, row: int) -> np.ndarray:
    """float [O, V]: cut to their ranges, in the units of OBJECT_KNOBS."""
    limits = np.array([*OBJECT_KNOBS.values()])
    return np.clip(program.knobs_NOV[row].astype(float), -1, 1) * limits


def picture_knobs(program: Program, row: int) -> dict[str, float]:
    """In the units of PICTURE_KNOBS; noise, blur and blocks are never below 0."""
    found = {}
    for (name, limit), value in zip(PICTURE_KNOBS.items(), program.picture_NW[row], strict=True):
        low, high = (0.0, 1.25) if name in QUALITIES else (-1.0, 1.0)
        found[name] = float(np.clip(float(value), low, high)) * limit
    return found
