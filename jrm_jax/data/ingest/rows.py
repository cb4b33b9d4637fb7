"""Rows of what lies on disk after a download, one at a time: JSON, JSON lines, parquet, Arrow, CSV.

Nothing is held but the row at hand (of parquet: a few rows), however large a file is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jrm_jax.data.ingest.delimited import read_cells
from jrm_jax.data.ingest.texts import check_row, open_text, printable
from jrm_jax.data.labels import shown
from jrm_jax.errors import RecordError, UserError

SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow")
_PLACE = re.compile(r".+\.(json|jsonl|parquet|arrow|csv|tsv)(:\d+|\[\d+\])", re.DOTALL)
Pick = Callable[[list[str]], list[str]]
_BLOCK = 1 << 16  # characters
_BATCH = 16  # rows of parquet
_WORD = 16  # characters: longer than any word of JSON, which the end of a block may cut
# what the `datasets` library, TFDS and this project write beside the rows of a folder
NO_ROWS = re.compile(
    r"state\.json|dataset_infos?\.json|dataset_dict\.json|features\.json|jrm_jax\.json|cache-.*\.arrow"
)


class NoRows(UserError):
    """A JSON file whose content is no list."""


def find(path: str | Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The file itself, or all of a folder's files of these kinds, sorted.

    Hidden files and folders are passed over, and what tools write about themselves.

    Raises:
        UserError: there are none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    found = []
    for file in path.rglob("*") if path.is_dir() else ():
        parts = file.relative_to(path).parts
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if file.suffix.lower() in suffixes and not hidden and not NO_ROWS.fullmatch(file.name):
            found += [file] if file.is_file() else []
    if not found:
        what = "holds none of" if path.is_dir() else "is not there; expected one of"
        raise UserError(f"{path} {what} {', '.join('*' + s for s in suffixes)}")
    return sorted(found)


def read_rows(
    path: Path, columns: Pick | None = None, skip: int = 0, any_text: bool = False
) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    """(where, row) of a file: a JSON list, JSON lines, parquet, Arrow or CSV, by its suffix.

    A row that is none comes as the error that tells why. `where` is 'file[index]' in lists,
    parquet and Arrow, 'file:line' in lines.

    Args:
        columns: picks of the columns of parquet and Arrow those that are read; None: all.
        skip: rows at the beginning that are not wanted.
        any_text: give rows whose text cannot be encoded as they are, not as errors.

    Raises:
        UserError: a file that cannot be read on; `NoRows`: one that holds no list.
    """
    readers = {
        ".parquet": _parquet, ".arrow": _arrow, ".jsonl": _lines, ".csv": read_cells,
        ".tsv": read_cells,
    }  # fmt: skip
    rows = readers.get(path.suffix.lower(), _json_list)(path, columns, skip)
    try:
        for where, row in rows:
            if isinstance(row, dict):
                try:
                    check_row(row, where, any_text)
                except RecordError as error:
                    row = error
            elif not isinstance(row, UserError):
                found = "a list" if isinstance(row, list) else shown(row)
                row = UserError(f"{where}: field '(whole row)': is {found}, must be an object")
            yield where, row
    except OSError as error:
        words = f"{printable(path)} cannot be read ({error.strerror or _one_line(error)})"
        raise UserError(words) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(path)} is no text ({error}): save it as UTF-8") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]  # Arrow's run over several


def is_place(name: str) -> bool:
    """Whether a name is the `where` of a row: the id of a record that was given none."""
    return _PLACE.fullmatch(name) is not None


def _lines(path: Path, columns, skip: int) -> Iterator[tuple[str, Any]]:
    count, name = 0, printable(path)
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            text = line.strip().lstrip("\ufeff")  # the mark may stand where files were joined
            if not text:
                continue
            count += 1
            if count <= skip:
                continue
            where = f"{name}:{number}"
            try:
                yield where, json.loads(text)
            except (ValueError, RecursionError) as error:
                yield where, UserError(f"{where}: not JSON ({error})")


def _json_list(path: Path, columns, skip: int) -> Iterator[tuple[str, Any]]:
    """Decodes entry by entry, and reads on whenever one is not complete."""
    decoder, name = json.JSONDecoder(), printable(path)
    with open_text(path) as file:
        text = file.read(_BLOCK).lstrip()
        if text and text[0] != "[":
            kind = "an object" if text[0] == "{" else "no list"
            raise NoRows(f"{name} must hold a list of objects, is {kind}")
        text, index, ended = text[1:], 0, not text
        while True:
            rest = text = text.lstrip()
            if index and text.startswith(","):
                rest = text[1:].lstrip()
            elif index and text and text[0] != "]":
                raise UserError(f"{name} is not JSON (no comma before entry {index})")
            if rest.startswith("]"):
                return
            try:
                row, end = decoder.raw_decode(rest)
                complete = end < len(rest)  # else a number may go on in the next block
            except (ValueError, RecursionError) as error:
                if ended or _is_hopeless(error, rest):
                    raise UserError(f"{name} is not JSON (entry {index}: {error})") from error
                complete = False
            if not complete:
                if ended:
                    raise UserError(f"{name} is not JSON (the list has no end)")
                # as much again as there is, so that a long entry is not decoded ever and ever
                block = file.read(max(_BLOCK, len(text)))
                text, ended = text + block, not block
                continue
            text = rest[end:]
            if index >= skip:
                yield f"{name}[{index}]", row
            index += 1


def _is_hopeless(error: Exception, text: str) -> bool:
    """Whether more text cannot help: the error is not at the end, nor in an open string."""
    if not isinstance(error, json.JSONDecodeError):
        return True
    return not error.msg.startswith("Unterminated") and error.pos < len(text) - _WORD


def _parquet(path: Path, columns, skip: int) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    name = printable(path)
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
                yield from _rows_of(batch, name, index, skip)
                index += batch.num_rows
    except pyarrow.ArrowException as error:
        raise UserError(f"{name} is no readable parquet file ({_one_line(error)})") from error


def _arrow(path: Path, columns, skip: int) -> Iterator[tuple[str, Any]]:
    """Arrow IPC: the stream that `Dataset.save_to_disk` writes, or the file format."""
    import pyarrow

    name = printable(path)
    try:
        with pyarrow.memory_map(str(path)) as source:
            index = 0
            for batch in _record_batches(source):
                wanted = batch.select(columns(batch.schema.names)) if columns else batch
                yield from _rows_of(wanted, name, index, skip)
                index += batch.num_rows
    except pyarrow.ArrowException as error:
        raise UserError(f"{name} is no readable Arrow file ({_one_line(error)})") from error


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


def _rows_of(batch: Any, name: str, first: int, skip: int) -> Iterator[tuple[str, Any]]:
    """Rows of a record batch, the first of which is the file's row `first`."""
    for number in range(max(0, skip - first), batch.num_rows):
        where = f"{name}[{first + number}]"
        try:
            (row,) = batch.slice(number, 1).to_pylist()
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date out of range
            kind = "row that cannot be read"
            row = RecordError(f"{where}: cannot be read ({_one_line(error)})", kind)
        yield where, row
