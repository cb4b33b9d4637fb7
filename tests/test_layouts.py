"""Layouts of training data: Hugging Face parquet, votes, own parquet, CSV."""

import csv
import itertools
import json

import numpy as np
from benchmark_files import png, write_arrow
from layout_case import SIDES, build, hub_row, lines, parquet, pictures  # noqa: F401

from jrm_jax.data import builders, store
from jrm_jax.data.ingest.judgements import EDITREWARD
from jrm_jax.data.schema import in_dimensions, to_record


def test_seven_edits_of_one_source_are_one_group_with_21_comparisons(tmp_path, build):
    pairs = [hub_row(0, i, j) for i, j in itertools.combinations(range(1, 8), 2)]
    rows = [row for pair in zip(pairs, [hub_row(1)] * 21, strict=True) for row in pair]
    found, kinds = build("editreward", parquet(tmp_path / "data.parquet", rows))
    (group,) = [e for e in found if len(e.candidates) == 7]
    assert len(found) == 2 and group.dimensions == EDITREWARD
    assert int(np.triu(group.weight[..., 0]).sum()) == 21
    assert group.prompt[1].data == png(0)
    places = {c.parts[0].data: k for k, c in enumerate(group.candidates)}
    assert set(places) == {png(i) for i in range(1, 8)}
    for i, j in itertools.combinations(range(1, 8), 2):
        k, m = places[png(i)], places[png(j)]
        assert group.preference[k, m].tolist() == [1, 1, 0]
        assert group.preference[m, k].tolist() == [0, 0, 1]
    assert kinds == {("kept", "pair that is judged more than once (its weight grows)"): 20}


def test_votes_count_and_dimensions_keep_their_own_order(tmp_path, build):
    rows = [
        hub_row(0),  # first overall and following, second in quality
        hub_row(1, vote="rightvote", scores=((4, 2, 2), (6, 3, 3))),
        hub_row(2, vote="tie", scores=((5, 2, 3), (5, 3, 2))),  # a tie whose dimensions differ
        hub_row(3, vote="tie", scores=((5, 3, 2), (5, 3, 2))),  # a real tie
        hub_row(4, vote="leftvote", scores=((5, None, 2), (5, None, float("nan")))),  # partial
        hub_row(5, vote="rightvote", scores=((6, 3, 3), (4, 2, 2))),  # against its own scores
        hub_row(6), hub_row(6, 2, 1),  # judged twice, with opposite results
        hub_row(7, vote=None),  # overall from the scores
    ]  # fmt: skip
    found, kinds = build("editreward", parquet(tmp_path / "data.parquet", rows))
    assert [e.preference[0, 1].tolist() for e in found] == [
        [1, 1, 0], [0, 0, 0], [0.5, 0, 1], [0.5] * 3, [1, 0.5, 0.5], [0, 1, 1], [0.5] * 3,
        [1, 1, 0],
    ]  # fmt: skip
    assert [e.weight[0, 1].tolist() for e in found] == [
        *[[1, 1, 1]] * 4, [1, 0, 0], [1, 1, 1], [2, 2, 2], [1, 1, 1],
    ]  # fmt: skip
    assert kinds == {
        ("kept", "score of one edit of a pair only (not used)"): 1,
        # leftvote or rightvote beside equal or opposite overall scores
        ("kept", "vote against its own overall scores (the vote counts)"): 2,
        ("kept", "pair that is judged more than once (its weight grows)"): 1,
        ("kept", "pair with differing judgements (the share of the votes counts)"): 1,
    }


def test_rows_of_a_saved_arrow_folder(tmp_path, build):
    rows = [hub_row(0, i, j) for i, j in itertools.combinations(range(1, 5), 2)]
    ((group,), kinds) = build("editreward", write_arrow(tmp_path / "train", rows))
    assert len(group.candidates) == 4 and not kinds


def test_bad_rows_of_the_parquet_layout(tmp_path, build):
    rows = [
        hub_row(0),
        hub_row(0, 1, 3, source_img={"bytes": png(55)}),  # one key, another source
        hub_row(1, left_output_image={"bytes": png(5)[:-40]}),
        hub_row(2, right_output_image=None),
        hub_row(3, 1, 1),
        hub_row(4, vote="both"),
        hub_row(5, instruction=None),
        hub_row(6, vote=None, scores=((None,) * 3,) * 2),
    ]
    found, kinds = build("editreward", parquet(tmp_path / "data.parquet", rows))
    assert [e.prompt[1].data for e in found] == [png(0), png(55)]
    assert kinds == {
        ("kept", "one key and instruction with several sources (kept apart)"): 1,
        ("left out", "picture that cannot be decoded"): 1,
        ("left out", "picture that is missing"): 1,
        ("left out", "pair of equal edits"): 1,
        ("left out", "vote of an unknown kind"): 1,
        ("left out", "field 'instruction'"): 1,
        ("left out", "pair without a judgement"): 1,
    }


