"""The built-in world: examples of preferences. (`describe.py` makes those of pretraining.)

    make_example(split, index, seed)   instruction, source, K candidates, critiques, preferences

Everything is chosen by `random.Random(f"{seed}/{split}/{index}")` and drawn in integers, so one
seed gives one data set on every machine, and any example can be made on its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np

from jrm_jax.data.schema import Candidate, Image, PreferenceExample, Text
from jrm_jax.data.world import facts
from jrm_jax.data.world import text as world_text
from jrm_jax.data.world.draw import PIXELS, draw, encode_png, encode_scene
from jrm_jax.data.world.edits import (
    Edit,
    Gold,
    apply_all,
    collateral,
    compare,
    held_out,
    held_out_kind,
    keeps_names,
    propose,
)
from jrm_jax.data.world.vocabulary import (
    HELD_OUT_PAIRS,
    KINDS,
    QUALITIES,
    SPLITS,
    Pool,
    Scene,
    pool_of,
    sample_scene,
    scene_split,
)

DIMENSIONS = ("overall", "following", "preservation")
CANDIDATE_KINDS = (
    "perfect",
    "wrong-object",
    "wrong-attribute",
    "partial",
    "untouched",
    "over-edited",
    "degraded",
)
# 'edits': critiques of the candidates; 'shuffled': those of `train` belong to other examples;
# 'facts': as 'edits', with what the critiques say as facts too.
KINDS_OF_EXAMPLE = ("edits", "shuffled", "facts")
COMPOUND_SHARE = 0.2  # of the instructions
PERFECT_SHARE = 0.8  # of the groups that have a perfect candidate
# How often each flaw is drawn, and how often a failed edit is over-edited or degraded as well:
# chosen so that neither the size of the change nor its neatness says which candidate is better.
FLAW_WEIGHTS = {
    "wrong-object": 30,
    "wrong-attribute": 30,
    "partial": 30,
    "untouched": 15,
    "over-edited": 20,
    "degraded": 25,
}
SECOND_FLAW = 0.4


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One candidate: the scene it shows, what its picture has lost, what it is worth."""

    kind: str
    scene: Scene
    quality: str | None
    gold: Gold


@dataclasses.dataclass(frozen=True)
class Group:
    """An example before it is drawn."""

    source: Scene
    target: Scene
    edits: tuple[Edit, ...]
    instruction: str
    attempts: tuple[Attempt, ...]

    @property
    def kind(self) -> str:
        return "compound" if len(self.edits) > 1 else self.edits[0].kind


def make_group(split: str, index: int, seed: int | str) -> Group:
    """Scenes, instruction and candidates of one example, without pictures."""
    return _make_group(split, random.Random(f"{seed}/{split}/{index}"))


def _make_group(split: str, rng: random.Random) -> Group:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    pool, hard = pool_of(split), split == "hard"
    # No held-out combination is about a background alone, so `hard` has no such instruction.
    kinds = [kind for kind in KINDS if not (hard and kind == "background")]
    compound, kind = rng.random() < COMPOUND_SHARE, rng.choice(kinds)
    while True:  # draw again until everything fits; the kind of instruction is settled
        include = rng.choice(sorted(HELD_OUT_PAIRS)) if hard and rng.random() < 0.7 else None
        source = sample_scene(rng, pool, include)
        if not hard and scene_split(source) != split:
            continue
        edits = _sample_edits(rng, source, pool, kind, compound)
        target = None if edits is None else apply_all(source, edits)
        if not pool.allows(target) or not keeps_names(source, target):
            continue
        if hard and not any(held_out(edit, source, target) for edit in edits):
            continue
        if not hard and any(held_out_kind(edit, source) for edit in edits):
            continue
        attempts = _sample_attempts(rng, source, target, edits, pool)
        if attempts is None:
            continue
        by_name = hard or compound
        text = world_text.instruction(rng, source, edits, by_name)
        return Group(source, target, edits, text, attempts)


