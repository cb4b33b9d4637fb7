"""Every benchmark's layout, its oddities, its numbers against a second reading of the rules."""

import json
import math

import numpy as np
import pytest
from benchmark_case import answered, issue, number, run, values
from benchmark_files import (
    TASKS,
    editscore_rows,
    judge_editscore,
    judge_mmrb2,
    write_arrow,
    write_mmrb2,
    write_pairs,
    write_parquet,
    write_ratings,
)
from scipy import stats

from jrm_jax.data.schema import Text
from jrm_jax.errors import UserError
from jrm_jax.evaluation import mmrb2 as mmrb2_layout
from jrm_jax.evaluation import report
from jrm_jax.evaluation.cases import Issues
from jrm_jax.evaluation.layouts import LAYOUTS
from jrm_jax.evaluation.metrics import point_value

# MMRB2


@pytest.fixture(scope="module")
def mmrb2(tmp_path_factory):
    return write_mmrb2(tmp_path_factory.mktemp("mmrb2"))


def count_mmrb2(folder, judge, task):
    """The protocol read again: (right, judgements, missing pairs)."""
    pairs = json.loads((folder / f"{task}.json").read_text())["pairs"]
    said = json.loads((judge / f"{task}.json").read_text())
    right = total = 0
    for pair in pairs:
        for side in ("forward", "reverse") if pair["id"] in said else ():
            given = said[pair["id"]][side]
            letter = given[0]["judgement"] if given else None
            if letter:
                total += 1
                meant = letter if side == "forward" else {"A": "B", "B": "A"}.get(letter)
                right += meant == pair["chosen"]
    return right, total, sum(pair["id"] not in said for pair in pairs)


def test_mmrb2_counts_what_is_there_and_shows_what_is_not(mmrb2, tmp_path):
    judge = judge_mmrb2(mmrb2, tmp_path / "judge")
    result = run(tmp_path / "r.json", "mmrb2", mmrb2, [judge])
    rights = totals = 0
    for task, stem in mmrb2_layout.TASKS.items():
        right, total, missing = count_mmrb2(mmrb2, judge, stem)
        row = number(result, task, "accuracy")
        assert row["value"] == right / total and (row["count"], row["total"]) == (total, 14)
        assert row["official"] and missing == 1
        strict = number(result, task, "accuracy, missing judgements wrong")
        assert strict["value"] == pytest.approx(right / 14) and strict["count"] == 14
        rights, totals = rights + right, totals + total
    assert number(result, "all tasks", "accuracy")["value"] == rights / totals
    assert len(issue(result, "prediction for an id that is not")) == 4
    assert len(issue(result, "case without a prediction")) == 4
    assert len(issue(result, "judgement that is missing")) == 8
    by_source = [number(result, f"edit / {s}", "accuracy") for s in ("emu-edit", "dreambench")]
    assert sum(row["count"] for row in by_source) == number(result, "edit", "accuracy")["count"]
    files = [judge / f"{stem}.json" for stem in ("t2i", "edit", "interleaved", "reasoning")]
    again = run(tmp_path / "again.json", "mmrb2", mmrb2, files)
    assert again["rows"] == result["rows"]


def test_mmrb2_contents_of_every_shape(mmrb2):
    cases = {c.id: c for c in LAYOUTS["mmrb2"].read(str(mmrb2), Issues()).cases}
    edit = cases["edit_1"]
    assert [isinstance(part, Text) for part in edit.prompt] == [True, True, False, False]
    assert edit.fields["images"] == 2
    assert [len(parts) for parts in cases["interleaved_1"].candidates] == [4, 1]
    assert cases["reasoning_1"].candidates[1] == ()


