"""Draw the built-in world into a folder, once, with all cores."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from jrm_jax.data.schema import from_record, to_record
from jrm_jax.data.store import disk_errors, open_dataset, write_dataset
from jrm_jax.data.workers import init_worker, pool
from jrm_jax.data.world.life import LIKE_PACKAGED, Life, make_lifelike
from jrm_jax.errors import UserError
from jrm_jax.shell import cores
from jrm_jax.shell.terminal import Bar

CHUNK = 32  # examples that a worker draws at a time
AHEAD = 4  # chunks for each worker that are drawn or wait to be taken
VERSION = 5  # raise it when the same seed gives other examples
LIFE_VERSION = 1  # the same, of those that `life` changes
LOST = (
    "a process that draws the built-in world was ended, perhaps because the memory is full: give"
    " the command fewer processors (taskset), each has a process"
)


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
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    bar, workers = Bar("drawing the built-in world", sum(counts.values())), cores.usable()

    def stream(split: str, count: int) -> Iterator[dict]:
        tasks = ((kind, split, index, seed) for index in range(count))
        for record in _records(drawers, tasks, AHEAD * workers):
            bar.advance()
            yield record

    # A clean interpreter per worker: forking one that runs jax's threads can hang.
    with pool(workers, "spawn", init_worker, (0, workers), LOST) as drawers, bar:
        splits = {split: stream(split, count) for split, count in counts.items() if count}
        _write(path, splits, {"kind": kind, "seed": seed})
    return path


def _records(
    drawers: ProcessPoolExecutor, tasks: Iterable[tuple], most: int
) -> Iterator[dict]:
    """Of each task, in order; at most so many chunks are drawn ahead of what is taken."""
    tasks, waiting = iter(tasks), collections.deque[Future]()
    while chunk := list(itertools.islice(tasks, CHUNK)):
        waiting.append(drawers.submit(_draw_chunk, chunk))
        if len(waiting) > most:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _draw_chunk(tasks: Sequence[tuple[str, str, int, int]]) -> list[dict]:
    return [_world_record(task) for task in tasks]


def _write(path: Path, splits: Mapping[str, Iterator[dict]], manifest: Mapping) -> None:
    from jrm_jax.data.world import scenes

    try:
        write_dataset(path, splits, scenes.DIMENSIONS, "world", manifest)
    except UserError:
        if not path.is_dir():  # else another process finished it first
            raise
