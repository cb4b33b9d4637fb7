"""The study's evidence: what can be read off a state, and which way two losses pull."""

import math

import numpy as np
import pytest

from jrm_jax.data.world import facts, scenes
from jrm_jax.study import why


def test_facts_are_read_where_they_are():
    stated_NF, group_N = why.stated_facts("test", 60, 0)
    groups = [scenes.make_group("test", i, 0) for i in range(60)]
    assert len(stated_NF) == len(group_N) == sum(len(g.attempts) for g in groups)
    first = groups[0].attempts[0]
    said = facts.facts_of(
        groups[0].source, first.scene, groups[0].edits, first.gold, first.quality
    )
    assert sorted(np.flatnonzero(stated_NF[0])) == sorted(said)
    rng = np.random.default_rng(0)
    verdicts = [f for f, name in enumerate(facts.FACTS) if name.startswith("verdict")]
    states = np.concatenate(
        [stated_NF[:, verdicts] @ rng.normal(size=(len(verdicts), 32)),
         rng.normal(size=(len(stated_NF), 8))], axis=1,
    )  # fmt: skip
    found = why.probe_facts(states, stated_NF, group_N)
    assert found["verdict"] > 0.97 and found["the edit asked for"] < 0.75
    noise = why.probe_facts(rng.normal(size=(len(stated_NF), 4)), stated_NF, group_N)
    assert abs(noise["verdict"] - 0.5) < 0.12


def test_area_under_roc_by_hand():
    score, truth = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert why.area_under_roc(score, truth) == 0.75
    assert why.area_under_roc(np.zeros(4), truth) == 0.5
    assert math.isnan(why.area_under_roc(score, np.ones(4, bool)))


def test_gradients_compared_by_hand():
    one = {"a": np.eye(3), "b": np.ones((1, 2, 2))}
    assert why.compare_gradients(one, one) == pytest.approx(
        {"ratio": 1.0, "cosine": 1.0, "kept": 1.0}
    )
    against = why.compare_gradients({"a": np.eye(3)}, {"a": -3 * np.eye(3)})
    assert against == pytest.approx({"ratio": 3.0, "cosine": -1.0, "kept": -1.0})
    # another direction in space, of the same size: the step is turned by 45 degrees
    beside = why.compare_gradients(
        {"a": np.array([[1.0, 0.0]])}, {"a": np.array([[0.0, 1.0]])}
    )
    assert beside == pytest.approx({"ratio": 1.0, "cosine": 0.0, "kept": 0.7071}, abs=1e-3)
