"""Positions and rotary embeddings.

Host side (NumPy): index tables of one image, and MRoPE positions of a sequence. Graph side (jax):
rotary angles and their application, float32.

Letters: n patches of an image, t merged tokens of an image (n / merge^2), B rows, S slots,
H heads, X half a head's width.

Formulas follow the published Qwen2-VL, Qwen2.5-VL and Qwen3-VL reports (2-D rotary in the tower,
multimodal rotary in the decoder) as implemented in `transformers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jrm_jax.model.config import TextConfig, VisionConfig

VISION_THETA = 10000.0
POSITIONS = ("mrope", "1d")  # modes of `mrope_positions`


class ImageTables(NamedTuple):
    """Index tables of one image. "Tower order" is the patch order the vision tower works in."""

    order: np.ndarray  # [n] int32: tower patch i is patch order[i] of the merge-block-major list
    positions: np.ndarray  # [n, 2] int32: (row, column) of the patch, tower order
    windows: np.ndarray | None  # [n] int32: 1 + attention window; Qwen2.5-VL only
    position_index: np.ndarray | None  # [n, 4] int32: taps in the position table; Qwen3-VL only
    position_weight: np.ndarray | None  # [n, 4] float32: bilinear weights; Qwen3-VL only
    token_slots: np.ndarray  # [t] int32: where the tower puts the row-major merged token


@lru_cache(maxsize=4096)
def image_tables(grid_hw: tuple[int, int], vision: VisionConfig) -> ImageTables:
    """Tables of an image of `grid_hw` = (rows, columns) patches; the arrays are read-only.

    Patches arrive merge-block major: the merge x merge patches of a merged token are neighbours,
    tokens are row-major. Qwen2.5-VL's tower works window by window (row-major windows, row-major
    tokens inside; windows at the border hold fewer tokens), Qwen3-VL's in the order of arrival.

    Raises:
        ValueError: the grid is not a positive multiple of `vision.merge`.
    """
    rows, columns = grid_hw
    merge = vision.merge
    if rows <= 0 or columns <= 0 or rows % merge or columns % merge:
        raise ValueError(f"patch grid {grid_hw} is not a multiple of merge size {merge}")
    token_rows, token_columns = rows // merge, columns // merge
    token_row, token_column = np.divmod(np.arange(token_rows * token_columns), token_columns)

    windows = None
    tower_tokens = np.arange(token_rows * token_columns)
    if vision.family == "qwen2_5_vl":
        side = vision.window // merge // vision.patch
        window = token_row // side * -(-token_columns // side) + token_column // side
        tower_tokens = np.argsort(window, kind="stable")
        windows = np.repeat(1 + window[tower_tokens], merge**2).astype(np.int32)
    token_slots = np.argsort(tower_tokens).astype(np.int32)

    inside = np.arange(merge**2)
    order = (tower_tokens[:, None] * merge**2 + inside).reshape(-1).astype(np.int32)
    row = (token_row[tower_tokens][:, None] * merge + inside // merge).reshape(-1)
    column = (token_column[tower_tokens][:, None] * merge + inside % merge).reshape(-1)
    positions = np.stack([row, column], axis=1).astype(np.int32)

    index = weight = None
    if vision.family == "qwen3_vl":
        index, weight = _table_taps(row, column, grid_hw, int(vision.num_positions**0.5))
    tables = ImageTables(order, positions, windows, index, weight, token_slots)
    for table in tables:
        if table is not None:
            table.setflags(write=False)
    return tables


def _table_taps(
    row_n: np.ndarray, column_n: np.ndarray, grid_hw: tuple[int, int], side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Four taps and weights that resample a side x side table bilinearly, corners aligned."""

    def axis(index: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        low = np.floor(source)
        high_weight = (source - low).astype(np.float32)
        taps = np.minimum(np.stack([low, low + 1], axis=1).astype(np.int32), side - 1)
        return taps, np.stack([1 - high_weight, high_weight], axis=1)

    row_taps, row_weights = axis(row_n, grid_hw[0])
    column_taps, column_weights = axis(column_n, grid_hw[1])
    index = (row_taps[:, :, None] * side + column_taps[:, None, :]).reshape(-1, 4)
    weight = (row_weights[:, :, None] * column_weights[:, None, :]).reshape(-1, 4)
    return index.astype(np.int32), weight.astype(np.float32)


def mrope_positions(
    runs: Sequence[int | tuple[int, int]], start: int = 0, mode: str = "mrope"
) -> tuple[np.ndarray, int]:
    """Decoder positions of a sequence made of text and images.

    Args:
        runs: an int is a text run of that many tokens, a pair is an image of (rows, columns)
            merged tokens.
        start: first position.
        mode: 'mrope', or '1d': consecutive numbers on all axes, whatever the images. The second
            reproduces checkpoints that were trained without token types.

    Returns:
        positions [3, n] int32 (time, height, width) and the position after the last token.
    """
    if mode not in POSITIONS:
        raise ValueError(f"position mode {mode!r}: use {' or '.join(map(repr, POSITIONS))}")
    pieces = [np.zeros((3, 0), np.int32)]
    for run in runs:
        if isinstance(run, tuple) and mode == "mrope":
            rows, columns = run
            row, column = np.divmod(np.arange(rows * columns), columns)
            pieces.append(start + np.stack([np.zeros_like(row), row, column]))
            start += max(rows, columns)
        else:
            length = run[0] * run[1] if isinstance(run, tuple) else run
            pieces.append(np.broadcast_to(start + np.arange(length), (3, length)))
            start += length
    return np.concatenate(pieces, axis=1).astype(np.int32), start


class Rotary(NamedTuple):
    """Factors of a rotation, [..., slots, 1, 2, X] float32 (broadcast over heads)."""

    cos: Array  # the cosine, twice
    sin: Array  # minus the sine, then the sine


def _rotary(angles: Array) -> Rotary:
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return Rotary(
        jnp.stack([cos, cos], axis=-2)[..., None, :, :],
        jnp.stack([-sin, sin], axis=-2)[..., None, :, :],
    )


def decoder_rotary(positions_B3S: Array, text: TextConfig) -> Rotary:
    """Rotary tables of the decoder from (time, height, width) positions.

    Each of the X frequencies belongs to one axis. Qwen2.5-VL gives consecutive blocks of
    `mrope_section` frequencies to time, height, width; Qwen3-VL interleaves them with stride 3 and
    leaves what remains to time.
    """
    half = text.turning // 2
    frequencies_X = 1.0 / text.rope_theta ** (np.arange(half, dtype=np.float32) / half)
    if text.mrope_interleaved:
        axis_X = np.zeros(half, np.int32)
        for axis in (1, 2):
            axis_X[axis : text.mrope_section[axis] * 3 : 3] = axis
    else:
        axis_X = np.repeat(np.arange(3), text.mrope_section)
    positions_BSX = positions_B3S[:, axis_X, :].swapaxes(1, 2)
    return _rotary(positions_BSX.astype(jnp.float32) * frequencies_X.astype(np.float32))


def vision_rotary(positions_Bn2: Array, head_dim: int) -> Rotary:
    """Rotary tables of the tower: the first half of the frequencies turns with the row, the
    second with the column."""
    quarter = head_dim // 4
    frequencies = 1.0 / VISION_THETA ** (np.arange(quarter, dtype=np.float32) / quarter)
    angles = positions_Bn2[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    return _rotary(angles.reshape(*positions_Bn2.shape[:-1], 2 * quarter))


def apply_rotary(x_BSHD: Array, rotary: Rotary) -> Array:
    """Turn pairs (i, i + X) of every head; computed in float32, returned in x's dtype. Dimensions
    from 2 X on pass as they are."""
    turning = 2 * rotary.cos.shape[-1]
    if turning < x_BSHD.shape[-1]:
        turned = apply_rotary(x_BSHD[..., :turning], rotary)
        return jnp.concatenate([turned, x_BSHD[..., turning:]], axis=-1)
    # exchanging the halves by a reversal keeps this one branch-free loop; joining two halves does
    # not, and was several times slower on CPU
    pairs = x_BSHD.astype(jnp.float32).reshape(*x_BSHD.shape[:-1], 2, -1)
    turned = pairs * rotary.cos + jnp.flip(pairs, axis=-2) * rotary.sin
    return turned.reshape(x_BSHD.shape).astype(x_BSHD.dtype)
