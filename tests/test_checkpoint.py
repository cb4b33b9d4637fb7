"""Checkpoints: what is kept, what is best, and what becomes of damaged and failed ones."""

import errno
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jrm_jax import checkpoint, train
from jrm_jax.checkpoint import open_checkpoints
from jrm_jax.errors import UserError
from jrm_jax.run.saved import ranked
from jrm_jax.sharding import make_mesh
from jrm_jax.step import TrainState

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(checkpoint, "AGAIN", (0.0, 0.0))


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
    steps = None if wanted is None else [wanted]
    found, *restored, meta = checkpoints.restore(abstract(trainable), abstract(opt_state), steps)
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
        assert checkpoints.steps() == [] == checkpoints.ranked()
        for step, metric in enumerate((0.1, 0.9, 0.2, 0.3, 0.4), 1):
            save(checkpoints, step, metric)
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.ranked()[0] == 2
        assert_holds(checkpoints, 5)
        assert_holds(checkpoints, 2, wanted=2)


def test_the_best_survives_a_restart(copy):
    """The ranks are on disk: another process knows the best, and keeps it."""
    with open_checkpoints(copy) as checkpoints:
        assert checkpoints.ranked()[0] == 1
        for step in (3, 4, 5):
            save(checkpoints, step, 0.5)
        assert checkpoints.steps() == [1, 4, 5] and checkpoints.ranked()[0] == 1
        save(checkpoints, 6, 1.0)
        assert checkpoints.steps() == [5, 6] and checkpoints.ranked()[0] == 6
        assert checkpoints.read_meta(6)["words"] == "step 6"


def test_nan_ranks_worst(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, math.nan)
        save(checkpoints, 2, -1e6)
        for step, metric in enumerate((math.nan, math.inf, -math.inf, math.nan), 3):
            save(checkpoints, step, metric)
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.ranked() == [2, 6, 5]


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


def seen(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in files(folder)}


