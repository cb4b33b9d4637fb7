"""The programs of a run: a step (training, evaluation) compiled for one bucket, each once.

Compiling takes most of a minute and is silent by itself, so it is done here: in threads, while the
main thread says what is compiled and can give it up when the run is to stop. The steps, called
afterwards, find their programs.
"""

from __future__ import annotations

import collections
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jrm_jax.build_data import Data, place
from jrm_jax.data.buckets import Bucket, as_table
from jrm_jax.data.pipeline import empty_batch
from jrm_jax.run.fit import compile_within
from jrm_jax.shell import cores
from jrm_jax.shell.stop import StopRequest
from jrm_jax.step import TrainState
from jrm_jax.watch import Watchdog

TRAIN, EVALUATE = "training step", "evaluation"
THREAD = "compile"
POLL = 0.1  # seconds between looks for a request to stop
STACK = 2**26  # bytes, as on the main thread and more: the compiler's recursion is deep
Key = tuple[str, Bucket]


class Programs:
    """What is compiled already, and what will be.

    Args:
        steps: {TRAIN: jitted step, EVALUATE: ...}.
        wanted: {TRAIN: buckets that will be met, ...}; for the count, others may come.
        buckets: all of the run, by growing cost, as it numbers them.
        say: for lines; `show`: for a few words that change, '' when it is over.
    """

    def __init__(
        self,
        steps: Mapping[str, Any],
        wanted: Mapping[str, Collection[Bucket]],
        buckets: Sequence[Bucket],
        *,
        stop: StopRequest,
        watchdog: Watchdog,
        say: Callable[[str], None],
        show: Callable[[str], None],
    ):
        # the largest first: it takes longest
        self.wanted = [(k, bucket) for k in steps for bucket in sorted(wanted[k], reverse=True)]
        self._steps, self._buckets = dict(steps), list(buckets)
        self._stop, self._watchdog, self._say, self._show = stop, watchdog, say, show
        self._ready: set[Key] = set()
        self._last = 0.0  # seconds that the last one took
        self._count = 0

    def prepare(
        self, inputs: Mapping[Key, tuple], threads: int = 1, limit: int | None = None
    ) -> bool:
        """Compile what is not compiled.

        Args:
            inputs: {(kind, bucket): what the step will be called with, or arrays like it}.
            threads: programs at a time.
            limit: bytes of a device that a program may plan with.

        Returns:
            False if it was given up, because the run is to stop. The threads then go on by
            themselves: see `leave`.
        """
        todo = collections.deque(key for key in inputs if key not in self._ready)
        if not todo:
            return True
        left, began = len(todo), time.monotonic()
        told: queue.SimpleQueue = queue.SimpleQueue()
        before = threading.stack_size(STACK)
        for _ in range(min(threads, left)):
            arguments = (todo, inputs, limit, told)
            threading.Thread(target=self._work, args=arguments, name=THREAD, daemon=True).start()
        threading.stack_size(before)
        with self._watchdog.aside("compiling"), self._stop.answering(
            "stopping: what is being compiled is given up"
        ):
            while left:
                try:
                    key, seconds, error = told.get(timeout=POLL)
                except queue.Empty:
                    if self._stop.asked:
                        todo.clear()
                        return False
                    self._watchdog.pulse(f" for {time.monotonic() - began:.0f} s")
                    continue
                if seconds is None:
                    self._announce(*key)
                    continue
                self._watchdog.beat()  # work that goes on; one program alone must end in time
                if error is not None:
                    raise error
                left, self._last = left - 1, seconds
                self._ready.add(key)
        self._show("")
        self._say(f"compiled in {time.monotonic() - began:.0f} s")
        return True

    def use(self, kind: str, step: Any) -> None:
        """From now on `step` is compiled, of which nothing is yet."""
        self._steps[kind] = step
        self._ready -= {key for key in self._ready if key[0] == kind}

    def outermost(self, kind: str) -> list[Key]:
        """Of those that will be wanted, the ones whose bucket has no room in another: the program
        that needs the most memory is among them. The dearest first."""
        buckets = [bucket for one, bucket in self.wanted if one == kind]
        table = as_table(buckets)
        holders = [bucket.fits(table) for bucket in buckets]  # by holder, then by what is held
        outer = [bucket for i, bucket in enumerate(buckets) if sum(row[i] for row in holders) == 1]
        return [(kind, bucket) for bucket in sorted(outer, key=self._buckets.index, reverse=True)]

    def prepare_ahead(self, config: ConfigDict, data: Data, mesh: Mesh, state: TrainState) -> bool:
        """All that will be wanted, before the first step, where a program is compiled by one core:
        on the CPU. Elsewhere, and where processes must go on together, each is compiled when it is
        first needed. Returns: as `prepare`."""
        if jax.process_count() > 1:
            return True
        inputs: dict[Key, tuple] = {}
        for kind, bucket in self.wanted:
            batch = place(config, empty_batch(config.batch_size, bucket, data.encoder), mesh)
            known = (state,) if kind == TRAIN else (state.trainable, state.frozen)
            inputs[kind, bucket] = (*known, batch)
        return self.prepare(inputs, threads=cores.usable())

    def _work(
        self, todo: collections.deque, inputs: Mapping[Key, tuple], limit: int | None, told: Any
    ) -> None:
        while todo:
            try:
                key = todo.popleft()
            except IndexError:  # another thread was faster
                return
            told.put((key, None, None))
            began, error = time.monotonic(), None
            try:
                compile_within(self._steps[key[0]].lower(*inputs[key]), limit)
            except BaseException as raised:  # the main thread's to report
                error = raised
            told.put((key, time.monotonic() - began, error))

    def _announce(self, kind: str, bucket: Bucket) -> None:
        self._count += 1
        words = f"compiling {self._count} of {max(self._count, len(self.wanted))}"
        self._show(words)
        words += f": {kind}, bucket {self._buckets.index(bucket) + 1}"
        self._say(words + (f"; the last took {self._last:.0f} s" if self._last else ""))


def buckets_met(data: Data, start: int, total: int) -> dict[str, set[Bucket]]:
    """The buckets that a run's steps from `start` on, and its evaluations, will come across."""
    read = {each.batch(i)[0] for each in data.eval_plans.values() for i in range(len(each))}
    return {TRAIN: data.train_plan.buckets_met(start, total), EVALUATE: read}


def are_left() -> bool:
    """Whether a compilation that was given up still goes on."""
    return any(thread.name == THREAD for thread in threading.enumerate())
