"""All numbers of the study's page, from the cells there are: one dict in JSON types.

A number that cannot be made yet is absent or None, and shown as missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jrm_jax.evaluation.statistics import Interval
from jrm_jax.study import analysis, cells, design
from jrm_jax.study.cells import ARMS, Cell

Found = Mapping[Cell, Mapping[str, Any]]
BASELINE, TREATED, PLACEBO = "discriminative", "joint", "joint_shuffled"
BEST_OF = (1, 2, 4, 8, 16, 32)
SPLITS = ("test", "hard")


def collect(config: ConfigDict, found: Found) -> dict[str, Any]:
    """Everything the page says in numbers."""
    full = max(config.sizes)
    pairs = {s: analysis.load_pairs(s, config.world[s], config.world.seed) for s in SPLITS}
    table = _Table(config, found, pairs)
    gain, placebo = (table.gain(arm, full, 1.0, "hard") for arm in (TREATED, PLACEBO))
    return {
        "pairs": {split: len(p.group) for split, p in pairs.items()},
        "verdict": gain and analysis.verdict(
            _interval(gain), _interval(placebo) if placebo else None, config.verdict
        ),
        "arms": {arm: table.arm(arm, full) for arm in ARMS},
        "sizes": {
            str(size): {arm: table.accuracy(arm, size, 1.0) for arm in (BASELINE, TREATED)}
            | {"gain": table.gain(TREATED, size, 1.0, "hard")}
            for size in config.sizes
        },
        "weights": {
            f"{weight:g}": {TREATED: table.accuracy(TREATED, full, weight)}
            | {"gain": table.gain(TREATED, full, weight, "hard")}
            for weight in _weights(config, full)
        },
        "kinds": table.kinds(full),
        "longer": longer(config, found, full),
        "pixel_rule": table.pixel_rule(),
        "contests": _contest_bounds(config) if found else None,
        "cells": {cell.name: table.cell(cell) for cell in found},
        "budget": budget(config, found),
    }


def _weights(config: ConfigDict, full: int) -> list[float]:
    every = {c.weight for c in cells.plan(config) if c.arm == TREATED and c.size == full}
    return sorted(every)


def _interval(row: Mapping[str, Any]) -> Interval:
    return Interval(row["value"], row["low"], row["high"], row["groups"])


def _mean(values: Sequence[float]) -> float | None:
    values = [v for v in values if v is not None and math.isfinite(v)]
    return float(np.mean(values)) if values else None


class _Table:
    """Looks results up by arm, size and weight, and compares them seed by seed."""

    def __init__(self, config: ConfigDict, found: Found, pairs: Mapping[str, analysis.Pairs]):
        self.config, self.found, self.pairs = config, found, pairs
        self._right: dict[tuple[Cell, str], np.ndarray] = {}

    def seeds(self, arm: str, size: int, weight: float) -> list[Cell]:
        return [c for c in self.found if c[:3] == (arm, size, weight)]

    def right(self, cell: Cell, split: str) -> np.ndarray:
        if (cell, split) not in self._right:
            scores = self.found[cell][f"scores/{split}"]
            self._right[cell, split] = analysis.correct(self.pairs[split], scores)
        return self._right[cell, split]

    def _spread(self, values_SN: Sequence[np.ndarray], split: str, keep=None) -> dict[str, Any]:
        """Mean, interval and number of seeds; `keep`: which pairs, default all."""
        group_N = self.pairs[split].group
        if keep is not None:
            values_SN, group_N = [row[keep] for row in values_SN], group_N[keep]
        settings = self.config.verdict
        found = analysis.interval(values_SN, group_N, settings.draws, settings.confidence)
        return {**found._asdict(), "seeds": len(values_SN), "pairs": len(group_N)}

    def accuracy(self, arm: str, size: int, weight: float) -> dict[str, Any] | None:
        chosen = self.seeds(arm, size, weight)
        return {
            split: self._spread([self.right(c, split) for c in chosen], split) for split in SPLITS
        } if chosen else None  # fmt: skip

    def gaps(
        self, arm: str, size: int, weight: float, split: str, other: str = BASELINE
    ) -> list[np.ndarray]:
        """Per seed that both have: [N] this arm minus the other on the same data."""
        out = []
        for cell in self.seeds(arm, size, weight):
            beside = Cell(other, size, 1.0, cell.seed)
            if beside in self.found and beside != cell:
                out.append(self.right(cell, split) - self.right(beside, split))
        return out

    def gain(
        self, arm: str, size: int, weight: float, split: str, other: str = BASELINE
    ) -> dict[str, Any] | None:
        found = self.gaps(arm, size, weight, split, other)
        return self._spread(found, split) if found else None

    def kinds(self, full: int) -> dict[str, dict[str, Any]]:
        """Joint minus discriminative on `hard`, by instruction and by flaw."""
        found = self.gaps(TREATED, full, 1.0, "hard")
        base = [self.right(c, "hard") for c in self.seeds(BASELINE, full, 1.0)]
        out: dict[str, dict[str, Any]] = {}
        for name in ("instruction", "flaw"):
            column = getattr(self.pairs["hard"], name)
            out[name] = {
                str(kind): {
                    "gain": self._spread(found, "hard", column == kind),
                    BASELINE: self._spread(base, "hard", column == kind),
                }
                for kind in np.unique(column)
            } if found else {}  # fmt: skip
        return out

    def pixel_rule(self) -> dict[str, Any] | None:
        """How right 'closer to the source in pixels' is on `hard`."""
        if not self.found:
            return None
        rule = [[-d for d in row] for row in self._distances()]
        return self._spread([analysis.correct(self.pairs["hard"], rule)], "hard")

    def _distances(self):
        return analysis.load_distances("hard", self.config.world.hard, self.config.world.seed)

    def cell(self, cell: Cell) -> dict[str, float | None]:
        """One run alone: accuracies; its accuracy on `hard` beyond that of the discriminative run
        of its size and seed; the attack's gain in spreads and the same difference of it."""
        beside = cell._replace(arm=BASELINE, weight=1.0)
        compared = beside in self.found and beside != cell
        own, other = self._attack(cell), self._attack(beside) if compared else None
        right = {split: float(self.right(cell, split).mean()) for split in SPLITS}
        return {
            "valid": self.found[cell]["valid"],
            **right,
            "gain": right["hard"] - float(self.right(beside, "hard").mean()) if compared else None,
            "attack": own,
            "attack_over": None if own is None or other is None else own - other,
        }

    def _attack(self, cell: Cell) -> float | None:
        numbers = analysis.attack_numbers(self.pairs["hard"], self.found[cell]["attack"])
        return numbers and numbers["gain_in_spreads"]

    def arm(self, arm: str, full: int) -> dict[str, Any] | None:
        """Every measure of an arm at full data; means over its seeds."""
        chosen = self.seeds(arm, full, 1.0)
        if not chosen:
            return None
        hard, results = self.pairs["hard"], [self.found[c] for c in chosen]
        within = [analysis.within_groups(hard, self.right(c, "hard")) for c in chosen]
        attacks = [analysis.attack_numbers(hard, r["attack"]) for r in results if r["attack"]]
        judge = ARMS[arm].judge
        calibrated = [] if judge else [
            analysis.reliability(hard, r["scores/hard"]) for r in results
        ]
        return {
            **self.accuracy(arm, full, 1.0),
            "gain": {split: self.gain(arm, full, 1.0, split) for split in SPLITS},
            "over_joint": self.gain(arm, full, 1.0, "hard", TREATED),
            "why": _why(results),
            "valid": _mean([r["valid"] for r in results]),
            "language": _mean([r["language"]["hard"] for r in results]),
            "step": [r["step"] for r in results],
            "within_groups": _mean([w[0] for w in within]),
            "whole_groups": _mean([w[1] for w in within]),
            "unparsable": _mean([analysis.unparsable(r["scores/hard"]) for r in results]),
            "calibration_error": _mean([c["error"] for c in calibrated]),
            "reliability": [c["bins"] for c in calibrated[:1]],
            "rank": _ranks(results),
            "pixel_agreement": _mean(
                [analysis.agreement(hard, r["scores/hard"], self._distances()) for r in results]
            ),
            "best_of_n": self._best_of_n(results),
            "attack": {k: _mean([a[k] for a in attacks]) for k in attacks[0]} if attacks else None,
            "flops": [r["cost"]["flops_per_group"] for r in results],
            "seconds": _mean([r["cost"]["seconds_per_group"] for r in results]),
            "train_seconds": _mean([r["seconds"]["train"] for r in results]),
        }

    def _best_of_n(self, results) -> dict[str, float | None]:
        attempts = self.config.measure.attempts
        gold = analysis.contest_gold(
            min(self.config.measure.contests, self.config.world.test),
            self.config.world.seed, attempts,
        )  # fmt: skip
        return {
            str(n): _mean(
                [
                    analysis.best_of_n(p, g, n)
                    for r in results
                    for p, g in zip(r["contests"], gold, strict=True)
                ]
            )
            for n in BEST_OF
            if n <= attempts
        }


