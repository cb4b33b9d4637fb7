"""Comparisons per second of a train step: seven edits as one group against 21 separate pairs.

    python -m jrm_jax.benchmarks.groups [--groups=4] [--rounds=8] [--out=FILE.json]

The same sources, edits, preferences and critiques of the built-in world, laid out twice: groups of
seven candidates with 21 comparisons each, and each comparison as a group of two (its prompt, source
and edits encoded again). Both take Adam steps of the default model, in turns; the first loss of
both must agree. With critiques (`joint`) and without (`ranking`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import joint
from jrm_jax import build, build_data, cli
from jrm_jax.data.buckets import make_buckets
from jrm_jax.data.pipeline import assemble_batch
from jrm_jax.data.schema import PreferenceExample
from jrm_jax.data.sizes import measure
from jrm_jax.data.world import scenes
from jrm_jax.sharding import compiler_options
from jrm_jax.shell.arguments import Parser
from jrm_jax.step import LossConfig, make_forward, make_train_step

EDITS = 7
PAIRS = list(itertools.combinations(range(EDITS), 2))
LEARNING_RATE = 1e-3


def make_group(number: int) -> PreferenceExample:
    """A source with seven edits, ranked by their place: the first is the best."""
    groups = (scenes.make_example("train", number * 100 + index, 0) for index in itertools.count())
    first = next(groups)
    candidates = [*first.candidates]
    while len(candidates) < EDITS:  # edits of other sources cost as much
        candidates += next(groups).candidates
    place_K = np.arange(EDITS)
    better_KK = (place_K[:, None] < place_K[None]).astype(np.float32)
    better_KK[place_K, place_K] = 0.5
    return dataclasses.replace(
        first, candidates=tuple(candidates[:EDITS]), dimensions=("overall",),
        preference=better_KK[..., None],
        weight=(1 - np.eye(EDITS, dtype=np.float32))[..., None],
    )  # fmt: skip


def split(group: PreferenceExample) -> list[PreferenceExample]:
    """Each comparison as a group of its own."""
    found = []
    for i, j in PAIRS:
        square = np.ix_([i, j], [i, j])
        found.append(
            dataclasses.replace(
                group, candidates=(group.candidates[i], group.candidates[j]),
                preference=group.preference[square], weight=group.weight[square],
            )
        )  # fmt: skip
    return found


class Sides:
    """The step of one kind (joint or ranking), and the batch of either layout."""

    def __init__(self, groups: list[PreferenceExample], language: bool):
        config = joint.get_config()
        config.data.dimensions = ("overall",)
        config.loss.language_weight = float(language)
        settings = {"name": "adam", "learning_rate": LEARNING_RATE, "warmup_steps": 1}
        config.optimizer.update(settings)
        backbone_config = build.load_backbone_config(config)
        mesh = build.make_mesh(config, backbone_config, check_batch=False)
        self.encoder = build_data.make_run_encoder(config, backbone_config)
        backbone = build.make_backbone(
            config, backbone_config, mesh, self.encoder.tokenizer.reward_id
        )
        self.state, (optimizer, _) = build.init_state(config, backbone_config, mesh, self.encoder)
        loss = LossConfig(config.loss.preference_weight, config.loss.language_weight)
        processor = self.encoder.processor
        forward = make_forward(backbone, processor.mean, processor.std, loss)
        step = make_train_step(forward, optimizer, loss)
        self.step = jax.jit(step, compiler_options=compiler_options(mesh))
        self.language, self.merge = language, backbone_config.vision.merge
        pairs = [pair for group in groups for pair in split(group)]
        self.batches = {"one group": self._lay(groups), "21 pairs": self._lay(pairs)}

    def _lay(self, examples: list[PreferenceExample]) -> dict:
        sizes = measure(examples, self.encoder.sizes, self.encoder.key, name="groups")
        (bucket,) = make_buckets(
            [sizes], language=self.language, merge=self.merge, candidate_cuts=()
        )
        encoded = [self.encoder.encode_example(example) for example in examples]
        return jax.tree.map(jnp.asarray, assemble_batch(encoded, bucket, self.encoder))

    def run(self, layout: str):
        """A function that takes one step and returns its loss."""
        state, batch = self.state, self.batches[layout]

        def one() -> float:
            nonlocal state
            state, metrics = self.step(state, batch)
            jax.block_until_ready(state)
            return float(metrics["loss"])

        return one


def compare(groups: list[PreferenceExample], language: bool, rounds: int) -> dict:
    """Seconds, comparisons per second and the ratio of both layouts."""
    sides = Sides(groups, language)
    runs = {layout: sides.run(layout) for layout in sides.batches}
    first = {layout: run() for layout, run in runs.items()}  # compiles, and must agree
    if abs(first["one group"] - first["21 pairs"]) > 1e-4 * abs(first["one group"]):
        raise SystemExit(f"error: the first losses differ: {first}")
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {layout: [] for layout in runs}
    for _ in range(rounds):
        for layout, run in runs.items():
            began = time.perf_counter()
            run()
            times[layout].append(time.perf_counter() - began)
    comparisons = len(groups) * len(PAIRS)
    medians = {layout: statistics.median(values) for layout, values in times.items()}
    return {
        "first_loss": first,
        "seconds_per_step": {
            layout: {"min": min(v), "median": medians[layout], "max": max(v)}
            for layout, v in times.items()
        },
        "comparisons_per_second": {n: comparisons / seconds for n, seconds in medians.items()},
        "pictures": {
            n: int((np.asarray(b["patch_segments"]).sum(-1) > 0).sum())
            for n, b in sides.batches.items()
        },
        "ratio": medians["21 pairs"] / medians["one group"],
    }


def main(argv: list[str] | None = None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=4, help="per step; each 21 comparisons")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    cli.keep_memory()
    groups = [make_group(number) for number in range(args.groups)]
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "comparisons_per_step": args.groups * len(PAIRS),
        **{
            name: compare(groups, language, args.rounds)
            for name, language in (("ranking", False), ("joint", True))
        },
    }
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
