"""The backbone of a run: found by its name, and known again.

`config.backbone.path` is one of

    tiny_qwen3_vl                       a backbone that comes with the code, by its name
    /weights/Qwen3-VL-2B, ./weights     a Hugging Face folder
    Qwen/Qwen3-VL-2B-Instruct           a model of the Hub, its newest revision when a run begins
    Qwen/Qwen3-VL-2B-Instruct@REVISION  the same, of a branch, a tag or a commit

A run writes down what it began with (`Record`), since its checkpoints hold what trains only: it
then goes on, is scored and exported with the same files, wherever they lie by now.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jrm_jax import distributed
from jrm_jax.errors import UserError, one_line
from jrm_jax.model.tensor_files import INDEX_FILE, SINGLE_FILE, TensorFiles, indexed_names
from jrm_jax.run.workdir import CONFIG, read_config
from jrm_jax.shell.packaged import backbones as packaged

RECORD = "backbone.json"  # in a run's folder
TRAINING = "--config.backbone.path=FOLDER"  # how a folder is given to a command
READING = "--backbone=FOLDER (in Python: backbone=FOLDER)"
FILES = (  # that are read of a model, besides its weights
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.json", "chat_template.jinja", INDEX_FILE,
)  # fmt: skip
TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")
NOTES = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
WHOLE = 1 << 26  # weights up to which all of them are compared, and beyond a row of each tensor
REASONS = {  # of the Hub's library, by the kind of its exception
    "GatedRepoError": "it needs your consent on its page, and hf auth login",
    "RepositoryNotFoundError": "there is none, or it needs hf auth login",
    "RevisionNotFoundError": "it has no such revision",
    "IncompleteSnapshotError": "it is only in part in the cache, and the Hub cannot be reached",
    "LocalEntryNotFoundError": "it is not in the cache, and the Hub cannot be reached",
}
_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")
_PINNED = re.compile(r".+@[0-9a-f]{40}")


class Record(NamedTuple):
    """What a run began with.

    path: as in the config. from_run: a folder's way from the run's folder, '' for names. digest: of
    'config', 'tokenizer', and 'weights' unless they were random.
    """

    path: str
    from_run: str
    digest: dict[str, str]

    def as_text(self) -> str:
        """What RECORD holds."""
        return json.dumps(self._asdict(), indent=2) + "\n"


# Finding


def find_folder(
    path: str, how: str = TRAINING, places: Sequence[Path] = (), weights: bool = True
) -> Path:
    """The folder that a config's `path` means.

    Args:
        how: the flag that gives another one, for the message.
        places: folders to look for instead of `path` itself.
        weights: False: of a model of the Hub, get the small files only.

    Raises:
        UserError: there is none.
    """
    if path in packaged():
        return packaged()[path]
    for place in places or (Path(path),):
        if path and place.is_dir():
            return place
    hub = _HUB.fullmatch(path)
    if hub:
        return _from_hub(hub[1], hub[2], how, weights)
    parts = Path(path).parts
    if parts[-2:-1] == ("assets",) and parts[-1] in packaged():  # of a checkout that is gone
        return packaged()[parts[-1]]
    raise UserError(
        f"the backbone {path!r} is no folder here, no name ORG/NAME of the Hub, and not one that "
        f"comes with the code ({', '.join(packaged())}): give it as {how}"
    )


@functools.cache
def _from_hub(name: str, revision: str | None, how: str, weights: bool) -> Path:
    small = _download(name, revision, FILES, how)
    if not (small / "config.json").is_file():
        raise UserError(f"{name} of the Hub has no config.json ({small}): give it as {how}")
    if not weights:
        return small
    index = small / INDEX_FILE
    files = indexed_names(index) if index.is_file() else [SINGLE_FILE]
    # of the same commit, whatever has been uploaded since
    return _download(name, small.name, tuple(files), how)


def _download(name: str, revision: str | None, files: tuple[str, ...], how: str) -> Path:
    """The snapshot's folder in the cache of the Hub, whose name is its commit."""
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the network's libraries raise many kinds
        wanted = f"{name}@{revision}" if revision else name
        kinds = (kind.__name__ for kind in type(error).__mro__)
        reason = next((REASONS[kind] for kind in kinds if kind in REASONS), one_line(error))
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise UserError(
            f"the backbone {wanted!r} is no folder here; as a name of the Hub, {reason}{offline}: "
            f"give {how}, or get it where there is a network: hf download {name}"
        ) from error


def pin(path: str, how: str = TRAINING, places: Sequence[Path] = (), before: str = "") -> str:
    """`path` with the full commit, where it is a name of the Hub; others as they are.

    Args:
        places: as for `find_folder`.
        before: what the run had until now: a name without a revision stays at that commit.

    Raises:
        UserError: see `find_folder`.
    """
    hub = _HUB.fullmatch(path)
    here = any(place.is_dir() for place in places or (Path(path),))
    if path in packaged() or here or not hub:
        return path
    if not hub[2] and before.startswith(f"{path}@"):
        path = before
    return f"{hub[1]}@{find_folder(path, how).name}"


def located(config: ConfigDict, folder: Path | str) -> ConfigDict:
    """A copy of `config` whose backbone is `folder`."""
    found = config.copy_and_resolve_references()
    found.backbone.path = str(folder)
    return found


# Knowing again


class Found(NamedTuple):
    """config: names the backbone, with its commit; what the run writes down. folder: its files."""

    config: ConfigDict
    folder: Path
    record: Record


