"""What this machine's accelerator does with real sizes, in one command and without downloads.

    python -m jrm_jax.benchmarks.accelerator [--minutes=8] [--parts=a,b] [--out=FILE] [--page=FILE]

Every part runs in a process of its own with a time limit, the most important first, so that a
failure costs one row; parts for which no time is left are named as such. The JSON file is written
again after every row. Parts that it holds already are kept and not run again, unless --parts names
them: a second call goes on where the first one ended. --tiny tries all of it with small sizes, on
any machine.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jrm_jax.benchmarks.accelerator.page import make_page
from jrm_jax.benchmarks.accelerator.parts import PARTS, environment, run
from jrm_jax.errors import UserError
from jrm_jax.shell.arguments import Parser

PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "optax", "torch",
    "transformers", "flash-attn", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip
POLL = 0.5  # seconds
LEAST = 15.0  # seconds: with less left, a part is not begun
BY_HAND = "\n## Beside the table\n"  # from here on a page is kept as it is
TAIL = 25  # lines of a failed part's words that are kept


def machine() -> dict[str, Any]:
    """Where it runs; nothing here touches the accelerator."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    asked = "--query-gpu=name,driver_version,memory.total"
    return {
        "cards": _output(["nvidia-smi", asked, "--format=csv,noheader"]).splitlines(),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _output(["git", "rev-parse", "--short", "HEAD"]),
    }


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


class Record:
    """The numbers, in a file that is whole at any time."""

    def __init__(self, path: Path):
        self.path = path
        self.data: dict[str, Any] = {"parts": {}}
        if path.exists():
            try:
                self.data = json.loads(path.read_text())
                self.data["parts"].items()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"--out={path} is no record of this command: move it") from error

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        return self.data["parts"]

    def write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n")
        temporary.replace(self.path)


def measure(name: str, record: Record, tiny: bool, left: float, cache: str) -> None:
    """Run a part in a process of its own; at most `left` seconds. `cache`: of compiled programs."""
    limit = min(PARTS[name].seconds, left)
    entry = {"words": PARTS[name].words, "status": "running", "seconds": 0.0, "rows": []}
    record.parts[name] = entry
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        rows.touch()
        command = [sys.executable, "-u", "-m", __package__, f"--part={name}", f"--rows={rows}"]
        command += ["--tiny"] * tiny
        with log.open("w") as out, log.open() as told:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment(name, cache),
                start_new_session=True,
            )  # fmt: skip
            try:
                while process.poll() is None and time.monotonic() - began < limit:
                    time.sleep(POLL)
                    _follow(entry, rows, told, began)
                    record.write()
                entry["status"] = {None: f"stopped after {limit:.0f} s", 0: "done"}.get(
                    process.poll(), f"failed with status {process.poll()}"
                )
            finally:
                with contextlib.suppress(ProcessLookupError):  # what it has started, too
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            _follow(entry, rows, told, began)
        if entry["status"] != "done":
            entry["log"] = log.read_text(errors="replace").splitlines()[-TAIL:]
    record.write()
    print(f"== {name}: {entry['status']}, {entry['seconds']:.0f} s", flush=True)


def _follow(entry: dict[str, Any], rows: Path, told: Any, began: float) -> None:
    """Take over what the process has written so far."""
    for line in told:
        print(f"   {line.rstrip()[:300]}", flush=True)
    whole = rows.read_text().rpartition("\n")[0]
    entry["rows"] = [json.loads(line) for line in whole.splitlines()]
    entry["seconds"] = time.monotonic() - began


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog=f"python -m {__package__}", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--parts", default="", help=f"default: {','.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"))
    parser.add_argument("--page", type=Path, help="a Markdown page of the numbers")
    parser.add_argument("--commit", default="", help="of the code, where git does not know it")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it out")
    parser.add_argument("--part", choices=[*PARTS], help="for this command's own processes")
    parser.add_argument("--rows", type=Path, help="for this command's own processes")
    args = parser.parse_args(argv)
    if args.part:
        run(args.part, args.tiny, args.rows)
        return
    began = time.monotonic()
    asked = [name for name in args.parts.split(",") if name]
    if unknown := set(asked) - set(PARTS):
        parser.error(f"no part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    try:
        record = Record(args.out)
    except UserError as error:
        parser.error(str(error))
    given = " ".join(sys.argv[1:] if argv is None else argv)
    record.data |= {
        "command": f"python -m {__package__} {given}".strip(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "tiny": args.tiny,
        "machine": machine(),
    }
    if args.commit:
        record.data["machine"]["commit"] = args.commit
    finished = {name for name, part in record.parts.items() if part["status"] == "done"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        for name in [each for each in PARTS if each in (asked or set(PARTS) - finished)]:
            left = 60 * args.minutes - (time.monotonic() - began)
            if left >= LEAST:
                measure(name, record, args.tiny, left, cache)
                continue
            words = {"words": PARTS[name].words, "status": "not reached", "seconds": 0, "rows": []}
            record.parts.setdefault(name, words)
    record.write()
    page = make_page(record.data)
    print(page, flush=True)
    if args.page:
        before = args.page.read_text() if args.page.exists() else ""
        args.page.write_text(page + "".join(before.partition(BY_HAND)[1:]))


if __name__ == "__main__":
    main()
