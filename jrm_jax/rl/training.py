"""One run of RL: the loop, and the files of a run.

A turn of the loop: evaluate (when due), save (when due), draw edits, have them scored, update. What
an iteration draws follows from the seed and its number alone, so that a run that was stopped goes
on bit for bit. Beside what `folder` keeps there, a run's folder holds `metrics.jsonl`,
`tensorboard/`, `checkpoints/` and, at its end, `run.json`: all that the page is made of.

Letters: G problems, K edits of each.
"""

from __future__ import annotations

import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jrm_jax.checkpoint import Checkpoints, open_checkpoints
from jrm_jax.errors import UserError
from jrm_jax.metrics import JSONL, Writer
from jrm_jax.rl import base, grpo, measures
from jrm_jax.rl.editing import make_problem
from jrm_jax.rl.examples import liked, worst
from jrm_jax.rl.folder import claimed, settle
from jrm_jax.rl.reward import Chance, Reward
from jrm_jax.rl.rollout import (
    EVALUATE,
    SPLITS,
    TRAIN,
    Dice,
    Pool,
    Rollout,
    batches,
    make_pool,
    roll,
    together,
)
from jrm_jax.run.workdir import CHECKPOINTS
from jrm_jax.shell import disk
from jrm_jax.shell.report import json_safe
from jrm_jax.shell.stop import StopRequest

RUN = "run.json"


def pools(config: ConfigDict) -> dict[str, Pool]:
    """Instructions of `train`, and of the splits on which a policy is evaluated."""
    counts = {"train": config.problems, **dict.fromkeys(SPLITS, config.eval_problems)}
    return {
        split: make_pool([make_problem(split, i, config.world_seed) for i in range(count)])
        for split, count in counts.items()
    }


_describe = jax.jit(grpo.describe)


@functools.cache
def _programs(adam: tuple[float, ...], chosen: grpo.Settings) -> tuple[Any, Any]:
    """(optimizer, jitted update): the runs of a process that are alike share one compilation.

    Args:
        adam: arguments of `grpo.make_optimizer`.
    """
    optimizer = grpo.make_optimizer(*adam)
    return optimizer, jax.jit(grpo.make_update(optimizer, chosen))


