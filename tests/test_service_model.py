"""The service around a real model: the same numbers as `RewardModel`, whoever else asks."""

import collections
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from entry_point import QUICK
from export_case import family_run, make_groups
from service_case import BROKEN, serving

from jrm_jax import RewardModel, serve
from jrm_jax.benchmarks.load import wait_ready
from jrm_jax.client import RewardClient
from jrm_jax.service.app import Service
from jrm_jax.service.limits import Limits
from jrm_jax.service.scorer import Scorer
from jrm_jax.service.server import listen
from jrm_jax.serving.groups import Group, read_picture

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model():
    return RewardModel.load(family_run("qwen3_vl"), batch_size=4, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def by_rung(model):
    """{rung: groups as files}, the two rungs that hold most; compiled."""
    found = collections.defaultdict(list)
    for text, source, candidates in make_groups(14)[2:]:
        group = Group(text, [read_picture(source)], [read_picture(c) for c in candidates])
        found[model.bucket_of(model.encode(group))].append(group)
    two = sorted(found, key=lambda rung: -len(found[rung]))[:2]
    assert set(two) <= set(model.buckets)
    model.warm(two)
    return {rung: found[rung] for rung in two}


@pytest.fixture(scope="module")
def groups(by_rung):
    found = [group for groups in by_rung.values() for group in groups]
    assert len(found) >= 8
    return found


def test_scores_are_those_of_the_model_to_the_bit(model, groups, by_rung):
    wanted = []
    for group in groups:
        row = model.encode(group)
        (alone,) = model.score_rows(model.bucket_of(row), [row])
        wanted.append(alone.reward_KR)
        # another program, of one row, sums in another order
        plain = model.score(group.instruction, group.source, group.candidates)
        np.testing.assert_allclose(alone.reward_KR[:, 0], plain, rtol=0, atol=1e-5)
    assert np.std(np.concatenate(wanted)) > 0.1
    service = Service(Limits())
    service.scorer = Scorer(model, service.limits, service.metrics, list(by_rung))
    order = random.Random(0).choices(range(len(groups)), k=48)
    with serving(service) as url, RewardClient(url) as client, ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda i: client.score_groups([groups[i]])[0], order))
        for index, scores in zip(order, found, strict=True):
            np.testing.assert_array_equal(scores.reward_KR, wanted[index])
            assert scores.dimensions == model.dimensions
        together = client.score_groups(groups)
        for scores, reward_KR in zip(together, wanted, strict=True):
            np.testing.assert_array_equal(scores.reward_KR, reward_KR)
        # one candidate is broken: the others keep their scores
        group = groups[0]
        (mixed,) = client.score_groups([group._replace(candidates=[*group.candidates, BROKEN])])
        assert mixed.errors[-1] and not any(mixed.errors[:-1])
        np.testing.assert_array_equal(mixed.reward_KR[:-1], wanted[0])
        # more candidates than a program has are laid into several rows
        many = group._replace(candidates=[*group.candidates] * 5)
        (scores,) = client.score_groups([many])
        np.testing.assert_allclose(
            scores.reward_KR, np.concatenate([wanted[0]] * 5), rtol=0, atol=1e-5
        )
        numbers = service.metrics
        assert numbers.batch_rows._value.get() < 4 * len(order)  # requests shared batches
        text = client.critique(group.instruction, group.source, group.candidates[:1])[0]
        assert text == model.critique(group.instruction, group.source, group.candidates[:1])[0]


def test_the_command_serves_and_ends_when_asked_to(model, groups, free_port, tmp_path):
    (tmp_path / "token").write_text("a-token-of-some-length\n")
    command = [
        sys.executable, "-m", "jrm_jax.serve", f"--model={family_run('qwen3_vl')}",
        f"--port={free_port}", f"--token_file={tmp_path / 'token'}", "--batch_size=4", "--warm=2",
    ]  # fmt: skip
    env = {**os.environ, "XLA_FLAGS": QUICK}  # one device, as `model` has
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    try:
        wait_ready(free_port, process)
        row = model.encode(groups[0])
        (wanted,) = model.score_rows(model.bucket_of(row), [row])
        with RewardClient(f"http://127.0.0.1:{free_port}", "a-token-of-some-length") as client:
            (found,) = client.score_groups(groups[:1])
        np.testing.assert_allclose(found.reward_KR, wanted.reward_KR, rtol=0, atol=1e-5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
    said = process.stderr.read()
    assert "ready: 2 programs" in said and "stopping: 0 requests" in said
    assert "a-token" not in said


@pytest.mark.parametrize("arguments, words", [
    (["--model=/nowhere"], "/nowhere is no folder"),
    (["--model=/nowhere", "--host=0.0.0.0"], "--token_file"),
    (["--model=/nowhere", "--host=no.such.host.invalid"], "no.such.host.invalid"),
    (["--model=/nowhere", "--port=0"], "from 1 to 65535"),
    (["--model=/nowhere", "--token_file=/nowhere"], "cannot be read"),
    (["--model=/nowhere", "--max_queue=3"], "cannot hold one request"),
    (["--model=/nowhere", "--deadline_s=0"], "larger than zero"),
    (["--model=/nowhere", "--deadline_s=nan"], "finite"),
    (["--model=/nowhere", "--batch_size=0"], "--batch_size=0: at least 1"),
    (["--model=/nowhere", "--programs=-1"], "--programs=-1: at least 1"),
    (["--model=/nowhere", "--warm=-2"], "--warm=-2: at least -1"),
])  # fmt: skip
def test_bad_arguments_are_one_line(arguments, words, capsys, monkeypatch, free_port):
    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(serve, "leave", leave)
    if not any("--port" in one for one in arguments):
        arguments = [*arguments, f"--port={free_port}"]
    with pytest.raises(SystemExit) as ended:
        serve.main(arguments)
    assert ended.value.code == 1
    (line,) = [s for s in capsys.readouterr().err.splitlines() if "error" in s]
    assert line.startswith("error: ") and words in line


@pytest.fixture
def free_port():
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    return port
