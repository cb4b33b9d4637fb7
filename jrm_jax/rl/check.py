"""What is refused of a config before anything is loaded."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from jrm_jax.errors import UserError
from jrm_jax.rl.reward import DEVIATION, SPREAD
from jrm_jax.rl.rollout import NOISES

AT_LEAST_ONE = (
    "seeds", "iterations", "groups", "edits", "problems", "eval_interval", "eval_problems",
    "save_interval", "log_interval", "optimizer.updates", "best_of.attempts", "best_of.problems",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "optimizer.slower", "optimizer.kl_weight", "reward.penalty", "verdict.gain",
    "verdict.collapse",
)  # fmt: skip
ABOVE_ZERO = (
    "optimizer.learning_rate", "optimizer.clip_norm", "optimizer.clip", "verdict.nats",
)  # fmt: skip
LARGEST_SEED = 2**31 - 1
BLOCK = 1000  # instructions: what chance is drawn from numbers them within a part
DRAWS = 40  # of a bootstrap; of a fit a quarter of that
CHOICES = {
    "optimizer.scale": ("batch", "group"),
    "reward.unsure": (SPREAD, DEVIATION),
}


def check_config(config: ConfigDict) -> None:
    """
    Raises:
        UserError: a field with a value that no run can have.
    """
    most = LARGEST_SEED - config.seeds
    for names, holds, words in (
        (AT_LEAST_ONE, lambda x: x >= 1, "at least 1"),
        (NOT_NEGATIVE, lambda x: 0 <= x < math.inf, "0 or more, and finite"),
        (ABOVE_ZERO, lambda x: 0 < x < math.inf, "above 0, and finite"),
        (("seed",), lambda x: x <= most, f"{most} at most"),
        (("eval_problems", "best_of.problems"), lambda x: x <= BLOCK, f"{BLOCK} at most"),
        (("optimizer.momentum",), lambda x: 0 <= x < 1, "0 or more, and below 1"),
        (("verdict.confidence",), lambda x: 0 < x < 1, "a share, above 0 and below 1"),
        (("verdict.draws",), lambda x: x >= DRAWS, f"at least {DRAWS}"),
    ):
        for name in names:
            value = _of(config, name)
            every = value if isinstance(value, tuple | list) else (value,)
            if not all(holds(one) for one in every):  # NaN, too
                raise UserError(f"config.{name} is {value}, must be {words}")
    if config.edits < 2:
        raise UserError("config.edits is 1: an edit is compared with the others of its instruction")
    if config.problems < config.groups:
        raise UserError(
            f"config.groups is {config.groups}, but config.problems {config.problems}: an iteration"
            " takes each instruction once"
        )
    if config.groups * config.edits > NOISES:
        raise UserError(
            f"config.groups * config.edits is {config.groups * config.edits}, must be {NOISES} at "
            "most: the pictures of an iteration"
        )
    for name, allowed in CHOICES.items():
        if _of(config, name) not in allowed:
            raise UserError(
                f"config.{name}: {_of(config, name)!r} is none of {', '.join(allowed)}"
            )


def _of(config: ConfigDict, name: str):
    for part in name.split("."):
        config = config[part]
    return config
