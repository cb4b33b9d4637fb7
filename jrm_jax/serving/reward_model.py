"""Scores of edits from a trained model. The command is `jrm_jax/score.py`.

    model = RewardModel.load("runs/joint")          # or a folder that jrm_jax.export wrote
    model.score("Make the cat white.", "cat.png", ["a.png", "b.png"])      float32 [2]

A reward is a real number without fixed scale; larger is better, and only differences between
candidates of one source and instruction carry meaning. Under the preference loss the chance that
people prefer i to j is sigmoid(reward_i - reward_j). `Scores.normalised` is (reward - mean) /
deviation over the rewards of the training set, for those who add it to other rewards.

Letters: K candidates, R reward dimensions, B groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jrm_jax.data.buckets import Bucket
from jrm_jax.data.encode import EncodedExample
from jrm_jax.data.pipeline import assemble_batch, empty_batch
from jrm_jax.errors import UserError
from jrm_jax.serving import groups as given
from jrm_jax.serving.device_call import CRITIQUES, SCORES, STATES, DeviceCall
from jrm_jax.serving.groups import Group, Picture, Scores
from jrm_jax.serving.ladder import joined, make_ladder, need_of, split
from jrm_jax.serving.programs import LIMIT, Programs, Work, group_cost
from jrm_jax.serving.trained import Trained, load_trained, scale


class RewardModel:
    """A trained model and few programs: one per bucket of sizes, see `ladder.py`.

    A score does not depend on the other groups of a batch, on its size or order, on padding, or on
    the other candidates: within 1e-5 in float32, where different buckets add up in different
    orders; within one bucket, and for as many rows, it is bit-identical whatever the others hold.

    All methods may be called from several threads.

    Attributes:
        buckets: the ladder of single calls, agreed upon when the model is loaded.
        batch_size: groups of one call of a program for many.
        work: what was computed so far, and which share of it was padding.
    """

    def __init__(
        self,
        trained: Trained,
        compute_dtype: str = "float32",
        batch_size: int = 8,
        programs: int = LIMIT,
        say: Callable[[str], None] | None = None,
    ):
        self.card, self.encoder, self.batch_size = trained.card, trained.encoder, batch_size
        self.dimensions = self.encoder.dimensions
        tokenizer, processor = self.encoder.tokenizer, self.encoder.processor
        self._device = DeviceCall(
            trained.config,
            trained.params,
            pixels=(processor.mean, processor.std),
            reward_id=tokenizer.reward_id,
            end_id=tokenizer.end_id,
            through_reward=trained.through_reward,
            compute_dtype=compute_dtype,
            say=say,
        )
        self._headless = trained.config.text.headless
        self.buckets, self.work = make_ladder(self.encoder), Work()
        self._cost = functools.partial(group_cost, trained.config)
        self._limit, self._programs = programs, {}
        self._shelf((SCORES,))  # a bad limit shows here

    @classmethod
    def load(
        cls,
        path: str | Path,
        step: int | str = "best",
        backbone: str | Path = "",
        **options: Any,
    ) -> RewardModel:
        """From a run's folder, or from one that `jrm_jax.export` wrote.

        Args:
            step: of a run's folder: a number, 'best' or 'latest'.
            backbone: of a run's folder: where its backbone lies by now, if it is not found.
            options: compute_dtype ('float32' or 'bfloat16'), batch_size (groups at a time),
                programs (that may be compiled for scores in this model's life; as many for
                critiques), say (told what is compiled, where that takes long).

        Raises:
            UserError: the folder holds no trained model.
        """
        return cls(load_trained(path, step, backbone), **options)

    # One call, and what a service needs

    def score(
        self, instruction: str, source: Picture | None, candidates: Sequence[Picture]
    ) -> np.ndarray:
        """float32 [K]: rewards in the first dimension, in the order of the candidates.

        Raises:
            UserError: no candidates, or a picture that cannot be read; it is named.
        """
        return self.score_batch([Group(instruction, source, candidates)])[0].reward_KR[:, 0]

    def encode(self, group: Group, where: str = "") -> EncodedExample:
        """What a program needs of a group: tokens and patches. Host work only.

        Args:
            where: goes before what a message names, 'group 3: '.

        Raises:
            UserError: no text, no candidates, or a picture that cannot be read; it is named.
        """
        return given.encode(self.encoder, *given.read_group(Group(*group), where))

    def bucket_of(self, encoded: EncodedExample) -> Bucket:
        """The bucket in which `score_rows` takes a group: its rung of the ladder.

        What no rung holds gets a bucket of its own. Where no more programs may be added it is the
        cheapest bucket in use that holds it. A group of very many candidates is better cut first,
        by `ladder.split`.

        Raises:
            UserError: no bucket in use holds it, and no more may be added.
        """
        return self._shelf((SCORES,)).choose(need_of(encoded), [self.batch_size])[0]

    def score_rows(self, bucket: Bucket, groups: Sequence[EncodedExample]) -> list[Scores]:
        """Scores of groups by one call of one program, of `batch_size` rows; the rest is padding.

        A score does not depend on the other groups, to the bit.

        Args:
            bucket: of all of them, from `bucket_of`.
            groups: at most `batch_size`.

        Raises:
            UserError: a group does not fit, or the program would be one too many.
            ValueError: too many groups.
        """
        if len(groups) > self.batch_size:
            raise ValueError(f"{len(groups)} groups, a program has {self.batch_size} rows")
        self._shelf((SCORES,)).take(bucket, self.batch_size)
        return self._with_scale(self._run((SCORES,), bucket, self.batch_size, groups))

    def warm(self, buckets: Sequence[Bucket] | None = None, rows: int | None = None) -> None:
        """Compile programs before they are needed.

        Args:
            buckets: default: the whole ladder, as far as the limit of programs goes.
            rows: of each; default: `batch_size`. 1: those of single calls.

        Raises:
            UserError: more buckets than programs may be added.
        """
        rows = self.batch_size if rows is None else rows
        shelf = self._shelf((SCORES,))
        for bucket in self.buckets[: shelf.left] if buckets is None else buckets:
            shelf.take(bucket, rows)
            self._device((SCORES,), empty_batch(rows, bucket, self.encoder)).block_until_ready()

    # Many groups

    def score_batch(self, groups: Sequence[Group | tuple]) -> list[Scores]:
        """Scores of many groups, in their order; a group is (instruction, source, candidates).

        Raises:
            UserError: as `score`; names the group.
        """
        return self._with_scale(self._each(SCORES, self._encode_all(groups)))

    def score_encoded(
        self,
        groups: Sequence[EncodedExample],
        one_bucket: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> list[np.ndarray]:
        """float32 [K, R] each, of many groups of any parts.

        Args:
            one_bucket: all go into one that holds them all: more padding, a single program.
            advance: told after every batch how many groups it held.
        """
        return self._each(SCORES, groups, one_bucket, advance)

    def reward_states(
        self, groups: Sequence[EncodedExample], advance: Callable[[int], None] | None = None
    ) -> list[np.ndarray]:
        """float32 [K, D] each: what the reward head reads, the final state of the reward token."""
        return self._each(STATES, groups, True, advance)

    def _shelf(self, kind: tuple) -> Programs:
        if kind not in self._programs:
            shelf = Programs(self.buckets, self._cost, self.encoder.processor, self._limit)
            self._programs.setdefault(kind, shelf)
        return self._programs[kind]

    def _each(
        self,
        kind: str,
        groups: Sequence[EncodedExample],
        one_bucket: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> list[np.ndarray]:
        """[K, ...] of each group."""
        parts = [(index, part) for index, group in enumerate(groups) for part in split(group)]
        needs = [need_of(part) for _, part in parts]
        few = 2 * len(parts) <= self.batch_size
        counts = [1, self.batch_size] if few else [self.batch_size, 1]
        if parts and (few or one_bucket):
            needs = [joined(needs)] * len(parts)
        by_program: dict[tuple[Bucket, int], list[int]] = {}
        for place, need in enumerate(needs):
            chosen = self._shelf((kind,)).choose(need, counts)
            by_program.setdefault(chosen, []).append(place)
        found: dict[int, np.ndarray] = {}
        for (bucket, count), places in by_program.items():
            for start in range(0, len(places), count):
                own = places[start : start + count]
                rows = self._run((kind,), bucket, count, [parts[place][1] for place in own])
                found |= dict(zip(own, rows, strict=True))
                if advance is not None:  # a group counts with its first part
                    firsts = [not place or parts[place - 1][0] != parts[place][0] for place in own]
                    advance(sum(firsts))
        of_group: list[list[np.ndarray]] = [[] for _ in groups]
        for place, (index, _) in enumerate(parts):
            of_group[index].append(found[place])
        return [np.concatenate(rows) for rows in of_group]

    def _run(
        self, kind: tuple, bucket: Bucket, rows: int, groups: Sequence[EncodedExample], *more: Any
    ) -> list[np.ndarray]:
        """[K, ...] of each group, of one call."""
        fillers = [None] * (rows - len(groups))
        batch = assemble_batch([*groups, *fillers], bucket, self.encoder)
        self.work.add(bucket, rows, [need_of(group) for group in groups], self._cost)
        array_BKX = np.asarray(self._device(kind, batch, *more))
        counts = [len(group.candidates) for group in groups]
        return [row_KX[:count] for row_KX, count in zip(array_BKX, counts, strict=False)]

    def _with_scale(self, rewards: Iterable[np.ndarray]) -> list[Scores]:
        mean, deviation = map(np.float32, scale(self.card))
        return [Scores(r_KR, (r_KR - mean) / deviation, self.dimensions) for r_KR in rewards]

    def _encode_all(self, groups: Sequence[Group | tuple]) -> list[EncodedExample]:
        names = [f"group {i}: " if len(groups) > 1 else "" for i in range(len(groups))]
        return [self.encode(group, name) for group, name in zip(groups, names, strict=True)]

    # Words

    def critique(
        self,
        instruction: str,
        source: Picture | None,
        candidates: Sequence[Picture],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """What the language head says of each candidate.

        Args:
            max_tokens: at most so many; a critique that is longer ends there.
            temperature: 0 takes the likeliest token, larger values sample.

        Raises:
            UserError: as `score`.
        """
        ids_KT = self.critique_tokens(
            instruction, source, candidates,
            max_tokens=max_tokens, temperature=temperature, seed=seed,
        )  # fmt: skip
        return [self.encoder.tokenizer.decode(ids) for ids in ids_KT]

    def critique_tokens(
        self, instruction, source, candidates, *, max_tokens=128, temperature=0.0, seed=0
    ) -> list[list[int]]:
        """Token ids of `critique`, without <|im_end|>."""
        if self._headless:
            raise UserError("this model's backbone came without a language head: no critiques")
        end = self.encoder.tokenizer.end_id
        parts = split(self.encode(Group(instruction, source, candidates)))
        kind = (CRITIQUES, max_tokens, temperature > 0)
        bucket, rows = self._shelf(kind).choose(joined([*map(need_of, parts)]), [1])
        key, heat = jax.random.key(seed), np.float32(temperature or 1.0)
        found = [
            self._run(kind, bucket, rows, [part], jax.random.fold_in(key, number), heat)[0]
            for number, part in enumerate(parts)
        ]
        listed = np.concatenate(found).tolist()
        return [row[: row.index(end)] if end in row else row for row in listed]

    def problem(self, picture: Picture) -> str | None:
        """Why a picture cannot be scored, or None."""
        return given.problem(self.encoder, picture)
