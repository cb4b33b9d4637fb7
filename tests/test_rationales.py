"""RationalRewards: a rationale about two candidates becomes two critiques and preferences."""

import pytest
from benchmark_files import png
from layout_case import build, lines, parquet, pictures  # noqa: F401

from jrm_jax.data.ingest import aspects
from jrm_jax.data.ingest.comparisons import split
from jrm_jax.data.stated import teacher_scores
from jrm_jax.errors import RecordError

REQUEST = "Add a red hat <|reward|>\nand a bow"
TWO = """You are an expert image editing evaluator.

User Instruction: {}
You are provided with three images:
1. Source Image <image>
2. Edited Image A <image>
3. Edited Image B <image>

Your task is to compare the two Edited Images.
## Score A: [float score for Image A]"""
ONE = """User Instruction: {}
You are provided with two images:
1. Source Image <image>
2. Edited Image <image>

## Score: [ float score ]"""
DRAWN = """User Instruction: {}
You are provided with two images:
1. Generated Image A <image>
2. Generated Image B <image>
"""
ALONE = """# Detailed Judgement
1. Text Faithfulness:
## Score: 3.2
## Justification: The hat is
there.
2. Text Rendering:
## Score: N/A
## Justification: Not asked for.
# Summary: Good.
# User Request Refinement:
## Score: 1
## Refined Request: More."""


def aspect(number, name, text, a, b, winner):
    return (f"{number}. {name}: \n## Justification: {text}\n## Score A: {a}\n## Score B: {b}\n"
            f"## Winner: {winner}\n")  # fmt: skip


FOLLOWS = "Image A adds the hat, while Image B only recolours it. Both images have a bow."
KEEPS = "Image A keeps the sky. It is unchanged. Image B loses it."
ANSWER = (
    "# User Request Analysis \nA hat is asked for in Image A.\n# Detailed Judgement\n"
    + aspect(1, "Text Faithfulness", FOLLOWS, 3.5, "2.0", "Image A")
    + aspect(2, "Image Faithfulness", KEEPS, "**4.0**", 1, "Image A")
    + aspect(3, "Physical and Visual Quality", "**Image B** is sharp.\nImage A is blurred.", 2, 3.5,
             "Image B")
    + aspect(4, "Text Rendering", "Nothing is to be written.", "N/A", "N/A", "N/A")
    + "# Summary: Image A wins overall."
)  # fmt: skip


def row(asked, images, answer, request=REQUEST):
    return {"messages": [{"role": "user", "content": asked.format(request)},
                         {"role": "assistant", "content": answer}], "images": images}  # fmt: skip


CRITIQUES = [
    """Instruction: The edited image adds the hat.
Preservation: The edited image keeps the sky. It is unchanged.
Quality: The edited image is blurred.
Scores: overall 3.167, instruction following 3.5, consistency 4, visual quality 2.""",
    """Instruction: The edited image only recolours it.
Preservation: The edited image loses it.
Quality: The edited image is sharp.
Scores: overall 2.167, instruction following 2, consistency 1, visual quality 3.5.""",
]


def test_a_rationale_about_two_is_split_and_its_scores_are_preferences(pictures, build):
    rows = [row(TWO, ["0.png", "1.png", "2.png"], ANSWER)]
    (example,), kinds = build("rationalrewards", lines(pictures / "pairs.jsonl", rows))
    assert example.dimensions == (
        "overall", "instruction_following", "consistency", "visual_quality",
    )  # fmt: skip
    assert example.prompt[0].text == REQUEST and example.prompt[1].data == png(0)
    assert [c.parts[0].data for c in example.candidates] == [png(1), png(2)]
    assert [c.critique for c in example.candidates] == CRITIQUES
    assert all(c.score_line for c in example.candidates)
    # overall: means 9.5 / 3 against 6.5 / 3
    assert example.preference[0, 1].tolist() == [1, 1, 1, 0]
    assert example.weight[0, 1].tolist() == [1, 1, 1, 1]
    stated = teacher_scores([c.critique for c in example.candidates], example.dimensions, {})
    assert stated == [[3.167, 3.5, 4, 2], [2.167, 2, 1, 3.5]]  # config.loss.teacher_weight's
    told = "rationale with sentences about both candidates (left out of it)"
    assert kinds == {("kept", told): 1}
    (bare,), kinds = build("rationalrewards", pictures / "pairs.jsonl", "--no_critiques")
    assert [c.critique for c in bare.candidates] == [None, None] and not kinds
    assert bare.preference[0, 1].tolist() == [1, 1, 1, 0]