class Run:
    """
    Args:
        name: as the page knows it. settings: what the run depends on, in JSON types.
        seed: of the policy's run. reward: None: the gold score.
    """

    def __init__(
        self, config: ConfigDict, name: str, folder: Path, seed: int, settings: dict[str, Any],
        reward: Reward | Chance | None, known: dict[str, Pool],
    ):  # fmt: skip
        self.config, self.name, self.folder, self.seed = config, name, folder, seed
        self.settings, self.reward, self.pools = settings, reward, known
        self.base = base.load()
        own = config.optimizer
        adam = own.learning_rate, own.clip_norm, own.momentum, own.slower * own.updates
        chosen = grpo.Settings(own.clip, own.kl_weight, own.updates, own.scale)
        self.optimizer, self.update = _programs(adam, chosen)
        self.seconds, self.evaluations = 0.0, []

    # What an iteration draws

    def rows(self, step: int) -> np.ndarray:
        """Of the pool of `train`: a part of a fresh order for each pass over it."""
        count, total = self.config.groups, self.config.problems
        each = total // count
        order = np.random.default_rng([self.seed, step // each]).permutation(total)
        return order[step % each * count :][:count]

    def edits(self, params: Any, pool: Pool, what: int, number: int, score: Any) -> Rollout:
        """What is evaluated is drawn alike in all runs, what is trained on by the run's seed."""
        seed = self.seed if what == TRAIN else 0
        return roll(params, pool, self.config.edits, Dice(seed, what, number), score)

    # The loop

    def train(self, stop: StopRequest, say: Any) -> int:
        """The signal that stopped it, or 0.

        Raises:
            UserError: another config, another run here, a score that failed, a full disk.
        """
        with (
            claimed(self.folder, self.settings, say) as self.lock,
            open_checkpoints(self.folder / CHECKPOINTS, say) as kept,
        ):
            self.base_gold = settle(self.folder, self.config, self.pools["train"], self.reward)
            params, opt_state, start = self._resume(kept)
            writer = Writer(self.folder, self.config.iterations, start)
            try:
                return self._loop(kept, writer, stop, params, opt_state, start)
            finally:
                writer.close()

    def _loop(
        self, kept: Checkpoints, writer: Writer, stop: StopRequest, params: Any, opt_state: Any,
        start: int,
    ) -> int:  # fmt: skip
        config, began, before = self.config, time.monotonic(), self.seconds
        saved = {*kept.steps()}
        evaluated = {row["step"] for row in self.evaluations}
        for step in range(start, config.iterations + 1):
            last = step == config.iterations
            kept.check()
            if step not in evaluated and (last or step % config.eval_interval == 0):
                self._evaluate(params, step, writer)
            stopping = stop.now()
            if (last or stopping or step % config.save_interval == 0) and step not in saved:
                self.seconds = before + time.monotonic() - began
                meta = {"seconds": self.seconds, "evaluations": self.evaluations}
                self.lock.check()
                kept.save(step, params, opt_state, json_safe(meta), math.nan)
            if stopping:
                return stopping
            if last:
                break
            params, opt_state, values = self._iterate(params, opt_state, step)
            if (step + 1) % config.log_interval == 0:
                writer.write(step + 1, "train", values)
                shown = ("reward", "gold", "kl", "spearman", "flat")
                writer.progress(step + 1, {name: values[name] for name in shown})
        self._finish(params)
        return 0

    def _iterate(self, params: Any, opt_state: Any, step: int) -> tuple[Any, Any, dict]:
        pool, began = self.pools["train"].pick(self.rows(step)), time.monotonic()
        found = self.edits(params, pool, TRAIN, step, self.reward)
        scored = time.monotonic()
        params, opt_state, own = self.update(
            params, opt_state, self.base, pool.features, found.program, found.reward_GK
        )
        own = {name: np.asarray(values) for name, values in own.items()}
        bad = [name for name, values in own.items() if not np.isfinite(values).all()]
        if bad:
            raise UserError(f"iteration {step}: {', '.join(bad)} not finite; nothing of it is kept")
        values = measures.summary(found, self.base_gold)
        values |= {name: float(v[-1]) for name, v in own.items()}
        values["ratio_off"] = float(own["ratio_off"][0])  # 0: the first update is of what was drawn
        values |= {"seconds_edits": scored - began, "seconds_update": time.monotonic() - scored}
        return params, opt_state, values

    def _evaluate(self, params: Any, step: int, writer: Writer) -> None:
        """On all held-out problems, with the same noise each time."""
        shown = {}
        for split in SPLITS:
            found, values = self._held_out(params, split)
            writer.write(step, split, values)
            by_problem = {
                "gold_G": found.gold_GK.mean(1), "proxy_G": found.proxy_GK.mean(1)
            }  # fmt: skip
            rounded = {
                name: np.round(own.astype(float), 5).tolist() for name, own in by_problem.items()
            }
            self.evaluations.append({"step": step, "split": split, **values, **rounded})
            shown |= {f"{split} {name}": values[name] for name in ("gold", "proxy")}
        shown["kl"] = values["kl"]
        words = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
        writer.say(f"{self.name}, iteration {step}: {words}")

    def _held_out(self, params: Any, split: str) -> tuple[Rollout, dict[str, float]]:
        pool, size = self.pools[split], self.config.groups
        first = 1000 * SPLITS.index(split)
        parts = [
            self.edits(params, pool.pick(rows), EVALUATE, first + rows[0], self.reward)
            for rows in batches(len(pool.problems), size)
        ]  # fmt: skip
        found = together(parts)
        own = _describe(params, self.base, pool.features)
        values = measures.summary(found, self.base_gold)
        return found, values | {name: float(np.mean(v)) for name, v in own.items()}

    # Files

    def _resume(self, kept: Checkpoints) -> tuple[Any, Any, int]:
        params, opt_state = self.base, self.optimizer.init(self.base)
        if not kept.steps():
            (self.folder / JSONL).unlink(missing_ok=True)  # of a start that came to nothing
            return params, opt_state, 0
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            (params, opt_state),
        )
        step, params, opt_state, meta = kept.restore(*abstract)
        if step > self.config.iterations:
            raise UserError(
                f"{self.folder} has had {step} iterations: config.iterations must be {step} or more"
            )
        self.seconds, self.evaluations = meta["seconds"], meta["evaluations"]
        print(f"resuming {self.folder} from iteration {step}", flush=True)
        return params, opt_state, step

    def _finish(self, params: Any) -> None:
        """`run.json`: the evaluations, what edits lost at the start and at the end, and the worst
        of those that the reward likes."""
        result = {
            "name": self.name,
            **self.settings,
            "seconds": round(self.seconds, 1),
            "base_gold": self.base_gold,
            "scale": None if self.reward is None else self.reward.scale,
            "evaluations": self.evaluations,
        }
        for when, own in (("start", self.base), ("end", params)):
            both = {split: self._held_out(own, split)[0] for split in SPLITS}
            golds = [found for part in both.values() for found in part.golds]
            result[f"lost_{when}"] = measures.lost(golds)
        result["worst"] = [row for split, part in both.items() for row in worst(liked(part, split))]
        self.lock.check()
        disk.write_whole(self.folder / RUN, json.dumps(json_safe(result), indent=1) + "\n")
