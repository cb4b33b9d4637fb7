"""A judge's answer by aspects: its justifications, scores and winners, and what they prefer."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from jrm_jax.data.ingest.comparisons import SIDES
from jrm_jax.data.labels import field_error, read_decimal

ASPECTS = {  # heading: (reward dimension, what a critique's line begins with)
    "text faithfulness": ("instruction_following", "Instruction"),
    "image faithfulness": ("consistency", "Preservation"),
    "physical and visual quality": ("visual_quality", "Quality"),
    "text rendering": ("text_rendering", "Text"),
}
LARGEST = 4
UNREADABLE = "rationale that cannot be read"
_ASPECT = re.compile(
    r"[#*\s]*\d+[.)]\s*\**\s*(text faithfulness|image faithfulness|text rendering"
    r"|(?P<quality>physical(?: and visual)? quality))\b", re.IGNORECASE,
)  # fmt: skip
_FIELD = re.compile(
    r"[#*\s-]*(Justification|Winner|Score(?: ([AB]))?)\b(?: \([^)]*\))?\**\s*:\**(.*)", re.DOTALL
)
_NONE = re.compile(r"[\s*\[(_-]*(?:N/?A\b|None\b(?!\s+of\b))", re.IGNORECASE)
_ASIDE = re.compile(r"\([^)]*\)|[^:]*:\s*$|\W|_")  # what a line may hold before a score comes
_END = re.compile(r"[#*\s]*(?:Summary|User Request Refinement)\b")


class Aspect(NamedTuple):
    """scores: {'A', 'B' or '' (of one candidate): number or None (N/A)}."""

    name: str
    text: str
    scores: dict[str, float | None]
    winner: str


def read_aspects(answer: str, where: str) -> list[Aspect]:
    """
    Raises:
        RecordError: there is no aspect, or a score that is neither a number of 0 to 4 nor N/A.
    """
    found: list[tuple[str, dict[str, list[str]]]] = []
    current: list[str] = []
    for line in answer.splitlines():
        if found and _END.match(line):
            break
        if heading := _ASPECT.match(line):
            name = "physical and visual quality" if heading["quality"] else heading[1].lower()
            found.append((name, {}))
            current = []
        elif found and (field := _FIELD.match(line)):
            key = f"Score {field[2]}" if field[2] else field[1]
            current = found[-1][1].setdefault(key, [])
            current.append(field[3].strip(" *"))
        else:
            current.append(line)
    aspects = []
    for name, fields in found:
        said = {key: "\n".join(lines).strip() for key, lines in fields.items()}
        scores = {
            key.removeprefix("Score").strip(): _score(text, where, f"{name}, {key}")
            for key, text in said.items() if key.startswith("Score")
        }  # fmt: skip
        aspects.append(Aspect(name, said.get("Justification", ""), scores, said.get("Winner", "")))
    if not any(aspect.scores for aspect in aspects):
        words = f"the answer has no aspect with scores: {answer[:60]!r}"
        raise field_error(where, "messages", words, UNREADABLE)
    return aspects


def share_of(aspect: Aspect) -> float | None:
    """Of the vote that A has, by the scores of both, else by the winner that is named."""
    one, other = (aspect.scores.get(side) for side in SIDES)
    if one is not None and other is not None:
        return 0.5 if one == other else float(one > other)
    return None if {one, other} != {None} else _won(aspect)


def _won(aspect: Aspect) -> float | None:
    if "tie" in aspect.winner.lower():
        return 0.5
    found = set(re.findall(r"(?<!N/)\b([AB])\b", aspect.winner))
    return {"A": 1.0, "B": 0.0}[found.pop()] if len(found) == 1 else None


def shares_of(
    aspects: list[Aspect], where: str
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """({reward dimension: share of A}, what is to be told)."""
    shares, odd, both = {}, [], []
    for aspect in aspects:
        share = share_of(aspect)
        if share is None:
            continue
        shares[ASPECTS[aspect.name][0]] = share
        scores = [aspect.scores.get(side) for side in SIDES]
        if None not in scores:
            both.append(scores)
            if _won(aspect) not in (None, share):
                odd.append(("winner against its own scores (the scores count)", aspect.name))
    if not shares:
        raise field_error(where, "messages", "no aspect has scores of both candidates",
                          "pair without a judgement")  # fmt: skip
    if not both:
        return shares, odd
    one, other = np.mean(both, axis=0)
    equal = abs(one - other) < 1e-9
    return {"overall": 0.5 if equal else float(one > other), **shares}, odd


def _score(text: str, where: str, field: str) -> float | None:
    found = None
    for line in text.splitlines():
        if _NONE.match(line):  # whatever is remarked about it
            return None
        found = re.search(r"-?\d+(?:[.,]\d+)*", line)
        if found or line.startswith("#") or _ASIDE.sub("", line):
            break
    if not text.strip(" *[].\n"):
        return None
    try:
        number = read_decimal(found[0] if found else text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= LARGEST:
        words = f"the score of {field} is {text[:40]!r}, must be from 0 to {LARGEST} or N/A"
        raise field_error(where, "messages", words, "score out of its range")
    return number
