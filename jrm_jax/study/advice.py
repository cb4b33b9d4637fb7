"""What the second part says to a user: by what was measured, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jrm_jax.study.regimes import CRITIQUES, place_words
from jrm_jax.study.tables import points, table


def advice(config: ConfigDict, numbers: Mapping[str, Any]) -> list[str]:
    """The table 'your labels are ..., your critiques are ..., use ...', and what it lacks."""
    rows = []
    for flip, by_size in numbers["curves"].items():
        for size, arms in by_size.items():
            for critiques, names in CRITIQUES.items():
                found = {a: arms[a]["advice"] for a in names if arms[a] and arms[a]["advice"]}
                if found:
                    place = place_words(int(size), float(flip))
                    rows.append((place, critiques, _advised(found, config.verdict.advice_seeds)))
    measured = {row[0] for row in rows}
    left = len(config.flips) * len(config.sizes) - len(measured)
    lines = table(("your labels are", "your critiques are", "use"), rows) if rows else []
    if left:
        sizes = _either([f"{size:,}" for size in config.sizes])
        flips = _either([f"{100 * flip:g}" for flip in config.flips])
        begin = f"Not measured yet: {left} of {left + len(measured)} kinds of labels."
        if not rows:
            begin = "No gain is measured yet, so nothing is recommended."
        lines += [f"{begin} Planned are {sizes} pairs with {flips} % of them wrong.", ""]
    return lines


def _advised(gains: Mapping[str, Mapping[str, Any]], seeds: int) -> str:
    """Arms whose interval lies above zero, of those that have enough seeds."""
    known = {arm: gain for arm, gain in gains.items() if gain["seeds"] >= seeds}
    best = max(known or gains, key=lambda arm: gains[arm]["value"])
    words = f"{best} {points(gains[best])}"
    if not known:
        return f"too few seeds to say; best so far: {words}"
    better = sorted((a for a in known if known[a]["low"] > 0), key=lambda a: -known[a]["value"])
    if not better:
        return f"discriminative; no gain can be told from zero (largest: {words})"
    return "; ".join(f"{arm} {points(known[arm])}" for arm in better)


def _either(words: Sequence[str]) -> str:
    """'0, 20 or 35'."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
