"""Writes the page: text with tables, numbers as JSON, figures, a sheet of exploits."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jrm_jax.rl import base, examples, figures
from jrm_jax.rl.models import CONTROLS, GOLD
from jrm_jax.rl.numbers import BASELINE, PREDICTORS, TREATED, collect, load
from jrm_jax.rl.runner import RUNS
from jrm_jax.shell.packaged import load_config_module
from jrm_jax.shell.report import flat, json_safe
from jrm_jax.shell.terminal import duration
from jrm_jax.study.tables import MISSING, number, table

USERS, NOTES = "users.md", "notes.md"  # by hand: what users should do, what the numbers say
EXPLOITS, SHOWN = "exploits.png", 4  # pictures of an arm
Numbers = Mapping[str, Any]


def write(config: ConfigDict, out: Path) -> list[Path]:
    """OUT.md, OUT/numbers.json, the figures and the sheet, from OUT/results alone; what it wrote.

    Raises:
        UserError: there are no runs of this config.
    """
    runs = load(config, out)
    numbers = json_safe(collect(config, runs))
    drawn = figures.draw(numbers, out)
    (out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    written = [out / "numbers.json", *drawn]
    if arms := _exploits([run for run in runs if run["name"] not in numbers["longer"]]):
        examples.draw_sheet(arms, config.world_seed, out / EXPLOITS)
        written.append(out / EXPLOITS)
    said = [p.read_text() if (p := out / n).is_file() else "" for n in (USERS, NOTES)]
    page = out.with_name(f"{out.name}.md")
    page.write_text(markdown(config, numbers, out, [p.name for p in written], *said))
    return [page, *written]


def _exploits(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list]]:
    """(words, the worst of the edits that the reward likes) of each arm's first model: after RL
    where it was run, else the best of n."""
    chosen: dict[str, Mapping[str, Any]] = {}
    for run in sorted(runs, key=lambda r: (r["number"], r["seed"] is None, r["seed"] or 0)):
        if run["arm"] not in CONTROLS:
            chosen.setdefault(run["arm"], run)
    return [
        (
            f"{arm}: {'best of n' if run['seed'] is None else 'after RL'}",
            sorted(run["worst"], key=lambda row: row["gold"])[:SHOWN],
        )
        for arm, run in chosen.items()
        if run["worst"]
    ]


def markdown(
    config: ConfigDict, numbers: Numbers, out: Path, shown: Sequence[str],
    users: str = "", notes: str = "",
) -> str:  # fmt: skip
    folder = out.name

    def figure(name: str, words: str) -> list[str]:
        return [f"![{words}]({folder}/{name})", ""] if name in shown else []

    parts = [
        "# Scores under optimisation",
        "",
        _answer(numbers),
        "",
        f"Made by `{command(config, numbers, out)}` from the runs in "
        f"`{folder}/{RUNS}/`; add `--report` to make this page, `{folder}/numbers.json` and the "
        f"figures again from these files alone. It is overwritten: words of your own belong into "
        f"`{folder}/{USERS}` and `{folder}/{NOTES}`, which are read into it.",
        "",
        *([users.strip(), ""] if users else []),
        *_claim(config, numbers),
        *([notes.strip(), ""] if notes else []),
        *_best(numbers),
        *figure("best_of_n.png", "gold and score of the best of n by divergence"),
        *_rl(config, numbers),
        *figure("rl.png", "gold, score, rank correlation and gap by divergence"),
        *_flaws(numbers),
        *figure(EXPLOITS, "edits that the score likes and that are worth little"),
        *_predictors(numbers),
        *_protocol(config, numbers),
    ]
    return "\n".join(parts).rstrip() + "\n"


def command(config: ConfigDict, numbers: Numbers, out: Path) -> str:
    """What makes the runs: the variant, what was set beside it, and models that are no arm's."""
    variant = f":{config.variant}" if config.variant else ""
    plain = flat(load_config_module("rl").get_config(config.variant or None).to_dict())
    own = flat(config.to_dict()) | {"iterations": numbers["iterations"] or config.iterations}
    changed = {n: v for n, v in own.items() if v != plain.get(n) and n != "arms"}
    arms = {arm for arm, _ in config.arms}
    words = [
        f"--config=configs/rl.py{variant}",
        *(f"--model={row['path']}" for row in numbers["models"] if row["arm"] not in arms),
        *([] if config.out else [f"--workdir={out.parent}"]),
        *(f"--config.{name}={value}" for name, value in sorted(changed.items())),
    ]
    return f"python -m jrm_jax.rl {' '.join(map(shlex.quote, words))}"


