"""This project's side: the card's own rate, the joint step, scoring. Each measurement yields rows.

Letters: see `data/pipeline.py`.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jrm_jax import build, optim, sharding
from jrm_jax.benchmarks.accelerator import case, timing
from jrm_jax.benchmarks.accelerator.trace import kernels
from jrm_jax.model.config import BackboneConfig, load_config
from jrm_jax.model.weights import load_params
from jrm_jax.planning.compiling import stand_in_encoder, train_parts
from jrm_jax.run import fit
from jrm_jax.run.flops import score_flops, train_flops
from jrm_jax.step import TrainState, make_score_step

Row = dict[str, Any]
HOMES = {"splash": "tpu", "cudnn": "gpu"}  # attention that runs nowhere else


def product(sizes: case.Sizes) -> Iterator[Row]:
    """The device's own rate: TFLOP/s of a bfloat16 product of square matrices."""
    side, times = sizes.product, 20
    a, b = (jax.random.normal(jax.random.key(n), (side, side), jnp.bfloat16) for n in range(2))
    b = b * side**-0.5  # what is multiplied again and again keeps its size

    @jax.jit
    def run(a, b):  # each product reads the one before, so that none is left out
        return jax.lax.fori_loop(0, times, lambda _, x: x @ b, a)

    yield timing.rate(lambda: jax.block_until_ready(run(a, b)), side, times)


def train(
    sizes: case.Sizes,
    tiny: bool,
    model: str,
    adapters: bool = False,
    attention: str = "auto",
    remats: tuple[str, ...] = ("full",),
    profile: bool = False,
) -> Iterator[Row]:
    """The joint step with random weights, with the first of `remats` that fits; a row for each that
    was tried. `profile`: a last row has what ran on the device in a step."""
    backbone, here = case.architecture(model, tiny), jax.default_backend()
    if (home := HOMES.get(attention, here)) != here:
        yield {"model": model, "failed": f"attention {attention} is for a {home}, this is a {here}"}
        return
    for remat in remats:
        row: Row = {
            "model": model, "trains": "adapters" if adapters else "everything",
            "attention": attention, "remat": remat,
        }  # fmt: skip
        config = case.make_config(model, sizes, adapters, attention, remat)
        try:
            numbers, run = _train(config, backbone, sizes)
        except (fit.OutOfMemory, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, fit.OutOfMemory) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            words = " ".join(str(error).split())[:200]
            yield row | {"failed": words}
            continue
        yield row | numbers
        if profile:
            yield row | {"kernels": _profile(run)}
        return


def _train(
    config: ConfigDict, backbone: BackboneConfig, sizes: case.Sizes
) -> tuple[Row, Callable[[int], None]]:
    """(numbers, so many more steps). Raises OutOfMemory, as a run finds out (`run.fit`)."""
    mesh = build.make_mesh(config, backbone, jax.devices()[:1])
    forward, abstract, step = train_parts(config, backbone, mesh)
    batch = case.make_batch(config, backbone, sizes)
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    limit = fit.memory_limit(jax.devices()[0])
    rough = fit.rough_bytes(forward, abstract, placed, 1)
    if limit is not None and rough > fit.DOUBT * limit:
        raise fit.OutOfMemory(rough, limit)
    compiled, compiling = _compile(step, abstract, placed)
    state = random_state(abstract, config)
    losses = []

    def run(steps: int = timing.STEPS) -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = compiled(state, placed)
            losses.append(metrics["loss"])
        jax.block_until_ready(state)

    seconds = timing.spread(run, sizes.rounds, timing.STEPS)
    flash = config.backbone.attention != "xla" and jax.default_backend() != "cpu"
    flops = train_flops(
        backbone, sizes.bucket(True), abstract.trainable, abstract.frozen, config.remat,
        flash,
    )  # fmt: skip
    pairs = sizes.groups * math.comb(sizes.candidates, 2)
    numbers = {
        **seconds,
        **compiling,
        "tflop_per_step": sizes.groups * flops.model / 1e12,
        "tflop_again": sizes.groups * flops.again / 1e12,
        "tflop_per_second": sizes.groups * flops.model / 1e12 / seconds["seconds"],
        "pairs_per_second": pairs / seconds["seconds"],
        "rough_gib": rough / fit.GIB,
        **_memory(compiled),
        "losses": [float(losses[0]), float(losses[-1])],
    }
    return numbers, run


