"""Draw a scene: anti-aliased coverage masks, integer blending, lossless PNG.

Integer arithmetic throughout, so that every machine draws the same pixels. Objects keep to their
own cell, hence nothing overlaps and an object is a cached tile copied into place.
"""

from __future__ import annotations

import functools
import random
import struct
import zlib

import numpy as np

from jrm_jax.data.world.vocabulary import BACKGROUNDS, COLOURS, Scene

PIXELS = 96  # default side of a picture
_SAMPLES = 8  # samples per pixel and axis
UNIT = 2 * _SAMPLES  # coordinates are in 1/16 pixel, samples at odd ones
# Radius in 1/64 of a cell; with the largest offset (3/32) the large one stays in its cell.
_RADII = {"small": 12, "medium": 18, "large": 25}
_ROUND = 940  # radius of the circle, in thousandths of the nominal radius
# Vertices in thousandths of the nominal radius, y downwards.
_POLYGONS = {
    "square": ((-820, -820), (820, -820), (820, 820), (-820, 820)),
    "triangle": ((0, -960), (980, 800), (-980, 800)),
    "diamond": ((0, -1000), (680, 0), (0, 1000), (-680, 0)),
    "cross": (
        (-310, -960), (310, -960), (310, -310), (960, -310), (960, 310), (310, 310),
        (310, 960), (-310, 960), (-310, 310), (-960, 310), (-960, -310), (-310, -310),
    ),
    "star": (
        (0, -1000), (247, -340), (951, -309), (400, 130), (588, 809),
        (0, 420), (-588, 809), (-400, 130), (-951, -309), (-247, -340),
    ),
}  # fmt: skip


def coverage(shape: str, size: str, cell: int) -> np.ndarray:
    """[side, side] int32 in 0..64: how many of a pixel's 8 x 8 samples the shape covers."""
    return mask(shape, radius_of(size, cell))


def radius_of(size: str, cell: int) -> int:
    """In 1/16 pixel; `cell` in pixels."""
    return _RADII[size] * cell * UNIT // 64


@functools.lru_cache(maxsize=8192)
def mask(shape: str, radius: int, right: int = 0, down: int = 0) -> np.ndarray:
    """As `coverage`, of any radius; its middle is that of the mask, moved by `right` and `down`.
    All three in 1/16 pixel; moved by less than a pixel."""
    half = -(-(radius + max(right, down)) // UNIT) + 1
    axis = np.arange(-half * UNIT + 1, half * UNIT, 2, dtype=np.int64)
    x, y = (axis[None, :] - right) * 1000, (axis[:, None] - down) * 1000
    if shape == "circle":
        inside = x * x + y * y <= (radius * _ROUND) ** 2
    else:
        inside = np.zeros((len(axis), len(axis)), bool)
        corners = [(vx * radius, vy * radius) for vx, vy in _POLYGONS[shape]]
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            # Even-odd rule: does the ray to the right cross this edge? All in integers.
            crosses = (y0 > y) != (y1 > y)
            side = (x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)
            inside ^= crosses & ((side > 0) == (y1 > y0)) & (side != 0)
    blocks = inside.reshape(2 * half, _SAMPLES, 2 * half, _SAMPLES)
    return blocks.sum((1, 3)).astype(np.int32)


@functools.cache
def _tile(shape: str, size: str, colour: str, background: str, cell: int) -> np.ndarray:
    alpha = coverage(shape, size, cell)[:, :, None]
    full = _SAMPLES * _SAMPLES
    front = np.array(COLOURS[colour], np.int32)
    back = np.array(BACKGROUNDS[background], np.int32)
    return ((front * alpha + back * (full - alpha) + full // 2) // full).astype(np.uint8)


@functools.cache
def _canvas(background: str, pixels: int) -> np.ndarray:
    return np.full((pixels, pixels, 3), BACKGROUNDS[background], np.uint8)


def draw(scene: Scene, pixels: int = PIXELS) -> np.ndarray:
    """[pixels, pixels, 3] uint8. `pixels` is a multiple of 3, at least 48."""
    cell = pixels // 3
    picture = _canvas(scene.background, pixels).copy()
    for thing in scene.things:
        tile = _tile(thing.shape, thing.size, thing.colour, scene.background, cell)
        side = len(tile)
        row, column = divmod(thing.cell, 3)
        top = row * cell + cell // 2 + thing.dy * cell // 32 - side // 2
        left = column * cell + cell // 2 + thing.dx * cell // 32 - side // 2
        # The tile's rim is background only and may reach past the picture's edge.
        t, l = max(0, -top), max(0, -left)
        b, r = min(side, pixels - top), min(side, pixels - left)
        picture[top + t : top + b, left + l : left + r] = tile[t:b, l:r]
    return picture


def degrade(picture: np.ndarray, quality: str, rng: random.Random) -> np.ndarray:
    """The same picture 'noisy', 'blurred' or 'blocky': [h, w, 3] uint8 -> [h, w, 3] uint8."""
    height, width, _ = picture.shape
    if quality == "noisy":
        raw = np.frombuffer(rng.randbytes(picture.size), np.uint8).reshape(picture.shape)
        noise = (raw.astype(np.int32) - 128) * 70 // 128
        return np.clip(picture + noise, 0, 255).astype(np.uint8)
    if quality == "blurred":
        soft = picture.astype(np.int32)
        for axis in (0, 1, 0, 1):
            soft = _box(soft, max(2, height // 40), axis)
        return soft.astype(np.uint8)
    if quality == "blocky":
        block = max(2, height // 24)
        small = picture[: height // block * block, : width // block * block].astype(np.int32)
        small = small.reshape(height // block, block, width // block, block, 3)
        mean = (small.sum((1, 3)) + block * block // 2) // (block * block)
        out = picture.copy()
        big = mean.repeat(block, 0).repeat(block, 1).astype(np.uint8)
        out[: big.shape[0], : big.shape[1]] = big
        return out
    raise ValueError(f"unknown quality {quality!r}")


def _box(picture: np.ndarray, reach: int, axis: int) -> np.ndarray:
    """Mean over 2 reach + 1 pixels along one axis, rounded, the edge pixels repeated."""
    lines = picture.swapaxes(0, axis)
    padded = np.concatenate([lines[:1].repeat(reach, 0), lines, lines[-1:].repeat(reach, 0)])
    window = 2 * reach + 1
    total = sum(padded[i : i + len(lines)] for i in range(window))
    return ((total + window // 2) // window).swapaxes(0, axis)


def encode_png(picture: np.ndarray) -> bytes:
    """[h, w, 3] uint8 -> a PNG file, several times faster than Pillow's writer at this size.

    Rows are stored without prediction filters. The pixels are the same everywhere, the bytes may
    depend on the zlib in use.
    """
    height, width, _ = picture.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # a leading 0 in each row: no filter
    rows[:, 1:] = picture.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def encode_scene(scene: Scene, quality: str | None, rng: random.Random, pixels: int) -> bytes:
    """The scene's picture as a PNG file, degraded where it has lost a `quality`."""
    picture = draw(scene, pixels)
    return encode_png(degrade(picture, quality, rng) if quality else picture)
