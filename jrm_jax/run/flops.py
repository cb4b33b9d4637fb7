"""FLOPs of a step, counted from shapes: the matrix products, two per multiply-add.

Counted at a bucket's static sizes, padding included, also that of a Gated DeltaNet's chunks. Causal
attention counts the visible keys only, as splash skips the others; window layers count whole
images, as they run masked. The compiler's own count is no use here: it sees the body of a scan once
and no kernel at all.

Letters: K candidates, I images, N patch slots, P prompt slots, C candidate slots, T critique
targets of a candidate, S = P + K*C.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jrm_jax.data.buckets import Bucket, Cost
from jrm_jax.model.config import BackboneConfig, TextConfig
from jrm_jax.model.delta import CHUNK
from jrm_jax.optim import flatten


class Part(NamedTuple):
    """Forward FLOPs of a group: products with weights, attention's two products, and those of the
    gated delta rule, of which `inverse` turn triangles."""

    linear: int
    attention: int
    rule: int = 0
    inverse: int = 0


class StepFlops(NamedTuple):
    """FLOPs of a group: what the step is for, and what remat computes again."""

    model: int
    again: int


# Parts in the order of the forward pass: their kernels, and all parameters for whose gradient
# something must pass back through the part.
_KERNELS = {
    "patches": r"backbone/vision/patch_embed/kernel",
    "blocks": r"backbone/vision/blocks_\d+/.*kernel",
    "mergers": r"backbone/vision/(merger|deepstack_\d+)/.*kernel",
    "layers": r"backbone/decoder/.*kernel",
    "language_head": r"language_head/kernel",
}
_REACHED = {
    "patches": r"backbone/vision/(patch_embed|position)/.*",
    "blocks": r"backbone/vision/blocks_.*",
    "mergers": r"backbone/vision/(merger|deepstack_).*",
    "layers": r"(backbone/decoder/.*|backbone/embed/.*|reward_embedding)",
    "language_head": r"language_head/.*",
}
_REMAT = ("blocks", "layers")  # the stacks that `config.remat` is about


def forward_flops(backbone: BackboneConfig, bucket: Bucket, causal: bool = True) -> dict[str, Part]:
    """FLOPs of one group by part; `causal=False` counts attention's whole rectangles.

    The bucket's sizes may be arrays of whole numbers, of many buckets at once.
    """
    vision, text = backbone.vision, backbone.text
    K, I, N = bucket.candidates, bucket.images, bucket.patches
    P, C, T = bucket.prompt, bucket.candidate, bucket.critique
    S, d, D = P + K * C, vision.hidden, text.hidden
    matrices = 2 if vision.family == "qwen3_vl" else 3
    block = 4 * d * d + matrices * d * vision.mlp
    merger = (vision.merge**2 * d) * (vision.merge**2 * d + D)
    tokens = I * N // vision.merge**2
    heads, groups = text.heads * text.head_dim, text.kv_heads * text.head_dim
    attended = text.layers if text.delta is None else text.layers // text.delta.interval
    mixing = attended * ((3 if text.gated else 2) * D * heads + 2 * D * groups)
    if text.delta is not None:
        values = text.delta.value_heads * text.delta.value_dim
        width = text.delta.channels + 2 * text.delta.value_heads + 2 * values
        mixing += (text.layers - attended) * D * width
    rule = _rule_flops(text, bucket)

    def pairs(length: int) -> int:
        return length * (length + 1) // 2 if causal else length * length

    seen = pairs(P) + K * (C * P + pairs(C))
    return {
        "patches": Part(2 * I * N * vision.features * d, 0),
        "blocks": Part(2 * I * N * vision.depth * block, 4 * I * N * N * d * vision.depth),
        "mergers": Part(2 * tokens * merger * (1 + backbone.taps), 0),
        "layers": Part(
            2 * S * (mixing + text.layers * 3 * D * text.mlp),
            4 * seen * heads * attended,
            rule.forward,
            rule.inverse,
        ),
        "language_head": Part(2 * K * T * D * text.vocab, 0),
    }


def unshared(bucket: Bucket) -> Bucket:
    """What it is where every candidate begins with the prompt (`pipeline.repeat_prompt`)."""
    longer = bucket.candidate + bucket.prompt
    return dataclasses.replace(bucket, candidate=longer, prompt=0 * longer)


def group_cost(backbone: BackboneConfig, share_prompt: bool = True) -> Cost:
    """The forward FLOPs of a group as a function of its sizes, by which buckets are chosen.

    Training costs about three times as much, whatever the sizes. Without a shared prompt every
    candidate begins with its own.
    """

    def cost(sizes_m6: np.ndarray) -> np.ndarray:
        bucket = Bucket(*np.asarray(sizes_m6, np.int64).T)
        bucket = bucket if share_prompt else unshared(bucket)
        return sum(map(sum, forward_flops(backbone, bucket).values()))

    return cost


class _Rule(NamedTuple):
    """FLOPs of the gated delta rule in all layers: its products but for the inverses, the inverses,
    of these in the backward pass, and of the products that make outputs and next states."""

    forward: int = 0
    inverse: int = 0
    inverse_back: int = 0
    last: int = 0


def _rule_flops(text: TextConfig, bucket: Bucket) -> _Rule:
    """What every chunk of every layer and head costs in `model.delta.gated_delta`."""
    delta = text.delta
    if delta is None:
        return _Rule()
    d, e, L, V = delta.key_dim, delta.value_dim, CHUNK, delta.value_heads
    layers = text.layers - text.layers // delta.interval
    chunks = -(-bucket.prompt // L) + bucket.candidates * -(-bucket.candidate // L)
    doublings = L.bit_length() - 1
    one_layer = (
        delta.key_heads * 2 * L * L * d + V * (3 * L * d * e + 2 * L * L * e),
        V * 2 * doublings * L**3,
        V * 2 * L**3,
        V * (L * d * e + L * L * e),
    )
    return _Rule(*(2 * layers * chunks * products for products in one_layer))


def score_flops(backbone: BackboneConfig, bucket: Bucket) -> StepFlops:
    """Of a group in the score step."""
    return StepFlops(sum(map(sum, forward_flops(backbone, bucket).values())), 0)


def train_flops(
    backbone: BackboneConfig,
    bucket: Bucket,
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    remat: str,
    flash: bool = False,
) -> StepFlops:
    """Of a group in the train step. `flash`: attention is done by a kernel, whose results are
    kept unless `remat` is 'full'.

    A frozen kernel needs no gradient, and a part needs none for its input where nothing before it
    is trained. A tied head counts as its embedding table.
    """
    parts = forward_flops(backbone, bucket)
    sizes = {True: _sizes(trainable), False: _sizes(frozen)}
    vision, text = backbone.vision, backbone.text
    slots = bucket.prompt + bucket.candidates * bucket.candidate
    patches = bucket.images * bucket.patches
    # the last product of a layer makes its output, for which no gradient asks
    last = {
        "blocks": 2 * patches * vision.depth * vision.hidden * vision.mlp,
        "layers": 2 * slots * text.layers * text.hidden * text.mlp,
    }
    deltas = _rule_flops(text, bucket)
    model = again = 0
    before = False  # is anything up to here trained?
    for name, (linear, attention, rule, inverse) in parts.items():
        kernels = _KERNELS[name]
        if name == "language_head" and backbone.text.tie_embeddings:
            kernels = r"backbone/embed/embedding"
        own, rest = (_total(sizes[kind], kernels) for kind in (True, False))
        here = any(re.fullmatch(_REACHED[name], path) for path in sizes[True])
        share = own / max(1, own + rest)
        inputs = before or (here and name != "patches")
        model += linear + attention + rule + inverse + int(share * linear)
        model += inputs * (linear + 2 * (attention + rule) + (deltas.inverse_back if rule else 0))
        before = before or here
        if before and name in _REMAT:  # else nothing is kept for a backward pass
            remade = rule + inverse + (0 if flash else attention)
            gated = name == "layers" or vision.family != "qwen3_vl"
            again += {
                "none": 0,
                "dots": remade,
                "narrow": remade + last[name] * (1 + gated),
                "full": linear + attention + rule + inverse - last[name],
            }[remat]
            if rule:  # a chunk keeps nothing, whatever `remat` says
                again += rule + inverse - deltas.last
    return StepFlops(model, again)


def _sizes(tree: Mapping[str, Any]) -> dict[str, int]:
    return {path: leaf.size for path, leaf in flatten(tree).items()}


def _total(sizes: Mapping[str, int], pattern: str) -> int:
    return sum(size for path, size in sizes.items() if re.fullmatch(pattern, path))
