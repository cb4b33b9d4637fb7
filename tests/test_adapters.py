"""Adapters as their trainers call them, against a server of the fake model."""

import asyncio
import base64
import io
import sys
import types

import httpx
import numpy as np
import PIL.Image
import pytest
from service_case import BROKEN, FakeModel, make_service, png, serving

from jrm_jax.adapters import verl_omni
from jrm_jax.adapters.flow_grpo import jrm_score, jrm_score_edit_r1
from jrm_jax.adapters.grouping import score_edits
from jrm_jax.adapters.trl import make_reward
from jrm_jax.adapters.verl_omni import compute_score
from jrm_jax.client import GroupScores, RewardClient, RewardError, encode, form

MODEL = FakeModel()
TEXTS = ["Make it red.", "Make it red.", "Add a dog."]
EDITS, SOURCES = (20, 30, 40), (10, 10, 50)


@pytest.fixture(scope="module")
def url():
    with serving(make_service(MODEL)) as found:
        yield found


def wanted(texts=TEXTS, sources=SOURCES, edits=EDITS):
    triples = zip(texts, sources, edits, strict=True)
    return [
        MODEL.expected(text, [] if source is None else [png(source)], [png(edit)])[0, 0]
        for text, source, edit in triples
    ]


def nhwc(*values):
    """uint8 [N, 8, 8, 3] of greys."""
    return np.stack([np.full((8, 8, 3), value, np.uint8) for value in values])


def nchw(*values):
    """float32 [N, 3, 8, 8], 0 to 1."""
    return nhwc(*values).transpose(0, 3, 1, 2).astype(np.float32) / 255


@pytest.mark.parametrize("form", ["numpy", "torch", "pil"])
def test_flow_grpo_and_edit_r1(url, form, monkeypatch):
    images, sources = nchw(*EDITS), nhwc(*SOURCES)
    if form == "torch":
        torch = pytest.importorskip("torch")
        images, sources = torch.tensor(images), torch.tensor(nchw(*SOURCES))
    if form == "pil":
        images, sources = (list(map(PIL.Image.fromarray, nhwc(*v))) for v in (EDITS, SOURCES))
    monkeypatch.setenv("JRM_SERVER", url)
    before = len(MODEL.batches)
    rewards, info = jrm_score("cuda:0")(images, TEXTS, [{}] * 3, ref_images=sources)
    np.testing.assert_array_equal(rewards, wanted())
    assert rewards.dtype == np.float32 and info == {"errors": [None] * 3}
    # the two edits of one source went as one group
    assert sorted(k for batch in MODEL.batches[before:] for k in batch) == [1, 2]
    rewards, _ = jrm_score_edit_r1("cuda:0")(sources, images, TEXTS, [{}] * 3)
    np.testing.assert_array_equal(rewards, wanted())
    score = jrm_score(servers=url)
    rewards, _ = score(images, TEXTS, [{"image": png(s)} for s in SOURCES], only_strict=False)
    np.testing.assert_array_equal(rewards, wanted())
    rewards, _ = score(images, TEXTS, None)
    np.testing.assert_array_equal(rewards, wanted(sources=(None,) * 3))
    rewards, _ = score(images, TEXTS, None, ref_images=sources[:1])
    np.testing.assert_array_equal(rewards, wanted(sources=(10,) * 3))


def multi_score(score_dict, score_functions, calls):
    """How the two trainers' `multi_score` makes their functions and calls them, read in their
    code: by the name of the argument `device`, and by the name of the score."""
    made = {}
    for name in score_dict:
        takes_device = "device" in score_functions[name].__code__.co_varnames
        made[name] = score_functions[name]("cuda:0") if takes_device else score_functions[name]()

    def score(images, prompts, metadata, ref_images=None, only_strict=True):
        total = []
        for name, weight in score_dict.items():
            scores, _ = calls(name)(made[name], images, prompts, metadata, ref_images)
            weighted = [weight * one for one in scores]
            total = [a + b for a, b in zip(total, weighted, strict=True)] if total else weighted
        return total

    return score


def plainly(score, images, prompts, metadata, ref_images):
    return score(images, prompts, metadata)


def test_inside_the_loop_of_edit_r1(url, monkeypatch):
    monkeypatch.setenv("JRM_SERVER", url)

    def calls(name):
        first = lambda f, images, prompts, metadata, refs: f(refs, images, prompts, metadata)  # noqa: E731
        return first if name.startswith("mllm_") else plainly

    sources = list(map(PIL.Image.fromarray, nhwc(*SOURCES)))
    for name in ("mllm_jrm", "jrm"):
        score = multi_score({name: 2.0}, {name: jrm_score_edit_r1}, calls)
        if name == "jrm":
            with pytest.raises(ValueError, match='call it "mllm_jrm"'):
                score(nchw(*EDITS), TEXTS, [{}] * 3, sources)
        else:
            found = score(nchw(*EDITS), TEXTS, [{}] * 3, sources)
            np.testing.assert_array_equal(found, 2 * np.array(wanted()))


