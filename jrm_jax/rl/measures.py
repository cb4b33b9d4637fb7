"""What is measured of a policy's edits, beside its divergence from the base.

Letters: G problems, K edits of each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jrm_jax.evaluation.statistics import spearman
from jrm_jax.rl.gold import Gold
from jrm_jax.rl.grpo import FLAT
from jrm_jax.rl.rollout import Rollout


def summary(found: Rollout, base_gold: tuple[float, float]) -> dict[str, float]:
    """Means over edits and groups.

    'proxy' is in deviations of the base's scores; 'gap' is that less the gold score in deviations
    of the base's gold scores: how far the score has run ahead of the truth. 'spearman': of proxy
    and gold within a group, mean over the groups in which both vary. 'spread': deviation of the
    proxy within a group; 'flat': share of groups without any.

    Args:
        base_gold: mean and deviation of the gold scores of the base's edits.
    """
    mean, deviation = base_gold
    spread_G = found.proxy_GK.std(1)
    ranks = [spearman(p, g) for p, g in zip(found.proxy_GK, found.gold_GK, strict=True)]
    ranks = [rank for rank in ranks if math.isfinite(rank)]
    gold = float(found.gold_GK.mean())
    return {
        "reward": float(found.reward_GK.mean()),
        "proxy": float(found.proxy_GK.mean()),
        "gold": gold,
        "following": float(found.following_GK.mean()),
        "preservation": float(found.preservation_GK.mean()),
        "spearman": float(np.mean(ranks)) if ranks else math.nan,
        "spread": float(spread_G.mean()),
        "flat": float((found.reward_GK.std(1) <= FLAT).mean()),
        "gap": float(found.proxy_GK.mean()) - (gold - mean) / deviation,
    }


def lost(golds: Sequence[Gold]) -> dict[str, float]:
    """Mean points of 100 that edits lose, by flaw; the largest first."""
    total: Counter[str] = Counter()
    for found in golds:
        total.update(found.lost)
    return {name: points / len(golds) for name, points in total.most_common()}
