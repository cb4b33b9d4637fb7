"""Scores of all groups of a file, streamed into JSON lines; stopped, it goes on where it was.

A row of the input (JSON lines, a JSON list, CSV, parquet, or a folder of them) is one group:

    {"id": "7", "instruction": "Make the cat white", "source": "cat.png", "candidates": ["a.png"]}

`source` may be absent, empty, one picture or a list; `edit` is one candidate (the columns of a CSV
are instruction,source,edit). The records that `jrm_jax.data.builders jsonl` reads are groups, too,
where their candidates are pictures: `prompt` and `candidates`, pairs with `chosen` and `rejected`,
rows of a prepared set; labels are not needed. A row of the output, in the order of the input:

    {"row": 0, "id": "7", "candidates": [{"picture": "a.png", "reward": 0.5, "normalised": 0.1}]}

with `dimensions` where a model has several, `deviation` (and `deviations`) where it says how unsure
it is, and `error` in place of what could not be scored: a candidate, or all of them.
"""

from __future__ import annotations

import collections
import fcntl
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from jrm_jax.data.chosen import is_pair
from jrm_jax.data.ingest import rows as source_rows
from jrm_jax.data.ingest.json_rows import NoRows
from jrm_jax.data.ingest.pictures import GroupPictures
from jrm_jax.data.ingest.records import read_parts
from jrm_jax.data.ingest.rows import read_rows
from jrm_jax.data.labels import check_text, field_error, read_id
from jrm_jax.data.schema import Part, Text
from jrm_jax.errors import UserError
from jrm_jax.serving.groups import Group
from jrm_jax.serving.planned import ahead
from jrm_jax.serving.reward_model import FIRST, RewardModel
from jrm_jax.serving.rows import Needs
from jrm_jax.shell import disk, terminal

SUFFIXES = (*source_rows.SUFFIXES, ".csv", ".tsv")
_ROW = "row"  # what rows of an output begin with, and their number


class _Asked(NamedTuple):
    """A row of the input: what is known of its row of the output, and what is to be scored.

    scored: the candidates of the output's row that have no error, in the order of the group's.
    """

    found: dict[str, Any]
    group: Group | None = None
    scored: Sequence[dict[str, Any]] = ()


def score_file(
    model: RewardModel,
    source: Path,
    out: Path,
    images: Path | None = None,
    made: Mapping[str, Any] | None = None,
) -> tuple[int, int]:
    """(rows, rows with an error) of the output, which is complete.

    Args:
        images: where pictures' names lead; default: the folder of the input.
        made: what else the scores depend on, in JSON types: which weights, and how they are used.
            An output does not go on where that differs.

    Raises:
        UserError: `out` is complete already or belongs to other files or another model, or a file
            cannot be read or written.
    """
    state = out.with_name(out.name + ".state.json")
    files = _find(source, (out, state))
    total = sum(1 for file in files for _ in read_rows(file, _first_column))
    pictures = images or (source if source.is_dir() else source.parent)

    def asked(first: int, last: int | None = None) -> Iterator[_Asked]:
        rows = itertools.chain.from_iterable(read_rows(file) for file in files)
        some = itertools.islice(rows, first, last)
        return ahead(lambda row: _ask(model, *row, pictures), some, 2 * model.batch_size)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        bar = terminal.Bar("scoring", total)
        with out.open("a", encoding="utf-8") as file, bar:
            _hold(file, out)
            done, failed = _begin(out, state, _facts(model, files, pictures, made or {}))
            bar.done = done
            # by the same rows wherever a file goes on: the same programs, the same last digits
            begun = asked(0, FIRST * model.batch_size)
            like = [model.need(one.group) for one in begun if one.group]
            for found in _score(model, asked(done), like):
                file.write(json.dumps({_ROW: done, **found}, ensure_ascii=False) + "\n")
                file.flush()
                done, failed = done + 1, failed + has_error(found)
                bar.show(done)
        state.unlink()
    except OSError as error:
        raise UserError(f"{out} cannot be written: {disk.explain(error, out)}") from error
    return done, failed


def _find(source: Path, own: Sequence[Path]) -> list[Path]:
    """Files of the input. Of a folder's, those that are our own are left out (`own`, and outputs of
    earlier runs), and JSON files that hold no rows."""
    places = {path.resolve() for path in own}
    found = source_rows.find(source, SUFFIXES)
    if source.is_file():
        return found
    files = []
    for file in (file for file in found if file.resolve() not in places):
        try:
            first = next(read_rows(file, _first_column), None)
        except NoRows as error:
            terminal.say(f"passed over: {error}")
            continue
        except UserError:  # told when it is read
            first = None
        if first is not None and _is_of_an_output(first[1]):
            terminal.say(f"passed over: {file} holds scores that were written by this command")
            continue
        files.append(file)
    if not files:
        raise UserError(f"{source} holds no file of groups (of {', '.join(SUFFIXES)})")
    return files


def _is_of_an_output(row: Any) -> bool:
    """Whether a file that begins with this row was written here."""
    wanted = {_ROW, "id", "candidates", "error"}
    return isinstance(row, dict) and row.get(_ROW) == 0 and set(row) <= wanted and len(row) > 1


def has_error(found: dict[str, Any]) -> bool:
    return "error" in found or any("error" in one for one in found["candidates"])


def _first_column(names: list[str]) -> list[str]:
    return names[:1]


