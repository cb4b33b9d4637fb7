"""Compiled programs are kept: where, which, how many, and what becomes of damaged ones."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from conftest import drop_halves
from entry_point import ROOT

from jrm_jax.shell import user_cache

PROGRAM = """
import sys
from jrm_jax.shell import user_cache
user_cache.SHORTEST = 0.0
{before}
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
f = jax.jit(lambda x: jnp.tanh(x @ x).sum())
with {around}:
    print(f(jnp.linspace(0.0, 1.0, 4096).reshape(64, 64)).tobytes().hex())
print(sum(hits), jax.config.jax_compilation_cache_dir)
"""
COMMAND = PROGRAM.format(before="user_cache.keep_programs()", around="user_cache.programs_kept()")
LIBRARY = PROGRAM.format(before="", around="user_cache.programs_kept()")


def run(cache: Path, source: str = COMMAND, **more: str) -> tuple[str, int, str, str]:
    """(the result's bits, programs found, JAX's folder in the end, stderr)."""
    env = {n: v for n, v in os.environ.items() if "COMPILATION_CACHE" not in n}
    env |= {"XDG_CACHE_HOME": str(cache), "XLA_FLAGS": ""} | more
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    bits, line = done.stdout.splitlines()
    found, place = line.split()
    return bits, int(found), place, done.stderr


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("jit_*") if path.is_file())


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(the cache of a first process, what it found)."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, run(cache)


def test_a_second_process_finds_the_program_and_gets_the_same_bits(first):
    cache, (bits, hits, place, errors) = first
    assert hits == 0 and errors == "" and kept(cache)
    assert Path(place).parent == cache / "jrm_jax" / "programs"
    before = {path: path.read_bytes() for path in kept(cache)}
    assert run(cache) == (bits, len(before), place, "")
    assert {path: path.read_bytes() for path in kept(cache)} == before


TOGETHER = """
import sys
from jrm_jax.shell import user_cache
user_cache.SHORTEST = 0.0
user_cache.keep_programs()
import jax, jax.numpy as jnp
from jrm_jax.run import fit
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
lowered = jax.jit(lambda x: jnp.sin(x)).lower(jax.ShapeDtypeStruct((3,), "float32"))

class Slow:  # a program that takes some time
    def as_text(self):
        return lowered.as_text()

    def compile(self):
        print("compiles", flush=True)
        sys.stdin.readline() if sys.argv[1] == "first" else None
        return lowered.compile()

