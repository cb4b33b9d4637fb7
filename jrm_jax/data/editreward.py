"""EditReward's training JSON: a list of pairs of edits -> groups of all edits of one source.

Fields read: prompt, path_src, path1, path2, model{1,2}_overall_score, model{1,2}_dim1_score
(instruction following), model{1,2}_dim2_score (visual quality), tie_case. The pairs of one
(source, prompt) become one group: each edit is encoded once, each pair keeps its own votes, and
pairs that were not compared have weight 0. The order of path1 and path2 means nothing here.

Letters: K candidates, R reward dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jrm_jax.data.labels import check_type, field_error
from jrm_jax.data.schema import (
    Candidate,
    Image,
    PreferenceExample,
    Text,
    image_reader,
    validate,
)
from jrm_jax.errors import UserError

DIMENSIONS = ("overall", "instruction_following", "visual_quality")
_SCORES = ("overall_score", "dim1_score", "dim2_score")
_TEXTS = ("prompt", "path_src", "path1", "path2")


def read_editreward(
    path: Path, images: Path, bad: list[str] | None = None
) -> Iterator[PreferenceExample]:
    """Groups in the order of their first pair.

    Args:
        bad: where to list unusable pairs; None: the first one is an error.

    Raises:
        UserError: unreadable file, or a bad pair; names file, index and field.
    """
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(pairs, list):
        raise UserError(f"{path}: must be a list of pairs, is {type(pairs).__name__}")
    read_image = image_reader(images)
    groups: dict[tuple[str, str], list[tuple[str, dict]]] = {}
    for index, pair in enumerate(pairs):
        where = f"{path}[{index}]"
        try:
            _check_pair(pair, read_image, where)
        except UserError as error:
            if bad is None:
                raise
            bad.append(str(error))
            continue
        groups.setdefault((pair["path_src"], pair["prompt"]), []).append((where, pair))
    for (source, prompt), members in groups.items():
        yield _make_group(source, prompt, members, read_image)


def _check_pair(pair: Any, read_image, where: str) -> None:
    check_type(pair, dict, where, "(record)", "an object")
    for field in _TEXTS:
        check_type(pair.get(field), str, where, field, "a string")
    if not pair["prompt"]:
        raise field_error(where, "prompt", "is empty")
    if pair["path1"] == pair["path2"]:
        raise field_error(where, "path2", f"is the same edit as path1 ({pair['path1']})")
    for side in (1, 2):
        value = pair.get(f"model{side}_overall_score")
        if value is None and not pair.get("tie_case"):
            raise field_error(where, f"model{side}_overall_score", "is missing")
        for name in _SCORES:
            value = pair.get(f"model{side}_{name}")
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise field_error(where, f"model{side}_{name}", f"is {value!r}, must be a number")
    for field in _TEXTS[1:]:
        try:
            read_image(pair[field])
        except UserError as error:
            raise field_error(where, field, str(error)) from error


def _make_group(source: str, prompt: str, members: list, read_image) -> PreferenceExample:
    names = list(dict.fromkeys(pair[side] for _, pair in members for side in ("path1", "path2")))
    count = len(names)
    votes_KKR = np.zeros((count, count, len(DIMENSIONS)))  # votes for i against j, halves for ties
    for _, pair in members:
        i, j = names.index(pair["path1"]), names.index(pair["path2"])
        for r, name in enumerate(_SCORES):
            first, second = pair.get(f"model1_{name}"), pair.get(f"model2_{name}")
            tied = r == 0 and bool(pair.get("tie_case"))
            if not tied and (first is None or second is None):
                continue
            share = 0.5 if tied or first == second else float(first > second)
            votes_KKR[i, j, r] += share
            votes_KKR[j, i, r] += 1 - share
    total_KKR = votes_KKR + votes_KKR.swapaxes(0, 1)
    # Agreeing votes keep their side, mixed ones become halves; the weight counts the votes.
    share_KKR = np.divide(votes_KKR, total_KKR, out=np.full_like(votes_KKR, 0.5),
                          where=total_KKR > 0)  # fmt: skip
    preference_KKR = np.where((share_KKR == 0) | (share_KKR == 1), share_KKR, 0.5)
    example = PreferenceExample(
        id=f"{source}:{prompt}"[:200],
        prompt=(Text(prompt), Image(read_image(source))),
        candidates=tuple(Candidate((Image(read_image(name)),)) for name in names),
        preference=preference_KKR.astype(np.float32),
        weight=total_KKR.astype(np.float32),
        dimensions=DIMENSIONS,
    )
    validate(example, members[0][0])
    return example
