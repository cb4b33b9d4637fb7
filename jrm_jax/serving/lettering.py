"""Text on pictures in any script for which there is a font: matplotlib's own, then the system's."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Lettering:
    """Measures, breaks and draws lines of text at one size.

    missing: characters drawn so far for which no font was found; they show as boxes.
    """

    def __init__(self, size: int):
        self.size, self.missing = size, set()

    def width(self, text: str) -> float:
        """Pixels."""
        return sum(font.getlength(part) for font, part in self._runs(text))

    def wrap(self, text: str, width: float) -> list[str]:
        """Lines of at most `width` pixels; a word that is wider is cut, as scripts without blanks
        need it."""
        lines = []
        for paragraph in text.splitlines():
            line = ""
            for word in paragraph.split():
                joined = f"{line} {word}" if line else word
                if self.width(joined) <= width:
                    line = joined
                    continue
                if line:
                    lines.append(line)
                *full, line = self._cut(word, width)
                lines += full
            if line:
                lines.append(line)
        return lines

    def _cut(self, word: str, width: float) -> list[str]:
        pieces = [""]
        for letter in word:
            if pieces[-1] and self.width(pieces[-1] + letter) > width:
                pieces.append("")
            pieces[-1] += letter
        return pieces

    def draw(self, pen: Any, left: float, top: float, text: str, fill: tuple) -> None:
        """One line; `pen`: of PIL.ImageDraw, (left, top): of the line's box in pixels."""
        for font, part in self._runs(text):
            pen.text((left, top + self.size), part, font=font, fill=fill, anchor="ls")
            left += font.getlength(part)

    def _runs(self, text: str) -> Iterator[tuple[Any, str]]:
        """Stretches of text that one font can draw."""
        start, chosen = 0, None
        for i, letter in enumerate(text):
            path = _font_of(letter)
            if path is None and letter.isprintable() and not letter.isspace():
                self.missing.add(letter)
            path = path or _own_font()
            if path != chosen and i > start:
                yield _open(chosen, self.size), text[start:i]
                start = i
            chosen = path
        if chosen is not None:
            yield _open(chosen, self.size), text[start:]


@functools.cache
def _font_of(letter: str) -> str | None:
    """The first font that has a letter."""
    if ord(letter) in _letters(_own_font()):
        return _own_font()
    return next((path for path in _system_fonts() if ord(letter) in _letters(path)), None)


@functools.cache
def _own_font() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.cache
def _system_fonts() -> tuple[str, ...]:
    from matplotlib.font_manager import findSystemFonts

    return tuple(sorted(findSystemFonts()))


@functools.cache
def _letters(path: str) -> frozenset[int]:
    """Code points that a font has; none of a file that cannot be read as one."""
    from fontTools.ttLib import TTCollection, TTFont

    try:
        collection = Path(path).suffix.lower() in (".ttc", ".otc")
        with TTCollection(path) if collection else TTFont(path, lazy=True) as read:
            font = read.fonts[0] if collection else read
            return frozenset(font.getBestCmap() or ())
    except Exception:  # fontTools raises many kinds for broken files
        return frozenset()


@functools.cache
def _open(path: str, size: int) -> Any:
    import PIL.ImageFont

    return PIL.ImageFont.truetype(path, size)
