"""Rows of JSON text, one at a time: JSON lines; a list, or lists one after another, as `cat` joins
them; objects one after another, as `jq` writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from jrm_jax.data.ingest.texts import open_text, printable
from jrm_jax.errors import UserError

BLOCK = 1 << 16  # characters
LONGEST = 1 << 26  # characters: of an object that may be the first of several
_WORD = 16  # characters: longer than any word of JSON, which the end of a block may cut
_BLANK = " \t\r\n\v\f\ufeff"  # the mark may stand where files were joined


class NoRows(UserError):
    """A JSON file that holds one object alone, as files of settings do."""


def read_lines(path: Path, columns: Any, skip: int) -> Iterator[tuple[str, Any]]:
    """('file:line', row or the error) of JSON lines; see `rows.read_rows`."""
    count, name = 0, printable(path)
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            text = line.strip().strip(_BLANK)
            if not text:
                continue
            count += 1
            if count <= skip:
                continue
            where = f"{name}:{number}"
            try:
                yield where, json.loads(text)
            except (ValueError, RecursionError) as error:
                yield where, UserError(f"{where}: not JSON ({error})")


def read_json_rows(path: Path, columns: Any, skip: int) -> Iterator[tuple[str, Any]]:
    """('file[index]', row) of a list, of several, or of objects; of JSON lines as `read_lines`.

    Raises:
        NoRows: it holds one object alone.
        UserError: it cannot be read on.
    """
    name = printable(path)
    with open_text(path) as file:
        values = _Values(file, name)
        begin = values.next_character()
        if not begin:
            raise UserError(f"{name} is not JSON (it is empty)")
        if begin not in "[{":
            raise UserError(f"{name} is not JSON of rows (it must hold a list of objects)")
        if begin == "{" and _holds_lines(path):
            yield from read_lines(path, columns, skip)
            return
        entries = _objects(values) if begin == "{" else _lists(values)
        for index, row in enumerate(entries):
            if index >= skip:
                yield f"{name}[{index}]", row


def _holds_lines(path: Path) -> bool:
    """Whether the first two lines that are not blank are objects, one of them a whole one."""
    found: list[str] = []
    with open_text(path) as file:
        while len(found) < 2 and (line := file.readline(LONGEST)):
            text = line.strip().strip(_BLANK)
            found += [text] if text else []
    return len(found) == 2 and all(text[0] == "{" for text in found) and any(map(_is_whole, found))


def _is_whole(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class _Values:
    """Text of a file, decoded value by value; reads on whenever one is not complete."""

    def __init__(self, file: TextIO, name: str):
        self._file, self.name = file, name
        self.text, self._ended, self._decoder = "", False, json.JSONDecoder()

    def next_character(self) -> str:
        """The next that is not blank; "" at the end."""
        self.text = self.text.lstrip(_BLANK)
        while not self.text and self._read_on():
            self.text = self.text.lstrip(_BLANK)
        return self.text[:1]

    def take(self) -> None:
        """Pass over that character."""
        self.text = self.text[1:]

    def value(self, index: int, longest: float = math.inf) -> Any:
        """The next value, entry `index` of the file.

        Raises:
            UserError: it is no JSON, the file ends in it, or it has more characters than `longest`.
        """
        while True:
            try:
                found, end = self._decoder.raw_decode(self.text)
            except (ValueError, RecursionError) as error:
                long = len(self.text) > longest
                if long or _is_hopeless(error, self.text) or not self._read_on():
                    words = f"{self.name} is not JSON (entry {index}: {error})"
                    raise UserError(words) from error
                continue
            # a number at the end of a block might go on in the next one
            if end < len(self.text) or not self._read_on():
                self.text = self.text[end:]
                return found

    def _read_on(self) -> bool:
        # as much again as there is, so that a long entry is not decoded ever and ever
        block = "" if self._ended else self._file.read(max(BLOCK, len(self.text)))
        self.text, self._ended = self.text + block, not block
        return not self._ended


def _lists(values: _Values) -> Iterator[Any]:
    index = 0
    while values.next_character():
        if values.next_character() != "[":
            words = f"something follows the list, after {index} entries"
            raise UserError(f"{values.name} is not JSON ({words})")
        values.take()
        first = True
        while (character := values.next_character()) != "]":
            if not first and character == ",":
                values.take()
                if values.next_character() == "]":  # a comma after the last entry
                    break
            elif not first and character:
                words = f"no comma before entry {index}"
                raise UserError(f"{values.name} is not JSON ({words})")
            row = values.value(index) if character else None
            if not values.next_character():
                raise UserError(f"{values.name} is not JSON (the list has no end)")
            yield row
            index, first = index + 1, False
        values.take()


def _objects(values: _Values) -> Iterator[Any]:
    words = "must hold a list of objects, is an object (a row alone: name the file .jsonl)"
    alone = NoRows(f"{values.name} {words}")
    try:
        first = values.value(0, LONGEST)
    except UserError as error:
        if len(values.text) > LONGEST:
            raise alone from error
        raise
    if not values.next_character():
        raise alone
    if values.next_character() != "{":
        raise UserError(f"{values.name} is not JSON (no object follows entry 0)")
    yield first
    index = 1
    while character := values.next_character():
        if character != "{":
            words = f"no object follows entry {index - 1}"
            raise UserError(f"{values.name} is not JSON ({words})")
        yield values.value(index)
        index += 1


def _is_hopeless(error: Exception, text: str) -> bool:
    """Whether more text cannot help: the error is not at the end, nor in an open string."""
    if not isinstance(error, json.JSONDecodeError):
        return True
    return not error.msg.startswith("Unterminated") and error.pos < len(text) - _WORD
