"""From a request's groups to answers: pictures in threads, batches on the device.

Letters: K candidates.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from jrm_jax.data.buckets import Bucket
from jrm_jax.data.encode import EncodedExample, Encoder
from jrm_jax.errors import UserError
from jrm_jax.service import pictures
from jrm_jax.service.batcher import Batcher, Job, Ticket
from jrm_jax.service.limits import Limits
from jrm_jax.service.metrics import Metrics
from jrm_jax.service.pictures import Fault
from jrm_jax.service.refusals import Refused
from jrm_jax.service.room import Room, Share
from jrm_jax.service.wire import Ask, Scored
from jrm_jax.serving.groups import Group, Scores
from jrm_jax.serving.programs import Work
from jrm_jax.serving.rows import split
from jrm_jax.shell import cores

Answer = list[Scored | Fault]  # of a group: one for each candidate
log = logging.getLogger("jrm_jax.serve")


class Model(Protocol):
    """What is needed of a `RewardModel`."""

    batch_size: int
    dimensions: tuple[str, ...]
    encoder: Encoder
    work: Work

    def encode(self, group: Group) -> EncodedExample: ...
    def bucket_of(self, encoded: EncodedExample) -> Bucket: ...
    def score_rows(self, bucket: Bucket, groups: Sequence[EncodedExample]) -> list[Scores]: ...
    def problem(self, picture: bytes) -> str | None: ...
    def critique_tokens(
        self, instruction: str, source: Any, candidates: Sequence, **how: Any
    ) -> list[list[int]]: ...


class Scorer:
    """One model and all its callers; as long as the process lives."""

    def __init__(self, model: Model, limits: Limits, metrics: Metrics, warm: Sequence = ()):
        self.model, self.limits, self.metrics = model, limits, metrics
        self.dimensions = tuple(model.dimensions)
        self._threads = max(2, cores.usable())
        self._pool = ThreadPoolExecutor(self._threads, "pictures")
        self._writer = ThreadPoolExecutor(1, "critiques")
        self._writing = 0
        self._pen = asyncio.Semaphore(1)  # who waits for it holds no pictures
        self.room = Room(limits.max_decoded_bytes)
        self.batcher = Batcher(
            model.score_rows, model.batch_size, limits.max_queue, limits.wait_ms / 1000,
            self._observe, warm,
        )  # fmt: skip

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """For what reads a request: base64, JSON, pictures."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def score(self, asks: Sequence[Ask], caller: str) -> list[Answer]:
        """Answers in the order of the groups.

        Raises:
            Refused: the queue is full, a picture is too large or all of them are, or the device
                failed.
        """
        with self.batcher.ticket(len(asks)) as ticket:
            bytes_of = await self.in_thread(self._weigh, asks)
            # one request does not fill the threads for all others
            turn = asyncio.Semaphore(self._threads)

            async def one(index: int) -> Answer:
                async with turn:
                    share = await self.room.take(bytes_of[index])
                    how = asks[index], caller, ticket, share
                    found, jobs = await _run(self._pool, share, self._begin, *how)
                return found if not jobs else _fill(found, [await _result(job) for job in jobs])

            return await _together([one(index) for index in range(len(asks))])

    async def critique(
        self, ask: Ask, max_tokens: int, temperature: float, seed: int
    ) -> list[str | Fault]:
        """A text for each candidate, cut after `max_tokens`.

        Raises:
            Refused: too many wait, a picture is too large or all of them are, or the device failed.
        """
        if self._writing >= self.limits.max_critique_queue:
            raise Refused("queue_full", f"{self._writing} critiques wait: try again", 5)
        self._writing += 1
        try:
            (count,) = await self.in_thread(self._weigh, [ask])
            how = ask, max_tokens, temperature, seed
            async with self._pen:
                share = await self.room.take(count)
                return await _run(self._writer, share, self._write, *how)
        finally:
            self._writing -= 1

    # in threads

    def _weigh(self, asks: Sequence[Ask]) -> list[int]:
        """Bytes of each group's decoded pictures. Each mention counts: each is decoded anew.

        Raises:
            Refused: more than the limits allow; nothing was decoded.
        """
        limits, processor = self.limits, self.model.encoder.processor
        most = limits.max_decoded_bytes
        known: dict[int, int] = {}  # by identity: a part of a form may be named very often

        def weigh(picture: bytes | Fault) -> int:
            if id(picture) not in known:
                count = pictures.decoded_bytes(picture, limits.max_pixels, processor)
                known[id(picture)] = count
            return known[id(picture)]

        found = [sum(map(weigh, (*ask.sources, *ask.candidates))) for ask in asks]
        if (total := sum(found)) > most:
            words = f"pictures of {total:,} bytes when decoded; at most {most:,}"
            raise Refused("too_many", f"{words} in a request: send fewer groups at a time")
        return found

    def _begin(
        self, ask: Ask, caller: str, ticket: Ticket, share: Share
    ) -> tuple[Answer, list[Job]]:
        """(answers with None where a score will stand, the jobs that give them)."""
        faults, encoded = self._encode(ask)
        if encoded is None:
            ticket.skip()
            return faults, []
        try:
            jobs = [Job(self.model.bucket_of(row), row, caller) for row in split(encoded)]
        except UserError as error:
            ticket.skip()
            return [fault or Fault("group", str(error)) for fault in faults], []
        for job in jobs:
            share.until(job.future)
        ticket.submit(jobs)
        return faults, jobs

    def _encode(self, ask: Ask) -> tuple[list[Fault | None], Any]:
        """(what is wrong with each candidate, the group of the others or None if there are none).

        Raises:
            Refused: a picture with more pixels than allowed.
        """
        most = self.limits.max_pixels
        sources = [pictures.check(picture, most) for picture in ask.sources]
        faults = [pictures.check(picture, most) for picture in ask.candidates]
        encoded, error = None, None
        if not any(sources):
            encoded, error = self._try(ask, faults)
        if error is not None:  # one of the pictures is broken further on: find out which
            sources = [self._problem(picture) for picture in ask.sources]
            faults = [
                fault or self._problem(picture)
                for fault, picture in zip(faults, ask.candidates, strict=True)
            ]
            if not any(sources):
                encoded, again = self._try(ask, faults)
                faults = [fault or (again and Fault("group", again)) for fault in faults]
        for index, fault in enumerate(sources):
            if fault:
                words = f"source {index}: {fault.message}"
                return [Fault("source", words) for _ in faults], None
        return faults, encoded

    def _try(self, ask: Ask, faults: Sequence[Fault | None]) -> tuple[Any, str | None]:
        """(the encoded group of the candidates without faults or None, what was wrong)."""
        good = [p for p, fault in zip(ask.candidates, faults, strict=True) if not fault]
        if not good:
            return None, None
        try:
            return self.model.encode(Group(ask.instruction, list(ask.sources) or None, good)), None
        except UserError as error:
            return None, str(error)

    def _problem(self, picture: bytes) -> Fault | None:
        words = self.model.problem(picture)
        return Fault("picture", words) if words else None

    def _write(
        self, ask: Ask, max_tokens: int, temperature: float, seed: int
    ) -> list[str | Fault]:
        faults, encoded = self._encode(ask)
        if encoded is None:
            return faults
        good = [p for p, fault in zip(ask.candidates, faults, strict=True) if not fault]
        try:
            # always as many tokens as may be: another number would be another program
            ids_KT = self.model.critique_tokens(
                ask.instruction, list(ask.sources) or None, good,
                max_tokens=self.limits.critique_tokens, temperature=temperature, seed=seed,
            )  # fmt: skip
        except UserError as error:
            raise Refused("invalid", str(error)) from error
        except Exception as error:
            log.exception("a critique failed")
            raise _device_failed() from error
        decode = self.model.encoder.tokenizer.decode
        texts = iter([decode(ids[:max_tokens]) for ids in ids_KT])
        return [fault or next(texts) for fault in faults]

    def _observe(
        self, bucket: Bucket, jobs: list[Job], seconds: float, error: Exception | None
    ) -> None:
        numbers, name = self.metrics, bucket.words
        numbers.program_seconds.labels(name).observe(seconds)
        numbers.batch_groups.observe(len(jobs))
        numbers.batch_rows.inc(self.model.batch_size)
        if error is not None:
            numbers.device_errors.inc()
            log.error("a batch of %d groups failed, bucket %s", len(jobs), name, exc_info=error)
            return
        numbers.groups.inc(len(jobs))
        numbers.candidates.inc(sum(len(job.encoded.candidates) for job in jobs))
        numbers.pictures.inc(sum(len(job.encoded.images) for job in jobs))


