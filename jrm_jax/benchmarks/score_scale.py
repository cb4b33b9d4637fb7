"""Scoring many groups: memory does not grow with them, and few programs serve all sizes.

    python -m jrm_jax.benchmarks.score_scale --model=FOLDER [--small=200] [--groups=20000]
        [--pairs=400] [--out=docs/FILE.md]

Memory: a process scores `--small` groups, another `--groups`, each with a list of paths
(`score_batch`), with such a list after `warm`, so that both have the same programs, and with a
generator that draws pictures (`iter_scores`). Programs: `--pairs`
made-up pairs in the layout of Multimodal RewardBench 2 (no to four pictures in a prompt, one to
four in an answer, texts alone, 300 to 2,000 pixels) through `jrm_jax.evaluate`, with an empty cache
of compiled programs.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from jrm_jax import cli
from jrm_jax.benchmarks.reporting import run_command
from jrm_jax.shell.arguments import Parser

FILES = 64  # pictures of a folder
WORDS = "make the white cat on left side red and keep everything else of this picture same".split()
TASKS = ("t2i", "edit", "interleaved", "reasoning")
MODULE = "jrm_jax.benchmarks.score_scale"
WAYS = ("list", "list, warm", "generator")


def draw(rng: np.random.Generator, low: int, high: int) -> PIL.Image.Image:
    """A blurred picture with sides from `low` to `high` pixels."""
    small = rng.integers(0, 256, (12, 12, 3), np.uint8)
    return PIL.Image.fromarray(small).resize(tuple(rng.integers(low, high + 1, 2)))


def draw_folder(folder: Path, low: int, high: int) -> list[str]:
    folder.mkdir(parents=True)
    rng, names = np.random.default_rng(0), []
    for index in range(FILES):
        names.append(str(folder / f"{index}.jpg"))
        draw(rng, low, high).save(names[-1], quality=80)
    return names


def write_pairs(folder: Path, count: int) -> None:
    """`evaluation/mmrb2.py` has the layout."""
    names, rng = draw_folder(folder / "images", 300, 2000), np.random.default_rng(1)
    tasks: dict[str, list[dict]] = {task: [] for task in TASKS}

    def text(low: int, high: int) -> list:
        return ["text", " ".join(rng.choice(WORDS, int(rng.integers(low, high + 1))))]

    def pictures(low: int, high: int) -> list[list]:
        chosen = rng.choice(names, int(rng.integers(low, high + 1)))
        return [["image", str(name)] for name in chosen]

    def answer(task: str) -> list[list]:
        if task == "reasoning":
            return [text(1, 80)]
        if task != "interleaved":
            return pictures(1, 1)
        return [part for picture in pictures(1, 4) for part in (text(3, 30), picture)]

    sources = {"t2i": (0, 0), "edit": (1, 4), "interleaved": (0, 4), "reasoning": (0, 2)}
    for index in range(count):
        task = TASKS[index % len(TASKS)]
        words = text(2, 400) if rng.random() < 0.02 else text(5, 60)
        tasks[task].append({
            "id": f"{task}_{index}", "prompt_source": "drawn", "prompt_metadata": {},
            "prompt_content": [words, *pictures(*sources[task])],
            "response_a": {"model_name": "a", "response_content": answer(task)},
            "response_b": {"model_name": "b", "response_content": answer(task)},
            "chosen": "AB"[int(rng.integers(2))], "human_annotations": [4, 5, 6],
        })  # fmt: skip
    for task, pairs in tasks.items():
        (folder / f"{task}.json").write_text(json.dumps({"pairs": pairs}))


def own_process(*arguments: Any) -> list[str]:
    """Lines that a command wrote, compiled programs not kept."""
    environment = os.environ | {"JRM_COMPILATION_CACHE": "off"}
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def score(model: str, way: str, count: int, folder: Path) -> None:
    """Prints seconds, the peak resident memory in megabytes and what was done."""
    from jrm_jax.serving.groups import Group
    from jrm_jax.serving.reward_model import RewardModel

    names = sorted(map(str, folder.glob("*.jpg")))

    def groups() -> Iterator[Group]:
        rng = np.random.default_rng(2)
        for _ in range(count):
            if way != "generator":
                source, *edits = map(str, rng.choice(names, 3))
            else:
                source, *edits = (draw(rng, 32, 64) for _ in range(3))
            yield Group(" ".join(rng.choice(WORDS, int(rng.integers(5, 40)))), source, edits)

    loaded = RewardModel.load(model)
    if way == "list, warm":
        loaded.warm()
    began = time.monotonic()
    lazy = way == "generator"
    scores = loaded.iter_scores(groups()) if lazy else loaded.score_batch(list(groups()))
    number = sum(1 for _ in scores)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([number, seconds, peak, loaded.describe_work()]))


def run(folder: Path, model: str, small: int, groups: int, pairs: int) -> list[str]:
    draw_folder(folder / "pictures", 32, 64)
    lines = ["| way | groups | seconds | peak memory | |", "|---|---|---|---|---|"]
    for way in WAYS:
        for count in (small, groups):
            told = own_process(MODULE, "--score", model, way, count, folder / "pictures")
            number, seconds, peak, work = json.loads(told[-1])
            lines.append(f"| {way} | {number:,} | {seconds:.0f} | {peak:.0f} MB | {work} |")
            print(lines[-1], flush=True)
    write_pairs(folder / "pairs", pairs)
    began, out = time.monotonic(), folder / "result.json"
    own_process("jrm_jax.evaluate", f"--checkpoint={model}", "--benchmark=mmrb2",
                f"--data={folder / 'pairs'}", f"--out={out}")  # fmt: skip
    seconds, work = time.monotonic() - began, json.loads(out.read_text())["work"]
    lines += ["", f"`evaluate --benchmark=mmrb2`, {pairs} pairs: {seconds:.0f} s; {work}."]
    print(lines[-1])
    return lines


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--score"]:
        cli.keep_memory()
        model, way, count, folder = arguments[1:]
        score(model, way, int(count), Path(folder))
        return
    parser = Parser(prog=f"python -m {MODULE}",
                    description=__doc__.splitlines()[0])  # fmt: skip
    parser.add_argument("--model", required=True, help="a run's folder, or an exported one")
    parser.add_argument("--small", type=int, default=200)
    parser.add_argument("--groups", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=400)
    where = f"{os.cpu_count()} cores, {platform.machine()}"
    run_command(parser, argv, run, "Scoring many groups", where)


if __name__ == "__main__":
    main()
