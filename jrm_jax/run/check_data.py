"""A config against its data, before the first step: is there anything to learn, what is missing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from jrm_jax.data import contents, store
from jrm_jax.data.contents import Contents
from jrm_jax.data.schema import Image, PreferenceExample
from jrm_jax.data.stated import OVERALL, plain
from jrm_jax.errors import UserError
from jrm_jax.run.ranking import METRICS, best_metric
from jrm_jax.shell.report import difference

# What the whole span of stated scores may count: chances of a half to three quarters are hardly a
# preference, and a hundred points at one nat each are no soft one.
LEAST_NATS, MOST_NATS = 1.0, 30.0


def reads_critiques(config: ConfigDict) -> bool:
    """Whether a run's losses need critiques; without, they are left out of the batches."""
    return bool(config.loss.language_weight or config.loss.words_weight)


def check_lessons(
    config: ConfigDict,
    train: Sequence[Contents],
    name: str,
    stated: Mapping[str, int] = MappingProxyType({}),
) -> list[str]:
    """What is to be said of the training groups; `name`: of the data; `stated`: groups with scores
    to compare, by reward dimension (`contents.find_stated`), where those are learnt.

    Raises:
        UserError: they hold nothing that this config learns from, or nothing for one of its
            dimensions, whose reward would stay random.
    """
    dimensions = tuple(config.data.dimensions)
    labelled = tuple(d for d in dimensions if any(c.labels.get(d) for c in train))
    critiques = any(c.critiques for c in train)
    ranks = bool(config.loss.preference_weight)
    # critiques are read for their words, for the scores they state, or for both
    distils, reads = bool(config.loss.teacher_weight), reads_critiques(config)
    if not (ranks and labelled) and not ((reads or distils) and critiques):
        wanted = [f"label (ranks, scores or preference) in {', '.join(dimensions)}"] * ranks
        wanted += ["critique"] * (reads or distils)
        other = ""
        if labelled and not ranks:
            other = "; it has labels, from which configs/discriminative.py learns"
        if critiques and not (reads or distils):
            other = "; it has critiques, from which configs/generative.py learns"
        raise UserError(
            f"{name}: no training group has a {' or a '.join(wanted)}, and this config learns from "
            f"nothing else{other}"
        )
    # a mix makes `overall`, and nothing else
    mix = dict(config.loss.teacher_mix) if OVERALL in map(plain, dimensions) else {}
    names = ", ".join(dict.fromkeys((*dimensions, *mix)))
    silent = (
        f"in no training group two critiques state a score ({names}) in last lines that are marked "
        "by score_line"
    )
    unscored = distils and not any(stated.values())
    if unscored and not reads and not (ranks and labelled):
        raise UserError(
            f"{name}: config.loss.teacher_weight is {config.loss.teacher_weight}, but {silent}: "
            "set config.loss.teacher_weight to 0, or name the scores that they state in "
            "config.loss.teacher_mix"
        )
    learnt = tuple(d for d in dimensions if d in labelled or stated.get(d))
    absent = ", ".join(d for d in dimensions if d not in learnt)
    if ranks and learnt and absent:
        nor = ", and in none two critiques state it" * distils
        raise UserError(
            f"{name}: no training group has a label in {absent}{nor}, so that reward would stay "
            f'random: give --config.data.dimensions="{learnt}"'
        )
    said = []
    if ranks and not learnt:
        said.append(f"WARNING: {name} has critiques but no labels: the reward head is not trained")
    if reads and not critiques:
        said.append(f"WARNING: {name} has labels but no critiques: no language is learnt")
    elif unscored:  # without their words, critiques are there for their scores alone
        warning = "" if reads else "WARNING: "
        said.append(f"{warning}{name}: {silent}, so config.loss.teacher_weight counts for nothing")
    return said


def check_example(config: ConfigDict, example: PreferenceExample, name: str) -> None:
    """One for all of a split, whose prompts are alike in most sets.

    Raises:
        UserError: critiques that see their candidate by its reward token alone would not see the
            instruction: a text at the end of a prompt stands with the candidate.
    """
    blind = config.loss.through_reward and config.loss.language_weight
    if blind and not isinstance(example.prompt[-1], Image):
        raise UserError(
            f"{name}: config.loss.through_reward needs prompts that end with a picture, because "
            f"critiques would not see a text behind it; that of {example.id!r} ends with text"
        )


def teacher_scale(
    config: ConfigDict, spans: Mapping[str, Mapping[str, float]]
) -> tuple[tuple[float, ...], list[str]]:
    """Points of the scores that critiques state which count one nat, for each reward dimension, and
    what is to be said of it.

    Args:
        spans: of each data set whose scores are learnt, by reward dimension (`contents.Stated`).

    Raises:
        UserError: `config.loss.teacher_scale` makes hard preferences of them.
    """
    given, scales, words, said = config.loss.teacher_scale, [], [], []
    for dimension in config.data.dimensions:
        every = {name: found.get(dimension, 0.0) for name, found in spans.items()}
        name, widest = max(every.items(), key=lambda each: each[1], default=("", 0.0))
        scales.append(given or widest / 10 or 1.0)
        nats = {name: span / scales[-1] for name, span in every.items() if span}
        points = f"{name}: scores for {dimension} that critiques state lie {widest:g} points apart"
        if given and widest > MOST_NATS * given:
            raise UserError(
                f"{points}, {nats[name]:.3g} nats with config.loss.teacher_scale={given:g}: give "
                f"{widest / 10:g}, or 0, with which a tenth of the points counts one nat"
            )
        if widest and not given:
            said.append(f"{dimension} {scales[-1]:g}")
        words += [
            f"WARNING: {name}: scores for {dimension} that critiques state are only "
            f"{each:.3g} nats apart at {scales[-1]:g} points a nat, so they teach little"
            for name, each in nats.items() if each < LEAST_NATS
        ]  # fmt: skip
    if said:
        words.insert(0, f"stated scores: points that count one nat: {', '.join(said)}")
    return tuple(scales), words


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
        f'(all: --config.data.dimensions="{every}")'
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


def describe_no_judgement(config: ConfigDict, measured: Collection[str]) -> str:
    """What a run lacks whose `valid` has no labels in its dimensions; `measured`: what it has."""
    metric = best_metric(config, measured)
    words = f"the best checkpoint is the one with the least {metric.lstrip('-')} loss there"
    if METRICS[metric] == "preference_weight":
        words = "no checkpoint is better than another, so the last one counts as the best"
    names = ", ".join(config.data.dimensions)
    return f"WARNING: no group of split 'valid' has a label in {names}: {words}"


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
