"""What fits: how much the backward pass computes again, and in how many parts a batch is taken, by
the compiler's own plan of a device's memory.

A run asks before its first step; `planning` asks for devices that are not there.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
from ml_collections import ConfigDict

from jrm_jax import build, distributed, sharding
from jrm_jax.build_data import Data, place
from jrm_jax.data.pipeline import empty_batch
from jrm_jax.errors import UserError
from jrm_jax.model.config import BackboneConfig
from jrm_jax.model.layers import REMAT
from jrm_jax.optim import merge_params
from jrm_jax.shell import user_cache
from jrm_jax.step import Forward, TrainState
from jrm_jax.watch import device_memory

GIB = 2**30
ROOM = 0.95  # of a device's memory for one program; some is lost between buffers
# What is told from shapes may be so much too high: the compilers' plans of Qwen3-VL-2B's step were
# 0.94 to 1.13 of it.
DOUBT = 1.1
PLENTY = 0.25  # of what a program may use: what needs less by that count is not compiled to be sure
SMALLER = "--config.lora.rank=16 or fewer patterns in --config.trainable"
Way = TypeVar("Way")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class OutOfMemory(UserError):
    """A program does not fit; `needed` and `available` are bytes of a device, or None."""

    def __init__(self, needed: int | None, available: int | None):
        self.needed, self.available = needed, available
        super().__init__(f"a program does not fit into the memory of a device{self.by_how_much}")

    @property
    def by_how_much(self) -> str:
        """': 21.50 GiB of 15.75 GiB, 5.75 GiB too much', or ''."""
        if self.needed is None or self.available is None:
            return ""
        over = self.needed - self.available
        return f": {gib(self.needed)} of {gib(self.available)}, {gib(over)} too much"


def gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def parse_out_of_memory(message: str) -> tuple[int | None, int | None]:
    """(bytes needed, bytes available) from XLA's words, None where they do not say.

    Where it gives up before it has a plan it names the temporaries alone: then more is needed.
    """
    number = r"([\d.]+)([KMGT]?)i?B?"

    def bytes_of(*patterns: str) -> int | None:
        found = next(filter(None, (re.search(pattern, message) for pattern in patterns)), None)
        return None if found is None else int(float(found[1]) * _UNITS[found[2]])

    return (
        bytes_of(rf"[Uu]sed {number} of", rf"temporaries \({number}\) exceed"),
        bytes_of(rf"of {number} hbm", rf"available HBM \({number}\)"),
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes that each device holds of arrays or shapes with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
        total += size
    return total


def planned_bytes(program: Any) -> int:
    """Of a device: the most that a compiled program means to hold at once, its arguments included.

    On a GPU that is what its allocator then counts (61.036 of 61.039 GiB). On a TPU arguments that
    are given away make room for others, so that the sum of all parts would be too much.
    """
    return program.memory_analysis().peak_memory_in_bytes


def memory_limit(device: Any) -> int | None:
    """Bytes of a device that one program may plan with; None where the backend tells nothing."""
    limit = device_memory(device)
    return None if limit is None else int(ROOM * limit)


def check_state(config: ConfigDict, backbone: BackboneConfig, mesh: jax.sharding.Mesh) -> None:
    """Before anything is read or made: does the state of a run fit its devices?

    Raises:
        UserError: it does not, whatever the batch.
    """
    limit = memory_limit(mesh.local_devices[0])
    if limit is None:
        return
    needed = bytes_per_device(build.abstract_state(config, backbone, mesh)[0])
    if not distributed.all_agree(needed <= limit):
        failure = OutOfMemory(needed, limit)
        raise UserError(
            "parameters and optimizer state do not fit on "
            f"{describe_devices(mesh)}{failure.by_how_much}; try {SMALLER}, more devices"
        )


def describe_devices(mesh: jax.sharding.Mesh) -> str:
    """'8 x NVIDIA H100'."""
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind}"


def compile_within(lowered: Any, limit: int | None) -> Any:
    """The compiled program. Raises OutOfMemory: the compiler gives up, or plans with more."""
    try:
        with user_cache.compiling(lowered):
            program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemory(*parse_out_of_memory(str(error))) from error
        raise
    if limit is not None and (needed := planned_bytes(program)) > limit:
        raise OutOfMemory(needed, limit)
    return program


def rough_bytes(
    forward: Forward, state: TrainState, batch: dict[str, Any], accumulation: int
) -> int:
    """About what a device holds in a train step: state, gradients, and what the forward pass keeps
    for the backward pass. From shapes, in seconds; compiling tells the rest.

    Args:
        state, batch: arrays or shapes, with shardings.
    """
    mesh = state.step.sharding.mesh
    parts = accumulation * sharding.batch_places(mesh)
    one = {
        name: jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype)
        for name, x in batch.items()
    }

    def backward(trainable: dict, frozen: dict, batch: dict) -> Any:
        def loss(trainable: dict) -> jax.Array:
            terms = forward(merge_params(trainable, frozen), batch).terms
            return sum(term.sum for term in terms.values())

        return jax.vjp(loss, trainable)[1]  # a pytree of what is kept

    shapes = (state.trainable, state.frozen, one)
    kept = _kinds(jax.eval_shape(backward, *shapes)) - _kinds(shapes)
    # What is made of a parameter lies like it; of the rest `tensor` splits a part, here all of it.
    lies = {x.shape: x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(shapes[:2])}
    bytes_kept = 0
    for (shape, dtype), count in kept.items():
        size = math.prod(lies.get(shape, shape)) * dtype.itemsize
        bytes_kept += count * (size if shape in lies else size // mesh.shape["tensor"])
    gradients = (1 + (accumulation > 1)) * bytes_per_device(state.trainable)
    return bytes_per_device((state, batch)) + gradients + bytes_kept


def _kinds(tree: Any) -> collections.Counter[tuple]:
    """How many arrays there are of each shape and type."""
    return collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(tree))


def first_fit(
    ways: Iterable[Way], may: Callable[[Way], bool], fits: Callable[[Way], bool]
) -> Way | None:
    """The first of `ways` that fits. `may` is quick and spares compiling what cannot."""
    return next((way for way in ways if may(way) and fits(way)), None)


class Fitting:
    """Looks for the train step of a run that fits its devices, and sees whether evaluation does.

    Args:
        optimizer, state: of `build.init_state`.
        say: for lines.
    """

    def __init__(
        self,
        config: ConfigDict,
        backbone: BackboneConfig,
        data: Data,
        optimizer: Any,
        state: TrainState,
        say: Callable[[str], None],
    ):
        self._config, self._backbone, self._data = config, backbone, data
        self._optimizer, self._state, self._say = optimizer, state, say
        self._mesh = state.step.sharding.mesh
        self.limit = memory_limit(self._mesh.local_devices[0])

    def search(self, programs: Any, train: str, evaluate: str, keep: Callable[[Any], None]) -> bool:
        """Have the train step compiled that computes as little again as fits, and the evaluation.

        Args:
            programs: a `run.programs.Programs`, which compiles them.
            train, evaluate: what it calls them.
            keep: is given every train step that is tried; the last one is what fits.

        Returns:
            False if it was given up.

        Raises:
            UserError: none fits; it names what would.
        """
        if not programs.outermost(train):  # no step is left
            return True
        config, given_up = self._config, False
        rows = len(sharding.local_rows(config.batch_size, self._mesh))
        failure = OutOfMemory(None, None)
        # shapes: several batches would take memory that a step needs
        batches: dict[str, dict[Any, Any]] = {train: {}, evaluate: {}}
        for kind, known in batches.items():
            for key in programs.outermost(kind):
                batch = place(config, empty_batch(rows, key[1], self._data.encoder), self._mesh)
                known[key] = sharding.placed(batch, jax.tree.map(lambda x: x.sharding, batch))

        @functools.cache
        def rough_needs(way: tuple[str, int], kind: str) -> dict[Any, int]:
            """Of evaluation that is as much as a train step would need, which is more."""
            changed = self._with(*way)
            forward = build.make_run_forward(changed, self._module(changed), self._data)
            return {
                key: rough_bytes(forward, self._state, batch, way[1])
                for key, batch in batches[kind].items()
            }

        def rough_need(way: tuple[str, int], *kinds: str) -> int:
            return max(n for kind in kinds for n in rough_needs(way, kind).values())

        def neediest(way: tuple[str, int], kind: str) -> Any:
            keys = list(batches[kind])  # the dearest first
            if len(keys) == 1 or self.limit is None:
                return keys[0]
            return max(keys, key=rough_needs(way, kind).get)

        def use(way: tuple[str, int]) -> None:
            step = self._steps(*way)[0]
            keep(step)
            programs.use(train, step)

        def may(way: tuple[str, int]) -> bool:
            nonlocal failure
            if self.limit is None or way[0] == REMAT[-1]:
                return True
            rough, fine = rough_need(way, train), True
            if rough > DOUBT * self.limit:
                failure, fine = OutOfMemory(rough, self.limit), False
                self._say(f"{_words(*way)} does not fit{failure.by_how_much}, about")
            return distributed.all_agree(fine)

        def prepare(kind: str, way: tuple[str, int], held: int, words: str, *known: Any) -> bool:
            nonlocal failure, given_up
            key, fine = neediest(way, kind), True
            limit = None if self.limit is None else self.limit - held
            try:
                given_up = not programs.prepare({key: (*known, batches[kind][key])}, limit=limit)
            except OutOfMemory as error:
                failure, fine = error, False
                self._say(f"{words} does not fit{error.by_how_much}")
            return distributed.all_agree(fine)

        @functools.cache
        def can_evaluate(parts: int) -> bool:
            if not batches[evaluate]:
                return True
            way = REMAT[0], parts
            if parts != config.accumulation:
                programs.use(evaluate, self._steps(*way)[1])
            words = f"evaluation{_in_parts(parts)} beside the optimizer state"
            held = bytes_per_device(self._state.opt_state)
            return prepare(evaluate, way, held, words, self._state.trainable, self._state.frozen)

        def fits(way: tuple[str, int]) -> bool:
            use(way)
            if not can_evaluate(way[1]) or given_up:
                return given_up
            return prepare(train, way, 0, _words(*way), self._state)

        parts = config.accumulation
        asked = REMAT if config.remat == build.AUTO else (config.remat,)
        # with nothing computed again, what the count leaves out is small, too
        plenty = PLENTY / self._mesh.shape["tensor"]  # by which the count may be too low
        if self.limit is not None and distributed.all_agree(
            rough_need((REMAT[0], parts), train, evaluate) <= plenty * self.limit
        ):
            use((asked[0], parts))  # its first step need not wait for the dearest program
            return True
        found = first_fit(((remat, parts) for remat in asked), may, fits)
        if given_up or found:
            if not given_up and len(asked) > 1:
                self._say(f"{_words(*found)}, the least that fits")
            return not given_up
        failed = failure
        per_device = config.batch_size // sharding.batch_places(self._mesh)
        others = [(remat, parts) for remat in REMAT[REMAT.index(asked[-1]) + 1 :]]
        others += [(REMAT[-1], n) for n in more_parts(per_device, parts)]
        helps = first_fit(others, may, fits)
        if given_up:
            return False
        advice = f"try {SMALLER}, fewer tokens, more devices"
        if helps is not None:
            fields = {"remat": build.AUTO} if len(asked) == 1 else {}
            fields |= {"accumulation": helps[1]} if helps[1] != parts else {}
            flags = " ".join(f"--config.{name}={value}" for name, value in fields.items())
            advice = f"{flags} fits" + (", the same step in parts" if helps[1] != parts else "")
        raise UserError(
            f"config.batch_size {config.batch_size} does not fit on "
            f"{describe_devices(self._mesh)}{failed.by_how_much}; {advice}"
        )

    def _with(self, remat: str, accumulation: int) -> ConfigDict:
        config = self._config.copy_and_resolve_references()
        with config.unlocked():
            config.remat, config.accumulation = remat, accumulation
        return config

    def _module(self, config: ConfigDict) -> Any:
        reward_id = self._data.encoder.tokenizer.reward_id
        return build.make_backbone(config, self._backbone, self._mesh, reward_id)

    def _steps(self, remat: str, accumulation: int) -> tuple[Any, Any]:
        config = self._with(remat, accumulation)
        parts = (self._module(config), self._data, self._optimizer, self._state)
        return build.make_steps(config, *parts)


def _words(remat: str, accumulation: int) -> str:
    return f"remat {remat}{_in_parts(accumulation)}"


def _in_parts(accumulation: int) -> str:
    return f" in {accumulation} microbatches" if accumulation > 1 else ""


def more_parts(rows: int, accumulation: int) -> list[int]:
    """Larger numbers of microbatches that divide the rows of a device: doublings, and all rows."""
    doublings = [accumulation * 2**n for n in range(1, rows.bit_length())]
    return sorted({n for n in (*doublings, rows) if rows % n == 0 and n > accumulation})
