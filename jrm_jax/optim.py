"""What is trained, and how fast: tables of path patterns, schedules, the optax chain.

A pattern is a regular expression searched for in a '/'-joined path, such as
`backbone/vision/` or `norm/scale$`. A pattern that matches nothing is an error.
"""

import difflib
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from jrm_jax.errors import UserError


def flatten(tree: dict, prefix: str = "") -> dict[str, jax.Array]:
    """{'a': {'b': x}} -> {'a/b': x}; empty dicts vanish."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat.update(flatten(value, path + "/") if isinstance(value, dict) else {path: value})
    return flat


def unflatten(flat: dict) -> dict:
    """The inverse of `flatten`."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def check_patterns(patterns: Sequence[str], paths: Sequence[str], field: str) -> None:
    """UserError that lists every pattern without a match, with the nearest paths."""
    bad = []
    for pattern in patterns:
        try:
            found = any(re.search(pattern, path) for path in paths)
        except re.error as error:
            raise UserError(f"{field}: {pattern!r} is no regular expression ({error})") from None
        if not found:
            near = difflib.get_close_matches(pattern, paths, n=2, cutoff=0.3)
            bad.append(f"{pattern!r}" + (f" (near: {', '.join(near)})" if near else ""))
    if bad:
        raise UserError(f"{field}: no parameter matches {'; '.join(bad)}")


def split_params(params: dict, patterns: Sequence[str]) -> tuple[dict, dict]:
    """(trainable, frozen): nested dicts, every leaf in exactly one of them."""
    flat = flatten(params)
    check_patterns(patterns, list(flat), "config.trainable")
    chosen = {path for path in flat if any(re.search(pattern, path) for pattern in patterns)}
    trainable = unflatten({path: flat[path] for path in flat if path in chosen})
    return trainable, unflatten({path: flat[path] for path in flat if path not in chosen})


def merge_params(trainable: dict, frozen: dict) -> dict:
    """The whole tree again; `language_head` of a tied model has no leaves and is put back."""
    merged = unflatten({**flatten(frozen), **flatten(trainable)})
    merged.setdefault("language_head", {})
    return merged


def make_schedule(
    kind: str, learning_rate: float, warmup_steps: int, total_steps: int, final_scale: float = 0.0
) -> Callable:
    """step -> learning rate; linear warm-up from 0, then 'constant', 'linear' or 'cosine'."""
    rest = max(1, total_steps - warmup_steps)
    table = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, learning_rate * final_scale, rest),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest, final_scale),
    }
    if kind not in table:
        raise UserError(f"config.optimizer.schedule: {kind!r} is none of {', '.join(table)}")
    warmup = optax.linear_schedule(0.0, learning_rate, max(1, warmup_steps))
    return optax.join_schedules([warmup, table[kind]()], [warmup_steps])


def make_optimizer(
    trainable: dict,
    schedule: Callable,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_patterns: Sequence[str] = ("kernel$",),
    clip_norm: float = 1.0,
    groups: Sequence[tuple[str, float]] = (),
) -> optax.GradientTransformation:
    """Clip by global norm, Adam with float32 moments, decay, per-group rate, schedule.

    `groups`: (pattern, multiplier of the learning rate); the first match counts, others are 1.
    """
    paths = list(flatten(trainable))
    check_patterns([pattern for pattern, _ in groups], paths, "config.optimizer.groups")
    if weight_decay:
        check_patterns(decay_patterns, paths, "config.optimizer.decay_patterns")

    def table(value: Callable[[str], object]) -> dict:
        return unflatten({path: value(path) for path in paths})

    def multiplier(path: str) -> float:
        return next((scale for pattern, scale in groups if re.search(pattern, path)), 1.0)

    chain = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    chain.append(optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.float32))
    if weight_decay:
        mask = table(lambda path: any(re.search(pattern, path) for pattern in decay_patterns))
        chain.append(optax.add_decayed_weights(weight_decay, mask))
    if groups:
        scales = table(multiplier)
        chain.append(
            optax.stateless(
                lambda updates, _: jax.tree.map(lambda u, scale: u * scale, updates, scales)
            )
        )
    chain.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*chain)