def test_the_published_subset_has_other_names_and_no_key(tmp_path, build):
    rows = []
    for row in (hub_row(0), hub_row(0, 1, 3), hub_row(1)):
        new = {"source_image": row["source_img"], "category": "add", "dev_id": "000"}
        new |= {f"{side}_image": row[f"{side}_output_image"] for side in SIDES}
        new |= {k: v for k, v in row.items() if "score" in k or k in ("instruction", "vote_type")}
        rows.append(new)
    found, kinds = build("editreward", parquet(tmp_path / "data.parquet", rows))
    assert [len(e.candidates) for e in found] == [3, 2] and not kinds
    assert found[0].preference[0, 1].tolist() == [1, 1, 0]


# GenAI-Bench


def test_genai_bench_has_votes_and_nothing_else(tmp_path, build):
    votes = ("leftvote", "rightvote", "tievote", "bothbad_vote", "unknown")
    rows = [
        {"source_prompt": "a", "target_prompt": "b", "instruct_prompt": f"Edit {i}",
         "source_image": {"bytes": png(i)}, "left_model": "x", "right_model": "y",
         "left_output_image": {"bytes": png(10 + i)},
         "right_output_image": {"bytes": png(20 + i)}, "vote_type": vote}
        for i, vote in enumerate(votes)
    ]  # fmt: skip
    found, kinds = build("genai_bench", parquet(tmp_path / "train.parquet", rows))
    assert [e.preference[0, 1].tolist() for e in found] == [[1], [0], [0.5], [0.5]]
    assert {e.dimensions for e in found} == {("overall",)}
    assert found[1].prompt[0].text == "Edit 1" and found[1].prompt[1].data == png(1)
    assert kinds == {
        ("kept", "both edits called bad (a tie)"): 1, ("left out", "vote of an unknown kind"): 1,
    }  # fmt: skip


def test_genai_bench_in_editrewards_json(tmp_path, build):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    row = {"prompt": "Edit", "path_src": "0.png", "path1": "1.png", "path2": "2.png",
           "model1_dim1_score": 4, "model2_dim1_score": 2}  # fmt: skip
    (tmp_path / "valid.json").write_text(json.dumps([row]))
    ((example,), kinds) = build("genai_bench", tmp_path / "valid.json")
    assert example.preference[0, 1].tolist() == [1] and not kinds


# A user's own


def test_parquet_of_examples_and_of_a_prepared_set(pictures, build, tmp_path):
    rows = [
        {"id": "bytes", "prompt": [{"text": "Add", "image": None},
                                   {"text": None, "image": {"bytes": png(0), "path": "x.png"}}],
         "candidates": [{"parts": [{"text": None, "image": {"bytes": png(k), "path": None}}],
                         "critique": said} for k, said in ((1, "Good."), (2, None))],
         "ranks": [1, 2]},
        {"id": "named", "prompt": [{"text": "Add", "image": None}],
         "candidates": [{"parts": [{"text": None, "image": {"bytes": None, "path": "3.png"}}],
                         "critique": None}] * 2, "ranks": [1, 1]},
        {"id": "broken", "prompt": [{"text": "Add", "image": None}],
         "candidates": [{"parts": [{"text": None, "image": {"bytes": png(3)[:-30],
                                                            "path": None}}],
                         "critique": None}] * 2, "ranks": [1, 2]},
    ]  # fmt: skip
    found, kinds = build("jsonl", parquet(tmp_path / "own.parquet", rows))
    assert [e.id for e in found] == ["bytes", "named"]
    first, second = found
    assert first.prompt[1].data == png(0) and first.candidates[1].parts[0].data == png(2)
    assert first.candidates[0].critique == "Good." and first.candidates[1].critique is None
    assert first.preference[0, 1, 0] == 1 and second.preference[0, 1, 0] == 0.5
    assert second.candidates[0].parts[0].data == png(3)
    assert kinds == {("left out", "picture that cannot be decoded"): 1}
    records = [
        {k: v.decode() if isinstance(v, bytes) else v for k, v in record.items()}
        for record in store.open_dataset(tmp_path / "out0")["train"]
    ]
    records.append(records[0] | {"id": "no record", "record": "{}"})
    again, kinds = build("jsonl", parquet(tmp_path / "prepared.parquet", records))
    assert [(e.id, e.prompt, e.candidates) for e in again] == [
        (e.id, e.prompt, e.candidates) for e in found
    ]
    assert kinds == {("left out", "field 'record'"): 1}


