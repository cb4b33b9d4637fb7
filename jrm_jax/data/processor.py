"""Pictures to patches, as transformers' Qwen2-VL image processor (Pillow backend) makes them.

Letters: n patches of an image, F = 3 * patch * patch features in the order (channel, row, column),
h, w pixels. Patches are merge-block major: the merge x merge patches that become one visual token
are neighbours, tokens are row-major. The frames of a still are equal, so only one is stored, and
pixels stay uint8: the model normalises them on the device with `mean` and `std`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from jrm_jax.data.images import MAX_ASPECT, check_size, decode, image_size
from jrm_jax.errors import UserError

_BICUBIC = 3
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Processor:
    """How pictures become patches. `mean` and `std` are in units of the pixel range 0..1."""

    patch: int
    merge: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def features(self) -> int:
        return 3 * self.patch**2

    @property
    def most_patches(self) -> int:
        """No picture has more. A long one may exceed `max_pixels`: `smart_resize` gives it one row
        of visual tokens at least, and rounds both sides up to reach `min_pixels`."""
        side = self.patch * self.merge
        most, least = self.max_pixels // side**2, -(-self.min_pixels // side**2)
        one_row = math.isqrt(MAX_ASPECT * self.max_pixels // side**2)
        # (a + 1)(b + 1) for sides with a * b = least; their sum is largest at the longest shape
        grown = least + math.ceil((MAX_ASPECT + 1) * math.sqrt(least / MAX_ASPECT)) + 1
        return max(most, one_row, grown) * self.merge**2

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches of a picture of that size.

        Raises:
            ValueError: no area, or one side more than 200 times the other.
        """
        factor = self.patch * self.merge
        rows, columns = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        return rows // self.patch, columns // self.patch

    def encode(self, data: bytes) -> tuple[np.ndarray, tuple[int, int]]:
        """Encoded picture -> (patches [n, F] uint8, (rows, columns) of patches).

        Raises:
            ValueError: not a picture, truncated, unreasonably large, or too narrow.
        """
        pixels = self.resize(decode(data))
        grid = pixels.shape[0] // self.patch, pixels.shape[1] // self.patch
        return patchify(pixels, self.patch, self.merge), grid

    def resize(self, pixels: np.ndarray) -> np.ndarray:
        """[h, w, 3] uint8 -> the same with both sides multiples of patch * merge."""
        rows, columns = self.grid(*pixels.shape[:2])
        size = (columns * self.patch, rows * self.patch)
        if pixels.shape[:2] == size[::-1]:
            return pixels
        import PIL.Image

        return np.asarray(PIL.Image.fromarray(pixels).resize(size, _BICUBIC))

    def measure(self, data: bytes) -> int:
        """Number of patches, from the file's header alone.

        EXIF orientation is not looked at: it swaps the sides, the number stays.

        Raises:
            ValueError: as `encode`, as far as the header tells.
        """
        width, height = image_size(data)
        rows, columns = self.grid(height, width)
        return rows * columns


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """(height, width) as multiples of `factor`, area in range, shape kept as far as possible.

    The rule of the Qwen2-VL image processor, Python's rounding half to even included.

    Raises:
        ValueError: no area, or one side more than 200 times the other.
    """
    check_size(width, height)
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def patchify(pixels: np.ndarray, patch: int, merge: int) -> np.ndarray:
    """[h, w, 3] uint8 -> [n, 3 * patch * patch] uint8, merge-block major."""
    height, width, channels = pixels.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    # Two plain copies, whole pixel runs first: several times faster than one 7-axis transpose.
    runs = pixels.reshape(rows, merge, patch, columns, merge, patch * channels)
    blocks = np.ascontiguousarray(runs.transpose(0, 3, 1, 4, 2, 5))
    blocks = blocks.reshape(rows * columns * merge**2, patch**2, channels)
    return np.ascontiguousarray(blocks.swapaxes(1, 2)).reshape(len(blocks), -1)


def load_processor(folder: str | Path, max_visual_tokens: int | None = None) -> Processor:
    """Read `preprocessor_config.json` (or the newer `processor_config.json`) of a folder.

    Args:
        max_visual_tokens: visual tokens a picture may have at most; replaces the folder's cap and
            lowers its floor to a quarter of it. As in the original rule, a picture much longer than
            wide may still exceed it.

    Raises:
        UserError: no such file, or it asks for something other than the Qwen2-VL processing.
    """
    path, fields = read_config(Path(folder))

    def fail(field: str, message: str) -> UserError:
        return UserError(f"{path}: field '{field}': {message}")

    def integer(field: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise fail(field, f"is {value!r}, must be a positive integer")
        return value

    def triple(field: str, default: tuple[float, ...]) -> tuple[float, ...]:
        value = fields.get(field, default)
        listed = isinstance(value, (list, tuple)) and len(value) == 3
        if not listed or not all(type(v) in (int, float) and math.isfinite(v) for v in value):
            raise fail(field, f"is {value!r}, must be three numbers")
        return tuple(float(v) for v in value)

    def deviation() -> tuple[float, ...]:
        value = triple("image_std", _CLIP_STD)
        if min(value) <= 0:
            raise fail("image_std", f"is {value!r}, must be three numbers above 0")
        return value

    for field, wanted in (("do_resize", True), ("do_rescale", True), ("do_convert_rgb", True)):
        if fields.get(field, wanted) != wanted:
            raise fail(field, f"is {fields[field]!r}; only {wanted!r} is supported")
    if fields.get("resample", _BICUBIC) != _BICUBIC:
        raise fail("resample", f"is {fields['resample']!r}; only {_BICUBIC} (bicubic) is supported")
    factor = fields.get("rescale_factor", 1 / 255)
    if type(factor) is not float or abs(factor - 1 / 255) > 1e-9:
        raise fail("rescale_factor", f"is {factor!r}; only 1/255 is supported")
    normalised = fields.get("do_normalize", True)
    size = fields.get("size") or {}
    if not isinstance(size, dict):
        raise fail("size", f"is {size!r}, must be an object of fields, {{...}}")
    low = fields.get("min_pixels") or size.get("shortest_edge", size.get("min_pixels", 56 * 56))
    high = fields.get("max_pixels") or size.get(
        "longest_edge", size.get("max_pixels", 28 * 28 * 1280)
    )
    patch = integer("patch_size", fields.get("patch_size", 14))
    merge = integer("merge_size", fields.get("merge_size", 2))
    low, high = integer("min_pixels", low), integer("max_pixels", high)
    if max_visual_tokens is not None:
        if max_visual_tokens < 1:
            raise UserError(f"max_visual_tokens is {max_visual_tokens}, must be at least 1")
        high = max_visual_tokens * (patch * merge) ** 2
        # Growing rounds up: with the floor near the cap, small pictures would grow beyond it.
        low = min(low, max(1, high // 4))
    return Processor(
        patch=patch,
        merge=merge,
        min_pixels=low,
        max_pixels=high,
        mean=triple("image_mean", _CLIP_MEAN) if normalised else (0.0, 0.0, 0.0),
        std=deviation() if normalised else (1.0, 1.0, 1.0),
    )


def read_config(folder: Path) -> tuple[Path, dict]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({error})") from error
        fields = fields.get("image_processor", fields) if isinstance(fields, dict) else None
        if isinstance(fields, dict):
            return path, fields
        raise UserError(f"{path} does not hold an image processor's settings")
    raise UserError(
        f"{folder / 'preprocessor_config.json'} not found: give a Hugging Face model folder with "
        "its image processor"
    )
