"""What goes over the wire: our format, UniRL's and Flow-Factory's, and how requests are refused."""

import base64
import json
import tracemalloc

import httpx
import pytest
from service_case import BROKEN, FakeModel, header_of, make_service, png, serving

from jrm_jax.service.formats import FlowFactoryIn, UniRLIn
from jrm_jax.service.refusals import STATUS, Refused
from jrm_jax.service.wire import ScoreIn, parse

MODEL = FakeModel()


def b64(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


@pytest.fixture(scope="module")
def http():
    service = make_service(MODEL, max_body_bytes=200_000, max_groups=5, max_candidates=6,
                           max_sources=2, max_instruction=50, max_pixels=10_000)  # fmt: skip
    with serving(service) as url, httpx.Client(base_url=url, trust_env=False) as client:
        yield client


def group(instruction="Make it red.", sources=(10,), candidates=(20, 30)):
    return {
        "instruction": instruction,
        "sources": [b64(png(v)) for v in sources],
        "candidates": [b64(png(v)) for v in candidates],
    }


def rewards(instruction, sources, candidates):
    reward_KR = MODEL.expected(instruction, [png(v) for v in sources], [png(v) for v in candidates])
    return reward_KR[:, 0].tolist()


def test_v1_json(http):
    second = group("Another.", (), (5,))
    second["candidates"] = ["data:image/webp;base64," + b64(png(5, kind="WEBP"))]
    answer = http.post("/v1/score", json={"groups": [group(), second]})
    assert answer.status_code == 200
    found = answer.json()
    assert found["dimensions"] == ["overall", "following"] and found["model"]["step"] == 7
    first, other = found["groups"]
    assert [c["reward"] for c in first["candidates"]] == rewards("Make it red.", (10,), (20, 30))
    (one,) = other["candidates"]
    assert one["reward"] == rewards("Another.", (), (5,))[0]
    assert one["dimensions"]["following"] == {"reward": -one["reward"], "normalised": None}
    assert one["dimensions"]["overall"] == {k: one[k] for k in ("reward", "normalised")}


def test_v1_forms_carry_bytes(http):
    body = {"groups": [
        {"instruction": "Make it red.", "sources": ["s"], "candidates": ["a", "b"]},
        {"instruction": "Again.", "sources": ["s"], "candidates": ["b"]},
    ]}  # fmt: skip
    files = {"s": png(10), "a": png(20, 200), "b": png(30)}  # `a` is beyond the pixels allowed
    parts = [("request", (None, json.dumps(body))), *((n, (n, d)) for n, d in files.items())]
    assert http.post("/v1/score", files=parts).status_code == 422
    parts[2] = ("a", ("a", png(20)))
    first, second = http.post("/v1/score", files=parts).json()["groups"]
    assert [c["reward"] for c in first["candidates"]] == rewards("Make it red.", (10,), (20, 30))
    assert [c["reward"] for c in second["candidates"]] == rewards("Again.", (10,), (30,))
    plain = [("instruction", (None, "Make it red.")), ("source", ("s.png", png(10))),
             ("candidate", ("../../etc/passwd", png(20))),
             ("candidate", ("b", png(30)))]  # fmt: skip
    (only,) = http.post("/v1/score", files=plain).json()["groups"]
    assert [c["reward"] for c in only["candidates"]] == rewards("Make it red.", (10,), (20, 30))
    for wrong, words in (
        ([*parts[:1], parts[1]], "no part of the form has the name 'a'"),
        ([*plain, ("sauce", ("s", b""))], "'sauce'"),
        ([plain[0], ("candidate", (None, "/etc/passwd"))], "send pictures as files"),
        (plain[1:], "groups[0].instruction"),
        ([*parts, parts[1]], "two parts have the name 's'"),
        ([*parts, parts[0]], "two parts have the name 'request'"),
        ([*parts, ("instruction", (None, "Red."))], "a field with the name 'instruction'"),
        ([*parts, ("seed", (None, "3"))], "a field with the name 'seed'"),
        ([*plain, plain[0]], "two parts have the name 'instruction'"),
        ([*plain, ("seed", ("s", b"3"))], "a file with the name 'seed'"),
        (plain[:1], "groups[0].candidates"),
    ):
        answer = http.post("/v1/score", files=wrong)
        assert answer.status_code == 422 and words in answer.json()["detail"], answer.text
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x; charset=zlib"):
        answer = http.post("/v1/score", content=b"--x\r\nbad", headers={"content-type": kind})
        assert answer.status_code == 422, answer.text
    answer = http.post("/v1/score", content=b"a=b", headers={"content-type": "text/plain"})
    assert answer.status_code == 415


def test_a_picture_that_cannot_be_scored_has_an_error_and_its_neighbours_scores(http):
    given = group(candidates=(20, 30))
    bad = {
        "truncated": b64(BROKEN), "text": b64(b"no picture"), "svg": b64(b"<svg></svg>"),
        "path": "/etc/passwd", "address": "http://127.0.0.1/a.png", "empty": "",
        "tiff": b64(png(3, kind="TIFF")), "words": "data:image/png,%00", "ü": "ü",
    }  # fmt: skip
    wanted = rewards("Make it red.", (10,), (20, 30))
    for name, picture in bad.items():
        mixed = {**given, "candidates": [given["candidates"][0], picture, given["candidates"][1]]}
        answer = http.post("/v1/score", json={"groups": [mixed]})
        first, one, last = answer.json()["groups"][0]["candidates"]
        assert [first["reward"], last["reward"]] == wanted, name
        assert one["error"]["code"] == "picture" and list(one) == ["error"], name
        sourced = {**given, "sources": [picture]}
        (found,) = http.post("/v1/score", json={"groups": [sourced]}).json()["groups"]
        codes = [c["error"]["code"] for c in found["candidates"]]
        assert codes == ["source", "source"], name


@pytest.mark.parametrize("change, words", [
    ({"candidates": []}, "groups[0].candidates"),
    ({"candidates": None}, "groups[0].candidates"),
    ({"candidates": [b64(png(1))] * 7}, "7 candidates; at most 6"),
    ({"candidates": [""] * 10_000}, "10,000 candidates; at most 6"),
    ({"sources": [b64(png(1))] * 3}, "3 sources; at most 2"),
    ({"instruction": "x" * 51}, "51 characters"),
    ({"instruction": ""}, "groups[0].instruction"),
    ({"instruction": 3}, "groups[0].instruction"),
    ({"sauce": []}, "groups[0].sauce"),
    ({"sources": [b64(header_of(101, 101))]}, "at most 10,000 pixels"),
    ({"candidates": [b64(header_of(100_000, 100_000))]}, "pixels"),
    ({"candidates": [b64(header_of(1, 9_000))]}, "200 times"),
])  # fmt: skip
def test_what_is_too_much_or_misspelt_is_422(http, change, words):
    answer = http.post("/v1/score", json={"groups": [{**group(), **change}]})
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["detail"] and "iVBOR" not in answer.text


def test_other_bodies_are_refused(http):
    headers = {"content-type": "application/json"}
    for body in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 50_000, b'{"groups": []}',
                 b'{"groups": [{"instruction": "\\ud800", "candidates": [""]}]}'):  # fmt: skip
        assert http.post("/v1/score", content=body, headers=headers).status_code == 422, body[:20]
    too_many = {"groups": [group()] * 6}
    assert "6 groups; at most 5" in http.post("/v1/score", json=too_many).json()["detail"]
    answer = http.post("/v1/score", content=b"x" * 200_001, headers=headers)
    assert answer.status_code == 413
    # without a length: it is counted as it comes
    answer = http.post("/v1/score", content=iter([b"x" * 50_000] * 5), headers=headers)
    assert answer.status_code == 413
    assert http.get("/v1/score").status_code == 405
    assert http.get("/page/../../etc/passwd").status_code == 404


