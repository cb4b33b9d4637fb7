"""The entry point as a user calls it, for `test_end_to_end.py`: commands, fixtures, readers."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jrm_jax.benchmarks import make_tiny_backbone
from jrm_jax.checkpoint import open_checkpoints
from jrm_jax.model.backbone import init_backbone
from jrm_jax.model.config import load_config
from jrm_jax.model.weights import save_params

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT.parent / "shared" / "data" / "editreward_example"
SMALL = (
    "--corpus=60", "--hidden=32", "--layers=2", "--heads=4", "--kv-heads=2", "--head-dim=16",
    "--mlp=64", "--vision-hidden=32", "--vision-depth=2", "--vision-heads=2", "--vision-mlp=64",
)  # fmt: skip
STEPS = 12


def make_small_backbone(folder: Path) -> Path:
    """Random weights, a quarter of the packaged width: it compiles in seconds."""
    make_tiny_backbone.main([f"--out={folder}", "--no-weights", *SMALL])
    config = load_config(folder)
    params = jax.jit(lambda key: init_backbone(key, config))(jax.random.key(0))
    save_params(folder, params, config, max_shard_bytes=1 << 30, dtype="float32")
    return folder


@contextlib.contextmanager
def quick_compilation(folder: Path):
    """Compiled programs of this process are kept in `folder`."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: jax.config.values[name] for name in settings}

    def use(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    use(settings)
    try:
        yield
    finally:
        use(before)


@pytest.fixture(scope="session")
def small_backbone(tmp_path_factory) -> Path:
    return make_small_backbone(tmp_path_factory.mktemp("model") / "small")


class Runner:
    """run(...) is the command line; all runs share one world and one cache of compilations."""

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
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            "XLA_FLAGS": "",  # one device
            "COLUMNS": "200",
        }

    def start(self, workdir, config="joint", *, limit=None, **changes) -> subprocess.Popen:
        """`changes`: fields with __ for dots. `limit`: bytes that one file may hold."""
        fields = self.fields | {k.replace("__", "."): v for k, v in changes.items()}
        command = [sys.executable, "-m", "jrm_jax.main", f"--config=configs/{config}.py"]
        command += [f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]

        def confine():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=self.env, preexec_fn=confine if limit else None,
        )  # fmt: skip

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
    done = runner.run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


@pytest.fixture(scope="module")
def stopped(runner, finished):
    """(workdir, exit status, what was printed) of the same run, asked to stop after step 2."""
    workdir = runner.folder / "stopped"
    process = runner.start(workdir)
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


def parameters(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by path: parameters and optimizer state."""
    restored = {
        name: ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / name)
        for name in ("trainable", "opt_state")
    }
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored)
    }
