"""Prepared data sets on disk: TFDS folders in array_record format, without TensorFlow.

A folder holds the splits' shards, TFDS's own description, and `jrm_jax.json` with the reward
dimensions and counts. A row is {'id', 'record' (JSON), 'images' (encoded bytes)}, see
`schema.to_record`. Folders are written under another name and renamed when they are complete, so a
folder that exists is whole.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.data.schema import PreferenceExample, to_record
from jrm_jax.errors import UserError
from jrm_jax.shell import disk

MANIFEST = "jrm_jax.json"
SHARD_EXAMPLES = 4096
SHARD_BYTES = 256 * 2**20
_FORMAT = "array_record"
# Pictures are compressed already: zstd, array_record's own choice, takes 5 s of processor time for
# a gigabyte of JPEG and saves 2 % of it; snappy takes 0.9 s and makes texts smaller. The hashes in
# the file find damage, whatever compresses it.
_WRITTEN = "group_size:1,snappy"
_SHARD_NAME = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"


@functools.cache
def _features():
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "record": tfds.features.Text(),
            "images": tfds.features.Sequence(tfds.features.Text()),
        }
    )


def serialize(record: Mapping[str, Any]) -> bytes:
    """A row of a shard.

    The same bytes every time: protobuf's maps come in an order of their own otherwise.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example.FromString(_features().serialize_example(record))
    return message.SerializeToString(deterministic=True)


