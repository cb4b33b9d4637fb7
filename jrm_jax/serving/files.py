"""Scores of all groups of a file, streamed into JSON lines; stopped, it goes on where it was.

A row of the input (JSON lines, a JSON list, CSV, parquet) is one group:

    {"id": "7", "instruction": "Make the cat white", "source": "cat.png", "candidates": ["a.png"]}

`source` may be absent, empty, one picture or a list; `edit` is one candidate (the columns of a CSV
are instruction,source,edit). The records that `jrm_jax.data.builders jsonl` reads are groups, too,
where their candidates are pictures. A row of the output, in the order of the input:

    {"row": 0, "id": "7", "candidates": [{"picture": "a.png", "reward": 0.5, "normalised": 0.1}]}

with `dimensions` where a model has several, `deviation` (and `deviations`) where it says how unsure
it is, and `error` in place of what could not be scored: a candidate, or all of them.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.data.ingest.pictures import GroupPictures
from jrm_jax.data.ingest.rows import find, read_rows
from jrm_jax.data.labels import check_text, field_error
from jrm_jax.errors import UserError
from jrm_jax.serving.groups import Group
from jrm_jax.serving.planned import ahead
from jrm_jax.serving.reward_model import FIRST, RewardModel
from jrm_jax.serving.rows import Needs
from jrm_jax.shell import terminal

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


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
) -> tuple[int, int]:
    """(rows, rows with an error) of the output, which is complete.

    Args:
        images: where pictures' names lead; default: the folder of the input.

    Raises:
        UserError: `out` is complete already or belongs to other files or another model, or a file
            cannot be read or written.
    """
    files = find(source, SUFFIXES)
    total = sum(1 for file in files for _ in read_rows(file, _first_column))
    pictures = images or (source if source.is_dir() else source.parent)
    state = out.with_name(out.name + ".state.json")
    done, failed = _begin(out, state, _facts(model, files, pictures))

    def asked(first: int, last: int | None = None) -> Iterator[_Asked]:
        rows = itertools.chain.from_iterable(read_rows(file) for file in files)
        some = itertools.islice(rows, first, last)
        return ahead(lambda row: _ask(model, *row, pictures), some, 2 * model.batch_size)

    try:
        bar = terminal.Bar("scoring", total)
        bar.done = done
        with out.open("a", encoding="utf-8") as file, bar:
            # by the same rows wherever a file goes on: the same programs, the same last digits
            begun = asked(0, FIRST * model.batch_size)
            like = [model.need(one.group) for one in begun if one.group]
            for found in _score(model, asked(done), like):
                file.write(json.dumps({"row": done, **found}, ensure_ascii=False) + "\n")
                file.flush()
                done, failed = done + 1, failed + has_error(found)
                bar.show(done)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    state.unlink()
    return done, failed


def has_error(found: dict[str, Any]) -> bool:
    return "error" in found or any("error" in one for one in found["candidates"])


def _first_column(names: list[str]) -> list[str]:
    return names[:1]


def _facts(model: RewardModel, files: list[Path], pictures: Path) -> dict[str, Any]:
    """What an output belongs to."""
    sizes = {str(f.resolve()): [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    stamp = json.loads(json.dumps(model.card["stamp"]))
    return {
        "files": sizes,
        "images": str(pictures.resolve()),
        "model": [stamp, model.card.get("step"), model.card.get("reward_mean")],
    }


def _begin(out: Path, state: Path, facts: dict[str, Any]) -> tuple[int, int]:
    """(complete lines of the output, those with an error); a torn last line is cut off."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps(facts), encoding="utf-8")
        return 0, 0
    if not state.exists():
        raise UserError(f"{out} exists and is complete: give another --output, or remove it")
    if json.loads(state.read_text(encoding="utf-8")) != facts:
        raise UserError(
            f"{out} was begun with other files or another model: give another --output, or remove "
            f"it and {state.name}"
        )
    done = failed = end = 0
    with out.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            done, failed, end = done + 1, failed + has_error(json.loads(line)), end + len(line)
    os.truncate(out, end)
    return done, failed


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
    try:
        if isinstance(row, UserError):
            raise row
        group, candidates = _group(model, row, where, GroupPictures(folder))
    except UserError as error:
        return _Asked(_named(row) | _error(error))
    scored = [one for one in candidates if "error" not in one]
    return _Asked(_named(row) | {"candidates": candidates}, group if scored else None, scored)


def _named(row: Any) -> dict[str, Any]:
    name = row.get("id") if isinstance(row, dict) else None
    return {} if name is None else {"id": name}


def _group(
    model: RewardModel, row: dict[str, Any], where: str, read: GroupPictures
) -> tuple[Group, list[dict[str, Any]]]:
    """(what is scored, the candidates as the output shows them: `error` where one is left out).

    Raises:
        UserError: no instruction, no candidates, or a source that cannot be read.
    """
    if "prompt" in row:
        row = _of_record(row, where)
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


def _of_record(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A record of `data/schema.py` as instruction, source and candidates."""
    try:
        texts, source = _parts(row["prompt"])
        candidates = []
        for one in row["candidates"]:
            words, pictures = _parts(one["parts"] if "parts" in one else one)
            if words or len(pictures) != 1:
                raise ValueError("a candidate is one picture here")
            candidates += pictures
    except (KeyError, TypeError, ValueError) as error:
        words = f"is no record of pictures ({error})"
        raise field_error(where, "prompt, candidates", words) from error
    return {"instruction": "\n".join(texts), "source": source, "candidates": candidates}


def _parts(value: Any) -> tuple[list[str], list[Any]]:
    """(texts, pictures) of a part or a list of parts."""
    listed = value if isinstance(value, list | tuple) else [value]
    parts = [{"text": part} if isinstance(part, str) else part for part in listed]
    return [p["text"] for p in parts if "text" in p], [p["image"] for p in parts if "image" in p]


def _picture(model: RewardModel, read: GroupPictures, value: Any, where: str, field: str) -> bytes:
    data = read(value, where, field)
    if problem := model.problem(data):
        raise field_error(where, field, problem)
    return data
