"""Groups of all callers -> full batches of one bucket -> one program call. Threads, no asyncio.

Order: a bucket is ready when a batch of it is full, when its oldest group has waited long enough,
or when nobody else is on the way; of the ready ones that with the oldest group comes first. Within
a bucket callers take turns, each with its oldest group. A bucket whose program is still to be
compiled is run by a second thread, so that the others do not wait for the compiler.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jrm_jax.service.refusals import Refused


class Job:
    """One row of a batch: an encoded group, or a part of one that has very many candidates.
    `encoded`: None after its call. `future`: of its scores."""

    def __init__(self, bucket: Hashable, encoded: Any, caller: str):
        self.bucket, self.encoded, self.caller = bucket, encoded, caller
        self.future: Future = Future()
        self.since = time.monotonic()


class Batcher:
    """
    Args:
        run: (bucket, encoded groups, at most `rows`) -> as many results; called by one thread for
            warm buckets, by another for others.
        rows: of a batch.
        capacity: groups of all callers that are accepted and not answered.
        wait: seconds that the oldest group of a batch with room waits for others on the way.
        observe: told (bucket, jobs, seconds of the call, error or None) after every call.
        warm: buckets whose programs are compiled.
    """

    def __init__(
        self,
        run: Callable[[Hashable, list], Sequence],
        rows: int,
        capacity: int,
        wait: float,
        observe: Callable[[Hashable, list[Job], float, Exception | None], None],
        warm: Iterable[Hashable] = (),
    ):
        self._run, self.rows, self.capacity, self._wait = run, rows, capacity, wait
        self._observe = observe
        self._queues: dict[Hashable, dict[str, collections.deque[Job]]] = {}
        self._changed = threading.Condition()
        self.pending = 0  # groups accepted and not answered
        self._preparing = 0  # of them, on the way here
        self._pace = 0.1  # seconds a group takes, a running mean
        self._warm, self._compiling = set(warm), set()
        self._compiler = ThreadPoolExecutor(1, "compiler")
        threading.Thread(target=self._work, name="device", daemon=True).start()

    def ticket(self, count: int) -> Ticket:
        """Room for `count` groups, until it is closed.

        Raises:
            Refused: the queue is full.
        """
        with self._changed:
            if self.pending + count > self.capacity:
                raise self.full()
            self.pending += count
            self._preparing += count
        return Ticket(self, count)

    def full(self) -> Refused:
        """What to say when there is no room."""
        seconds = max(1, min(30, round(self.pending * self._pace / 2)))
        words = f"{self.pending} groups wait; send this again in {seconds} s"
        return Refused("queue_full", words, seconds)

    @property
    def waiting(self) -> int:
        """Groups in the queue, not those on the device."""
        with self._changed:
            return sum(len(q) for callers in self._queues.values() for q in callers.values())

    # what a ticket does

    def put(self, jobs: list[Job]) -> None:
        """The rows of one group."""
        with self._changed:
            self._preparing -= 1
            for job in jobs:
                queue = self._queues.setdefault(job.bucket, {})
                queue.setdefault(job.caller, collections.deque()).append(job)
            self._changed.notify_all()

    def missing(self, count: int) -> None:
        """So many groups that were on the way will not come."""
        with self._changed:
            self._preparing -= count
            self._changed.notify_all()

    def give_back(self, count: int, jobs: list[Job]) -> None:
        """Their request is over: what still waits is dropped."""
        with self._changed:
            self.pending -= count
            for job in jobs:
                if job.future.cancel():
                    self._remove(job)

    def _remove(self, job: Job) -> None:
        callers = self._queues.get(job.bucket, {})
        queue = callers.get(job.caller)
        if queue and job in queue:
            queue.remove(job)
            self._tidy(job.bucket, job.caller)

    def _tidy(self, bucket: Hashable, caller: str) -> None:
        callers = self._queues[bucket]
        if not callers[caller]:
            del callers[caller]
        if not callers:
            del self._queues[bucket]

    # the device's thread

    def _work(self) -> None:
        while True:
            bucket, jobs = self._next()
            if bucket in self._warm:
                self._call(bucket, jobs)
            else:
                self._compiler.submit(self._first_call, bucket, jobs)

    def _first_call(self, bucket: Hashable, jobs: list[Job]) -> None:
        done = self._call(bucket, jobs)
        with self._changed:
            self._compiling.discard(bucket)
            if done:
                self._warm.add(bucket)
            self._changed.notify_all()

    def _call(self, bucket: Hashable, jobs: list[Job]) -> bool:
        """Whether it went well."""
        jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        if not jobs:
            return False
        start, error = time.perf_counter(), None
        try:
            results = self._run(bucket, [job.encoded for job in jobs])
            for job, result in zip(jobs, results, strict=True):
                job.future.set_result(result)
        except Exception as caught:  # whatever the device says: this batch fails, not the next
            error = caught
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(caught)
        seconds = time.perf_counter() - start
        if bucket in self._warm:
            self._pace += 0.1 * (seconds / len(jobs) - self._pace)
        self._observe(bucket, jobs, seconds, error)
        for job in jobs:
            job.encoded = None  # its request may still wait for other groups
        return error is None

    def _next(self) -> tuple[Hashable, list[Job]]:
        with self._changed:
            while True:
                bucket, due = self._choose(time.monotonic())
                if bucket is not None and due <= 0:
                    if bucket not in self._warm:
                        self._compiling.add(bucket)
                    return bucket, self._take(bucket)
                self._changed.wait(due if bucket is not None else None)

    def _choose(self, now: float) -> tuple[Hashable | None, float]:
        """The bucket to run next, and in how many seconds it is due."""
        best, best_key = None, (float("inf"), 0.0)
        for bucket, callers in self._queues.items():
            if bucket in self._compiling:
                continue
            oldest = min(queue[0].since for queue in callers.values())
            full = sum(map(len, callers.values())) >= self.rows
            ready = full or not self._preparing
            key = (0.0 if ready else max(0.0, oldest + self._wait - now), oldest)
            if key < best_key:
                best, best_key = bucket, key
        return best, best_key[0]

    def _take(self, bucket: Hashable) -> list[Job]:
        callers = self._queues[bucket]
        jobs: list[Job] = []
        while callers and len(jobs) < self.rows:
            caller, queue = next(iter(callers.items()))
            del callers[caller]
            jobs.append(queue.popleft())
            if queue:
                callers[caller] = queue  # at the end: the others are next
        if not callers:
            del self._queues[bucket]
        return jobs


class Ticket:
    """Of one request. Closing it gives the room back and drops what still waits."""

    def __init__(self, batcher: Batcher, count: int):
        self._batcher, self._count, self._left = batcher, count, count
        self._jobs: list[Job] = []
        self._closed = False
        self._lock = threading.Lock()

    def submit(self, jobs: list[Job]) -> None:
        """One group, in one row or several. May be called from several threads; after the end the
        jobs are cancelled."""
        with self._lock:
            if not self._closed:
                self._left -= 1
                self._jobs += jobs
                self._batcher.put(jobs)
                return
        for job in jobs:
            job.future.cancel()

    def skip(self) -> None:
        """One group cannot be scored."""
        with self._lock:
            if not self._closed:
                self._left -= 1
                self._batcher.missing(1)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._closed = True
            self._batcher.missing(self._left)
            self._batcher.give_back(self._count, self._jobs)