@contextlib.contextmanager
def _writer_errors() -> Iterator[None]:
    """array_record's writer raises RuntimeError where the disk is full."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


class Shards:
    """Writes the shards of a folder, one file after another for each split.

    done: {split: [(examples, bytes) of each complete shard]}; shards are added to what it holds.
    A shard file that is not listed there is half-written, and is overwritten.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        done: Mapping[str, Sequence] | None = None,
        examples: int = SHARD_EXAMPLES,
    ):
        self.folder, self.name, self.examples = folder, name, examples
        self.done = {split: [tuple(s) for s in shards] for split, shards in (done or {}).items()}
        self._open: dict[str, list] = {}  # split: [writer, examples, bytes]

    def add(self, split: str, data: bytes) -> None:
        """A row, see `serialize`."""
        from array_record.python.array_record_module import ArrayRecordWriter

        if split not in self._open:
            number = len(self.done.get(split, ()))
            path = self.folder / f"{self.name}-{split}.{_FORMAT}-{number:05d}"
            path.unlink(missing_ok=True)
            self._open[split] = [ArrayRecordWriter(str(path), _WRITTEN), 0, 0]
        entry = self._open[split]
        with _writer_errors():
            entry[0].write(data)
        entry[1] += 1
        entry[2] += len(data)

    @property
    def full(self) -> bool:
        """The open files together hold a shard's worth: time to `close_files`."""
        examples, size = (sum(entry[i] for entry in self._open.values()) for i in (1, 2))
        return examples >= self.examples or size >= SHARD_BYTES

    def close_files(self) -> None:
        """Complete the open shards; they are on the disk afterwards."""
        for split, (writer, examples, size) in self._open.items():
            number = len(self.done.get(split, ()))
            with _writer_errors():
                writer.close()
            with (self.folder / f"{self.name}-{split}.{_FORMAT}-{number:05d}").open("rb") as file:
                os.fsync(file.fileno())
            self.done.setdefault(split, []).append((examples, size))
        self._open = {}

    def abandon(self) -> None:
        """Close what is open without counting it."""
        for writer, *_ in self._open.values():
            with contextlib.suppress(RuntimeError):  # nothing of it is wanted
                writer.close()
        self._open = {}

    @property
    def counts(self) -> dict[str, int]:
        """Examples in complete shards per split."""
        return {split: sum(n for n, _ in shards) for split, shards in self.done.items()}

    def describe(self, dimensions: Sequence[str], manifest: Mapping[str, Any]) -> None:
        """Write TFDS's description and ours; the folder can be read afterwards."""
        splits = {
            split: ([n for n, _ in shards], sum(size for _, size in shards))
            for split, shards in self.done.items()
        }
        _describe(self.folder, self.name, splits)
        content = {"dimensions": list(dimensions), "counts": self.counts, **manifest}
        (self.folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def _describe(folder: Path, name: str, splits: Mapping[str, tuple[Sequence[int], int]]) -> None:
    """TFDS's own description. splits: {split: (examples of each shard, bytes)}."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming

    identity = tfds.core.DatasetIdentity(
        name=name, version="1.0.0", data_dir=str(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=_features(),
        description="Groups of candidates with preferences and critiques, for jrm_jax.",
    )
    info.set_file_format(_FORMAT)
    found = []
    for split, (lengths, size) in splits.items():
        template = naming.ShardedFileTemplate(
            dataset_name=name,
            data_dir=str(folder),
            split=split,
            filetype_suffix=_FORMAT,
            template=_SHARD_NAME,
        )
        found.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
            )
        )
    info.set_splits(tfds.core.splits.SplitDict(found))
    info.write_to_directory(str(folder))


class Existing(NamedTuple):
    """A prepared data set to which splits are to be added. name: TFDS's, part of file names."""

    path: Path
    name: str
    dimensions: tuple[str, ...]


def check_splits(path: Path, splits: Sequence[str]) -> Existing | None:
    """The data set that lies there; None where nothing does.

    Raises:
        UserError: something else lies there, or a data set that has one of these splits.
    """
    if not path.exists():
        return None
    try:
        manifest, name = read_manifest(path), _builder(path).info.name
    except UserError as error:
        raise UserError(f"{path} exists already: choose another --out ({error})") from error
    there = [split for split in splits if split in manifest["counts"]]
    if there:
        words = f"{path} exists already and has the split {there[0]!r}"
        raise UserError(f"{words}: remove it, or choose another --out or --split")
    return Existing(path, name, tuple(manifest["dimensions"]))


def add_splits(path: Path, folder: Path, files: Mapping[str, str]) -> None:
    """Move the splits of one data set into another; `path` is whole at any moment, and what was
    begun can be done again.

    Args:
        files: what else of `folder` is to move, with its new name.
    """
    new, old = read_manifest(folder), read_manifest(path)
    splits = {}
    for place in (path, folder):
        info = _builder(place).info
        splits |= {s.name: (s.shard_lengths, s.num_bytes) for s in info.splits.values()}
    for shard in sorted(folder.glob(f"*.{_FORMAT}-*")):
        os.replace(shard, path / shard.name)
    for name, moved in files.items():
        os.replace(folder / name, path / moved)
    _describe(folder, info.name, splits)
    os.replace(folder / "dataset_info.json", path / "dataset_info.json")
    old["counts"] |= new["counts"]
    old.setdefault("added", []).append(new)
    (folder / MANIFEST).write_text(json.dumps(old, indent=2) + "\n")
    os.replace(folder / MANIFEST, path / MANIFEST)
    shutil.rmtree(folder)


def check_absent(path: Path) -> None:
    """
    Raises:
        UserError: the folder exists.
    """
    if path.exists():
        raise UserError(f"{path} exists already: remove it or choose another --out")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """An OSError while writing becomes one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} could not be written: {disk.explain(error, path)}") from error


def write_dataset(
    path: str | Path,
    splits: Mapping[str, Iterable[PreferenceExample | dict]],
    dimensions: Sequence[str],
    name: str = "preferences",
    manifest: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Stream examples (or their records) into a new data set; returns the number per split.

    Raises:
        UserError: the folder exists, a split has no example, or the disk is full.
    """
    path = Path(path)
    check_absent(path)
    temporary = disk.half_made(path)
    shards = Shards(temporary, name)
    try:
        with disk_errors(path):
            temporary.mkdir(parents=True)
            for split, examples in splits.items():
                for example in examples:
                    record = example if isinstance(example, dict) else to_record(example)
                    shards.add(split, serialize(record))
                    if shards.full:
                        shards.close_files()
                shards.close_files()
                if not shards.counts.get(split):
                    raise UserError(f"{path}: split {split!r} has no example")
            shards.describe(dimensions, manifest or {})
            temporary.rename(path)
    except BaseException:
        shards.abandon()
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return shards.counts


def read_manifest(path: str | Path) -> dict[str, Any]:
    """`jrm_jax.json` of a prepared data set: dimensions, counts, and where it came from.

    Raises:
        UserError: no prepared data set there.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such data folder; make one with python -m jrm_jax.data.builders, or leave "
            "config.data.path unset for the built-in world"
        )
    try:
        return json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no prepared data set ({MANIFEST}: {error}); make one with "
            "python -m jrm_jax.data.builders"
        ) from error


def check_dimensions(wanted: Sequence[str], folders: Sequence[str | Path]) -> None:
    """
    Raises:
        UserError: a reward dimension of the run that no data set has.
    """
    manifests = [read_manifest(folder) for folder in folders]
    found = list(dict.fromkeys(name for m in manifests for name in m.get("dimensions", wanted)))
    for name in wanted:
        if name not in found:
            raise UserError(
                f"reward dimension {name!r} is not in the data, which has {', '.join(found)}"
            )


def open_dataset(path: str | Path) -> dict[str, Any]:
    """{split: random access to records}, see `schema.from_record`.

    Raises:
        UserError: no prepared data set there, or one that cannot be read.
    """
    read_manifest(path)
    try:
        return dict(_builder(path).as_data_source())
    except UserError:
        raise
    except Exception as error:  # as in `_builder`
        raise _unreadable(path, error) from error


def _builder(path: str | Path) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(str(path))
    except Exception as error:  # tfds raises many kinds, all meaning the same here
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> UserError:
    detail = " ".join(str(error).split())[:200]
    return UserError(f"{path} cannot be read as a TFDS data set ({detail})")
