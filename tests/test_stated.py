"""The scores that critiques state, and what is learnt from them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import joint
from jrm_jax.data.schema import to_record
from jrm_jax.data.stated import stated_scores, teacher_scores
from jrm_jax.data.world import scenes
from jrm_jax.errors import UserError
from jrm_jax.losses import combine, preference_loss, teacher_preferences, term_weights
from jrm_jax.run import check_data

MIX = {"following": 0.6, "preservation": 0.4}


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
        ("It is done.", {}),
    ],
)  # fmt: skip
def test_stated_scores(line, found):
    assert stated_scores(f"The circle is at nine.\n{line}\n") == found


def test_the_score_of_a_dimension():
    said = "Correct.\nfollowing ten preservation five"
    found = teacher_scores(said, ("overall", "following", "beauty"), MIX)
    assert found[:2] == [8.0, 10.0] and math.isnan(found[2])
    assert teacher_scores(said, ("overall",), {}) == [7.5]  # the plain mean
    assert teacher_scores("x\noverall 3 following 4", ("overall",), MIX) == [3.0]
    assert math.isnan(teacher_scores("x\nfollowing 4", ("overall",), MIX)[0])
    assert math.isnan(teacher_scores(None, ("overall",), MIX)[0])


def test_the_worlds_lines_state_gold():
    group = scenes.make_group("train", 3, 0)
    for attempt, words in zip(group.attempts, scenes.group_critiques(group), strict=True):
        (score,) = teacher_scores(words, ("overall",), MIX)
        assert score == pytest.approx(attempt.gold.overall / 10)


def test_soft_preferences_by_hand():
    scores = jnp.array([[[3.0], [1.0], [0.0]]])
    mask = jnp.array([[[1.0], [1.0], [0.0]]])
    preference, weight = teacher_preferences(scores, mask, 2.0)
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
        term = preference_loss(reward, *teacher_preferences(scores, mask, 2.0))
        return combine({"teacher": term}, {"teacher": 1.0}, weights)

    # least where rewards differ by the scores' difference in units of the scale
    best = jnp.array([[[1.0], [0.0], [7.0]]])
    np.testing.assert_allclose(jax.grad(loss)(best), 0, atol=1e-6)
    assert loss(best) < loss(best.at[0, 0].add(0.5)) and loss(best) < loss(best.at[0, 0].add(-0.5))


def test_critiques_without_scores_are_told():
    config = joint.get_config()
    config.loss.teacher_weight = 1.0
    example = scenes.make_example("train", 0, 0, pixels=48)
    check_data.check_teacher(config, [[to_record(example)]], "it")
    unmarked = dataclasses.replace(
        example,
        candidates=tuple(dataclasses.replace(c, score_line=False) for c in example.candidates),
    )
    with pytest.raises(UserError, match="no critique of the first 2000 groups states a score"):
        check_data.check_teacher(config, [[to_record(unmarked)]], "it")
    config.loss.teacher_mix = (("beauty", 1.0),)
    with pytest.raises(UserError, match="states a score .beauty."):
        check_data.check_teacher(config, [[to_record(example)]], "it")
