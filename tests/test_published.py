"""Other systems' numbers, and the commands of docs/evaluation.md."""

import json
from pathlib import Path

import pytest

from jrm_jax.evaluation import page, report
from jrm_jax.evaluation.layouts import LAYOUTS

ROOT = Path(__file__).resolve().parents[1]
TABLES = json.loads((ROOT / "jrm_jax/evaluation/published.json").read_text())["tables"]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table["source"][:30])
def test_every_table_says_its_protocol(table):
    assert table["benchmark"] in LAYOUTS and table["unit"] in ("percent", "share")
    assert "pairwise" in table["protocol"] or "pointwise" in table["protocol"]
    owner = {"editreward_bench": "TIGER-Lab's", "editscore_bench": "EditScore's"}
    assert owner.get(table["benchmark"], "") in table["protocol"]
    assert all(len(cells) == len(table["columns"]) for cells in table["rows"].values())
    limit = 1 if table["unit"] == "share" else 100
    numbers = [float(c.rstrip("*")) for cells in table["rows"].values() for c in cells if c]
    assert numbers and max(map(abs, numbers)) <= limit


def test_the_numbers_of_august_2026_stand_beside_ours():
    found = {}
    for name in ("mmrb2", "editreward_bench", "editscore_bench"):
        for table in report.published(name):
            for system, cells in table["rows"].items():
                found.setdefault((name, system.split(" (")[0]), []).append(cells)
    assert found["mmrb2", "RubricRM-Edit-9B"] == [["75.4"]]
    assert found["mmrb2", "JRM"] == [["69.3", "70.3", "64.6"]]
    assert [cells[0] for cells in found["mmrb2", "GPT-5"]] == ["70.5", "61.9"]
    assert found["editreward_bench", "RubricRM-Edit-9B"] == [["46.4"]]
    assert found["editscore_bench", "JRM"] == [[".854", None, ".851"]]
    row = {"section": "edit", "metric": "accuracy", "value": 0.6543}
    result = {"model": "ours", "rows": [row], "published": report.published("mmrb2")}
    text = "\n".join(report._published_lines(result))
    assert text.count("| **ours** (here) |") == 3 and "| **ours** (here) | 65.43 | - | - |" in text
    assert text.count("Protocol: ") == 3 and "Protocol: pointwise" in text
    assert page._published(result).count("65.43") == 3
    assert page._published(result | {"published": []}) == ""


def test_the_page_has_a_row_of_commands_for_every_public_benchmark():
    rows = (ROOT / "docs/evaluation.md").read_text().splitlines()
    for name, layout in LAYOUTS.items():
        assert any(f"`{name}`" in row for row in rows)
        commands = [row for row in rows if f"--benchmark={name} " in row]
        assert len(commands) == bool(layout.download) or name == "imagenhub"
        assert all(f"`{layout.download}`" in row for row in commands if layout.download)
