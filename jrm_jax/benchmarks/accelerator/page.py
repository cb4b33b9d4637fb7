"""The page docs/accelerator.md, made from the record of one machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
ABOUT = """\
# On an accelerator

But for its last section this page is made by the command below, from the numbers that it measured \
on the machine named here.

- **Step**: the joint step (both losses, Adam) at the sizes of a published backbone with random \
weights: 4 groups of two candidates; a source picture and two edited ones of 506 visual tokens \
each; prompts of 512 slots, candidates of 1408 with critiques of 896 tokens. bfloat16 compute, \
float32 state. PyTorch: `transformers`' own model on the same device, bfloat16 autocast, float32 \
weights, fused AdamW, the same groups as 8 sequences of 1920 tokens, the same losses.
- **TFLOP/s**: the matrix products that the step is for (`jrm_jax/run/flops.py`), without \
what is computed again. **Of the card**: divided by the rate of a bfloat16 product of 8192 x 8192 \
matrices on the same card.
- **Pairs**: a group of two candidates is one. **Edits**: a candidate, scored with its source; \
`candidates` is how many share one, which is encoded once here. Weights are bfloat16 on \
both sides where edits are scored.
- Times are medians. Steps of training are timed four at a time: neither side waits in between."""


def make_page(record: Row) -> str:
    where = record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [
        ABOUT, "", "```", record["command"], "```", "",
        f"{'; '.join(where['cards']) or 'no NVIDIA card'}; {where['cores']} cores of the host; "
        f"Python {where['python']}; {versions}; commit {where['commit'] or 'unknown'}; "
        f"{record['date']}{'; tiny sizes: no measurement' if record['tiny'] else ''}.",
    ]  # fmt: skip
    for section in (_rates, _steps, _scores, _starts, _checks, _kernels, _missing):
        if found := section(record["parts"]):
            lines += ["", *found]
    return "\n".join(lines) + "\n"


def _rows(parts: Row, *starts: str) -> Iterable[tuple[str, Row]]:
    for name, part in parts.items():
        if name.startswith(starts):
            yield from ((name, row) for row in part["rows"])


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines] if lines else []


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and value < 100 else (
        f"{value:.0f}" if isinstance(value, float) else str(value).replace("|", "/")
    )  # fmt: skip


def _best(parts: Row, name: str, field: str) -> float | None:
    found = [row[field] for row in parts.get(name, {"rows": []})["rows"] if field in row]
    return max(found, default=None)


def _card(parts: Row) -> float | None:
    rates = [_best(parts, name, "tflop_per_second") for name in ("rate", "rate_torch")]
    return max((rate for rate in rates if rate), default=None)


def _over(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other


def _rates(parts: Row) -> list[str]:
    sides = {"rate": "JAX", "rate_torch": "PyTorch"}
    rows = [
        (sides[name], row["side"], row["tflop_per_second"]) for name, row in _rows(parts, "rate")
    ]
    return ["## The card's own rate", "", *_table(("", "side", "TFLOP/s"), rows)] if rows else []


def _steps(parts: Row) -> list[str]:
    torch = _best(parts, "step_2b_torch", "pairs_per_second")
    rows = []
    for name, row in _rows(parts, "step_"):
        if "kernels" in row or "remat" not in row:
            continue
        theirs = name.endswith("_torch")
        rate = row.get("pairs_per_second")
        times = None if theirs or row["model"] != "qwen3_vl_2b" else _over(rate, torch)
        numbers = (
            row.get("seconds"), row.get("tflop_per_second"),
            _over(row.get("tflop_per_second"), _card(parts)), rate, times, row.get("peak_gib"),
            row.get("compile_seconds"),
        )  # fmt: skip
        kinds = (row["model"], "PyTorch" if theirs else "jrm_jax", row["trains"],
                 row["attention"], row["remat"])  # fmt: skip
        rows.append((*kinds, *((row["failed"][:120],) if "failed" in row else numbers)))
    heads = (
        "model", "side", "trains", "attention", "remat", "seconds", "TFLOP/s", "of the card",
        "pairs/s", "times PyTorch", "peak GiB", "compile s",
    )  # fmt: skip
    rows = [(*row, *[None] * (len(heads) - len(row))) for row in rows]
    return ["## A step", "", *_table(heads, rows)] if rows else []


def _scores(parts: Row) -> list[str]:
    rows = []
    for name, row in _rows(parts, "score_"):
        theirs = name.endswith("_torch")
        torch = None if theirs else _best(parts, f"{name}_torch", "edits_per_second")
        rows.append((
            row["model"], row.get("candidates", 2), "PyTorch" if theirs else "jrm_jax",
            row.get("attention", "auto"),
            row["seconds"], row["edits_per_second"], _over(row["edits_per_second"], torch),
            row.get("tflop_per_second"), _over(row.get("tflop_per_second"), _card(parts)),
            row.get("peak_gib"), row.get("compile_seconds"),
        ))  # fmt: skip
    heads = ("model", "candidates", "side", "attention", "seconds", "edits/s", "times PyTorch",
             "TFLOP/s", "of the card", "peak GiB", "compile s")  # fmt: skip
    return ["## Scoring", "", *_table(heads, rows)] if rows else []


def _starts(parts: Row) -> list[str]:
    known = {
        "seconds_to_data": "from the start of the process to its data drawn",
        "seconds_to_step": "data there, nothing compiled: from the start of the process to the end "
        "of its first step",
        "compile_seconds": "all there: the programs, compiled or found",
        "seconds_per_step": "a step",
    }
    rows = [
        (row["start"], words, row[field])
        for _, row in _rows(parts, "start")
        for field, words in known.items()
        if field in row
    ]
    heads = ("start", "of `python -m jrm_jax.main --config=configs/joint.py`", "seconds")
    return ["## The default run", "", *_table(heads, rows)] if rows else []


def _checks(parts: Row) -> list[str]:
    lines = []
    for _, row in _rows(parts, "parity"):
        if "failed" in row:
            continue
        lines.append(
            f"Parity tests on the device ({row['platform']}): {row['passed']} passed, "
            f"{len(row['failed_tests'])} failed, {row['skipped']} skipped."
        )
        lines += [f"- `{name}`: {words}" for name, words in row["failed_tests"].items()]
    rows = [
        (row["dtype"], name, *(f"{row[side][name]:.6f}" for side in ("jrm_jax", "torch")),
         abs(row["jrm_jax"][name] / row["torch"][name] - 1))
        for _, row in _rows(parts, "losses")
        for name in ("loss", "grad_norm")
    ]  # fmt: skip
    heads = ("first step from equal weights, small backbone", "", "jrm_jax", "PyTorch",
             "relative difference")  # fmt: skip
    if rows:
        lines += ["", *_table(heads, rows)]
    return ["## Is it the same?", "", *lines] if lines else []


def _kernels(parts: Row) -> list[str]:
    for name, row in _rows(parts, "step_"):
        if "kernels" in row:
            rows = [(f"`{k['name']}`", k["calls"], k["ms"], k["share"]) for k in row["kernels"]]
            return [
                f"## Where a step's time goes ({name}: attention {row['attention']}, "
                f"remat {row['remat']})",
                "", *_table(("kernel", "calls a step", "ms a step", "share"), rows),
            ]  # fmt: skip
    return []


def _missing(parts: Row) -> list[str]:
    lines = [
        f"- {part['words']}: {part['status']}"
        for part in parts.values()
        if part["status"] != "done"
    ]
    lines += [
        f"- {part['words']}: {row['failed'][:200]}"
        for part in parts.values()
        for row in part["rows"]
        if "failed" in row and not any("seconds" in other for other in part["rows"])
    ]
    return ["## Not measured", "", *lines] if lines else []
