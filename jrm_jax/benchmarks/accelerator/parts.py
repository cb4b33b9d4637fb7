"""The measurements, the most important first, and the process in which one of them runs."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jrm_jax.model.attention import IMPLEMENTATIONS
from jrm_jax.model.layers import REMAT

Row = dict[str, Any]


class Part(NamedTuple):
    """side: 'ours', 'theirs' or 'commands'. what: the function there. seconds: its limit."""

    words: str
    side: str
    what: str
    options: dict[str, Any]
    seconds: float


def _table() -> dict[str, Part]:
    big, large = {"model": "qwen3_vl_2b"}, {"model": "qwen3_vl_8b"}
    hybrid = {"model": "qwen3_5_2b", "remats": REMAT, "profile": True}
    many = {**big, "candidates": 8}  # of one prompt, as in online reinforcement learning
    adapters = {**large, "adapters": True, "remats": REMAT}
    parts = {
        "rate": Part("a matrix product", "ours", "product", {}, 60),
        "rate_torch": Part("the same in PyTorch", "theirs", "product", {}, 60),
        "step_2b": Part(
            "joint step, 2B", "ours", "train",
            {**big, "remats": REMAT, "profile": True}, 200,
        ),
        "step_2b_torch": Part("the same in PyTorch", "theirs", "train", big, 120),
        "start": Part("start of the default run", "commands", "start", {}, 200),
        "score_2b": Part("scoring, 2B", "ours", "score", big, 90),
        "score_2b_torch": Part("the same in PyTorch", "theirs", "score", big, 60),
        "score_2b_of8": Part("scoring, 2B, groups of 8", "ours", "score", many, 90),
        "score_2b_of8_torch": Part("the same in PyTorch", "theirs", "score", many, 60),
        "losses": Part("equal first losses", "theirs", "losses", big, 150),
        "parity": Part("parity tests", "commands", "parity", {}, 150),
        "step_qwen3_5": Part("joint step, Qwen3.5 2B", "ours", "train", hybrid, 200),
        "step_8b": Part("joint step, 8B with adapters", "ours", "train", adapters, 200),
        "score_8b": Part("scoring, 8B", "ours", "score", large, 120),
        "score_8b_torch": Part("the same in PyTorch", "theirs", "score", large, 90),
    }  # fmt: skip
    for name in IMPLEMENTATIONS:
        if name != "auto":
            options = {**big, "attention": name, "remats": REMAT}
            words = f"joint step, 2B, attention {name}"
            parts[f"step_2b_{name}"] = Part(words, "ours", "train", options, 150)
    for remat in REMAT[::-1]:
        options = {**big, "remats": (remat,)}
        words = f"joint step, 2B, remat {remat}"
        parts[f"step_2b_remat_{remat}"] = Part(words, "ours", "train", options, 150)
    return parts


PARTS = _table()


def run(name: str, tiny: bool, path: Path) -> None:
    """Run a part and append its rows to a file of JSON lines as they come."""
    from jrm_jax.benchmarks.accelerator import case

    part, sizes = PARTS[name], case.TINY if tiny else case.REAL
    with path.open("a") as file:
        for row in _rows(part, tiny, sizes):
            file.write(json.dumps(row) + "\n")
            file.flush()
            shown = {key: value for key, value in row.items() if key != "kernels"}
            print(f"{name}: {json.dumps(shown)}", flush=True)


def _rows(part: Part, tiny: bool, sizes: Any) -> Iterator[Row]:
    if part.side == "commands":
        from jrm_jax.benchmarks.accelerator import commands

        yield from getattr(commands, part.what)(tiny)
        return
    if part.side == "ours":
        from jrm_jax.benchmarks.accelerator import ours as side
    else:
        from jrm_jax.benchmarks.accelerator import theirs as side
    measure: Callable[..., Iterator[Row]] = getattr(side, part.what)
    if part.what == "product":
        yield from measure(sizes)
    elif part.what == "losses":
        with tempfile.TemporaryDirectory() as folder:
            yield from measure(Path(folder), **part.options)
    else:
        yield from measure(sizes, tiny, **part.options)


def environment(name: str, cache: str) -> dict[str, str]:
    """What a part's process needs to be told before it imports JAX or PyTorch. `cache`: a folder
    for compiled programs that all parts share, and no other run."""
    given = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if name in ("losses", "parity"):  # several programs on one device
        given["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    elif PARTS[name].side == "ours":
        given["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.93"
    return given | os.environ
