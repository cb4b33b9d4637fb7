"""Worker processes, watched: if one is killed, nobody may wait for it.

A killed process that prepares batches may die with half a batch in its pipe, or with a lock that
the others wait for; a read from it then never returns. So batches are taken by a thread, and
whoever waits for it looks after the processes meanwhile. Other work has a `pool`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from jrm_jax.errors import UserError

LOOK = 1.0  # seconds between looks at the processes
CLOSING = 5.0  # seconds that the thread may take to end
NAME = "grain-"  # how the names of the processes begin


class WorkerDied(UserError):
    """The program must end without waiting for its other processes."""


def init_worker(index: int, count: int) -> None:
    """In each of the processes: Ctrl-C is for the run, which saves first; and when the run is
    killed they end, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = multiprocessing.parent_process()  # which need not be the one that forked this one

    def watch() -> None:
        run.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def pool(
    count: int, start: str, begin: Callable, arguments: tuple, lost: str
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes, which end with the block.

    Args:
        start: how they start, see `multiprocessing.get_context`.
        begin, arguments: what each calls first.
        lost: what to say where one is ended from outside.

    Raises:
        UserError: one was; the pool gives up all that it has to do.
    """
    others = set(multiprocessing.active_children())
    made = ProcessPoolExecutor(count, multiprocessing.get_context(start), begin, arguments)

    there = threading.Event()  # a `join` that a signal ends takes the thread for ended, too

    def start_all() -> None:  # at once: later the rest might wait for one that is gone
        try:
            for _ in range(count):
                made.submit(int)
        except BrokenProcessPool:  # whoever uses the pool is told
            pass
        finally:
            there.set()

    # In a thread, which no signal interrupts: a process that is half started belongs to nobody.
    threading.Thread(target=start_all, daemon=True).start()
    try:
        there.wait()
        yield made
    except BaseException as error:
        there.wait()
        # Where one is ended the library ends the others, but for one that is just being started,
        # and then waits for all.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        # One may have died with half a result in the pipe: whoever reads it waits for the rest as
        # long as somebody could write it, and that is this process itself.
        with contextlib.suppress(AttributeError, OSError):  # the library's own
            made._result_queue._writer.close()
        if isinstance(error, BrokenProcessPool):
            raise UserError(lost) from error
        raise
    finally:
        made.shutdown(cancel_futures=True)


class WatchedIterator:
    """Over the batches of a data set with worker processes. Close it to end them."""

    def __init__(self, batches: Iterable[Any]):
        self._iterator = iter(batches)
        self._taken: queue.Queue[tuple[Any, Exception | None]] = queue.Queue(1)
        self._closing = threading.Event()
        self._error: Exception | None = None  # the last thing there was
        self._processes: set[Any] = set()
        self._thread = threading.Thread(target=self._take, name="batches", daemon=True)
        self._thread.start()

    def _take(self) -> None:
        error = None
        while error is None and not self._closing.is_set():
            batch = None
            try:
                batch = next(self._iterator)
            except Exception as raised:  # StopIteration among them: told by `__next__`
                error = raised
            while not self._closing.is_set():
                try:
                    self._taken.put((batch, error), timeout=LOOK)
                    break
                except queue.Full:
                    continue

    def __next__(self) -> Any:
        """
        Raises:
            WorkerDied: a process was killed.
        """
        while self._error is None:
            self._look()
            try:
                batch, self._error = self._taken.get(timeout=LOOK)
            except queue.Empty:
                continue
            if self._error is None:
                return batch
        self._look()
        raise self._error

    def _look(self) -> None:
        found = multiprocessing.active_children()
        self._processes.update(p for p in found if p.name.startswith(NAME))
        dead = [p for p in self._processes if p.exitcode]
        if not dead:
            return
        self._closing.set()
        for process in self._processes:
            process.kill()
        code = dead[0].exitcode
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        full = "the memory is full"
        if how == "SIGBUS":  # of a page that could not be had
            full = "/dev/shm is full, through which batches come (docker: --shm-size=8g)"
        self._error = WorkerDied(
            f"a process that prepares batches ({dead[0].pid}) was ended by {how}, perhaps because "
            f"{full}: run the same command to go on from the last checkpoint, or with fewer "
            "config.data.workers (0: none)"
        )
        raise self._error

    def close(self) -> None:
        self._closing.set()
        if not isinstance(self._error, WorkerDied):
            self._thread.join(CLOSING)
            self._iterator.close()
