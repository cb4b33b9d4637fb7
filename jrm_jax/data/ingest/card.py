"""What a prepared data set holds: counts kept while it is written, and the card beside it.

Letters: K candidates, R reward dimensions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jrm_jax.data.schema import PreferenceExample


def count(
    counts: Counter, split: str, example: PreferenceExample, record: Mapping[str, Any]
) -> None:
    """Add one example to the counts; names are '<split>/<what>'."""
    found = Counter(groups=1, candidates=len(example.candidates))
    found["pictures"] = len(record["images"])
    found["bytes of pictures"] = sum(map(len, record["images"]))
    found["critiques"] = sum(bool(c.critique) for c in example.candidates)
    found[f"groups of {len(example.candidates)}"] = 1
    upper_KK = np.triu(np.ones(example.weight.shape[:2], bool), 1)
    for r, name in enumerate(example.dimensions):
        labelled = upper_KK & (example.weight[..., r] > 0)
        ties = labelled & (example.preference[..., r] == 0.5)
        found[f"pairs in {name}"] = int(labelled.sum())
        found[f"ties in {name}"] = int(ties.sum())
    found["groups with preferences"] = int(example.weight.any())
    found["groups with critiques"] = int(found["critiques"] > 0)
    for what, number in found.items():
        counts[f"{split}/{what}"] += number


def text(
    layout: str,
    files: Sequence[tuple[str, int]],
    options: Any,
    result: Any,
    counts: Counter,
    listed: str,
) -> str:
    """The card in Markdown. listed: the file beside it that names the rows that are left out."""
    left = sum(result.left.values())
    lines = [
        "# Data card",
        "",
        f"Prepared by `python -m jrm_jax.data.builders {layout}` from {len(files)} files"
        f" ({sum(size for _, size in files):,} bytes):",
        "",
        *(f"- `{Path(name).name}` ({size:,} bytes)" for name, size in files[:20]),
        *(["- ..."] if len(files) > 20 else []),
        "",
        f"{result.rows:,} rows were read: {result.rows - left:,} kept, {left:,} left out"
        f" (each is listed in `{listed}`).",
        "",
        *_table(("left out because of", "rows"), result.left.items()),
        *_table(("kept, but odd", "times"), result.notes.items()),
        "## What it holds",
        "",
        "| split | groups | candidates | by group | pictures | bytes of pictures | critiques |"
        " groups with preferences | with critiques |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for split in result.counts:
        own = {k.split("/", 1)[1]: v for k, v in counts.items() if k.startswith(f"{split}/")}
        sizes = sorted(
            (int(k.rsplit(" ", 1)[1]), v) for k, v in own.items() if k.startswith("groups of ")
        )
        cells = (
            split, f"{own['groups']:,}", f"{own['candidates']:,}",
            ", ".join(f"{v:,} of {k}" for k, v in sizes), f"{own['pictures']:,}",
            f"{own['bytes of pictures']:,}", f"{own['critiques']:,}",
            f"{own['groups with preferences']:,}", f"{own['groups with critiques']:,}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| split | dimension | labelled pairs | of them ties |", "|---|---|---|---|"]
    for split in result.counts:
        for name in result.dimensions:
            pairs, ties = (counts[f"{split}/{what} in {name}"] for what in ("pairs", "ties"))
            lines.append(f"| {split} | {name} | {pairs:,} | {ties:,} |")
    lines.append("")
    if options.valid_fraction:
        lines += [
            f"About {options.valid_fraction:g} of the prompts are in `valid`, chosen by a hash of"
            " their pictures, so that no source stands in two splits.",
            "",
        ]
    lines += ["The licence is that of the source.", ""]
    return "\n".join(lines)


def _table(heads: tuple[str, str], items: Any) -> list[str]:
    rows = [f"| {kind} | {number:,} |" for kind, number in items]
    return [f"| {heads[0]} | {heads[1]} |", "|---|---|", *rows, ""] if rows else []
