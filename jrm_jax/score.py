"""Scores of edits in the shell: a ranked table, JSON, a sheet of the pictures; or a whole file.

    python -m jrm_jax.score --model=FOLDER --source=cat.png --instruction="..." a.png b.png
    python -m jrm_jax.score --model=FOLDER --input=edits.jsonl --output=scores.jsonl

`serving/files.py` has the rows of such files. `serving/reward_model.py` is the same in Python, and
says what the number means.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jrm_jax import cli
from jrm_jax.errors import UserError
from jrm_jax.shell import disk, terminal
from jrm_jax.shell.arguments import Parser, check_least
from jrm_jax.shell.stop import ending

if TYPE_CHECKING:
    from jrm_jax.serving.reward_model import RewardModel


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m jrm_jax.score", description="Rank edited pictures."
    )
    parser.add_argument("--model", required=True, help="a run's folder, or an exported one")
    parser.add_argument("--step", default="best", help="of a run: a number, 'best' or 'latest'")
    parser.add_argument("--backbone", default="", help="where the backbone of a run lies by now")
    parser.add_argument("--source", action="append", help="picture to be edited (may be repeated)")
    parser.add_argument("--instruction", help="what was to be done")
    parser.add_argument("candidates", nargs="*", metavar="PICTURE", help="edited pictures")
    parser.add_argument("--input", type=Path, help="JSON lines, CSV or parquet of many groups")
    parser.add_argument("--output", type=Path, help="JSON lines: their scores, in the same order")
    parser.add_argument("--images", type=Path, help="folder of --input's pictures")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--critique", action="store_true", help="what the model says of each")
    parser.add_argument("--max_tokens", type=int, default=128, help="of a critique")
    parser.add_argument("--sheet", type=Path, help="PNG file: the pictures with their scores")
    parser.add_argument("--compute_dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--programs", type=int, default=8, help="that may be compiled; default 8")
    args = parser.parse_args(argv)
    args.step = int(args.step) if args.step.isdecimal() else args.step
    return args


def _load(args: argparse.Namespace) -> RewardModel:
    from jrm_jax.serving.reward_model import RewardModel

    return RewardModel.load(
        args.model, args.step, args.backbone,
        compute_dtype=args.compute_dtype, programs=args.programs, say=terminal.say,
    )  # fmt: skip


def rank(args: argparse.Namespace) -> dict[str, Any]:
    """Everything the command prints: candidates from best to worst, those with errors last.

    Raises:
        UserError: no candidates, no model, a source that cannot be read; without --json also a
            candidate that cannot be read.
    """
    if not args.instruction:
        raise UserError("give --instruction, or --input and --output for many groups")
    if not args.candidates:
        raise UserError("give at least one candidate picture")
    from jrm_jax.serving.groups import Group

    if args.sheet:
        from jrm_jax.serving.sheet import check_sheet

        check_sheet(args.sheet)  # loading takes minutes
    model = _load(args)
    rows: list[dict[str, Any]] = [{"picture": path} for path in args.candidates]
    for row in rows:
        problem = model.problem(row["picture"])
        if problem is not None:
            if not args.json:
                raise UserError(f"{row['picture']}: {problem}")
            row["error"] = problem
    good = [row for row in rows if "error" not in row]
    if good:
        group = Group(args.instruction, args.source, [row["picture"] for row in good])
        (scores,) = model.score_batch([group])
        said = model.critique(*group, max_tokens=args.max_tokens) if args.critique else good
        for i, cells in enumerate(scores.as_rows()):
            good[i] |= cells | ({"critique": said[i]} if args.critique else {})
    rows.sort(key=lambda row: -row.get("reward", -math.inf))
    return {"instruction": args.instruction, "source": args.source, "candidates": rows}


def score_many(args: argparse.Namespace) -> int:
    """The status of the command; see `serving/files.py`.

    Raises:
        UserError: options that do not go together, or as `score_file`.
    """
    if not (args.input and args.output):
        raise UserError("give both --input=FILE and --output=FILE.jsonl")
    single = ("instruction", "source", "candidates", "json", "critique", "sheet")
    if beside := [name for name in single if getattr(args, name)]:
        raise UserError(f"--input holds all groups: leave out {', '.join(beside)}")
    from jrm_jax.serving.files import score_file
    from jrm_jax.serving.trained import identify

    disk.check_file(args.output)  # loading takes minutes
    model = _load(args)
    made = {"weights": identify(args.model, model.card["step"]).digest, "programs": args.programs,
            "compute_dtype": args.compute_dtype}  # fmt: skip
    rows, failed = score_file(model, args.input, args.output, args.images, made)
    terminal.say(f"scored in {model.describe_work()}")
    words = f", {failed:,} of them with an error" if failed else ""
    print(f"{args.output}: {rows:,} rows{words}")
    return 1 if failed else 0


def print_table(found: dict[str, Any]) -> None:
    columns = {"rank": "right", "picture": "left", "reward": "right", "normalised": "right"}
    if any("deviation" in row for row in found["candidates"]):
        columns["deviation"] = "right"
    if any("critique" in row for row in found["candidates"]):
        columns["critique"] = "left"
    rows = []
    for place, row in enumerate(found["candidates"], 1):
        shown = {"rank": place} | row
        cells = [shown.get(name) for name in columns]
        signs = ("" if name == "deviation" else "+" for name in columns)
        rows.append(
            f"{c:{sign}.4f}" if isinstance(c, float) else str(c or "-")
            for c, sign in zip(cells, signs, strict=True)
        )
    options = {name: {"justify": side, "overflow": "fold"} for name, side in columns.items()}
    terminal.print_table(found["instruction"], options, rows)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if argv is None:
        cli.prepare()
    with ending():
        check_least(args, {"max_tokens": 1, "programs": 1})
        if args.input or args.output:
            sys.exit(score_many(args))
        found = rank(args)
        if args.json:
            print(json.dumps(found))
        else:
            print_table(found)
        if args.sheet:
            from jrm_jax.serving.sheet import draw_sheet

            if missing := draw_sheet(found, args.sheet):
                words = "the sheet cannot draw these letters, no font here has them (install Noto)"
                terminal.say(f"{words}: {missing}")
    if any("error" in row for row in found["candidates"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