def test_reward_dimensions_are_those_of_all_rows(pictures, build, tmp_path):
    def line(name, **labels):
        edits = [{"image": "1.png"}, {"image": "2.png"}]
        return {"id": name, "prompt": "Add", "candidates": edits} | labels

    rows = [
        line("a", scores={"overall": [2, 1]}),
        line("b", scores={"overall": [1, 2], "quality": [2, 1]}),
        line("c", ranks=[1, 2]),  # without a name: overall
        line("d", preference=[[[0.5, 0.5], [0, 1]], [[1, 0], [0.5, 0.5]]],
             dimensions=["speed", "quality"]),
    ]  # fmt: skip
    found, kinds = build("jsonl", lines(pictures / "own.jsonl", rows))
    assert not kinds and {e.dimensions for e in found} == {("overall", "quality", "speed")}
    assert [e.preference[0, 1].tolist() for e in found] == [
        [1, 0.5, 0.5], [0, 1, 0.5], [1, 0.5, 0.5], [0.5, 1, 0],
    ]  # fmt: skip
    assert [e.weight[0, 1].tolist() for e in found] == [[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 1]]
    again = tmp_path / "again"  # rows of prepared sets with different dimensions, too
    again.mkdir()
    records = [to_record(e) for e in (found[0], in_dimensions(found[1], ("quality",)))]
    parquet(again / "prepared.parquet", records)
    found, _ = build("jsonl", again)
    assert [e.weight[0, 1].tolist() for e in found] == [[1, 0, 0], [0, 1, 0]]
    folder = tmp_path / "tables"
    folder.mkdir()
    for name, columns in (("a", {"score": 3}), ("b", {"score": 2, "score_quality": 1})):
        rows = [{"source": f"{tmp_path}/0.png", "instruction": "Add",
                 "edit": f"{tmp_path}/{i}.png"} | columns for i in (range(1, 3) if name == "a"
                                                                     else range(3, 5))]  # fmt: skip
        table(folder / f"{name}.csv", rows)
    ((example,), kinds) = build("csv", folder)
    assert not kinds and example.dimensions == ("overall", "quality")
    assert example.weight[0, 2].tolist() == [1, 0] and example.weight[2, 3].tolist() == [1, 1]


def test_repeated_ids_are_told(pictures, build):
    def line(name, ranks):
        edits = [{"image": "1.png"}, {"image": "2.png"}]
        return {"id": name, "prompt": "Add", "candidates": edits, "ranks": ranks}

    rows = [line("a", [1, 2]), line("b", [1, 2]), line("a", [2, 1]), line("b", [1, 2])]
    found, kinds = build("jsonl", lines(pictures / "own.jsonl", rows))
    assert len(found) == 4
    assert kinds == {
        ("kept", "id that occurs more than once"): 4, ("kept", "id with contradicting labels"): 2,
    }  # fmt: skip


def table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_folder_of_pictures_with_a_csv(pictures, build):
    def row(edit, score, quality, critique="", source="0.png", text="Add a hat, please"):
        return {"source": source, "instruction": text, "edit": edit, "score": score,
                "score_quality": quality, "critique": critique}  # fmt: skip

    rows = [
        row("1.png", "8", "2", "Line one\nline two"), row("2.png", "5", ""), row("3.png", "8", "3"),
        row("3.png", "1", "1"), row("gone.png", "1", "1"), row("4.png", "high", "1"),
        row("", "1", "1"), row("5.png", "", "", "Said.", text="Alone"),
        row("6.png", "3", "", text="Nothing to compare with"),
        row("1.png", "2", "1", source="", text="A cat"), row("2.png", "1", "2", source="",
                                                             text="A cat"),
    ]  # fmt: skip
    found, kinds = build("csv", table(pictures / "edits.csv", rows))
    alone, drawn, group = sorted(found, key=lambda e: len(e.candidates))
    assert group.dimensions == ("overall", "quality")
    assert group.prompt[0].text == "Add a hat, please" and group.prompt[1].data == png(0)
    assert [c.critique for c in group.candidates] == ["Line one\nline two", None, None]
    assert group.preference[0, 1].tolist() == [1, 0.5] and group.weight[0, 1].tolist() == [1, 0]
    assert group.preference[0, 2].tolist() == [0.5, 0] and group.weight[0, 2].tolist() == [1, 1]
    assert alone.candidates[0].critique == "Said." and not alone.weight.any()
    assert len(drawn.prompt) == 1 and drawn.preference[0, 1].tolist() == [1, 0]
    assert kinds == {
        ("left out", "field 'edit'"): 2, ("left out", "picture that is missing"): 1,
        ("left out", "field 'score'"): 1, ("left out", "group without a judgement"): 1,
    }  # fmt: skip


def test_a_csv_with_ranks_groups_and_wrong_columns(pictures, build, capsys):
    rows = [
        {"group": g, "source": s, "instruction": "Add", "edit": e, "rank": r}
        for g, s, e, r in (("a", "0.png", "1.png", 2), ("b", "0.png", "1.png", 1),
                           ("a", "0.png", "2.png", 1), ("b", "0.png", "2.png", 1),
                           ("b", "3.png", "4.png", 1))
    ]  # fmt: skip
    (first, second), kinds = build("csv", table(pictures / "edits.csv", rows))
    assert first.preference[0, 1].tolist() == [0] and second.preference[0, 1].tolist() == [0.5]
    assert kinds == {("left out", "field 'group'"): 1}
    for column, words in (("colour", "column 'colour' is unknown"), ("score", "both scores and")):
        path = table(pictures / f"{column}.csv", [row | {column: "1"} for row in rows])
        assert builders.main(["csv", f"--data={path}", f"--out={pictures / 'no'}"]) == 1
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
