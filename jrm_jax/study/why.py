"""Evidence of what the language loss does to a run: what the reward token's state says, which way
the two losses pull, how the losses went. Part of what `measure.py` keeps of a cell.

Letters: N candidates, D hidden width, F facts, J seen one of two halves.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jrm_jax import optim
from jrm_jax.data.buckets import make_buckets
from jrm_jax.data.pipeline import make_iterator
from jrm_jax.data.plan import EvalPlan, Source
from jrm_jax.data.world import facts, scenes
from jrm_jax.losses import combine, term_weights
from jrm_jax.model.backbone import Backbone
from jrm_jax.step import LossConfig, make_forward

# What a fact is about, by the beginning of its name: the table of the probe.
TOPICS = {
    "verdict": ("verdict",),
    "quality": ("quality",),
    "score line": ("following", "preservation"),
    "the edit asked for": ("first/", "second/"),
    "other changes": ("extra/", "more", "nothing else"),
}
RARE = 0.03  # a fact stated of fewer, or not stated of fewer, is left out
RIDGE = 0.1  # of the number of examples; states have deviation 1
GROUPS = 64  # whose gradients are taken


def read_training(workdir: Path) -> list[list[float | None]]:
    """[step, preference loss, language loss] of training, as logged; nats per pair and token."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    kept = (row for row in rows if row["split"] == "train")
    return [[r["step"], *(_short(r.get(name)) for name in ("preference", "language"))]
            for r in kept]  # fmt: skip


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


# What the state of the reward token says


def stated_facts(split: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """([N, F] bool, group of each [N]): what the critiques of a split state."""
    rows, groups = [], []
    for index in range(count):
        group = scenes.make_group(split, index, seed)
        for attempt in group.attempts:
            row = np.zeros(facts.COUNT, bool)
            said = facts.facts_of(
                group.source, attempt.scene, group.edits, attempt.gold, attempt.quality
            )
            row[list(said)] = True
            rows.append(row)
            groups.append(index)
    return np.array(rows), np.array(groups)


def probe_facts(states_ND: np.ndarray, facts_NF: np.ndarray, group_N: np.ndarray) -> dict:
    """By topic: mean area under the ROC curve of linear readers of single facts.

    Ridge regression on the states of the even groups, read off the odd ones; 0.5 is chance.
    """
    train_N = group_N % 2 == 0
    known, asked = states_ND[train_N], states_ND[~train_N]
    center, spread = known.mean(0), known.std(0) + 1e-8
    known, asked = (known - center) / spread, (asked - center) / spread
    target_JF = facts_NF[train_N].astype(np.float64)
    gram_DD = known.T @ known + RIDGE * len(known) * np.eye(known.shape[1])
    read_JF = asked @ np.linalg.solve(gram_DD, known.T @ (target_JF - target_JF.mean(0)))
    truth_JF = facts_NF[~train_N]
    shares_F = truth_JF.mean(0)
    found = {}
    for topic, starts in TOPICS.items():
        areas = [
            area_under_roc(read_JF[:, f], truth_JF[:, f])
            for f, name in enumerate(facts.FACTS)
            if name.startswith(starts) and RARE < shares_F[f] < 1 - RARE and target_JF[:, f].any()
        ]
        if areas:
            found[topic] = round(float(np.mean(areas)), 4)
    return found


def area_under_roc(score_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Chance that a true one scores above a false one; equal scores count one half."""
    from scipy.stats import rankdata

    true = int(truth_N.sum())
    false = len(truth_N) - true
    if not true or not false:
        return math.nan
    return float((rankdata(score_N)[truth_N].sum() - true * (true + 1) / 2) / (true * false))


# Which way the losses pull


def make_gradients(backbone: Backbone, mean: tuple, std: tuple, first_weight: float):
    """gradients(params, batch) -> {'preference', 'language'}: each loss's gradient in `params`."""

    def gradients(params: dict, batch: dict) -> dict[str, dict]:
        batch = {
            **batch,
            "critique_weights": batch["critique_weights"].at[..., 0].multiply(first_weight),
        }
        weights = term_weights(batch)

        def loss(params, name):
            terms = make_forward(backbone, mean, std, LossConfig())(params, batch).terms
            return combine({name: terms[name]}, {name: 1.0}, weights)

        return {name: jax.grad(loss)(params, name) for name in ("preference", "language")}

    return gradients


def compare_gradients(
    preference: dict[str, np.ndarray], language: dict[str, np.ndarray]
) -> dict[str, float]:
    """Of two losses' gradients in the same kernels, by path.

    Returns:
        'ratio': norm of the language gradient over that of the preference gradient. 'cosine'
        between the two. 'kept': cosine between what Muon makes of their sum and what it makes of
        the preference gradient alone (every matrix orthogonalised: Jordan et al., 2024), which is
        1 where the language loss does not turn the step.
    """
    dots, squares_p, squares_l, kept, rank = 0.0, 0.0, 0.0, 0.0, 0.0
    for path, gradient in preference.items():
        own, other = (np.asarray(x, np.float64) for x in (gradient, language[path]))
        dots += float((own * other).sum())
        squares_p += float((own**2).sum())
        squares_l += float((other**2).sum())
        alone, both = orthogonal(own), orthogonal(own + other)
        kept += float((alone * both).sum())
        rank += float((alone**2).sum())
    product = math.sqrt(squares_p * squares_l)
    return {
        "ratio": _short(math.sqrt(squares_l / squares_p)) if squares_p else math.nan,
        "cosine": _short(dots / product) if product else math.nan,
        "kept": _short(kept / rank),
    }


def orthogonal(matrices: np.ndarray) -> np.ndarray:
    """The nearest matrices with orthonormal rows or columns, over the last two axes."""
    left, _, right = np.linalg.svd(matrices, full_matrices=False)
    return left @ right


def kernels(tree: dict) -> dict[str, np.ndarray]:
    """What Muon updates: the backbone's kernels, by path."""
    return {p: np.asarray(x) for p, x in optim.flatten(tree).items() if optim.takes_muon(p)}


def pull(model: Any, params: dict) -> dict[str, float]:
    """`compare_gradients` on `GROUPS` groups of `valid` with their critiques, weighted as in the
    run; a loss that did not count there counts once."""
    encoder = dataclasses.replace(model.encoder, language=True)
    settings, size = model.card["config"]["loss"], model.settings.batch_size
    sizes = model.sizes["valid"]
    (bucket,) = make_buckets([sizes], language=True, merge=model.merge, candidate_cuts=())
    plan = EvalPlan([Source(sizes)], (bucket,), size, True)
    backbone = model.backbone.clone(scan_unroll=1)  # compiled once, run a few times
    mean, std = encoder.processor.mean, encoder.processor.std
    compute = jax.jit(make_gradients(backbone, mean, std, settings["first_weight"]))
    stop = min(len(plan), max(1, GROUPS // size))
    with make_iterator(plan, (model.records["valid"],), encoder, stop=stop) as batches:
        every = [compute(params, batch) for batch in batches]
    sums = []
    for name in ("preference", "language"):
        trees = [kernels(gradients[name]) for gradients in every]
        weight = settings[f"{name}_weight"] or 1.0
        sums.append({path: weight * sum(tree[path] for tree in trees) for path in trees[0]})
    return compare_gradients(*sums)
