"""Building a data set from many records: memory, a kill half-way, the same result.

    python -m jrm_jax.benchmarks.build_scale [--records=50000] [--small=5000] [--out=docs/FILE.md]

Makes EditReward-Data's Hugging Face layout (parquet, pictures inside, seven edits of a source give
21 rows, rows of neighbouring sources mixed), builds it undisturbed from `--small` and from all
records, and all again with `kill -9` half-way. Exit 1 unless the resumed data set equals the
undisturbed one byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import platform
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image

from jrm_jax.benchmarks.reporting import run_command
from jrm_jax.shell.arguments import Parser

EDITS = 7
WINDOW = 420  # rows that are mixed: those of twenty sources
SHARD_EXAMPLES = 100
TRIES = 5


def picture(seed: int, side: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def rows(count: int, side: int):
    """Rows of the Hugging Face layout; every 500th has a broken picture."""
    pairs = list(itertools.combinations(range(EDITS), 2))
    made = 0
    for source in itertools.count():
        rng = np.random.default_rng(source)
        pictures = [picture(source * 10 + i, side) for i in range(EDITS + 1)]
        scores = rng.integers(1, 5, (EDITS, 2))
        for index, (i, j) in enumerate(pairs):
            row = {"key": f"source{source}", "unique_key": f"source{source}_{index}",
                   "instruction": f"Edit number {source}", "source_img": pictures[-1]}  # fmt: skip
            for side_name, edit in (("left", i), ("right", j)):
                row[f"{side_name}_output_image"] = pictures[edit]
                row[f"{side_name}_instruction_following_score"] = float(scores[edit, 0])
                row[f"{side_name}_quality_aesthetic_score"] = float(scores[edit, 1])
                row[f"{side_name}_overall_score"] = float(scores[edit].sum())
            gap = int(scores[i].sum() - scores[j].sum())
            row["vote_type"] = "tie" if not gap else "leftvote" if gap > 0 else "rightvote"
            if made % 500 == 499:
                row["right_output_image"] = row["right_output_image"][:-300]
            yield row
            made += 1
            if made == count:
                return


def write_source(path: Path, count: int, side: int) -> None:
    """Parquet, a window of mixed rows at a time."""
    import pyarrow
    import pyarrow.parquet

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    writer, rng = None, np.random.default_rng(0)
    source = rows(count, side)
    while window := list(itertools.islice(source, WINDOW)):
        rng.shuffle(window)
        columns = {}
        for name in window[0]:
            values = [row[name] for row in window]
            if name.endswith(("_img", "_image")):
                values = pyarrow.array([{"bytes": v, "path": None} for v in values], image)
            columns[name] = values
        table = pyarrow.table(columns)
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def start(source: Path, out: Path) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "jrm_jax.data.builders", "editreward", f"--data={source}",
        f"--out={out}", "--skip_bad", f"--shard_examples={SHARD_EXAMPLES}",
    ]  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[float, list[str]]:
    """(peak resident memory in MB, what was printed)."""
    said = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the build ended with {process.returncode}: {said}")
    return usage.ru_maxrss / 1024, said


def position(out: Path) -> int:
    """Rows behind the last complete shard of a build that runs; -1 before there is one."""
    state = out.with_name(f"{out.name}.building") / "state.sqlite"
    try:
        with sqlite3.connect(f"file:{state}?mode=ro", uri=True, timeout=1) as connection:
            found = connection.execute("SELECT value FROM meta WHERE name = 'position'").fetchone()
    except sqlite3.Error:  # not there yet, or just being written
        return -1
    return int(found[0]) if found else -1


def kill_half_way(source: Path, out: Path, half: int) -> int:
    """Kill -9 soon after half of the rows; returns the rows that were safe by then."""
    for _ in range(TRIES):
        process = start(source, out)
        while position(out) < half and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        if process.wait() == -signal.SIGKILL and not out.exists():
            return position(out)
        shutil.rmtree(out)  # a small build on a busy machine may be over by then
    sys.exit(f"{TRIES} builds were over before they could be killed: take more records")


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def run(folder: Path, records: int, small: int, side: int) -> list[str]:
    """The report; ends the program where something is not as it must be."""
    lines = ["| records | source | seconds | peak memory | printed |", "|---|---|---|---|---|"]
    for count in filter(None, (small, records)):
        source = folder / f"source{count}.parquet"
        write_source(source, count, side)
        began = time.monotonic()
        memory, said = finish(start(source, folder / f"whole{count}"))
        size = source.stat().st_size / 2**20
        words = "; ".join(line.strip() for line in said[:3]).replace(str(folder), "DIR")
        lines.append(
            f"| {count:,} | {size:,.0f} MB | {time.monotonic() - began:.0f} | {memory:,.0f} MB |"
            f" {words} |"
        )
        print(lines[-1], flush=True)
    out = folder / f"resumed{records}"
    safe = kill_half_way(source, out, records // 2)
    half_written = len(list(out.with_name(f"{out.name}.building").glob("*array_record*")))
    memory, _ = finish(start(source, out))
    first, second = digests(folder / f"whole{records}"), digests(out)
    differing = [name for name in first | second if first.get(name) != second.get(name)]
    if differing:
        sys.exit(f"these files differ: {differing}")
    lines += [
        "",
        f"Killed (`kill -9`) with {safe:,} of {records:,} rows behind complete shards and"
        f" {half_written} shard files on the disk; the same command went on from there (peak memory"
        f" {memory:,.0f} MB). All {len(first)} files (shards, descriptions, card, list of problems)"
        " equal those of the undisturbed build byte for byte.",
    ]
    print(lines[-1])
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m jrm_jax.benchmarks.build_scale", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--small", type=int, default=5_000)
    parser.add_argument("--side", type=int, default=64, help="pixels of a picture's side")
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    run_command(parser, argv, run, "Building from many records", machine)


if __name__ == "__main__":
    main()
