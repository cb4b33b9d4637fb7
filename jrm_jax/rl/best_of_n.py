"""The optimiser without a loop: of n edits of the base policy the one that is scored best.

Its divergence from the base is log n - (n - 1) / n nats, an upper bound that is close where scores
are never equal (Beirami et al., arXiv 2401.01879). Gold and proxy of the best of n are expectations
over all choices of n of the edits that were drawn, without bias.

Letters: P problems, A edits of each, n of which the best is taken.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jrm_jax.evaluation.statistics import spearman
from jrm_jax.rl import base
from jrm_jax.rl.editing import make_problem
from jrm_jax.rl.examples import liked, worst
from jrm_jax.rl.folder import claimed, settle
from jrm_jax.rl.reward import Chance, Reward
from jrm_jax.rl.rollout import BEST, SPLITS, Dice, Pool, batches, make_pool, roll, together
from jrm_jax.shell import disk
from jrm_jax.shell.report import json_safe
from jrm_jax.shell.stop import StopRequest
from jrm_jax.study.analysis import best_of_n

BLOCKS = "blocks"  # in a run's folder: edits that are scored


def sizes(attempts: int) -> list[int]:
    """1, 2, 4, ... up to the number of edits."""
    return [2**power for power in range(attempts.bit_length()) if 2**power <= attempts]


def divergence(n: int) -> float:
    """Nats."""
    return math.log(n) - (n - 1) / n


def measure(
    config: ConfigDict, name: str, folder: Path, settings: dict[str, Any],
    reward: Reward | Chance | None, pools: Mapping[str, Pool], known: Mapping[str, Any], out: Path,
    stop: StopRequest, say: Callable[[str], None],
) -> int:  # fmt: skip
    """Write what best-of-n makes of a reward (None: gold) to `out`; the signal that stopped it, or
    0. Each block of edits is kept in `folder` when it is scored, and not scored again.

    Args:
        pools: that of `train`. known: what else goes into `out`.

    Raises:
        UserError: another run's folder, or another process works there; a score that failed.
    """
    with claimed(folder, settings, say) as lock:
        settle(folder, config, pools["train"], reward)
        result = {"name": name, **settings, **known, "worst": [], "seconds": 0.0}
        count = -(-config.best_of.attempts // config.edits)
        for place, split in enumerate(SPLITS):
            pool, rows = held_out(config, split), []
            for block in range(count):
                path = folder / BLOCKS / f"{split}-{block}.json"
                if not path.exists():
                    if signal := stop.now():
                        return signal
                    path.parent.mkdir(exist_ok=True)
                    made = json.dumps(_block(config, pool, split, block, reward))
                    lock.check()
                    disk.write_whole(path, made)
                rows.append(disk.read_json(path))
                if count >= 4 and (block + 1) % (count // 4) == 0:
                    share = (place * count + block + 1) / (count * len(SPLITS))
                    say(f"{name}: best of n, {share:.0%} of the edits are scored")
            result[split] = _numbers(
                *(np.concatenate([row[column] for row in rows], 1)[:, : config.best_of.attempts]
                  for column in ("reward", "proxy", "gold"))
            )  # fmt: skip
            best = [max(own, key=lambda row: row["reward"]) for own in
                    zip(*(row["liked"] for row in rows), strict=True)]  # fmt: skip
            result["worst"] += worst(best)
            result["seconds"] += sum(row["seconds"] for row in rows)
        result["seconds"] = round(result["seconds"], 1)
        lock.check()
        disk.write_whole(out, json.dumps(json_safe(result), indent=1) + "\n")
    return 0


def held_out(config: ConfigDict, split: str) -> Pool:
    count = config.best_of.problems
    return make_pool([make_problem(split, index, config.world_seed) for index in range(count)])


def _block(
    config: ConfigDict, pool: Pool, split: str, block: int, reward: Reward | Chance | None
) -> dict[str, Any]:
    """Some edits of each problem: 'reward', 'proxy', 'gold' [P, edits], 'liked' as `liked`."""
    began, start = time.monotonic(), base.load()
    first = 10**6 * SPLITS.index(split) + 1000 * block  # of its own for each split
    parts = [
        roll(start, pool.pick(rows), config.edits, Dice(0, BEST, first + rows[0]), reward)
        for rows in batches(len(pool.problems), config.groups)
    ]
    found = together(parts)
    columns = {"reward": found.reward_GK, "proxy": found.proxy_GK, "gold": found.gold_GK}
    return {
        **{name: values_GK.tolist() for name, values_GK in columns.items()},
        "liked": liked(found, split),
        "seconds": time.monotonic() - began,
    }


def _numbers(reward_PA: np.ndarray, proxy_PA: np.ndarray, gold_PA: np.ndarray) -> dict[str, Any]:
    """By problem: 'gold', 'proxy' [P, sizes] of the best of n by reward; 'spearman' [P] of proxy
    and gold, 'pairs' [P]: share of pairs of unequal gold that the proxy orders rightly."""
    counts = sizes(reward_PA.shape[1])

    def expected(values_PA: np.ndarray) -> list[list[float]]:
        return [
            [round(best_of_n(own, values, n), 5) for n in counts]
            for own, values in zip(reward_PA, values_PA, strict=True)
        ]

    return {
        "gold": expected(gold_PA),
        "proxy": expected(proxy_PA),
        "spearman": [round(spearman(p, g), 5) for p, g in zip(proxy_PA, gold_PA, strict=True)],
        "pairs": [round(_right(p, g), 5) for p, g in zip(proxy_PA, gold_PA, strict=True)],
    }


def _right(proxy_A: np.ndarray, gold_A: np.ndarray) -> float:
    proxy_AA, gold_AA = (np.sign(x[:, None] - x[None]) for x in (proxy_A, gold_A))
    inside = gold_AA > 0
    return float((proxy_AA[inside] + 1).mean() / 2) if inside.any() else math.nan
