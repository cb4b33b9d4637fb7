"""The gated delta rule and its convolution against `transformers`; inert slots."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot_case import SMALL_HYBRID
from jax.lax import Precision

from jrm_jax.model import delta

torch = pytest.importorskip("torch")
modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")

ROWS, HEADS, VALUE_HEADS, KEY, VALUE = 2, 2, 4, 16, 24
NAMES = ("q", "k", "v", "g", "beta", "state")
THEIRS = {
    "chunk": modeling.torch_chunk_gated_delta_rule,
    "recurrent": modeling.torch_recurrent_gated_delta_rule,
}


def make_inputs(slots: int, decay: float = 0.1, alike: float = 0.0) -> dict[str, np.ndarray]:
    """`decay`: the largest of a token, as -g; `alike`: how much all keys share."""
    rng = np.random.default_rng(slots)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(ROWS, *shape)).astype(np.float32)

    keys = normal(slots, HEADS, KEY)
    inputs = {
        "q": normal(slots, HEADS, KEY),
        "k": alike * keys[:, :1] + (1 - alike) * keys,
        "v": normal(slots, VALUE_HEADS, VALUE),
        "g": -decay * rng.uniform(size=(ROWS, slots, VALUE_HEADS)).astype(np.float32),
        "beta": rng.uniform(size=(ROWS, slots, VALUE_HEADS)).astype(np.float32),
        "state": normal(VALUE_HEADS, KEY, VALUE),
    }
    return {name: np.asarray(value, np.float32) for name, value in inputs.items()}


def run_torch(kind: str, inputs: dict, weights: tuple) -> tuple[list, dict]:
    """([outputs, last state], gradients of their weighted sum)."""
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in inputs.items()}
    *arguments, state = (leaves[name] for name in NAMES)
    results = THEIRS[kind](
        *arguments, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    sum((x * torch.tensor(w)).sum() for x, w in zip(results, weights, strict=True)).backward()
    grads = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
    return [x.detach().numpy() for x in results], grads


@functools.cache
def compiled(rule):
    def loss(inputs: dict, weights: tuple):
        results = rule(*(inputs[name] for name in NAMES))
        return sum(jnp.sum(x * w) for x, w in zip(results, weights, strict=True)), results

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run_ours(inputs: dict, weights: tuple, rule=delta.gated_delta) -> tuple[list, dict]:
    (_, results), grads = compiled(rule)(inputs, weights)
    return [np.asarray(x) for x in results], {k: np.asarray(v) for k, v in grads.items()}


def make_weights(slots: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes = (ROWS, slots, VALUE_HEADS, VALUE), (ROWS, VALUE_HEADS, KEY, VALUE)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("slots", [150, 128, 3])  # no multiple of a chunk, one, less than one
def test_the_rule_is_that_of_torch(kind, slots):
    inputs, weights = make_inputs(slots), make_weights(slots)
    theirs, their_grads = run_torch(kind, inputs, weights)
    ours, grads = run_ours(inputs, weights)
    for mine, yours in zip(ours, theirs, strict=True):
        assert error(mine, yours) < 2e-6
    errors = {name: error(grads[name], their_grads[name]) for name in NAMES}
    print(f"{kind} {slots}: worst gradient {max(errors.values()):.1e}")
    assert max(errors.values()) < 5e-6, errors


def test_strong_decay_and_equal_keys_stay_finite_and_right():
    weights = make_weights(150)
    for options in ({"decay": 20.0}, {"decay": 0.0, "alike": 0.999}):
        inputs = make_inputs(150, **options)
        theirs, their_grads = run_torch("recurrent", inputs, weights)
        ours, grads = run_ours(inputs, weights)
        errors = {name: error(grads[name], their_grads[name]) for name in NAMES}
        errors["o"] = error(ours[0], theirs[0])
        errors["last"] = error(ours[1], theirs[1])
        print(options, {name: f"{value:.1e}" for name, value in errors.items()})
        assert max(errors.values()) < 5e-5, errors  # torch's chunks are as far from its tokens
    inputs = make_inputs(150)
    inputs["g"] = np.full_like(inputs["g"], -20.0)
    ours, grads = run_ours(inputs, weights)
    assert all(np.isfinite(x).all() for x in [*ours, *grads.values()])


def test_one_token_after_another_is_the_rule_of_them_all():
    inputs = make_inputs(5)
    expected, state = delta.gated_delta(*inputs.values())
    held = inputs["state"]
    for slot in range(5):
        one = [inputs[name][:, slot : slot + 1] for name in NAMES[:5]]
        out, held = delta.gated_delta_step(*one, held)
        assert error(np.asarray(out[:, 0]), np.asarray(expected[:, slot])) < 2e-6
    assert error(np.asarray(held), np.asarray(state)) < 2e-6


def test_inert_slots_change_no_bit_and_get_no_gradient():
    inputs, (weight, last) = make_inputs(150), make_weights(150)
    for name in ("g", "beta"):
        inputs[name][:, 70:] = 0
    weight[:, 70:] = 0
    (out, state), grads = run_ours(inputs, (weight, last))
    for name in ("q", "k", "v"):
        assert not grads[name][:, 70:].any() and grads[name][:, :70].any()
        inputs[name] = inputs[name].copy()
        inputs[name][:, 70:] *= 100
    (other_out, other), other_grads = run_ours(inputs, (weight, last))
    np.testing.assert_array_equal(other, state)
    np.testing.assert_array_equal(other_out[:, :70], out[:, :70])
    np.testing.assert_array_equal(other_grads["state"], grads["state"])
    fewer = {name: x if name == "state" else x[:, :70] for name, x in inputs.items()}
    (out, short), _ = run_ours(fewer, (weight[:, :70], last))
    np.testing.assert_array_equal(short, state)
    np.testing.assert_array_equal(other_out[:, :70], out)


def test_a_chunk_is_inverted_by_products_alone():
    rng = np.random.default_rng(0)
    lower = np.tril(rng.normal(size=(3, 64, 64)), -1).astype(np.float32) * 0.2
    full = np.eye(64) + lower.astype(np.float64)
    ours = np.asarray(delta.invert(lower, Precision.HIGHEST))
    assert error(ours, np.linalg.inv(full)) < 1e-6
    program = jax.jit(delta.invert, static_argnums=1).lower(lower, Precision.HIGHEST)
    assert "triangular_solve" not in program.as_text()


def test_training_asks_for_three_passes_and_float32_for_all():
    """JAX's default would be one bfloat16 pass on TPU: no product of the rule may be left to it."""
    arguments = tuple(make_inputs(70).values())
    for name, dots in ((Precision.HIGH, "HIGH"), (Precision.HIGHEST, "HIGHEST")):
        rule = functools.partial(delta.gated_delta, precision=name)
        step = functools.partial(delta.gated_delta_step, precision=name)
        one = (*(x[:, :1] for x in arguments[:5]), arguments[5])

        def total(rule, *arguments):
            return sum(jnp.sum(x) for x in rule(*arguments))

        for run, given in ((rule, arguments), (step, one)):
            text = jax.jit(jax.grad(functools.partial(total, run), argnums=range(6))).lower(*given)
            products = [x for x in text.as_text().splitlines() if "dot_general" in x]
            assert products and all(f"precision = [{dots}, {dots}]" in x for x in products)
    segments = (np.ones((1, 3), np.int32), np.ones((1, 2, 4), np.int32))
    for dtype, dots in ((jnp.bfloat16, "HIGH"), (jnp.float32, "HIGHEST")):
        mixer, x = delta.DeltaMixer(SMALL_HYBRID.text, dtype), np.ones((1, 11, 32), np.float32)
        shapes = jax.eval_shape(mixer.init, jax.random.key(0), x, segments, None)
        text = jax.jit(mixer.apply).lower(shapes, x, segments, None).as_text()
        wide = [x for x in text.splitlines() if "dot_general" in x and "bf16" not in x]
        assert len(wide) > 15 and all(f"precision = [{dots}, {dots}]" in x for x in wide)


def test_the_convolution_is_that_of_torch_and_goes_on_from_a_window():
    rng = np.random.default_rng(3)
    x, taps = (rng.normal(size=s).astype(np.float32) for s in ((ROWS, 9, 6), (4, 6)))
    theirs = modeling.causal_conv1d_fn(
        torch.tensor(x).swapaxes(1, 2), torch.tensor(taps).T, activation="silu"
    )
    theirs = theirs.swapaxes(1, 2).numpy()
    nothing = np.zeros((ROWS, 3, 6), np.float32)
    assert error(np.asarray(delta.convolve(nothing, x, taps)), theirs) < 1e-6
    for length in (0, 1, 2, 3, 6):  # a prompt of one token reaches into the zeros before it
        padded = np.concatenate([x[:, :length], np.full((ROWS, 4, 6), 9, np.float32)], axis=1)
        window = delta.last_rows(nothing, padded, jnp.full(ROWS, length))
        ours = np.asarray(delta.convolve(window, x[:, length:], taps))
        assert error(ours, theirs[:, length:]) < 1e-6
