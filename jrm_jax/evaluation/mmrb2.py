"""Multimodal RewardBench 2 (Meta): pairs of four tasks, judged in both orders.

On disk, as its build script writes them: t2i.json, edit.json, interleaved.json, reasoning.json,
each {'pairs': [{id, prompt_source, prompt_content, response_a, response_b, chosen, ...}]} with
contents [['text' | 'image', value], ...]; *_response_only.json, which the repository ships, have no
prompts and can only be used with --predictions. Predictions: {id: {'forward': [{'judgement':
'A'|'B', ...}], 'reverse': [...]}}; in 'reverse' the two answers have changed places.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    Part,
    digest,
    note_duplicates,
    tell_apart,
)
from jrm_jax.evaluation.held import Spool
from jrm_jax.evaluation.metrics import Metric, Verdict, accuracy, sections, verdicts
from jrm_jax.evaluation.predictions import UNKNOWN, to_scores

TASKS = {"image": "t2i", "edit": "edit", "interleaved": "interleaved", "reasoning": "reasoning"}
LABELS = {"A": 1, "B": -1}
LETTERS = {1: "A", -1: "B"}
KINDS = ["text", "image"]
UNREADABLE = 2  # a label that no judgement agrees with
PROTOCOL = (
    "Each pair is judged twice, the second time with its answers swapped; accuracy is right"
    " judgements / judgements present (MMRB2's compute_accuracy.py). A reward model judges both"
    " orders alike; equal scores are answered with the first in both orders."
)


def read(path: str, issues: Issues, images: files.Images | None = None) -> Benchmark:
    """`path`: the benchmark's folder, or the file of one task.

    Raises:
        UserError: no such files, or a pair that lacks a field.
    """
    cases = []
    for task, file in _task_files(Path(path)):
        content = files.read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("pairs"), list):
            raise UserError(f"{file} must be an object with a list 'pairs'")
        whole = files.Row(content, str(file), file.parent, images, Spool())
        rows = [
            _case(task, whole.inner(pair, f"pairs[{number}]"), issues)
            for number, pair in enumerate(content["pairs"])
        ]
        note_duplicates(issues, [(c.id, LETTERS.get(c.comparisons[0].label)) for c in rows])
        cases += tell_apart(rows)
    return Benchmark("mmrb2", cases, issues, PROTOCOL)


def _task_files(path: Path) -> list[tuple[str, Path]]:
    if path.is_file():
        return [(_task_of(path), path)]
    found = []
    for task, stem in TASKS.items():
        for name in (f"{stem}.json", f"{stem}_response_only.json"):
            if (path / name).is_file():
                found.append((task, path / name))
                break
    if not found:
        names = ", ".join(f"{stem}.json" for stem in TASKS.values())
        raise UserError(f"{path} holds none of {names}: give the folder that MMRB2 was built into")
    return found


def _task_of(path: Path) -> str:
    """By the words of its name: 'gpt4_t2i', 'edit_images', 'image' (which stands for many things,
    so it is asked last)."""
    words = re.split(r"[^a-z0-9]+", path.stem.lower())
    for names in (TASKS.items(), zip(TASKS, TASKS, strict=True)):
        found = {task for task, name in names if any(word.startswith(name) for word in words)}
        if len(found) == 1:
            return found.pop()
        if found:
            break
    raise UserError(f"{path.name}: the name must tell one task ({', '.join(TASKS.values())})")


def _case(task: str, row: files.Row, issues: Issues) -> Case:
    pair = row.fields
    name = pair["id"] if "id" in pair else row.field("pair_id")
    # the benchmark's README calls three fields otherwise than its code
    chosen = pair["human_preference"] if "human_preference" in pair and "chosen" not in pair else (
        row.field("chosen")
    )  # fmt: skip
    label = _label(chosen)
    if not label:
        issues.add("pair whose 'chosen' is neither A nor B (always counted as wrong)", name)
    prompt = _parts(pair.get("prompt_content") or [], row)
    sides = [row.field(side, dict) for side in ("response_a", "response_b")]
    _check_annotations(pair, chosen, name, issues)
    return Case(
        id=str(name),
        group=digest(task, [p if isinstance(p, Text) else p.key for p in prompt] or name),
        section=task,
        subtask=str(pair.get("prompt_source", "")),
        prompt=prompt,
        candidates=tuple(_parts(side.get("response_content") or [], row) for side in sides),
        comparisons=(Comparison("pair", 0, 1, label or UNREADABLE),),
        names=tuple(str(side.get("model_name", side.get("model", ""))) for side in sides),
        fields={"images": sum(not isinstance(part, Text) for part in prompt)},
    )


def _label(letter: Any) -> int:
    """1 for A, -1 for B, 0 for anything else."""
    return LABELS.get(letter, 0) if isinstance(letter, str) else 0


def _check_annotations(pair: dict, chosen: str, name: Any, issues: Issues) -> None:
    given = pair.get("human_annotations")
    if not isinstance(given, list) or not all(isinstance(x, int | float) for x in given):
        return
    if given and (sum(given) > 3.5 * len(given)) != (chosen == "A"):
        issues.add("pair whose 'chosen' contradicts the mean of its annotations", name)


def _parts(content: Any, row: files.Row) -> tuple[Part, ...]:
    parts: list[Part] = []
    for item in content if isinstance(content, list | tuple) else [None]:
        if not isinstance(item, list | tuple) or len(item) != 2 or item[0] not in KINDS:
            raise UserError(f"{row.where}: content must be [['text' or 'image', value], ...]")
        kind, value = item
        if kind == "image":
            parts.append(row.picture(value, "picture"))
        elif value:
            parts.append(Text(str(value)))
    return tuple(parts)


def write(judged: Sequence[Judged], out: Path, model: str, threshold: float = 0.0) -> None:
    """<task>.json for each task, as MMRB2's own evaluate.py writes them."""
    for task, items in sections(judged, lambda one: one.case.section).items():
        content = {}
        for case, answer in items:
            forward, turned = _both_orders(answer)["pair"]
            letters = (("forward", LETTERS[forward]), ("reverse", LETTERS[-turned]))
            rewards = {"reward_a": answer.scores[0], "reward_b": answer.scores[1]}
            content[case.id] = {
                side: [{"judgement": letter, "evaluator": model, "metadata": rewards}]
                for side, letter in letters
            }
        (out / f"{TASKS[task]}.json").write_text(json.dumps(content, indent=2))


