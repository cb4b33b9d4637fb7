"""What happens before a route is reached: who asks, how much, how slowly. An ASGI layer.

A request is refused from its head alone where that is possible: nothing of its body is read.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from jrm_jax.service import refusals
from jrm_jax.service.auth import Tokens
from jrm_jax.service.limits import Limits
from jrm_jax.service.metrics import Metrics
from jrm_jax.service.refusals import Refused

OPEN = ("/health", "/ready")  # without a token, and while loading and draining
SAFE = {  # of every answer
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
    b"content-security-policy": (
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
        b" connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """
    Args:
        tokens: None: everybody may ask.
        closed: why no work is accepted now, or None.
        admit: raises `Refused` where there is no room for one more request.
        known: the paths that routes have; others are counted as one.
    """

    def __init__(
        self,
        app: Any,
        limits: Limits,
        metrics: Metrics,
        tokens: Tokens | None,
        closed: Callable[[], Refused | None],
        admit: Callable[[], None],
        known: frozenset[str],
    ):
        self._app, self._limits, self._metrics, self._tokens = app, limits, metrics, tokens
        self._closed, self._admit, self._known = closed, admit, known
        self._waiting_bytes = 0
        self.working = 0  # POST requests that are not answered

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's start and end; there are no web sockets
            await self._app(scope, receive, send)
            return
        start, path = time.perf_counter(), scope["path"]
        route = path if path in self._known else "other"
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *SAFE.items()]
                self._metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        working = scope["method"] == "POST"
        self.working += working
        body = _Body(receive, self._limits, self)
        try:
            self._check(scope, working)
            body.expect(scope)
            await self._app(scope, body.receive if working else receive, answer)
        except Refused as refused:
            if not started:
                self._metrics.rejections.labels(refused.reason).inc()
                await refuse(refused, answer)
        except Exception:
            if not started:  # otherwise it is logged and answered, see `app`
                raise
        finally:
            self.working -= working
            self._waiting_bytes -= body.held
            self._metrics.seconds.labels(route).observe(time.perf_counter() - start)

    def _check(self, scope: Message, working: bool) -> None:
        headers = dict(scope["headers"])
        if scope["path"] in OPEN:
            return
        if self._tokens and not self._tokens.accept(headers.get(b"authorization", b"")):
            raise Refused("unauthorised", "give a token: Authorization: Bearer TOKEN")
        if working:
            # a browser that is logged in would send its token along from any page
            if _is_cross_site(headers):
                raise Refused("cross_site", "not from pages of other sites")
            if closed := self._closed():
                raise closed
            self._admit()

    def hold(self, count: int) -> None:
        """
        Raises:
            Refused: the bodies of all requests are more bytes than may wait.
        """
        if self._waiting_bytes + count > self._limits.max_waiting_bytes:
            raise Refused("queue_full", "too many bytes wait; send this again in 2 s", 2)
        self._waiting_bytes += count


def _is_cross_site(headers: dict[bytes, bytes]) -> bool:
    """Whether a page of another site asks. Browsers say so to HTTPS and localhost; to other
    addresses they send the page's origin alone, 'null' where it has none. Others send neither."""
    if (site := headers.get(b"sec-fetch-site")) is not None:
        return site not in (b"none", b"same-origin")
    origin = headers.get(b"origin")
    asked = headers.get(b"host", b"").lower()
    return origin is not None and origin.lower().partition(b"://")[2] != asked


class _Body:
    """A request's body as it arrives: counted, and with a last moment."""

    def __init__(self, receive: Receive, limits: Limits, gate: Gate):
        self._receive, self._limits, self._gate = receive, limits, gate
        self._due = time.monotonic() + limits.receive_s
        self._count, self._over = 0, False
        self.held = 0  # bytes

    def expect(self, scope: Message) -> None:
        """
        Raises:
            Refused: the head announces more than is accepted.
        """
        length = dict(scope["headers"]).get(b"content-length", b"0")
        self._check_size(int(length) if length.isdigit() else 0)

    def _check_size(self, count: int) -> None:
        most = self._limits.max_body_bytes
        if count > most:
            raise Refused("body_too_large", f"a body of more than {most:,} bytes")

    async def receive(self) -> Message:
        if self._over:  # what comes now is the end of the connection
            return await self._receive()
        try:
            async with asyncio.timeout(self._due - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            words = f"the body took longer than {self._limits.receive_s:g} s"
            raise Refused("receive_timeout", words) from None
        count = len(message.get("body", b""))
        self._count += count
        self._check_size(self._count)
        self._gate.hold(count)
        self.held += count
        self._over = not message.get("more_body", False)
        return message


async def refuse(refused: Refused, send: Send) -> None:
    """The answer to a refused request."""
    content = json.dumps(refusals.body(refused.reason, refused.message)).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content))}
    pairs = [(k.lower().encode(), v.encode()) for k, v in (headers | refused.headers()).items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})
