"""A request's body, JSON or form -> groups."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from jrm_jax.service import wire
from jrm_jax.service.limits import Limits
from jrm_jax.service.refusals import Refused
from jrm_jax.service.scorer import Scorer
from jrm_jax.service.wire import Ask, GroupIn, ScoreIn

JSON_BYTES = 4 << 20  # of the field `request`: names and instructions, no pictures
_OPTIONS = ("max_tokens", "temperature", "seed")  # of a critique, as fields of their own
_FIELDS, _FILES = ("instruction", *_OPTIONS), ("source", "candidate")  # of a form without `request`
_PLAIN = (
    "give `request`, or the field `instruction` with files `source` and `candidate`:"
    " send pictures as files, with a file name (curl -F candidate=@a.png)"
)
Content = TypeVar("Content", str, bytes)


async def read(
    request: Request, kind: type[ScoreIn], scorer: Scorer, limits: Limits
) -> tuple[Any, list[Ask]]:
    """(the body as `kind`, its groups).

    Raises:
        Refused: neither JSON nor a form, not what `kind` says, or more than the limits allow.
    """
    content_type = request.headers.get("content-type", "application/json")
    media = content_type.partition(";")[0].strip().lower()
    if media == "application/json":
        content = await request.body()

        def from_json() -> tuple[Any, list[Ask]]:
            body = wire.parse(kind, content)
            return body, wire.from_json(body.groups, limits)

        return await scorer.in_thread(from_json)
    if media == "multipart/form-data":
        fields, files = await _form(request, limits)
        return await scorer.in_thread(_from_form, fields, files, kind, limits)
    words = "send application/json, or multipart/form-data with the pictures as files"
    raise Refused("media_type", f"{media[:80]!a}: {words}")


def _once(parts: list[tuple[str, Content]]) -> dict[str, Content]:
    """
    Raises:
        Refused: a name that stands twice: which of the two is meant?
    """
    found: dict[str, Content] = {}
    for name, content in parts:
        if name in found:
            raise Refused("invalid", f"two parts have the name {name[:80]!a}")
        found[name] = content
    return found


async def _form(
    request: Request, limits: Limits
) -> tuple[list[tuple[str, str]], list[tuple[str, bytes]]]:
    """(fields, files) in their order."""
    most = min(limits.max_groups * (limits.max_sources + limits.max_candidates), 20_000)
    try:
        form: FormData = await request.form(max_files=most, max_fields=8, max_part_size=JSON_BYTES)
    except (HTTPException, LookupError, ValueError) as error:
        words = getattr(error, "detail", "not a form as multipart/form-data describes it")
        raise Refused("invalid", f"the form cannot be read: {words}") from error
    try:
        items = form.multi_items()
        files = [(n, await v.read()) for n, v in items if isinstance(v, UploadFile)]
        return [(n, v) for n, v in items if isinstance(v, str)], files
    finally:
        await form.close()  # large parts lie in files


def _from_form(
    fields: list[tuple[str, str]],
    files: list[tuple[str, bytes]],
    kind: type[ScoreIn],
    limits: Limits,
) -> tuple[Any, list[Ask]]:
    given = _once(fields)
    if "request" in given:
        for name in given:
            if name != "request":
                words = "beside `request` there are only files; what it says goes into the JSON"
                raise Refused("invalid", f"a field with the name {name[:80]!a}: {words}")
        body = wire.parse(kind, given["request"])
        return body, wire.from_form(body.groups, _once(files), limits)
    for names, parts, what in ((_FIELDS, fields, "a field"), (_FILES, files, "a file")):
        for name, _ in parts:
            if name not in names:
                raise Refused("invalid", f"{what} with the name {name[:80]!a}: {_PLAIN}")
    named = {f"{name} {index}": data for index, (name, data) in enumerate(files)}
    group = GroupIn.model_construct(
        instruction=given.get("instruction", ""),
        sources=[name for name in named if name.startswith("source")],
        candidates=[name for name in named if name.startswith("candidate")],
    )
    options = {name: given[name] for name in _OPTIONS if name in given}
    body = wire.parse_fields(kind, {"groups": [group.model_dump()], **options})
    return body, wire.from_form(body.groups, named, limits)
