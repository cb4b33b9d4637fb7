"""Loss terms against plain referees."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrm_jax.benchmarks import groups
from jrm_jax.losses import (
    Term,
    centering_loss,
    combine,
    pair_counts,
    preference_loss,
    term_weights,
)

B, K, R = 3, 4, 2


def votes(seed=0):
    """Random labels: wins, losses, ties, missing pairs, an absent candidate; cyclic at times."""
    rng = np.random.default_rng(seed)
    preference, weight = np.full((B, K, K, R), 0.5), np.zeros((B, K, K, R))
    for b, r in itertools.product(range(B), range(R)):
        for i, j in itertools.combinations(range(K if b else K - 1), 2):
            share = rng.choice([0.0, 0.5, 1.0])
            preference[b, i, j, r], preference[b, j, i, r] = share, 1 - share
            weight[b, i, j, r] = weight[b, j, i, r] = rng.choice([0.0, 1.0, 2.0])
    return preference.astype(np.float32), weight.astype(np.float32)


def referee(reward, preference, weight, margin):
    total = count = 0.0
    for b, r in itertools.product(range(B), range(R)):
        for i, j in itertools.combinations(range(K), 2):
            p, w = preference[b, i, j, r], weight[b, i, j, r]
            gap, m = reward[b, i, r] - reward[b, j, r], margin * abs(2 * p - 1)
            nll = -p * math.log(1 / (1 + math.exp(m - gap)))
            nll -= (1 - p) * math.log(1 / (1 + math.exp(m + gap)))
            total, count = total + w * nll, count + w
    return total, count


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_bradley_terry(margin):
    reward = np.random.default_rng(1).normal(size=(B, K, R)).astype(np.float32)
    preference, weight = votes()
    term = preference_loss(reward, preference, weight, margin)
    total, count = referee(reward, preference, weight, margin)
    np.testing.assert_allclose(term.sum, total, rtol=1e-5)
    assert float(term.weight) == count


def test_a_tie_is_half_a_vote_each_way_and_its_margin_is_zero():
    reward = jnp.array([[[0.3], [-1.1]]])
    half = jnp.full((1, 2, 2, 1), 0.5)
    weight = (1 - jnp.eye(2))[None, :, :, None]
    wins = [half.at[0, 0, 1, 0].set(p).at[0, 1, 0, 0].set(1 - p) for p in (0.0, 1.0)]
    each = [float(preference_loss(reward, win, weight).sum) for win in wins]
    assert float(preference_loss(reward, half, weight, 5.0).sum) == pytest.approx(sum(each) / 2)


def test_a_share_is_its_votes_and_is_reached_where_the_model_gives_it():
    """12 votes against 7: value and gradient of 19 pairs, none where sigmoid(gap) is 12/19."""
    share, count = np.float32(12 / 19), 19.0
    weight = (1 - jnp.eye(2))[None, :, :, None]

    def cost(gap, win, weight):
        preference = jnp.full((1, 2, 2, 1), 0.5).at[0, 0, 1, 0].set(win).at[0, 1, 0, 0].set(1 - win)
        return preference_loss(jnp.stack([gap, 0.0])[None, :, None], preference, weight).sum

    def votes(gap):
        return 12 * cost(gap, 1.0, weight) + 7 * cost(gap, 0.0, weight)

    for gap in (-1.5, 0.2, 3.0):
        soft = jax.value_and_grad(cost)(gap, share, count * weight)
        np.testing.assert_allclose(soft, jax.value_and_grad(votes)(gap), rtol=1e-5)
    assert abs(jax.grad(cost)(math.log(12 / 7), share, count * weight)) < 1e-5


def test_gradients_match_differences_and_unlabelled_pairs_have_none():
    reward = jnp.array(np.random.default_rng(2).normal(size=(B, K, R)), jnp.float32)
    preference, weight = votes(3)
    grad = jax.grad(lambda r: preference_loss(r, preference, weight).sum)(reward)
    for index in [(0, 0, 0), (1, 3, 1), (2, 2, 0)]:
        high = preference_loss(reward.at[index].add(1e-2), preference, weight).sum
        low = preference_loss(reward.at[index].add(-1e-2), preference, weight).sum
        assert float(grad[index]) == pytest.approx(float(high - low) / 2e-2, abs=2e-3)
    assert not np.any(grad[0, K - 1])  # the absent candidate


def test_zero_weight_gives_zero_gradient():
    preference, weight = votes()

    def loss(reward):
        terms = {"preference": preference_loss(reward, preference, weight * 0)}
        return combine(terms, {"preference": 1.0}, {"preference": jnp.float32(0)})

    value, grad = jax.value_and_grad(loss)(jnp.ones((B, K, R)))
    assert float(value) == 0 and not np.any(grad)


def test_combine_divides_by_the_global_weights():
    terms = {"a": Term(jnp.float32(6), jnp.float32(2)), "b": Term(jnp.float32(5), jnp.float32(1))}
    weights = {"a": jnp.float32(4), "b": jnp.float32(10)}
    assert float(combine(terms, {"a": 2.0, "b": 3.0}, weights)) == pytest.approx(3.0 + 1.5)


def test_pair_counts_leave_human_ties_out_and_split_equal_predictions():
    preference, weight = np.full((1, 3, 3, 1), 0.5, np.float32), np.ones((1, 3, 3, 1), np.float32)
    for i, j, share in ((0, 1, 1.0), (0, 2, 0.0), (1, 2, 0.5)):
        preference[0, i, j, 0], preference[0, j, i, 0] = share, 1 - share
    weight[0, range(3), range(3)] = 0
    counts = pair_counts(jnp.array([[[2.0], [1.0], [2.0]]]), preference, weight)
    assert [float(c) for c in counts] == [1.5, 2.0, 1.0]


def test_one_group_of_seven_asks_for_what_its_21_pairs_ask_for():
    """What `benchmarks.groups` compares is the same loss."""
    group = groups.make_group(0)
    pairs = groups.split(group)
    assert len(pairs) == 21 and len(group.candidates) == 7
    reward_K = np.random.default_rng(0).normal(size=7).astype(np.float32)
    data = {c.parts[0].data: r for c, r in zip(group.candidates, reward_K, strict=True)}

    def loss(examples):
        rewards = [[[data[c.parts[0].data]] for c in e.candidates] for e in examples]
        labels = (np.stack([getattr(e, n) for e in examples]) for n in ("preference", "weight"))
        term = preference_loss(jnp.array(rewards), *labels)
        return float(term.sum / term.weight), float(term.weight)

    assert len(data) == 7
    assert loss([group]) == pytest.approx(loss(pairs))


def test_centering_counts_present_candidates():
    term = centering_loss(jnp.array([[[1.0, 3.0], [2.0, 0.0]]]), jnp.array([[1.0, 0.0]]))
    assert (float(term.sum), float(term.weight)) == (5.0, 1.0)


def test_term_weights_come_from_the_batch_alone():
    _, weight = votes()
    weight = np.array(weight)
    weight[2] = 0  # critiques alone, or filler: rewards are not asked for
    batch = {
        "preference_weight": weight,
        "candidate_mask": np.ones((B, K), np.float32),
        "example_index": np.array([0, 5, -1]),
        "critique_weights": np.full((B, K, 2), 0.5, np.float32),
    }
    found = {name: float(value) for name, value in term_weights(batch).items()}
    upper = sum(weight[:, i, j].sum() for i, j in itertools.combinations(range(K), 2))
    said = float(B * K)
    assert found == {"preference": upper, "centering": 2.0 * K, "language": said, "words": said}
