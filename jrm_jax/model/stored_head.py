"""The reward head in a Hugging Face folder: tensors whose names begin with 'score.'.

A head of one linear is `score.weight`, without a bias, as serving engines expect. One with hidden
layers is `score.hidden.N.weight` and `.bias`, then `score.out.weight` and `.bias`. Rows of the last
matrix are the reward dimensions; where rewards are Gaussians, their log-deviations follow.
config.json says so: DESCRIPTION, absent for one linear of plain rewards.

Letters: D hidden width of the backbone, R reward dimensions, U units of a layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jrm_jax.errors import UserError
from jrm_jax.model.config import BackboneConfig
from jrm_jax.model.tensor_files import READABLE, TensorFiles
from jrm_jax.model.tensors import Params

PREFIX = "score."
DESCRIPTION = "reward_head"  # in config.json: {'hidden': [U, ...], 'deviation': bool}
DEVIATION = " log deviation"  # ends the name of an output that is one


def describe(head: Params) -> dict[str, Any]:
    """What config.json says of a head; {} of one linear of plain rewards."""
    widths = [len(layer["bias"]) for _, layer in _hidden(head)]
    if not widths and "deviation" not in head:
        return {}
    return {DESCRIPTION: {"hidden": widths, "deviation": "deviation" in head}}


def output_names(head: Params, dimensions: Sequence[str]) -> list[str]:
    """Of the rows of the last matrix."""
    more = [name + DEVIATION for name in dimensions] if "deviation" in head else []
    return [*dimensions, *more]


def head_tensors(head: Params) -> dict[str, np.ndarray]:
    """What a folder holds of a head, float32 by name."""
    parts = [head, *([head["deviation"]] if "deviation" in head else [])]
    kernel = np.concatenate([np.asarray(part["kernel"], np.float32) for part in parts], axis=1)
    if "hidden" not in head:
        return {f"{PREFIX}weight": kernel.T}
    bias = np.concatenate([np.asarray(part["bias"], np.float32) for part in parts])
    tensors = {f"{PREFIX}out.weight": kernel.T, f"{PREFIX}out.bias": bias}
    for number, layer in _hidden(head):
        name = f"{PREFIX}hidden.{number}"
        tensors[f"{name}.weight"] = np.asarray(layer["kernel"], np.float32).T
        tensors[f"{name}.bias"] = np.asarray(layer["bias"], np.float32)
    return tensors


def load_reward_head(folder: str | os.PathLike, config: BackboneConfig) -> Params | None:
    """The tree of `heads.init_reward_head` from a folder, None if it has none.

    Raises:
        UserError: as `weights.load_params`; tensors missing, unread or of a wrong shape;
            a description that is none.
    """
    folder = Path(folder)
    files = TensorFiles(folder)
    names = {name for name in files.tensors if name.startswith(PREFIX)}
    if not names:
        return None
    widths, gaussian = _described(folder)
    last = f"{PREFIX}out" if widths else PREFIX.rstrip(".")
    wanted = {f"{last}.weight"} | ({f"{last}.bias"} if widths else set())
    wanted |= {f"{PREFIX}hidden.{n}.{p}" for n in range(len(widths)) for p in ("weight", "bias")}
    if names != wanted:
        raise UserError(
            f"{folder}: its reward head is {', '.join(sorted(names))}; by its config.json it must "
            f"be {', '.join(sorted(wanted))}"
        )
    read = _reader(folder, files)
    inputs, layers = config.text.hidden, {}
    for number, units in enumerate(widths):
        layers[str(number)] = _layer(read, f"{PREFIX}hidden.{number}", inputs, units, True)
        inputs = units
    out = _layer(read, last, inputs, None, bool(widths))
    outputs = out["kernel"].shape[1]
    if gaussian and outputs % 2:
        raise UserError(f"{folder}: {last}.weight has {outputs} rows, needs pairs: a mean and a "
                        "log-deviation of each dimension")  # fmt: skip
    count = outputs // 2 if gaussian else outputs
    mean = {name: leaf[..., :count] for name, leaf in out.items()}
    deviation = {"deviation": {name: leaf[..., count:] for name, leaf in out.items()}}
    return ({"hidden": layers} if widths else {}) | mean | (deviation if gaussian else {})


def _described(folder: Path) -> tuple[list[int], bool]:
    """(widths of the hidden layers, whether rewards are Gaussians), by config.json."""
    said = json.loads((folder / "config.json").read_text()).get(DESCRIPTION) or {}
    fields = said if isinstance(said, dict) else {"hidden": None}
    widths = fields.get("hidden", [])
    if not isinstance(widths, list) or not all(type(n) is int and n > 0 for n in widths):
        raise UserError(
            f"{folder / 'config.json'}: {DESCRIPTION!r} is {said!r}, needs "
            '{"hidden": [widths of layers], "deviation": true or false}'
        )
    return widths, bool(fields.get("deviation"))


def _hidden(head: Params) -> list[tuple[str, Params]]:
    """Hidden layers by number, in order."""
    return sorted(head.get("hidden", {}).items(), key=lambda item: int(item[0]))


def _reader(folder: Path, files: TensorFiles):
    def read(name: str, wanted: Sequence[int | None], words: str) -> np.ndarray:
        shape, stored = files.describe(name)
        fits = len(shape) == len(wanted) and all(
            size is None or size == own for size, own in zip(wanted, shape, strict=True)
        )
        if not fits or stored not in READABLE:
            raise UserError(f"{folder}: {name} is {stored} {list(shape)}, needs floats {words}")
        return files.read(name, tuple((0, n) for n in shape)).astype(np.float32)

    return read


def _layer(read, name: str, inputs: int, units: int | None, bias: bool) -> Params:
    shown = "dimensions" if units is None else units
    rows_UD = read(f"{name}.weight", (units, inputs), f"[{shown}, {inputs}]")
    layer: Mapping[str, Any] = {"kernel": jnp.asarray(rows_UD.T)}
    if bias:
        layer = layer | {"bias": jnp.asarray(read(f"{name}.bias", (len(rows_UD),), f"[{shown}]"))}
    return layer
