"""The report as one HTML file that needs nothing else: tables, plots, the worst mistakes."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from jrm_jax.data.images import open_image
from jrm_jax.errors import UserError
from jrm_jax.evaluation.cases import SHOWN, Judged, Picture
from jrm_jax.evaluation.metrics import Verdict
from jrm_jax.evaluation.report import (
    SANITY,
    about,
    instruction,
    interval,
    note,
    own_cells,
    table_words,
    value,
    worst,
)

SIDE = 220  # pixels of a picture in the report
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1b1b; background: #fff;
       margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
td, th { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e2e2e2; }
th { border-bottom: 2px solid #888; font-weight: 600; }
td { white-space: nowrap; } td.text { white-space: normal; }
td.text, th.text { text-align: left; } td.text:last-child { min-width: 9rem; }
tr.main td { font-weight: 600; background: #f3f6fb; }
.faint { color: #666; font-size: .9em; }
.warn { background: #fff6e0; padding: .6rem 1rem; border-left: 4px solid #e0a000; }
.case { border-top: 1px solid #ccc; padding: .8rem 0; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: 220px; max-width: calc(50% - .5rem); }
figure img { width: 100%; border: 1px solid #ccc; }
svg { max-width: 100%; }
figcaption { font-size: .9em; overflow-wrap: anywhere; }
.liked { color: #0a6b2d; font-weight: 600; } .picked { color: #a01818; font-weight: 600; }
"""


def page(result: dict[str, Any], judged: Sequence[Judged]) -> str:
    """The whole document."""
    title = f"{result['benchmark']}: {result['model']}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p class=faint>{_text(about(result))}</p>",
        _headline(result),
        *(f"<p class=warn>{_text(remark)}</p>" for remark in result["remarks"]),
        _issues(result["issues"]),
        "<h2>All numbers</h2>",
        f"<p>{_text(result['protocol'])}</p>",
        "<p class=faint>Intervals: 95 %, from drawing whole groups (same prompt and source) with "
        "replacement. Rules on the right need no model; a number is worth something only above "
        "them.</p>",
        _numbers(result["rows"]),
        _published(result),
        *(_probe(result.get(block), title) for block, title in SANITY.items()),
        _mistakes(judged),
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<meta name=viewport content='width=device-width'><title>{_text(title)}</title>"
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _text(words: Any) -> str:
    return html.escape(str(words))


def _headline(result: dict[str, Any]) -> str:
    lines = []
    for row in (row for row in result["rows"] if row["headline"]):
        rules = ((v, name) for name, v in row["baselines"].items() if v is not None)
        best = max(rules, default=None)
        beside = f"; best rule without a model: {best[1]}, {value(best[0])}" if best else ""
        lines.append(
            f"<li><b>{_text(row['section'])}, {_text(row['metric'])}: {value(row['value'])}</b>"
            f" (95 % {interval(row)}; {row['count']:,} of {row['total']:,} judged"
            f"{_text(beside)})</li>"
        )
    counts = ", ".join(f"{count:,} {what}" for what, count in result["counts"].items())
    return f"<ul>{''.join(lines)}</ul><p>{_text(counts)}.</p>"


