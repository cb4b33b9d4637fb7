"""Metrics: sums with their weights, and where they are written.

Console (a progress bar on a terminal, plain lines elsewhere), `metrics.jsonl` (one object a line:
step, split, names and values) and TensorBoard. Only the first process of a run writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jrm_jax.shell import disk
from jrm_jax.shell.report import in_words
from jrm_jax.shell.terminal import Bar, duration, is_watched

JSONL = "metrics.jsonl"


class Accumulator:
    """Adds up (sum, weight) pairs by name, in float64."""

    OTHERWISE = ("ties", "reward", "reward_square")  # whose means are not for `summary`

    def __init__(self) -> None:
        self.totals: dict[str, list[float]] = {}

    def add(self, terms: Mapping[str, tuple[Any, Any]]) -> None:
        for name, (total, weight) in terms.items():
            entry = self.totals.setdefault(name, [0.0, 0.0])
            entry[0] += float(total)
            entry[1] += float(weight)

    def mean(self, name: str) -> float:
        """NaN where nothing was measured."""
        total, weight = self.totals.get(name, (0.0, 0.0))
        return total / weight if weight else math.nan

    def sum(self, name: str) -> float:
        return self.totals.get(name, (0.0, 0.0))[0]

    def weight(self, name: str) -> float:
        return self.totals.get(name, (0.0, 0.0))[1]

    def summary(self) -> dict[str, float]:
        """Means by name, of all but what is told otherwise: counts of pairs and ties, and the mean
        and the spread of the rewards."""
        values = {name: self.mean(name) for name in self.totals if name not in self.OTHERWISE}
        if "pair_accuracy" in self.totals:
            values["pairs"] = self.weight("pair_accuracy")
            values["ties"] = self.sum("ties")
        if "reward" in self.totals:
            mean = self.mean("reward")
            values["reward_mean"] = mean
            values["reward_std"] = math.sqrt(max(0.0, self.mean("reward_square") - mean**2))
        return values


class Window:
    """What a run measures between two lines of metrics: sums over its steps, and seconds."""

    WITHIN = ("data",)  # parts of a step
    BETWEEN = ("checkpoint", "compilation", "evaluation")  # what is no step

    def __init__(self, scalars: Sequence[str]):
        """`scalars`: metrics of a step that are numbers; the others are (sum, weight)."""
        self._scalars = tuple(scalars)
        self.begin()

    def begin(self) -> None:
        self._totals, self._began = Accumulator(), time.monotonic()
        self._spent = dict.fromkeys((*self.WITHIN, *self.BETWEEN), 0.0)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """What is done inside takes the seconds of `name`; not nested."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._spent[name] += time.monotonic() - began

    def add(self, metrics: Mapping[str, Any]) -> None:
        """A step's."""
        self._totals.add(
            {n: (value, 1.0) if n in self._scalars else value for n, value in metrics.items()}
        )

    def close(self) -> dict[str, float]:
        """Means by name, and seconds: of a step, of its parts, and in all between the steps. A new
        window begins."""
        steps = max(1.0, self._totals.weight("loss"))
        seconds = time.monotonic() - self._began - sum(self._spent[n] for n in self.BETWEEN)
        values = dict.fromkeys(self._scalars, math.nan) | self._totals.summary()
        values["seconds_per_step"] = seconds / steps
        values["seconds_data"] = self._spent["data"] / steps
        values["seconds_compute"] = (seconds - self._spent["data"]) / steps
        values |= {f"seconds_{name}": self._spent[name] for name in self.BETWEEN}
        if "pairs" in values:
            values["pairs_per_second"] = values["pairs"] / max(seconds, 1e-9)
        self.begin()
        return values


class Writer:
    """Everything that a run writes about itself, step by step."""

    def __init__(self, workdir: Path, total_steps: int, start: int, active: bool = True):
        """Lines of `metrics.jsonl` from after step `start` are cut off."""
        self.active = active
        self._bar = None
        if not active:
            return
        self._jsonl = _cut_back(workdir / JSONL, start).open("a", encoding="utf-8")
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start or None)
        self._total, self._start, self._began = total_steps, start, time.monotonic()
        if is_watched():
            self._bar = Bar("training", total_steps, kept=True)
            self._bar.__enter__()
            self._bar.show(start)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One line of numbers; not-a-number becomes null in JSON."""
        if not self.active:
            return
        row = {
            "step": step,
            "split": split,
            **{k: (float(v) if np.isfinite(v) else None) for k, v in values.items()},
        }
        self._jsonl.write(json.dumps(row) + "\n")
        self._jsonl.flush()
        for name, value in row.items():
            if name in values and value is not None:  # tensorboardX warns of each that is no number
                self._board.add_scalar(f"{split}/{name}", value, step)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """The state of training for a person: numbers and the time left."""
        if not self.active:
            return
        words = in_words(values)
        if self._bar is not None:
            self._bar.show(step, words=words)
            return
        done = max(1, step - self._start)
        left = (time.monotonic() - self._began) / done * (self._total - step)
        print(f"step {step}/{self._total}  {words}  left {duration(left)}", flush=True)

    def show(self, words: str) -> None:
        """On a terminal, what is done beside the steps; '': nothing."""
        if self._bar is not None:
            self._bar.show(self._bar.done, note=words)

    def say(self, words: str) -> None:
        if not self.active or not words:
            return
        if self._bar is not None:
            self._bar.say(words)
        else:
            print(words, flush=True)

    def close(self) -> None:
        if not self.active:
            return
        if self._bar is not None:
            self._bar.__exit__()
        self._jsonl.close()
        self._board.close()


def _cut_back(path: Path, step: int) -> Path:
    """Drop lines written after `step`, and a last line that a crash left incomplete."""
    if not path.exists():
        return path
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # damaged, or not ours
            continue
    disk.write_whole(path, "".join(kept))
    return path
