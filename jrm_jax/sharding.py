"""The device mesh and where every array lives on it.

Mesh axes: `data` repeats the parameters, `fsdp` splits them (and the batch) and gathers a layer
when it is used, `tensor` splits heads and MLP widths. The compiler places the rest (AxisType.Auto).

Letters: B groups in a global batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jrm_jax.errors import UserError
from jrm_jax.lora import LEAVES as LORA
from jrm_jax.model.config import BackboneConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
LARGE = 2**20  # elements of a parameter that must not be held whole by every device
TORUS = 4  # devices along a dimension from which on TPU slices are closed to a ring
CONSTANTS = 16  # elements of an optimizer state that is no moment, at most

_BLOCK = r"backbone/vision/blocks_\d+"
_LAYER = r"backbone/decoder/(taps|layers|blocks/(delta|full))"
_MERGER = r"backbone/vision/(merger|deepstack_\d+)"

# Path of a leaf (whole path) -> mesh axis of each of its dimensions. Stacks keep their layer axis
# whole: a scan slices it. A matrix pair is split by `tensor` along its inner width (heads, MLP), by
# `fsdp` along its outer one. What is fused (the tower's query-key-value, Gated DeltaNet's) is not
# split by `tensor`: its parts would not line up with heads. Every place of `tensor` then runs all
# heads of a Gated DeltaNet's rule. Vectors stay whole unless the output of their matrix is split.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"backbone/embed/embedding", ("tensor", "fsdp")),
    (r"backbone/vision/patch_embed/kernel", (None, None, "fsdp")),
    (r"backbone/vision/patch_embed/bias", (None,)),
    (r"backbone/vision/position/embedding", (None, "fsdp")),
    (rf"({_BLOCK}|{_LAYER})/norm[12]/(scale|bias)", (None, None)),
    (rf"{_BLOCK}/attn/qkv/kernel", (None, "fsdp", None)),
    (rf"{_BLOCK}/attn/proj/kernel", (None, "tensor", "fsdp")),
    (rf"{_BLOCK}/attn/(qkv|proj)/bias", (None, None)),
    (rf"{_LAYER}/attn/[qkv]/kernel", (None, "fsdp", "tensor")),
    (rf"{_LAYER}/attn/[qkv]/bias", (None, "tensor")),
    (rf"{_LAYER}/attn/[qk]_norm/scale", (None, None)),
    (rf"{_LAYER}/attn/o/kernel", (None, "tensor", "fsdp")),
    (rf"{_LAYER}/mixer/(qkv|a|b)/kernel", (None, "fsdp", None)),
    (rf"{_LAYER}/mixer/z/kernel", (None, "fsdp", "tensor")),
    (rf"{_LAYER}/mixer/out/kernel", (None, "tensor", "fsdp")),
    (rf"{_LAYER}/mixer/conv", (None, None, "fsdp")),
    (rf"{_LAYER}/mixer/(A_log|dt_bias|norm/scale)", (None, None)),
    (rf"({_BLOCK}|{_LAYER})/mlp/(gate|up|fc1)/kernel", (None, "fsdp", "tensor")),
    (rf"({_BLOCK}|{_LAYER})/mlp/(gate|up|fc1)/bias", (None, "tensor")),
    (rf"({_BLOCK}|{_LAYER})/mlp/(down|fc2)/kernel", (None, "tensor", "fsdp")),
    (rf"({_BLOCK}|{_LAYER})/mlp/(down|fc2)/bias", (None, None)),
    (rf"{_MERGER}/norm/(scale|bias)", (None,)),
    (rf"{_MERGER}/fc1/kernel", ("fsdp", "tensor")),
    (rf"{_MERGER}/fc1/bias", ("tensor",)),
    (rf"{_MERGER}/fc2/kernel", ("tensor", "fsdp")),
    (rf"{_MERGER}/fc2/bias", (None,)),
    (r"backbone/decoder/norm/scale", (None,)),
    (r"language_head/kernel", ("fsdp", "tensor")),
    (r"reward_head/(deviation/)?kernel", (None, None)),
    (r"reward_head/hidden/\d+/kernel", ("fsdp", None)),
    (r"reward_head/(deviation/|hidden/\d+/)?bias", (None,)),
    (r"reward_embedding", (None,)),
    (r"words_head/kernel", ("fsdp", None)),
    (r"facts_head/kernel", (None, None)),
    (r"facts_head/bias", (None,)),
)


COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}


def compiler_options(mesh: Mesh, search: bool = False) -> dict[str, Any] | None:
    """What `jax.jit` must be told for the devices of `mesh`.

    On NVIDIA's cards XLA writes kernels for matrix products with Triton, too: it compiles and times
    dozens for every product. The first program of the default run, in float32, then takes over 80 s
    to compile instead of 22 s (H100, 16 cores; docs/accelerator.md). A long run in bfloat16 gains 1
    to 5 % a step for 6 s. So it may `search` only there; otherwise all products are left to
    NVIDIA's library.

    XLA's CPU compiler (jaxlib 0.10.2) hands sums to a library whose threads race where the summed
    value is broadcast: `jnp.sum(jnp.square(jnp.broadcast_to(x, (2, *x.shape))))` now and then
    counts a part twice. Gradient norms, and through clipping all parameters, were off by per cents.
    Only matrix products go to that library here, and each by itself: where it is given chains of
    products with what lies between them (Muon's, attention's), they take up to 2.4 times as long,
    and the default step 9 % longer.
    """
    platform = mesh.devices.flat[0].platform
    return None if platform == "gpu" and search else COMPILER_OPTIONS.get(platform)


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices; one of the three sizes may be -1: whatever is left.

    Neighbouring devices hold neighbouring places of `tensor`, then `fsdp`. Over several TPU slices,
    `data` crosses them and must be a multiple of their number.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"config.mesh ({asked}): sizes are positive, and at most one is -1 (whatever is left)"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        verb = "divide" if free else "multiply to"
        raise UserError(
            f"config.mesh ({asked}): the sizes must {verb} the number of devices, {len(devices)}"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes.values())
    slices = _slices(devices)
    if slices > 1:
        if shape[0] % slices:
            raise UserError(
                f"config.mesh.data is {shape[0]}: it must be a multiple of the {slices} TPU slices"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]),
            (slices, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fill_sizes(
    sizes: tuple[int, int, int], params: Mapping[str, Any], devices: Sequence[Any] | None = None
) -> tuple[int, int, int]:
    """`sizes` (data, fsdp, tensor) with a number for `data` where it and `fsdp` both are -1.

    `fsdp` then takes the devices of a slice that `tensor` leaves, as far as it divides every large
    parameter of `params`; `data` takes the rest and crosses slices. 256 devices split no kernel of
    a tower that is 1152 wide, and each would hold all of it: 128 do, twice. Of a torus with three
    dimensions `data` takes the shortest: XLA gathers over two, and over three it sums instead.
    """
    data, fsdp, tensor = sizes
    if (data, fsdp) != (-1, -1):
        return sizes
    devices = jax.devices() if devices is None else devices
    slices = _slices(devices)
    rest = len(devices) // slices // max(tensor, 1)
    if tensor < 1 or rest * slices * tensor != len(devices):
        return 1, -1, tensor  # `make_mesh` says what is wrong
    short = _shortest_of_three(devices)
    widest = rest if rest % short else rest // short
    lengths = [
        leaf.shape[dims.index("fsdp")]
        for path, leaf in _leaves(params)
        if leaf.size >= LARGE and "fsdp" in (dims := rule(path) or ())
    ]
    return rest // math.gcd(widest, *lengths) * slices, -1, tensor


def check_mesh(config: BackboneConfig, mesh: Mesh) -> None:
    """Raise UserError unless `tensor` splits every attention into whole heads."""
    tensor = mesh.shape["tensor"]
    heads = {
        "attention heads": config.text.heads,
        "key-value heads": config.text.kv_heads,
        "vision heads": config.vision.heads,
    }
    bad = [f"{count} {name}" for name, count in heads.items() if count % tensor]
    if bad:
        largest = math.gcd(*heads.values())
        raise UserError(
            f"config.mesh.tensor is {tensor}, which does not divide this backbone's "
            f"{', '.join(bad)}: use {largest} or a divisor of it, and config.mesh.fsdp for the rest"
        )


def fit_spec(dims: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> P:
    """`dims` without the axes whose size does not divide their dimension (kept whole instead)."""
    fits = (
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(dims, shape, strict=True)
    )
    return P(*fits)


def rule(path: str) -> tuple[str | None, ...] | None:
    """Mesh axis of each dimension of the leaf at `path`, None where no rule covers it.

    An adapter lies like its kernel; its rank is not split.
    """
    place, _, name = path.rpartition("/")
    owner = f"{place}/kernel" if name in LORA else path
    dims = next((dims for pattern, dims in RULES if re.fullmatch(pattern, owner)), None)
    if dims is None or name not in LORA:
        return dims
    return (*dims[:-1], None) if name == LORA[0] else (*dims[:-2], None, dims[-1])


def _leaves(tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("/".join(key.key for key in keys), leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _slices(devices: Sequence[Any]) -> int:
    """TPU slices among the devices; other platforms have none, and None counts as the only one."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", None) or 0 for device in devices})


