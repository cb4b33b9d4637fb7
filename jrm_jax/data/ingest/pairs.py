"""Pairs of edits that people judged -> groups of all edits of one source and instruction.

EditReward-Data as JSON and as the Hugging Face parquet, a subset of it that others published under
other names, and GenAI-Bench's image editing. Each edit is encoded once, each pair keeps its own
votes, pairs that were not compared have weight 0. The order of a pair means nothing.

Letters: K candidates, R reward dimensions.
"""

from __future__ import annotations

import hashlib
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jrm_jax.data.ingest.layout import Member, Problems, read_each
from jrm_jax.data.ingest.pictures import GroupPictures, picture_name
from jrm_jax.data.ingest.rows import SUFFIXES
from jrm_jax.data.labels import check_type, field_error
from jrm_jax.data.schema import Candidate, Image, PreferenceExample, Text, validate

EDITREWARD = ("overall", "instruction_following", "visual_quality")
DIMENSIONS = {"editreward": EDITREWARD, "genai_bench": EDITREWARD[:1]}
VOTES = {"leftvote": 1.0, "rightvote": 0.0, "tie": 0.5, "tievote": 0.5}
BOTH_BAD = ("bothbad", "bothbad_vote")
_SIDES = ("left", "right")
_HUB_SCORES = ("overall_score", "instruction_following_score", "quality_aesthetic_score")


class Columns(NamedTuple):
    """What the fields of a kind of row are called. scores: (first, second) for each dimension."""

    prompt: str
    source: str
    first: str
    second: str
    scores: tuple[tuple[str, str], ...]


def _hub(source: str, first: str, second: str) -> Columns:
    scores = tuple(tuple(f"{side}_{name}" for side in _SIDES) for name in _HUB_SCORES)
    return Columns("instruction", source, first, second, scores)


_JSON = Columns(
    "prompt", "path_src", "path1", "path2",
    tuple((f"model1_{n}", f"model2_{n}") for n in ("overall_score", "dim1_score", "dim2_score")),
)  # fmt: skip
_GENAI = Columns("instruct_prompt", "source_image", "left_output_image", "right_output_image", ())
KINDS = {
    "editreward": (
        _JSON,
        _hub("source_img", "left_output_image", "right_output_image"),
        _hub("source_image", "left_image", "right_image"),
    ),
    # people's vote is about the whole; EditReward's copy has it as the first dimension's score
    "genai_bench": (_GENAI, _JSON._replace(scores=(("model1_dim1_score", "model2_dim1_score"),))),
}


class Pair(NamedTuple):
    """shares: of the vote that the first edit has in each dimension; None = not judged."""

    where: str
    prompt: str
    source: bytes
    first: bytes
    second: bytes
    shares: tuple[float | None, ...]


