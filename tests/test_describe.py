"""What pretraining reads: pictures described, things looked up, pairs of pictures compared."""

import collections
import dataclasses
import random
import re

import numpy as np
from world_case import a_scene

from jrm_jax.data.schema import Image
from jrm_jax.data.world import describe
from jrm_jax.data.world.vocabulary import PLACES, Scene, pool_of, sample_scene

SEED = 11


def test_descriptions_describe_and_nothing_else():
    made = [describe.make_description(i, SEED, kind) for kind in describe.KINDS for i in range(60)]
    assert {example.prompt[0].text for example in made[:60]} == set(describe.WHOLE)
    for of_pairs in (made[120:180], made[180:]):
        assert {example.id.split("-")[2] for example in of_pairs} == set(describe.ASPECTS)
    pictures = [sum(isinstance(part, Image) for part in example.prompt) for example in made]
    assert pictures == [1] * 60 + [0] * 60 + [1] * 120  # a lookup has no first picture
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
    for kind in describe.KINDS:
        made = [describe.make_description(i, SEED, kind) for i in range(60)]
        firsts = [[c.critique.split()[0] for c in example.candidates] for example in made]
        assert np.mean([len(set(words)) > 1 for words in firsts]) > 0.8
        common = collections.Counter(word for words in firsts for word in words).most_common(1)
        assert common[0][1] < 0.4 * 4 * 60


def test_pairs_of_pictures_are_compared_by_aspect():
    first = a_scene()
    circle, star, square = first.things
    larger = dataclasses.replace(circle, size="large")
    # the circle grew, the star is gone and the square moved, on another background
    second = Scene("navy", (larger, dataclasses.replace(square, cell=7)))
    named = {thing: describe._named(thing, "it") for thing in first.things}
    for subject, aspect, words in (
        (named[circle], "first", " top left medium."),
        (named[circle], "second", " top left large."),
        (named[circle], "both", " second top left large."),
        (named[circle], "there", " large red circle."),
        (named[star], "second", " nothing."),
        (named[square], "second", " bottom small."),
        (named[square], "there", " nothing."),
        (describe._placed(4), "first", " small green square."),
        (describe._placed(4), "both", " second nothing."),
        (describe._placed(8), "both", " both nothing."),
        (describe._placed(describe.BACKGROUND), "both", " second navy."),
        (named[star], "all", " five background, top left, top, middle, bottom."),
    ):
        assert describe.compare(aspect, subject, first, second) == words
    same = describe.compare("both", named[circle], first, first, "noisy")
    assert same == " noisy both top left medium."
    assert describe.compare("all", named[circle], first, first) == " zero."
    spelled = describe.compare("all", named[circle], first, second, spelled=True)
    assert spelled == (
        " five changed changed changed kept kept changed kept kept changed kept."
    )  # the background, then the places in reading order
    assert describe._placed(describe.BACKGROUND).asked == "the background"


def test_what_is_compared_differs_about_as_often_as_not():
    made = [describe.make_description(i, SEED, "comparisons") for i in range(300)]
    words = [c.critique.split() for e in made if e.id.endswith("-both") for c in e.candidates]
    share = np.mean(["second" in w for w in words])
    assert 0.3 < share < 0.6
