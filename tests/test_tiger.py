"""TIGER-Lab's EditReward-Bench: both layouts, our rule, and the published one read again."""

import json
from itertools import combinations

import numpy as np
import pytest
from benchmark_case import answered, issue, number, run, values
from benchmark_files import tiger_log, tiger_rows, write_parquet, write_tiger

from jrm_jax.errors import UserError
from jrm_jax.evaluation import report
from jrm_jax.evaluation.cases import Answer, Issues, Judged
from jrm_jax.evaluation.layouts import LAYOUTS
from jrm_jax.evaluation.unsure import scored_pairs

# as `inference_2pair_hf.py --model_name m` looks for it
PAIR_FILE = "m_pairwise_2pair_2pair_hf.json"


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


def test_rankings_that_cannot_be_read_are_nobodys_preference(tmp_path):
    """They count as wrong, officially, and as nothing else."""
    rows = tiger_rows()
    rows[0]["ranking"] = "A?B"
    path = write_parquet(tmp_path / "rows.parquet", rows)
    _, judged = answered(
        "editreward_bench", path, lambda i, case: tuple(range(len(case.candidates)))
    )
    assert 2 in {c.label for one in judged for c in one.case.comparisons}
    assert {v.comparison.label for v in report.worst(judged, 100)} <= {1, -1}
    assert {v.comparison.label for v in scored_pairs(judged)} == {1, -1}


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
    votes = json.loads((out / PAIR_FILE).read_text())["results"]
    assert [(v["model_vote"], v["human_vote"], v["is_correct"]) for v in votes] == [
        ("A>B", "A>B", True), ("A>B", "A=B", False), ("A>B", "B>A", False)]  # fmt: skip
    again = LAYOUTS["editreward_bench"].read_predictions(benchmark, [str(out)])
    found = values("editreward_bench", benchmark, again)
    assert found == values("editreward_bench", benchmark, judged)
    assert found["3-Pair", "strict accuracy"] == 1 / 2
    results = [*votes[:1], None, {**votes[2], "model_vote": "?"}, {"id": "zz", "model_vote": "A>B"}]
    (out / PAIR_FILE).write_text(json.dumps({"results": results}))
    (out / PAIR_FILE.replace("2pair", "3pair")).unlink()
    result = run(tmp_path / "r.json", "editreward_bench", path, [out])
    assert len(issue(result, "failed call")) == len(issue(result, "vote that cannot")) == 1
    assert issue(result, "prediction for an id") == ["zz/AvsB"]
    assert number(result, "Overall", "pair accuracy, three answers")["total"] == 9


# Files and readings of the official scripts


def eval_bench(groups, scores):
    """eval_bench.py read again: its log, and (pair accuracy, strict accuracy) by size."""
    logs, numbers = [], {}
    for size in (2, 3, 4):
        rows = [(g, s) for g, s in zip(groups, scores, strict=True) if len(s) == size]
        pairs = []
        for group, own in rows:
            text = group["human_vote"].get("ranking", "")
            for i, j in combinations(range(size), 2):
                first, second = text.find("ABCD"[i]), text.find("ABCD"[j])
                label = 0 if -1 in (first, second) else 1 if first < second else -1
                label = {"B>A": -1, "A<B": -1, "A=B=Good": 0, "A=B=Bad": 0}.get(text, label)
                pairs.append((label, own[i] - own[j]))

        def share(eps, pairs=pairs):
            return np.mean([h == 0 if abs(m) <= eps else h * m > 0 for h, m in pairs])

        tries = sorted({0.0, *(abs(m) for _, m in pairs)}) if size == 2 else [0.0]
        eps = max(tries, key=lambda e: (share(e), -e))
        rights = []
        for i, (group, own) in enumerate(rows):
            text, order = group["human_vote"].get("ranking", ""), np.argsort(own)[::-1].tolist()
            if text in ("A=B=Good", "A=B=Bad"):
                right = abs(own[0] - own[1]) <= eps
            else:
                letters = "BA" if text == "A<B" else text.replace(">", "").replace("<", "")
                right = "=" not in text and [ord(c) - 65 for c in letters] == order
            rights.append(right)
            logs.append(
                {"file_name": f"{size}-Pair", "sample_index": i, "prompt": group["prompt"],
                 "ground_truth": group["human_vote"].get("preference", "N/A"),
                 "strict_accuracy_correct": right,
                 "model_outputs": [
                     {"path": path, "score": score, "predicted_rank": order.index(k) + 1}
                     for k, (path, score) in enumerate(
                         zip(group["paths_generated"], own, strict=True))]}
            )  # fmt: skip
        strict_pairs = [h * m > 0 for h, m in pairs if h]
        numbers[f"{size}-Pair"] = (
            share(eps) if size == 2 else np.mean(strict_pairs), np.mean(rights), eps,
        )  # fmt: skip
    return logs, numbers


SPACED = {
    2: [" A > B", "B > A", "A=B=Good ", "A = B", "B<A", "A=B=Bad", "b>a", "A=B=Good", None],
    3: ["A > B > C", "C<A<B", "A<B<C", "B>A>C", "A>B<C"],
    4: ["A>B>C>D", "D > C>B>A"],
}


@pytest.fixture
def spaced(tmp_path):
    """Rankings with blanks, signs the other way round, none; a group without a picture's name."""
    groups = []
    for size, texts in SPACED.items():
        mine = [
            {"prompt": f"Edit {i} ü", "path_src": "s.png", "human_vote": {"ranking": text},
             "paths_generated": [f"{i}{k}.png" for k in range(size)]}
            for i, text in enumerate(texts)
        ]  # fmt: skip
        mine[0]["human_vote"]["preference"] = "A first"
        for group in mine:
            if group["human_vote"]["ranking"] is None:
                group["human_vote"] = {"preference": "A>B"}
        gone = {**mine[0], "paths_generated": ["", *mine[0]["paths_generated"][1:]]}
        path = tmp_path / f"EditReward_Bench_{size}pair.json"
        path.write_text(json.dumps([mine[0], gone, *mine[1:]]))
        groups += mine
    return tmp_path, groups


