"""The step on real groups of the built-in world: accumulation, weights, unused paths."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_case import (  # noqa: F401  fixtures among them
    BUCKET,
    HALF,
    change,
    deepstack_backbone,
    jit,
    lay,
    plain,
    world,
)

from jrm_jax.heads import init_words_head
from jrm_jax.model import backbone as backbone_module
from jrm_jax.model.backbone import normalise_patches
from jrm_jax.optim import flatten, split_params
from jrm_jax.step import (
    LossConfig,
    TrainState,
    make_eval_step,
    make_forward,
    make_train_step,
)


@pytest.fixture(scope="module")
def evaluate(world):
    """evaluate(params, batch) -> (terms, rewards), compiled once for each shape."""
    _, backbone, _, _ = world
    loss = LossConfig(1.0, 1.0, first_weight=5.0)
    step = jit(make_eval_step(make_forward(backbone, HALF, HALF, loss)))
    return lambda params, batch: step(*split_params(params, (".*",)), batch)


def make_state(params, optimizer, patterns=(".*",)):
    trainable, frozen = split_params(params, patterns)
    return TrainState(jnp.int32(0), trainable, frozen, optimizer.init(trainable))


def test_uneven_microbatches_equal_one_batch(world, plain):
    (encoder, *_, groups), (backbone, params) = world, plain
    # critiques and labels fall unevenly on the microbatches, one row is filler
    groups = [change(group, 0, critique=None) for group in groups[:3]] + groups[3:7] + [None]
    batch = lay(encoder, groups)
    loss = LossConfig(1.0, 0.5, 0.1, 0.1)
    forward, optimizer = make_forward(backbone, HALF, HALF, loss), optax.sgd(0.5)
    found = {}
    for parts in (1, 2, 4):
        step = jit(make_train_step(forward, optimizer, loss, parts))
        found[parts] = step(make_state(params, optimizer), batch)
    for parts in (2, 4):
        for (path, one), many in zip(
            flatten(found[1][0].trainable).items(),
            flatten(found[parts][0].trainable).values(), strict=True,
        ):  # fmt: skip
            np.testing.assert_allclose(one, many, rtol=2e-5, atol=2e-6, err_msg=path)
        one, many = found[1][1], found[parts][1]
        assert one.keys() == many.keys()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), one, many)


def measured(step, names):
    """step(state, batch) -> (next state's number, metrics of these names): what is not asked for,
    the update among it, is not compiled."""

    def run(state, batch):
        state, metrics = step(state, batch)
        return state.step, {name: metrics[name] for name in names}

    return jit(run)


def test_the_first_token_of_a_critique_may_weigh_more(world, evaluate):
    encoder, backbone, params, groups = world
    optimizer, batch = optax.sgd(0.0), lay(encoder, groups[:2])
    first = {**batch, "critique_weights": batch["critique_weights"].at[..., 1:].set(0.0)}
    terms = {}
    for weight, parts in ((1.0, {"all": batch, "first": first}), (5.0, {"more": batch})):
        loss = LossConfig(0.0, 1.0, first_weight=weight)
        step = make_train_step(make_forward(backbone, HALF, HALF, loss), optimizer, loss)
        step = measured(step, ("loss", "language"))
        for name, part in parts.items():
            _, metrics = step(make_state(params, optimizer), part)
            terms[name] = np.asarray(metrics["language"])
            assert metrics["loss"] == pytest.approx(terms[name][0] / terms[name][1], rel=1e-5)
    np.testing.assert_allclose(terms["more"], terms["all"] + 4 * terms["first"], rtol=1e-5)
    seen, _ = evaluate(params, batch)
    np.testing.assert_allclose(seen["language"], terms["all"], rtol=1e-5)  # evaluation is plain


def test_the_language_weight_may_fade(world):
    encoder, backbone, params, groups = world
    optimizer, batch, total = optax.sgd(0.0), lay(encoder, groups[:2]), 5
    loss = LossConfig(1.0, 2.0, language_end=0.25)
    forward = make_forward(backbone, HALF, HALF, loss)
    step = make_train_step(forward, optimizer, loss, 1, total)
    step = measured(step, ("loss", "preference", "language"))
    state = make_state(params, optimizer)
    for share in (1.0, 0.8125, 0.625, 0.4375, 0.25, 0.25):  # and stays where it ended
        number, metrics = step(state, batch)
        state = state._replace(step=number)
        means = {n: metrics[n].sum / metrics[n].weight for n in ("preference", "language")}
        expected = means["preference"] + 2.0 * share * means["language"]
        assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_the_words_of_a_critique_teach_the_state_that_is_scored(world, plain):
    (encoder, *_, groups), (backbone, params) = world, plain
    params = {**params, "words_head": init_words_head(backbone.config.text.hidden)}
    loss = LossConfig(1.0, 0.0, words_weight=1.0)
    forward = make_forward(backbone, HALF, HALF, loss)

    def words(params, batch):
        return forward(params, batch).terms["words"].sum

    batch = lay(encoder, groups[:2])
    assert set(jax.eval_shape(forward, params, batch).terms) == {"preference", "words"}
    gradient = jit(jax.grad(words))(params, batch)
    assert np.any(gradient["words_head"]["kernel"]) and np.any(gradient["reward_embedding"])
    assert np.any(gradient["backbone"]["vision"]["patch_embed"]["kernel"])
    assert not np.any(gradient["reward_head"]["kernel"])


def test_filler_rows_count_nothing(world, evaluate):
    encoder, _, params, groups = world
    terms, _ = evaluate(params, lay(encoder, [groups[0], groups[1]]))
    filled, _ = evaluate(params, lay(encoder, [groups[0], None, groups[1], None]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), terms, filled)


def test_unused_paths_are_not_there(world):
    encoder, backbone, params, groups = world
    vocab = backbone.config.text.vocab
    batch = lay(encoder, groups[:2])

    def program(loss, batch=batch):
        forward = make_forward(backbone, HALF, HALF, loss)
        program, shape = jax.make_jaxpr(forward, return_shape=True)(params, batch)
        return shape, str(program)

    both, text = program(LossConfig(1.0, 1.0))
    assert set(both.terms) == {"preference", "language"} and f",{vocab}]" in text
    ranking, text = program(LossConfig(1.0, 0.0))
    assert set(ranking.terms) == {"preference"} and f",{vocab}]" not in text
    generative, _ = program(LossConfig(0.0, 1.0))
    assert set(generative.terms) == {"language"} and generative.reward_BKR is None
    short = lay(dataclasses.replace(encoder, language=False), groups[:2],
                dataclasses.replace(BUCKET, candidate=32, critique=0))  # fmt: skip
    assert set(program(LossConfig(1.0, 1.0), short)[0].terms) == {"preference"}


def test_frozen_parameters_stay_and_have_no_moments(world):
    encoder, backbone, params, groups = world
    loss, optimizer = LossConfig(1.0, 1.0), optax.adam(1e-2)
    step = jit(make_train_step(make_forward(backbone, HALF, HALF, loss), optimizer, loss))
    before = make_state(params, optimizer, ("reward_head", "decoder/norm"))
    after, metrics = step(before, lay(encoder, groups[:2]))
    jax.tree.map(np.testing.assert_array_equal, before.frozen, after.frozen)
    start = flatten(before.trainable)
    moved = {path: np.any(leaf != start[path]) for path, leaf in flatten(after.trainable).items()}
    assert moved == {"reward_head/kernel": True, "backbone/decoder/norm/scale": True}
    assert len(jax.tree.leaves(after.opt_state)) == 1 + 2 * len(moved)
    assert int(after.step) == 1 and np.isfinite(metrics["param_norm"])


def test_a_parameter_that_is_not_finite_is_seen(world):
    encoder, backbone, params, groups = world
    loss, optimizer = LossConfig(1.0, 0.0), optax.sgd(jnp.inf)
    step = jit(make_train_step(make_forward(backbone, HALF, HALF, loss), optimizer, loss))
    state = make_state(params, optimizer, ("reward_head", "decoder/norm"))
    _, metrics = step(state, lay(encoder, groups[:2]))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["param_norm"])


def test_pixels_have_gradients(world):
    encoder, backbone, params, groups = world
    batch = lay(encoder, groups[:1])
    patches = normalise_patches(batch["patches"], HALF, HALF)

    def total(patches):
        hidden = backbone.apply(
            {"params": params["backbone"]}, batch, params["reward_embedding"], patches
        )
        slot = BUCKET.prompt + batch["reward_index"][0, 0]
        return (hidden[0, slot] @ params["reward_head"]["kernel"])[0]

    grad = jit(jax.grad(total))(patches)
    assert np.isfinite(grad).all() and np.any(grad[0, 0]) and np.any(grad[0, 1])
    assert not np.any(grad[0, 2:])  # pictures of the other candidates


def test_threads_trace_one_after_the_other(world, monkeypatch):
    """flax changes classes while it traces."""
    encoder, backbone, params, groups = world
    inside, most, original = [], [], backbone_module.decoder_rotary

    def slow(*arguments):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.2)
        inside.pop()
        return original(*arguments)

    monkeypatch.setattr(backbone_module, "decoder_rotary", slow)
    batch = lay(encoder, groups[:1])

    def trace(_):
        return jax.eval_shape(make_forward(backbone, HALF, HALF, LossConfig()), params, batch)

    with ThreadPoolExecutor(2) as pool:
        assert len({str(found.reward_BKR) for found in pool.map(trace, range(2))}) == 1
    assert most == [1, 1]
