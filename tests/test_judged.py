"""Edits with a judge's reasoning become critiques and ranks."""

import json

import pytest
from benchmark_files import png
from layout_case import build, lines, pictures  # noqa: F401

from jrm_jax.data.ingest.judged import DIMENSIONS as JUDGED
from jrm_jax.data.stated import teacher_scores


def judged_row(edit="1.png", sc=(20, 10), pq=(16, 25), **changes):
    return {
        "instruction": "Add a <|reward|> hat", "input_image": "0.png", "output_image": edit,
        "SC_reasoning": f"Hat of {edit}\nis there.", "PQ_reasoning": "Clean.",
        "SC_score": sc, "PQ_score": pq,
    } | changes  # fmt: skip


def test_judgements_per_dimension_become_critiques_and_ranks(pictures, build):
    rows = [
        judged_row(), judged_row("2.png", (20, 20), (4, 9), PQ_reasoning=""),
        judged_row("3.png", None, None, SC_reasoning=None),
        judged_row("4.png", instruction="Alone"),
    ]  # fmt: skip
    found, kinds = build("editscore", lines(pictures / "train.jsonl", rows))
    group, alone = found
    assert group.dimensions == JUDGED and not kinds
    assert [(c.critique, c.score_line) for c in group.candidates] == [
        ("Instruction: Hat of 1.png is there.\nQuality: Clean.\nScores: overall 12.65, instruction"
         " following 20, consistency 10, visual quality 16 (naturalness 16, artifacts 25).", True),
        ("Instruction: Hat of 2.png is there.\nScores: overall 8.944, instruction following 20,"
         " consistency 20, visual quality 4 (naturalness 4, artifacts 9).", True),
        ("Quality: Clean.", False),
    ]  # fmt: skip
    # overall: sqrt(10 * 16) against sqrt(20 * 4); following equal; consistency; quality
    assert group.preference[0, 1].tolist() == [1, 0.5, 0, 1]
    assert group.weight[0, 1].tolist() == [1] * 4 and not group.weight[:, 2].any()
    stated = teacher_scores([c.critique for c in group.candidates[:2]], JUDGED, {})
    assert stated == [[12.65, 20, 10, 16], [8.944, 20, 20, 4]]  # config.loss.teacher_weight's
    assert len(alone.candidates) == 1 and not alone.weight.any()  # for the language loss only
    assert alone.candidates[0].critique.startswith("Instruction: ")
    found, _ = build("editscore", pictures / "train.jsonl", "--no_scores")
    assert not found[0].weight.any() and found[0].candidates[0].critique


def test_two_edits_in_a_row_and_an_edit_judged_again(pictures, build):
    both = judged_row(["1.png", "2.png"], [[20, 10], [2, 3]], [[10, 12], [5, 5]])
    del both["output_image"]
    both |= {"output_images": ["1.png", "2.png"], "SC_reasoning": ["One.", "Two."]}
    again = judged_row("1.png", (10, 20), (10, 12), SC_reasoning="Another pass.")
    found, kinds = build("editscore", lines(pictures / "train.jsonl", [both, again]))
    (group,) = found
    assert group.candidates[0].critique == (
        "Instruction: One.\nQuality: Clean.\nScores: overall 12.25, instruction following 15,"
        " consistency 15, visual quality 10 (naturalness 10, artifacts 12)."
    )
    assert group.candidates[1].critique.startswith("Instruction: Two.\n")
    assert group.preference[0, 1].tolist() == [1, 1, 1, 1]
    assert kinds == {("kept", "edit that is judged more than once (mean scores, first reasoning)"):
                     2}  # fmt: skip


@pytest.mark.parametrize("score", [[[20, 10]], [20, 10]])
def test_lists_of_one_edit(pictures, build, score):
    row = judged_row(["1.png"], score, score)
    row |= {"output_images": row.pop("output_image"), "SC_reasoning": ["One."]}
    (example,), kinds = build("editscore", lines(pictures / "train.jsonl", [row]))
    assert not kinds and example.candidates[0].critique.startswith("Instruction: One.\n")
    assert "instruction following 20, consistency 10" in example.candidates[0].critique


