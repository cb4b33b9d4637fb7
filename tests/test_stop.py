"""Ctrl-C and SIGTERM: what is answered, what stops, and when."""

import signal
import subprocess
import sys
import time

import pytest
from entry_point import ROOT

from jrm_jax.errors import UserError
from jrm_jax.shell import stop
from jrm_jax.shell.stop import Stopped, StopRequest, ending

PROGRAM = """
import hashlib, time
from jrm_jax.shell.stop import StopRequest, ending
with {context}:
    print("ready", flush=True)
    {work}
"""
BUSY = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)'  # minutes in one call, as a compilation


def start(work: str, context: str = "StopRequest()") -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM.format(work=work, context=context)]
    options = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **options)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)  # it is at work now
    return process


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [(signal.SIGINT, 130, "press again to end now"),
     (signal.SIGTERM, 143, "a second SIGTERM ends it now")],
)  # fmt: skip
def test_an_answer_comes_at_once_and_a_second_signal_ends_at_once(number, status, words):
    with start(BUSY) as process:
        process.send_signal(number)
        process.send_signal(number)  # `timeout` sends two: this is no second wish
        assert process.stderr.readline() == f"stopping after this step; {words}\n"
        time.sleep(2 * stop.REPEAT)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=10) == status
        assert process.stderr.read() == ""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_stopped_is_one_line(number, status):
    with start("time.sleep(60)", "ending('stopped; the same command goes on')") as process:
        process.send_signal(number)
        assert process.wait(timeout=10) == status
        assert process.stderr.read() == "stopped; the same command goes on\n"
        assert process.stdout.read() == ""


def test_a_command_in_a_long_call_answers_on_stderr():
    with start(BUSY, "ending()") as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "stopping; press again to end now\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130


def test_a_request_is_heard_at_the_next_question():
    before = [signal.getsignal(number) for number in stop.SIGNALS]
    said = []
    with StopRequest("stopping here", said.append) as request:
        assert request.now() == 0
        with request.answering("stopping there"):
            signal.raise_signal(signal.SIGTERM)
            until = time.monotonic() + 10
            while not (said and request.now()):
                assert time.monotonic() < until
        assert request.now() == signal.SIGTERM and request.answer == "stopping here"
        with pytest.raises(Stopped) as raised, request.breaking():
            raise AssertionError("it was asked to stop before")
        assert raised.value.status == 143
    assert said == ["stopping there; a second SIGTERM ends it now"]
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before


def test_bad_input_is_one_line():
    with pytest.raises(SystemExit, match="^error: give another file$"), ending():
        raise UserError("give\n  another file")
