"""Which reward dimension the headlines of an evaluation are of."""

import json

from benchmark_case import issue, number, run


def test_headlines_are_of_the_first_dimension_whoever_comes_first(tmp_path):
    """The first case may have labels in another one alone."""
    lines = [
        {"id": f"u{i}", "prompt": ["Edit"], "candidates": ["a", f"b{i}", f"c{i}"],
         "dimensions": ["overall", "quality"], "scores": scores}
        for i, scores in enumerate((
            {"overall": [None] * 3, "quality": [1, 2, 3]}, {"overall": [3, 2, 1]},
            {"overall": [1, 2, 3], "quality": [3, 2, 1]},
        ))
    ]  # fmt: skip
    path, said = tmp_path / "own.jsonl", tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said.write_text("".join(f'{{"id": "u{i}", "scores": [3, 2, 1]}}\n' for i in range(3)))
    result = run(tmp_path / "r.json", "jsonl", path, [said])
    row = number(result, "pairs", "pair accuracy")
    assert row["headline"] and (row["right"], row["count"]) == (3, 6)
    first = run(tmp_path / "f.json", "jsonl", path, [said], "--limit=1")
    assert [row["section"] for row in first["rows"]] == ["pairs", "pairs"]  # of `quality`
    said.write_text(said.read_text() + '{"id": "u2", "scores": [1]}\n')
    run(tmp_path / "g.json", "jsonl", path, [said], "--limit=1")  # behind the limit
    assert not issue(first, "prediction for an id")
    other = number(result, "pairs (quality)", "pair accuracy")
    assert not other["headline"] and (other["right"], other["count"]) == (3, 6)


def test_dimensions_that_lines_name_for_themselves_are_not_mixed(tmp_path):
    lines = [
        {"id": f"u{i}", "prompt": ["Edit"], "candidates": ["a", f"b{i}"], "scores": scores}
        for i in range(3) for scores in ({"overall": [2, 1]}, {"quality": [1, 1]})
    ]  # fmt: skip
    path, said = tmp_path / "own.jsonl", tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said.write_text("".join(f'{{"id": "u{i}", "scores": [3, 2]}}\n' for i in range(3)))
    result = run(tmp_path / "r.json", "jsonl", path, [said])
    assert not issue(result, "id ") and result["tie_threshold_tuned_here"] is None
    assert [r["section"] for r in result["rows"] if r["headline"]] == ["pairs"]
