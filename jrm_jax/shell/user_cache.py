"""What is kept between runs in the user's cache folder: compiled programs, tokenizers, sizes.

Programs are kept by JAX's own persistent compilation cache. One switch, an environment variable:

    JRM_COMPILATION_CACHE=off       nothing is kept
    JRM_COMPILATION_CACHE=FOLDER    kept in FOLDER/jrm_jax_programs; otherwise in
                                    ~/.cache/jrm_jax/programs, or where XDG_CACHE_HOME says

Who sets JAX's JAX_COMPILATION_CACHE_DIR, or configures JAX in Python, is left alone. A kept program
is the compiled one, to the bit: what it computes does not change. Commands keep programs for as
long as they run; in other people's processes only the project's own programs are kept, and JAX's
settings are theirs again afterwards.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import pkgutil
import platform
import re
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jrm_jax.shell import cores
from jrm_jax.shell.terminal import if_slow, say

SWITCH = "JRM_COMPILATION_CACHE"
LIMIT = 2 * 10**9  # bytes; what was used least lately goes first, at the start of a command
BELOW = "jrm_jax_programs"  # in a folder that the user chose, where other files may lie
# JAX's names of files. Nothing else is ever removed, wherever the user has put the cache.
_MACHINE, _PROGRAM = r"\w*-[0-9a-f]{12}", r".+-[0-9a-f]{64}-(cache|atime)"
_ANOTHER = "waiting for another process, which compiles the same program"
PATIENCE = 600  # seconds; then it is compiled here, too: the other process may be stopped
LOOK = 0.1  # seconds between looks
SHORTEST = 0.1  # seconds; what compiles faster is not worth a file


def folder(name: str) -> Path | None:
    """A folder of the user's cache; None where the user has no home."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "jrm_jax" / name
    except RuntimeError:
        return None


def keep_programs() -> None:
    """For commands, before anything imports jax: keep what this process compiles.

    A folder that cannot be used is no obstacle; it is named if the user chose it.
    """
    place = for_programs()
    if place is None:
        return
    if not may_use_an_accelerator():
        # Of a kept program XLA's loader says that some features of the machine are missing which
        # are none (prefer-no-gather): a long line for each, on many Intel processors.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    _use(_settings(place))
    warnings.showwarning = functools.partial(_mend, place, warnings.showwarning)


def for_programs(name: str = "programs") -> Path | None:
    """The folder of this kind of machine in the cache's folder `name`, made, tried and trimmed;
    None where nothing is to be kept."""
    place = _place(name)
    if place is not None:
        with contextlib.suppress(OSError):
            _trim(place.parent)
    return place


@contextlib.contextmanager
def programs_kept() -> Iterator[None]:
    """For what may run in other people's processes: keep what is compiled inside."""
    import jax

    place = None if jax.config.jax_compilation_cache_dir else _place()
    if place is None:
        yield
        return
    settings = _settings(place)
    before = {name: jax.config.values[name] for name in settings}
    _use(settings)
    try:
        yield
    finally:
        _use(before)


@contextlib.contextmanager
def compiling(program: Any) -> Iterator[None]:
    """While this is open, other processes of this machine that want the same program wait, for
    `PATIENCE` at the most, and then find it kept: without it, jobs that start together would each
    compile it. Nobody waits where nothing is kept, where files cannot be locked, or where processes
    compile together.

    Args:
        program: a lowered one, `jax.stages.Lowered`.
    """
    import jax

    kept = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
    place = folder("locks")
    if place is None or not kept or jax.process_count() > 1:
        yield
        return
    # of this machine: homes may be shared
    known = f"{platform.node()} {kept} {program.as_text()}"
    name = hashlib.sha256(known.encode()).hexdigest()[:3]  # 4,096 files at the most
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError), if_slow(_ANOTHER):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = held.enter_context(open(place / f"compiling-{name}", "w", encoding="utf-8"))
            _lock(file, time.monotonic() + PATIENCE)
        yield


def _lock(file: Any, until: float) -> None:
    """Returns without the lock when the time is over."""
    while time.monotonic() < until:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOOK)
        else:
            return


def _place(name: str = "programs") -> Path | None:
    chosen = os.environ.get(SWITCH, "")
    if chosen.lower() in ("off", "0", "no", "false") or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    root = Path(chosen).expanduser().absolute() / BELOW if chosen else folder(name)
    return None if root is None else _try(root, say if chosen else None)


@functools.cache  # said once
def _try(root: Path, tell: Callable[[str], None] | None) -> Path | None:
    place = root / _machine()
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        if tell is not None:
            tell(f"compiled programs are not kept: {root.parent}: {error.strerror}")
        return None
    return place


def _machine() -> str:
    """A name for machines that run each other's programs: JAX's own key does not tell processors
    apart, and programs for the CPU are cut for a number of cores."""
    features = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    known = f"{platform.machine()} {platform.processor()} {features.split()} {cores.bound()}"
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"


def may_use_an_accelerator() -> bool:
    """Whether JAX has a plugin for a GPU or a TPU here, and is not told to leave it alone."""
    if os.environ.get("JAX_PLATFORMS", "").strip() == "cpu":
        return False
    plugins = importlib.util.find_spec("jax_plugins")
    places = [] if plugins is None else plugins.submodule_search_locations
    return any(pkgutil.iter_modules(places)) or importlib.util.find_spec("libtpu") is not None


def _settings(place: Path) -> dict[str, Any]:
    """JAX's names. Its own limit of size is not used: one file that a killed process left half
    written then keeps jax 0.10 from ever writing again, and its locks fail on many mounts."""
    return {
        "jax_compilation_cache_dir": str(place),
        "jax_compilation_cache_max_size": -1,
        "jax_persistent_cache_min_compile_time_secs": SHORTEST,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }


def _use(settings: dict[str, Any]) -> None:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it takes the settings of its first use


def _programs(place: Path) -> list[Path]:
    """The kept programs in the folder of a machine: what may be removed."""
    if not re.fullmatch(_MACHINE, place.name) or place.is_symlink():
        return []
    return [path for path in place.glob("*") if re.fullmatch(_PROGRAM, path.name)]


def _trim(root: Path) -> None:
    """Remove programs, those used least lately first, until `LIMIT` holds."""
    found = []
    for path in (path for place in root.glob("*") for path in _programs(place)):
        with contextlib.suppress(OSError):  # another process may trim too
            about = path.lstat()
            if stat.S_ISREG(about.st_mode):
                found.append((max(about.st_atime, about.st_mtime), about.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= LIMIT:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


def _mend(place: Path, show: Any, message: Any, *rest: Any, **options: Any) -> None:
    """JAX's warnings about its cache, as one line. A file that cannot be read, because a process
    was killed as it wrote, is removed: JAX compiles then, and writes only where there is none."""
    words = str(message)
    if "persistent compilation cache entry for '" not in words:
        show(message, *rest, **options)
        return
    name, _, reason = words.partition(" entry for '")[2].partition("': ")
    if words.startswith("Error writing"):
        say(f"a compiled program cannot be kept in {place} ({reason})")
        return
    for path in _programs(place):
        if path.name.startswith(f"{name}-"):
            with contextlib.suppress(OSError):
                path.unlink()
    say(f"a kept program cannot be read ({reason}): it is compiled again")
