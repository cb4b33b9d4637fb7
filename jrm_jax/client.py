"""Scores over HTTP, for other people's processes: httpx, numpy and Pillow, no JAX.

    client = RewardClient("http://rewards:8080", token="...")          # or a list of servers
    client.score("Make the cat white.", "cat.png", ["a.png", "b.png"])   float32 [2]
    await AsyncRewardClient(...).score(...)                              the same

A picture is a path, an encoded file as bytes, a Pillow image, or an array or tensor: uint8 or float
in 0 to 1, [h, w, 3] or [3, h, w]. Arrays travel as PNG, so no pixel changes on the way but by the
rounding of floats. In `score` and `critique` a candidate without a score raises; `score_groups`
gives it NaN and says why. Retried are answers of
429 and 503 alone, with growing pauses, at the next server.

Letters: K candidates, R reward dimensions.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import random
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import PIL.Image

Picture = Any  # see above
RETRIED = (429, 503)
_ORIENTATION = 0x0112  # EXIF tag
LONGEST = 30.0  # seconds of one pause at most


class RewardError(RuntimeError):
    """The service did not give what was asked for. `status`: of HTTP; 200 where single candidates
    have errors. `faults`: {(group, candidate): words}."""

    def __init__(self, message: str, status: int, faults: dict[tuple[int, int], str] | None = None):
        super().__init__(message)
        self.status, self.faults = status, faults or {}


class Group(NamedTuple):
    """One edit and its candidates. `source`: None, one picture or a list of them."""

    instruction: str
    source: Any
    candidates: Sequence[Picture]


class GroupScores(NamedTuple):
    """Columns stand in the order of `dimensions`; a candidate without a score has NaN in its row
    and words in `errors` (None elsewhere). deviation_KR: how unsure the model is of each reward;
    None of a model that does not say."""

    reward_KR: np.ndarray
    normalised_KR: np.ndarray
    dimensions: tuple[str, ...]
    errors: tuple[str | None, ...]
    deviation_KR: np.ndarray | None = None


class _Client:
    """What both clients share.

    Args:
        servers: one address or several; requests go round.
        token: what the service was given as --token_file; unset: the variable JRM_TOKEN.
        timeout: seconds for one try, from when it has a connection. More than the server's
            --deadline_s, so that its own answer (504) arrives.
        retries: further tries after 429 and 503.
    """

    def __init__(
        self,
        servers: str | Sequence[str],
        token: str | None = None,
        timeout: float = 90.0,
        retries: int = 8,
    ):
        found = [servers] if isinstance(servers, str) else list(servers)
        if not found:
            raise ValueError("give the address of at least one server")
        start = random.randrange(len(found))  # many clients do not all begin with the first
        self._servers = itertools.cycle([s.rstrip("/") for s in found[start:] + found[:start]])
        token = os.environ.get("JRM_TOKEN") if token is None else token
        headers = {"X-JRM-Client": uuid.uuid4().hex}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        # many asks at once wait for a connection as long as those before them take
        patience = httpx.Timeout(timeout, pool=None)
        self._options = {"headers": headers, "timeout": patience, "trust_env": False}
        self._retries = retries

    def _tries(self) -> Iterator[str]:
        """The server of each try."""
        return itertools.islice(self._servers, self._retries + 1)


class RewardClient(_Client):
    """See `_Client` for the arguments. Threads may share one."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._http = httpx.Client(**self._options)

    def score(self, instruction: str, source: Any, candidates: Sequence[Picture]) -> np.ndarray:
        """float32 [K]: rewards in the first dimension.

        Raises:
            RewardError: a candidate that cannot be scored, or a service that does not answer so.
            httpx.TransportError: no connection.
        """
        return first_column(self.score_groups([(instruction, source, candidates)]))[0]

    def score_groups(self, groups: Sequence[Group | tuple]) -> list[GroupScores]:
        """Scores of many groups in one request. Errors of single candidates are not raised here.

        Raises:
            RewardError: the request as a whole was refused.
            httpx.TransportError: no connection.
        """
        return read_scores(self._post("/v1/score", form(groups)))

    def critique(
        self, instruction: str, source: Any, candidates: Sequence[Picture], **how: Any
    ) -> list[str]:
        """A text for each candidate. `how`: max_tokens, temperature, seed.

        Raises:
            As `score`.
        """
        parts = form([(instruction, source, candidates)], **how)
        return read_texts(self._post("/v1/critique", parts))

    def _post(self, path: str, files: list) -> dict[str, Any]:
        for number, server in enumerate(self._tries()):
            answer = self._http.post(server + path, files=files)
            if answer.status_code not in RETRIED or number == self._retries:
                return read(answer)
            time.sleep(pause(answer, number))
        raise AssertionError("there is at least one try")

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class AsyncRewardClient(_Client):
    """`RewardClient` for asyncio: the same arguments, methods and errors."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._http = httpx.AsyncClient(**self._options)

    async def score(
        self, instruction: str, source: Any, candidates: Sequence[Picture]
    ) -> np.ndarray:
        return first_column(await self.score_groups([(instruction, source, candidates)]))[0]

    async def score_groups(self, groups: Sequence[Group | tuple]) -> list[GroupScores]:
        parts = await asyncio.to_thread(form, groups)
        return read_scores(await self._post("/v1/score", parts))

    async def critique(
        self, instruction: str, source: Any, candidates: Sequence[Picture], **how: Any
    ) -> list[str]:
        parts = await asyncio.to_thread(form, [(instruction, source, candidates)], **how)
        return read_texts(await self._post("/v1/critique", parts))

    async def _post(self, path: str, files: list) -> dict[str, Any]:
        for number, server in enumerate(self._tries()):
            answer = await self._http.post(server + path, files=files)
            if answer.status_code not in RETRIED or number == self._retries:
                return read(answer)
            await asyncio.sleep(pause(answer, number))
        raise AssertionError("there is at least one try")

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncRewardClient:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()


def pause(answer: httpx.Response, number: int) -> float:
    """Seconds before the next try: what the service asks for, at least 0.25 s doubled each time;
    up to a half more by chance, so that clients do not come back together."""
    asked = answer.headers.get("retry-after", "")
    wait = max(0.25 * 2**number, float(asked) if asked.isdigit() else 0.0)
    return min(wait, LONGEST) * random.uniform(1.0, 1.5)


def form(groups: Sequence[Group | tuple], **fields: Any) -> list[tuple[str, tuple]]:
    """Parts of a multipart request: the JSON with names of pictures, then the pictures. One that is
    the same object stands in it once."""
    parts: list[tuple[str, tuple]] = []
    known: dict[int, tuple[str, Picture]] = {}  # it holds them: a freed one's id would come again

    def name(picture: Picture) -> str:
        if id(picture) not in known:
            known[id(picture)] = f"p{len(known)}", picture
            parts.append((known[id(picture)][0], ("picture", encode(picture))))
        return known[id(picture)][0]

    asked = []
    for instruction, source, candidates in groups:
        many = source if isinstance(source, list | tuple) else [source]
        asked.append({
            "instruction": instruction,
            "sources": [name(picture) for picture in many if picture is not None],
            "candidates": [name(picture) for picture in candidates],
        })  # fmt: skip
    body = json.dumps({"groups": asked, **fields})
    return [("request", (None, body)), *parts]


def encode(picture: Picture) -> bytes:
    """An encoded file.

    Raises:
        TypeError: none of the known forms. OSError: a file that cannot be read.
    """
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | Path):
        return Path(picture).read_bytes()
    if isinstance(picture, PIL.Image.Image):
        image, turned = picture, _turn_of(picture)
        if image.mode in ("F", "I"):
            words = "whose range is not known: give an array of uint8, or floats from 0 to 1"
            raise TypeError(f"a Pillow image of mode {image.mode}, {words}")
        if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):  # which PNG does not have
            image = image.convert("RGB")
    else:
        image, turned = PIL.Image.fromarray(pixels(picture)), 0
    file, exif = io.BytesIO(), PIL.Image.Exif()
    if turned:  # the service turns it upright, as it does a file
        exif[_ORIENTATION] = turned
    image.save(file, "PNG", compress_level=1, exif=exif)
    return file.getvalue()


def _turn_of(image: PIL.Image.Image) -> int:
    """What its EXIF tag says, from 2 to 8; 0: it stands upright, or the tag cannot be read."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # a broken tag of a good picture; Pillow raises many kinds
        return 0
    return found if found in range(2, 9) else 0


