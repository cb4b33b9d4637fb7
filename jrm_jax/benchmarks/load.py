"""Load on a reward service, from this machine: connections that cost little, and its process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from jrm_jax.client import form
from jrm_jax.data.world import scenes
from jrm_jax.serving.groups import Group


def make_groups(count: int, candidates: int, split: str = "valid") -> list[Group]:
    """Groups of the built-in world with just so many candidates, as encoded files."""
    found: list[Group] = []
    index = 0
    while len(found) < count:
        example = scenes.make_example(split, index, 0)
        index += 1
        words, source = example.prompt
        pictures = [candidate.parts[0].data for candidate in example.candidates]
        if len(pictures) >= candidates:
            found.append(Group(words.text, source.data, pictures[:candidates]))
    return found


def request_of(groups: Sequence[Group], path: str = "/v1/score") -> bytes:
    """A whole HTTP request that asks for them: a form with the pictures as bytes."""
    made = httpx.Request("POST", f"http://127.0.0.1{path}", files=form(groups))
    return raw_request(path, made.read(), made.headers["content-type"])


def raw_request(path: str, body: bytes, kind: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Connection:
    """One client that stays connected, as trainers' do."""

    def __init__(self, port: int):
        self._port = port
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """(status, body)."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(request)
        await self._writer.drain()
        head = await self._reader.readuntil(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next(int(v[15:]) for v in lines if v.startswith(b"content-length:"))
        body = await self._reader.readexactly(length)
        if b"connection: close" in lines:
            self.close()
        return int(head[9:12]), body

    async def send_part(self, part: bytes) -> None:
        """Send the beginning of a request and hang up."""
        self.close()
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(part)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        await asyncio.sleep(0.02)
        writer.transport.abort()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@contextlib.contextmanager
def server_process(model: Path, *options: str) -> Iterator[tuple[int, int]]:
    """(port, process id) of `python -m jrm_jax.serve`, ready."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "jrm_jax.serve", f"--model={model}", f"--port={port}"]
    process = subprocess.Popen([*command, *options])
    try:
        wait_ready(port, process)
        yield port, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_ready(port: int, process: subprocess.Popen) -> None:
    """
    Raises:
        RuntimeError: the process has ended.
    """
    while process.poll() is None:
        with contextlib.suppress(OSError):  # not listening yet, or 503 while it loads
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5)
            return
        time.sleep(0.1)
    raise RuntimeError(f"the server ended with status {process.returncode}")


def rewards(body: bytes) -> list[list[float]]:
    """[groups][candidates] of an answer of /v1/score; NaN where an error stands."""
    groups = json.loads(body)["groups"]
    return [[one.get("reward", float("nan")) for one in group["candidates"]] for group in groups]


def memory_mib(pid: int) -> float:
    """Resident memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process, since it started."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def open_files(pid: int) -> int:
    """Handles of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))
