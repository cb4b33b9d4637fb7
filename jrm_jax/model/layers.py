"""Parts that the vision tower and the decoder share: projections, norms, stacks of layers.

Parameters are float32 (or the dtype they are loaded in) and are cast to the compute dtype where
they are used; statistics of norms are float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

# What the backward pass computes again, the least first; see `rematerialised`.
REMAT = ("none", "dots", "narrow", "full")
NARROW = "narrow"  # a result that is about as wide as the hidden state
ATTENTION = "attention"  # what an attention kernel leaves for its backward pass ...
CUDNN = "dot_product_attention_fwd_wrapper"  # ... which of cuDNN's has no such name


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Of products of arrays of this type: float32 means float32 everywhere. JAX would use TF32 on
    NVIDIA's cards and bfloat16 on TPUs."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def unroll_all(layers: int, platform: str) -> bool:
    """Whether a decoder of so many layers is compiled as one piece, not as a loop over layers: a
    small one runs faster so on a CPU. A GPU's compiler needs twice the time for it."""
    return platform == "cpu" and layers < 8


def _by_rms(x: Array, eps: float) -> Array:
    """x / rms(x) over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis (Zhang and Sennrich, 2019).

    `centred` multiplies by 1 + scale, in float32, before the result is rounded.
    """

    eps: float
    dtype: jnp.dtype
    centred: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.zeros if self.centred else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        normed = _by_rms(x, self.eps)
        if self.centred:
            return (normed * (1 + scale.astype(jnp.float32))).astype(self.dtype)
        return normed.astype(self.dtype) * scale.astype(self.dtype)


class GatedRMSNorm(nn.Module):
    """x / rms(x) * scale * silu(gate) over the last axis; the gate acts in float32."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, gate: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        normed = _by_rms(x, self.eps).astype(self.dtype) * scale.astype(self.dtype)
        return (normed.astype(jnp.float32) * nn.silu(gate.astype(jnp.float32))).astype(self.dtype)


@jax.custom_vjp
def matmul(x: Array, kernel: Array) -> Array:
    """x [..., D] @ kernel [D, F].

    The gradient of the kernel is written as x^T g unless g is much narrower. JAX's own rule is
    (g^T x)^T: the CPU compiler then lays a wide, freshly computed g out anew for every product,
    which took a quarter of a train step, while x^T is made once for all products that read x.
    """
    return jnp.matmul(x, kernel, precision=precision(x.dtype))


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.matmul(x, kernel, precision=precision(x.dtype)), (x, kernel)


def _matmul_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = saved
    leading = tuple(range(x.ndim - 1))
    contract, exact = ((leading, leading), ((), ())), precision(x.dtype)
    if x.shape[-1] <= 2 * grad.shape[-1]:
        kernel_grad = jax.lax.dot_general(x, grad, contract, precision=exact)
    else:
        kernel_grad = jax.lax.dot_general(grad, x, contract, precision=exact).T
    return jnp.matmul(grad, kernel.T, precision=exact), kernel_grad


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nn.Module):
    """x @ kernel (+ bias) (+ x @ lora_a @ lora_b). `gain` scales the random initial kernel only;
    `narrow` is for `rematerialised`."""

    width: int
    dtype: jnp.dtype
    bias: bool = True
    gain: float = 1.0
    narrow: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.variance_scaling(self.gain**2, "fan_in", "normal")
        kernel = self.param("kernel", init, (x.shape[-1], self.width), jnp.float32)
        out = matmul(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.has_variable("params", "lora_a"):  # see `jrm_jax.lora`
            low, high = (
                self.get_variable("params", name).astype(self.dtype)
                for name in ("lora_a", "lora_b")
            )
            out = out + matmul(matmul(x.astype(self.dtype), low), high)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)
            out = out + bias.astype(self.dtype)
        return checkpoint_name(out, NARROW) if self.narrow else out


def _keep_cudnn(primitive, *_, **__) -> bool:
    return primitive.name == CUDNN


_keep = jax.checkpoint_policies
_keep_attention = _keep.save_from_both_policies(
    _keep.save_only_these_names(ATTENTION), _keep_cudnn
)
_KEPT = {
    "dots": _keep.save_from_both_policies(_keep.dots_with_no_batch_dims_saveable, _keep_attention),
    "narrow": _keep.save_from_both_policies(_keep.save_only_these_names(NARROW), _keep_attention),
    "full": None,
}


def rematerialised(layer: type[nn.Module], remat: str, unroll: int | bool) -> type[nn.Module]:
    """`layer` with what its backward pass makes again: 'none' keeps everything, 'full' only its
    input, 'narrow' also the results of `Linear`s that say so and of attention kernels, 'dots' those
    of all unbatched matrix products and of attention kernels."""
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r}: use one of {', '.join(REMAT)}")
    if remat == "none":
        return layer
    # inside a rolled loop nothing can be merged with the forward pass anyway
    return nn.remat(layer, policy=_KEPT[remat], prevent_cse=unroll is True)


def stack(
    layer: type[nn.Module], length: int, remat: str, unroll: int | bool
) -> Callable[..., nn.Module]:
    """`length` copies of `layer` as one module whose parameters lead with the layer axis.

    The layer's call is (carry, scanned, shared) -> (carry, output): `scanned` leads with the layer
    axis, `shared` is the same for all layers. `remat`: see `rematerialised`.
    """
    return nn.scan(
        rematerialised(layer, remat, unroll),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=length,
        unroll=unroll,
    )