@pytest.mark.parametrize("kind, body, entry", [
    (ScoreIn, '{"groups": [ENTRIES]}', '{"x": 1}'), (ScoreIn, '{"groups": [ENTRIES]}', "1"),
    (ScoreIn, '{"groups": [{"instruction": "a", "candidates": [ENTRIES]}]}', "1"),
    (ScoreIn, '{"groups": [ENTRIES]}', '{"instruction": "a", "candidates": ["b"]}'),
    (UniRLIn, '{"requests": [ENTRIES]}', '{"x": 1}'), (FlowFactoryIn, '{"prompt": [ENTRIES]}', "1"),
    (FlowFactoryIn, '{"prompt": ["a"], "condition_images": [ENTRIES]}', "[1]"),
])  # fmt: skip
def test_a_body_of_many_faults_takes_little(kind, body, entry):
    """As what each takes is many times its bytes."""
    for count in (100_000, 2_000_000):
        text = body.replace("ENTRIES", ",".join([entry] * count)).encode()
        tracemalloc.start()
        try:
            with pytest.raises(Refused) as refused:
                parse(kind, text)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert most < 60e6 and len(str(refused.value)) < 500


def test_many_unknown_fields_are_counted_and_long_names_are_cut():
    fields = {f"{'x' * 200}{i}": 1 for i in range(5000)}
    with pytest.raises(Refused, match="5,002 fields are not as /docs says"):
        parse(ScoreIn, json.dumps({"groups": [fields]}))
    with pytest.raises(Refused) as refused:
        parse(ScoreIn, json.dumps({"groups": [{"instruction": "a", "x" * 5000: 1}]}))
    assert f"groups[0].{'x' * 80}: " in str(refused.value) and len(str(refused.value)) < 300


