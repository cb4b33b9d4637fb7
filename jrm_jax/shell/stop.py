"""Requests to stop: Ctrl-C and SIGTERM. The first is answered at once, the second ends the process.

"At once" holds while the interpreter is busy in a call that takes minutes, a compilation for
example: Python writes the signal's number into a pipe, and a thread of its own reads it there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from jrm_jax.errors import UserError
from jrm_jax.shell import disk, terminal

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGAIN = {signal.SIGINT: "press again to end now", signal.SIGTERM: "a second SIGTERM ends it now"}
GRACE = 0.5  # seconds for work that stops by itself; only then is there something to say
REPEAT = 0.3  # seconds; `timeout` and some controllers signal a process and its group, too


class Stopped(BaseException):
    """Like KeyboardInterrupt, no error. `number`: of the signal; `status`: of the process."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number, self.status = number, 128 + number


class StopRequest:
    """Hears the signals while it is entered, in the main thread.

    Args:
        answer: said at the first signal ...
        grace: ... unless all is over within so many seconds.
        several: there are other processes.

    Of several processes each may be told at another time: SIGTERM is then left to JAX, which hears
    it (and Cloud TPU's notice) and agrees with all of them on the call of `now` to stop at.
    """

    def __init__(
        self,
        answer: str = "stopping after this step",
        say: Callable[[str], None] = terminal.say,
        several: bool = False,
        grace: float = 0.0,
    ):
        self.asked = 0  # the signal
        self.answer, self.say, self._grace = answer, say, grace
        self._several, self._calls = several, 0
        self._breaks = False
        self._over = threading.Event()

    def __enter__(self) -> StopRequest:
        self._numbers = (signal.SIGINT,) if self._several else SIGNALS
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)  # as Python wants it
        self._before = {n: signal.signal(n, self._interrupt) for n in self._numbers}
        self._write_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        signal.set_wakeup_fd(self._write_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)  # which ends the thread
        self._thread.join()
        os.close(self._read)

    def _listen(self) -> None:
        first = None
        while told := os.read(self._read, 1):
            number, now = told[0], time.monotonic()
            if number not in self._numbers:
                continue
            if first is not None:
                if now - first > REPEAT:
                    terminal.show_cursor()
                    os._exit(128 + number)
                continue
            first = now
            if self._several:
                signal.raise_signal(signal.SIGTERM)  # for JAX, which tells the others
            else:
                self.asked = number
            if not self._over.wait(self._grace):
                with contextlib.suppress(OSError, ValueError):  # nobody listens any more
                    self.say(f"{self.answer}; {AGAIN[signal.Signals(number)]}")

    def _interrupt(self, number: int, _: Any) -> None:
        if self._breaks:
            self._breaks = False
            raise Stopped(number)

    @contextlib.contextmanager
    def breaking(self) -> Iterator[None]:
        """Here a signal raises `Stopped`, as soon as Python has its turn: nothing is lost by it."""
        self._breaks = not self._several
        try:
            if self._breaks and self.asked:
                raise Stopped(self.asked)
            yield
        finally:
            self._breaks = False

    @contextlib.contextmanager
    def answering(self, words: str) -> Iterator[None]:
        """Here the answer is another."""
        before, self.answer = self.answer, words
        try:
            yield
        finally:
            self.answer = before

    def now(self) -> int:
        """The signal to stop for now, or 0. Of several processes all must ask equally often."""
        self._calls += 1
        if self._several and not self.asked:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(self._calls):
                self.asked = signal.SIGTERM
        return self.asked


@contextlib.contextmanager
def ending(words: str = "stopped") -> Iterator[None]:
    """How every command ends but training: bad input, a disk that refuses and a lack of memory are
    one line and status 1; Ctrl-C is one line and status 130, SIGTERM the same with 143. `words`:
    the line of the latter two."""
    try:
        with StopRequest("stopping", grace=GRACE) as stop, stop.breaking():
            yield
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        if (told := disk.expected_words(error)) is None:
            raise
        sys.exit(f"error: {told}")
    except Stopped as stopped:
        terminal.say(words)
        sys.exit(stopped.status)


def leave(status: int) -> NoReturn:
    """End now, without waiting for threads that are busy in a compiler."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
