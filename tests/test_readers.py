"""Checkpoints that are read while a run writes them, and disks that refuse."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_checkpoint import (  # noqa: F401  fixtures among them
    abstract,
    assert_holds,
    copy,
    lose_parameters,
    save,
    saved,
    trees,
)

from jrm_jax import checkpoint, cli
from jrm_jax.checkpoint import open_checkpoints, read_checkpoint
from jrm_jax.data import store
from jrm_jax.errors import UserError
from jrm_jax.run.saved import complete_steps
from jrm_jax.shell import disk

ROOT = Path(__file__).resolve().parents[1]


def read(folder: Path, which="best") -> int:
    """The step found; what it holds must be exactly what `save` wrote."""
    wanted = trees(1)[0]
    step, found, meta = read_checkpoint(folder, abstract(wanted), which)
    jax.tree.map(np.testing.assert_array_equal, found, trees(step)[0])
    assert meta == {"step": step, "words": f"step {step}"}
    return step


def seen(folder: Path) -> dict[str, tuple[int, int]]:
    """What a reader may not change: names, sizes and times of everything."""
    paths = [folder, *folder.rglob("*")]
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in paths}


def test_a_reader_changes_nothing_and_says_nothing(copy, capfd):
    half = shutil.copytree(copy / "2", copy / "3.orbax-checkpoint-tmp-17")
    (half / "trainable" / "_METADATA").unlink()
    (copy / "1" / "metrics" / "metrics").write_text("{")
    before = seen(copy)
    assert read(copy) == 2 and read(copy, "latest") == 2 and read(copy, 1) == 1
    assert seen(copy) == before
    assert capfd.readouterr() == ("", "")


def test_what_a_reader_asks_for_must_be_there(copy, tmp_path):
    with pytest.raises(UserError, match="no step 7; there are 1, 2"):
        read(copy, 7)
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        read(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_damaged_checkpoint_is_told_to_a_reader(copy, monkeypatch):
    monkeypatch.setattr(checkpoint, "PAUSE", 0.0)
    lose_parameters(copy / "1")
    with pytest.raises(UserError) as caught:
        read(copy)
    words = str(caught.value)
    assert f"{copy / '1'} cannot be read" in words and "(there are 1, 2)" in words
    assert "\n" not in words


WRITER = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from test_checkpoint import save
from jrm_jax.checkpoint import open_checkpoints

with open_checkpoints(Path({folder!r})) as checkpoints:
    for step in range(1, {steps} + 1):
        save(checkpoints, step, (step * 7 % 5) / 5)
"""


def test_reading_in_a_loop_while_every_step_is_saved(tmp_path, capfd):
    """The trainer saves all it wants to, the reader gets whole checkpoints only."""
    folder, steps = tmp_path / "checkpoints", 40
    script = WRITER.format(
        tests=str(ROOT / "tests"), root=str(ROOT), folder=str(folder), steps=steps
    )
    writer = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    found = []
    try:
        while writer.poll() is None:
            if complete_steps(folder):
                found.append(read(folder, ("best", "latest")[len(found) % 2]))
            else:
                time.sleep(0.01)
        assert writer.returncode == 0, writer.stderr.read()
    finally:
        writer.kill()
        writer.wait()
    assert len(set(found)) >= 5, found
    *best, before, last = complete_steps(folder)
    assert (before, last) == (steps - 1, steps) and [step * 7 % 5 for step in best] == [4]
    assert capfd.readouterr() == ("", "")


# Disks that refuse


def refuse(monkeypatch, name: str, number: int, when=lambda *paths: True) -> None:
    """os.`name` fails with this error where `when` says so of its paths."""
    real = getattr(os, name)

    def call(*paths, **options):
        if when(*paths):
            names = [os.fspath(paths[0]), *([None, os.fspath(paths[1])] if paths[1:] else [])]
            raise OSError(number, os.strerror(number), *names)
        return real(*paths, **options)

    monkeypatch.setattr(os, name, call)