def test_no_source_one_candidate_and_parquet(pictures, build):
    written, fine = "Image A reads OPEN. Image B reads OPN.", "Image A is fine. Image B is not."
    drawn = (
        aspect(1, "Text Faithfulness", "Image A has 2 cats. Image B has one.", 4, 4, "It's a tie")
        + aspect(2, "Physical and Visual Quality", fine, 2, 3, "Image A")
        + aspect(3, "Text Rendering", written, "N/A", "N/A", "Image A")
    )
    rows = [
        row(DRAWN, ["1.png", "2.png"], drawn, "Two cats"),
        row(ONE, ["0.png", "3.png"], ALONE),
        # no <image> in the question: candidates are the last pictures
        row(ONE.replace("<image>", ""), ["0.png", "4.png"], ALONE),
        row(TWO.replace("Image A <image>", "Image B <image>").replace(
            "3. Edited Image B", "3. Edited Image A"), ["0.png", "1.png", "2.png"], ANSWER),
    ]  # fmt: skip
    found, kinds = build("rationalrewards", parquet(pictures / "data.parquet", rows))
    pair, one, bare, swapped = found
    assert pair.dimensions[:4] == (
        "overall", "instruction_following", "visual_quality", "text_rendering",
    )  # fmt: skip
    assert len(pair.prompt) == 1 and pair.prompt[0].text == "Two cats"
    assert pair.candidates[1].critique == (
        "Instruction: The image has one.\nQuality: The image is not.\nText: The image reads OPN.\n"
        "Scores: overall 3.5, instruction following 4, visual quality 3."
    )
    assert pair.preference[0, 1, :4].tolist() == [0, 0.5, 0, 1]  # text rendering: by its winner
    assert pair.weight[0, 1].tolist() == [1, 1, 1, 1, 0]  # consistency is not judged here
    assert one.candidates[0].critique == (
        "Instruction: The hat is there.\nText: Not asked for.\n"
        "Scores: overall 3.2, instruction following 3.2."
    )
    assert one.prompt[1].data == png(0) and one.candidates[0].parts[0].data == png(3)
    assert not one.weight.any() and bare.candidates[0].parts[0].data == png(4)
    assert [c.parts[0].data for c in swapped.candidates] == [png(2), png(1)]
    assert swapped.candidates[0].critique == CRITIQUES[0]
    assert kinds == {
        ("kept", "rationale with sentences about both candidates (left out of it)"): 1,
        ("kept", "winner against its own scores (the scores count)"): 1,
    }


