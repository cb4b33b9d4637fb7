"""Encoded pictures to pixels: one rule, wherever a picture enters.

Letters: h, w pixels. Pictures are turned upright by their EXIF tag, transparency is laid on white
and deep modes are scaled to 8 bits (`to_rgb`): what a person saw who judged them.
"""

from __future__ import annotations

import io
import warnings
import zlib

import numpy as np

MAX_ASPECT = 200
MAX_PIXELS = 100_000_000  # beyond it a small file may be a decompression bomb
_PNG = b"\x89PNG\r\n\x1a\n"
_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # chunks of a PNG that make the pixels
_ORIENTATION = 0x0112  # EXIF tag
# What turns a picture with that tag upright, as Pillow's `Transpose` numbers it
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_BITS = 258  # TIFF tag: bits of each channel
# Pillow's own words on a broken file: what matters of them is an error here, the rest does no harm
warnings.filterwarnings("ignore", module=r"PIL\.")
_RANGES = {"I": (2.0**8, 2.0**16, 2.0**32), "F": (1.0, 2.0**8, 2.0**16, 2.0**32)}


def decode(data: bytes) -> np.ndarray:
    """Encoded picture -> [h, w, 3] uint8, as `open_image` shows it.

    Raises:
        ValueError: not a picture, truncated, or unreasonably large.
    """
    pixels = _plain_png(data)
    return np.asarray(open_image(data)) if pixels is None else pixels


def _plain_png(data: bytes) -> np.ndarray | None:
    """Pixels of the plainest kind of PNG, which the built-in world writes; None for any other.

    Only header, data and end, 8-bit RGB, no interlacing, no row filters. Takes a third of Pillow's
    time for a small picture. Whatever is odd or broken is left to Pillow.
    """
    if data[:8] != _PNG or data[12:16] != b"IHDR" or data[24:29] != b"\x08\x02\x00\x00\x00":
        return None
    width, height = image_size(data)
    at, kind, stream = 8, b"", []
    while kind != b"IEND":
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if kind not in (b"IHDR", b"IDAT", b"IEND") or end > len(data):
            return None
        if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return None
        if kind == b"IDAT":
            stream.append(data[at + 8 : end - 4])
        at = end
    size = height * (1 + 3 * width)
    try:
        raw = zlib.decompressobj().decompress(b"".join(stream), size)
    except zlib.error:
        return None
    if len(raw) != size:
        return None
    rows = np.frombuffer(raw, np.uint8).reshape(height, 1 + 3 * width)
    return None if rows[:, 0].any() else rows[:, 1:].reshape(height, width, 3)


def open_image(data: bytes):
    """Encoded picture -> upright, opaque RGB Pillow image, decoded in full.

    Raises:
        ValueError: not a picture, truncated, or (`SizeError`) of a size that no processor takes.
    """
    import PIL.Image

    size = image_size(data)
    try:
        image = PIL.Image.open(io.BytesIO(data))
        if image.size != size:  # before it is decoded: room was made for that size
            raise ValueError(f"it has two headers, of {size} and of {image.size} pixels")
        return to_rgb(image)
    except Exception as error:  # Pillow's readers raise many kinds for broken files
        bare = _bare_png(data)
        if bare != data:
            return open_image(bare)
        raise ValueError(f"not a readable image ({_one_line(error)})") from error


def _bare_png(data: bytes) -> bytes:
    """A PNG without the chunks that its pixels do not need, whose damage does them no harm; other
    data as it is."""
    if data[:8] != _PNG:
        return data
    at, kept, kind = 8, [_PNG], b""
    while kind != b"IEND" and at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        kept += [data[at:end]] if kind in _NEEDED else []
        at = end
    return b"".join(kept) if kind == b"IEND" else data


def to_rgb(image):
    """Any Pillow image -> upright, opaque, 8-bit RGB; the one rule for every picture, and the
    exported PyTorch file's own copy of it follows this one.

    Turned by its EXIF tag (one that cannot be read is ignored), deep modes scaled to 8 bits
    (`eight_bits`), transparency laid on white.
    """
    import PIL.Image

    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # a broken tag of a good picture; Pillow raises many kinds
        turn = None
    if turn is not None:
        image = image.transpose(turn)
    if is_deep(image.mode):
        image = PIL.Image.fromarray(eight_bits(np.asarray(image), image.mode))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def is_deep(mode: str) -> bool:
    """Whether a Pillow mode has more than 8 bits a channel ('I;16...', 'I', 'F')."""
    return mode[0] in "IF"


def has_deep_channels(data: bytes) -> bool:
    """Whether a good picture's file has more than 8 bits a channel, from its header."""
    if data[:8] == _PNG:
        return data[24] > 8
    if data[:2] == b"\xff\xd8":  # JPEG
        return False
    import PIL.Image

    with PIL.Image.open(io.BytesIO(data)) as image:
        bits = getattr(image, "tag_v2", {}).get(_BITS, 8)
        return is_deep(image.mode) or max(bits if isinstance(bits, tuple) else (bits,)) > 8


def eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Values of a deep mode -> uint8 of the same shape: value * 256 / range, rounded down.

    The range of 16-bit modes is 65536: the upper byte is kept, as Pillow does with 16-bit colour.
    'I' and 'F' do not say theirs: it is the first of 1 ('F' alone), 256, 65536 and 2^32 that holds
    the largest value; of 'F' half of it, since resizing makes values that are a little beyond
    white. What is below zero, or no number, is black.
    """
    values = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    ranges, room = _RANGES.get(mode, (2.0**16,)), 2.0 if mode == "F" else 1.0
    span = next((r for r in ranges if values.max(initial=0.0) <= r * room), ranges[-1])
    return np.clip(values * (256.0 / span), 0.0, 255.0).astype(np.uint8)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) from the header, before EXIF orientation.

    Raises:
        ValueError: the header cannot be read, or (`SizeError`) no processor takes that size.
    """
    if data[:8] == _PNG and data[12:16] == b"IHDR" and len(data) > 24:
        size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    else:
        import PIL.Image

        try:
            with PIL.Image.open(io.BytesIO(data)) as image:
                size = image.size
        except Exception as error:  # as in open_image
            raise ValueError(f"not a readable image ({_one_line(error)})") from error
    check_size(*size)
    return size


class SizeError(ValueError):
    """A picture that cannot be encoded, whatever it shows."""


def check_size(width: int, height: int) -> None:
    """
    Raises:
        SizeError: no area, one side more than 200 times the other, or unreasonably large.
    """
    size = f"a picture of {width} x {height} pixels"
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise SizeError(f"{size}: one side may be at most {MAX_ASPECT} times the other")
    if width * height > MAX_PIXELS:
        raise SizeError(f"{size}; at most {MAX_PIXELS:,} pixels")


def _one_line(error: BaseException) -> str:
    if type(error).__name__ == "UnidentifiedImageError":  # its words name a buffer of ours
        return "its format is none that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__
