"""Pieces of the study's page: tables, shares, points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "missing"  # in the first part; in the second:
NOT_YET = "not yet run"
Numbers = Mapping[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def share(row: Mapping[str, Any] | None) -> str:
    """'61.2 (59.8 to 62.5)', in per cent."""
    if not row:
        return MISSING
    return f"{100 * row['value']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def points(row: Mapping[str, Any] | None) -> str:
    """'+3.1 (+1.2 to +5.0), 5 seeds'."""
    if not row:
        return MISSING
    value, low, high = (100 * row[key] for key in ("value", "low", "high"))
    seeds = f"{row['seeds']} seed{'s' * (row['seeds'] != 1)}"
    return f"{value:+z.1f} ({low:+z.1f} to {high:+z.1f}), {seeds}"


def absent(numbers: Numbers, arm: str) -> str:
    """Why an arm has no numbers: still to be run, not needed, or not in this design."""
    for words, names in ((MISSING, "missing"), ("not needed", "unneeded")):
        if any(name.startswith(f"{arm}-n") for name in numbers["budget"][names]):
            return words
    return "not planned"


def number(value: float | None, form: str = ".3f") -> str:
    return MISSING if value is None else format(value, form)
