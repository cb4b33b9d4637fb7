"""Building a data set from many records: memory, a kill half-way, the same result, all cores.

    python -m jrm_jax.benchmarks.build_scale [--records=50000] [--small=5000] [--out=docs/FILE.md]
    python -m jrm_jax.benchmarks.build_scale --records=0 --large=3000

Makes EditReward-Data's Hugging Face layout (parquet, pictures inside, seven edits of a source give
21 rows, rows of neighbouring sources mixed), builds it undisturbed from `--small` and from all
records, and all again with `kill -9` half-way. `--large` rows name pictures of a megabyte in a
folder, as EditReward-Data's JSON does: they are built with one process, with one for each core, and
again with a kill. Exit 1 unless all data sets of the same rows are equal byte for byte.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import os
import platform
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image

from jrm_jax.benchmarks.reporting import run_command
from jrm_jax.shell import cores
from jrm_jax.shell.arguments import Parser

EDITS = 7
WINDOW = 420  # rows that are mixed: those of twenty sources
SHARD_EXAMPLES = 100
TRIES = 5
GRACE = 10  # seconds that the workers of a killed build may take to end
WORKERS = max(2, cores.usable())


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


def photo(number: int) -> bytes:
    """A JPEG of about a megabyte: one of a few, told apart by a comment in the file."""
    comment = f"picture {number}".encode()
    data = _noisy(number % 8)
    return data[:2] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + data[2:]


@functools.cache
def _noisy(seed: int) -> bytes:
    """Smooth, with some noise."""
    rng = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    pixels = np.asarray(coarse.resize((1600, 1200), PIL.Image.Resampling.BICUBIC), np.int16)
    noisy = np.clip(pixels + rng.integers(-14, 15, pixels.shape, np.int16), 0, 255)
    file = io.BytesIO()
    PIL.Image.fromarray(noisy.astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_named(folder: Path, count: int) -> Path:
    """The rows of `rows` as JSON, their pictures as files: a photo for each place of a picture."""
    folder.mkdir()
    names: dict[bytes, str] = {}
    found = []
    for row in rows(count, 12):
        for field, value in row.items():
            if isinstance(value, bytes):
                if value not in names:
                    names[value] = f"{len(names)}.jpg"
                    (folder / names[value]).write_bytes(photo(len(names)))
                row[field] = names[value]
        found.append(row)
    (folder / "rows.json").write_text(json.dumps(found))
    return folder / "rows.json"


def start(source: Path, out: Path, workers: int = 1) -> subprocess.Popen:
    """A build, with its processes in a group of their own."""
    command = [
        sys.executable, "-m", "jrm_jax.data.builders", "editreward", f"--data={source}",
        f"--out={out}", "--skip_bad", f"--shard_examples={SHARD_EXAMPLES}", f"--workers={workers}",
    ]  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> tuple[float, list[str]]:
    """(peak resident memory of all its processes together in MB, what was printed)."""
    peak, over = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.2):
            peak = max(peak, memory_of(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    over.set()
    watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the build ended with {process.returncode}: {said}")
    return max(peak, usage.ru_maxrss / 1024), said


def memory_of(group: int) -> float:
    """Resident MB of the processes of a group; what they share counts for each."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()  # from the state on
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == group:
            total += int(fields[21]) * resource.getpagesize()
    return total / 2**20


def position(out: Path) -> int:
    """Rows behind the last complete shard of a build that runs; -1 before there is one."""
    state = out.with_name(f"{out.name}.building") / "state.sqlite"
    try:
        with sqlite3.connect(f"file:{state}?mode=ro", uri=True, timeout=1) as connection:
            found = connection.execute("SELECT value FROM meta WHERE name = 'position'").fetchone()
    except sqlite3.Error:  # not there yet, or just being written
        return -1
    return int(found[0]) if found else -1


