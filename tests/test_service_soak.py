"""Good and bad requests mixed, from many clients: all answered, rightly, in flat memory.

JRM_SLOW=1 sends 20,000; otherwise a few hundred.
"""

import asyncio
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from service_case import FakeModel

from jrm_jax.benchmarks import load, serve_soak

ROOT = Path(__file__).resolve().parents[1]
REQUESTS = 20_000 if os.environ.get("JRM_SLOW") else 600


@pytest.fixture
def process():
    """(port, process id) of a server of the fake model."""
    command = [sys.executable, str(ROOT / "tests" / "service_case.py"), "0.005", "10"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    port = int(started.stdout.readline().rpartition(":")[2])
    load.wait_ready(port, started)
    yield port, started.pid
    started.kill()
    started.wait()


def test_every_request_is_answered_once_and_rightly(process):
    model = FakeModel()
    groups = load.make_groups(12, 2)
    wanted = [model.expected(g.instruction, [g.source], g.candidates)[:, 0] for g in groups]
    port, pid = process
    cases = serve_soak.make_cases(groups, wanted)
    report = asyncio.run(serve_soak.soak(port, pid, cases, REQUESTS, 32, seed=1))
    assert not report["wrong"], report["wrong_examples"]
    sent = report["planned"]
    for kind, count in sent.items():
        assert report["answered"].get(kind, 0) == (0 if "hang up" in kind else count), kind
    assert len(sent) == len(serve_soak.SHARES)
    files = report["open_files"]
    assert files["end"] <= files["first"] + 4
    if REQUESTS >= 20_000:
        memory = report["memory_mib"]
        assert memory["last"] < 1.1 * memory["first"]
    # and what was wrong would have been seen
    spoilt = {"form": [dataclasses.replace(c, rewards=c.rewards + 1) for c in cases["form"]]}
    again = asyncio.run(serve_soak.soak(port, pid, cases | spoilt, 40, 4, seed=2))
    assert again["wrong"] == again["planned"]["form"] > 0
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert "jrm_pending_groups 0.0" in text and "jrm_waiting_groups 0.0" in text
