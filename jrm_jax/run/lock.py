"""One trainer to a folder: a file that says who trains there, and that it lives.

Locks of the operating system are of no use here: on network file systems and bucket mounts they
are missing, or hold within one machine only. The file names the process that trains and is written
anew every few seconds. On the same machine a look at that process tells whether it lives; from
another one, only whether the file still changes, which needs no clocks that agree.

A process that was silent for too long, and then wakes up, finds another's name in the file and ends
before it saves anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from jrm_jax import distributed
from jrm_jax.errors import UserError
from jrm_jax.shell import disk

LOCK = "lock.json"
BEAT = 15.0  # seconds between signs of life
SILENCE = 90.0  # seconds without one, as seen from another machine: dead. Mounts cache for 60
SETTLE = 0.2  # seconds after which of several who take a lock over at once the last one is known


class Holder(NamedTuple):
    """What the file says. `place`: where process numbers mean the same (this boot of this machine,
    this container), `began`: when the process started, in the machine's ticks; None if unknown."""

    host: str
    process: int
    place: str | None
    began: str | None
    since: str
    token: str
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} (since {self.since})"


class Lock:
    """Held by this process. `check` before anything is saved."""

    def __init__(self, path: Path, me: Holder, beat: float):
        self._path, self._me, self._beat = path, me, beat
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """
        Raises:
            UserError: another process has taken the folder over.
        """
        found = _read(self._path)
        if found and found.token != self._me.token:
            raise UserError(
                f"{self._path.parent} was taken over by {found} while this process gave no"
                " sign of life; this one ends, and saves nothing more"
            )

    def _live(self) -> None:
        while not self._ended.wait(self._beat):
            with contextlib.suppress(OSError, UserError):
                self.check()
                self._me = self._me._replace(beat=self._me.beat + 1)
                disk.write_whole(self._path, json.dumps(self._me._asdict()))

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError, UserError):
            self.check()
            self._path.unlink()


@contextlib.contextmanager
def hold(
    workdir: Path,
    say: Callable[[str], None] = print,
    beat: float = BEAT,
    silence: float = SILENCE,
) -> Iterator[Lock | None]:
    """This run alone trains in `workdir`, which is made if need be. Of several processes of a run
    the leader holds the lock (the others get None), and all of them are refused together.

    Raises:
        UserError: another run trains there, or nothing can be written there.
    """
    lock, problem = None, None
    with distributed.leader_first("lock"):
        if distributed.is_leader():
            try:
                lock = Lock(workdir / LOCK, _take(workdir, say, silence), beat)
            except UserError as error:
                problem = error
    try:
        if not distributed.all_agree(problem is None):
            raise problem or UserError(f"{workdir}: process 0 cannot train there, see its line")
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _take(workdir: Path, say: Callable[[str], None], silence: float) -> Holder:
    """Write this process' name into the lock; returns what was written."""
    path, process = workdir / LOCK, os.getpid()
    since, token = time.strftime("%Y-%m-%d %H:%M:%S %z"), uuid.uuid4().hex
    me = Holder(socket.gethostname(), process, _place(), _began(process), since, token)
    text = json.dumps(me._asdict())
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                with path.open("x") as file:
                    file.write(text)
                return me
            except FileExistsError:
                found = _read(path)
            alive = _lives(found)
            if alive is None:
                words = found or "a process that has not yet said who it is"
                say(f"{path} is held by {words}: waiting {silence:g} s for a sign of life")
                found, alive = _watch(path, found, silence)
            if alive:
                raise UserError(
                    f"{workdir} is in use, {found} trains there: wait for its end, stop it, or "
                    "give another --workdir"
                )
            if not path.exists():  # it has ended
                continue
            disk.write_whole(path, text)
            time.sleep(SETTLE)
            if (_read(path) or me).token == token:
                return me
    except OSError as error:
        words = disk.explain(error, workdir)
        raise UserError(f"{workdir} cannot be used for a run: {words}") from error


def _read(path: Path) -> Holder | None:
    """None where there is no such file, or no whole one."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _place() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return None


def _began(process: int) -> str | None:
    """None where there is no such process, or it has ended and nobody has taken notice."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_anothers(process: int) -> bool:
    """Whether there is such a process of another user, whatever may be seen of it."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        pass
    return False


def _lives(found: Holder | None) -> bool | None:
    """Whether the holder's process lives; None where that cannot be seen from here."""
    if found is None or found.place != _place():
        return None
    if found.place is not None:
        began = _began(found.process)
        hidden = began is None and _is_anothers(found.process)  # /proc may be mounted with hidepid
        return None if hidden else began == found.began
    if found.host == socket.gethostname():
        with contextlib.suppress(PermissionError):
            try:
                os.kill(found.process, 0)
            except ProcessLookupError:
                return False
    return None


def _watch(path: Path, before: Holder | None, silence: float) -> tuple[Holder | None, bool]:
    """(holder, whether it has written within `silence` seconds); over when the file vanishes."""
    ends, found = time.monotonic() + silence, before
    while time.monotonic() < ends and path.exists():
        time.sleep(min(1.0, silence / 10))
        found = _read(path) or found
        if found != before:
            return found, True
    return found, False
