"""Scores out of files that anybody wrote: what is no number is listed and counts as not judged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from jrm_jax.errors import UserError
from jrm_jax.evaluation import files
from jrm_jax.evaluation.cases import Answer, Benchmark, Issues, Judged
from jrm_jax.evaluation.metrics import sections

NOT_JUDGED = "score that is no number (the case counts as not judged)"
NO_ENTRY = "entry of a prediction file that is no object (passed over)"
UNKNOWN = "prediction for an id that is not in the benchmark"
SECOND = "second prediction for an id (the first counts)"
SHARED = "prediction for an id of several groups (not judged: give each group an id of its own)"


def entries(
    paths: Sequence[str], suffixes: Sequence[str], issues: Issues
) -> Iterator[files.Row]:
    """Objects of prediction files and folders; what else stands in them is listed.

    Raises:
        UserError: no such files, or one that cannot be read.
    """
    for path in paths:
        yield from files.read_rows(
            path, None, suffixes, lambda error: issues.add(NO_ENTRY, error)
        )


def to_scores(
    values: Any, where: str, issues: Issues, kind: str = NOT_JUDGED
) -> tuple[float, ...] | None:
    """Finite numbers (or text that says such); None, and listed, where one is something else."""
    given = values if isinstance(values, list | tuple) else [values]
    found = [files.to_number(value) for value in given]
    if given is values and all(math.isfinite(score) for score in found):
        return tuple(found)
    issues.add(kind, f"{where}: {str(values)[:80]}")
    return None


class Collected:
    """Answers to a benchmark's cases, by id. Unknown ids and second answers are listed.

    An id that the benchmark's files give to several groups is taken where it comes as often as
    there are groups, in their order.
    """

    def __init__(self, benchmark: Benchmark):
        self.issues = benchmark.issues
        self._cases = sections(benchmark.cases, lambda case: case.id)
        self._beyond = {name for case in benchmark.cut for name in (case.id, case.given)}
        self._found: dict[str, list[Judged]] = {}
        self._shared: dict[str, list[tuple[Any, str]]] = {
            case.given: [] for case in benchmark.cases if case.given
        }

    def add(self, name: str, values: Any, where: str) -> None:
        """values: scores, one per candidate (of one candidate the number alone will do), or
        {reward dimension: scores}.

        Raises:
            UserError: another number of scores than the case has candidates.
        """
        if name in self._shared:
            self._shared[name].append((values, where))
            return
        if name not in self._cases:
            if name not in self._beyond:
                self.issues.add(UNKNOWN, name)
            return
        if self._found.get(name):
            self.issues.add(SECOND, name)
            return
        self._found[name] = []
        for case in self._cases[name]:
            own = values
            if isinstance(values, dict):
                if case.dimension not in values:
                    continue
                own = values[case.dimension]
            if len(case.candidates) == 1 and not isinstance(own, list | tuple):
                own = [own]
            if isinstance(own, list) and len(own) != len(case.candidates):
                raise UserError(f"{where}: {len(own)} scores for {len(case.candidates)} candidates")
            scores = to_scores(own, where, self.issues)
            if scores is not None:
                self._found[name].append(Judged(case, Answer(scores)))

    def close(self) -> list[Judged]:
        """All answers.

        Raises:
            UserError: as `add`.
        """
        shared, self._shared = self._shared, {}
        for given, answers in shared.items():
            names = [n for n, cases in self._cases.items() if cases[0].given == given]
            if len(names) == len(answers):
                for name, answer in zip(names, answers, strict=True):
                    self.add(name, *answer)
            elif answers:
                self.issues.add(SHARED, f"{given} ({len(answers)} of {len(names)})")
        return [one for items in self._found.values() for one in items]
