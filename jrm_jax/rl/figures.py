"""The figures of the page, from the numbers of `numbers.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jrm_jax.rl import fits
from jrm_jax.rl.models import CONTROLS
from jrm_jax.study import figures

COLOURS = ("#c0392b", "#2471a3", "#1e8449", "#8e44ad", "#e59866", "#148f77", "#7d6608", "#555555")
MARKERS = ("o", "s", "^", "D", "v")  # of the arms that have a colour a second time, a third, ...
Numbers = Mapping[str, Any]


def draw(numbers: Numbers, folder: Path) -> list[Path]:
    """Write every figure there are numbers for; returns their paths.

    Raises:
        UserError: matplotlib is not installed.
    """
    looks = {arm: look(place) for place, arm in enumerate(numbers["arms"])}

    def filled(part: str, fill: Callable[..., None]) -> Callable[..., bool]:
        def on(numbers: Numbers, *axes: Any) -> bool:
            arms = {arm: row[part] for arm, row in numbers["arms"].items() if row[part]}
            for arm, row in arms.items():
                fill(row, arm, looks[arm], *axes)
            if arms:
                axes[0].legend(fontsize=7)
            return bool(arms)

        return on

    fills = {name: (filled(part, fill), width) for name, (part, fill, width) in FIGURES.items()}
    return figures.draw(numbers, folder, fills)


def look(place: int) -> dict[str, Any]:
    """Colour and marker of an arm; no two of the first 40 are alike."""
    again, colour = divmod(place, len(COLOURS))
    return {"color": COLOURS[colour], "marker": MARKERS[again % len(MARKERS)], "ms": 3}


def _roots(kl: list[float]) -> list[float]:
    return [math.sqrt(max(0.0, nats)) for nats in kl]


def _fitted(axis, row: Mapping[str, Any], start: float, form: str, colour: str) -> None:
    alpha, beta = (row["fit"][name]["value"] for name in ("alpha", "beta"))
    if alpha is None or not math.isfinite(alpha):
        return
    most = max(row["kl"] if "kl" in row else row["curves"]["kl"])
    nats = [most * (i / 60) ** 2 for i in range(1, 61)]
    values = [start + fits.value(alpha, beta, x, form) for x in nats]
    axis.plot(_roots(nats), values, ls=":", color=colour, lw=1)


def _best(row: Mapping[str, Any], arm: str, look: dict[str, Any], gold, proxy) -> None:
    values = [point["value"] for point in row["gold"]]
    low, high = ([point[end] for point in row["gold"]] for end in ("low", "high"))
    gold.plot(_roots(row["kl"]), values, label=arm, **look)
    gold.fill_between(_roots(row["kl"]), low, high, color=look["color"], alpha=0.12, lw=0)
    _fitted(gold, row, values[0], fits.BEST_OF_N, look["color"])
    if arm not in CONTROLS:
        proxy.plot(_roots(row["kl"]), row["proxy"], **look)
    gold.set(xlabel="root of KL, nats", ylabel="gold of the best of n", title="best of n")
    proxy.set(xlabel="root of KL, nats", ylabel="its score, in the base's deviations")


def _rl(row: Mapping[str, Any], arm: str, look: dict[str, Any], gold, proxy, ranks, gap) -> None:
    for own in row["by_run"]:
        gold.plot(_roots(own["kl"]), own["gold"], color=look["color"], lw=0.7, alpha=0.6)
    x, curves = _roots(row["curves"]["kl"]), row["curves"]
    gold.plot(x, curves["gold"], label=arm, **look)
    _fitted(gold, row, row["start"]["value"], fits.RL, look["color"])
    gold.set(xlabel="root of KL, nats", ylabel="gold, test and hard", title="RL")
    for axis, name, words in (
        (proxy, "proxy", "score, in the base's deviations"),
        (ranks, "spearman", "Spearman of score and gold in a group"),
        (gap, "gap", "score ahead of gold, in deviations"),
    ):
        axis.set(xlabel="root of KL, nats", ylabel=words)
        if arm in CONTROLS:  # theirs are no scores of a model
            continue
        axis.plot(x, [math.nan if v is None else v for v in curves[name]], **look)


# name -> (part of an arm's numbers, what draws it, axes side by side)
FIGURES: dict[str, tuple[str, Callable[..., None], int]] = {
    "best_of_n": ("best_of_n", _best, 2),
    "rl": ("rl", _rl, 4),
}
