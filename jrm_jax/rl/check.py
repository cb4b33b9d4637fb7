"""What is refused of a config before anything is loaded."""

from __future__ import annotations

from ml_collections import ConfigDict

from jrm_jax.errors import UserError
from jrm_jax.rl.reward import DEVIATION, SPREAD

AT_LEAST_ONE = (
    "seeds", "iterations", "groups", "edits", "problems", "eval_interval", "eval_problems",
    "save_interval", "log_interval", "optimizer.updates", "best_of.attempts", "best_of.problems",
)  # fmt: skip
NOT_NEGATIVE = ("optimizer.kl_weight", "reward.penalty")
ABOVE_ZERO = ("optimizer.learning_rate", "optimizer.clip_norm", "optimizer.clip")


def check_config(config: ConfigDict) -> None:
    """
    Raises:
        UserError: a field with a value that no run can have.
    """
    for names, least, words in (
        (AT_LEAST_ONE, lambda x: x >= 1, "at least 1"),
        (NOT_NEGATIVE, lambda x: x >= 0, "0 or more"),
        (ABOVE_ZERO, lambda x: x > 0, "above 0"),
    ):
        for name in names:
            value = _of(config, name)
            if not least(value):  # NaN, too
                raise UserError(f"config.{name} is {value}, must be {words}")
    if config.edits < 2:
        raise UserError("config.edits is 1: an edit is compared with the others of its instruction")
    if config.problems < config.groups:
        raise UserError(
            f"config.groups is {config.groups}, but config.problems {config.problems}: an iteration"
            " takes each instruction once"
        )
    if config.optimizer.scale not in ("batch", "group"):
        raise UserError(
            f"config.optimizer.scale: {config.optimizer.scale!r} is none of batch, group"
        )
    if config.reward.unsure not in (SPREAD, DEVIATION):
        raise UserError(
            f"config.reward.unsure: {config.reward.unsure!r} is none of {SPREAD}, {DEVIATION}"
        )


def _of(config: ConfigDict, name: str):
    for part in name.split("."):
        config = config[part]
    return config
