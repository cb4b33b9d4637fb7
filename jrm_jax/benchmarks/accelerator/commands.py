"""Whole commands on the device: the start of the default run, the parity tests."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[3]
GROUPS = 800  # as many as give the buckets of the default data
STEPS = 120  # of the second start
PARITY = ("tests/test_parity.py",)
PROCESSES = 4  # of the parity tests
PLATFORMS = ("gpu", "tpu")  # that the tests know besides the CPU


def start(tiny: bool) -> Iterator[Row]:
    """The default command, twice, its data being there: seconds from the start of the process to
    the end of its first step, and those of a step after that. The second start finds the programs
    that the first one compiled."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"--config.data.cache={folder}/data",
            f"--config.data.world.train={64 if tiny else GROUPS}",
            *(f"--config.data.world.{split}=32" for split in ("valid", "test", "hard")),
            *(["--config.batch_size=2"] if tiny else []),
        ]
        environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # as a user's first run finds it
        command = [sys.executable, "-u", "-m", "jrm_jax.main", "--config=configs/joint.py"]
        command += settings
        drawing = _until([*command, f"--workdir={folder}/draw"], environment, "parameters train")
        yield {"start": "draws its data", "seconds_to_data": drawing}
        first = [*command, f"--workdir={folder}/first", "--config.log_interval=1"]
        yield {"start": "first", "seconds_to_step": _until(first, environment, "step 1/")}
        steps = 12 if tiny else STEPS
        second = [*command, f"--workdir={folder}/second", "--config.log_interval=4"]
        seconds = _until(second, environment, f"step {steps}/")
        lines = Path(folder, "second", "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["split"] == "train"]
        late = [row["seconds_per_step"] for row in rows[len(rows) // 2 :]]
        yield {
            "start": "again", "seconds_to_all_steps": seconds, "steps": steps,
            "seconds_per_step": statistics.median(late),
            "compile_seconds": sum(row["seconds_compilation"] for row in rows),
        }  # fmt: skip


def _until(command: list[str], environment: dict[str, str], words: str) -> float:
    """Seconds until the command prints a line with `words`; then it is ended. What it prints is
    printed. Raises RuntimeError if it ends without."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            taken = time.perf_counter() - began
            print(f"{taken:7.1f} s  {line}", end="", flush=True)
            if words in line:
                return taken
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()  # nothing of it is kept
        process.wait()
    raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} before {words!r}")


def parity(tiny: bool) -> Iterator[Row]:
    """The parity tests of all families on this device: how many passed, and which failed."""
    if importlib.util.find_spec("pytest") is None or not (ROOT / "tests").is_dir():
        yield {"failed": "needs pytest and the tests of this repository"}
        return
    asked = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    backend = subprocess.run(asked, capture_output=True, text=True).stdout.split()
    platform = backend[-1] if backend and backend[-1] in PLATFORMS else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", f"--junitxml={report}"]
        command += [*PARITY, *(["-k", "padding"] if tiny else [])]
        if importlib.util.find_spec("xdist"):  # most of their time is compiling, one core each
            command += ["-n", str(min(PROCESSES, os.cpu_count() or 1))]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "JRM_PLATFORM": platform})
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    failed = {
        each.get("name"): " ".join((found.get("message") or "").split())[:300]
        for each in cases
        for found in (*each.iter("failure"), *each.iter("error"))
    }
    skipped = sum(1 for each in cases if each.find("skipped") is not None)
    yield {
        "platform": platform, "passed": len(cases) - len(failed) - skipped, "skipped": skipped,
        "failed_tests": failed,
    }  # fmt: skip
