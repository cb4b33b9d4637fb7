"""The second part of the study: few and noisy labels, critiques for nearly nothing. Its points.

One vote for each labelled group, and critiques of all groups. The first rows of a batch are
labelled groups, the same ones at a step in every arm; an arm that learns from critiques has as many
rows besides, drawn from all groups, whose labels do not count (`data/plan.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jrm_jax.data.world.prepare import LIFE_VERSION
from jrm_jax.errors import UserError
from jrm_jax.study.cells import FACTS, LANGUAGE, Arm, shared_changes

# `overall` as gold has it, in tenths of its points.
TEACHER = {
    "loss.teacher_weight": 1.0,
    "loss.teacher_mix": (("following", 0.6), ("preservation", 0.4)),
}
ALONE = {LANGUAGE: 0.0}
WORDS = {"loss.words_weight": 1.0}
MASKED = {"loss.score_line": False}
SHUFFLED = {"data.world.kind": "shuffled"}
# A model judge's: a fifth of what it states is wrong, its scores agree with gold at 0.7.
NOISY = {"data.world.wrong_facts": 0.2, "data.world.score_correlation": 0.7}
# Critiques alone, of all groups, before the run itself.
STAGE = {"loss.preference_weight": 0.0, "loss.centering_weight": 0.0}

ARMS = {
    "discriminative": Arm("preference loss alone", ALONE),
    "joint": Arm("preference and critique losses", {}),
    "joint_words": Arm(
        "joint, and the reward token's state predicts the critique's words", WORDS
    ),
    "joint_through": Arm(
        "joint, critiques see their candidate by its reward token alone",
        {"loss.through_reward": True},
    ),
    "teacher": Arm(
        "preference loss, and soft preferences from the score that a critique's last line states",
        {**ALONE, **TEACHER},
    ),
    "joint_teacher": Arm("joint and teacher", TEACHER),
    "regression": Arm(
        "preference loss and the critique's facts, no language",
        {**ALONE, FACTS: 1.0, "data.world.kind": "facts"},
    ),
    "staged": Arm("critiques alone first, then preference loss alone", ALONE, first=STAGE),
    "staged_joint": Arm("critiques alone first, then joint", {}, first=STAGE),
    "joint_shuffled": Arm("joint, critiques of other examples", SHUFFLED),
    "words_shuffled": Arm("joint_words, critiques of other examples", {**WORDS, **SHUFFLED}),
    "joint_masked": Arm("joint, the critique's score line masked", MASKED),
    "words_masked": Arm("joint_words, the critique's score line masked", {**WORDS, **MASKED}),
    "joint_noisy": Arm("joint, critiques that err as a model judge's", NOISY),
    "words_noisy": Arm(
        "joint_words, critiques that err as a model judge's", {**WORDS, **NOISY}
    ),
    "staged_shuffled": Arm(
        "critiques of other examples alone first, then preference loss alone", ALONE,
        first={**STAGE, **SHUFFLED},
    ),
    "staged_masked": Arm(
        "critiques alone first, their score line masked, then preference loss alone", ALONE,
        first={**STAGE, **MASKED},
    ),
    "teacher_noisy": Arm(
        "teacher, scores that err as a model judge's", {**ALONE, **TEACHER, **NOISY}
    ),
}  # fmt: skip
BASELINE = "discriminative"
# What critiques may be like, and the arms that learn from such ones.
CRITIQUES = {
    "good ones, for all groups": (
        "joint", "joint_words", "joint_through", "teacher", "joint_teacher", "regression",
        "staged", "staged_joint",
    ),
    "good ones, without scores": ("joint_masked", "words_masked", "staged_masked"),
    "a model judge's, which err": ("joint_noisy", "words_noisy", "teacher_noisy"),
}  # fmt: skip


def place_words(labelled: int, flip: float) -> str:
    """'1,600 pairs, one a group, 35 % of them wrong'."""
    noise = f"{100 * flip:g} % of them wrong" if flip else "none of them wrong"
    return f"{labelled:,} pairs, one a group, {noise}"


class Point(NamedTuple):
    """arm; groups with a vote; chance that a vote is wrong; seed. rate, steps: 0 as the config's;
    others are of the runs by which these were chosen."""

    arm: str
    labelled: int
    flip: float
    seed: int
    rate: float = 0.0
    steps: int = 0

    @property
    def name(self) -> str:
        tuned = f"-r{self.rate:g}-t{self.steps}" if self.is_trial else ""
        return f"{self.arm}-n{self.labelled}-f{self.flip:g}-s{self.seed}{tuned}"

    @property
    def is_trial(self) -> bool:
        return bool(self.steps)

    @property
    def what(self) -> Arm:
        return ARMS[self.arm]

    def changes(self, config: ConfigDict) -> dict[str, Any]:
        """What the training config has instead of the base's fields."""
        arm = self.what
        rows = config.labelled_rows * (1 if arm.changes == ALONE else 2)
        rates = rate_changes(config, self.arm)
        if self.is_trial:
            rates = {"optimizer.learning_rate": self.rate, "total_steps": self.steps}
        return {
            **shared_changes(config),
            "data.world.train": config.groups,
            # read once, when the cell is measured
            "data.world.test": 0,
            "data.world.hard": 0,
            "data.world.labelled": self.labelled / config.groups,
            "data.world.pairs": 1,
            "data.world.flip": self.flip,
            "data.labelled": config.labelled_rows,
            "batch_size": rows,
            "seed": self.seed,
            **arm.changes,
            **rates,
        }

    def measures(self, config: ConfigDict) -> dict[str, Any]:
        """The settings of `measure.py`: of a trial the scores of `valid`, of most points what the
        page has of all, of some everything."""
        headline = config.headline
        place = (self.labelled, self.flip) == (headline.labelled, headline.flip)
        whole = place and self.seed in config.whole_seeds
        kind = "trial" if self.is_trial else "whole" if whole else "point"
        return {
            **config.measure.to_dict(),
            "parts": list(config.parts[kind]),
            "world": {split: config.world[split] for split in ("valid", "test", "hard")},
        }

    def first(self, config: ConfigDict) -> dict[str, Any] | None:
        """The training config's changes of the run that comes before, if there is one."""
        if not self.what.first:
            return None
        return {
            **shared_changes(config),
            "data.world.train": config.groups,
            "data.world.test": 0,
            "data.world.hard": 0,
            "batch_size": 2 * config.labelled_rows,
            "seed": self.seed,
            "total_steps": config.stage_steps,
            **self.what.first,
            **rate_changes(config, "joint"),  # it writes, as that arm does
        }

    def depends(self, config: ConfigDict) -> list[Any]:
        """What else the numbers depend on."""
        return [LIFE_VERSION, self.first(config)]


def rate_changes(config: ConfigDict, arm: str) -> dict[str, float]:
    """The training config's change where an arm has a learning rate of its own."""
    rate = next((rate for arms, rate in config.rates if arm in arms), None)
    return {} if rate is None else {"optimizer.learning_rate": rate}


def plan(config: ConfigDict) -> list[Point]:
    """Every point once, in the order of the config's tables.

    Raises:
        UserError: an arm that does not exist.
    """
    points = []
    for arms, labelled, flips, rates_and_steps in config.trials:
        points += [
            Point(arm, labelled, flip, 0, rate, steps)
            for arm in arms for flip in flips for rate, steps in rates_and_steps
        ]  # fmt: skip
    for arms, sizes, flips, seeds in config.points:
        points += [
            Point(arm, labelled, flip, seed)
            for seed in range(seeds) for flip in flips for labelled in sizes for arm in arms
        ]  # fmt: skip
    unknown = [point.arm for point in points if point.arm not in ARMS]
    if unknown:
        raise UserError(f"config.points: no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    return list(dict.fromkeys(points))
