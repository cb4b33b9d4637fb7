"""EditReward-Bench of EditScore (BAAI): 13 subtasks, three dimensions, pairs of edits.

(TIGER-Lab's benchmark of the same name is `tiger.py`; their numbers cannot be compared.)

On disk: the Arrow folder that is downloaded, parquet or JSON lines with key (2 ids, the preferred
first), instruction, input_image, output_images (2), task_type, dimension. Predictions:
<task>/<dimension>.jsonl with key, idx, score.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jrm_jax.data.schema import Text
from jrm_jax.errors import UserError
from jrm_jax.evaluation import files
from jrm_jax.evaluation.cases import (
    Answer,
    Benchmark,
    Case,
    Comparison,
    Issues,
    Judged,
    digest,
    note_duplicates,
)
from jrm_jax.evaluation.metrics import Metric, accuracy, sections, verdicts
from jrm_jax.evaluation.predictions import entries, to_scores

DIMENSIONS = ("prompt_following", "consistency", "overall")
CATEGORIES = {
    "Subject": ("subject-add", "subject-remove", "subject-replace"),
    "Appearance": ("color_alter", "material_alter", "style_change", "tone_transfer"),
    "Scene": ("background_change", "extract"),
    "Advanced": ("ps_human", "text_change", "motion_change", "compose"),
}
TASKS = 13
UNKNOWN = "prediction for an id that is not in the benchmark (counted, as officially)"
PROTOCOL = (
    "A pair is right if the preferred edit's score is larger; equal scores are wrong. 'Average' is"
    " the unweighted mean over subtasks, per dimension (EditScore's calculate_statistics.py)."
    " Edits are resized to the source's size before they are judged."
)


def read(path: str | None, issues: Issues, images: files.Images | None = None) -> Benchmark:
    """Rows of a downloaded benchmark; None: only predictions are known.

    Raises:
        UserError: no such files, or a row that lacks a field.
    """
    rows = files.read_rows(path, images) if path else ()
    cases = [_case(row, index, issues) for index, row in enumerate(rows)]
    note_duplicates(issues, [(f"{c.subtask}/{c.dimension}/{_key(c)}", "") for c in cases])
    known = {(c.subtask, c.dimension, _key(c)) for c in cases}
    for case in cases:
        first, second = case.fields["key"]
        turned = (case.subtask, case.dimension, f"{second} > {first}")
        if turned in known and first < second:
            issues.add("id with contradicting labels", f"{'/'.join(turned[:2])}: {first}, {second}")
    return Benchmark("editscore_bench", cases, issues, PROTOCOL)


def _key(case: Case) -> str:
    return " > ".join(case.fields["key"])


def _case(row: files.Row, index: int, issues: Issues) -> Case:
    key = row.field("key", (list, tuple))
    edits = row.field("output_images", (list, tuple))
    if len(key) != 2 or len(edits) != 2:
        raise UserError(f"{row.where}: 'key' and 'output_images' must have two entries each")
    task, dimension = row.field("task_type", str), row.field("dimension", str)
    if dimension not in DIMENSIONS:
        issues.add("row of an unknown dimension", f"{row.where}: {dimension}")
    source = row.picture(row.field("input_image"), "source")
    # what `evaluation.py` writes beside its scores repeats the rows without their instructions
    instruction = str(row.fields.get("instruction") or "")
    return Case(
        id=f"{index}",
        group=digest(instruction, source.key),
        section=dimension,
        subtask=task,
        prompt=(Text(instruction), source) if instruction else (),
        candidates=tuple(
            (row.picture(edit, f"edit {i}", like=source),) for i, edit in enumerate(edits)
        ),
        comparisons=(Comparison("pair", 0, 1, 1),),
        dimension=dimension,
        names=tuple(map(str, key)),
        fields={"key": [str(key[0]), str(key[1])], "idx": row.fields.get("idx", index)},
    )


def write(judged: Sequence[Judged], out: Path, model: str, threshold: float = 0.0) -> None:
    """<task>/<dimension>.jsonl, anew (EditScore's own script appends)."""
    parts = sections(judged, lambda one: f"{one.case.subtask}/{one.case.dimension}.jsonl")
    for name, items in parts.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            {**case.fields, "score": list(answer.scores), "SC_reasoning": ["", ""],
             "PQ_reasoning": ["", ""], "model": model}
            for case, answer in items
        ]  # fmt: skip
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_predictions(benchmark: Benchmark, paths: Sequence[str]) -> list[Judged]:
    """The folder that holds <task>/<dimension>.jsonl; every line counts, as officially.

    Raises:
        UserError: no such files, or a line that lacks a field.
    """
    if len(paths) != 1 or not Path(paths[0]).is_dir():
        raise UserError("--predictions must be one folder that holds <task>/<dimension>.jsonl")
    issues, judged, seen = benchmark.issues, [], []
    by_key = {(c.subtask, c.dimension, _key(c)): c for c in benchmark.cases}
    beyond = {(c.subtask, c.dimension, _key(c)) for c in benchmark.cut}
    for path in files.find(paths[0], (".jsonl",)):
        task, dimension = path.parent.name, path.stem
        if dimension not in DIMENSIONS:
            issues.add("prediction file of an unknown dimension (not read)", path)
            continue
        for row in entries([path], (".jsonl",), issues):
            key = row.field("key", list)
            name = " > ".join(map(str, key))
            if (task, dimension, name) in beyond:
                continue
            scores = _scores(row, issues)
            case = by_key.get((task, dimension, name))
            if case is None:
                if benchmark.cases:
                    issues.add(UNKNOWN, f"{task}/{dimension}: {name}")
                case = Case(
                    id=f"{task}/{dimension}/{name}", group=digest(sorted(map(str, key))),
                    section=dimension, subtask=task, prompt=(), candidates=((), ()),
                    comparisons=(Comparison("pair", 0, 1, 1),), dimension=dimension,
                    names=tuple(map(str, key)), fields={"key": [str(k) for k in key]},
                )  # fmt: skip
            seen.append((f"{task}/{dimension}/{name}", ""))
            if scores is not None:
                judged.append(Judged(case, Answer(scores)))
    note_duplicates(issues, seen)
    if equal := sum(answer.scores[0] == answer.scores[1] for _, answer in judged):
        issues.add("equal scores (wrong by the official rule)", f"{equal} of {len(judged)} pairs")
    return judged