def pixels(array: Any) -> np.ndarray:
    """[h, w, 3] uint8 of an array or tensor, [h, w, 3] or [3, h, w]; floats are 0 to 1.

    Raises:
        TypeError: another shape, or values that are no pixels.
    """
    if hasattr(array, "detach"):  # a tensor of PyTorch, on any device, bfloat16 too
        array = array.detach().cpu().float() if array.is_floating_point() else array.cpu()
    found = np.asarray(array)
    if found.ndim == 3 and found.shape[2] != 3 and found.shape[0] == 3:
        found = found.transpose(1, 2, 0)
    if found.ndim != 3 or found.shape[2] != 3:
        shape = list(found.shape)
        raise TypeError(f"an array of {shape}: give [h, w, 3] or [3, h, w], RGB")
    if found.dtype == np.uint8:
        return np.ascontiguousarray(found)
    if not np.issubdtype(found.dtype, np.floating) or not np.isfinite(found).all():
        raise TypeError(f"pixels of {found.dtype}: give uint8, or finite floats from 0 to 1")
    if found.min(initial=0.0) < -0.01 or found.max(initial=0.0) > 1.01:
        raise TypeError("floats beyond 0 to 1: divide by 255, or give uint8")
    return np.ascontiguousarray(np.rint(found.clip(0, 1) * 255).astype(np.uint8))


