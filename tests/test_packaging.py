"""The wheel: complete, and at work in an empty folder, where no checkout is near."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from entry_point import QUICK

from jrm_jax.data.world import scenes

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("jrm_jax", "configs")
MODULES = {
    "jrm-train": "jrm_jax.main", "jrm-score": "jrm_jax.score", "jrm-export": "jrm_jax.export",
    "jrm-evaluate": "jrm_jax.evaluate", "jrm-data": "jrm_jax.data.builders",
    "jrm-aot": "jrm_jax.aot", "jrm-serve": "jrm_jax.serve",
}  # fmt: skip
SMALL = (
    "--config=joint", "--config.total_steps=1", "--config.batch_size=4",
    "--config.optimizer.warmup_steps=0", "--config.backbone.scan_unroll=1",
    "--config.data.cache=world", "--config.data.world.train=4", "--config.data.world.valid=0",
    "--config.data.world.test=0", "--config.data.world.hard=0",
)  # fmt: skip
SCORE = """
import sys
from jrm_jax import RewardModel
import jrm_jax
model = RewardModel.load("export")
print(jrm_jax.__file__)
print(*model.score("Make the sky red.", "0.png", ["1.png", "2.png", "0.png"]))
"""


def files(folder: Path) -> set[str]:
    """Everything below, but for what Python leaves."""
    found = {path for top in SHIPPED for path in (folder / top).rglob("*") if path.is_file()}
    return {str(p.relative_to(folder)) for p in found if p.suffix != ".pyc"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, by setuptools itself: nothing is downloaded."""
    setuptools = importlib.util.find_spec("setuptools") and importlib.metadata.version("setuptools")
    if not setuptools or int(setuptools.split(".")[0]) < 77:
        pytest.skip("needs setuptools >= 77: pip install -r requirements-test.txt")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SHIPPED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    texts = ("README.md", "LICENSE", "requirements.txt", "requirements-serve.txt")
    for name in ("pyproject.toml", *texts):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


class Installed:
    """A virtual environment with the wheel; its other packages are those of this one."""

    def __init__(self, folder: Path, wheel: Path):
        self.bin, self.work = folder / "venv" / "bin", folder / "work"
        self.work.mkdir()
        venv.create(folder / "venv", symlinks=True, with_pip=True)
        (self.site,) = (folder / "venv").glob("lib/python*/site-packages")
        self.run("pip", "install", "--no-index", "--no-deps", str(wheel))
        others = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
        (self.site / "others.pth").write_text("\n".join(others) + "\n")

    def run(self, *command: str) -> str:
        """What a program of the environment prints, called in its work folder."""
        env = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "PYTHONHOME")}
        env["XLA_FLAGS"] = QUICK
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.work, env=env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


def test_the_wheel_holds_every_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {name for name in names if name.split("/")[0] in SHIPPED}
    assert shipped == files(ROOT)
    assert "jrm_jax/assets/tiny_qwen3_vl/model.safetensors" in shipped
    assert {"jrm_jax/service/page/page.js", "jrm_jax/adapters/trl.py"} <= shipped
    (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
    needs = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    assert 'Requires-Dist: fastapi; extra == "serve"' in needs
    others = {name.split(".dist-info/")[1] for name in names - shipped}
    assert others == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"
    }  # fmt: skip


def test_every_command_prints_its_help(installed):
    with ThreadPoolExecutor(3) as pool:
        scripts = pool.map(lambda name: installed.run(name, "--help"), MODULES)
        modules = pool.map(lambda m: installed.run("python", "-m", m, "--help"), MODULES.values())
        for name, one, other in zip(MODULES, scripts, modules, strict=True):
            assert "usage: " in one or "Flags:" in one, name
            assert one == other, name


def test_a_model_is_trained_exported_and_asked_for_scores(installed):
    """One step is trained. Configs and backbone are the packaged ones, by name."""
    before = files(installed.site)
    example = scenes.make_example("test", 0, 0)
    pictures = [example.prompt[1].data, *(c.parts[0].data for c in example.candidates)]
    for index, data in enumerate(pictures[:3]):
        (installed.work / f"{index}.png").write_bytes(data)
    installed.run("jrm-train", *SMALL, "--workdir=run")
    written = json.loads((installed.work / "run" / "config.json").read_text())
    assert written["batch_size"] == 4
    installed.run("jrm-export", "--checkpoint=run", "--out=export")
    where, scores = installed.run("python", "-c", SCORE).splitlines()[-2:]
    assert where == str(installed.site / "jrm_jax" / "__init__.py")
    assert len(set(map(float, scores.split()))) == 3
    assert files(installed.site) == before  # nothing is written where the package lies
