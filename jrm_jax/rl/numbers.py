"""All numbers of the page, from the runs' files: one dict in JSON types.

Letters: S runs or models, T evaluations of a run, G held-out problems (`test`, then `hard`), n of
best-of-n.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jrm_jax.errors import UserError
from jrm_jax.evaluation.statistics import spearman
from jrm_jax.rl import best_of_n, fits
from jrm_jax.rl.models import CONTROLS
from jrm_jax.rl.rollout import SPLITS
from jrm_jax.rl.runner import RUNS
from jrm_jax.rl.settings import protocol
from jrm_jax.study.analysis import interval

TREATED, BASELINE = "joint", "discriminative"
CURVES = ("kl", "proxy", "gold", "following", "preservation", "spearman", "spread", "flat", "gap",
          "entropy_choices", "entropy_knobs")  # fmt: skip
PREDICTORS = ("pair_accuracy", "spearman", "pairs", "best_of_16", "attack_gain", "effective_rank")
KNOWN = ("pair_accuracy", "attack_gain", "effective_rank")  # of a model, without a policy
ENOUGH = 4  # models, before a rank correlation over them is a number
Runs = Sequence[Mapping[str, Any]]


def load(config: ConfigDict, out: Path) -> list[dict[str, Any]]:
    """The runs' files of this config.

    Raises:
        UserError: there is none.
    """
    paths = sorted((out / RUNS).glob("*.json"))
    found = [json.loads(path.read_text()) for path in paths]
    same = [row for row in found if row["protocol"] == protocol(config)]
    if not same:
        what = "none is of these settings" if found else "there are none"
        raise UserError(f"{out / RUNS}: no runs to report ({what}): run without --report first")
    return same


def collect(config: ConfigDict, runs: Runs) -> dict[str, Any]:
    arms = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        best = sorted((r for r in own if r["seed"] is None), key=lambda r: r["number"])
        rl = sorted((r for r in own if r["seed"] is not None), key=_place)
        arms[arm] = {
            "models": len({run["number"] for run in own}),
            "best_of_n": _best(config, best) if best else None,
            "rl": _rl(config, rl) if rl else None,
        }
    return {
        "arms": arms,
        "gains": {
            arm: _gains(config, runs, arm)
            for arm in arms
            if arm not in (baseline_of(arm), *CONTROLS) and baseline_of(arm) in arms
        },
        "predictors": _predictors(runs),
        "seconds": sum(run["seconds"] for run in runs),
        "runs": len(runs),
        "iterations": sorted({run["iterations"] for run in runs if run["seed"] is not None}),
    }


def _place(run: Mapping[str, Any]) -> tuple[int, int]:
    return run["number"], run["seed"]


def _mean(values: Sequence[float | None]) -> float | None:
    kept = [v for v in values if v is not None and math.isfinite(v)]
    return float(np.mean(kept)) if kept else None


def _row(config: ConfigDict, values_SG: Sequence[np.ndarray]) -> dict[str, Any]:
    """Mean over runs and problems, and its interval over both."""
    own = config.verdict
    found = interval(values_SG, np.arange(len(values_SG[0])), own.draws, own.confidence)
    return {**found._asdict(), "runs": len(values_SG)}


# Best of n


def _by_n(run: Mapping[str, Any], name: str) -> np.ndarray:
    """[n, G]"""
    return np.concatenate([np.array(run[split][name]) for split in SPLITS]).T


def _best(config: ConfigDict, runs: Runs) -> dict[str, Any]:
    gold_SnG = [_by_n(run, "gold") for run in runs]
    counts = best_of_n.sizes(2 ** (len(gold_SnG[0]) - 1))
    kl = [best_of_n.divergence(n) for n in counts]
    gain = [own - own[:1] for own in gold_SnG]
    mean_n = np.mean([own.mean(1) for own in gold_SnG], 0)
    own = config.verdict
    return {
        "n": counts,
        "kl": kl,
        "gold": [_row(config, [g[place] for g in gold_SnG]) for place in range(len(counts))],
        "proxy": [_mean([_by_n(r, "proxy")[i].mean() for r in runs]) for i in range(len(counts))],
        "spearman": _mean([v for run in runs for split in SPLITS for v in run[split]["spearman"]]),
        "peak": {"n": counts[int(mean_n.argmax())], "gold": float(mean_n.max())},
        "fall": float(mean_n.max() - mean_n[-1]),
        "fit": fits.with_intervals(
            [kl] * len(runs), gain, fits.BEST_OF_N, own.draws // 4, own.confidence
        ),
    }


# RL


class _Curve:
    """One run: arrays [T], and gold [T, G]."""

    def __init__(self, run: Mapping[str, Any]):
        rows = {split: [e for e in run["evaluations"] if e["split"] == split] for split in SPLITS}
        self.steps = [row["step"] for row in rows[SPLITS[0]]]
        both = [*zip(*rows.values(), strict=True)]
        self.gold_TG = np.array([[g for row in pair for g in row["gold_G"]] for pair in both])
        self.values = {
            name: np.array([np.mean([np.nan if row[name] is None else row[name] for row in pair])
                            for pair in both])
            for name in CURVES
        }  # fmt: skip
        self.kl_T = self.values["kl"]
        self.gold_T = self.gold_TG.mean(1)
        self.peak = int(self.gold_T.argmax())

    def at(self, nats: float) -> np.ndarray | None:
        """Gold by problem [G] where the divergence first reaches `nats`; None where it never
        does."""
        above = np.flatnonzero(self.kl_T >= nats)
        if not len(above):
            return None
        t = int(above[0])
        if not t:
            return self.gold_TG[0]
        low, high = self.kl_T[t - 1 : t + 1]
        share = (nats - low) / (high - low)
        return (1 - share) * self.gold_TG[t - 1] + share * self.gold_TG[t]


def _rl(config: ConfigDict, runs: Runs) -> dict[str, Any]:
    own, curves = config.verdict, [_Curve(run) for run in runs]
    shared = range(min(len(curve.steps) for curve in curves))
    collapsed = [
        run["name"] for run, c in zip(runs, curves, strict=True)
        if c.gold_T[-1] < c.gold_T[0] - own.collapse
    ]  # fmt: skip
    return {
        "runs": [run["name"] for run in runs],
        "steps": [curves[0].steps[t] for t in shared],
        "curves": {
            name: [_mean([c.values[name][t] for c in curves]) for t in shared] for name in CURVES
        },
        "by_run": [{n: own.tolist() for n, own in c.values.items()} for c in curves],
        "start": _row(config, [c.gold_TG[0] for c in curves]),
        "peak": _row(config, [c.gold_TG[c.peak] for c in curves]),
        "peak_kl": _mean([c.kl_T[c.peak] for c in curves]),
        "last": _row(config, [c.gold_TG[-1] for c in curves]),
        "last_kl": _mean([c.kl_T[-1] for c in curves]),
        "fall": _row(config, [c.gold_TG[c.peak] - c.gold_TG[-1] for c in curves]),
        "collapsed": collapsed,
        "at": {f"{nats:g}": _at(config, curves, nats) for nats in own.nats},
        "fit": fits.with_intervals(
            [c.kl_T for c in curves], [c.gold_TG - c.gold_TG[:1] for c in curves], fits.RL,
            own.draws // 4, own.confidence,
        ),
        "lost": {when: _lost(runs, f"lost_{when}") for when in ("start", "end")},
        "seconds": _mean([run["seconds"] for run in runs]),
    }  # fmt: skip


def _at(config: ConfigDict, curves: Sequence[_Curve], nats: float) -> dict[str, Any] | None:
    found = [own for curve in curves if (own := curve.at(nats)) is not None]
    return _row(config, found) if found else None


def _lost(runs: Runs, name: str) -> dict[str, float]:
    flaws = sorted({flaw for run in runs for flaw in run[name]})
    return {flaw: float(np.mean([run[name].get(flaw, 0.0) for run in runs])) for flaw in flaws}


# Comparisons


def baseline_of(arm: str) -> str:
    """The discriminative arm of the same regime: 'joint, noisy' -> 'discriminative, noisy'."""
    return "".join((BASELINE, *arm.partition(",")[1:]))


def _gains(config: ConfigDict, runs: Runs, arm: str) -> dict[str, Any]:
    """An arm less the discriminative one of its regime, paired by model, seed and problem: gold of
    the best of all n, at the peak of RL, at its end, and at equal divergences."""
    own = {_key(run): run for run in runs if run["arm"] == arm}
    beside = {_key(run): run for run in runs if run["arm"] == baseline_of(arm)}
    shared = [key for key in own if key in beside]
    best = [(own[k], beside[k]) for k in shared if k[1] is None]
    rl = [(_Curve(own[k]), _Curve(beside[k])) for k in shared if k[1] is not None]

    def row(pairs: list[tuple[np.ndarray | None, np.ndarray | None]]) -> dict[str, Any] | None:
        gaps = [a - b for a, b in pairs if a is not None and b is not None]
        return _row(config, gaps) if gaps else None

    return {
        "best_of_n": row([(_by_n(a, "gold")[-1], _by_n(b, "gold")[-1]) for a, b in best]),
        "peak": row([(a.gold_TG[a.peak], b.gold_TG[b.peak]) for a, b in rl]),
        "last": row([(a.gold_TG[-1], b.gold_TG[-1]) for a, b in rl]),
        "at": {f"{x:g}": row([(a.at(x), b.at(x)) for a, b in rl]) for x in config.verdict.nats},
    }


def _key(run: Mapping[str, Any]) -> tuple[int, int | None]:
    return run["number"], run["seed"]


def _predictors(runs: Runs) -> dict[str, Any]:
    """What can be measured of a model before RL, beside what RL made of it; rank correlations over
    the models where there are enough."""
    rows = []
    for best in (run for run in runs if run["seed"] is None and run["arm"] not in CONTROLS):
        key = (best["arm"], best["number"])
        own = [r for r in runs if (r["arm"], r["number"]) == key and r["seed"] is not None]
        curves = [_Curve(run) for run in own]
        gold_nG = _by_n(best, "gold")
        sixteen = min(4, len(gold_nG) - 1)
        rows.append(
            {
                "model": f"{best['arm']} {best['number']}",
                **{name: _mean(best.get(name, [])) for name in KNOWN},
                "spearman": _mean([v for s in SPLITS for v in best[s]["spearman"]]),
                "pairs": _mean([v for s in SPLITS for v in best[s]["pairs"]]),
                "best_of_16": float(gold_nG[sixteen].mean()),
                "peak": _mean([curve.gold_T[curve.peak] for curve in curves]),
                "last": _mean([curve.gold_T[-1] for curve in curves]),
            }
        )
    whole = [row for row in rows if row["last"] is not None]

    def correlation(name: str, outcome: str) -> float | None:
        pairs = [(r[name], r[outcome]) for r in whole if r[name] is not None]
        return spearman(*zip(*pairs, strict=True)) if len(pairs) >= ENOUGH else None

    return {
        "models": rows,
        "correlations": {
            name: {outcome: correlation(name, outcome) for outcome in ("peak", "last")}
            for name in PREDICTORS
        },
    }
