"""The built-in world in words: instructions and critiques.

One small closed vocabulary, shared with `describe.py`, and the same noun phrase for an object
wherever it is named: "the red circle", "at the top left". Medium is the unmarked size. Numbers are
written as words, so that each is a single token.
"""

from __future__ import annotations

import random
import re

from jrm_jax.data.stated import NUMBERS
from jrm_jax.data.world.edits import Change, Edit, Gold
from jrm_jax.data.world.vocabulary import PLACES, Scene, Thing

_TEMPLATES = {
    "recolour": (
        "make {a} {v}", "turn {a} {v}", "paint {a} {v}", "change the colour of {a} to {v}",
        "colour {a} {v}",
    ),
    "remove": ("remove {a}", "delete {a}", "erase {a}", "take away {a}"),
    "add": ("add {v} {p}", "put {v} {p}", "draw {v} {p}", "place {v} {p}"),
    "replace": (
        "replace {a} with a {v}", "change {a} into a {v}", "turn {a} into a {v}", "make {a} a {v}",
    ),
    "move": ("move {a} {p}", "put {a} {p}", "shift {a} {p}", "place {a} {p}"),
    "resize": ("make {a} {v}", "change the size of {a} to {v}", "resize {a} to {v}"),
    "background": (
        "make the background {v}", "change the background to {v}", "turn the background {v}",
        "paint the background {v}",
    ),
    "swap": (
        "swap {a} and {b}", "exchange {a} and {b}", "let {a} and {b} trade places",
        "switch {a} and {b}",
    ),
}  # fmt: skip
_BIGGER = ("make {a} bigger", "enlarge {a}")
_SMALLER = ("make {a} smaller", "shrink {a}")


def template_words() -> str:
    """Every word of the instruction templates, the rare ones included."""
    phrases = [p for group in _TEMPLATES.values() for p in group] + [*_BIGGER, *_SMALLER]
    phrases += [phrase[0].upper() + phrase[1:] for phrase in phrases]
    return "\n".join(re.sub(r" ?\{\w\}", "", phrase) for phrase in phrases)


def place(cell: int) -> str:
    """'at the top left', 'in the middle'."""
    return f"{'in' if PLACES[cell] == 'middle' else 'at'} the {PLACES[cell]}"


def name(thing: Thing) -> str:
    return f"the {thing.colour} {thing.shape}"


def noun(thing: Thing) -> str:
    """'a small red circle'; medium goes without saying."""
    size = "" if thing.size == "medium" else thing.size + " "
    return article(f"{size}{thing.colour} {thing.shape}")


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def refer(rng: random.Random, scene: Scene, thing: Thing, by_name: bool) -> str:
    """An unambiguous way to point at an object: mostly colour and shape, sometimes less."""
    if by_name or rng.random() < 0.75:
        return name(thing)
    options = [f"the shape {place(thing.cell)}"]
    if sum(t.shape == thing.shape for t in scene.things) == 1:
        options.append(f"the {thing.shape}")
    if sum(t.colour == thing.colour for t in scene.things) == 1:
        options.append(f"the {thing.colour} shape")
    if thing.size != "medium" and sum(t.size == thing.size for t in scene.things) == 1:
        options.append(f"the {thing.size} shape")
    return rng.choice(options)


def instruction(rng: random.Random, scene: Scene, edits: tuple[Edit, ...], by_name: bool) -> str:
    """One sentence for one edit or for two; `by_name`: objects by colour and shape only."""
    parts, previous = [], None
    for edit in edits:
        again = edit.key is not None and edit.key == previous and edit.kind != "swap"
        parts.append(_request(rng, scene, edit, by_name, "it" if again else None))
        previous = None if edit.kind in ("swap", "add") else edit.key
    return sentence(" and ".join(parts))


def sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def _request(
    rng: random.Random, scene: Scene, edit: Edit, by_name: bool, pronoun: str | None
) -> str:
    if edit.kind == "background":
        return rng.choice(_TEMPLATES["background"]).format(v=edit.value)
    if edit.kind == "add":
        template = rng.choice(_TEMPLATES["add"])
        return template.format(v=noun(edit.value), p=place(edit.value.cell))
    thing, templates = scene.get(edit.key), _TEMPLATES[edit.kind]
    if edit.kind == "swap":
        # By name, both: two places in one instruction would be long and easily misread.
        return rng.choice(templates).format(a=name(thing), b=name(scene.get(edit.other)))
    subject = pronoun or refer(rng, scene, thing, by_name)
    if edit.kind == "resize" and thing.size == "medium" and rng.random() < 0.5:
        templates = _BIGGER if edit.value == "large" else _SMALLER
    template = rng.choice(templates)
    if edit.kind == "move":
        # 'move it to the top', but 'put it at the top'.
        still = template.startswith(("put", "place"))
        goal = place(edit.value) if still else f"to the {PLACES[edit.value]}"
        return template.format(a=subject, p=goal)
    return template.format(a=subject, v=edit.value)