def test_rows_about_regions_without_boxes_are_left_out(pictures, build):
    rows = [judged_row(SC_reasoning="<|bbox_0|> has a hat."), judged_row("2.png")]
    (example,), kinds = build("editscore", lines(pictures / "train.jsonl", rows))
    assert kinds == {("left out", "field 'SC_reasoning'"): 1} and len(example.candidates) == 1


def talk(images, asked, answered):
    turns = [{"from": "human", "value": "<image>" * len(images) + asked},
             {"from": "gpt", "value": answered}]  # fmt: skip
    return {"conversations": turns, "images": images}


RULES = "RULES: two scores.\n\nEditing instruction: "


def test_conversations_with_a_judge_become_critiques(pictures, build):
    answer = json.dumps({"reasoning": "The hat is there.", "score": [22, 18]})
    quality = 'Sure:\n```json\n{"reasoning": "Seam at the brim.", "score": [12, 9]}\n```'
    rows = [
        talk(["1.png"], "The image is an AI-generated image.", quality),
        talk(["0.png", "1.png"], RULES + "Add a hat\nand <image_pad>", answer),
        talk(["0.png", "6.png"], "Is it natural? Image 2 is the edit.", quality),  # both pictures
        talk(["0.png", "6.png"], RULES + "Add a bow", answer),
        talk(["0.png", "2.png"], RULES + "Add a hat", "I cannot judge this"),
        talk(["0.png", "3.png"], RULES + "Add a hat", '{"reasoning": "x", "score": [1]}'),
        talk(["4.png"], "Naturalness?", quality),  # nobody tells what was asked for
        talk(["5.png"], RULES + "Add a hat", answer),  # without the source
    ]
    (pictures / "reward.json").write_text(json.dumps(rows))
    found, kinds = build("editscore", pictures / "reward.json")
    example, other = found
    assert other.candidates[0].parts[0].data == png(6)
    assert other.candidates[0].critique.count("\n") == 2
    assert example.prompt[0].text == "Add a hat\nand <image_pad>"
    assert example.prompt[1].data == png(0) and example.candidates[0].parts[0].data == png(1)
    assert example.candidates[0].critique == (
        "Instruction: The hat is there.\nQuality: Seam at the brim.\nScores: overall 12.73,"
        " instruction following 22, consistency 18, visual quality 9 (naturalness 12, artifacts 9)."
    )
    assert not example.weight.any()
    assert kinds == {
        ("left out", "judge's answer that cannot be read"): 1,
        ("left out", "field 'score'"): 1,
        ("left out", "judgement of quality without the instruction"): 1,
        ("left out", "field 'images'"): 1,
    }


