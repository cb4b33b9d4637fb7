"""Rows of what lies on disk after a download, one at a time: JSON, JSON lines, parquet, Arrow, CSV.

Nothing is held but the row at hand (of parquet: a few rows), however large a file is.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jrm_jax.errors import UserError

SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow")
# what the `datasets` library writes beside the rows of a folder that it saved
NO_ROWS = re.compile(r"state\.json|dataset_infos?\.json|dataset_dict\.json|cache-.*\.arrow")
_PLACE = re.compile(r".+\.(json|jsonl|parquet|arrow|csv)(:\d+|\[\d+\])", re.DOTALL)
Pick = Callable[[list[str]], list[str]]
_BLOCK = 1 << 16  # characters
_BATCH = 16  # rows of parquet


def find(path: str | Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The file itself, or all of a folder's files of these kinds, sorted.

    Raises:
        UserError: there are none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    there = sorted(p for p in path.rglob("*") if p.suffix in suffixes) if path.is_dir() else []
    found = [p for p in there if not NO_ROWS.fullmatch(p.name)]
    if not found:
        what = "holds none of" if path.is_dir() else "is not there; expected one of"
        raise UserError(f"{path} {what} {', '.join('*' + s for s in suffixes)}")
    return found


def read_rows(
    path: Path, columns: Pick | None = None, skip: int = 0
) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    """(where, row) of a file: a JSON list, JSON lines, parquet, Arrow or CSV, by its suffix.

    A row that is none comes as the error that tells why. `where` is 'file[index]' in lists,
    parquet and Arrow, 'file:line' in lines.

    Args:
        columns: picks of the columns of parquet and Arrow those that are read; None: all.
        skip: rows at the beginning that are not wanted.

    Raises:
        UserError: a file that cannot be read on.
    """
    readers = {".parquet": _parquet, ".arrow": _arrow, ".jsonl": _lines, ".csv": _csv}
    rows = readers.get(path.suffix, _json_list)(path, columns, skip)
    try:
        for where, row in rows:
            if not isinstance(row, dict | UserError):
                found = "null" if row is None else json.dumps(row)[:40]
                row = UserError(f"{where}: field '(whole row)': is {found}, must be an object")
            yield where, row
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from error


def is_place(name: str) -> bool:
    """Whether a name is the `where` of a row: the id of a record that was given none."""
    return _PLACE.fullmatch(name) is not None


def _lines(path: Path, columns, skip: int) -> Iterator[tuple[str, Any]]:
    count = 0
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            count += 1
            if count <= skip:
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except ValueError as error:
                yield where, UserError(f"{where}: not JSON ({error})")


def _json_list(path: Path, columns, skip: int) -> Iterator[tuple[str, Any]]:
    """Decodes entry by entry, and reads on whenever one is not complete."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as file:
        text = file.read(_BLOCK).lstrip()
        if text and text[0] != "[":
            kind = "an object" if text[0] == "{" else "no list"
            raise UserError(f"{path} must hold a list of objects, is {kind}")
        text, index, ended = text[1:], 0, not text
        while True:
            rest = text = text.lstrip()
            if index and text.startswith(","):
                rest = text[1:].lstrip()
            elif index and text and text[0] != "]":
                raise UserError(f"{path} is not JSON (no comma before entry {index})")
            if rest.startswith("]"):
                return
            try:
                row, end = decoder.raw_decode(rest)
                complete = end < len(rest)  # else a number may go on in the next block
            except ValueError as error:
                if ended:
                    raise UserError(f"{path} is not JSON (entry {index}: {error})") from error
                complete = False
            if not complete:
                if ended:
                    raise UserError(f"{path} is not JSON (the list has no end)")
                # as much again as there is, so that a long entry is not decoded ever and ever
                block = file.read(max(_BLOCK, len(text)))
                text, ended = text + block, not block
                continue
            text = rest[end:]
            if index >= skip:
                yield f"{path}[{index}]", row
            index += 1


def _parquet(path: Path, columns, skip: int) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = columns(file.schema_arrow.names) if columns else None
            groups, index = [], 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if not groups and index + count <= skip:
                    index += count  # these are not even read
                else:
                    groups.append(group)
            if not groups:
                return
            batches = file.iter_batches(
                batch_size=_BATCH, row_groups=groups, columns=names
            )
            for batch in batches:
                for row in batch.to_pylist():
                    if index >= skip:
                        yield f"{path}[{index}]", row
                    index += 1
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no readable parquet file ({error})") from error


def _arrow(path: Path, columns, skip: int) -> Iterator[tuple[str, Any]]:
    """Arrow IPC: the stream that `Dataset.save_to_disk` writes, or the file format."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            index = 0
            for batch in _record_batches(source):
                wanted = batch.select(columns(batch.schema.names)) if columns else batch
                for start in range(max(0, skip - index), batch.num_rows, _BATCH):
                    rows = wanted.slice(start, _BATCH).to_pylist()
                    for place, row in enumerate(rows, index + start):
                        yield f"{path}[{place}]", row
                index += batch.num_rows
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no readable Arrow file ({error})") from error


def _record_batches(source) -> Iterator[Any]:
    import pyarrow

    try:
        stream = pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        file = pyarrow.ipc.open_file(source)
        for number in range(file.num_record_batches):
            yield file.get_batch(number)
        return
    yield from stream


def _csv(path: Path, columns, skip: int) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for index, row in enumerate(reader):
            if index < skip:
                continue
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                heads = len(reader.fieldnames or ())
                yield where, UserError(f"{where}: has not as many cells as the {heads} heads")
            else:
                yield where, row
