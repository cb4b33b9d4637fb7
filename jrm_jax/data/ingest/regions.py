"""Boxes of edited regions in a judge's answer, written so that its text stands on its own.

SpatialReward's judge answers {"edit_region": [{"id", "label", "bbox_2d": [x1, y1, x2, y2]}, ..],
"reasoning", "score"}: thousandths of the edited picture's width and height, and <|bbox_ID|> in the
reasoning before what is said of a region, <|global|> before what is said of the whole (from the
prompts in its reward server). Assumed: `bbox` for `bbox_2d`, where that stands instead.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from jrm_jax.data.labels import field_error, finite

STYLES = ("words", "line")
LARGEST = 1000
_TOKENS = re.compile(r"(?:<\|(?:bbox_\d+|global)\|>[\s,:]*)+")
_TOKEN = re.compile(r"<\|(?:bbox_(\d+)|global)\|>")
_BOX = ("bbox_2d", "bbox")
_KIND = "edit region that cannot be read"


class Region(NamedTuple):
    """box: left, top, right, bottom, 0 to 1000."""

    label: str
    box: tuple[float, float, float, float]

    def __str__(self) -> str:
        sides = zip(("left", "top", "right", "bottom"), self.box, strict=True)
        return f"{self.label} ({', '.join(f'{side} {value:g}' for side, value in sides)})"


def read_regions(value: Any, where: str) -> dict[int, Region]:
    """{id: region} of `edit_region`: a list, or the text of one.

    Raises:
        RecordError: it is none, or a box is not four numbers from 0 to 1000 in order.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            pass
    if not isinstance(value, list):
        raise field_error(where, "edit_region", f"is {str(value)[:40]}, must be a list", _KIND)
    regions = {}
    for index, item in enumerate(value):
        at = f"edit_region[{index}]"
        box = next((item[n] for n in _BOX if n in item), None) if isinstance(item, dict) else None
        right = isinstance(box, list) and len(box) == 4 and all(
            (n := finite(value)) is not None and 0 <= n <= LARGEST for value in box
        ) and box[0] <= box[2] and box[1] <= box[3]  # fmt: skip
        if not right:
            words = "needs 'bbox_2d': left, top, right, bottom from 0 to 1000, in this order"
            raise field_error(where, at, f"is {str(item)[:60]}; {words}", _KIND)
        number = item.get("id", index)
        if isinstance(number, bool) or not isinstance(number, int) or number in regions:
            raise field_error(where, f"{at}.id", f"is {number!r}, must be a number of its own",
                              _KIND)  # fmt: skip
        label = " ".join(str(item.get("label") or f"region {number}").split())
        regions[number] = Region(label, tuple(map(float, box)))
    return regions


def has_tokens(text: str) -> bool:
    return bool(_TOKEN.search(text))


def unknown_regions(text: str, regions: dict[int, Region]) -> list[int]:
    """Ids that the text refers to and that have no box."""
    found = [int(token[1]) for token in _TOKEN.finditer(text) if token[1] is not None]
    return [number for number in dict.fromkeys(found) if number not in regions]


def in_words(text: str, regions: dict[int, Region]) -> str:
    """The text with every token replaced by what it stands for; a box is told once."""
    told: set[int] = set()

    def named(number: int) -> str:
        region = regions.get(number)
        first = number not in told
        told.add(number)
        if region is None:
            return f"region {number}"
        return str(region) if first else region.label

    def replace(found: re.Match) -> str:
        ids = dict.fromkeys(int(token[1]) for token in _TOKEN.finditer(found[0]) if token[1])
        names = " and ".join(map(named, ids))
        before = text[: found.start()].rstrip()
        if before and before[-1] not in ".!?:;":  # within a sentence
            return f"{names or 'the whole'} "
        return f"At {names}: " if names else "Overall: "

    return re.sub(r"\s+([.,;!?])", r"\1", _TOKENS.sub(replace, text)).strip()


def as_line(regions: dict[int, Region]) -> str:
    """All boxes as a line of their own; the tokens of the text refer to it."""
    items = [
        f"<|bbox_{number}|> {label} [{', '.join(f'{n:g}' for n in box)}]"
        for number, (label, box) in regions.items()
    ]
    return f"Regions: {'; '.join(items) or 'none'}."
