"""Where the parameters of a model lie: whole on every device, or split where one cannot hold them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jrm_jax import sharding
from jrm_jax.build import DTYPES
from jrm_jax.errors import UserError
from jrm_jax.optim import flatten
from jrm_jax.watch import device_memory

SHARE = 0.8  # of a device's memory for parameters; the rest is what a program works in
# Matrices that a program computes with in its own dtype only, so that they may be kept in it. The
# rest is small, or float32 in every program: statistics, position tables, patches, the reward head.
MATRICES = (
    r"backbone/(?!vision/patch_embed/).*/kernel|backbone/embed/embedding|language_head/kernel"
)


def lay_out(
    shapes: dict[str, Any],
    compute_dtype: str = "float32",
    devices: Sequence[Any] | None = None,
    room: int | None = None,
) -> dict[str, Any]:
    """jax.ShapeDtypeStruct of each leaf as it is to lie: its dtype and its sharding.

    Args:
        shapes: parameters, or shapes of such.
        compute_dtype: 'float32' or 'bfloat16'; in bfloat16 matrices are kept in it.
        devices: default: all of this process.
        room: bytes of each device; default: what it says it has.

    Raises:
        UserError: no such dtype, or all devices together cannot hold the model.
    """
    if compute_dtype not in DTYPES:
        raise UserError(f"compute_dtype {compute_dtype!r}: use {' or '.join(DTYPES)}")
    devices = list(jax.local_devices() if devices is None else devices)

    def kept(keys: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        path = "/".join(key.key for key in keys)
        dtype = DTYPES[compute_dtype] if re.fullmatch(MATRICES, path) else jnp.float32
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    typed = jax.tree_util.tree_map_with_path(kept, shapes)
    room = device_memory(devices[0]) if room is None else room
    split = room is not None and _bytes(typed) > SHARE * room
    sizes = sharding.fill_sizes((-1, -1, 1), typed, devices) if split else (len(devices), 1, 1)
    mesh = sharding.make_mesh(*sizes, devices=devices)
    placed = sharding.placed(typed, sharding.param_shardings(typed, mesh))
    if split and (each := _bytes(placed)) > SHARE * room:
        raise UserError(
            f"the model takes {each / 1e9:.1f} GB of each of {len(devices)} devices, which have"
            f" {room / 1e9:.1f} GB ({SHARE:.0%} of it may hold parameters): use more devices"
            + (", or compute_dtype=bfloat16" if compute_dtype == "float32" else "")
        )
    return placed


def place(params: dict[str, Any], laid_out: dict[str, Any]) -> dict[str, Any]:
    """The parameters as they are to lie; what lies so already is not touched."""
    return jax.tree.map(
        lambda leaf, wanted: jax.device_put(leaf.astype(wanted.dtype), wanted.sharding),
        params,
        laid_out,
    )


def mesh_of(params: dict[str, Any]) -> jax.sharding.Mesh:
    """Of parameters that `place` has placed."""
    return jax.tree.leaves(params)[0].sharding.mesh


def _bytes(shapes: dict[str, Any]) -> int:
    """On one device."""
    total = 0
    for leaf in flatten(shapes).values():
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total
