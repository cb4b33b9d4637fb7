"""From a policy to numbers: programs drawn, pictured, judged and scored.

Letters: G problems, K edits of each, N = G * K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jrm_jax.rl import drawing, gold, grpo
from jrm_jax.rl.editing import Features, Problem, Program, features, joined
from jrm_jax.rl.gold import Gold

SPLITS = ("test", "hard")  # on which policies are evaluated


class Pool(NamedTuple):
    """Problems with what the network is told of them."""

    problems: list[Problem]
    features: Features

    def pick(self, rows: Sequence[int]) -> Pool:
        taken = Features(*(array[rows] for array in self.features))
        return Pool([self.problems[row] for row in rows], taken)


def batches(count: int, size: int) -> list[range]:
    """Numbers below `count`, `size` at a time."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def make_pool(problems: list[Problem]) -> Pool:
    return Pool(problems, features(problems))


class Rollout(NamedTuple):
    """reward_GK: what is optimised. proxy_GK: the score alone. gold_GK, following_GK,
    preservation_GK: 0..1. golds: N, with what was lost for which flaw. seeds: N, of the pictures'
    noise.
    """

    program: Program
    pictures_NHW3: np.ndarray
    reward_GK: np.ndarray
    proxy_GK: np.ndarray
    gold_GK: np.ndarray
    following_GK: np.ndarray
    preservation_GK: np.ndarray
    golds: list[Gold]
    seeds: list[int]


NOISES = 10**4  # pictures of one roll


class Dice(NamedTuple):
    """What chance comes from: a seed, one of the purposes below, and a number of that purpose."""

    seed: int
    what: int
    number: int

    @property
    def key(self) -> jax.Array:
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.key(self.seed), self.what), self.number
        )

    def noise(self, count: int) -> list[int]:
        """Seeds of the noise of so many pictures, at most NOISES: no two dice share one while
        runs have fewer than 100,000 iterations."""
        first = 10**18 * self.seed + 10**9 * self.what + NOISES * self.number
        return [first + row for row in range(count)]


TRAIN, EVALUATE, SETTLE, BEST = 1, 2, 3, 4

# (problems, pictures) -> (reward_GK, proxy_GK); given the gold scores where these are the reward
Score = Callable[[Sequence[Problem], np.ndarray], tuple[np.ndarray, np.ndarray]]
_draw = jax.jit(grpo.draw, static_argnums=3)


def programs_of(params: Any, pool: Pool, key: jax.Array, count: int) -> Program:
    """`count` programs of each problem, as NumPy arrays."""
    program, _ = _draw(params, pool.features, key, count)
    return jax.tree.map(np.asarray, program)


def pictured(
    pool: Pool, program: Program, count: int, seeds: Sequence[int]
) -> tuple[np.ndarray, list[Gold]]:
    """(pictures_NHW3, golds) of programs that are `count` of each problem.

    Args:
        seeds: of the pictures' noise.
    """
    problems = [problem for problem in pool.problems for _ in range(count)]
    drawn = drawing.draw(problems, program, seeds)
    golds = [
        gold.judge(problem, program, row, drawn.visible_NO[row])
        for row, problem in enumerate(problems)
    ]
    return drawn.pictures_NHW3, golds


def roll(params: Any, pool: Pool, count: int, dice: Dice, score: Score | None) -> Rollout:
    """
    Args:
        count: edits of each problem.
        score: None: gold is the reward.

    Raises:
        UserError: as `Reward`.
    """
    program, seeds = (
        programs_of(params, pool, dice.key, count),
        dice.noise(len(pool.problems) * count),
    )
    pictures, golds = pictured(pool, program, count, seeds)

    def table(values: list[float]) -> np.ndarray:
        return np.float32(values).reshape(-1, count)

    gold_GK = table([found.overall for found in golds])
    reward_GK, proxy_GK = (gold_GK, gold_GK) if score is None else score(pool.problems, pictures)
    return Rollout(
        program, pictures, reward_GK, proxy_GK, gold_GK,
        table([found.following / 10 for found in golds]),
        table([found.preservation / 10 for found in golds]), golds, seeds,
    )  # fmt: skip


def together(parts: Sequence[Rollout]) -> Rollout:
    """Of several sets of problems as one."""
    columns = dict(zip(Rollout._fields, zip(*parts, strict=True), strict=True))
    program = joined(columns.pop("program"))
    lists = {name: [x for part in columns.pop(name) for x in part] for name in ("golds", "seeds")}
    arrays = {name: np.concatenate(column) for name, column in columns.items()}
    return Rollout(program=program, **arrays, **lists)
