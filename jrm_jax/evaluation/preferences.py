"""A user's own examples (see `data.ingest.records`), prepared data sets, and the built-in world.

No official layout: predictions are JSON lines {'id', 'scores': [one per candidate]}, or
{'id', 'scores': {dimension: [..]}}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jrm_jax.data.ingest.records import read_example
from jrm_jax.data.ingest.rows import SUFFIXES, is_place
from jrm_jax.data.schema import Image, PreferenceExample, from_record
from jrm_jax.data.store import MANIFEST, open_dataset
from jrm_jax.errors import UserError
from jrm_jax.evaluation import files
from jrm_jax.evaluation.cases import (
    Benchmark,
    Case,
    Comparison,
    Issues,
    Judged,
    Picture,
    content_id,
    digest,
    note_duplicates,
    tell_apart,
)
from jrm_jax.evaluation.held import Records
from jrm_jax.evaluation.metrics import Metric, accuracy, sections, strict, verdicts
from jrm_jax.evaluation.predictions import Collected, entries
from jrm_jax.shell.terminal import track

PROTOCOL = (
    "Pair accuracy: share of the pairs people decided in which the preferred candidate scores"
    " higher (equal scores are wrong). Best of group: the highest score is one that nobody beats;"
    " counted where people single out fewer than all candidates."
)
WORLD_SPLITS = ("test", "hard")


def read_jsonl(path: str, issues: Issues, images: files.Images | None = None) -> Benchmark:
    """JSON lines, a JSON list or parquet of examples, or a data set that builders.py prepared.

    Raises:
        UserError: no such files, or a data set that holds nothing but what models train on. A line
            that is no valid example is an issue, not an error.
    """
    folder = Path(path)
    if folder.is_dir() and (folder / MANIFEST).is_file():
        splits = {name: split for name, split in open_dataset(folder).items() if name != "train"}
        if not splits:
            raise UserError(
                f"{folder} holds the split 'train' only, which is not judged: a model may have"
                " learnt it by heart. Give a data set with another split (builders: --split=test"
                " or --valid_fraction=0.05), or the JSON lines of held-out groups"
            )
        cases = [case for name, split in splits.items() for case in _of_split(name, split)]
        return _benchmark("jsonl", cases, issues)
    cases = []

    def bad(error: UserError) -> None:
        issues.add("line that is no valid example (left out)", error)

    for row in files.read_rows(path, images, SUFFIXES, bad):
        pictures: dict[bytes, Picture] = {}

        def read(value: str | bytes, row=row, pictures=pictures) -> bytes:
            # the schema keeps bytes; a mark stands for the file, which is read when scored
            mark = value.encode() if isinstance(value, str) else value
            pictures[mark] = row.picture(value, "picture")
            return mark

        try:
            example = read_example(row.fields, row.where, read, row.is_file)
        except UserError as error:
            bad(error)
            continue
        cases += _cases(example, "pairs", pictures)
    return _benchmark("jsonl", cases, issues)


def _of_split(name: str, records: Sequence[Any]) -> Iterator[Case]:
    store = Records(records)
    for index in track(range(len(records)), f"reading {name}"):
        record = records[index]
        example, images = from_record(record), [bytes(data) for data in record["images"]]
        held = zip(images, store.held(index, images), strict=True)
        yield from _cases(example, name, {d: Picture(example.id, one) for d, one in held})


def read_world(counts: dict[str, int], seed: int, issues: Issues) -> Benchmark:
    """The built-in test and hard splits of a run's seed."""
    cases = [
        case
        for split, count in counts.items()
        for example in _draw(split, count, seed)
        for case in _cases(example, split, subtask=example.id.split("-")[2].split(":")[0])
    ]
    protocol = f"{PROTOCOL} People's preferences are the built-in world's exact gold scores here."
    return _benchmark("world", cases, issues)._replace(protocol=protocol)


def _draw(split: str, count: int, seed: int) -> Iterator[PreferenceExample]:
    from jrm_jax.data.world.scenes import make_example

    for index in track(range(count), f"drawing {split}"):
        yield make_example(split, index, seed)


def _benchmark(name: str, cases: list[Case], issues: Issues) -> Benchmark:
    cases = headlined(cases)
    seen = [
        (case.id, tuple((c.id, c.label) for c in case.comparisons))
        for case in cases
        if case.headline
    ]
    note_duplicates(issues, seen)
    return Benchmark(name, tell_apart(cases), issues, PROTOCOL)


