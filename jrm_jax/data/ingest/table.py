"""A folder of pictures with a CSV file, one edit a row -> groups of the edits of one source.

    source,instruction,edit,score,critique
    cat.png,Make the cat white,a.png,8,The cat is white.
    cat.png,Make the cat white,b.png,5,

Columns: edit; source (may be empty: text to image) and instruction, or group, which then tells what
belongs together; critique, and score_line, `true` where its last line states scores (else `false`
or empty); and `score` (larger is better) or `rank` (1 is best), for more than one reward dimension
`score_NAME` or `rank_NAME`. An empty cell is an unlabelled one. The delimiter may be a comma, a
semicolon, a tab or |.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.data.ingest.layout import Member, Problems, read_each
from jrm_jax.data.ingest.pictures import GroupPictures
from jrm_jax.data.labels import field_error, parse_labels, read_decimal
from jrm_jax.data.schema import (
    DEFAULT_DIMENSIONS,
    Candidate,
    Image,
    PreferenceExample,
    Text,
    validate,
)
from jrm_jax.errors import UserError

_MISSING = ("", "nan", "na", "n/a", "null", "none", "-")  # what tables write where nothing is
_KNOWN = ("source", "instruction", "edit", "group", "critique", "score_line")
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False,
          "1.0": True, "0.0": False}  # fmt: skip


class Table(NamedTuple):
    """Layout. folder: where pictures' names lead."""

    folder: Path
    suffixes: tuple[str, ...] = (".csv", ".tsv")
    columns: None = None
    gathers: bool = True

    def key(self, row: dict[str, str], where: str) -> str:
        _labels(row, where)
        for name in ("instruction", "edit"):
            if not row.get(name, "").strip():
                raise field_error(where, name, "is empty" if name in row else "is no column")
        asked = "\0".join([_cell(row, "source"), row["instruction"].strip()])
        return _cell(row, "group") or asked

    def label(self, row: dict[str, str]) -> str:
        return ""

    def dimensions(self, row: dict[str, str]) -> tuple[str, ...]:
        return tuple(_labels(row, "")[1])

    def make(self, members: list[Member], problems: Problems) -> list[PreferenceExample]:
        pictures = GroupPictures(self.folder)
        edits: list[_Edit] = []

        def read(row: dict[str, str], where: str) -> _Edit:
            source, critique = _cell(row, "source"), _cell(row, "critique") or None
            instruction, picture = row["instruction"].strip(), row["edit"].strip()
            kind, columns = _labels(row, where)
            edit = _Edit(
                (instruction, pictures(source, where, "source") if source else b""),
                pictures(picture, where, "edit"),
                kind,
                {name: _number(row, column, where, problems) for name, column in columns.items()},
                critique,
                _truth(row, "score_line", where) and critique is not None,
            )
            if edits and edit.prompt != edits[0].prompt:
                raise field_error(where, "group", "has several sources or instructions")
            if edits and edit.kind != edits[0].kind:
                raise field_error(where, "group", "has scores in one file and ranks in another")
            if edit.picture in [other.picture for other in edits]:
                raise field_error(where, "edit", f"is in its group twice ({row['edit']})")
            return edit

        used = []
        for where, edit in read_each(members, problems, read):
            edits.append(edit)
            used.append(where)
        if not used:
            return []
        kind = edits[0].kind
        named = tuple(dict.fromkeys(name for edit in edits for name in edit.values))
        names = named or DEFAULT_DIMENSIONS
        values = {name: [edit.values.get(name) for edit in edits] for name in named}
        shown = {kind: values} if kind else {}
        preference, weight = parse_labels(shown, len(edits), names, used[0])
        if not weight.any() and not any(edit.critique for edit in edits):
            raise field_error(used[0], "edit", "its group has neither two edits with scores or"
                              " ranks nor a critique", "group without a judgement")  # fmt: skip
        text, source = edits[0].prompt
        example = PreferenceExample(
            id=f"{Path(used[0]).name}:{text}"[:120],
            prompt=(Text(text), *([Image(source)] if source else [])),
            candidates=tuple(
                Candidate((Image(edit.picture),), edit.critique, edit.score_line) for edit in edits
            ),
            preference=preference, weight=weight, dimensions=names,
        )  # fmt: skip
        validate(example, used[0])
        return [example]


class _Edit(NamedTuple):
    """A row. prompt: instruction and source picture. kind: 'scores', 'ranks' or ''."""

    prompt: tuple[str, bytes]
    picture: bytes
    kind: str
    values: dict[str, float | None]  # by dimension
    critique: str | None
    score_line: bool


def _labels(row: dict[str, Any], where: str) -> tuple[str, dict[str, str]]:
    """('scores' or 'ranks', {dimension: column}); ('', {}) without such columns.

    Raises:
        UserError: both kinds, or a column that means nothing.
    """
    found: dict[str, dict[str, str]] = {}
    for column in row:
        kind, _, dimension = column.partition("_")
        if column in _KNOWN:  # `score_line` is no dimension
            continue
        if kind in ("score", "rank"):
            found.setdefault(f"{kind}s", {})[dimension or DEFAULT_DIMENSIONS[0]] = column
        else:
            known = ", ".join((*_KNOWN, "score", "score_NAME", "rank", "rank_NAME"))
            raise UserError(f"{where}: column {column!r} is unknown; known: {known}")
    if len(found) > 1:
        raise UserError(f"{where}: has both scores and ranks; give one kind")
    return next(iter(found.items())) if found else ("", {})


def _cell(row: dict[str, str], name: str) -> str:
    """Without blanks around it; '' where nothing is said."""
    text = row.get(name, "").strip()
    return "" if text.lower() in _MISSING else text


def _truth(row: dict[str, str], name: str, where: str) -> bool:
    text = _cell(row, name).lower()
    if text and text not in _TRUTH:
        raise field_error(where, name, f"is {row[name]!r}, not true or false")
    return bool(text) and _TRUTH[text]


def _number(
    row: dict[str, str], name: str, where: str, problems: Problems
) -> float | None:
    """None: unlabelled. Where a comma does not part the cells it may be a decimal one."""
    text = row[name].strip()
    if text.lower() in _MISSING:
        if text:
            detail = f"{where}: {name} is {text!r}"
            problems.note("score or rank that is no number (that edit is unlabelled)", detail)
        return None
    try:
        return read_decimal(text)
    except ValueError as error:
        raise field_error(where, name, f"is {text!r}, {error}") from error
