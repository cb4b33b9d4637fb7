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
import optax.contrib

from jrm_jax.errors import UserError
from jrm_jax.model.tensors import flatten, unflatten


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


def matching(patterns: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The paths in which any of the patterns is found, in order."""
    return [path for path in paths if any(re.search(pattern, path) for pattern in patterns)]


def split_params(params: dict, patterns: Sequence[str]) -> tuple[dict, dict]:
    """(trainable, frozen): nested dicts, every leaf in exactly one of them."""
    flat = flatten(params)
    check_patterns(patterns, list(flat), "config.trainable")
    chosen = set(matching(patterns, list(flat)))
    trainable = unflatten({path: flat[path] for path in flat if path in chosen})
    return trainable, unflatten({path: flat[path] for path in flat if path not in chosen})


def merge_params(trainable: dict, frozen: dict) -> dict:
    """The whole tree again; `language_head` of a tied model has no leaves and is put back."""
    merged = unflatten({**flatten(frozen), **flatten(trainable)})
    merged.setdefault("language_head", {})
    return merged


# kind -> (learning rate, its share at the end, steps) -> what comes after the warm-up
SCHEDULES = {
    "constant": lambda rate, final, steps: optax.constant_schedule(rate),
    "linear": lambda rate, final, steps: optax.linear_schedule(rate, rate * final, steps),
    "cosine": lambda rate, final, steps: optax.cosine_decay_schedule(rate, steps, final),
}


def make_schedule(
    kind: str, learning_rate: float, warmup_steps: int, total_steps: int, final_scale: float = 0.0
) -> Callable:
    """step -> learning rate; linear warm-up from 0, then 'constant', 'linear' or 'cosine'."""
    if kind not in SCHEDULES:
        raise UserError(f"config.optimizer.schedule: {kind!r} is none of {', '.join(SCHEDULES)}")
    main = SCHEDULES[kind](learning_rate, final_scale, max(1, total_steps - warmup_steps))
    warmup = optax.linear_schedule(0.0, learning_rate, max(1, warmup_steps))
    return optax.join_schedules([warmup, main], [warmup_steps])


def _adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.float32)


def takes_muon(path: str) -> bool:
    """Every kernel of the backbone."""
    return path.startswith("backbone/") and path.endswith("kernel")


def _muon(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def matrices(params: dict) -> dict:
        # Axes before the last two count layers or frames: so many matrices of their own.
        chosen = {path: matrix if takes_muon(path) else None for path in flatten(params)}
        return unflatten(chosen)

    return optax.contrib.muon(
        learning_rate=-1.0,  # the sign is turned, and the rate set, at the end of the chain
        eps=eps,
        adam_b1=b1,
        adam_b2=b2,
        mu_dtype=jnp.float32,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    )


SCALINGS = {"adam": _adam, "muon": _muon}


def multiplier(groups: Sequence[tuple[str, float]], path: str) -> float:
    """Of a parameter's learning rate: that of the first pattern found in its path, else 1."""
    return next((scale for pattern, scale in groups if re.search(pattern, path)), 1.0)


def make_optimizer(
    trainable: dict,
    schedule: Callable,
    *,
    name: str = "adam",
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_patterns: Sequence[str] = ("kernel$",),
    clip_norm: float = 1.0,
    groups: Sequence[tuple[str, float]] = (),
    others: Sequence[str] = (),
) -> optax.GradientTransformation:
    """Clip by global norm, Adam or Muon with float32 moments, decay, per-group rate, schedule.

    `name`: 'adam', or 'muon' for every kernel of the backbone (each layer's on its own) and
    Nesterov's Adam for the rest; its updates have the size of Adam's, so a learning rate means the
    same for both (Liu et al., arXiv 2502.16982).
    `groups`: (pattern, multiplier of the learning rate); the first match counts, others are 1.
    `others`: paths of what does not learn; a pattern may be found in these alone.

    Raises:
        UserError: a pattern is found in no parameter at all.
    """
    paths = list(flatten(trainable))
    known = [*paths, *others]
    check_patterns([pattern for pattern, _ in groups], known, "config.optimizer.groups")
    if weight_decay:
        check_patterns(decay_patterns, known, "config.optimizer.decay_patterns")

    def table(value: Callable[[str], object]) -> dict:
        return unflatten({path: value(path) for path in paths})

    chain = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if name not in SCALINGS:
        raise UserError(f"config.optimizer.name: {name!r} is none of {', '.join(SCALINGS)}")
    chain.append(SCALINGS[name](b1, b2, eps))
    if weight_decay:
        mask = table(lambda path: any(re.search(pattern, path) for pattern in decay_patterns))
        chain.append(optax.add_decayed_weights(weight_decay, mask))
    if groups:
        scales = table(lambda path: multiplier(groups, path))
        chain.append(
            optax.stateless(
                lambda updates, _: jax.tree.map(lambda u, scale: u * scale, updates, scales)
            )
        )
    chain.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*chain)
