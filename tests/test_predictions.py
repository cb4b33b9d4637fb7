"""Predictions as others leave them: missing scores, broken lines, names from elsewhere."""

import base64
import json
import random

import pytest
from benchmark_case import answered, issue, number, run, values
from benchmark_files import (
    editscore_rows,
    judge_editscore,
    judge_mmrb2,
    pictures,
    tiger_log,
    write_mmrb2,
    write_pairs,
    write_ratings,
    write_tiger,
)

from jrm_jax.errors import UserError
from jrm_jax.evaluation.cases import Issues
from jrm_jax.evaluation.files import Images
from jrm_jax.evaluation.layouts import LAYOUTS
from jrm_jax.evaluation.scoring import score_cases

# in the place of a score; of all scores of a case
NO_SCORE = [None, "n/a", "", True, [1.0], {"score": 1}, 10**400, float("nan"), float("-inf")]
NO_SCORES = [None, "n/a", 1.5, *([score, 1.0] for score in NO_SCORE)]


def own_lines(folder, ids=True):
    """Three groups of two edits, as a user's JSON lines."""
    names = pictures(folder / "images", 5)
    rows = [
        {"prompt": [f"Edit {i}", {"image": names[0]}], "ranks": [1, 2],
         "candidates": [[{"image": names[i + 1]}], [{"image": names[i + 2]}]]}
        | ({"id": f"g{i}"} if ids else {})
        for i in range(3)
    ]  # fmt: skip
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(name, data, said):
    """(what is odd, answers) of a file or folder of predictions."""
    benchmark = LAYOUTS[name].read(data and str(data), Issues())
    return benchmark.issues.found, LAYOUTS[name].read_predictions(benchmark, [str(said)])


@pytest.mark.parametrize("scores", NO_SCORES)
def test_a_case_without_scores_is_not_judged_and_listed(tmp_path, scores):
    data, said = own_lines(tmp_path), tmp_path / "said.jsonl"
    good = [{"id": "g0", "scores": [2, 1]}, {"id": "g2", "scores": ["0.5", 0.1]}]
    lines = [json.dumps(row) for row in (good[0], {"id": "g1", "scores": scores}, good[1])]
    said.write_text("\n".join([*lines, "null", "[1, 2]", '{"id": "g']))
    issues, judged = read("jsonl", data, said)
    found = [(one.case.id, one.answer.scores) for one in judged]
    assert found == [("g0", (2, 1)), ("g2", (0.5, 0.1))]
    (listed,) = issues["score that is no number (the case counts as not judged)"]
    assert "said.jsonl:2" in listed
    assert len(issues["entry of a prediction file that is no object (passed over)"]) == 3
    if scores is None:
        result = run(tmp_path / "r.json", "jsonl", data, [said])
        row = number(result, "pairs", "pair accuracy")
        assert (row["right"], row["count"], row["total"]) == (2, 2, 3)
        assert issue(result, "case without a prediction") == ["pairs: g1"]


def test_a_later_line_may_bring_the_scores_that_were_missing(tmp_path):
    said = tmp_path / "said.jsonl"
    rows = [{"id": "g1", "scores": None}, {"id": "g1", "scores": [1, 2]}]
    said.write_text("".join(json.dumps(row) + "\n" for row in rows))
    issues, ((_, answer),) = read("jsonl", own_lines(tmp_path), said)
    assert answer.scores == (1, 2) and len(issues) == 1


@pytest.mark.parametrize("score", NO_SCORE)
@pytest.mark.parametrize("name", ["genai_bench", "imagenhub", "editreward_bench", "mer_bench"])
def test_every_benchmark_reads_past_missing_scores(tmp_path, name, score):
    data, said = tmp_path / "data", tmp_path / "said"
    make = {"genai_bench": write_pairs, "imagenhub": write_ratings, "editreward_bench": write_tiger}
    if name in make:
        make[name](data)
    else:
        rows = [{"pair_id": str(i), "instruction": "x", "original_image": "a", "label": "add",
                 "edited_images": ["b", "c"]} for i in range(3)]  # fmt: skip
        data.mkdir()
        (data / "rows.json").write_text(json.dumps(rows))
    said.mkdir()
    _, judged = answered(name, data, lambda i, case: (1.0, 0.5, 0.2, 0.1)[: len(case.candidates)])
    LAYOUTS[name].write(judged, said, "m")
    (file,) = [path for path in said.iterdir() if path.name != "spearman.json"]
    content = json.loads(file.read_text())
    entry = content["1" if name == "mer_bench" else 1]
    if name == "editreward_bench":
        entry["model_outputs"][0]["score"] = score
    else:
        entry["scores"][0] = score
    file.write_text(json.dumps(content))
    issues, found = read(name, data, said)
    assert len(issues["score that is no number (the case counts as not judged)"]) == 1
    assert len(found) == len(judged) - 1


