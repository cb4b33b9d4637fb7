"""A policy: a small network, and the distribution of edit programs that it gives. Pure: jax only.

Whether an object is there, its fields and the background are categorical, knobs are Gaussian, and
all are independent given the problem. What an absent object would be is not part of a program, so
that log-probabilities, divergences and entropies count it only as far as the object is there.
They are exact, in nats.

Letters: as in `editing.py`; H hidden width, L all values of an object's fields.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrm_jax.rl.editing import FIELDS, GROUNDS, KNOBS, WHOLE, Features, Program

WIDTH = 64
LOW, HIGH = -3.5, 1.0  # of the logarithm of a knob's deviation
_ENDS = [sum(len(v) for v in [*FIELDS.values()][: i + 1]) for i in range(len(FIELDS))]
VALUES = _ENDS[-1]


class Choice(NamedTuple):
    """The distribution of programs, for each of N problems. Logits are normalised."""

    present_NO2: Any
    fields_NOL: tuple[Any, ...]  # one [N, O, values] for each field
    ground_NG: Any
    mean_NOV: Any
    scale_NOV: Any  # logarithm of the deviation
    picture_NW: Any  # means
    picture_scale_NW: Any
    possible_NO: Any


def init(key: jax.Array, slots: int, scene: int, width: int = WIDTH) -> dict[str, Any]:
    """Parameters for `slots` features of a slot and `scene` features of a problem."""
    sizes = {
        "slot_in": (slots, width), "scene_in": (scene, width),
        "slot_mid": (width, width), "pool_mid": (width, width), "scene_mid": (scene, width),
        "slot_out": (width, 1 + VALUES + 2 * KNOBS),
        "scene_hidden": (width + scene, width),
        "scene_out": (width, len(GROUNDS) + 2 * WHOLE),
    }  # fmt: skip
    keys = jax.random.split(key, len(sizes))
    params: dict[str, Any] = {}
    for k, (name, shape) in zip(keys, sizes.items(), strict=True):
        size = 0.01 if name.endswith("out") else 1.0
        params[name] = {"kernel": jax.random.normal(k, shape) * size / jnp.sqrt(shape[0])}
        if name not in ("scene_in", "pool_mid", "scene_mid"):  # added to one that has it
            params[name]["bias"] = jnp.zeros(shape[1])
    return params


def apply(params: dict[str, Any], features: Features) -> Choice:
    """The distribution of programs for each problem."""

    def linear(name: str, x: jax.Array) -> jax.Array:
        layer = params[name]
        return x @ layer["kernel"] + layer.get("bias", 0.0)

    slots_NOX, scene_NY, possible_NO = features
    own_NOH = jax.nn.gelu(linear("slot_in", slots_NOX) + linear("scene_in", scene_NY)[:, None])
    weight_NO1 = possible_NO[..., None].astype(own_NOH.dtype)
    pooled_NH = (own_NOH * weight_NO1).sum(1) / weight_NO1.sum(1)
    around_NH = linear("pool_mid", pooled_NH) + linear("scene_mid", scene_NY)
    hidden_NOH = own_NOH + jax.nn.gelu(linear("slot_mid", own_NOH) + around_NH[:, None])
    out = linear("slot_out", hidden_NOH)
    there = out[..., :1]
    logits, mean, scale = jnp.split(out[..., 1:], [VALUES, VALUES + KNOBS], axis=-1)
    whole = jax.nn.gelu(linear("scene_hidden", jnp.concatenate([pooled_NH, scene_NY], -1)))
    picture = linear("scene_out", whole)
    grounds = len(GROUNDS)
    return Choice(
        jax.nn.log_softmax(jnp.concatenate([-there, there], -1)),
        tuple(jax.nn.log_softmax(part) for part in jnp.split(logits, _ENDS[:-1], axis=-1)),
        jax.nn.log_softmax(picture[:, :grounds]),
        mean,
        _bounded(scale),
        picture[:, grounds : grounds + WHOLE],
        _bounded(picture[:, grounds + WHOLE :]),
        possible_NO,
    )


def _bounded(x: jax.Array) -> jax.Array:
    """Smoothly between LOW and HIGH; x = 0 is a deviation of about 0.3."""
    return LOW + (HIGH - LOW) * jax.nn.sigmoid(x)


def sample(choice: Choice, key: jax.Array) -> Program:
    """One program for each problem."""
    keys = jax.random.split(key, 4 + len(FIELDS))
    present = jax.random.categorical(keys[0], choice.present_NO2)
    fields = [
        jax.random.categorical(k, logits)
        for k, logits in zip(keys[4:], choice.fields_NOL, strict=True)
    ]
    noise = jax.random.normal(keys[2], choice.mean_NOV.shape)
    picture = jax.random.normal(keys[3], choice.picture_NW.shape)
    return Program(
        (present * choice.possible_NO).astype(jnp.int32),
        jnp.stack(fields, -1).astype(jnp.int32),
        jax.random.categorical(keys[1], choice.ground_NG).astype(jnp.int32),
        choice.mean_NOV + jnp.exp(choice.scale_NOV) * noise,
        choice.picture_NW + jnp.exp(choice.picture_scale_NW) * picture,
    )


def log_prob(choice: Choice, program: Program) -> jax.Array:
    """float32 [N], nats; a density where it is about knobs."""
    present_NO = _picked(choice.present_NO2, program.present_NO)
    inner_NO = sum(
        _picked(logits, program.fields_NOF[..., number])
        for number, logits in enumerate(choice.fields_NOL)
    )
    inner_NO += _normal(program.knobs_NOV, choice.mean_NOV, choice.scale_NOV).sum(-1)
    whole_N = _picked(choice.ground_NG, program.ground_N)
    whole_N += _normal(program.picture_NW, choice.picture_NW, choice.picture_scale_NW).sum(-1)
    slots_NO = present_NO + program.present_NO * inner_NO
    return whole_N + (slots_NO * choice.possible_NO).sum(-1)


def _picked(logits: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]


def _normal(x: jax.Array, mean: jax.Array, scale: jax.Array) -> jax.Array:
    return -0.5 * jnp.square((x - mean) * jnp.exp(-scale)) - scale - 0.5 * jnp.log(2 * jnp.pi)


def divergence(choice: Choice, base: Choice) -> jax.Array:
    """float32 [N]: KL(choice || base) in nats, closed-form.

    Written so that where the two are equal not only the value but each term of its gradient is
    exactly zero: Adam would make whole steps of what rounding leaves.
    """
    inner_NO = sum(
        _categorical(mine, theirs)
        for mine, theirs in zip(choice.fields_NOL, base.fields_NOL, strict=True)
    )
    inner_NO += _gaussian(choice.mean_NOV, choice.scale_NOV, base.mean_NOV, base.scale_NOV).sum(-1)
    whole_N = _categorical(choice.ground_NG, base.ground_NG)
    whole_N += _gaussian(
        choice.picture_NW, choice.picture_scale_NW, base.picture_NW, base.picture_scale_NW
    ).sum(-1)
    there_NO = jnp.exp(choice.present_NO2[..., 1])
    slots_NO = _categorical(choice.present_NO2, base.present_NO2) + there_NO * inner_NO
    return whole_N + (slots_NO * choice.possible_NO).sum(-1)


def _categorical(mine: jax.Array, theirs: jax.Array) -> jax.Array:
    """sum p (log p - log q), plus sum q - sum p, which is nothing, as sum p f(log p - log q): f and
    its slope are zero where its argument is."""
    gap = mine - theirs
    return (jnp.exp(mine) * (gap + jnp.expm1(-gap))).sum(-1)


def _gaussian(mean: jax.Array, scale: jax.Array, mean0: jax.Array, scale0: jax.Array) -> jax.Array:
    ratio = scale - scale0
    return 0.5 * (jnp.expm1(2 * ratio) + jnp.square((mean - mean0) * jnp.exp(-scale0))) - ratio


def entropy(choice: Choice) -> tuple[jax.Array, jax.Array]:
    """float32 [N] each, nats: of all choices, and of all knobs (a differential entropy)."""
    there_NO = jnp.exp(choice.present_NO2[..., 1]) * choice.possible_NO
    fields_NO = sum(_spread(logits) for logits in choice.fields_NOL)
    choices_N = (_spread(choice.present_NO2) * choice.possible_NO + there_NO * fields_NO).sum(-1)
    half = 0.5 * jnp.log(2 * jnp.pi * jnp.e)
    knobs_N = (there_NO * (choice.scale_NOV + half).sum(-1)).sum(-1)
    knobs_N += (choice.picture_scale_NW + half).sum(-1)
    return choices_N + _spread(choice.ground_NG), knobs_N


def _spread(logits: jax.Array) -> jax.Array:
    return -(jnp.exp(logits) * logits).sum(-1)
