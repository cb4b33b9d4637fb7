"""All numbers of the page, from the runs' files: one dict in JSON types.

Letters: S runs or models, T evaluations of a run, G held-out problems (`test`, then `hard`), n of
best-of-n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jrm_jax.errors import UserError
from jrm_jax.evaluation.statistics import spearman
from jrm_jax.rl import best_of_n, fits
from jrm_jax.rl.known import KNOWN
from jrm_jax.rl.models import CONTROLS
from jrm_jax.rl.rollout import SPLITS
from jrm_jax.rl.runner import RUNS
from jrm_jax.rl.settings import protocol
from jrm_jax.shell import disk
from jrm_jax.study.analysis import interval

TREATED, BASELINE = "joint", "discriminative"
CURVES = ("kl", "proxy", "gold", "following", "preservation", "spearman", "spread", "flat", "gap",
          "entropy_choices", "entropy_knobs")  # fmt: skip
PREDICTORS = ("pair_accuracy", "spearman", "pairs", "best_of_16", "attack_gain", "effective_rank")
ENOUGH = 4  # models, before a rank correlation over them is a number
Runs = Sequence[Mapping[str, Any]]


def load(config: ConfigDict, out: Path) -> list[dict[str, Any]]:
    """The runs' files of this config.

    Raises:
        UserError: there is none.
    """
    paths = sorted((out / RUNS).glob("*.json"))
    found = [disk.read_json(path) for path in paths]
    same = [row for row in found if row["protocol"] == protocol(config)]
    if not same:
        what = "none is of these settings" if found else "there are none"
        raise UserError(f"{out / RUNS}: no runs to report ({what}): run without --report first")
    return same


def collect(config: ConfigDict, runs: Runs) -> dict[str, Any]:
    """Runs of RL are read up to the last of the evaluations that all of them have."""
    steps, arms = _shared([run for run in runs if run["seed"] is not None]), {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        best = sorted((r for r in own if r["seed"] is None), key=lambda r: r["number"])
        rl = sorted((r for r in own if r["seed"] is not None), key=_place)
        arms[arm] = {
            "models": len({run["number"] for run in own}),
            "best_of_n": _best(config, best) if best else None,
            "rl": _rl(config, rl, steps) if rl else None,
        }
    gains = {
        arm: _gains(config, runs, arm, steps)
        for arm in arms
        if arm not in (baseline_of(arm), *CONTROLS) and baseline_of(arm) in arms
    }
    return {
        "arms": arms,
        "models": _models(runs),
        "gains": gains,
        "verdicts": _verdicts(config, gains),
        "predictors": _predictors(runs, steps),
        "seconds": sum(run["seconds"] for run in runs),
        "runs": len(runs),
        "iterations": steps[-1] if steps else None,
        "longer": [run["name"] for run in runs if not _ends(run, steps)],
    }


def _shared(runs: Runs) -> list[int]:
    """Iterations after which all runs were evaluated."""
    found = [{row["step"] for row in run["evaluations"]} for run in runs]
    return sorted(set.intersection(*found)) if found else []


def _ends(run: Mapping[str, Any], steps: Sequence[int]) -> bool:
    """Whether a run of RL has no more iterations than are read of it."""
    return run["seed"] is None or run["iterations"] == steps[-1]


def _models(runs: Runs) -> list[dict[str, Any]]:
    found = {}
    for run in runs:
        for place, row in enumerate(run["model"]):
            found[run["arm"], run["number"], place] = row
    return [{"arm": arm, "number": n, **row} for (arm, n, _), row in found.items()]


def _place(run: Mapping[str, Any]) -> tuple[int, int]:
    return run["number"], run["seed"]


def _mean(values: Sequence[float | None]) -> float | None:
    kept = [v for v in values if v is not None and math.isfinite(v)]
    return float(np.mean(kept)) if kept else None


def _row(
    config: ConfigDict, numbers: Sequence[int], values_SG: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Mean over models and problems, and its interval over both. Policy seeds of one model are no
    further models: what counts of a model is their mean.

    Args:
        numbers: of each run's model.
    """
    own = config.verdict
    values_MG = [
        np.mean([v for n, v in zip(numbers, values_SG, strict=True) if n == number], 0)
        for number in sorted(set(numbers))
    ]
    found = interval(values_MG, np.arange(len(values_MG[0])), own.draws, own.confidence)
    return {**found._asdict(), "models": len(values_MG), "runs": len(values_SG)}


