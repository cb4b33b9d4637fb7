"""Pairs per second of one train step: this project's against two others, in one run.

    python -m jrm_jax.benchmarks.train_step [--backbone=FOLDER] [--batch_size=16] [--out=FILE.json]

    joint     one pass, prompt shared by the candidates, both losses (what training runs)
    two-pass  the same code with the prompt repeated for every candidate and a pass for each loss:
              ranking without critiques, then language
    torch     `transformers`' own model, same losses in one pass, prompt repeated (torch_reference)

All three see the same groups, the same weights, float32, and take an Adam step. The batches are the
first ones of a run, from all its buckets. The sides are timed in turns, so that a busy machine is
busy for all. A side's time is the mean over batches of each one's median, since buckets differ;
ratios of these are printed. The first step's losses must agree, or the comparison is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from ml_collections import ConfigDict

from configs import joint
from jrm_jax import build, build_data, cli
from jrm_jax.benchmarks import torch_reference
from jrm_jax.data.pipeline import repeat_prompt
from jrm_jax.losses import combine, term_weights
from jrm_jax.sharding import compiler_options
from jrm_jax.shell import cores
from jrm_jax.shell.arguments import Parser
from jrm_jax.step import LossConfig, TrainState, make_forward, make_train_step

LEARNING_RATE = 1e-3


def make_config(args: argparse.Namespace) -> ConfigDict:
    config = joint.get_config()
    config.batch_size = args.batch_size
    groups = (args.batches + config.data.programs) * args.batch_size  # a part is unused
    config.data.world.update({"train": groups, "valid": 0, "test": 0, "hard": 0})
    settings = {"name": "adam", "learning_rate": LEARNING_RATE, "warmup_steps": 1}
    config.optimizer.update(settings)
    if args.backbone:
        config.backbone.path = args.backbone
    return config


class JaxSides:
    """`joint` and `two_pass` over the same parameters and groups."""

    def __init__(self, config: ConfigDict, batches: int):
        backbone_config = build.load_backbone_config(config)
        self.config, self.mesh = config, build.make_mesh(config, backbone_config)
        self.data = build_data.build_data(config, backbone_config, print)
        encoder = self.data.encoder
        backbone = build.make_backbone(
            config, backbone_config, self.mesh, encoder.tokenizer.reward_id
        )
        self.state, (optimizer, _) = build.init_state(config, backbone_config, self.mesh, encoder)
        settings = config.loss
        self.loss = LossConfig(
            settings.preference_weight, settings.language_weight, settings.margin, 0.0
        )
        mean, std = encoder.processor.mean, encoder.processor.std
        self.forward = make_forward(backbone, mean, std, self.loss)
        options = compiler_options(self.mesh)
        self.joint_step = jax.jit(
            make_train_step(self.forward, optimizer, self.loss), compiler_options=options
        )
        ranking = make_forward(backbone, mean, std, self.loss._replace(language_weight=0.0))
        language = make_forward(backbone, mean, std, self.loss._replace(preference_weight=0.0))
        self.two_pass_step = jax.jit(
            self._two_pass(ranking, language, optimizer), compiler_options=options
        )
        with build_data.batches(config, self.data, "train", self.mesh, 0, batches) as source:
            self.host_batches = list(source)
        self.short_batches = [self._without_critiques(batch) for batch in self.host_batches]

    def _without_critiques(self, batch: dict) -> dict:
        """The same groups as a discriminative run lays them out: nothing after <|reward|>."""
        length = int(batch["reward_index"].max()) + 1
        length += -length % self.config.data.round_to
        short = dict(batch)
        for name in ("tokens", "positions", "segments", "visual"):
            short[f"candidate_{name}"] = batch[f"candidate_{name}"][..., :length]
        after = np.arange(length) > batch["reward_index"][..., None]
        short["candidate_segments"] = np.where(after, 0, short["candidate_segments"])
        for name in ("index", "targets", "weights"):
            short[f"critique_{name}"] = batch[f"critique_{name}"][..., :0]
        return short

    def _two_pass(self, ranking, language, optimizer):
        loss = self.loss

        def step(state: TrainState, short: dict, full: dict):
            def objective(trainable, forward, batch):
                terms = forward({"language_head": {}} | trainable, batch).terms
                coefficients = {
                    "preference": loss.preference_weight,
                    "language": loss.language_weight,
                }
                return combine(terms, coefficients, term_weights(batch))

            first, ranking_grads = jax.value_and_grad(objective)(state.trainable, ranking, short)
            second, language_grads = jax.value_and_grad(objective)(state.trainable, language, full)
            grads = jax.tree.map(jnp.add, ranking_grads, language_grads)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
            trainable = jax.tree.map(jnp.add, state.trainable, updates)
            new = TrainState(state.step + 1, trainable, state.frozen, opt_state)
            return new, {"loss": first + second}

        return step

    def joint_inputs(self) -> list[tuple[dict, ...]]:
        return [(batch,) for batch in self.host_batches]

    def two_pass_inputs(self) -> list[tuple[dict, ...]]:
        both = zip(self.short_batches, self.host_batches, strict=True)
        return [(repeat_prompt(short), repeat_prompt(full)) for short, full in both]

    def joint(self):
        return self._run(self.joint_step, self.joint_inputs())

    def two_pass(self):
        return self._run(self.two_pass_step, self.two_pass_inputs())

    def _run(self, step, inputs: list[tuple[dict, ...]]):
        inputs = [jax.tree.map(jnp.asarray, each) for each in inputs]
        state = self.state

        def run(which: int) -> float:
            nonlocal state
            state, metrics = step(state, *inputs[which])
            jax.block_until_ready(state)
            return float(metrics["loss"])

        return run

    def torch(self, folder: str):
        encoder = self.data.encoder
        reward_id = encoder.tokenizer.reward_id
        params = jax.device_get(self.state.trainable)
        model = torch_reference.load_model(folder, reward_id, params["reward_embedding"])
        kernel = torch.nn.Parameter(torch.from_numpy(np.array(params["reward_head"]["kernel"])))
        optimizer = torch.optim.AdamW(
            [*model.parameters(), kernel], LEARNING_RATE, (0.9, 0.95), weight_decay=0.01
        )
        scale = encoder.processor.mean, encoder.processor.std
        inputs = [torch_reference.unpack_sequences(batch, *scale) for batch in self.host_batches]

        def run(which: int) -> float:
            loss, _ = torch_reference.joint_loss(
                model, kernel, inputs[which], self.host_batches[which],
                self.loss.preference_weight, self.loss.language_weight, reward_id,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*model.parameters(), kernel], 1.0)
            optimizer.step()
            return loss.item()

        return run


def mean_flops(step, state: TrainState, inputs: list[tuple[dict, ...]]) -> float:
    """FLOPs that the compiler counts for a step, over batches; each shape is compiled once."""
    counted: dict[tuple, float] = {}

    def count(each: tuple[dict, ...]) -> float:
        shapes = tuple(x.shape for x in jax.tree.leaves(each))
        if shapes not in counted:
            cost = step.lower(state, *each).compile().cost_analysis()
            counted[shapes] = float(cost.get("flops", float("nan")))
        return counted[shapes]

    return statistics.mean(count(each) for each in inputs)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="", help="default: the packaged tiny one")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=8, help="different ones")
    parser.add_argument("--rounds", type=int, default=5, help="times that each batch is timed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cli.keep_memory()
    torch.set_num_threads(cores.usable())
    config = make_config(args)
    sides = JaxSides(config, args.batches)
    runs = {
        "joint": sides.joint(),
        "two-pass": sides.two_pass(),
        "torch": sides.torch(str(build_data.backbone_folder(config, weights=True))),
    }
    first = {name: run(0) for name, run in runs.items()}  # must agree
    for name, loss in first.items():
        if abs(loss - first["joint"]) > 1e-3 * abs(first["joint"]):
            raise SystemExit(f"error: first loss of {name}: {loss}, of joint: {first['joint']}")
    order = range(len(sides.host_batches))
    for which in order[1:]:  # compiles what is of another shape
        for run in runs.values():
            run(which)
    times = {name: [[] for _ in order] for name in runs}
    for _ in range(args.rounds):
        for which in order:
            for name, run in runs.items():
                began = time.perf_counter()
                run(which)
                times[name][which].append(time.perf_counter() - began)
    pairs = statistics.mean(
        int(np.triu(b["preference_weight"][..., 0], 1).astype(bool).sum())
        for b in sides.host_batches
    )

    def over_batches(statistic, name: str) -> float:
        return statistics.mean(statistic(values) for values in times[name])

    medians = {name: over_batches(statistics.median, name) for name in runs}
    counted = {
        "joint": mean_flops(sides.joint_step, sides.state, sides.joint_inputs()),
        "two-pass": mean_flops(sides.two_pass_step, sides.state, sides.two_pass_inputs()),
    }
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}",
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "groups_per_step": args.batch_size,
        "candidates_at_most": [b["candidate_tokens"].shape[1] for b in sides.host_batches],
        "labelled_pairs_per_step": pairs,
        "first_loss": first,
        "seconds_per_step": {
            name: {
                "min": over_batches(min, name),
                "median": medians[name],
                "max": over_batches(max, name),
            }
            for name in runs
        },
        "pairs_per_second": {name: pairs / medians[name] for name in runs},
        "joint_is_faster_by": {
            name: medians[name] / medians["joint"] for name in runs if name != "joint"
        },
        "gflop_per_step": {name: value / 1e9 for name, value in counted.items()},
    }
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