def read_predictions(benchmark: Benchmark, paths: Sequence[str]) -> list[Judged]:
    """One file per task present, by name or in the order of the tasks; or their folder.

    Raises:
        UserError: a file that is no predictions, or no file for a task.
    """
    tasks = list(dict.fromkeys(case.section for case in benchmark.cases))
    judged, issues = [], benchmark.issues
    for task, path in _prediction_files(tasks, [Path(path) for path in paths]):
        content = files.read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path} must be an object of ids with 'forward' and 'reverse'")
        cases = [case for case in benchmark.cases if case.section == task]
        known = {name for case in cases for name in (case.id, case.given)}
        for name in content:
            if name not in known:
                issues.add(UNKNOWN, f"{task}: {name}")
        for case in cases:
            # officially an id's entry counts for all pairs that have the id
            entry = content.get(case.id, content.get(case.given or case.id))
            if entry is None:
                continue  # counted as missing by the caller
            votes, scores = _votes(entry, f"{path}: {case.id}", issues)
            judged.append(Judged(case, Answer(scores, {"pair": votes})))
    return judged


def _prediction_files(tasks: list[str], paths: list[Path]) -> list[tuple[str, Path]]:
    if len(paths) == 1 and paths[0].is_dir():
        paths = files.find(paths[0], (".json",))
        found = [(_task_of(path), path) for path in paths if _task_of(path) in tasks]
    elif len(paths) == len(tasks) == 1:
        return [(tasks[0], paths[0])]
    else:
        try:
            found = [(_task_of(path), path) for path in paths]
        except UserError:
            if len(paths) != len(tasks):
                raise
            found = list(zip(tasks, paths, strict=True))  # names that tell nothing: in their order
    known: dict[str, Path] = {}
    for task, path in found:
        if (other := known.setdefault(task, path)) != path:
            raise UserError(f"{other} and {path} are both of task {TASKS[task]}: give one of them")
    return found


