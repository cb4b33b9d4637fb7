"""Files as people and tools leave them: encodings, broken texts, tables, what is no data at all."""

import io
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from benchmark_files import png
from layout_case import build, lines, pictures  # noqa: F401

from jrm_jax.data import builders, store
from jrm_jax.data.ingest import json_rows, making, rows
from jrm_jax.errors import UserError


def line(name="a", **changes):
    return {
        "id": name, "prompt": ["Grüße an die Katze", {"image": "0.png"}],
        "candidates": [{"image": "1.png"}, {"image": "2.png"}], "ranks": [1, 2],
    } | changes  # fmt: skip


def written(rows_, **options):
    return "".join(json.dumps(row, ensure_ascii=False, **options) + "\n" for row in rows_)


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", [".jsonl", ".JSON"])
def test_marks_at_the_beginning_of_a_file(pictures, build, encoding, suffix):
    found = [line("a"), line("b")]
    text = written(found) if suffix == ".jsonl" else json.dumps(found, ensure_ascii=False)
    path = pictures / f"own{suffix}"
    path.write_text(text, encoding=encoding)
    examples, kinds = build("jsonl", path)
    assert [e.id for e in examples] == ["a", "b"] and not kinds
    assert examples[0].prompt[0].text == "Grüße an die Katze"


def test_marks_where_files_were_joined(pictures, build):
    text = "".join("\ufeff" + written([line(name)]) for name in "abc")
    (pictures / "own.jsonl").write_text(text)
    examples, kinds = build("jsonl", pictures / "own.jsonl")
    assert [e.id for e in examples] == list("abc") and not kinds


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_bytes_that_are_no_utf_8_cost_their_row_only(pictures, build, capsys, suffix):
    found = [line("a", prompt="Cat"), line("b"), line("c", prompt="Dog")]
    text = written(found) if suffix == ".jsonl" else json.dumps(found, ensure_ascii=False)
    path = pictures / f"own{suffix}"
    path.write_bytes(text.encode("latin-1"))
    examples, kinds = build("jsonl", path)
    assert [e.id for e in examples] == ["a", "c"]
    assert kinds == {("left out", "text that is not valid Unicode"): 1}
    assert builders.main(["jsonl", f"--data={path}", f"--out={pictures / 'no'}"]) == 1
    said = capsys.readouterr().err
    at = ":2: field 'prompt[0]'" if suffix == ".jsonl" else "[1]: field 'prompt[0]'"
    assert at in said and "save the file as UTF-8" in said and said.count("\n") == 1


HALF = "Smile \ud83d"


@pytest.mark.parametrize("changes", [
    {"prompt": HALF}, {"id": HALF}, {HALF: 1}, {"scores": {HALF: [1, 2]}},
    {"candidates": [{"parts": ["x"], "critique": HALF}, "y"]}, {"prompt": [{"image": HALF}]},
])  # fmt: skip
def test_half_of_a_surrogate_pair_is_left_out_with_a_reason(pictures, build, changes):
    found = [line("a"), line("b") | changes, line("c")]
    examples, kinds = build("jsonl", lines(pictures / "own.jsonl", found))
    assert [e.id for e in examples] == ["a", "c"]
    assert kinds == {("left out", "text that is not valid Unicode"): 1}


def test_half_of_a_surrogate_pair_in_the_other_layouts(pictures, build):
    pair = {"prompt": HALF, "path_src": "0.png", "path1": "1.png", "path2": "2.png",
            "model1_overall_score": 8, "model2_overall_score": 5}  # fmt: skip
    (pictures / "pairs.json").write_text(json.dumps([pair, pair | {"prompt": "Add a hat"}]))
    judged = {"instruction": "Add a hat", "input_image": "0.png", "output_image": "1.png",
              "SC_reasoning": HALF, "SC_score": [3, 4]}  # fmt: skip
    lines(pictures / "judged.jsonl", [judged, judged | {"SC_reasoning": "Fine."}])
    for layout, name in (("editreward", "pairs.json"), ("editscore", "judged.jsonl")):
        examples, kinds = build(layout, pictures / name)
        assert len(examples) == 1
        assert kinds == {("left out", "text that is not valid Unicode"): 1}


@pytest.mark.parametrize("nested", ["[" * 40 + "]" * 40, "[" * 100_000])
def test_rows_nested_beyond_reason(pictures, build, nested):
    text = written([line("a")]) + f'{{"id": "b", "prompt": {nested}}}\n' + written([line("c")])
    (pictures / "own.jsonl").write_text(text)
    examples, kinds = build("jsonl", pictures / "own.jsonl")
    assert [e.id for e in examples] == ["a", "c"] and sum(kinds.values()) == 1


