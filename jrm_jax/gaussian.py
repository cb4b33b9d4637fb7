"""Rewards as Gaussians: what is expected of the sigmoid of their difference. Pure: jax only.

The difference of two independent Gaussian rewards is one Gaussian, gap + deviation * z with z
standard normal, so that an expectation is one integral over z, made by a sum: nothing is sampled.

Up to a deviation of NARROW it is Gauss-Hermite quadrature with NODES nodes. A wider Gaussian sees
the sigmoid as a step, which no polynomial follows: 32 nodes are off by 1e-2 at a deviation of 6.
There the same integral is turned round. The sigmoid is the distribution function of the logistic
law, so E sigmoid(gap + deviation z) = E Phi((gap - L) / deviation) with L logistic, which is smooth
at the scale of L, and sums at equal steps converge exponentially fast for such functions (Trefethen
and Weideman 2014, SIAM Review 56). Both are within 1e-7 of the integral.

Letters: Q nodes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, logsumexp

NODES = 32
NARROW = 1.5
STEP, REACH = 0.75, 36.0  # of the sum over the logistic law
FAR = 1e12  # a gap beyond the reach of every deviation
LOG_DEVIATION = 20.0  # log-deviations lie within this, either way: its square is a float32
BLOCKS = (256, 4096)  # pairs at a time of `log_chances`: a call's, a benchmark's

_NODES_Q, _weights = np.polynomial.hermite_e.hermegauss(NODES)
_LOG_WEIGHTS_Q = np.log(_weights / np.sqrt(2 * np.pi))
_LOGISTIC_Q = np.arange(-REACH, REACH + STEP / 2, STEP)
_LOG_DENSITY_Q = np.log(STEP) - np.logaddexp(0, _LOGISTIC_Q) - np.logaddexp(0, -_LOGISTIC_Q)


def bounded(log_deviation: jax.Array) -> jax.Array:
    """Within LOG_DEVIATION: a deviation stays a finite number, and above zero."""
    return jnp.clip(log_deviation, -LOG_DEVIATION, LOG_DEVIATION)


def gap_deviation(first: jax.Array, second: jax.Array) -> jax.Array:
    """Deviation of the difference of two independent Gaussians, from their log-deviations."""
    return jnp.exp(0.5 * jnp.logaddexp(2.0 * bounded(first), 2.0 * bounded(second)))


def log_expected_sigmoid(gap: jax.Array, deviation: jax.Array) -> jax.Array:
    """log E sigmoid(gap + deviation z), of arrays of one shape: the log of the chance to win.

    Nothing overflows and gradients are finite for deviations from 0 to e^LOG_DEVIATION. To 1e-6
    where the result is of order 1, to float32's digits where it is large.
    """
    gap, deviation = jnp.broadcast_arrays(gap, deviation)
    wins = gap > 0
    loss = jnp.where(wins, -gap, gap)  # the unlikely side is computed, the other is 1 minus it
    square = jnp.square(deviation)
    # E sigmoid(m + s z) = e^(m + s^2 / 2) E sigmoid(-m - s^2 - s z): completes the square. Where
    # only the tail of the Gaussian counts, the integrand has its mass at z = 0 after that
    tail = loss < -0.5 * square
    scale = jnp.where(tail, loss + 0.5 * square, 0.0)
    mean = jnp.where(tail, -(loss + square), loss)
    log_chance = scale + _log_chance(mean, deviation)
    # log(1 - chance), where the chance is at most a half
    return jnp.where(wins, jnp.log1p(-jnp.exp(jnp.where(wins, log_chance, -1.0))), log_chance)


_log_expected_sigmoid = jax.jit(log_expected_sigmoid)


def log_chances(gap: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """`log_expected_sigmoid` on the host, of any number of pairs: float32 of the arrays' common
    shape. Blocks of fixed sizes: no shape compiles anew, and little memory is taken at a time."""
    gap, deviation = np.broadcast_arrays(np.float32(gap), np.float32(deviation))
    block = next((size for size in BLOCKS if gap.size <= size), BLOCKS[-1])
    chances = np.empty(gap.size, np.float32)
    for first in range(0, gap.size, block):
        parts = [flat[first : first + block] for flat in (gap.ravel(), deviation.ravel())]
        filled = [np.pad(part, (0, block - len(part))) for part in parts]
        found = np.asarray(_log_expected_sigmoid(*filled))
        chances[first : first + block] = found[: len(parts[0])]
    return chances.reshape(gap.shape)


def expected_softplus(gap: jax.Array, deviation: jax.Array) -> jax.Array:
    """E softplus(gap + deviation z) = E [-log sigmoid(-gap - deviation z)], of arrays of one shape.

    Convex in z, so it never falls as the deviation grows.
    """
    gap, deviation = jnp.broadcast_arrays(gap, deviation)
    above = gap > 0
    # softplus(x) = x + softplus(-x), and of the latter nothing is left at FAR
    mean = jnp.maximum(jnp.where(above, -gap, gap), -FAR)
    wide, (narrow, broad) = _split(deviation)
    values_Q = jax.nn.softplus(mean[..., None] + narrow[..., None] * _NODES_Q)
    small = jnp.sum(values_Q * np.exp(_LOG_WEIGHTS_Q), axis=-1)
    # softplus(x) is the expectation of max(x - L, 0)
    ratio_Q = (mean[..., None] - _LOGISTIC_Q) / broad[..., None]
    density_Q = jnp.exp(-0.5 * jnp.square(ratio_Q)) / np.sqrt(2 * np.pi)
    part_Q = density_Q + ratio_Q * jnp.exp(log_ndtr(ratio_Q))
    large = broad * jnp.sum(part_Q * np.exp(_LOG_DENSITY_Q), axis=-1)
    return jnp.where(above, gap, 0.0) + jnp.where(wide, large, small)


def _log_chance(mean: jax.Array, deviation: jax.Array) -> jax.Array:
    """log E sigmoid(mean + deviation z), for a mean of at least -deviation^2 / 2."""
    wide, (narrow, broad) = _split(deviation)
    values_Q = jax.nn.log_sigmoid(mean[..., None] + narrow[..., None] * _NODES_Q)
    ratio_Q = (mean[..., None] - _LOGISTIC_Q) / broad[..., None]
    return jnp.where(
        wide,
        logsumexp(log_ndtr(ratio_Q) + _LOG_DENSITY_Q, axis=-1),
        logsumexp(values_Q + _LOG_WEIGHTS_Q, axis=-1),
    )


def _split(deviation: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(whether it is wide, what each of both sums may take: its own where it is chosen)."""
    wide = deviation > NARROW
    return wide, (jnp.where(wide, 1.0, deviation), jnp.where(wide, deviation, 2.0 * NARROW))