class Pairs(NamedTuple):
    """Layout. name: of `KINDS`. folder: where pictures' names lead."""

    name: str
    folder: Path
    suffixes: tuple[str, ...] = SUFFIXES
    gathers: bool = True

    def dimensions(self, row: dict[str, Any]) -> tuple[str, ...]:
        return DIMENSIONS[self.name]

    def columns(self, names: list[str]) -> list[str]:
        """Of parquet, what `key` needs: no picture at all where the rows have a key."""
        wanted = {c.prompt for c in KINDS[self.name]}
        wanted |= {"key"} if "key" in names else {c.source for c in KINDS[self.name]}
        return [name for name in names if name in wanted]

    def key(self, row: dict[str, Any], where: str) -> str:
        kinds = [c for c in KINDS[self.name] if c.prompt in row]
        if not kinds:
            names = " or ".join(dict.fromkeys(repr(c.prompt) for c in KINDS[self.name]))
            raise field_error(where, KINDS[self.name][0].prompt, f"is missing (needs {names})")
        prompt = row[kinds[0].prompt]
        check_type(prompt, str, where, kinds[0].prompt, "a string")
        if not prompt:
            raise field_error(where, kinds[0].prompt, "is empty")
        source = row.get("key") or ""
        for columns in kinds:
            source = source or picture_name(row.get(columns.source))
        return hashlib.sha256(f"{source}\0{prompt}".encode()).hexdigest()[:24]

    def label(self, row: dict[str, Any]) -> str:
        return ""

    def make(self, members: list[Member], problems: Problems) -> list[PreferenceExample]:
        read = GroupPictures(self.folder)
        by_source: dict[bytes, list[Pair]] = {}
        for _, pair in read_each(members, problems, partial(self._pair, read, problems)):
            by_source.setdefault(pair.source, []).append(pair)
        if len(by_source) > 1:
            where = next(iter(by_source.values()))[0].where
            problems.note("one key and instruction with several sources (kept apart)", where)
        return [self._group(pairs, problems) for pairs in by_source.values()]

    def _pair(
        self, read: GroupPictures, problems: Problems, row: dict[str, Any], where: str
    ) -> Pair:
        columns = self._columns_of(row, where)
        shares, odd = _shares(row, columns, where)
        if all(share is None for share in shares):
            names = ", ".join(dict.fromkeys(name for both in columns.scores for name in both))
            raise field_error(
                where, columns.scores[0][0] if columns.scores else "vote_type",
                f"no dimension is judged (needs {names or 'a vote'})", "pair without a judgement",
            )  # fmt: skip
        first, second = row[columns.first], row[columns.second]
        source, one, two = (
            read(row[name], where, name)
            for name in (columns.source, columns.first, columns.second)
        )
        if one == two:
            shown = f" ({first})" if first == second and isinstance(first, str) else ""
            raise field_error(
                where, columns.second, f"is the same edit as {columns.first}{shown}",
                "pair of equal edits",
            )  # fmt: skip
        for kind, detail in odd:
            problems.note(kind, detail)
        return Pair(where, row[columns.prompt], source, one, two, shares)

    def _columns_of(self, row: dict[str, Any], where: str) -> Columns:
        kinds = [c for c in KINDS[self.name] if c.prompt in row]
        for columns in kinds:
            if all(name in row for name in columns[:4]):
                return columns
        missing = [name for name in kinds[0][:4] if name not in row]
        raise field_error(where, missing[0], "is missing")

    def _group(self, pairs: list[Pair], problems: Problems) -> PreferenceExample:
        edits = list(dict.fromkeys(edit for p in pairs for edit in (p.first, p.second)))
        count, dimensions = len(edits), DIMENSIONS[self.name]
        votes_KKR = np.zeros((count, count, len(dimensions)))  # for i against j
        seen: set[frozenset[int]] = set()
        for pair in pairs:
            i, j = edits.index(pair.first), edits.index(pair.second)
            if frozenset((i, j)) in seen:
                problems.note("pair that is judged more than once (its weight grows)", pair.where)
            seen.add(frozenset((i, j)))
            for r, share in enumerate(pair.shares):
                if share is not None:
                    votes_KKR[i, j, r] += share
                    votes_KKR[j, i, r] += 1 - share
        total_KKR = votes_KKR + votes_KKR.swapaxes(0, 1)
        share_KKR = np.divide(votes_KKR, total_KKR, out=np.full_like(votes_KKR, 0.5),
                              where=total_KKR > 0)  # fmt: skip
        # Agreeing votes keep their side, mixed ones become halves; the weight counts the votes.
        for i, j in np.argwhere(_opposed(pairs, edits)):
            words = f"{pairs[0].where}: edits {i} and {j} of its group"
            problems.note("pair with contradicting judgements (a tie where they do)", words)
        preference_KKR = np.where((share_KKR == 0) | (share_KKR == 1), share_KKR, 0.5)
        prompt, source = pairs[0].prompt, pairs[0].source
        name = hashlib.sha256(prompt.encode() + b"\0" + source).hexdigest()[:16]
        example = PreferenceExample(
            id=f"{name}:{prompt}"[:120],
            prompt=(Text(prompt), Image(source)),
            candidates=tuple(Candidate((Image(edit),)) for edit in edits),
            preference=preference_KKR.astype(np.float32),
            weight=total_KKR.astype(np.float32),
            dimensions=dimensions,
        )
        validate(example, pairs[0].where)
        return example


def _shares(
    row: dict[str, Any], columns: Columns, where: str
) -> tuple[tuple[float | None, ...], list[tuple[str, str]]]:
    """(the first edit's share of the vote in each dimension, oddities as kind and detail)."""
    shares: list[float | None] = []
    odd = []
    for names in columns.scores:
        first, second = (_score(row, name, where) for name in names)
        if (first is None) != (second is None):
            odd.append(("score of one edit of a pair only (not used)", f"{where}: {names[0]}"))
        known = first is not None and second is not None
        shares.append((0.5 if first == second else float(first > second)) if known else None)
    shares = shares or [None]
    vote = "tie" if row.get("tie_case") else row.get("vote_type")
    if vote is None:
        return tuple(shares), odd
    if vote in BOTH_BAD:
        odd.append(("both edits called bad (a tie)", where))
    elif vote not in VOTES:
        raise field_error(
            where, "vote_type", f"is {vote!r}; known: {', '.join((*VOTES, *BOTH_BAD))}",
            "vote of an unknown kind",
        )  # fmt: skip
    share = VOTES.get(vote, 0.5)
    if shares[0] not in (None, share):
        odd.append(("vote against its own overall scores (the vote counts)", where))
    return (share, *shares[1:]), odd


def _opposed(pairs: list[Pair], edits: list[bytes]) -> np.ndarray:
    """[K, K] bool: judged again, and otherwise, in some dimension."""
    found: dict[tuple[int, int, int], set[float]] = {}
    for pair in pairs:
        i, j = edits.index(pair.first), edits.index(pair.second)
        for r, share in enumerate(pair.shares):
            if share is not None:
                sides = (i, j, share) if i < j else (j, i, 1 - share)
                found.setdefault((sides[0], sides[1], r), set()).add(sides[2])
    opposed_KK = np.zeros((len(edits), len(edits)), bool)
    for (i, j, _), shares in found.items():
        opposed_KK[i, j] |= len(shares) > 1
    return opposed_KK


def _score(row: dict[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise field_error(where, name, f"is {value!r}, must be a number")
    return float(value)
