"""All numbers of the second part's page, from the cells there are: one dict in JSON types.

Letters: N pairs, G groups, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jrm_jax.study import analysis, efficiency
from jrm_jax.study.numbers import budget, machine_of
from jrm_jax.study.regimes import ARMS, BASELINE, CRITIQUES, Point

Found = Mapping[Point, Mapping[str, Any]]
SPLITS = ("test", "hard")
RULES = {
    "closer to the source in pixels is better": analysis.load_distances,
    "a degraded picture is worse": analysis.load_damage,
}


def collect(config: ConfigDict, found: Found, again: Found) -> dict[str, Any]:
    """Everything the page says in numbers; `again`: the same cells, made on another machine."""
    table = Table(config, found)
    headline = config.headline.labelled, config.headline.flip
    return {
        "pairs": {split: len(p.group) for split, p in table.pairs.items()},
        "rules": {name: table.rule(load) for name, load in RULES.items()},
        "trials": [_trial(p, found[p]) for p in found if p.is_trial],
        "headline": {arm: table.place(arm, *headline) for arm in ARMS},
        "verdict": verdict(config, table),
        "beside": {
            f"{arm} - {other}": table.versus(arm, other, *headline)
            for arm, other in config.verdict.beside
        },
        "curves": {
            f"{flip:g}": {
                str(size): {arm: table.place(arm, size, flip) for arm in ARMS}
                for size in config.sizes
            }
            for flip in config.flips
        },
        "efficiency": {
            f"{flip:g}": {
                arm: {
                    f"{accuracy:g}": table.efficiency(arm, flip, accuracy)
                    for accuracy in config.verdict.efficiency
                }
                for arm in ARMS if arm != BASELINE
            }
            for flip in config.flips
        },
        "cells": {p.name: table.cell(p) for p in found if not p.is_trial},
        "spreads": {
            str(size): {
                arm: known._asdict() for arm in ARMS
                if arm != BASELINE and not ARMS[arm].first
                and (known := table.known_spread(arm, size, "hard", True))
            }
            for size in config.sizes
        },
        "again": {p.name: table.beside(p, again[p]) for p in again if p in table.found},
        "budget": budget(config, found),
    }  # fmt: skip


def _trial(point: Point, result: Mapping[str, Any]) -> dict[str, Any]:
    return {**point._asdict(), "valid": result["valid"], "curve": result["curve"]}


class Table:
    """Looks results up by place, an arm's labelled groups and flips, and compares them with the
    discriminative arm's, seed by seed."""

    def __init__(self, config: ConfigDict, found: Found):
        self.config, self.found = config, {p: r for p, r in found.items() if not p.is_trial}
        world = config.world
        self.pairs = {s: analysis.load_pairs(s, world[s], world.seed) for s in SPLITS}
        self._right = {
            (point, split): analysis.correct(self.pairs[split], result[f"scores/{split}"])
            for point, result in self.found.items() for split in SPLITS
        }  # fmt: skip
        self._spreads: dict[tuple[str, int, str, bool], analysis.Spread | None] = {}

    def seeds(self, arm: str, labelled: int, flip: float) -> list[Point]:
        return [p for p in self.found if p[:3] == (arm, labelled, flip)]

    def spread(
        self,
        values_SN: Sequence[np.ndarray],
        split: str,
        confidence: float | None = None,
        known: analysis.Spread | None = None,
    ) -> dict[str, Any] | None:
        """Mean, interval and number of seeds; None without any. `known`: for few seeds, see
        `known_spread`."""
        if not values_SN:
            return None
        settings = self.config.verdict
        wanted = confidence or settings.confidence
        if len(values_SN) >= settings.seeds:  # they tell enough by themselves
            known = None
        found = analysis.seeds_interval(
            values_SN, self.pairs[split].group, settings.draws, wanted, known
        )
        return {**found._asdict(), "seeds": len(values_SN)}

    def known_spread(
        self, arm: str, labelled: int, split: str, gains: bool
    ) -> analysis.Spread | None:
        """How much one seed's accuracy, or its gain over the discriminative arm, varies with so
        many labelled groups; fewer labels make seeds differ more.

        It is pooled over all arms and flips, or over this arm's flips where these differ more. Arms
        that begin with a run of their own, whose seeds differ by that run, too, are a pool apart.
        Arms of one flip share labelled groups, and their gains the discriminative runs: so degrees
        of freedom are counted once for each flip.
        """
        key = arm, labelled, split, gains
        if key not in self._spreads:
            self._spreads[key] = self._pool(*key)
        return self._spreads[key]

    def _pool(self, arm: str, labelled: int, split: str, gains: bool) -> analysis.Spread | None:
        samples: dict[tuple[str, float], list[float]] = {}
        places = {
            (p.arm, p.flip) for p in self.found
            if p.labelled == labelled and bool(p.what.first) == bool(ARMS[arm].first)
        }  # fmt: skip
        for other, flip in sorted(places):  # sums to the last digit
            rows = (
                self._gains(other, labelled, flip, split) if gains
                else [self._right[p, split] for p in self.seeds(other, labelled, flip)]
            )  # fmt: skip
            samples[other, flip] = [float(row_N.mean()) for row_N in rows]
        pooled = analysis.pooled_spread([*samples.values()])
        if pooled is None:
            return None
        own = analysis.pooled_spread([v for (other, _), v in samples.items() if other == arm])
        counts: dict[float, int] = {}
        for (_, flip), values in samples.items():
            counts[flip] = max(counts.get(flip, 0), len(values) - 1)
        widest = max(spread.deviation for spread in (pooled, own) if spread is not None)
        return analysis.Spread(widest, sum(counts.values()))

    def gain(
        self, arm: str, labelled: int, flip: float, split: str, confidence: float | None = None
    ) -> dict[str, Any] | None:
        """Over the discriminative arm, of the seeds that both have."""
        known = self.known_spread(arm, labelled, split, True)
        return self.spread(self._gains(arm, labelled, flip, split), split, confidence, known)

    def _gains(
        self, arm: str, labelled: int, flip: float, split: str, other: str = BASELINE
    ) -> list[np.ndarray]:
        return [
            self._right[point, split] - self._right[beside, split]
            for point in self.seeds(arm, labelled, flip)
            if (beside := point._replace(arm=other)) in self.found and beside != point
        ]

    def versus(self, arm: str, other: str, labelled: int, flip: float) -> dict[str, Any] | None:
        """The gain on `hard` over another arm than the discriminative one, by these seeds alone."""
        return self.spread(self._gains(arm, labelled, flip, "hard", other), "hard")

    def place(self, arm: str, labelled: int, flip: float) -> dict[str, Any] | None:
        """Every measure that all points have; None where none is made."""
        points = self.seeds(arm, labelled, flip)
        if not points:
            return None
        hard, results = self.pairs["hard"], [self.found[p] for p in points]
        scores = [r["scores/hard"] for r in results]
        own = {s: self.known_spread(arm, labelled, s, False) for s in SPLITS}
        return {
            **{s: self.spread([self._right[p, s] for p in points], s, None, own[s])
               for s in SPLITS},
            "gain": {s: self.gain(arm, labelled, flip, s) for s in SPLITS},
            "advice": self._advice(arm, labelled, flip),
            "valid": _mean([r["valid"] for r in results]),
            "step": [r["step"] for r in results],
            "preference": _mean([analysis.preference_loss(hard, s) for s in scores]),
            "calibration": _mean([analysis.reliability(hard, s)["error"] for s in scores]),
            "rank": _mean([_last(r["ranks"])["effective_rank"] for r in results]),
            "says": _mean_by_name([_last(r["says"]) for r in results]),
            "attack": _mean(
                [analysis.attack_numbers(hard, r["attack"])["gain_in_spreads"]
                 for r in results if r.get("attack")]
            ),
            "seconds": _mean([sum(r["seconds"].values()) for r in results]),
        }  # fmt: skip

    def _advice(self, arm: str, labelled: int, flip: float) -> dict[str, Any] | None:
        """The gain on `hard`, with an interval for as many comparisons as there are arms for the
        same critiques; None of an arm that is none to choose."""
        rivals = max((len(arms) for arms in CRITIQUES.values() if arm in arms), default=0)
        confidence = 1 - (1 - self.config.verdict.confidence) / max(1, rivals)
        return self.gain(arm, labelled, flip, "hard", confidence) if rivals else None

    def rule(self, load: Any) -> dict[str, Any]:
        """How right a rule that needs no model is, by split: the smaller number is the better."""
        world, found = self.config.world, {}
        for split, pairs in self.pairs.items():
            scores = [[-x for x in row] for row in load(split, world[split], world.seed)]
            found[split] = self.spread([analysis.correct(pairs, scores)], split)
        return found

    def cell(self, point: Point) -> dict[str, Any]:
        """One run alone."""
        beside = point._replace(arm=BASELINE)
        own = float(self._right[point, "hard"].mean())
        compared = beside in self.found and beside != point
        other = float(self._right[beside, "hard"].mean()) if compared else None
        return {
            "valid": self.found[point]["valid"],
            "test": float(self._right[point, "test"].mean()),
            "hard": own,
            "gain": None if other is None else own - other,
            "step": self.found[point]["step"],
        }

    def beside(self, point: Point, result: Mapping[str, Any]) -> dict[str, Any]:
        """The same cell, made on another machine: where, accuracies of both, and pairs that the two
        order in different ways."""
        first, out = self.found[point], {}
        for split, pairs in self.pairs.items():
            own_N = self._right[point, split]
            other_N = analysis.correct(pairs, result[f"scores/{split}"])
            out[split] = {
                "accuracies": [float(own_N.mean()), float(other_N.mean())],
                "differ": int((own_N != other_N).sum()),
            }
        steps = [r["step"] for r in (first, result)]
        return {"machines": [machine_of(r) for r in (first, result)], "steps": steps, **out}

    def efficiency(self, arm: str, flip: float, accuracy: float) -> dict[str, Any] | None:
        """How many times fewer labelled groups this arm needs than the discriminative one
        (`efficiency.compare`), by the sizes that both have; None: fewer than two."""
        shared = [
            size for size in self.config.sizes
            if all(self.seeds(a, size, flip) for a in (arm, BASELINE))
        ]  # fmt: skip
        if len(shared) < 2:
            return None
        curves = [[self._by_group(a, size, flip) for size in shared] for a in (arm, BASELINE)]
        sizes_G = np.bincount(np.unique(self.pairs["hard"].group, return_inverse=True)[1])
        settings = self.config.verdict
        found = efficiency.compare(
            *curves, sizes_G, shared, accuracy, settings.draws, settings.confidence,
            [[self.known_spread(a, size, "hard", False) for size in shared]
             for a in (arm, BASELINE)],
        )  # fmt: skip
        seeds = min(len(c) for curve in curves for c in curve)
        return {**found, "sizes": shared, "seeds": seeds}

    def _by_group(self, arm: str, labelled: int, flip: float) -> np.ndarray:
        """[S, G]: right pairs of each group of `hard`."""
        place_N = np.unique(self.pairs["hard"].group, return_inverse=True)[1]
        points = self.seeds(arm, labelled, flip)
        return np.stack([np.bincount(place_N, self._right[p, "hard"]) for p in points])