def kill_half_way(source: Path, out: Path, half: int, workers: int) -> int:
    """Kill -9 soon after half of the rows; returns the rows that were safe by then."""
    for _ in range(TRIES):
        process = start(source, out, workers)
        while position(out) < half and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        if process.wait() == -signal.SIGKILL and not out.exists():
            ends = time.monotonic() + GRACE
            while memory_of(process.pid):
                if time.monotonic() > ends:
                    sys.exit("the workers of a killed build do not end")
                time.sleep(0.05)
            return position(out)
        shutil.rmtree(out)  # a small build on a busy machine may be over by then
    sys.exit(f"{TRIES} builds were over before they could be killed: take more records")


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def build(source: Path, out: Path, workers: int = 1) -> tuple[float, float, list[str]]:
    """(seconds, peak memory in MB, what was printed) of an undisturbed build."""
    began = time.monotonic()
    memory, said = finish(start(source, out, workers))
    return time.monotonic() - began, memory, said


def check_equal(one: Path, two: Path) -> int:
    """The number of files; ends the program where a file differs."""
    first, second = digests(one), digests(two)
    differing = [name for name in first | second if first.get(name) != second.get(name)]
    if differing:
        sys.exit(f"these files differ: {differing}")
    return len(first)


def kill_and_compare(source: Path, whole: Path, records: int, workers: int) -> str:
    """Killed half-way and gone on with, against an undisturbed build; a line for the report."""
    out = whole.with_name(f"resumed-{whole.name}")
    safe = kill_half_way(source, out, records // 2, workers)
    half_written = len(list(out.with_name(f"{out.name}.building").glob("*array_record*")))
    memory, _ = finish(start(source, out, workers))
    files = check_equal(whole, out)
    return (
        f"Killed (`kill -9`, {workers} workers) with {safe:,} of {records:,} rows behind complete"
        f" shards and {half_written} shard files on the disk; the same command went on from there"
        f" (peak memory {memory:,.0f} MB). All {files} files (shards, descriptions, card, list of"
        " problems) equal those of the undisturbed build byte for byte."
    )


def run(folder: Path, records: int, small: int, side: int, large: int = 0) -> list[str]:
    """The report; ends the program where something is not as it must be."""
    lines = ["| records | source | seconds | peak memory | printed |", "|---|---|---|---|---|"]
    for count in filter(None, (small, records)):
        source = folder / f"source{count}.parquet"
        write_source(source, count, side)
        seconds, memory, said = build(source, folder / f"whole{count}")
        size = source.stat().st_size / 2**20
        words = "; ".join(line.strip() for line in said[:3]).replace(str(folder), "DIR")
        lines.append(f"| {count:,} | {size:,.0f} MB | {seconds:.0f} | {memory:,.0f} MB | {words} |")
        print(lines[-1], flush=True)
    if records:
        lines += ["", kill_and_compare(source, folder / f"whole{records}", records, WORKERS)]
        print(lines[-1], flush=True)
    return lines + (compare_workers(folder, large) if large else [])


def compare_workers(folder: Path, count: int) -> list[str]:
    """Pictures of a megabyte as files, with one process and with a worker for each core."""
    source = write_named(folder / "large", count)
    pictures = [path.stat().st_size for path in source.parent.glob("*.jpg")]
    lines = [
        "",
        f"{count:,} rows that name {len(pictures):,} pictures, {sum(pictures) / 2**20:,.0f} MB"
        f" together, {min(pictures) / 2**20:.2f} MB or more each:",
        "",
        "| workers | seconds | peak memory of all processes |",
        "|---|---|---|",
    ]
    build(source, folder / "warm", WORKERS)  # the files are in memory afterwards
    found = {}
    for workers in (1, WORKERS):
        found[workers], memory, _ = build(source, folder / f"workers{workers}", workers)
        lines.append(f"| {workers} | {found[workers]:.1f} | {memory:,.0f} MB |")
        print(lines[-1], flush=True)
    check_equal(folder / "workers1", folder / f"workers{WORKERS}")
    lines += ["", f"{found[1] / found[WORKERS]:.2f} times as fast, and equal byte for byte.", ""]
    print(lines[-2], flush=True)
    lines.append(kill_and_compare(source, folder / "workers1", count, WORKERS))
    print(lines[-1], flush=True)
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m jrm_jax.benchmarks.build_scale", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--small", type=int, default=5_000)
    parser.add_argument("--side", type=int, default=64, help="pixels of a picture's side")
    parser.add_argument("--large", type=int, default=0, help="rows with pictures of a megabyte")
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    run_command(parser, argv, run, "Building from many records", machine)


if __name__ == "__main__":
    main()
