"""The scores that critiques state in their last lines, as numbers: 'following ten preservation
two', 'Instruction following (0-10): 3.5/4, quality: 7/10', '| overall | 7 |'.

Only names that are asked for are read, and only where a name begins a statement and a number
follows it: a number of anything else is no score. Letters: K candidates, R reward dimensions.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from jrm_jax.data.labels import read_decimal

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)  # fmt: skip
OVERALL = "overall"
ALIASES = ("score", "rating", "total", "总分")  # of `OVERALL`, where a line does not state that
_NUMBER = (  # '7,5' is a decimal comma, '1,000' is left alone
    rf"[+\-\u2212]?\d{{1,9}}(?:\.\d{{1,9}}|,\d{{1,2}})?(?![.,]?\d)|(?:{'|'.join(NUMBERS)})\b"
)
# between a name and its number: '(0-10):', ' | ', ' - ', '": '
_BETWEEN = (
    r"(?:\s?score)?[*\"'`\s]{0,4}(?:[(\[][^()\[\]]{0,40}[)\]])?"
    r"(?:\s{1,3}[-\u2013\u2014]\s{1,3}|[\s:=|*\"'`(\[\u2013\u2014]{1,8})"
)
# of how many: '/10', ' out of 10', '%'; not a range, and no letter ('3rd')
_AFTER = (
    r"(?![^\W_])(?!\s?[-\u2013\u2014]\s?\d)"
    r"(?:[*\"'`\s]{0,4}(?:/|out of|of)\s{0,3}(?P<of>\d+(?:[.,]\d+)?|ten|five)(?![^\W_])"
    r"|\s?(?P<percent>%))?"
)
# then the end, punctuation, or another name with its number: '2 objects are gone' is no score
_THEN = (
    r"(?=\s{0,4}(?:$|[^\w\s]|(?:and|points?|stars?)\b"
    rf"|[^\W\d][\w -]{{0,40}}?[\s:=|*\"'`(]{{1,8}}(?:{_NUMBER})))"
)
LOOK_BACK = 40  # characters before a name
# the line, a clause, or what follows the score before it
_BEGINS = re.compile(
    r"(?:^|[,;{|:.!?(\u3002\u3001])[\s*\"'`#>{)\]}-]*(?:(?:and|the|final)\s+)?$", re.IGNORECASE
)


class _Score(NamedTuple):
    """of: of how many; 0 where that is not said."""

    value: float
    of: float


def score_line(
    scores: Mapping[str, float], parts: Mapping[str, Mapping[str, float]] = MappingProxyType({})
) -> str:
    """'Scores: overall 3.5, visual quality 2 (naturalness 2, artifacts 4).', as it is read here.

    Args:
        scores: by reward dimension.
        parts: of some of them, what a score is made of.
    """

    def say(found: Mapping[str, float], within: Mapping[str, Mapping[str, float]]) -> str:
        said = []
        for name, score in found.items():
            inner = say(within[name], {}) if within.get(name) else ""
            said.append(f"{name.replace('_', ' ')} {score:.4g}{inner and f' ({inner})'}")
        return ", ".join(said)

    return f"Scores: {say(scores, parts)}."


def last_line(critique: str) -> int:
    """Where the last line begins that holds more than blanks; 0 where there is only one line."""
    return critique.rstrip().rfind("\n") + 1


def stated_scores(critique: str, names: Sequence[str]) -> dict[str, float]:
    """{'following': 10.0, 'preservation': 2.0}: which of these names the last line states, in small
    letters with '_' between words, and their numbers. {} where it states none."""
    return {name: score.value for name, score in _read(critique, tuple(names)).items()}


def teacher_scores(
    critiques: Sequence[str | None], dimensions: Sequence[str], mix: Mapping[str, float]
) -> list[list[float]]:
    """The score of each candidate of a group in each reward dimension, [K][R]; NaN where it is not
    stated.

    A dimension has the score of its name. 'overall', where none of them states it, is the weighted
    mean of the names in `mix`; where that is empty, the plain mean of the other dimensions, if all
    that state any state the same. A name with different scales ('/5', '/10') in one group is not
    stated, and a mean is of one scale.
    """
    wanted = [plain(name) for name in dimensions]
    weights = {plain(name): weight for name, weight in mix.items() if weight}
    parts = weights or {name: 1.0 for name in wanted if name != OVERALL}
    names = tuple(dict.fromkeys((*wanted, *parts, OVERALL, *ALIASES)))
    group = [_with_overall(_read(c, names) if c else {}) for c in critiques]
    for name in names:
        if len({row[name].of for row in group if name in row}) > 1:
            group = [{n: score for n, score in row.items() if n != name} for row in group]
    if not any(OVERALL in row for row in group):
        used = [row.keys() & parts.keys() for row in group]
        if not weights:
            same = len({frozenset(some) for some in used if some}) == 1
            parts = {name: 1.0 for some in used for name in some} if same else {}
        for row in group:
            if parts and parts.keys() <= row.keys() and len({row[n].of for n in parts}) == 1:
                total = sum(weight * row[name].value for name, weight in parts.items())
                row[OVERALL] = _Score(total / sum(parts.values()), 0.0)
    return [[row[name].value if name in row else math.nan for name in wanted] for row in group]


def plain(name: str) -> str:
    """As names are compared: small letters, '_' between words, without '_score' at the end."""
    name = unicodedata.normalize("NFKC", name).strip().lower()
    return re.sub(r"[\s_-]+", "_", name).removesuffix("_score")


def _with_overall(row: dict[str, _Score]) -> dict[str, _Score]:
    found = [row[name] for name in ALIASES if name in row]
    return {OVERALL: found[0], **row} if len(set(found)) == 1 else row


@functools.lru_cache(maxsize=16)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    ordered = sorted({plain(name) for name in names}, key=len, reverse=True)
    spelled = "|".join(r"[\s_-]{1,3}".join(map(re.escape, n.split("_"))) for n in ordered)
    return re.compile(
        rf"(?<![\w-])(?P<name>{spelled}){_BETWEEN}(?P<number>{_NUMBER}){_AFTER}{_THEN}",
        re.IGNORECASE,
    )


def _read(critique: str, names: tuple[str, ...]) -> dict[str, _Score]:
    """A name that is stated twice, and not alike, is not stated."""
    line = unicodedata.normalize("NFKC", critique[last_line(critique) :].rstrip())
    found: dict[str, set[_Score]] = {}
    end = 0  # of the score before
    for match in _pattern(names).finditer(line):
        cut = max(end, match.start() - LOOK_BACK)
        before = line[cut : match.start()]
        if not _BEGINS.search(before if cut == end else f"x{before}"):  # ^ is no place in between
            continue
        end = match.end()
        try:
            of = 100.0 if match["percent"] else _number(match["of"] or "0")
            score = _Score(_number(match["number"]), of)
        except ValueError:  # of 1,000, which may be 1
            continue
        found.setdefault(plain(match["name"]), set()).add(score)
    return {name: scores.pop() for name, scores in found.items() if len(scores) == 1}


def _number(word: str) -> float:
    if word.lower() in NUMBERS:
        return float(NUMBERS.index(word.lower()))
    return read_decimal(word.replace("\u2212", "-"))
