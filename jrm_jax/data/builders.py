"""Data sets on disk, from a user's files or from the built-in world.

    python -m jrm_jax.data.builders editreward --data=PATH --images=DIR --out=DIR
    python -m jrm_jax.data.builders LAYOUT --help           of LAYOUTS below
    python -m jrm_jax.data.builders world --out=DIR [--train=16384 ...]

A build that was stopped goes on where it was when the same command is given again. `docs/data.md`
has the layouts; `building` is how files become a data set, `store` what lies on the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.data.ingest import building, making, regions
from jrm_jax.data.ingest.judged import Judged
from jrm_jax.data.ingest.judgements import EDITREWARD
from jrm_jax.data.ingest.pairs import Pairs
from jrm_jax.data.ingest.ranked import Ranked
from jrm_jax.data.ingest.rationales import Rationales
from jrm_jax.data.ingest.records import Records
from jrm_jax.data.ingest.table import Table
from jrm_jax.data.store import SHARD_EXAMPLES
from jrm_jax.data.world.prepare import prepare_world
from jrm_jax.errors import UserError
from jrm_jax.shell import cores, disk, memory
from jrm_jax.shell.arguments import Parser, check_least
from jrm_jax.shell.stop import GRACE, Stopped, StopRequest
from jrm_jax.shell.terminal import Bar, say

FEW = 2**16  # bytes: a file of fewer has hardly rows enough for worker processes
SHOWN = 20  # problems that are printed; all are listed in the data set's problems.txt


class Flag(NamedTuple):
    """Of one layout alone."""

    name: str
    words: str
    options: dict[str, Any]


class Kind(NamedTuple):
    """What the command says about a layout, how it is made, and what may be chosen."""

    words: str
    make: Callable[[Path, argparse.Namespace], building.Layout]
    flags: tuple[Flag, ...] = ()


NO_SCORES = Flag(
    "--no_scores", "critiques only: do not rank by the scores", {"action": "store_true"}
)
LAYOUTS = {
    "editreward": Kind(
        "EditReward-Data, JSON or parquet: all edits of one source become one group",
        lambda folder, args: Pairs("editreward", folder),
    ),
    "genai_bench": Kind(
        "GenAI-Bench's image editing, parquet or EditReward's JSON of it",
        lambda folder, args: Pairs("genai_bench", folder, EDITREWARD[:1]),
    ),
    "hpdv3": Kind(
        "HPDv3's pairs of pictures without a source, with the shares of the votes",
        lambda folder, args: Pairs("hpdv3", folder, (args.dimension,)),
        (Flag("--dimension", "what the pairs were judged by", {"default": EDITREWARD[0]}),),
    ),
    "imagereward": Kind(
        "ImageRewardDB: all pictures of one prompt, ranked and rated",
        lambda folder, args: Ranked(folder),
    ),
    "editscore": Kind(
        "edits with a judge's reasoning and scores, as EditScore's training data",
        lambda folder, args: Judged(folder, labels=not args.no_scores),
        (NO_SCORES,),
    ),
    "spatialreward": Kind(
        "SpatialReward-Train: a judge's reasoning about boxes in the edits",
        lambda folder, args: Judged(folder, boxes=args.boxes),
        (Flag("--boxes", "in the text as words, or as a line of their own before it",
              {"choices": regions.STYLES, "default": regions.STYLES[0]}),),
    ),
    "rationalrewards": Kind(
        "RationalRewards' SFT data: rationales with scores by aspect, about two candidates or one",
        lambda folder, args: Rationales(folder, critiques=not args.no_critiques),
        (Flag("--no_critiques", "preferences only", {"action": "store_true"}),),
    ),
    "jsonl": Kind(
        "examples as JSON lines, JSON list or parquet, see jrm_jax/data/parsing.py",
        lambda folder, args: Records(folder),
    ),
    "csv": Kind(
        "a folder of pictures with a CSV file, see jrm_jax/data/ingest/table.py",
        lambda folder, args: Table(folder),
    ),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from jrm_jax.data.world import describe, scenes

    parser = Parser(
        prog="python -m jrm_jax.data.builders", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, kind in LAYOUTS.items():
        command = commands.add_parser(name, help=kind.words, description=kind.words)
        command.add_argument(
            "--data", "--json", type=Path, required=True, help="file, or folder of files"
        )
        command.add_argument(
            "--images", type=Path, help="folder of the pictures; default: where --data is"
        )
        command.add_argument("--out", type=Path, required=True)
        command.add_argument(
            "--valid_fraction", type=float, default=0.0, help="share of the prompts for 'valid'"
        )
        command.add_argument(
            "--shard_examples", type=int, default=SHARD_EXAMPLES, help="groups per file, at most"
        )
        command.add_argument(
            "--workers", type=int, default=cores.usable(), help="processes that check pictures"
        )
        command.add_argument("--split", default="train", choices=("train", "valid", "test", "hard"))
        command.add_argument(
            "--skip_bad", action="store_true", help="leave bad records out, count and list them"
        )
        for flag in kind.flags:
            command.add_argument(flag.name, help=flag.words, **flag.options)
    world = commands.add_parser("world", help="the built-in world")
    world.add_argument("--out", type=Path, required=True, help="the data set's parent folder")
    world.add_argument("--seed", type=int, default=0)
    kinds = (*scenes.KINDS_OF_EXAMPLE, *describe.KINDS)
    world.add_argument("--kind", choices=kinds, default="edits")
    for split, count in (("train", 16384), ("valid", 512), ("test", 1024), ("hard", 1024)):
        world.add_argument(f"--{split}", type=int, default=count)
    return parser.parse_args(argv)


def make_layout(args: argparse.Namespace) -> building.Layout:
    """Layout of a command."""
    folder = args.images or (args.data if args.data.is_dir() else args.data.parent)
    return LAYOUTS[args.command].make(folder, args)


@contextlib.contextmanager
def _build_progress() -> Iterator[Callable[[str, int, int, Counter], None]]:
    with Bar("starting") as bar:

        def show(words: str, done: int, total: int, counts: Counter) -> None:
            left = f"rows, {counts['rows left out']:,} left out"
            bar.show(done, total or None, words, left)

        yield show


def build(args: argparse.Namespace) -> None:
    """A user's files; prints what was kept and what was not.

    Raises:
        UserError: see `building.build`.
    """
    if not 0 <= args.valid_fraction < 1:
        raise UserError(f"--valid_fraction={args.valid_fraction} must be at least 0 and below 1")
    check_least(args, {"workers": 1, "shard_examples": 1})
    if args.workers > 1 and not (args.data.is_file() and args.data.stat().st_size < FEW):
        making.start_server()
    # Before the bar's thread starts: while this import runs, rich cannot import its own parts.
    import tensorflow_datasets  # noqa: F401

    options = building.Options(
        args.skip_bad, args.valid_fraction, args.split, args.shard_examples
    )
    with _build_progress() as progress:
        result = building.build(
            make_layout(args), args.command, args.data, args.out, options, progress, args.workers
        )
    left = sum(result.left.values())
    print(
        f"{args.out}: "
        + ", ".join(f"{count} groups in {split}" for split, count in result.counts.items())
        + f"; dimensions {', '.join(result.dimensions)}"
    )
    print(f"{result.rows} rows: {result.rows - left} kept, {left} left out")
    for kinds, words in ((result.left, "left out"), (result.notes, "kept, but odd")):
        for kind, count in kinds.items():
            print(f"  {count} {words}: {kind}")
    if result.left or result.notes:
        with result.listed.open(encoding="utf-8") as lines:
            for _, line in zip(range(SHOWN), lines, strict=False):
                print(f"  {line.rstrip().split(chr(9))[-1]}")
        print(f"all of them: {result.listed}")


def make_world(args: argparse.Namespace) -> None:
    """The built-in world as a data set; prints its folder."""
    from jrm_jax.data.world import scenes

    names = ("train", "valid")
    if args.kind in scenes.KINDS_OF_EXAMPLE:
        names += ("test", "hard")
    check_least(args, dict.fromkeys(names, 0))
    counts = {split: getattr(args, split) for split in names}
    print(prepare_world(args.out, counts, args.seed, args.kind))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if argv is None:  # a process of its own
        memory.keep_freed()
    try:
        with StopRequest("stopping", grace=GRACE) as stop, stop.breaking():
            if args.command == "world":
                make_world(args)
            else:
                build(args)
    except (UserError, OSError) as error:
        if (told := disk.expected_words(error)) is None:
            raise
        say(f"error: {told}")
        return 1
    except Stopped as stopped:
        say("stopped; the same command goes on")
        return stopped.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
