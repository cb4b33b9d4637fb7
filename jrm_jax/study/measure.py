"""Measures one trained cell and writes its numbers; a process of its own, which ends when done.

    python -m jrm_jax.study.measure --workdir=DIR --out=FILE.json --settings=JSON [--judge]

`settings` are `config.measure` of `configs/study.py`. Nothing is judged here: the file holds scores
by example, and `report.py` makes the numbers from them.

Letters: B groups, K candidates, N patch slots, D hidden width.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jrm_jax import cli, sharding
from jrm_jax.data import store
from jrm_jax.data.buckets import make_buckets
from jrm_jax.data.pipeline import assemble_batch, make_iterator
from jrm_jax.data.plan import EvalPlan, Source
from jrm_jax.data.schema import Candidate, Image, Text
from jrm_jax.data.sizes import measure as measure_sizes
from jrm_jax.data.world import scenes
from jrm_jax.data.world.draw import PIXELS, draw, encode_png, encode_scene
from jrm_jax.data.world.prepare import prepare_world
from jrm_jax.data.world.text import NUMBERS
from jrm_jax.evaluation.statistics import effective_rank
from jrm_jax.model.backbone import Backbone
from jrm_jax.model.layers import unroll_all
from jrm_jax.run.fit import compile_within
from jrm_jax.run.saved import complete_steps
from jrm_jax.run.workdir import CHECKPOINTS
from jrm_jax.serving.generate import make_generate
from jrm_jax.serving.trained import Trained, load_trained
from jrm_jax.shell.arguments import Parser
from jrm_jax.shell.stop import ending
from jrm_jax.step import make_score_step
from jrm_jax.study import why
from jrm_jax.study.programs import make_attack, make_probe

SPLITS = ("valid", "test", "hard")
PARTS = (*SPLITS, "contests", "critiques", "states", "pulls", "attack", "cost")
TIMED = 5  # batches
_SCORES = re.compile(r"following (\w+) preservation (\w+)\s*$")


def read_score(critique: str) -> float | None:
    """What a critique's last line says, 0..100 as the gold score; None where it says nothing."""
    found = _SCORES.search(critique)
    if found is None or not all(word in NUMBERS for word in found.groups()):
        return None
    following, preservation = (NUMBERS.index(word) for word in found.groups())
    return float(6 * following + 4 * preservation)


