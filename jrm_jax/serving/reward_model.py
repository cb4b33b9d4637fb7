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

import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jrm_jax import build, sharding
from jrm_jax.data.buckets import Bucket
from jrm_jax.data.encode import EncodedExample
from jrm_jax.data.images import to_rgb
from jrm_jax.data.labels import BROKEN_TEXT, is_text
from jrm_jax.data.picture_names import read_named, short
from jrm_jax.data.pipeline import assemble_batch
from jrm_jax.data.schema import Candidate, Image, Part, Text
from jrm_jax.errors import UserError
from jrm_jax.model.backbone import Backbone
from jrm_jax.serving.generate import make_generate
from jrm_jax.serving.trained import Trained, load_trained, scale
from jrm_jax.shell import user_cache
from jrm_jax.shell.terminal import if_slow
from jrm_jax.step import make_score_step, make_state_step

Picture = Any  # path, data: URI, encoded bytes, PIL image, or uint8 array [h, w, 3]
TOKENS = 16  # token slots are rounded up to steps of this


class Scores(NamedTuple):
    """Of one group. Columns stand in the order of `dimensions`.

    reward_KR: float32, linear and unbounded. normalised_KR: (reward - mean) / deviation of the
    training rewards; NaN where the model does not know them.
    """

    reward_KR: np.ndarray
    normalised_KR: np.ndarray
    dimensions: tuple[str, ...]

    def as_rows(self) -> list[dict[str, Any]]:
        """Of each candidate, for JSON: `reward` and `normalised` (null if unknown) of the first
        dimension, and where there are several `dimensions` {name: reward}."""
        rows = []
        for reward_R, normalised_R in zip(self.reward_KR, self.normalised_KR, strict=True):
            known = math.isfinite(normalised_R[0])
            row = {
                "reward": float(reward_R[0]),
                "normalised": float(normalised_R[0]) if known else None,
            }
            if len(self.dimensions) > 1:
                row["dimensions"] = dict(zip(self.dimensions, reward_R.tolist(), strict=True))
            rows.append(row)
        return rows


class Group(NamedTuple):
    """One edit and its candidates. `source` may be None, one picture or several."""

    instruction: str
    source: Picture | Sequence[Picture] | None
    candidates: Sequence[Picture]