@pytest.mark.parametrize("scores", NO_SCORES)
def test_editscore_lines_without_scores(tmp_path, scores):
    rows = editscore_rows()
    judge = judge_editscore(rows, tmp_path / "judge")
    path = judge / "compose" / "overall.jsonl"
    _, before = read("editscore_bench", None, judge)
    line = json.dumps({"key": ["u", "v"], "idx": 0, "score": scores})
    path.write_text(path.read_text() + line + "\nnull\n")
    issues, judged = read("editscore_bench", None, judge)
    assert len(issues["score that is no number (the case counts as not judged)"]) == 1
    assert [one.answer for one in judged] == [one.answer for one in before]


def test_the_order_of_predictions_plays_no_part(tmp_path):
    data = write_pairs(tmp_path)
    scores = [[0.3, 0], [0, 0.2], [0.1, 0], [0.1, 0], [0.4, 0], [0.1, 0], [1, 0]]
    rows = [{"index": i, "scores": pair} for i, pair in enumerate(scores)]
    results = []
    for order in (rows, rows[::-1]):
        (tmp_path / "said.json").write_text(json.dumps(order))
        results.append(run(tmp_path / "r.json", "genai_bench", data, [tmp_path / "said.json"]))
    # three gaps are equal, and the published threshold is tuned in the order of the file
    assert results[0]["rows"] == results[1]["rows"]


@pytest.mark.parametrize("broken", [
    None, {}, {"forward": None, "reverse": [None]}, {"forward": [{}], "reverse": []},
    {"forward": [{"judgement": None}]},
])  # fmt: skip
def test_mmrb2_entries_without_judgements(tmp_path, broken):
    data = write_mmrb2(tmp_path / "mmrb2")
    judge = judge_mmrb2(data, tmp_path / "judge")
    content = json.loads((judge / "edit.json").read_text())
    content["edit_0"] = {"forward": [{"judgement": "A"}], "reverse": [{"judgement": ["A"]}]}
    content["edit_0"]["forward"][0]["metadata"] = {"reward_a": None, "reward_b": "n/a"}
    content["edit_1"] = broken
    (judge / "edit.json").write_text(json.dumps(content))
    issues, judged = read("mmrb2", data, judge)
    said = {one.case.id: one.answer.votes["pair"] for one in judged if one.case.section == "edit"}
    assert said["edit_0"] == [1, 0] and not said.get("edit_1")
    (listed,) = issues["judgement that is neither A nor B (wrong)"][:1]
    assert "edit_0: ['A']" in listed
    assert len(issues["reward that is no number (the votes count)"]) == 1


# Files that are not complete


def without_prompts(folder, task, name):
    """What MMRB2's repository ships: answers of text stand in it, prompts do not."""
    content = json.loads((folder / f"{task}.json").read_text())
    for pair in content["pairs"]:
        del pair["prompt_content"]
    (folder / f"{task}.json").unlink()
    (folder / name).write_text(json.dumps(content))


def test_a_model_is_not_asked_without_prompts(tmp_path):
    data = write_mmrb2(tmp_path / "mmrb2")
    judge = judge_mmrb2(data, tmp_path / "judge")
    wanted = run(tmp_path / "r.json", "mmrb2", data, [judge])
    without_prompts(data, "reasoning", "reasoning_response_only.json")  # a half-built folder
    layout = LAYOUTS["mmrb2"]
    for path, words in ((data, "7 of 28 cases"), (data / "reasoning_response_only.json", "7 of 7")):
        cases = layout.read(str(path), Issues()).cases
        with pytest.raises(UserError, match=f"^{words}.* no prompts .*reasoning_0.*build_from_hf"):
            score_cases(None, cases, Issues(), layout.download)
    result = run(tmp_path / "r.json", "mmrb2", data, [judge])
    assert [row["value"] for row in result["rows"] if row["metric"] == "accuracy"] == [
        row["value"] for row in wanted["rows"] if row["metric"] == "accuracy"
    ]


