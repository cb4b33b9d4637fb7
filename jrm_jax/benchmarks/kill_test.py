"""`kill -9` at random moments of a short run, then compare with a run that nothing disturbed.

    python -m jrm_jax.benchmarks.kill_test [--kills=20] [--reader] [--out=docs/kill_test.md]

Every start but the last is killed: in its start-up, at any moment of its steps, or as soon as a
checkpoint has begun to be written (there is one after every other step, beside the next steps).
Exit 1 unless kills fell into such writing, every start resumed from the latest complete checkpoint,
and the final parameters, optimizer state and losses equal the undisturbed run's bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from jrm_jax.benchmarks.reporting import run_command
from jrm_jax.shell.arguments import Parser

SMALL = (
    "--corpus=60", "--hidden=32", "--layers=2", "--heads=4", "--kv-heads=2", "--head-dim=16",
    "--mlp=64", "--vision-hidden=32", "--vision-depth=2", "--vision-heads=2", "--vision-mlp=64",
)  # fmt: skip
# What is compared was compiled alike; the compiler's own optimisations would take most of the time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
SAVE_EVERY = 2
START_UP = 0.15  # share of kills before the first step
WRITING = 0.5  # share of the others that wait for a checkpoint to be begun ...
BEGUN = 0.05  # ... and fall within so many seconds after that
SPAN = 5.0  # seconds after the first step in which the others begin to wait, or fall


def make_command(folder: Path, workdir: Path, steps: int, fields: tuple[str, ...]) -> list[str]:
    """The run: random weights, Adam, ranking only, no held-out splits."""
    values = {
        "backbone.path": folder / "backbone", "backbone.random": True, "backbone.scan_unroll": 1,
        "data.cache": folder / "world", "data.world.train": 32, "data.world.valid": 0,
        "data.world.test": 0, "data.world.hard": 0, "batch_size": 4, "total_steps": steps,
        "eval_interval": steps, "save_interval": SAVE_EVERY, "log_interval": 1,
        "optimizer.name": "adam",
    }  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "jrm_jax.main", f"--workdir={workdir}"]
    command += [f"--config={root / 'configs' / 'discriminative.py'}"]
    return command + [f"--config.{k}={v}" for k, v in values.items()] + list(fields)


class Start:
    """One start of the run and what it prints, in the order of time."""

    def __init__(self, command: list[str], folder: Path):
        compiled = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": QUICK,  # and one device
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.lines: list[str] = []
        self.stepped = threading.Event()
        self.start_up = math.inf  # seconds to the first step
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=Path(__file__).resolve().parents[2], env=os.environ | compiled,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("step ") and not self.stepped.is_set():
                self.start_up = time.monotonic() - self.began
                self.stepped.set()
        self.stepped.set()  # it has ended

    def end(self) -> int:
        status = self.process.wait()
        self._reader.join()
        return status

    def kill(self, rng: random.Random, start_up: float, workdir: Path) -> float:
        """Kill it at a random moment; returns the seconds it lived."""
        if rng.random() < START_UP:
            self.stepped.wait(rng.uniform(0.0, start_up))
        else:
            self.stepped.wait()
            time.sleep(rng.uniform(0.0, SPAN))
            if rng.random() < WRITING:
                while self.process.poll() is None and not on_disk(workdir)[1]:
                    time.sleep(0.001)
                time.sleep(rng.uniform(0.0, BEGUN))
        self.process.kill()
        self.end()
        return time.monotonic() - self.began

    def resumed(self) -> int | None:
        """The step it says it went on from; 0: it says that it had to begin anew."""
        for line in self.lines:
            if line.startswith("resuming "):
                return int(line.rpartition(" ")[2])
            if line.endswith("from step 0"):
                return 0
        return None

    def steps(self) -> int:
        return max((int(line[5:].split("/")[0]) for line in self.lines if line[:5] == "step "),
                   default=0)  # fmt: skip


def on_disk(workdir: Path) -> tuple[list[int], list[int]]:
    """Steps of complete checkpoints, and of half-written ones."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    complete = sorted(int(name) for name in names if name.isdecimal())
    return complete, sorted(int(name.split(".")[0]) for name in names if "tmp" in name)


def losses(workdir: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if row["split"] == "train"]


READ = "from jrm_jax.benchmarks.kill_test import read_on; read_on({!r})"


