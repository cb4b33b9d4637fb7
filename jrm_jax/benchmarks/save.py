"""Seconds that training loses to a save: waited for, and written while the next steps run.

    python -m jrm_jax.benchmarks.save [--million=200] [--rounds=3] [--out=FILE.md]

Two states: the default run's, and one of random weights with Adam whose backbone has so many
million parameters. Each save is followed by steps until it is complete. What these took beyond as
many undisturbed ones, which are timed just before, is what the save has cost; the first of them
also waits until the save has begun. The share compares that with waiting for the whole save.

The larger state is measured twice: with its own steps, which want the processor that writing
wants, and with steps that only sleep, as for a process whose steps an accelerator computes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from configs import discriminative, joint
from jrm_jax import build, build_data, cli
from jrm_jax.benchmarks import make_tiny_backbone
from jrm_jax.benchmarks.reporting import run_command
from jrm_jax.checkpoint import Checkpoints, open_checkpoints
from jrm_jax.shell.arguments import Parser

WIDTH, PER_LAYER = 1024, 16.8e6  # of the random backbone: 4 MLP widths of 1024, square projections
SLEEP = 1.0  # seconds of a step that an accelerator is meant to compute
STEPS = 4  # undisturbed ones before each save, at least
HEADER = (
    "| state | arrays, MB | a step, s | waiting for a save, s | begun after, s | complete after, s "
    "| steps meanwhile | these took longer by, s | share |"
)


class Cost(NamedTuple):
    """Of one save in seconds, and the steps that ran while it was written."""

    begun: float
    complete: float
    steps: int
    lost: float


def default_run(folder: Path) -> ConfigDict:
    config = joint.get_config()
    config.data.world.update({"train": 8 * config.batch_size, "valid": 0, "test": 0, "hard": 0})
    return config


def random_run(folder: Path, million: float) -> ConfigDict:
    """Ranking of single groups, so that a step takes seconds."""
    layers = max(1, round(million * 1e6 / PER_LAYER))
    sizes = {"hidden": WIDTH, "layers": layers, "heads": 16, "kv-heads": 16, "head-dim": 64}
    sizes["mlp"] = 4 * WIDTH
    made = folder / "backbone"
    options = [f"--out={made}", "--no-weights", *(f"--{k}={v}" for k, v in sizes.items())]
    make_tiny_backbone.main(options)
    config = discriminative.get_config()
    config.backbone.update({"path": str(made), "random": True, "scan_unroll": 1})
    config.data.world.update({"train": 32, "valid": 0, "test": 0, "hard": 0})
    config.optimizer.name, config.batch_size = "adam", 1
    return config


class Training:
    """A state and a step that takes one batch again and again."""

    def __init__(self, config: ConfigDict):
        backbone_config = build.load_backbone_config(config)
        mesh = build.make_mesh(config, backbone_config)
        data = build_data.build_data(config, backbone_config, print)
        reward_id = data.encoder.tokenizer.reward_id
        backbone = build.make_backbone(config, backbone_config, mesh, reward_id)
        self.state, (optimizer, _) = build.init_state(config, backbone_config, mesh, data.encoder)
        self._step, _ = build.make_steps(config, backbone, data, optimizer, self.state)
        with build_data.batches(config, data, "train", mesh, 0, 1) as source:
            self._batch = build_data.place(config, next(source), mesh)
        self.number, self.elsewhere = 0, False
        saved = self.state.trainable, self.state.opt_state
        self.megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(saved)) / 1e6

    def step(self) -> None:
        self.number += 1
        if self.elsewhere:
            time.sleep(SLEEP)
        else:
            self.state, _ = jax.block_until_ready(self._step(self.state, self._batch))

    def save(self, checkpoints: Checkpoints) -> None:
        state = self.state
        checkpoints.save(self.number, state.trainable, state.opt_state, {}, float("nan"))


def timed(do: Callable[[], Any]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def save_beside_steps(training: Training, checkpoints: Checkpoints, step: float) -> Cost:
    """`step`: seconds of an undisturbed one."""
    began = time.perf_counter()
    training.save(checkpoints)
    begun, steps, complete = time.perf_counter() - began, 0, 0.0
    while not complete:
        training.step()
        steps += 1
        if checkpoints.check():
            complete = time.perf_counter() - began
    return Cost(begun, complete, steps, complete - steps * step)


def measure(name: str, training: Training, folder: Path, rounds: int) -> str:
    """A row of the table: medians over rounds."""
    for _ in range(3):  # compiles; the memory of a state is then the process's
        training.step()
    waited, costs, steps = [], [], []
    with open_checkpoints(folder / name) as checkpoints:
        for _ in range(rounds):
            training.step()
            waited.append(timed(lambda: (training.save(checkpoints), checkpoints.wait())))
            count = max(STEPS, costs[-1].steps if costs else 0)
            steps.append(statistics.median(timed(training.step) for _ in range(count)))
            costs.append(save_beside_steps(training, checkpoints, steps[-1]))
            print(f"{name}: a step {steps[-1]:.3f} s, waiting {waited[-1]:.3f} s, {costs[-1]}")
    middle = Cost(*map(statistics.median, zip(*costs, strict=True)))
    wait = statistics.median(waited)
    cells = [
        name, f"{training.megabytes:.0f}", f"{statistics.median(steps):.3f}", f"{wait:.3f}",
        f"{middle.begun:.3f}", f"{middle.complete:.3f}", f"{middle.steps:g}",
        f"{middle.lost:.3f}", f"{middle.lost / wait:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def run(folder: Path, million: float, rounds: int) -> list[str]:
    """Lines of a Markdown report."""
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    lines.append(measure("default run", Training(default_run(folder)), folder, rounds))
    if million:
        name, training = f"{million:g} M, Adam", Training(random_run(folder, million))
        lines.append(measure(name, training, folder, rounds))
        training.elsewhere = True
        lines.append(measure(f"{name}, computed elsewhere", training, folder, rounds))
    print("\n".join(lines))
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m jrm_jax.benchmarks.save", description=__doc__.splitlines()[0])
    parser.add_argument("--million", type=float, default=200, help="parameters; 0: none")
    parser.add_argument("--rounds", type=int, default=3, help="saves of each kind")
    cli.keep_memory()
    run_command(parser, argv, run, "Saves", f"{os.cpu_count()} cores, {jax.devices()[0]}")


if __name__ == "__main__":
    main()
