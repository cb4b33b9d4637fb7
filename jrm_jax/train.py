"""The loop. It owns the order of things, the files of a run, and nothing else.

The order of one turn is a contract:

    1. read the metrics of the step before and stop if anything is not finite
    2. evaluate (when due), so that a save can be ranked
    3. save (when due, or `valid` is the best so far): only a state seen to be finite. It is
       written while the next steps run; an error of it ends the run at the next turn
    4. next batch: the data position is the step, so nothing else need be saved
    5. step; its metrics are read one turn later, so that the device never waits for the host
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jrm_jax import build, build_data, distributed
from jrm_jax.checkpoint import Checkpoints, give_up, open_checkpoints
from jrm_jax.errors import UserError
from jrm_jax.metrics import Accumulator, Window, Writer
from jrm_jax.run import backbones, buckets, check_data, fit
from jrm_jax.run import workdir as files
from jrm_jax.run.check_config import check_config
from jrm_jax.run.held_out import HeldOut
from jrm_jax.run.lock import Lock, hold
from jrm_jax.run.programs import EVALUATE, TRAIN, Programs, buckets_met
from jrm_jax.run.ranking import best_metric
from jrm_jax.run.saved import best_rank
from jrm_jax.shell import disk
from jrm_jax.shell.report import describe_run, in_words, json_safe, print_results
from jrm_jax.shell.stop import Stopped, StopRequest
from jrm_jax.watch import Trace, Watchdog, describe_memory

LESSONS = ("preference", "language", "words", "facts", "teacher")
SCALARS = ("loss", "grad_norm", "param_norm")


def run(config: ConfigDict, workdir: Path) -> int:
    """Train, or go on training, or reprint the results of a finished run. Returns the exit status.

    Raises:
        UserError: bad input, a changed config, a non-finite loss, a full disk, another trainer.
    """
    leader = distributed.is_leader()
    say = functools.partial(print, flush=True) if leader else _silent
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
    stop = StopRequest(say=say, several=jax.process_count() > 1)
    with stop, contextlib.ExitStack() as parts:
        try:
            with stop.breaking(), stop.answering("stopping"):
                held = parts.enter_context(hold(workdir, say))
                files.check_config(workdir, config)  # once more: another may just have ended
                kept = config.keep_interval
                checkpoints = open_checkpoints(workdir / files.CHECKPOINTS, say, kept)
                checkpoints = parts.enter_context(checkpoints)
                backbone = backbones.for_training(config, workdir)
                here = backbones.located(config, backbone.folder)
                training = _Run(here, workdir, checkpoints, stop, leader, held, backbone.record)
        except Stopped as stopped:
            say(_last_words(stopped.number, "before the first step, and nothing is lost"))
            return stopped.status
        if steps < config.total_steps:
            say(build.describe_more_steps(config, steps, training.start))
        if leader:  # only now: a config that cannot start may be corrected
            files.keep_results(workdir, steps)
            chosen = buckets.as_text(training.data.train_plan.buckets)
            disk.write_whole(workdir / buckets.RECORD, chosen)
            disk.write_whole(workdir / backbones.RECORD, backbone.record.as_text())
            disk.write_whole(workdir / files.CONFIG, files.as_text(backbone.config))
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
        fit.check_state(config, backbone_config, self.mesh)
        with distributed.leader_first("data"):  # who comes later finds it drawn and measured
            kept = buckets.read_record(workdir)
            self.data = build_data.build_data(config, backbone_config, say, kept)
        reward_id = self.data.encoder.tokenizer.reward_id
        backbone = build.make_backbone(config, backbone_config, self.mesh, reward_id)
        self.rewards = Accumulator()
        self.taught = dict.fromkeys(LESSONS, 0)  # steps in which a loss had something to teach
        state, (optimizer, self.schedule) = build.init_state(
            config, backbone_config, self.mesh, self.data.encoder
        )
        steps = build.make_steps(config, backbone, self.data, optimizer, state)
        self.train_step, self.eval_step = steps
        self.owed = False  # an evaluation of the step at which the run starts
        self.resumed = False  # from a checkpoint, of step 0 maybe
        self.state, self.start = self._resume(state)
        self.best = best_rank(checkpoints.folder, checkpoints.steps())
        if not self.start and (words := build.head_start(config, backbone_config).words):
            say(words)
        self.seconds = 0.0  # of this session
        self.window = Window(SCALARS)
        self.best_metric = best_metric(config, self.data.measured)
        self.writer = Writer(workdir, config.total_steps, self.start, leader)
        self.watchdog = Watchdog(
            config.watchdog_seconds, config.heartbeat_seconds, self.writer.say if leader else print
        )
        checkpoints.alive = self.watchdog.beat
        self.trace = Trace(config.profile, workdir / "profile")
        watched = {"stop": stop, "watchdog": self.watchdog, "show": self.writer.show}
        parts = (backbone_config, self.data, optimizer, self.state)
        self.fitting = fit.Fitting(config, *parts, say=self.writer.say)
        self.programs = Programs(
            {TRAIN: self.train_step, EVALUATE: self.eval_step},
            buckets_met(self.data, self.start, config.total_steps),
            self.data.buckets,
            say=self.writer.say,
            **watched,
        )
        self.held_out = HeldOut(
            config, self.data, self.mesh, self.eval_step, self.programs, **watched
        )
        self.writer.say(describe_run(self.data, self.state, self.mesh))

    def _resume(self, state):
        if not self.checkpoints.steps():
            if self.leader and (self.workdir / files.CONFIG).exists():
                print(f"{self.workdir} has no complete checkpoint yet: from step 0", flush=True)
            return state, 0
        step, trainable, opt_state, meta = self.checkpoints.restore(
            *give_up((state.trainable, state.opt_state))
        )
        check_data.check_unchanged(self.workdir, meta["stamp"], self.data.stamp)
        self.rewards.totals = meta["rewards"]
        self.taught |= meta.get("taught", {})
        self.owed, self.resumed = not meta["valid"], True
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
        saved = self.start if self.resumed else -1
        saves = config.save_interval, config.keep_interval
        try:
            with batches, self.watchdog:
                if not self._prepare():
                    return self._stopped(self.start)
                self.window.begin()
                for step in range(self.start, total + 1):
                    self.watchdog.beat(step)
                    self.checkpoints.check()
                    stopping = self.stop.now()
                    due_eval = step == total or _is_due(step, config.eval_interval)
                    due_save = step == total or _is_due(step, *saves)
                    due_log = step == total or _is_due(step, config.log_interval)
                    # no steps at all: the start is saved
                    new = step > self.start or not (total or self.resumed)
                    if new and (due_eval or due_save or due_log or stopping):
                        pending = self._check(pending)
                    if new and due_log:
                        self._log(step)
                    valid: dict[str, float] = {}
                    if due_eval and not stopping and (new or self.owed):
                        valid = self._evaluate(step)
                        stopping = self.stop.asked
                        due_save |= config.save_interval > 0 and self.metric(valid) > self.best
                        self.best = max(self.best, self.metric(valid))
                    if new and (due_save or stopping) and saved != step:
                        saved = self._save(step, valid)
                    elif valid and saved == step:
                        self.checkpoints.rate(step, self._meta(step, valid), self.metric(valid))
                    if stopping:
                        return self._stopped(step)
                    if step == total:
                        break
                    self.trace.at(step, self.state)
                    with self.window.timed("data"):
                        placed = build_data.place(config, next(batches), self.mesh)
                    if not self._compile(step, placed):
                        self._check(pending)
                        if step > self.start and saved != step:
                            self._save(step, {})
                        return self._stopped(step)
                    self.state, metrics = self.train_step(self.state, placed)
                    if pending is not None:
                        self._check(pending)
                    elif step == self.start:
                        self.writer.say(describe_memory(self.mesh.local_devices[0]))
                    pending = (step, metrics)
            self.seconds += time.monotonic() - began
            with self.watchdog:
                return self._finish()
        finally:
            self.trace.close(self.state)
            self.writer.close()

    def _prepare(self) -> bool:
        """What is compiled before the first step: on the CPU everything, elsewhere the train step
        and the evaluation that need most, which must fit. False: given up."""
        if self.mesh.devices.flat[0].platform == "cpu" and self.fitting.limit is None:
            return self.programs.prepare_ahead(self.config, self.data, self.mesh, self.state)

        def keep(step: Any) -> None:
            self.train_step = step

        return self.fitting.search(self.programs, TRAIN, EVALUATE, keep)

    def _stopped(self, step: int) -> int:
        """The exit status; says that nothing of it is lost, once that is so."""
        if not self.checkpoints.check():
            self.writer.say("waiting until the last checkpoint is complete")
            self.checkpoints.wait()
        where = f"after step {step}, which is saved" if step else "before the first step"
        self.writer.say(_last_words(self.stop.asked, where))
        return 128 + self.stop.asked

    def _evaluate(self, step: int) -> dict[str, float]:
        """Of `valid`; {} where there is none, or it was given up."""
        if "valid" not in self.data.eval_plans:
            return {}
        with self.window.timed("evaluation"):
            valid = self.held_out.read("valid", self.state.trainable, self.state.frozen)
        if valid is None:
            return {}
        self.owed = False
        self.writer.write(step, "valid", valid)
        self.writer.say(f"step {step}  valid: {in_words(valid)}")
        return valid

    def _compile(self, step: int, placed: dict) -> bool:
        """The program that this step needs. False: given up."""
        program = TRAIN, self.data.train_plan.batch(step)[0]
        with self.window.timed("compilation"):
            return self.programs.prepare({program: (self.state, placed)}, limit=self.fitting.limit)

    def _check(self, pending: tuple[int, dict] | None) -> None:
        """Read a step's metrics; what is not finite ends the run."""
        if pending is None:
            return
        step, metrics = pending
        metrics = jax.device_get(metrics)
        bad = [name for name in SCALARS if not np.isfinite(metrics[name])]
        if bad:
            ids = self.data.train_plan.batch(step)[1]  # of all hosts
            names = ", ".join(self.data.example_names(ids))
            try:
                last = f"last good checkpoint: {(self.checkpoints.steps() or ['none'])[-1]}"
            except UserError as error:  # the one that was being written has failed as well
                last = str(error)
            raise UserError(
                f"step {step}: {', '.join(bad)} not finite; nothing of it is saved ({last});"
                f" its examples: {names}"
            )
        self.window.add(metrics)
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

    def _log(self, step: int) -> None:
        values = self.window.close() | {"learning_rate": float(self.schedule(step - 1))}
        self.writer.write(step, "train", values)
        shown = ("loss", "preference", "language", "pair_accuracy", "pairs_per_second")
        self.writer.progress(step, {name: values[name] for name in shown if name in values})

    def metric(self, values: dict[str, float]) -> float:
        """The number by which checkpoints are ranked, larger is better; NaN if not measured."""
        name = self.best_metric
        sign = -1.0 if name.startswith("-") else 1.0
        return sign * values.get(name.lstrip("-"), math.nan)

    def _save(self, step: int, valid: dict[str, float]) -> int:
        """Begin to save; returns the step."""
        if self.held is not None:
            self.held.check()
        with self.window.timed("checkpoint"):
            self.checkpoints.save(
                step,
                self.state.trainable,
                self.state.opt_state,
                self._meta(step, valid),
                self.metric(valid),
            )
        return step

    def _meta(self, step: int, valid: dict[str, float]) -> dict[str, Any]:
        """What a checkpoint says about itself."""
        rewards = self.rewards.summary()
        return {
            "step": step,
            "stamp": self.data.stamp,
            "valid": {k: v if math.isfinite(v) else None for k, v in valid.items()},
            "reward_mean": rewards.get("reward_mean"),
            "reward_std": rewards.get("reward_std"),
            "backbone": self.backbone and self.backbone._asdict(),
            "rewards": self.rewards.totals,
            "taught": self.taught,
        }

    def _finish(self) -> int:
        """`test` and `hard`, read once, from the best step; then results.json. The exit status."""
        best = (ranked := self.checkpoints.ranked())[0]
        if best == self.config.total_steps:
            trainable, meta = self.state.trainable, self.checkpoints.read_meta(best)
        else:
            self.trace.close(self.state)
            self.watchdog.beat()
            shapes, _ = give_up((self.state.trainable, self.state.opt_state))
            best, trainable, _, meta = self.checkpoints.restore(shapes, None, ranked)
        results: dict[str, Any] = {"step": best, "total_steps": self.config.total_steps}
        found = self.held_out.read_all(self.workdir, best, trainable, self.state.frozen)
        if found is None:
            return self._stopped(self.config.total_steps)
        for split, values in found.items():
            if split != "valid":  # which stands at its step already
                self.writer.write(best, split, values)
            results |= {f"{split}/{name}": value for name, value in values.items()}
        results["reward_mean"], results["reward_std"] = meta["reward_mean"], meta["reward_std"]
        results["seconds"] = self.seconds
        results["config"] = f"{self.config.name}:{self.config.get('variant') or ''}".rstrip(":")
        if self.leader:
            text = json.dumps(json_safe(results), indent=2) + "\n"
            files.write_results(self.workdir, text)
            self.writer.close()
            print_results(results)
            print(f"results: {self.workdir / files.RESULTS}")
        return 0


def _last_words(number: int, where: str) -> str:
    return f"stopped by {signal.Signals(number).name} {where}; run the same command to go on"


def _is_due(step: int, *intervals: int) -> bool:
    """At every multiple of one of `intervals`; 0: never."""
    return any(interval > 0 and step % interval == 0 for interval in intervals)


def _silent(words: str) -> None:
    """Of several processes one speaks."""
