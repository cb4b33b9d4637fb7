"""A run's folder: its name, and the config and results that lie in it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jrm_jax.errors import UserError
from jrm_jax.shell import disk
from jrm_jax.shell.packaged import load_config_module
from jrm_jax.shell.report import difference, flat

CONFIG, RESULTS, CHECKPOINTS = "config.json", "results.json", "checkpoints"
FINAL = "final.json"  # splits of the final evaluation that are read; results.json follows
# A run may be watched otherwise; its batches, which stay the same, may be made by other hands; its
# backward pass may compute more or less again, and its backbone may have moved (`backbones` knows
# it again).
FREE = (
    "heartbeat_seconds", "profile", "watchdog_seconds", "data.workers", "data.prefetch", "remat",
    "backbone.path",
)  # fmt: skip
TEACHER = ("loss.teacher_scale", "loss.teacher_mix")  # read where `loss.teacher_weight` is not 0
LONGEST = 60  # characters of the data sets' names


def default_name(config: ConfigDict) -> str:
    """'joint-qwen3_vl_8b-edits': the config, its variant, and the folders of its data, if any."""
    paths = [path for path, _ in config.data.mixture] or [config.data.path]
    data = "+".join(Path(path).resolve().name for path in paths if path)
    return "-".join(filter(None, (config.name, config.variant, data[:LONGEST])))


def defaults() -> ConfigDict:
    """Every field with its default, without 'name' and 'variant'."""
    return load_config_module("common").base()


def as_text(config: ConfigDict) -> str:
    """What CONFIG holds."""
    return config.to_json_best_effort(indent=2, sort_keys=True) + "\n"


def read_config(workdir: Path) -> ConfigDict:
    """The config of a run; fields that were added since it began have their defaults.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = workdir / CONFIG
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    return ConfigDict(_filled(stored, json.loads(as_text(defaults())), str(path)))


def _filled(stored: Any, defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(stored, dict):
        raise UserError(f"{where} is damaged: it should be an object of fields, {{...}}")
    filled = {**defaults, **stored}
    for name, value in defaults.items():
        if isinstance(value, dict) and name in stored:
            filled[name] = _filled(stored[name], value, f"{where}: {name}")
    return filled


def check_config(workdir: Path, config: ConfigDict) -> int:
    """Whether a run with `config` may go on in `workdir`.

    Returns:
        The steps that the run has had until now: those of `config`, unless it is to be longer.

    Raises:
        UserError: it belongs to a run with another config; more steps are no difference.
    """
    if not (workdir / CONFIG).exists():
        return config.total_steps
    both = [flat(json.loads(text)) for text in (as_text(read_config(workdir)), as_text(config))]
    free = FREE if any(fields["loss.teacher_weight"] for fields in both) else (*FREE, *TEACHER)
    before, now = (
        {name: value for name, value in fields.items() if name not in free} for fields in both
    )
    steps = before["total_steps"]
    if before != {**now, "total_steps": steps} or steps > config.total_steps:
        raise UserError(
            f"{workdir} belongs to a run with another config ({difference(before, now)}): "
            "use the same config to go on, or another --workdir"
        )
    return steps


def read_results(workdir: Path) -> dict[str, Any] | None:
    """Of a finished run, else None.

    Raises:
        UserError: it is damaged.
    """
    path = workdir / RESULTS
    if not path.exists():
        return None
    advice = "remove it, and the command that trained writes it again from the checkpoints"
    found = disk.read_json(path, advice)
    if not isinstance(found, dict) or "step" not in found:
        raise UserError(f"{path} has no results in it: {advice}")
    return found


def read_final(workdir: Path, step: int) -> dict[str, dict[str, float]]:
    """{split: metrics} of a final evaluation of `step` that was stopped; {} of none, or where the
    file is damaged: the splits are read again."""
    with contextlib.suppress(UserError):
        match disk.read_json(workdir / FINAL):
            case {"step": found, "splits": dict(splits)} if found == step:
                return splits
    return {}


def write_final(workdir: Path, step: int, splits: Mapping[str, Mapping[str, float]]) -> None:
    disk.write_whole(workdir / FINAL, json.dumps({"step": step, "splits": splits}))


def write_results(workdir: Path, text: str) -> None:
    disk.write_whole(workdir / RESULTS, text)
    (workdir / FINAL).unlink(missing_ok=True)


def keep_results(workdir: Path, steps: int) -> None:
    """Results of a run that now gets more steps than these stay beside it: results-60.json."""
    if (workdir / RESULTS).exists():
        os.replace(workdir / RESULTS, workdir / f"results-{steps}.json")