def test_rationales_that_cannot_be_used_are_refused_by_name(pictures, build, capsys):
    def judged(text, a=3, b=2):
        return aspect(1, "Text Faithfulness", text, a, b, "Image A")

    three = ["0.png", "1.png", "2.png"]
    good = judged("Image A is right. Image B is not.")
    rows = [
        row(TWO, three, good),
        row(TWO, three, judged("Both images are fine, and Image A is better than Image B.")),
        row(TWO, three, judged("Image A is right.")),
        row(TWO, three, judged("The first has a hat.")),
        row(TWO, three, judged("Image A is right. Image B is not.", 4.5)),
        row(TWO, three, judged("Image A is right. Image B is not.", "good")),
        row(TWO, three, judged("Image A is right. Image B is not.", "N/A", "N/A").replace(
            "Winner: Image A", "Winner: N/A")),
        row(TWO, three, "Image A is right."),
        row(TWO, three[:2], good),
        row(TWO, ["0.png", "1.png", "1.png"], good),
        row(TWO, ["0.png", "1.png", "gone.png"], good),
        row("Which is better? {} <image>", three, good),
        row(TWO, three, good, request=""),
        {"prompt": "Add", "images": three},
    ]  # fmt: skip
    found, kinds = build("rationalrewards", lines(pictures / "pairs.jsonl", rows))
    assert len(found) == 1
    assert kinds == {
        ("left out", "rationale about two candidates that cannot be split"): 3,
        ("left out", "score out of its range"): 2, ("left out", "pair without a judgement"): 1,
        ("left out", "rationale that cannot be read"): 3, ("left out", "field 'images'"): 1,
        ("left out", "pair of equal edits"): 1, ("left out", "picture that is missing"): 1,
        ("left out", "field 'messages'"): 1,
    }  # fmt: skip
    said = (pictures / "out0" / "problems.txt").read_text().splitlines()[1]
    assert "nothing names Image B alone (--no_critiques keeps the preferences)" in said


@pytest.mark.parametrize(
    "said, found",
    [
        ("N/A (Image 2 has no text)", None), ("**N/A** - 0 words", None), ("[n/a]", None),
        ("None, as 3 letters are missing", None), ("NA", None), ("", None), ("\n\n", None),
        ("N/A\n\n# Overall: 2 of 4", None), ("3.5\n\n# Overall: 2 of 4", 3.5), ("**4.0**", 4.0),
        ("---\n3", 3.0), ("(see below)\n3.0", 3.0), ("- N/A", None), ("**None**", None),
        ("None of the letters is readable, 1.0", 1.0), ("Score:\n2", 2.0),
        ("None (Image 2 has no text)", None), ("None - 0 words", None), ("None given", None),
        ("None\u20143 words", None), ("None / 2 letters", None),
        ("[2]", 2.0), ("about 3", 3.0), ("\n1", 1.0), ("0", 0.0),
    ],
)  # fmt: skip
def test_a_score_is_what_its_own_line_says(said, found):
    assert aspects._score(said, "x", "score") == found


def test_a_line_of_words_is_no_score():
    for said in ("Not applicable\nThere are 2 letters", "good\n3"):
        with pytest.raises(RecordError):
            aspects._score(said, "x", "score")


@pytest.mark.parametrize(
    "text, one, other, left",
    [
        ("Image A is right; however, Image B is wrong.", "X is right.", "X is wrong.", 0),
        ("- **Image A**: good hat\n- **Image B:** no hat", "Good hat.", "No hat.", 0),
        ("A: good hat.\nB: no hat.", "Good hat.", "No hat.", 0),
        ("Image A's hat is red. In Edited Image B it is blue.", "X's hat is red.",
         "In x it is blue.", 0),
        ("Image A fails but Image B fits and Image A keeps 3.5 points.",
         "X fails. X keeps 3.5 points.", "X fits.", 0),
        ("The hat in Image A and Image B is red.", "", "", 1),
        ("Images A and B are equal. It is dark.", "", "", 2),
        ("Image A is better lit. Image A has both the hat and the bow.",
         "X has both the hat and the bow.", "", 1),
        ("Image A adds it, while Image B does not. The sky is kept.", "X adds it.",
         "X does not.", 1),
        ("A hat was asked for. Image A has it. They differ. So it is.", "X has it.", "", 3),
        ("Compared to Image B, Image A is calm. Image B shouts.", "", "X shouts.", 1),
        ("Image A is red and Image A is big, whereas Image B is blue, but Image B is also small.",
         "X is red and x is big.", "X is blue, but x is also small.", 0),
        ("Image A " + "is red and Image A " * 200 + "is tied with Image B.", "", "", 1),
        ("", "", "", 0),
    ],
)  # fmt: skip
def test_sentences_go_to_the_candidate_they_name(text, one, other, left):
    parts = split(text, "x")
    assert parts.texts == {"A": one, "B": other} and len(parts.left) == left
