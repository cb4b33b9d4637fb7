"""Checkpoints: what is kept, what is best, and what becomes of damaged and failed ones."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jrm_jax.checkpoint import open_checkpoints
from jrm_jax.errors import UserError
from jrm_jax.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[1]


def trees(value: float):
    """(trainable, opt_state): large enough that their data does not fit into metadata files."""
    rng = np.random.default_rng(0)
    trainable = {
        "layer": {"kernel": jnp.asarray(rng.normal(size=(64, 32)) + value, jnp.float32)},
        "bias": jnp.full((3,), value, jnp.float32),
    }
    moments = jax.tree.map(lambda x: x * 2, trainable)
    return trainable, (jnp.int32(value), {"mu": moments})


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(checkpoints, step: int, metric: float = math.nan) -> None:
    checkpoints.save(step, *trees(step), {"step": step, "words": f"step {step}"}, metric)


def assert_holds(checkpoints, step: int, wanted: int | None = None) -> None:
    """Restoring (the latest, or `wanted`) gives exactly what `save` wrote at `step`."""
    trainable, opt_state = trees(step)
    found, *restored, meta = checkpoints.restore(abstract(trainable), abstract(opt_state), wanted)
    assert found == step and meta == {"step": step, "words": f"step {step}"}
    jax.tree.map(np.testing.assert_array_equal, restored, [trainable, opt_state])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints 1 (the best) and 2. To be copied."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with open_checkpoints(folder) as checkpoints:
        save(checkpoints, 1, 0.9)
        save(checkpoints, 2, 0.1)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_the_latest_two_and_the_best_are_kept(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [] and checkpoints.best_step() is None
        for step, metric in enumerate((0.1, 0.9, 0.2, 0.3, 0.4), 1):
            save(checkpoints, step, metric)
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.best_step() == 2
        assert_holds(checkpoints, 5)
        assert_holds(checkpoints, 2, wanted=2)


def test_the_best_survives_a_restart(copy):
    """The ranks are on disk: another process knows the best, and keeps it."""
    with open_checkpoints(copy) as checkpoints:
        assert checkpoints.best_step() == 1
        for step in (3, 4, 5):
            save(checkpoints, step, 0.5)
        assert checkpoints.steps() == [1, 4, 5] and checkpoints.best_step() == 1
        save(checkpoints, 6, 1.0)
        assert checkpoints.steps() == [5, 6] and checkpoints.best_step() == 6
        assert checkpoints.read_meta(6)["words"] == "step 6"


def test_nan_ranks_worst(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, math.nan)
        assert checkpoints.best_step() is None
        save(checkpoints, 2, -1e6)
        for step, metric in enumerate((math.nan, math.inf, -math.inf, math.nan), 3):
            save(checkpoints, step, metric)
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.best_step() == 2


def test_restores_into_the_shardings_asked_for(tmp_path):
    mesh = make_mesh(1, 8, 1)
    split = jax.NamedSharding(mesh, P("fsdp"))
    whole = jax.NamedSharding(mesh, P())
    value = jax.device_put(jnp.arange(64.0).reshape(16, 4), split)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"kernel": value}, {"mu": value}, {}, math.nan)
        other = jax.NamedSharding(make_mesh(2, 2, 2), P("tensor", "fsdp"))
        for wanted, shard in ((whole, (16, 4)), (other, (8, 2)), (split, (2, 4))):
            target = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=wanted)
            _, trainable, opt_state, _ = checkpoints.restore({"kernel": target}, {"mu": target})
            for found in (trainable["kernel"], opt_state["mu"]):
                assert found.sharding.is_equivalent_to(wanted, 2)
                assert {s.data.shape for s in found.addressable_shards} == {shard}
                np.testing.assert_array_equal(found, value)
        _, trainable, opt_state, _ = checkpoints.restore({"kernel": target})
        assert opt_state is None and trainable["kernel"].shape == (16, 4)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def truncate_data(step: Path) -> None:
    large = [path for path in files(step / "trainable") if path.stat().st_size > 1000]
    assert large
    for path in large:
        os.truncate(path, path.stat().st_size // 2)


def flip_data(step: Path) -> None:
    large = [path for path in files(step / "opt_state") if path.stat().st_size > 1000]
    assert large
    for path in large:
        data = bytearray(path.read_bytes())
        for at in range(0, len(data), 7):
            data[at] ^= 0xFF
        path.write_bytes(bytes(data))


def empty_everything(step: Path) -> None:
    for path in files(step):
        os.truncate(path, 0)


def lose_parameters(step: Path) -> None:
    shutil.rmtree(step / "trainable")


def lose_moments(step: Path) -> None:
    shutil.rmtree(step / "opt_state")


def lose_meta(step: Path) -> None:
    shutil.rmtree(step / "meta")


def lose_everything(step: Path) -> None:
    for path in files(step):
        path.unlink()


DAMAGE = (
    truncate_data, flip_data, empty_everything, lose_parameters, lose_moments, lose_meta,
    lose_everything,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_latest_falls_back_to_the_one_before(copy, damage):
    damage(copy / "2")
    said = []
    with open_checkpoints(copy, said.append) as checkpoints:
        assert checkpoints.best_step() == 1
        assert_holds(checkpoints, 1)
        warnings = [words for words in said if "checkpoint 2 cannot be read" in words]
        assert len(warnings) == 1 and "\n" not in warnings[0], said
        checkpoints.delete_after(1)
        assert checkpoints.steps() == [1]
        save(checkpoints, 2, 0.2)  # training gets there again
        assert_holds(checkpoints, 2)


def test_damaged_metrics_cost_only_the_rank(copy):
    (copy / "1" / "metrics" / "metrics").write_text("{")
    said = []
    with open_checkpoints(copy, said.append) as checkpoints:
        assert "ranks last" in " ".join(said)
        assert checkpoints.best_step() == 2
        assert_holds(checkpoints, 1, wanted=1)


def test_nothing_readable_is_one_line(copy):
    for step in ("1", "2"):
        lose_parameters(copy / step)
    said = []
    with pytest.raises(UserError, match="no checkpoint can be read") as caught:
        with open_checkpoints(copy, said.append) as checkpoints:
            assert_holds(checkpoints, 1)
    assert "\n" not in str(caught.value) and len(said) == 2
    assert "1:" in str(caught.value) and "2:" in str(caught.value)


def test_half_written_checkpoints_are_ignored_and_removed(copy):
    half = copy / "3.orbax-checkpoint-tmp-17"
    shutil.copytree(copy / "2", half)
    (half / "trainable" / "_METADATA").unlink()
    with open_checkpoints(copy) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert_holds(checkpoints, 2)
    assert not half.exists()


FULL = """
import resource, sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from test_checkpoint import save
from jrm_jax.checkpoint import open_checkpoints
from jrm_jax.errors import UserError

try:
    with open_checkpoints(Path({folder!r})) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
        save(checkpoints, 3, 0.5)
except UserError as error:
    sys.exit(f"error: {{error}}")
"""


def test_a_failing_save_is_one_line_and_spares_the_earlier_ones(copy):
    """A limit on the size of files stands in for a full disk."""
    before = {path: path.read_bytes() for path in files(copy)}
    script = FULL.format(tests=str(ROOT / "tests"), root=str(ROOT), folder=str(copy))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 1, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: checkpoint 3 could not be written")
    assert "free some space" in lines[0] and lines[0].endswith("complete checkpoints: 1, 2")
    assert before == {path: path.read_bytes() for path in before}
    with open_checkpoints(copy) as checkpoints:
        assert checkpoints.steps() == [1, 2] and checkpoints.best_step() == 1
        assert_holds(checkpoints, 2)
        save(checkpoints, 3, 0.5)
        assert_holds(checkpoints, 3)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: .*another folder"):
        with open_checkpoints(tmp_path / "file" / "checkpoints"):
            pass
