"""Tables as spreadsheets and people leave them, and numbers and names as they write them."""


import pytest
from benchmark_files import png
from layout_case import build, lines, pictures  # noqa: F401

from jrm_jax.data import builders
from jrm_jax.data.ingest import aspects, delimited
from jrm_jax.data.ingest.pictures import GroupPictures
from jrm_jax.data.labels import read_decimal
from jrm_jax.data.picture_names import is_file, read_named
from jrm_jax.data.stated import stated_scores, teacher_scores
from jrm_jax.errors import RecordError, UserError
from jrm_jax.evaluation.files import Row


def table(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return path


def test_cells_that_hold_no_number(pictures, build):
    text = "source,instruction,edit,score\n" + "".join(
        f"0.png,Add,{i}.png,{score}\n"
        for i, score in enumerate(("3", "nan", "5", "N/A", "inf", "", "high"), 1)
    )
    (example,), kinds = build("csv", table(pictures / "t.csv", text))
    assert len(example.candidates) == 5  # 3, nan, 5, N/A, empty
    assert example.preference[0, 2, 0] == 0
    assert [int(example.weight[i].sum()) for i in range(5)] == [1, 0, 1, 0, 0]
    assert kinds == {
        ("kept", "score or rank that is no number (that edit is unlabelled)"): 2,
        ("left out", "field 'score'"): 2,
    }
    problems = (pictures / "out0" / "problems.txt").read_text()
    for number, words in ((3, "score is 'nan'"), (6, "must be a finite"), (8, "must be a number")):
        assert any(f"t.csv:{number}: " in said and words in said for said in problems.splitlines())


def test_cells_in_which_nothing_is_said(pictures, build):
    """With blanks around cells, and what tables write where nothing is."""
    text = "source, instruction, edit, group, score, critique\n" + "".join(
        f"{source}, {text}, {edit}.png , {group}, {5 - edit}, {critique}\n"
        for source, text, edit, group, critique in (
            ("0.png", "Add", 1, "nan", "N/A"), (" 0.png", "Add ", 2, "-", " - "),
            ("0.png", "Add", 3, "", "Fine."), ("nan", "Draw", 4, "none", "null"),
            ("", "Draw", 1, "", ""), ("0.png", "Add", 1, "own", "So."),
        )
    )  # fmt: skip
    found, kinds = build("csv", table(pictures / "t.csv", text))
    assert not kinds
    shown = [(len(e.prompt), [c.critique for c in e.candidates]) for e in found]
    assert shown == [(2, [None, None, "Fine."]), (1, [None, None]), (2, ["So."])]


def test_lines_of_scores_are_those_that_the_table_marks(pictures, build):
    text = "source,instruction,edit,critique,score_line\n" + "".join(
        f"0.png,Add,{i}.png,{critique},{mark}\n"
        for i, (critique, mark) in enumerate(
            (("Fine. Overall: 7/10", "TRUE"), ("Overall: 3/10", "yes"), ("Overall: 2/10", ""),
             ("Overall: 1/10", "false"), ("", "true"), ("Overall: 9/10", "maybe")), 1
        )
    )  # fmt: skip
    (example,), kinds = build("csv", table(pictures / "t.csv", text))
    marks = [candidate.score_line for candidate in example.candidates]
    assert marks == [True, True, False, False, False]
    assert kinds == {("left out", "field 'score_line'"): 1}
    found = [c.critique if c.score_line else None for c in example.candidates]
    assert teacher_scores(found, ("overall",), {})[:2] == [[7], [3]]


@pytest.mark.parametrize("opened", ['z,Add "a hat,x', '"z,Add,x', 'z,"Add,x', 'z,Add,"x'])
def test_a_quote_that_is_never_closed(pictures, build, capsys, monkeypatch, opened):
    monkeypatch.setattr(delimited, "CELL", 2000)
    good = [f"{i},Add {i},{i % 8}.png,Said {i}." for i in range(200)]
    cells = opened.split(",")
    good[5] = ",".join([cells[0], cells[1], "5.png", cells[2]])
    good[150] = '150,Add 150,6.png,"Said\nin ""two"" lines."'
    text = "\n".join(["group,instruction,edit,critique", *good]) + "\n"
    path = table(pictures / "t.csv", text)
    examples, kinds = build("csv", path)
    harmless = opened.startswith("z,Add ")  # a quote inside a cell opens nothing
    assert len(examples) == 200 - (not harmless)
    assert 'Said\nin "two" lines.' in [e.candidates[0].critique for e in examples]
    assert kinds == ({} if harmless else {("left out", "quote that is not closed"): 1})
    if not harmless:
        assert builders.main(["csv", f"--data={path}", f"--out={pictures / 'no'}"]) == 1
        said = capsys.readouterr().err
        assert "t.csv:7: a quote (\") opens here" in said and said.count("\n") == 1


@pytest.mark.parametrize(("delimiter", "encoding", "first"), [
    (";", "utf-8-sig", ""), ("\t", "utf-16", ""), ("|", "utf-8", ""), (";", "utf-8", "sep=;\r\n"),
])  # fmt: skip
def test_tables_as_spreadsheets_write_them(pictures, build, delimiter, encoding, first):
    rows_ = [
        (" source", "instruction ", "edit", "score", ""),
        ("0.png", "Größer, bitte", "1.png", "3,5", ""),
        ("0.png", "Größer, bitte", "2.png", "4", ""),
        ("0.png", "Größer, bitte", "3.png", "3.25", ""),
    ]  # fmt: skip
    text = first + "".join(delimiter.join(row) + "\r\n" for row in rows_)
    (example,), kinds = build("csv", table(pictures / "t.csv", text, encoding))
    assert not kinds and example.prompt[0].text == "Größer, bitte"
    assert example.preference[..., 0].tolist() == [[0.5, 0, 1], [1, 0.5, 1], [0, 0, 0.5]]


def test_heads_that_stand_twice_are_refused(pictures, capsys):
    path = table(pictures / "t.csv", "edit,instruction,score,score\n1.png,Add,1,2\n")
    assert builders.main(["csv", f"--data={path}", f"--out={pictures / 'no'}", "--skip_bad"]) == 1
    assert "column 'score' is there twice" in capsys.readouterr().err


def test_rows_of_empty_cells_are_none(pictures, build):
    """As spreadsheets leave them below a table, and above it."""
    text = ",,,\nsource,instruction,edit,score\n , ,\t,\n0.png,Add,1.png,2\n,,,,,\n" \
           "0.png,Add,2.png,1\n,,\n,,,\n\n"  # fmt: skip
    (example,), kinds = build("csv", table(pictures / "t.csv", text))
    assert not kinds and example.preference[0, 1, 0] == 1


# Numbers


@pytest.mark.parametrize(("text", "number"), [
    ("7,5", 7.5), ("-0,250", -0.25), ("1,25", 1.25), ("1,2500", 1.25), ("1250,5", 1250.5),
    ("12,5", 12.5), ("1e3", 1000), ("+3", 3), ("1.250", 1.25), ("0,001", 0.001),
])  # fmt: skip
def test_decimal_commas(text, number):
    assert read_decimal(text) == number


@pytest.mark.parametrize(("text", "words"), [
    ("1,250", "write 1250, or 1.250"), ("-12,000", "write -12000, or -12.000"),
    ("1,250,000", "part thousands"), ("1_000", "a number"), ("1.250,5", "a number"),
    ("1,2,3", "a number"), ("1,250.5", "a number"), ("", "a number"), ("inf", "a finite number"),
    ("1,", "a number"), ("1 250", "a number"),
])  # fmt: skip
def test_commas_that_may_part_thousands_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        read_decimal(text)


def test_a_comma_between_thousands_does_not_turn_a_label_round(pictures, build):
    text = 'source,instruction,edit,score\n0.png,Add,1.png,"1,250"\n0.png,Add,2.png,980\n' \
           "0.png,Add,3.png,3\n"  # fmt: skip
    (example,), kinds = build("csv", table(pictures / "t.csv", text))
    assert kinds == {("left out", "field 'score'"): 1} and len(example.candidates) == 2
    assert example.preference[0, 1, 0] == 1


def test_the_same_rule_for_what_judges_say():
    assert stated_scores("overall: 7,5/10", ["overall"]) == {"overall": 7.5}
    assert stated_scores("overall: 700/1,000", ["overall"]) == {}
    assert aspects._score("3,5 of 4", "x", "y") == 3.5
    with pytest.raises(RecordError, match="from 0 to 4"):
        aspects._score("1,250", "x", "y")


# Names as Windows writes them


def test_backslashes_in_names_of_pictures(pictures, build):
    inner = pictures / "data" / "images"
    inner.mkdir(parents=True)
    for number in range(3):
        (inner / f"{number}.png").write_bytes(png(number))
    (pictures / "data" / "odd\\name.png").write_bytes(png(3))
    rows = "source,instruction,edit,score\nimages\\0.png,Add,images\\1.png,2\n" \
           "images\\0.png,Add,.\\images\\2.png,1\nimages\\0.png,Add,odd\\name.png,3\n"  # fmt: skip
    (example,), kinds = build("csv", table(pictures / "data" / "t.csv", rows))
    assert not kinds
    assert [one.parts[0].data for one in example.candidates] == [png(1), png(2), png(3)]
    assert read_named("images\\1.png", pictures / "data") == png(1)
    record = {"prompt": "Add", "candidates": ["images\\1.png", {"image": "images\\2.png"}],
              "ranks": [1, 2]}  # fmt: skip
    path = lines(pictures / "data" / "own.jsonl", [record])
    assert builders.main(["jsonl", f"--data={path}", f"--out={pictures / 'no'}"]) == 1
    assert GroupPictures(pictures / "data").is_file("images\\1.png")
    assert not is_file("https://x.org/a.png") and not is_file("a\0b")


@pytest.mark.parametrize(("name", "words"), [
    ("https://x.org/a.png", "an address on the web: download it"), ("data:image/png", "comma"),
    ("nowhere\\a.png", "nowhere/a.png: No such file"),
])  # fmt: skip
def test_names_in_benchmarks_get_the_same_advice(pictures, name, words):
    row = Row({}, "f.json[3]", pictures)
    with pytest.raises(UserError, match=words):
        row.picture(name, "source").read()
    (pictures / "sub dir").mkdir()
    (pictures / "sub dir" / "a.png").write_bytes(png(5))
    for good in ("sub dir\\a.png", (pictures / "sub dir" / "a.png").as_uri()):
        assert row.picture(good, "source").read() == png(5) and row.is_file(good)
    assert not row.is_file(name) and not row.is_file("x" * 5000)
