"""The reward of a policy: the scores that trained models give to drawn pictures.

All pictures of a run go through one bucket, so that nothing is compiled after the first time. What
cannot be scored ends the run: a failure is never a reward of 0.

Letters: G problems, K edits of each, M models.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jrm_jax.data.buckets import Bucket
from jrm_jax.data.world.draw import draw as draw_scene
from jrm_jax.data.world.draw import encode_png
from jrm_jax.errors import UserError
from jrm_jax.rl.editing import Problem
from jrm_jax.serving.groups import Group, Scores
from jrm_jax.serving.ladder import UNIT, joined
from jrm_jax.serving.planned import ahead
from jrm_jax.serving.reward_model import RewardModel
from jrm_jax.serving.rows import split

SPREAD, DEVIATION = "spread", "deviation"  # how unsure the reward is: between models, by the model


class Scale(NamedTuple):
    """Of each model's scores on edits of the base policy: lists of M numbers."""

    mean: list[float]
    deviation: list[float]


class Reward:
    """One trained model or the mean of several, less a multiple of how unsure they are.

    Args:
        names: of the models, for messages.
        penalty: that multiple. unsure: SPREAD (the deviation between the models' normalised scores)
            or DEVIATION (the mean of what the models say of themselves); read where penalty > 0.
        problems: all that are ever scored; with `count` edits each they decide the bucket.

    Raises:
        UserError: a penalty for which the models have no measure.
    """

    def __init__(
        self,
        models: Sequence[RewardModel],
        names: Sequence[str],
        problems: Sequence[Problem],
        count: int,
        penalty: float = 0.0,
        unsure: str = SPREAD,
    ):
        self._models, self._names, self._count = models, names, count
        self._penalty, self._unsure = penalty, unsure
        if penalty and unsure not in (SPREAD, DEVIATION):
            raise UserError(f"config.reward.unsure: {unsure!r} is none of {SPREAD}, {DEVIATION}")
        if penalty and unsure == SPREAD and len(models) < 2:
            raise UserError(
                "config.reward.penalty on the spread needs several models as one reward: "
                "--config.reward.ensemble=True and two or more --model"
            )
        pictures = [encode_png(draw_scene(problems[0].source))] * (count + 1)
        self._buckets = [_bucket(model, problems, pictures) for model in models]
        self.scale: Scale | None = None

    def raw(
        self, problems: Sequence[Problem], pictures_NHW3: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(scores [M, G, K], the models' own deviations likewise, None where one has none).

        Args:
            pictures_NHW3: `count` for each problem, uint8.

        Raises:
            UserError: a score that is not finite, or pictures that cannot be scored.
        """
        encoded = [encode_png(picture) for picture in pictures_NHW3]
        groups = [
            Group(
                problem.instruction,
                encode_png(draw_scene(problem.source)),
                encoded[index * self._count : (index + 1) * self._count],
            )
            for index, problem in enumerate(problems)
        ]
        found = [self._scored(place, groups) for place in range(len(self._models))]
        scores_MGK = np.array([[s.reward_KR[:, 0] for s in own] for own in found], np.float32)
        for name, scores_GK in zip(self._names, scores_MGK, strict=True):
            _check_finite(f"{name}: a score", scores_GK, problems)
        own = [[s.deviation_KR for s in scores] for scores in found]
        if any(deviation is None for row in own for deviation in row):
            return scores_MGK, None
        return scores_MGK, np.array([[d[:, 0] for d in row] for row in own], np.float32)

    def _scored(self, place: int, groups: Sequence[Group]) -> list[Scores]:
        """A group of more candidates than a row holds takes several."""
        model, bucket, scores = self._models[place], self._buckets[place], []
        rows = [split(encoded) for encoded in ahead(model.encode, groups, len(groups))]
        flat = [row for own in rows for row in own]
        for start in range(0, len(flat), model.batch_size):
            scores += model.score_rows(bucket, flat[start : start + model.batch_size])
        found = iter(scores)
        return [_joined([next(found) for _ in own]) for own in rows]

    def settle(self, problems: Sequence[Problem], pictures_NHW3: np.ndarray) -> Scale:
        """Take the scale from these, edits of the base policy.

        Raises:
            UserError: as `raw`; a model that gives all of them one score; a penalty on deviations
                that a model does not predict.
        """
        scores_MGK, own = self.raw(problems, pictures_NHW3)
        if self._penalty and self._unsure == DEVIATION and own is None:
            raise UserError(
                f"{', '.join(self._names)}: no predicted deviation, which only models trained with "
                "config.loss.gaussian have: use --config.reward.unsure=spread, or penalty 0"
            )
        flat_MN = scores_MGK.reshape(len(scores_MGK), -1).astype(float)
        deviation = flat_MN.std(1)
        for name, value in zip(self._names, deviation, strict=True):
            if not value > 1e-6:
                raise UserError(
                    f"{name} gives every edit the same score: there is nothing to learn"
                )
        self.scale = Scale(flat_MN.mean(1).tolist(), deviation.tolist())
        return self.scale

    def __call__(
        self, problems: Sequence[Problem], pictures_NHW3: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(reward, proxy) float32 [G, K]: what is optimised, and the same without the penalty. In
        deviations of the base's scores.

        Raises:
            UserError: as `raw`; a reward that is not finite, as of a deviation that is not.
        """
        if self.scale is None:
            raise RuntimeError("settle first")
        scores_MGK, own_MGK = self.raw(problems, pictures_NHW3)
        mean_M, deviation_M = (np.float32(part)[:, None, None] for part in self.scale)
        normal_MGK = (scores_MGK - mean_M) / deviation_M
        proxy_GK = normal_MGK.mean(0)
        reward_GK = proxy_GK
        if self._penalty:
            own = self._unsure == DEVIATION
            unsure_MGK = own_MGK / deviation_M if own else normal_MGK.std(0)[None]
            reward_GK = proxy_GK - np.float32(self._penalty) * unsure_MGK.mean(0)
        for what, values_GK in (("score in deviations", proxy_GK), ("reward", reward_GK)):
            _check_finite(f"{' + '.join(self._names)}: a {what}", values_GK, problems)
        return reward_GK, proxy_GK


def _joined(parts: Sequence[Scores]) -> Scores:
    """Of the rows of one group."""
    columns = ([part[place] for part in parts] for place in (0, 1, 3))
    reward_KR, normalised_KR, deviation_KR = (
        None if own[0] is None else np.concatenate(own) for own in columns
    )
    return Scores(reward_KR, normalised_KR, parts[0].dimensions, deviation_KR)


def _check_finite(what: str, values_GK: np.ndarray, problems: Sequence[Problem]) -> None:
    if not np.isfinite(values_GK).all():
        bad = problems[int(np.argwhere(~np.isfinite(values_GK))[0][0])]
        raise UserError(
            f"{what} is not finite, for {bad.instruction!r}; nothing of this iteration is kept"
        )


class Chance:
    """A reward that says nothing: standard normal, and the same whenever the pictures are."""

    scale: Scale | None = None

    def settle(self, problems: Sequence[Problem], pictures_NHW3: np.ndarray) -> None:
        """It has its scale already."""

    def __call__(
        self, problems: Sequence[Problem], pictures_NHW3: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Reward`."""
        rng = np.random.default_rng(zlib.crc32(pictures_NHW3.tobytes()))
        found_GK = rng.normal(size=(len(problems), len(pictures_NHW3) // len(problems)))
        return found_GK.astype(np.float32), found_GK.astype(np.float32)


def _bucket(model: RewardModel, problems: Sequence[Problem], pictures: list[bytes]) -> Bucket:
    """The least that holds every problem with its pictures, which all have one size."""
    texts = {problem.instruction for problem in problems}
    needs = [model.need(Group(text, pictures[0], pictures[1:])).together for text in texts]
    least = joined(needs)
    up = {name: UNIT * math.ceil(getattr(least, name) / UNIT) for name in ("prompt", "candidate")}
    return dataclasses.replace(least, **up)
