"""Decoded pictures of all requests: counted before they are decoded, and given back."""

import asyncio
import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest
from service_case import BROKEN, FakeModel, make_service, png, serving

from jrm_jax.errors import UserError
from jrm_jax.service.limits import Limits
from jrm_jax.service.room import Room

ONE = 3 * 8 * 8  # bytes of a picture of 8 x 8


class Counting(FakeModel):
    """Knows how many encoded pictures there are at once, at most."""

    def __init__(self, seconds=0.0, held=None):
        super().__init__(seconds, held)
        self.live, self.most, self.lock = 0, 0, threading.Lock()

    def encode(self, group):
        found = super().encode(group)
        with self.lock:
            self.live += len(found.images)
            self.most = max(self.most, self.live)
        return found

    def score_rows(self, bucket, encoded):
        try:
            return super().score_rows(bucket, encoded)
        finally:
            with self.lock:
                self.live -= sum(len(one.images) for one in encoded)


def parts(groups: int, candidates: int, picture: bytes = png(9)) -> list:
    """A form with one picture, named by every candidate."""
    group = {"instruction": "Red.", "candidates": ["p"] * candidates}
    return [("request", (None, json.dumps({"groups": [group] * groups}))), ("p", ("p", picture))]


def wait_for(condition) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_each_mention_of_a_picture_counts_and_nothing_is_decoded():
    model = Counting(0.0)
    service = make_service(model, max_pixels=64, max_decoded_bytes=6 * ONE)
    with serving(service) as url, httpx.Client(base_url=url, trust_env=False) as http:
        assert http.post("/v1/score", files=parts(2, 3)).status_code == 200
        model.most = 0
        for route, groups, candidates in (
            ("/v1/score", 7, 1), ("/v1/score", 1, 7), ("/v1/critique", 1, 7),
        ):  # fmt: skip
            answer = http.post(route, files=parts(groups, candidates))
            assert answer.status_code == 422, answer.text
            assert answer.json()["error"]["code"] == "too_many"
            assert f"{7 * ONE:,} bytes when decoded; at most {6 * ONE:,}" in answer.text
        # a picture that is smaller than what the model takes counts as that
        assert http.post("/v1/score", files=parts(7, 1, png(9, side=1))).status_code == 422
        assert model.most == 0
        assert http.post("/v1/score", files=parts(1, 7, b"no picture")).status_code == 200
        assert http.post("/v1/critique", files=parts(1, 6)).status_code == 200
    assert service.scorer.room.free == 6 * ONE


def test_pictures_of_all_requests_fit_and_the_room_comes_back():
    model = Counting(0.02)
    service = make_service(model, max_pixels=64, max_decoded_bytes=6 * ONE, deadline_s=5)
    with (
        serving(service) as url,
        httpx.Client(base_url=url, trust_env=False) as http,
        ThreadPoolExecutor(6) as pool,
    ):
        sent = [parts(2, 2), parts(1, 6), parts(3, 1), parts(1, 5, BROKEN), parts(1, 1)] * 3
        asked = [pool.submit(http.post, "/v1/score", files=one) for one in sent]
        assert {one.result().status_code for one in asked} == {200}
        assert 0 < model.most <= 6
        wait_for(lambda: service.scorer.room.free == 6 * ONE)
        model.broken = "the device is gone"
        assert http.post("/v1/score", files=parts(2, 3)).status_code == 500
        wait_for(lambda: service.scorer.room.free == 6 * ONE)


def test_dropped_work_gives_its_room_back_when_it_has_ended():
    model = Counting(held=threading.Event())
    service = make_service(model, max_pixels=64, max_decoded_bytes=6 * ONE, deadline_s=2)
    room = service.scorer.room
    with serving(service) as url, httpx.Client(base_url=url, trust_env=False) as http:
        assert http.post("/v1/score", files=parts(1, 6)).status_code == 504
        assert room.free == 0  # the device still works on it
        model.held.set()
        wait_for(lambda: room.free == 6 * ONE)


def test_who_waits_is_served_in_order_and_may_leave():
    async def work():
        room, first, served = Room(10), Future(), []

        async def ask(name, count):
            share = await room.take(count)
            served.append(name)
            share.until(ended := Future())
            return ended

        (await room.take(8)).until(first)
        large = asyncio.create_task(ask("large", 9))
        await asyncio.sleep(0)
        small = [asyncio.create_task(ask(name, 2)) for name in ("a", "b")]
        await asyncio.sleep(0)
        assert served == [] and room.free == 2
        large.cancel()
        await asyncio.wait([large, small[0]])
        assert served == ["a"] and room.free == 0
        first.cancel()
        (await small[1]).set_result(None)
        small[0].result().set_result(None)
        assert served == ["a", "b"] and room.free == 10
        # one that leaves in the moment in which it is served
        (await room.take(10)).until(last := Future())
        late = asyncio.create_task(ask("late", 10))
        await asyncio.sleep(0)
        last.set_result(None)
        late.cancel()
        await asyncio.wait([late])
        assert room.free == 10 and "late" not in served

    asyncio.run(work())


def test_a_share_is_given_back_once():
    """A thread's work, with all that it began, may end before the thread itself is a user."""
    room = Room(10)
    share = asyncio.run(room.take(6))
    for _ in range(2):
        share.until(ended := Future())
        ended.set_result(None)
    assert room.free == 10


def test_limits_that_cannot_hold_one_picture():
    with pytest.raises(UserError, match="cannot hold one picture"):
        Limits(max_decoded_bytes=100)
