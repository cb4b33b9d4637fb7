"""EditReward-Bench of TIGER-Lab: groups of 2, 3 and 4 edits, whole orders counted.

(EditScore's benchmark of the same name is `editscore.py`; their numbers cannot be compared.)

On disk, either EditReward_Bench_{2,3,4}pair.json (a group per entry: prompt, path_src,
paths_generated, human_vote.ranking such as 'C>A>B') or the Hugging Face rows (a pair per row:
dataset '2pair'.., id, comparison_type 'AvsC', ranking 'C>A', candidate_1, candidate_2), parquet or
JSON. Predictions: the detailed log of eval_bench.py (scores), or the 'results' of
inference_{2,3,4}pair_hf.py (votes).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import combinations
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
    digest,
    note_duplicates,
)
from jrm_jax.evaluation.metrics import verdicts

SIZES = {2: "2-Pair", 3: "3-Pair", 4: "4-Pair"}
LETTERS = "ABCD"
UNREADABLE = 9  # a verdict that agrees with no label
TIES = ("A=B=Good", "A=B=Bad", "A=B")
PROTOCOL = (
    "Strict accuracy: a group is right if its whole order is people's order (a tie: if the scores"
    " differ by no more than the threshold); Overall is right groups / groups. Ours: the threshold"
    " comes from elsewhere (--tie_threshold, --tie_from; else 0). Published: tuned on the test"
    " groups themselves (eval_bench.py), which favours every model."
)


def read(path: str, issues: Issues) -> Benchmark:
    """
    Raises:
        UserError: no such files, or a row that lacks a field.
    """
    cases: list[Case] = []
    rows: list[tuple[dict, str, Path]] = []
    for file in files.find(path):
        for number, row in enumerate(files.read_rows(file)):
            where = f"{file}: row {number}"
            if "paths_generated" in row:
                cases.append(_group(row, number, where, file, issues))
            elif "comparison_type" in row or "candidate_1" in row:
                rows.append((row, where, file))
            else:
                raise UserError(f"{where}: has neither 'paths_generated' nor 'candidate_1'")
    cases += _groups_of_rows(rows, issues)
    return Benchmark("editreward_bench", cases, issues, PROTOCOL)


def _group(row: dict, number: int, where: str, file: Path, issues: Issues) -> Case:
    edits = files.field(row, "paths_generated", where, list)
    size = len(edits)
    if size not in SIZES:
        raise UserError(f"{where}: 'paths_generated' has {size} entries, must be 2, 3 or 4")
    vote = files.field(row, "human_vote", where, dict)
    ranking = vote.get("ranking", vote.get("preference"))
    order = _order(ranking, size)
    name = f"{SIZES[size]}/{number}"
    if ranking == "A=B":
        issues.add("bare 'A=B' (a tie here; the official script reads it otherwise)", name)
    if order is None:
        issues.add("ranking that cannot be read (the group counts as wrong)", f"{name}: {ranking}")
    prompt = str(files.field(row, "prompt", where))
    source = files.picture(files.field(row, "path_src", where), file.parent, f"{where} path_src")
    return Case(
        id=name,
        group=digest(prompt, source.key),
        section=SIZES[size],
        subtask="",
        prompt=(Text(prompt), source),
        candidates=tuple(
            (files.picture(edit, file.parent, f"{where} edit {i}"),) for i, edit in enumerate(edits)
        ),
        comparisons=_comparisons(order, size),
        fields={"ranking": ranking, "order": order, "prompt": prompt, "paths": list(edits)},
    )


def _order(ranking: Any, size: int) -> tuple[int, ...] | str | None:
    """Candidates from best to worst, 'tie', or None where it says neither."""
    text = str(ranking).replace(" ", "")
    if size == 2 and text in TIES:
        return "tie"
    if size == 2 and text == "A<B":
        return 1, 0
    places = tuple(LETTERS.find(letter) for letter in text.split(">"))
    return places if sorted(places) == list(range(size)) else None


def _comparisons(order: Any, size: int) -> tuple[Comparison, ...]:
    if order is None:
        return ()
    return tuple(
        Comparison(
            f"{LETTERS[i]}vs{LETTERS[j]}", i, j,
            0 if order == "tie" else (1 if order.index(i) < order.index(j) else -1),
        )
        for i, j in combinations(range(size), 2)
    )  # fmt: skip


# Hugging Face rows: all pairs of a group


def _groups_of_rows(rows: list[tuple[dict, str, Path]], issues: Issues) -> list[Case]:
    groups: dict[tuple[int, str], list[tuple[dict, str, Path]]] = {}
    for number, (row, where, file) in enumerate(rows):
        size = _size(row, where)
        name = str(files.field(row, "id", where))
        # as the official scripts cut them; a pair is a group of its own
        prefix = name.split("_")[0] if "_" in name else name[:10]
        prefix = f"{name}#{number}" if size == 2 else prefix
        groups.setdefault((size, prefix), []).append((row, where, file))
    note_duplicates(
        issues,
        [
            (f"{row.get('dataset')}: {row['id']}", str(row.get("ranking")))
            for row, _, _ in rows
        ],
    )
    return [_row_case(size, name, members, issues) for (size, name), members in groups.items()]


def _size(row: dict, where: str) -> int:
    match = re.match(r"([234])-?pair", str(row.get("dataset", "")), re.IGNORECASE)
    if match is None:
        raise UserError(f"{where}: field 'dataset' is {row.get('dataset')!r}, not 2pair .. 4pair")
    return int(match.group(1))


def _row_case(size: int, name: str, members: list, issues: Issues) -> Case:
    first, where, file = members[0]
    source = files.picture(files.field(first, "source_image", where), file.parent, where)
    instruction = str(files.field(first, "instruction", where))
    edits: dict[int, Any] = {}
    comparisons, ids = [], {}
    for row, where, file in members:
        kind = str(row.get("comparison_type") or "AvsB")
        match = re.fullmatch(r"([ABCD])vs([ABCD])", kind)
        if match is None:
            raise UserError(f"{where}: field 'comparison_type' is {kind!r}, not like 'AvsB'")
        i, j = (LETTERS.index(letter) for letter in match.groups())
        for place, column in ((i, "candidate_1"), (j, "candidate_2")):
            value = files.field(row, column, where)
            edits.setdefault(place, files.picture(value, file.parent, f"{where} {column}"))
        label = _label(str(row.get("ranking")), LETTERS[i], LETTERS[j])
        if label is None:
            issues.add("ranking that cannot be read (the group counts as wrong)", f"{where}: {row}")
        number = sum(c.id.split("#")[0] == kind for c in comparisons)
        key = kind if not number else f"{kind}#{number}"
        ids[key] = str(row["id"])
        comparisons.append(Comparison(key, i, j, 2 if label is None else label))
    if len({c.id.split("#")[0] for c in comparisons}) != size * (size - 1) // 2:
        issues.add("group without all of its pairs (counts as wrong)", f"{SIZES[size]}/{name}")
    order = {place: rank for rank, place in enumerate(sorted(edits))}
    return Case(
        id=f"{SIZES[size]}/{name}",
        group=digest(instruction, source.key),
        section=SIZES[size],
        subtask="",
        prompt=(Text(instruction), source),
        candidates=tuple((edits[place],) for place in sorted(edits)),
        comparisons=tuple(c._replace(first=order[c.first], second=order[c.second])
                          for c in comparisons),
        fields={"ids": ids, "rows": True},
    )  # fmt: skip


def _label(ranking: str, first: str, second: str) -> int | None:
    text = ranking.replace(" ", "")
    if text in TIES or text == f"{first}={second}":
        return 0
    return {f"{first}>{second}": 1, f"{second}<{first}": 1,
            f"{second}>{first}": -1, f"{first}<{second}": -1}.get(text)  # fmt: skip


# Predictions


def write(judged: Sequence[Judged], out: Path, model: str, threshold: float = 0.0) -> None:
    """detailed_log.json for whole groups; <k>pair_hf.json for rows of pairs."""
    logs = [_log(case, answer) for case, answer in judged if "rows" not in case.fields]
    if logs:
        (out / "detailed_log.json").write_text(json.dumps(logs, indent=2))
    for size, section in SIZES.items():
        results = []
        for item in verdicts(judged, threshold if size == 2 else -1.0):
            case, answer = item.judged
            if case.section != section or "rows" not in case.fields:
                continue
            kind = item.comparison.id.split("#")[0]
            a, b = kind.split("vs")
            results.append(
                {
                    "id": case.fields["ids"][item.comparison.id],
                    "comparison_type": kind,
                    "human_vote": _words(item.comparison.label, a, b),
                    "model_vote": _words(item.said, a, b),
                    "is_correct": bool(item.right),
                    "reward_1": answer.scores[item.comparison.first],
                    "reward_2": answer.scores[item.comparison.second],
                }
            )
        if results:
            content = {"model_name": model, "data_type": f"huggingface_{size}pair",
                       "results": results}  # fmt: skip
            (out / f"{size}pair_hf.json").write_text(json.dumps(content, indent=2))


def _words(verdict: int, a: str, b: str) -> str:
    return {1: f"{a}>{b}", -1: f"{b}>{a}", 0: f"{a}={b}"}.get(verdict, "Unknown")


def _log(case: Case, answer: Answer) -> dict[str, Any]:
    ranks = sorted(range(len(answer.scores)), key=lambda i: -answer.scores[i])
    order = case.fields["order"]
    right = order != "tie" and order is not None and list(order) == ranks
    return {
        "file_name": case.section,
        "sample_index": int(case.id.split("/")[1]),
        "prompt": case.fields["prompt"],
        "ground_truth": case.fields["ranking"],
        "strict_accuracy_correct": right,
        "model_outputs": [
            {"path": path, "score": score, "predicted_rank": ranks.index(i) + 1}
            for i, (path, score) in enumerate(
                zip(case.fields["paths"], answer.scores, strict=True)
            )
        ],
    }


def read_predictions(benchmark: Benchmark, paths: Sequence[str]) -> list[Judged]:
    """
    Raises:
        UserError: files that are neither a detailed log nor results of votes.
    """
    by_id = {case.id: case for case in benchmark.cases}
    scored: dict[str, tuple[float, ...]] = {}
    votes: dict[str, dict[str, list[int]]] = {}
    for path in (file for given in paths for file in files.find(given, (".json",))):
        content = files.read_json(path)
        if isinstance(content, dict) and isinstance(content.get("results"), list):
            _read_votes(content["results"], path, benchmark, votes)
            continue
        for number, row in enumerate(files.as_list(content, path)):
            where = f"{path}: entry {number}"
            outputs = files.field(row, "model_outputs", where, list)
            scores = tuple(files.number(output, "score", where) for output in outputs)
            section, place = (files.field(row, k, where) for k in ("file_name", "sample_index"))
            name = f"{section}/{place}"
            case = by_id.get(name)
            if case is None:
                benchmark.issues.add("prediction for an id that is not in the benchmark", name)
            elif len(scores) != len(case.candidates):
                raise UserError(f"{where}: {len(scores)} scores for {len(case.candidates)} edits")
            elif name in scored:
                benchmark.issues.add("second prediction for an id (the first counts)", name)
            else:
                scored[name] = scores
    judged = [Judged(by_id[name], Answer(scores)) for name, scores in scored.items()]
    return judged + [Judged(by_id[name], Answer(None, said)) for name, said in votes.items()]


def _read_votes(results: list, path: Path, benchmark: Benchmark, votes: dict) -> None:
    known: dict[tuple[str, str], list[tuple[Case, Comparison]]] = {}
    for case in benchmark.cases:
        for comparison in case.comparisons:
            key = case.fields.get("ids", {}).get(comparison.id), comparison.id.split("#")[0]
            known.setdefault(key, []).append((case, comparison))
    used: dict[tuple[str, str], int] = {}
    for number, row in enumerate(results):
        if row is None:
            benchmark.issues.add("failed call (leaves the denominator, as officially)", number)
            continue
        where = f"{path}: results[{number}]"
        name = str(files.field(row, "id", where))
        key = name, str(row.get("comparison_type") or "AvsB")
        # duplicated ids: their rows come in the same order in both files
        place = used[key] = used.get(key, -1) + 1
        if place >= len(known.get(key, ())):
            benchmark.issues.add("prediction for an id that is not in the benchmark", "/".join(key))
            continue
        case, comparison = known[key][place]
        a, b = key[1].split("vs")
        said = _label(str(row.get("model_vote")), a, b)
        if said is None:
            words = f"{where}: {row.get('model_vote')}"
            benchmark.issues.add("vote that cannot be read (wrong)", words)
        said = UNREADABLE if said is None else said
        votes.setdefault(case.id, {}).setdefault(comparison.id, []).append(said)
