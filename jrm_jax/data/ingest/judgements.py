"""What a row about a pair says: which of both edits is preferred, in which dimension, how surely.

From EditReward's TRAIN_README.md and the cards of EditReward-Data and GenAI-Bench: the fields of
`KINDS`, overall as the sum of two dimensions of 1 to 4, the words of a vote. From HPSv3's README.md
and its loader: see `_stated`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jrm_jax.data.labels import field_error, finite, read_flag, shown

EDITREWARD = ("overall", "instruction_following", "visual_quality")
VOTES = {"leftvote": 1.0, "rightvote": 0.0, "tie": 0.5, "tievote": 0.5}
BOTH_BAD = ("bothbad", "bothbad_vote")
MOST = 4  # of one dimension's scale in EditReward-Data, whose overall score is the sum of both
SOURCE = "path_src"  # in EditReward's JSON; HPDv3's differs by its absence
_SIDES = ("left", "right")
_HUB_SCORES = ("overall_score", "instruction_following_score", "quality_aesthetic_score")
_ABSENT = (None, "null", [])  # of HPDv3's labels; tools that write its layout leave empty lists


class Judgement(NamedTuple):
    """shares: of the vote that the first edit has in each dimension; None = not judged.

    odd: what is to be told, as (kind, detail).
    """

    shares: tuple[float | None, ...]
    odd: list[tuple[str, str]]
    weight: float = 1.0


class Columns(NamedTuple):
    """What the fields of a kind of row are called. source: "" where there is none.

    scores: (first, second) for each dimension. judge: (row, columns, where) -> Judgement.
    """

    prompt: str
    source: str
    first: str
    second: str
    scores: tuple[tuple[str, str], ...]
    judge: Callable[[dict[str, Any], Columns, str], Judgement]

    @property
    def pictures(self) -> tuple[str, ...]:
        return tuple(name for name in (self.source, self.first, self.second) if name)


def _scored(row: dict[str, Any], columns: Columns, where: str) -> Judgement:
    """By scores of both edits and a vote. The vote decides the first dimension."""
    odd = []
    scores: list[tuple[float | None, float | None]] = []
    for names in columns.scores:
        first, second = (_score(row, name, where) for name in names)
        if (first is None) != (second is None):
            odd.append(("score of one edit of a pair only (not used)", f"{where}: {names[0]}"))
        scores.append((first, second))
    vote = "tie" if read_flag(row.get("tie_case"), where, "tie_case") else row.get("vote_type")
    if vote in BOTH_BAD:
        odd.append(("both edits called bad (a tie)", where))
    elif vote is not None and (not isinstance(vote, str) or vote not in VOTES):
        raise field_error(
            where, "vote_type", f"is {vote!r:.40}; known: {', '.join((*VOTES, *BOTH_BAD))}",
            "vote of an unknown kind",
        )  # fmt: skip
    if len(scores) == len(EDITREWARD) and vote is None:
        scores[0] = _summed(scores, columns, where, odd)
    shares: list[float | None] = [
        None if first is None or second is None
        else 0.5 if first == second else float(first > second)
        for first, second in scores
    ] or [None]  # fmt: skip
    if vote is None:
        return Judgement(tuple(shares), odd)
    share = VOTES.get(vote, 0.5)
    if shares[0] not in (None, share):
        odd.append(("vote against its own overall scores (the vote counts)", where))
    return Judgement((share, *shares[1:]), odd)


def _summed(
    scores: list[tuple[float | None, float | None]],
    columns: Columns,
    where: str,
    odd: list[tuple[str, str]],
) -> tuple[float | None, float | None]:
    """Overall scores of both edits, made from the dimensions where they are not their sum.

    The card of EditReward-Data calls overall the sum; people gave the dimensions. EditReward's copy
    of GenAI-Bench has random numbers there, and its second dimension is missing.

    Raises:
        RecordError: overall is no sum, and a dimension that would tell the right one is missing.
    """
    overall, following, quality = scores
    if None in overall:
        return overall  # is not used
    sums, wrong = [], []
    for side in range(2):
        known = [d[side] for d in (following, quality) if d[side] is not None]
        rest = overall[side] - sum(known)  # 0, or what a missing dimension would be
        fits = abs(rest) < 1e-3 if len(known) == 2 else -1e-3 < rest < MOST + 1e-3
        sums.append(sum(known) if len(known) == 2 else None)
        if known and not fits:
            parts = [f"{d:g}" for d in known] + ["one that is missing"] * (2 - len(known))
            wrong.append(f"{columns.scores[0][side]} is {overall[side]:g}, not the sum of its"
                         f" dimensions ({' + '.join(parts)})")  # fmt: skip
    if not wrong:
        return overall
    hint = "GenAI-Bench's pairs in EditReward's JSON (valid_dataset_1.json) are read with the" \
           " layout genai_bench"  # fmt: skip
    if None in sums:
        raise field_error(where, columns.scores[0][0], f"{wrong[0]}; {hint}",
                          "overall score that is not the sum of its dimensions")  # fmt: skip
    odd.append(("overall score that is not the sum of its dimensions (the sum counts)",
                f"{where}: {wrong[0]}; {hint}"))  # fmt: skip
    return sums[0], sums[1]


def _stated(row: dict[str, Any], columns: Columns, where: str) -> Judgement:
    """HPDv3's: the first picture is the preferred one; by how many, and how surely, may be told.

    From HPSv3's README.md: path1 is always preferred; `choice_dist` counts the votes of both;
    `confidence` is how reliable the preference is, by the annotators' capabilities; both are null
    in pairs from Discord and HPDv2. From its loader: the larger count is the first picture's,
    whatever its place; a null confidence passes every threshold. Assumed: confidence is a weight.

    Raises:
        RecordError: counts or a confidence that are none, or a source picture beside the pair.
    """
    if row.get(SOURCE):
        raise field_error(where, SOURCE, "is a source picture, which HPDv3 has not; pairs of"
                          " edits are read with the layout editreward")  # fmt: skip
    counts, confidence = row.get("choice_dist"), row.get("confidence")
    share, odd, weight = 1.0, [], 1.0
    if counts not in _ABSENT:
        numbers = [finite(n) for n in counts] if isinstance(counts, list | tuple) else []
        if len(numbers) != 2 or None in numbers or min(numbers) < 0 or not finite(sum(numbers)):
            raise field_error(where, "choice_dist", f"is {str(counts)[:40]}, must be the votes for"
                              " both pictures")  # fmt: skip
        share = max(numbers) / sum(numbers)
        if numbers[0] < numbers[1]:
            odd.append(("more votes in the second place (path1 is the preferred one)", where))
    if confidence not in _ABSENT:
        weight = finite(confidence)
        if weight is None or not 0 < weight <= 1:
            raise field_error(where, "confidence", f"is {str(confidence)[:40]}, must be above 0 and"
                              " at most 1")  # fmt: skip
    return Judgement((share,), odd, weight)


def _score(row: dict[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    number = finite(value)
    if number is None:
        raise field_error(where, name, f"is {shown(value)}, must be a number")
    return number


def _hub(source: str, first: str, second: str) -> Columns:
    scores = tuple(tuple(f"{side}_{name}" for side in _SIDES) for name in _HUB_SCORES)
    return Columns("instruction", source, first, second, scores, _scored)


_JSON = Columns(
    "prompt", SOURCE, "path1", "path2",
    tuple((f"model1_{n}", f"model2_{n}") for n in ("overall_score", "dim1_score", "dim2_score")),
    _scored,
)  # fmt: skip
KINDS = {
    "editreward": (
        _JSON,
        _hub("source_img", "left_output_image", "right_output_image"),
        _hub("source_image", "left_image", "right_image"),
    ),
    # people's vote is about the whole; EditReward's copy has it as the first dimension's score
    "genai_bench": (
        Columns("instruct_prompt", "source_image", "left_output_image", "right_output_image", (),
                _scored),
        _JSON._replace(scores=(("model1_dim1_score", "model2_dim1_score"),)),
    ),
    "hpdv3": (Columns("prompt", "", "path1", "path2", (), _stated),),
}  # fmt: skip