def test_critique(http):
    asked = {"groups": [group()], "temperature": 0.5, "seed": 3}
    (found,) = http.post("/v1/critique", json=asked).json()["groups"]
    texts = [c["text"] for c in found["candidates"]]
    assert texts == ["Make it red. 0.5 3 20", "Make it red. 0.5 3 30"]
    for most in (1, 2, 3, 128):  # one program for any number of tokens
        (found,) = http.post("/v1/critique", json={**asked, "max_tokens": most}).json()["groups"]
        assert [c["text"] for c in found["candidates"]] == [text[:most] for text in texts]
    assert MODEL.critique_programs == {(128, True)}
    asked["groups"][0]["candidates"][0] = b64(BROKEN)
    first, last = http.post("/v1/critique", json=asked).json()["groups"][0]["candidates"]
    assert first["error"]["code"] == "picture" and last["text"].endswith("30")
    plain = [("instruction", (None, "Red.")), ("temperature", (None, "0.25")),
             ("candidate", ("a.png", png(20)))]  # fmt: skip
    (found,) = http.post("/v1/critique", files=plain).json()["groups"]
    assert found["candidates"] == [{"text": "Red. 0.25 0 20"}]
    for change in ({"max_tokens": 129}, {"temperature": -1}, {"temperature": 1e999}, {"seed": -1},
                   {"groups": [group()] * 2}, {"beams": 3}):  # fmt: skip
        body = json.dumps({**asked, **change})
        answer = http.post("/v1/critique", content=body)
        assert answer.status_code == 422, answer.text


def turn(value, text="Make it red."):
    return {"text": text, "image_b64": b64(png(value, kind="JPEG"))}