def headlined(cases: list[Case]) -> list[Case]:
    """The same, of which those in one dimension are of the headlines: the first that examples name,
    or, where nothing has labels in it, that of the first case."""
    main = next((case.dimension for case in cases if case.headline), "")
    main = main or (cases[0].dimension if cases else "")
    return [case._replace(headline=case.dimension == main) for case in cases]


def _cases(
    example: PreferenceExample, section: str, pictures: dict | None = None, subtask: str = ""
) -> Iterator[Case]:
    """One case per reward dimension that has labels."""
    kinds = example.id.split(":")[1].split(",") if subtask else ()

    def parts(items) -> tuple:
        return tuple(
            (pictures[item.data] if pictures else Picture(example.id, item.data))
            if isinstance(item, Image)
            else item
            for item in items
        )

    prompt = parts(example.prompt)
    candidates = tuple(parts(candidate.parts) for candidate in example.candidates)
    group = digest([p.key if isinstance(p, Picture) else p for p in prompt])
    name = content_id(prompt, candidates) if is_place(example.id) else example.id
    for column, dimension in enumerate(example.dimensions):
        weight = example.weight[..., column]
        side = np.sign(2 * example.preference[..., column] - 1).astype(int)
        comparisons = tuple(
            Comparison(f"{i}-{j}", int(i), int(j), int(side[i, j]))
            for i, j in np.argwhere(np.triu(weight) > 0)
        )
        if comparisons:
            yield Case(
                name, group, section, subtask, prompt, candidates, comparisons, dimension,
                names=tuple(kinds) or tuple(f"candidate {i}" for i in range(len(candidates))),
                headline=not column,
            )  # fmt: skip


def write(judged: Sequence[Judged], out: Path, model: str, threshold: float = 0.0) -> None:
    """predictions.jsonl: {'id', 'scores': {dimension: [..]}}."""
    lines: dict[str, dict] = {}
    for case, answer in judged:
        entry = lines.setdefault(case.id, {"id": case.id, "scores": {}})
        entry["scores"].setdefault(case.dimension, list(answer.scores))
    text = "".join(json.dumps(line) + "\n" for line in lines.values())
    (out / "predictions.jsonl").write_text(text)


def read_predictions(benchmark: Benchmark, paths: Sequence[str]) -> list[Judged]:
    """
    Raises:
        UserError: lines of another shape.
    """
    found = Collected(benchmark)
    for row in entries(paths, (".jsonl",), benchmark.issues):
        found.add(str(row.field("id")), row.field("scores"), row.where)
    return found.close()


def measure(benchmark: Benchmark, judged: Sequence[Judged], threshold: float) -> list[Metric]:
    """Per split and dimension: pairs, whole groups, and pairs by kind of instruction."""
    metrics = []
    wanted = sections(benchmark.cases, lambda case: (case.section, case.dimension))
    found = sections(judged, lambda one: (one.case.section, one.case.dimension))
    main = next((case.dimension for case in benchmark.cases if case.headline), "")
    for (section, dimension), cases in wanted.items():
        items = found.get((section, dimension), [])
        name = section if dimension == main else f"{section} ({dimension})"
        said = verdicts(items)
        decided, ties = strict(said), sum(not v.comparison.label for v in said)
        total = sum(bool(c.label) for case in cases for c in case.comparisons)
        metrics.append(
            accuracy(name, "pair accuracy", decided, total=total, headline=dimension == main,
                     note=f"{ties} ties of people left out")
        )  # fmt: skip
        if dimension != main:
            continue
        metrics.append(_best(name, items))
        for kind, inside in sorted(sections(decided, lambda v: v.judged.case.subtask).items()):
            metrics.append(accuracy(f"{name} / {kind}", "pair accuracy", inside))
    return metrics


def _best(section: str, items: Sequence[Judged]) -> Metric:
    values, groups, ids = [], [], []
    for case, answer in items:
        beaten = {c.second if c.label > 0 else c.first for c in case.comparisons if c.label}
        places = range(len(case.candidates))
        if not beaten or len(beaten) == len(case.candidates):
            continue
        top = max(answer.scores)
        first = [i for i in places if answer.scores[i] == top]
        values.append(sum(i not in beaten for i in first) / len(first))
        groups.append(case.group)
        ids.append(case.id)
    return Metric(section, "best of group", values, groups, ids)