def _shortest_of_three(devices: Sequence[Any]) -> int:
    """Length of the shortest dimension of a slice that is a torus in three; 1 for any other."""
    places = [getattr(device, "coords", None) or () for device in devices]
    lengths = [len(set(along)) for along in zip(*places, strict=True)]
    return min(lengths) if len(lengths) == 3 and min(lengths) >= TORUS else 1


def param_shardings(tree: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """A NamedSharding per leaf of a parameter tree (arrays or jax.ShapeDtypeStruct).

    Raises:
        UserError: leaves that no rule covers, or with another number of dimensions than their
            rule; names all of them.
    """
    offenders: list[str] = []

    def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        path = "/".join(key.key for key in keys)
        dims = rule(path)
        if dims is None or len(dims) != len(leaf.shape):
            offenders.append(f"{path} {list(leaf.shape)}")
            return replicated(mesh)
        return NamedSharding(mesh, fit_spec(dims, leaf.shape, mesh))

    shardings = jax.tree_util.tree_map_with_path(place, tree)
    if offenders:
        raise UserError(f"no sharding rule covers these parameters: {', '.join(offenders)}")
    return shardings


def optimizer_shardings(opt_state: Any, trainable: Mapping[str, Any], mesh: Mesh) -> Any:
    """Shardings of an optax state: moments lie like the parameters they belong to.

    A leaf belongs to the parameter whose path ends its own; one of the same shape is placed like
    it. Scalars, short lists of constants, and reduced statistics of another shape are repeated on
    every device.

    Raises:
        UserError: arrays that belong to no parameter; names all of them.
    """
    placed = {
        tuple(key.key for key in keys): sharding
        for keys, sharding in jax.tree_util.tree_leaves_with_path(param_shardings(trainable, mesh))
    }
    shapes = {
        tuple(key.key for key in keys): leaf.shape
        for keys, leaf in jax.tree_util.tree_leaves_with_path(trainable)
    }
    offenders: list[str] = []

    def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = tuple(getattr(key, "key", None) for key in keys)
        owner = next((names[i:] for i in range(len(names)) if names[i:] in placed), None)
        if owner is not None and shapes[owner] == leaf.shape:
            return placed[owner]
        if owner is None and leaf.size > CONSTANTS:
            offenders.append(f"{jax.tree_util.keystr(keys)} {list(leaf.shape)}")
        return replicated(mesh)

    shardings = jax.tree_util.tree_map_with_path(place, opt_state)
    if offenders:
        raise UserError(f"no parameter goes with these optimizer states: {', '.join(offenders)}")
    return shardings


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings of a TrainState(step, trainable, frozen, opt_state), arrays or abstract.

    Raises:
        UserError: as `param_shardings` and `optimizer_shardings`.
    """
    return state._replace(
        step=replicated(mesh),
        trainable=param_shardings(state.trainable, mesh),
        frozen=param_shardings(state.frozen, mesh),
        opt_state=optimizer_shardings(state.opt_state, state.trainable, mesh),
    )


def placed(tree: Any, shardings: Any) -> Any:
    """jax.ShapeDtypeStruct per leaf, with its sharding."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )


def is_this_device(mesh: Mesh) -> bool:
    """One device, of the platform that this process computes on."""
    return mesh.size == 1 and mesh.devices.flat[0].platform == jax.default_backend()


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the leading axis) over `data` and `fsdp`; also right for hidden states [B, S, D]."""
    return NamedSharding(mesh, P(BATCH_AXES))


def batch_places(mesh: Mesh) -> int:
    """Over how many places the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raise UserError unless every microbatch gives each place of data * fsdp as many rows."""
    places = batch_places(mesh)
    if batch_size < 1 or batch_size % (places * accumulation):
        sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH_AXES)
        parts = f" x {accumulation} microbatches" if accumulation > 1 else ""
        raise UserError(
            f"config.batch_size is {batch_size}; the mesh ({sizes}{parts}) needs a multiple of "
            f"{places * accumulation}"
        )


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Rows of the global batch that this process must supply to `place_batch`, ascending.

    Not always one range by process number: the mesh follows the wiring of the machine, and
    processes that share a place along `tensor` supply the same rows.
    """
    check_batch_size(batch_size, mesh)
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = {row for (part,) in parts for row in range(*part.indices(batch_size))}
    return np.array(sorted(rows), np.int64)


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows (see `local_rows`) of every array -> global arrays on the mesh.

    Raises:
        UserError: the number of rows does not fit the mesh.
    """
    sharding = batch_sharding(mesh)
    places = batch_places(mesh)
    here = len(local_rows(places, mesh))
    sizes = {name: len(array) for name, array in batch.items()}
    rows = next(iter(sizes.values()))
    if set(sizes.values()) != {rows}:
        raise ValueError(f"arrays of one batch differ in their rows: {sizes}")
    if rows % here:
        raise UserError(
            f"{rows} rows cannot be spread evenly over the {here} places of data x fsdp on this "
            "host: change config.batch_size or config.mesh"
        )
    return {
        name: jax.make_array_from_process_local_data(
            sharding, array, (rows // here * places, *array.shape[1:])
        )
        for name, array in batch.items()
    }
