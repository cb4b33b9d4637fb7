"""Runs the study's cells: each is trained by `jrm_jax.main` and measured, both in processes of
their own, and its numbers are kept. What is kept is not run again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from ml_collections import ConfigDict

from jrm_jax.errors import UserError
from jrm_jax.shell.terminal import duration
from jrm_jax.study import cells
from jrm_jax.study.cells import ARMS, Cell

GRACE = 120  # seconds that a run has to save itself when the time is over


class OutOfTime(Exception):
    """The limit was reached in the middle of a cell; its run goes on from there next time."""


def find_cell(config: ConfigDict, name: str) -> Cell:
    """
    Raises:
        UserError: the config has no such cell.
    """
    every = cells.plan(config)
    found = [cell for cell in every if cell.name == name]
    if not found:
        names = ", ".join(cell.name for cell in every)
        raise UserError(f"--cell={name}: no such cell; there are {names}")
    return found[0]


def run(config: ConfigDict, minutes: float = 0.0, keep: bool = False) -> None:
    """Make what is missing, in order, and say before each cell what is left.

    Raises:
        UserError: a cell failed.
    """
    ends = time.monotonic() + 60 * minutes if minutes else None
    while True:
        found = cells.load_cells(config)
        todo = []
        for cell in cells.plan(config):
            if cell not in found and not cells.unneeded(cell, found):
                todo.append(cell)
        print(budget(todo, found), flush=True)
        if not todo:
            return
        if ends is not None and time.monotonic() >= ends:
            print(f"the {minutes:g} minutes are over; the same command goes on", flush=True)
            return
        print(f"cell {todo[0].name}: {ARMS[todo[0].arm].words}", flush=True)
        try:
            make_cell(config, todo[0], keep, ends)
        except OutOfTime:
            print(f"the {minutes:g} minutes are over in {todo[0].name}; the same command goes on")
            return


def budget(todo: list[Cell], found: dict[Cell, dict]) -> str:
    """'12 of 26 cells are made; 14 to go, about 3:20:00'."""
    words = f"{len(found)} cells are made, {len(todo)} to go"
    costs = [cells.estimate(cell, found) for cell in todo]
    if not todo:
        return words
    if None in costs:
        return f"{words}; the first will tell how long they take"
    return f"{words}, about {duration(sum(costs))}"


def make_cell(
    config: ConfigDict, cell: Cell, keep: bool = False, ends: float | None = None
) -> dict:
    """Train, measure, keep.

    Args:
        ends: time.monotonic() at which to stop.

    Raises:
        UserError: training or measuring failed; it has said why.
        OutOfTime: at `ends`.
    """
    # another config has another folder, so that an unfinished run is never gone on with wrongly
    fingerprint = cells.fingerprint(config, cell)
    workdir = Path(config.workdir) / f"{cell.name}-{fingerprint}"
    fields = cells.changes(config, cell)
    command = ["jrm_jax.main", f"--config={cells.BASE}", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    _call(command, cell, ends)
    out = workdir / "measured.json"
    command = ["jrm_jax.study.measure", f"--workdir={workdir}", f"--out={out}"]
    command += [f"--settings={json.dumps(config.measure.to_dict())}"]
    _call(command + ["--judge"] * ARMS[cell.arm].judge, cell, ends)
    measured = json.loads(out.read_text())
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


def _valid(config: ConfigDict, scores: list) -> float:
    from jrm_jax.study import analysis

    pairs = analysis.load_pairs("valid", config.world.valid, config.world.seed)
    return round(float(analysis.correct(pairs, scores).mean()), 6)


def _call(command: list[str], cell: Cell, ends: float | None) -> None:
    process = subprocess.Popen([sys.executable, "-m", *command])
    try:
        status = process.wait(None if ends is None else max(1.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # training saves where it is
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise OutOfTime from None
    except BaseException:  # Ctrl-C reaches the process too; it must not outlive this one
        process.terminate()
        process.wait()
        raise
    if status:
        raise UserError(f"cell {cell.name}: {command[0]} ended with status {status}, see above")
