"""What pretraining reads: single pictures and pairs of pictures, described."""

import dataclasses
import random
import re

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
            for i in range(30)]  # fmt: skip
    wholes = [example.prompt[0].text in describe.WHOLE for example in made]
    assert all(wholes[:30]) and 0 < sum(wholes[30:60]) < 20 and sum(wholes[60:]) < 10
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
        assert f"{scene.background} background, " in text
        assert text.endswith(". The picture is blocky.")
        where = [text.lower().index(f"{t.colour} {t.shape}") for t in scene.things]
        assert where == sorted(where)
        assert all(PLACES[thing.cell] in text for thing in scene.things)


def test_pairs_of_pictures_are_described_side_by_side():
    first = a_scene()
    circle, star, square = first.things
    larger = dataclasses.replace(circle, size="large")
    second = Scene("navy", (larger, dataclasses.replace(square, cell=7)))
    rng = random.Random(0)
    subjects = [describe._named(rng, first, circle), describe._placed(4)]
    assert describe.describe_pair(subjects, first, second) == (
        "The red circle first medium at the top left, second large at the top left; "
        "in the middle first a small green square, second nothing."
    )
    subjects = [describe._named(rng, first, star), describe._GROUND, describe._placed(8)]
    assert describe.describe_pair(subjects, first, second, "noisy") == (
        "The blue star first large at the top, second nowhere; the background first white, second "
        "navy; at the bottom right both nothing. The picture is noisy."
    )
    subjects = [describe._named(rng, first, circle), describe._placed(8)]
    # the circle grew; of the rest, the star is gone and the square moved, on another background
    assert describe.describe_counts(subjects, first, second) == (
        " one and four changed, the background, at the top left, at the top, in the middle, "
        "at the bottom."
    )
