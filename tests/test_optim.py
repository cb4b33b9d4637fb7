"""What trains, how fast, and what the optimizer keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import generative
from jrm_jax import build, sharding
from jrm_jax.errors import UserError
from jrm_jax.model.published import PUBLISHED
from jrm_jax.optim import (
    flatten,
    make_optimizer,
    make_schedule,
    merge_params,
    split_params,
    unflatten,
)

PARAMS = {
    "backbone": {
        "vision": {"fc1": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
        "decoder": {"norm": {"scale": jnp.ones(2)}},
    },
    "language_head": {},
    "reward_head": {"kernel": jnp.ones((2, 1))},
}
TRAINABLE = split_params(PARAMS, (".*",))[0]  # all of it, without the empty head


def test_split_and_merge_are_inverse():
    trainable, frozen = split_params(PARAMS, ("reward_head", "norm/scale$"))
    assert set(flatten(trainable)) == {"reward_head/kernel", "backbone/decoder/norm/scale"}
    assert not set(flatten(trainable)) & set(flatten(frozen))
    merged = merge_params(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    assert unflatten(flatten(merged)) == {k: v for k, v in merged.items() if v}


def test_patterns_without_a_match_are_all_named():
    with pytest.raises(UserError, match="'visoin'.*'reward_haed'") as error:
        split_params(PARAMS, ("decoder", "visoin", "reward_haed"))
    assert "near: reward_head/kernel" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="groups"):
        make_optimizer(PARAMS, lambda step: 1.0, groups=(("nothing", 2.0),))
    with pytest.raises(UserError, match="no regular expression"):
        split_params(PARAMS, ("(",))


def test_a_pattern_of_what_is_frozen_is_no_error():
    """The defaults of a config must not refuse what its user has chosen to freeze."""
    trainable, frozen = split_params(PARAMS, ("backbone/decoder",))
    settings = {"weight_decay": 0.1, "groups": (("reward_head", 10.0),)}
    for others in ((), tuple(flatten(frozen))):
        if not others:
            with pytest.raises(UserError, match="groups: no parameter matches 'reward_head'"):
                make_optimizer(trainable, lambda step: 1.0, **settings)
            continue
        optimizer = make_optimizer(trainable, lambda step: 1.0, **settings, others=others)
        updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable)
        assert set(flatten(updates)) == {"backbone/decoder/norm/scale"}
        settings["decay_patterns"] = ("kernle$",)
        with pytest.raises(UserError, match="decay_patterns: no parameter matches 'kernle"):
            make_optimizer(trainable, lambda step: 1.0, **settings, others=others)


def test_a_real_config_may_train_the_decoder_alone():
    config = generative.get_config("qwen3_vl_2b")
    config.trainable, config.optimizer.weight_decay = ("norm/scale$",), 0.1
    backbone, mesh = PUBLISHED["qwen3_vl_2b"], sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    state, _ = build.abstract_state(config, backbone, mesh)
    assert all(path.endswith("norm/scale") for path in flatten(state.trainable))
    config.optimizer.groups = (("reward_haed", 10.0),)
    with pytest.raises(UserError, match="'reward_haed'.*near: reward_head/kernel"):
        build.abstract_state(config, backbone, mesh)


def one_step(**settings):
    optimizer = make_optimizer(TRAINABLE, lambda step: 0.1, clip_norm=0, **settings)
    grads = jax.tree.map(jnp.ones_like, TRAINABLE)
    updates, _ = optimizer.update(grads, optimizer.init(TRAINABLE), TRAINABLE)
    return {path: float(leaf.ravel()[0]) for path, leaf in flatten(updates).items()}


def test_groups_scale_the_rate_and_the_first_match_counts():
    plain = one_step()
    grouped = one_step(groups=(("reward_head", 10.0), ("kernel$", 0.5)))
    factors = {path: grouped[path] / plain[path] for path in plain}
    assert factors == pytest.approx({
        "reward_head/kernel": 10.0, "backbone/vision/fc1/kernel": 0.5,
        "backbone/vision/fc1/bias": 1.0, "backbone/decoder/norm/scale": 1.0,
    })  # fmt: skip


def test_decay_only_where_the_pattern_says():
    plain, decayed = one_step(), one_step(weight_decay=0.5)
    changed = {path for path in plain if decayed[path] != plain[path]}
    assert changed == {"reward_head/kernel", "backbone/vision/fc1/kernel"}
    assert decayed["reward_head/kernel"] == pytest.approx(-0.1 * 1.5, rel=1e-4)


def test_muon_makes_each_matrix_of_the_backbone_orthogonal_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(2, 8, 4)), jnp.float32)  # two layers' matrices
    tree = {"backbone": {"q": {"kernel": kernel, "bias": kernel[:, 0]}}, "reward_head": {
        "kernel": kernel[0]}}  # fmt: skip
    found = {}
    for name, optimizer in (
        ("adam", optax.nadam(0.1, b1=0.9, b2=0.95)),
        ("muon", make_optimizer(tree, lambda step: 0.1, name="muon", clip_norm=0)),
    ):
        found[name] = flatten(optimizer.update(tree, optimizer.init(tree), tree)[0])
    for path in ("backbone/q/bias", "reward_head/kernel"):
        np.testing.assert_allclose(found["muon"][path], found["adam"][path], rtol=1e-6)
    update = np.asarray(found["muon"]["backbone/q/kernel"])
    for layer, gradient in zip(update, np.asarray(kernel), strict=True):
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular.max() < 2 * singular.min()  # five Newton-Schulz steps: about 0.7 to 1.2
        assert 0.5 < np.sqrt(np.mean(layer**2)) / (0.1 * 0.2) < 2  # as large as Adam's usual 0.2
        assert np.sum(layer * gradient) < 0
    alone = {"backbone": {"q": {"kernel": kernel[1:]}}}
    optimizer = make_optimizer(alone, lambda step: 0.1, name="muon", clip_norm=0)
    second = flatten(optimizer.update(alone, optimizer.init(alone), alone)[0])
    np.testing.assert_allclose(second["backbone/q/kernel"][0], update[1], rtol=1e-5, atol=1e-7)
    with pytest.raises(UserError, match="name: 'lion' is none of adam, muon"):
        make_optimizer(tree, lambda step: 0.1, name="lion")


def test_clip_by_the_norm_of_all():
    chain = make_optimizer(TRAINABLE, lambda step: 1.0, clip_norm=1.0)
    grads = jax.tree.map(lambda x: 100 * jnp.ones_like(x), TRAINABLE)
    _, state = chain.update(grads, chain.init(TRAINABLE), TRAINABLE)
    moments = next(s for s in state if isinstance(s, optax.ScaleByAdamState)).mu
    assert float(optax.tree.norm(moments)) == pytest.approx(0.1, rel=1e-4)  # (1 - b1) * 1


def test_frozen_leaves_have_no_moments():
    trainable, _ = split_params(PARAMS, ("reward_head",))
    state = make_optimizer(trainable, lambda step: 1.0).init(trainable)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert shapes == [(2, 1), (2, 1)]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state) if leaf.ndim)


@pytest.mark.parametrize(
    ("kind", "end"), [("constant", 2.0), ("linear", 0.2), ("cosine", 0.2)]
)
def test_schedules(kind, end):
    schedule = make_schedule(kind, 2.0, 10, 110, 0.1)
    values = np.array([float(schedule(step)) for step in (0, 5, 10, 110)])
    np.testing.assert_allclose(values, [0.0, 1.0, 2.0, end], rtol=1e-5)


def test_unknown_schedule():
    with pytest.raises(UserError, match="schedule: 'step'"):
        make_schedule("step", 1.0, 0, 10)
