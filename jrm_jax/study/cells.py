"""The cells of the study: arms as changes of the training config, in the order they are run."""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jrm_jax import optim
from jrm_jax.data.world.life import LIKE_PACKAGED
from jrm_jax.data.world.prepare import VERSION as WORLD_VERSION
from jrm_jax.errors import UserError
from jrm_jax.run.backbones import find_folder
from jrm_jax.shell import disk

BASE = "configs/joint.py"
VERSION = 1  # raise it when `measure.py` measures something else
LANGUAGE, FACTS = "loss.language_weight", "loss.facts_weight"
# Fields that came after the first cells, with the values at which a run is what it was before.
LATER = {
    "loss.language_end": 1.0, "loss.through_reward": False, "loss.words_weight": 0.0,
    "loss.gaussian": "off", "head.hidden": (), "head.anew": False,
    "data.max_candidates": 0, "data.max_pictures": 0,
    "data.max_picture_tokens": 0, "data.max_prompt": 0, "data.max_candidate": 0,
    "data.programs": 6, "data.labelled": 0,
    "loss.teacher_weight": 0.0, "loss.teacher_scale": 1.0, "loss.teacher_mix": (),
    **{f"data.world.{name}": value for name, value in LIKE_PACKAGED._asdict().items()},
}  # fmt: skip


class Arm(NamedTuple):
    """words: what it is. changes: fields of the training config. scaled: the field that the weight
    axis sets, '' for none. steps, groups: times those of the others. judge: its score is read from
    the critique that it writes. until: the arm whose accuracy on `valid` it is to reach. idea: why
    it was tried, of an arm that came after the first results. first: fields of a run that comes
    before it, from whose backbone it starts."""

    words: str
    changes: Mapping[str, Any]
    scaled: str = ""
    steps: int = 1
    judge: bool = False
    until: str = ""
    idea: str = ""
    first: Mapping[str, Any] | None = None
    groups: int = 1


_ALONE = {LANGUAGE: 0.0}
ARMS = {
    "discriminative": Arm("preference loss alone", _ALONE),
    "joint": Arm("preference and critique losses", {}, LANGUAGE),
    "joint_masked": Arm(
        "joint, the critique's score line masked", {"loss.score_line": False}, LANGUAGE
    ),
    "joint_shuffled": Arm(
        "joint, critiques of other examples", {"data.world.kind": "shuffled"}, LANGUAGE
    ),
    "regression": Arm(
        "preference loss and the critique's facts, no language",
        {**_ALONE, "data.world.kind": "facts"},
        FACTS,
    ),
    "generative": Arm(
        "critique loss alone; the score is read from the critique it writes",
        {"loss.preference_weight": 0.0, "loss.centering_weight": 0.0},
        LANGUAGE,
        judge=True,
    ),
    "discriminative_x2": Arm("discriminative, twice the steps", _ALONE, "", 2, until="joint"),
    "discriminative_x4": Arm("discriminative, four times the steps", _ALONE, "", 4, until="joint"),
    "joint_words": Arm(
        "joint, and the reward token's state predicts the critique's words",
        {"loss.words_weight": 1.0}, LANGUAGE,
        idea="the critique is written from the pictures, so its loss asks little of the one state "
        "that is scored; here that state must itself say what the critique says",
    ),
    "joint_through": Arm(
        "joint, critiques see their candidate by its reward token alone",
        {"loss.through_reward": True}, LANGUAGE,
        idea="the same, by what a critique may look at instead of by one more loss",
    ),
    "joint_fade": Arm(
        "joint, twice the language weight at first, none at the end",
        {"loss.language_weight": 2.0, "loss.language_end": 0.0},
        idea="the language loss begins at 14 nats a token and is informative late; it should not "
        "turn the last steps, which settle the ranking",
    ),
    "joint_rate": Arm(
        "joint, 1.7 times the learning rate", {"optimizer.learning_rate": 2.5e-3}, LANGUAGE,
        idea="Muon's steps have a fixed size, and the language loss takes its share of each",
    ),
    "discriminative_rate": Arm(
        "discriminative, 1.7 times the learning rate",
        {**_ALONE, "optimizer.learning_rate": 2.5e-3},
        idea="what the higher rate does without language",
    ),
    "joint_head": Arm(
        "joint, the reward head begins at a tenth of its size",
        {"head.scale": 0.1}, LANGUAGE,
        idea="a random head asks the backbone for random changes in the first steps; a small one "
        "leaves these to language",
    ),
    "discriminative_head": Arm(
        "discriminative, the reward head begins at a tenth of its size",
        {**_ALONE, "head.scale": 0.1},
        idea="what joint_head is to be compared with",
    ),
    "joint_long": Arm(
        "joint, twice the steps on twice the groups",
        {}, LANGUAGE, 2, groups=2,
        idea="in 400 steps the language loss is just becoming informative when the run ends",
    ),
    "discriminative_long": Arm(
        "discriminative, twice the steps on twice the groups",
        _ALONE, "", 2, groups=2,
        idea="what joint_long is to be compared with",
    ),
}  # fmt: skip
CHANGES = tuple(name for name, arm in ARMS.items() if arm.idea)


class Cell(NamedTuple):
    """One run of the first part. `regimes.Point` is one of the second, and has the same methods."""

    arm: str
    size: int
    weight: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-n{self.size}-w{self.weight:g}-s{self.seed}"

    @property
    def what(self) -> Arm:
        return ARMS[self.arm]

    def changes(self, config: ConfigDict) -> dict[str, Any]:
        """What the training config has instead of the base's fields."""
        arm = self.what
        return {
            **shared_changes(config),
            "data.world.train": self.size * arm.groups,
            "total_steps": config.train.total_steps * arm.steps,
            "seed": self.seed,
            **arm.changes,
            **({arm.scaled: self.weight} if arm.scaled else {}),
        }

    def measures(self, config: ConfigDict) -> dict[str, Any]:
        """The settings of `measure.py`."""
        return config.measure.to_dict()

    def first(self, config: ConfigDict) -> dict[str, Any] | None:
        """The training config's changes of the run that comes before, if there is one."""
        return None

    def depends(self, config: ConfigDict) -> list[Any]:
        """What else the numbers depend on."""
        return []