def score(sizes: case.Sizes, tiny: bool, model: str, candidates: int = 2) -> Iterator[Row]:
    """The score step, parameters in bfloat16: edits (a candidate with its source) a second."""
    sizes = sizes.scored_with(candidates)
    backbone = case.architecture(model, tiny)
    config = case.make_config(model, sizes)
    config.batch_size = sizes.scored
    mesh = build.make_mesh(config, backbone, jax.devices()[:1])
    encoder = stand_in_encoder(config, backbone)
    module = build.make_backbone(config, backbone, mesh, encoder.tokenizer.reward_id)
    whole = build.abstract_params(config, backbone)
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), whole)
    params = random_params(sharding.placed(whole, sharding.param_shardings(whole, mesh)))
    step = jax.jit(
        make_score_step(module, encoder.processor.mean, encoder.processor.std),
        compiler_options=sharding.compiler_options(mesh),
    )
    batch = case.make_batch(config, backbone, sizes, critique=False)
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    compiled, compiling = _compile(step, params, placed)
    seconds = timing.spread(lambda: jax.block_until_ready(compiled(params, placed)), sizes.rounds)
    tflop = sizes.scored * score_flops(backbone, sizes.bucket(False)).model / 1e12
    yield {
        "model": model,
        "candidates": candidates,
        **seconds,
        **compiling,
        "tflop_per_second": tflop / seconds["seconds"],
        "edits_per_second": sizes.scored * sizes.candidates / seconds["seconds"],
        **_memory(compiled),
    }


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _fill(key: jax.Array, shape: tuple[int, ...], dtype: Any, spread: float) -> jax.Array:
    return (spread * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def random_params(abstract: Any) -> Any:
    """Arrays for shapes with shardings: kernels and tables normal, norms one, biases zero. Leaf by
    leaf on the device, so that no more than one of them is ever there in float32."""
    key = jax.random.key(0, impl="rbg")  # quick on accelerators

    def make(path: str, leaf: Any, number: int) -> jax.Array:
        if path.endswith(("scale", "bias")):
            made = jnp.full(leaf.shape, float(path.endswith("scale")), leaf.dtype)
        else:
            spread = 0.02 if "embedding" in path else leaf.shape[-2] ** -0.5
            made = _fill(jax.random.fold_in(key, number), leaf.shape, leaf.dtype, spread)
        return jax.device_put(made, leaf.sharding)

    leaves = optim.flatten(abstract).items()
    return optim.unflatten({path: make(path, leaf, n) for n, (path, leaf) in enumerate(leaves)})


def random_state(abstract: TrainState, config: ConfigDict) -> TrainState:
    trainable = random_params(abstract.trainable)
    optimizer, _ = build.make_optimizer(config, trainable)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(trainable)
    step = jax.device_put(jnp.int32(0), places.step)
    return TrainState(step, trainable, random_params(abstract.frozen), opt_state)


def _compile(step: Any, *arguments: Any) -> tuple[Any, Row]:
    began = time.perf_counter()
    limit = fit.memory_limit(jax.devices()[0])
    compiled = fit.compile_within(step.lower(*arguments), limit)
    return compiled, {"compile_seconds": time.perf_counter() - began}


def _memory(compiled: Any) -> Row:
    """GiB: what the compiler planned, and what the device counted at its peak."""
    stats = jax.devices()[0].memory_stats() or {}
    names = {"peak_bytes_in_use": "peak_gib", "bytes_limit": "limit_gib"}
    counted = {words: stats[name] / fit.GIB for name, words in names.items() if name in stats}
    return {"planned_gib": fit.planned_bytes(compiled) / fit.GIB, **counted}


def _profile(run: Callable[[int], None], steps: int = 2) -> list[Row]:
    """The kernels of a step by their time."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(steps)
        return kernels(Path(folder), steps)


def losses(sizes: case.Sizes, model: str, folder: Path) -> tuple[Any, Callable[[str], Row]]:
    """For weights of a Hugging Face folder: (what `theirs` needs, dtype -> loss and gradient norm
    of the first step)."""
    backbone = load_config(folder)
    config = case.make_config(model, sizes)
    encoder = stand_in_encoder(config, backbone)
    params = load_params(folder, backbone)
    reward = np.asarray(params["backbone"]["embed"]["embedding"][encoder.tokenizer.reward_id])
    kernel = np.random.default_rng(0).normal(size=(backbone.text.hidden, 1)) * 0.1
    kernel = kernel.astype(np.float32)
    params |= {"reward_head": {"kernel": jnp.asarray(kernel)}, "reward_embedding": reward}
    batch = case.make_batch(config, backbone, sizes)

    def run(dtype: str) -> Row:
        config.backbone.compute_dtype = dtype
        mesh = build.make_mesh(config, backbone, jax.devices()[:1])
        module = build.make_backbone(config, backbone, mesh, encoder.tokenizer.reward_id)
        own, rest = optim.split_params(params, build.trainable_patterns(config))
        own = jax.tree.map(jnp.array, own)  # the step takes its state's memory
        optimizer, _ = build.make_optimizer(config, own)
        state = TrainState(jnp.int32(0), own, rest, optimizer.init(own))
        state = jax.device_put(state, sharding.state_shardings(state, mesh))
        step, _ = build.make_steps(
            config, module, SimpleNamespace(encoder=encoder), optimizer, state
        )
        _, metrics = step(state, batch)
        return {name: float(metrics[name]) for name in ("loss", "grad_norm")}

    return SimpleNamespace(backbone=backbone, config=config, batch=batch, kernel=kernel), run
