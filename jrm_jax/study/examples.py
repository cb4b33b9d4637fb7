"""One HTML file, which needs nothing else: groups of `hard` that the arms order differently."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jrm_jax.data.schema import Image
from jrm_jax.data.world import scenes
from jrm_jax.evaluation.page import STYLE
from jrm_jax.study import analysis
from jrm_jax.study.cells import ARMS, Cell

SHOWN = 16  # groups


def page(config: ConfigDict, found: Mapping[Cell, Mapping[str, Any]]) -> str:
    """The document, of seed 0 at full data; '' where fewer than two arms are there."""
    chosen = {
        arm: found[cell]
        for arm in ARMS
        if (cell := Cell(arm, max(config.sizes), 1.0, 0)) in found
    }
    if len(chosen) < 2:
        return ""
    groups = disagreements(config, chosen)[:SHOWN]
    body = "".join(_group(config, chosen, index) for index in groups)
    title = "Where the arms disagree"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{STYLE} figure img {{ image-rendering: pixelated; }}</style><body>"
        f"<h1>{title}</h1><p class=faint>Groups of <i>hard</i>, seed 0, those with the largest "
        "difference between the arms' accuracies first. The first line below a picture is its gold "
        "score (0 to 100) and gold critique; then, for each arm, its score, with its place in the "
        f"group, and the critique that it writes where it has learnt to.</p>{body}</html>\n"
    )


def disagreements(config: ConfigDict, results: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """Groups that have critiques, those whose accuracies spread most over the arms first."""
    pairs = analysis.load_pairs("hard", config.world.hard, config.world.seed)
    kept = min(len(r["critiques"]) or config.measure.critiques for r in results.values())
    right_AN = np.stack([analysis.correct(pairs, r["scores/hard"]) for r in results.values()])
    spread = {}
    for group in np.unique(pairs.group[pairs.group < kept]):
        accuracy_A = right_AN[:, pairs.group == group].mean(1)
        spread[int(group)] = float(np.ptp(accuracy_A))
    return sorted((g for g in spread if spread[g] > 0), key=lambda g: (-spread[g], g))


def _group(config: ConfigDict, results: Mapping[str, Mapping[str, Any]], index: int) -> str:
    seed = config.world.seed
    example = scenes.make_example("hard", index, seed)
    group = scenes.make_group("hard", index, seed)
    words, source = example.prompt
    figures = [_figure(source, "source")]
    for k, candidate in enumerate(example.candidates):
        lines = [f"<b>gold {group.attempts[k].gold.overall}</b> {_text(candidate.critique)}"]
        for arm, result in results.items():
            scores = result["scores/hard"][index]
            if scores[k] is None:
                shown = "no score"
            else:
                place = 1 + sum(s is not None and s > scores[k] for s in scores)
                shown = f"{scores[k]:+.2f} (place {place})"
            lines.append(f"<b>{arm}</b> {shown}")
            if result["critiques"]:
                lines.append(f"<span class=faint>{_text(result['critiques'][index][k])}</span>")
        figures.append(_figure(candidate.parts[0], "<br>".join(lines)))
    return (
        f"<div class=case><p><b>{_text(words.text)}</b> <span class=faint>{_text(example.id)}"
        f"</span></p><div class=row>{''.join(figures)}</div></div>"
    )


def _figure(picture: Image, caption: str) -> str:
    data = base64.b64encode(picture.data).decode()
    return (
        f"<figure><img alt='' src='data:image/png;base64,{data}'>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _text(words: str) -> str:
    return html.escape(words).replace("\n", "<br>")
