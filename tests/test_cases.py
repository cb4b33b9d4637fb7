"""What all benchmarks share: ids that repeat, groups that lack pairs, names that tell a task."""

import json
from pathlib import Path

import pytest
from benchmark_case import answered, issue, number, run
from benchmark_files import pictures, write_ratings

from jrm_jax.errors import UserError
from jrm_jax.evaluation import mmrb2, scoring
from jrm_jax.evaluation.cases import Issues, content_key
from jrm_jax.evaluation.layouts import LAYOUTS
from jrm_jax.evaluation.predictions import SHARED
from jrm_jax.evaluation.tiger_metrics import measure


def own_groups(folder, sizes=(2, 2)):
    """Two files of JSON lines whose groups, of so many edits, all have the id '1'."""
    names = pictures(folder / "images", 9)
    for place, size in enumerate(sizes):
        row = {"id": "1", "prompt": [f"Edit {place}", {"image": f"images/{Path(names[0]).name}"}],
               "candidates": [[{"image": f"images/{Path(names[place + i]).name}"}]
                              for i in range(size)],
               "ranks": list(range(1, size + 1))}  # fmt: skip
        (folder / f"part{place}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def mer_groups(folder, sizes=(2, 2)):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"pair_id": "1", "label": "add", "instruction": f"Edit {place}",
             "original_image": "a.png", "edited_images": [f"{place}{i}.png" for i in range(size)]}
            for place, size in enumerate(sizes)]  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3)])
@pytest.mark.parametrize("name, make", [("jsonl", own_groups), ("mer_bench", mer_groups)])
def test_groups_of_one_id_keep_their_own_answers(tmp_path, name, make, sizes):
    data, out = make(tmp_path / "data", sizes), tmp_path / "out"
    out.mkdir()
    scores = ((2.0, 1.0, 0.5), (1.0, 2.0, 3.0))
    benchmark, judged = answered(name, data, lambda i, case: scores[i][: len(case.candidates)])
    assert "1 (2 times)" in benchmark.issues.found["id that occurs more than once"]
    LAYOUTS[name].write(judged, out, "m")
    assert LAYOUTS[name].read_predictions(benchmark, [str(out)]) == judged
    LAYOUTS[name].write(judged[1:], out, "m")  # a picture of the first could not be read
    assert LAYOUTS[name].read_predictions(benchmark, [str(out)]) == judged[1:]


def test_answers_for_a_shared_id_are_taken_in_the_order_of_its_groups(tmp_path):
    data, said = own_groups(tmp_path / "data"), tmp_path / "said.jsonl"
    lines = [json.dumps({"id": "1", "scores": scores}) + "\n" for scores in ([2, 1], [1, 2])]
    said.write_text("".join(lines))
    row = number(run(tmp_path / "r.json", "jsonl", data, [said]), "pairs", "pair accuracy")
    assert (row["right"], row["count"]) == (1, 2)
    said.write_text(lines[0])
    benchmark = LAYOUTS["jsonl"].read(str(data), Issues())
    assert LAYOUTS["jsonl"].read_predictions(benchmark, [str(said)]) == []
    assert benchmark.issues.found[SHARED] == ["1 (1 of 2)"]


