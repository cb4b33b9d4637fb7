"""Pictures of a request, before anything is allocated for their pixels."""

from __future__ import annotations

from typing import NamedTuple

from jrm_jax.data.images import SizeError, image_size
from jrm_jax.data.picture_names import decode_base64, inline_picture
from jrm_jax.data.processor import Processor
from jrm_jax.service.refusals import Refused

# How files of the formats begin that Pillow may be asked to open. Its other readers are many, and
# what comes over a network should not choose among them.
FORMATS = "PNG, JPEG or WebP"
_BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


class Fault(NamedTuple):
    """Why one candidate has no number. `code`: 'source', 'picture', 'group' or 'not_finite'."""

    code: str
    message: str


def from_text(text: str) -> bytes | Fault:
    """The file that base64 or a data: URI holds. Never a path, never an address."""
    try:
        found = inline_picture(text) if text[:5].lower() == "data:" else None
        return decode_base64(text.encode("ascii")) if found is None else found
    except (ValueError, UnicodeError) as error:
        words = "characters that are not base64" if isinstance(error, UnicodeError) else error
        return Fault("picture", f"give base64 of a picture's file, or a data: URI: {words}")


def decoded_bytes(picture: bytes | Fault, max_pixels: int, processor: Processor) -> int:
    """What a picture takes, from its first bytes: its pixels, 3 bytes each, or its patches where
    the model's size is larger. 0 where it will not be decoded.

    Raises:
        Refused: as `check`.
    """
    if check(picture, max_pixels):
        return 0
    width, height = image_size(picture)
    rows, columns = processor.grid(height, width)
    return max(3 * width * height, rows * columns * processor.features)


def check(picture: bytes | Fault, max_pixels: int) -> Fault | None:
    """What is wrong with a picture, from its first bytes.

    Raises:
        Refused: more pixels than a picture may have, or a shape that no processor takes.
    """
    if isinstance(picture, Fault):
        return picture
    webp = picture[:4] == b"RIFF" and picture[8:12] == b"WEBP"
    if not (webp or picture.startswith(_BEGINNINGS)):
        return Fault("picture", f"not a picture's file: {FORMATS}")
    try:
        width, height = image_size(picture)
    except SizeError as error:
        raise Refused("picture_size", str(error)) from error
    except ValueError as error:
        return Fault("picture", str(error))
    if width * height > max_pixels:
        words = f"a picture of {width} x {height} pixels; at most {max_pixels:,} pixels"
        raise Refused("picture_size", words)
    return None
