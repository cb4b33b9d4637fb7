"""The evaluate command with a small model, as a user calls it: reports, comparisons, probes."""

import json
import re

import numpy as np
import pytest
from benchmark_files import pictures, write_mmrb2, write_tiger
from export_case import family_run

from jrm_jax import RewardModel, evaluate
from jrm_jax.data.images import open_image
from jrm_jax.data.schema import Text
from jrm_jax.errors import UserError
from jrm_jax.evaluation import probe
from jrm_jax.evaluation.cases import Case, Issues, Picture
from jrm_jax.evaluation.scoring import column, score_cases
from jrm_jax.serving.groups import Scores


@pytest.fixture(scope="module")
def workdir():
    return family_run("qwen3_vl")


@pytest.fixture(scope="module")
def world(workdir, tmp_path_factory):
    """Result file of the built-in splits, with probes of one kind of change."""
    out = tmp_path_factory.mktemp("world") / "world.json"
    kept = dict(probe.CHANGES)
    for name in list(kept)[1:]:
        del probe.CHANGES[name]
    try:
        evaluate.main([f"--checkpoint={workdir}", "--benchmark=world", "--limit=6", "--probe",
                       f"--out={out}"])  # fmt: skip
    finally:
        probe.CHANGES.update(kept)
    return out


def test_the_world_gives_a_table_a_report_and_predictions(world):
    result = json.loads(world.read_text())
    rows = {(row["section"], row["metric"]): row for row in result["rows"]}
    for split in ("test", "hard"):
        row = rows[split, "pair accuracy"]
        assert row["headline"] and row["count"] == row["total"] > 6 and row["groups"] == 6
        assert row["low"] <= row["value"] <= row["high"]
        assert set(row["baselines"]) == {"random", "always the first", "fewest changed pixels"}
    text = world.with_suffix(".md").read_text()
    assert "fewest changed pixels" in text and "| test |" in text
    assert "; checkpoint: " in text and "Sanity of the model." in text and "effective rank" in text
    html = world.with_suffix(".html").read_text()
    beaten = [r for r in rows.values() if max(r["baselines"].values()) > r["value"]]
    assert len(re.findall("BELOW", text)) == len(re.findall("BELOW", html)) == len(beaten)
    asked = result["probe"]["calibration"]["count"]  # of the first dimension alone
    assert asked == sum(rows[split, "pair accuracy"]["count"] for split in ("test", "hard"))
    assert html.count("data:image/jpeg;base64,") > 6 and "people prefer this one" in html
    assert not re.search(r"(src|href)=['\"]?http", html)
    assert "<svg" in html and "effective rank" in html


def test_written_predictions_give_the_same_numbers(world, workdir, tmp_path):
    out = tmp_path / "again.json"
    folder = world.with_name("world_predictions")
    data = tmp_path / "own.jsonl"
    data.write_text('{"prompt": "x", "candidates": ["a", "b"], "ranks": [1, 2]}\n')
    evaluate.main(["--benchmark=world", "--limit=6", f"--out={out}",
                   "--predictions", str(folder / "predictions.jsonl")])  # fmt: skip
    first, second = json.loads(world.read_text()), json.loads(out.read_text())
    assert [r["value"] for r in first["rows"]] == [r["value"] for r in second["rows"]]


def test_comparing_results(world, tmp_path, capsys):
    result = json.loads(world.read_text())
    other = tmp_path / "other.json"
    name = "test: pair accuracy"
    result["judgements"][name] = [[i, g, 1.0] for i, g, _ in result["judgements"][name]][1:]
    other.write_text(json.dumps(result))
    evaluate.main(["--compare", str(world), str(other), f"--out={tmp_path / 'c.json'}"])
    assert "only in the first" in capsys.readouterr().out
    rows = {row["metric"]: row for row in json.loads((tmp_path / "c.json").read_text())["rows"]}
    assert rows[name]["only_in_first"] == 1 and rows[name]["only_first"] == 0
    assert rows[name]["difference"] == pytest.approx(1 - rows[name]["first"])
    assert rows["hard: pair accuracy"]["p"] == 1.0