def test_mmrb2_scores_are_judged_alike_in_both_orders(mmrb2, tmp_path):
    benchmark, judged = answered("mmrb2", mmrb2, lambda i, case: (float(i % 3), 1.0))
    LAYOUTS["mmrb2"].write(judged, tmp_path, "m")
    written = json.loads((tmp_path / "edit.json").read_text())
    letters = {tuple(e[side][0]["judgement"] for side in ("forward", "reverse"))
               for e in written.values()}  # fmt: skip
    assert letters == {("A", "B"), ("B", "A"), ("A", "A")}  # equal scores: the first, twice
    again = LAYOUTS["mmrb2"].read_predictions(benchmark, [str(tmp_path)])
    assert values("mmrb2", benchmark, again) == values("mmrb2", benchmark, judged)
    ties = [one for one in judged if one.answer.scores == (1.0, 1.0)]
    assert values("mmrb2", benchmark, ties)["all tasks", "accuracy"] == 0.5


def test_mmrb2_without_prompts_measures_predictions_but_scores_nothing(mmrb2, tmp_path):
    content = json.loads((mmrb2 / "edit.json").read_text())
    for pair in content["pairs"]:
        del pair["prompt_content"]
        for side in ("response_a", "response_b"):
            del pair[side]["response_content"]
    content["pairs"].append({**content["pairs"][0], "chosen": "BA"["AB".index(
        content["pairs"][0]["chosen"])]})  # fmt: skip
    path = tmp_path / "edit_response_only.json"
    path.write_text(json.dumps(content))
    judge = judge_mmrb2(mmrb2, tmp_path / "judge")
    result = run(tmp_path / "r.json", "mmrb2", path, [judge / "edit.json"])
    assert number(result, "edit", "accuracy")["total"] == 16
    assert issue(result, "id that occurs more than once") == ["edit_0 (2 times)"]
    assert issue(result, "id with contradicting labels") == ["edit_0: A, B"]
    from jrm_jax.evaluation.scoring import score_cases

    with pytest.raises(UserError, match="no prompts"):
        score_cases(None, LAYOUTS["mmrb2"].read(str(path), Issues()).cases, Issues())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pair: pair.pop("chosen"), "'chosen' is missing"),
        (lambda pair: pair.pop("id"), "'pair_id' is missing"),
        (lambda pair: pair["prompt_content"].append("text"), "content must be"),
        (lambda pair: pair.update(response_a="x"), "'response_a' is a str"),
    ],
)
def test_mmrb2_says_what_is_wrong(mmrb2, tmp_path, change, words):
    content = json.loads((mmrb2 / "edit.json").read_text())
    change(content["pairs"][2])
    (tmp_path / "edit.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        LAYOUTS["mmrb2"].read(str(tmp_path), Issues())


def test_mmrb2_reads_the_names_of_its_readme_too(mmrb2, tmp_path):
    content = json.loads((mmrb2 / "edit.json").read_text())
    for pair in content["pairs"]:
        pair["pair_id"], pair["human_preference"] = pair.pop("id"), pair.pop("chosen")
        for side in ("response_a", "response_b"):
            pair[side]["model"] = pair[side].pop("model_name")
    content["pairs"][3]["human_annotations"] = [6] * 3 if (
        content["pairs"][3]["human_preference"] == "B") else [1] * 3  # fmt: skip
    content["pairs"][4]["human_preference"] = "both"
    path = tmp_path / "edit.json"
    path.write_text(json.dumps(content))
    issues = Issues()
    found = LAYOUTS["mmrb2"].read(str(path), issues).cases
    wanted = LAYOUTS["mmrb2"].read(str(mmrb2 / "edit.json"), Issues()).cases
    assert [(c.id, c.names) for c in found] == [(c.id, c.names) for c in wanted]
    labels = [case.comparisons[0].label for case in found]
    assert labels[:4] == [case.comparisons[0].label for case in wanted[:4]] and labels[4] == 2
    assert "edit_3" in issues.found["pair whose 'chosen' contradicts the mean of its annotations"]
    assert issues.found["pair whose 'chosen' is neither A nor B (always counted as wrong)"]


# EditScore


@pytest.fixture(scope="module")
def editscore(tmp_path_factory):
    folder = tmp_path_factory.mktemp("editscore")
    rows = editscore_rows()
    return folder, rows, write_parquet(folder / "data" / "train-0.parquet", rows)


def test_editscore_averages_subtasks_and_counts_equal_as_wrong(editscore, tmp_path):
    _, rows, path = editscore
    judge = judge_editscore(rows, tmp_path / "judge")
    result = run(tmp_path / "r.json", "editscore_bench", path, [judge])
    alone = run(tmp_path / "alone.json", "editscore_bench", None, [judge])
    for dimension in ("prompt_following", "consistency", "overall"):
        shares = {}
        for task in sorted(TASKS):
            lines = (judge / task / f"{dimension}.jsonl").read_text().splitlines()
            scores = [json.loads(line)["score"] for line in lines]
            shares[task] = sum(a > b for a, b in scores) / len(scores)
            row = number(result, f"{dimension} / {task}", "accuracy")
            assert row["value"] == shares[task] and row["count"] == len(scores)
        average = sum(shares.values()) / len(shares)
        assert number(result, dimension, "Average")["value"] == average
        assert number(alone, dimension, "Average")["value"] == average
        subject = [shares[f"subject-{k}"] for k in ("add", "remove", "replace")]
        found = number(result, f"{dimension} / Subject", "Average")["value"]
        assert found == np.mean(subject)
    assert len(issue(result, "id that occurs more than once")) == 1
    assert issue(result, "equal scores")
    assert any("first candidate is always" in words for words in result["remarks"])
    second = judge_editscore(rows, tmp_path / "second", seed=1)
    run(tmp_path / "s.json", "editscore_bench", path, [second])
    found = report.compare(str(tmp_path / "r.json"), str(tmp_path / "s.json"))
    names = ("prompt_following", "consistency", "overall")
    wanted = [f"{name}: accuracy over all pairs" for name in names]
    assert [row["metric"] for row in found["rows"]] == wanted


def test_a_limit_is_one_of_predictions_too(editscore, tmp_path):
    """What lies behind it counts nowhere, and is no unknown id."""
    _, rows, path = editscore
    judge = judge_editscore(rows, tmp_path / "judge")
    result = run(tmp_path / "r.json", "editscore_bench", path, [judge], "--limit=3")
    names = [f"{row['dimension']}: {row['task_type']}" for row in rows[:3]]
    assert len({*names}) == 3 and not issue(result, "unknown")
    assert result["counts"]["cases with a prediction"] == 4  # the first stands there twice
    assert {r["section"] for r in result["rows"] if r["count"]} >= {"consistency", "overall"}


@pytest.mark.parametrize("stream", [True, False])
def test_editscore_as_the_arrow_folder_that_is_downloaded(editscore, tmp_path, stream):
    _, rows, path = editscore
    folder = write_arrow(tmp_path / "bench", rows, stream=stream)
    wanted = LAYOUTS["editscore_bench"].read(str(path), Issues()).cases
    issues = Issues()
    found = LAYOUTS["editscore_bench"].read(str(folder), issues).cases
    assert not issues.found
    assert [(c.fields, c.prompt[0]) for c in found] == [(c.fields, c.prompt[0]) for c in wanted]
    assert [p.read() for p in found[-1].pictures] == [p.read() for p in wanted[-1].pictures]
    broken = folder / "data-00001-of-00002.arrow"
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(UserError, match="data-00001-of-00002.arrow"):
        LAYOUTS["editscore_bench"].read(str(folder), Issues())


def test_editscore_files_hold_the_subtasks_and_nothing_else(editscore, tmp_path):
    benchmark, judged = answered(
        "editscore_bench", editscore[2], lambda i, case: (float(i % 3), 1.0)
    )
    LAYOUTS["editscore_bench"].write(judged, tmp_path, "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(TASKS)
    line = json.loads((tmp_path / "compose" / "overall.jsonl").read_text().splitlines()[0])
    assert {"key", "idx", "score", "SC_reasoning", "PQ_reasoning"} <= set(line)
    again = LAYOUTS["editscore_bench"].read_predictions(benchmark, [str(tmp_path)])
    found = values("editscore_bench", benchmark, again)
    assert found == values("editscore_bench", benchmark, judged)


def test_editscore_resizes_edits_and_lists_oddities(editscore, tmp_path):
    folder, rows, _ = editscore
    from jrm_jax.data.images import image_size

    benchmark = LAYOUTS["editscore_bench"].read(str(editscore[2]), Issues())
    assert image_size(benchmark.cases[0].candidates[0][0].read()) == (32, 24)
    turned = {**rows[0], "key": rows[0]["key"][::-1]}
    odd = write_parquet(tmp_path / "odd.parquet", [rows[0], turned, rows[3], rows[3]])
    issues = Issues()
    LAYOUTS["editscore_bench"].read(str(odd), issues)
    assert len(issues.found["id that occurs more than once"]) == 1
    assert len(issues.found["id with contradicting labels"]) == 1
    path = tmp_path / "judge" / "compose" / "overall.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"key": ["u", "v"], "idx": 0, "score": [2, 1]}\n')
    result = run(tmp_path / "r.json", "editscore_bench", odd, [tmp_path / "judge"])
    assert issue(result, "prediction for an id that is not") == ["compose/overall: u > v"]
    assert "the benchmark has 13" in number(result, "overall", "Average")["note"]
    path.write_text('{"key": ["u", "v"], "idx": 0, "score": [2]}\n')
    with pytest.raises(UserError, match="two numbers"):
        run(tmp_path / "r.json", "editscore_bench", None, [tmp_path / "judge"])


def test_editscore_rows_and_files_of_unknown_dimensions_are_listed(editscore, tmp_path):
    _, rows, _ = editscore
    path = write_parquet(tmp_path / "odd.parquet", [rows[0], {**rows[1], "dimension": "beauty"}])
    judge = judge_editscore([rows[0], {**rows[1], "dimension": "beauty"}], tmp_path / "judge")
    result = run(tmp_path / "r.json", "editscore_bench", path, [judge])
    assert [w.split(": ")[-1] for w in issue(result, "row of an unknown dimension")] == ["beauty"]
    assert len(issue(result, "prediction file of an unknown dimension")) == 1
    assert result["counts"]["cases without a prediction"] == 1


# GenAI-Bench, AURORA, ImagenHub


@pytest.mark.parametrize("name", ["genai_bench", "aurora_bench"])
def test_pairs_with_ties_by_both_rules(tmp_path, name):
    path = write_pairs(tmp_path)
    gaps = [0.3, -0.2, 0.1, 0.05, 0.4, 0.6, 1.0]
    benchmark, judged = answered(name, path, lambda i, case: (gaps[i], 0.0))
    labels = [1, -1, 0, 1, -1, 0, 1]
    found = values(name, benchmark, judged, 0.15)
    said = [0 if abs(g) <= 0.15 else np.sign(g) for g in gaps]
    assert found["pairs", "accuracy with ties"] == np.mean(np.equal(said, labels))
    assert found["pairs", "accuracy without ties"] == 4 / 5
    best = max(
        np.mean(np.equal([0 if abs(g) <= eps else np.sign(g) for g in gaps], labels))
        for eps in map(abs, gaps)
    )
    assert found["pairs", "accuracy with ties, published rule"] == best
    LAYOUTS[name].write(judged, tmp_path, "m")
    predictions = tmp_path / "predictions.json"
    again = LAYOUTS[name].read_predictions(benchmark, [str(predictions)])
    assert values(name, benchmark, again, 0.15) == found


def test_genai_benchs_own_rows(tmp_path):
    from benchmark_files import png

    rows = [
        {"instruct_prompt": "Edit", "source_image": {"bytes": png(0), "path": None},
         "left_output_image": {"bytes": png(1), "path": None},
         "right_output_image": {"bytes": png(2), "path": None}, "vote_type": vote}
        for vote in ("leftvote", "rightvote", "tievote", "bothbad_vote")
    ]  # fmt: skip
    path = write_parquet(tmp_path / "g.parquet", rows)
    issues = Issues()
    cases = LAYOUTS["genai_bench"].read(str(path), issues).cases
    assert [case.comparisons[0].label for case in cases] == [1, -1, 0, 0]
    assert issues.found["id with contradicting labels"]
    with pytest.raises(UserError, match="needs the fields"):
        LAYOUTS["imagenhub"].read(str(path), Issues())


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("imagenhub", ("instruction", "input_path", "output_path")),
        ("aurora_bench", ("prompt", "input", "gen")),
    ],
)
def test_ratings_correlate_within_editors(tmp_path, name, columns):
    path = write_ratings(tmp_path, columns)
    scores = np.random.default_rng(3).normal(size=18)
    benchmark, judged = answered(name, path, lambda i, case: (scores[i],))
    found = values(name, benchmark, judged)
    targets = np.array([case.targets[0] for case in benchmark.cases])
    rhos = [stats.spearmanr(scores[k : k + 6], targets[k : k + 6]).statistic for k in (0, 6)]
    fisher = math.tanh(np.mean(np.arctanh(rhos)))
    words = "Spearman, mean over editors by Fisher's z"
    assert found["ratings", words] == pytest.approx(fisher, abs=1e-12)
    assert found["ratings / editor0", "Spearman"] == pytest.approx(rhos[0], abs=1e-12)
    assert math.isnan(found["ratings", "Spearman, published rule"])  # as the script would print
    metrics = LAYOUTS[name].measure(benchmark, judged[:12], 0.0)
    found = {m.name: point_value(m) for m in metrics if m.section == "ratings"}
    z = sum(rhos) / 2
    wanted = math.tanh(z) if name == "imagenhub" else z
    assert found["Spearman, published rule"] == pytest.approx(wanted, abs=1e-12)
    (note,) = {m.note for m in LAYOUTS[name].measure(benchmark, judged, 0.0) if m.name == words}
    assert "editor2" in note