def _sample_edits(
    rng: random.Random, source: Scene, pool: Pool, kind: str, compound: bool
) -> tuple[Edit, ...] | None:
    """The instruction's edit, or its two edits; None where the two do not go together."""
    first = propose(rng, source, kind, pool)
    if not compound:
        return (first,)
    second = propose(rng, source, rng.choice(KINDS), pool)
    shared = {first.key, first.other} & {second.key, second.other} - {None}
    kinds = {first.kind, second.kind}
    if len(kinds) == 1 or (shared and kinds & {"swap", "remove"}):
        return None
    if apply_all(source, (first,)) is None or apply_all(source, (second,)) is None:
        return None
    # "swap a and b" reads best at the end of a sentence with another "and".
    return (second, first) if first.kind == "swap" else (first, second)


def _sample_attempts(
    rng: random.Random,
    source: Scene,
    target: Scene,
    edits: tuple[Edit, ...],
    pool: Pool,
    count: int = 0,
) -> tuple[Attempt, ...] | None:
    """K candidates with distinct pictures, shuffled; None where too few can be made.

    `count`: so many; 0: two to four.
    """
    count = count or rng.choices((2, 3, 4), (15, 20, 65))[0]
    kinds = ["perfect"] if rng.random() < PERFECT_SHARE else []
    found: dict[object, Attempt] = {}
    for _ in range(max(40, 10 * count)):
        if len(found) == count:
            break
        if len(found) < len(kinds):
            kind = kinds[len(found)]
        else:
            kind = rng.choices(tuple(FLAW_WEIGHTS), tuple(FLAW_WEIGHTS.values()))[0]
        made = _attempt(rng, kind, source, target, edits, pool)
        if made is None:
            continue
        scene, quality = made
        if not pool.allows(scene) or not keeps_names(source, scene):
            continue
        if kind != "perfect" and made == (target, None):
            continue
        gold = compare(source, target, scene, quality)
        found.setdefault((scene.visible(), quality), Attempt(kind, scene, quality, gold))
    if len(found) < count:
        return None
    attempts = list(found.values())
    rng.shuffle(attempts)
    return tuple(attempts)


def _attempt(
    rng: random.Random, kind: str, source: Scene, target: Scene, edits: tuple[Edit, ...], pool: Pool
) -> tuple[Scene, str | None] | None:
    """(scene, lost quality) of one candidate of this kind, or None where this try failed."""
    quality = None
    if kind == "perfect":
        scene = target
    elif kind == "untouched":
        scene = source
    elif kind == "degraded":
        scene, quality = target, rng.choice(QUALITIES)
    elif kind == "over-edited":
        scene = collateral(rng, target, source, target, pool, rng.choice((1, 1, 2)))
    else:
        make = {"wrong-object": _wrong_object, "wrong-attribute": _wrong_attribute}
        tried = make.get(kind, _partial)(rng, source, edits, pool)
        scene = None if tried is None else apply_all(source, tried)
        if scene in (None, source, target):
            return None
        if rng.random() < SECOND_FLAW:
            if rng.random() < 0.5:
                quality = rng.choice(QUALITIES)
            else:
                scene = collateral(rng, scene, source, target, pool, rng.choice((1, 2)))
    return None if scene is None else (scene, quality)


def _wrong_object(rng: random.Random, source: Scene, edits: tuple[Edit, ...], pool: Pool):
    """The instruction's operation on an object it is not about (one half of a compound)."""
    which = rng.randrange(len(edits))
    edit = edits[which]
    others = [t.key for t in source.things if t.key not in (edit.key, edit.other)]
    if edit.kind in ("add", "background") or not others:
        return None
    wrong = dataclasses.replace(edit, key=rng.choice(others))
    return (*edits[:which], wrong, *edits[which + 1 :])


def _wrong_attribute(rng: random.Random, source: Scene, edits: tuple[Edit, ...], pool: Pool):
    """The right object, another value: colour, shape, size, place or background."""
    which = rng.randrange(len(edits))
    edit = edits[which]
    if edit.kind == "remove":
        return None
    if edit.kind == "add":
        thing, change = edit.value, rng.choice(("colour", "shape", "cell"))
        drawn = propose(rng, source, "add", pool).value
        wrong = dataclasses.replace(
            edit, value=dataclasses.replace(thing, **{change: getattr(drawn, change)})
        )
    else:
        wrong = propose(rng, source, edit.kind, pool, edit.key)
        if wrong == edit or (edit.kind == "swap" and wrong.other == edit.other):
            return None
    return (*edits[:which], wrong, *edits[which + 1 :])


