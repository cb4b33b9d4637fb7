"""The scores that critiques state, and what is learnt from them."""

import dataclasses
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import discriminative, generative, joint, paper
from jrm_jax.data import contents, store
from jrm_jax.data.schema import Candidate, PreferenceExample, Text
from jrm_jax.data.stated import stated_scores, teacher_scores
from jrm_jax.data.world import scenes
from jrm_jax.errors import UserError
from jrm_jax.losses import combine, preference_loss, teacher_preferences, term_weights
from jrm_jax.run import check_data, unused_fields
from jrm_jax.run.check_config import check_config

MIX = {"following": 0.6, "preservation": 0.4}


NAMES = ("overall", "score", "following", "preservation", "quality", "visual quality",
         "Instruction following", "总分")  # fmt: skip


@pytest.mark.parametrize(
    "line, found",
    [
        ("following ten preservation two", {"following": 10, "preservation": 2}),
        ("Instruction following: 3/4, visual quality: 2.5/4",
         {"instruction_following": 3, "visual_quality": 2.5}),
        ("Overall score: 7 out of 10", {"overall": 7}),
        ('{"following": 3, "quality": -2}', {"following": 3, "quality": -2}),
        ("**Overall** = 8", {"overall": 8}),
        ("Scores: overall 3.5, visual_quality 2.", {"overall": 3.5, "visual_quality": 2}),
        ("Instruction following (0-10): 8", {"instruction_following": 8}),
        ("| overall | 7 | quality | 5 |", {"overall": 7, "quality": 5}),
        ("overall: +7; quality: \u22122", {"overall": 7, "quality": -2}),
        ("Overall\uff1a7\uff0f10", {"overall": 7}),
        ("总分: 8/10", {"总分": 8}),
        ("following - 3, quality -3", {"following": 3, "quality": -3}),
        ("Overall: 7,5/10", {"overall": 7.5}),
        ("Overall: **7**/10, quality (4/10)", {"overall": 7, "quality": 4}),
        ("This one is worse. Score: 3", {"score": 3}),
        ("Step 2: quality 8", {"quality": 8}),
        ("following ten beauty two", {"following": 10}),
        # a number of something else
        ("It is done.", {}),
        ("not following 8", {}),
        ("overall one of the best", {}),
        ("overall 2 objects are gone", {}),
        ("overall: 7-8", {}),
        ("overall: 1,000", {}),
        ("following 3, following 5", {}),
        ("quality: 3rd", {}),
    ],
)  # fmt: skip
def test_stated_scores(line, found):
    assert stated_scores(f"The circle is at nine.\n{line}\n", NAMES) == found


@pytest.mark.parametrize(
    "line", ["a" * 9000, "overall " * 9000, "overall (" * 5000, "1 " * 9000, " - " * 9000]
)
def test_a_long_line_costs_no_more_than_its_length(line):
    began = time.process_time()
    assert stated_scores(line, NAMES) == {}
    assert time.process_time() - began < 0.5  # what grows with its square takes minutes


def group_scores(*lines, dimensions=("overall",), mix=()):
    said = [line and f"Correct.\n{line}" for line in lines]
    return [[None if math.isnan(x) else x for x in row]
            for row in teacher_scores(said, dimensions, dict(mix))]  # fmt: skip


def test_the_score_of_a_dimension():
    said, three = "following ten preservation five", ("overall", "following", "beauty")
    assert group_scores(said, dimensions=three, mix=MIX) == [[8.0, 10.0, None]]
    assert group_scores("overall 3 following 4", mix=MIX) == [[3.0]]
    assert group_scores("following 4", None, mix=MIX) == [[None], [None]]
    assert group_scores("Score: 3", "Overall: 4") == [[3.0], [4.0]]
    # all candidates in the same way: the one that states it and a mean do not compare
    assert group_scores("overall 3", said, mix=MIX) == [[3.0], [None]]


def test_a_plain_mean_is_of_the_same_names():
    both = ("overall", "following", "quality")

    def overall(*lines, dimensions=both):
        return [row[0] for row in group_scores(*lines, dimensions=dimensions)]

    assert overall("following 8 quality 2", "following 6 quality 6") == [5.0, 6.0]
    # 5 against 6 would turn them over
    assert overall("following 8 quality 2", "following 6") == [None, None]
    assert overall("following 8 quality 2", "") == [5.0, None]
    # names that nobody asked for are not read
    assert overall("following 8 beauty 2", "following 6", dimensions=("overall",)) == [None, None]


def test_scales_are_not_mixed():
    two = ("overall", "following")
    assert group_scores("overall: 4/5", "overall: 7/10") == [[None], [None]]
    assert group_scores("overall: 4/10", "overall: 7 out of 10") == [[4.0], [7.0]]
    assert group_scores("overall: 40%", "overall: 7 of 100") == [[40.0], [7.0]]
    mix = {"following": 0.5, "quality": 0.5}
    assert group_scores("following: 4/5, quality: 7/10", dimensions=two, mix=mix) == [[None, 4.0]]