def test_unirl(http):
    """Written from the description of its format in the wild, field by field."""
    ask = {"required_rewards": ["jrm"], "metadata": None}
    body = {"requests": [
        {"history": [turn(10), turn(20)], **ask},
        {"history": [turn(9, "A dog.")], **ask, "metadata": {"id": 3}},
        {"history": [turn(10), turn(30)], **ask},
        {"history": [turn(10), {"text": "Make it red.", "image_b64": b64(BROKEN)}], **ask},
        {"history": [turn(10), turn(40)], "required_rewards": []},
    ]}  # fmt: skip
    before = len(MODEL.batches)
    answer = http.post("/score", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    edited, drawn, again, broken, unasked = found["results"]
    wanted = rewards("Make it red.", (10,), (20, 30))
    for result, reward in ((edited, wanted[0]), (again, wanted[1]),
                           (drawn, rewards("A dog.", (), (9,))[0])):  # fmt: skip
        assert result == {"jrm": {"reward": reward, "overall": reward, "following": -reward}}
    assert broken == unasked == {}
    assert [list(e) for e in found["errors"]] == [[], [], [], ["jrm"], []]
    assert "truncated" in found["errors"][3]["jrm"]
    # the three edits of one source went as one group
    assert sorted(k for batch in MODEL.batches[before:] for k in batch) == [1, 2]
    health = http.get("/health").json()
    assert health == {"status": "ok", "rewards": {"jrm": ["reward", "overall", "following"]}}
    assert http.get("/rewards").json() == {"rewards": ["jrm"]}
    assert http.post("/score", json={"requests": []}).json() == {"results": [], "errors": []}


def test_unirl_refusals(http):
    def post(**item):
        base = {"history": [turn(1), turn(2)], "required_rewards": ["jrm"], "metadata": None}
        return http.post("/score", json={"requests": [{**base, **item}]})

    assert post().status_code == 200
    assert post(required_rewards=["jrm", "hpsv3"]).status_code == 400
    assert "hpsv3" in post(required_rewards=["hpsv3"]).json()["detail"]
    assert post(history=[turn(1), {"text": "only words"}]).status_code == 422
    assert post(history=[{"text": "a", "image_b64": None}]).status_code == 422
    assert post(history=[{"text": "a", "video_path": "/etc/passwd"}]).status_code == 422
    assert post(history=[]).status_code == post(history=[turn(1)] * 3).status_code == 422


def test_flow_factory(http):
    """As its client writes it: every field is there, most of them null."""
    empty = {"video": None, "condition_videos": None, "kwargs": None}
    body = {
        "prompt": ["Make it red.", "Make it red.", "A dog."],
        "image": [b64(png(v)) for v in (20, 30, 9)],
        "condition_images": [[b64(png(10))], [b64(png(10))], []],
        **empty,
    }
    wanted = [*rewards("Make it red.", (10,), (20, 30)), *rewards("A dog.", (), (9,))]
    answer = http.post("/compute", json=body)
    assert answer.status_code == 200 and answer.json() == {"rewards": wanted}
    plain = {"prompt": ["A dog."], "image": [b64(png(9))], "condition_images": None, **empty}
    assert http.post("/compute", json=plain).json() == {"rewards": wanted[2:]}
    for change, words in (
        ({"image": [b64(BROKEN)]}, "image[0]: not a readable image"),
        ({"image": [b64(png(9))] * 2}, "1 prompts, 2 images"),
        ({"image": None}, "one edited picture"),
        ({"video": [[b64(png(9))]]}, "not videos"),
        ({"condition_images": [[b64(BROKEN)]]}, "source 0"),
    ):
        answer = http.post("/compute", json={**plain, **change})
        assert answer.status_code == 422 and words in answer.json()["detail"], answer.text
        assert "rewards" not in answer.json()


def test_every_answer_is_counted_and_careful(http):
    answer = http.get("/metrics")
    assert 'jrm_rejections_total{reason="body_too_large"}' in answer.text
    assert 'jrm_requests_total{route="/compute",status="422"}' in answer.text
    assert 'jrm_faults_total{code="source"}' in answer.text
    for path in ("/metrics", "/", "/nowhere", "/health"):
        headers = http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
    assert "server" not in headers
    assert all(400 <= status < 600 for status in STATUS.values())
