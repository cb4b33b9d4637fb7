"""Writes the page of the study's second part: text with tables, numbers as JSON, a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jrm_jax.study import cells, design, figures
from jrm_jax.study.advice import advice
from jrm_jax.study.regimes import ARMS, place_words
from jrm_jax.study.regimes_numbers import collect
from jrm_jax.study.regimes_protocol import budget, protocol, trials
from jrm_jax.study.tables import NOT_YET, number, points, share, table

Numbers = Mapping[str, Any]
NOTES = "notes.md"  # by hand
TABLE = "table.md"  # what README shows, too
YES = {True: "yes", False: "**no**", None: NOT_YET}


def write(config: ConfigDict) -> list[Path]:
    """OUT.md, OUT/numbers.json, OUT/table.md and the figure; returns what was written.

    OUT/notes.md, where it is, is written by hand and becomes a part of OUT.md.
    """
    numbers = collect(config, design.load(config), design.load(config, cells.AGAIN))
    out = Path(config.out)
    drawn = figures.draw(numbers, out, figures.REGIMES)
    notes = out / NOTES
    files = {
        out / "numbers.json": json.dumps(numbers, indent=1) + "\n",
        out / TABLE: "\n".join(advice(config, numbers)).rstrip() + "\n",
        out.with_suffix(".md"): markdown(
            config, numbers, [path.stem for path in drawn],
            notes.read_text() if notes.is_file() else "",
        ),
    }  # fmt: skip
    for path, text in files.items():
        path.write_text(text)
    return [*reversed(files), *drawn]


def markdown(config: ConfigDict, numbers: Numbers, shown: list[str], notes: str = "") -> str:
    """The whole text."""
    folder = Path(config.out).name
    command = f"python -m jrm_jax.study --config=configs/study.py:{config.variant}"
    parts = [
        "# Few and noisy labels, many critiques: should I train jointly?",
        "",
        f"{sentence(config, numbers)}",
        "",
        f"Made by `{command}` from the cells in `{folder}/cells/`; the same command goes on with "
        f"the cells that are missing (`--jobs=4`: four at a time). Add `--report` to make this "
        f"page and `{folder}/numbers.json` again from the cells alone. It is overwritten: words of "
        f"your own belong into `{folder}/{NOTES}`, which is read into it.",
        "",
        "## What to use",
        "",
        *advice(config, numbers),
        *_claim(config, numbers),
        *([notes.strip(), ""] if notes else []),
        *_headline(config, numbers),
        *_curves(config, numbers, folder if "curves" in shown else ""),
        *_efficiency(numbers),
        *_rules(numbers),
        *trials(config, numbers),
        *_cells(numbers),
        *_again(config, numbers),
        *budget(config, numbers),
        *protocol(config, numbers),
    ]
    return "\n".join(parts).rstrip() + "\n"


def sentence(config: ConfigDict, numbers: Numbers) -> str:
    """What came out, in one sentence."""
    found, place = numbers["verdict"], place_words(config.headline.labelled, config.headline.flip)
    said = ", ".join(
        f"{arm} {100 * row['value']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        for arm, row in found["arms"].items() if row
    )  # fmt: skip
    if not said:
        return f"**Nothing is decided yet**: of the headline, {place}, the cells are not yet run."
    words = {
        True: "**The claim holds**", False: "**The claim does not hold**",
        None: "**Nothing is decided yet**",
    }[found["holds"]]  # fmt: skip
    few = found["seeds"] < config.verdict.seeds
    if few and found["holds"] is not None:
        words = f"**After {found['seeds']} of {config.verdict.seeds} seeds, so not final:** " + (
            "the claim holds" if found["holds"] else "the claim does not hold"
        )
    return f"{words}: with {place}, points of accuracy on `hard` over discriminative are {said}."


# Pieces


def _claim(config: ConfigDict, numbers: Numbers) -> list[str]:
    settings, found = config.verdict, numbers["verdict"]
    place = place_words(config.headline.labelled, config.headline.flip)
    rows = [
        (f"{arm} - discriminative", points(row) if row else NOT_YET,
         f"at least +{settings.gain:g}: {YES[row and row['enough']]}; "
         f"above zero: {YES[row and row['above_zero']]}")
        for arm, row in found["arms"].items()
    ]  # fmt: skip
    rows += [
        (f"{arm} - discriminative", points(row) if row else NOT_YET,
         f"no gain: {YES[row and row['null']]}")
        for arm, row in found["placebos"].items()
    ]  # fmt: skip
    arms, placebos = (" and ".join(found[kind]) for kind in ("arms", "placebos"))
    return [
        "## The claim",
        "",
        f"Fixed before running: with {place}, and critiques of all {config.groups:,} groups, "
        f"{arms} each gain at least {settings.gain:g} points over discriminative on `hard`, their "
        f"intervals ({100 * found['confidence']:g} %, so that both together are "
        f"{100 * settings.confidence:g} %) lie above zero, and with critiques of other examples "
        f"({placebos}) each gains less than {settings.null:g} point or nothing that can be told "
        f"from zero; {settings.seeds} seeds.",
        "",
        *table(("on `hard`", "points (interval)", "threshold"), rows),
    ]


def _headline(config: ConfigDict, numbers: Numbers) -> list[str]:
    rows = []
    for arm, found in numbers["headline"].items():
        words = f"{arm}: {ARMS[arm].words}"
        if not found:
            continue
        gain = found["gain"]["hard"]
        rows.append(
            (
                words, share(found["test"]), share(found["hard"]),
                points(gain) if gain else "-", number(found["preference"]),
                number(found["calibration"]), number(found["rank"], ".1f"),
                number(found["says"].get("verdict")),
                number(found["attack"], "+.2f") if found["attack"] is not None else NOT_YET,
            )
        )  # fmt: skip
    head = (
        "arm", "test", "hard", "points over discriminative, hard", "preference loss, hard",
        "calibration error", "effective rank", "reads the verdict", "gain by the attack",
    )  # fmt: skip
    place = place_words(config.headline.labelled, config.headline.flip)
    return [
        f"## All arms, with {place}",
        "",
        *(table(head, rows) if rows else []),
        *_left(numbers["headline"]),
        *_beside(numbers),
    ]


def _beside(numbers: Numbers) -> list[str]:
    rows = [(name, points(gain)) for name, gain in numbers["beside"].items() if gain]
    return table(("one arm over another", "points, hard"), rows) if rows else []


def _left(arms: Mapping[str, Any]) -> list[str]:
    words = [f"{arm} ({ARMS[arm].words})" for arm, found in arms.items() if not found]
    return [f"{NOT_YET.capitalize()}: {'; '.join(words)}.", ""] if words else []


def _curves(config: ConfigDict, numbers: Numbers, folder: str) -> list[str]:
    lines = [
        "## By number of labels and noise",
        "",
        "Accuracy on `hard`; points over discriminative in brackets where they can be told from "
        "zero.",
        "",
    ]
    for flip, by_size in numbers["curves"].items():
        rows = []
        for arm in ARMS:
            found = [by_size[str(size)][arm] for size in config.sizes]
            if any(found):
                rows.append((arm, *(_short(row) for row in found)))
        lines += [f"{100 * float(flip):g} % of the votes wrong:", ""]
        head = ("arm", *(f"{size:,} labelled" for size in config.sizes))
        lines += table(head, rows) if rows else [f"{NOT_YET.capitalize()}.", ""]
    return [*lines, *([f"![accuracy by labels]({folder}/curves.png)", ""] if folder else [])]


def _short(row: Mapping[str, Any] | None) -> str:
    if not row:
        return NOT_YET
    gain, seeds = row["gain"]["hard"], row["hard"]["seeds"]
    told = gain and (gain["low"] > 0 or gain["high"] < 0)
    words = f" ({100 * gain['value']:+.1f})" if told else ""
    return f"{100 * row['hard']['value']:.1f}{words}, {seeds} seed{'s' * (seeds != 1)}"


def _efficiency(numbers: Numbers) -> list[str]:
    rows = []
    for flip, arms in numbers["efficiency"].items():
        for arm, by_accuracy in arms.items():
            if any(by_accuracy.values()):
                factors = (_factor(row) for row in by_accuracy.values())
                rows.append((f"{100 * float(flip):g} %", arm, *factors))
    accuracies = next(iter(next(iter(numbers["efficiency"].values())).values()))
    head = ("wrong", "arm", *(f"to reach {100 * float(a):g} % on hard" for a in accuracies))
    return [
        "## Label efficiency",
        "",
        "How many times fewer labels than discriminative, by straight lines between the sizes of "
        "the curves above (logarithm of the size). An arm that has the accuracy with the smallest "
        "size already may need fewer labels than that, and one that does not have it with the "
        "largest needs more: then the factor is a bound (`>=`, `<=`), or not measurable. So it is "
        "with each draw of the interval.",
        "",
        *(table(head, rows) if rows else ["Not yet: it needs two sizes of two arms.", ""]),
    ]


def _factor(row: Mapping[str, Any] | None) -> str:
    if not row:
        return NOT_YET
    least, most, low, high = (row[key] for key in ("least", "most", "low", "high"))
    if not least and most is None:
        value = "not measurable"
    elif most is None:
        value = f">= {least:.2g}"
    else:
        value = f"{most:.2g}" if least == most else f"<= {most:.2g}"
    low, high = f"{low:.2g}" if low else "no bound", f"{high:.2g}" if high else "no bound"
    percent = round(100 * row["open"])
    share = f", not measurable in {percent} % of the draws" if percent else ""
    return f"{value} ({low} to {high}{share}), {row['seeds']} seed{'s' * (row['seeds'] != 1)}"


def _rules(numbers: Numbers) -> list[str]:
    rows = [
        (name, share(row["test"]), share(row["hard"])) for name, row in numbers["rules"].items()
    ]
    return [
        "## Rules that need no model",
        "",
        "Equal ones count one half. An arm that is no better has learnt no more.",
        "",
        *table(("rule", "test", "hard"), rows),
    ]


def _cells(numbers: Numbers) -> list[str]:
    rows = []
    for name, own in numbers["cells"].items():
        accuracies = (f"{100 * own[split]:.1f}" for split in ("valid", "test", "hard"))
        gain = "-" if own["gain"] is None else f"{100 * own['gain']:+.1f}"
        rows.append((name, str(own["step"]), *accuracies, gain))
    head = ("cell", "best step", "valid", "test", "hard", "points over discriminative, hard")
    return [
        "## Cell by cell",
        "",
        *(table(head, rows) if rows else [f"{NOT_YET.capitalize()}.", ""]),
    ]


def _again(config: ConfigDict, numbers: Numbers) -> list[str]:
    rows = []
    for name, own in numbers["again"].items():
        steps = " and ".join(str(step) for step in own["steps"])
        columns = []
        for split in numbers["pairs"]:
            both = " and ".join(f"{100 * value:.2f}" for value in own[split]["accuracies"])
            columns.append(f"{both}; {own[split]['differ']}")
        rows.append((name, steps, *columns, *own["machines"]))
    if not rows:
        return []
    heads = (
        f"{split}: accuracies; pairs ordered otherwise, of {count:,}"
        for split, count in numbers["pairs"].items()
    )
    return [
        "## The same cells on another machine",
        "",
        f"Cells of `{Path(config.out).name}/{cells.AGAIN}/`, from the same config and seed. They "
        "count nowhere else on this page.",
        "",
        *table(("cell", "best step", *heads, "the cell", "again"), rows),
    ]
