"""GenAI-Bench (image editing), AURORA and ImagenHub, as EditReward's evaluation reads them.

A row is a pair of edits {prompt, path_src, path1, path2, model{1,2}_dim1_score}, or one edit with a
rating: {instruction, input_path, output_path, score, model} (ImagenHub), {prompt, input, gen,
score, model} (AURORA, pointwise). GenAI-Bench's own rows {instruct_prompt, source_image,
left_output_image, right_output_image, vote_type} are read too. These benchmarks have no official
file of predictions: ours repeats the row's place with its scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jrm_jax.data.schema import Text
from jrm_jax.errors import UserError
from jrm_jax.evaluation import files
from jrm_jax.evaluation.cases import (
    Benchmark,
    Case,
    Comparison,
    Issues,
    Judged,
    digest,
    note_duplicates,
)
from jrm_jax.evaluation.metrics import Metric, accuracy, strict, verdicts
from jrm_jax.evaluation.predictions import Collected, entries
from jrm_jax.evaluation.statistics import (
    fisher_mean,
    published_mean,
    spearman,
    tune_threshold,
)

# kind of row: (instruction, source, candidates)
COLUMNS = {
    "pair": ("prompt", "path_src", ("path1", "path2")),
    "vote": ("instruct_prompt", "source_image", ("left_output_image", "right_output_image")),
    "imagenhub": ("instruction", "input_path", ("output_path",)),
    "aurora": ("prompt", "input", ("gen",)),
}
VOTES = {"leftvote": 1, "rightvote": -1, "tievote": 0, "tie": 0, "bothbad_vote": 0, "bothbad": 0}
PAIRS, RATINGS = "pairs", "ratings"
CORRELATIONS = "spearman.json"
PROTOCOL = (
    "Pairs: people prefer the edit with the larger first-dimension score. Accuracy with ties has"
    " three answers; ours takes the threshold from elsewhere, the published one tunes it on these"
    " pairs (Deutsch et al.). Ratings: Spearman's rho within each editor; ours averages them by"
    " Fisher's z, published ImagenHub numbers leave the atanh out, AURORA's are plain means."
)


def reader(name: str, kinds: Sequence[str]):
    """read(path, issues, images) of a benchmark that has these kinds of rows."""

    def read(path: str, issues: Issues, images: files.Images | None = None) -> Benchmark:
        rows = files.read_rows(path, images)
        cases = [_case(row, _kind(row, kinds), index) for index, row in enumerate(rows)]
        note_duplicates(
            issues,
            [(case.fields["name"], case.fields["label"]) for case in cases],
        )
        return Benchmark(name, cases, issues, PROTOCOL)

    return read


def _kind(row: files.Row, kinds: Sequence[str]) -> str:
    for kind in kinds:
        instruction, source, candidates = COLUMNS[kind]
        if all(name in row.fields for name in (instruction, source, *candidates)):
            return kind
    wanted = " or ".join(str([c[0], c[1], *c[2]]) for c in map(COLUMNS.get, kinds))
    raise UserError(f"{row.where}: needs the fields {wanted}; has {', '.join(row.fields)}")


def _case(row: files.Row, kind: str, index: int) -> Case:
    words, source_name, edit_names = COLUMNS[kind]
    fields = row.fields
    instruction = str(fields[words])
    source = row.picture(fields[source_name], source_name)
    edits = [row.picture(fields[name], name) for name in edit_names]
    rated = len(edits) == 1
    name = fields.get("id") or fields.get("filename") if not rated else None
    label = None if rated else _pair_label(row, kind)
    if rated:
        name = digest(instruction, source.key, edits[0].key, fields.get("model"))
        label = row.number("score")
    models = (str(fields.get("model", "unknown")),) if rated else (
        str(fields.get("model1", fields.get("left_model", ""))),
        str(fields.get("model2", fields.get("right_model", ""))),
    )  # fmt: skip
    return Case(
        id=str(index),
        group=digest(instruction, source.key),
        section=RATINGS if rated else PAIRS,
        subtask=models[0] if rated else str(fields.get("task_type", "")),
        prompt=(Text(instruction), source),
        candidates=tuple((edit,) for edit in edits),
        comparisons=() if rated else (Comparison("pair", 0, 1, label),),
        names=models,
        targets=(label,) if rated else None,
        fields={"name": str(name or digest(instruction, source.key, *(e.key for e in edits))),
                "label": label},
    )  # fmt: skip


def _pair_label(row: files.Row, kind: str) -> int:
    if kind == "vote":
        vote = str(row.fields.get("vote_type"))
        if vote not in VOTES:
            raise UserError(
                f"{row.where}: field 'vote_type' is {vote!r}, none of {', '.join(VOTES)}"
            )
        return VOTES[vote]
    first, second = (row.number(f"model{i}_dim1_score") for i in (1, 2))
    return (first > second) - (first < second)


def write(judged: Sequence[Judged], out: Path, model: str, threshold: float = 0.0) -> None:
    """predictions.json: [{'index', 'scores', ...}]; spearman.json as EditReward writes it."""
    rows = [
        {"index": int(case.id), "scores": list(answer.scores), "models": list(case.names)}
        for case, answer in judged
    ]
    (out / "predictions.json").write_text(json.dumps(rows, indent=1))
    rated = [one for one in judged if one.case.section == RATINGS]
    if rated:
        rhos = _rhos(_columns(rated)[0])
        names = list(dict.fromkeys(one.case.subtask for one in rated))
        content = dict(zip(names, rhos, strict=True)) | {"average": published_mean(rhos)}
        content = {k: v if math.isfinite(v) else None for k, v in content.items()}
        (out / CORRELATIONS).write_text(json.dumps(content, indent=2))


def read_predictions(benchmark: Benchmark, paths: Sequence[str]) -> list[Judged]:
    """Lists of {'index', 'scores'}.

    Raises:
        UserError: files of another shape.
    """
    found = Collected(benchmark)
    given = [file for path in paths for file in files.find(path, (".json", ".jsonl"))]
    own = [file for file in given if file.name != CORRELATIONS]
    for row in entries(own, (".json", ".jsonl"), benchmark.issues):
        found.add(str(row.field("index")), row.field("scores"), row.where)
    return found.close()


def measure(benchmark: Benchmark, judged: Sequence[Judged], threshold: float) -> list[Metric]:
    """Accuracies of the pairs, correlations of the ratings; whichever the files hold."""
    metrics = []
    for section, numbers in ((PAIRS, _of_pairs), (RATINGS, _of_ratings)):
        cases = [case for case in benchmark.cases if case.section == section]
        if cases:
            items = [one for one in judged if one.case.section == section]
            metrics += numbers(benchmark.name, items, len(cases), threshold)
    return metrics


def _of_pairs(name: str, items, total: int, threshold: float) -> list[Metric]:
    said = verdicts(items, threshold)
    free = strict(verdicts(items))
    one = accuracy(PAIRS, "accuracy with ties", said, total=total, headline=True,
                   note=f"ties where scores differ by <= {threshold:g}")  # fmt: skip
    values = np.array([(s.comparison.label, s.gap) for s in said]).reshape(-1, 2)
    best = tune_threshold(values[:, 0], values[:, 1], zero=False, whole=False)[0]
    tuned = one._replace(
        name="accuracy with ties, published rule", values=values, statistic=_published,
        official=True, headline=False,
        note=f"threshold for ties tuned on these very pairs, as published: {best:.6g}",
    )  # fmt: skip
    decided = sum(item.comparison.label != 0 for item in said)
    more = {"headline": True, "official": True, "note": f"{len(said) - decided} ties left out"}
    return [one, accuracy(PAIRS, "accuracy without ties", free, **more), tuned]


def _published(values_N2: np.ndarray) -> float:
    return tune_threshold(values_N2[:, 0], values_N2[:, 1], zero=False, whole=False)[1]


def _columns(items: Sequence[Judged]) -> tuple[np.ndarray, list[str]]:
    """[N, 4]: editor, prompt, prediction, people's score."""
    editors = list(dict.fromkeys(one.case.subtask for one in items))
    prompts = list(dict.fromkeys(one.case.group for one in items))
    rows = [
        (editors.index(c.subtask), prompts.index(c.group), answer.scores[0], c.targets[0])
        for c, answer in items
    ]
    return np.array(rows, float).reshape(-1, 4), editors