def _why(results) -> dict[str, Any]:
    """Of the seeds that have them (cells from before these measures have not): what the reward
    token's state says and how the losses pull, both at the last step; the first seed's losses."""
    says = [r["says"][max(r["says"], key=int)] for r in results if r.get("says")]
    pulls = [r["pulls"] for r in results if r.get("pulls")]
    return {
        "seeds": len(says),
        "says": {topic: _mean([s.get(topic) for s in says]) for topic in (says or [{}])[0]},
        "pulls": {name: _mean([p[name] for p in pulls]) for name in (pulls or [{}])[0]},
        "training": next((r["training"] for r in results if r.get("training")), []),
    }


def _ranks(results) -> dict[str, dict[str, Any]]:
    """By step that all seeds have kept: mean effective rank, and the first seed's spectrum."""
    shared = set.intersection(*(set(r["ranks"]) for r in results))
    return {
        step: {
            "effective_rank": _mean([r["ranks"][step]["effective_rank"] for r in results]),
            "spectrum": results[0]["ranks"][step]["spectrum"],
        }
        for step in sorted(shared, key=int)
    }


def _contest_bounds(config: ConfigDict) -> dict[str, dict[str, float | None]]:
    """The best that any score could choose."""
    attempts = config.measure.attempts
    gold = analysis.contest_gold(
        min(config.measure.contests, config.world.test), config.world.seed, attempts
    )
    sizes = [n for n in BEST_OF if n <= attempts]
    return {"gold": {str(n): _mean([analysis.best_of_n(g, g, n) for g in gold]) for n in sizes}}


