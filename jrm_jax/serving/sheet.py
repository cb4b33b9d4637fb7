"""One picture that shows a source and its candidates side by side, with their scores."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from jrm_jax.data.picture_names import short
from jrm_jax.errors import UserError, one_line
from jrm_jax.serving.groups import read_picture
from jrm_jax.serving.lettering import Lettering
from jrm_jax.shell import disk

SIDE, MARGIN, LETTER, LINE = 256, 12, 12, 16  # pixels
SOFTWARE, MAKER = "Software", "jrm_jax.score"  # a PNG file's text, by which a sheet is known
INK, FAINT = (20, 20, 20), (110, 110, 110)


def check_sheet(out: Path) -> None:
    """Before a model is loaded.

    Raises:
        UserError: the file cannot be written, or it is there and no sheet.
    """
    import PIL.Image

    disk.check_file(out)
    if not out.exists() or not out.stat().st_size:
        return
    with contextlib.suppress(OSError, ValueError), PIL.Image.open(out) as known:
        if known.info.get(SOFTWARE) == MAKER:
            return
    raise UserError(f"--sheet={out} exists and is no sheet of jrm_jax.score: give another name, or"
                    " remove it first")  # fmt: skip


def draw_sheet(found: dict[str, Any], out: Path) -> str:
    """Draw what `score.rank` found; returns the letters that could not be drawn.

    Raises:
        UserError: a picture cannot be read, the file cannot be written, or its name is of no known
            kind.
    """
    import PIL.Image
    import PIL.ImageDraw
    import PIL.PngImagePlugin

    letters = Lettering(LETTER)
    tiles = [(path, ["source"]) for path in found["source"] or ()]
    for place, row in enumerate(found["candidates"], 1):
        if "error" in row:
            tiles.append((None, letters.wrap(f"{_name(row['picture'])}: {row['error']}", SIDE)))
            continue
        lines = [f"{place}.  {row['reward']:+.4f}", *letters.wrap(_name(row["picture"]), SIDE)]
        tiles.append((row["picture"], lines + letters.wrap(row.get("critique", ""), SIDE)))
    width = MARGIN + len(tiles) * (SIDE + MARGIN)
    title = letters.wrap(found["instruction"], width - 2 * MARGIN)
    top = MARGIN + LINE * len(title) + MARGIN
    deepest = max(len(lines) for _, lines in tiles)
    size = (width, top + SIDE + LINE * deepest + 2 * MARGIN)
    sheet = PIL.Image.new("RGB", size, (255, 255, 255))
    pen = PIL.ImageDraw.Draw(sheet)

    def write(lines: list[str], left: int, top: int, fill: tuple[int, int, int]) -> None:
        for i, line in enumerate(lines):
            letters.draw(pen, left, top + i * LINE, line, fill)

    write(title, MARGIN, MARGIN, INK)
    for i, (path, lines) in enumerate(tiles):
        left = MARGIN + i * (SIDE + MARGIN)
        if path is not None:
            sheet.paste(_thumbnail(path), (left, top))
        write(lines, left, top + SIDE + 4, INK if path else FAINT)
    try:
        mark = PIL.PngImagePlugin.PngInfo()
        mark.add_text(SOFTWARE, MAKER)
        sheet.save(out, pnginfo=mark)
    except (OSError, ValueError) as error:
        raise UserError(f"--sheet={out} cannot be written: {error}") from error
    return "".join(sorted(letters.missing))


def _name(picture: str) -> str:
    """Of a file without its folders; the beginning of a data: URI."""
    return short(picture) if picture.startswith("data:") else Path(picture).name


def _thumbnail(path: str):
    from jrm_jax.data.images import open_image

    try:
        picture = open_image(read_picture(path))
    except (OSError, ValueError) as error:  # which could be scored, but is gone by now
        raise UserError(f"--sheet: {short(path)}: {one_line(error)}") from error
    picture.thumbnail((SIDE, SIDE))
    return picture
