"""Pictures as they come: what can never be encoded, deep ones, and pictures written as text."""

import base64
import io
import json
import zlib

import numpy as np
import PIL.Image
import pytest
from benchmark_files import png
from layout_case import build, lines, parquet, pictures  # noqa: F401

from jrm_jax.data import builders, images
from jrm_jax.data.chosen import as_group
from jrm_jax.data.images import SizeError
from jrm_jax.data.picture_names import ends_like_picture, inline_picture, short
from jrm_jax.errors import RecordError, UserError
from jrm_jax.serving.groups import read_picture


def line(name="a", edit="2.png", **changes):
    return {
        "id": name, "prompt": ["Add", {"image": "0.png"}],
        "candidates": [{"image": "1.png"}, {"image": edit}], "ranks": [1, 2],
    } | changes  # fmt: skip


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, body):
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


# What can never be encoded


@pytest.mark.parametrize("size", [(400, 1), (1, 201), (4100, 20)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_what_can_never_be_encoded_is_left_out_when_the_set_is_built(
    pictures, build, capsys, size, kind
):
    (pictures / "narrow.png").write_bytes(saved(PIL.Image.new("RGB", size), kind))
    with pytest.raises(SizeError, match="at most 200 times"):
        images.decode((pictures / "narrow.png").read_bytes())
    path = lines(pictures / "own.jsonl", [line("a"), line("b", "narrow.png")])
    examples, kinds = build("jsonl", path)
    assert [e.id for e in examples] == ["a"]
    assert kinds == {("left out", "picture of a size that no model can take"): 1}
    path = pictures / "t.csv"
    path.write_text("source,instruction,edit,score\n0.png,Add,1.png,2\n0.png,Add,narrow.png,1\n")
    assert builders.main(["csv", f"--data={path}", f"--out={pictures / 'no'}"]) == 1
    said = capsys.readouterr().err
    assert "t.csv:3: field 'edit': " in said and "crop or remove it" in said


# Damage that does no harm, and what turns a picture


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_in_every_format(tag, kind):
    import PIL.ImageOps

    exif = PIL.Image.Exif()
    exif[0x0112] = tag
    small = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    data = saved(PIL.Image.fromarray(small.repeat(8, 0).repeat(8, 1)), kind, exif=exif)
    wanted = PIL.Image.open(io.BytesIO(data))
    wanted.load()
    wanted = PIL.ImageOps.exif_transpose(wanted).convert("RGB")
    np.testing.assert_array_equal(images.decode(data), wanted)
    assert sorted(images.image_size(data)) == [24, 40]


def test_a_turned_picture_with_another_tag_that_is_broken_is_still_turned():
    """Pillow reads the orientation, but cannot write the tags anew."""
    tags = [(0x010E, 2, 1 << 20, 200), (0x0112, 3, 1, 6)]  # a text beyond the end, the orientation
    body = b"II*\0\x08\0\0\0" + len(tags).to_bytes(2, "little")
    for tag, kind, count, value in tags:
        body += tag.to_bytes(2, "little") + kind.to_bytes(2, "little")
        body += count.to_bytes(4, "little") + value.to_bytes(4, "little")
    plain = saved(PIL.Image.new("RGB", (64, 32)))
    data = plain[:33] + chunk(b"eXIf", body + bytes(4)) + plain[33:]
    assert images.open_image(data).size == (32, 64)
    from jrm_jax.assets.export.image_processing_jrm import to_rgb  # the export's copy of the rule

    assert to_rgb(PIL.Image.open(io.BytesIO(data))).size == (32, 64)


@pytest.mark.parametrize("body", [b"", b"MM\0*\xff\xff\xff\xff\0", b"Exif\0\0junk", bytes(200)])
@pytest.mark.parametrize("right_sum", [True, False])
def test_broken_exif_is_no_reason_to_refuse_a_picture(pictures, build, body, right_sum):
    plain = png(1)
    exif = chunk(b"eXIf", body)
    exif = exif if right_sum else exif[:-1] + bytes([exif[-1] ^ 1])
    (pictures / "odd.png").write_bytes(plain[:33] + exif + plain[33:])
    examples, kinds = build("jsonl", lines(pictures / "own.jsonl", [line("a", "odd.png")]))
    assert len(examples) == 1 and not kinds
    shown = images.decode((pictures / "odd.png").read_bytes())
    np.testing.assert_array_equal(shown, images.decode(plain))


def test_damage_to_the_pixels_is_not_forgiven():
    plain = bytearray(png(1))
    plain[-20] ^= 1
    with pytest.raises(ValueError, match="not a readable image"):
        images.open_image(bytes(plain))


# Deep pictures


def deep_colour():
    values = np.random.default_rng(0).integers(0, 65536, (8, 9, 3))
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = (9).to_bytes(4, "big") + (8).to_bytes(4, "big") + b"\x10\x02\0\0\0"
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_deep_pictures_are_told_once_in_the_data_card(pictures, build):
    ramp = PIL.Image.fromarray(np.linspace(0, 65535, 32 * 24).reshape(24, 32).astype(np.uint16))
    (pictures / "deep.png").write_bytes(saved(ramp))
    (pictures / "deep.tif").write_bytes(saved(ramp.convert("F"), "TIFF"))
    (pictures / "colour.png").write_bytes(deep_colour())
    found = [line("a", "deep.png"), line("b"), line("c", "deep.tif"), line("d", "colour.png")]
    examples, kinds = build("jsonl", lines(pictures / "own.jsonl", found))
    assert len(examples) == 4
    kind = "picture with more than 8 bits a channel (scaled to 8)"
    assert kinds == {("kept", kind): 3}
    assert f"| {kind} | 3 |" in (pictures / "out0" / "README.md").read_text()
    grey = images.decode(examples[0].candidates[1].parts[0].data)[..., 0]
    assert grey.min() == 0 and grey.max() == 255 and len(np.unique(grey)) == 256


# Pictures as text


def uri(data, head="data:image/png;base64", encode=base64.b64encode):
    return f"{head},{encode(data).decode()}"


FORMS = {
    "plain": lambda d: uri(d),
    "no type": lambda d: uri(d, "data:;base64"),
    "capitals": lambda d: uri(d, "DATA:image/PNG;Base64"),
    "parameters": lambda d: uri(d, "data:image/png;name=a.png;base64"),
    "for addresses": lambda d: uri(d, encode=base64.urlsafe_b64encode).rstrip("="),
    "in lines": lambda d: uri(d, encode=base64.encodebytes),
    "percent": lambda d: uri(d).replace("+", "%2B").replace("=", "%3D"),
    "percent only": lambda d: "data:image/png," + "".join(f"%{byte:02X}" for byte in d),
    "bare": lambda d: base64.b64encode(d).decode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_may_be_written_as_text(form):
    data = png(5)
    text = FORMS[form](data)
    assert inline_picture(text) == data == read_picture(text)
    assert len(short(text)) < 80 and "characters" in short(text)
    for name in ("cat.png", "/9j/cat.png", "R0lGODxx", "dataset/a.png"):
        assert inline_picture(name) is None and short(name) == name


def test_pictures_as_text_in_every_layout(pictures, build):
    texts = [uri(png(i)) for i in range(3)]
    lines(pictures / "own.jsonl", [line("a", texts[2], prompt=["Add", {"image": texts[0]}])])
    edits = [{"image": {"bytes": FORMS["bare"](png(i)), "path": None}} for i in (1, 2)]
    hub = {"id": "b", "prompt": "Add", "candidates": edits, "ranks": [1, 2]}
    lines(pictures / "hub.jsonl", [hub])
    pair = dict(zip(("path_src", "path1", "path2"), texts, strict=True))
    pair |= {"prompt": "Add", "model1_overall_score": 8, "model2_overall_score": 5}
    (pictures / "pairs.json").write_text(json.dumps([pair]))
    judged = {"instruction": "Add", "input_image": texts[0], "output_image": texts[1],
              "SC_reasoning": "Good."}  # fmt: skip
    lines(pictures / "judged.jsonl", [judged])
    rows = "".join(f'"{texts[0]}",Add,"{text}",{i}\n' for i, text in enumerate(texts[1:]))
    (pictures / "t.csv").write_text(f"source,instruction,edit,score\n{rows}")
    for layout, name in (("jsonl", "own.jsonl"), ("jsonl", "hub.jsonl"), ("csv", "t.csv"),
                         ("editreward", "pairs.json"), ("editscore", "judged.jsonl")):  # fmt: skip
        (example,), kinds = build(layout, pictures / name)
        found = [part.data for candidate in example.candidates for part in candidate.parts]
        assert found == [png(1), png(2)][: len(found)] and not kinds, layout


@pytest.mark.parametrize(("text", "words"), [
    ("data:image/png;base64", "a data: URI without a comma"),
    ("data:image/png;base64,####", "base64 that cannot be decoded"),
    (uri(png(1)[:200] * 30), "not a readable image"),
    (uri(b""), "not a readable image"),
    ("https://example.org/a.png", "download it"),
    ("a" * 5000 + ".png", "cannot be read"),
    ("nul\0.png", "null"),
])  # fmt: skip
def test_what_is_wrong_with_a_picture_as_text_is_said_shortly(pictures, build, text, words):
    found = [line("a"), line("b", text)]
    examples, _ = build("jsonl", lines(pictures / "own.jsonl", found))
    assert [e.id for e in examples] == ["a"]
    (problem,) = (pictures / "out0" / "problems.txt").read_text().splitlines()
    assert words in problem and len(problem) < 500
    with pytest.raises((ValueError, OSError)):
        images.decode(read_picture(text))


def test_files_by_address(pictures, build):
    name = (pictures / "2.png").as_uri()
    (example,), kinds = build("jsonl", lines(pictures / "own.jsonl", [line("a", name)]))
    assert example.candidates[1].parts[0].data == png(2) and not kinds


# Names that are taken for text


@pytest.mark.parametrize("text", [
    "a.jpg", "my cat.PNG", "folder/b.webp", " a.jpeg ", "data:image/png;base64,xyz", "1",
])  # fmt: skip
def test_a_text_that_looks_like_a_pictures_name_is_refused(pictures, build, capsys, text):
    (pictures / "1").write_bytes(png(1))  # no ending, but there is such a file
    path = lines(pictures / "own.jsonl", [line("a"), line("b", candidates=[text, "2.png"])])
    examples, kinds = build("jsonl", path)
    kind = "text that looks like a picture's name"
    assert len(examples) == 1 and kinds == {("left out", kind): 1}
    assert builders.main(["jsonl", f"--data={path}", f"--out={pictures / 'no'}"]) == 1
    said = capsys.readouterr().err
    assert 'write {"image": ' in said and '{"text": ' in said and "candidates[0][0]" in said


def test_sentences_and_texts_that_are_meant_are_kept(pictures, build):
    found = [
        line("a", prompt=["Put in what is in logo.png", {"image": "0.png"}]),
        line("b", candidates=[{"text": "a.png"}, {"parts": ["I cannot do that."]}]),
        line("c", prompt="2.png"), line("d", prompt=["Add", "0.png"]),
    ]  # fmt: skip
    examples, kinds = build("jsonl", lines(pictures / "own.jsonl", found))
    assert [e.id for e in examples] == ["a", "b"] and sum(kinds.values()) == 2


# Pairs as chosen and rejected


def pair(**changes):
    return {"instruction": "Add a hat", "source": "0.png", "chosen": "1.png",
            "rejected": "2.png"} | changes  # fmt: skip


def says(role, content):
    return {"role": role, "content": content}


PAIRS = {
    "plain": pair(id=3, model="x", category="add"),
    "prompt": pair(prompt="Add a hat", instruction=None),
    "lists": pair(source=["0.png"], chosen=["1.png"], rejected=["2.png"]),
    "parts": pair(chosen={"image": "1.png"}, rejected={"parts": [{"image": "2.png"}]}),
    "hub": pair(source_image={"bytes": None, "path": "0.png"}, source=None,
                chosen={"bytes": None, "path": "1.png"}),
    "messages": pair(instruction=None, source=None, images=["0.png", "1.png", "2.png"],
                     prompt=[says("user", [{"type": "text", "text": "Add a hat"},
                                           {"type": "image"}])],
                     chosen=[says("assistant", [{"type": "image"}])],
                     rejected=[says("assistant", [{"type": "image"}])]),
    "conversations": {"conversations": [{"from": "human", "value": "Add a hat <image>"}],
                      "images": ["0.png", "1.png", "2.png"],
                      "chosen": {"from": "gpt", "value": "<image>"},
                      "rejected": {"from": "gpt", "value": "<image>"}},
    "address": pair(chosen=[says("assistant", [
        {"type": "image_url", "image_url": {"url": uri(png(1))}}])]),
}  # fmt: skip


@pytest.mark.parametrize("form", PAIRS)
def test_chosen_and_rejected(pictures, build, form):
    (example,), kinds = build("jsonl", lines(pictures / "own.jsonl", [PAIRS[form]]))
    assert not kinds
    text, source = example.prompt
    assert text.text == "Add a hat" and source.data == png(0)
    assert [c.parts[0].data for c in example.candidates] == [png(1), png(2)]
    assert example.preference[0, 1, 0] == 1 and example.weight[0, 1, 0] == 1
    assert example.dimensions == ("overall",)


def test_several_rejected_answers_and_answers_in_words(pictures, build):
    spoken = pair(source=None, chosen="Yes, there is.", rejected=[says("assistant", "No.")])
    found = [pair(rejected=["2.png", "3.png"]), spoken]
    (many, words), kinds = build("jsonl", lines(pictures / "own.jsonl", found))
    assert not kinds
    assert many.preference[..., 0].tolist() == [[0.5, 1, 1], [0, 0.5, 0.5], [0, 0.5, 0.5]]
    assert [c.parts[0].text for c in words.candidates] == ["Yes, there is.", "No."]


def test_pairs_of_parquet_hold_their_pictures(tmp_path, build):
    rows = [{"prompt": "Add", "images": [{"bytes": png(0), "path": None}],
             "chosen": {"bytes": png(1), "path": "a"}, "rejected": {"bytes": png(2), "path": "b"}}]
    (example,), kinds = build("jsonl", parquet(tmp_path / "own.parquet", rows))
    assert not kinds and example.prompt[1].data == png(0)
    assert example.candidates[1].parts[0].data == png(2)


@pytest.mark.parametrize(("changes", "words"), [
    ({"rejected": None}, "'rejected': is missing beside"), ({"instruction": None}, "'instruction'"),
    ({"sorce": "0.png"}, "did you mean 'source'"), ({"chosen": 3}, "'chosen': must be"),
    ({"chosen": []}, "needs at least 2"), ({"chosen": "gone.png"}, "gone.png cannot be read"),
    ({"chosen": [says("assistant", [{"type": "image"}])]}, "'images' holds none"),
])  # fmt: skip
def test_pairs_that_cannot_be_read(pictures, build, changes, words):
    path = lines(pictures / "own.jsonl", [pair(), pair(**changes)])
    examples, _ = build("jsonl", path)
    assert len(examples) == 1
    assert words in (pictures / "out0" / "problems.txt").read_text()


def test_other_objects_are_left_as_they_are():
    for obj in (3, {"candidates": [], "chosen": 1}, {"prompt": "x"}):
        assert as_group(obj, "x") is obj
    with pytest.raises(RecordError):
        as_group({"chosen": "a.png"}, "x")
    assert ends_like_picture("x.tiff") and not ends_like_picture("Version 1.5")
    assert issubclass(RecordError, UserError)