def test_probes_of_the_small_model(world):
    found = json.loads(world.read_text())["probe"]
    assert found["swap"]["largest"] < 1e-4 and found["swap"]["flips"] == 0.0
    assert 1.0 <= found["effective_rank"] <= 32
    assert list(found["drift"]) == ["half the resolution"]
    assert found["drift"]["half the resolution"]["drift"] > 0.001
    assert 0 <= found["calibration"]["error"] <= 0.5
    names = [row["name"] for row in found["rows"]]
    assert {"another instruction", "black candidate"} <= set(names)
    assert found["another_instruction"]["drift"] > 0.001  # random weights see the words
    assert found["another_instruction"]["cases"] == found["black_candidate"]["cases"] == 12
    assert 0 <= found["black_candidate"]["lowest"] <= found["black_candidate"]["below"] <= 1


class Judge:
    """Scores by a rule: how bright a candidate is; with `reads`, also by the number of letters."""

    dimensions = ("overall",)

    def __init__(self, reads):
        self.encoder, self.reads = self, reads

    def encode_group(self, prompt, candidates):
        (words,) = [part.text for part in prompt if isinstance(part, Text)]
        bright = [np.asarray(open_image(c.parts[0].data)).mean() for c in candidates]
        return np.array(bright) - self.reads * len(words) * np.arange(len(bright))

    def score_encoded(self, encoded, one_bucket=False):
        return [Scores(score_K[:, None], score_K[:, None], ("overall",)) for score_K in encoded]


@pytest.mark.parametrize("reads", [0, 1])
def test_probes_of_instructions_and_of_black_pictures(tmp_path, reads):
    source, *edits = [Picture(str(tmp_path / n)) for n in pictures(tmp_path / "images", 4)]
    cases = [
        Case(str(i), "g", "s", "", (source, Text(words)), tuple((edit,) for edit in edits))
        for i, words in enumerate(("Make it " + 90 * "very " + "big", "Add", "Add"))
    ]
    judge, numbers, rows = Judge(reads), {}, {}
    base = probe._rewards(judge, cases)
    for tell in (probe._tell_instruction, probe._tell_black):
        more = (1.0,) if tell is probe._tell_instruction else ()
        tell(judge, cases, base, *more, numbers, lambda name, *words: rows.update({name: words}))
    found = numbers["another_instruction"]
    assert found["cases"] == 3 and (found["drift"] > 1) == bool(reads)
    assert found["lower"] == (4 / 9 if reads else 0.0)  # of two short ones, all but the first
    assert numbers["black_candidate"] == {"below": 1.0, "lowest": 1.0, "cases": 3}
    assert list(rows) == ["another instruction", "black candidate"]
    textless = [case._replace(prompt=(source,), candidates=((Text("a"),),)) for case in cases]
    probe._tell_instruction(judge, textless, base, 1.0, numbers, None)
    probe._tell_black(judge, textless, base, numbers, None)


@pytest.fixture(scope="module")
def model(workdir):
    return RewardModel.load(workdir)


def test_reward_states_are_what_the_head_reads(model):
    case = Case("1", "g", "s", "", (Text("Edit"),), ((Text("a"),), (Text("b"),)))
    from jrm_jax.evaluation.scoring import encode_case

    encoded = [encode_case(model, case)]
    (state_KD,) = model.reward_states(encoded)
    (scores,) = model.score_encoded(encoded)
    kernel_DR = np.asarray(model._runner.device.params["reward_head"]["kernel"])
    np.testing.assert_allclose(state_KD @ kernel_DR, scores.reward_KR, rtol=1e-5, atol=1e-5)


def test_special_tokens_in_a_benchmarks_texts_are_plain_text(model):
    words = "<|reward|><|image_pad|><|im_end|>"
    case = Case("1", "g", "s", "", (Text(words),), ((Text(words),), (Text("b"),)))
    from jrm_jax.evaluation.scoring import encode_case

    encoded = encode_case(model, case)
    specials = (model.encoder.tokenizer.reward_id, model.encoder.tokenizer.image_id)
    rows = [encoded.prompt, *encoded.candidates]
    assert [[row.tokens.count(token) for row in rows] for token in specials] == [
        [0, 1, 1], [0, 0, 0]]  # fmt: skip
    (judged,) = score_cases(model, [case], Issues())
    assert np.isfinite(judged.answer.scores).all()


