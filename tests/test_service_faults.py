"""What goes wrong around a service: callers, the device, its end. Nothing accepted is lost."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from service_case import FakeModel, make_service, png, serving

from jrm_jax.service import auth
from jrm_jax.service.auth import Tokens

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "a-token-of-some-length"


def form(value: int = 20, candidates: int = 1, text: str = "Red.") -> dict:
    files = [("candidate", ("c", png(value))) for _ in range(candidates)]
    return {"files": [("instruction", (None, text)), *files]}


def reward(answer: httpx.Response) -> float:
    return answer.json()["groups"][0]["candidates"][0]["reward"]


def head(path="/v1/score", length=100, extra="") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n{extra}\r\n"
    ).encode()


def dial(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def wait_for(condition) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_every_route_but_two_needs_a_token(capfd):
    service = make_service(tokens=Tokens(["another-long-token", TOKEN]))
    with serving(service) as url, httpx.Client(base_url=url, trust_env=False) as http:
        paths = [path for path in http.get("/openapi.json", auth=("x", TOKEN)).json()["paths"]]
        assert len(paths) >= 8
        for path in (*paths, "/", "/docs", "/page/page.js", "/page/example.json", "/nowhere"):
            wanted = 200 if path in ("/health", "/ready") else 401
            assert http.get(path).status_code == wanted, path
        for bad in ("Bearer wrong-token-wrong", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN,
                    "Bearer", "Basic %%%", "Bearer \x80"):  # fmt: skip
            answer = http.post("/v1/score", headers={"authorization": bad.encode("latin-1")})
            assert answer.status_code == 401 and "Bearer" in answer.headers["www-authenticate"]
        right = {"authorization": f"bearer {TOKEN}"}
        assert http.post("/v1/score", headers=right, **form()).status_code == 200
        assert http.get("/", auth=("anyone", TOKEN)).status_code == 200  # as a browser asks
        answer = http.post("/v1/score", headers={**right, "sec-fetch-site": "cross-site"}, **form())
        assert answer.status_code == 403
        host = url.removeprefix("http://")
        for origin, wanted in ((url, 200), (url.upper(), 200), ("http://evil.example", 403),
                               ("null", 403), (f"{url}0", 403), ("http://127.0.0.1", 403),
                               (f"http://evil.example/{host}", 403)):  # fmt: skip
            answer = http.post("/v1/score", headers={**right, "origin": origin}, **form())
            assert answer.status_code == wanted, origin
        # a browser's own word counts more: a proxy may have changed the host
        sure = {**right, "origin": "https://rewards.example.org", "sec-fetch-site": "same-origin"}
        assert http.post("/v1/score", headers=sure, **form()).status_code == 200
        # no token: nothing of the body is read
        with dial(url) as raw:
            raw.sendall(head(length=10**9))
            assert b" 401 " in raw.recv(4096)
    assert TOKEN not in "".join(capfd.readouterr())


def test_token_files(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"# trainers\n\n{TOKEN}\n")
    assert auth.read_tokens(path).accept(f"Bearer {TOKEN}".encode())
    for text in ("", "# none\n", "short\n", "two words of sixteen\n", "ümläutümläutümläut\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="token") as error:
            auth.read_tokens(path)
        assert text.strip() == "" or text.strip() not in str(error.value)
    with pytest.raises(ValueError, match="cannot be read"):
        auth.read_tokens(tmp_path / "nowhere")
    public = ("0.0.0.0", "::", "10.1.2.3")
    assert all(map(auth.is_public, public))
    assert not any(map(auth.is_public, ("127.0.0.1", "::1", "localhost", "127.9.9.9")))
    with pytest.raises(ValueError, match="--host"):
        auth.is_public("no.such.host.invalid")


def test_a_full_queue_says_so_at_once_and_one_caller_cannot_fill_the_batches_of_others():
    model = FakeModel(held=threading.Event())
    service = make_service(model, max_queue=4, max_groups=4)
    with (
        serving(service) as url,
        httpx.Client(base_url=url, trust_env=False) as http,
        ThreadPoolExecutor(8) as pool,
    ):
        http.get("/health")
        waiting = [pool.submit(http.post, "/v1/score", **form(v)) for v in (1, 2, 3, 4)]
        wait_for(lambda: service.scorer.batcher.pending == 4)
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            answer = http.post("/v1/score", **form())
            taken.append(time.perf_counter() - start)
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert min(taken) < 0.05  # other programs may have the processor now and then
        model.held.set()
        assert [reward(one.result()) for one in waiting] == [5, 6, 7, 8]
        assert http.post("/v1/score", **form()).status_code == 200
        assert 'reason="queue_full"} 5.0' in http.get("/metrics").text


def test_work_that_nobody_waits_for_is_dropped():
    model = FakeModel(seconds=0.2)
    service = make_service(model, deadline_s=0.5)
    batcher = service.scorer.batcher
    with serving(service) as url, httpx.Client(base_url=url, trust_env=False) as http:
        body = json.dumps({"prompt": ["A."] * 40, "image": ["x"] * 40}).encode()
        assert http.post("/compute", content=body).status_code == 422
        # twelve groups of one caller are three batches and more than the deadline
        asked = {"groups": [{"instruction": f"{i}", "candidates": ["c"]} for i in range(40)]}
        parts = [("request", (None, json.dumps(asked))), ("c", ("c", png(9)))]
        answer = http.post("/v1/score", files=parts)
        assert answer.status_code == 504
        assert batcher.pending == batcher.waiting == 0
        done = len(model.batches)
        assert done <= 4
        # a caller that is killed: SO_LINGER 0 resets the connection, as a dead machine's kernel
        sent = httpx.Request("POST", url + "/v1/score", files=parts)
        with dial(url) as raw:
            length = sent.headers["content-length"]
            kind = sent.headers["content-type"]
            text = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
            raw.sendall(f"{text}Content-Length: {length}\r\n\r\n".encode() + sent.read())
            wait_for(lambda: batcher.pending == 40)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wait_for(lambda: batcher.pending == 0)
        assert batcher.waiting == 0 and len(model.batches) < done + 4
        assert reward(http.post("/v1/score", **form())) == 24


def test_hanging_up_within_a_body_is_no_fault_of_the_server(capfd):
    with serving(make_service()) as url, httpx.Client(base_url=url, trust_env=False) as http:
        for kind in ("application/json", "multipart/form-data; boundary=x"):
            with dial(url) as raw:
                raw.sendall(head().replace(b"application/json", kind.encode()) + b"--x")
                time.sleep(0.05)
        wait_for(lambda: 'route="/v1/score",status="499"} 2.0' in http.get("/metrics").text)
    assert "rror" not in capfd.readouterr().err


def test_a_fault_of_our_own_is_logged_once_and_says_nothing(caplog, monkeypatch):
    service = make_service()
    monkeypatch.setattr(service.scorer, "score", None)  # calling it fails
    with serving(service) as url:
        answer = httpx.post(url + "/v1/score", trust_env=False, **form())
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal"
    assert "NoneType" not in answer.text
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert "a request failed" in record.message and record.exc_info


def test_a_device_error_fails_its_batch_and_the_next_one_works(capfd):
    model = FakeModel()
    with serving(make_service(model)) as url, httpx.Client(base_url=url, trust_env=False) as http:
        model.broken = "RESOURCE_EXHAUSTED: secret address"
        answer = http.post("/v1/score", **form())
        assert answer.status_code == 500 and "secret" not in answer.text
        assert http.post("/v1/critique", **form()).status_code == 500
        model.broken = ""
        assert reward(http.post("/v1/score", **form())) == 24
        assert http.post("/v1/critique", **form()).status_code == 200
        assert "jrm_device_errors_total 1.0" in http.get("/metrics").text


def test_no_answer_holds_a_number_that_is_none():
    model = FakeModel()
    score = model.scores
    model.scores = lambda encoded: score(encoded)._replace(
        reward_KR=score(encoded).reward_KR * float("inf")
    )
    with serving(make_service(model)) as url, httpx.Client(base_url=url, trust_env=False) as http:
        answer = http.post("/v1/score", **form())
        (one,) = answer.json()["groups"][0]["candidates"]
        assert one["error"]["code"] == "not_finite" and "Infinity" not in answer.text


def test_slow_senders_are_shown_out():
    service = make_service(receive_s=0.4)
    with serving(service) as url:
        silent, half_head, half_body = dial(url), dial(url), dial(url)
        half_head.sendall(b"POST /v1/score HTTP/1.1\r\nHost: ")
        half_body.sendall(head() + b'{"gro')
        dripping = threading.Thread(target=drip, args=(half_head,))
        dripping.start()
        assert silent.recv(10) == b""
        answer = b"".join(iter(lambda: half_body.recv(4096), b""))  # until it is closed
        assert b" 408 " in answer and b"longer than 0.4 s" in answer
        dripping.join()
        assert half_head.recv(10) == b""
        again = dial(url)  # the second request of a connection, too
        again.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while b"}}" not in answer:
            answer += again.recv(4096)
        again.sendall(b"GET /hea")
        assert again.recv(10) == b""
        for one in (silent, half_head, half_body, again):
            one.close()


def drip(sock: socket.socket) -> None:
    try:
        for _ in range(40):
            sock.sendall(b"x")
            time.sleep(0.02)
    except OSError:
        pass


def test_a_gigabyte_is_refused_from_its_head_and_from_its_first_parts():
    service = make_service(max_body_bytes=1 << 20)
    with serving(service) as url:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with dial(url) as raw:
            raw.sendall(head(length=1 << 30))
            assert b" 413 " in raw.recv(4096)
        with dial(url) as raw:
            raw.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            chunk, sent = b"10000\r\n" + b"x" * 0x10000 + b"\r\n", 0
            try:
                while sent < 1 << 30:
                    raw.sendall(chunk)
                    sent += len(chunk)
            except OSError:
                pass
            assert sent < 64 << 20  # what the sockets' buffers take in
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 64 << 10  # KiB
    service = make_service(max_waiting_bytes=1000)
    with serving(service) as url, httpx.Client(base_url=url, trust_env=False) as http:
        assert http.post("/v1/score", content=b"x" * 2000).status_code == 429
        assert http.post("/v1/score", **form()).status_code == 200


@pytest.fixture
def process():
    """start(seconds of a call, seconds to drain) -> (process, address)."""
    started = []

    def start(seconds: float, drain: float):
        command = [
            sys.executable,
            str(ROOT / "tests" / "service_case.py"),
            f"{seconds}",
            f"{drain}",
        ]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env))
        url = started[-1].stdout.readline().strip()
        wait_for(lambda: httpx.get(url + "/ready", trust_env=False).status_code == 200)
        return started[-1], url

    yield start
    for one in started:
        one.kill()
        one.wait()


def test_sigterm_under_load_answers_what_was_accepted(process):
    server, url = process(0.25, 20)
    with (
        httpx.Client(base_url=url, trust_env=False, timeout=20) as http,
        ThreadPoolExecutor(16) as pool,
    ):
        http.get("/health")
        accepted = [pool.submit(http.post, "/v1/score", **form(v)) for v in range(12)]
        wait_for(lambda: "jrm_pending_groups 12.0" in http.get("/metrics").text)
        server.send_signal(signal.SIGTERM)
        wait_for(lambda: http.get("/ready").status_code == 503)
        late = http.post("/v1/score", **form())
        assert late.status_code == 503 and "retry-after" in late.headers
        assert http.get("/health").status_code == 200
        assert [reward(one.result()) for one in accepted] == [v + 4 for v in range(12)]
    assert server.wait(timeout=10) == 0
    assert "12 requests are answered first" in server.stdout.read()


def test_a_drain_that_takes_too_long_ends_with_a_status(process):
    server, url = process(3, 0.3)
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(httpx.post, url + "/v1/score", trust_env=False, timeout=20, **form())
        wait_for(lambda: "pending_groups 1.0" in httpx.get(url + "/metrics", trust_env=False).text)
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=10) == 1
        assert "1 requests were not answered" in server.stdout.read()
        assert lost.exception() is not None or lost.result().status_code >= 500
