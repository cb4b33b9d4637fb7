"""What pretraining reads: single pictures and pairs of pictures, described."""

import collections
import dataclasses
import random
import re

import numpy as np

from jrm_jax.data import describe
from jrm_jax.data.world import PLACES, Scene, Thing, pool_of, sample_scene

SEED = 11


def a_scene():
    """A red circle at the top left, a blue star at the top, a green square in the middle."""
    return Scene(
        "white",
        (
            Thing(0, "red", "circle", "medium", 0, 1, -2),
            Thing(1, "blue", "star", "large", 1, 0, 0),
            Thing(2, "green", "square", "small", 4, 3, 3),
        ),
    )


def test_descriptions_describe_and_nothing_else():
    made = [describe.make_description(i, SEED, kind) for kind in describe.PAIR_SHARES
            for i in range(60)]  # fmt: skip
    wholes = [example.prompt[0].text in describe.WHOLE for example in made]
    assert all(wholes[:60]) and 0 < sum(wholes[60:120]) < 12 and not any(wholes[120:])
    assert {example.id.split("-")[2] for example in made[120:]} == set(describe.ASPECTS)
    for example in made:
        assert not example.weight.any() and len(example.candidates) == 4
        assert not any(candidate.score_line for candidate in example.candidates)
        text = " ".join([example.prompt[0].text, *(c.critique for c in example.candidates)])
        words = {word.lower() for word in re.findall(r"[A-Za-z]+", text)}
        assert not words & {"make", "remove", "asked", "still", "now", "wrong", "mistake", "score"}
    rng, pool = random.Random(3), pool_of("train")
    for _ in range(50):
        scene = sample_scene(rng, pool)
        text = describe.describe(scene, "blocky")
        assert text.startswith(f" blocky {scene.background} background, ")
        where = [text.index(f"{t.colour} {t.shape}") for t in scene.things]
        assert where == sorted(where)
        assert all(PLACES[thing.cell] in text for thing in scene.things)


def test_what_the_reward_token_predicts_is_never_the_same_for_all():
    """A first word that the pictures do not decide teaches the reward token not to look."""
    for kind in describe.PAIR_SHARES:
        made = [describe.make_description(i, SEED, kind) for i in range(60)]
        firsts = [[c.critique.split()[0] for c in example.candidates] for example in made]
        assert np.mean([len(set(words)) > 1 for words in firsts]) > 0.8
        common = collections.Counter(word for words in firsts for word in words).most_common(1)
        assert common[0][1] < 0.3 * 4 * 60


def test_pairs_of_pictures_are_described_by_aspect():
    first = a_scene()
    circle, star, square = first.things
    larger = dataclasses.replace(circle, size="large")
    second = Scene("navy", (larger, dataclasses.replace(square, cell=7)))
    rng = random.Random(0)
    named = {thing: describe._named(rng, first, thing) for thing in first.things}
    for subject, aspect, words in (
        (named[circle], "second", " large at the top left."),
        (named[circle], "both", " first medium at the top left, second large at the top left."),
        (named[star], "second", " nothing there."),
        (named[star], "both", " first large at the top, second nothing there."),
        (describe._placed(4), "both", " first small green square, second nothing."),
        (describe._placed(8), "both", " both nothing."),
        (describe._GROUND, "both", " first white, second navy."),
        # the circle grew, the star is gone and the square moved, on another background
        (
            named[circle], "rest",
            " four the background, at the top, in the middle, at the bottom.",
        ),
        (
            named[square], "all",
            " five the background, at the top left, at the top, in the middle, at the bottom.",
        ),
    ):  # fmt: skip
        assert describe.describe_pair(aspect, subject, first, second) == words
    same = describe.describe_pair("both", named[circle], first, first, "noisy")
    assert same == " noisy both medium at the top left."
    assert describe.describe_pair("rest", named[circle], first, first) == " zero."
    plain = describe.describe_pair("all", named[circle], first, second, "blurred", counted=False)
    assert plain == " blurred background, top left, top, middle, bottom."
    assert describe.describe_pair("all", named[circle], first, first, counted=False) == " nothing."