def verdict(config: ConfigDict, table: Table) -> dict[str, Any]:
    """Whether the claim holds, by the thresholds of the config: 'arms': {arm: its gain, with an
    interval for as many comparisons as there are arms, and what it passes}, 'placebos': {the same
    arm with critiques of other examples: its gain, and whether that is none}, 'seeds', 'holds'
    (None: cells are missing)."""
    settings, place = config.verdict, (config.headline.labelled, config.headline.flip)
    confidence = 1 - (1 - settings.confidence) / len(settings.arms)
    arms, placebos = {}, {}
    for arm, placebo in settings.arms:
        gain = table.gain(arm, *place, "hard", confidence)
        arms[arm] = gain and {
            **gain,
            "enough": bool(100 * gain["value"] >= settings.gain),
            "above_zero": bool(gain["low"] > 0),
        }
        gain = table.gain(placebo, *place, "hard")
        placebos[placebo] = gain and {
            **gain, "null": bool(100 * gain["value"] < settings.null or gain["low"] <= 0)
        }  # fmt: skip
    rows = [*arms.values(), *placebos.values()]
    seeds, holds = min(row["seeds"] if row else 0 for row in rows), None
    if all(rows):
        holds = all(row["enough"] and row["above_zero"] for row in arms.values())
        holds = holds and all(row["null"] for row in placebos.values())
    return {
        "arms": arms, "placebos": placebos, "seeds": seeds, "confidence": confidence,
        "holds": holds,
    }  # fmt: skip


def _last(by_step: Mapping[str, Any]) -> Any:
    return by_step[max(by_step, key=int)]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _mean_by_name(rows: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    return {name: _mean([row[name] for row in rows if name in row]) for name in rows[0]}
