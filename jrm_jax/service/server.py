"""The process around the routes: sockets, the model's loading, signals, draining."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jrm_jax.errors import UserError
from jrm_jax.service.app import Service, make_app
from jrm_jax.service.limits import Limits
from jrm_jax.service.scorer import Scorer

BACKLOG = 2048  # connections that wait to be accepted
KEEP_ALIVE = 75  # seconds of an idle connection; trainers pause between steps
TICK = 0.05  # seconds
log = logging.getLogger("jrm_jax.serve")


class Patient(H11Protocol):
    """A connection. It is closed where a request's head does not arrive in `receive_s` seconds;
    uvicorn itself waits for ever once the first byte is there."""

    receive_s = 30.0
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _expect_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()  # it is there: from now on the body is timed
        elif self._head is None and self.timeout_keep_alive_task is None:
            self._head = self.loop.call_later(self.receive_s, self._late)

    def _stop(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _late(self) -> None:
        self._head = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are heard here, in `_Run`; uvicorn would end by the signal, not with 0


def make_config(app: Any, limits: Limits) -> uvicorn.Config:
    """Of uvicorn: no web sockets, no access log, no name of the server in answers."""
    protocol = type("Connection", (Patient,), {"receive_s": limits.receive_s})
    return uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=1,
    )  # fmt: skip


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: no such host, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
        # socket.create_server leaves the protocol out, and asyncio then leaves TCP_NODELAY off:
        # every answer would wait 40 ms for an acknowledgement
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        return sock
    except (OSError, OverflowError) as error:
        words = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot listen on {host}:{port}: {words}; give another --port") from error


def run(
    service: Service, load: Callable[[], Scorer], sock: socket.socket, say: Callable[[str], None]
) -> int:
    """Serve until SIGTERM or SIGINT; the status of the process.

    It listens while `load` runs, so that /health answers. After the first signal new work is
    refused and accepted work is answered; a second signal ends the process at once.

    Raises:
        UserError: what `load` raises.
    """
    return asyncio.run(_Run(service, load, say).serve(sock))


class _Run:
    def __init__(self, service: Service, load: Callable[[], Scorer], say: Callable[[str], None]):
        self._service, self._load, self._say = service, load, say
        self._gate = make_app(service)
        self._server = _Server(make_config(self._gate, service.limits))
        self._error: BaseException | None = None
        self._status = 0
        self._drain: asyncio.Task | None = None

    async def serve(self, sock: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal, number)
        # not joined at the end: it may be busy in the compiler
        threading.Thread(target=self._loading, args=(loop,), name="loading", daemon=True).start()
        await self._server.serve(sockets=[sock])
        if self._error is not None:
            raise self._error
        return self._status

    def _loading(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._service.scorer = self._load()
        except BaseException as error:  # it is raised again by `serve`
            self._error = error
            loop.call_soon_threadsafe(setattr, self._server, "should_exit", True)

    def _signal(self, number: int) -> None:
        if self._drain is not None:
            os._exit(128 + number)
        self._service.draining = True
        self._drain = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        limit = self._service.limits.drain_s
        left = self._gate.working
        self._say(f"stopping: {left} requests are answered first, in {limit:g} s")
        end = time.monotonic() + limit
        while self._gate.working and time.monotonic() < end:
            await asyncio.sleep(TICK)
        if self._gate.working:
            self._status = 1
            self._say(f"{self._gate.working} requests were not answered in {limit:g} s")
        self._server.should_exit = True


def configure_logging() -> None:
    """What goes to the standard error: our own words, and faults of the libraries."""
    handler: Any = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("jrm_jax.serve", logging.INFO), ("uvicorn", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers, logger.propagate = [handler], False
