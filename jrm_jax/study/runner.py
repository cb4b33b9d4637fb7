"""Runs the study's cells: each is trained by `jrm_jax.main` and measured, both in processes of
their own, and its numbers are kept. What is kept is not run again.

Several cells are made at a time by several threads here (`jobs`), or by several of these commands:
who makes a cell holds a lock on a file, which its processes hold, too, so that a cell whose
processes outlived their runner is left to them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jrm_jax import build_data
from jrm_jax.errors import UserError
from jrm_jax.shell import disk
from jrm_jax.shell.terminal import duration
from jrm_jax.shell.user_cache import may_use_an_accelerator
from jrm_jax.study import cells, design
from jrm_jax.study.cells import Cell

GRACE = 120  # seconds that a run has to save itself when the time is over
LOOK = 0.2  # seconds between looks at a process
SHARED = 0.7  # of a GPU's memory is for what jobs compute with; each needs about 0.6 GB besides


class OutOfTime(Exception):
    """The limit was reached in the middle of a cell; its run goes on from there next time."""


def find_cell(config: ConfigDict, name: str) -> Cell:
    """
    Raises:
        UserError: the config has no such cell.
    """
    every = design.plan(config)
    found = [cell for cell in every if cell.name == name]
    if not found:
        names = ", ".join(cell.name for cell in every)
        raise UserError(f"--cell={name}: no such cell; there are {names}")
    return found[0]


def run(config: ConfigDict, minutes: float = 0.0, keep: bool = False, jobs: int = 1) -> None:
    """Make what is missing, in order, and say before each cell what is left.

    Raises:
        UserError: a cell failed.
    """
    ends = time.monotonic() + 60 * minutes if minutes else None
    shared = _Shared(config, keep, ends, jobs)
    if jobs == 1:
        shared.work(0)
    else:
        # not Thread.join: interrupted by a signal, Python 3.11's takes the thread for ended
        with ThreadPoolExecutor(jobs) as pool:
            working = [pool.submit(shared.work, job) for job in range(jobs)]
            try:
                while wait(working, LOOK).not_done:
                    pass
            finally:  # Ctrl-C and SIGTERM end the processes, too: they must not outlive this one
                shared.stop.set()
                wait(working)
    for error in shared.errors[:1]:
        raise error


def remake(config: ConfigDict, cell: Cell, keep: bool = False) -> None:
    """Make one cell, also if it is there.

    Raises:
        UserError: another command is making it; or as `make_cell`.
    """
    with _locked(config, cell.name) as claim:
        if claim is None:
            raise UserError(f"cell {cell.name}: another command is making it; wait until it ends")
        make_cell(config, cell, keep, Place((claim,)))


def budget(config: ConfigDict, todo: list[Cell], found: dict[Cell, dict]) -> str:
    """'12 of 26 cells are made; 14 to go, about 3:20:00'."""
    words = f"{len(found)} cells are made, {len(todo)} to go"
    costs = [cells.estimate(config, cell, found) for cell in todo]
    if not todo:
        return words
    if None in costs:
        return f"{words}; the first will tell how long they take"
    return f"{words}, about {duration(sum(costs))}"


class _Shared:
    """What the threads of one command share."""

    def __init__(self, config: ConfigDict, keep: bool, ends: float | None, jobs: int):
        self.config, self.keep, self.ends, self.jobs = config, keep, ends, jobs
        self.stop, self.errors = threading.Event(), []
        self._choosing = threading.Lock()

    def work(self, job: int) -> None:
        """Make one cell after another, until none is left that nobody makes."""
        say = f"job {job}: " if self.jobs > 1 else ""
        with contextlib.ExitStack() as bound:
            self._work(say, *self._core(bound))

    def _core(self, bound: contextlib.ExitStack) -> tuple[int | None, tuple[int, ...]]:
        """A core for this job alone, which no job of any command of this study has, and the file of
        its lock; None and (): there is none, or none is needed."""
        if self.jobs > 1 and not may_use_an_accelerator():
            for core in sorted(os.sched_getaffinity(0)):
                claim = bound.enter_context(_locked(self.config, f"core-{core}"))
                if claim is not None:
                    return core, (claim,)
        return None, ()

    def _work(self, say: str, core: int | None, claims: tuple[int, ...]) -> None:
        try:
            while not self.stop.is_set():
                with contextlib.ExitStack() as held:
                    chosen = self._choose(held)
                    if chosen is None:
                        return
                    cell, claim = chosen
                    print(f"{say}cell {cell.name}: {cell.what.words}", flush=True)
                    place = Place((claim, *claims), self.ends, self.stop, self.jobs, core)
                    make_cell(self.config, cell, self.keep, place)
        except OutOfTime:
            print(f"{say}stopped in {cell.name}; the same command goes on", flush=True)
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    def _choose(self, held: contextlib.ExitStack) -> tuple[Cell, int] | None:
        """The first missing cell that nobody makes, and the file of its lock."""
        with self._choosing:
            if self.ends is not None and time.monotonic() >= self.ends:
                print("the time is over; the same command goes on", flush=True)
                return None
            found = design.load(self.config)
            todo = [
                cell for cell in design.plan(self.config)
                if cell not in found and not cells.unneeded(cell, found)
            ]  # fmt: skip
            print(budget(self.config, todo, found), flush=True)
            for cell in todo:
                claim = held.enter_context(_locked(self.config, cell.name))
                # another may have made it since it was looked for
                if claim is not None and not cells.load_cells(self.config, [cell]):
                    return cell, claim
                held.close()
            if todo:
                print("others are making them", flush=True)
            return None


class Place(NamedTuple):
    """Where a cell's processes run: the files whose locks they hold, too, when they end, how many
    jobs there are, and the core that this one is bound to."""

    claims: tuple[int, ...] = ()
    ends: float | None = None
    stop: threading.Event = threading.Event()
    jobs: int = 1
    core: int | None = None


ANYWHERE = Place()


@contextlib.contextmanager
def _locked(config: ConfigDict, name: str, until: Place | None = None) -> Iterator[int | None]:
    """The descriptor of a locked file, or None where another holds it; `until`: to wait
    until it is free, as long as there is time.

    Raises:
        OutOfTime: while waiting.
    """
    path = Path(config.workdir) / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if until is None:
                    yield None
                    return
                _check_time(until)
                time.sleep(LOOK)
                continue
            yield file.fileno()
            return


def make_cell(config: ConfigDict, cell: Cell, keep: bool = False, place: Place = ANYWHERE) -> dict:
    """Train, measure, keep.

    Raises:
        UserError: training or measuring failed; it has said why.
        OutOfTime: at `place.ends`.
    """
    # another config has another folder, so that an unfinished run is never gone on with wrongly
    fingerprint = cells.fingerprint(config, cell)
    workdir = Path(config.workdir) / f"{cell.name}-{fingerprint}"
    fields = cell.changes(config)
    if place.jobs > 1:
        with _locked(config, "data", place):  # drawn once, not by every job
            build_data.data_folders(cells.training_config(config, cell))
    _train(workdir, {**fields, **_start(config, cell, place)}, cell, place)
    out = workdir / "measured.json"
    command = ["jrm_jax.study.measure", f"--workdir={workdir}", f"--out={out}"]
    command += [f"--settings={json.dumps(cell.measures(config))}"]
    _call(command + ["--judge"] * cell.what.judge, cell, place)
    measured = disk.read_json(out)
    result = {
        "cell": cell.name,
        **cell._asdict(),
        "steps": fields["total_steps"],
        "fingerprint": fingerprint,
        "backbone": cells.backbone_digest(cells.training_config(config, cell).backbone.path),
        "world": cells.WORLD_VERSION,
        "valid": _valid(config, measured["scores/valid"]),
        **measured,
    }
    cells.save_cell(config, cell, result)
    if not keep:
        shutil.rmtree(workdir)
    return result


def _train(workdir: Path, fields: dict[str, Any], cell: Cell, place: Place) -> None:
    command = ["jrm_jax.main", f"--config={cells.BASE}", f"--workdir={workdir}"]
    _call([*command, *(f"--config.{name}={value}" for name, value in fields.items())], cell, place)


def _start(config: ConfigDict, cell: Cell, place: Place) -> dict[str, Any]:
    """Fields that let a run start from the backbone of the run that comes before it, if there is
    one: made once, and exported without a reward head."""
    fields = cell.first(config)
    if fields is None:
        return {}
    name = f"first-s{cell.seed}-{cells.first_fingerprint(config, cell)}"
    workdir = Path(config.workdir) / name
    folder = workdir.with_name(f"{name}-export")
    with _locked(config, name, place) as claim:
        place = place._replace(claims=(*place.claims, claim))  # it outlives this process with them
        if not folder.is_dir():
            _train(workdir, fields, cell, place)
            command = ["jrm_jax.export", f"--checkpoint={workdir}", f"--out={folder}"]
            _call([*command, "--backbone_only", "--dtype=float32"], cell, place)
            shutil.rmtree(workdir)
    return {"backbone.path": folder}


def _valid(config: ConfigDict, scores: list) -> float:
    from jrm_jax.study import analysis

    pairs = analysis.load_pairs("valid", config.world.valid, config.world.seed)
    return round(float(analysis.correct(pairs, scores).mean()), 6)


def _check_time(place: Place) -> None:
    over = place.ends is not None and time.monotonic() >= place.ends
    if over or place.stop.is_set():
        raise OutOfTime


def _call(command: list[str], cell: Cell, place: Place) -> None:
    settings = dict(os.environ)
    if place.jobs > 1:  # on a GPU each takes its part of the memory, not three quarters of it
        settings["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{SHARED / place.jobs:.3f}"
        settings.setdefault("OMP_NUM_THREADS", "1")  # NumPy's, of which each would take all cores
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=settings,
        pass_fds=place.claims,
    )
    try:
        if place.core is not None:
            os.sched_setaffinity(process.pid, {place.core})
        while (status := process.poll()) is None:
            _check_time(place)
            time.sleep(LOOK)
    except BaseException:  # training saves where it is
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    if status:
        raise UserError(f"cell {cell.name}: {command[0]} ended with status {status}, see above")
