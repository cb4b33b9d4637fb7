"""What an evaluation leaves on the disk: FILE.json, .md and .html, and FILE_predictions/.

Nothing of the user's is written over: a file of that name must be one of ours, and a folder must
hold what `MARK` in it lists, and nothing else.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from jrm_jax.errors import UserError
from jrm_jax.evaluation import files
from jrm_jax.shell import disk

MARK = "written_by_jrm_jax.txt"  # lists the files of a folder of predictions
BESIDE = (".md", ".html")  # of the JSON file


def check_out(out: Path, read: Sequence[str] = (), beside: Sequence[str] = BESIDE) -> None:
    """Before a model is loaded.

    Args:
        read: files that the command reads. beside: suffixes of what else it writes.

    Raises:
        UserError: the file cannot be written, it is one of `read`, or it or one beside it is not of
            an evaluation.
    """
    disk.check_file(out)
    if any(out.resolve() == Path(name).resolve() for name in read):
        raise UserError(f"--out={out} is a file that this command reads: give another --out")
    paths, ours = [out, *map(out.with_suffix, beside)], []
    if _holds(out):
        with contextlib.suppress(UserError):
            known = files.read_json(out)
            if isinstance(known, dict) and {"benchmark", "rows"} <= known.keys():
                # a comparison of two results is a JSON file alone: what lies beside is not of it
                ours = paths if "format" in known else [out]
    for path in paths:
        if path not in ours and _holds(path):
            raise UserError(
                f"{path} exists and is no result of jrm_jax.evaluate: give another --out, or"
                " remove it first"
            )


def _holds(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def save(path: Path, text: str) -> None:
    """
    Raises:
        UserError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {disk.explain(error, path)}") from error


def predictions_folder(out: Path) -> Path:
    return out.with_name(f"{out.stem}_predictions")


def check_folder(folder: Path) -> None:
    """
    Raises:
        UserError: it holds what an evaluation has not written.
    """
    try:
        known = {*(folder / MARK).read_text(encoding="utf-8").splitlines(), MARK}
    except OSError:
        known = set()
    if other := [name for name in _names(folder) if name not in known]:
        raise UserError(
            f"{folder} holds {other[0]}, which jrm_jax.evaluate has not written there: move the"
            " folder away, or give another --out"
        )


def _names(folder: Path) -> list[str]:
    """Of all files below it."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


@contextlib.contextmanager
def new_predictions(folder: Path) -> Iterator[Path]:
    """A folder to write predictions into, which takes the place of `folder` when all are written.

    Raises:
        UserError: `folder` holds what an evaluation has not written, or it cannot be written.
    """
    folder, complete = folder.resolve(), False
    check_folder(folder)
    part = disk.half_made(folder)
    try:
        part.mkdir(parents=True)
        yield part
        names = _names(part)
        (part / MARK).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        complete = True
        if folder.exists():
            shutil.rmtree(folder)  # a file of an earlier run would be counted too
        shutil.move(part, folder)  # by copies where folders cannot be renamed
    except OSError as error:
        words = f"{folder} cannot be written: {disk.explain(error, folder)}"
        kept = f"; the predictions are in {part}" if complete else ""
        raise UserError(words + kept) from error
    finally:
        if not complete:
            shutil.rmtree(part, ignore_errors=True)
