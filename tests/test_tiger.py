"""TIGER-Lab's EditReward-Bench: both layouts, our rule, and the published one read again."""

import json
from itertools import combinations

import numpy as np
import pytest
from benchmark_case import answered, issue, number, run, values
from benchmark_files import tiger_log, tiger_rows, write_parquet, write_tiger

from jrm_jax.evaluation.cases import Answer, Issues, Judged
from jrm_jax.evaluation.layouts import LAYOUTS


@pytest.fixture(scope="module")
def tiger(tmp_path_factory):
    return write_tiger(tmp_path_factory.mktemp("tiger"))


def published_tiger(folder, log):
    """The published rule read again: {section: (pair accuracy, strict accuracy)}."""
    entries = json.loads(log.read_text())
    found, every, hits = {}, [], []

    def label(text, i, j):
        if text in ("A=B=Good", "A=B=Bad"):
            return 0
        if text == "A<B":
            return -1
        return 1 if text.find("ABCD"[i]) < text.find("ABCD"[j]) else -1

    def best(pairs):
        def share(eps):
            return np.mean([(0 if abs(m) <= eps else np.sign(m) or 9) == h for h, m in pairs])

        tries = sorted({0.0, *(abs(m) for _, m in pairs)})
        return max((share(eps), -eps) for eps in tries)

    for size in (2, 3, 4):
        groups = json.loads((folder / f"EditReward_Bench_{size}pair.json").read_text())
        pairs, strict, rows = [], [], []
        for entry in (e for e in entries if e["file_name"] == f"{size}-Pair"):
            text = groups[entry["sample_index"]]["human_vote"]["ranking"]
            scores = [o["score"] for o in entry["model_outputs"]]
            rows.append((text, scores))
            pairs += [(label(text, i, j), scores[i] - scores[j])
                      for i, j in combinations(range(size), 2)]  # fmt: skip
        share, eps = best(pairs)
        if size > 2:
            decided = [(h, m) for h, m in pairs if h]
            share, eps = np.mean([h * m > 0 for h, m in decided]), 0.0
        for text, scores in rows:
            order = "".join("ABCD"[i] for i in np.argsort(scores)[::-1])
            if text in ("A=B=Good", "A=B=Bad"):
                strict.append(abs(scores[0] - scores[1]) <= -eps)
            else:
                strict.append("=" not in text and {"A<B": "BA"}.get(
                    text, text.replace(">", "")) == order)  # fmt: skip
        found[f"{size}-Pair"] = share, np.mean(strict)
        every += pairs
        hits += strict
    found["Overall"] = best(every)[0], np.mean(hits)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_tiger_published_numbers_to_the_last_digit(tiger, tmp_path, seed):
    log = tiger_log(tiger, tmp_path / "log.json", seed)
    result = run(tmp_path / "r.json", "editreward_bench", tiger, [log])
    for section, (pair, strict) in published_tiger(tiger, log).items():
        assert number(result, section, "pair accuracy, published rule")["value"] == pytest.approx(
            pair, abs=1e-15)  # fmt: skip
        assert number(result, section, "strict accuracy, published rule")["value"] == pytest.approx(
            strict, abs=1e-15)  # fmt: skip
    assert "tuned on these very groups" in number(
        result, "Overall", "strict accuracy, published rule")["note"]  # fmt: skip
    assert number(result, "Overall", "strict accuracy")["total"] == 15
    assert issue(result, "bare 'A=B'") == ["2-Pair/4"]
    assert len(issue(result, "ranking that cannot be read")) == 1


def test_tiger_strict_accuracy_with_a_threshold_from_elsewhere(tiger):
    perfect = {"A": 3.0, "B": 2.0, "C": 1.0, "D": 0.0}

    def score(i, case):
        order = case.fields["order"]
        if order == "tie" or order is None:
            return tuple(0.05 * k for k in range(len(case.candidates)))
        return tuple(perfect["ABCD"[order.index(k)]] for k in range(len(order)))

    benchmark, judged = answered("editreward_bench", tiger, score)
    loose = values("editreward_bench", benchmark, judged, 0.1)
    assert loose["2-Pair", "strict accuracy"] == 1.0
    assert loose["3-Pair", "strict accuracy"] == 4 / 5  # one ranking cannot be read
    assert loose["Overall", "strict accuracy"] == 14 / 15
    none = values("editreward_bench", benchmark, judged, 0.0)
    assert none["2-Pair", "strict accuracy"] == 4 / 7


def test_tiger_rows_become_groups_and_votes_are_read_back(tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", tiger_rows())
    issues = Issues()
    benchmark = LAYOUTS["editreward_bench"].read(str(path), issues)
    assert [len(case.candidates) for case in benchmark.cases] == [2, 2, 2, 3, 3]
    assert issues.found["id with contradicting labels"] == ["2pair: p0: A>B, B>A"]
    assert [c.label for c in benchmark.cases[1].comparisons] == [0]
    third = benchmark.cases[3]
    assert [(c.first, c.second, c.label) for c in third.comparisons] == [
        (0, 1, 1), (0, 2, -1), (1, 2, -1)]  # fmt: skip
    judged = [Judged(case, Answer(tuple(range(len(case.candidates), 0, -1))))
              for case in benchmark.cases]  # fmt: skip
    out = tmp_path / "said"
    out.mkdir()
    LAYOUTS["editreward_bench"].write(judged, out, "m")
    votes = json.loads((out / "2pair_hf.json").read_text())["results"]
    assert [(v["model_vote"], v["human_vote"], v["is_correct"]) for v in votes] == [
        ("A>B", "A>B", True), ("A>B", "A=B", False), ("A>B", "B>A", False)]  # fmt: skip
    again = LAYOUTS["editreward_bench"].read_predictions(benchmark, [str(out)])
    found = values("editreward_bench", benchmark, again)
    assert found == values("editreward_bench", benchmark, judged)
    assert found["3-Pair", "strict accuracy"] == 1 / 2
    results = [*votes[:1], None, {**votes[2], "model_vote": "?"}, {"id": "zz", "model_vote": "A>B"}]
    (out / "2pair_hf.json").write_text(json.dumps({"results": results}))
    (out / "3pair_hf.json").unlink()
    result = run(tmp_path / "r.json", "editreward_bench", path, [out])
    assert len(issue(result, "failed call")) == len(issue(result, "vote that cannot")) == 1
    assert issue(result, "prediction for an id") == ["zz/AvsB"]
    assert number(result, "Overall", "pair accuracy, three answers")["total"] == 9