async def _run(pool: Executor, share: Share, function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a thread that uses `share`, also after nobody waits for it any more."""
    work = pool.submit(function, *arguments)
    share.until(work)
    return await asyncio.wrap_future(work)


async def _result(job: Job) -> Any:
    try:
        return await asyncio.wrap_future(job.future)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        raise _device_failed() from error


def _device_failed() -> Refused:
    return Refused("device", "the device failed on this batch; send it again, the log has more")


async def _together(waiting: Sequence[Awaitable]) -> list:
    """All results; the first failure ends the others."""
    if len(waiting) == 1:
        return [await waiting[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in waiting]
    except* Refused as several:
        raise several.exceptions[0] from None
    return [task.result() for task in tasks]


def _fill(answer: list[Fault | None], scores: Sequence[Any]) -> Answer:
    """Scores where no fault stands. What is not finite is no score."""
    rewards = np.concatenate([one.reward_KR for one in scores])
    normalised = np.concatenate([one.normalised_KR for one in scores])
    unsure = [one.deviation_KR for one in scores if one.deviation_KR is not None]
    deviations = np.concatenate(unsure) if unsure else [None] * len(rewards)
    rows = iter(zip(rewards, normalised, deviations, strict=True))
    return [fault or _finite(Scored(*next(rows))) for fault in answer]


def _finite(scored: Scored) -> Scored | Fault:
    numbers = scored.reward_R.tolist()
    numbers += [] if scored.deviation_R is None else scored.deviation_R.tolist()
    if all(map(math.isfinite, numbers)):
        return scored
    return Fault("not_finite", "the model's reward is not a finite number")