def test_the_worlds_lines_state_gold():
    group = scenes.make_group("train", 3, 0)
    for attempt, words in zip(group.attempts, scenes.group_critiques(group), strict=True):
        ((score,),) = teacher_scores([words], ("overall",), MIX)
        assert score == pytest.approx(attempt.gold.overall / 10)


def test_soft_preferences_by_hand():
    scores = jnp.array([[[3.0], [1.0], [0.0]]])
    mask = jnp.array([[[1.0], [1.0], [0.0]]])
    preference, weight = teacher_preferences(scores / 2.0, mask)
    assert preference[0, 0, 1, 0] == pytest.approx(1 / (1 + math.exp(-1)))
    assert preference[0, 1, 0, 0] == pytest.approx(1 - preference[0, 0, 1, 0])
    assert weight[0, :, :, 0].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    batch = {
        "teacher_mask": mask, "preference_weight": jnp.zeros((1, 3, 3, 1)),
        "candidate_mask": jnp.ones((1, 3)), "critique_weights": jnp.zeros((1, 3, 0)),
    }  # fmt: skip
    weights = term_weights(batch)
    assert weights["teacher"] == 1 and weights["preference"] == 0  # no label, one pair to learn

    def loss(reward):
        term = preference_loss(reward, *teacher_preferences(scores / 2.0, mask))
        return combine({"teacher": term}, {"teacher": 1.0}, weights)

    # least where rewards differ by the scores' difference in units of the scale
    best = jnp.array([[[1.0], [0.0], [7.0]]])
    np.testing.assert_allclose(jax.grad(loss)(best), 0, atol=1e-6)
    assert loss(best) < loss(best.at[0, 0].add(0.5)) and loss(best) < loss(best.at[0, 0].add(-0.5))


def said_by(*lines, marked=True):
    return PreferenceExample(
        str(lines), (Text("Edit."),),
        tuple(Candidate((Text(f"{i}"),), line and f"So.\n{line}", marked)
              for i, line in enumerate(lines)),
        np.full((len(lines),) * 2 + (1,), 0.5, np.float32),
        np.zeros((len(lines),) * 2 + (1,), np.float32), ("overall",),
    )  # fmt: skip


def test_groups_that_state_scores_are_counted_once(tmp_path):
    """All of them, also where those that do come last; a score alone is compared with nothing."""
    folder, dimensions = tmp_path / "set", ("overall", "following", "beauty")
    train = [said_by("It is done.", None)] * 2 + [
        said_by("overall 3", "overall 4"), said_by("overall 3", None),
        said_by("following 3", "following 4", "overall 7"),
        said_by("overall 3", "overall 4", marked=False),
    ]  # fmt: skip
    train = [dataclasses.replace(e, id=str(i)) for i, e in enumerate(train)]
    store.write_dataset(folder, {"train": train}, ("overall",), manifest={})
    records = store.open_dataset(folder)["train"]
    found = contents.find_stated(folder, "train", records, dimensions, {})
    assert found.groups == {"overall": 1, "following": 1, "beauty": 0}
    # from 3 to 4; 'overall 7' is compared with nothing
    assert found.spans == pytest.approx({"overall": 0.98, "following": 0.98, "beauty": 0.0})
    unread = [None] * len(records)
    assert contents.find_stated(folder, "train", unread, dimensions, {}) == found
    mixed = contents.find_stated(folder, "train", records, ("overall",), {"following": 1.0})
    assert mixed.groups == {"overall": 1}  # 'overall 7' alone says more than what is made for it
    beauty = contents.find_stated(folder, "train", records, ("beauty",), {})
    assert beauty == ({"beauty": 0}, {"beauty": 0.0})


@pytest.mark.parametrize(
    "labels, stated, words",
    [
        ({"overall": 3}, {"overall": 5, "beauty": 0}, "a label in beauty, and in none two critiq"),
        ({}, {"overall": 5, "beauty": 0}, "dimensions=.*'overall',"),
        ({}, {"overall": 0, "beauty": 0}, "state a score .overall, beauty, following."),
        ({"beauty": 3}, {"overall": 5, "beauty": 0}, ""),
        ({}, {"overall": 5, "beauty": 1}, ""),
    ],
)
def test_dimensions_that_nothing_teaches_are_told(labels, stated, words):
    config = discriminative.get_config()
    config.loss.teacher_weight = 1.0
    config.loss.teacher_mix = (("following", 1.0),)
    config.data.dimensions = ("overall", "beauty")
    train = [contents.Contents(9, "", labels, 9)]
    if not words:
        assert check_data.check_lessons(config, train, "it", stated) == []
        return
    with pytest.raises(UserError, match=words):
        check_data.check_lessons(config, train, "it", stated)