def critique(source: Scene, candidate: Scene, edits, gold: Gold, quality: str | None) -> str:
    """What was asked, what the candidate shows, what is wrong; last line: both scores.

    Everything said is read off the two scenes and `gold`; how the candidate was made is not known
    here. `edits` is the instruction.
    """
    outcomes = [_outcome(source, candidate, edit, gold.credits) for edit in edits]
    if len(edits) > 1:  # the longest critiques set the width of every batch
        outcomes = [_shorten(outcome) for outcome in outcomes]
    first, *rest = outcomes
    extras = [_extra(source, change, pair) for change, pair in gold.extras.items()]
    says = verdict(source, candidate, gold, quality)
    if extras and len(edits) > 1 and says != "Too much":
        says += " and more"
    if quality and quality.capitalize() != says:
        says += f", {quality}"
    text = f"{says}: {first}."
    text += "".join(f" {sentence(clause)}" for clause in rest)
    if extras and len(edits) == 1:
        more = " and more" if len(extras) > 1 else ""  # one mistake is spelled out
        text += f" {sentence(f'{extras[0]}{more} by mistake')}"
    if not extras and not quality and len(edits) == 1 and any(gold.credits.values()):
        text += " Nothing else changed."
    return f"{text}\n{score_line(gold)}"


def _shorten(outcome: str) -> str:
    """Without what the verdict, 'still' or 'not' says as well."""
    if " still " in outcome or " is new, " in outcome:
        return outcome.partition(", not ")[0]
    return outcome.removesuffix(" as asked").replace(" is now ", " is ")


def score_line(gold: Gold) -> str:
    return f"following {NUMBERS[gold.following]} preservation {NUMBERS[gold.preservation]}"


def verdict(source: Scene, candidate: Scene, gold: Gold, quality: str | None) -> str:
    """The first words of a critique: 'Correct', 'Too much', 'Wrong colour', 'Noisy'."""
    credits = gold.credits.values()
    if min(credits) == 10:
        if gold.extras:
            return "Too much"
        return quality.capitalize() if quality else "Correct"
    if source == candidate:
        return "Nothing changed"
    if not any(credits):
        return "Wrong object" if any(key is not None for key, _ in gold.extras) else "Not done"
    for (_, field), credit in gold.credits.items():
        if 0 < credit < 10:
            return "Wrong " + {"cell": "place", "added": "object"}.get(field, field)
    return "Half done"


def _outcome(source: Scene, candidate: Scene, edit: Edit, credits: dict[Change, int]) -> str:
    """'the red circle is now green, not blue as asked', for one edit of the instruction."""
    if edit.kind == "background":
        if candidate.background == edit.value:
            return f"the background is now {edit.value} as asked"
        when = "still" if candidate.background == source.background else "now"
        return f"the background is {when} {candidate.background}, not {edit.value}"
    now = candidate.get(edit.key)
    if edit.kind == "add":
        goal, where = noun(edit.value), place(edit.value.cell)
        if now is None:
            return f"there is no {goal.partition(' ')[2]} {where}"
        differing = [goal] if noun(now) != goal else []
        differing += [where] if now.cell != edit.value.cell else []
        instead = f", not {' '.join(differing)}" if differing else ""
        return f"{noun(now)} {place(now.cell)} is new{instead}"
    thing = source.get(edit.key)
    if edit.kind == "remove":
        return (
            f"{name(thing)} is gone as asked"
            if now is None
            else (f"{name(thing)} is still there, not gone")
        )
    if edit.kind == "swap":
        both = f"{name(thing)} and {name(source.get(edit.other))}"
        done = credits[edit.key, "cell"] == credits[edit.other, "cell"] == 10
        return f"{both} {'traded places as asked' if done else 'did not trade'}"
    field = {"recolour": "colour", "replace": "shape", "move": "cell", "resize": "size"}[edit.kind]
    goal = _value(field, edit.value)
    if now is None:
        return f"{name(thing)} is gone, not {goal}"
    if getattr(now, field) == edit.value:
        return f"{name(thing)} is now {goal} as asked"
    when = "still" if getattr(now, field) == getattr(thing, field) else "now"
    return f"{name(thing)} is {when} {_value(field, getattr(now, field))}, not {goal}"


def _extra(source: Scene, change: Change, pair) -> str:
    """'the green square is now blue', for a change nobody asked for."""
    (key, field), (_, new) = change, pair
    if field == "background":
        return f"the background is now {new}"
    if field == "added":
        return f"{noun(new)} is new"
    if field == "removed":
        return f"{name(source.get(key))} is gone"
    if field == "cell":
        return f"{name(source.get(key))} moved"
    return f"{name(source.get(key))} is now {_value(field, new)}"


def _value(field: str, value) -> str:
    if field == "cell":
        return place(value)
    return article(value) if field == "shape" else value