class RewardModel:
    """A trained model on one device. Programs are compiled once per bucket of sizes.

    A score does not depend on the other groups of a batch, on its size or order, on padding, or on
    the other candidates: within 1e-5 in float32, where different buckets add up in different
    orders; within one bucket, and for as many rows, it is bit-identical whatever the others hold.
    """

    def __init__(
        self,
        trained: Trained,
        compute_dtype: str = "float32",
        batch_size: int = 8,
        say: Callable[[str], None] | None = None,
    ):
        if compute_dtype not in build.DTYPES:
            raise UserError(f"compute_dtype {compute_dtype!r}: use {' or '.join(build.DTYPES)}")
        self.card, self.encoder, self.batch_size = trained.card, trained.encoder, batch_size
        self.dimensions = self.encoder.dimensions
        self._params, self._headless = trained.params, trained.config.text.headless
        processor = self.encoder.processor
        mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        self._options = sharding.compiler_options(mesh)
        self._backbone = Backbone(
            trained.config,
            dtype=build.DTYPES[compute_dtype],
            scan_unroll=True if trained.config.text.layers < 8 else 1,
            reward_token_id=self.encoder.tokenizer.reward_id,
            through_reward=trained.through_reward,
        )
        self._pixels = (processor.mean, processor.std)
        self._score, self._states = (
            jax.jit(make(self._backbone, *self._pixels), compiler_options=self._options)
            for make in (make_score_step, make_state_step)
        )
        self._generate: dict[tuple, Any] = {}
        self._say, self._compiled = say or _silent, set()

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
            options: compute_dtype ('float32' or 'bfloat16'), batch_size (groups at a time), say
                (told what is compiled, where that takes long).

        Raises:
            UserError: the folder holds no trained model.
        """
        return cls(load_trained(path, step, backbone), **options)

    def score(
        self, instruction: str, source: Picture | None, candidates: Sequence[Picture]
    ) -> np.ndarray:
        """float32 [K]: rewards in the first dimension, in the order of the candidates.

        Raises:
            UserError: no candidates, or a picture that cannot be read; it is named.
        """
        return self.score_batch([Group(instruction, source, candidates)])[0].reward_KR[:, 0]

    def score_batch(self, groups: Sequence[Group | tuple]) -> list[Scores]:
        """Scores of many groups, in their order; a group is (instruction, source, candidates).

        Raises:
            UserError: as `score`; names the group.
        """
        mean, deviation = map(np.float32, scale(self.card))
        found = self._of_candidates(self._score, self._batches(self._encode_all(groups)))
        return [Scores(r_KR, (r_KR - mean) / deviation, self.dimensions) for r_KR in found]

    def score_encoded(
        self,
        groups: Sequence[EncodedExample],
        one_bucket: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> list[np.ndarray]:
        """float32 [K, R] each, of many groups of any parts; a bucket compiles once.

        Args:
            one_bucket: all go into one that holds them all: more padding, a single compilation.
            advance: told after every batch how many groups it held.
        """
        return self._of_candidates(self._score, self._batches(groups, True, one_bucket), advance)

    def reward_states(
        self, groups: Sequence[EncodedExample], advance: Callable[[int], None] | None = None
    ) -> list[np.ndarray]:
        """float32 [K, D] each: what the reward head reads, the final state of the reward token."""
        return self._of_candidates(self._states, self._batches(groups, True, True), advance)

    def _of_candidates(
        self, program: Any, batches: Iterator, advance: Callable[[int], None] | None = None
    ) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for indices, batch in batches:
            array_BKX = np.asarray(self._call(program, "scores", batch))
            for row, index in enumerate(indices):
                found[index] = array_BKX[row, : int(batch["candidate_mask"][row].sum())]
            if advance is not None:
                advance(len(indices))
        return [found[index] for index in sorted(found)]

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
        options, end = (max_tokens, temperature > 0), self.encoder.tokenizer.end_id
        if options not in self._generate:
            generate = make_generate(self._backbone, *self._pixels, *options, end)
            self._generate[options] = jax.jit(generate, compiler_options=self._options)
        group = Group(instruction, source, candidates)
        ((_, batch),) = self._batches(self._encode_all([group]))
        key = jax.random.key(seed)
        more = key, np.float32(temperature or 1.0)
        ids_BKT = self._call(self._generate[options], "critiques", batch, *more)
        rows = np.asarray(ids_BKT)[0, : len(candidates)].tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]

    def _call(self, program: Any, of: str, batch: dict, *more: Any) -> Any:
        """A program's output. What it compiles is kept for other processes, see `user_cache`."""
        kind = program, *(array.shape for array in batch.values())
        if kind in self._compiled:
            return program(self._params, batch, *more)
        rows, candidates = batch["candidate_mask"].shape
        words = f"compiling the program of {of}, {rows} x {candidates} candidates"
        with if_slow(words, self._say), user_cache.programs_kept():
            found = program(self._params, batch, *more)
        self._compiled.add(kind)
        return found

    def problem(self, picture: Picture) -> str | None:
        """Why a picture cannot be scored, or None."""
        try:
            self.encoder.processor.encode(read_picture(picture))
        except (ValueError, OSError) as error:
            return _words(error)
        return None

    def _encode_all(self, groups: Sequence[Group | tuple]) -> list[EncodedExample]:
        names = [f"group {i}: " if len(groups) > 1 else "" for i in range(len(groups))]
        return [self._encode(Group(*g), name) for g, name in zip(groups, names, strict=True)]

    def _batches(
        self, groups: Sequence[EncodedExample], full: bool = False, one_bucket: bool = False
    ) -> Iterator[tuple[list[int], dict]]:
        """(indices of the groups, batch) for groups of one bucket at a time."""
        by_bucket: dict[Bucket, list[tuple[int, EncodedExample]]] = {}
        for index, encoded in enumerate(groups):
            by_bucket.setdefault(self._bucket(encoded), []).append((index, encoded))
        if one_bucket and by_bucket:
            sizes = zip(*map(dataclasses.astuple, by_bucket), strict=True)
            members = [member for part in by_bucket.values() for member in part]
            by_bucket = {Bucket(*map(max, sizes)): members}
        for bucket, members in by_bucket.items():
            for start in range(0, len(members), self.batch_size):
                part = members[start : start + self.batch_size]
                slots = self.batch_size if full else _step(len(part))
                fillers = [None] * (slots - len(part))
                rows = [encoded for _, encoded in part] + fillers
                yield [i for i, _ in part], assemble_batch(rows, bucket, self.encoder)

    def _encode(self, group: Group, where: str) -> EncodedExample:
        if not isinstance(group.instruction, str):
            raise UserError(f"{where}the instruction must be a text")
        if not is_text(group.instruction):
            raise UserError(f"{where}the instruction {BROKEN_TEXT[0]}")
        if isinstance(group.candidates, str | bytes | Path) or not len(group.candidates):
            raise UserError(f"{where}give a list of at least one candidate picture")
        named: list[tuple[str, bytes]] = []

        def read(picture: Picture, name: str) -> Image:
            label = f"{name} ({short(str(picture))})" if isinstance(picture, str | Path) else name
            try:
                named.append((f"{where}{label}", read_picture(picture)))
            except (ValueError, OSError) as error:
                raise UserError(f"{where}{label}: {_words(error)}") from error
            return Image(named[-1][1])

        prompt: list[Part] = [Text(group.instruction)]
        sources = group.source if isinstance(group.source, list | tuple) else [group.source]
        for i, picture in enumerate(sources):
            if picture is not None:
                name = "source" if len(sources) == 1 else f"source {i}"
                prompt.append(read(picture, name))
        candidates = [
            Candidate((read(picture, f"candidate {i}"),))
            for i, picture in enumerate(group.candidates)
        ]
        try:
            return self.encoder.encode_group(prompt, candidates)
        except ValueError as error:
            raise UserError(f"{self._culprit(named)}: {error}") from error

    def _culprit(self, named: Sequence[tuple[str, bytes]]) -> str:
        """Which of the pictures cannot be decoded."""
        return next((name for name, data in named if self.problem(data)), "a picture")

    def _bucket(self, encoded: EncodedExample) -> Bucket:
        merge = self.encoder.processor.merge**2
        return Bucket(
            candidates=_step(len(encoded.candidates)),
            images=_step(len(encoded.images)),
            patches=_step(max((len(p) for p, _ in encoded.images), default=0), 4 * merge),
            prompt=_step(len(encoded.prompt.tokens), TOKENS),
            candidate=_step(max(len(row.tokens) for row in encoded.candidates), TOKENS),
            critique=0,
        )


def _step(count: int, unit: int = 1) -> int:
    """The smallest of unit * (0, 1, 2, 3, 4, 6, 8, 12, ...) that holds `count`."""
    units = -(-count // unit)
    if units < 2:
        return units * unit
    power = 2 ** math.ceil(math.log2(units))
    return unit * (power * 3 // 4 if units <= power * 3 // 4 else power)


def read_picture(picture: Picture) -> bytes:
    """An encoded picture, whatever form it is given in.

    Raises:
        ValueError: none of the known forms. OSError: a file that cannot be read.
    """
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | Path):
        return read_named(str(picture))
    import PIL.Image

    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            shape = f"{picture.dtype} {list(picture.shape)}"
            raise ValueError(f"an array of {shape}: give uint8 [height, width, 3]")
        picture = PIL.Image.fromarray(picture)
    if not isinstance(picture, PIL.Image.Image):
        kind = type(picture).__name__
        raise ValueError(f"a {kind}: give a path, bytes, a PIL image or a uint8 array")
    file = io.BytesIO()
    to_rgb(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


def _silent(words: str) -> None:
    """A library says nothing unless it is asked to."""
