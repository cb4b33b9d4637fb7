"""Predictions for TIGER-Lab's EditReward-Bench, written and read as its own scripts do.

Groups: detailed_log.json of eval_bench.py, with scores. Hugging Face rows:
<model>_pairwise_<K>pair_<K>pair_hf.json of inference_<K>pair_hf.py, with votes; a row's place in
`results` is its place among the rows of K, and null stands for a row without an answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jrm_jax.evaluation import files
from jrm_jax.evaluation.cases import Answer, Benchmark, Case, Comparison, Judged
from jrm_jax.evaluation.metrics import verdicts
from jrm_jax.evaluation.predictions import UNKNOWN, Collected, entries
from jrm_jax.evaluation.tiger import SIZES, read_vote
from jrm_jax.evaluation.tiger_metrics import official_right, tuned_threshold

UNREADABLE = 9  # a verdict that agrees with no label
DATA = "TIGER-Lab/EditReward-Bench"


def write(judged: Sequence[Judged], out: Path, model: str, threshold: float = 0.0) -> None:
    """Both kinds of files, for what there is. threshold: for ties in votes about two edits."""
    groups = [one for one in judged if "rows" not in one.case.fields]
    if groups:
        tuned = tuned_threshold([one for one in groups if one.case.section == SIZES[2]])
        logs = [_log(one, tuned) for one in groups]
        text = json.dumps(logs, indent=2, ensure_ascii=False)
        (out / "detailed_log.json").write_text(text, encoding="utf-8")
    for size, section in SIZES.items():
        rows = [one for one in judged if one.case.section == section and "rows" in one.case.fields]
        results = _votes(rows, threshold if size == 2 else -1.0)
        if not results:
            continue
        answered = [result for result in results if result is not None]
        right = sum(result["is_correct"] for result in answered)
        template = f"pairwise_{size}pair"
        content = {
            "model_name": model, "template": template, "dataset_name": DATA,
            "total_examples": len(answered), "correct_examples": right,
            "individual_accuracy" if size > 2 else "accuracy": right / len(answered),
            "data_type": f"huggingface_{size}pair", "results": results,
        }  # fmt: skip
        path = out / f"{model.strip('/')}_{template}_{size}pair_hf.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _log(one: Judged, tuned: float) -> dict[str, Any]:
    """An entry of the detailed log; equal scores are ranked the last first, as numpy sorts."""
    case, scores = one.case, one.answer.scores
    order = np.argsort(scores)[::-1].tolist()
    return {
        "file_name": case.section,
        "sample_index": int(case.id.split("/")[1]),
        "prompt": case.fields["prompt"],
        "ground_truth": case.fields["vote"].get("preference", "N/A"),
        "strict_accuracy_correct": official_right(one, tuned),
        "model_outputs": [
            {"path": path, "score": score, "predicted_rank": order.index(i) + 1}
            for i, (path, score) in enumerate(zip(case.fields["paths"], scores, strict=True))
        ],
    }


def _votes(judged: Sequence[Judged], threshold: float) -> list[dict[str, Any] | None]:
    """The rows' votes, each at its place."""
    found: dict[int, dict[str, Any]] = {}
    for item in verdicts(judged, threshold):
        case, answer = item.judged
        row = case.fields["rows"][item.comparison.id]
        kind = item.comparison.id.split("#")[0]
        vote = _words(item.said, *kind.split("vs"))
        found[row["place"]] = {
            "id": row["id"],
            "instruction": case.fields["instruction"],
            "comparison_type": kind,
            "human_vote": row["ranking"],
            "model_vote": vote,
            "is_correct": row["ranking"] == vote,  # as published, so a label with blanks is wrong
            "reward_1": answer.scores[item.comparison.first],
            "reward_2": answer.scores[item.comparison.second],
        }
    return [found.get(place) for place in range(max(found, default=-1) + 1)]


def _words(verdict: int, a: str, b: str) -> str:
    return {1: f"{a}>{b}", -1: f"{b}>{a}", 0: f"{a}={b}"}[verdict]


def read_predictions(benchmark: Benchmark, paths: Sequence[str]) -> list[Judged]:
    """
    Raises:
        UserError: files that are neither a detailed log nor results of votes.
    """
    scored = Collected(benchmark)
    votes: dict[str, dict[str, list[int]]] = {}
    for path in (file for given in paths for file in files.find(given, (".json",))):
        content = files.read_json(path)
        if isinstance(content, dict) and isinstance(content.get("results"), list):
            _read_votes(content["results"], path, benchmark, votes)
            continue
        for row in entries([path], (".json",), benchmark.issues):
            outputs = row.field("model_outputs", list)
            scores = [o.get("score") if isinstance(o, dict) else None for o in outputs]
            name = "/".join(str(row.field(k)) for k in ("file_name", "sample_index"))
            scored.add(name, scores, row.where)
    by_id = {case.id: case for case in benchmark.cases}
    voted = [Judged(by_id[name], Answer(None, said)) for name, said in votes.items()]
    return scored.close() + voted


def _read_votes(results: list, path: Path, benchmark: Benchmark, votes: dict) -> None:
    known: dict[tuple[str, str], dict[int, tuple[Case, Comparison]]] = {}
    for case in benchmark.cases:
        for comparison in case.comparisons if "rows" in case.fields else ():
            row = case.fields["rows"][comparison.id]
            key = row["id"], comparison.id.split("#")[0]
            known.setdefault(key, {})[row["place"]] = case, comparison
    whole = files.Row({}, str(path), path.parent)
    for number, result in enumerate(results):
        if result is None:
            benchmark.issues.add("failed call (leaves the denominator, as officially)", number)
            continue
        row = whole.inner(result, f"results[{number}]")
        key = str(row.field("id")), str(result.get("comparison_type") or "AvsB")
        rows = known.get(key)
        if not rows:
            benchmark.issues.add(UNKNOWN, "/".join(key))
            continue
        # an id may stand for several rows: that at the same place is meant, else the next
        case, comparison = rows.pop(number if number in rows else min(rows))
        said = read_vote(result.get("model_vote"), *key[1].split("vs"))
        if said is None:
            words = f"{row.where}: {result.get('model_vote')}"
            benchmark.issues.add("vote that cannot be read (wrong)", words)
        said = UNREADABLE if said is None else said
        votes.setdefault(case.id, {}).setdefault(comparison.id, []).append(said)
