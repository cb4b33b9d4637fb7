"""What a critique of the built-in world says, as yes-or-no facts instead of words.

Two critiques are equal exactly where their facts are. The facts are computed from what
`text.critique` is computed from, never from its words.

Letters: F facts.
"""

from __future__ import annotations

from jrm_jax.data.world.edits import Edit, Gold
from jrm_jax.data.world.text import verdict
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

VERDICTS = (
    "Correct", "Too much", "Nothing changed", "Wrong object", "Not done", "Half done",
    "Wrong colour", "Wrong shape", "Wrong size", "Wrong place", "Wrong background",
    *(quality.capitalize() for quality in QUALITIES),
)  # fmt: skip
_FIELDS = {
    "colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES, "cell": tuple(range(len(PLACES))),
    "background": tuple(BACKGROUNDS),
}  # fmt: skip
_CHANGES = (*_FIELDS, "added", "removed")
_LEVELS = tuple(range(11))
_EDITED = {"recolour": "colour", "replace": "shape", "move": "cell", "resize": "size"}

# Slot -> the values of which at most one is stated.
SLOTS: dict[str, tuple] = {
    "verdict": VERDICTS,
    "quality": QUALITIES,
    "more": (True,),
    "nothing else": (True,),
    "following": _LEVELS,
    "preservation": _LEVELS,
    "extra/change": _CHANGES,
}
# Who or what a clause is about, and what of it can be stated.
_ROLES = {"subject": ("colour", "shape"), "other": ("colour", "shape")}
_ROLES |= {"goal": tuple(_FIELDS), "now": tuple(_FIELDS)}
for _clause in ("first", "second"):
    SLOTS[f"{_clause}/kind"] = KINDS
    SLOTS[f"{_clause}/state"] = ("done", "still", "now", "gone", "absent", "new")
for _clause, _roles in (
    ("first", tuple(_ROLES)), ("second", tuple(_ROLES)), ("extra", ("subject", "now"))
):  # fmt: skip
    SLOTS |= {f"{_clause}/{r}/{field}": _FIELDS[field] for r in _roles for field in _ROLES[r]}

FACTS = tuple(f"{slot}={value}" for slot, values in SLOTS.items() for value in values)  # [F]
COUNT = len(FACTS)
_INDEX = {
    (slot, value): index
    for index, (slot, value) in enumerate((s, v) for s, values in SLOTS.items() for v in values)
}


def facts_of(
    source: Scene, candidate: Scene, edits: tuple[Edit, ...], gold: Gold, quality: str | None
) -> tuple[int, ...]:
    """Indices into FACTS of what `text.critique` states, ascending; arguments as there."""
    said: dict[str, object] = {
        "verdict": verdict(source, candidate, gold, quality),
        "quality": quality,
        "following": gold.following,
        "preservation": gold.preservation,
    }
    alone = len(edits) == 1
    for clause, edit in zip(("first", "second"), edits, strict=False):
        stated = _outcome(source, candidate, edit, gold, alone)
        said |= {f"{clause}/{slot}": value for slot, value in stated.items()}
    if gold.extras and alone:
        change, pair = next(iter(gold.extras.items()))
        stated = _extra(source, change, pair)
        said |= {f"extra/{slot}": value for slot, value in stated.items()}
        said["more"] = len(gold.extras) > 1 or None
    elif gold.extras and said["verdict"] != "Too much":
        said["more"] = True
    if alone and not gold.extras and not quality and any(gold.credits.values()):
        said["nothing else"] = True
    return tuple(sorted(_INDEX[slot, v] for slot, v in said.items() if v is not None))


def _named(role: str, thing: Thing) -> dict[str, object]:
    return {f"{role}/colour": thing.colour, f"{role}/shape": thing.shape}


def _shown(role: str, thing: Thing) -> dict[str, object]:
    return {**_named(role, thing), f"{role}/size": thing.size}


def _outcome(
    source: Scene, candidate: Scene, edit: Edit, gold: Gold, alone: bool
) -> dict[str, object]:
    """What is said of one edit of the instruction. Beside another edit, what stayed as it was or is
    new is said without the goal."""
    said: dict[str, object] = {"kind": edit.kind}
    if edit.kind == "background":
        said |= _against(source.background, candidate.background, edit.value, "background", alone)
        return said
    now = candidate.get(edit.key)
    if edit.kind == "add":
        goal = edit.value
        if now is None:
            return said | {"state": "absent", "goal/cell": goal.cell} | _shown("goal", goal)
        said |= {"state": "new", "now/cell": now.cell} | _shown("now", now)
        if alone and (now.colour, now.shape, now.size) != (goal.colour, goal.shape, goal.size):
            said |= _shown("goal", goal)
        if alone and now.cell != goal.cell:
            said["goal/cell"] = goal.cell
        return said
    thing = source.get(edit.key)
    said |= _named("subject", thing)
    if edit.kind == "remove":
        return said | {"state": "done" if now is None else "still"}
    if edit.kind == "swap":
        done = all(gold.credits[key, "cell"] == 10 for key in (edit.key, edit.other))
        said |= _named("other", source.get(edit.other))
        return said | {"state": "done" if done else "still"}
    field = _EDITED[edit.kind]
    if now is None:
        return said | {"state": "gone", f"goal/{field}": edit.value}
    return said | _against(getattr(thing, field), getattr(now, field), edit.value, field, alone)


def _against(before, now, goal, field: str, alone: bool) -> dict[str, object]:
    """'is now X as asked', 'is still X, not Y' or 'is now X, not Y'."""
    if now == goal:
        return {"state": "done", f"now/{field}": now}
    still = now == before
    stated = {"state": "still" if still else "now", f"now/{field}": now}
    return stated if still and not alone else stated | {f"goal/{field}": goal}


def _extra(source: Scene, change, pair) -> dict[str, object]:
    """What is said of the first change nobody asked for."""
    (key, field), (_, new) = change, pair
    said: dict[str, object] = {"change": field}
    if field == "background":
        return said | {"now/background": new}
    if field == "added":
        return said | _shown("now", new)
    said |= _named("subject", source.get(key))
    if field not in ("cell", "removed"):  # "moved" does not say where to
        said[f"now/{field}"] = new
    return said
