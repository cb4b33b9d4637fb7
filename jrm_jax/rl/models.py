"""Which rewards are compared: the models of a config's arms and of --model, and their names."""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from jrm_jax.errors import UserError
from jrm_jax.run.workdir import CHECKPOINTS, RESULTS
from jrm_jax.shell import terminal

GOLD, CHANCE, ENSEMBLE = "gold", "chance", "ensemble"
CONTROLS = (GOLD, CHANCE)  # arms whose reward is no model's
_SEED = re.compile(r"-s(\d+)(?=-|$)")  # of a run, in the names that the study gives


class Model(NamedTuple):
    """A reward: its arm, which of the arm's, and the folders of its models (a control has none).

    Models of two arms with one number are compared with each other.
    """

    arm: str
    number: int
    folders: tuple[str, ...]

    @property
    def name(self) -> str:
        """'joint-0', as part of a file's name."""
        return f"{re.sub(r'[^A-Za-z0-9._]+', '-', self.arm)}-{self.number}"


def models(config: ConfigDict, given: Sequence[str]) -> tuple[list[Model], list[str]]:
    """(rewards, arms of the config of which no folder is there).

    Of an arm's folders the seed in its name is a model's number ('joint-s3': 3), else the place of
    its pattern: a number is not changed by what else is there.

    Args:
        given: folders of --model; each is an arm of its own, by its folder's name, or all of them
            one reward. One that is an arm's already is not named again.

    Raises:
        UserError: nothing to measure, a folder that is not there, or two models with one name.
    """
    for folder in given:
        if not Path(folder).is_dir():
            raise UserError(f"--model={folder}: no such folder: give a run's, or an export's")
        if _trains_still(Path(folder)):
            terminal.say(f"WARNING: {folder} trains still: its best step may become another one")
    unknown = [arm for arm in config.controls if arm not in CONTROLS]
    if unknown:
        raise UserError(f"config.controls: {unknown[0]!r} is none of {', '.join(CONTROLS)}")
    folders = list({Path(folder).resolve(): folder for folder in reversed(given)}.values())[::-1]
    found, missing = [], []
    if config.reward.ensemble:
        if len(folders) < 2:
            raise UserError("--config.reward.ensemble=True needs two or more --model, not the same")
        found.append(Model(ENSEMBLE, 0, tuple(sorted(folders))))
    else:
        own, missing = _of_arms(config)
        known = {Path(model.folders[0]).resolve() for model in own}
        new = [folder for folder in folders if Path(folder).resolve() not in known]
        found += [Model(name, 0, (f,)) for f, name in _named(new, [m.name for m in own]).items()]
        found += own
    if not found:
        hint = f" (none is there of {', '.join(missing)})" if missing else ""
        raise UserError(f"give --model=FOLDER, the folder of a run or of an export{hint}")
    found += [Model(arm, 0, ()) for arm in config.controls]
    _check_names(found)
    return found, missing


def _of_arms(config: ConfigDict) -> tuple[list[Model], list[str]]:
    found, missing = [], []
    for arm, patterns in config.arms:
        own = [
            Model(
                arm, int(seed[-1]) if (seed := _SEED.findall(Path(path).name)) else place, (path,)
            )
            for place, pattern in enumerate(patterns)
            for path in _finished(pattern)
        ]
        found += sorted(own, key=lambda model: model.number)
        missing += [] if own else [arm]
    return found, missing


def _finished(pattern: str) -> Iterator[str]:
    """Folders; but a run that trains still would give the weights of a step that nobody chose."""
    for path in sorted(glob.glob(pattern)):
        if _trains_still(Path(path)):
            terminal.say(f"left out: {path} is a run that has not finished yet")
        else:
            yield path


def _trains_still(folder: Path) -> bool:
    return (folder / CHECKPOINTS).is_dir() and not (folder / RESULTS).is_file()


def _named(folders: Sequence[str], taken: Sequence[str]) -> dict[str, str]:
    """Names of folders: the last part of each path, or as many parts as tell them from each other
    and from the rest, whose names `taken` are."""
    parts = {folder: Path(folder).resolve().parts[1:] for folder in folders}
    reserved = {*taken, *(Model(arm, 0, ()).name for arm in (*CONTROLS, ENSEMBLE))}
    names: dict[str, str] = {}
    for length in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {folder: "/".join(own[-length:]) for folder, own in parts.items()}
        files = {Model(name, 0, ()).name.casefold() for name in names.values()}
        if len(files) == len(names) and not files & {name.casefold() for name in reserved}:
            break
    return names


def _check_names(found: Sequence[Model]) -> None:
    """Some file systems take upper and lower case for the same."""
    same = defaultdict(list)
    for model in found:
        same[model.name.casefold()].append(" + ".join(model.folders) or model.arm)
    for name, folders in same.items():
        if len(folders) > 1:
            raise UserError(
                f"{' and '.join(folders)} would both be {name}: put the seed into the folders' "
                "names (-s0, -s1), or give each an arm of its own"
            )
