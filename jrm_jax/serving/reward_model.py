"""Scores of edits from a trained model. The command is `jrm_jax/score.py`.

    model = RewardModel.load("runs/joint")          # or a folder that jrm_jax.export wrote
    model.score("Make the cat white.", "cat.png", ["a.png", "b.png"])      float32 [2]

A reward is a real number without fixed scale; larger is better, and only differences between
candidates of one source and instruction carry meaning. Under the preference loss the chance that
people prefer i to j is sigmoid(reward_i - reward_j). `Scores.normalised_KR` is (reward - mean) /
standard deviation, both of the rewards in training, for those who add it to other rewards. A model
that was trained with `config.loss.gaussian` says how unsure it is: `Scores.deviation_KR`.

Letters: K candidates, R reward dimensions, B groups.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jrm_jax.data.buckets import Bucket
from jrm_jax.data.encode import EncodedExample
from jrm_jax.data.schema import Candidate, Part
from jrm_jax.errors import UserError
from jrm_jax.serving import groups as given
from jrm_jax.serving.device_call import CRITIQUES, SCORES, STATES, DeviceCall
from jrm_jax.serving.groups import Group, Picture, Scores
from jrm_jax.serving.ladder import holds, joined
from jrm_jax.serving.placing import lay_out, place
from jrm_jax.serving.planned import ahead
from jrm_jax.serving.programs import LIMIT, Program
from jrm_jax.serving.rows import Needs, need_of, needs_from, part_sizes, split
from jrm_jax.serving.runner import Runner
from jrm_jax.serving.trained import Trained, load_trained, scale

FIRST = 16  # batches of a stream by whose sizes its buckets are planned


class RewardModel:
    """A trained model and few programs: one per bucket of sizes, see `ladder.py`.

    A score does not depend on the other groups of a batch, on its size or order, on padding, or on
    the other candidates: within 1e-5 in float32, where different buckets add up in different
    orders; within one bucket, and for as many rows, it is bit-identical whatever the others hold.

    All methods may be called from several threads.

    Attributes:
        buckets: the ladder of single calls, agreed upon when the model is loaded.
        batch_size: groups of one call of a program for many, on all devices together.
        work: what was computed so far, and which share of it was padding.
    """

    def __init__(
        self,
        trained: Trained,
        compute_dtype: str = "float32",
        batch_size: int = 8,
        programs: int = LIMIT,
        say: Callable[[str], None] | None = None,
        devices: Sequence[Any] | None = None,
        device_bytes: int | None = None,
    ):
        """Options: as `load`."""
        self.card, self.encoder = trained.card, trained.encoder
        self.dimensions = self.encoder.dimensions
        tokenizer, processor = self.encoder.tokenizer, self.encoder.processor
        wanted = lay_out(trained.params, compute_dtype, devices, device_bytes)
        device = DeviceCall(
            trained.config,
            place(trained.params, wanted),
            pixels=(processor.mean, processor.std),
            reward_id=tokenizer.reward_id,
            end_id=tokenizer.end_id,
            through_reward=trained.through_reward,
            compute_dtype=compute_dtype,
            say=say,
        )
        self._runner = Runner(
            device, self.encoder, trained.config, batch_size, programs, trained.buckets
        )
        self.batch_size = self._runner.rows
        self.speaks = not trained.config.text.headless  # whether it can write critiques
        self.buckets, self.work = self._runner.ladder, self._runner.work
        self._runner.shelf((SCORES,))  # a bad limit shows here

    @classmethod
    def load(
        cls,
        path: str | Path,
        step: int | str = "best",
        backbone: str | Path = "",
        *,
        compute_dtype: str = "float32",
        devices: Sequence[Any] | None = None,
        device_bytes: int | None = None,
        **options: Any,
    ) -> RewardModel:
        """From a run's folder, or from one that `jrm_jax.export` wrote.

        Args:
            step: of a run's folder: a number, 'best' or 'latest'.
            backbone: of a run's folder: where its backbone lies by now, if it is not found.
            compute_dtype: 'float32' or 'bfloat16', which matrices are then kept in, too.
            devices: default: all of this process. Each holds the whole model and takes its share of
                a batch; where one cannot hold it, the model is split over them.
            device_bytes: memory of each; default: what it says it has.
            options: batch_size (groups at a time on each device), programs (that may be compiled
                for scores in this model's life; as many for critiques), say (told what is compiled,
                where that takes long).

        Raises:
            UserError: the folder holds no trained model, the devices cannot hold it, or an option
                below 1.
        """
        lie = {"compute_dtype": compute_dtype, "devices": devices}

        def laid_out(shapes: dict[str, Any]) -> dict[str, Any]:
            return lay_out(shapes, **lie, room=device_bytes)

        trained = load_trained(path, step, backbone, laid_out=laid_out)
        return cls(trained, **lie, device_bytes=device_bytes, **options)

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
        parts, names = given.read_group(Group(*group), where)
        return given.naming(self.encoder.processor.encode, self.encoder.encode_group, parts, names)

    def bucket_of(self, encoded: EncodedExample) -> Bucket:
        """The bucket in which `score_rows` takes a group: its rung of the ladder.

        What no rung holds gets a bucket of its own. Where no more programs may be added it is the
        cheapest bucket in use that holds it. A group of very many candidates is better cut first,
        by `rows.split`.

        Raises:
            UserError: no bucket in use holds it, and no more may be added.
        """
        return self._runner.shelf((SCORES,)).choose(need_of(encoded), [self.batch_size]).bucket

    def score_rows(self, bucket: Bucket, groups: Sequence[EncodedExample]) -> list[Scores]:
        """Scores of groups by one call of one program, of `batch_size` rows; the rest is padding.

        A score does not depend on the other groups, to the bit. One that is not finite is left
        in: those beside it count.

        Args:
            bucket: of all of them, from `bucket_of`.
            groups: at most `batch_size`.

        Raises:
            UserError: a group does not fit, or the program would be one too many.
            ValueError: too many groups.
        """
        if len(groups) > self.batch_size:
            raise ValueError(f"{len(groups)} groups, a program has {self.batch_size} rows")
        if any(not holds(bucket, need_of(group)) for group in groups):
            raise UserError(f"a group does not fit into its bucket ({bucket.words}): ask bucket_of")
        program = self._runner.shelf((SCORES,)).take(Program(bucket, self.batch_size))
        return self._scores(self._runner.call((SCORES,), program, groups))

    @property
    def usual(self) -> tuple[Bucket, ...]:
        """The rungs of the ladder that may be compiled ahead, smallest first: as far as the limit
        of programs goes, but for the last program, which is kept for what these do not hold."""
        return self.buckets[: self._runner.shelf((SCORES,)).spare]

    def warm(self, buckets: Sequence[Bucket] | None = None, single: bool = False) -> None:
        """Compile programs before they are needed.

        Args:
            buckets: default: those of `usual`.
            single: those of single calls, instead of those for `batch_size` groups.

        Raises:
            UserError: more buckets than programs may be added.
        """
        buckets = self.usual if buckets is None else buckets
        self._runner.warm((SCORES,), buckets, self._runner.one if single else self.batch_size)

    # Many groups

    def score_batch(self, groups: Sequence[Group | tuple]) -> list[Scores]:
        """Scores of many groups, in their order; a group is (instruction, source, candidates).

        Sizes are read first, then pictures, a few batches ahead of the devices.

        Raises:
            UserError: as `score`; names the group.
        """

        def named(index: int) -> tuple[Group | tuple, str]:
            return groups[index], f"group {index}: " if len(groups) > 1 else ""

        known: dict[Needs, Needs] = {}  # equal ones are one object
        needs = ahead(lambda index: self.need(*named(index)), range(len(groups)), self.batch_size)
        needs = [known.setdefault(need, need) for need in needs]
        return self.score_lazily(needs, lambda index: self.encode(*named(index)))

    def iter_scores(
        self, groups: Iterable[Group | tuple], like: Sequence[Needs] = ()
    ) -> Iterator[Scores]:
        """Scores of any number of groups, in their order, as they come.

        Args:
            groups: are taken some batches ahead of what is yielded.
            like: buckets are planned by these, from `need`; default: by the first of `groups`.

        Raises:
            UserError: as `score_batch`.
        """
        for scores in self.iter_found(groups, like):
            if isinstance(scores, UserError):
                raise scores
            yield scores

    def iter_found(
        self, groups: Iterable[Group | tuple], like: Sequence[Needs] = ()
    ) -> Iterator[Scores | UserError]:
        """As `iter_scores`, with the error in place of the scores of a group that has none."""

        def asked(named: tuple[Group | tuple, str]) -> list[Needs]:
            with contextlib.suppress(UserError):  # `encode` meets it again, in its place
                return [self.need(*named)]
            return []

        rest, first = iter(groups), collections.deque()
        if not like:
            first.extend(itertools.islice(rest, FIRST * self.batch_size))
            named = ((group, f"group {index}: ") for index, group in enumerate(first))
            like = list(itertools.chain(*ahead(asked, named, self.batch_size)))
        begun = (first.popleft() for _ in range(len(first)))  # whose pictures are kept no longer
        found = self._runner.streamed(
            (SCORES,),
            like,
            itertools.chain(begun, rest),
            lambda index, group: self.encode(group, f"group {index}: "),
        )
        for one in found:
            failed = isinstance(one, UserError)
            yield one if failed else given.finite(*self._scores([one]))

    def need(self, group: Group | tuple, where: str = "") -> Needs:
        """The least buckets that hold a group, by the headers of its pictures.

        Raises:
            UserError: as `encode`.
        """
        parts, names = given.read_group(Group(*group), where, given.read_size)
        return given.naming(self.encoder.processor.measure, self.measure, parts, names)

    def measure(self, prompt: Sequence[Part], candidates: Sequence[Candidate]) -> Needs:
        """As `need`, of any parts.

        Raises:
            ValueError: a picture whose header cannot be read.
        """
        return needs_from(self.encoder.part_sizes(prompt, candidates))

    def score_lazily(
        self,
        needs: Sequence[Needs],
        encode: Callable[[int], EncodedExample],
        advance: Callable[[int], None] | None = None,
    ) -> list[Scores]:
        """Of each group of a set of any parts.

        Args:
            needs: of each group, from `need` or `measure`.
            encode: of a group by its number; called from several threads, some batches ahead.
            advance: told how many groups are done.
        """
        found = self._runner.planned((SCORES,), needs, encode, advance=advance)
        return given.all_finite(self._scores(found))

    def score_encoded(
        self,
        groups: Sequence[EncodedExample],
        one_bucket: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> list[Scores]:
        """Of many groups of any parts.

        Args:
            one_bucket: all go into one that holds them all: more padding, a single program.
            advance: told how many groups are done.
        """
        return given.all_finite(self._scores(self._encoded(SCORES, groups, one_bucket, advance)))

    def reward_states(
        self, groups: Sequence[EncodedExample], advance: Callable[[int], None] | None = None
    ) -> list[np.ndarray]:
        """float32 [K, D] each: what the reward head reads, the final state of the reward token."""
        return self._encoded(STATES, groups, True, advance)

    def _encoded(self, kind: str, groups: Sequence[EncodedExample], *options: Any) -> list:
        needs = [needs_from(part_sizes(group)) for group in groups]
        return self._runner.planned((kind,), needs, groups.__getitem__, *options)

    def describe_work(self) -> str:
        """'7 programs, 21% of the work was padding'"""
        count = len(self._runner.device.compiled)
        words = f"{count} program{'s' * (count != 1)}"
        return f"{words}, {self.work.padded:.0%} of the work was padding"

    def _scores(self, found: Iterable[np.ndarray]) -> list[Scores]:
        mean, spread = map(np.float32, scale(self.card))
        return [given.to_scores(f_KX, self.dimensions, mean, spread) for f_KX in found]

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
        if not self.speaks:
            raise UserError("this model's backbone came without a language head: no critiques")
        end = self.encoder.tokenizer.end_id
        parts = split(self.encode(Group(instruction, source, candidates)))
        kind, needs = (CRITIQUES, max_tokens, temperature > 0), [need_of(part) for part in parts]
        program = self._runner.shelf(kind).choose(joined(needs), [self._runner.one])
        key, heat = jax.random.key(seed), np.float32(temperature or 1.0)
        found = [
            self._runner.call(kind, program, [part], jax.random.fold_in(key, number), heat)[0]
            for number, part in enumerate(parts)
        ]
        listed = np.concatenate(found).tolist()
        return [row[: row.index(end)] if end in row else row for row in listed]

    def problem(self, picture: Picture) -> str | None:
        """Why a picture cannot be scored, or None."""
        return given.problem(self.encoder.processor.encode, picture)
