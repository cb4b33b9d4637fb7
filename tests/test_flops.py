"""FLOPs counted from shapes, against hand counts, the traced program and XLA."""

import math

import pytest
from aot_case import SMALL, SMALL_HYBRID, one_device, small_case, traced
from jax.extend.core import jaxprs_in_params

from jrm_jax import build
from jrm_jax.data.buckets import Bucket
from jrm_jax.model.layers import REMAT
from jrm_jax.model.published import PUBLISHED
from jrm_jax.planning import compiling
from jrm_jax.run import flops


def products(jaxpr) -> int:
    """FLOPs of every dot_general of a program, loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contract)
            total += 2 * inner * equation.outvars[0].aval.size
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inside in jaxprs_in_params(equation.params):
            total += times * products(inside)
    return total


def not_counted(backbone, bucket, head: int, table: int) -> int:
    """The reward head, `head` times, and the resampling of the position table: too small."""
    reward = 2 * bucket.candidates * backbone.text.hidden
    positions = 2 * bucket.images * bucket.patches * 4 * backbone.vision.hidden
    return head * reward + table * positions


@pytest.mark.parametrize("small", [SMALL, SMALL_HYBRID], ids=lambda small: small.family)
def test_forward_flops_are_those_of_the_program(small):
    config, backbone, bucket = small_case(small)
    _, evaluate, state, batch = traced(config, backbone, bucket)
    found = products(evaluate.trace(state.trainable, state.frozen, batch).jaxpr)
    ours = sum(sum(part) for part in flops.forward_flops(backbone, bucket, causal=False).values())
    assert found == ours + not_counted(backbone, bucket, 1, 1)


def test_forward_flops_by_hand():
    """Qwen3-VL-8B, three pictures of 512 visual tokens: the sum written out."""
    backbone = PUBLISHED["qwen3_vl_8b"]
    bucket = compiling.make_bucket(backbone, 512, 256, 640, 2, 3, 128)
    assert bucket == Bucket(2, 3, 2048, 768, 1280, 640)
    parts = flops.forward_flops(backbone, bucket)
    slots = 768 + 2 * 1280
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 12288
    assert parts["layers"].linear == 2 * slots * 36 * layer
    seen = 768 * 769 // 2 + 2 * (1280 * 768 + 1280 * 1281 // 2)
    assert parts["layers"].attention == 4 * seen * 4096 * 36
    assert parts["blocks"].linear == 2 * 3 * 2048 * 27 * (4 * 1152**2 + 2 * 1152 * 4304)
    assert parts["language_head"].linear == 2 * 2 * 640 * 4096 * 151936


def test_train_flops_follow_what_is_trained_and_recomputed():
    config, backbone, bucket = small_case()

    def count(trainable=(".*",), remat="none"):
        config.trainable = trainable
        state, _ = build.abstract_state(config, backbone, one_device())
        return flops.train_flops(backbone, bucket, state.trainable, state.frozen, remat)

    parts = flops.forward_flops(backbone, bucket)
    forward = sum(sum(part) for part in parts.values())
    whole = count()
    # all of it three times, but the pixels need no gradient
    assert whole.model == 3 * forward - parts["patches"].linear and whole.again == 0
    vision, text = backbone.vision, backbone.text
    fc2 = 2 * bucket.images * bucket.patches * vision.depth * vision.hidden * vision.mlp
    slots = bucket.prompt + bucket.candidates * bucket.candidate
    down = 2 * slots * text.layers * text.hidden * text.mlp
    stacks = sum(sum(parts[name]) for name in ("blocks", "layers")) - fc2 - down
    assert count(remat="full").again == stacks
    assert count(remat="full").model == whole.model
    attention = sum(parts[name].attention for name in ("blocks", "layers"))
    assert count(remat="dots").again == attention
    fc1, gate_and_up = fc2, 2 * down
    assert count(remat="narrow").again == attention + fc1 + gate_and_up < stacks
    head = count(("reward_head",), remat="full")
    assert head == (forward, 0)  # nothing before the head is trained: one forward pass
    decoder = count(("decoder", "reward_"), remat="full")
    assert decoder.again == sum(parts["layers"]) - down
    tower = sum(sum(parts[name]) for name in ("patches", "blocks", "mergers"))
    head_inputs = 2 * parts["language_head"].linear
    assert decoder.model == tower + 3 * sum(parts["layers"]) + head_inputs


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("small", [SMALL, SMALL_HYBRID], ids=lambda small: small.family)
def test_train_flops_are_those_of_the_program(small, remat):
    config, backbone, bucket = small_case(small)
    config.optimizer.name, config.backbone.scan_unroll = "adam", 1  # quickly traced
    step, _, state, batch = traced(config, backbone, bucket, remat)
    found = products(step.trace(state, batch).jaxpr)
    ours = flops.train_flops(backbone, bucket, state.trainable, state.frozen, remat)
    parts = flops.forward_flops(backbone, bucket)
    rectangles = flops.forward_flops(backbone, bucket, causal=False)
    extra = sum(rectangles[n].attention - parts[n].attention for n in parts)
    extra *= 3 if remat == "none" else 4
    # what the program is traced with and the compiler drops: the pixels' gradient
    dropped = parts["patches"].linear
    assert found == ours.model + ours.again + extra + dropped + not_counted(backbone, bucket, 3, 2)


def test_forward_flops_are_those_that_xla_counts():
    config, backbone, bucket = small_case()
    _, evaluate, state, batch = traced(config, backbone, bucket)
    counted = evaluate.lower(state.trainable, state.frozen, batch).compile().cost_analysis()
    ours = sum(sum(part) for part in flops.forward_flops(backbone, bucket, causal=False).values())
    # XLA also counts what is no product: norms, softmax, rotations
    assert ours < counted["flops"] < 1.35 * ours
