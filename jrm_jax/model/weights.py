"""Backbone weights on disk: reading and writing safetensors of a Hugging Face folder.

The names, shapes and layouts are the table in tensors.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrm_jax.errors import UserError
from jrm_jax.model.config import BackboneConfig
from jrm_jax.model.tensor_files import INDEX_FILE, READABLE, SINGLE_FILE, Slices, TensorFiles
from jrm_jax.model.tensors import (
    EMBEDDING,
    HEAD,
    Leaf,
    Params,
    abstract_params,
    flatten,
    leaf_dtype,
    params_of,
    stays_float32,
    tensor_table,
)

__all__ = [
    "abstract_params", "as_stored", "load_params", "save_params", "tensor_table",
]  # fmt: skip

STORED_AS = {"float32": ("F32", np.dtype("float32")), "bfloat16": ("BF16", np.dtype(jnp.bfloat16))}
UNUSED = ("mtp.",)  # beginnings of names: heads that guess several tokens ahead


def as_stored(folder: Path, config: BackboneConfig) -> BackboneConfig:
    """`config`, without a language head if the folder holds none: for what only scores.

    Raises:
        UserError: the files are damaged or incomplete.
    """
    if not config.text.separate_head or HEAD in TensorFiles(folder).tensors:
        return config
    return dataclasses.replace(config, text=dataclasses.replace(config.text, headless=True))


def _check(files: TensorFiles, config: BackboneConfig, ignore: Collection[str]) -> None:
    """Raise one UserError naming every tensor that does not fit the table."""
    table = tensor_table(config)
    expected = {name: leaf.disk_shape for leaf in table.values() for name in leaf.names}
    missing = [name for name in expected if name not in files.tensors]
    tied_head = config.text.tie_embeddings and HEAD in files.tensors
    known = {*expected, *((HEAD,) if tied_head else ())}
    found = (name for name in files.tensors if not name.startswith((*UNUSED, *ignore)))
    unread = [files.key(name) for name in found if name not in known]
    shapes, types = [], []
    for name in (name for name in expected if name in files.tensors):
        shape, stored = files.describe(name)
        if shape != expected[name]:
            shapes.append(f"{files.key(name)} is {list(shape)}, needs {list(expected[name])}")
        if stored not in READABLE:
            types.append(f"{files.key(name)} is {stored}")
    untied = []
    if tied_head and not (missing or shapes or types) and not _equal(files, HEAD, EMBEDDING):
        untied = [f"{HEAD} differs from {files.key(EMBEDDING)}, but config.json ties them"]
    problems = [
        f"{title} ({len(names)}): {', '.join(names)}"
        for title, names in (
            ("missing", missing),
            ("not read", unread),
            ("wrong shape", shapes),
            ("not floating point", types),
            ("twice", files.repeated),
            ("head", untied),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"{files.folder}: the tensors do not fit its config.json. {'; '.join(problems)}"
        )


def _equal(files: TensorFiles, first: str, second: str, rows: int = 4096) -> bool:
    shape, _ = files.describe(first)
    if shape != files.describe(second)[0]:
        return False
    for start in range(0, shape[0], rows):
        part = ((start, min(start + rows, shape[0])), (0, shape[1]))
        if not np.array_equal(files.read(first, part), files.read(second, part)):
            return False
    return True


def _read_leaf(files: TensorFiles, leaf: Leaf, slices: Slices, dtype: Any) -> np.ndarray:
    """The part of a leaf given by (start, stop) per tree axis, from only that part of the file."""
    if not leaf.stacked:
        return np.ascontiguousarray(_read_tensor(files, leaf, leaf.names[0], slices), dtype)
    (first, last), inner = slices[0], slices[1:]
    part = np.empty([stop - start for start, stop in slices], dtype)
    for row, name in enumerate(leaf.names[first:last]):
        part[row] = _read_tensor(files, leaf, name, inner)
    return part


def _read_tensor(files: TensorFiles, leaf: Leaf, name: str, slices: Slices) -> np.ndarray:
    if leaf.kind == "patch":
        (frames, features, width), (_, channels, _, height, side) = slices, leaf.disk_shape
        block = files.read(name, (width, (0, channels), frames, (0, height), (0, side)))
        block = block.transpose(2, 1, 3, 4, 0).reshape(block.shape[2], -1, block.shape[0])
        return block[:, slice(*features)]
    if leaf.kind == "transpose":
        return files.read(name, slices[::-1]).T
    if leaf.kind == "conv":
        taps, channels = slices
        return files.read(name, (channels, (0, 1), taps))[:, 0].T
    return files.read(name, slices)


def load_params(
    folder: str | os.PathLike,
    config: BackboneConfig,
    shardings: Params | None = None,
    dtype: Any | Callable[[str], Any] = jnp.float32,
    ignore: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
    only: Collection[str] | None = None,
) -> Params:
    """Read {'backbone': ..., 'language_head': ...} from a Hugging Face folder.

    Args:
        folder: one model.safetensors, or shards with an index; names in either layout.
        config: of that folder.
        shardings: a tree that has a sharding at every path of `abstract_params(config)`. Each
            device's part is read from just that part of the files, one leaf at a time. None places
            whole leaves on the default device.
        dtype: of the leaves, or a function from a leaf's path to its dtype.
        ignore: beginnings of the names of further tensors to leave aside, such as 'score.'.
        progress: called after each leaf with the numbers read so far and in total.
        only: paths of the leaves to read; None reads all. All are checked.

    Raises:
        UserError: files absent, damaged or incomplete; or tensors missing, unread, of the wrong
            shape or not floating point, a tied head that differs: all in one message.
    """
    files = TensorFiles(Path(folder))
    _check(files, config, ignore)
    table = tensor_table(config)
    if only is not None:
        table = {path: leaf for path, leaf in table.items() if path in only}
    placed = None if shardings is None else flatten(shardings)
    total, done = sum(math.prod(leaf.shape) for leaf in table.values()), 0
    leaves = {}
    for path, leaf in table.items():
        leaves[path] = _place(files, leaf, leaf_dtype(dtype, path), placed and placed[path])
        done += math.prod(leaf.shape)
        if progress is not None:
            progress(done, total)
    return params_of(leaves)


def _place(files: TensorFiles, leaf: Leaf, dtype: np.dtype, sharding: Any) -> jax.Array:
    if sharding is None:
        return jnp.asarray(_read_leaf(files, leaf, tuple((0, n) for n in leaf.shape), dtype))
    parts: dict[Slices, np.ndarray] = {}  # devices that hold the same part read it once

    def part(index: tuple[slice, ...]) -> np.ndarray:
        slices = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        if slices not in parts:
            parts[slices] = _read_leaf(files, leaf, slices, dtype)
        return parts[slices]

    return jax.make_array_from_callback(leaf.shape, sharding, part, dtype=dtype)


def save_params(
    folder: str | os.PathLike,
    params: Params,
    config: BackboneConfig,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write the tree `load_params` returns as safetensors in the native Hugging Face layout.

    One tensor is in host memory at a time. A tied head is not written. Files appear under their
    final names only when all of them are complete.

    Args:
        folder: created if needed; must not hold weights yet.
        dtype: 'float32' or 'bfloat16', of the stored tensors; see `tensors.stays_float32`.
        max_shard_bytes: tensors are split over several files plus an index beyond this.
        extra: further tensors by name, such as 'score.weight' [R, D]; kept in float32.

    Raises:
        UserError: the folder holds weights already, or the tree does not fit `config` (every
            offending path is named).
    """
    folder = Path(folder)
    if dtype not in STORED_AS:
        raise UserError(f"cannot save weights as {dtype!r}; choose {' or '.join(STORED_AS)}")
    if any(folder.glob("model*.safetensors")) or (folder / INDEX_FILE).exists():
        raise UserError(f"{folder} holds weights already: give an empty folder")
    table, leaves = tensor_table(config), flatten(params)
    wrong = [f"{path} is missing" for path in table if path not in leaves]
    wrong += [f"{path} is unknown" for path in leaves if path not in table]
    wrong += [
        f"{path} is {list(leaves[path].shape)}, needs {list(leaf.shape)}"
        for path, leaf in table.items()
        if path in leaves and tuple(leaves[path].shape) != leaf.shape
    ]
    wrong += [
        f"{path} is spread over several processes (save from one)"
        for path, leaf in leaves.items()
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    ]
    if wrong:
        raise UserError(f"these parameters do not fit the model: {', '.join(wrong)}")

    tensors: list[tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]] = []
    for name, array in (extra or {}).items():
        tensors.append((name, "float32", tuple(array.shape), lambda array=array: array))
    for path, leaf in table.items():
        for row, name in enumerate(leaf.names):
            fetch = lambda x=leaves[path], leaf=leaf, row=row: _disk_tensor(x, leaf, row)  # noqa: E731
            stored = "float32" if stays_float32(path) else dtype
            tensors.append((name, stored, leaf.disk_shape, fetch))
    try:
        _write_shards(folder, list(_shards(tensors, max_shard_bytes)))
    except OSError as error:
        raise UserError(f"cannot write weights to {folder}: {error}") from error