def test_editscore_lines_with_paths_and_without_instructions(tmp_path):
    names = pictures(tmp_path / "images", 3)
    row = {"key": ["u", "v"], "idx": 41, "task_type": "compose", "dimension": "overall",
           "input_image": f"/far/{names[0]}", "output_images": [f"/far/{n}" for n in names[1:]]}
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"instruction": "Edit"}))
    layout, images = LAYOUTS["editscore_bench"], Images(tmp_path)
    bare, whole = layout.read(str(path), Issues(), images).cases
    assert bare.fields == whole.fields == {"key": ["u", "v"], "idx": 41}
    assert [p.read() for p in whole.pictures] == [(tmp_path / n).read_bytes() for n in names]
    with pytest.raises(UserError, match="1 of 2 cases have no prompts"):
        score_cases(None, [bare, whole], Issues(), layout.download)


# Pictures that lie elsewhere


def test_images_are_found_in_a_folder_of_their_own(tmp_path):
    data = write_tiger(tmp_path / "tiger")
    log = tiger_log(data, tmp_path / "log.json")
    wanted = run(tmp_path / "r.json", "editreward_bench", data, [log])
    (tmp_path / "elsewhere").mkdir()
    (data / "images").rename(tmp_path / "elsewhere" / "images")
    for prefix in ("", "/far/away/", "C:\\far\\"):
        for path in data.glob("*.json"):
            groups = json.loads(path.read_text())
            for group in groups:
                group["path_src"] = prefix + "images/" + group["path_src"].split("images/")[-1]
                group["paths_generated"] = [
                    prefix + "images/" + name.split("images/")[-1]
                    for name in group["paths_generated"]
                ]
            path.write_text(json.dumps(groups))
        found = run(tmp_path / "r.json", "editreward_bench", data, [log],
                    f"--images={tmp_path / 'elsewhere'}")  # fmt: skip
        assert found["rows"] == wanted["rows"]
    without = run(tmp_path / "r.json", "editreward_bench", data, [log])
    assert "fewest changed pixels" not in without["rows"][0]["baselines"]


def test_two_names_never_lead_to_one_picture(tmp_path):
    (name,) = pictures(tmp_path / "images", 1)
    images = Images(tmp_path / "images")
    assert images.find(f"a/{name}") == tmp_path / "images" / "0.png"
    assert images.find(f"./a/{name}") == tmp_path / "images" / "0.png"
    assert images.find("a/none.png") is None and images.find("x" * 5000) is None
    with pytest.raises(UserError, match=r"a/images/0.png and b/images/0.png would both be"):
        images.find(f"b/{name}")
    with pytest.raises(UserError, match="--images=.* is no folder"):
        Images(tmp_path / name)


def test_pictures_that_stand_in_the_text(tmp_path):
    path, names = own_lines(tmp_path), pictures(tmp_path / "images", 5)
    text = path.read_text()
    for name in names:
        data = base64.b64encode((tmp_path / name).read_bytes()).decode()
        text = text.replace(f'"{name}"', f'"data:image/png;base64,{data}"')
    (tmp_path / "inline.jsonl").write_text(text)
    wanted, found = (LAYOUTS["jsonl"].read(str(tmp_path / n), Issues()).cases
                     for n in ("own.jsonl", "inline.jsonl"))  # fmt: skip
    assert [[p.read() for p in case.pictures] for case in found] == [
        [p.read() for p in case.pictures] for case in wanted
    ]


# A user's own groups under other paths


def test_groups_without_ids_are_known_by_their_content(tmp_path):
    first = own_lines(tmp_path / "first", ids=False)
    second = own_lines(tmp_path / "second", ids=False)
    second.write_text("".join(sorted(second.read_text().splitlines(keepends=True), reverse=True)))
    _, judged = answered("jsonl", first, lambda i, case: (float(i), 0.5))
    LAYOUTS["jsonl"].write(judged, tmp_path, "m")
    said = [tmp_path / "predictions.jsonl"]
    one = run(tmp_path / "one.json", "jsonl", first, said)
    two = run(tmp_path / "two.json", "jsonl", second, said)
    assert not two["issues"]
    assert number(two, "pairs", "pair accuracy")["right"] == 2
    assert {i for i, _, _ in one["judgements"]["pairs: pair accuracy"]} == {
        i for i, _, _ in two["judgements"]["pairs: pair accuracy"]
    }
    twice = tmp_path / "first" / "twice.jsonl"
    lines = first.read_text().splitlines()
    turned = lines[0].replace("[1, 2]", "[2, 1]")
    twice.write_text("\n".join([lines[0], lines[0], turned]))
    issues = Issues()
    LAYOUTS["jsonl"].read(str(twice), issues)
    assert "id with contradicting labels" in issues.found