def _votes(entry: Any, where: str, issues: Issues) -> tuple[list[int], tuple | None]:
    """Verdicts as the official script counts them: the first judgement of each order."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be an object with 'forward' and 'reverse'")
    votes, scores = [], None
    for side, sign in (("forward", 1), ("reverse", -1)):
        given = entry.get(side) or []
        if not isinstance(given, list) or (given and not isinstance(given[0], dict | None)):
            raise UserError(f"{where}: {side!r} must be a list of objects with 'judgement'")
        first = (given[0] if given else None) or {}
        letter = first.get("judgement")
        if not letter:
            issues.add("judgement that is missing (leaves the denominator)", f"{where}: {side}")
            continue
        if not _label(letter):
            issues.add("judgement that is neither A nor B (wrong)", f"{where}: {letter!r}")
        votes.append(sign * _label(letter))
        rewards = first.get("metadata")
        if isinstance(rewards, dict) and {"reward_a", "reward_b"} <= set(rewards):
            both = [rewards["reward_a"], rewards["reward_b"]]
            scores = to_scores(both, where, issues, "reward that is no number (the votes count)")
    return votes, scores


def measure(benchmark: Benchmark, judged: Sequence[Judged], threshold: float) -> list[Metric]:
    """Official accuracies, by task and source; what the official denominator leaves out beside."""
    # the verdicts count, scores are only for showing
    said = verdicts([Judged(case, Answer(None, _both_orders(answer))) for case, answer in judged])
    wanted = sections(benchmark.cases, lambda case: case.section)
    by_task = sections(said, _task)
    metrics = []
    if len(wanted) > 1:
        metrics += _with_missing("all tasks", said, 2 * len(benchmark.cases), headline=True)
    for task, cases in wanted.items():
        items, total = by_task.get(task, []), 2 * len(cases)
        metrics += _with_missing(task, items, total, headline=True)
        metrics.append(_consistency(task, items))
        sources = sections(cases, lambda case: case.subtask)
        found = sections(items, lambda item: item.judged.case.subtask)
        metrics += [
            accuracy(f"{task} / {name}", "accuracy", found.get(name, []), total=2 * len(members))
            for name, members in sources.items()
        ]
        metrics += _subsets(task, cases, items)
    return metrics


def _both_orders(answer: Answer) -> dict[str, list[int]]:
    if answer.votes is not None:
        return answer.votes
    gap = answer.scores[0] - answer.scores[1]
    return {"pair": [1 if gap >= 0 else -1, -1 if gap <= 0 else 1]}


def _task(item: Verdict) -> str:
    return item.judged.case.section


def _with_missing(section: str, items: list[Verdict], total: int, **more) -> list[Metric]:
    found = [accuracy(section, "accuracy", items, total=total, official=True, **more)]
    if len(items) < total:
        one = accuracy(section, "accuracy, missing judgements wrong", items, total=total)
        gone = [f"missing {number}" for number in range(total - len(items))]
        found.append(
            one._replace(
                values=[*one.values, *(0.0 for _ in gone)],
                groups=[*one.groups, *gone],
                ids=[*one.ids, *gone],
                note=f"{len(gone)} of {total} judgements are missing",
            )
        )
    return found


def _consistency(section: str, items: list[Verdict]) -> Metric:
    pairs = [
        (a, b)
        for a, b in zip(items, items[1:], strict=False)
        if a.judged.case is b.judged.case
    ]
    return Metric(
        section,
        "same answer in both orders",
        [float(a.said == b.said != 0) for a, b in pairs],
        [a.judged.case.group for a, _ in pairs],
        [a.judged.case.id for a, _ in pairs],
    )


def _subsets(task: str, cases: list[Case], items: list[Verdict]) -> list[Metric]:
    """Prompts with one picture or several (published apart), and pairs of one model."""
    tests = {
        "one input picture": lambda case: case.fields["images"] == 1,
        "several input pictures": lambda case: case.fields["images"] > 1,
        "two answers of one model": lambda case: bool(case.names[0])
        and case.names[0] == case.names[1],
    }
    metrics = []
    for name, test in tests.items():
        inside = [case for case in cases if test(case)]
        if inside and len(inside) < len(cases):
            found = [item for item in items if test(item.judged.case)]
            metrics.append(accuracy(f"{task} / {name}", "accuracy", found, total=2 * len(inside)))
    return metrics
