"""What a disk says when it refuses, or a memory that is full, in words that say what to do."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from jrm_jax.errors import UserError, one_line

_FREE = "free some space"
_RIGHTS = "give this user the right to read and write there, or another folder"
_ANSWER = "see whether the disk or the network file system still answers"
_MEMORY = "docs/troubleshooting.md says under Memory what needs less, and what is saved stays"
_FILE = "give another folder, a part of this path is a file"
ADVICE = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: _FREE + ", or allow larger files",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "give a folder that can be written",
    errno.EIO: _ANSWER,
    errno.ESTALE: _ANSWER,
    errno.ENOTCONN: _ANSWER,
    errno.ETIMEDOUT: _ANSWER,
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "allow more open files (ulimit -n)",
    errno.ENAMETOOLONG: "give a shorter name",
}
FAULTS = tuple(ADVICE)  # the disk's, wherever they show
ADVICE |= {
    errno.ENOTDIR: _FILE,
    errno.EEXIST: _FILE,
    errno.ENOENT: "see whether the folder was removed",
    errno.EISDIR: "give the name of a file, this is a folder",
}
_PHRASES = {os.strerror(number): number for number in ADVICE} | {"disk is full": errno.ENOSPC}
# What XLA and tensorstore say
_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
# How file systems answer that cannot rename a folder with something in it; gcsfuse: EMFILE, ENOSYS
_NO_RENAME = (errno.ENOSYS, errno.EMFILE, errno.ENOTSUP, errno.EPERM, errno.EXDEV, errno.EINVAL)


def is_fault(error: BaseException) -> bool:
    """Whether it is the disk's, and not one of the program."""
    return isinstance(error, OSError) and error.errno in FAULTS


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host has not the memory that was asked for."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def expected_words(error: BaseException) -> str | None:
    """One line for bad input, of a disk that refuses or a lack of memory; None of a fault of the
    program."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if is_out_of_memory(error):
        return f"out of memory ({one_line(error)}): {_MEMORY}"
    return explain(error, Path(error.filename or ".")) if is_fault(error) else None


def error_number(error: BaseException | None) -> int | None:
    """Of the first OSError among an exception and its causes; libraries in C++ only write its name
    or its words into their message."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        seen.append(error)
        error = error.__cause__ or error.__context__
    found = (n for each in seen for words, n in _PHRASES.items() if words in str(each))
    return next(found, None)


def is_passing(error: BaseException) -> bool:
    """Whether the disk, the network or a lack of memory is at fault, and not what was read."""
    return (
        error_number(error) in FAULTS
        or is_out_of_memory(error)
        or any(words in str(error) for words in _PASSING)
    )


def explain(error: BaseException, path: Path) -> str:
    """'No space left on device: free some space', of an error at `path`."""
    if _is_rename(error):
        return _explain_rename(error, path)
    advice = ADVICE.get(error_number(error))
    return f"{one_line(error)}{f': {advice}' if advice else ''}"


def half_made(path: Path) -> Path:
    """A name beside `path` for what becomes it when all of it is there; no other process has it,
    not even one with the same number in another container."""
    return path.with_name(f"{path.name}.incomplete-{uuid.uuid4().hex[:8]}")


def write_whole(path: Path, content: str | Callable[[BinaryIO], Any]) -> None:
    """All of a file or nothing, whenever the process or the machine dies, and whoever else writes
    it: a text, or what a function writes.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("xb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_json(path: str | Path, advice: str = "") -> Any:
    """What a JSON file holds. advice: what to do where it cannot be read, for the message.

    Raises:
        UserError: missing, not to be read, or no JSON.
    """
    more = f": {advice}" if advice else ""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}){more}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}){more}") from error


def _is_rename(error: BaseException) -> bool:
    return (
        isinstance(error, OSError)
        and error.filename2 is not None
        and error.errno in _NO_RENAME
        and os.path.isdir(error.filename)
    )


def _explain_rename(error: OSError, path: Path) -> str:
    point, kind = mount_of(path)
    words = f"the mount at {point} ({kind}) cannot rename folders ({error.strerror})"
    if "gcsfuse" in kind:
        return (
            f"{words}: mount the bucket with --rename-dir-limit=200000, or take one with a "
            "hierarchical namespace"
        )
    return f"{words}: give a folder on another file system"


def mount_of(path: Path) -> tuple[str, str]:
    """(where it is mounted, kind) of the file system that a path lies on, or would lie on."""
    place = str(path.resolve())
    found = ("/", "unknown file system")
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:  # not Linux
        return found
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(found[0]):
            found = (point, kind)
    return found


def check_file(path: Path) -> None:
    """Try what writing a file needs: its folder, which is made if need be, takes a new one.

    Raises:
        UserError: it does not, or the file that is there cannot be written.
    """
    trial = path.with_name(f".try-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {explain(error, path)}") from error
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)


def check_folder(folder: Path) -> None:
    """Try what saving needs: making a folder with a file in it, renaming and removing it.

    Raises:
        UserError: it cannot be done in `folder`, which is made if need be.
    """
    first, second = (folder / f".try-{uuid.uuid4().hex[:8]}" for _ in range(2))
    try:
        first.mkdir(parents=True)
        (first / "file").write_text("whole")
        first.rename(second)
        shutil.rmtree(second)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {explain(error, folder)}") from error
    finally:
        for left in (first, second):
            shutil.rmtree(left, ignore_errors=True)
