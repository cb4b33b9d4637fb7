"""Draw the built-in world into a folder, once, with all cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jrm_jax.data.schema import from_record, to_record
from jrm_jax.data.store import open_dataset, write_dataset
from jrm_jax.data.world.life import LIKE_PACKAGED, Life, make_lifelike
from jrm_jax.errors import UserError
from jrm_jax.shell.terminal import Bar

VERSION = 5  # raise it when the same seed gives other examples
LIFE_VERSION = 1  # the same, of those that `life` changes


def _world_record(task: tuple[str, str, int, int]) -> dict:
    from jrm_jax.data.world import describe, scenes

    kind, split, index, seed = task
    if kind in describe.KINDS:
        # `valid` takes its own range of indices
        example = describe.make_description(index + (split == "valid") * 10**7, seed, kind)
    else:
        example = scenes.make_example(split, index, seed, kind=kind)
    return to_record(example)


def prepare_world(
    cache: str | Path,
    counts: Mapping[str, int],
    seed: int,
    kind: str = "edits",
    life: Life = LIKE_PACKAGED,
) -> Path:
    """Draw the built-in world once; later calls with the same arguments find it.

    A world like life is made from the packaged one, whose pictures it has.

    Args:
        counts: examples per split.
        kind: one of `scenes.KINDS_OF_EXAMPLE` (preferences and critiques), or of `describe.KINDS`
            (pretraining; only train and valid).
        life: what becomes of labels and critiques of `train`; not for pretraining.
    """
    drawn = _draw(cache, counts, seed, kind)
    if life == LIKE_PACKAGED:
        return drawn
    path = drawn.with_name(f"{drawn.name}-life{LIFE_VERSION}-{life.words}")
    count = counts["train"]

    def stream(split: str, records: Sequence) -> Iterator[dict]:
        for index in range(len(records)):
            record = records[index]
            if split == "train":
                example = make_lifelike(from_record(record), life, index, seed, count)
                record = to_record(example)
            yield record

    if not path.is_dir():
        splits = {split: stream(split, records) for split, records in open_dataset(drawn).items()}
        _write(path, splits, {"kind": kind, "seed": seed, "life": life._asdict()})
    return path


def _draw(cache: str | Path, counts: Mapping[str, int], seed: int, kind: str) -> Path:
    # Before the bar's thread starts: while this import runs, rich cannot import its own parts.
    import tensorflow_datasets  # noqa: F401

    sizes = "-".join(f"{split}{count}" for split, count in counts.items())
    path = Path(cache) / f"world-{kind}-v{VERSION}-seed{seed}-{sizes}"
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # A clean interpreter per worker: forking one that runs jax's threads can hang.
    context = multiprocessing.get_context("spawn")
    bar = Bar("drawing the built-in world", sum(counts.values()))
    # Ctrl-C reaches the workers, too; it is for this process to end them.
    ignore = (signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with context.Pool(os.cpu_count(), *ignore) as pool, bar:

        def stream(split: str, count: int) -> Iterator[dict]:
            tasks = ((kind, split, index, seed) for index in range(count))
            for record in pool.imap(_world_record, tasks, chunksize=32):
                bar.advance()
                yield record

        splits = {split: stream(split, count) for split, count in counts.items() if count}
        _write(path, splits, {"kind": kind, "seed": seed})
    return path


def _write(path: Path, splits: Mapping[str, Iterator[dict]], manifest: Mapping) -> None:
    from jrm_jax.data.world import scenes

    try:
        write_dataset(path, splits, scenes.DIMENSIONS, "world", manifest)
    except UserError:
        if not path.is_dir():  # else another process finished it first
            raise