def as_messages(row):
    """The same talk as LLaMA-Factory's OpenAI layout."""
    turns = [{"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
             for turn in row["conversations"]]  # fmt: skip
    return {"messages": [{"role": "system", "content": "You judge."}, *turns],
            "images": row["images"]}  # fmt: skip


def as_parts(row):
    """With contents of parts, which hold the pictures, too."""
    asked, answered = row["conversations"]
    content = [{"type": "image", "image": name} for name in row["images"]]
    content.append({"type": "text", "text": asked["value"].replace("<image>", "")})
    answer = [{"type": "text", "text": answered["value"]}]
    return {"messages": [{"role": "user", "content": content},
                         {"role": "assistant", "content": answer}]}  # fmt: skip


def as_alpaca(row):
    asked, answered = (turn["value"] for turn in row["conversations"])
    return {"instruction": asked, "input": "", "output": answered, "images": row["images"]}


@pytest.mark.parametrize("form", [as_messages, as_parts, as_alpaca])
def test_a_talk_is_the_same_in_every_layout_of_trainers(pictures, build, form):
    answer = json.dumps({"reasoning": "The hat is there.", "score": [22, 18]})
    quality = json.dumps({"reasoning": "Seam at the brim.", "score": [12, 9]})
    rows = [talk(["1.png"], "The image is an AI-generated image.", quality),
            talk(["0.png", "1.png"], RULES + "Add a hat", answer)]  # fmt: skip
    (expected,), _ = build("editscore", lines(pictures / "a.jsonl", rows))
    found, kinds = build("editscore", lines(pictures / "b.jsonl", map(form, rows)))
    assert [(e.prompt, e.candidates) for e in found] == [(expected.prompt, expected.candidates)]
    assert not kinds and expected.candidates[0].critique.count("\n") == 2


def test_talks_that_are_none(pictures, build):
    good = as_messages(talk(["0.png", "1.png"], RULES + "Add", '{"score": [1, 2]}'))
    asked, answered = good["messages"][1:]
    rows = [
        good | {"messages": [asked]},  # as a set for RL
        good | {"messages": [answered]},
        good | {"messages": "text"},
        good | {"messages": ["text"]},
        good | {"messages": [asked, {"role": "assistant", "content": None}]},
        good | {"images": []},
        good | {"images": None},
    ]
    rows.append(as_messages(talk(["0.png", "2.png"], RULES + "Add",
                                 '{"reasoning": "Yes.", "score": [1, 2]}')))  # fmt: skip
    found, kinds = build("editscore", lines(pictures / "train.jsonl", rows))
    assert len(found) == 1
    assert kinds == {
        ("left out", "field 'messages'"): 4, ("left out", "field 'messages.content'"): 1,
        ("left out", "field 'images'"): 2,
    }  # fmt: skip


def test_an_edit_is_known_by_its_content_and_what_was_asked_for_is_kept_apart(pictures, build):
    """One picture under three names answers two instructions; its quality belongs to both."""
    for name in ("again", "more"):
        (pictures / f"{name}.png").write_bytes(png(1))
    answer = json.dumps({"reasoning": "It follows.", "score": [22, 18]})
    rows = [
        talk(["again.png"], "Natural?", '{"reasoning": "Sharp.", "score": [12, 9]}'),
        talk(["0.png", "1.png"], RULES + "Add a hat", answer),
        talk(["0.png", "more.png"], RULES + "Add a bow", answer),
        talk(["2.png"], "Natural?", '{"reasoning": "Nobody asked.", "score": [12, 9]}'),
        talk(["0.png", "3.png"], RULES + "Add a hat", answer),
        talk(["0.png", "3.png"], RULES + "Add a bow", '{"score": [22, 18]}'),  # says nothing
    ]
    found, kinds = build("editscore", lines(pictures / "train.jsonl", rows))
    assert [e.prompt[0].text for e in found] == ["Add a hat", "Add a bow", "Add a hat"]
    found = found[:2]
    assert len({e.id for e in found}) == 2
    for example in found:
        (candidate,) = example.candidates
        assert candidate.parts[0].data == png(1) and "Quality: Sharp." in candidate.critique
    assert kinds == {
        ("left out", "judgement of quality without the instruction"): 1,
        ("left out", "judgement without reasoning or comparison"): 1,
    }


def test_bad_rows_of_judgements(pictures, build):
    rows = [
        judged_row(),
        judged_row("gone.png"),
        judged_row("2.png", sc=[1, 2, 3]),
        judged_row("2.png", sc=["high", "low"]),
        judged_row("2.png", sc=[26, 3]),
        judged_row("2.png", pq=[-1, 3]),
        judged_row("2.png", output_image=None),
        judged_row("2.png", instruction=3),
        judged_row("2.png", instruction=" "),
        judged_row("2.png", instruction="x", SC_reasoning="", PQ_reasoning=None),
    ]
    found, kinds = build("editscore", lines(pictures / "train.jsonl", rows))
    assert len(found) == 1 and len(found[0].candidates) == 1
    assert kinds == {
        ("left out", "picture that is missing"): 1, ("left out", "field 'SC_score'"): 2,
        ("left out", "score out of its range"): 2, ("left out", "field 'output_image'"): 1,
        ("left out", "field 'instruction'"): 2,
        ("left out", "judgement without reasoning or comparison"): 1,
    }  # fmt: skip
