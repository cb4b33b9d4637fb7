"""A config against its data, before the first step: is there anything to learn, what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jrm_jax.data import contents, store
from jrm_jax.data.contents import Contents
from jrm_jax.data.schema import from_record
from jrm_jax.data.stated import teacher_scores
from jrm_jax.errors import UserError
from jrm_jax.shell.report import difference

LOOKED_AT = 2000  # groups, for one that has what a loss needs


def reads_critiques(config: ConfigDict) -> bool:
    """Whether a run's losses need critiques; without, they are left out of the batches."""
    return bool(config.loss.language_weight or config.loss.words_weight)


def check_lessons(config: ConfigDict, train: Sequence[Contents], name: str) -> list[str]:
    """What is to be said of the training groups; `name`: of the data.

    Raises:
        UserError: they hold nothing that this config learns from, or no label in one of its
            dimensions, whose reward would stay random.
    """
    dimensions = tuple(config.data.dimensions)
    present = tuple(d for d in dimensions if any(c.labels.get(d) for c in train))
    absent = ", ".join(d for d in dimensions if d not in present)
    critiques = any(c.critiques for c in train)
    ranks = bool(config.loss.preference_weight)
    # critiques are read for their words, for the scores they state, or for both
    distils, reads = bool(config.loss.teacher_weight), reads_critiques(config)
    reads = reads or distils
    if not (ranks and present) and not (reads and critiques):
        wanted = [f"label (ranks, scores or preference) in {absent}"] * ranks + ["critique"] * reads
        other = ""
        if present and not ranks:
            other = "; it has labels, from which configs/discriminative.py learns"
        if critiques and not reads:
            other = "; it has critiques, from which configs/generative.py learns"
        raise UserError(
            f"{name}: no training group has a {' or a '.join(wanted)}, and this config learns from "
            f"nothing else{other}"
        )
    if ranks and present and absent and not distils:
        raise UserError(
            f"{name}: no training group has a label in {absent}, so that reward would stay random: "
            f"give --config.data.dimensions={present}"
        )
    said = []
    if ranks and not present and not distils:
        said.append(f"WARNING: {name} has critiques but no labels: the reward head is not trained")
    if reads and not critiques:
        said.append(f"WARNING: {name} has labels but no critiques: no language is learnt")
    return said


def check_teacher(config: ConfigDict, sets: Sequence[Sequence[Any]], name: str) -> None:
    """
    Args:
        sets: records of the training splits; `LOOKED_AT` of each are looked at.

    Raises:
        UserError: scores of critiques are to be learnt, and no critique states one that is asked
            for.
    """
    mix = dict(config.loss.teacher_mix)
    for records in sets:
        for index in range(min(len(records), LOOKED_AT)):
            for c in from_record(records[index]).candidates:
                said = c.critique if c.score_line else None
                if not all(map(math.isnan, teacher_scores(said, config.data.dimensions, mix))):
                    return
    wanted = ", ".join(mix) or ", ".join(config.data.dimensions)
    raise UserError(
        f"{name}: config.loss.teacher_weight is {config.loss.teacher_weight}, but no critique of "
        f"the first {LOOKED_AT} groups states a score ({wanted}) in a last line that is marked by "
        "score_line: set config.loss.teacher_weight to 0, or name the scores that it states in "
        "config.loss.teacher_mix"
    )


def describe_unused(config: ConfigDict, folders: Sequence[Path]) -> list[str]:
    """Reward dimensions that the user's data have and the run does not train."""
    if not config.data.path and not config.data.mixture:
        return []
    found = dict.fromkeys(d for f in folders for d in store.read_manifest(f).get("dimensions", ()))
    unused = [name for name in found if name not in config.data.dimensions]
    if not unused:
        return []
    every = (*config.data.dimensions, *unused)
    return [
        f"the data have labels in {', '.join(found)}; those in {', '.join(unused)} are not used "
        f"(all: --config.data.dimensions={every})"
    ]


def describe_no_valid(config: ConfigDict, folders: Sequence[Path]) -> str:
    """What a run without the split 'valid' lacks, and what makes one."""
    if not config.data.path and not config.data.mixture:
        make = "give --config.data.world.valid=256"
    else:
        layout = store.read_manifest(folders[0]).get("layout", "LAYOUT")
        make = (
            f"make one of other lines with python -m jrm_jax.data.builders {layout} --json=FILE "
            f"--images=FOLDER --split=valid --out={folders[0]}, or build the set anew with "
            "--valid_fraction=0.05"
        )
    return (
        "WARNING: there is no split 'valid': nothing is measured during training, and the last "
        f"checkpoint counts as the best; {make}"
    )


def check_unchanged(workdir: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Whether a run may go on; `before`: the stamp of its checkpoint, `now`: of its data.

    Raises:
        UserError: another protocol, or other examples; says what differs.
    """
    old, new = ({k: v for k, v in each.items() if k != "data"} for each in (before, now))
    if old != new:
        raise UserError(
            f"{workdir}: the checkpoint was trained with another protocol: {difference(old, new)}"
        )
    # of a checkpoint from before there were digests nothing is known
    words = contents.changes(before["data"], now["data"]) if "data" in before else ""
    if words:
        raise UserError(
            f"{workdir}: the data have changed since the checkpoint was saved: {words}; put the "
            "old ones back to go on, or give another --workdir"
        )