def _partial(rng: random.Random, source: Scene, edits: tuple[Edit, ...], pool: Pool):
    """One half of a compound, a resize that stops at medium, a move that stops half way."""
    if len(edits) > 1:
        return (rng.choice(edits),)
    (edit,) = edits
    if edit.kind == "resize" and source.get(edit.key).size != "medium" and edit.value != "medium":
        return (dataclasses.replace(edit, value="medium"),)
    if edit.kind == "move":
        start, goal = divmod(source.get(edit.key).cell, 3), divmod(edit.value, 3)
        ways = [cell for cell in source.free_cells() if _between(divmod(cell, 3), start, goal)]
        return (dataclasses.replace(edit, value=rng.choice(ways)),) if ways else None
    return None


def _between(cell: tuple[int, int], start: tuple[int, int], goal: tuple[int, int]) -> bool:
    inside = all(min(a, b) <= x <= max(a, b) for x, a, b in zip(cell, start, goal, strict=True))
    return inside and cell not in (start, goal)


def group_critiques(group: Group) -> tuple[str, ...]:
    """One critique per candidate, score line included."""
    return tuple(
        world_text.critique(group.source, a.scene, group.edits, a.gold, a.quality)
        for a in group.attempts
    )


def group_facts(group: Group) -> tuple[tuple[int, ...], ...]:
    """What each critique says, as facts: indices into `facts.FACTS`."""
    return tuple(
        facts.facts_of(group.source, a.scene, group.edits, a.gold, a.quality)
        for a in group.attempts
    )


def borrowed_critiques(split: str, index: int, seed: int, count: int) -> tuple[str, ...]:
    """Critiques of another group of `count` candidates, drawn by the same rule: they tell nothing
    of the example at `index`."""
    for attempt in itertools.count():
        group = make_group(split, attempt, f"{seed}/borrowed/{index}")
        if len(group.attempts) == count:
            return group_critiques(group)


def make_contest(split: str, index: int, seed: int, count: int) -> Group:
    """The instruction of an example with `count` attempts at it, drawn as its own are."""
    group = make_group(split, index, seed)
    rng, attempts = random.Random(f"{seed}/contest/{split}/{index}"), None
    while attempts is None:
        attempts = _sample_attempts(
            rng, group.source, group.target, group.edits, pool_of(split), count
        )
    return dataclasses.replace(group, attempts=attempts)


def make_example(
    split: str, index: int, seed: int, pixels: int = PIXELS, kind: str = "edits"
) -> PreferenceExample:
    """One preference example of the world; R = 3 dimensions, all pairs labelled, ties as halves.

    Args:
        kind: one of KINDS_OF_EXAMPLE.
    """
    rng = random.Random(f"{seed}/{split}/{index}")
    group = _make_group(split, rng)
    critiques = group_critiques(group)
    if kind == "shuffled" and split == "train":
        critiques = borrowed_critiques(split, index, seed, len(critiques))
    stated = group_facts(group) if kind == "facts" else (None,) * len(critiques)
    candidates, scores_KR = [], []
    for attempt, words, said in zip(group.attempts, critiques, stated, strict=True):
        picture = encode_scene(attempt.scene, attempt.quality, rng, pixels)
        candidates.append(Candidate((Image(picture),), words, score_line=True, facts=said))
        gold = attempt.gold
        scores_KR.append((gold.overall, gold.following, gold.preservation))
    scores = np.asarray(scores_KR, np.int32)
    sign_KKR = np.sign(scores[:, None] - scores[None, :])
    count = len(candidates)
    weight_KKR = np.repeat(1.0 - np.eye(count, dtype=np.float32)[:, :, None], 3, axis=2)
    kinds = ",".join(attempt.kind for attempt in group.attempts)
    return PreferenceExample(
        id=f"{split}-{index:06d}-{group.kind}:{kinds}",
        prompt=(Text(group.instruction), Image(encode_png(draw(group.source, pixels)))),
        candidates=tuple(candidates),
        preference=((sign_KKR + 1) / 2).astype(np.float32),
        weight=weight_KKR,
        dimensions=DIMENSIONS,
    )
