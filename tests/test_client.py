"""The client: scores or an error, never a made-up number; light, and patient with 429 and 503."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import PIL.Image
import pytest
from service_case import BROKEN, FakeModel, make_service, png, serving

from jrm_jax import client as client_module
from jrm_jax.client import AsyncRewardClient, RewardClient, RewardError, encode, pixels
from jrm_jax.data.images import decode, to_rgb
from jrm_jax.service.auth import Tokens
from jrm_jax.service.limits import Limits

ROOT = Path(__file__).resolve().parents[1]
MODEL, TOKEN = FakeModel(), "a-token-of-some-length"


@pytest.fixture(scope="module")
def url():
    with serving(make_service(MODEL, Tokens([TOKEN]))) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    with RewardClient(url, TOKEN) as found:
        yield found


def test_scores_are_the_models(client, tmp_path):
    (tmp_path / "a.png").write_bytes(png(20))
    grey = np.full((8, 8, 3), 30, np.uint8)
    forms = [tmp_path / "a.png", png(30), PIL.Image.fromarray(grey), grey, grey.transpose(2, 0, 1)]
    found = client.score("Red.", png(10), forms)
    wanted = MODEL.expected("Red.", [png(10)], [png(v) for v in (20, 30, 30, 30, 30)])
    np.testing.assert_array_equal(found, wanted[:, 0])
    assert found.dtype == np.float32
    stacked = np.stack([np.full((8, 8, 3), v, np.uint8) for v in range(40)])
    found = client.score("Red.", stacked[0], stacked)  # rows of an array are made as they are met
    np.testing.assert_array_equal(found, np.arange(40) + 4)
    groups = [("Red.", [png(1), png(2)], [png(5)]), ("Blue!", None, [png(v) for v in range(20)])]
    scores = client.score_groups(groups)
    for (text, source, candidates), one in zip(groups, scores, strict=True):
        np.testing.assert_array_equal(one.reward_KR, MODEL.expected(text, source, candidates))
        np.testing.assert_array_equal(one.normalised_KR[:, 0], one.reward_KR[:, 0] / 2)
        assert np.isnan(one.normalised_KR[:, 1]).all() and not any(one.errors)
    assert client.critique("Red.", None, [png(9)], seed=4) == ["Red. 0.0 4 9"]


def test_asyncio(url):
    async def ask():
        async with AsyncRewardClient(url, TOKEN) as client:
            scores = await asyncio.gather(
                *(client.score("Red.", None, [png(v)]) for v in range(20))
            )
            with pytest.raises(RewardError):
                await client.score("Red.", None, [BROKEN])
            return [one[0] for one in scores], await client.critique("Red.", None, [png(9)])

    assert asyncio.run(ask()) == ([v + 4 for v in range(20)], ["Red. 0.0 0 9"])


def test_a_candidate_without_a_score_raises(client, url, monkeypatch):
    with pytest.raises(RewardError, match="group 0, candidate 1: not a readable") as error:
        client.score("Red.", None, [png(1), BROKEN])
    assert list(error.value.faults) == [(0, 1)] and error.value.status == 200
    (scores,) = client.score_groups([("Red.", None, [png(1), BROKEN])])
    assert scores.reward_KR[0, 0] == 5 and np.isnan(scores.reward_KR[1]).all()
    assert scores.errors[0] is None and "readable" in scores.errors[1]
    with pytest.raises(RewardError, match="no critique"):
        client.critique("Red.", None, [BROKEN])
    with pytest.raises(RewardError, match="422: groups.0..instruction"):
        client.score("", None, [png(1)])
    monkeypatch.delenv("JRM_TOKEN", raising=False)
    with pytest.raises(RewardError, match="401") as error, RewardClient(url) as stranger:
        stranger.score("Red.", None, [png(1)])
    assert error.value.status == 401
    monkeypatch.setenv("JRM_TOKEN", TOKEN)
    with RewardClient(url) as known:
        assert known.score("Red.", None, [png(1)])[0] == 5
    with pytest.raises(httpx.ConnectError), RewardClient("http://127.0.0.1:9") as nobody:
        nobody.score("Red.", None, [png(1)])


class Busy(BaseHTTPRequestHandler):
    """Answers with the statuses of its list, then with a score."""

    statuses: list = []
    seen: list = []

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.server.server_port, time.monotonic()))
        status = self.statuses.pop(0) if self.statuses else 200
        columns = {"reward": 1.5, "normalised": None}
        one = {**columns, "dimensions": {"overall": columns}}
        body = json.dumps({"dimensions": ["overall"], "groups": [{"candidates": [one]}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def busy(monkeypatch):
    """Addresses of two servers, `Busy` fresh, and pauses a hundred times as short."""
    monkeypatch.setattr(Busy, "statuses", [])
    monkeypatch.setattr(Busy, "seen", [])
    monkeypatch.setattr(client_module.time, "sleep", lambda s, sleep=time.sleep: sleep(s / 100))
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Busy) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}" for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


def test_429_and_503_alone_are_tried_again_at_the_next_server(busy):
    Busy.statuses += [429, 503, 429]
    with RewardClient(busy) as client:
        assert client.score("Red.", None, [png(1)]) == [1.5]
        ports, times = zip(*Busy.seen, strict=True)
        assert len(ports) == 4 and ports[0] == ports[2] != ports[1] == ports[3]
        pauses = np.diff(times)
        assert pauses[2] > pauses[0]  # 1 s and 0.25 s, at most a half longer
        for status in (500, 502, 504, 408, 413, 422):
            Busy.seen.clear()
            Busy.statuses += [status]
            with pytest.raises(RewardError, match=str(status)):
                client.score("Red.", None, [png(1)])
            assert len(Busy.seen) == 1
    Busy.seen.clear()
    Busy.statuses += [503] * 3
    with RewardClient(busy, retries=2) as client, pytest.raises(RewardError, match="503"):
        client.score("Red.", None, [png(1)])
    assert len(Busy.seen) == 3


def test_pixels():
    floats = np.linspace(0, 1, 4 * 5 * 3, dtype=np.float32).reshape(4, 5, 3)
    wanted = np.rint(floats * 255).astype(np.uint8)
    np.testing.assert_array_equal(pixels(floats), wanted)
    np.testing.assert_array_equal(pixels(floats.transpose(2, 0, 1)), wanted)
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(pixels(torch.tensor(wanted)), wanted)
    graph = torch.tensor(floats.transpose(2, 0, 1), requires_grad=True)
    np.testing.assert_array_equal(pixels(graph), wanted)
    assert pixels(graph.bfloat16()).shape == wanted.shape
    for bad in (floats * 255, floats - 0.5, floats * np.nan, floats[..., :2], floats[0],
                wanted.astype(np.int64)):  # fmt: skip
        with pytest.raises(TypeError):
            pixels(bad)
    with pytest.raises(FileNotFoundError):
        encode("no/such/file.png")


def test_pillow_images_are_sent_as_their_files_are_shown(tmp_path):
    """Turned upright, and in any mode, some of which PNG does not have."""
    seen = PIL.Image.fromarray(np.arange(20 * 40 * 3, dtype=np.uint8).reshape(40, 20, 3))
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    modes = ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr")
    cases = [(seen.convert(mode), {}) for mode in modes]
    for image, options in [*cases, (seen, {"exif": turned})]:
        kind = "TIFF" if image.mode == "CMYK" else "PNG"
        if image.mode != "YCbCr":
            image.save(tmp_path / "file", kind, **options)
            image = PIL.Image.open(tmp_path / "file")
        found = decode(encode(image))  # as the service does
        np.testing.assert_array_equal(found, np.asarray(to_rgb(image)))
    assert found.shape == (20, 40, 3)  # as the tag says, 20 x 40 before
    for broken in (b"Exif\0\0no such thing", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        tagged = seen.copy()
        tagged.info["exif"] = broken
        np.testing.assert_array_equal(decode(encode(tagged)), np.asarray(seen))
    for mode in ("F", "I"):
        with pytest.raises(TypeError, match=f"mode {mode}, whose range is not known"):
            encode(seen.convert(mode))


def test_it_imports_quickly_and_without_jax(tmp_path):
    """In an environment that holds the project and the client's three packages, nothing else."""
    allowed = "jrm_jax httpx numpy PIL httpcore h11 anyio idna certifi typing_extensions".split()
    code = f"""
import sys, time
class Wall:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in {allowed!r}:
            return None
        raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Wall())
start = time.process_time()  # on a machine that is busy otherwise
import jrm_jax.client
print(time.process_time() - start)
from jrm_jax.adapters import flow_factory, flow_grpo, trl, verl_omni
print(sorted({{name.partition(".")[0] for name in sys.modules}} & {{"jax", "flax", "torch"}}))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    times = []
    for _ in range(2):  # the second finds the byte code
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seconds, heavy = done.stdout.splitlines()
        assert heavy == "[]"
        times.append(float(seconds))
    assert min(times) < 0.5


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_an_error(bad):
    def candidate(*rewards):
        named = zip("ab", rewards, strict=True)
        return {"dimensions": {n: {"reward": r, "normalised": 1} for n, r in named}}

    rows = [candidate(1.0, 2.0), candidate(bad, 2.0), candidate(1.0, bad)]
    found = {"dimensions": ["a", "b"], "groups": [{"candidates": rows}]}
    scores = client_module.read_scores(json.loads(json.dumps(found)))
    assert scores[0].errors == (None, *["no finite reward"] * 2)
    assert np.isnan(scores[0].reward_KR[1:]).all() and scores[0].reward_KR[0].tolist() == [1, 2]
    with pytest.raises(RewardError, match="2 without a score; group 0, candidate 1: no finite"):
        client_module.first_column(scores)
    assert client_module.first_column(scores, -1.0)[0].tolist() == [1, -1, -1]


def test_a_try_is_longer_than_the_servers_deadline_and_does_not_count_the_wait_for_a_connection():
    with RewardClient("http://rewards") as found:
        timeout = found._http.timeout
    assert timeout.pool is None and timeout.read > Limits().deadline_s