def _issues(issues: dict[str, Any]) -> str:
    if not issues:
        return "<p>Nothing odd was found in the files.</p>"
    items = []
    for kind, found in issues.items():
        shown = "; ".join(found["items"][:SHOWN])
        more = f"; and {found['count'] - SHOWN} more (JSON file)" if found["count"] > SHOWN else ""
        items.append(f"<li>{found['count']} &times; {_text(kind)}: {_text(shown + more)}</li>")
    return f"<div class=warn>Oddities of the files:<ul>{''.join(items)}</ul></div>"


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], texts: set[int]) -> str:
    """rows: (class, cells); cells are escaped here. texts: columns that are left-aligned."""

    def line(tag: str, cells: Sequence[str], kind: str = "") -> str:
        inner = "".join(
            f"<{tag}{' class=text' if i in texts else ''}>{_text(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr{f' class={kind}' if kind else ''}>{inner}</tr>"

    body = "".join(line("td", cells, kind) for kind, cells in rows)
    return f"<div class=wide><table>{line('th', head)}{body}</table></div>"


def _numbers(rows: Sequence[dict[str, Any]]) -> str:
    rules = list(rows[0]["baselines"]) if rows else []
    head = ["part", "number", "value", "95 % interval", "judged / all", "groups", *rules, "note"]
    lines = []
    for row in rows:
        name = row["metric"] + (" (official)" if row["official"] else "")
        cells = [row["section"], name, value(row["value"]), interval(row),
                 f"{row['count']:,} / {row['total']:,}", f"{row['groups']:,}",
                 *(value(row["baselines"][rule]) for rule in rules), note(row)]  # fmt: skip
        lines.append(("main" if row["headline"] else "", cells))
    return _table(head, lines, {0, 1, len(head) - 1})


def _published(result: dict[str, Any]) -> str:
    parts = ["<h2>Published numbers of other systems</h2>"] if result["published"] else []
    for table in result["published"]:
        lines = [("main", [f"{result['model']} (here)", *own_cells(result, table)])]
        lines += [("", [name, *(c or "-" for c in cells)]) for name, cells in table["rows"].items()]
        parts.append(f"<p class=faint>{_text(table_words(table))}</p>")
        parts.append(_table(["", *table["columns"].values()], lines, {0}))
    return "".join(parts)


# Probes


def _probe(probe: dict[str, Any] | None, title: str) -> str:
    if not probe:
        return ""
    lines = [("", [row["name"], row["value"], row["meaning"]]) for row in probe["rows"]]
    found = probe.get("calibration") or probe.get("with")
    plots = _reliability(found) if found else ""
    return (
        f"<h2>{title}</h2><p class=faint>{_text(probe['about'])}</p>"
        + _table(["probe", "value", "what it means"], lines, {0, 1, 2})
        + plots
    )


def _reliability(found: dict[str, Any]) -> str:
    """Predicted against observed, as inline SVG; dots grow with their count."""
    size, edge = 260, 40

    def x(share: float) -> float:
        return edge + (share - 0.5) * 2 * size

    def y(share: float) -> float:
        return 10 + (1 - share) * size

    marks = [
        f"<line x1={x(0.5)} y1={y(0.5)} x2={x(1)} y2={y(1)} stroke='#999' stroke-dasharray='4 4'/>",
        f"<rect x={edge} y=10 width={size} height={size} fill=none stroke='#444'/>",
    ]
    most = max((row["count"] for row in found["bins"]), default=1)
    for row in found["bins"]:
        radius = 3 + 7 * (row["count"] / most) ** 0.5
        words = f"{row['predicted']:.2f} predicted, {row['observed']:.2f} observed"
        words += f", {row['count']} pairs"
        marks.append(
            f"<circle cx={x(row['predicted']):.1f} cy={y(row['observed']):.1f} r={radius:.1f} "
            f"fill='#2a62b8' fill-opacity=.75><title>{words}</title></circle>"
        )
    for share in (0.5, 0.75, 1.0):
        marks.append(f"<text x={x(share)} y={size + 26} text-anchor=middle>{share:g}</text>")
    for share in (0.0, 0.5, 1.0):
        marks.append(f"<text x={edge - 6} y={y(share) + 4} text-anchor=end>{share:g}</text>")
    marks.append(f"<text x={edge + size / 2} y={size + 44} text-anchor=middle>predicted chance of"
                 " the preferred edit</text>")  # fmt: skip
    rows = [
        ("", [f"{r['predicted']:.3f}", f"{r['observed']:.3f}", r["count"]]) for r in found["bins"]
    ]
    return (
        "<h3>Reliability: how often the model's choice is people's choice</h3><div class=row>"
        f"<svg width={size + 70} height={size + 54} font-size=12>{''.join(marks)}</svg>"
        + _table(["predicted", "observed", "pairs"], rows, set())
        + "</div><p class=faint>On the dashed line, predicted and observed agree; below it the "
        "model is too sure of itself.</p>"
    )


# Mistakes


def _mistakes(judged: Sequence[Judged]) -> str:
    found = worst(judged)
    if not found:
        return ""
    return (
        "<h2>Worst mistakes</h2><p class=faint>Pairs people decided, ranked the other way with the "
        "largest difference in score; at most one per prompt.</p>"
        + "".join(_mistake(verdict) for verdict in found)
    )


def _mistake(verdict: Verdict) -> str:
    case, answer = verdict.judged
    pair = verdict.comparison
    liked = pair.first if pair.label > 0 else pair.second
    figures = [_figure(part, "source") for part in case.prompt if isinstance(part, Picture)]
    order = _ranks(case)
    for place, parts in enumerate(case.candidates):
        words = [_text(case.names[place] if place < len(case.names) else f"candidate {place}")]
        if answer.scores is not None:
            words.append(f"score {answer.scores[place]:+.3f}")
        if order[place]:
            words.append(f"people's rank {order[place]}")
        if place == liked:
            words.append("<span class=liked>people prefer this one</span>")
        elif place in (pair.first, pair.second):
            words.append("<span class=picked>the model prefers this one</span>")
        pictures = [part for part in parts if isinstance(part, Picture)]
        said = " ".join(part.text for part in parts if not isinstance(part, Picture))
        caption = "<br>".join(words) + (f"<br>{_text(said[:600])}" if said else "")
        figures.append(_figure(pictures[0] if pictures else None, caption, raw=True))
    gap = "" if verdict.gap is None else f", difference in score {abs(verdict.gap):.3f}"
    words = instruction(verdict) or "(the files hold no instruction)"
    return (
        f"<div class=case><p><b>{_text(words[:600])}</b><br><span class=faint>"
        f"{_text(case.section)} {_text(case.subtask)}, asked for {_text(case.dimension)}, "
        f"{_text(case.id[:80])}{gap}</span></p>"
        f"<div class=row>{''.join(figures)}</div></div>"
    )


def _ranks(case: Any) -> list[int]:
    """1 + how many candidates people prefer to it; 0 where it stands in no comparison."""
    ranks = [0] * len(case.candidates)
    for pair in case.comparisons:
        for own, label in ((pair.first, -pair.label), (pair.second, pair.label)):
            ranks[own] = max(ranks[own], 1) + (label > 0)
    return ranks


def _figure(picture: Picture | None, caption: str, raw: bool = False) -> str:
    words = caption if raw else _text(caption)
    if picture is None:
        return f"<figure><figcaption>{words}</figcaption></figure>"
    try:
        opened = open_image(picture.read())
    except UserError as error:
        return f"<figure><figcaption>{words}<br>{_text(error)}</figcaption></figure>"
    opened.thumbnail((2 * SIDE, 2 * SIDE))
    file = io.BytesIO()
    opened.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f"<figure><img alt='{_text(caption if not raw else 'candidate')}' "
        f"src='data:image/jpeg;base64,{data}'><figcaption>{words}</figcaption></figure>"
    )