@pytest.fixture
def bucket(monkeypatch):
    """A mount of a bucket: folders with something in them cannot be renamed."""
    monkeypatch.setattr(disk, "mount_of", lambda path: ("/jrm/bucket", "fuse.gcsfuse"))
    refuse(monkeypatch, "rename", errno.EMFILE, lambda old, new: os.path.isdir(old))


MOUNT = (
    "the mount at /jrm/bucket (fuse.gcsfuse) cannot rename folders (Too many open files): mount "
    "the bucket with --rename-dir-limit=200000"
)


def test_a_mount_that_cannot_rename_is_named_before_the_first_step(tmp_path, bucket):
    with pytest.raises(UserError) as caught:
        with open_checkpoints(tmp_path / "checkpoints"):
            pass
    assert MOUNT in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_mount_that_cannot_rename_is_named_wherever_folders_are_made(tmp_path, bucket):
    with pytest.raises(UserError) as caught:
        with store.disk_errors(tmp_path / "out"):
            (tmp_path / "part").mkdir()
            (tmp_path / "part").rename(tmp_path / "out")
    assert MOUNT in str(caught.value) and "free some" not in str(caught.value)


def test_a_save_that_cannot_be_renamed_names_the_mount(copy, monkeypatch):
    with pytest.raises(UserError) as caught:
        with open_checkpoints(copy) as checkpoints:
            monkeypatch.setattr(disk, "mount_of", lambda path: ("/mnt/disk", "fuse.other"))
            refuse(monkeypatch, "rename", errno.ENOSYS, lambda old, new: os.path.isdir(old))
            save(checkpoints, 3, 0.5)
    words = str(caught.value)
    assert "checkpoint 3 could not be written" in words and words.endswith("checkpoints: 1, 2")
    assert "the mount at /mnt/disk (fuse.other) cannot rename folders" in words
    assert "another file system" in words and "free some space" not in words


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(copy, monkeypatch):
    said = []
    with open_checkpoints(copy, said.append) as checkpoints:
        save(checkpoints, 3, 0.5)
        number, there = errno.EBUSY, lambda path, *_: "/2" in os.fspath(path)
        for name in ("rmdir", "unlink"):
            refuse(monkeypatch, name, number, there)
        save(checkpoints, 4, 0.5)
        assert_holds(checkpoints, 4)
    assert any("after checkpoint 4 was saved" in words for words in said), said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a"), "free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a"), "free some space"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "a folder that can be written"),
        (OSError(errno.EACCES, "Permission denied", "a"), "the right to read and write"),
        (OSError(errno.EIO, "Input/output error", "a"), "still answers"),
        (OSError(errno.ESTALE, "Stale file handle", "a"), "still answers"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "ulimit -n"),
        (ValueError('INTERNAL: "d/1": No space left on device [tensorstore]'), "free some space"),
        (RuntimeError("writer: Input/output error"), "still answers"),
        (OSError("database or disk is full"), "free some space"),
    ],
)
def test_what_a_disk_says_is_told_with_what_to_do(error, words, tmp_path):
    found = disk.explain(error, tmp_path)
    assert words in found and "\n" not in found
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = error
    assert words in disk.explain(wrapped, tmp_path)
    others = {"free some space", "can be written", "the right", "still answers", "ulimit"}
    assert sum(other in found for other in others) == 1
    if isinstance(error, OSError) and error.errno:
        assert cli.is_expected(error) and words in cli.in_one_line(error)


def test_an_error_that_is_no_disk_is_told_as_it_is(tmp_path):
    assert disk.explain(ValueError("shapes differ"), tmp_path) == "shapes differ"
    assert not cli.is_expected(FileNotFoundError(errno.ENOENT, "No such file", "a"))


def test_mounts_are_found(tmp_path):
    point, kind = disk.mount_of(tmp_path)
    assert str(tmp_path).startswith(point) and kind not in ("", "unknown file system")
    assert disk.mount_of(Path("/proc/self/fd"))[1] == "proc"


def test_nothing_is_left_by_the_try(tmp_path):
    disk.check_folder(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of this path is a file"):
        disk.check_folder(tmp_path / "file" / "new")
