"""Expectations over Gaussian rewards against numerical integration, and the loss made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
from test_losses import votes

from jrm_jax.gaussian import (
    BLOCKS,
    LOG_DEVIATION,
    NARROW,
    expected_softplus,
    gap_deviation,
    log_chances,
    log_expected_sigmoid,
)
from jrm_jax.losses import GAUSSIAN, preference_loss

GAPS = (0.0, 1e-3, -0.5, 2.0, -2.0, 10.0, -10.0, 40.0, -40.0, 1e3, -1e5)
DEVIATIONS = (1e-9, 1e-3, 0.3, np.sqrt(2), NARROW, 1.51, 2.5, 6.0, 30.0, 1e3, 1e6)
GRID_G2 = np.array([(m, s) for m in GAPS for s in DEVIATIONS], np.float32)


def integrate(log_part, gap, deviation):
    """log of the integral of exp(log_part(gap + deviation z)) over a standard normal z."""

    def exponent(z):
        return log_part(gap + deviation * z) - z**2 / 2 - 0.5 * np.log(2 * np.pi)

    edge = -gap / deviation
    near = edge + np.linspace(-40, 40, 801) / deviation
    most = 40 + min(abs(edge), deviation)  # farther out there is nothing
    places = np.concatenate([np.linspace(-most, most, 4001), near])
    places = np.sort(places[np.abs(places) <= most])
    top = exponent(places).max()
    mass = places[exponent(places) > top - 45]
    cuts = np.unique(np.concatenate([np.quantile(mass, np.linspace(0, 1, 9)), edge + np.array(
        [-20, -5, 0, 5, 20]) / deviation]))  # fmt: skip
    cuts = cuts[(cuts >= mass[0]) & (cuts <= mass[-1])]
    parts = (
        scipy.integrate.quad(lambda z: np.exp(exponent(z) - top), *ends, epsabs=0, epsrel=1e-10)[0]
        for ends in zip(cuts[:-1], cuts[1:], strict=True)
    )
    return top + np.log(sum(parts))


def log_softplus(x):
    return np.where(x < -30, x, np.log(np.logaddexp(0, np.maximum(x, -30))))


def log_density(x):
    """Of the logistic law: the slope of the sigmoid."""
    return scipy.special.log_expit(x) + scipy.special.log_expit(-x)


def by_integration(name, gap, deviation):
    """(what COMPUTED[name] gives, its derivative by the gap)"""
    at, sigmoid = (gap, deviation), scipy.special.log_expit
    if name == "sigmoid":
        value = integrate(sigmoid, *at)
        return value, np.exp(integrate(log_density, *at) - value)
    return np.exp(integrate(log_softplus, *at)), np.exp(integrate(sigmoid, *at))


COMPUTED = {"sigmoid": log_expected_sigmoid, "softplus": expected_softplus}


@pytest.mark.parametrize("name", COMPUTED)
def test_values_and_slopes_are_those_of_numerical_integration(name):
    value_and_slopes = jax.vmap(jax.value_and_grad(COMPUTED[name], (0, 1)))
    value_G, (slope_G, broader_G) = value_and_slopes(*map(jnp.asarray, GRID_G2.T))
    wanted_G, wanted_slope_G = zip(*(by_integration(name, *row) for row in GRID_G2.tolist()),
                                   strict=True)  # fmt: skip
    np.testing.assert_allclose(value_G, wanted_G, rtol=1e-6, atol=1e-6)
    near = np.abs(wanted_G) < 3e3  # beyond, float32 tells a chance by three digits
    wanted_slope_G = np.array(wanted_slope_G)
    np.testing.assert_allclose(slope_G[near], wanted_slope_G[near], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slope_G, wanted_slope_G, rtol=1e-3, atol=1e-6)
    assert np.isfinite(broader_G).all()


@pytest.mark.parametrize("name", COMPUTED)
def test_gradients_by_the_deviation_are_those_of_differences(name):
    step = 1e-3
    for gap in (0.0, 1.0, -7.0):
        for deviation in (0.2, NARROW, 4.0, 40.0):
            low, high = (
                by_integration(name, gap, deviation + side * step / 2)[0] for side in (-1, 1)
            )
            found = jax.grad(COMPUTED[name], 1)(gap, deviation)
            np.testing.assert_allclose(found, (high - low) / step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", COMPUTED.values())
def test_nothing_overflows(function):
    for gap in (0.0, 1e30, -1e30, 3e38):
        for deviation in (0.0, 1e-30, np.exp(LOG_DEVIATION)):
            found = jax.value_and_grad(function, (0, 1))(jnp.float32(gap), jnp.float32(deviation))
            assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(found)), (gap, deviation)


@pytest.mark.parametrize("shape", [(0,), (), (3, 3, 2), (257,), (BLOCKS[-1] + 1,)])
def test_chances_on_the_host_are_those_of_one_call(shape):
    rng = np.random.default_rng(4)
    gap, deviation = rng.normal(0, 4, shape), rng.exponential(2, shape)
    found = log_chances(gap, deviation)
    assert found.shape == shape and found.dtype == np.float32
    wanted = log_expected_sigmoid(np.float32(gap), np.float32(deviation))
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6)


def test_log_deviations_of_any_size_give_finite_losses_and_gradients():
    def total(log_deviation, gaussian):
        preference, weight = votes()
        reward = jnp.linspace(-30, 30, preference.shape[0] * 8).reshape(-1, 4, 2)
        spread = jnp.full_like(reward, 0.5) * log_deviation
        spread = spread.at[0].mul(-1)
        return preference_loss(reward, preference, weight, 0.5, spread, gaussian).sum

    for gaussian in ("log_of_mean", "mean_of_log"):
        for size in (0.0, 1.0, 39.0, 1e4, 1e30):
            found = jax.value_and_grad(total)(jnp.float32(size), gaussian)
            assert all(np.isfinite(found)), (gaussian, size)


@pytest.mark.parametrize("gaussian", ["log_of_mean", "mean_of_log"])
def test_the_loss_of_a_deviation_of_zero_is_the_plain_one(gaussian):
    """Wins, ties, shares of votes, missing pairs, a margin; values and gradients."""
    preference, weight = votes()
    preference[0, 0, 1, 0], preference[0, 1, 0, 0], weight[0, 0, 1, 0] = 0.3, 0.7, 2.0
    reward = np.random.default_rng(1).normal(0, 3, preference.shape[:2] + (2,)).astype(np.float32)

    def total(reward, gaussian, log_deviation=None):
        term = preference_loss(reward, preference, weight, 0.4, log_deviation, gaussian)
        return term.sum / term.weight

    plain = jax.value_and_grad(total)(reward, "off")
    narrow = jax.value_and_grad(total)(reward, gaussian, np.full_like(reward, -12.0))
    for mine, other in zip(narrow, plain, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
    wide = total(reward, gaussian, np.full_like(reward, 1.0))
    assert not np.isclose(wide, plain[0], rtol=1e-2)


@pytest.mark.parametrize("gaussian", ["log_of_mean", "mean_of_log"])
def test_a_pair_by_hand(gaussian):
    """One pair, 19 votes of 30 for the first, deviations 0.5 and 2; a margin of 0.3 asked of it."""
    preference, weight = np.zeros((1, 2, 2, 1), np.float32), np.ones((1, 2, 2, 1), np.float32)
    share = preference[0, 0, 1, 0] = np.float32(19 / 30)
    reward = np.array([[[1.2], [0.1]]], np.float32)
    spread = np.log(np.array([[[0.5], [2.0]]], np.float32))
    found = preference_loss(reward, preference, weight, 0.3, spread, gaussian)
    deviation, asked = np.sqrt(0.25 + 4), 0.3 * (2 * share - 1)

    def cost(gap):
        if gaussian == "log_of_mean":
            return -integrate(scipy.special.log_expit, gap, deviation)
        return np.exp(integrate(log_softplus, -gap, deviation))

    wanted = share * cost(1.1 - asked) + (1 - share) * cost(-1.1 - asked)
    np.testing.assert_allclose(found.sum, wanted, rtol=1e-6)
    np.testing.assert_allclose(gap_deviation(*spread[0]), [deviation], rtol=1e-6)


def test_what_each_loss_does_to_a_deviation():
    """Of a wrongly ordered pair -log of the mean asks for more deviation."""
    slopes = {
        name: [float(jax.grad(GAUSSIAN[name], 1)(gap, 1.0)) for gap in (-2.0, 2.0)]
        for name in ("log_of_mean", "mean_of_log")
    }
    assert slopes["log_of_mean"][0] < 0 < slopes["log_of_mean"][1]
    assert min(slopes["mean_of_log"]) > 0
