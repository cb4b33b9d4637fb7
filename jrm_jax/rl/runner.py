"""Makes what a config asks for: best-of-n and runs of RL, of every model. What is made is kept, and
not made again."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jrm_jax.errors import UserError
from jrm_jax.rl import best_of_n, training
from jrm_jax.rl.editing import Problem, make_problem
from jrm_jax.rl.reward import Chance, Reward
from jrm_jax.rl.rollout import SPLITS
from jrm_jax.run.workdir import RESULTS, write_whole
from jrm_jax.serving.reward_model import RewardModel
from jrm_jax.shell.stop import StopRequest
from jrm_jax.shell.terminal import duration

MEASURED = "measured.json"  # what the study writes into a run's folder
CHANCE = "chance"
CONTROLS = ("gold", CHANCE)  # arms whose reward is no model's
RUNS = "results"
# Of a config, what a run's numbers do not depend on.
APART = (
    "arms", "iterations", "seeds", "seed", "name", "variant", "controls", "verdict", "out",
    "log_interval", "save_interval",
)  # fmt: skip


class Model(NamedTuple):
    """A reward: its arm, which of the arm's, and the folders of its models (none: gold)."""

    arm: str
    number: int
    folders: tuple[str, ...]

    @property
    def name(self) -> str:
        """'joint-0', as part of a file's name."""
        return f"{re.sub(r'[^A-Za-z0-9._]+', '-', self.arm)}-{self.number}"


class Job(NamedTuple):
    model: Model
    seed: int | None  # of a run of RL; None: best-of-n

    @property
    def name(self) -> str:
        return f"{self.model.name}-{'best' if self.seed is None else f's{self.seed}'}"


def models(config: ConfigDict, given: Sequence[str]) -> tuple[list[Model], list[str]]:
    """(rewards, arms of the config of which no folder is there).

    Args:
        given: folders of --model; each is an arm of its own, by its folder's name, or all of them
            one reward.

    Raises:
        UserError: nothing to measure, or a folder that is not there.
    """
    for folder in given:
        if not Path(folder).is_dir():
            raise UserError(f"--model={folder}: no such folder: give a run's, or an export's")
    found, missing = [], []
    if config.reward.ensemble:
        if len(given) < 2:
            raise UserError("--config.reward.ensemble=True needs two or more --model")
        found.append(Model("ensemble", 0, tuple(given)))
    else:
        names = _names(given)
        found += [Model(names[folder], 0, (folder,)) for folder in dict.fromkeys(given)]
        for arm, patterns in config.arms:
            folders = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
            found += [Model(arm, _seed(path, place), (path,)) for place, path in enumerate(folders)]
            missing += [] if folders else [arm]
    if not found:
        hint = f" (none is there of {', '.join(missing)})" if missing else ""
        raise UserError(f"give --model=FOLDER, the folder of a run or of an export{hint}")
    unknown = [arm for arm in config.controls if arm not in CONTROLS]
    if unknown:
        raise UserError(f"config.controls: {unknown[0]!r} is none of {', '.join(CONTROLS)}")
    found += [Model(arm, 0, ()) for arm in config.controls]
    return found, missing


def _seed(path: str, place: int) -> int:
    """Of a run of the study, whose folder's name says it: other models may be made later."""
    found = re.search(r"-s(\d+)-[0-9a-f]+$", path)
    return int(found[1]) if found else place