def _rhos(values_N4: np.ndarray, column: int = 0) -> list[float]:
    """Spearman's rho within each editor (column 0) or prompt (column 1)."""
    return [
        spearman(values_N4[values_N4[:, column] == which, 2],
                 values_N4[values_N4[:, column] == which, 3])
        for which in np.unique(values_N4[:, column])
    ]  # fmt: skip


def _fisher(values_N4: np.ndarray) -> float:
    return fisher_mean(_rhos(values_N4))


def _without_atanh(values_N4: np.ndarray) -> float:
    return published_mean(_rhos(values_N4))


def _plain(values_N4: np.ndarray) -> float:
    rhos = _rhos(values_N4)
    return sum(rhos) / len(rhos)


def _by_prompt(values_N4: np.ndarray) -> float:
    rhos = [rho for rho in _rhos(values_N4, 1) if math.isfinite(rho)]
    return float(np.mean(rhos)) if rhos else 0.0


def _scaled_by_prompt(values_N4: np.ndarray) -> float:
    scaled, people = [], []
    for which in np.unique(values_N4[:, 1]):
        inside = values_N4[values_N4[:, 1] == which]
        if len(inside) < 2:
            continue
        spread = inside[:, 2].std()
        gaps = inside[:, 2] - inside[:, 2].mean()
        scaled += (gaps / spread if spread > 1e-6 else np.zeros(len(inside))).tolist()
        people += inside[:, 3].tolist()
    rho = spearman(np.asarray(scaled), np.asarray(people))
    return rho if math.isfinite(rho) else 0.0


