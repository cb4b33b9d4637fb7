"""A measurement as a command: its options, a folder that goes away, and a page with `--out`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from jrm_jax.shell import disk
from jrm_jax.shell.stop import ending


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    run: Callable[..., list[str]],
    title: str,
    where: str,
) -> None:
    """Call run(folder, **options), which returns the lines of a Markdown page.

    Args:
        parser: its `prog` is the command, its options are those of `run`.
        where: what it ran on, for the page.
    """
    parser.add_argument("--out", type=Path, help="write the report to this file, too")
    options = vars(parser.parse_args(argv))
    out = options.pop("out")
    with ending(), tempfile.TemporaryDirectory() as folder:
        if out:
            disk.check_file(out)
        lines = run(Path(folder), **options)
    if out:
        given = {name: value for name, value in options.items() if value is not False}
        words = (f"--{name}" if v is True else f"--{name}={v}" for name, v in given.items())
        command = " ".join([parser.prog, *words])
        out.write_text("\n".join([f"# {title}", "", f"`{command}` ({where}):", "", *lines, ""]))
