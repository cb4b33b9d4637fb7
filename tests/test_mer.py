"""MER-Bench: its layouts, and its official numbers read again."""

import json
import math

import numpy as np
import pytest
from benchmark_case import answered, issue, number, run, values
from benchmark_files import png, write_parquet

from jrm_jax.errors import UserError
from jrm_jax.evaluation.cases import Issues
from jrm_jax.evaluation.layouts import LAYOUTS

SIZES = (2, 2, 3, 3, 3, 4, 4)


def rows():
    return [
        {"pair_id": f"{size}pair_{i}", "label": ("add", "style")[i % 2], "instruction": f"Edit {i}",
         "original_image": {"bytes": png(i), "path": None},
         "edited_images": [{"bytes": png(10 * i + k), "path": None} for k in range(1, size + 1)]}
        for i, size in enumerate(SIZES)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As on the hub: a file for each split."""
    folder = tmp_path_factory.mktemp("mer") / "data"
    for size in (2, 3, 4):
        mine = [row for row in rows() if len(row["edited_images"]) == size]
        write_parquet(folder / f"{size}pair-00000-of-00001.parquet", mine)
    return folder


def official(results):
    """The published numbers, computed from the results file alone."""
    found = {}
    for entry in results.values():
        order, n = entry["pred_rank"], len(entry["pred_rank"])
        inverse = sum(order[i] > order[j] for i in range(n) for j in range(i + 1, n))
        gain = sum((n - i) / math.log2(order[i] + 2) for i in range(n))
        best = sum((n - i) / math.log2(i + 2) for i in range(n))
        exact = order == entry["gt_rank"] and len(set(entry["scores"])) == n
        numbers = {
            "exact match": exact, "Kendall's tau": 1 - 4 * inverse / (n * (n - 1)),
            "NDCG": gain / best, "best edit first": order[0] == 0,
            "best two first": sorted(order[:2]) == [0, 1],
            "Spearman's rho": 1 - 6 * sum((a - i) ** 2 for i, a in enumerate(order))
            / (n * (n**2 - 1)),
        }  # fmt: skip
        for part in ("Overall", f"{entry['pair_type']}-Pair", f"Overall / {entry['label']}"):
            for name, value in numbers.items():
                found.setdefault((part, name), []).append(value)
    return {key: np.mean(values) for key, values in found.items()}


def test_mer_bench_official_numbers_and_files(folder, tmp_path):
    rng = np.random.default_rng(0)

    def score(i, case):
        size = len(case.candidates)
        if case.id == "3pair_2":
            return (1.0, 1.0, 0.0)  # equal: wrong, though the first come first
        noise = rng.normal(size=size) * (0.1 if i % 2 else 3)
        return tuple((size - np.arange(size) + noise).tolist())

    benchmark, judged = answered("mer_bench", folder, score)
    assert [len(case.candidates) for case in benchmark.cases] == list(SIZES)
    LAYOUTS["mer_bench"].write(judged, tmp_path, "m")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["3pair_2"]["pred_rank"] == [0, 1, 2] and results["3pair_2"]["is_correct"]
    assert results["4pair_6"]["gt_qualities"] == [4, 3, 2, 1]
    wanted, found = official(results), values("mer_bench", benchmark, judged)
    shared = wanted.keys() & found.keys()
    assert {k for k in wanted if k[0] == "Overall"} <= shared
    for key in shared:
        assert found[key] == pytest.approx(wanted[key], abs=1e-12), key
    assert 0 < found["Overall", "exact match"] < 1
    again = LAYOUTS["mer_bench"].read_predictions(benchmark, [str(tmp_path)])
    assert values("mer_bench", benchmark, again) == found
    del results["2pair_0"]
    results |= {"x": {"scores": [1, 2]}, "2pair_1": {"scores": None}, "3pair_3": None}
    (tmp_path / "results.json").write_text(json.dumps(results))
    result = run(tmp_path / "r.json", "mer_bench", folder, [tmp_path / "results.json"])
    assert number(result, "Overall", "exact match")["count"] == len(SIZES) - 3
    assert issue(result, "prediction for an id") == ["x"]
    assert len(issue(result, "score that is no number")) == 2


def test_mer_bench_as_json_and_wrong_sizes(tmp_path):
    plain = {"pair_id": "2pair_0", "instruction": "Edit", "original_image": "0.png", "label": "add",
             "edited_images": [{"edited_image": "1.png", "quality": 2}, "2.png"]}  # fmt: skip
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps(plain) + "\n")
    (case,) = LAYOUTS["mer_bench"].read(str(path), Issues()).cases
    assert [picture.read() for picture in case.pictures] == [png(0), png(1), png(2)]
    assert [(c.first, c.second, c.label) for c in case.comparisons] == [(0, 1, 1)]
    path.write_text(json.dumps(plain | {"edited_images": ["1.png"]}))
    with pytest.raises(UserError, match="has 1 entries, must be 2, 3 or 4"):
        LAYOUTS["mer_bench"].read(str(path), Issues())
