"""Benchmarks out of a model, or out of somebody's predictions: JSON, Markdown, HTML.

    python -m jrm_jax.evaluate --checkpoint=DIR --benchmark=NAME --data=PATH --out=FILE.json
    python -m jrm_jax.evaluate --benchmark=NAME --data=PATH --predictions=FILE --out=FILE.json
    python -m jrm_jax.evaluate --compare FIRST.json SECOND.json

Beside FILE.json stand FILE.md, FILE.html and, for a checkpoint, FILE_predictions/ in the layout of
the benchmark's own scorer. `docs/evaluation.md` tells what each number means.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from pathlib import Path
from typing import Any

from jrm_jax import cli
from jrm_jax.errors import UserError
from jrm_jax.evaluation import output, report
from jrm_jax.evaluation.cases import Issues, in_order
from jrm_jax.evaluation.files import Images
from jrm_jax.evaluation.layouts import LAYOUTS
from jrm_jax.shell import terminal
from jrm_jax.shell.arguments import Parser, check_least
from jrm_jax.shell.stop import ending

WORLD = {"test": 512, "hard": 512}
LEAST = {"tie_threshold": 0, "limit": 1, "batch_size": 1, "programs": 1}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m jrm_jax.evaluate", description="Benchmark a model, or predictions."
    )
    parser.add_argument("--benchmark", choices=tuple(LAYOUTS))
    parser.add_argument("--data", help="the benchmark's files as downloaded; not for 'world'")
    parser.add_argument("--images", metavar="FOLDER", help="of the pictures that the files name")
    parser.add_argument("--checkpoint", help="a run's folder, or an exported one")
    parser.add_argument("--step", default="best", help="of a run: a number, 'best' or 'latest'")
    parser.add_argument("--backbone", default="", help="where the backbone of a run lies by now")
    parser.add_argument("--predictions", nargs="+", metavar="FILE",
                        help="predictions in the official layout, instead of a model")  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file; Markdown and HTML stand beside it")
    parser.add_argument("--probe", action="store_true", help="sanity of the model as well")
    parser.add_argument("--tie_threshold", type=float, help="scores no further apart are a tie")
    parser.add_argument("--tie_from", metavar="RESULT.json",
                        help="the threshold that another benchmark's result tuned")  # fmt: skip
    parser.add_argument("--limit", type=int, help="only the first so many cases (world: per split)")
    parser.add_argument("--name", help="of the model, in the tables; default: its folder")
    parser.add_argument("--batch_size", type=int, default=8, help="groups at a time")
    parser.add_argument("--compute_dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--programs", type=int, default=8, help="that may be compiled; default 8")
    parser.add_argument("--compare", nargs=2, metavar=("FIRST", "SECOND"),
                        help="paired test between two results")  # fmt: skip
    args = parser.parse_args(argv)
    args.step = int(args.step) if args.step.isdecimal() else args.step
    return args


def check_args(args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: options that do not go together.
    """
    if not args.benchmark:
        raise UserError(f"give --benchmark, one of {', '.join(LAYOUTS)} (or --compare)")
    if bool(args.checkpoint) == bool(args.predictions):
        raise UserError("give either --checkpoint (a model) or --predictions (files)")
    if args.backbone and not args.checkpoint:
        raise UserError("--backbone belongs to a model: give --checkpoint")
    if args.probe and not args.checkpoint:
        raise UserError("--probe looks into a model: give --checkpoint")
    if args.out is None or args.out.suffix != ".json":
        raise UserError("give --out=FILE.json")
    if args.tie_threshold is not None and args.tie_from:
        raise UserError("give --tie_threshold or --tie_from, not both")
    check_least(args, LEAST)
    layout = LAYOUTS[args.benchmark]
    needed = args.benchmark != "world" and (layout.needs_data or not args.predictions)
    if needed and not args.data:
        how = f": {layout.download}" if layout.download else ""
        raise UserError(f"--benchmark={args.benchmark} needs --data=PATH (its files{how})")
    if args.images and not args.data:
        raise UserError("--images goes with --data=PATH, the files that name the pictures")


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Everything the command does; returns what it wrote as JSON.

    Raises:
        UserError: bad options or bad files; one line that says what to do.
    """
    check_args(args)
    from jrm_jax.evaluation import page, scoring

    layout, issues, threshold = LAYOUTS[args.benchmark], Issues(), _threshold(args)
    output.check_out(args.out, [args.tie_from] if args.tie_from else [])
    if args.checkpoint:
        output.check_folder(output.predictions_folder(args.out))
    model = _load(args) if args.checkpoint else None
    benchmark = _read(args, layout, issues, model)
    if args.limit and args.benchmark != "world":
        benchmark = _limited(benchmark, args.limit)
    name = args.name or _name(args)
    if model is not None:
        judged = scoring.score_cases(model, benchmark.cases, issues, layout.download)
        terminal.say(f"scored in {model.describe_work()}")
        with output.new_predictions(output.predictions_folder(args.out)) as folder:
            layout.write(judged, folder, name, threshold)
    else:
        judged = in_order(benchmark.cases, layout.read_predictions(benchmark, args.predictions))
    if not judged:
        what = "no case has a prediction" if benchmark.cases else "the files hold no case to judge"
        raise UserError(f"nothing to measure: {what}"
                        + "".join(f"; {kind}: {items[0]}" for kind, items in issues.found.items()))

    def measure(found):
        return layout.measure(benchmark, found, threshold)

    rules = scoring.baselines(benchmark.cases, measure) if benchmark.cases else {}
    about = {
        "model": name,
        "made": datetime.datetime.now().isoformat(" ", "minutes"),
        "data": args.data or "the built-in world",
        "checkpoint": args.checkpoint,
        "predictions": args.predictions,
        "tie_threshold": threshold,
        "limit": args.limit,
    }
    result = report.make_result(benchmark, judged, measure(judged), rules, about)
    if model is not None:
        result["step"], result["stamp"] = model.card.get("step"), model.card.get("stamp")
        result["work"] = model.describe_work()
        result["remarks"] += _dimension_remarks(model, benchmark)
    if any(one.answer.deviations for one in judged):
        from jrm_jax.evaluation.unsure import unsure

        result["unsure"] = report.plain(unsure(judged, model.dimensions))

    def save() -> None:
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
        output.save(args.out, f"{text}\n")
        output.save(args.out.with_suffix(".md"), report.markdown(result))
        output.save(args.out.with_suffix(".html"), page.page(result, judged))

    save()
    if args.probe:  # what is measured stays, whatever becomes of the probe
        from jrm_jax.evaluation.probe import probe

        result["probe"] = report.plain(probe(model, judged))
        save()
    return result


def _limited(benchmark: Any, count: int) -> Any:
    kept, cut = benchmark.cases[:count], benchmark.cases[count:]
    if kept and not any(case.headline for case in kept):
        from jrm_jax.evaluation.preferences import headlined

        kept = headlined(kept)
    return benchmark._replace(cases=kept, cut=cut)


def _threshold(args: argparse.Namespace) -> float:
    if not args.tie_from:
        return args.tie_threshold or 0.0
    other = report.load_result(args.tie_from)
    if other["benchmark"] == args.benchmark:
        raise UserError(
            f"--tie_from={args.tie_from} is a result of {args.benchmark} itself; a threshold must"
            " come from other data (the published rule, tuned on the test data, is shown anyway)"
        )
    found = other["tie_threshold_tuned_here"]
    if found is None:
        raise UserError(
            f"--tie_from={args.tie_from} holds no scores of pairs that people call equal, so no"
            " threshold can be taken from it"
        )
    if not isinstance(found, int | float) or not 0 <= found < math.inf:
        raise UserError(f"--tie_from={args.tie_from}: its threshold is {found!r}, no number")
    return float(found)


def _load(args: argparse.Namespace):
    from jrm_jax.serving.reward_model import RewardModel

    return RewardModel.load(
        args.checkpoint,
        args.step,
        args.backbone,
        compute_dtype=args.compute_dtype,
        batch_size=args.batch_size,
        programs=args.programs,
        say=terminal.say,
    )


def _read(args: argparse.Namespace, layout, issues: Issues, model: Any):
    if args.benchmark != "world" or args.data:
        return layout.read(args.data, issues, Images(args.images) if args.images else None)
    from jrm_jax.evaluation.preferences import WORLD_SPLITS, read_world

    config = (model.card.get("config") or {}) if model is not None else {}
    world = config.get("data", {}).get("world", {})
    counts = {s: args.limit or world.get(s) or WORLD[s] for s in WORLD_SPLITS}
    return read_world(counts, world.get("seed", 0), issues)


def _name(args: argparse.Namespace) -> str:
    return Path(args.checkpoint or args.predictions[0]).resolve().name


def _dimension_remarks(model: Any, benchmark) -> list[str]:
    from jrm_jax.evaluation.scoring import column

    asked = dict.fromkeys(case.dimension for case in benchmark.cases)
    used = {name: model.dimensions[column(model.dimensions, name)] for name in asked}
    if all(name == own for name, own in used.items()):
        return []
    words = ", ".join(f"{own!r} for {name!r}" for name, own in used.items() if own != name)
    return [
        "The model has no reward of its own for every dimension that is asked for; it answers with"
        f" {words}."
    ]


def print_result(result: dict[str, Any]) -> None:
    rules = list(result["rows"][0]["baselines"]) if result["rows"] else []
    columns: dict[str, dict[str, Any]] = {
        "part": {"overflow": "fold", "min_width": 15},
        "number": {"overflow": "fold", "min_width": 13},
    }
    for head in ("value", "95 % interval", "judged/all", *(["best rule"] if rules else [])):
        columns[head] = {"justify": "right", "no_wrap": True}

    def short(number: float | None) -> str:
        return "-" if number is None else f"{number:.3f}"

    rows = []
    for row in result["rows"]:
        low, high = short(row["low"]), short(row["high"])
        known = [row["baselines"][rule] for rule in rules if row["baselines"][rule] is not None]
        rows.append((
            row["section"], row["metric"], short(row["value"]),
            f"{low}..{high}" if row["low"] is not None else "-", f"{row['count']}/{row['total']}",
            *([short(max(known, default=None))] if rules else []),
        ))  # fmt: skip
    terminal.print_table(
        f"{result['benchmark']}: {result['model']}", columns, rows,
        bold=[row["headline"] for row in result["rows"]], framed=False,
    )  # fmt: skip
    console = terminal.console()
    if rules:
        console.print(f"Best rule: the best of {', '.join(rules)}, which need no model.")
    for block in report.SANITY:
        for row in (result.get(block) or {}).get("rows", ()):
            console.print(f"{row['name']}: {row['value']}")
    for kind, found in result["issues"].items():
        console.print(f"{found['count']} x {kind}; first: {found['items'][0]}")
    for remark in result["remarks"]:
        console.print(remark)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if argv is None:
        cli.prepare()
    with ending():
        if args.compare:
            if args.out:
                output.check_out(args.out, args.compare, beside=())
            found = report.compare(*args.compare)
            print(report.compare_markdown(found))
            if args.out:
                output.save(args.out, json.dumps(found, indent=1) + "\n")
            return
        result = evaluate(args)
    print_result(result)
    print(f"written: {args.out} and beside it .md, .html")


if __name__ == "__main__":
    main()