def for_training(config: ConfigDict, workdir: Path) -> Found:
    """The backbone of a run that begins or goes on in `workdir`; of several processes one gets it.

    Raises:
        UserError: there is none, or another than the run began with.
    """
    stored = read_config(workdir).backbone.path if (workdir / CONFIG).exists() else ""
    where, weights = places(path_of(config), workdir), not config.backbone.random
    path = distributed.from_leader(
        "backbone", lambda: pin(config.backbone.path, TRAINING, where, stored)
    )
    folder = find_folder(path, TRAINING, where, weights)
    named = folder in packaged().values() or _PINNED.fullmatch(path)
    way = "" if named else os.path.relpath(folder.resolve(), workdir.resolve())
    found = Record(path, way, digest(folder, weights))
    before = read_record(workdir)
    if before:
        check_same(before, found.digest, folder, TRAINING)
    elif stored and not same_name(path, stored):
        raise UserError(
            f"{workdir} belongs to a run with another backbone ({stored}, not {path}): give that "
            f"one as {TRAINING}, or another --workdir"
        )
    return Found(located(config, path), folder, found)


def check_name(config: ConfigDict, workdir: Path) -> None:
    """For a finished run, which needs no backbone any more: one that has its name passes.

    Raises:
        UserError: see `for_training`.
    """
    if not same_name(config.backbone.path, read_config(workdir).backbone.path):
        for_training(config, workdir)


def for_reading(config: ConfigDict, workdir: Path, given: str = "", weights: bool = False) -> Path:
    """The folder of the backbone of the run in `workdir`, to score, export or measure it.

    Args:
        config: that of the run.
        given: another place of it than the run's own, in the words of `config.backbone.path`.
        weights: whether they are read, too: not all of a model's is in the checkpoints.

    Raises:
        UserError: there is none, or another than the run began with.
    """
    path, before = config.backbone.path, read_record(workdir)
    if given:
        folder = find_folder(given, READING, weights=weights)
    else:
        folder = find_folder(path, READING, places(path, workdir, above=True), weights)
    if before:
        check_same(before, digest(folder, weights), folder, READING)
    return folder


def path_of(config: ConfigDict) -> str:
    """
    Raises:
        UserError: it is not set.
    """
    if not config.backbone.path:
        wanted = f" of {config.variant}" if config.get("variant") else ""
        raise UserError(
            f"config.backbone.path is not set: give the Hugging Face folder{wanted}, or its name "
            f"on the Hub, ORG/NAME, as {TRAINING}"
        )
    return config.backbone.path


def same_name(first: str, second: str) -> bool:
    """Whether two paths of configs mean the same, as far as their words tell."""

    def plain(path: str) -> str:
        parts = Path(path).parts
        known = parts[-2:-1] == ("assets",) and parts[-1] in packaged()
        return parts[-1] if known else path

    return plain(first) == plain(second) or second.startswith(f"{first}@")


def places(path: str, workdir: Path, above: bool = False) -> tuple[Path, ...]:
    """Where the folder `path` of a run's config may lie by now: where it was, as seen from the run,
    from here, or (`above`) from a folder that the run lies in."""
    here, before = Path(path), read_record(workdir)
    way = (workdir / before.from_run,) if before and before[:1] == (path,) and before[1] else ()
    if here.is_absolute():
        return (here, *way)
    return (*way, here, *(up / here for up in workdir.resolve().parents if above))


def read_record(workdir: Path) -> Record | None:
    """None: a run from before there were any.

    Raises:
        UserError: it is damaged.
    """
    try:
        found = Record(**json.loads((workdir / RECORD).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{workdir / RECORD} cannot be read ({error})") from error
    if not (isinstance(found.digest, dict) and all(isinstance(x, str) for x in found[:2])):
        raise UserError(f"{workdir / RECORD} cannot be read (its fields are of other types)")
    return found


def check_same(before: Record, found: dict[str, str], folder: Path, how: str) -> None:
    """
    Args:
        found: the `digest` of `folder`; what it lacks is not compared.

    Raises:
        UserError: it is not what the run began with.
    """
    known = {name: before.digest.get(name, found[name]) for name in found}
    differing = [name for name in found if found[name] != known[name]]
    if differing:
        raise UserError(
            f"{folder} is not the backbone that the run began with ({before.path}); they differ in "
            f"{' and '.join(differing)}: give that one as {how}"
        )


def digest(folder: Path, weights: bool = True) -> dict[str, str]:
    """Tells backbones from each other; {'config': ..., 'tokenizer': ..., 'weights': ...}.

    Beyond 64 million weights, tensors are compared by name, shape, type and the row in the middle.
    """
    found = {
        "config": hashed([_plain_config(folder / "config.json")]),
        "tokenizer": hashed(f.read_bytes() for n in TOKENIZER if (f := folder / n).is_file()),
    }
    if weights:
        found["weights"] = hashed(_sampled(TensorFiles(folder)))
    return found


def _plain_config(path: Path) -> bytes:
    """Without what programs note there about themselves. Whoever reads a bad file refuses it."""

    def plain(settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        return {name: plain(value) for name, value in settings.items() if name not in NOTES}

    text = path.read_bytes() if path.is_file() else b""
    try:
        return json.dumps(plain(json.loads(text)), sort_keys=True).encode()
    except ValueError:
        return text


def _sampled(files: TensorFiles) -> Iterator[bytes]:
    """However the tensors are spread over files."""
    described = {name: files.describe(name) for name in sorted(files.tensors)}
    whole = sum(math.prod(shape) for shape, _ in described.values()) <= WHOLE
    for name, (shape, kind) in described.items():
        yield json.dumps([name, shape, kind]).encode()
        slices = tuple((0, size) for size in shape)
        if shape and not whole:
            slices = ((shape[0] // 2, shape[0] // 2 + 1), *slices[1:])
        yield files.read(name, slices).tobytes()


def hashed(parts: Iterable[bytes]) -> str:
    """16 hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]
