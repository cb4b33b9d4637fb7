"""Pictures of a user's data: read once, decoded once, and refused by name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jrm_jax.data import picture_names
from jrm_jax.data.images import SizeError, open_image
from jrm_jax.data.labels import field_error
from jrm_jax.data.picture_names import name_or_bytes, read_named, short
from jrm_jax.errors import RecordError

MISSING, BROKEN = "picture that is missing", "picture that cannot be decoded"
UNFIT = "picture of a size that no model can take"
NAME = 256  # characters: a longer one is no name of a file


def check_image(data: bytes, name: str) -> None:
    """Decode a picture once, in full.

    Raises:
        RecordError: names the picture.
    """
    try:
        open_image(data)
    except SizeError as error:
        raise RecordError(f"{name} is {error}; crop or remove it", UNFIT) from error
    except ValueError as error:
        raise RecordError(f"{name} is {error}; replace or remove it", BROKEN) from error


def _content(root: Path, name: str) -> bytes:
    try:
        return read_named(name, root)
    except OSError as error:
        words = f"image file {short(str(root / name))} cannot be read ({error.strerror})"
        raise RecordError(words, MISSING) from error
    except ValueError as error:
        raise RecordError(f"picture {short(name)} is {error}", MISSING) from error


def content_digest(folder: Path, value: Any, where: str, field: str) -> str:
    """What tells pictures apart that may have several names: a digest of the encoded bytes.

    Raises:
        RecordError: there is no picture; it is not decoded here.
    """
    value = _given(value, where, field)
    try:
        data = _content(folder, value) if isinstance(value, str) else value
    except RecordError as error:
        raise field_error(where, field, str(error), error.kind) from error
    return hashlib.sha256(data).hexdigest()


def _given(value: Any, where: str, field: str) -> str | bytes:
    """A name or bytes."""
    value = name_or_bytes(value)
    if not isinstance(value, str | bytes) or not value:
        raise field_error(where, field, "holds no picture", MISSING)
    return value


def picture_name(value: Any) -> str:
    """What tells pictures apart before they are read: a file's name, or a digest of the picture."""
    value = name_or_bytes(value)
    if isinstance(value, str) and len(value) > NAME:
        value = value.encode()
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value or "")


class GroupPictures:
    """The pictures of one group, by name or as bytes; each is read and decoded once.

    Args:
        folder: where names lead.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._names: dict[str, bytes] = {}
        self._seen: set[bytes] = set()

    def is_file(self, name: str) -> bool:
        return picture_names.is_file(name, self._folder)

    def read(self, value: str | bytes) -> bytes:
        """Encoded bytes of a file's name, of the picture that a data: URI or base64 holds, or bytes
        themselves.

        Raises:
            RecordError: the file is missing, unreadable, truncated, or no picture; names it.
        """
        if isinstance(value, str):
            if value not in self._names:
                data = _content(self._folder, value)
                check_image(data, f"image file {short(str(self._folder / value))}")
                self._names[value] = data
            return self._names[value]
        digest = hashlib.sha256(value).digest()
        if digest not in self._seen:
            check_image(value, "the picture")
            self._seen.add(digest)
        return value

    def __call__(self, value: Any, where: str, field: str) -> bytes:
        """The same, also of {'bytes', 'path'} (a Hugging Face column).

        Raises:
            RecordError: there is none, or it cannot be read; names file, row and field.
        """
        value = _given(value, where, field)
        try:
            return self.read(value)
        except RecordError as error:
            raise field_error(where, field, str(error), error.kind) from error
