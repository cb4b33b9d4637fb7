"""Routes of the reward service."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from jrm_jax.service import example, formats, forms, openapi, refusals, wire
from jrm_jax.service.auth import Tokens
from jrm_jax.service.gate import Gate
from jrm_jax.service.limits import Limits
from jrm_jax.service.metrics import CONTENT_TYPE_LATEST, Metrics
from jrm_jax.service.pictures import Fault
from jrm_jax.service.refusals import Refused
from jrm_jax.service.scorer import Answer, Scorer

CALLER = "x-jrm-client"  # a client's name of its own: callers take turns by it
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
DESCRIPTION = (
    "Rewards of edited pictures. A reward is a real number without fixed scale; larger is better,"
    " and only differences between candidates of one source and instruction carry meaning."
)
log = logging.getLogger("jrm_jax.serve")


class Service:
    """What stands behind the routes. `scorer` is None while the model is being loaded.

    model: said with every answer: which model gave it.
    """

    def __init__(self, limits: Limits, tokens: Tokens | None = None):
        self.limits, self.tokens = limits, tokens
        self.metrics = Metrics()
        self.scorer: Scorer | None = None
        self.model: dict[str, Any] = {}
        self.draining = False

    def closed(self) -> Refused | None:
        """Why no work is accepted now."""
        if self.draining:
            return Refused("draining", "this server is stopping", 5)
        if self.scorer is None:
            return Refused("loading", "the model is being loaded", 10)
        return None

    def admit(self) -> None:
        """
        Raises:
            Refused: the queue is full.
        """
        batcher = self.scorer.batcher
        if batcher.pending >= batcher.capacity:
            raise batcher.full()


def make_app(service: Service) -> Gate:
    """The ASGI application."""
    app = FastAPI(
        title="jrm_jax", description=DESCRIPTION, docs_url=None, redoc_url=None,
        openapi_url="/openapi.json",
    )  # fmt: skip
    app.openapi = lambda: openapi.document(app, service.tokens is not None)
    _add_errors(app, service)
    _add_scoring(app, service)
    _add_other_formats(app, service)
    _add_state(app, service)
    _add_page(app)
    known = frozenset(route.path for route in app.routes)
    return Gate(
        app, service.limits, service.metrics, service.tokens, service.closed, service.admit, known
    )


def _add_errors(app: FastAPI, service: Service) -> None:
    async def refused(_: Request, error: Refused) -> Response:
        service.metrics.rejections.labels(error.reason).inc()
        found = refusals.body(error.reason, error.message)
        return _json(found, error.status, error.headers())

    async def http(_: Request, error: HTTPException) -> Response:
        found = refusals.body(f"http_{error.status_code}", str(error.detail))
        return _json(found, error.status_code, dict(error.headers or {}))

    async def fault(_: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return _json(refusals.body("internal", "a fault of the server; its log has more"), 500)

    async def gone(request: Request, _: ClientDisconnect) -> Response:
        return await refused(request, hung_up())

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, fault)


def _add_scoring(app: FastAPI, service: Service) -> None:
    limits = service.limits

    @app.post("/v1/score", openapi_extra=openapi.route(wire.ScoreIn, openapi.ScoreOut, form=True))
    async def score(request: Request) -> Response:
        """Rewards of groups: JSON, or a form with the pictures as files."""
        _, asks = await forms.read(request, wire.ScoreIn, service.scorer, limits)
        answers = await _work(request, limits, service.scorer.score(asks, _caller(request)))
        _count(service, answers)
        return _json(wire.reply(answers, service.scorer.dimensions, service.model))

    @app.post(
        "/v1/critique", openapi_extra=openapi.route(wire.CritiqueIn, openapi.ScoreOut, form=True)
    )
    async def critique(request: Request) -> Response:
        """What the model says of each candidate of one group, greedy or sampled."""
        body, (ask,) = await forms.read(request, wire.CritiqueIn, service.scorer, limits)
        most = body.max_tokens or limits.critique_tokens
        if most > limits.critique_tokens:
            raise Refused("too_many", f"max_tokens: at most {limits.critique_tokens}")
        writing = service.scorer.critique(ask, most, body.temperature, body.seed)
        said = await _work(request, limits, writing)
        rows = [wire.fault_json(one) if isinstance(one, Fault) else {"text": one} for one in said]
        return _json({"model": service.model, "groups": [{"candidates": rows}]})


def _add_other_formats(app: FastAPI, service: Service) -> None:
    limits = service.limits

    async def edits_of(
        request: Request, kind: type, edits: Callable[[Any], list[formats.Edit]]
    ) -> tuple[Any, list[Any]]:
        """(the body, an answer for each edit)."""
        content = await request.body()

        def read() -> tuple:
            body = wire.parse(kind, content)
            return body, *formats.regroup(edits(body), limits)

        body, asks, places = await service.scorer.in_thread(read)
        answers = await _work(request, limits, service.scorer.score(asks, _caller(request)))
        _count(service, answers)
        return body, [answers[group][candidate] for group, candidate in places]

    @app.post(
        "/score",
        openapi_extra=openapi.route(formats.UniRLIn, openapi.UniRLOut, more=(400,)),
    )
    async def unirl(request: Request) -> Response:
        """UniRL's format."""
        body, answers = await edits_of(request, formats.UniRLIn, formats.unirl_edits)
        return _json(formats.unirl_reply(body, answers, service.scorer.dimensions))

    @app.post(
        "/compute", openapi_extra=openapi.route(formats.FlowFactoryIn, openapi.FlowFactoryOut)
    )
    async def flow_factory(request: Request) -> Response:
        """Flow-Factory's format."""
        _, answers = await edits_of(request, formats.FlowFactoryIn, formats.flow_factory_edits)
        return _json(formats.flow_factory_reply(answers))

    @app.get("/rewards")
    async def rewards() -> Response:
        """Names of rewards, as UniRL asks for them."""
        return _json({"rewards": [formats.REWARD]})


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Alive; with the rewards and their sub-metrics once the model is there."""
        scorer = service.scorer
        names = {formats.REWARD: formats.sub_metrics(scorer.dimensions)} if scorer else {}
        return _json({"status": "ok", "rewards": names})

    @app.get("/ready", responses={503: {"description": "loading or draining"}})
    async def ready() -> Response:
        """Whether work is accepted: 200 or 503."""
        if closed := service.closed():
            found = refusals.body(closed.reason, closed.message)
            return _json(found, closed.status, closed.headers())
        return _json({"status": "ready", "model": service.model})

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        service.metrics.ready.set(service.closed() is None)
        if service.scorer is not None:
            numbers, scorer = service.metrics, service.scorer
            numbers.waiting.set(scorer.batcher.waiting)
            numbers.pending.set(scorer.batcher.pending)
            numbers.cost.set(scorer.model.work.slots)
            numbers.cost_used.set(scorer.model.work.used)
            numbers.padded.set(scorer.model.work.padded)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    files = {
        file.name: (file.read_bytes(), TYPES[file.name.rpartition(".")[2]])
        for file in resources.files("jrm_jax.service").joinpath("page").iterdir()
        if file.is_file()
    }

    def add(path: str, name: str) -> None:
        content, kind = files[name]

        async def send() -> Response:
            return Response(content, media_type=kind)

        app.add_api_route(path, send, include_in_schema=False)

    for name in files:
        add(f"/page/{name}", name)
    add("/", "index.html")
    add("/docs", "docs.html")

    @app.get("/page/example.json", include_in_schema=False)
    async def built_in_example() -> Response:
        return _json(await asyncio.to_thread(example.make))


def _caller(request: Request) -> str:
    named = request.headers.get(CALLER, "")[:64]
    return named or (request.client.host if request.client else "")


def _count(service: Service, answers: list[Answer]) -> None:
    for answer in answers:
        for one in answer:
            if isinstance(one, Fault):
                service.metrics.faults.labels(one.code).inc()


async def _work(request: Request, limits: Limits, work: Awaitable) -> Any:
    """The result of `work`, unless it takes too long or the caller hangs up: then it is dropped.

    Raises:
        Refused: the deadline has passed, or nobody waits any more.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        done, _ = await asyncio.wait(
            {task, gone}, timeout=limits.deadline_s, return_when=asyncio.FIRST_COMPLETED
        )
        if task in done:
            return task.result()
        if gone in done:
            raise hung_up()
        raise Refused("deadline", f"not answered within {limits.deadline_s:g} s: dropped")
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def hung_up() -> Refused:
    return Refused("gone", "the caller hung up")


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return Response(text.encode(), status, headers, "application/json")
