"""What rows about pairs say: overall scores that are no sums, HPDv3's shares and weights."""

import json

import numpy as np
from benchmark_files import png
from layout_case import build, hub_row, lines, parquet, pictures  # noqa: F401

from jrm_jax.data import builders
from jrm_jax.data.schema import Text


def test_an_overall_score_that_is_no_sum_is_made_from_the_dimensions(tmp_path, build):
    """Random numbers for overall: their order must not become a label."""
    scores = ((0.1, 4, 3), (0.9, 2, 3))
    rows = [hub_row(0), hub_row(1, vote=None, scores=scores), hub_row(2, scores=scores)]
    found, kinds = build("editreward", parquet(tmp_path / "data.parquet", rows))
    assert [e.preference[0, 1].tolist() for e in found] == [[1, 1, 0], [1, 1, 0.5], [1, 1, 0.5]]
    assert kinds == {
        ("kept", "overall score that is not the sum of its dimensions (the sum counts)"): 1,
        ("kept", "vote against its own overall scores (the vote counts)"): 1,
    }
    problems = (tmp_path / "out0" / "problems.txt").read_text()
    assert "left_overall_score is 0.1, not the sum of its dimensions (4 + 3)" in problems
    assert "layout genai_bench" in problems


def genai_json(one=(4, 0.9016961262134842), two=(2, 0.08793550441813658), **changes):
    """A row of EditReward's data/dataset/valid_dataset_1.json."""
    row = {"prompt": "let a herd of sheep block the taxi", "choice_dist": None, "confidence": None,
           "path_src": "0.png", "path1": "1.png", "path2": "2.png", "model1": "MagicBrush",
           "model2": "Pix2PixZero"}  # fmt: skip
    for side, (dim1, overall) in ((1, one), (2, two)):
        row |= {f"model{side}_dim1_score": dim1, f"model{side}_overall_score": overall}
    return row | changes


def test_editrewards_copy_of_genai_bench_is_refused_by_the_name_of_its_layout(
    pictures, build, capsys
):
    rows = [genai_json(), genai_json((4, 0.3), (2, 0.64), path2="3.png")]
    (pictures / "valid.json").write_text(json.dumps(rows))
    for arguments in ([], ["--skip_bad"]):
        out = pictures / "no"
        path = pictures / "valid.json"
        status = builders.main(["editreward", f"--data={path}", f"--out={out}", *arguments])
        said = capsys.readouterr().err
        assert status == 1 and said.count("\n") == 1 and not out.exists()
        assert "field 'model1_overall_score': model1_overall_score is 0.901696, not the sum" in said
        assert "are read with the layout genai_bench" in said
    kept = genai_json((3, 5), (2, 6), path1="4.png")  # a dimension lacks, but could be 2 and 4
    (pictures / "valid.json").write_text(json.dumps([*rows, kept]))
    (group,), kinds = build("editreward", pictures / "valid.json")
    assert group.preference[0, 1, :2].tolist() == [0, 1]
    assert group.weight[0, 1].tolist() == [1, 1, 0]
    assert kinds == {("left out", "overall score that is not the sum of its dimensions"): 2}
    found, kinds = build("genai_bench", pictures / "valid.json")
    assert sum(int(np.triu(e.weight[..., 0]).sum()) for e in found) == 3 and not kinds


# HPDv3


def hpd_row(first, second, dist=None, sure=None, **changes):
    """All fields of HPDv3's all.json."""
    return {
        "prompt": "A photo of <|reward|> a corgi", "choice_dist": dist, "confidence": sure,
        "path1": f"{first}.png", "path2": f"{second}.png", "model1": "flux", "model2": "infinity",
    } | changes  # fmt: skip


def test_hpdv3_keeps_shares_and_weights_and_has_no_source(pictures, build):
    rows = [
        hpd_row(0, 1, [12, 7], 0.75),
        hpd_row(2, 0, [3, 3], 1),
        hpd_row(1, 2),  # from Discord: nothing but the order
        hpd_row(3, 4, [1, 4], 0.5),  # of the same prompt, compared with none of those above
        hpd_row(5, 6, [], "null", prompt="Another"),
        {"prompt": "Test", "path1": "0.png", "path2": "1.png", "model1": "a", "model2": "b"},
    ]
    (pictures / "all.json").write_text(json.dumps(rows))
    found, kinds = build("hpdv3", pictures / "all.json")
    group, apart, other, test = found
    assert group.dimensions == ("overall",) and len({e.id for e in found}) == 4
    assert group.prompt == (Text("A photo of <|reward|> a corgi"),) == apart.prompt
    assert [c.parts[0].data for c in group.candidates] == [png(0), png(1), png(2)]
    share = np.float32(12 / 19)
    np.testing.assert_array_equal(
        group.preference[..., 0], [[0.5, share, 0.5], [1 - share, 0.5, 1], [0.5, 0, 0.5]]
    )
    assert group.weight[..., 0].tolist() == [[0, 0.75, 1], [0.75, 0, 1], [1, 1, 0]]
    assert apart.preference[0, 1, 0] == np.float32(0.8) and apart.weight[0, 1, 0] == 0.5
    assert other.preference[0, 1, 0] == test.preference[0, 1, 0] == 1 == test.weight[0, 1, 0]
    assert kinds == {("kept", "more votes in the second place (path1 is the preferred one)"): 1}
    (first, *_), _ = build("hpdv3", pictures / "all.json", "--dimension=visual_quality")
    assert first.dimensions == ("visual_quality",)


def test_bad_rows_of_hpdv3(pictures, build, capsys):
    bad = {
        "choice_dist": ([1], [1, 2, 3], [0, 0], [-1, 2], ["1", "2"], 3, [True, 1],
                        [1e308, 1e308], [10**400, 1]),
        "confidence": (0, -0.1, 1.5, "high", [1], float("nan"), True),
        "prompt": (None, "", 3), "path_src": ("0.png",),
    }  # fmt: skip
    rows = [hpd_row(0, 1, **{name: value}) for name, values in bad.items() for value in values]
    rows = [hpd_row(0, 1), *rows, hpd_row(0, 0), hpd_row(0, "gone")]
    found, kinds = build("hpdv3", lines(pictures / "train.jsonl", rows))
    assert len(found) == 1 and found[0].weight.sum() == 2
    expected = {("left out", f"field '{name}'"): len(values) for name, values in bad.items()}
    assert kinds == expected | {
        ("left out", "pair of equal edits"): 1, ("left out", "picture that is missing"): 1,
    }  # fmt: skip
    path = lines(pictures / "train.jsonl", [hpd_row(0, 1)])
    assert builders.main(["editreward", f"--data={path}", f"--out={pictures / 'no'}"]) == 1
    assert "are read with the layout hpdv3" in capsys.readouterr().err