def plan(config: ConfigDict) -> list[Cell]:
    """Every cell once, in the order of the config's table.

    Raises:
        UserError: an arm that does not exist.
    """
    cells = []
    for arms, size, weight, seeds in config.cells:
        unknown = [arm for arm in arms if arm not in ARMS]
        if unknown:
            raise UserError(f"config.cells: no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
        cells += [
            Cell(arm, size or max(config.sizes), weight if ARMS[arm].scaled else 1.0, seed)
            for seed in range(seeds)
            for arm in arms
        ]
    return list(dict.fromkeys(cells))


def shared_changes(config: ConfigDict) -> dict[str, Any]:
    """Of all cells, by the name of the training config's field."""
    shared = optim.flatten(config.train.to_dict())
    return {
        **{path.replace("/", "."): value for path, value in shared.items()},
        **{f"data.world.{name}": value for name, value in config.world.items()},
    }


def training_config(config: ConfigDict, cell: Cell) -> ConfigDict:
    base = _base()
    base.update_from_flattened_dict(cell.changes(config))
    return base


def _base() -> ConfigDict:
    from configs import joint

    return joint.get_config()


def fingerprint(config: ConfigDict, cell: Cell) -> str:
    """Of everything a cell's numbers depend on: its config, the measures, the world, the weights it
    starts from."""
    content = [
        _settings(training_config(config, cell)),
        cell.measures(config), WORLD_VERSION, VERSION, *cell.depends(config),
    ]  # fmt: skip
    return _digest(content)


def first_fingerprint(config: ConfigDict, cell: Cell) -> str:
    """Likewise of the run that comes before it, of a cell that has one."""
    base = _base()
    base.update_from_flattened_dict(cell.first(config))
    return _digest([_settings(base), WORLD_VERSION])


def _settings(training: ConfigDict) -> dict[str, Any]:
    """What of a training config its numbers depend on."""
    settings = training.to_dict()
    for name, value in LATER.items():
        *path, field = name.split(".")
        part = functools.reduce(dict.__getitem__, path, settings)
        if part[field] == value:
            del part[field]
    settings["backbone"]["path"] = backbone_digest(settings["backbone"]["path"])
    for name in ("cache", "workers", "prefetch"):
        settings["data"].pop(name)
    return settings


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def backbone_digest(path: str) -> str:
    """Of a backbone's weights, tokenizer and config."""
    digest, folder = hashlib.sha256(), find_folder(path, "--config.train.backbone.path=FOLDER")
    for file in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


# Results on disk


FOLDER, AGAIN = "cells", "again"  # of results, and of the same cells made elsewhere


def path_of(config: ConfigDict, cell: Cell, folder: str = FOLDER) -> Path:
    return Path(config.out) / folder / f"{cell.name}.json"


def load_cells(
    config: ConfigDict, every: Sequence[Cell] | None = None, folder: str = FOLDER
) -> dict[Cell, dict]:
    """The results there are, of cells whose fingerprint is still the config's; of `every` cell, or
    of those of `plan`."""
    every = plan(config) if every is None else every
    read = {cell: _read(config, cell, folder) for cell in every}
    return {cell: result for cell, result in read.items() if result is not None}


def _read(config: ConfigDict, cell: Cell, folder: str) -> dict | None:
    """None: there is none, or it is of another config."""
    path = path_of(config, cell, folder)
    result = disk.read_json(path) if path.is_file() else {}
    return result if result and result["fingerprint"] == fingerprint(config, cell) else None


def save_cell(config: ConfigDict, cell: Cell, result: Mapping[str, Any]) -> None:
    """One field a line, so that changes can be read."""
    path = path_of(config, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = (f'"{key}": {json.dumps(v, separators=(",", ":"))}' for key, v in result.items())
    disk.write_whole(path, "{\n" + ",\n".join(fields) + "\n}\n")


def unneeded(cell: Cell, found: Mapping[Cell, Mapping[str, Any]]) -> str:
    """Why a longer run need not be made: '' where it must, or where that is not known yet.

    A longer run is needed while no shorter one of its seed has reached the other arm's accuracy on
    `valid`.
    """
    arm = cell.what
    goal = found.get(cell._replace(arm=arm.until)) if arm.until else None
    if goal is None:
        return ""
    for other, result in found.items():
        alike = (other.what.changes, other.what.groups) == (arm.changes, arm.groups)
        shorter = alike and other.what.steps < arm.steps
        if shorter and other[1:] == cell[1:] and result["valid"] >= goal["valid"]:
            return f"{other.name} has reached {arm.until}'s {goal['valid']:.4f} on valid"
    return ""


def estimate(
    config: ConfigDict, cell: Cell, found: Mapping[Cell, Mapping[str, Any]]
) -> float | None:
    """Seconds, from measured cells of its arm, else of all arms, by the number of their steps; None
    at first."""

    def length(other: Cell) -> float:
        """In units of the config's steps."""
        return other.changes(config)["total_steps"] / config.train.total_steps

    if not found:
        return None
    alike = [c for c in found if c.arm == cell.arm] or [*found]
    rates = [found[c]["seconds"]["train"] / length(c) for c in alike]
    rest = [found[c]["seconds"]["measure"] for c in alike]
    return statistics.median(rates) * length(cell) + statistics.median(rest)