# JSON lines


def test_a_users_own_json_lines(tmp_path):
    from benchmark_files import pictures

    names = pictures(tmp_path / "images", 4)
    lines = [
        {"id": f"u{i}", "prompt": ["Edit <|im_end|>", {"image": names[0]}],
         "candidates": [[{"image": n}] for n in names[1:]],
         "scores": {"overall": [3, 1, 1], "quality": [1, 2, None]}}
        for i in (0, 1, 1)
    ]  # fmt: skip
    lines[2]["scores"] = {"overall": [1, 3, 3]}
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in [*lines, {"prompt": "x"}]))
    said = tmp_path / "said.jsonl"
    said.write_text(
        '{"id": "u0", "scores": [0.5, 0.1, 0.7]}\n'
        '{"id": "u0", "scores": [9, 9, 9]}\n{"id": "u9", "scores": [1, 2, 3]}\n'
    )
    result = run(tmp_path / "r.json", "jsonl", path, [said])
    row = number(result, "pairs", "pair accuracy")
    assert (row["right"], row["count"], row["total"]) == (1, 2, 6)
    assert number(result, "pairs (quality)", "pair accuracy")["right"] == 0
    assert number(result, "pairs", "best of group")["value"] == 0.0
    assert issue(result, "id with contradicting labels")
    assert len(issue(result, "line that is no valid example")) == 1
    assert issue(result, "second prediction") == ["u0"]
    assert issue(result, "prediction for an id that is not") == ["u9"]
    said.write_text('{"id": "u0", "scores": [1, 2]}\n')
    with pytest.raises(UserError, match="2 scores for 3 candidates"):
        run(tmp_path / "r.json", "jsonl", path, [said])
