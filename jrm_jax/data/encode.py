"""One example to tokens, patches and labels, before it is laid into a batch.

Letters: K candidates, R reward dimensions, n patches and t visual tokens of an image, F features of
a patch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jrm_jax.data.processor import Processor, load_processor
from jrm_jax.data.schema import (
    DEFAULT_DIMENSIONS,
    Candidate,
    Image,
    Part,
    PreferenceExample,
    in_dimensions,
)
from jrm_jax.data.stated import teacher_scores
from jrm_jax.data.template import (
    END_THINK,
    THINK,
    Piece,
    Template,
    Token,
    Tokenizer,
    load_tokenizer,
)
from jrm_jax.errors import UserError
from jrm_jax.model.config import BackboneConfig, VisionConfig
from jrm_jax.model.rope import ImageTables, image_tables, mrope_positions


class TokenRow(NamedTuple):
    """Tokens of a prompt, or of a candidate with its critique."""

    tokens: list[int]
    positions: np.ndarray  # [3, tokens] int32
    visual: list[tuple[int, int, np.ndarray]]  # (first slot, image row, slots of its tokens [t])
    reward: int = 0  # slot of <|reward|>
    targets: tuple[int, ...] = ()
    masked: tuple[int, int] = (0, 0)  # targets [first, last) that are kept out of the loss


class PartSizes(NamedTuple):
    """Of a prompt or a candidate: patches of each picture, and tokens."""

    patches: tuple[int, ...]
    tokens: int


class EncodedExample(NamedTuple):
    """One group, ready to be laid into a bucket."""

    prompt: TokenRow
    candidates: list[TokenRow]
    images: list[tuple[np.ndarray, ImageTables]]  # patches [n, F] uint8, merge-block major
    preference: np.ndarray  # [K, K, R] float32
    weight: np.ndarray  # [K, K, R] float32
    facts: np.ndarray | None = None  # [K, F] float32, where the encoder is asked for facts
    teacher: np.ndarray | None = None  # [K, R] float32, likewise, in nats; NaN = not stated


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns examples into tokens, patches and tables. Picklable.

    dimensions: the reward dimensions of the run, picked by name from the data's.
    language: feed critiques and their targets.
    score_line: let the loss see score lines; else they are fed but masked.
    positions: 'mrope', or '1d' (see `model.rope.mrope_positions`).
    facts: how many facts of a candidate are fed (the built-in world's `facts.COUNT`); 0: none.
    teacher: feed the scores that critiques state, mixed so (`stated.teacher_scores`); None: do not.
    teacher_scale: points of such a score that count one nat, for each dimension; (): one.
    """

    tokenizer: Tokenizer
    processor: Processor
    vision: VisionConfig
    template: Template = Template()
    dimensions: tuple[str, ...] = DEFAULT_DIMENSIONS
    language: bool = True
    score_line: bool = True
    positions: str = "mrope"
    facts: int = 0
    teacher: tuple[tuple[str, float], ...] | None = None
    teacher_scale: tuple[float, ...] = ()

    def __post_init__(self):
        mine, theirs = self.processor, self.vision
        if (mine.patch, mine.merge) != (theirs.patch, theirs.merge):
            raise UserError(
                f"the image processor makes patches of {mine.patch} (merge {mine.merge}), the"
                f" vision tower takes {theirs.patch} (merge {theirs.merge}): fix the model folder"
            )
        if self.template.thinking and None in (self.tokenizer.ids[t] for t in (THINK, END_THINK)):
            raise UserError(f"the tokenizer has no {THINK} or {END_THINK}: fix the model folder")

    @property
    def key(self) -> str:
        """Of everything that the sizes of an example depend on; for `sizes.measure`."""
        parts = (self.tokenizer.digest, self.template.hash, self.processor)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def sizes(self, example: PreferenceExample) -> tuple[int, ...]:
        """The numbers of `sizes.SIZE_NAMES`, from image headers alone.

        Raises:
            ValueError: a picture whose header cannot be read.
        """
        prompt, *own = self.part_sizes(example.prompt, example.candidates)
        lengths = [part.tokens for part in own]
        patches = [number for part in (prompt, *own) for number in part.patches]
        said = [
            len(self.tokenizer.encode_critique(c.critique)[0]) if c.critique else 0
            for c in example.candidates
        ]
        return (
            len(own),
            len(patches),
            max(patches, default=0),
            prompt.tokens,
            max(lengths),
            max(length + more for length, more in zip(lengths, said, strict=True)),
            max(more + 1 if more else 0 for more in said),
            sum(patches),
            sum(lengths),
            sum(lengths) + sum(said),
        )

    def part_sizes(
        self, prompt: Sequence[Part], candidates: Sequence[Candidate]
    ) -> list[PartSizes]:
        """Of the prompt, then of each candidate up to <|reward|>, from image headers alone.

        Raises:
            ValueError: a picture whose header cannot be read.
        """

        def measured(pieces: list[Piece]) -> PartSizes:
            patches, total = [], 0
            for piece in pieces:
                if isinstance(piece, Image):
                    patches.append(self.processor.measure(piece.data))
                    total += patches[-1] // self.processor.merge**2
                else:
                    total += len(self._ids(piece))
            return PartSizes(tuple(patches), total)

        head, bodies = self.template.split(prompt, [c.parts for c in candidates])
        return [measured(pieces) for pieces in (head, *bodies)]

    def encode_example(self, example: PreferenceExample) -> EncodedExample:
        """Decode, resize, tokenise.

        A reward dimension that the example does not have is unlabelled.

        Raises:
            ValueError: a picture that cannot be decoded.
            UserError: facts that the example does not have.
        """
        labels = in_dimensions(example, self.dimensions)
        return self.encode_group(example.prompt, example.candidates)._replace(
            preference=labels.preference,
            weight=labels.weight,
            facts=self.candidate_facts(example.candidates),
            teacher=None if self.teacher is None else self._teacher(example.candidates),
        )

    def _teacher(self, candidates: Sequence[Candidate]) -> np.ndarray:
        said = [c.critique if c.score_line else None for c in candidates]
        points_KR = teacher_scores(said, self.dimensions, dict(self.teacher))
        return np.asarray(points_KR, np.float32) / np.asarray(self.teacher_scale or 1.0, np.float32)

    def candidate_facts(self, candidates: Sequence[Candidate]) -> np.ndarray | None:
        """[K, F] float32 of 0 and 1; None where none are fed.

        Raises:
            UserError: a candidate has none.
        """
        if not self.facts:
            return None
        facts_KF = np.zeros((len(candidates), self.facts), np.float32)
        for row, candidate in zip(facts_KF, candidates, strict=True):
            if candidate.facts is None:
                raise UserError(
                    "config.loss.facts_weight needs facts, which this data set has not: "
                    "use --config.data.world.kind=facts"
                )
            row[list(candidate.facts)] = 1
        return facts_KF

    def encode_group(
        self, prompt: Sequence[Part], candidates: Sequence[Candidate]
    ) -> EncodedExample:
        """A group without labels; any number of candidates.

        Raises:
            ValueError: a picture that cannot be decoded.
        """
        head, bodies = self.template.split(prompt, [c.parts for c in candidates])
        images: list[tuple[np.ndarray, ImageTables]] = []
        start, end = self._row(head, images, 0)
        rows = [
            self._row(body, images, end, candidate)[0]
            for body, candidate in zip(bodies, candidates, strict=True)
        ]
        labels = (len(rows), len(rows), len(self.dimensions))
        half, none = np.full(labels, 0.5, np.float32), np.zeros(labels, np.float32)
        return EncodedExample(start, rows, images, half, none)

    def _ids(self, piece: str) -> tuple[int, ...]:
        if isinstance(piece, Token):
            return (self.tokenizer.ids[piece],)
        return self.tokenizer.encode_text(piece)

    def _row(
        self,
        pieces: list[Piece],
        images: list[tuple[np.ndarray, ImageTables]],
        start: int,
        candidate: Candidate | None = None,
    ) -> tuple[TokenRow, int]:
        """The row and the position after it; decoded pictures are appended to `images`."""
        tokens: list[int] = []
        runs: list[int | tuple[int, int]] = []
        visual = []
        text = 0  # tokens since the last picture
        merge = self.processor.merge
        for piece in pieces:
            if not isinstance(piece, Image):
                ids = self._ids(piece)
                tokens += ids
                text += len(ids)
                continue
            patches, grid = self.processor.encode(piece.data)
            tables = image_tables(grid, self.vision)
            visual.append((len(tokens), len(images), tables.token_slots))
            images.append((patches, tables))
            tokens += [self.tokenizer.image_id] * len(tables.token_slots)
            runs += [text, (grid[0] // merge, grid[1] // merge)]
            text = 0
        reward = len(tokens) - 1
        targets: tuple[int, ...] = ()
        masked = (0, 0)
        if candidate is not None and self.language and candidate.critique:
            ids, before = self.tokenizer.encode_critique(candidate.critique)
            tokens += ids
            text += len(ids)
            targets = (*ids, self.tokenizer.end_id)
            if candidate.score_line and not self.score_line:
                masked = (before, len(ids))
        positions, end = _positions((*runs, text), start, self.positions)
        return TokenRow(tokens, positions, visual, reward, targets, masked), end


_positions = functools.lru_cache(maxsize=16384)(mrope_positions)


def make_encoder(
    folder: str | Path,
    config: BackboneConfig,
    *,
    template: Template | None = None,
    max_visual_tokens: int | None = None,
    dimensions: Sequence[str] = DEFAULT_DIMENSIONS,
    language: bool = True,
    score_line: bool = True,
    positions: str = "mrope",
    facts: int = 0,
    teacher: Sequence[tuple[str, float]] | None = None,
) -> Encoder:
    """Encoder of a Hugging Face folder.

    Raises:
        UserError: tokenizer or image processor missing, unsuitable, or at odds with `config`.
    """
    tokenizer = load_tokenizer(folder, config.text.vocab)
    if tokenizer.image_id != config.image_token_id:
        raise UserError(
            f"{folder}: <|image_pad|> is token {tokenizer.image_id} in the tokenizer but"
            f" {config.image_token_id} in config.json"
        )
    return Encoder(
        tokenizer,
        load_processor(folder, max_visual_tokens),
        config.vision,
        (template or Template()).of_family(config.family),
        tuple(dimensions),
        language,
        score_line,
        positions,
        facts,
        None if teacher is None else tuple((name, float(weight)) for name, weight in teacher),
    )
