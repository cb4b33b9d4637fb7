"""Low-rank adapters (Hu et al., 2021): kernel + alpha / rank * lora_a @ lora_b, functions on trees.

An adapter is two leaves beside a kernel [..., D, F]: `lora_a` [..., D, r] and `lora_b` [..., r, F],
float32, with the layer axis of a stack in front. `model.layers.Linear` adds x @ lora_a @ lora_b
where it finds them. Two thin products instead of one merged kernel: in a scanned stack a merged
kernel, and in the backward pass its whole gradient, would exist for all layers at once.

`scale` is alpha / rank; `scale_adapters` puts it into lora_b once, before the backbone is applied.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jrm_jax.optim import check_patterns, flatten, matching, unflatten

LEAVES = ("lora_a", "lora_b")
TRAINABLE = (r"/lora_[ab]$", r"^reward_head/", r"^reward_embedding$")


def adapter_shapes(params: dict, rank: int, targets: Sequence[str]) -> dict:
    """Nested dict of jax.ShapeDtypeStruct of the adapters beside the kernels that `targets` name.

    Args:
        params: the whole tree, arrays or abstract.

    Raises:
        UserError: a pattern that matches no kernel of a linear layer.
    """
    flat = flatten(params)
    kernels = [
        path
        for path in flat
        if path.startswith("backbone/") and path.endswith("/kernel") and "patch_embed" not in path
    ]
    check_patterns(targets, kernels, "config.lora.targets")
    shapes = {}
    for path in matching(targets, kernels):
        *stack, width_in, width_out = flat[path].shape
        place = path.removesuffix("kernel")
        shapes[place + "lora_a"] = jax.ShapeDtypeStruct((*stack, width_in, rank), jnp.float32)
        shapes[place + "lora_b"] = jax.ShapeDtypeStruct((*stack, rank, width_out), jnp.float32)
    return unflatten(shapes)


def init_adapters(key: jax.Array, shapes: dict) -> dict:
    """lora_a with variance 1 / D, lora_b zero: the model starts as it was."""
    flat = flatten(shapes)
    leaves = {}
    for index, (path, leaf) in enumerate(sorted(flat.items())):
        if path.endswith("lora_b"):
            leaves[path] = jnp.zeros(leaf.shape, leaf.dtype)
            continue
        own = jax.random.fold_in(key, index)
        spread = 1.0 / math.sqrt(leaf.shape[-2])
        leaves[path] = spread * jax.random.normal(own, leaf.shape, leaf.dtype)
    return unflatten(leaves)


def scale_adapters(params: dict, scale: float) -> dict:
    """The tree with every lora_b times `scale`."""
    flat = flatten(params)
    scaled = {p: leaf * scale if p.endswith("/lora_b") else leaf for p, leaf in flat.items()}
    return {**params, **unflatten(scaled)}


def merge_adapters(
    params: dict, scale: float, dtype_of: Callable[[str], Any] = lambda path: jnp.float32
) -> dict:
    """The tree without adapters: kernels that have one become kernel + scale * lora_a @ lora_b,
    added in float32 and kept in the dtype of their path."""
    flat = flatten(params)
    merged = {}
    for path, leaf in flat.items():
        place, _, name = path.rpartition("/")
        if name in LEAVES:
            continue
        if name == "kernel" and f"{place}/lora_a" in flat:
            low, high = (flat[f"{place}/{part}"] for part in LEAVES)
            product = jnp.matmul(low, high, precision=jax.lax.Precision.HIGHEST)
            leaf = (leaf.astype(jnp.float32) + scale * product).astype(dtype_of(path))
        merged[path] = leaf
    return {**{name: {} for name in params}, **unflatten(merged)}
