"""Data sets on disk: TFDS folders in array_record format, written and read without TensorFlow.

    python -m jrm_jax.data.builders editreward --json=train.json --images=DIR --out=DIR
    python -m jrm_jax.data.builders jsonl --json=train.jsonl --images=DIR --out=DIR
    python -m jrm_jax.data.builders world --out=DIR [--train=16384 ...]

A prepared folder holds the splits' shards, TFDS's own description, and `jrm_jax.json` with the
reward dimensions. It is written under a temporary name and renamed when it is complete, so a
folder that exists is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jrm_jax.data.schema import PreferenceExample, image_reader, parse_json, to_record
from jrm_jax.errors import UserError

MANIFEST = "jrm_jax.json"
WORLD_VERSION = 5  # raise it when the same seed gives other examples
SHARD_EXAMPLES = 4096
CHUNK = 256  # examples per call of the writer, which rewrites its description each time


def write_dataset(
    path: str | Path,
    splits: Mapping[str, Iterable[PreferenceExample | dict]],
    dimensions: Sequence[str],
    name: str = "preferences",
    manifest: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Stream examples (or their records) into a new data set; returns the number per split.

    Raises:
        UserError: the folder exists, a split has no example, or the disk is full.
    """
    import tensorflow_datasets as tfds

    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already: remove it or choose another --out")
    temporary = path.with_name(f"{path.name}.incomplete-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "record": tfds.features.Text(),
            "images": tfds.features.Sequence(tfds.features.Text()),
        }
    )
    counts = dict.fromkeys(splits, 0)
    try:
        temporary.mkdir(parents=True)
        identity = tfds.core.DatasetIdentity(
            name=name, version="1.0.0", data_dir=str(temporary), module_name=__name__
        )
        info = tfds.core.DatasetInfo(
            builder=identity,
            features=features,
            description="Groups of candidates with preferences and critiques, for jrm_jax.",
        )
        writer = tfds.core.SequentialWriter(
            info, max_examples_per_shard=SHARD_EXAMPLES, file_format="array_record"
        )
        writer.initialize_splits(list(splits))
        for split, examples in splits.items():
            for chunk in _chunks(examples):
                records = [e if isinstance(e, dict) else to_record(e) for e in chunk]
                writer.add_examples({split: records})
                counts[split] += len(records)
            if not counts[split]:
                raise UserError(f"{path}: split {split!r} has no example")
        writer.close_all()
        content = {"dimensions": list(dimensions), "counts": counts, **(manifest or {})}
        (temporary / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error}): free some space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def _chunks(items: Iterable) -> Iterator[list]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def read_manifest(path: str | Path) -> dict[str, Any]:
    """`jrm_jax.json` of a prepared data set: dimensions, counts, and where it came from.

    Raises:
        UserError: no prepared data set there.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such data folder; make one with python -m jrm_jax.data.builders, or leave "
            "config.data.path unset for the built-in world"
        )
    try:
        return json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no prepared data set ({MANIFEST}: {error}); make one with "
            "python -m jrm_jax.data.builders"
        ) from error


def open_dataset(path: str | Path) -> dict[str, Any]:
    """{split: random access to records}, see `schema.from_record`.

    Raises:
        UserError: no prepared data set there, or one that cannot be read.
    """
    read_manifest(path)
    import tensorflow_datasets as tfds

    try:
        return dict(tfds.builder_from_directory(str(path)).as_data_source())
    except Exception as error:  # tfds raises many kinds, all meaning the same here
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as a TFDS data set ({detail})") from error


# The built-in world


def _world_record(task: tuple[str, str, int, int]) -> dict:
    from jrm_jax.data import describe, scenes

    kind, split, index, seed = task
    if kind in describe.KINDS:
        # `valid` takes its own range of indices
        example = describe.make_description(index + (split == "valid") * 10**7, seed, kind)
    else:
        example = scenes.make_example(split, index, seed, kind=kind)
    return to_record(example)


def prepare_world(
    cache: str | Path, counts: Mapping[str, int], seed: int, kind: str = "edits"
) -> Path:
    """Draw the built-in world once; later calls with the same arguments find it.

    Args:
        counts: examples per split.
        kind: one of `scenes.KINDS_OF_EXAMPLE` (preferences and critiques), or of `describe.KINDS`
            (pretraining; only train and valid).
    """
    # Before the bar's thread starts: while this import runs, rich cannot import its own parts.
    import tensorflow_datasets  # noqa: F401

    from jrm_jax.data import scenes

    sizes = "-".join(f"{split}{count}" for split, count in counts.items())
    path = Path(cache) / f"world-{kind}-v{WORLD_VERSION}-seed{seed}-{sizes}"
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # A clean interpreter per worker: forking one that runs jax's threads can hang.
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count()) as pool, _progress(sum(counts.values())) as advance:

        def stream(split: str, count: int) -> Iterator[dict]:
            tasks = ((kind, split, index, seed) for index in range(count))
            for record in pool.imap(_world_record, tasks, chunksize=32):
                advance()
                yield record

        splits = {split: stream(split, count) for split, count in counts.items() if count}
        try:
            write_dataset(path, splits, scenes.DIMENSIONS, "world", {"kind": kind, "seed": seed})
        except UserError:
            if not path.is_dir():  # else another process finished it first
                raise
    return path


@contextlib.contextmanager
def _progress(total: int):
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("drawing the built-in world", total=total)
        yield lambda: progress.advance(task)


# Command line


def _read_jsonl(path: Path, images: Path, bad: list[str] | None) -> Iterator[PreferenceExample]:
    reader, dimensions = image_reader(images), None
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    try:
                        obj = json.loads(line)
                    except ValueError as error:
                        raise UserError(f"{where}: not JSON ({error})") from error
                    example = parse_json(obj, reader, where, dimensions=dimensions)
                except UserError as error:
                    if bad is None:
                        raise
                    bad.append(str(error))
                    continue
                dimensions = dimensions or example.dimensions
                yield example
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from error


def _split_off(examples: list, fraction: float) -> dict[str, list]:
    """Every n-th example becomes `valid`."""
    if not fraction:
        return {"train": examples}
    every = max(2, round(1 / fraction))
    valid = examples[every - 1 :: every]
    train = [e for index, e in enumerate(examples) if (index + 1) % every]
    if not valid:
        raise UserError(f"--valid_fraction={fraction} leaves no example of {len(examples)} aside")
    return {"train": train, "valid": valid}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    from jrm_jax.data import describe, scenes

    parser = argparse.ArgumentParser(
        prog="python -m jrm_jax.data.builders", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (
        ("editreward", "EditReward's training JSON: pairs of edits of one source become one group"),
        ("jsonl", "JSON lines of examples, see jrm_jax/data/schema.py"),
    ):
        command = commands.add_parser(name, help=words)
        command.add_argument("--json", type=Path, required=True)
        command.add_argument("--images", type=Path, required=True, help="folder of the pictures")
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--valid_fraction", type=float, default=0.0)
        command.add_argument(
            "--skip_bad", action="store_true", help="leave bad records out, and list them"
        )
    world = commands.add_parser("world", help="the built-in world")
    world.add_argument("--out", type=Path, required=True, help="the data set's parent folder")
    world.add_argument("--seed", type=int, default=0)
    kinds = (*scenes.KINDS_OF_EXAMPLE, *describe.KINDS)
    world.add_argument("--kind", choices=kinds, default="edits")
    for split, count in (("train", 16384), ("valid", 512), ("test", 1024), ("hard", 1024)):
        world.add_argument(f"--{split}", type=int, default=count)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.command == "world":
            from jrm_jax.data import scenes

            names = ("train", "valid")
            if args.kind in scenes.KINDS_OF_EXAMPLE:
                names += ("test", "hard")
            counts = {split: getattr(args, split) for split in names}
            print(prepare_world(args.out, counts, args.seed, args.kind))
            return 0
        from jrm_jax.data.editreward import read_editreward

        read = {"editreward": read_editreward, "jsonl": _read_jsonl}[args.command]
        bad = [] if args.skip_bad else None
        examples = read(args.json, args.images, bad)
        first = next(examples, None)
        if first is None:
            detail = f"; first: {bad[0]}" if bad else ""
            raise UserError(f"{args.json}: no usable record{detail}")

        def every() -> Iterator[PreferenceExample]:
            yield first
            yield from examples

        # without a validation share nothing is held in memory
        splits = (
            _split_off(list(every()), args.valid_fraction)
            if args.valid_fraction
            else {"train": every()}
        )
        counts = write_dataset(args.out, splits, first.dimensions, args.command)
        print(
            f"{args.out}: "
            + ", ".join(f"{count} groups in {split}" for split, count in counts.items())
            + f"; dimensions {', '.join(first.dimensions)}"
        )
        if bad:
            print(f"{len(bad)} records left out:")
            print("\n".join(f"  {line}" for line in bad))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