DAMAGE = (
    truncate_data, flip_data, empty_everything, lose_parameters, lose_moments, lose_meta,
    lose_everything,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_latest_falls_back_to_the_one_before(copy, damage):
    damage(copy / "2")
    said, damaged = [], seen(copy / "2")
    with open_checkpoints(copy, said.append) as checkpoints:
        assert checkpoints.ranked()[0] == 1
        assert_holds(checkpoints, 1)
        warnings = [words for words in said if "checkpoint 2 cannot be read" in words]
        assert len(warnings) == 1 and "\n" not in warnings[0], said
        assert checkpoints.steps() == [1]
        save(checkpoints, 2, 0.2)  # training gets there again
        assert_holds(checkpoints, 2)
    kept = seen(copy / "2.damaged")  # nothing of it is lost
    assert {name.replace("metrics.damaged", "metrics"): kept[name] for name in kept} == damaged


def test_damaged_metrics_cost_only_the_rank(copy):
    metrics = copy / "1" / "metrics" / "metrics"
    metrics.write_text("{")
    said = []
    with open_checkpoints(copy, said.append) as checkpoints:
        assert "ranks last" in " ".join(said)
        assert checkpoints.ranked()[0] == 2
        assert_holds(checkpoints, 1, wanted=1)
    assert metrics.with_name("metrics.damaged").read_text() == "{"


def test_a_damaged_best_makes_way_for_the_next_best(copy):
    with open_checkpoints(copy) as checkpoints:
        save(checkpoints, 3, 0.5)
        checkpoints.wait()
        lose_parameters(copy / "1")
        shutil.copytree(copy / "3", copy / "1.damaged")  # of an earlier time
        trainable = abstract(trees(3)[0])
        found, _, _, meta = checkpoints.restore(trainable, None, checkpoints.ranked())
        assert found == 3 == meta["step"] and checkpoints.ranked() == [3, 2]
    assert (copy / "1.damaged1").is_dir() and seen(copy / "1.damaged") == seen(copy / "3")


def fails(monkeypatch, error, times):
    """The first reads of checkpoint 2 fail."""
    restore, tries = checkpoint._Manager.restore, []

    def failing(self, step, **rest):
        tries.append(step)
        if step == 2 and len(tries) <= times:
            raise error
        return restore(self, step, **rest)

    monkeypatch.setattr(checkpoint._Manager, "restore", failing)
    return tries


def test_a_hiccup_is_no_damage(copy, monkeypatch):
    tries = fails(monkeypatch, ValueError("the network was away"), times=2)
    with open_checkpoints(copy) as checkpoints:
        assert_holds(checkpoints, 2)
        assert tries == [2, 2, 2] and checkpoints.steps() == [1, 2]


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.EIO, "Input/output error", "a"), "network file system still answers"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (ValueError('NOT_FOUND: opening "a": Permission denied'), "the right to read"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "Out of memory"),
        (ValueError("UNAVAILABLE: the bucket does not answer"), "does not answer"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_where_the_checkpoint_is_not_at_fault_the_run_ends_and_nothing_changes(
    copy, monkeypatch, error, words
):
    """An older one was taken, and this one, which was whole, removed."""
    before = seen(copy)
    fails(monkeypatch, error, times=9)
    with pytest.raises(UserError, match="checkpoint 2 cannot be read now") as ended:
        with open_checkpoints(copy) as checkpoints:
            assert_holds(checkpoints, 1)
    assert words in str(ended.value) and "\n" not in str(ended.value)
    assert seen(copy) == before


def test_a_disk_that_does_not_answer_makes_no_other_checkpoint_the_best(copy, monkeypatch):
    read = Path.read_text

    def failing(self, *rest, **options):
        if self.parts[-3:] == ("1", "metrics", "metrics"):
            raise OSError(numbers[0], os.strerror(numbers[0]), str(self))
        return read(self, *rest, **options)

    before = seen(copy)
    monkeypatch.setattr(Path, "read_text", failing)
    numbers = [errno.EIO, errno.EMFILE, errno.ESTALE]
    while len(numbers) > 1:
        with pytest.raises(OSError, match=os.strerror(numbers[0])), open_checkpoints(copy):
            pass
        assert seen(copy) == before
        numbers.pop(0)
    assert ranked(copy, [1, 2]) == [2, 1]  # removed while somebody looked


def test_what_is_restored_takes_the_place_of_what_is_there(copy):
    """A device need not hold the state twice."""
    state = TrainState(jnp.int32(0), trees(9)[0], {"frozen": jnp.ones(3)}, trees(9)[1])
    gone = jax.tree.leaves((state.trainable, state.opt_state))
    with open_checkpoints(copy) as checkpoints, pytest.MonkeyPatch.context() as patch:
        read = checkpoints.restore
        patch.setattr(checkpoints, "restore", lambda *trees: (
            all(leaf.is_deleted() for leaf in gone) and read(*trees)))  # fmt: skip
        patch.setattr(train.check_data, "check_unchanged", lambda *_: None)
        checkpoints.save(3, *trees(3), {"stamp": {}, "rewards": {}, "valid": {}}, 0.0)
        parts = {"checkpoints": checkpoints, "workdir": copy, "leader": False, "taught": {}}
        run = SimpleNamespace(**parts, data=SimpleNamespace(stamp={}), rewards=SimpleNamespace())
        state, step = train._Run._resume(run, state)
    assert step == 3 == int(state.step) and not state.frozen["frozen"].is_deleted()
    jax.tree.map(np.testing.assert_array_equal, [state.trainable, state.opt_state], [*trees(3)])


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
        assert checkpoints.steps() == [1, 2] and checkpoints.ranked()[0] == 1
        assert_holds(checkpoints, 2)
        save(checkpoints, 3, 0.5)
        assert_holds(checkpoints, 3)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: .*another folder"):
        with open_checkpoints(tmp_path / "file" / "checkpoints"):
            pass
