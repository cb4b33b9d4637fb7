"""How large each example is: tokens and patches, measured once and cached.

Letters: n examples of a data set.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jrm_jax.data.schema import PreferenceExample, from_record
from jrm_jax.errors import UserError
from jrm_jax.shell import disk, user_cache
from jrm_jax.shell.terminal import track

SIZES_VERSION = 2  # raise it when what is measured changes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What every example needs; int32 arrays [n].

    candidates K; images I; patches: of the largest image; prompt: tokens; candidate: tokens of the
    longest candidate up to <|reward|>; answer: the same with its critique; critique: targets of the
    longest critique, its <|im_end|> included (0 = none). What the group holds, all parts together:
    all_patches, of its pictures; all_candidate and all_answer: tokens of its candidates.
    """

    candidates: np.ndarray
    images: np.ndarray
    patches: np.ndarray
    prompt: np.ndarray
    candidate: np.ndarray
    answer: np.ndarray
    critique: np.ndarray
    all_patches: np.ndarray
    all_candidate: np.ndarray
    all_answer: np.ndarray

    def __len__(self) -> int:
        return len(self.candidates)

    def rows(self) -> np.ndarray:
        """[n, 10], columns in the order of `SIZE_NAMES`."""
        return np.stack([getattr(self, name) for name in SIZE_NAMES], axis=1)

    @classmethod
    def from_rows(cls, rows: Any) -> Sizes:
        table = np.asarray(rows, np.int32).reshape(-1, len(SIZE_NAMES))
        return cls(*(np.ascontiguousarray(column) for column in table.T))


SIZE_NAMES = tuple(field.name for field in dataclasses.fields(Sizes))


def as_example(item: Any) -> PreferenceExample:
    """Data sets may hold records (of a prepared set) or examples."""
    return item if isinstance(item, PreferenceExample) else from_record(item)


def measure(
    dataset: Sequence[Any],
    size_of: Callable[[PreferenceExample], tuple[int, ...]],
    key: str,
    *,
    name: str,
    folder: str | Path | None = None,
    fallback: str | Path | None = None,
) -> Sizes:
    """Sizes of every example, from the cache where it was measured before.

    Args:
        dataset: random access to records or examples.
        size_of: example -> the numbers of `SIZE_NAMES`; `Encoder.sizes`.
        key: everything the sizes depend on besides the data; `Encoder.key`.
        name: of the data set and split, for messages and for the cache file.
        folder: where the data set lies; the cache goes beside it, or into `fallback` (default: the
            user's cache folder) where that cannot be written. None: no cache.

    Raises:
        UserError: a picture that cannot be read or a size out of range; names the example.
    """
    paths = [] if folder is None else _cache_paths(dataset, key, name, Path(folder), fallback)
    for path in paths:
        rows = _read_cache(path, len(dataset))
        if rows is not None:
            return Sizes.from_rows(rows)
    rows = np.zeros((len(dataset), len(SIZE_NAMES)), np.int32)
    for index in track(range(len(dataset)), f"measuring {name}"):
        example = as_example(dataset[index])
        try:
            rows[index] = size_of(example)
        except ValueError as error:  # UserError is one
            raise UserError(f"{name}: example {index} ({example.id}): {error}") from error
    for path in paths:
        if write_cache(path, lambda file: np.savez_compressed(file, rows=rows)):
            break
    return Sizes.from_rows(rows)


def _cache_paths(
    dataset: Sequence[Any], key: str, name: str, folder: Path, fallback: str | Path | None
) -> list[Path]:
    """Candidates in order. The first and last example are part of the name: a data set that was
    made anew at the same place is measured anew."""
    digest = hashlib.sha256(f"{SIZES_VERSION}/{key}/{len(dataset)}".encode())
    for index in {0, len(dataset) - 1} if len(dataset) else ():
        example = as_example(dataset[index])
        texts = [part for part in example.prompt if hasattr(part, "text")]
        critiques = [candidate.critique for candidate in example.candidates]
        digest.update(repr((example.id, texts, critiques)).encode())
    plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[-60:]
    return cache_places(folder, f"sizes-{plain}-{digest.hexdigest()[:16]}.npz", fallback)


def cache_places(folder: Path, file: str, fallback: str | Path | None = None) -> list[Path]:
    """Where a file about the data set in `folder` may lie: in it, or in the user's cache folder."""
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    if fallback is None:
        fallback = user_cache.folder("sizes")
    return [folder / file, *([Path(fallback) / place / file] if fallback is not None else [])]


def _read_cache(path: Path, count: int) -> np.ndarray | None:
    try:
        with np.load(path) as content:
            rows = content["rows"]
    except Exception:  # absent, half written by an older program, or no npz at all: measure anew
        return None
    return rows if rows.shape == (count, len(SIZE_NAMES)) else None


def write_cache(path: Path, content: str | Callable[[BinaryIO], Any]) -> bool:
    """See `disk.write_whole`; False where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_whole(path, content)
    except OSError:
        return False
    return True
