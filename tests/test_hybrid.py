"""A decoder whose layers hand on a state: short prompts, padding, what a run keeps and refuses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot_case import SMALL, SMALL_HYBRID
from parity_case import QUICK, relative

from configs import joint
from jrm_jax import build, lora
from jrm_jax.data.pipeline import repeat_prompt
from jrm_jax.errors import UserError
from jrm_jax.model.backbone import Backbone, cast_projections, empty_inputs, init_backbone
from jrm_jax.model.delta import DeltaMixer
from jrm_jax.model.weights import abstract_params
from jrm_jax.optim import flatten
from jrm_jax.planning import compiling

PROMPT, LENGTHS, SLOTS = 5, (4, 9), 10
NO_PICTURES = np.zeros((1, 0, 0, SMALL_HYBRID.vision.features), np.float32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_backbone(key, SMALL_HYBRID))(jax.random.key(1))["backbone"]


def make_batch(prompt: int) -> dict[str, np.ndarray]:
    """A prompt of so many tokens and two candidates of different lengths, text alone."""
    rng = np.random.default_rng(0)
    real = np.arange(PROMPT) < prompt
    own = np.stack([np.arange(SLOTS) < length for length in LENGTHS])
    places = np.broadcast_to(prompt + np.arange(SLOTS), (2, 3, SLOTS))
    batch = {
        "prompt_tokens": np.where(real, rng.integers(1, 90, PROMPT), 0),
        "prompt_positions": np.broadcast_to(np.arange(PROMPT), (3, PROMPT)),
        "prompt_segments": real,
        "prompt_visual": np.full(PROMPT, -1),
        "candidate_tokens": np.where(own, rng.integers(1, 90, (2, SLOTS)), 0),
        "candidate_positions": places,
        "candidate_segments": own,
        "candidate_visual": np.full((2, SLOTS), -1),
        "reward_index": np.array([2, 3]),
        "candidate_mask": np.ones(2),
        "critique_index": np.array([[2], [3]]),
    }
    return {name: value[None].astype(np.int32) for name, value in batch.items()}


@functools.cache
def compiled(**fields):
    backbone = Backbone(SMALL_HYBRID, attention="xla", **fields)

    def run(params, batch, weights_SD):
        hidden = backbone.apply({"params": params}, batch, jnp.zeros(32), NO_PICTURES)[0]
        return jnp.sum(hidden * weights_SD), hidden

    return jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options=QUICK)


def run(params, batch, **fields) -> tuple[np.ndarray, dict]:
    slots = batch["prompt_tokens"].shape[1] + batch["candidate_tokens"][0].size
    weights = np.random.default_rng(3).normal(size=(slots, 32)).astype(np.float32)
    (_, hidden), grads = compiled(**fields)(params, batch, weights)
    return np.asarray(hidden), flatten(grads)


@pytest.mark.parametrize("prompt", [1, 2, 3])
def test_a_prompt_shorter_than_the_window_is_shared(params, prompt):
    batch = make_batch(prompt)
    shared, _ = run(params, batch)
    apart, _ = run(params, repeat_prompt(batch))
    for row, length in enumerate(LENGTHS):
        own = shared[PROMPT + row * SLOTS :][:length]
        first = row * (PROMPT + SLOTS) + prompt
        assert relative(own, apart[first : first + length]) < 1e-5
        assert relative(shared[:prompt], apart[first - prompt : first]) < 1e-5


def test_what_is_computed_again_changes_nothing(params):
    hidden, grads = run(params, make_batch(3))
    again, other = run(params, make_batch(3), remat="dots", scan_unroll=True)
    assert relative(again, hidden) < 1e-5
    for path, grad in grads.items():
        if np.any(grad):
            assert relative(other[path], grad) < 1e-4, path


def test_padding_changes_no_bit_and_gets_no_gradient():
    mixer = DeltaMixer(SMALL_HYBRID.text, jnp.float32)
    batch = make_batch(3)
    segments = (batch["prompt_segments"], batch["candidate_segments"])
    real = np.concatenate([segments[0], segments[1].reshape(1, -1)], axis=1)[..., None] > 0
    x = np.random.default_rng(1).normal(size=(1, real.size, 32)).astype(np.float32)
    make = jax.jit(lambda key: mixer.init(key, x, segments, None), compiler_options=QUICK)
    variables = make(jax.random.key(0))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def states(x):
        def total(x):
            out, cache = mixer.apply(variables, x, segments, None)
            used = jnp.sum(jnp.where(real, out, 0) ** 2) + jnp.sum(cache.state) ** 2
            return used + jnp.sum(cache.window**2), (out, cache)

        return jax.value_and_grad(total, has_aux=True)(x)

    (_, (out, cache)), grad = states(x)
    assert not np.asarray(grad)[~real[..., 0]].any()
    assert np.abs(np.asarray(grad)[real[..., 0]]).min(axis=-1).max() > 0
    (_, (other, held)), _ = states(np.where(real, x, 1e3))
    for mine, yours in zip(cache, held, strict=True):
        np.testing.assert_array_equal(mine, yours)
    np.testing.assert_array_equal(np.where(real, out, 0), np.where(real, other, 0))
    assert out.dtype == jnp.float32 and cache.state.dtype == jnp.float32


def test_critiques_behind_a_barrier_are_refused():
    config = joint.get_config("qwen3_5_9b")
    config.loss.through_reward = True
    with pytest.raises(UserError, match="config.loss.through_reward is True, .* set it to False"):
        compiling.architecture(config)
    build.check_losses(config, SMALL)
    backbone = Backbone(SMALL_HYBRID, attention="xla", through_reward=True)
    inputs, reward, pixels = empty_inputs(SMALL_HYBRID)
    inputs["reward_index"] = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="neither deepstack features nor barriers"):
        jax.eval_shape(backbone.init, jax.random.key(0), inputs, reward, pixels)


def test_what_decays_a_state_stays_float32_when_frozen():
    config = joint.get_config("qwen3_5_9b")
    config.lora.rank = 4
    state, _ = build.abstract_state(config, SMALL_HYBRID, build.make_mesh(config, SMALL_HYBRID))
    wide = {path for path, leaf in flatten(state.frozen).items() if leaf.dtype == jnp.float32}
    delta = "backbone/decoder/blocks/delta/mixer/"
    assert wide == {delta + "A_log", delta + "norm/scale"}


def test_adapters_stand_beside_every_projection():
    targets = tuple(joint.get_config().lora.targets)
    found = flatten(lora.adapter_shapes(abstract_params(SMALL_HYBRID), 4, targets))
    places = {path.rpartition("/")[0].removeprefix("backbone/decoder/blocks/") for path in found}
    mlps = {f"{kind}/mlp/{part}" for kind in ("delta", "full") for part in ("gate", "up", "down")}
    assert places == mlps | {f"full/attn/{part}" for part in "qkvo"} | {
        f"delta/mixer/{part}" for part in ("qkv", "z", "a", "b", "out")
    }
    assert found["backbone/decoder/blocks/delta/mixer/out/lora_a"].shape == (4, 48, 4)


def test_every_projection_is_cast_once():
    shapes = abstract_params(SMALL_HYBRID)["backbone"]
    cast = flatten(jax.eval_shape(lambda tree: cast_projections(tree, jnp.bfloat16), shapes))
    wide = {path for path, leaf in cast.items() if leaf.dtype == jnp.float32}
    assert {path for path in wide if path.endswith("kernel")} == {"vision/patch_embed/kernel"}
    assert all(path in wide for path in cast if not path.endswith("kernel"))
