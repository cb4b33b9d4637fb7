"""The safetensors files of a Hugging Face folder, and the tensors in them by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jrm_jax.errors import UserError
from jrm_jax.model.tensors import TEXT, VISION

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
READABLE = ("F64", "F32", "F16", "BF16")
WHOLE = ("BOOL", *(f"{sign}{bits}" for sign in "IU" for bits in (8, 16, 32, 64)))

Slices = tuple[tuple[int, int], ...]


class TensorFiles:
    """The tensors of a folder under their native names, whatever layout they are stored in.

    Raises:
        UserError: files are absent or damaged, or hold numbers of a type that NumPy has not (FP8).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, tuple[Any, str]] = {}
        self.repeated: list[str] = []
        for path in weight_files(folder):
            try:
                handle = safe_open(path, framework="np")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} cannot be read ({error}): the file is damaged or incomplete, "
                    "fetch it again"
                ) from error
            for key in handle.keys():
                name = _native_name(key)
                if name in self.tensors:
                    self.repeated.append(f"{self.tensors[name][1]} and {key}")
                self.tensors[name] = (handle, key)
        kinds = {name: self.describe(name)[1] for name in self.tensors}
        strange = [name for name, kind in kinds.items() if kind not in (*READABLE, *WHOLE)]
        if strange:
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            raise UserError(
                f"{folder}: {self.key(strange[0])}{more} are stored as {kinds[strange[0]]}, which "
                "is not read here: give the folder of the model in bfloat16, float16 or float32"
            )

    def key(self, name: str) -> str:
        return self.tensors[name][1]

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and stored type, from the file's header."""
        handle, key = self.tensors[name]
        part = handle.get_slice(key)
        return tuple(part.get_shape()), part.get_dtype()

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """The given (start, stop) of each axis; nothing else is copied from the file."""
        handle, key = self.tensors[name]
        return handle.get_slice(key)[tuple(slice(*bounds) for bounds in slices)]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that its index names.

    Raises:
        UserError: there are none, or not all of them.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not index.is_file():
        hint = "give a Hugging Face model folder"
        if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
            hint = "only PyTorch pickles were found, save the model as safetensors first"
        raise UserError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: {hint}")
    names = indexed_names(index)
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder} is incomplete: {INDEX_FILE} names {', '.join(absent)}")
    return [folder / name for name in names]


def has_weights(folder: Path) -> bool:
    """Whether a folder holds all files of its weights."""
    try:
        return bool(weight_files(folder))
    except UserError:
        return False


def indexed_names(index: Path) -> list[str]:
    """
    Raises:
        UserError: the index is damaged.
    """
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise UserError(f"{index} is not a valid safetensors index ({error!r})") from error


def _native_name(key: str) -> str:
    """Older files have the tower at the top and the decoder directly under 'model.'."""
    if key.startswith("visual."):
        return f"model.{key}"
    if key.startswith("model.") and not key.startswith((TEXT, VISION)):
        return TEXT + key.removeprefix("model.")
    return key
