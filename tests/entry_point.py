"""The entry point as a user calls it, for `test_end_to_end.py`: commands, fixtures, readers."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from shared_case import once

from jrm_jax.benchmarks import make_tiny_backbone
from jrm_jax.benchmarks.kill_test import SMALL
from jrm_jax.checkpoint import open_checkpoints
from jrm_jax.checkpoint import read_arrays as parameters  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT.parent / "shared" / "data" / "editreward_example"
STEPS = 12
# What the compiler is told by default: as in the tests' own process. A user tells it nothing.
QUICK = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)


def make_small_backbone(folder: Path) -> Path:
    """A copy in `folder` of the small backbone: a quarter of the packaged width, random weights."""
    return shutil.copytree(once("small", _write_small_backbone), folder)


def _write_small_backbone(folder: Path, *options: str) -> None:
    make_tiny_backbone.main([f"--out={folder}", *SMALL, *options])


def make_small_hybrid(folder: Path) -> Path:
    """The same of Qwen3.5: two blocks of three layers, random weights."""
    return shutil.copytree(once("hybrid", _write_small_hybrid), folder)


def _write_small_hybrid(folder: Path) -> None:
    _write_small_backbone(folder, "--layers=6", "--interval=3")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="session")
def deepstack_backbone() -> Path:
    return once("small", _write_small_backbone)


@pytest.fixture(scope="session")
def small_backbone() -> Path:
    """For whole runs: each stack of its layers is compiled once, there is no deepstack between."""
    return once("plain", lambda folder: _write_small_backbone(folder, "--deepstack"))


class Runner:
    """run(...) is the command line; all runs share one world."""

    def __init__(self, folder: Path, backbone: Path):
        self.folder = folder
        self.fields = {
            "backbone.path": backbone, "backbone.scan_unroll": 1, "data.cache": folder / "world",
            "data.world.train": 32, "data.world.valid": 8, "data.world.test": 8,
            "data.world.hard": 8, "batch_size": 4, "total_steps": STEPS, "eval_interval": 6,
            "save_interval": 6, "log_interval": 1,
        }  # fmt: skip
        self.env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "COLUMNS": "200",
        }

    def start(
        self, workdir, config="joint", *, limit=None, flags=QUICK, **changes
    ) -> subprocess.Popen:
        """`changes`: fields with __ for dots. `limit`: bytes that one file may hold. `flags`: of
        the compiler, "" for what a user gets."""
        fields = self.fields | {k.replace("__", "."): v for k, v in changes.items()}
        command = [sys.executable, "-m", "jrm_jax.main", f"--config=configs/{config}.py"]
        command += [f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]

        def confine():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=self.env | {"XLA_FLAGS": flags}, preexec_fn=confine if limit else None,
        )  # fmt: skip

    def start_several(
        self, count: int, workdir, record: Path, config="joint", *, port: int, **changes
    ) -> list[subprocess.Popen]:
        """The same command in `count` processes of one device, quickly compiled; each writes the
        example ids of its rows to `record`/PROCESS.jsonl (see `process_case.py`)."""
        fields = self.fields | {k.replace("__", "."): v for k, v in changes.items()}
        command = [sys.executable, str(ROOT / "tests" / "process_case.py"), str(record)]
        command += [f"--config=configs/{config}.py", f"--workdir={workdir}"]
        command += [f"--config.{k}={v}" for k, v in fields.items()]
        record.mkdir(parents=True, exist_ok=True)
        processes = []
        for index in range(count):
            several = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
            with (record / f"{index}.out").open("w") as out:
                processes.append(
                    subprocess.Popen(
                        command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
                        env=self.env | {"XLA_FLAGS": QUICK} | (several if count > 1 else {}),
                    )
                )  # fmt: skip
        return processes

    def run_several(self, count: int, workdir, record: Path, **changes) -> list[int]:
        """Exit statuses."""
        processes = self.start_several(count, workdir, record, port=free_port(), **changes)
        try:
            return [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()

    def run(self, *arguments, **changes) -> subprocess.CompletedProcess:
        process = self.start(*arguments, **changes)
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def refused(self, *arguments, **changes) -> str:
        """The one line of a run that must fail."""
        done = self.run(*arguments, **changes)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 1 and len(lines) == 1, (done.returncode, done.stderr)
        assert lines[0].startswith("error: ")
        return lines[0]


@pytest.fixture(scope="module")
def runner(tmp_path_factory, small_backbone):
    return Runner(tmp_path_factory.mktemp("runs"), small_backbone)


@pytest.fixture(scope="module")
def finished(runner):
    """(workdir, what was printed) of a run that nothing disturbed."""
    workdir = runner.folder / "finished"
    done = runner.run(workdir, flags="")
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


@pytest.fixture(scope="module")
def stopped(runner, finished):
    """(workdir, exit status, what was printed) of the same run, asked to stop after step 2."""
    workdir = runner.folder / "stopped"
    process = runner.start(workdir, flags="")
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith(f"step 2/{STEPS}"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=180) is not None
    return workdir, process.returncode, "".join(printed), process.stderr.read()


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps(workdir: Path) -> list[int]:
    with open_checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.steps()