def test_a_prepared_set_of_the_same_lines(tmp_path, capsys):
    from jrm_jax.data import builders
    from jrm_jax.evaluation import report

    lines = own_lines(tmp_path / "first", ids=False)
    _, judged = answered("jsonl", lines, lambda i, case: (float(i), 0.5))
    LAYOUTS["jsonl"].write(judged, tmp_path, "m")
    said = [tmp_path / "predictions.jsonl"]
    run(tmp_path / "one.json", "jsonl", lines, said)
    for split in ("test", "train"):
        arguments = [f"--data={lines}", f"--out={tmp_path / split}", f"--split={split}"]
        assert builders.main(["jsonl", *arguments]) == 0
    run(tmp_path / "two.json", "jsonl", tmp_path / "test", said)
    found = report.compare(str(tmp_path / "one.json"), str(tmp_path / "two.json"))
    assert {row["metric"]: row["count"] for row in found["rows"]} == {"pair accuracy": 3}
    assert all(row["p"] == 1.0 for row in found["rows"])
    with pytest.raises(UserError, match="holds the split 'train' only, which is not judged"):
        run(tmp_path / "r.json", "jsonl", tmp_path / "train", said)


# Broken files

BROKEN = [None, "n/a", "", True, [], {}, [1], {"a": 1}, 10**400, float("nan"), -1, "x" * 3000,
          "\ud83d", [None], ["text"], {"bytes": None, "path": None}]  # fmt: skip


def places(content):
    """(list or object, key) of every value in it."""
    if not isinstance(content, dict | list):
        return []
    keys = content if isinstance(content, dict) else range(len(content))
    own = [(content, key) for key in keys]
    return own + [place for key in keys for place in places(content[key])]


def mutate(content, rng):
    """A value somewhere in it is another, or gone."""
    holder, key = rng.choice(places(content))
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(BROKEN)
    return content


@pytest.mark.parametrize("name", ["mmrb2", "editreward_bench", "editscore_bench", "jsonl",
                                  "genai_bench", "imagenhub"])  # fmt: skip
def test_broken_files_get_one_line_or_are_read_past(tmp_path, name):
    rng, data, said = random.Random(name), tmp_path / "data", tmp_path / "said"
    data.mkdir()
    names = pictures(data / "images", 3)
    row = {"key": ["u", "v"], "task_type": "compose", "dimension": "overall", "instruction": "x",
           "input_image": names[0], "output_images": names[1:]}  # fmt: skip
    make = {
        "mmrb2": write_mmrb2, "editreward_bench": write_tiger, "genai_bench": write_pairs,
        "imagenhub": write_ratings, "jsonl": own_lines,
        "editscore_bench": lambda folder: (folder / "b.json").write_text(json.dumps([row] * 2)),
    }  # fmt: skip
    make[name](data)
    said.mkdir()
    _, judged = answered(name, data, lambda i, case: [rng.random() for _ in case.candidates])
    LAYOUTS[name].write(judged, said, "m")
    paths = [*data.glob("*.json*"), *said.rglob("*.json*"), *said.rglob("*.json*")]
    ends = []
    for _ in range(60):
        path = rng.choice(paths)
        kept = path.read_bytes()
        broken = bytearray(kept)
        how = rng.random()
        if how < 0.1:
            del broken[rng.randrange(len(broken)) :]
        elif how < 0.2:
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        else:
            lines = path.suffix == ".jsonl"
            rows = [json.loads(x) for x in kept.splitlines()] if lines else json.loads(kept)
            rows = mutate(rows, rng)
            text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
            broken = text.encode()
        path.write_bytes(broken)
        try:
            benchmark = LAYOUTS[name].read(str(data), Issues())
            found = LAYOUTS[name].read_predictions(benchmark, [str(said)])
            values(name, benchmark, found)
            ends.append(len(found))
        except UserError as error:
            ends.append("\n" in str(error))
        path.write_bytes(kept)
    assert not any(end is True for end in ends) and len(set(ends)) > 1
