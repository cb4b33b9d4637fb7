"""What is measured: sizes, a backbone's architecture, a config, a batch of random content.

Shapes are those of a real run: a source picture and two edited ones, written critiques. Contents
are random, and fill their slots all but whole, so that a side that does not pad gains nothing.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from configs import joint
from jrm_jax.data.buckets import Bucket
from jrm_jax.data.encode import EncodedExample, TokenRow
from jrm_jax.data.pipeline import assemble_batch
from jrm_jax.model.config import BackboneConfig
from jrm_jax.model.published import PUBLISHED
from jrm_jax.model.rope import image_tables, mrope_positions
from jrm_jax.planning.compiling import stand_in_encoder

RANK = 16  # of adapters


@dataclasses.dataclass(frozen=True)
class Sizes:
    """grid: merged tokens of a picture (rows, columns). words: text tokens of the prompt, and of a
    candidate before its reward token. slots: of a picture's patches, a prompt, a candidate, and of
    a candidate that is only scored. candidates: of a group."""

    groups: int
    scored: int  # groups of a scoring batch
    grid: tuple[int, int]
    words: tuple[int, int]
    critique: int
    slots: tuple[int, int, int, int]
    rounds: int  # timed steps
    product: int  # side of the square matrices whose product gives the device's own rate
    candidates: int = 2

    def scored_with(self, candidates: int) -> Sizes:
        """As many edits, scored in groups of so many."""
        groups = max(1, self.scored * self.candidates // candidates)
        return dataclasses.replace(self, scored=groups, candidates=candidates)

    def bucket(self, critique: bool) -> Bucket:
        patches, prompt, candidate, short = self.slots
        return Bucket(
            candidates=self.candidates, images=1 + self.candidates, patches=patches, prompt=prompt,
            candidate=candidate if critique else short, critique=self.critique * critique,
        )  # fmt: skip


REAL = Sizes(4, 16, (22, 23), (4, 4), 896, (2048, 512, 1408, 640), rounds=10, product=8192)
TINY = Sizes(2, 2, (4, 5), (4, 4), 24, (96, 32, 56, 32), rounds=2, product=256)


def architecture(name: str, tiny: bool) -> BackboneConfig:
    """That of a published backbone; `tiny`: a small one of the same kind, for trying things out."""
    backbone = PUBLISHED[name]
    if not tiny:
        return backbone
    text = dataclasses.replace(
        backbone.text, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, mlp=96, vocab=512,
        mrope_section=(4, 2, 2),
    )  # fmt: skip
    if text.delta is not None:
        delta = dataclasses.replace(
            text.delta, interval=2, key_heads=2, value_heads=4, key_dim=8, value_dim=12
        )
        text = dataclasses.replace(text, mrope_section=(2, 1, 1), rotary=8, delta=delta)
    vision = dataclasses.replace(
        backbone.vision, depth=2, hidden=48, heads=4, mlp=80, patch=4, out_hidden=64,
        deepstack=backbone.vision.deepstack and (0,), num_positions=49,
    )  # fmt: skip
    return BackboneConfig(backbone.family, vision, text, 500, 501, 502)


def make_config(
    name: str, sizes: Sizes, adapters: bool = False, attention: str = "auto", remat: str = "full"
) -> ConfigDict:
    """The joint run of a published backbone with preference and language losses alone."""
    config = joint.get_config(name)
    config.batch_size = sizes.groups
    config.loss.update({"centering_weight": 0.0, "teacher_weight": 0.0})
    config.lora.rank = RANK if adapters else 0
    config.backbone.attention, config.remat = attention, remat
    config.mesh.data = config.mesh.fsdp = 1
    return config


def make_batch(
    config: ConfigDict, backbone: BackboneConfig, sizes: Sizes, critique: bool = True
) -> dict[str, np.ndarray]:
    """A batch on the host (`data/pipeline.py`): of training, or without critiques of scoring."""
    rng = np.random.default_rng(0)
    encoder = stand_in_encoder(config, backbone)
    rows, columns = sizes.grid
    grid = rows * backbone.vision.merge, columns * backbone.vision.merge
    tables = image_tables(grid, backbone.vision)
    special = (backbone.image_token_id, backbone.vision_start_id, backbone.vision_end_id)
    count = sizes.candidates
    plain = min(*special, encoder.tokenizer.reward_id)  # ids below it are words

    def text(length: int) -> list[int]:
        return rng.integers(1, plain, length).tolist()

    def row(image: int, words: int, start: int, targets: tuple[int, ...] | None):
        tokens = [special[1], *[special[0]] * (rows * columns), special[2], *text(words)]
        reward = len(tokens)
        if targets is not None:
            tokens += [encoder.tokenizer.reward_id, *targets[:-1]]
        runs = [1, sizes.grid, len(tokens) - 1 - rows * columns]
        positions, end = mrope_positions(runs, start)
        seen = [(1, image, tables.token_slots)]
        return TokenRow(tokens, positions, seen, reward, targets or ()), end

    def group() -> EncodedExample:
        prompt, end = row(0, sizes.words[0], 0, None)
        candidates = [
            row(k + 1, sizes.words[1], end, tuple(text(sizes.critique * critique)))[0]
            for k in range(count)
        ]
        shape = (grid[0] * grid[1], backbone.vision.features)
        images = [(rng.integers(0, 256, shape, np.uint8), tables) for _ in range(1 + count)]
        preference = np.full((count, count, 1), 0.5, np.float32)
        preference[0, 1], preference[1, 0] = 1.0, 0.0
        weight = 1 - np.eye(count, dtype=np.float32)[..., None]
        return EncodedExample(prompt, candidates, images, preference, weight)

    groups = sizes.groups if critique else sizes.scored
    return assemble_batch([group() for _ in range(groups)], sizes.bucket(critique), encoder)
