"""The policy's distribution and one update of it: exact probabilities, and what must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrm_jax.errors import UserError
from jrm_jax.rl import base, editing, grpo, policy

GROUPS, COUNT = 4, 8
# one program each: run op by op they would be compiled op by op
APPLY, SAMPLE, LOG_PROB = map(jax.jit, (policy.apply, policy.sample, policy.log_prob))
DRAW = jax.jit(grpo.draw, static_argnums=3)
SETTINGS = grpo.Settings(clip=0.2, kl_weight=0.01, updates=2, scale="batch")


@pytest.fixture(scope="module")
def inputs():
    problems = [editing.make_problem("test", index, "rl-tests") for index in range(GROUPS)]
    return editing.features(problems)


@pytest.fixture(scope="module")
def start():
    return base.load()


@jax.jit
def moved(params, size=0.02, seed=0):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + size * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def test_the_divergence_is_what_samples_say(start, inputs):
    """Exact KL against the mean of log p - log q over programs that p draws; also the entropy."""
    p, q = (APPLY(params, inputs) for params in (moved(start), start))
    count = 20_000
    repeated = jax.jit(lambda c: jax.tree.map(lambda x: jnp.repeat(x[:1], count, 0), c))
    many = [repeated(c) for c in (p, q)]
    program = SAMPLE(many[0], jax.random.key(3))
    log_p, log_q = (LOG_PROB(choice, program) for choice in many)
    exact = float(jax.jit(policy.divergence)(p, q)[0])
    assert exact > 1  # there is something to compare
    assert float((log_p - log_q).mean()) == pytest.approx(exact, rel=0.02)
    entropy = sum(float(part[0]) for part in jax.jit(policy.entropy)(p))
    assert -float(log_p.mean()) == pytest.approx(entropy, rel=0.02)
    # importance weights of a density that is normalised have a mean of one
    near = repeated(APPLY(moved(start, 0.002), inputs))
    drawn = SAMPLE(many[1], jax.random.key(4))
    weights = jnp.exp(LOG_PROB(near, drawn) - LOG_PROB(many[1], drawn))
    assert float(weights.mean()) == pytest.approx(1, abs=0.05)


def test_what_an_absent_object_would_be_counts_nowhere(start, inputs):
    choice = APPLY(start, inputs)
    program = SAMPLE(choice, jax.random.key(0))
    gone = program._replace(present_NO=program.present_NO * 0)
    other = gone._replace(fields_NOF=(gone.fields_NOF + 1) % 3, knobs_NOV=gone.knobs_NOV + 1)
    assert (LOG_PROB(choice, gone) == LOG_PROB(choice, other)).all()
    impossible = ~np.asarray(inputs.possible_NO)
    assert impossible.any() and not np.asarray(program.present_NO)[impossible].any()


def draw(params, inputs, seed=0):
    return DRAW(params, inputs, jax.random.key(seed), COUNT)


def test_the_ratio_is_exactly_one_at_the_first_update_and_not_at_the_second(start, inputs):
    params = moved(start)
    program, before_N = draw(params, inputs)
    reward = np.random.default_rng(0).normal(size=(GROUPS, COUNT)).astype(np.float32)
    optimizer = grpo.make_optimizer(1e-3, 1.0)
    update = jax.jit(grpo.make_update(optimizer, SETTINGS))
    *_, measures = update(params, optimizer.init(params), start, inputs, program, reward)
    first, second = np.asarray(measures["ratio_off"])
    assert first == 0 and second > 0
    assert float(measures["clipped"][0]) == 0
    again = LOG_PROB(grpo.repeated(APPLY(params, inputs), COUNT), program)
    np.testing.assert_allclose(again, before_N, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_a_constant_reward_changes_nothing_to_the_bit(start, inputs, scale):
    """With a weight on the divergence as well: at the base its gradient is exactly zero."""
    program, _ = draw(start, inputs)
    optimizer = grpo.make_optimizer(1e-2, 1.0)
    update = jax.jit(grpo.make_update(optimizer, SETTINGS._replace(scale=scale, kl_weight=1.0)))
    reward = np.full((GROUPS, COUNT), 0.7, np.float32)
    params, _, measures = update(start, optimizer.init(start), start, inputs, program, reward)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (params, start)), strict=True))
    assert not np.asarray(measures["grad_norm"]).any() and not np.asarray(measures["kl"]).any()
    reward[0, 0] = 1.7  # and one that is not
    params, *_ = update(start, optimizer.init(start), start, inputs, program, reward)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (params, start)), strict=True))


def test_gradients_are_those_of_the_loss(start, inputs):
    """Against differences, along random directions, where the ratio is not 1 and some is clipped;
    and at ratio 1 against the policy gradient, which knows no ratio."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (moved(start), start))
        params, old = wide
        features = editing.Features(*(
            jnp.asarray(x, jnp.float64 if x.dtype != bool else bool) for x in inputs
        ))  # fmt: skip
        program, _ = DRAW(old, features, jax.random.key(1), COUNT)
        advantage_N = jax.random.normal(jax.random.key(2), (GROUPS * COUNT,), jnp.float64)
        near = jax.tree.map(lambda a, b: b + 0.1 * (a - b), params, old)

        @jax.jit
        def loss(p):
            return grpo.make_loss(SETTINGS)(p, old, old, features, program, advantage_N)[0]

        slopes = jax.jit(jax.grad(loss))
        grads = slopes(near)
        for seed in range(3):
            way = moved(jax.tree.map(jnp.zeros_like, near), 1.0, seed)
            there, back = (
                loss(jax.tree.map(lambda p, d, s=s: p + s * d, near, way)) for s in (1e-6, -1e-6)
            )
            slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads, way)),
                                                       strict=True))  # fmt: skip
            assert float((there - back) / 2e-6) == pytest.approx(float(slope), rel=2e-3)

        def plain(p):
            choice = grpo.repeated(APPLY(p, features), COUNT)
            return -jnp.mean(advantage_N * LOG_PROB(choice, program))

        for a, b in zip(
            *(jax.tree.leaves(f(old)) for f in (slopes, jax.jit(jax.grad(plain)))), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_advantages_by_hand():
    reward = jnp.array([[0.0, 2.0], [5.0, 5.0], [1.0, 7.0]])
    assert grpo.advantages(reward, "group").tolist() == [[-1, 1], [0, 0], [-1, 1]]
    whole = np.sqrt((2 * 1 + 2 * 9) / 6)
    found = grpo.advantages(reward, "batch")
    np.testing.assert_allclose(found, np.array([[-1, 1], [0, 0], [-3, 3]]) / whole, rtol=1e-6)


@pytest.mark.parametrize("count", [3, 5, 6, 7, 24])
def test_equal_rewards_have_no_advantage_however_large(count):
    """The rounded mean of equal numbers may be another one."""
    reward = jnp.repeat(jnp.linspace(16, 4000, 50, dtype=jnp.float32)[:, None], count, 1)
    for scale in ("group", "batch"):
        assert not grpo.advantages(reward, scale).any()
    some = reward.at[0, 0].add(1.0)
    found = grpo.advantages(some, "group")
    assert found[0].all() and not found[1:].any()


def test_the_base_learns_and_its_file_is_checked(tmp_path, start):
    problems, programs = base.imitated(24, 2)
    params, losses = base.train(problems, programs, steps=30)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1
    base.save(tmp_path / "p.safetensors", params)
    again = base.load(tmp_path / "p.safetensors")
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (params, again)), strict=True))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, start)
    small = {**params, "scene_out": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}}
    base.save(tmp_path / "q.safetensors", small)
    with pytest.raises(UserError, match="make it anew"):
        base.load(tmp_path / "q.safetensors")
    (tmp_path / "q.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        base.load(tmp_path / "q.safetensors")


def test_an_update_moves_towards_what_is_rewarded(start, inputs):
    """More blur: its mean rises by an update, and by no reward falls."""
    place = list(editing.PICTURE_KNOBS).index("blurred")
    optimizer = optax.sgd(1e-3)
    update = jax.jit(grpo.make_update(optimizer, SETTINGS._replace(updates=1, kl_weight=0.0)))
    program, _ = draw(start, inputs, 5)
    reward = np.asarray(program.picture_NW)[:, place].reshape(GROUPS, COUNT)
    means = []
    for sign in (1, -1):
        params, *_ = update(start, optimizer.init(start), start, inputs, program, sign * reward)
        means.append(float(APPLY(params, inputs).picture_NW[:, place].mean()))
    level = float(APPLY(start, inputs).picture_NW[:, place].mean())
    assert means[0] > level > means[1]


def test_the_rate_falls_with_the_updates():
    """Adam's updates of a gradient that stays are the rate itself."""
    optimizer, params = grpo.make_optimizer(0.1, 1.0, 0.97, slower=2), jnp.zeros(1)
    state, steps = optimizer.init(params), []
    for _ in range(5):
        step, state = optimizer.update(jnp.ones(1), state, params)
        steps.append(-float(step[0]))
    np.testing.assert_allclose(steps, [0.1 / (1 + n / 2) for n in range(5)], rtol=1e-4)