def test_inside_the_loop_of_flow_grpo(url, monkeypatch):
    monkeypatch.setenv("JRM_SERVER", url)

    def calls(name):  # with the branch that `jrm_jax.adapters.flow_grpo` asks for
        return lambda f, images, prompts, metadata, refs: f(
            images, prompts, metadata, ref_images=refs
        )

    score = multi_score({"jrm": 1.0}, {"jrm": jrm_score}, calls)
    found = score(nchw(*EDITS), TEXTS, {}, list(map(PIL.Image.fromarray, nhwc(*SOURCES))))
    np.testing.assert_array_equal(found, wanted())


def test_a_failed_item_raises_unless_the_caller_says_otherwise(url):
    images = [png(1), BROKEN]
    with pytest.raises(RewardError, match="not a readable"):
        jrm_score(servers=url)(images, TEXTS[:2], None)
    rewards, info = jrm_score(servers=url, failed=-3.5)(images, TEXTS[:2], None)
    assert rewards[1] == -3.5 and rewards[0] == wanted(TEXTS[:1], (None,), (1,))[0]
    assert info["errors"][0] is None and "readable" in info["errors"][1]
    with pytest.raises(ValueError, match="1 instructions, 2 sources, 2 edits"):
        jrm_score(servers=url)(images, TEXTS[:1], None, ref_images=images)
    with pytest.raises(httpx.ConnectError):  # `failed` is about pictures, not about the network
        jrm_score(servers="http://127.0.0.1:9", failed=0.0)(images, TEXTS[:2], None)


def test_groups_are_cut_and_put_back_in_order(url):
    with RewardClient(url) as client:
        values = list(range(37))
        texts = ["Red."] * 35 + ["Blue.", "Red."]
        rewards, errors = score_edits(client, texts, [None] * 37, [png(v) for v in values])
        np.testing.assert_array_equal(rewards, wanted(texts, [None] * 37, values))
        assert errors == [None] * 37
        assert score_edits(client, [], [], [])[0].shape == (0,)
        # sources that are equal, in whatever form, are one group; others are not
        for same in (nhwc(10, 10), [png(10)] * 2, list(map(PIL.Image.fromarray, nhwc(10, 10)))):
            before = len(MODEL.batches)
            score_edits(client, TEXTS[:2], list(same), [png(1), png(2)])
            assert MODEL.batches[before:] == [[2]]
        before = len(MODEL.batches)
        score_edits(client, TEXTS[:2], list(nhwc(10, 11)), [png(1), png(2)])
        assert sum(MODEL.batches[before:], []) == [1, 1]


def test_sources_are_the_same_where_they_show_the_same():
    """A palette is no part of an image's bytes."""
    red, blue = (PIL.Image.new("RGB", (8, 8), colour).quantize() for colour in ("red", "blue"))
    assert red.tobytes() == blue.tobytes()
    client = Recorder()
    score_edits(client, ["Red."] * 3, [red, blue, red.copy()], [png(v) for v in range(3)])
    assert [[len(one.candidates) for one in groups] for groups in client.asked] == [[2, 1]]


LARGE = encode(PIL.Image.new("1", (8192, 8192)))  # few bytes, many pixels


class Recorder:
    """A client that keeps what it was asked. A reward is the length of the file."""

    def __init__(self):
        self.asked = []

    def score_groups(self, groups):
        self.asked.append(groups)
        rows = [np.array([[len(c)] for c in one.candidates], np.float32) for one in groups]
        return [GroupScores(row, row, ("overall",), (None,) * len(row)) for row in rows]


@pytest.mark.parametrize("sources, edits, requests", [
    # 64 sources of 1 MiB and edits of 2 MiB: ten groups fill a request, almost
    ([b"%02d" % i + bytes(1 << 20) for i in range(64)],
     [bytes((2 << 20) + 2 * i) for i in range(64)], 7),
    # one source: its group is cut, too
    ([None] * 40, [bytes((3 << 20) + 2 * i) for i in range(40)], 4),
    # small files of many pixels: each mention is decoded
    ([LARGE] * 9, [LARGE + bytes(2 * i) for i in range(9)], 3),
    # one picture that no request has room for goes alone
    ([None] * 3, [png(1), bytes(40 << 20), png(2)], 3),
    ([None] * 3, [png(1), png(2), b"not a picture"], 1),
])  # fmt: skip
def test_requests_are_closed_before_they_are_too_large_for_a_server(sources, edits, requests):
    client = Recorder()
    rewards, _ = score_edits(client, ["Red."] * len(edits), sources, edits)
    np.testing.assert_array_equal(rewards, list(map(len, edits)))
    assert len(client.asked) == requests
    for groups in client.asked:
        size = sum(len(part[-1]) for _, part in form(groups))
        assert size < 33 << 20 or sum(len(one.candidates) for one in groups) == 1