def test_a_files_name_may_be_any_bytes(pictures, build):
    folder = pictures / "data"
    folder.mkdir()
    path = folder / b"caf\xe9.jsonl".decode(errors="surrogateescape")
    path.write_text(written([{k: v for k, v in line().items() if k != "id"}]) + "{\n")
    (example,), kinds = build("jsonl", folder, f"--images={pictures}")
    assert example.id.endswith("data/caf\\udce9.jsonl:1")
    assert kinds == {("left out", "row that cannot be read"): 1}


# What is no data


def test_hidden_files_and_tools_own_files_are_passed_over(pictures, build, capsys):
    folder = pictures / "data"
    for name in ("", ".cache", "__MACOSX", "sub.json"):
        (folder / name).mkdir(parents=True)
    lines(folder / "train.jsonl", [line("a")])
    for name in ("._train.jsonl", ".hidden.json", ".cache/x.json", "__MACOSX/train.jsonl"):
        (folder / name).write_bytes(b"\0\5\x16\7\0\2")
    for name in ("dataset_infos.json", "dataset_info.json", "state.json", "jrm_jax.json"):
        (folder / name).write_text('{"splits": {"train": 3}}')
    examples, kinds = build("jsonl", folder, f"--images={pictures}")
    assert [e.id for e in examples] == ["a"] and not kinds
    (folder / "results.json").write_text('{"accuracy": 0.7}')  # somebody's: passed over, told
    examples, kinds = build("jsonl", folder, f"--images={pictures}")
    assert len(examples) == 1
    assert kinds == {("kept", "JSON file that holds no list of rows (passed over)"): 1}
    (folder / "train.jsonl").unlink()
    (folder / "own.json").write_text("{}")
    arguments = [f"--data={folder}", f"--out={pictures / 'no'}"]
    assert builders.main(["jsonl", *arguments, "--skip_bad"]) == 1
    said = capsys.readouterr().err
    assert "no usable record; first: " in said and "own.json must hold a list" in said


def test_a_file_that_breaks_off_costs_what_follows_in_it(pictures, build, capsys):
    folder = pictures / "data"
    folder.mkdir()
    whole = json.dumps([line("a"), line("b"), line("c")])
    (folder / "1.json").write_text(whole[: whole.index('"c"')])
    lines(folder / "2.jsonl", [line("d")])
    (folder / "3.parquet").write_bytes(b"PAR1" + b"x" * 100)
    examples, kinds = build("jsonl", folder, f"--images={pictures}")
    assert [e.id for e in examples] == ["a", "b", "d"]
    assert kinds == {("left out", "file that cannot be read on"): 2}
    arguments = [f"--data={folder}", f"--out={pictures / 'no'}", f"--images={pictures}"]
    assert builders.main(["jsonl", *arguments]) == 1
    said = capsys.readouterr().err
    assert "1.json is not JSON (entry 2" in said and said.count("\n") == 1


def test_a_broken_list_is_not_read_to_its_end(tmp_path, monkeypatch):
    sizes = []

    class Text(io.StringIO):
        def read(self, size):
            sizes.append(size)
            return super().read(size)

    text = Text('[{"a": 1}, {"b" 2}, ' + '{"c": 3}, ' * 50_000 + "1]")
    monkeypatch.setattr(json_rows, "BLOCK", 64)
    (tmp_path / "list.json").touch()
    monkeypatch.setattr(json_rows, "open_text", lambda path: text)
    with pytest.raises(UserError, match="entry 1"):
        list(rows.read_rows(tmp_path / "list.json"))
    assert sizes == [64]


# JSON by other names, and joined; links


def found_in(path, text, **options):
    path.write_text(text, encoding="utf-8")
    return list(rows.read_rows(path, **options))


@pytest.mark.parametrize("block", [1, 64])
@pytest.mark.parametrize("between", ["", "\n", " \n\ufeff"])
def test_joined_lists_are_read_to_the_end(tmp_path, monkeypatch, block, between):
    monkeypatch.setattr(json_rows, "BLOCK", block)
    path = tmp_path / "all.json"
    found = found_in(path, between.join(['[{"a": 1}, {"a": 2}]', "[]", '[{"a": 3}]\n']))
    assert found == [(f"{path}[{i}]", {"a": i + 1}) for i in range(3)]
    assert list(rows.read_rows(path, skip=2)) == found[2:]


