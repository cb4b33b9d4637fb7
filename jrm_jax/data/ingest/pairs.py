"""Pairs of edits that people judged -> groups of all edits of one source and instruction.

EditReward-Data as JSON and as the Hugging Face parquet, a subset of it that others published under
other names, GenAI-Bench's image editing, and HPDv3's pictures without a source. Each edit is
encoded once, each pair keeps its own votes, pairs that were not compared have weight 0. The order
of a pair means nothing; in HPDv3 alone the first is the preferred one.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.data.ingest.judgements import EDITREWARD, KINDS, SOURCE, Columns
from jrm_jax.data.ingest.layout import Member, Problems, read_each
from jrm_jax.data.ingest.pictures import GroupPictures, picture_name
from jrm_jax.data.ingest.rows import SUFFIXES
from jrm_jax.data.ingest.votes import Vote, connected, tally
from jrm_jax.data.labels import check_type, field_error
from jrm_jax.data.schema import Candidate, Image, PreferenceExample, Text, validate


class Pairs(NamedTuple):
    """Layout. name: of `KINDS`. folder: where pictures' names lead. judged: the dimensions."""

    name: str
    folder: Path
    judged: tuple[str, ...] = EDITREWARD
    suffixes: tuple[str, ...] = SUFFIXES
    gathers: bool = True

    def dimensions(self, row: dict[str, Any]) -> tuple[str, ...]:
        return self.judged

    def columns(self, names: list[str]) -> list[str]:
        """What `key` needs: no picture at all where the rows have a key. Where one is null, the
        rows of its prompt are read as one group, and `make` takes their sources apart."""
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
        source = row.get("key")
        for columns in kinds if source is None else ():
            source = source or picture_name(row.get(columns.source))
        return hashlib.sha256(f"{source}\0{prompt}".encode()).hexdigest()[:24]

    def label(self, row: dict[str, Any]) -> str:
        return ""

    def make(self, members: list[Member], problems: Problems) -> list[PreferenceExample]:
        read = GroupPictures(self.folder)
        asked: dict[tuple[str, bytes], list[Vote]] = {}  # by prompt and source
        for _, (prompt, vote) in read_each(members, problems, partial(self._vote, read, problems)):
            asked.setdefault(prompt, []).append(vote)
        if len(asked) > 1:
            where = next(iter(asked.values()))[0].where
            problems.note("one key and instruction with several sources (kept apart)", where)
        return [
            self._group(prompt, source, part, problems)
            for (prompt, source), votes in asked.items()
            for part in ([votes] if source else connected(votes))
        ]

    def _vote(
        self, read: GroupPictures, problems: Problems, row: dict[str, Any], where: str
    ) -> tuple[tuple[str, bytes], Vote]:
        """((prompt, source picture or b""), vote) of a row."""
        columns = self._columns_of(row, where)
        shares, odd, weight = columns.judge(row, columns, where)
        if all(share is None for share in shares):
            names = ", ".join(dict.fromkeys(name for both in columns.scores for name in both))
            raise field_error(
                where, columns.scores[0][0] if columns.scores else "vote_type",
                f"no dimension is judged (needs {names or 'a vote'})", "pair without a judgement",
            )  # fmt: skip
        *source, one, two = (read(row[name], where, name) for name in columns.pictures)
        first, second = row[columns.first], row[columns.second]
        if one == two:
            shown = f" ({first})" if first == second and isinstance(first, str) else ""
            raise field_error(
                where, columns.second, f"is the same edit as {columns.first}{shown}",
                "pair of equal edits",
            )  # fmt: skip
        for kind, detail in odd:
            problems.note(kind, detail)
        prompt = row[columns.prompt], b"".join(source)
        return prompt, Vote(where, one, two, shares, weight)

    def _columns_of(self, row: dict[str, Any], where: str) -> Columns:
        kinds = [c for c in KINDS[self.name] if c.prompt in row]
        for columns in kinds:
            if all(name in row for name in (columns.prompt, *columns.pictures)):
                return columns
        missing = [name for name in kinds[0].pictures if name not in row]
        hint = ""
        if missing == [SOURCE]:
            hint = "; pairs without a source, as HPDv3 has them, are read with the layout hpdv3"
        raise field_error(where, missing[0], f"is missing{hint}")

    def _group(
        self, prompt: str, source: bytes, votes: list[Vote], problems: Problems
    ) -> PreferenceExample:
        edits, preference_KKR, weight_KKR, odd = tally(votes)
        for kind, detail in odd:
            problems.note(kind, detail)
        known = source or edits[0]  # without a source, parts of a prompt are told apart by edits
        name = hashlib.sha256(prompt.encode() + b"\0" + known).hexdigest()[:16]
        example = PreferenceExample(
            id=f"{name}:{prompt}"[:120],
            prompt=(Text(prompt), *([Image(source)] if source else [])),
            candidates=tuple(Candidate((Image(edit),)) for edit in edits),
            preference=preference_KKR,
            weight=weight_KKR,
            dimensions=self.judged,
        )
        validate(example, votes[0].where)
        return example
