"""The scores that a critique's last line states, as numbers: 'following ten preservation two',
'Instruction following: 3/4, visual quality: 2.5/4'."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)  # fmt: skip
OVERALL = "overall"
_SCORE = re.compile(
    rf"([a-z][a-z _-]*?)[\s:=*\"']+(-?\d+(?:\.\d+)?|{'|'.join(NUMBERS)})\b"
    r"(?:\s*(?:/|out of)\s*\d+(?:\.\d+)?)?",  # of how many: whoever states it states it always
    re.IGNORECASE,
)


def stated_scores(critique: str) -> dict[str, float]:
    """{'following': 10.0, 'preservation': 2.0}: the names of the last line, in small letters with
    '_' for what stands between words, and their numbers. {} where it states none."""
    line = critique.rstrip().rpartition("\n")[2]
    return {_plain(name): _number(word) for name, word in _SCORE.findall(line)}


def teacher_scores(
    critique: str | None, dimensions: Sequence[str], mix: Mapping[str, float]
) -> list[float]:
    """The score in each reward dimension; NaN where it is not stated.

    A dimension has the score of its name. 'overall', where it is not stated, is the weighted mean
    of the names in `mix`; of all that is stated, where that is empty.
    """
    stated = stated_scores(critique) if critique else {}
    weights = {_plain(name): weight for name, weight in mix.items()} or dict.fromkeys(stated, 1.0)
    if OVERALL not in stated and stated and weights.keys() <= stated.keys():
        total = sum(weight * stated[name] for name, weight in weights.items())
        stated[OVERALL] = total / sum(weights.values())
    return [stated.get(_plain(name), math.nan) for name in dimensions]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower()).removesuffix("_score")


def _number(word: str) -> float:
    return float(NUMBERS.index(word.lower())) if word.lower() in NUMBERS else float(word)