def _of_ratings(name: str, items, total: int, threshold: float) -> list[Metric]:
    values, editors = _columns(items)
    groups, ids = [one.case.group for one in items], [one.case.id for one in items]
    flat = [e for e, rho in zip(editors, _rhos(values), strict=True) if not math.isfinite(rho)]
    note = f"no correlation for {', '.join(flat)} (constant scores)" if flat else ""

    def metric(words: str, statistic, **more: Any) -> Metric:
        return Metric(RATINGS, words, values, groups, ids, statistic, total=total, **more)

    words = "Spearman, mean over editors by Fisher's z"
    metrics = [metric(words, _fisher, headline=True, note=note)]
    if name == "imagenhub":
        metrics += [
            metric("Spearman, published rule", _without_atanh, official=True,
                   note="tanh of the mean rho, without atanh: biased towards 0"),
            metric("Spearman within prompts, mean", _by_prompt, official=True,
                   note="published as version 2"),
            metric("Spearman of scores scaled by prompt", _scaled_by_prompt, official=True,
                   note="published as version 2"),
        ]  # fmt: skip
    else:
        metrics.append(
            metric("Spearman, published rule", _plain, official=True, note="plain mean of rho")
        )
    for place, editor in enumerate(editors):
        chosen = np.flatnonzero(values[:, 0] == place)
        metrics.append(
            Metric(f"{RATINGS} / {editor}", "Spearman", values[chosen],
                   [groups[i] for i in chosen], [ids[i] for i in chosen], _only, official=True)
        )  # fmt: skip
    return metrics


def _only(values_N4: np.ndarray) -> float:
    return spearman(values_N4[:, 2], values_N4[:, 3])
