"""Facts of critiques: as much as the words say, and no more; worlds with borrowed critiques."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entry_point import small_backbone  # noqa: F401  a fixture
from world_case import a_scene

from jrm_jax.data.schema import from_record, to_record
from jrm_jax.data.world import facts, scenes
from jrm_jax.data.world.edits import Edit, apply_all, compare
from jrm_jax.data.world.vocabulary import make_scene
from jrm_jax.losses import facts_loss, term_weights


def stated(source, edits, shown, quality=None):
    gold = compare(source, apply_all(source, edits), shown, quality)
    indices = facts.facts_of(source, shown, edits, gold, quality)
    return {facts.FACTS[index] for index in indices}


def test_facts_of_a_recolour_by_hand():
    source = a_scene()
    edits = (Edit("recolour", 0, "blue"),)
    asked = {"first/kind=recolour", "first/subject/colour=red", "first/subject/shape=circle"}
    done = stated(source, edits, apply_all(source, edits))
    assert done == asked | {
        "verdict=Correct", "first/state=done", "first/now/colour=blue", "nothing else=True",
        "following=10", "preservation=10",
    }  # fmt: skip
    assert stated(source, edits, source) == asked | {
        "verdict=Nothing changed", "first/state=still", "first/now/colour=red",
        "first/goal/colour=blue", "following=0", "preservation=10",
    }  # fmt: skip
    spoilt = make_scene("grey", apply_all(source, edits).things)
    assert stated(source, edits, spoilt, "noisy") == asked | {
        "verdict=Too much", "quality=noisy", "first/state=done", "first/now/colour=blue",
        "extra/change=background", "extra/now/background=grey", "following=10", "preservation=0",
    }  # fmt: skip


def test_facts_are_equal_exactly_where_critiques_are():
    facts_of, words_of, seen = {}, {}, set()
    for split, count in (("train", 800), ("hard", 300)):
        for index in range(count):
            group = scenes.make_group(split, index, 1)
            said = zip(scenes.group_critiques(group), scenes.group_facts(group), strict=True)
            for words, indices in said:
                assert facts_of.setdefault(words, indices) == indices, words
                assert words_of.setdefault(indices, words) == words
                assert list(indices) == sorted(set(indices)) and indices[-1] < facts.COUNT
                seen |= set(indices)
    assert len(facts_of) > 2000
    assert len(seen) > 0.9 * facts.COUNT  # few that are never true


def test_borrowed_critiques_are_of_the_same_kind_but_of_another_example():
    words = {"edits": collections.Counter(), "shuffled": collections.Counter()}
    same = total = 0
    for index in range(150):
        plain, mixed = (
            scenes.make_example("train", index, 0, 48, kind) for kind in ("edits", "shuffled")
        )
        assert dataclasses.replace(mixed, candidates=plain.candidates).id == plain.id
        assert (plain.preference == mixed.preference).all() and plain.prompt == mixed.prompt
        for one, other in zip(plain.candidates, mixed.candidates, strict=True):
            assert one.parts == other.parts and other.score_line
            words["edits"].update(one.critique.split())
            words["shuffled"].update(other.critique.split())
            same += one.critique == other.critique
            total += 1
    assert same < 0.02 * total
    shares = [
        {w: n / sum(c.values()) for w, n in c.most_common(60)} for c in words.values()
    ]
    assert all(abs(shares[0][w] - shares[1].get(w, 0)) < 0.01 for w in shares[0])
    for split in ("valid", "hard"):  # held-out critiques stay with their pictures
        one, other = (scenes.make_example(split, 3, 0, 48, k) for k in ("edits", "shuffled"))
        assert one.candidates == other.candidates


def test_a_contest_is_about_the_example_it_is_named_after():
    group, contest = scenes.make_group("test", 2, 0), scenes.make_contest("test", 2, 0, 16)
    assert (group.source, group.instruction) == (contest.source, contest.instruction)
    assert len({(a.scene.visible(), a.quality) for a in contest.attempts}) == 16
    for attempt in contest.attempts:
        gold = compare(group.source, group.target, attempt.scene, attempt.quality)
        assert gold == attempt.gold


def test_facts_go_through_a_record_and_are_absent_without():
    with_facts = scenes.make_example("train", 0, 0, 48, "facts")
    again = from_record(to_record(with_facts))
    assert [c.facts for c in again.candidates] == [c.facts for c in with_facts.candidates]
    assert all(c.facts for c in again.candidates)
    plain = from_record(to_record(scenes.make_example("train", 0, 0, 48)))
    assert all(c.facts is None for c in plain.candidates)


def test_facts_loss_by_hand_and_its_gradient():
    facts_BKF = jnp.zeros((1, 2, 3)).at[0, 0, 1].set(1.0)
    mask_BK = jnp.array([[1.0, 0.0]])
    logits_BKF = jnp.array([[[0.0, 2.0, -1.0], [5.0, 5.0, 5.0]]])
    term = facts_loss(logits_BKF, facts_BKF, mask_BK)
    by_hand = np.log(2) + np.log1p(np.exp(-2)) + np.log1p(np.exp(-1))
    np.testing.assert_allclose(term.sum, by_hand, rtol=1e-6)
    assert term.weight == 1
    gradient = jax.grad(lambda x: facts_loss(x, facts_BKF, mask_BK).sum)(logits_BKF)
    expected = 1 / (1 + np.exp(-np.asarray(logits_BKF[0, 0]))) - np.array([0, 1, 0])
    np.testing.assert_allclose(gradient[0, 0], expected, rtol=1e-5)
    assert not gradient[0, 1].any()  # an absent candidate


def test_without_facts_there_is_no_weight():
    batch = {
        "preference_weight": jnp.zeros((1, 2, 2, 1)), "candidate_mask": jnp.ones((1, 2)),
        "example_index": jnp.zeros(1, int), "critique_weights": jnp.zeros((1, 2, 0)),
    }  # fmt: skip
    assert "facts" not in term_weights(batch)
    assert term_weights(batch | {"facts": jnp.ones((1, 2, 3))})["facts"] == 6


def test_the_facts_head_learns_and_is_absent_when_off(small_backbone):
    from configs import joint
    from jrm_jax import build, build_data, sharding
    from jrm_jax.data.buckets import Bucket
    from jrm_jax.data.pipeline import assemble_batch
    from jrm_jax.errors import UserError
    from jrm_jax.losses import combine
    from jrm_jax.model.backbone import Backbone
    from jrm_jax.model.config import load_config
    from jrm_jax.step import LossConfig, make_forward

    config = joint.get_config()
    config.backbone.path = str(small_backbone)
    architecture = load_config(config.backbone.path)
    assert "facts_head" not in build.abstract_params(config, architecture)
    config.loss.update({"facts_weight": 1.0, "language_weight": 0.0})
    encoder = build_data.make_run_encoder(config, architecture)
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    state, _ = build.init_state(config, architecture, mesh, encoder)
    assert state.trainable["facts_head"]["kernel"].shape[1] == facts.COUNT
    with pytest.raises(UserError, match="kind=facts"):
        encoder.encode_example(scenes.make_example("train", 0, 0, 48))

    group = scenes.make_example("train", 0, 0, 96, "facts")
    bucket = Bucket(candidates=4, images=5, patches=36, prompt=64, candidate=96, critique=0)
    batch = assemble_batch([encoder.encode_example(group), None], bucket, encoder)
    assert batch["facts"].sum() == sum(len(c.facts) for c in group.candidates)
    backbone = Backbone(
        architecture, attention="xla", reward_token_id=encoder.tokenizer.reward_id
    )
    processor = encoder.processor

    def terms(params, weight):
        loss = LossConfig(1.0, 0.0, facts_weight=weight)
        return make_forward(backbone, processor.mean, processor.std, loss)(params, batch).terms

    assert set(jax.eval_shape(lambda p: terms(p, 0.0), state.trainable)) == {"preference"}

    def objective(params):
        coefficients = {"preference": 1.0, "facts": 1.0}
        return combine(terms(params, 1.0), coefficients, term_weights(batch))

    gradient = jax.jit(jax.grad(objective))(state.trainable)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["facts_head"]))
