"""One text about two candidates, A and B -> a text about each of them. Nothing but text here.

A critique is about its candidate alone. So a sentence goes to the candidate that it names, and
those that follow and name nobody go with it; a sentence that names both is cut at "while", "but"
and the like where each part names one. What compares, or is about both, belongs to neither.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SIDES = ("A", "B")
_THING = r"(?i:(?:image|edit|candidate|output|picture|result|version|option|response)s?)"
_KIND = r"(?:(?i:edited|generated|output|candidate|final|resulting)\s+)?"
_NAME = re.compile(
    rf"\*{{0,2}}(?:\b(?i:the)\s+)?{_KIND}\b{_THING}\s+\(?(?P<one>[AB])\b\)?\*{{0,2}}"
    rf"(?:\s*(?:,|&|/|(?i:and|or|vs\.?|versus))\s*(?:{_KIND}{_THING}\s+)?(?P<other>[AB])\b(?!'))?"
    r"|^[\s*-]*(?P<head>[AB])\*{0,2}\s*:",
    re.MULTILINE,
)
_HEADING = re.compile(
    rf"^[\s*-]*(?:(?i:the)\s+)?(?:{_KIND}{_THING}\s+)?\(?[AB]\)?\*{{0,2}}\s*:\*{{0,2}}"
)
_COMPARES = re.compile(
    r"\b(?:both\s+(?:of\s+)?(?:the\s+|these\s+)?(?:edited\s+|generated\s+)?(?:images|edits|candidates"
    r"|outputs|pictures|results|versions|options|responses|them)|neither|either one|each other"
    r"|the other (?:image|one|edit|candidate|version)|the former|the latter|the two|the winner"
    r"|better|worse|superior|inferior|outperform\w*|preferred|preferable|wins|a tie|tied"
    r"|than (?:the other|image|in image)|compared (?:to|with) (?:the other|image))\b",
    re.IGNORECASE,
)
_BOTH = re.compile(r"\b(?:both|each|they|either)\b", re.IGNORECASE)  # where nobody is named
_SENTENCES = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[*]*[A-Z])|\n+")
_JOINTS = re.compile(
    r"(?:[,;.]?\s+(?:while|whereas|but|and|although|though|yet|in contrast,?|by contrast,?|"
    r"on the other hand,?|however,?)\s+)|;\s+|,\s+(?=(?i:the\s+)?(?i:image|edited|generated))",
    re.IGNORECASE,
)


class Parts(NamedTuple):
    """texts: {'A': .., 'B': ..}, "" where nothing names a candidate alone.

    left: sentences that belong to neither.
    """

    texts: dict[str, str]
    left: list[str]


def split(text: str, called: str) -> Parts:
    """
    Args:
        called: what a candidate is called in its own text, as 'the edited image'.
    """
    said: dict[str, list[str]] = {side: [] for side in SIDES}
    left, last = [], ""
    for sentence in filter(None, map(str.strip, _SENTENCES.split(text))):
        pieces = _cut(sentence)
        if pieces == [("", sentence)] and last and not _BOTH.search(sentence):
            pieces = [(last, sentence)]
        for side, piece in pieces or [("", sentence)]:
            if side:
                said[side].append(_own(piece, called))
            else:
                left.append(piece)
        last = pieces[0][0] if pieces and len(pieces) == 1 else ""
    return Parts({side: " ".join(pieces) for side, pieces in said.items()}, left)


def _named(text: str) -> set[str]:
    found = (match.group("one", "other", "head") for match in _NAME.finditer(text))
    return {side for sides in found for side in sides if side}


def _cut(sentence: str) -> list[tuple[str, str]] | None:
    """[(side or "", piece), ..]; None: it compares both."""
    if len(_named(sentence)) < 2:
        return None if _COMPARES.search(sentence) else [("".join(_named(sentence)), sentence)]
    pairs = [found.span() for found in _NAME.finditer(sentence) if found["other"]]  # "A and B"
    joints = [joint.span() for joint in _JOINTS.finditer(sentence)
              if not any(start <= joint.start() < end for start, end in pairs)]  # fmt: skip
    pieces: list[tuple[str, str]] = []
    side, begin = "", 0
    stops = [*(stop for stop, _ in joints), len(sentence)]
    for (end, after), stop in zip([(0, 0), *joints], stops, strict=True):
        names = _named(sentence[after:stop])
        if len(names) > 1:
            return None
        name = "".join(names) or side
        if side and name != side:  # another candidate from here on; the joint is dropped
            pieces.append((side, sentence[begin:end].strip()))
            begin = after
        side = name
    pieces.append((side, sentence[begin:].strip()))
    alone = all(_says_something(piece) and not _COMPARES.search(piece) for _, piece in pieces)
    return pieces if alone else None


def _says_something(piece: str) -> bool:
    return bool(_NAME.sub("", piece).strip(" ,;:.*-"))


def _own(piece: str, called: str) -> str:
    """A piece as a sentence about its candidate, without its letter."""
    piece = _HEADING.sub("", piece).strip()
    piece = _NAME.sub(called, piece).strip(" ,;")
    piece = piece[:1].upper() + piece[1:]
    return piece if piece.endswith((".", "!", "?", '"')) else piece + "."
