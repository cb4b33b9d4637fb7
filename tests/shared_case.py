"""What several tests start from, made once: per test run, by the worker that asks first, or per
process."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from jrm_jax import build, sharding, train

RUN = Path(os.environ["JRM_TEST_RUN"])  # made by conftest.py


def once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` of this test run, which `make(folder)` has filled; others wait meanwhile.

    It is for reading: a test that changes it takes a copy.
    """
    folder, done = RUN / name, RUN / f"{name}.done"
    with (RUN / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a try that failed
            make(folder)
            done.touch()
    return folder


def on_one_device(patch: pytest.MonkeyPatch) -> None:
    """From now on all meshes are of one of the simulated devices; programs for several take twice
    as long to compile."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    patch.setattr(sharding, "make_mesh", lambda *_, **__: mesh)


def run_on_one_device(config: ConfigDict, workdir: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        return train.run(config, workdir)


def share_steps(patch: pytest.MonkeyPatch) -> None:
    """From now on the runs of a config in this process have the same jitted steps; each would trace
    the same programs again."""
    make_steps, made = build.make_steps, {}

    def shared(config, *parts):
        key = config.to_json()
        made[key] = made.get(key) or make_steps(config, *parts)
        return made[key]

    patch.setattr(build, "make_steps", shared)
