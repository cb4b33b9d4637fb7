"""Writes the study's page: text with tables, numbers as JSON, figures, examples as HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jrm_jax.shell.terminal import duration
from jrm_jax.study import cells, examples, explain, figures
from jrm_jax.study.cells import ARMS, CHANGES
from jrm_jax.study.numbers import collect
from jrm_jax.study.tables import MISSING, absent, number, points, share, table

USERS, NOTES = "users.md", "notes.md"  # by hand: what users should know, what the numbers say
YES = {True: "yes", False: "**no**", None: MISSING}
Numbers = Mapping[str, Any]


def write(config: ConfigDict) -> list[Path]:
    """OUT.md, OUT/numbers.json, the figures and OUT/examples.html; returns what was written.

    OUT/users.md and OUT/notes.md, where they are, are written by hand and become parts of OUT.md.
    """
    found = cells.load_cells(config)
    numbers = collect(config, found)
    out = Path(config.out)
    drawn = figures.draw(numbers, out)
    (out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    written = [out / "numbers.json", *drawn]
    html = examples.page(config, found)
    if html:
        (out / "examples.html").write_text(html)
        written.append(out / "examples.html")
    paths = (out / USERS, out / NOTES)
    said = [path.read_text() if path.is_file() else "" for path in paths]
    page = out.with_suffix(".md")
    page.write_text(markdown(config, numbers, [path.stem for path in written], *said))
    return [page, *written]


def markdown(
    config: ConfigDict, numbers: Numbers, shown: Sequence[str], users: str = "", notes: str = ""
) -> str:
    """The whole text, with the figures and examples named in `shown`; `users` begins it and `notes`
    comments the numbers, both by a person."""
    folder = Path(config.out).name

    def figure(name: str, words: str) -> list[str]:
        return [f"![{words}]({folder}/{name}.png)", ""] if name in shown else []

    variant = f":{config.variant}" if config.variant else ""
    parts = [
        "# Does joint training help, and why?",
        "",
        f"Made by `python -m jrm_jax.study --config=configs/study.py{variant}` from the cells in "
        f"`{folder}/cells/`; add `--report` to make this page, `{folder}/numbers.json` and the "
        f"figures again from the cells alone. It is overwritten: words of your own belong into "
        f"`{folder}/{USERS}` and `{folder}/{NOTES}`, which are read into it.",
        "",
        *([users.strip(), ""] if users else []),
        *_claim(config, numbers),
        *([notes.strip(), ""] if notes else []),
        *_arms(numbers),
        *(
            [f"[Groups where the arms disagree, in pictures]({folder}/examples.html)", ""]
            if "examples" in shown
            else []
        ),
        *_axes(config, numbers),
        *figure("sizes", "accuracy by number of groups"),
        *figure("weights", "accuracy by weight of the language loss"),
        *explain.changes(numbers),
        *explain.reasons(numbers),
        *_kinds(numbers),
        *figure("kinds", "gain by instruction and flaw"),
        *_longer(numbers),
        *_measures(config, numbers),
        *figure("calibration", "reliability"),
        *figure("ranks", "effective rank and spectrum"),
        *figure("best_of_n", "gold score of the best of n"),
        *_costs(numbers),
        *_cells(numbers),
        *_budget(config, numbers),
        *_protocol(config, numbers),
    ]
    return "\n".join(parts).rstrip() + "\n"


# Pieces


def _claim(config: ConfigDict, numbers: Numbers) -> list[str]:
    settings, verdict = config.verdict, numbers["verdict"]
    lines = [
        "## The claim",
        "",
        f"Fixed before running: joint gains at least {settings.gain:g} points over discriminative "
        f"on `hard` at equal data and steps, its {100 * settings.confidence:g} % interval lies "
        f"above zero, and shuffled critiques gain less than {settings.null:g} point or nothing "
        "that can be told from zero.",
        "",
    ]
    joint, shuffled = numbers["arms"]["joint"], numbers["arms"]["joint_shuffled"]
    if not verdict:
        return [*lines, "The cells that decide it are missing.", ""]
    rows = [
        ("joint - discriminative", points(joint["gain"]["hard"]),
         f"at least +{settings.gain:g}: {YES[verdict['gain']]}; "
         f"above zero: {YES[verdict['above_zero']]}"),
        ("shuffled - discriminative", points(shuffled and shuffled["gain"]["hard"]),
         f"no gain: {YES[verdict['shuffled']]}"),
    ]  # fmt: skip
    words = {True: "The claim holds here.", False: "The claim does not hold here.",
             None: "Not decided: a cell is missing."}  # fmt: skip
    few = numbers["pairs"]["hard"] < settings.pairs
    full = max(config.sizes)
    planned = sum((c.arm, c.size, c.weight) == ("joint", full, 1.0) for c in cells.plan(config))
    seeds = joint["gain"]["hard"]["seeds"]
    so_far = f"After {seeds} of {planned} seeds, so not final: " if seeds < planned else ""
    return [
        *lines,
        *table(("on `hard`", "points (interval)", "threshold"), rows),
        f"{so_far}**{words[verdict['holds']]}** {numbers['pairs']['hard']:,} pairs of `hard`"
        + (f", fewer than the {settings.pairs:,} asked for" if few else "")
        + ".",
        "",
    ]


def _arms(numbers: Numbers) -> list[str]:
    rows = []
    for name, arm in ARMS.items():
        if name in CHANGES:
            continue
        found = numbers["arms"][name]
        cells_of = [absent(numbers, name)] * 5
        if found:
            own = found["gain"]["hard"]
            cells_of = [
                share(found["test"]), share(found["hard"]),
                points(own) if own else ("-" if name == "discriminative" else MISSING),
                f"{100 * found['within_groups']:.1f} / {100 * found['whole_groups']:.1f}",
                f"{100 * found['unparsable']:.1f} %" if arm.judge else "-",
            ]  # fmt: skip
        rows.append((f"{name}: {arm.words}", *cells_of))
    head = ("arm", "pair accuracy, test", "pair accuracy, hard",
            "points over discriminative, hard", "within groups / whole groups right, hard",
            "answers without a score")  # fmt: skip
    rule = numbers["pixel_rule"]
    extra = (
        f"A rule that needs no model, the picture closer to the source in pixels first: "
        f"{share(rule)} on `hard`."
        if rule
        else ""
    )
    return ["## Arms, all data", "", *table(head, rows), extra, ""]


def _axes(config: ConfigDict, numbers: Numbers) -> list[str]:
    def of(row, arm):
        return share(row[arm] and row[arm]["hard"])

    sizes = [
        (size, of(row, "discriminative"), of(row, "joint"), points(row["gain"]))
        for size, row in numbers["sizes"].items()
    ]
    weights = [(w, of(row, "joint"), points(row["gain"])) for w, row in numbers["weights"].items()]
    gain = "points over discriminative"
    return [
        "## Amount of data",
        "",
        f"Equal steps at every size ({config.train.total_steps} of {config.train.batch_size} "
        "groups); fewer groups are seen more often. Accuracy on `hard`.",
        "",
        *table(("groups", "discriminative", "joint", gain), sizes),
        "## Weight of the language loss",
        "",
        *table(("weight", "joint, hard", gain), weights),
    ]


def _kinds(numbers: Numbers) -> list[str]:
    lines = ["## Kinds of instruction and of flaw", ""]
    for name, title in (("instruction", "instruction"), ("flaw", "flaw of the worse candidate")):
        rows = [
            (kind, str(row["gain"]["pairs"]), share(row["discriminative"]), points(row["gain"]))
            for kind, row in numbers["kinds"][name].items()
        ]
        if rows:
            head = (title, "pairs", "discriminative, hard", "points of joint over it")
            lines += table(head, rows)
    return lines if len(lines) > 2 else [*lines, f"All {MISSING}.", ""]


def _longer(numbers: Numbers) -> list[str]:
    rows = [
        (
            str(row["seed"]),
            str(row["steps"]),
            ("yes" if row["reached"] else "never" if row["complete"] else "not yet"),
            " / ".join(f"{100 * v:.1f}" for v in row["valid"]),
            " / ".join(f"{100 * v:.1f}" for v in row["hard"]),
            points({**row["gain"], "seeds": 1}),
        )
        for row in numbers["longer"]
    ]
    head = ("seed", "steps", "reached joint on valid", "valid: joint / longer",
            "hard: joint / longer", "joint - longer, hard")  # fmt: skip
    return [
        "## Discriminative, trained until it matches on valid",
        "",
        *(table(head, rows) if rows else [f"All {MISSING}.", ""]),
    ]


def _measures(config: ConfigDict, numbers: Numbers) -> list[str]:
    rows = []
    counts = [n for n in (1, 2, 4, 8, 16) if n <= config.measure.attempts]
    for name, found in numbers["arms"].items():
        if not found:
            rows.append((name, *[absent(numbers, name)] * (5 + len(counts))))
            continue
        attack, rank = found["attack"], found["rank"]
        last = rank[max(rank, key=int)]["effective_rank"] if rank else None
        rows.append(
            (
                name,
                number(found["calibration_error"]) if not ARMS[name].judge else "-",
                number(last, ".1f"),
                f"{100 * found['pixel_agreement']:.1f} %",
                f"{100 * attack['turned']:.1f} %" if attack else "-",
                number(attack["gain_in_spreads"], "+.2f") if attack else "-",
                *(number(found["best_of_n"][str(n)], ".1f") for n in counts),
            )
        )
    if numbers["contests"]:
        gold = numbers["contests"]["gold"]
        best = (number(gold[str(n)], ".1f") for n in counts)
        rows.append(("gold score itself", *["-"] * 5, *best))
    head = ("arm", "calibration error", "effective rank", "agrees with pixel distance",
            "pairs turned by the attack", "gain by the attack",
            *(f"best of {n}" for n in counts))  # fmt: skip
    return ["## Other measures", "", *table(head, rows)]


def _costs(numbers: Numbers) -> list[str]:
    rows = []
    for name, found in numbers["arms"].items():
        if not found:
            rows.append((name, *[absent(numbers, name)] * 3))
            continue
        flops = " / ".join(f"{f:,.1f}" for f in sorted(set(found["flops"])))
        took = f"{1000 * found['seconds']:.1f} ms"
        rows.append((name, flops, took, duration(found["train_seconds"])))
    arms = numbers["arms"]
    lines = ["## Cost of a score", ""]
    lines += table(("arm", "FLOPs a group", "time a group", "training"), rows)
    if arms["joint"] and arms["discriminative"]:
        same = {*arms["joint"]["flops"]} == {*arms["discriminative"]["flops"]}
        lines += [f"Joint and discriminative cost the same FLOPs to the last one: {YES[same]}.", ""]
    return lines


def _cells(numbers: Numbers) -> list[str]:
    rows = []
    for name, own in numbers["cells"].items():
        accuracies = (f"{100 * own[split]:.1f}" for split in ("valid", "test", "hard"))
        gain = "-" if own["gain"] is None else f"{100 * own['gain']:+.1f}"
        pushed = ("-" if own[k] is None else f"{own[k]:+.2f}" for k in ("attack", "attack_over"))
        rows.append((name, *accuracies, gain, *pushed))
    head = ("cell", "valid", "test", "hard", "points over discriminative, hard",
            "gain by the attack", "over discriminative's")  # fmt: skip
    return [
        "## Cell by cell",
        "",
        "Against the discriminative cell of the same size and seed.",
        "",
        *(table(head, rows) if rows else [f"All {MISSING}.", ""]),
    ]


def _budget(config: ConfigDict, numbers: Numbers) -> list[str]:
    found = numbers["budget"]
    rows = [
        (name, duration(s["train"]), duration(s["measure"])) for name, s in found["cells"].items()
    ]
    lines = [
        "## Budget",
        "",
        f"{len(rows)} cells took {duration(found['seconds'])} (the last session of each run, "
        "compilation included). "
        + "".join(f"{count} ran on {name}. " for name, count in found["machines"].items()),
        "",
    ]
    if found["missing"]:
        left = found["missing_seconds"]
        about = f", about {duration(left)}" if left is not None else ""
        lines += [f"Missing ({len(found['missing'])}{about}): {', '.join(found['missing'])}.", ""]
    lines += [f"Not needed: {name}, as {why}." for name, why in found["unneeded"].items()]
    return [*lines, "", *(table(("cell", "training", "measuring"), rows) if rows else [])]


def _protocol(config: ConfigDict, numbers: Numbers) -> list[str]:
    train, measure, world = config.train, config.measure, config.world
    return [
        "## Protocol",
        "",
        "- Every arm starts from the packaged backbone and is `configs/joint.py` with "
        f"{train.total_steps} steps of {train.batch_size} groups and the changes listed in "
        "`jrm_jax/study/cells.py`; same seeds, same data order, same optimizer. The checkpoint "
        "with the best accuracy on `valid` counts (for the generative arm: the lowest loss).",
        f"- World seed {world.seed}: {world.valid} groups of `valid`, {world.test} of `test`, "
        f"{world.hard} of `hard` with {numbers['pairs']['hard']:,} pairs whose gold scores "
        "differ. Equal scores, and answers of the judge without a score, count one half.",
        f"- Intervals: {100 * config.verdict.confidence:g} %, {config.verdict.draws} bootstrap "
        "draws of seeds and of whole groups, both with replacement. Differences are paired by "
        "seed and pair. With two seeds an interval says little about other seeds.",
        "- Calibration error: mean gap between sigmoid(difference of scores) and the share right, "
        "weighted by the pairs in ten bins.",
        "- Effective rank: exponential of the entropy of the normalised singular values of the "
        "centred final states of the reward token on `test` (Roy and Vetterli, EUSIPCO 2007), at "
        "the last step.",
        f"- Best of n: {measure.attempts} attempts at each of "
        f"{min(measure.contests, world.test)} instructions of `test`; expected gold score (0 to "
        "100) of the attempt with the highest score among n of them.",
        f"- Attack: {measure.attack_steps} signed gradient steps on the candidate's pixels, at "
        f"most {measure.attack_radius:g} of 255 each, on {measure.attack_groups} groups of `hard`; "
        "a pair is turned where the worse candidate then scores above the better one as it was. "
        "The gain is in standard deviations of the scores.",
        "- FLOPs: as the compiler counts them for the program that scores one batch; for the "
        "judge, the loop over tokens times the tokens of the batch.",
        "- Not covered: every weight at every size (each axis is varied alone), backbones of other "
        "sizes, critiques written by people or models.",
        "",
    ]
