"""The result of an evaluation as one JSON object, and as Markdown; comparisons of two results."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jrm_jax.data.schema import Text
from jrm_jax.errors import UserError
from jrm_jax.evaluation import files
from jrm_jax.evaluation.cases import SHOWN, Benchmark, Judged
from jrm_jax.evaluation.metrics import Metric, Verdict, decided, to_row, verdicts
from jrm_jax.evaluation.statistics import paired_test, tune_threshold

FORMAT = 1  # of the JSON file
WORST = 12
# block of the result -> its title; each has 'about' and 'rows' {'name', 'value', 'meaning'}
SANITY = {"unsure": "How unsure the model is, and whether it is right to be",
          "probe": "Sanity of the model"}  # fmt: skip


def make_result(
    benchmark: Benchmark,
    judged: Sequence[Judged],
    metrics: Sequence[Metric],
    rules: dict[str, dict],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Everything a reader needs to trust or doubt the numbers, in JSON types."""
    rows = []
    for metric in metrics:
        row = to_row(metric)
        key = metric.section, metric.name
        row["baselines"] = {
            rule: values[key] if math.isfinite(values.get(key, math.nan)) else None
            for rule, values in rules.items()
        }
        rows.append(row)
    comparisons = sum(len(case.comparisons) for case in benchmark.cases)
    seen = {id(one.case) for one in judged}
    missing = [c for c in benchmark.cases if id(c) not in seen]
    for case in missing:
        benchmark.issues.add("case without a prediction", f"{case.section}: {case.id}")
    labels, gaps = _gaps(judged)
    return {
        "format": FORMAT,
        "benchmark": benchmark.name,
        "protocol": benchmark.protocol,
        **about,
        "counts": {
            "groups of candidates": len({(c.section, c.id) for c in benchmark.cases}
                                        or {id(one.case) for one in judged}),  # fmt: skip
            "cases (a group, asked for one dimension)": len(benchmark.cases) or len(judged),
            "cases with a prediction": len(judged),
            "cases without a prediction": len(missing),
            "comparisons": comparisons or sum(len(one.case.comparisons) for one in judged),
        },
        "remarks": _remarks(judged),
        "issues": benchmark.issues.report(),
        "rows": rows,
        "published": published(benchmark.name),
        "tie_threshold_tuned_here": tune_threshold(labels, gaps)[0] if len(labels) else None,
        "judgements": {
            f"{metric.section}: {metric.name}": [
                [name, group, float(value)]
                for name, group, value in zip(
                    metric.ids, metric.groups, metric.values, strict=True
                )
            ]
            for metric in metrics
            if metric.headline and metric.statistic is None
        },
    }