def read_on(workdir: str) -> None:
    """Score an edit with the run's best and latest checkpoints in turn, for ever; prints the steps.
    Ends with an error where a checkpoint that is there cannot be read."""
    from jrm_jax.errors import UserError
    from jrm_jax.serving.reward_model import RewardModel

    pictures_NHW3 = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    reads = 0
    while True:
        there = on_disk(Path(workdir))[0]
        try:
            model = RewardModel.load(workdir, ("best", "latest")[reads % 2])
        except UserError as error:
            if there:
                sys.exit(str(error))
            time.sleep(0.5)  # nothing is saved yet
            continue
        score_K = model.score("Make it red.", pictures_NHW3[0], list(pictures_NHW3[1:]))
        if not np.isfinite(score_K).all():
            sys.exit(f"scores of step {model.card['step']} are {score_K}")
        reads += 1
        print(f"read {model.card['step']}", flush=True)


def run(
    folder: Path,
    kills: int,
    steps: int,
    seed: int,
    fields: tuple[str, ...] = (),
    reader: bool = False,
) -> list[str]:
    """Lines of a Markdown report. Exits with a message where something is wrong."""
    from jrm_jax.benchmarks import make_tiny_backbone
    from jrm_jax.checkpoint import read_arrays

    if not (folder / "backbone").exists():
        plain = [f"--out={folder / 'backbone'}", "--no-weights", "--deepstack"]
        make_tiny_backbone.main([*plain, *SMALL])
    rng = random.Random(seed)
    whole = Start(make_command(folder, folder / "whole", steps, fields), folder)
    if whole.end():
        sys.exit("the undisturbed run failed:\n" + "\n".join(whole.lines[-20:]))
    workdir, start_up = folder / "killed", whole.start_up
    command = make_command(folder, workdir, steps, fields)
    report = [
        "| start | resumed from | lived, s | last step seen | complete after | half-written |",
        "|---|---|---|---|---|---|",
    ]
    during_saves, beside_steps, wrong = 0, 0, []
    reading = Start([sys.executable, "-c", READ.format(str(workdir))], folder) if reader else None
    for number in range(kills + 1):
        before, _ = on_disk(workdir)
        start = Start(command, folder)
        if number < kills:
            lived = start.kill(rng, start_up, workdir)
        else:
            status = start.end()
            lived = time.monotonic() - start.began
            if status:
                wrong.append(f"the last start ended with {status}: {start.lines[-1:]}")
        start_up = min(start_up, start.start_up)  # nothing is compiled anew
        resumed, (after, half) = start.resumed(), on_disk(workdir)
        during_saves += bool(half)
        beside_steps += bool(half) and start.steps() > half[-1]
        if resumed is not None and resumed != (before[-1] if before else 0):
            wrong.append(f"start {number}: resumed from {resumed}, there were {before}")
        if before and start.steps() and resumed is None:
            wrong.append(f"start {number} did not say where it resumed from")
        if number < kills and start.process.returncode != -9:
            wrong.append(f"start {number} ended by itself: {start.process.returncode}")
        shown = "killed before" if resumed is None and number else resumed or 0
        row = (number + 1, shown, f"{lived:.1f}", start.steps(), after[-2:], half or "")
        report.append("| " + " | ".join(map(str, row)) + " |")
        print(report[-1], flush=True)
    read = ""
    if reading is not None:
        ended = reading.process.poll() is not None
        reading.process.kill()
        reading.end()
        reads = [line for line in reading.lines if line.startswith("read ")]
        if ended or not reads or len(reads) < len(reading.lines):
            wrong.append(f"the reader: {reading.lines[-3:]}")
        steps_read = len(set(reads))
        read = f" Meanwhile it was scored {len(reads)} times, at {steps_read} different steps."
    wanted, found = (read_arrays(w, steps) for w in (folder / "whole", workdir))
    same = wanted.keys() == found.keys() and all(
        np.array_equal(wanted[name], found[name]) for name in wanted
    )
    if not same:
        wrong.append("final parameters differ")
    if losses(folder / "whole") != losses(workdir):
        wrong.append("losses differ")
    if not during_saves:
        wrong.append("no kill fell into the writing of a checkpoint")
    if wrong:
        sys.exit("\n".join(wrong))
    verdict = (
        f"{kills} kills, {during_saves} of them while a checkpoint was written ({beside_steps} "
        f"after a later step); {len(wanted)} arrays (parameters and optimizer state) and {steps} "
        f"losses equal the undisturbed run's bit for bit.{read}"
    )
    print(verdict)
    return [*report, "", verdict]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m jrm_jax.benchmarks.kill_test", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--reader", action="store_true", help="score the run in a loop meanwhile")
    run_command(parser, argv, run, "Kill test", "one CPU process")


if __name__ == "__main__":
    main()
