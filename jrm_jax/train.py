"""The loop. It owns the order of things, the files of a run, and nothing else.

The order of one turn is a contract:

    1. read the metrics of the step before and stop if anything is not finite
    2. evaluate (when due), so that a save can be ranked
    3. save (when due): only a state whose metrics and parameters were seen to be finite
    4. next batch: the data position is the step, so nothing else need be saved
    5. step; its metrics are read one turn later, so that the device never waits for the host
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jrm_jax import backbones, build, build_data, check_data, distributed
from jrm_jax import workdir as files
from jrm_jax.check_config import check_config
from jrm_jax.checkpoint import Checkpoints, open_checkpoints
from jrm_jax.errors import UserError
from jrm_jax.lock import Lock, hold
from jrm_jax.metrics import Accumulator, Writer
from jrm_jax.report import in_words, json_safe, print_results
from jrm_jax.stop import StopRequest
from jrm_jax.watch import Trace, Watchdog, describe_memory

LESSONS = ("preference", "language", "words", "facts")
SCALARS = ("loss", "grad_norm", "param_norm")


def run(config: ConfigDict, workdir: Path) -> int:
    """Train, or go on training, or reprint the results of a finished run. Returns the exit status.

    Raises:
        UserError: bad input, a changed config, a non-finite loss, a full disk, another trainer.
    """
    leader = distributed.is_leader()
    say = print if leader else _silent
    notes = check_config(config)
    steps = files.check_config(workdir, config)
    results = files.read_results(workdir)
    if results is not None and steps == config.total_steps:
        backbones.check_name(config, workdir)
        if leader:
            print(f"{workdir} is finished; its results:")
            print_results(results)
        return 0
    for note in notes:
        say(note)
    stop, kept = StopRequest(several=jax.process_count() > 1), config.keep_interval
    with hold(workdir, say) as held, stop:
        files.check_config(workdir, config)  # once more: another trainer may just have ended
        with open_checkpoints(workdir / files.CHECKPOINTS, say, kept) as checkpoints:
            backbone = backbones.for_training(config, workdir)
            here = backbones.located(config, backbone.folder)
            training = _Run(here, workdir, checkpoints, stop, leader, held, backbone.record)
            if steps < config.total_steps:
                say(build.describe_more_steps(config, steps, training.start))
            if leader:  # only now: a config that cannot start may be corrected
                files.keep_results(workdir, steps)
                files.write_whole(workdir / backbones.RECORD, backbone.record.as_text())
                files.write_whole(workdir / files.CONFIG, files.as_text(backbone.config))
            return training.train()


class _Run:
    """One run's parts, and the loop over them."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        checkpoints: Checkpoints,
        stop: StopRequest,
        leader: bool,
        held: Lock | None = None,
        backbone: backbones.Record | None = None,
    ):
        self.config, self.workdir, self.checkpoints, self.stop = config, workdir, checkpoints, stop
        self.leader, self.held, self.backbone = leader, held, backbone
        say = print if leader else _silent
        backbone_config = build.load_backbone_config(config)
        self.mesh = build.make_mesh(config, backbone_config)
        with distributed.leader_first("data"):  # who comes later finds it drawn and measured
            self.data = build_data.build_data(config, backbone_config, say)
        backbone = build.make_backbone(
            config, backbone_config, self.mesh, self.data.encoder.tokenizer.reward_id
        )
        self.rewards = Accumulator()
        self.taught = dict.fromkeys(LESSONS, 0)  # steps in which a loss had something to teach
        state, (optimizer, self.schedule) = build.init_state(
            config, backbone_config, self.mesh, self.data.encoder
        )
        self.train_step, self.eval_step = build.make_steps(
            config, backbone, self.data, optimizer, state
        )
        self.state, self.start = self._resume(state)
        if not self.start and (words := build.head_start(config, backbone_config).words):
            say(words)
        self.seconds = 0.0  # of this session
        self.spent = {"data": 0.0, "checkpoint": 0.0}  # since the last line of metrics
        self.best_metric = config.best_metric
        if self.best_metric == "auto":
            self.best_metric = "pair_accuracy" if config.loss.preference_weight else "-language"
        self.writer = Writer(workdir, config.total_steps, self.start, leader)
        self.watchdog = Watchdog(
            config.watchdog_seconds, config.heartbeat_seconds, self.writer.say if leader else print
        )
        self.trace = Trace(config.profile, workdir / "profile")
        self.writer.say(self._describe())

    def _describe(self) -> str:
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in self.state[1:3]]
        where = f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
        plan = self.data.train_plan
        return (
            f"{sizes[0]:,} parameters train, {sizes[1]:,} are frozen; {where}; "
            f"{sum(map(len, self.data.train_sets)):,} training groups, "
            f"{plan.steps_per_epoch:,} steps an epoch; buckets "
            + ", ".join(
                f"K{b.candidates} I{b.images} N{b.patches} P{b.prompt} C{b.candidate} T{b.critique}"
                for b in self.data.buckets
            )
        )

    def _resume(self, state):
        if not self.checkpoints.steps():
            if self.leader and (self.workdir / files.CONFIG).exists():
                print(f"{self.workdir} has no complete checkpoint yet: from step 0", flush=True)
            return state, 0
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        step, trainable, opt_state, meta = self.checkpoints.restore(
            abstract.trainable, abstract.opt_state
        )
        check_data.check_unchanged(self.workdir, meta["stamp"], self.data.stamp)
        self.checkpoints.delete_after(step)
        self.rewards.totals = meta["rewards"]
        self.taught |= meta.get("taught", {})
        if self.leader:
            print(f"resuming {self.workdir} from step {step}", flush=True)
        placed = jax.device_put(np.int32(step), state.step.sharding)
        return state._replace(step=placed, trainable=trainable, opt_state=opt_state), step

    # The loop

    def train(self) -> int:
        config, total = self.config, self.config.total_steps
        began = time.monotonic()
        batches = build_data.batches(config, self.data, "train", self.mesh, self.start, total)
        pending: tuple[int, dict] | None = None
        window = Accumulator()
        valid: dict[str, float] = {}
        saved = self.start if self.start else -1
        try:
            with batches, self.watchdog:
                self._compile()
                window_began = time.monotonic()
                for step in range(self.start, total + 1):
                    self.watchdog.beat(step)
                    stopping = self.stop.now()  # once: what stops here must be saved here
                    due_eval = step == total or _is_due(step, config.eval_interval)
                    due_save = step == total or _is_due(step, config.save_interval) or stopping
                    due_log = step == total or _is_due(step, config.log_interval)
                    if step > self.start or step == total:  # no steps at all: the start is saved
                        if (due_eval or due_save or due_log) and pending is not None:
                            self._check(pending, window)
                            pending = None
                        if due_log:
                            self._log(step, window, time.monotonic() - window_began)
                            window, window_began = Accumulator(), time.monotonic()
                        paused = time.monotonic()
                        if due_eval and "valid" in self.data.eval_plans:
                            valid = self.evaluate("valid")
                            self.writer.write(step, "valid", valid)
                            self.writer.say(f"step {step}  valid: {in_words(valid)}")
                        if due_save and saved != step:
                            with self._timed("checkpoint"):
                                self._save(step, valid if due_eval else {})
                            saved = step
                        window_began += time.monotonic() - paused
                    if stopping and step > self.start:
                        self.writer.say(
                            f"stopped by {signal.Signals(stopping).name} after step {step}, "
                            "which is saved; run the same command to go on"
                        )
                        return 128 + stopping
                    if step == total:
                        break
                    self.trace.at(step, self.state)
                    with self._timed("data"):
                        placed = build_data.place(config, next(batches), self.mesh)
                    self.state, metrics = self.train_step(self.state, placed)
                    if pending is not None:
                        self._check(pending, window)
                    elif step == self.start:  # compiled now
                        self.writer.say(describe_memory(self.mesh.local_devices[0]))
                    pending = (step, metrics)
            self.seconds += time.monotonic() - began
            with self.watchdog:
                self._finish()
            return 0
        finally:
            self.trace.close(self.state)
            self.writer.close()

    def _compile(self) -> None:
        began, steps = time.monotonic(), (self.train_step, self.eval_step)
        count = build.compile_ahead(
            self.config, self.data, self.mesh, self.state, steps, self.start
        )
        if count:
            self.writer.say(f"{count} programs compiled in {time.monotonic() - began:.0f} s")

    @contextlib.contextmanager
    def _timed(self, name: str):
        began = time.monotonic()
        yield
        self.spent[name] += time.monotonic() - began

    def _check(self, pending: tuple[int, dict], window: Accumulator) -> None:
        step, metrics = pending
        metrics = jax.device_get(metrics)
        bad = [name for name in SCALARS if not np.isfinite(metrics[name])]
        if bad:
            ids = self.data.train_plan.batch(step)[1]  # of all hosts
            names = ", ".join(self.data.example_names(ids))
            saved = self.checkpoints.steps()
            raise UserError(
                f"step {step}: {', '.join(bad)} not finite; nothing of it is saved (last good "
                f"checkpoint: {saved[-1] if saved else 'none'}); its examples: {names}"
            )
        window.add({name: (metrics.pop(name), 1.0) for name in SCALARS})
        window.add(metrics)
        for name in LESSONS:
            self.taught[name] += name in metrics and bool(metrics[name][1] > 0)
        # moments of the training rewards, as a score's scale; early steps fade out
        for name in ("reward", "reward_square"):
            if name in metrics:
                total, weight = self.rewards.totals.get(name, (0.0, 0.0))
                self.rewards.totals[name] = [
                    0.99 * total + float(metrics[name][0]),
                    0.99 * weight + float(metrics[name][1]),
                ]

    def _log(self, step: int, window: Accumulator, seconds: float) -> None:
        steps = max(1.0, window.weight("loss"))
        values = {name: window.mean(name) for name in SCALARS} | window.summary()
        values["learning_rate"] = float(self.schedule(step - 1))
        values["seconds_per_step"] = seconds / steps
        values["seconds_data"] = self.spent["data"] / steps
        values["seconds_compute"] = (seconds - self.spent["data"]) / steps
        values["seconds_checkpoint"] = self.spent["checkpoint"]  # in all, between steps
        self.spent = dict.fromkeys(self.spent, 0.0)
        if "pairs" in values:
            values["pairs_per_second"] = values["pairs"] / max(seconds, 1e-9)
        self.writer.write(step, "train", values)
        shown = ("loss", "preference", "language", "pair_accuracy", "pairs_per_second")
        self.writer.progress(step, {name: values[name] for name in shown if name in values})

    def evaluate(self, split: str, trainable: Any | None = None) -> dict[str, float]:
        """Every example of a held-out split once."""
        trainable = self.state.trainable if trainable is None else trainable
        totals = Accumulator()
        plan = self.data.eval_plans[split]
        groups = sum(int((plan.batch(i)[1] >= 0).sum()) for i in range(len(plan)))  # of all hosts
        with build_data.batches(self.config, self.data, split, self.mesh) as batches:
            for batch in batches:
                self.watchdog.beat()
                terms, _ = self.eval_step(
                    trainable, self.state.frozen, build_data.place(self.config, batch, self.mesh)
                )
                totals.add(jax.device_get(terms))
        return totals.summary() | {"groups": float(groups)}

    def metric(self, values: dict[str, float]) -> float:
        """The number by which checkpoints are ranked, larger is better; NaN if not measured."""
        name = self.best_metric
        sign = -1.0 if name.startswith("-") else 1.0
        return sign * values.get(name.lstrip("-"), math.nan)

    def _save(self, step: int, valid: dict[str, float]) -> None:
        if self.held is not None:
            self.held.check()
        rewards = self.rewards.summary()
        meta = {
            "step": step,
            "stamp": self.data.stamp,
            "valid": {k: v if math.isfinite(v) else None for k, v in valid.items()},
            "reward_mean": rewards.get("reward_mean"),
            "reward_std": rewards.get("reward_std"),
            "backbone": self.backbone and self.backbone._asdict(),
            "rewards": self.rewards.totals,
            "taught": self.taught,
        }
        self.checkpoints.save(
            step, self.state.trainable, self.state.opt_state, meta, self.metric(valid)
        )

    def _finish(self) -> None:
        """`test` and `hard`, read once, from the best step; then results.json."""
        best = self.checkpoints.best_step() or self.config.total_steps
        if best != self.config.total_steps:
            abstract = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
                self.state.trainable,
            )
            _, trainable, _, meta = self.checkpoints.restore(abstract, None, best)
        else:
            trainable, meta = self.state.trainable, self.checkpoints.read_meta(best)
        results: dict[str, Any] = {"step": best, "total_steps": self.config.total_steps}
        for split in self.data.eval_plans:
            values = self.evaluate(split, trainable)
            self.writer.write(self.config.total_steps, split, values)
            results |= {f"{split}/{name}": value for name, value in values.items()}
        results["reward_mean"], results["reward_std"] = meta["reward_mean"], meta["reward_std"]
        results["seconds"] = self.seconds
        results["config"] = f"{self.config.name}:{self.config.get('variant') or ''}".rstrip(":")
        if self.leader:
            text = json.dumps(json_safe(results), indent=2) + "\n"
            files.write_whole(self.workdir / files.RESULTS, text)
            self.writer.close()
            print_results(results)
            print(f"results: {self.workdir / files.RESULTS}")


def _is_due(step: int, interval: int) -> bool:
    """At every multiple of `interval`; never if that is 0."""
    return interval > 0 and step % interval == 0


def _silent(words: str) -> None:
    """Of several processes one speaks."""
