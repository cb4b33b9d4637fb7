"""The sheet of `score --sheet`: letters of every script that a font has, pictures of any form."""

import base64
import io
import json

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from jrm_jax import score
from jrm_jax.serving import lettering
from jrm_jax.serving.lettering import Lettering
from jrm_jax.serving.sheet import LINE, MARGIN, SIDE, check_sheet, draw_sheet


def drawn(text):
    picture = PIL.Image.new("L", (40, 30), 255)
    Lettering(20).draw(PIL.ImageDraw.Draw(picture), 2, 2, text, (0,))
    return np.asarray(picture)


def test_letters_beyond_ascii_are_drawn_and_not_boxes():
    nothing = drawn("\ue123")  # a private letter: what a missing one looks like
    seen = [drawn(letter) for letter in "ßäéñłжΩ"]
    for i, one in enumerate(seen):
        assert (one != nothing).any() and (one < 128).any()
        assert all((one != other).any() for other in seen[:i])


def test_what_no_font_has_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(lettering, "_system_fonts", lambda: ())
    lettering._font_of.cache_clear()
    for name in ("a.png", "b.png"):
        PIL.Image.new("RGB", (30, 20)).save(tmp_path / name)
    found = {
        "instruction": "Mach 把 猫 größer",
        "source": [str(tmp_path / "a.png")],
        "candidates": [{"picture": str(tmp_path / "b.png"), "reward": 1.0, "critique": "good 猫"}],
    }
    assert draw_sheet(found, tmp_path / "sheet.png") == "把猫"
    assert PIL.Image.open(tmp_path / "sheet.png").size[1] > 256
    lettering._font_of.cache_clear()


def test_a_system_font_is_found_for_what_ours_lacks(monkeypatch):
    ours = lettering._own_font()
    has = {ours: {ord("a")}, "/fonts/han.ttc": {ord("猫")}}
    monkeypatch.setattr(lettering, "_letters", has.__getitem__)
    monkeypatch.setattr(lettering, "_system_fonts", lambda: ("/fonts/han.ttc",))
    lettering._font_of.cache_clear()
    assert lettering._font_of("a") == ours and lettering._font_of("猫") == "/fonts/han.ttc"
    assert lettering._font_of("ж") is None
    lettering._font_of.cache_clear()


@pytest.mark.parametrize("text", ["a few words that fill more than one line", "無" * 40, "a" * 90])
def test_lines_fit_and_hold_everything(text):
    letters = Lettering(12)
    lines = letters.wrap(text, 120)
    assert len(lines) > 1 and all(letters.width(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def picture(shade, where=None):
    file = io.BytesIO()
    PIL.Image.new("RGB", (20, 10), (shade, 0, 0)).save(where or file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_pictures_may_stand_in_the_command(tmp_path):
    picture(200, tmp_path / "edit.png")
    rows = [{"picture": (tmp_path / "edit.png").as_uri(), "reward": 0.5},
            {"picture": picture(100), "reward": 0.1},
            {"picture": picture(1)[:60], "error": "no picture"}]  # fmt: skip
    found = {"instruction": "Do it", "source": [picture(50)], "candidates": rows}
    assert draw_sheet(found, tmp_path / "sheet.png") == ""
    drawn = np.asarray(PIL.Image.open(tmp_path / "sheet.png"))
    top = MARGIN * 2 + LINE
    reds = [drawn[top, MARGIN + i * (SIDE + MARGIN), 0] for i in range(3)]
    assert reds == [50, 200, 100]


def test_a_sheet_takes_no_other_pictures_place(tmp_path):
    picture(200, tmp_path / "edit.png")
    before = (tmp_path / "edit.png").read_bytes()
    with pytest.raises(SystemExit, match="edit.png exists and is no sheet"):  # forgot the name
        score.main(["--model=/nowhere", "--instruction=x", "a.png", "--sheet",
                    str(tmp_path / "edit.png")])  # fmt: skip
    assert (tmp_path / "edit.png").read_bytes() == before
    found = {"instruction": "Do it", "source": [], "candidates": []}
    for _ in range(2):
        check_sheet(tmp_path / "sheet.png")
        draw_sheet(found | {"source": [str(tmp_path / "edit.png")]}, tmp_path / "sheet.png")
    draw_sheet(found | {"source": [str(tmp_path / "edit.png")]}, tmp_path / "sheet.jpg")


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_scores_are_shown_though_the_sheet_cannot_be_made(tmp_path, monkeypatch, capsys, words):
    found = {"instruction": "Do it", "source": [], "candidates": [
        {"picture": str(tmp_path / "gone.png"), "reward": 0.125, "normalised": None}]}  # fmt: skip
    monkeypatch.setattr(score, "rank", lambda args: found)
    with pytest.raises(SystemExit, match="^error: .*gone.png"):
        score.main(["--model=m", "--instruction=Do it", "a.png", *words,
                    f"--sheet={tmp_path / 'sheet.png'}"])  # fmt: skip
    shown = capsys.readouterr().out
    assert json.loads(shown) == found if words else "0.125" in shown
