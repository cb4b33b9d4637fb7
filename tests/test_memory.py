"""The table of what devices hold: arithmetic that a person can do by hand."""

import pytest

from jrm_jax.model.published import PARAMETERS
from jrm_jax.planning.memory import WAYS, held


def test_everything_costs_twelve_bytes_a_parameter_and_sixteen_with_gradients():
    count = PARAMETERS["qwen3_vl_2b"]
    between, most = held("qwen3_vl_2b", WAYS["everything"], 1)
    assert between == pytest.approx(12 * count, rel=1e-3)
    assert most == pytest.approx(16 * count, rel=1e-3)


def test_adapters_cost_two_bytes_a_frozen_parameter():
    between, most = held("qwen3_vl_8b", WAYS["adapters"], 1)
    assert 2 * PARAMETERS["qwen3_vl_8b"] < between < most < 2.1 * PARAMETERS["qwen3_vl_8b"]


def test_eight_devices_hold_an_eighth_each():
    alone, split = (held("qwen3_vl_2b", WAYS["everything"], n)[0] for n in (1, 8))
    assert split == pytest.approx(alone / 8, rel=0.02)
