"""One picture that shows a source and its candidates side by side, with their scores."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from jrm_jax.errors import UserError

SIDE, MARGIN, LINE = 256, 12, 16  # pixels
INK, FAINT = (20, 20, 20), (110, 110, 110)


def draw_sheet(found: dict[str, Any], out: Path) -> None:
    """Draw what `score.rank` found.

    Raises:
        UserError: the file cannot be written, or its name is of no known kind.
    """
    import PIL.Image
    import PIL.ImageDraw

    tiles = [(path, ["source"]) for path in found["source"] or ()]
    for place, row in enumerate(found["candidates"], 1):
        if "error" in row:
            tiles.append((None, _wrap(f"{row['picture']}: {row['error']}")))
            continue
        lines = [f"{place}.  {row['reward']:+.4f}", *_wrap(Path(row["picture"]).name)]
        tiles.append((row["picture"], lines + _wrap(row.get("critique", ""))))
    title = textwrap.wrap(found["instruction"], max(20, len(tiles) * SIDE // 8))
    top = MARGIN + LINE * len(title) + MARGIN
    deepest = max(len(lines) for _, lines in tiles)
    size = (MARGIN + len(tiles) * (SIDE + MARGIN), top + SIDE + LINE * deepest + 2 * MARGIN)
    sheet = PIL.Image.new("RGB", size, (255, 255, 255))
    pen = PIL.ImageDraw.Draw(sheet)
    pen.multiline_text((MARGIN, MARGIN), "\n".join(title), fill=INK)
    for i, (path, lines) in enumerate(tiles):
        left = MARGIN + i * (SIDE + MARGIN)
        if path is not None:
            sheet.paste(_thumbnail(path), (left, top))
        pen.multiline_text((left, top + SIDE + 4), "\n".join(lines), fill=INK if path else FAINT)
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"--sheet={out} cannot be written: {error}") from error


def _wrap(text: str) -> list[str]:
    return [line for part in text.splitlines() for line in textwrap.wrap(part, SIDE // 7)]


def _thumbnail(path: str):
    from jrm_jax.data.images import open_image

    picture = open_image(Path(path).read_bytes())
    picture.thumbnail((SIDE, SIDE))
    return picture
