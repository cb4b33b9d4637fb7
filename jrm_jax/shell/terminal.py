"""What a person sees while a command works: text as it was typed, tables, how far the work is.

The one module that knows rich. A user's words may look like its markup ("Remove the [/b] tag"), or
hold an emoji's name or a terminal's control codes: none of it is obeyed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

Item = TypeVar("Item")
SLOW = 3.0  # seconds from which on a person wants to know what takes so long
TELL_SECONDS = 30.0  # between two lines about the same work, where there is no terminal
# Control codes are shown, not obeyed; tabs and line breaks stay.
_CODES = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n"}


@functools.cache
def _console_class() -> type:
    from rich.console import Console

    class Plain(Console):
        """Every text that rich is given, in a table or on its own, comes through here."""

        def render_str(self, text: str, **options: Any):
            return super().render_str(text.translate(_CODES), **options)

    return Plain


def console(stderr: bool = False) -> Any:
    """A rich console that shows text as it is."""
    return _console_class()(stderr=stderr, markup=False, emoji=False, highlight=False)


def is_watched() -> bool:
    """Whether a person sees stderr as it is written, and not a file or a pipe."""
    return sys.stderr is not None and sys.stderr.isatty()


def say(words: str) -> None:
    """A line on stderr: stdout is for what a command makes."""
    print(words, file=sys.stderr, flush=True)


@contextlib.contextmanager
def if_slow(words: str, say: Callable[[str], None] = say) -> Iterator[None]:
    """Say it if what is done inside takes longer than `SLOW` seconds."""
    timer = threading.Timer(SLOW, say, [words])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def show_cursor() -> None:
    """A bar hides it; for a program that ends at once."""
    if is_watched():
        console(stderr=True).show_cursor(True)


def duration(seconds: float) -> str:
    """'1:02:03', '2:03'."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Bar:
    """How far long work is, on stderr: a bar with the time left; where nobody watches, a plain line
    every `TELL_SECONDS`, so that short work leaves no trace in a file.

    Args:
        total: None: not known yet.
        kept: a bar that stays on the screen when the work is done.
    """

    def __init__(self, words: str, total: int | None = None, *, kept: bool = False):
        self.words, self.total, self.done, self.note = words, total, 0, ""
        self._bar: Any = None
        if is_watched():
            from rich import progress

            column = functools.partial(progress.TextColumn, markup=False)
            self._bar = progress.Progress(
                column("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                column("{task.fields[note]}"),
                progress.TimeRemainingColumn(),
                console=console(stderr=True),
                transient=not kept,
            )
            self._task = self._bar.add_task(words.translate(_CODES), total=total, note="")

    def __enter__(self) -> Bar:
        self._began = self._told = time.monotonic()
        self._first = self.done
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1) -> None:
        self.show(self.done + count)

    def show(
        self,
        done: int,
        total: int | None = None,
        words: str | None = None,
        note: str | None = None,
    ) -> None:
        """`done` of `total` is done; what is None stays as it is. `note` follows the count."""
        self.done, self.total = done, self.total if total is None else total
        self.words = self.words if words is None else words
        self.note = self.note if note is None else note
        if self._bar is not None:
            words, note = (text.translate(_CODES) for text in (self.words, self.note))
            self._bar.update(
                self._task, completed=done, total=self.total, description=words, note=note
            )
            return
        now = time.monotonic()
        if now - self._told >= TELL_SECONDS:
            self._told = now
            say(self._line(now))

    def say(self, words: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(words)
        else:
            say(words)

    def _line(self, now: float) -> str:
        """'reading: 128 of 4,096 rows, 3:20 to go'"""
        words = f"{self.words}: {self.done:,}" + (f" of {self.total:,}" if self.total else "")
        words += f" {self.note}" if self.note else ""
        new = self.done - self._first
        if not self.total or new <= 0:
            return words
        left = (now - self._began) / new * (self.total - self.done)
        return f"{words}, {duration(left)} to go"


def track(items: Iterable[Item], words: str, total: int | None = None) -> Iterator[Item]:
    """The items, one after the other, with a bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Bar(words, total) as bar:
        for item in items:
            yield item
            bar.advance()


def print_table(
    title: str,
    columns: dict[str, dict[str, Any]],
    rows: Iterable[Iterable[str]],
    bold: Sequence[bool] = (),
    framed: bool = True,
) -> None:
    """Print a table on stdout.

    Args:
        columns: {heading: options of rich's `Table.add_column`}.
        bold: whether a row is set in bold, for the first rows or for all.
    """
    from rich import box
    from rich.table import Table

    style = {} if framed else {"box": box.SIMPLE, "show_edge": False, "pad_edge": False}
    table = Table(title=title, **style)
    for heading, options in columns.items():
        table.add_column(heading, **options)
    for row, strong in zip(rows, itertools.chain(bold, itertools.repeat(False)), strict=False):
        table.add_row(*row, style="bold" if strong else None)
    console().print(table)
