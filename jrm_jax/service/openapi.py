"""The OpenAPI document: what FastAPI cannot read off routes that take raw requests."""

from __future__ import annotations

from typing import Any

import pydantic
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from jrm_jax.service.formats import FlowFactoryIn, UniRLIn
from jrm_jax.service.refusals import STATUS
from jrm_jax.service.wire import CritiqueIn, ScoreIn

_REF = "#/components/schemas/{model}"


class ErrorText(pydantic.BaseModel):
    """A code that stays, and words for people."""

    code: str
    message: str


class ErrorOut(pydantic.BaseModel):
    """Body of every refusal."""

    error: ErrorText
    detail: str


class Number(pydantic.BaseModel):
    """Of one dimension. `normalised`: (reward - mean) / standard deviation, both of all rewards in
    training. `deviation`, another number: how unsure the model is of this reward, in its units;
    only where the model says so."""

    reward: float
    normalised: float | None
    deviation: float | None = None


class CandidateOut(pydantic.BaseModel):
    """Either the numbers, or `error`; never both. `text` in answers of /v1/critique."""

    reward: float | None = None
    normalised: float | None = None
    deviation: float | None = None
    dimensions: dict[str, Number] | None = None
    text: str | None = None
    error: ErrorText | None = None


class GroupOut(pydantic.BaseModel):
    """In the order of the request's candidates."""

    candidates: list[CandidateOut]


class ScoreOut(pydantic.BaseModel):
    """In the order of the request's groups."""

    model: dict[str, Any]
    dimensions: list[str] | None = None
    groups: list[GroupOut]


class UniRLOut(pydantic.BaseModel):
    """One entry of both lists for each request."""

    results: list[dict[str, dict[str, float]]]
    errors: list[dict[str, str]]


class FlowFactoryOut(pydantic.BaseModel):
    """One reward for each image."""

    rewards: list[float]


_TAKEN = (ScoreIn, CritiqueIn, UniRLIn, FlowFactoryIn)
_GIVEN = (ScoreOut, UniRLOut, FlowFactoryOut, ErrorOut)
_FORM = {
    "type": "object",
    "description": "`request` (JSON whose pictures are names of parts), or the three others",
    "properties": {
        "request": {"type": "string"},
        "instruction": {"type": "string"},
        "source": {"type": "array", "items": {"type": "string", "format": "binary"}},
        "candidate": {"type": "array", "items": {"type": "string", "format": "binary"}},
    },
}
_REASONS = (408, 413, 422, 429, 500, 503, 504)


def route(takes: type, gives: type, form: bool = False, more: tuple[int, ...] = ()) -> dict:
    """`openapi_extra` of a POST route."""
    content: dict[str, Any] = {"application/json": {"schema": _ref(takes)}}
    if form:
        content["multipart/form-data"] = {"schema": _FORM}
    refusals = {
        str(status): {
            "description": ", ".join(name for name, of in STATUS.items() if of == status),
            "content": {"application/json": {"schema": _ref(ErrorOut)}},
        }
        for status in sorted({*_REASONS, *more})
    }
    answer = {"description": "", "content": {"application/json": {"schema": _ref(gives)}}}
    return {
        "requestBody": {"required": True, "content": content},
        "responses": {"200": answer, **refusals},
    }


def _ref(model: type) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def document(app: FastAPI, tokens: bool) -> dict[str, Any]:
    """The whole document; `tokens`: whether routes need one."""
    found = get_openapi(
        title="jrm_jax", version="1", description=app.description, routes=app.routes
    )
    pairs = [(model, "validation") for model in (*_TAKEN, *_GIVEN)]
    _, defined = models_json_schema(pairs, ref_template=_REF)
    parts = found.setdefault("components", {})
    parts.setdefault("schemas", {}).update(defined["$defs"])
    if tokens:
        parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"token": []}]
    return found