def _facts(
    model: RewardModel, files: list[Path], pictures: Path, made: Mapping[str, Any]
) -> dict[str, Any]:
    """What an output belongs to."""
    sizes = {str(f.resolve()): [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    stamp = json.loads(json.dumps(model.card["stamp"]))
    return {
        "files": sizes,
        "images": str(pictures.resolve()),
        "model": [stamp, model.card.get("step"), model.card.get("reward_mean")],
        "made": {"batch_size": model.batch_size, **made},
    }


def _hold(file: TextIO, out: Path) -> None:
    """Until the file is closed, against the same command given twice.

    Raises:
        UserError: another process writes there.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{out} is being written by another process") from error
    except OSError:  # of file systems without locks
        return


def _begin(out: Path, state: Path, facts: dict[str, Any]) -> tuple[int, int]:
    """(complete lines of the output, those with an error); from a damaged line on it is cut off."""
    if not out.stat().st_size:
        disk.write_whole(state, json.dumps(facts))
        return 0, 0
    if not state.exists():
        raise UserError(f"{out} exists and is complete: give another --output, or remove it")
    advice = f"give another --output, or remove it and {out.name}"
    if disk.read_json(state, advice) != facts:
        raise UserError(
            f"{out} was begun with other files, another model or other options: give another "
            f"--output, or remove it and {state.name}"
        )
    done = failed = end = 0
    with out.open("rb") as lines:
        for line in lines:
            found = _complete(line, done)
            if found is None:
                break
            done, failed, end = done + 1, failed + has_error(found), end + len(line)
    os.truncate(out, end)
    return done, failed


def _complete(line: bytes, number: int) -> dict[str, Any] | None:
    """The row of the output with this number that a line holds; None where it is damaged."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    whole = isinstance(found, dict) and found.get(_ROW) == number
    return found if whole and ("candidates" in found or "error" in found) else None


def _score(model: RewardModel, asked: Iterable[_Asked], like: list[Needs]) -> Iterator[dict]:
    """Rows of the output, in order; what cannot be scored has its reason."""
    waiting: collections.deque[_Asked] = collections.deque()

    def groups() -> Iterator[Group]:
        for one in asked:
            waiting.append(one._replace(group=None))  # its pictures need not wait
            if one.group is not None:
                yield one.group

    def errors() -> Iterator[dict]:
        while waiting and not waiting[0].scored:
            yield waiting.popleft().found

    for scores in model.iter_found(groups(), like):
        yield from errors()
        one = waiting.popleft()
        if isinstance(scores, UserError):
            del one.found["candidates"]
            yield one.found | _error(scores)
            continue
        for cell, cells in zip(one.scored, scores.as_rows(), strict=True):
            cell |= cells
        yield one.found
    yield from errors()


def _error(error: UserError) -> dict[str, str]:
    return {"error": " ".join(str(error).split())}


def _ask(model: RewardModel, where: str, row: Any, folder: Path) -> _Asked:
    named: dict[str, Any] = {}
    try:
        if isinstance(row, UserError):
            raise row
        named = _named(row, where)
        group, candidates = _group(model, row, where, GroupPictures(folder))
    except UserError as error:
        return _Asked(named | _error(error))
    scored = [one for one in candidates if "error" not in one]
    return _Asked(named | {"candidates": candidates}, group if scored else None, scored)


def _named(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The id of a row of the output: that of the input, a whole number as a number."""
    value = row.get("id")
    name = read_id(value, where)
    return {} if name is None else {"id": value if isinstance(value, str) else int(name)}


def _group(
    model: RewardModel, row: dict[str, Any], where: str, read: GroupPictures
) -> tuple[Group, list[dict[str, Any]]]:
    """(what is scored, the candidates as the output shows them: `error` where one is left out).

    Raises:
        UserError: no instruction, no candidates, or a source that cannot be read.
    """
    if _is_record(row):
        row = _of_record(row, where, read)
    instruction = row.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise field_error(where, "instruction", "is no text")
    check_text(instruction, where, "instruction")
    given = row.get("candidates") if row.get("candidates") is not None else row.get("edit")
    given = given if isinstance(given, list | tuple) else [given] if given else []
    if not given:
        raise field_error(where, "candidates", "holds no picture (or give one as 'edit')")
    sources = row.get("source")
    sources = sources if isinstance(sources, list | tuple) else [sources] if sources else []
    source = [_picture(model, read, one, where, "source") for one in sources]
    shown, good = [], []
    for index, one in enumerate(given):
        cell = {"picture": one if isinstance(one, str) else index}
        try:
            good.append(_picture(model, read, one, where, f"candidates[{index}]"))
        except UserError as error:
            cell |= _error(error)
        shown.append(cell)
    return Group(instruction, source, good), shown


def _is_record(row: dict[str, Any]) -> bool:
    said = {name for name, value in row.items() if value is not None}
    return bool(said & {"prompt", "record"}) or is_pair(row) and not said & {"candidates", "edit"}


def _of_record(row: dict[str, Any], where: str, read: GroupPictures) -> dict[str, Any]:
    """A record (see `ingest.records`) as instruction, source and candidates, none of them read."""
    pictures: list[str | bytes] = []

    def mark(picture: str | bytes) -> bytes:
        pictures.append(picture)
        return str(len(pictures) - 1).encode()

    def of(parts: Sequence[Part]) -> list[str | bytes]:
        return [pictures[int(part.data)] for part in parts if not isinstance(part, Text)]

    prompt, candidates = read_parts(row, where, mark, read.is_file)
    for index, one in enumerate(candidates):
        if len(one.parts) != 1 or isinstance(one.parts[0], Text):
            raise field_error(where, f"candidates[{index}]", "must be one picture to be scored")
    return {
        "instruction": "\n".join(part.text for part in prompt if isinstance(part, Text)),
        "source": of(prompt),
        "candidates": [picture for one in candidates for picture in of(one.parts)],
    }


def _picture(model: RewardModel, read: GroupPictures, value: Any, where: str, field: str) -> bytes:
    data = read(value, where, field)
    if problem := model.problem(data):
        raise field_error(where, field, problem)
    return data
