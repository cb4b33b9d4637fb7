"""A reward service for tests: a model that needs no device, a server in a thread or a process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import PIL.Image
import uvicorn

from jrm_jax.data.buckets import Bucket
from jrm_jax.data.encode import EncodedExample, TokenRow
from jrm_jax.data.images import decode
from jrm_jax.errors import UserError
from jrm_jax.service import server
from jrm_jax.service.app import Service, make_app
from jrm_jax.service.limits import Limits
from jrm_jax.service.scorer import Scorer
from jrm_jax.serving.groups import Scores
from jrm_jax.serving.programs import Work
from jrm_jax.shell.stop import leave


class FakeModel:
    """Scores by pixels: mean of the candidate less mean of the sources, plus the text's length.

    It waits `seconds` in a call, and for `held` if there is one. It fails while `broken` is set and
    writes down its batches.
    """

    batch_size, dimensions = 4, ("overall", "following")

    def __init__(self, seconds: float = 0.0, held: threading.Event | None = None):
        self.seconds, self.held, self.broken, self.batches = seconds, held, "", []
        self.card, self.work, self.critique_programs = {"step": 7}, Work(), set()
        tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
        processor = SimpleNamespace(features=3, grid=lambda height, width: (8, 8))
        self.encoder = SimpleNamespace(tokenizer=tokenizer, processor=processor)

    def encode(self, group):
        """Raises UserError for broken pictures, as RewardModel does."""
        pictures = [*(group.source or []), *group.candidates]
        try:
            images = [(np.full((1, 1), decode(picture).mean()), None) for picture in pictures]
        except ValueError as error:
            raise UserError(f"a picture: {error}") from error
        sources = len(pictures) - len(group.candidates)
        none = np.zeros((3, 0), np.int32)
        rows = [TokenRow([0], none, [(0, i, none)]) for i in range(sources, len(pictures))]
        prompt = TokenRow(
            [0] * len(group.instruction), none, [(0, i, none) for i in range(sources)]
        )
        labels = np.zeros((len(rows), len(rows), 1))
        return EncodedExample(prompt, rows, images, labels, labels)

    def bucket_of(self, encoded):
        return Bucket(len(encoded.candidates), len(encoded.images), 4, 16, 16, 0)

    def score_rows(self, bucket, encoded):
        assert 0 < len(encoded) <= self.batch_size
        assert all(self.bucket_of(one) == bucket for one in encoded)
        time.sleep(self.seconds)
        if self.held:
            assert self.held.wait(30)
        self.batches.append([len(one.candidates) for one in encoded])
        if self.broken:
            raise RuntimeError(self.broken)
        return [self.scores(one) for one in encoded]

    def scores(self, encoded):
        def total(row):
            return sum(encoded.images[i][0].item() for _, i, _ in row.visual)

        shift = len(encoded.prompt.tokens) - total(encoded.prompt)
        rewards = [np.float32(total(row) + shift) for row in encoded.candidates]
        reward_KR = np.stack([rewards, np.negative(rewards)], 1).astype(np.float32)
        normalised = np.stack([reward_KR[:, 0] / 2, np.full(len(rewards), np.nan)], 1)
        return Scores(reward_KR, normalised.astype(np.float32), self.dimensions)

    def problem(self, picture):
        try:
            decode(picture)
        except ValueError as error:
            return str(error)
        return None

    def critique_tokens(self, instruction, source, candidates, *, max_tokens, temperature, seed):
        """A token is a letter."""
        if self.broken:
            raise RuntimeError(self.broken)
        self.critique_programs.add((max_tokens, temperature > 0))
        said = f"{instruction} {temperature} {seed}"
        texts = [f"{said} {decode(picture).mean():.0f}" for picture in candidates]
        return [list(map(ord, text))[:max_tokens] for text in texts]

    def expected(self, instruction, sources, candidates):
        """float32 [K, R]: what score_rows gives."""
        group = SimpleNamespace(instruction=instruction, source=sources, candidates=candidates)
        return self.scores(self.encode(group)).reward_KR


def png(value: int, side: int = 8, kind: str = "PNG") -> bytes:
    """A picture of one grey."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (side, side), (value, value, value)).save(file, kind)
    return file.getvalue()


def header_of(width: int, height: int) -> bytes:
    """A PNG whose header promises that many pixels."""
    small = bytearray(png(0))
    small[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return bytes(small)


BROKEN = png(77)[:-30]  # its header is fine


def make_service(model=None, tokens=None, **limits) -> Service:
    service = Service(Limits(**{"wait_ms": 2.0, **limits}), tokens)
    service.scorer = Scorer(model or FakeModel(), service.limits, service.metrics)
    service.model = {"name": "fake", "step": 7}
    return service


@contextlib.contextmanager
def serving(service: Service):
    """The address of a server that runs in a thread of this process."""
    with server.listen("127.0.0.1", 0) as sock:
        running = uvicorn.Server(server.make_config(make_app(service), service.limits))
        thread = threading.Thread(target=lambda: asyncio.run(running.serve(sockets=[sock])))
        thread.start()
        try:
            while not running.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join()


def main() -> None:
    """A server process of the fake model: its address is printed, SIGTERM ends it."""
    seconds, drain = map(float, sys.argv[1:3])
    sock = server.listen("127.0.0.1", 0)
    service = Service(Limits(drain_s=drain))
    server.configure_logging()

    def load():
        return Scorer(FakeModel(seconds), service.limits, service.metrics)

    print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
    leave(server.run(service, load, sock, lambda words: print(words, flush=True)))


if __name__ == "__main__":
    main()
