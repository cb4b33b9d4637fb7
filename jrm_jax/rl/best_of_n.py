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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jrm_jax.evaluation.statistics import spearman
from jrm_jax.rl import base
from jrm_jax.rl.editing import make_problem
from jrm_jax.rl.examples import liked, worst
from jrm_jax.rl.reward import Reward
from jrm_jax.rl.rollout import BEST, SPLITS, Dice, batches, make_pool, roll, together
from jrm_jax.run.workdir import write_whole
from jrm_jax.shell.report import json_safe
from jrm_jax.shell.stop import StopRequest
from jrm_jax.study.analysis import best_of_n


def sizes(attempts: int) -> list[int]:
    """1, 2, 4, ... up to the number of edits."""
    return [2**power for power in range(attempts.bit_length()) if 2**power <= attempts]


def divergence(n: int) -> float:
    """Nats."""
    return math.log(n) - (n - 1) / n


def measure(
    config: ConfigDict, name: str, settings: dict[str, Any], reward: Reward | None, out: Path,
    stop: StopRequest, say: Callable[[str], None],
) -> int:  # fmt: skip
    """Write what best-of-n makes of a reward (None: gold) to `out`; the signal that stopped it, or
    0."""
    began, result = time.monotonic(), {"name": name, **settings, "worst": []}
    start, attempts = base.load(), config.best_of.attempts
    for split in SPLITS:
        problems = [
            make_problem(split, index, config.world_seed)
            for index in range(config.best_of.problems)
        ]
        pool, blocks, best = make_pool(problems), [], {}
        count = -(-attempts // config.edits)
        for block in range(count):
            if signal := stop.now():
                return signal
            parts = [
                roll(
                    start, pool.pick(rows), config.edits, Dice(0, BEST, 1000 * block + rows[0]),
                    reward,
                )
                for rows in batches(len(problems), config.groups)
            ]  # fmt: skip
            found = together(parts)
            blocks.append((found.reward_GK, found.proxy_GK, found.gold_GK))
            for row in liked(found, split):
                if row["index"] not in best or row["reward"] > best[row["index"]]["reward"]:
                    best[row["index"]] = row
            if count >= 4 and (block + 1) % (count // 4) == 0:
                seen, every = (SPLITS.index(split) * count + block + 1), count * len(SPLITS)
                say(f"{name}: best of n, {seen * 100 // every} % of the edits are scored")
        reward_PA, proxy_PA, gold_PA = (
            np.concatenate(column, 1)[:, :attempts] for column in zip(*blocks, strict=True)
        )
        result[split] = _numbers(reward_PA, proxy_PA, gold_PA)
        result["worst"] += worst([*best.values()])
    result["seconds"] = round(time.monotonic() - began, 1)
    write_whole(out, json.dumps(json_safe(result), indent=1) + "\n")
    return 0


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
