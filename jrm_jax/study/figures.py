"""The figures of the study, from the numbers of `numbers.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jrm_jax.errors import UserError

COLOURS = {  # of the arms that are drawn; changes tried later are in the tables alone
    "discriminative": "#555555", "joint": "#c0392b", "joint_masked": "#e59866",
    "joint_shuffled": "#8e44ad", "regression": "#2471a3", "generative": "#1e8449",
    "discriminative_x2": "#999999", "discriminative_x4": "#bbbbbb",
}  # fmt: skip
Numbers = Mapping[str, Any]


Figures = Mapping[str, tuple[Callable[..., bool], int]]


def draw(numbers: Numbers, folder: Path, figures: Figures | None = None) -> list[Path]:
    """Write every figure there are numbers for; returns their paths.

    Args:
        figures: FIGURES, unless others are given: name -> (fill, axes side by side); fill says
            whether there was anything to draw.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("the figures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (fill, width) in (figures or FIGURES).items():
        figure, axes = plt.subplots(1, width, figsize=(4.6 * width, 3.6), squeeze=False)
        path = folder / f"{name}.png"
        if fill(numbers, *axes[0]):
            figure.tight_layout()
            # without the version of the library: equal numbers give equal files
            figure.savefig(path, dpi=110, metadata={"Software": None})
            written.append(path)
        else:
            path.unlink(missing_ok=True)
        plt.close(figure)
    return written


def _arms(numbers: Numbers) -> dict[str, Any]:
    return {arm: row for arm, row in numbers["arms"].items() if row and arm in COLOURS}


def _line(axis, places, rows, label: str, colour: str) -> bool:
    """Accuracies with their intervals; places without a row are left out."""
    kept = [(x, row) for x, row in zip(places, rows, strict=True) if row]
    if not kept:
        return False
    x, rows = zip(*kept, strict=True)
    values = [100 * r["value"] for r in rows]
    below = [100 * (r["value"] - r["low"]) for r in rows]
    above = [100 * (r["high"] - r["value"]) for r in rows]
    axis.errorbar(x, values, (below, above), marker="o", capsize=3, label=label, color=colour)
    return True


def _sizes(numbers: Numbers, axis) -> bool:
    sizes, drawn = [int(s) for s in numbers["sizes"]], False
    for arm in ("discriminative", "joint"):
        rows = [numbers["sizes"][str(s)][arm] for s in sizes]
        drawn |= _line(axis, sizes, [r and r["hard"] for r in rows], arm, COLOURS[arm])
    axis.set(xscale="log", xlabel="training groups", ylabel="pair accuracy on hard, %")
    axis.set_xticks(sizes, [str(s) for s in sizes])
    axis.minorticks_off()
    axis.legend() if drawn else None
    return drawn


def _weights(numbers: Numbers, axis) -> bool:
    weights = [float(w) for w in numbers["weights"]]
    rows = [numbers["weights"][w]["joint"] for w in numbers["weights"]]
    drawn = _line(axis, weights, [r and r["hard"] for r in rows], "joint", COLOURS["joint"])
    base = numbers["arms"]["discriminative"]
    if base:
        level = 100 * base["hard"]["value"]
        axis.axhline(level, color=COLOURS["discriminative"], ls="--", label="discriminative")
    axis.set(xscale="log", xlabel="weight of the language loss", ylabel="pair accuracy on hard, %")
    axis.set_xticks(weights, [f"{w:g}" for w in weights])
    axis.minorticks_off()
    axis.legend() if drawn else None
    return drawn


def _kinds(numbers: Numbers, by_instruction, by_flaw) -> bool:
    drawn = False
    for axis, name in ((by_instruction, "instruction"), (by_flaw, "flaw")):
        rows = numbers["kinds"][name]
        for place, row in enumerate(rows.values()):
            found = row["gain"]
            value, low, high = (100 * found[key] for key in ("value", "low", "high"))
            axis.plot((low, high), (place, place), color=COLOURS["joint"])
            axis.plot(value, place, "o", color=COLOURS["joint"])
            drawn = True
        axis.axvline(0, color="#888888", lw=1)
        axis.set_yticks(range(len(rows)), list(rows))
        axis.set(title=f"by {name}", xlabel="joint - discriminative on hard, points")
    return drawn


def _calibration(numbers: Numbers, axis) -> bool:
    axis.plot((0.5, 1), (0.5, 1), color="#888888", lw=1)
    drawn = False
    for arm, row in _arms(numbers).items():
        for bins in row["reliability"]:
            points = [(b["predicted"], b["observed"]) for b in bins]
            axis.plot(*zip(*points, strict=True), marker="o", label=arm, color=COLOURS[arm])
            drawn = True
    axis.set(xlabel="predicted chance of the preferred one", ylabel="share right, hard")
    axis.legend(fontsize=7) if drawn else None
    return drawn


def _ranks(numbers: Numbers, over_training, spectrum) -> bool:
    for arm, row in _arms(numbers).items():
        steps = {int(step): found for step, found in row["rank"].items()}
        if steps:
            ranks = [found["effective_rank"] for found in steps.values()]
            over_training.plot([*steps], ranks, marker="o", label=arm, color=COLOURS[arm])
            spectrum.plot(steps[max(steps)]["spectrum"], label=arm, color=COLOURS[arm])
    over_training.set(xlabel="step", ylabel="effective rank of the reward token")
    spectrum.set(
        yscale="log", xlabel="singular value", ylabel="share of the sum, last step", title="seed 0"
    )
    drawn = bool(_arms(numbers))
    spectrum.legend(fontsize=7) if drawn else None
    return drawn


def _best_of_n(numbers: Numbers, axis) -> bool:
    for arm, row in _arms(numbers).items():
        counts = [int(n) for n in row["best_of_n"]]
        axis.plot(counts, [*row["best_of_n"].values()], marker="o", label=arm, color=COLOURS[arm])
    if numbers["contests"]:
        gold = numbers["contests"]["gold"]
        axis.plot([int(n) for n in gold], [*gold.values()], color="black", ls=":", label="gold")
    axis.set(xscale="log", xlabel="n", ylabel="gold score of the best of n")
    drawn = bool(_arms(numbers))
    axis.legend(fontsize=7) if drawn else None
    return drawn


def _curves(numbers: Numbers, *axes) -> bool:
    """Of the second part: an axis for each share of wrong votes, arms of two sizes or more."""
    drawn = False
    for axis, (flip, by_size) in zip(axes, numbers["curves"].items(), strict=False):
        arms = dict.fromkeys(arm for row in by_size.values() for arm in row)
        sizes = [int(size) for size in by_size]
        for place, arm in enumerate(arms):
            found = [row[arm] and row[arm]["hard"] for row in by_size.values()]
            if sum(map(bool, found)) > 1:
                drawn |= _line(axis, sizes, found, arm, COLOURS.get(arm, f"C{place % 10}"))
        axis.set(xscale="log", title=f"{100 * float(flip):g} % of the votes wrong",
                 xlabel="labelled groups", ylabel="pair accuracy on hard, %")  # fmt: skip
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.legend(fontsize=7) if axis.has_data() else None
    return drawn


FIGURES: Figures = {
    "sizes": (_sizes, 1),
    "weights": (_weights, 1),
    "kinds": (_kinds, 2),
    "calibration": (_calibration, 1),
    "ranks": (_ranks, 2),
    "best_of_n": (_best_of_n, 1),
}
REGIMES: Figures = {"curves": (_curves, 3)}
