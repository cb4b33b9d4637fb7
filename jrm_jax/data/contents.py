"""What the splits of a data set hold: a digest of every record, and what can be learnt from them.

It is found in one pass over the records and kept beside the data set, with marks of the files that
it was found in: it travels with them, and is not believed where other files lie at the same place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jrm_jax.data.sizes import cache_places, write_cache
from jrm_jax.data.stated import teacher_scores
from jrm_jax.errors import UserError
from jrm_jax.shell.terminal import track

VERSION = 1  # raise it when something else is counted or digested
MARK = 4096  # bytes


class Contents(NamedTuple):
    """Of one split.

    digest: of all records in their order, without their ids. labels: groups with a label, by reward
    dimension. critiques: groups with a critique.
    """

    groups: int
    digest: str
    labels: dict[str, int]
    critiques: int


class Stated(NamedTuple):
    """The scores that critiques state, by reward dimension. groups: in which two or more do: those
    that `config.loss.teacher_weight` learns from. spans: points from the 1st to the 99th percentile
    of these groups' scores; 0 without any."""

    groups: dict[str, int]
    spans: dict[str, float]


def read_contents(
    folder: Path, split: str, records: Sequence[Any], fallback: Path | None = None
) -> Contents:
    """Of a prepared data set's split; `fallback`: as of `sizes.measure`.

    Raises:
        UserError: a record that cannot be read.
    """
    found = _kept(folder, split, records, "contents", lambda: _count(folder, split, records),
                  fallback=fallback)  # fmt: skip
    return Contents(*found)


def find_lessons(
    folder: Path,
    split: str,
    records: Sequence[Any],
    dimensions: Sequence[str],
    fallback: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices, [m] int64 each, of the records with a label in one of these reward dimensions, and
    of those with a critique. All are read once, as by `read_contents`."""

    def find() -> tuple[dict[str, list[int]], list[int]]:
        labels, critiques = {}, []
        for index in track(range(len(records)), "which groups have labels"):
            fields = json.loads(records[index]["record"])
            for name in _labelled(fields):
                labels.setdefault(name, []).append(index)
            if any(candidate[1] for candidate in fields["candidates"]):
                critiques.append(index)
        return labels, critiques

    labels, critiques = _kept(folder, split, records, "lessons", find, fallback=fallback)
    every = [index for name in dimensions for index in labels.get(name, ())]
    return np.unique(np.array(every, np.int64)), np.array(critiques, np.int64)


def find_stated(
    folder: Path,
    split: str,
    records: Sequence[Any],
    dimensions: Sequence[str],
    mix: Mapping[str, float],
    fallback: Path | None = None,
) -> Stated:
    """What the critiques of a split state; all are read once for these arguments.

    Args:
        mix: as of `stated.teacher_scores`.
    """

    def find() -> Stated:
        groups = dict.fromkeys(dimensions, 0)
        every: dict[str, list[float]] = {name: [] for name in dimensions}
        for index in track(range(len(records)), "which critiques state scores"):
            candidates = json.loads(records[index]["record"])["candidates"]
            said = [critique if marked else None for _, critique, marked, *_ in candidates]
            scores_KR = np.asarray(teacher_scores(said, dimensions, mix))
            for name, scores_K in zip(dimensions, scores_KR.T, strict=True):
                stated = scores_K[np.isfinite(scores_K)].tolist()
                if len(stated) > 1:
                    groups[name] += 1
                    every[name] += stated
        spans = {
            name: float(np.subtract(*np.percentile(scores, (99, 1)))) if scores else 0.0
            for name, scores in every.items()
        }
        return Stated(groups, spans)

    more = [list(dimensions), dict(mix), "spans"]
    return Stated(*_kept(folder, split, records, "stated", find, more, fallback))


def _kept(
    folder: Path,
    split: str,
    records: Sequence[Any],
    name: str,
    find: Callable[[], Any],
    more: Sequence[Any] = (),
    fallback: Path | None = None,
) -> Any:
    """What `find` finds in JSON types, from beside the data set where it was found before in the
    same files; `more`: what else it depends on."""
    places = cache_places(folder, f"{name}-{split}.json", fallback)
    key = [VERSION, len(records), _marks(folder, split), *more]
    for place in places:
        try:
            kept = json.loads(place.read_text())
            if kept["key"] == key:
                return kept["contents"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    found = find()
    text = json.dumps({"key": key, "contents": found})
    for place in places:
        if write_cache(place, text):
            break
    return found


def _labelled(fields: Mapping[str, Any]) -> list[str]:
    """The reward dimensions in which a record has a label."""
    weight_KKR = np.asarray(fields["weight"], np.float32)
    columns = zip(fields["dimensions"], weight_KKR.T, strict=False)
    return [name for name, column_KK in columns if column_KK.any()]


def _marks(folder: Path, split: str) -> str:
    """Of a split's files: names, sizes, and their first, middle and last bytes."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(f"*-{split}.array_record-*")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - MARK)):
                file.seek(start)
                digest.update(file.read(MARK))
    return digest.hexdigest()[:16]


def _count(folder: Path, split: str, records: Sequence[Any]) -> Contents:
    digest, labels, critiques = hashlib.sha256(), {}, 0
    for index in track(range(len(records)), f"reading {folder.name}/{split}"):
        try:
            record = records[index]
            text, pictures = _bytes(record["record"]), record["images"]
            fields = json.loads(text)
        except Exception as error:  # damaged files raise many kinds
            words = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: record {index} of {split} is damaged ({words})") from error
        for part in (text, *map(bytes, pictures)):
            digest.update(len(part).to_bytes(8, "big") + part)
        with_label = _labelled(fields)
        for name in fields["dimensions"]:
            labels[name] = labels.get(name, 0) + (name in with_label)
        critiques += any(candidate[1] for candidate in fields["candidates"])
    return Contents(len(records), digest.hexdigest()[:16], labels, critiques)


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


Stamp = list[dict[str, Any]]  # by data set of a run: 'name', and 'splits' with counts and digests


def stamp(names: Sequence[str], splits: Sequence[Mapping[str, Contents]]) -> Stamp:
    """What a checkpoint keeps of the data it was trained on; in JSON types."""
    return [
        {"name": name, "splits": {s: {"groups": c.groups, "digest": c.digest} for s, c in found}}
        for name, found in zip(names, (each.items() for each in splits), strict=True)
    ]


def changes(before: Stamp, now: Stamp) -> str:
    """What is no longer as it was, '' if all of it is. A split that no data set had changes nothing
    for the others; one that only some had is another by what is added to it."""
    found, known = [], {split for old in before for split in old["splits"]}
    for old, new in zip(before, now, strict=True):
        for split, was in old["splits"].items():
            name, there = f"{new['name']}/{split}", new["splits"].get(split)
            if there is None:
                found.append(f"{name} had {was['groups']} groups and is gone")
            elif was["groups"] != there["groups"]:
                found.append(f"{name} had {was['groups']} groups, has {there['groups']}")
            elif was != there:
                found.append(f"{name} has {was['groups']} groups as before, but others")
        added = known & new["splits"].keys() - old["splits"].keys()
        found += [f"{new['name']}/{split} has been added" for split in sorted(added)]
    return "; ".join(found)
