"""What lies there until a data set is complete, a folder with a lock and a build's state, and what
is said of it where a build ends too early."""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from jrm_jax.data.ingest.layout import Options
from jrm_jax.errors import UserError, one_line

STATE, LOCK = "state.sqlite", "lock"


class Useless(UserError):
    """What is done so far leads nowhere: the same command would fail again."""


def hold(lock: TextIO, folder: Path) -> None:
    """
    Raises:
        UserError: another process has the lock, or the file system has none.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{folder} is being written by another process") from error
    except OSError as error:  # of file systems without locks
        words = f"cannot be locked ({error.strerror}): give an --out on another file system"
        raise UserError(f"{folder} {words}") from error


@contextlib.contextmanager
def state_errors(folder: Path) -> Iterator[None]:
    """What SQLite says of a full disk is an OSError, what it says of a damaged file one line."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(str(error)) from error
    except sqlite3.Error as error:
        words = f"{folder / STATE} is damaged ({one_line(error)})"
        raise UserError(f"{words}: remove {folder} and give the command again") from error


def how_to_go_on(folder: Path, options: Options) -> str:
    """Of a build that ended with complete shards."""
    words = f"{folder} keeps what is done: the same command goes on there"
    if options.skip_bad:
        return words
    return f"{words}, with --skip_bad past bad rows; remove it where you mend the files themselves"