def longer(config: ConfigDict, found: Found, full: int) -> list[dict[str, Any]]:
    """Per seed: after how many steps discriminative training reaches joint's accuracy on `valid`,
    and what both have on `hard` then."""
    pairs = analysis.load_pairs("hard", config.world.hard, config.world.seed)
    rows = []
    own = (ARMS[BASELINE].changes, ARMS[BASELINE].groups)
    names = [name for name, arm in ARMS.items() if (arm.changes, arm.groups) == own]
    planned = {c.seed for c in cells.plan(config) if ARMS[c.arm].until}
    for seed in sorted(planned):
        goal = found.get(Cell(TREATED, full, 1.0, seed))
        tried = [found[c] for n in names if (c := Cell(n, full, 1.0, seed)) in found]
        if goal is None or not tried:
            continue
        reached = next((r for r in tried if r["valid"] >= goal["valid"]), None)
        last = reached or tried[-1]
        right = [analysis.correct(pairs, r["scores/hard"]) for r in (goal, last)]
        gain = analysis.interval(right[0] - right[1], pairs.group, config.verdict.draws)
        rows.append(
            {
                "seed": seed,
                "reached": reached is not None,
                "steps": last["steps"],
                "valid": [goal["valid"], last["valid"]],
                "hard": [float(r.mean()) for r in right],
                "gain": gain._asdict(),
                "complete": reached is not None or len(tried) == len(names),
            }
        )
    return rows


def machine_of(result: Mapping[str, Any]) -> str:
    """'1 x cpu (cpu), 2 x AMD EPYC, jax 0.10.2'."""
    own = result["machine"]
    return f"{own['device']}, {own['cpu']}, jax {own['jax']}"


def budget(config: ConfigDict, found: Found) -> dict[str, Any]:
    """What was run, on what, how long; what is missing; what need not be run."""
    every = design.plan(config)
    spared = {c: cells.unneeded(c, found) for c in every if c not in found}
    machines: dict[str, int] = {}
    for result in found.values():
        name = machine_of(result)
        machines[name] = machines.get(name, 0) + 1
    missing = [c for c in every if c not in found and not spared[c]]
    costs = [cells.estimate(config, c, found) for c in missing]
    return {
        "cells": {c.name: result["seconds"] for c, result in found.items()},
        "seconds": sum(sum(r["seconds"].values()) for r in found.values()),
        "machines": machines,
        "missing": [c.name for c in missing],
        "missing_seconds": None if None in costs else sum(costs),
        "unneeded": {c.name: why for c, why in spared.items() if why},
    }