def _scores(row: files.Row, issues: Issues) -> tuple[float, ...] | None:
    given = row.field("score")
    if isinstance(given, list) and len(given) != 2:
        raise UserError(f"{row.where}: 'score' must be two numbers, is {given!r}")
    return to_scores(given, row.where, issues)


def _mean_of_tasks(values_N2: np.ndarray) -> float:
    """Columns: right, number of the subtask. Unweighted over the subtasks that are there."""
    tasks_N = values_N2[:, 1].astype(int)
    counts = np.bincount(tasks_N)
    rights = np.bincount(tasks_N, values_N2[:, 0])
    shares = (rights[counts > 0] / counts[counts > 0]).tolist()
    return sum(shares) / len(shares)  # in the official script's order, to the last digit


def measure(benchmark: Benchmark, judged: Sequence[Judged], threshold: float) -> list[Metric]:
    """Per dimension: the average, the pooled accuracy, categories, and each subtask."""
    metrics: list[Metric] = []
    said = verdicts(judged)
    totals = sections(benchmark.cases, lambda case: case.dimension)
    by_dimension = sections(said, lambda item: item.judged.case.dimension)
    for dimension in (d for d in DIMENSIONS if d in by_dimension or d in totals):
        items = by_dimension.get(dimension, [])
        wanted = sections(totals.get(dimension, []), lambda case: case.subtask)
        tasks = sections(items, lambda item: item.judged.case.subtask)
        names = sorted({*wanted, *tasks})
        complete = len(names) == TASKS
        note = "" if complete else f"over {len(names)} subtasks; the benchmark has {TASKS}"
        total = len(totals.get(dimension, items))
        more = {"official": True, "headline": True, "note": note, "total": total}
        metrics.append(_average(dimension, "Average", items, names, **more))
        metrics.append(
            accuracy(dimension, "accuracy over all pairs", items, total=total, headline=True)
        )
        for category, members in CATEGORIES.items():
            inside = [item for item in items if item.judged.case.subtask in members]
            if inside:
                metrics.append(
                    _average(f"{dimension} / {category}", "Average", inside, members, official=True)
                )
        metrics += [
            accuracy(
                f"{dimension} / {name}",
                "accuracy",
                tasks.get(name, []),
                total=len(wanted.get(name, tasks.get(name, []))),
                official=True,
            )
            for name in names
        ]
    return metrics


def _average(section: str, name: str, items, names: Sequence[str], **more: Any) -> Metric:
    one = accuracy(section, name, items)
    place = {task: i for i, task in enumerate(names)}
    tasks = [place[item.judged.case.subtask] for item in items]
    values = np.stack([np.asarray(one.values, float), np.asarray(tasks, float)], axis=1)
    return one._replace(values=values, statistic=_mean_of_tasks, **more)
