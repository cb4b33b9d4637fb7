"""Writes the page of the study's second part: text with tables, numbers as JSON, a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jrm_jax.shell.terminal import duration
from jrm_jax.study import cells, design, figures
from jrm_jax.study.advice import advice
from jrm_jax.study.regimes import ARMS, place_words
from jrm_jax.study.regimes_numbers import collect
from jrm_jax.study.tables import number, points, share, table

Numbers = Mapping[str, Any]
NOTES = "notes.md"  # by hand
TABLE = "table.md"  # what README shows, too
NOT_YET = "not yet run"
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
        *_trials(config, numbers),
        *_cells(numbers),
        *_again(config, numbers),
        *_budget(config, numbers),
        *_protocol(config, numbers),
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


def _trials(config: ConfigDict, numbers: Numbers) -> list[str]:
    rows = []
    for trial in numbers["trials"]:
        curve = ", ".join(f"{step:g}: {100 * value:.1f}" for step, value in trial["curve"])
        place = (trial["arm"], f"{trial['labelled']:,}", f"{100 * trial['flip']:g} %")
        rows.append((*place, f"{trial['rate']:g}", str(trial["steps"]),
                     f"{100 * trial['valid']:.1f}", curve))  # fmt: skip
    train = config.train
    head = ("arm", "labelled", "wrong", "learning rate", "steps", "valid, best step",
            "valid by step")  # fmt: skip
    others = "".join(f", {rate:g} in {', '.join(arms)}" for arms, rate in config.rates)
    return [
        "## How length and learning rate were chosen",
        "",
        "On `valid`, seed 0: the length by the discriminative arm alone, a learning rate by each "
        f"arm of the claim for itself. In use: {train.total_steps} steps, learning rate "
        f"{train.optimizer.learning_rate:g}{others}. {config.chosen}",
        "",
        *(table(head, rows) if rows else [f"{NOT_YET.capitalize()}.", ""]),
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


def _budget(config: ConfigDict, numbers: Numbers) -> list[str]:
    found = numbers["budget"]
    made, missing = len(found["cells"]), len(found["missing"])
    left = found["missing_seconds"]
    about = f", about {duration(left)} at the pace so far" if left else ""
    rows = [(name, duration(s["train"]), duration(s["measure"])) for name, s in
            found["cells"].items()]  # fmt: skip
    return [
        "## Budget",
        "",
        f"Written before the first cell of the headline: {config.budget_hours:g} hours of one core "
        f"that has nothing else to do. {config.budget_words} So far {made} cells took "
        f"{duration(found['seconds'])} of wall time; {missing} are not yet run{about}. "
        + "".join(f"{count} ran on {name}. " for name, count in found["machines"].items()).rstrip(),
        "",
        *(table(("cell", "training", "measuring"), rows) if rows else []),
    ]


def _spreads(config: ConfigDict, numbers: Numbers) -> str:
    """How much seeds differ, in words."""
    said = []
    for size, arms in numbers["spreads"].items():
        if not arms:
            continue
        deviations = [100 * spread["deviation"] for spread in arms.values()]
        freedom = next(iter(arms.values()))["freedom"]  # the same for all
        said.append(
            f"{min(deviations):.1f} to {max(deviations):.1f} points with {int(size):,} "
            f"({freedom} degrees of freedom)"
        )
    alone = "With one seed they are of groups alone, so that they say nothing of other seeds. "
    if not said:
        return alone
    return (
        f"Where a place has fewer than {config.verdict.seeds} seeds, how much one seed's number "
        "varies is taken from all arms and shares of wrong votes with as many labels, or from the "
        "arm's own shares where these vary more: two or three seeds tell little of it, and one "
        f"tells nothing. Of a gain on `hard` the standard deviation is {', '.join(said)}; degrees "
        "of freedom are counted once for each share of wrong votes, as arms share the runs that "
        "they are compared with. This was decided after the cells of the curves were there; the "
        f"claim is of {config.verdict.seeds} seeds of its own, as it was fixed. A test measures "
        "that such intervals hold the truth as often as they say. "
    )


def _protocol(config: ConfigDict, numbers: Numbers) -> list[str]:
    train, world, rows = config.train, config.world, config.labelled_rows
    return [
        "## Protocol",
        "",
        f"- {config.groups:,} groups of the built-in world. Some are labelled: one pair, chosen by "
        "chance, with one vote, which is wrong with the chance given, unless the two are equally "
        "good: such votes, 6.7 %, stay half to each, so that of all votes 33 % are wrong where "
        "it says 35 %. All have critiques. `valid`, "
        "`test` and `hard` are clean, with all pairs.",
        f"- Every batch of every arm holds {rows} labelled groups, the same ones in the same "
        f"order; where {rows} does not divide their number, the last batch of a pass over them "
        "holds what is left (with 100 every 13th batch holds 4). An arm that learns from "
        f"critiques has {rows} more rows, drawn from all groups; their labels "
        "do not count. So labels are seen equally often in all arms, and critiques cost time and "
        "nothing else.",
        f"- {train.total_steps} steps in all arms, and {config.stage_steps} of critiques alone "
        "before them in the two arms that begin so. The checkpoint with the best accuracy on "
        f"`valid` ({world.valid} groups) counts.",
        "- Teacher: the score that a critique's last line states, 0.6 following + 0.4 preservation "
        "of ten, makes soft preferences, sigmoid of the difference, for all pairs of all rows.",
        "- Noisy critiques: a fifth of what they state is replaced by another word of its kind, "
        "and their scores correlate with gold at 0.7.",
        f"- `test` has {world.test} groups, `hard` {world.hard}. Intervals: "
        f"{100 * config.verdict.confidence:g} %. Of groups by {config.verdict.draws} bootstrap "
        "draws of whole groups, of seeds by Student's t; half-widths are the root of the two "
        f"squares. {_spreads(config, numbers)}Differences are paired by seed and pair. In the "
        "curves they are not corrected for the number of arms. In the table of what to use they "
        "are, for as many as "
        f"there are with such critiques, and an arm is named from {config.verdict.advice_seeds} "
        "seeds on.",
        "- Preference loss: mean of -log sigmoid(difference) on the true order of all pairs of "
        "`hard`; 0.693 is what knowing nothing costs. Other measures as in [the first "
        "part](study.md); the attack is measured for seed "
        f"{', '.join(map(str, config.whole_seeds)) or '-'} of the headline.",
        "",
    ]
