"""Pictures of edit programs, many at a time.

A program whose knobs are at 0 is drawn to the bit as the built-in world draws its scene. Knobs are
drawn in steps of half a pixel, so that few masks serve all pictures.

Letters: N programs, O slots, h, w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from jrm_jax.data.world.draw import PIXELS, UNIT, mask, radius_of
from jrm_jax.data.world.vocabulary import BACKGROUNDS, COLOURS
from jrm_jax.rl.editing import (
    SHIFTS,
    SLOTS,
    Problem,
    Program,
    object_knobs,
    picture_knobs,
    slots_of,
    to_scene,
)

FULL = 64  # samples of a pixel
STEP = UNIT // 2  # half a pixel
BLUR = 2.0  # pixels, the deviation of a picture that is blurred by 1: the world's two boxes of five
NOISE = 70  # of 255, the largest change at 1
BLOCK = 4  # pixels
GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


class Drawn(NamedTuple):
    pictures_NHW3: np.ndarray  # uint8
    visible_NO: np.ndarray  # float32: the share of each object that no later one hides; 0: absent


def draw(problems: Sequence[Problem], program: Program, seeds: Sequence[int]) -> Drawn:
    """Pictures of `program`, row by row of `problems`.

    Args:
        seeds: of the noise, one a row.
    """
    count = len(problems)
    pictures = np.empty((count, PIXELS, PIXELS, 3), np.uint8)
    visible = np.zeros((count, SLOTS), np.float32)
    for row, (problem, seed) in enumerate(zip(problems, seeds, strict=True)):
        whole = picture_knobs(program, row)
        sharp, visible[row] = _objects(problem, program, row, whole)
        pictures[row] = _spoil(sharp, whole, seed)
    return Drawn(pictures, visible)


def _objects(
    problem: Problem, program: Program, row: int, whole: dict[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """(picture [h, w, 3] uint8, visible shares [O])."""
    scene, cell = to_scene(problem, program, row), PIXELS // 3
    ground = np.array(BACKGROUNDS[scene.background]) + [whole[name] for name in SHIFTS]
    picture = np.empty((PIXELS, PIXELS, 3), np.int32)
    picture[:] = _colour(ground)
    owner = np.full((PIXELS, PIXELS), -1, np.int8)
    area, knobs_OV = np.zeros(SLOTS), object_knobs(program, row)
    for thing, slot in zip(scene.things, slots_of(problem, scene), strict=True):
        red, green, blue, larger, right, down = knobs_OV[slot]
        radius = radius_of(thing.size, cell)
        radius += STEP * round(radius * np.expm1(larger) / STEP)
        x, inner_x = divmod(STEP * round(right * cell * UNIT / STEP), UNIT)
        y, inner_y = divmod(STEP * round(down * cell * UNIT / STEP), UNIT)
        alpha = mask(thing.shape, int(radius), inner_x, inner_y)
        across, along = divmod(thing.cell, 3)
        side = len(alpha)
        top = across * cell + cell // 2 + thing.dy * cell // 32 - side // 2 + y
        left = along * cell + cell // 2 + thing.dx * cell // 32 - side // 2 + x
        t, l = max(0, -top), max(0, -left)
        b, r = min(side, PIXELS - top), min(side, PIXELS - left)
        alpha, own = alpha[t:b, l:r, None], (slice(top + t, top + b), slice(left + l, left + r))
        front = _colour(np.array(COLOURS[thing.colour]) + (red, green, blue))
        picture[own] = (front * alpha + picture[own] * (FULL - alpha) + FULL // 2) // FULL
        inside = alpha[..., 0] > FULL // 2
        owner[own][inside] = slot
        area[slot] = inside.sum()
    seen = np.bincount(owner[owner >= 0], minlength=SLOTS)
    return picture.astype(np.uint8), seen / np.maximum(area, 1)


def _colour(rgb: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(rgb), 0, 255).astype(np.int32)


def _spoil(sharp: np.ndarray, whole: dict[str, float], seed: int) -> np.ndarray:
    """What the picture's knobs do to it: uint8 [h, w, 3] -> the same."""
    if not any(whole[name] for name in ("noisy", "blurred", "blocky", "contrast", "saturation")):
        return sharp
    picture = sharp.astype(np.float32)
    if whole["saturation"]:
        grey = (picture @ GREY.astype(np.float32))[..., None]
        picture = grey + (picture - grey) * np.float32(np.exp(whole["saturation"]))
    if whole["contrast"]:
        picture = 128 + (picture - 128) * np.float32(np.exp(whole["contrast"]))
    picture = np.clip(picture, 0, 255)
    if whole["blurred"]:
        sigma = BLUR * whole["blurred"]
        picture = ndimage.gaussian_filter(picture, (sigma, sigma, 0), mode="nearest", truncate=3)
    if whole["blocky"]:
        blocks = picture.reshape(PIXELS // BLOCK, BLOCK, PIXELS // BLOCK, BLOCK, 3)
        mean = blocks.mean((1, 3)).repeat(BLOCK, 0).repeat(BLOCK, 1)
        picture += np.float32(min(1.0, whole["blocky"])) * (mean - picture)
    if whole["noisy"]:
        bits = np.random.Generator(np.random.Philox(seed)).bytes(picture.size)
        raw = np.frombuffer(bits, np.uint8).reshape(picture.shape).astype(np.float32)
        picture = picture + (raw - 128) * np.float32(NOISE / 128 * whole["noisy"])
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
