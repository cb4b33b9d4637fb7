"""The folder of one run: whose it is, who works there, and the scale of its reward.

It holds `config.json` (the run's settings) and `scale.json`, beside what the run itself keeps.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jrm_jax.rl import base
from jrm_jax.rl.reward import Chance, Reward, Scale
from jrm_jax.rl.rollout import SETTLE, Dice, Pool, roll
from jrm_jax.rl.settings import check_same
from jrm_jax.run.lock import Lock, hold
from jrm_jax.run.workdir import CONFIG
from jrm_jax.shell import disk

SCALE = "scale.json"
SETTLING = 4  # batches of the base's edits, from which the scale of a reward is taken


@contextlib.contextmanager
def claimed(
    folder: Path, settings: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[Lock]:
    """This process alone works in `folder`, which is made if need be, on the run of `settings`;
    `Lock.check` before a checkpoint or a result is saved.

    Raises:
        UserError: another run's folder, or another process works there.
    """
    with hold(folder, say) as lock:
        path = folder / CONFIG
        if path.exists():
            check_same(folder, disk.read_json(path), settings)
        else:
            (folder / SCALE).unlink(missing_ok=True)  # nobody knows whose it is
        disk.write_whole(path, json.dumps(settings, indent=1) + "\n")
        yield lock


def settle(
    folder: Path, config: ConfigDict, pool: Pool, reward: Reward | Chance | None
) -> tuple[float, float]:
    """Gives a reward its scale, from edits of the base, and returns that of gold (mean and
    deviation of its scores on them). Both are kept for the whole run.

    Args:
        pool: of `train`.

    Raises:
        UserError: as `Reward.settle`.
    """
    path = folder / SCALE
    if not path.exists():
        count = min(config.groups * SETTLING, config.problems)
        part = pool.pick(range(count))
        found = roll(base.load(), part, config.edits, Dice(0, SETTLE, 0), None)
        scale = None if reward is None else reward.settle(part.problems, found.pictures_NHW3)
        gold = float(found.gold_GK.mean()), float(found.gold_GK.std())
        disk.write_whole(path, json.dumps({"gold": gold, "reward": scale}, indent=1) + "\n")
    kept = disk.read_json(path)
    if kept["reward"] is not None:
        reward.scale = Scale(*kept["reward"])
    mean, deviation = kept["gold"]
    return mean, deviation
