"""Watching a run from within: signs of life, what hangs, chosen traces."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax


class Watchdog:
    """Ends the process, with the stacks of all threads, when `beat` was not called for long.

    A thread of the C library keeps the time, so that it works while the interpreter is stuck in a
    call; a controller then starts the run again from its last checkpoint. With `every` > 0 a line
    is printed at the first beat of a step, or `pulse`, so many seconds after the last line. What
    goes on for long beats as it gets on: a program was compiled, more of a checkpoint is on the
    disk. Beats count inside `with` alone.
    """

    def __init__(self, silence: float, every: float, say: Callable[[str], None]):
        self.silence, self.every, self.say = silence, every, say
        self._line = self._step_began = time.monotonic()
        self._step: int | None = None
        self._doing, self._watching = "", False

    def __enter__(self) -> Watchdog:
        self._watching = True
        self.beat()
        return self

    def beat(self, step: int | None = None) -> None:
        """A sign of life; `step`: one that begins now."""
        if self._watching and self.silence > 0:
            # the program's own stderr: what stands in for it may have no file
            faulthandler.dump_traceback_later(self.silence, exit=True, file=sys.__stderr__)
        if step is None:
            return
        now = time.monotonic()
        if self._step is None:
            self._step, self._step_began = step, now
        elif self.every > 0 and now - self._line >= self.every:
            each = (now - self._step_began) / max(1, step - self._step)
            self.say(f"heartbeat: {_who()} at step {step}, {each:.3g} s a step")
            self._line, self._step, self._step_began = now, step, now

    @contextlib.contextmanager
    def aside(self, doing: str) -> Iterator[None]:
        """What is no step, a compilation or an evaluation: no step is said to take its time."""
        outer, began, self._doing = self._doing, time.monotonic(), doing
        try:
            yield
        finally:
            self._doing = outer
            if not outer:
                self._step_began += time.monotonic() - began

    def pulse(self, how_far: str) -> None:
        """A heartbeat from within `aside`, when one is due; no sign of life."""
        now = time.monotonic()
        if self.every > 0 and now - self._line >= self.every:
            self._line = now
            self.say(f"heartbeat: {_who()} is {self._doing}{how_far}")

    def __exit__(self, *_: Any) -> None:
        self._watching = False
        faulthandler.cancel_dump_traceback_later()


def _who() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


class Trace:
    """Profiles of chosen steps, one for each unbroken series of them."""

    def __init__(self, steps: Collection[int], folder: Path):
        self.steps, self.folder = frozenset(steps), folder
        self._running = False

    def at(self, step: int, state: Any) -> None:
        """Before `step` is started; `state` is what the step before has made."""
        if step in self.steps and not self._running:
            jax.block_until_ready(state)  # of the steps before nothing is to be seen
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        elif step not in self.steps:
            self.close(state)

    def close(self, state: Any) -> None:
        if self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False


def device_memory(device: Any) -> int | None:
    """Bytes that a device has; None where the backend does not say, as on a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit")


def describe_memory(device: Any) -> str:
    """'memory of TPU v5: 12.30 GB in use, 95.70 GB in all'; '' where the backend tells nothing."""
    stats = device.memory_stats() or {}
    names = {"bytes_in_use": "in use", "peak_bytes_in_use": "at its peak", "bytes_limit": "in all"}
    parts = [f"{stats[n] / 1e9:.2f} GB {words}" for n, words in names.items() if n in stats]
    return f"memory of {device.device_kind}: {', '.join(parts)}" if parts else ""