@pytest.mark.parametrize("more", ["x", ",", "]", '{"a": 3}', ', {"a": 3}', '"', "\0\0"])
def test_what_follows_a_list_is_not_dropped_in_silence(tmp_path, more):
    with pytest.raises(UserError, match="something follows the list, after 1 entries"):
        found_in(tmp_path / "own.json", '[{"a": 1}]\n' + more + "\n")


def test_json_lines_by_other_names(tmp_path):
    wanted = [{"a": 1, "b": "x\ny"}, {"a": 2}, {"a": 3}]
    text = "\n\n".join(map(json.dumps, wanted)) + "\n"
    for name in ("x.json", "x.ndjson", "X.JSONL", "x.txt"):
        found = found_in(tmp_path / name, "\ufeff" + text)
        assert [row for _, row in found] == wanted and found[1][0].endswith(f"{name}:3")
    (_, first), (where, bad), (_, last) = found_in(tmp_path / "x.json", text.replace("2}", "2"))
    assert isinstance(bad, UserError) and where.endswith(":3") and (first, last) == (
        wanted[0], wanted[2])  # fmt: skip
    objects = "\n".join(json.dumps(row, indent=2) for row in wanted)  # as jq writes them
    assert [row for _, row in found_in(tmp_path / "x.json", objects)] == wanted
    assert [w for w, _ in rows.read_rows(tmp_path / "x.json", skip=2)] == [f"{tmp_path}/x.json[2]"]
    for more, words in ((", 3", "no object follows entry 2"), ('{"a"', "entry 3")):
        with pytest.raises(UserError, match=words):
            found_in(tmp_path / "x.json", objects + more)
    for alone in (json.dumps(wanted[0]), json.dumps(wanted[0], indent=1)):
        with pytest.raises(json_rows.NoRows, match="is an object .*name the file .jsonl"):
            found_in(tmp_path / "x.json", alone)


@pytest.mark.parametrize("text", ['{"a": ', "{\n{\n", '{"a": 1} x', "<html>", '"a"', "nothing"])
def test_a_broken_file_is_not_passed_over(tmp_path, text):
    """A part of a data set may be what was cut off, or a page that tells of an error."""
    with pytest.raises(UserError, match="is not JSON") as caught:
        found_in(tmp_path / "x.json", text)
    assert not isinstance(caught.value, json_rows.NoRows)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.parquet", "x.arrow", "x.csv"])