def read(answer: httpx.Response) -> dict[str, Any]:
    """The JSON of an answer.

    Raises:
        RewardError: it is not one of scores.
    """
    try:
        found = answer.json()
    except ValueError:
        found = {}
    if answer.status_code != 200 or not isinstance(found, dict) or "groups" not in found:
        words = found.get("detail") if isinstance(found, dict) else None
        raise RewardError(
            f"{answer.url}: {answer.status_code}: {words or 'no answer of a reward service'}",
            answer.status_code,
        )
    return found


def read_scores(found: dict[str, Any]) -> list[GroupScores]:
    """Of the JSON of /v1/score. A reward that is not finite is an error of its candidate."""
    dimensions = tuple(found["dimensions"])
    scores = []
    says = any(  # the model, of any of them: then all groups have an array
        row.get("deviation") is not None
        for group in found["groups"]
        for one in group["candidates"]
        for row in one.get("dimensions", {}).values()
    )
    for group in found["groups"]:
        reward_KR = np.full((len(group["candidates"]), len(dimensions)), np.nan, np.float32)
        normalised_KR, deviation_KR, errors = reward_KR.copy(), reward_KR.copy(), []
        for k, one in enumerate(group["candidates"]):
            error = one.get("error")
            errors.append(error["message"] if error else None)
            for r, name in enumerate(dimensions if not error else ()):
                own = one["dimensions"][name]
                reward_KR[k, r] = own["reward"]
                known = own["normalised"]
                normalised_KR[k, r] = np.nan if known is None else known
                unsure = own.get("deviation")
                deviation_KR[k, r] = np.nan if unsure is None else unsure
            if not error and not np.isfinite(reward_KR[k]).all():
                errors[k] = "no finite reward"
                reward_KR[k] = normalised_KR[k] = deviation_KR[k] = np.nan
        scores.append(
            GroupScores(reward_KR, normalised_KR, dimensions, tuple(errors),
                        deviation_KR if says else None)
        )  # fmt: skip
    return scores


def first_column(scores: Sequence[GroupScores], failed: float | None = None) -> list[np.ndarray]:
    """float32 [K] of each group: rewards in the first dimension.

    Args:
        failed: stands for a candidate without a score; None: it raises.

    Raises:
        RewardError: a candidate has no score.
    """
    faults = {
        (g, k): error
        for g, one in enumerate(scores)
        for k, error in enumerate(one.errors)
        if error is not None
    }
    if faults and failed is None:
        (group, candidate), words = next(iter(faults.items()))
        place = f"group {group}, candidate {candidate}"
        raise RewardError(f"{len(faults)} without a score; {place}: {words}", 200, faults)
    columns = [one.reward_KR[:, 0].copy() for one in scores]
    for group, candidate in faults:
        columns[group][candidate] = failed
    return columns


def read_texts(found: dict[str, Any]) -> list[str]:
    """Of the JSON of /v1/critique, of its one group.

    Raises:
        RewardError: a candidate has no text.
    """
    rows = found["groups"][0]["candidates"]
    faults = {(0, k): row["error"]["message"] for k, row in enumerate(rows) if "error" in row}
    if faults:
        raise RewardError(f"no critique: {next(iter(faults.values()))}", 200, faults)
    return [row["text"] for row in rows]