class Model:
    """A trained model with its programs, and the world it is measured on."""

    def __init__(self, workdir: Path, settings: ConfigDict, judge: bool):
        self.workdir, self.settings, self.judge = workdir, settings, judge
        trained = load_trained(workdir, scores=not judge)
        self.card, self.params = trained.card, trained.params
        self.encoder = dataclasses.replace(trained.encoder, language=False)
        self.merge = trained.config.vision.merge**2
        self.world = {**trained.card["config"]["data"]["world"], **settings.get("world", {})}
        self._open_world(trained)
        processor = self.encoder.processor
        pixels = (processor.mean, processor.std)
        self.backbone = backbone = Backbone(
            trained.config,
            scan_unroll=trained.card["config"]["backbone"]["scan_unroll"]
            or unroll_all(trained.config.text.layers, jax.default_backend())
            or 1,
            reward_token_id=self.encoder.tokenizer.reward_id,
            through_reward=trained.through_reward,
        )
        options = sharding.compiler_options(sharding.make_mesh(1, 1, 1, jax.devices()[:1]))

        def jit(program):
            return jax.jit(program, compiler_options=options)

        probe, end = make_probe(backbone, *pixels), self.encoder.tokenizer.end_id
        self._programs = {
            "score": jit(make_score_step(backbone, *pixels)),
            "probe": jit(lambda params, batch: probe(params, batch, batch["patches"])),
            "attack": jit(make_attack(probe, settings.attack_radius, settings.attack_steps)),
            "generate": jit(make_generate(backbone, *pixels, settings.max_tokens, False, end)),
        }
        self._compiled: dict[str, Any] = {}

    def _open_world(self, trained: Trained) -> None:
        alone = "world" in self.settings  # other splits than the run's: drawn once for all cells
        counts = {s: self.world[s] for s in ("train", *SPLITS)[alone:] if self.world[s]}
        kind = "edits" if alone else self.world["kind"]
        cache = trained.card["config"]["data"]["cache"]
        folder = prepare_world(cache, counts, self.world["seed"], kind)
        self.records = store.open_dataset(folder)
        self.sizes = {
            split: measure_sizes(
                self.records[split], self.encoder.sizes, self.encoder.key,
                name=f"{folder.name}/{split}", folder=folder,
            )
            for split in SPLITS
        }  # fmt: skip
        (self.bucket,) = make_buckets(
            [*self.sizes.values()], language=False, merge=trained.config.vision.merge,
            candidate_cuts=(), round_to=8,
        )  # fmt: skip

    def call(self, name: str, *arguments: Any) -> Any:
        """Run one of the programs; there is one bucket, hence one compilation of each."""
        if name not in self._compiled:
            self._compiled[name] = compile_within(self._programs[name].lower(*arguments), None)
        return self._compiled[name](*arguments)

    def flops(self, name: str) -> float:
        """Of a batch, as the compiler counts them."""
        found = self._compiled[name].cost_analysis()
        return float((found[0] if isinstance(found, list) else found)["flops"])

    # Batches

    def batches(self, split: str, groups: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The first `groups` groups of a split (0: all) in their order, filled up with padding."""
        size = self.settings.batch_size
        plan = EvalPlan([Source(self.sizes[split])], (self.bucket,), size, False)
        stop = min(len(plan), -(-groups // size)) if groups else len(plan)
        with make_iterator(plan, (self.records[split],), self.encoder, stop=stop) as batches:
            yield from batches

    def contest_batches(self, attempts: Sequence[tuple[Any, list]]) -> Iterator[dict]:
        """Groups of (prompt, candidates), as many candidates as the bucket holds at a time."""
        size, room = self.settings.batch_size, self.bucket.candidates
        rows = [
            self.encoder.encode_group(prompt, candidates[start : start + room])
            for prompt, candidates in attempts
            for start in range(0, len(candidates), room)
        ]
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            fillers = [None] * (size - len(part))
            yield assemble_batch([*part, *fillers], self.bucket, self.encoder)

    # Scores

    def score(self, batch: dict) -> list[list[float | None]]:
        """Per group present, per candidate present; None where a judge's answer has no score."""
        if self.judge:
            return [[read_score(words) for words in group] for group in self.say(batch)]
        reward_BK = np.asarray(self.call("score", self.params, batch))[..., 0].astype(float)
        return [[round(r, 6) for r in row] for row in _present(batch, reward_BK)]

    def say(self, batch: dict) -> list[list[str]]:
        """The critiques that the model writes."""
        return [
            [self.encoder.tokenizer.decode(ids) for ids in group]
            for group in _present(batch, self.tokens(batch))
        ]

    def tokens(self, batch: dict) -> np.ndarray:
        """int32 [B, K, T], see `generate.make_generate`; the likeliest ones."""
        key = jax.random.key(0)
        return np.asarray(self.call("generate", self.params, batch, key, np.float32(1.0)))


def _present(batch: dict, values_BKX: np.ndarray) -> list[list[Any]]:
    """Without padding, as lists."""
    counts = batch["candidate_mask"].sum(1).astype(int)
    return [values_BKX[b, :count].tolist() for b, count in enumerate(counts) if count]


# The measures


def measure_scores(model: Model, splits: Sequence[str]) -> dict[str, list]:
    return {
        f"scores/{split}": [row for batch in model.batches(split) for row in model.score(batch)]
        for split in splits
    }


def measure_contests(model: Model) -> list[list[float | None]]:
    """Scores of many attempts at the instructions of `test`; their gold scores are remade with
    `scenes.make_contest`."""
    seed, count = model.world["seed"], model.settings.attempts
    contests = []
    for index in range(min(model.settings.contests, model.world["test"])):
        group = scenes.make_contest("test", index, seed, count)
        rng = random.Random(f"{seed}/contest/test/{index}/pictures")
        prompt = (Text(group.instruction), Image(encode_png(draw(group.source, PIXELS))))
        pictures = [encode_scene(a.scene, a.quality, rng, PIXELS) for a in group.attempts]
        contests.append((prompt, [Candidate((Image(picture),)) for picture in pictures]))
    scores = [s for batch in model.contest_batches(contests) for row in model.score(batch)
              for s in row]  # fmt: skip
    return [scores[i : i + count] for i in range(0, len(scores), count)]


def measure_states(model: Model, steps: Sequence[int], pulls: bool) -> dict[str, dict[str, Any]]:
    """'ranks' and 'says', by step: effective rank and spectrum of the reward token's state on
    `test`, and how well the facts of critiques can be read off it. 'pulls', if asked for:
    `why.pull`, at the last step."""
    stated_NF, group_N = why.stated_facts("test", model.world["test"], model.world["seed"])
    found: dict[str, dict[str, Any]] = {"ranks": {}, "says": {}}
    for step in steps:
        params = load_trained(model.workdir, step, scores=False).params
        states = []
        for batch in model.batches("test"):
            state_BKD = np.asarray(model.call("probe", params, batch)[1])
            states += [state for group in _present(batch, state_BKD) for state in group]
        states_ND = np.asarray(states, np.float64)
        singular = np.linalg.svd(states_ND - states_ND.mean(0), compute_uv=False)
        share = singular / max(singular.sum(), 1e-30)
        found["ranks"][str(step)] = {
            "effective_rank": round(effective_rank(states_ND), 4),
            "spectrum": [float(f"{s:.4g}") for s in share[: model.settings.spectrum]],
        }
        found["says"][str(step)] = why.probe_facts(states_ND, stated_NF, group_N)
    return {**found, "pulls": why.pull(model, params)} if pulls else found


def measure_attack(model: Model) -> dict[str, Any] | None:
    """Scores before and after; None for a judge, whose words have no gradient."""
    if model.judge:
        return None
    before, after = [], []
    per_image = model.bucket.patches // model.merge
    for batch in model.batches("hard", model.settings.attack_groups):
        images = batch["patches"].shape[1]
        visual_BX = batch["candidate_visual"].reshape(len(batch["patches"]), -1)
        rows_BX = np.where(visual_BX < 0, -1, visual_BX // per_image)
        own_BI = np.stack([(rows_BX == i).any(1) for i in range(images)], 1).astype(np.float32)
        clean_BK, pushed_BK = model.call("attack", model.params, batch, own_BI)
        before += _present(batch, np.asarray(clean_BK, float).round(6))
        after += _present(batch, np.asarray(pushed_BK, float).round(6))
    return {"before": before, "after": after}


def measure_cost(model: Model) -> dict[str, Any]:
    """FLOPs as the compiler counts them and seconds, per group of the bucket's size.

    A judge's program loops over tokens, which the compiler counts once: so many times as the batch
    took tokens, the loop's share is what its program has more than the score's.
    """
    (batch,) = list(model.batches("test", 1))
    groups = len(batch["candidate_mask"])
    cost: dict[str, Any] = {"groups_per_batch": groups, "bucket": dataclasses.asdict(model.bucket)}

    def score(batch):
        return jax.block_until_ready(model.call("score", model.params, batch))

    run = model.tokens if model.judge else score
    score(batch)
    total = model.flops("score")
    if model.judge:
        ids_BKT = model.tokens(batch)
        ended = ids_BKT == model.encoder.tokenizer.end_id
        lengths = np.where(ended.any(-1), ended.argmax(-1) + 1, ids_BKT.shape[-1])
        lengths = lengths[batch["candidate_mask"] > 0]
        total += (model.flops("generate") - total) * (int(lengths.max()) - 1)
        cost["tokens"] = float(lengths.mean())
    taken = []
    for _ in range(TIMED + 1):
        began = time.perf_counter()
        run(batch)
        taken.append(time.perf_counter() - began)
    cost["flops_per_group"] = total / groups
    cost["seconds_per_group"] = float(f"{sorted(taken[1:])[TIMED // 2] / groups:.4g}")
    return cost


def machine() -> dict[str, Any]:
    """What ran it, without a name of its own."""
    device = jax.devices()[0]
    chip = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        chip = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return {
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "cpu": f"{os.cpu_count()} x {chip}",
        "jax": jax.__version__,
    }


def curve(workdir: Path) -> list[list[float]]:
    """(step, pair accuracy on valid) during training; a judge has none there."""
    rows = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    found = {
        row["step"]: round(row["pair_accuracy"], 6)
        for row in rows
        if row["split"] == "valid" and row.get("pair_accuracy") is not None
    }
    return [list(point) for point in found.items()]


def measure(workdir: Path, settings: ConfigDict, judge: bool) -> dict[str, Any]:
    """Everything that is kept of a cell, in JSON types; of PARTS those that the settings name."""
    model = Model(workdir, settings, judge)
    results = json.loads((workdir / "results.json").read_text())
    began, tell = time.monotonic(), lambda words: print(f"  {words}", flush=True)
    parts = tuple(settings.get("parts", PARTS))
    splits = tuple(split for split in SPLITS if split in parts)
    found: dict[str, Any] = {}
    tell(f"scores of {', '.join(splits)}")
    scores = measure_scores(model, splits)
    if "contests" in parts:
        tell("many attempts at one instruction")
        found["contests"] = measure_contests(model)
    if "critiques" in parts:
        tell("critiques")
        found["critiques"] = []
        if model.card["config"]["loss"]["language_weight"]:  # it has learnt to write some
            wanted = model.batches("hard", settings.critiques)
            said = [row for batch in wanted for row in model.say(batch)]
            found["critiques"] = said[: settings.critiques]
    if "states" in parts:
        tell("states of the reward token, and gradients")
        every = complete_steps(model.workdir / CHECKPOINTS)
        steps = every[-1:] if "parts" in settings else every
        found |= measure_states(model, steps, "pulls" in parts)
    if "attack" in parts:
        tell("attack on the pixels")
        found["attack"] = measure_attack(model)
    if "cost" in parts:
        tell("cost")
        found["cost"] = measure_cost(model)
    return {
        "step": results["step"],
        "language": {s: results.get(f"{s}/language") for s in SPLITS},
        "curve": curve(workdir),
        "machine": machine(),
        "seconds": {"train": results["seconds"], "measure": round(time.monotonic() - began, 1)},
        "training": why.read_training(workdir),
        **found,
        **scores,
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m jrm_jax.study.measure")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", required=True, help="config.measure as JSON")
    parser.add_argument("--judge", action="store_true", help="read scores from written critiques")
    args = parser.parse_args(argv)
    if argv is None:
        cli.prepare()
    with ending():
        found = measure(args.workdir, ConfigDict(json.loads(args.settings)), args.judge)
    args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
