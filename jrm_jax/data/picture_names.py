"""What a text can say about a picture: the picture itself, as a data: URI or base64; or where it
lies."""

from __future__ import annotations

import base64
import binascii
import os
import urllib.parse
from pathlib import Path
from typing import Any

# Pillow reads them all; what a file is called matters only where text might be meant
_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif",
    ".heic", ".jp2", ".ppm", ".pgm",
)  # fmt: skip
# How base64 of a PNG, JPEG, GIF, WebP (RIFF), TIFF and BMP begins; with a length that no name has
_BEGINNINGS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkqAA", "TU0AKg", "Qk0")
_LEAST = 256  # characters


def inline_picture(text: str) -> bytes | None:
    """The encoded picture that a text holds; None where it is a name.

    Raises:
        ValueError: a data: URI that cannot be decoded.
    """
    if text[:5].lower() == "data:":
        head, comma, body = text.partition(",")
        if not comma:
            raise ValueError("a data: URI without a comma")
        body = urllib.parse.unquote_to_bytes(body)
        if not head.lower().endswith(";base64"):
            return body
        return decode_base64(body)
    if len(text) >= _LEAST and text.startswith(_BEGINNINGS):
        try:
            return decode_base64(text.encode())
        except ValueError:
            return None  # after all a name
    return None


def decode_base64(body: bytes) -> bytes:
    body = b"".join(body.split()).translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(body + b"=" * (-len(body) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"base64 that cannot be decoded ({error})") from error


def name_or_bytes(value: Any) -> Any:
    """Of {'bytes', 'path'}, as a Hugging Face image column comes: the bytes, else the name; None
    where it has neither. Anything else as it is."""
    if isinstance(value, dict) and value and set(value) <= {"bytes", "path"}:
        return value.get("bytes") or value.get("path")
    return value


def read_named(name: str, folder: Path = Path()) -> bytes:
    """What a text names, a file in `folder`, or holds.

    Raises:
        OSError: no such file, or one that cannot be read. ValueError: it names no file.
    """
    data = inline_picture(name)
    return path_of(name, folder).read_bytes() if data is None else data


def path_of(name: str, folder: Path = Path()) -> Path:
    """Where the picture of that name lies, or would lie. A backslash in it leads where / leads, as
    Windows writes names, unless there is a file of just that name.

    Raises:
        ValueError: it names no file.
    """
    if name[:8].lower().startswith(("http://", "https://")):
        raise ValueError("an address on the web: download it, and give the file's name")
    if name[:7].lower() == "file://":
        name = urllib.parse.unquote(name[7:])
    if "\\" in name and not os.path.isfile(folder / name):
        name = name.replace("\\", "/")
    return folder / name


def is_file(name: str, folder: Path = Path()) -> bool:
    """Whether a file of that name is there; False of any text that is no name."""
    try:
        return os.path.isfile(path_of(name, folder))
    except ValueError:
        return False


def ends_like_picture(text: str) -> bool:
    """Whether a text ends like the name of a picture, or is one as a data: URI."""
    return text[-9:].strip().lower().endswith(_ENDINGS) or text[:11].lower() == "data:image/"


def short(name: str) -> str:
    """A name for messages: cut where it is a picture, or longer than a file's name can be."""
    if len(name) < _LEAST and name[:5].lower() != "data:":
        return name.encode(errors="backslashreplace").decode()
    return f"{name[:40]!a}... ({len(name):,} characters)"