def _gaps(judged: Sequence[Judged]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and differences of scores where ties can be learnt: in parts that have some."""
    scored = [v for v in verdicts(main_dimension(judged)) if v.gap is not None]
    parts = {v.judged.case.section for v in scored if v.comparison.label == 0}
    found = [
        (v.comparison.label, v.gap)
        for v in scored
        if v.judged.case.section in parts and v.comparison.label in (-1, 0, 1)
    ]
    values = np.array(found, float).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _remarks(judged: Sequence[Judged]) -> list[str]:
    found = []
    labels = {c.label for one in judged for c in one.case.comparisons}
    if labels == {1} and judged:
        found.append(
            "In these files the first candidate is always the preferred one, so 'always the first'"
            " is right by construction and says nothing."
        )
    return found


def main_dimension(judged: Sequence[Judged]) -> list[Judged]:
    """Of several reward dimensions the first; where they are sections, each."""
    return [one for one in judged if one.case.headline]


def worst(judged: Sequence[Judged], count: int = WORST) -> list[Verdict]:
    """Pairs ranked most wrongly, one per case; where there are no scores, just wrong ones."""
    wrong = [v for v in decided(verdicts(main_dimension(judged))) if not v.right]
    wrong.sort(key=lambda v: -abs(v.gap or 0.0))
    found: dict[Any, Verdict] = {}
    for verdict in wrong:
        case = verdict.judged.case
        found.setdefault((case.group, case.section), verdict)
    return list(found.values())[:count]


def instruction(verdict: Verdict) -> str:
    return " ".join(p.text for p in verdict.judged.case.prompt if isinstance(p, Text))


@functools.cache
def _published() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))


def published(benchmark: str) -> list[dict[str, Any]]:
    """The tables of other systems' numbers for a benchmark, one for each source and protocol."""
    return [table for table in _published()["tables"] if table["benchmark"] == benchmark]


def plain(value: Any) -> Any:
    """The same in JSON types; what is not a finite number becomes None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


# Two results


def load_result(path: str) -> dict[str, Any]:
    """
    Raises:
        UserError: not a file that evaluate wrote.
    """
    content = files.read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or "rows" not in content:
        raise UserError(f"{path} is no result of jrm_jax.evaluate (format {FORMAT})")
    return content


def compare(first_path: str, second_path: str) -> dict[str, Any]:
    """Paired tests of all headline numbers that both have, on the judgements that both have.

    Where no number has one name in both, the splits do not count: a file of JSON lines and a
    prepared data set of it are compared by their groups' ids.

    Raises:
        UserError: other benchmarks, or nothing in common.
    """
    first, second = load_result(first_path), load_result(second_path)
    if first["benchmark"] != second["benchmark"]:
        raise UserError(
            f"{first_path} is of {first['benchmark']}, {second_path} of {second['benchmark']}:"
            " only results of one benchmark can be compared"
        )
    rows, mine, others = [], first["judgements"], second["judgements"]
    if not mine.keys() & others.keys():
        mine, others = _without_parts(mine), _without_parts(others)
    for name, own in mine.items():
        one, other = _numbered(own), _numbered(others.get(name, []))
        common = [key for key in one if key in other]
        if not common:
            continue
        test = paired_test(
            [one[key][1] for key in common],
            [other[key][1] for key in common],
            [one[key][0] for key in common],
        )
        left = {"only_in_first": len(one) - len(common), "only_in_second": len(other) - len(common)}
        pair = {
            "first": float(np.mean([one[key][1] for key in common])),
            "second": float(np.mean([other[key][1] for key in common])),
        }
        rows.append({"metric": name, **pair, **plain(test._asdict()), **left})
    if not rows:
        raise UserError(f"{first_path} and {second_path} share no judgement")
    return {"benchmark": first["benchmark"], "first": first_path, "second": second_path,
            "rows": rows}  # fmt: skip


def _without_parts(judgements: dict[str, list]) -> dict[str, list]:
    """The same number's judgements of all parts together."""
    found: dict[str, list] = {}
    for name, items in judgements.items():
        found.setdefault(name.split(": ", 1)[-1], []).extend(items)
    return found


def _numbered(items: list) -> dict[tuple[str, int], tuple[str, float]]:
    """{(id, how often it was there before): (group, value)}: votes and duplicates keep apart."""
    found: dict[tuple[str, int], tuple[str, float]] = {}
    counts: dict[str, int] = {}
    for name, group, value in items:
        counts[name] = counts.get(name, -1) + 1
        found[name, counts[name]] = group, value
    return found


# Markdown


def markdown(result: dict[str, Any]) -> str:
    """The tables as text."""
    rules = list(result["rows"][0]["baselines"]) if result["rows"] else []
    head = ["part", "number", "value", "95 % interval", "judged / all", "groups", *rules, "note"]
    lines = [
        f"# {result['benchmark']}: {result['model']}",
        "",
        about(result),
        "",
        result["protocol"],
        "",
        ", ".join(f"{count:,} {what}" for what, count in result["counts"].items()) + ".",
        *(f"\n{remark}" for remark in result["remarks"]),
        "",
        _line(head),
        _line(["---"] * 2 + ["---:"] * (len(head) - 3) + ["---"]),
    ]
    for row in result["rows"]:
        cells = [value(row["baselines"][rule]) for rule in rules]
        name = row["metric"] + (" (official)" if row["official"] else "")
        if row["headline"]:
            name = f"**{name}**"
        lines.append(
            _line([row["section"], name, value(row["value"]), interval(row),
                   f"{row['count']:,} / {row['total']:,}", f"{row['groups']:,}", *cells,
                   note(row)])
        )  # fmt: skip
    for block, title in SANITY.items():
        lines += ["", *_probe_lines(result.get(block), title)]
    lines += _issue_lines(result["issues"])
    lines += _published_lines(result)
    return "\n".join(lines)


def about(result: dict[str, Any]) -> str:
    """What was measured, and when, in one line."""
    step = result.get("step")
    words = [
        result["made"],
        f"data: {result['data']}",
        f"checkpoint: {result['checkpoint']}" + (f", step {step}" if step is not None else "")
        if result["checkpoint"] else f"predictions: {', '.join(result['predictions'] or ())}",
    ]  # fmt: skip
    if result["limit"]:
        words.append(f"ONLY THE FIRST {result['limit']:,} cases (--limit)")
    if result["tie_threshold"]:
        words.append(f"threshold for ties: {result['tie_threshold']:g}")
    return "; ".join(words)


def _probe_lines(probe: dict[str, Any] | None, title: str) -> list[str]:
    if not probe:
        return []
    rows = [_line([row["name"], row["value"], row["meaning"]]) for row in probe["rows"]]
    head = [_line(["probe", "value", "what it means"]), _line(["---"] * 3)]
    return [f"{title}. {probe['about']}", "", *head, *rows, ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def value(number: float | None) -> str:
    return "-" if number is None else f"{number:.4f}"


def interval(row: dict[str, Any]) -> str:
    if row["low"] is None:
        return "-"
    return f"{row['low']:.4f} to {row['high']:.4f}"


def note(row: dict[str, Any]) -> str:
    """The row's note, and which rules without a model do better."""
    above = [
        rule for rule, number in row["baselines"].items()
        if number is not None and row["value"] is not None and number > row["value"]
    ]  # fmt: skip
    return "; ".join([*([row["note"]] if row["note"] else []),
                      *([f"BELOW {' and '.join(above)}"] if above else [])])  # fmt: skip


def _issue_lines(issues: dict[str, Any]) -> list[str]:
    if not issues:
        return ["Nothing odd was found in the files.", ""]
    lines = ["Oddities of the files (all of them in the JSON file):", ""]
    for kind, found in issues.items():
        shown = "; ".join(found["items"][:SHOWN])
        more = f"; and {found['count'] - SHOWN} more" if found["count"] > SHOWN else ""
        lines.append(f"- {found['count']} x {kind}: {shown}{more}")
    return [*lines, ""]


def _published_lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for table in result["published"]:
        lines += [f"Published numbers of other systems. {table_words(table)}", ""]
        names = list(table["columns"].values())
        lines += [_line(["", *names]), _line(["---", *["---:"] * len(names)])]
        lines.append(_line([f"**{result['model']}** (here)", *own_cells(result, table)]))
        lines += [_line([name, *(cell or "-" for cell in cells)])
                  for name, cells in table["rows"].items()]  # fmt: skip
        lines.append("")
    return lines


def table_words(table: dict[str, Any]) -> str:
    """How the numbers of a published table came about, and where they stand."""
    remark = table["remark"].rstrip(".")
    return f"Protocol: {table['protocol']}. Source: {table['source']}. Remark: {remark}."


def own_cells(result: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """Our numbers by the rule the published ones follow, in their units."""
    cells = []
    for section in table["columns"]:
        rows = [row for row in result["rows"] if row["section"] == section]
        # the published rule where there is one, else what stands first
        tuned = [row for row in rows if row["metric"].endswith("published rule")]
        named = [row for row in tuned if row["metric"].startswith("strict")] or tuned or rows
        number = named[0]["value"] if named else None
        shown = f"{100 * (number or 0):.2f}" if table["unit"] == "percent" else f"{number or 0:.3f}"
        cells.append("-" if number is None else shown)
    return cells


def compare_markdown(found: dict[str, Any]) -> str:
    head = ["number", "first", "second", "difference", "95 % interval", "p", "test",
            "judgements (groups)", "only first right", "only second right"]  # fmt: skip
    lines = [
        f"# {found['benchmark']}: {found['second']} against {found['first']}", "", _line(head),
        _line(["---"] * len(head)),
    ]  # fmt: skip
    for row in found["rows"]:
        lines.append(
            _line([row["metric"], value(row["first"]), value(row["second"]),
                   f"{row['difference']:+.4f}", interval(row), f"{row['p']:.3g}", row["test"],
                   f"{row['count']} ({row['groups']})", row["only_first"], row["only_second"]])
        )  # fmt: skip
        apart = row["only_in_first"], row["only_in_second"]
        if any(apart):
            lines.append(f"\n{row['metric']}: {apart[0]} judgements only in the first file,"
                         f" {apart[1]} only in the second, left out.\n")  # fmt: skip
    return "\n".join([*lines, ""])