print("ready", flush=True)
fit.compile_within(Slow(), None)
print(sum(hits), flush=True)
"""


@pytest.mark.parametrize("end", ["compiled", "killed"])
def test_a_program_is_compiled_by_one_process_at_a_time(tmp_path, end):
    """The second waits, says so, and finds it; of a process that is killed it takes over."""
    env = {n: v for n, v in os.environ.items() if "COMPILATION_CACHE" not in n}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": ""}
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-c", TOGETHER, name]
        return subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipe)

    with contextlib.ExitStack() as ended:
        first = ended.enter_context(start("first"))
        ended.callback(first.kill)
        assert [first.stdout.readline() for _ in range(2)] == ["ready\n", "compiles\n"]
        second = ended.enter_context(start("second"))
        ended.callback(second.kill)
        assert second.stdout.readline() == "ready\n"
        assert second.stderr.readline() == user_cache._ANOTHER + "\n"
        if end == "killed":
            first.kill()
        else:
            first.stdin.write("on\n")
            first.stdin.flush()
            assert first.stdout.readline() == "0\n"
        found = "1" if end == "compiled" else "0"
        assert second.stdout.read() == f"compiles\n{found}\n"


def test_waiting_has_an_end(tmp_path):
    """Another process may be stopped while it compiles."""
    with open(tmp_path / "lock", "w") as held, open(tmp_path / "lock", "w") as file:
        user_cache._lock(held, time.monotonic() + 9)
        began = time.monotonic()
        user_cache._lock(file, began + 0.3)
        assert 0.3 <= time.monotonic() - began < 5


def test_nobody_waits_where_nothing_is_kept(tmp_path):
    env = {n: v for n, v in os.environ.items() if "COMPILATION_CACHE" not in n}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "JRM_COMPILATION_CACHE": "off"}
    command = [sys.executable, "-c", TOGETHER, "second"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "ready\ncompiles\n0\n" and not (tmp_path / "jrm_jax" / "locks").exists()


def test_in_other_peoples_processes_jax_is_left_as_it_was(first):
    cache, (bits, _, _, _) = first
    again = run(cache, LIBRARY)
    assert again == (bits, again[1], "None", "") and again[1] > 0


def test_a_damaged_program_is_compiled_again_and_replaced(tmp_path):
    bits = run(tmp_path)[0]
    for path in kept(tmp_path):
        path.write_bytes(path.read_bytes()[:-40])  # the writer was killed
    found = run(tmp_path)
    assert found[:2] == (bits, 0)
    lines = found[3].splitlines()
    assert len(lines) == len(kept(tmp_path)) > 0
    assert all(line.startswith("a kept program cannot be read (") for line in lines)
    assert run(tmp_path)[:2] == (bits, len(lines))


@pytest.mark.parametrize("source", [COMMAND, LIBRARY])
@pytest.mark.parametrize("value", ["off", "OFF", "0"])
def test_the_switch(monkeypatch, tmp_path, source, value):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv(user_cache.SWITCH, value)
    assert user_cache._place() is None and not list(tmp_path.iterdir())


def test_a_chosen_folder(first, tmp_path):
    _, (bits, _, _, _) = first
    found = run(tmp_path / "unused", **{user_cache.SWITCH: str(tmp_path / "chosen")})
    assert found[0] == bits and found[3] == ""
    assert Path(found[2]).parent == tmp_path / "chosen" / user_cache.BELOW
    assert kept(tmp_path / "chosen") and not (tmp_path / "unused").exists()
    (tmp_path / "file").write_text("")
    found = run(tmp_path / "unused", **{user_cache.SWITCH: str(tmp_path / "file" / "inner")})
    assert found[0] == bits  # works without, and says so, for it was asked for
    assert found[3] == f"compiled programs are not kept: {tmp_path}/file/inner: Not a directory\n"


def test_a_cache_folder_that_cannot_be_used_is_no_matter(first, tmp_path):
    (tmp_path / "file").write_text("")
    bits, hits, place, errors = run(tmp_path / "file")
    assert (bits, hits, place, errors) == (first[1][0], 0, "None", "")


def test_jaxs_own_settings_come_first(first, tmp_path):
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    bits, hits, place, errors = run(tmp_path / "unused", **own)
    assert (bits, hits, place, errors) == (first[1][0], 0, str(tmp_path / "own"), "")
    assert not (tmp_path / "unused").exists()


def test_there_need_be_no_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert user_cache.folder("programs") is None and user_cache._place() is None


def program(name: str) -> str:
    return f"jit_{name}-{name.encode().hex():0>64}-cache"


def write(path: Path, used: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(100))
    os.utime(path, (used, 0))
    return path


def test_what_was_used_least_lately_goes(monkeypatch, tmp_path):
    monkeypatch.setattr(user_cache, "LIMIT", 250)
    place = tmp_path / user_cache._machine()
    for name, used in (("a", 30), ("b", 10), ("c", 20), ("d", 40)):
        write(place / program(name), used)
    user_cache._trim(tmp_path)
    assert sorted(path.name for path in place.iterdir()) == [program("a"), program("d")]


def test_nothing_but_programs_is_ever_removed(monkeypatch, tmp_path):
    """The folder may be the user's home, a shared disk, or one that looks like a machine's."""
    monkeypatch.setattr(user_cache, "LIMIT", 0)
    monkeypatch.setattr(user_cache, "_use", lambda settings: None)
    monkeypatch.setattr("warnings.showwarning", None)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv(user_cache.SWITCH, str(tmp_path))
    place = user_cache._place()
    ours = write(place / program("old"), 1)
    digest = "0" * 64
    theirs = [
        write(folder / name, 1)
        for folder in (tmp_path, tmp_path / "thesis", tmp_path / place.name, place.parent, place)
        for name in ("chapter0.txt", "100/trainable/manifest.ocdbt", f"{digest}-cache", "w-cache")
    ]
    # JAX's names, but not in a machine's folder of ours
    theirs += [write(tmp_path / program("x"), 1), write(place.parent / "a" / program("x"), 1)]
    elsewhere = write(tmp_path / "elsewhere" / program("x"), 1)
    (place.parent / "linked-0123456789ab").symlink_to(elsewhere.parent)
    (place / program("link")).symlink_to(elsewhere)
    user_cache.keep_programs()
    assert not ours.exists() and elsewhere.exists() and all(path.exists() for path in theirs)
    damaged, other = write(place / program("damaged"), 1), write(place / "jit_damaged-notes.txt", 1)
    words = "persistent compilation cache entry for 'jit_damaged': it is cut short"
    user_cache._mend(place, None, f"Error reading {words}")
    assert not damaged.exists() and other.exists()


def test_what_a_killed_test_has_half_written_goes_before_the_next_run(first):
    cache, (_, _, place, _) = first
    whole = kept(cache)
    half, other = Path(place) / program("half"), Path(place) / "jit_notes.txt"
    for path in (half, other):
        path.write_bytes(whole[0].read_bytes()[:-9])
    drop_halves(Path(place))
    assert kept(cache) == sorted([*whole, other])
    other.unlink()


def test_machines_that_differ_do_not_share(monkeypatch):
    here = user_cache._machine()
    assert here == user_cache._machine()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1000), raising=False)
    assert user_cache._machine() != here


def test_nothing_is_changed_where_somebody_has_set_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = dict(jax.config.values)
    assert before["jax_compilation_cache_dir"]  # the tests' own
    with user_cache.programs_kept():
        assert dict(jax.config.values) == before
    assert not list(tmp_path.iterdir())
