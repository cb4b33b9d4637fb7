"""Requests that nobody would write: made up from the OpenAPI document, and by hostile hands."""

import base64
import io
import resource
import socket
import zlib

import httpx
import PIL.Image
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from service_case import FakeModel, make_service, png, serving

schemathesis = pytest.importorskip("schemathesis")
EXAMPLES = 15  # of each route and kind


@pytest.fixture(scope="module")
def url():
    with serving(make_service(FakeModel(), max_candidates=8, max_pixels=1 << 22)) as found:
        yield found


@pytest.fixture(scope="module")
def schema(url):
    return schemathesis.openapi.from_dict(httpx.get(url + "/openapi.json").json())


def test_the_openapi_document_finds_no_server_error(url, schema):
    asked = set()
    for operation in (found.ok() for found in schema.get_all_operations()):
        modes = list(schemathesis.GenerationMode)  # a route that takes nothing has no wrong way
        for mode in modes if operation.body else modes[:1]:
            strategy = operation.as_strategy(generation_mode=mode)

            @made_up(strategy)
            def ask(case):
                answer = case.call(base_url=url)
                assert answer.status_code < 500, (case.as_curl_command(), answer.text)
                asked.add((case.operation.path, answer.status_code))

            ask()
    assert {("/v1/score", 200), ("/v1/score", 422), ("/score", 422), ("/compute", 422)} <= asked
    assert httpx.get(url + "/ready", trust_env=False).status_code == 200


def made_up(strategy):
    quick = settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    return lambda test: quick(given(strategy)(test))


def chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + kind + data + crc


def png_of(width: int, height: int, pixels: bytes, *chunks: bytes) -> bytes:
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    parts = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def zeros(count: int) -> bytes:
    """A zlib stream of so many zeros, a thousandth of their size."""
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    parts = [packer.compress(block) for _ in range(count >> 20)]
    return b"".join([*parts, packer.compress(bytes(count % (1 << 20))), packer.flush()])


def animated() -> bytes:
    frames = [PIL.Image.new("RGB", (64, 64), (i % 256, 0, 0)) for i in range(400)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    return file.getvalue()


BOMBS = {
    "more pixels than promised": png_of(8, 8, zeros(1 << 28)),
    "a profile of 256 MiB": png_of(8, 8, zeros(8 * 25), chunk(b"iCCP", b"p\0\0" + zeros(1 << 28))),
    "a text of 256 MiB": png_of(8, 8, zeros(8 * 25), chunk(b"zTXt", b"t\0\0" + zeros(1 << 28))),
    "two thousand megapixels": png_of(50_000, 40_000, zeros(1 << 28)),
    "as large as may be": png_of(2048, 2048, zeros(2048 * (1 + 3 * 2048))),
    "four hundred frames": animated(),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_stays_small(url, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    picture = base64.b64encode(BOMBS[name]).decode()
    body = {"groups": [{"instruction": "Red.", "sources": [], "candidates": [picture] * 8}]}
    answer = httpx.post(url + "/v1/score", json=body, timeout=60)
    assert answer.status_code in (200, 422)
    if name in ("two thousand megapixels",):
        assert answer.status_code == 422
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 << 10, f"{grown >> 10} MiB"
    good = base64.b64encode(png(3)).decode()
    body["groups"][0]["candidates"] = [good]
    assert httpx.post(url + "/v1/score", json=body).status_code == 200


@pytest.mark.parametrize("raw", [
    b"GET / HTTP/1.1\r\n\r\n",
    b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /compute HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST /v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
    b"GET /page/..%2f..%2fapp.py HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET //etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x00\xa5\x01\x00\x00",
    b"\x00" * 5000,
])  # fmt: skip
def test_what_is_no_http_ends_its_own_connection(url, raw):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        try:
            sock.sendall(raw)
            sock.shutdown(socket.SHUT_WR)
            said = sock.recv(65536)
        except OSError:
            said = b""
    assert not said or said[9:10] in b"24"
    assert b"Traceback" not in said and b"root:" not in said
    assert httpx.get(url + "/ready").status_code == 200