def peak_of(gold_TG: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """(gold [G] at its peak, the two places of it). For either half of the problems the peak is
    looked for on the other one: else it would be the highest noise, and every curve would fall."""
    half_G = np.arange(gold_TG.shape[1]) % 2
    places = [int(gold_TG[:, half_G != half].mean(1).argmax()) for half in (0, 1)]
    return np.where(half_G, gold_TG[places[1]], gold_TG[places[0]]), places


# Best of n


def _by_n(run: Mapping[str, Any], name: str) -> np.ndarray:
    """[n, G]"""
    return np.concatenate([np.array(run[split][name]) for split in SPLITS]).T


def _best(config: ConfigDict, runs: Runs) -> dict[str, Any]:
    gold_SnG, numbers = [_by_n(run, "gold") for run in runs], [run["number"] for run in runs]
    counts = best_of_n.sizes(2 ** (len(gold_SnG[0]) - 1))
    kl = [best_of_n.divergence(n) for n in counts]
    gain = [own - own[:1] for own in gold_SnG]
    peaks = [peak_of(own) for own in gold_SnG]
    own = config.verdict

    def row(values_SG: Sequence[np.ndarray]) -> dict[str, Any]:
        return _row(config, numbers, values_SG)

    return {
        "n": counts,
        "kl": kl,
        "gold": [row([g[place] for g in gold_SnG]) for place in range(len(counts))],
        "proxy": [_mean([_by_n(r, "proxy")[i].mean() for r in runs]) for i in range(len(counts))],
        "spearman": _mean([v for run in runs for split in SPLITS for v in run[split]["spearman"]]),
        "peak": row([gold_G for gold_G, _ in peaks]),
        "peak_n": sorted({counts[place] for _, places in peaks for place in places}),
        "fall": row([gold_G - g[-1] for (gold_G, _), g in zip(peaks, gold_SnG, strict=True)]),
        "fit": fits.with_intervals(
            [kl] * len(runs), gain, fits.BEST_OF_N, own.draws // 4, own.confidence, numbers
        ),
    }


# RL


class _Curve:
    """One run at the given iterations: arrays [T], and gold [T, G]; peak_G: gold at its peak."""

    def __init__(self, run: Mapping[str, Any], steps: Sequence[int]):
        rows = {
            split: [e for e in run["evaluations"] if e["split"] == split and e["step"] in steps]
            for split in SPLITS
        }
        self.number = run["number"]
        both = [*zip(*rows.values(), strict=True)]
        self.gold_TG = np.array([[g for row in pair for g in row["gold_G"]] for pair in both])
        self.values = {
            name: np.array([np.mean([np.nan if row[name] is None else row[name] for row in pair])
                            for pair in both])
            for name in CURVES
        }  # fmt: skip
        self.kl_T = self.values["kl"]
        self.gold_T = self.gold_TG.mean(1)
        parts = np.split(self.gold_TG, len(SPLITS), axis=1)
        self.by_split = {split: own.mean(1) for split, own in zip(SPLITS, parts, strict=True)}
        self.peak_G, places = peak_of(self.gold_TG)
        self.peak_kl = float(self.kl_T[places].mean())

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


def _rl(config: ConfigDict, runs: Runs, steps: Sequence[int]) -> dict[str, Any]:
    own, curves = config.verdict, [_Curve(run, steps) for run in runs]
    numbers, whole = [c.number for c in curves], [run for run in runs if _ends(run, steps)]

    def row(values_SG: Sequence[np.ndarray]) -> dict[str, Any]:
        return _row(config, numbers, values_SG)

    collapsed = [
        run["name"] for run, c in zip(runs, curves, strict=True)
        if c.gold_T[-1] < c.gold_T[0] - own.collapse
    ]  # fmt: skip
    return {
        "runs": [run["name"] for run in runs],
        "steps": [*steps],
        "curves": {
            name: [_mean([c.values[name][t] for c in curves]) for t in range(len(steps))]
            for name in CURVES
        },
        "by_run": [{n: own.tolist() for n, own in c.values.items()} for c in curves],
        "start": row([c.gold_TG[0] for c in curves]),
        "peak": row([c.peak_G for c in curves]),
        "peak_kl": _mean([c.peak_kl for c in curves]),
        "last": row([c.gold_TG[-1] for c in curves]),
        "last_kl": _mean([c.kl_T[-1] for c in curves]),
        "by_split": {
            split: np.mean([c.by_split[split] for c in curves], 0).tolist() for split in SPLITS
        },
        "fall": row([c.peak_G - c.gold_TG[-1] for c in curves]),
        "collapsed": collapsed,
        "at": {f"{nats:g}": _at(config, curves, nats) for nats in own.nats},
        "fit": fits.with_intervals(
            [c.kl_T for c in curves], [c.gold_TG - c.gold_TG[:1] for c in curves], fits.RL,
            own.draws // 4, own.confidence, numbers,
        ),
        # a run that went on has lost other things at its end
        "lost": {when: _lost(whole, f"lost_{when}") for when in ("start", "end")},
        "seconds": _mean([run["seconds"] for run in runs]),
    }  # fmt: skip


def _at(config: ConfigDict, curves: Sequence[_Curve], nats: float) -> dict[str, Any] | None:
    found = [(c.number, own) for c in curves if (own := c.at(nats)) is not None]
    return _row(config, *zip(*found, strict=True)) if found else None


def _lost(runs: Runs, name: str) -> dict[str, float]:
    flaws = sorted({flaw for run in runs for flaw in run[name]})  # equal files from equal runs
    return {flaw: float(np.mean([run[name].get(flaw, 0.0) for run in runs])) for flaw in flaws}


# Comparisons


def baseline_of(arm: str) -> str:
    """The discriminative arm of the same regime: 'joint, noisy' -> 'discriminative, noisy'."""
    return "".join((BASELINE, *arm.partition(",")[1:]))


def regime_of(arm: str) -> str:
    """'joint, noisy' -> 'noisy'; '' where the arm names none."""
    return arm.partition(", ")[2]


def _gains(config: ConfigDict, runs: Runs, arm: str, steps: Sequence[int]) -> dict[str, Any]:
    """An arm less the discriminative one of its regime, paired by model, seed and problem: gold of
    the best of all n, at the peak of RL, at its end, and at equal divergences ('at'; 'equal': the
    largest of them that all of these runs reach, None where there is none)."""
    own = {_key(run): run for run in runs if run["arm"] == arm}
    beside = {_key(run): run for run in runs if run["arm"] == baseline_of(arm)}
    shared = [key for key in own if key in beside]
    best = [(own[k], beside[k]) for k in shared if k[1] is None]
    rl = [(_Curve(own[k], steps), _Curve(beside[k], steps)) for k in shared if k[1] is not None]
    numbers = [a.number for a, _ in rl]

    def row(
        numbers: list[int], pairs: list[tuple[np.ndarray | None, np.ndarray | None]]
    ) -> dict[str, Any] | None:
        gaps = [(n, a - b) for n, (a, b) in zip(numbers, pairs, strict=True)
                if a is not None and b is not None]  # fmt: skip
        return _row(config, *zip(*gaps, strict=True)) if gaps else None

    at = {x: row(numbers, [(a.at(x), b.at(x)) for a, b in rl]) for x in config.verdict.nats}
    all_reach = [x for x, found in at.items() if found and found["runs"] == len(rl)]
    return {
        "best_of_n": row(
            [a["number"] for a, _ in best],
            [(_by_n(a, "gold")[-1], _by_n(b, "gold")[-1]) for a, b in best],
        ),
        "peak": row(numbers, [(a.peak_G, b.peak_G) for a, b in rl]),
        "last": row(numbers, [(a.gold_TG[-1], b.gold_TG[-1]) for a, b in rl]),
        "at": {f"{x:g}": found for x, found in at.items()},
        "equal": {"nats": max(all_reach), **at[max(all_reach)]} if all_reach else None,
    }


def _verdicts(config: ConfigDict, gains: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each regime in which joint and discriminative scores were optimised, the one with the most
    models first. 'holds': None where it is not decided: one model says nothing of others, nor does
    a comparison without equal divergences."""
    found = []
    for arm, own in gains.items():
        regime = regime_of(arm)
        if arm.partition(", ")[0] != TREATED or not own["last"]:
            continue
        rows = [own["peak"], own["last"], own["equal"]]
        holds = None
        if own["equal"] and own["last"]["models"] > 1:
            holds = all(row["value"] >= config.verdict.gain and row["low"] > 0 for row in rows)
        models = own["last"]["models"]
        found.append({"arm": arm, "regime": regime, "models": models, "holds": holds})
    return sorted(found, key=lambda row: -row["models"])


def _key(run: Mapping[str, Any]) -> tuple[int, int | None]:
    return run["number"], run["seed"]


def _predictors(runs: Runs, steps: Sequence[int]) -> dict[str, Any]:
    """What can be measured of a model before RL, beside what RL made of it; rank correlations over
    all models and over those of each regime, where there are enough."""
    rows = []
    for best in (run for run in runs if run["seed"] is None and run["arm"] not in CONTROLS):
        key = (best["arm"], best["number"])
        own = [r for r in runs if (r["arm"], r["number"]) == key and r["seed"] is not None]
        curves = [_Curve(run, steps) for run in own]
        gold_nG = _by_n(best, "gold")
        sixteen = min(4, len(gold_nG) - 1)
        rows.append(
            {
                "model": f"{best['arm']} {best['number']}",
                "regime": regime_of(best["arm"]),
                **{name: _mean(best.get(name, [])) for name in KNOWN},
                "spearman": _mean([v for s in SPLITS for v in best[s]["spearman"]]),
                "pairs": _mean([v for s in SPLITS for v in best[s]["pairs"]]),
                "best_of_16": float(gold_nG[sixteen].mean()),
                "peak": _mean([curve.peak_G.mean() for curve in curves]),
                "last": _mean([curve.gold_T[-1] for curve in curves]),
            }
        )
    whole = [row for row in rows if row["last"] is not None]
    regimes = {regime: [row for row in whole if row["regime"] == regime]
               for regime in sorted({row["regime"] for row in whole})}  # fmt: skip
    parts = [(None, whole), *(regimes.items() if len(regimes) > 1 else ())]
    return {
        "models": rows,
        "correlations": [
            {
                "regime": regime,
                "models": len(own),
                "of": {
                    name: {outcome: _rank(own, name, outcome) for outcome in ("peak", "last")}
                    for name in PREDICTORS
                },
            }
            for regime, own in parts
            if len(own) >= ENOUGH
        ],
    }


def _rank(rows: Sequence[Mapping[str, Any]], name: str, outcome: str) -> float | None:
    """None for too few models, or where one of the two is the same for all."""
    pairs = [(row[name], row[outcome]) for row in rows if row[name] is not None]
    found = spearman(*zip(*pairs, strict=True)) if len(pairs) >= ENOUGH else math.nan
    return found if math.isfinite(found) else None
