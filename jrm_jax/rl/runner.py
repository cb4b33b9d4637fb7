"""Makes what a config asks for: best-of-n and runs of RL, of every model. What is made is kept, and
not made again."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jrm_jax.errors import UserError
from jrm_jax.rl import best_of_n, training
from jrm_jax.rl.editing import Problem
from jrm_jax.rl.known import known, lacks
from jrm_jax.rl.models import CHANCE, Model, models
from jrm_jax.rl.reward import Chance, Reward
from jrm_jax.rl.rollout import SPLITS
from jrm_jax.rl.settings import check_same, protocol
from jrm_jax.serving.reward_model import RewardModel
from jrm_jax.serving.trained import Identity, identify
from jrm_jax.shell import disk
from jrm_jax.shell.stop import StopRequest
from jrm_jax.shell.terminal import duration

RUNS = "results"


class Job(NamedTuple):
    model: Model
    seed: int | None  # of a run of RL; None: best-of-n

    @property
    def name(self) -> str:
        return f"{self.model.name}-{'best' if self.seed is None else f's{self.seed}'}"


def jobs(config: ConfigDict, found: Sequence[Model]) -> Iterator[Job]:
    """Best-of-n of all models first: it is cheap, and has no chance of training in it."""
    yield from (Job(model, None) for model in found if model.arm != CHANCE)
    for model in found:  # one after the other: each is loaded once more
        for seed in range(config.seeds):
            yield Job(model, config.seed + seed)


def settings_of(config: ConfigDict, job: Job, of: Callable[[str], Identity]) -> dict[str, Any]:
    """What a run's file says of itself before it is made.

    Args:
        of: tells which weights a folder's scores come from.
    """
    model = job.model
    return {
        "arm": model.arm,
        "model": [{"path": f, **of(f)._asdict()} for f in map(os.path.normpath, model.folders)],
        "number": model.number,
        "seed": job.seed,
        "iterations": None if job.seed is None else config.iterations,
        "protocol": protocol(config),
    }


def folder_of(config: ConfigDict, workdir: Path) -> Path:
    """Where the page's files are: config.out, or inside the workdir."""
    return Path(config.out or workdir / "report")


def run(
    config: ConfigDict, given: Sequence[str], workdir: Path, stop: StopRequest,
    say: Callable[[str], None],
) -> int:  # fmt: skip
    """Make all that is missing; the signal that stopped it, or 0.

    Raises:
        UserError: see `models`, `Reward` and `training.Run`.
    """
    found, missing = models(config, given)
    out, todo, of = folder_of(config, workdir) / RUNS, [], functools.cache(identify)
    out.mkdir(parents=True, exist_ok=True)
    every = [*jobs(config, found)]
    for job in every:
        path, settings = out / f"{job.name}.json", settings_of(config, job, of)
        if not is_made(path, settings):
            todo.append((job, path, settings))
        elif job.seed is None and lacks(kept := disk.read_json(path)):
            more = known(settings["model"], config.known, say)
            disk.write_whole(path, json.dumps(kept | more, indent=1) + "\n")
    say(f"{len(every) - len(todo)} runs are made, {len(todo)} to go")
    if missing:
        say(f"no folder yet of {', '.join(missing)}: left out until there is one")
    if not todo:
        return 0
    pools, loaded, spent = training.pools(config), {}, {True: [], False: []}
    problems = [problem for pool in pools.values() for problem in pool.problems]
    problems += [p for split in SPLITS for p in best_of_n.held_out(config, split).problems]
    for place, (job, path, settings) in enumerate(todo):
        left = _left(spent, [later.seed is None for later, *_ in todo[place:]])
        say(f"{job.name}: run {place + 1} of {len(todo)}, time left {left}")
        began = time.monotonic()
        # first: it loads the model, too
        own = known(settings["model"], config.known, say) if job.seed is None else {}
        if job.model not in loaded:
            loaded.clear()  # one at a time in memory
            loaded[job.model] = _reward(config, job.model, settings["model"], problems, say)
        args = (config, job.name, settings, loaded[job.model], pools)
        status = _make(*args, own, workdir, path, stop, say)
        if status:
            return status
        spent[job.seed is None].append(time.monotonic() - began)
    return 0


def _left(spent: dict[bool, list[float]], to_go: Sequence[bool]) -> str:
    """Time for runs of either kind (best-of-n or not), by the mean of those that were made."""
    if any(not spent[kind] for kind in to_go):
        return "unknown"
    return duration(sum(sum(spent[kind]) / len(spent[kind]) for kind in to_go))


def is_made(path: Path, settings: dict[str, Any]) -> bool:
    """
    Raises:
        UserError: what is there is of other settings or other weights, or a longer run.
    """
    if not path.exists():
        return False
    kept = disk.read_json(path)
    check_same(path, kept, settings)
    had, wanted = (row["iterations"] or 0 for row in (kept, settings))
    if had > wanted:
        raise UserError(f"{path} has {had} iterations: config.iterations must be {had} or more")
    return had == wanted


def _reward(
    config: ConfigDict, model: Model, known: Sequence[dict[str, Any]], problems: Sequence[Problem],
    say: Callable[[str], None],
) -> Reward | Chance | None:  # fmt: skip
    """
    Args:
        known: of each of its models, as `settings_of` says it.
    """
    if not model.folders:
        return Chance() if model.arm == CHANCE else None
    here = jax.devices()[:1]  # a call is too small to be shared out
    loaded = [
        RewardModel.load(
            row["path"], row["step"], batch_size=config.groups, say=say, devices=here
        )
        for row in known
    ]  # fmt: skip
    own = config.reward
    return Reward(loaded, model.folders, problems, config.edits, own.penalty, own.unsure)


def _make(
    config: ConfigDict, name: str, settings: dict[str, Any], reward: Reward | Chance | None,
    pools: dict, own: dict[str, Any], workdir: Path, path: Path, stop: StopRequest,
    say: Callable[[str], None],
) -> int:  # fmt: skip
    """
    Args:
        own: what is known of the model, for the file of best-of-n.
    """
    folder = workdir / name
    if settings["seed"] is None:
        return best_of_n.measure(
            config, name, folder, settings, reward, pools, own, path, stop, say
        )
    run = training.Run(config, name, folder, settings["seed"], settings, reward, pools)
    status = run.train(stop, say)
    if not status:
        disk.write_whole(path, json.dumps(disk.read_json(folder / training.RUN), indent=1) + "\n")
    return status
