"""The sheet of pictures: letters of every script that a font has, the others named."""

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from jrm_jax.serving import lettering
from jrm_jax.serving.lettering import Lettering
from jrm_jax.serving.sheet import draw_sheet


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