def _points(row: Mapping[str, Any] | None) -> str:
    """'+0.031 (+0.012 to +0.050)'"""
    if not row:
        return MISSING
    return f"{row['value']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def _gold(row: Mapping[str, Any] | None) -> str:
    return f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})" if row else MISSING


def _answer(numbers: Numbers) -> str:
    """The first sentence of each regime, that with the most models first."""
    if numbers["verdicts"]:
        return " ".join(_sentence(numbers["gains"][own["arm"]], own) for own in numbers["verdicts"])
    if BASELINE in numbers["arms"] or TREATED in numbers["arms"]:
        return "Whether a joint score is better to optimise than a discriminative one is open."
    arms = [arm for arm in numbers["arms"] if arm not in CONTROLS] or numbers["arms"]
    return f"What optimisation makes of {', '.join(arms)}, where the truth is known."


HELD = {True: "is borne out here", False: "is not borne out here", None: "is not decided yet"}


def _sentence(gains: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    models, equal = verdict["models"], gains["equal"]
    of = f" trained on {verdict['regime']} labels" if verdict["regime"] else ""
    at = f"{_points(equal)} at {equal['nats']:g} nats" if equal else (
        "at no divergence that is compared have all runs arrived"
    )  # fmt: skip
    return (
        f"With {models} model{'s' * (models != 1)} of each kind{of}, the claim that a joint score "
        f"is better to optimise {HELD[verdict['holds']]}: gold is {_points(gains['peak'])} higher "
        f"than with a discriminative score at the peak of RL, {_points(gains['last'])} at its end, "
        f"and {at}."
    )


def _claim(config: ConfigDict, numbers: Numbers) -> list[str]:
    if not numbers["gains"]:
        return []
    own = config.verdict
    rows = [
        (arm, _points(found["best_of_n"]), _points(found["peak"]), _points(found["last"]),
         *(_points(found["at"][f"{nats:g}"]) for nats in own.nats))
        for arm, found in numbers["gains"].items()
    ]  # fmt: skip
    head = ("gold over discriminative", f"best of {_most(numbers)}", "peak of RL",
            "end of RL", *(f"at {nats:g} nats" for nats in own.nats))  # fmt: skip
    return [
        "## The claim",
        "",
        f"Fixed before running: with {TREATED} scores gold is at least {own.gain:g} higher than "
        f"with {BASELINE} ones, at the peak of RL, at its end, and at the largest of the listed "
        f"divergences that all runs of both reach, and all three {100 * own.confidence:g} % "
        "intervals lie above zero. With one model of a kind nothing is decided.",
        "",
        *table(head, rows),
    ]


def _best(numbers: Numbers) -> list[str]:
    rows = []
    for arm, found in numbers["arms"].items():
        own = found["best_of_n"]
        if own:
            fit = own["fit"]
            rows.append(
                (arm, str(own["peak"]["models"]), number(own["gold"][0]["value"]),
                 _gold(own["gold"][-1]),
                 f"{_gold(own['peak'])} at n = {' or '.join(map(str, own['peak_n']))}",
                 _gold(own["fall"]),
                 number(own["spearman"], ".2f"), _fit(fit))
            )  # fmt: skip
    head = ("reward", "models", "base", f"best of {_most(numbers)}", "highest", "fall from it",
            "Spearman on base edits", "alpha, beta")  # fmt: skip
    return ["## Best of n", "", *(table(head, rows) if rows else [f"All {MISSING}.", ""])]


def _most(numbers: Numbers) -> int:
    return max((a["best_of_n"]["n"][-1] for a in numbers["arms"].values() if a["best_of_n"]),
               default=0)  # fmt: skip


def _fit(fit: Mapping[str, Any]) -> str:
    def one(row: Mapping[str, Any]) -> str:
        return f"{number(row['value'], '.3f')} ({number(row['low'])} to {number(row['high'])})"

    return f"{one(fit['alpha'])}, {one(fit['beta'])}"


def _rl(config: ConfigDict, numbers: Numbers) -> list[str]:
    rows, at, first = [], [], []
    for arm, found in numbers["arms"].items():
        own = found["rl"]
        if not own:
            continue
        last = {name: values[-1] for name, values in own["curves"].items()}
        rows.append(
            (arm, f"{own['last']['models']} / {own['last']['runs']}", _gold(own["start"]),
             f"{_gold(own['peak'])} at {own['peak_kl']:.1f}",
             f"{_gold(own['last'])} at {own['last_kl']:.1f}", _gold(own["fall"]),
             f"{len(own['collapsed'])}", number(last["spearman"], ".2f"),
             "-" if arm in CONTROLS else number(last["gap"], "+.2f"),
             f"{100 * last['flat']:.0f} %", _fit(own["fit"]))
        )  # fmt: skip
        at.append((arm, *(_reached(own, f"{x:g}") for x in config.verdict.nats)))
        first.extend(run["kl"][1] for run in own["by_run"] if len(run["kl"]) > 1)
    if not rows:
        return ["## RL", "", f"All {MISSING}.", ""]
    head = ("reward", "models / runs", "base", "peak, at nats", "end, at nats", "fall",
            "collapsed", "Spearman, end", "gap, end", "flat groups", "alpha, beta")  # fmt: skip
    nats = ("gold at equal divergence", *(f"{x:g} nats" for x in config.verdict.nats))
    words = "" if not first else (
        "Between the base and a run's first evaluation after it, which is at "
        f"{min(first):.1f} to {max(first):.1f} nats, gold is a straight line of nats: what stands "
        "under fewer nats than that is not measured."
    )  # fmt: skip
    return ["## RL", "", *_optimiser(numbers), *table(head, rows), *table(nats, at), words, ""]


def _reached(own: Mapping[str, Any], nats: str) -> str:
    """Gold at a divergence, and how many runs reached it where not all did."""
    found, every = own["at"][nats], own["last"]["runs"]
    some = f", {found['runs']} of {every} runs" if found and found["runs"] < every else ""
    return f"{_gold(found)}{some}"


def _optimiser(numbers: Numbers) -> list[str]:
    """What it does with the truth as its reward."""
    own = (numbers["arms"].get(GOLD) or {}).get("rl")
    if not own:
        return []
    moves = [f"{gold_T[0]:.3f} to {gold_T[-1]:.3f} on `{split}`"
             for split, gold_T in own["by_split"].items()]  # fmt: skip
    gold_T = own["curves"]["gold"]
    rises = sum(later > earlier for earlier, later in itertools.pairwise(gold_T))
    return [
        "What the optimiser can do, gold itself shows as the reward: it takes gold from "
        f"{' and '.join(moves)}, and is higher than before at {rises} of {len(gold_T) - 1} "
        "evaluations. `hard` asks for what no instruction of the training asks for.",
        "",
    ]


def _flaws(numbers: Numbers) -> list[str]:
    lines = []
    for arm, found in numbers["arms"].items():
        if found["rl"] and arm not in CONTROLS:
            start, end = found["rl"]["lost"]["start"], found["rl"]["lost"]["end"]
            if not end:  # no run ends where the curves do
                continue
            change = {f: end.get(f, 0.0) - start.get(f, 0.0) for f in sorted({*start, *end})}
            worse = [f for f in sorted(change, key=change.get, reverse=True) if change[f] > 0.2]
            words = ", ".join(f"{f} {start.get(f, 0):.1f} to {end.get(f, 0):.1f}" for f in worse)
            left = sorted(end, key=end.get, reverse=True)[:3]
            rest = ", ".join(f"{f} {end[f]:.1f}" for f in left)
            lines.append((arm, words or "none", rest))
    if not lines:
        return []
    head = ("reward", "grew under RL", "largest at the end")
    return [
        "## Flaws that policies find",
        "",
        "Points of 100 that the mean edit loses for a flaw, at the base and at the end of RL.",
        "",
        *table(head, lines),
    ]


def _predictors(numbers: Numbers) -> list[str]:
    found = numbers["predictors"]
    head = ("model", "pair accuracy, valid", "Spearman on base edits", "pairs of base edits",
            "best of 16", "attack gain", "effective rank", "peak of RL", "end of RL")  # fmt: skip
    names = (*PREDICTORS, "peak", "last")
    rows = [(row["model"], *(number(row[name]) for name in names)) for row in found["models"]]
    if not rows:
        return []
    ranks = [
        (_whose(part), *(_ranks(part["of"][name]) for name in PREDICTORS))
        for part in found["correlations"]
    ]
    over = ("rank correlation with the peak / the end of RL, over", *head[1 : 1 + len(PREDICTORS)])
    said = table(over, ranks) if ranks else ["Too few models for rank correlations.", ""]
    return ["## What can be seen before RL", "", *table(head, rows), *said]


def _whose(part: Mapping[str, Any]) -> str:
    own = {None: "all", "": "the others"}.get(part["regime"], f"{part['regime']} labels")
    return f"{own}, {part['models']} models"


def _ranks(row: Mapping[str, float | None]) -> str:
    if row["peak"] is None and row["last"] is None:
        return MISSING
    return f"{number(row['peak'], '+.2f')} / {number(row['last'], '+.2f')}"


def _protocol(config: ConfigDict, numbers: Numbers) -> list[str]:
    own, best = config.optimizer, config.best_of
    half = f", half of it after {own.slower:g} iterations" if own.slower else ""
    return [
        "## Protocol",
        "",
        f"- A policy writes edit programs (`jrm_jax/rl/editing.py`) and starts from the packaged "
        f"base, which imitates {100 * base.PERFECT:.0f} % perfect edits and else the built-in "
        "world's flaws. Pictures go through `RewardModel`; scores are in deviations of the base's.",
        f"- RL: GRPO, {numbers['iterations'] or 'no'} iterations of {config.groups} instructions x "
        f"{config.edits} edits, {own.updates} updates each, Adam at {own.learning_rate:g}"
        f"{half}, momentum {own.momentum:g}, ratio clipped at "
        f"{own.clip:g}, weight of the divergence {own.kl_weight:g}, advantages over the "
        f"{own.scale}'s spread.",
        f"- Best of n: {best.attempts} base edits of {best.problems} instructions of `test` and as "
        "many of `hard`. RL is evaluated on "
        f"{config.eval_problems} of each, with the same noise in all runs.",
        "- Divergences from the base are exact for RL, log n - (n - 1) / n for best of n. With d "
        "= root of KL the dotted fits are d (alpha - beta d) and d (alpha - beta log d) (Gao et "
        "al., arXiv 2210.10760).",
        f"- Intervals: {100 * config.verdict.confidence:g} %, drawing models and instructions with "
        "replacement, after the mean over the policy seeds of each model; differences are paired. "
        "With one model of a kind they say nothing of other models.",
        "- The peak is looked for on one half of the instructions and read on the other, and the "
        "other way round; the fall is from there to the end.",
        *(["- Longer than that, and read up to there; their flaws and pictures are left out: "
           f"{', '.join(numbers['longer'])}."] if numbers["longer"] else []),
        *(f"- {row['arm']} {row['number']} is `{row['path']}`, step {row['step']}, weights "
          f"{row['digest']}." for row in numbers["models"]),
        f"- {numbers['runs']} runs took {duration(numbers['seconds'])}, without loading models.",
        "",
    ]
