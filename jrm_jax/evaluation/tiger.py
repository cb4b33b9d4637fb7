"""EditReward-Bench of TIGER-Lab: groups of 2, 3 and 4 edits, whole orders counted.

(EditScore's benchmark of the same name is `editscore.py`; their numbers cannot be compared.)

On disk, either EditReward_Bench_{2,3,4}pair.json (a group per entry: prompt, path_src,
paths_generated, human_vote.ranking such as 'C>A>B') or the Hugging Face rows (a pair per row:
dataset '2pair'.., id, comparison_type 'AvsC', ranking 'C>A', candidate_1, candidate_2), parquet or
JSON. Predictions are `tiger_predictions`, the published rule is in `tiger_metrics`.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from typing import Any

from jrm_jax.data.schema import Text
from jrm_jax.errors import UserError
from jrm_jax.evaluation import files
from jrm_jax.evaluation.cases import (
    Benchmark,
    Case,
    Comparison,
    Issues,
    digest,
    note_duplicates,
)

SIZES = {2: "2-Pair", 3: "3-Pair", 4: "4-Pair"}
LETTERS = "ABCD"
TIE = re.compile(r"(A=B|B=A)(=GOOD|=BAD)?")
PROTOCOL = (
    "Strict accuracy: a group is right if its whole order is people's order (a tie: if the scores"
    " differ by no more than the threshold); Overall is right groups / groups. Ours: the threshold"
    " comes from elsewhere (--tie_threshold, --tie_from; else 0). Published: tuned on the test"
    " groups themselves (eval_bench.py), which favours every model."
)


def read(path: str, issues: Issues, images: files.Images | None = None) -> Benchmark:
    """
    Raises:
        UserError: no such files, or a row that lacks a field.
    """
    cases: list[Case] = []
    rows: list[files.Row] = []
    counts: Counter[int] = Counter()
    for row in files.read_rows(path, images):
        if "paths_generated" in row.fields:
            edits = row.field("paths_generated", list)
            if not row.field("path_src") or not all(edits):
                issues.add("group without its pictures (left out, as officially)", row.where)
                continue
            # the official logs count the groups of each size that are left
            cases.append(_group(row, counts[len(edits)], issues))
            counts[len(edits)] += 1
        elif "comparison_type" in row.fields or "candidate_1" in row.fields:
            rows.append(row)
        else:
            raise UserError(f"{row.where}: has neither 'paths_generated' nor 'candidate_1'")
    cases += _groups_of_rows(rows, issues)
    return Benchmark("editreward_bench", cases, issues, PROTOCOL)


def _group(row: files.Row, number: int, issues: Issues) -> Case:
    edits = row.field("paths_generated", list)
    size = len(edits)
    if size not in SIZES:
        raise UserError(f"{row.where}: 'paths_generated' has {size} entries, must be 2, 3 or 4")
    vote = row.field("human_vote", dict)
    ranking = vote.get("ranking", vote.get("preference"))
    order = read_order(ranking, size)
    name = f"{SIZES[size]}/{number}"
    if _tidy(ranking) == "A=B":
        issues.add("bare 'A=B' (a tie here; the official script reads it otherwise)", name)
    if order is None:
        issues.add("ranking that cannot be read (the group counts as wrong)", f"{name}: {ranking}")
    prompt = str(row.field("prompt"))
    source = row.picture(row.field("path_src"), "path_src")
    return Case(
        id=name,
        group=digest(prompt, source.key),
        section=SIZES[size],
        subtask="",
        prompt=(Text(prompt), source),
        candidates=tuple((row.picture(edit, f"edit {i}"),) for i, edit in enumerate(edits)),
        comparisons=_comparisons(order, size),
        fields={"vote": vote, "order": order, "prompt": prompt, "paths": list(edits)},
    )


def _tidy(ranking: Any) -> str:
    """Without blanks, in capitals."""
    return "".join(str(ranking).split()).upper()


def read_order(ranking: Any, size: int) -> tuple[int, ...] | str | None:
    """Candidates from best to worst, 'tie', or None where the text says neither.

    What is meant, that is, however it is spaced: 'A > B', 'B<A', 'A=B=Good '. The published rule
    reads some of them otherwise, see `tiger_metrics`.
    """
    text = _tidy(ranking)
    if size == 2 and TIE.fullmatch(text):
        return "tie"
    letters = text.split("<")[::-1] if "<" in text and ">" not in text else text.split(">")
    places = tuple(LETTERS.find(letter) for letter in letters)
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


def _groups_of_rows(rows: list[files.Row], issues: Issues) -> list[Case]:
    groups: dict[tuple[int, str], list[tuple[int, files.Row]]] = {}
    places: Counter[int] = Counter()
    for number, row in enumerate(rows):
        size = _size(row)
        name = str(row.field("id"))
        # as the official scripts cut them; a pair is a group of its own
        prefix = name.split("_")[0] if "_" in name else name[:10]
        prefix = f"{name}#{number}" if size == 2 else prefix
        groups.setdefault((size, prefix), []).append((places[size], row))
        places[size] += 1
    note_duplicates(
        issues,
        [
            (f"{row.fields.get('dataset')}: {row.fields['id']}", str(row.fields.get("ranking")))
            for row in rows
        ],
    )
    return [_row_case(size, name, members, issues) for (size, name), members in groups.items()]


def _size(row: files.Row) -> int:
    data = row.fields.get("dataset")
    match = re.match(r"([234])-?pair", str(data or ""), re.IGNORECASE)
    if match is None:
        raise UserError(f"{row.where}: field 'dataset' is {data!r}, not 2pair .. 4pair")
    return int(match.group(1))


def _row_case(
    size: int, name: str, members: list[tuple[int, files.Row]], issues: Issues
) -> Case:
    first = members[0][1]
    source = first.picture(first.field("source_image"), "source_image")
    instruction = str(first.field("instruction"))
    edits: dict[int, Any] = {}
    comparisons, rows = [], {}
    for place, row in members:
        kind = str(row.fields.get("comparison_type") or "AvsB")
        match = re.fullmatch(r"([ABCD])vs([ABCD])", kind)
        if match is None:
            raise UserError(f"{row.where}: field 'comparison_type' is {kind!r}, not like 'AvsB'")
        i, j = (LETTERS.index(letter) for letter in match.groups())
        for letter, column in ((i, "candidate_1"), (j, "candidate_2")):
            edits.setdefault(letter, row.picture(row.field(column), column))
        ranking = row.fields.get("ranking")
        label = read_vote(ranking, LETTERS[i], LETTERS[j])
        if label is None:
            words = f"{row.where}: {ranking}"
            issues.add("ranking that cannot be read (the group counts as wrong)", words)
        number = sum(c.id.split("#")[0] == kind for c in comparisons)
        key = kind if not number else f"{kind}#{number}"
        rows[key] = {"id": str(row.fields["id"]), "ranking": ranking, "place": place}
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
        fields={"rows": rows, "instruction": instruction},
    )  # fmt: skip


def read_vote(ranking: Any, first: str, second: str) -> int | None:
    """1: the first is preferred, -1: the second, 0: neither, None: the text says nothing of it."""
    text = _tidy(ranking)
    if TIE.fullmatch(text) or text in (f"{first}={second}", f"{second}={first}"):
        return 0
    return {f"{first}>{second}": 1, f"{second}<{first}": 1,
            f"{second}>{first}": -1, f"{first}<{second}": -1}.get(text)  # fmt: skip
