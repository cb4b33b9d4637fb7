"""What a run's numbers depend on, and whether what is kept is of the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jrm_jax.errors import UserError
from jrm_jax.shell.report import difference

# Of a config, what a run's numbers do not depend on.
APART = (
    "arms", "iterations", "seeds", "seed", "name", "variant", "controls", "verdict", "out",
    "log_interval", "save_interval", "known",
)  # fmt: skip
# Of a run's settings; it may become longer than it was to be at first.
COMPARED = ("arm", "number", "seed", "protocol")


def protocol(config: ConfigDict) -> dict[str, Any]:
    """What every run's numbers depend on, beside its models and seed; in JSON types."""
    whole = json.loads(config.to_json_best_effort())
    return {name: value for name, value in whole.items() if name not in APART}


def check_same(path: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """
    Args:
        path: of what is kept, for the message. kept, wanted: settings of a run, as
            `runner.settings_of` makes them.

    Raises:
        UserError: they are of other settings, or of models with other weights. Where a model lies
            is no difference.
    """
    before, now = _compared(kept), _compared(wanted)
    if before != now:
        raise UserError(
            f"{path} belongs to a run with other settings or another model "
            f"({difference(before, now)}): use the same to go on, or another --workdir"
        )


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    models = {
        f"model {place}": {n: row[n] for n in ("step", "digest")} if isinstance(row, dict) else row
        for place, row in enumerate(settings["model"])
    }
    # as they are after a way through a file
    return json.loads(json.dumps({name: settings[name] for name in COMPARED} | models))
