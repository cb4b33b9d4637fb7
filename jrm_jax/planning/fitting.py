"""Compiled steps become a table: what they hold, send and compute, and how fast they could be.

Every bound is a lower one: a step cannot be faster than its products at the chip's peak, than one
pass over what it must read and write, or than its collectives at the full speed of all links. What
overlaps in reality is assumed to overlap here, so the largest of them is the bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from jrm_jax import build, build_data, sharding
from jrm_jax.data.buckets import Bucket
from jrm_jax.errors import UserError
from jrm_jax.model.config import BackboneConfig
from jrm_jax.model.layers import REMAT
from jrm_jax.planning import compiling
from jrm_jax.planning.chips import Chip, Topology
from jrm_jax.planning.collectives import Collectives, Traffic, read_collectives
from jrm_jax.run.check_config import check_config
from jrm_jax.run.fit import (
    DOUBT,
    GIB,
    SMALLER,
    OutOfMemory,
    first_fit,
    gib,
    more_parts,
    rough_bytes,
)
from jrm_jax.run.flops import StepFlops, score_flops, train_flops, unshared

_LARGEST = 64  # groups per place of the mesh that the search tries, at most


@dataclasses.dataclass(frozen=True)
class Case:
    """One config, topology and set of sizes."""

    config: ConfigDict
    backbone: BackboneConfig
    topology: Topology
    devices: tuple[Any, ...]
    visual: int
    text: int
    critique: int
    candidates: int
    images: int
    ready: compiling.Compiled | None = None  # the train step, where it is compiled already

    def bucket(self, which: str) -> Bucket:
        language = which == "train" and build_data.reads_critiques(self.config)
        critique = self.critique if language else 0
        return compiling.make_bucket(
            self.backbone, self.visual, self.text, critique, self.candidates, self.images,
            self.config.data.round_to,
        )  # fmt: skip

    def mesh(self, check_batch: bool = True) -> Any:
        return build.make_mesh(self.config, self.backbone, self.devices, check_batch)

    def compile(self, which: str) -> compiling.Compiled:
        if which == "train" and self.ready is not None:
            return self.ready
        step = {"train": compiling.compile_train, "score": compiling.compile_score}[which]
        return step(self.config, self.backbone, self.bucket(which), self.mesh())

    def flops(self, which: str, flash: bool) -> StepFlops:
        """Of one group. `flash`: see `train_flops`."""
        bucket = self.bucket(which)
        if which == "score":
            return score_flops(self.backbone, bucket)
        state, _ = build.abstract_state(self.config, self.backbone, self.mesh())
        bucket = bucket if self.config.data.share_prompt else unshared(bucket)
        return train_flops(
            self.backbone, bucket, state.trainable, state.frozen, self.config.remat,
            flash,
        )  # fmt: skip

    def may_fit(self) -> bool:
        """Whether it is worth compiling the train step, by what its shapes need."""
        mesh = self.mesh()
        forward, state = compiling.train_parts(self.config, self.backbone, mesh)[:2]
        batch = compiling.abstract_batch(self.config, self.backbone, self.bucket("train"), mesh)
        has = self.topology.chip.memory / self.topology.chip.devices
        return rough_bytes(forward, state, batch, self.config.accumulation) <= DOUBT * has

    def with_(self, batch_size: int, remat: str) -> Case:
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.batch_size, config.remat = batch_size, remat
        return dataclasses.replace(self, config=config, ready=None)


@dataclasses.dataclass(frozen=True)
class Report:
    """One compiled step. FLOPs of the whole step; bytes and seconds of a device."""

    which: str
    compiled: compiling.Compiled
    collectives: Collectives
    flops: StepFlops
    bounds: dict[str, float]
    pairs: int
    chips: int
    peak_flops: float

    @property
    def bound(self) -> float:
        return max(self.bounds.values())

    @property
    def utilisation(self) -> float:
        """Model FLOPs over what the chips could do in that time."""
        return self.flops.model / (self.chips * self.peak_flops * self.bound)

    def numbers(self) -> dict[str, Any]:
        """For a JSON file."""
        kept = dataclasses.asdict(self.compiled)
        del kept["program"]
        sent = {
            where: {kind: traffic._asdict() for kind, traffic in each.items()}
            for where, each in self.collectives._asdict().items()
        }
        return {
            **kept,
            "collectives": sent,
            "model_flops": self.flops.model,
            "recomputed_flops": self.flops.again,
            "model_flops_per_pair": self.flops.model / self.pairs,
            "bounds_seconds": self.bounds,
            "step_seconds_at_least": self.bound,
            "model_flops_utilisation_at_most": self.utilisation,
            "pairs_per_second_per_chip_at_most": self.pairs / self.bound / self.chips,
        }


def report(case: Case, which: str) -> Report:
    """Compile a step and count. Raises OutOfMemory."""
    compiled = case.compile(which)
    topology, groups = case.topology, case.config.batch_size
    collectives = read_collectives(compiled.program, len(case.devices), topology.slices)
    flops = StepFlops(*(groups * each for each in case.flops(which, bool(compiled.attention))))
    return Report(
        which=which,
        compiled=compiled,
        collectives=collectives,
        flops=flops,
        bounds=bounds(case, which, compiled, collectives, flops),
        pairs=groups * math.comb(case.candidates, 2),
        chips=topology.chips,
        peak_flops=topology.chip.flops,
    )


def bounds(
    case: Case, which: str, compiled: compiling.Compiled, sent: Collectives, flops: StepFlops
) -> dict[str, float]:
    """Seconds that a step takes at least, by what limits it."""
    chip: Chip = case.topology.chip
    per_chip = len(case.devices) / case.topology.chips
    weights = sum(
        math.prod(leaf.shape)
        for leaf in jax.tree.leaves(build.abstract_params(case.config, case.backbone))
    )
    width = build.DTYPES[case.config.backbone.compute_dtype].dtype.itemsize
    passes = 1 if which == "score" else 2 + (case.config.remat == "full")
    gathered = passes * weights * width / case.mesh().shape["tensor"]
    # the state is read and written once; the gathered weights are read in every pass
    kept = compiled.params + compiled.optimizer
    moved = gathered + kept * (1 if which == "score" else 2)
    network = sum(traffic.bytes for traffic in sent.network.values())
    return {
        "compute": sum(flops) / case.topology.chips / chip.flops,
        "memory": per_chip * moved / chip.memory_bandwidth,
        "links": per_chip * sum(t.bytes for t in sent.links.values()) / chip.link_bandwidth,
        "network": per_chip * network / chip.network_bandwidth,
    }


def find(case: Case, say: Callable[[str], None]) -> Case:
    """The largest batch that fits with the most remat, then the least remat at that batch.

    Batches double, from one group per place of the mesh and microbatch.

    Raises:
        UserError: not even one group per place fits.
    """
    mesh = case.mesh(check_batch=False)
    step = sharding.batch_places(mesh) * case.config.accumulation
    best = None
    for groups in (2**n for n in range(_LARGEST.bit_length())):
        tried, failure = _try(case.with_(groups * step, REMAT[-1]), say)
        if failure:
            if best is None:
                raise UserError(failure)
            break
        best = tried
    return settle(best, say)


def settle(case: Case, say: Callable[[str], None]) -> Case:
    """The case with the least remat that fits; the most where none does."""
    size, found = case.config.batch_size, case.with_(case.config.batch_size, REMAT[-1])
    if case.ready is not None:  # the most is known to fit
        found = case

    def fits(remat: str) -> bool:
        nonlocal found
        tried, failure = _try(case.with_(size, remat), say)
        found = found if failure else tried
        return not failure

    first_fit(REMAT[:-1], lambda remat: case.with_(size, remat).may_fit(), fits)
    return found


def _try(case: Case, say: Callable[[str], None]) -> tuple[Case, str]:
    """(the case with its train step compiled, '') where that fits, else what `advice` says."""
    words = f"batch_size {case.config.batch_size}, remat {case.config.remat}"
    try:
        compiled = case.compile("train")
    except OutOfMemory as error:
        say(f"{words}: does not fit{error.by_how_much}")
        return case, advice(case, "train", error)
    say(f"{words}: fits, {gib(compiled.peak)} at the peak ({compiled.seconds:.0f} s)")
    return dataclasses.replace(case, ready=compiled), ""


def advice(case: Case, which: str, error: OutOfMemory) -> str:
    """One line: by how much a step does not fit, and what would help, the cheapest first."""
    config, train = case.config, which == "train"
    mesh = case.mesh()
    places, parts = sharding.batch_places(mesh), config.accumulation
    rows = config.batch_size // places  # of a place
    changes: list[dict[str, Any]] = []
    if train and config.remat != REMAT[-1]:
        changes.append({"remat": REMAT[-1]})
    if rows > parts:
        changes.append({"batch_size": places * parts * (rows // parts // 2)})
        changes += [{"accumulation": more} for more in more_parts(rows, parts)[:1] if train]
    else:
        # half the places, each with as many rows; the heads may divide by it or not
        wider = {"mesh.tensor": mesh.shape["tensor"] * 2}
        changes.append(wider | {"batch_size": places // 2 * rows})
    hints = list(filter(None, (_flags(case, change) for change in changes)))
    if train and tuple(config.trainable) == (build.EVERYTHING,) and not config.lora.rank:
        hints.append(f"{SMALLER} (docs/pods.md)")
    hints.append("fewer tokens, or more chips")
    return (
        f"the {which} step of {config.get('variant') or 'this backbone'} does not fit on "
        f"{case.topology.name}{error.by_how_much}. Try {', or '.join(hints)}"
    )


def _flags(case: Case, changes: dict[str, Any]) -> str:
    """The flags that change these fields of a case; '' where a run would refuse them."""
    config = case.config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    try:
        check_config(config)
        build.make_mesh(config, case.backbone, case.devices)
    except UserError:
        return ""
    return " ".join(f"--config.{name}={value}" for name, value in changes.items())


def table(case: Case, reports: list[Report]) -> str:
    """The reports side by side, in lines of text."""
    chip, mesh = case.topology.chip, case.mesh()
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    slices = f"{case.topology.slices} slices of " if case.topology.slices > 1 else ""
    bucket = case.bucket("train")
    lines = [
        f"{case.config.get('variant') or case.config.backbone.path} on {slices}"
        f"{case.topology.name}: {case.topology.chips} chips, {sizes}",
        f"{case.config.batch_size} groups a step: {bucket.prompt} + {case.candidates} candidates x "
        f"{bucket.candidate} slots, critiques of {bucket.critique}, {case.images} pictures of "
        f"{case.visual} visual tokens; remat {case.config.remat}",
        "",
    ]
    rows = [("", [each.which for each in reports])]

    def row(name: str, value: Callable[[Report], str]) -> None:
        rows.append((name, [value(each) for each in reports]))

    row("parameters / device", lambda r: gib(r.compiled.params))
    row("optimizer state / device", lambda r: gib(r.compiled.optimizer))
    row("batch / device", lambda r: gib(r.compiled.batch))
    row("activations / device", lambda r: gib(r.compiled.activations))
    memory = chip.memory / len(case.devices) * case.topology.chips
    row("peak / device", lambda r: f"{gib(r.compiled.peak)} of {memory / GIB:.0f}")
    row("  allotted", lambda r: gib(r.compiled.allotted))
    row("FLOPs / step", lambda r: f"{r.flops.model:.3g}")
    row("  computed again", lambda r: f"{r.flops.again:.3g}")
    row("FLOPs / pair", lambda r: f"{r.flops.model / r.pairs:.3g}")
    for where in Collectives._fields:
        kinds = {kind for each in reports for kind in getattr(each.collectives, where)}
        for kind in sorted(kinds):
            row(f"{kind}, {where}", lambda r, w=where, k=kind: _traffic(r.collectives, w, k))
    for name in reports[0].bounds:
        row(f"{name} bound", lambda r, n=name: f"{r.bounds[n] * 1e3:.1f} ms")
    row("step at least", lambda r: f"{r.bound * 1e3:.1f} ms ({max(r.bounds, key=r.bounds.get)})")
    row("MFU at most", lambda r: f"{r.utilisation:.2f}")
    row("pairs/s/chip at most", lambda r: f"{r.pairs / r.bound / r.chips:.3g}")
    row("attention", lambda r: f"splash x {n}" if (n := len(r.compiled.attention)) else "xla")
    row("compile", lambda r: f"{r.compiled.seconds:.0f} s")
    row("  of a processor", lambda r: f"{r.compiled.processor_seconds:.0f} s")
    width = max(len(name) for name, _ in rows) + 2
    columns = [max(len(values[i]) for _, values in rows) + 3 for i in range(len(reports))]
    lines += [
        name.ljust(width) + "".join(v.rjust(w) for v, w in zip(values, columns, strict=True))
        for name, values in rows
    ]
    return "\n".join(lines)


def _traffic(collectives: Collectives, where: str, kind: str) -> str:
    sent: Traffic | None = getattr(collectives, where).get(kind)
    return "-" if sent is None else f"{sent.count} x, {gib(sent.bytes)}"
