"""A folder of pictures with a CSV file, one edit a row -> groups of the edits of one source.

    source,instruction,edit,score,critique
    cat.png,Make the cat white,a.png,8,The cat is white.
    cat.png,Make the cat white,b.png,5,

Columns: edit; source (may be empty: text to image) and instruction, or group, which then tells what
belongs together; critique; and `score` (larger is better) or `rank` (1 is best), for more than one
reward dimension `score_NAME` or `rank_NAME`. An empty cell is an unlabelled one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.data.ingest.layout import Member, Problems
from jrm_jax.data.ingest.pictures import GroupPictures
from jrm_jax.data.labels import field_error, parse_labels
from jrm_jax.data.schema import (
    DEFAULT_DIMENSIONS,
    Candidate,
    Image,
    PreferenceExample,
    Text,
    validate,
)
from jrm_jax.errors import RecordError, UserError

_KNOWN = ("source", "instruction", "edit", "group", "critique")


class Table(NamedTuple):
    """Layout. folder: where pictures' names lead."""

    folder: Path
    suffixes: tuple[str, ...] = (".csv",)
    columns: None = None
    gathers: bool = True

    def key(self, row: dict[str, str], where: str) -> str:
        _labels(row, where)
        for name in ("instruction", "edit"):
            if not row.get(name, "").strip():
                raise field_error(where, name, "is empty" if name in row else "is no column")
        return row.get("group") or "\0".join([row.get("source", ""), row["instruction"]])

    def label(self, row: dict[str, str]) -> str:
        return ""

    def make(
        self, members: list[Member], problems: Problems, dimensions: tuple[str, ...]
    ) -> list[PreferenceExample]:
        read = GroupPictures(self.folder)
        prompts, edits, values, critiques, used = [], [], [], [], []
        for where, row in members:
            try:
                source = row.get("source", "")
                prompt = (row["instruction"], read(source, where, "source") if source else b"")
                if prompts and prompt != prompts[0]:
                    raise field_error(where, "group", "has several sources or instructions")
                edit = read(row["edit"], where, "edit")
                if edit in edits:
                    raise field_error(where, "edit", f"is in its group twice ({row['edit']})")
                found = [_number(row, name, where) for name in _labels(row, where)[1].values()]
            except RecordError as error:
                problems.leave(where, error)
                continue
            prompts.append(prompt)
            edits.append(edit)
            values.append(found)
            critiques.append(row.get("critique", "").strip() or None)
            used.append(where)
        if not used:
            return []
        kind, names = _labels(members[0][1], used[0])
        names = names or dict.fromkeys(DEFAULT_DIMENSIONS)
        columns = list(map(list, zip(*values, strict=True)))
        shown = {kind: dict(zip(names, columns, strict=True))} if kind else {}
        preference, weight = parse_labels(shown, len(edits), tuple(names), used[0])
        if not weight.any() and not any(critiques):
            raise field_error(used[0], "edit", "its group has neither two edits with scores or"
                              " ranks nor a critique", "group without a judgement")  # fmt: skip
        text, source = prompts[0]
        example = PreferenceExample(
            id=f"{Path(used[0]).name}:{text}"[:120],
            prompt=(Text(text), *([Image(source)] if source else [])),
            candidates=tuple(
                Candidate((Image(edit),), critique)
                for edit, critique in zip(edits, critiques, strict=True)
            ),
            preference=preference, weight=weight, dimensions=tuple(names),
        )  # fmt: skip
        validate(example, used[0])
        return [example]


def _labels(row: dict[str, Any], where: str) -> tuple[str, dict[str, str]]:
    """('scores' or 'ranks', {dimension: column}); ('', {}) without such columns.

    Raises:
        UserError: both kinds, or a column that means nothing.
    """
    found: dict[str, dict[str, str]] = {}
    for column in row:
        kind, _, dimension = column.partition("_")
        if kind in ("score", "rank"):
            found.setdefault(f"{kind}s", {})[dimension or DEFAULT_DIMENSIONS[0]] = column
        elif column not in _KNOWN:
            known = ", ".join((*_KNOWN, "score", "score_NAME", "rank", "rank_NAME"))
            raise UserError(f"{where}: column {column!r} is unknown; known: {known}")
    if len(found) > 1:
        raise UserError(f"{where}: has both scores and ranks; give one kind")
    return next(iter(found.items())) if found else ("", {})


def _number(row: dict[str, str], name: str, where: str) -> float | None:
    text = row[name].strip()
    if not text:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise field_error(where, name, f"is {text!r}, must be a number") from error