def _names(folders: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or as many parts as tell them apart, as files and from the
    controls."""
    parts = {folder: Path(folder).resolve().parts for folder in folders}
    for length in range(1, max(map(len, parts.values()), default=1) + 1):
        names = {folder: "/".join(own[-length:]) for folder, own in parts.items()}
        files = {Model(name, 0, ()).name for name in names.values()}
        if len(files) == len(set(parts.values())) and not set(names.values()) & {*CONTROLS}:
            break
    return names


def jobs(config: ConfigDict, found: Sequence[Model]) -> Iterator[Job]:
    """Best-of-n of all models first: it is cheap, and has no chance of training in it."""
    yield from (Job(model, None) for model in found if model.arm != CHANCE)
    for seed in range(config.seeds):
        for model in found:
            if model.folders or not seed:
                yield Job(model, config.seed + seed)


def protocol(config: ConfigDict) -> dict[str, Any]:
    """What every run's numbers depend on, beside its models and seed; in JSON types."""
    whole = json.loads(config.to_json_best_effort())
    return {name: value for name, value in whole.items() if name not in APART}


def settings_of(config: ConfigDict, job: Job) -> dict[str, Any]:
    """What a run's file says of itself before it is made."""
    model = job.model
    return {
        "arm": model.arm, "model": list(model.folders), "number": model.number, "seed": job.seed,
        "iterations": None if job.seed is None else config.iterations,
        "protocol": protocol(config),
    }  # fmt: skip


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
    out, todo = folder_of(config, workdir) / RUNS, []
    out.mkdir(parents=True, exist_ok=True)
    for job in jobs(config, found):
        path = out / f"{job.name}.json"
        if not is_made(config, path, job):
            todo.append((job, path))
    say(f"{len([*jobs(config, found)]) - len(todo)} runs are made, {len(todo)} to go")
    if missing:
        say(f"no folder yet of {', '.join(missing)}: left out until there is one")
    if not todo:
        return 0
    pools, loaded, spent = training.pools(config), {}, []
    every = [problem for pool in pools.values() for problem in pool.problems]
    every += [
        make_problem(split, index, config.world_seed)
        for split in SPLITS
        for index in range(config.best_of.problems)
    ]
    for place, (job, path) in enumerate(todo):
        left = duration(sum(spent) / len(spent) * (len(todo) - place)) if spent else "unknown"
        say(f"{job.name}: run {place + 1} of {len(todo)}, time left {left}")
        if job.model not in loaded:
            loaded = {job.model: _reward(config, job.model, every, say)}  # one at a time in memory
        args = (config, job.name, settings_of(config, job), loaded[job.model], pools)
        status = _make(*args, workdir, path, stop, say)
        if status:
            return status
        spent.append(json.loads(path.read_text())["seconds"])
    return 0


def is_made(config: ConfigDict, path: Path, job: Job) -> bool:
    if not path.exists():
        return False
    kept, wanted = json.loads(path.read_text()), settings_of(config, job)
    more = (wanted["iterations"] or 0) - (kept["iterations"] or 0)
    same = all(kept[name] == wanted[name] for name in ("protocol", "model"))
    if not same or more < 0:
        raise UserError(
            f"{path} is of other settings or another model: use the same to go on, or another "
            "--workdir"
        )
    return not more


def _reward(
    config: ConfigDict, model: Model, problems: Sequence[Problem], say: Callable[[str], None]
) -> Reward | Chance | None:
    if not model.folders:
        return Chance() if model.arm == CHANCE else None
    here = jax.devices()[:1]  # a call is too small to be shared out
    loaded = [
        RewardModel.load(folder, batch_size=config.groups, say=say, devices=here)
        for folder in model.folders
    ]
    own = config.reward
    return Reward(loaded, model.folders, problems, config.edits, own.penalty, own.unsure)


def _known(folders: Sequence[str]) -> dict[str, Any]:
    """What is known of models without a policy, for each folder, None where it is not: accuracy on
    `test`; of runs that the study has measured and kept, the effective rank of the reward token's
    state, and what an attack on the pixels gains, in deviations of the scores."""
    known: dict[str, list] = {"pair_accuracy": [], "effective_rank": [], "attack_gain": []}
    for folder in map(Path, folders):
        results, measured = (
            json.loads(path.read_text()) if (path := folder / name).is_file() else {}
            for name in (RESULTS, MEASURED)
        )
        ranks, attack = measured.get("ranks") or {}, measured.get("attack")
        last = ranks[max(ranks, key=int)]["effective_rank"] if ranks else None
        gain = None
        if attack:
            before, after = (
                np.concatenate([np.asarray(row) for row in attack[when]])
                for when in ("before", "after")
            )
            gain = float((after - before).mean() / before.std())
        known["pair_accuracy"].append(results.get("test/pair_accuracy"))
        known["effective_rank"].append(last)
        known["attack_gain"].append(gain)
    return known


def _make(
    config: ConfigDict, name: str, settings: dict[str, Any], reward: Reward | Chance | None,
    pools: dict, workdir: Path, path: Path, stop: StopRequest, say: Callable[[str], None],
) -> int:  # fmt: skip
    folder, known = workdir / name, _known(settings["model"])
    run = training.Run(config, name, folder, settings["seed"] or 0, settings, reward, pools)
    if settings["seed"] is not None:
        status = run.train(stop, say)
        if not status:
            made = json.loads((folder / training.RUN).read_text())
            write_whole(path, json.dumps(made | known, indent=1) + "\n")
        return status
    folder.mkdir(parents=True, exist_ok=True)
    run.settle()
    return best_of_n.measure(config, name, settings | known, reward, path, stop, say)