def _write_shards(folder: Path, shards: list) -> None:
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = names if count > 1 else [SINGLE_FILE]
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("model*.part"):
        stale.unlink()
    size = sum(_write_file(folder / f"{n}.part", s) for n, s in zip(names, shards, strict=True))
    if count > 1:
        located = {row[0]: n for n, shard in zip(names, shards, strict=True) for row in shard}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(located.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name in names:
        os.replace(folder / f"{name}.part", folder / name)


def _disk_tensor(stack: Any, leaf: Leaf, row: int) -> np.ndarray:
    """One tensor of a leaf in the file's axis order (float, not yet contiguous)."""
    if leaf.stacked and isinstance(stack, jax.Array):
        stack = jax.lax.dynamic_index_in_dim(stack, row, 0, keepdims=False)
    elif leaf.stacked:
        stack = stack[row]
    tensor = np.asarray(stack)
    if leaf.kind == "patch":
        width, channels, frames, height, side = leaf.disk_shape
        return tensor.reshape(frames, channels, height, side, width).transpose(4, 1, 0, 2, 3)
    if leaf.kind == "conv":
        return tensor.T[:, None]
    return tensor.T if leaf.kind == "transpose" else tensor


def _byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * STORED_AS[dtype][1].itemsize


def _shards(tensors: list, limit: int) -> Iterator[list]:
    shard: list = []
    size = 0
    for tensor in tensors:
        count = _byte_count(tensor[1], tensor[2])
        if shard and size + count > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += count
    if shard:
        yield shard


def _write_file(path: Path, tensors: list) -> int:
    """Stream tensors into one safetensors file; returns the bytes of data.

    Format: header length (8 bytes, little endian), JSON header padded with blanks to a multiple of
    8, then the tensors in row-major order without gaps (github.com/huggingface/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape, _ in tensors:
        start, end = end, end + _byte_count(dtype, shape)
        stored = {"dtype": STORED_AS[dtype][0], "shape": shape, "data_offsets": [start, end]}
        header[name] = stored
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, dtype, _, fetch in tensors:
            tensor = np.ascontiguousarray(fetch(), STORED_AS[dtype][1])
            file.write(tensor.reshape(-1).view(np.uint8).data)
    return end