def test_verl_omni(url, tmp_path):
    (tmp_path / "000001.png").write_bytes(png(10))
    solution = nhwc(20)[0].transpose(2, 0, 1)  # uint8 CHW

    def ask(info, ground_truth="", **more):
        options = {"servers": url, "images": str(tmp_path), **more}
        return asyncio.run(compute_score("edit", solution, ground_truth, info, **options))

    found = ask({"instruction": "Make it red.", "image": "000001.png"})
    (reward,) = wanted(TEXTS[:1], (10,), (20,))
    assert found == {"score": reward, "overall": reward, "following": -reward}
    (reward,) = wanted(["Add a dog."], (None,), (20,))
    assert ask(None, "Add a dog.")["score"] == reward  # text to image
    for name in ("../000001.png", "/etc/passwd", "."):
        with pytest.raises(ValueError, match="is not in the folder"):
            ask({"instruction": "a", "image": name})
    with pytest.raises(FileNotFoundError):
        ask({"instruction": "a", "image": "2.png"})
    (tmp_path / "bad.png").write_bytes(BROKEN)
    with pytest.raises(RewardError, match="source 0"):
        ask({"instruction": "a", "image": "bad.png"})
    failed = ask({"instruction": "a", "image": "bad.png"}, failed=-1.0)
    assert failed == {"score": -1.0, "overall": -1.0, "following": -1.0}
    # where a reward model runs beside it, verl-omni names that one to every function
    more = {"reward_router_address": "10.0.0.1:80", "reward_model_tokenizer": None,
            "model_name": "/models/judge", "sampling_params": {"max_tokens": 4096}}  # fmt: skip
    assert ask({"instruction": "Make it red.", "image": "000001.png"}, **more) == found

    async def several():
        asks = [compute_score("", nhwc(v)[0], "Red.", {}, servers=url) for v in range(9)]
        return [one["score"] for one in await asyncio.gather(*asks)]

    assert asyncio.run(several()) == wanted(["Red."] * 9, [None] * 9, range(9))
    for _ in range(5):  # a loop for each batch: connections of closed ones are not kept
        ask(None, "Add a dog.")
    assert len(verl_omni._CLIENTS) == 1


def test_trl(url):
    reward = make_reward(url)
    assert reward.__name__ == "jrm"
    pictures = [PIL.Image.fromarray(one) for one in nhwc(*EDITS)]
    sources = [PIL.Image.fromarray(one) for one in nhwc(*SOURCES)]
    common = {"completion_ids": [[1]] * 3, "trainer_state": None}
    found = reward(prompts=TEXTS, completions=pictures, image=sources, **common)
    assert found == wanted() and isinstance(found[0], float)
    assert reward(prompts=TEXTS, completions=pictures, **common) == wanted(sources=(None,) * 3)
    talks = [
        [{"role": "system", "content": "Edit."},
         {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        for text in TEXTS
    ]  # fmt: skip
    said = [
        [{"role": "assistant", "content": [{"type": "image", "image": picture}]}]
        for picture in pictures
    ]
    assert reward(prompts=talks, completions=said, image=sources, **common) == wanted()
    columns = {"asked": TEXTS, "result": pictures, "before": [[one] for one in sources]}
    other = make_reward(url, source="before", edited="result", instruction="asked")
    assert other(prompts=talks, completions=["done"] * 3, **columns) == wanted()
    with pytest.raises(ValueError, match="no image in"):
        reward(prompts=talks, completions=[[{"role": "assistant", "content": "words"}]] * 3)


class RemotePointwiseRewardModel:
    """Flow-Factory's client, from the description of its requests."""

    required_fields = ("prompt", "image")

    def __init__(self, server):
        self.server = server
        assert httpx.get(f"{server}/health").is_success

    def __call__(self, prompt, image=None, video=None, condition_images=None,
                 condition_videos=None, **kwargs):  # fmt: skip
        body = {
            "prompt": prompt,
            "image": [text_of(one) for one in image] if image else None,
            "video": video,
            "condition_images": [[text_of(one) for one in many] for many in condition_images]
            if condition_images else None,
            "condition_videos": condition_videos,
            "kwargs": kwargs or None,
        }  # fmt: skip
        answer = httpx.post(f"{self.server}/compute", json=body, timeout=60)
        answer.raise_for_status()
        assert not answer.json().get("error")
        return answer.json()["rewards"]


def text_of(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_flow_factory(url, monkeypatch):
    for name in ("flow_factory", "flow_factory.rewards", "flow_factory.rewards.my_reward_remote"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = sys.modules["flow_factory.rewards.my_reward_remote"]
    module.RemotePointwiseRewardModel = RemotePointwiseRewardModel
    from jrm_jax.adapters import flow_factory

    flow_factory._found.cache_clear()
    reward = flow_factory.JRMReward(url)
    assert reward.required_fields == ("prompt", "image", "condition_images")
    pictures = [PIL.Image.fromarray(one) for one in nhwc(*EDITS)]
    sources = [[PIL.Image.fromarray(one)] for one in nhwc(*SOURCES)]
    found = reward(prompt=TEXTS, image=pictures, condition_images=sources, step=3)
    assert found == wanted()
    assert reward(prompt=TEXTS, image=pictures) == wanted(sources=(None,) * 3)
    flow_factory._found.cache_clear()
    with pytest.raises(AttributeError):
        flow_factory.nothing  # noqa: B018
