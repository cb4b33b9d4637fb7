"""What a person sees: text as typed, bars on a terminal, quiet files."""

import contextlib
import os
import select
import sys
import time

import pytest

from jrm_jax import evaluate, score
from jrm_jax.data.builders import _build_progress
from jrm_jax.shell import report, terminal

HOSTILE = "Remove the [/b] tag [red]now[/red] :cat: [@click=x]"


@contextlib.contextmanager
def screen():
    """stderr is a terminal here; a function that reads what was written there since."""
    master, slave = os.openpty()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(slave, "w", encoding="utf-8") as stderr:
        patch.setattr(sys, "stderr", stderr)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "150")

        def read() -> str:
            stderr.flush()
            found = b""
            while select.select([master], [], [], 0.2)[0]:
                found += os.read(master, 1 << 20)
            return found.decode()

        yield read
    os.close(master)


def shown(text: str) -> str:
    return " ".join(text.split())


# Words of a user's


def test_score_shows_what_was_typed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    rows = [
        {"picture": f"[/i]{HOSTILE}.png", "reward": 0.5, "normalised": None, "critique": HOSTILE},
        {"picture": ":dog:.png", "error": "[/]"},
    ]
    score.print_table({"instruction": HOSTILE, "candidates": rows})
    out = shown(capsys.readouterr().out)
    assert out.count(HOSTILE) == 3 and f"[/i]{HOSTILE}.png" in out and ":dog:.png" in out


def test_evaluate_shows_what_the_files_say(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    row = {"section": f"1{HOSTILE}", "metric": f"2{HOSTILE}", "value": 0.5, "low": 0.4, "high": 0.6,
           "count": 1, "total": 1, "headline": True, "baselines": {f"3{HOSTILE}": 0.5}}  # fmt: skip
    evaluate.print_result({
        "benchmark": "jsonl", "model": f"4{HOSTILE}", "rows": [row],
        "probe": {"rows": [{"name": f"5{HOSTILE}", "value": f"6{HOSTILE}"}]},
        "issues": {f"7{HOSTILE}": {"count": 1, "items": [f"8{HOSTILE}"]}},
        "remarks": [f"9{HOSTILE}"],
    })  # fmt: skip
    out = shown(capsys.readouterr().out)
    assert [n for n in range(1, 10) if f"{n}{HOSTILE}" not in out] == []


def test_results_show_the_names_of_the_config(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    report.print_results({
        "config": "[/x]:cat:", "step": 3, "[b]:dog:/pairs": 2.0, "seconds": 1.0,
    })  # fmt: skip
    out = capsys.readouterr().out
    assert "[/x]:cat:" in out and "[b]:dog:" in out


def test_a_bar_shows_the_names_of_files():
    with screen() as read:
        with _build_progress() as progress:
            progress(HOSTILE, 1, 2, {"rows left out": 3})
        seen = read()
        assert HOSTILE in seen and "rows, 3 left out" in seen
        with terminal.Bar("[/b]\x1b[5n") as bar:
            bar.say(HOSTILE)
        seen = read()
        assert HOSTILE in seen and "[/b]\\x1b[5n" in seen


def test_a_terminal_is_not_told_what_to_do(capsys):
    """Clearing the screen, for example, or setting the window's title."""
    terminal.console().print("a\x1b[2Jb\x9b\x07\tc")
    terminal.print_table("\x1b]0;title\x07", {"\x1bx": {}}, [["\x1by\nz" + 30 * "."]])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\x9b" not in out
    assert "a\\x1b[2Jb\\x9b\\x07" in out and "\\x1b]0;title\\x07" in out and "\\x1by" in out


# Bars


def test_short_work_leaves_no_trace_in_a_file(capsys):
    assert list(terminal.track(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_long_work_is_a_plain_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with terminal.Bar("scoring [/b]", 5000) as bar:
        for _ in range(3):
            now[0] += 20
            bar.advance(1000)
        now[0] += 100
        bar.show(4000, note="(1 odd)")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "scoring [/b]: 2,000 of 5,000, 1:00 to go",
        "scoring [/b]: 4,000 of 5,000 (1 odd), 0:40 to go",
    ]


def test_a_bar_gives_the_cursor_back():
    hidden, visible = "\x1b[?25l", "\x1b[?25h"
    with screen() as read:
        with pytest.raises(RuntimeError), terminal.Bar("work", 2) as bar:
            bar.advance()
            raise RuntimeError
        seen = read()
        assert 0 <= seen.rfind(hidden) < seen.rfind(visible) and "1/2" in seen
        terminal.show_cursor()
        assert visible in read()