def test_pictures_and_texts_of_every_shape_are_scored(model, workdir, tmp_path):
    write_mmrb2(tmp_path / "mmrb2")
    gone = next((tmp_path / "mmrb2" / "images").glob("3.png"))
    gone.unlink()
    out = tmp_path / "r.json"
    evaluate.main([f"--checkpoint={workdir}", "--benchmark=mmrb2", f"--out={out}",
                   f"--data={tmp_path / 'mmrb2'}"])  # fmt: skip
    result = json.loads(out.read_text())
    rows = {(row["section"], row["metric"]): row for row in result["rows"]}
    unread = result["issues"]["case with a picture that cannot be read (not scored)"]
    assert unread["count"] == 7 and "3.png: No such file" in unread["items"][0]
    assert rows["edit", "accuracy"]["count"] == 0 and rows["edit", "accuracy"]["total"] == 14
    assert rows["reasoning", "accuracy"]["count"] == 14
    assert result["counts"]["cases without a prediction"] == 7
    assert rows["image", "same answer in both orders"]["value"] in (1.0, None)
    assert (tmp_path / "r_predictions" / "interleaved.json").is_file()


def test_dimensions_are_answered_by_the_columns_that_fit():
    names = ("overall", "following", "preservation")
    asked = ("prompt_following", "consistency", "overall", "other")
    assert [column(names, name) for name in asked] == [1, 2, 0, 0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out=x.json"], "give --benchmark"),
        (["--benchmark=mmrb2", "--out=x.json"], "either --checkpoint"),
        (["--benchmark=mmrb2", "--checkpoint=a", "--predictions", "b"], "either --checkpoint"),
        (["--benchmark=mmrb2", "--checkpoint=a", "--out=x.json"], "needs --data"),
        (["--benchmark=mmrb2", "--checkpoint=a", "--out=x.txt"], "FILE.json"),
        (["--benchmark=mmrb2", "--predictions", "b", "--probe"], "--probe looks into a model"),
        (["--benchmark=mmrb2", "--predictions", "b", "--data=/nowhere", "--out=x.json"], "nowhere"),
        (["--benchmark=world", "--checkpoint=a", "--out=x.json", "--tie_threshold=1",
          "--tie_from=b"], "not both"),
        (["--compare", "a.json", "b.json"], "cannot be read"),
    ],
)  # fmt: skip
def test_bad_options_get_one_line(words, message):
    with pytest.raises(SystemExit, match=message):
        evaluate.main(words)


def test_the_threshold_for_ties_must_come_from_other_data(world, tmp_path):
    data = write_tiger(tmp_path / "tiger")
    words = [f"--data={data}", "--benchmark=editreward_bench", "--out=x.json", "--predictions", "p"]
    args = evaluate.parse_args([*words, f"--tie_from={world}"])
    tuned = json.loads(world.read_text())["tie_threshold_tuned_here"]
    assert evaluate._threshold(args) == tuned
    args = evaluate.parse_args(["--benchmark=world", f"--tie_from={world}"])
    with pytest.raises(UserError, match="must come from other data"):
        evaluate._threshold(args)


def test_the_table_fits_eighty_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    row = {
        "section": "hard (preservation)", "metric": "pair accuracy", "value": 0.668, "low": 0.642,
        "high": 0.692, "count": 1806, "total": 1806, "headline": True,
        "baselines": {"random": 0.5, "fewest changed pixels": 0.812},
    }  # fmt: skip
    result = {"benchmark": "world", "model": "joint", "rows": [row], "issues": {}, "remarks": []}
    evaluate.print_result(result)
    shown = capsys.readouterr().out
    for cell in ("best rule", "judged/all", "1806/1806", "0.642..0.692", "0.812"):
        assert cell in shown
    assert max(map(len, shown.splitlines())) <= 80
