"""The two heads: where they read, and what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrm_jax.heads import (
    apply_deviation_head,
    apply_reward_head,
    critique_nll,
    gather_hidden,
    init_reward_head,
    init_words_head,
    language_kernel,
    words_nll,
)

B, X, D, W = 2, 7, 5, 11
SPARE = 4


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, W - 1, (B, X))
    targets += targets >= SPARE
    weights = rng.choice([0.0, 1.0, 0.5], (B, X)).astype(np.float32)
    hidden = rng.normal(size=(B, X, D)).astype(np.float32)
    return rng.normal(size=(D, W)).astype(np.float32), hidden, targets.astype(np.int32), weights


def test_reward_head_is_float32_whatever_it_reads():
    params = init_reward_head(jax.random.key(0), D, 2)
    hidden = jax.random.normal(jax.random.key(1), (B, 3, D), jnp.bfloat16)
    reward = apply_reward_head(params, hidden)
    assert reward.dtype == jnp.float32 and reward.shape == (B, 3, 2)
    np.testing.assert_allclose(
        reward, np.asarray(hidden, np.float64) @ np.asarray(params["kernel"]), rtol=1e-5
    )


def test_a_head_with_layers_and_deviations():
    """Its products by hand; every deviation begins at one; rewards begin with the spread asked."""
    plain = init_reward_head(jax.random.key(0), D, 2)
    assert "deviation" not in plain and apply_deviation_head(plain, jnp.ones((B, D))) is None
    wide = init_reward_head(jax.random.key(0), 400, 200, 2.0, (900, 700), True)
    states = jax.random.normal(jax.random.key(1), (500, 400))
    reward = apply_reward_head(wide, states)
    np.testing.assert_allclose(jnp.mean(jnp.square(reward)), 4.0, rtol=0.3)
    np.testing.assert_array_equal(apply_deviation_head(wide, states), jnp.zeros((500, 200)))

    head = init_reward_head(jax.random.key(0), D, 2, hidden=(5, 3), deviation=True)
    keys = iter(jax.random.split(jax.random.key(2), 20))
    head = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), head)
    hidden = jax.random.normal(jax.random.key(1), (B, 3, D), jnp.bfloat16)
    features = np.asarray(hidden, np.float64)
    for name in ("0", "1"):
        layer = head["hidden"][name]
        features = np.maximum(features @ np.asarray(layer["kernel"]) + layer["bias"], 0)
    for part, apply in ((head, apply_reward_head), (head["deviation"], apply_deviation_head)):
        found = apply(head, hidden)
        assert found.dtype == jnp.float32 and found.shape == (B, 3, 2)
        wanted = features @ np.asarray(part["kernel"], np.float64) + np.asarray(part["bias"])
        wanted = np.clip(wanted, -20, 20) if part is not head else wanted
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_gather_reads_the_packed_axis():
    prompt, slots, candidates = 3, 4, 2
    hidden = np.arange(B * (prompt + slots * candidates)).reshape(B, -1, 1)
    index = np.array([[[0, 3], [2, 2]], [[1, 1], [0, 3]]])
    found = gather_hidden(jnp.asarray(hidden), jnp.asarray(index), prompt, slots)[..., 0]
    for b, k, t in np.ndindex(index.shape):
        assert found[b, k, t] == hidden[b, prompt + k * slots + index[b, k, t], 0]


def test_critique_loss_equals_torch(case):
    torch = pytest.importorskip("torch")
    kernel, hidden, targets, weights = case
    logits = torch.from_numpy(hidden @ kernel)
    logits[..., SPARE] = -torch.inf
    nll = torch.nn.functional.cross_entropy(
        logits.reshape(-1, W), torch.from_numpy(targets.reshape(-1)).long(), reduction="none"
    )
    term = critique_nll(kernel, hidden, targets, weights, SPARE)
    np.testing.assert_allclose(term.sum, (nll.numpy() * weights.reshape(-1)).sum(), rtol=1e-5)
    assert float(term.weight) == weights.sum()


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_change_neither_value_nor_gradient(case, chunk):
    kernel, hidden, targets, weights = case

    def loss(kernel, hidden, chunk):
        return critique_nll(kernel, hidden, targets, weights, SPARE, chunk).sum

    value_and_grad = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    whole, parts = (value_and_grad(kernel, hidden, size) for size in (0, chunk))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), whole, parts)


@pytest.mark.parametrize("chunk", [0, 3])
def test_gradients_in_half_precision_are_those_in_full(case, chunk):
    """And no product of the backward pass is made in float32."""
    kernel, hidden, targets, weights = case
    hidden = jnp.asarray(hidden, jnp.bfloat16)

    def gradients(kernel, hidden):
        return jax.grad(
            lambda k, h: critique_nll(k, h, targets, weights, SPARE, chunk).sum, (0, 1)
        )(kernel, hidden)

    wanted = gradients(kernel, hidden.astype(jnp.float32))
    found = gradients(kernel, hidden)
    assert [g.dtype for g in found] == [jnp.float32, jnp.bfloat16]
    for ours, theirs in zip(found, wanted, strict=True):
        ours = np.asarray(ours, np.float32)
        assert np.abs(ours - theirs).max() < 0.02 * np.abs(theirs).max()
    text = str(jax.make_jaxpr(gradients)(kernel, hidden))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3  # the logits are made once, also those of chunks
    assert sum(":f32" in line for line in products) == 1  # the logits


def test_the_weight_of_the_loss_is_not_rounded_with_the_states():
    """1.3085 is 1.3047 in bfloat16: all gradients would be 0.3 % too small."""
    rng = np.random.default_rng(0)
    kernel, hidden = rng.normal(size=(32, 50)), rng.normal(size=(2, 64, 32))
    hidden, targets = jnp.asarray(hidden, jnp.bfloat16), rng.integers(5, 50, (2, 64))

    def size(scale):
        def loss(hidden):
            weights = jnp.ones(targets.shape)
            return scale * critique_nll(jnp.asarray(kernel), hidden, targets, weights, 4, 16).sum

        return np.abs(np.asarray(jax.grad(loss)(hidden), np.float64)).sum()

    assert size(1.3085) / size(1.0) == pytest.approx(1.3085, abs=1e-3)


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_suppressed_token_is_no_target(case, chunk):
    kernel, hidden, targets, weights = case
    wrong = np.where(weights > 0, SPARE, targets)
    assert critique_nll(kernel, hidden, wrong, weights, SPARE, chunk).sum == jnp.inf


def test_of_a_frozen_kernel_chunks_make_no_gradient(case):
    kernel, hidden, targets, weights = case
    nll = lambda h: critique_nll(kernel, h, targets, weights, SPARE, 3).sum  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(nll))(hidden))
    assert text.count("dot_general") == 2 and f"[{D},{W}] = add" not in text


def test_chunked_logits_never_stand_all_at_once(case):
    kernel, hidden, targets, weights = case
    text = str(jax.make_jaxpr(
        jax.grad(lambda h: critique_nll(kernel, h, targets, weights, SPARE, 3).sum)
    )(hidden))  # fmt: skip
    assert f"[{B},3,{W}]" in text and f"[{B},{X},{W}]" not in text


def test_masked_positions_weigh_nothing(case):
    kernel, hidden, targets, weights = case
    grad = jax.grad(lambda h: critique_nll(kernel, h, targets, weights, SPARE).sum)(hidden)
    assert not np.any(grad[weights == 0]) and np.all(np.any(grad[weights > 0] != 0, axis=-1))
    # a masked target may even be the suppressed token
    safe = critique_nll(kernel, hidden, np.full_like(targets, SPARE), weights * 0, SPARE)
    assert float(safe.sum) == 0


def test_words_are_all_read_off_one_state(case):
    torch = pytest.importorskip("torch")
    kernel, hidden, targets, weights = case
    rng = np.random.default_rng(1)
    states = hidden[:, :2]  # [B, K, D], two candidates with the critiques' halves
    targets, weights = (x[:, :6].reshape(B, 2, 3) for x in (targets, weights))
    mapping = rng.normal(size=(D, D)).astype(np.float32)
    logits = torch.from_numpy(states @ mapping @ kernel)
    logits[..., SPARE] = -torch.inf
    nll = -torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(targets).long())
    term = words_nll({"kernel": mapping}, states, kernel, targets, weights, SPARE)
    np.testing.assert_allclose(term.sum, (nll.numpy() * weights).sum(), rtol=1e-5)
    assert float(term.weight) == weights.sum()
    # the order of the words means nothing; at first the map changes nothing
    turned = words_nll({"kernel": mapping}, states, kernel, targets[..., ::-1],
                       weights[..., ::-1], SPARE)  # fmt: skip
    np.testing.assert_allclose(turned.sum, term.sum, rtol=1e-6)
    bare = words_nll(init_words_head(D), states, kernel, targets[..., :1], weights[..., :1], SPARE)
    plain = critique_nll(kernel, states, targets[..., 0], weights[..., 0], SPARE)
    np.testing.assert_allclose(bare.sum, plain.sum, rtol=1e-6)


def test_language_kernel_tied_and_untied():
    table = jnp.arange(6.0).reshape(3, 2)
    tied = {"backbone": {"embed": {"embedding": table}}, "language_head": {}}
    np.testing.assert_array_equal(language_kernel(tied), table.T)
    assert language_kernel(tied | {"language_head": {"kernel": table}}) is table