def test_rows_of_one_content_share_their_answer(tmp_path):
    names = pictures(tmp_path / "images", 3)
    row = {"id": "1", "prompt": ["Edit", {"image": names[0]}], "ranks": [1, 2],
           "candidates": [[{"image": names[1]}], [{"image": names[2]}]]}  # fmt: skip
    (tmp_path / "own.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    (tmp_path / "said.jsonl").write_text('{"id": "1", "scores": [2, 1]}\n')
    result = run(tmp_path / "r.json", "jsonl", tmp_path / "own.jsonl", [tmp_path / "said.jsonl"])
    assert number(result, "pairs", "pair accuracy")["count"] == 2
    assert issue(result, "id that occurs more than once") == ["1 (2 times)"]


def test_a_single_candidates_score_may_be_a_number(tmp_path):
    benchmark = LAYOUTS["imagenhub"].read(str(write_ratings(tmp_path)), Issues())
    said = tmp_path / "said.jsonl"
    said.write_text('{"index": 0, "scores": 0.7}\n{"index": 1, "scores": "high"}\n')
    found = LAYOUTS["imagenhub"].read_predictions(benchmark, [str(said)])
    assert [(one.case.id, one.answer.scores) for one in found] == [("0", (0.7,))]


def test_a_group_that_lacks_pairs_is_wrong_and_has_no_tie_threshold(tmp_path):
    names = pictures(tmp_path / "images", 4)
    row = {"id": "g_1", "dataset": "3pair", "instruction": "Edit", "source_image": names[0],
           "comparison_type": "AvsB", "ranking": "A=B", "candidate_1": names[1],
           "candidate_2": names[2]}  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    benchmark, judged = answered("editreward_bench", tmp_path / "rows.json", lambda *_: (1.0, 1.0))
    assert len(judged[0].case.candidates) == 2
    assert "group without all of its pairs (counts as wrong)" in benchmark.issues.found
    strict = [m for m in measure(benchmark, judged, 0.5) if m.name == "strict accuracy"]
    assert [list(metric.values) for metric in strict] == [[0.0], [0.0]]


@pytest.mark.parametrize("name, task", [
    ("t2i", "image"), ("edit", "edit"), ("gpt4_image_edit", "edit"), ("edit_images", "edit"),
    ("image_editing", "edit"), ("Edit-v2", "edit"), ("image", "image"), ("image_gpt4", "image"),
    ("reasoning_response_only", "reasoning"), ("interleaved.image", "interleaved"),
    ("meditation", None), ("t2i_edit", None), ("scores", None),
])  # fmt: skip
def test_a_files_name_tells_one_task_by_its_words(name, task):
    if task is None:
        with pytest.raises(UserError, match="the name must tell one task"):
            mmrb2._task_of(Path(f"{name}.json"))
    else:
        assert mmrb2._task_of(Path(f"{name}.json")) == task


def test_prediction_files_are_known_by_their_names_before_their_order(tmp_path):
    tasks = ["image", "edit"]
    given = [tmp_path / "m_edit.json", tmp_path / "m_t2i.json"]
    assert dict(mmrb2._prediction_files(tasks, given)) == {"edit": given[0], "image": given[1]}
    plain = [tmp_path / "a.json", tmp_path / "b.json"]
    assert dict(mmrb2._prediction_files(tasks, plain)) == dict(zip(tasks, plain, strict=True))
    assert mmrb2._prediction_files(["image"], given[:1]) == [("image", given[0])]
    for path in (given[0], tmp_path / "n_edit.json"):
        path.write_text("{}")
    with pytest.raises(UserError, match="are both of task edit"):
        mmrb2._prediction_files(tasks, [tmp_path])


def test_pixels_are_compared_side_by_side_and_each_picture_is_scaled_once(tmp_path, monkeypatch):
    names = pictures(tmp_path / "images", 4)
    rows = [{"pair_id": str(i), "label": "add", "instruction": "Edit", "original_image": names[0],
             "edited_images": [names[i], *names[2:]]} for i in (0, 1, 1)]  # fmt: skip
    rows.append(rows[0] | {"pair_id": "3", "edited_images": [names[1], "gone.png"]})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    cases = LAYOUTS["mer_bench"].read(str(tmp_path / "rows.json"), Issues()).cases
    scaled, shown, small = [], [], scoring._small
    monkeypatch.setattr(scoring, "_small", lambda one: scaled.append(one) or small(one))
    monkeypatch.setattr(scoring.Bar, "advance", lambda bar, count=1: shown.append(bar.words))
    found = scoring._distances(cases)
    assert len(scaled) == 2 * 4 and shown == ["comparing pixels"] * 3  # equal cases once
    keys = list(map(content_key, cases))
    assert found == dict(zip(keys[:3], map(scoring.pixel_distance, cases[:3]), strict=True))
    assert found[keys[0]][0] == 0 < found[keys[1]][0]  # the source itself
