"""What can be known of a model without a policy, in seconds: what a user may look at before RL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jrm_jax.errors import one_line
from jrm_jax.run.workdir import CHECKPOINTS, RESULTS
from jrm_jax.shell import disk
from jrm_jax.shell.report import json_safe
from jrm_jax.study.analysis import attack_gain
from jrm_jax.study.measure import Model, measure_attack, measure_states

MEASURED = "measured.json"  # what the study writes into a run's folder
# accuracy on `valid`, which every run measures; what an attack on the pixels gains, in deviations
# of the scores; effective rank of the reward token's state
KNOWN = ("pair_accuracy", "attack_gain", "effective_rank")


def known(
    models: Sequence[Mapping[str, Any]], settings: ConfigDict, say: Callable[[str], None]
) -> dict[str, list[float | None]]:
    """KNOWN of each model, None where it cannot be told (an export holds no world to attack).

    Args:
        models: 'path' and 'step' of each. settings: of `study.measure`, with a 'world'.
    """
    rows = [_of(Path(row["path"]), row["step"], settings, say) for row in models]
    return json_safe({name: [row[name] for row in rows] for name in KNOWN})


def lacks(kept: Mapping[str, Any]) -> bool:
    """Whether a file of best-of-n lacks what is measured for it; a run without `valid` never has
    its accuracy."""
    return any(None in kept.get(name, [None]) for name in KNOWN[1:]) and bool(kept["model"])


def _of(
    folder: Path, step: int, settings: ConfigDict, say: Callable[[str], None]
) -> dict[str, float | None]:
    results, measured = (
        disk.read_json(path) if (path := folder / name).is_file() else {}
        for name in (RESULTS, MEASURED)
    )
    rank, attack = _parts(measured, step)
    if not (rank and attack) and (folder / CHECKPOINTS).is_dir():
        rank, attack = _parts(_measure(folder, step, settings, say), step)
    own = results if results.get("step") == step else {}  # else of other weights
    return {
        "pair_accuracy": own.get("valid/pair_accuracy"),
        "attack_gain": attack_gain(attack)["gain_in_spreads"] if attack else None,
        "effective_rank": rank,
    }


def _parts(measured: Mapping[str, Any], step: int) -> tuple[float | None, dict[str, Any] | None]:
    """(effective rank, scores before and after an attack), None where they are of another step."""
    ranks = measured.get("ranks") or {}
    attack = measured.get("attack") if measured.get("step") == step else None
    return ranks.get(str(step), {}).get("effective_rank"), attack


def _measure(
    folder: Path, step: int, settings: ConfigDict, say: Callable[[str], None]
) -> dict[str, Any]:
    """Nothing where the device has no room for gradients: that is no reason to end a run."""
    say(f"{folder}: attack on the pixels, and states of the reward token")
    try:
        model = Model(folder, settings, judge=False)
        attack, states = measure_attack(model), measure_states(model, [step], pulls=False)
    except jax.errors.JaxRuntimeError as error:
        say(f"{folder}: not measured: {one_line(error)}")
        return {}
    return {"step": step, "attack": attack, **states}