def test_what_stands_for_a_file_is_told(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} stands for a file that was not downloaded"):
        found_in(tmp_path / name, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_names_in_other_encodings(tmp_path, kind):
    """As old archives leave them."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/z\xfc"))
    folder.mkdir()
    table, path = pyarrow.table({"n": [1, 2, 3]}), folder / f"data.{kind}"
    with path.open("wb") as file:
        if kind == "parquet":
            pyarrow.parquet.write_table(table, file)
        else:
            with pyarrow.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
    assert [row for _, row in rows.read_rows(path, skip=1)] == [{"n": 2}, {"n": 3}]


def test_a_long_object_is_not_read_to_its_end(tmp_path, monkeypatch):
    """It may be anything, and as large as a disk."""
    monkeypatch.setattr(json_rows, "BLOCK", 64)
    monkeypatch.setattr(json_rows, "LONGEST", 256)
    read, sizes = json_rows._Values._read_on, []

    def counted(values):
        sizes.append(len(values.text))
        return read(values)

    monkeypatch.setattr(json_rows._Values, "_read_on", counted)
    with pytest.raises(json_rows.NoRows):
        found_in(tmp_path / "x.json", json.dumps({"a": list(range(10_000))}))
    assert max(sizes) <= 256


def test_linked_folders_are_entered_once(tmp_path):
    far, data = tmp_path / "far", tmp_path / "data"
    for folder in (far / "deep", data / "part2"):
        folder.mkdir(parents=True)
        (folder / "x.jsonl").write_text("{}")
    (data / "part1").symlink_to(far, target_is_directory=True)
    (far / "deep" / "round").symlink_to(data, target_is_directory=True)  # in a circle
    (data / "again").symlink_to(data / "part2", target_is_directory=True)
    (data / "y.jsonl").symlink_to(far / "deep" / "x.jsonl")
    wanted = [data / "part1" / "deep" / "x.jsonl", data / "part2" / "x.jsonl", data / "y.jsonl"]
    assert rows.find(data) == wanted
    (data / "part3").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="part3 is a link that leads nowhere"):
        rows.find(data)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.zst", "x.CSV.ZIP"])
def test_packed_files_are_named(tmp_path, name):
    suffixes = (*rows.SUFFIXES, ".csv")
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "images.zip").write_bytes(b"PK")
    assert rows.find(tmp_path, suffixes) == [tmp_path / "a.jsonl"]
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=f"{name} is packed: unpack it"):
            rows.find(place, suffixes)
    (tmp_path / name).with_suffix("").write_text("{}")  # as gunzip -k leaves it
    assert len(rows.find(tmp_path, suffixes)) == 2


# Ids and flags


def test_numbers_as_ids(pictures, build):
    names = (7, 8.0, "nine", None, True, [1])
    examples, kinds = build("jsonl", lines(pictures / "own.jsonl", [line(n) for n in names]))
    assert [e.id for e in examples][:3] == ["7", "8", "nine"]
    assert examples[3].id.endswith("own.jsonl:4") and len(examples) == 4
    assert kinds == {("left out", "field 'id'"): 2}


@pytest.mark.parametrize(("said", "tie"), [
    (True, True), ("True", True), ("true ", True), (1, True), (1.0, True), ("yes", True),
    (False, False), ("False", False), ("false", False), (0, False), ("0", False), ("", False),
    (None, False), (float("nan"), False), ("maybe", None), (2, None), ([True], None),
])  # fmt: skip
def test_ties_said_in_words(pictures, build, capsys, said, tie):
    (pictures / "x.png").write_bytes(png(99))
    pair = {"prompt": "Add", "path_src": "0.png", "path1": "1.png", "path2": "2.png",
            "model1_overall_score": 8, "model2_overall_score": 5}  # fmt: skip
    path = pictures / "pairs.json"
    path.write_text(json.dumps([pair | {"tie_case": said}]))
    if tie is None:
        assert builders.main(["editreward", f"--data={path}", f"--out={pictures / 'no'}"]) == 1
        assert "field 'tie_case': is" in capsys.readouterr().err
        return
    (example,), _ = build("editreward", path)
    assert example.preference[0, 1, 0] == (0.5 if tie else 1)


def test_a_split_is_added_to_the_folder_in_which_one_is(pictures, monkeypatch):
    rows_ = [{"id": str(i), "prompt": ["Add"], "candidates": ["a", f"b{i}"], "ranks": [1, 2]}
             for i in range(3)]  # fmt: skip
    data = lines(pictures / "rows.jsonl", rows_)
    out = pictures / "own"
    assert builders.main(["jsonl", f"--data={data}", f"--out={out}"]) == 0
    monkeypatch.chdir(out)
    assert builders.main(["jsonl", f"--data={data}", "--out=.", "--split=valid"]) == 0
    assert {name: len(rows) for name, rows in store.open_dataset(out).items()} == {
        "train": 3, "valid": 3
    }  # fmt: skip


def test_a_split_is_added_where_a_link_leads(pictures, monkeypatch):
    """The disk of the link may be another one."""
    rows_ = [{"id": str(i), "prompt": ["Add"], "candidates": ["a", f"b{i}"], "ranks": [1, 2]}
             for i in range(3)]  # fmt: skip
    data, far = lines(pictures / "rows.jsonl", rows_), pictures / "far"
    far.mkdir()
    assert builders.main(["jsonl", f"--data={data}", f"--out={far / 'own'}"]) == 0
    (pictures / "link").symlink_to(far / "own")
    places, make = [], Path.mkdir

    def noted(path, *options, **more):
        places.append(path)
        make(path, *options, **more)

    monkeypatch.setattr(Path, "mkdir", noted)
    arguments = ["jsonl", f"--data={data}", f"--out={pictures / 'link'}", "--split=valid"]
    assert builders.main(arguments) == 0
    assert (pictures / "link").is_symlink() and len(store.open_dataset(far / "own")) == 2
    assert far / "own.building" in places and pictures / "link.building" not in places


def test_places_that_cannot_be_used_are_one_line(pictures, monkeypatch, capsys):
    data = lines(pictures / "rows.jsonl", [line("a")])
    out = os.fsdecode(os.fsencode(pictures) + b"/z\xfc")
    assert builders.main(["jsonl", f"--data={data}", f"--out={out}"]) == 1
    assert "give a name that UTF-8 can hold" in capsys.readouterr().err

    def refuse():
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(making.forkserver, "ensure_running", refuse)
    with pytest.raises(UserError, match="AF_UNIX path too long.: set TMPDIR to .* short name"):
        making.start_server()