def test_critiques_without_scores_are_still_read_for_their_words():
    """By default a real run learns from both, if there are both."""
    config = joint.get_config("qwen3_vl_2b")
    assert config.loss.teacher_weight and config.loss.language_weight
    for module in (discriminative, generative, paper):
        assert module.get_config("qwen3_vl_8b").loss.teacher_weight == 0.0
    train = [contents.Contents(9, "", {"overall": 9}, 9)]
    (words,) = check_data.check_lessons(config, train, "it", {"overall": 0})
    assert words.startswith("it: in no training group two critiques state a score (overall) in")
    assert words.endswith("so config.loss.teacher_weight counts for nothing")
    assert check_data.check_lessons(config, train, "it", {"overall": 2}) == []
    config.loss.teacher_mix = (("following", 1.0),)  # makes `overall`, and nothing else
    for dimensions, named in (("overall",), "overall, following"), (("beauty",), "beauty"):
        config.data.dimensions = dimensions
        found = [contents.Contents(9, "", dict.fromkeys(dimensions, 9), 9)]
        (words,) = check_data.check_lessons(config, found, "it", dict.fromkeys(dimensions, 0))
        assert f"state a score ({named}) in" in words
    counts = "config.loss.teacher_mix counts for nothing"
    assert any(counts in words for words in unused_fields.describe(config))
    config.data.dimensions = ("overall",)
    assert not any(counts in words for words in unused_fields.describe(config))
    config.loss.language_weight = 0.0  # then they are there for their scores alone
    (words,) = check_data.check_lessons(config, train, "it", {"overall": 0})
    assert words.startswith("WARNING: it: in no training group")
    config.loss.language_weight = 0.5
    bare = [contents.Contents(9, "", {"overall": 9}, 0)]
    (words,) = check_data.check_lessons(config, bare, "it", {"overall": 0})
    assert words == "WARNING: it has labels but no critiques: no language is learnt"


@pytest.mark.parametrize(
    "overall, beauty, given, scales, said",
    [
        ({}, {}, 1.0, (1.0, 1.0), []), ({}, {}, 0.0, (1.0, 1.0), []),
        ({"a": 0.0}, {"a": 9.0}, 1.0, (1.0, 1.0), []), ({"a": 30.0}, {}, 1.0, (1.0, 1.0), []),
        (
            {"a": 25.0, "b": 20.0}, {"b": 4.0}, 0.0, (2.5, 0.4),
            ["stated scores: points that count one nat: overall 2.5, beauty 0.4"],
        ),
        ({"a": 0.8}, {"a": 5.0}, 1.0, (1.0, 1.0), ["WARNING: a: scores for overall .* 0.8 nats"]),
        (
            {"a": 100.0, "b": 8.0}, {}, 0.0, (10.0, 1.0),
            ["stated scores: .*: overall 10", "WARNING: b: .* 0.8 nats apart at 10 points a nat"],
        ),
    ],
)  # fmt: skip
def test_points_that_count_one_nat(overall, beauty, given, scales, said):
    """Of each dimension by itself: one may be of ten, another of a hundred points."""
    config = discriminative.get_config()
    config.data.dimensions = ("overall", "beauty")
    config.loss.teacher_weight, config.loss.teacher_scale = 1.0, given
    spans = {
        name: {"overall": overall.get(name, 0.0), "beauty": beauty.get(name, 0.0)}
        for name in {**overall, **beauty}
    }
    found, words = check_data.teacher_scale(config, spans)
    assert found == pytest.approx(scales) and len(words) == len(said)
    assert all(re.match(pattern, line) for pattern, line in zip(said, words, strict=True))


def test_a_scale_that_makes_hard_preferences_is_refused():
    config = discriminative.get_config()
    config.loss.teacher_weight = 1.0
    said = "b: scores for overall .* 85 points apart, 85 nats .*=1: give 8.5, or 0"
    with pytest.raises(UserError, match=said):
        check_data.teacher_scale(config, {"a": {"overall": 9.0}, "b": {"overall": 85.0}})


@pytest.mark.parametrize(
    "mix", [(("a", 0.0),), (("a", 1.0), ("a", 2.0)), (("a b", 1.0), ("A_b score", 1.0))]
)
def test_a_mix_that_means_nothing_is_refused(mix):
    config = joint.get_config()
    config.loss.teacher_weight, config.loss.teacher_mix = 1.0, mix
    with pytest.raises(UserError, match="each name once, one weight above 0"):
        check_config(config)
    config.loss.teacher_mix = (("a", 0.0), ("b", 1.0))
    assert check_config(config) == []
