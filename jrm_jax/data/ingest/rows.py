"""Rows of what lies on disk after a download, one at a time: JSON, JSON lines, parquet, Arrow, CSV.

Nothing is held but the row at hand (of parquet: a few rows), however large a file is.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from jrm_jax.data.ingest.delimited import read_cells
from jrm_jax.data.ingest.json_rows import read_json_rows, read_lines
from jrm_jax.data.ingest.texts import check_row, printable
from jrm_jax.data.labels import is_text, shown
from jrm_jax.errors import RecordError, UserError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow")
_PLACE = re.compile(r".+\.(json|jsonl|ndjson|parquet|arrow|csv|tsv)(:\d+|\[\d+\])", re.DOTALL)
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
Pick = Callable[[list[str]], list[str]]
_POINTER = b"version https://git-lfs"  # in the place of a large file
_BATCH = 16  # rows of parquet
# what the `datasets` library, TFDS and this project write beside the rows of a folder
NO_ROWS = re.compile(
    r"state\.json|dataset_infos?\.json|dataset_dict\.json|features\.json|jrm_jax\.json|cache-.*\.arrow"
)


def find(path: str | Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The file itself, or all of a folder's files of these kinds, sorted.

    Hidden files and folders are passed over, and what tools write about themselves.

    Raises:
        UserError: there are none, or some are packed, or cannot be reached.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() in _PACKED:
            raise UserError(f"{printable(path)} is packed: unpack it, and give what was in it")
        return [path]
    found = []
    for file in _walk(path) if path.is_dir() else ():
        suffix = file.suffix.lower()
        if suffix in suffixes and not NO_ROWS.fullmatch(file.name) and file.is_file():
            found.append(file)
        elif suffix in ("", *suffixes) and file.is_symlink() and not file.exists():
            raise UserError(f"{printable(file)} is a link that leads nowhere: mend or remove it")
        elif suffix in _PACKED and Path(file.stem).suffix.lower() in suffixes:
            if not file.with_suffix("").exists():  # else it was unpacked there
                words = "unpack it, or move it out of the folder"
                raise UserError(f"{printable(file)} is packed: {words}")
    if not found:
        what = "holds none of" if path.is_dir() else "is not there; expected one of"
        raise UserError(f"{path} {what} {', '.join('*' + s for s in suffixes)}")
    return sorted(found)


def _walk(folder: Path) -> Iterator[Path]:
    """What lies in a folder and in those in it, links to folders among them; none is entered
    twice, so that links may go round in a circle."""

    def refuse(error: OSError) -> None:
        name = printable(Path(error.filename))
        raise UserError(f"{name} cannot be read ({error.strerror})") from error

    entered = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        shown = [name for name in folders if not _is_hidden(name)]
        # folders before links to them, so that a place has the same name every time
        folders[:] = sorted(shown, key=lambda name: (os.path.islink(f"{place}/{name}"), name))
        yield from (Path(place, name) for name in names if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def read_rows(
    path: Path, columns: Pick | None = None, skip: int = 0, any_text: bool = False
) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    """(where, row) of a file: a JSON list, JSON lines, parquet, Arrow or CSV, by its suffix. JSON
    lines are known under the name .json, too.

    A row that is none comes as the error that tells why. `where` is 'file[index]' in lists,
    parquet and Arrow, 'file:line' in lines.

    Args:
        columns: picks of the columns of parquet and Arrow those that are read; None: all.
        skip: rows at the beginning that are not wanted.
        any_text: give rows whose text cannot be encoded as they are, not as errors.

    Raises:
        UserError: a file that cannot be read on; `json_rows.NoRows`: one of JSON that holds one
            object alone.
    """
    readers = {
        ".parquet": _parquet, ".arrow": _arrow, ".jsonl": read_lines, ".ndjson": read_lines,
        ".csv": read_cells, ".tsv": read_cells,
    }  # fmt: skip
    rows = readers.get(path.suffix.lower(), read_json_rows)(path, columns, skip)
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                words = "stands for a file that was not downloaded (run 'git lfs pull')"
                raise UserError(f"{printable(path)} {words}")
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


def _parquet(path: Path, columns, skip: int) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    name = printable(path)
    try:
        with (
            _place_of(path) as place,
            pyarrow.parquet.ParquetFile(place, buffer_size=1 << 20, pre_buffer=False) as file,
        ):
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
        with _place_of(path) as place, _mapped(place) as source:
            index = 0
            for batch in _record_batches(source):
                wanted = batch.select(columns(batch.schema.names)) if columns else batch
                yield from _rows_of(wanted, name, index, skip)
                index += batch.num_rows
    except pyarrow.ArrowException as error:
        raise UserError(f"{name} is no readable Arrow file ({_one_line(error)})") from error


@contextlib.contextmanager
def _place_of(path: Path) -> Iterator[str | BinaryIO]:
    """What Arrow can open: it takes no name that holds bytes of another encoding than UTF-8."""
    if is_text(str(path)):
        yield str(path)
        return
    with path.open("rb") as file:
        yield file


def _mapped(place: str | BinaryIO) -> Any:
    import pyarrow

    return pyarrow.memory_map(place) if isinstance(place, str) else pyarrow.PythonFile(place, "r")


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