@pytest.mark.parametrize("seed", range(4))
def test_the_log_and_the_published_rows_are_the_official_scripts(spaced, seed):
    folder, groups = spaced
    rng = np.random.default_rng(seed)
    scores = [np.round(rng.normal(size=len(g["paths_generated"])), seed % 2).tolist()
              for g in groups]  # fmt: skip
    scores[5] = [1.0, 1.0]  # a tie of people and scores
    scores[-1] = [2.0, 2.0, 2.0, 2.0]
    benchmark, judged = answered("editreward_bench", folder, lambda i, case: tuple(scores[i]))
    assert len(benchmark.issues.found["group without its pictures (left out, as officially)"]) == 3
    LAYOUTS["editreward_bench"].write(judged, folder, "m")
    wanted, numbers = eval_bench(groups, scores)
    log = folder / "detailed_log.json"
    assert log.read_text() == json.dumps(wanted, indent=2, ensure_ascii=False)
    found = values("editreward_bench", benchmark, judged)
    for section, (pair, strict, _) in numbers.items():
        assert found[section, "pair accuracy, published rule"] == pytest.approx(pair, abs=1e-15)
        assert found[section, "strict accuracy, published rule"] == pytest.approx(strict, abs=1e-15)
    (folder / "log").mkdir()
    again = log.rename(folder / "log" / log.name)
    assert LAYOUTS["editreward_bench"].read_predictions(benchmark, [str(again)]) == judged


def test_rankings_are_read_as_meant_in_our_rows(spaced):
    folder, _ = spaced
    benchmark = LAYOUTS["editreward_bench"].read(str(folder), Issues())
    orders = {2: [(0, 1), (1, 0), "tie", "tie", (0, 1), "tie", (1, 0), "tie", (0, 1)],
              3: [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 0, 2), None],
              4: [(0, 1, 2, 3), (3, 2, 1, 0)]}  # fmt: skip
    assert [case.fields["order"] for case in benchmark.cases] == sum(orders.values(), [])
    (unread,) = benchmark.issues.found["ranking that cannot be read (the group counts as wrong)"]
    assert unread == "3-Pair/4: A>B<C"


def test_a_threshold_for_ties_comes_from_the_pairs_alone(tiger, tmp_path):
    log = tiger_log(tiger, tmp_path / "log.json", 1)
    entries = json.loads(log.read_text())
    for entry in entries:  # in two edits small gaps are ties; in three and four they are not
        if entry["file_name"] == "2-Pair":
            for place, output in enumerate(entry["model_outputs"]):
                output["score"] = 5.0 * place if ">" in entry["ground_truth"] else 2.944 * place
    log.write_text(json.dumps(entries))
    result = run(tmp_path / "r.json", "editreward_bench", tiger, [log])
    assert result["tie_threshold_tuned_here"] == pytest.approx(2.944)
    note = number(result, "2-Pair", "strict accuracy, published rule")["note"]
    assert note.endswith(": 2.944")
    from jrm_jax import evaluate

    other = ["--benchmark=genai_bench", f"--tie_from={tmp_path / 'r.json'}"]
    assert evaluate._threshold(evaluate.parse_args(other)) == pytest.approx(2.944)
    result["tie_threshold_tuned_here"] = None
    (tmp_path / "r.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="no scores of pairs that people call equal"):
        evaluate._threshold(evaluate.parse_args(other))


def test_votes_stand_where_the_official_script_looks_for_them(tmp_path):
    """By place among the rows of a size: null where a row has no answer."""
    rows = tiger_rows()
    rows[1]["ranking"] = "A = B"
    mixed = [rows[i] for i in (3, 0, 6, 1, 4, 2, 7, 5, 8)]  # groups and sizes in each other's way
    path = write_parquet(tmp_path / "rows.parquet", mixed)
    benchmark, judged = answered("editreward_bench", path, lambda i, case: (0.1, 0.0, -1.0)[
        : len(case.candidates)])  # fmt: skip
    out = tmp_path / "said"
    out.mkdir()
    # the first pair is not judged; 0.1 is a tie
    unjudged = benchmark.cases[1].id
    answers = [one for one in judged if one.case.id != unjudged]
    LAYOUTS["editreward_bench"].write(answers, out, "org/m", 0.2)
    pairs = json.loads((out / "org" / PAIR_FILE).read_text())
    assert [r and (r["id"], r["model_vote"], r["is_correct"]) for r in pairs["results"]] == [
        None, ("p1", "A=B", False), ("p0", "A=B", False)]  # fmt: skip
    assert (pairs["template"], pairs["total_examples"]) == ("pairwise_2pair", 2)
    triples = json.loads((out / "org" / PAIR_FILE.replace("2pair", "3pair")).read_text())
    wanted = [row["id"] for row in mixed if row["dataset"] == "3pair"]
    assert [result["id"] for result in triples["results"]] == wanted
    again = LAYOUTS["editreward_bench"].read_predictions(benchmark, [str(out)])
    votes = {one.case.id: one.answer.votes for one in again}
    assert votes["2-Pair/p1#3"] == {"AvsB": [0]} and unjudged not in votes
    assert sorted(benchmark.issues.found) == [
        "failed call (leaves the denominator, as officially)",
        "id that occurs more than once", "id with contradicting labels",
    ]  # fmt: skip
