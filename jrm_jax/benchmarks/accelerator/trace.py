"""A profile as a table: what ran on the device, by its time."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import jax

MOST = 30  # rows


def kernels(folder: Path, steps: int) -> list[dict[str, Any]]:
    """[{name, calls and milliseconds of a step, share of all}], the longest first, of the trace in
    `folder`; the last row sums up what is left out. On a CPU the compiler's threads are read."""
    count: collections.Counter[str] = collections.Counter()
    total: collections.Counter[str] = collections.Counter()
    for path in folder.rglob("*.xplane.pb"):
        for line in _lines(jax.profiler.ProfileData.from_file(str(path))):
            for event in line.events:
                count[event.name] += 1
                total[event.name] += event.duration_ns / 1e6 / steps
    whole = sum(total.values())
    ranked = total.most_common()
    rows = [(name, count[name] / steps, ms) for name, ms in ranked[:MOST]]
    if rest := ranked[MOST:]:
        calls = sum(count[name] for name, _ in rest) / steps
        rows.append((f"{len(rest)} others", calls, sum(ms for _, ms in rest)))
    return [
        {"name": name[:160], "calls": calls, "ms": ms, "share": ms / max(whole, 1e-9)}
        for name, calls, ms in rows
    ]


def _lines(profile: Any) -> list[Any]:
    planes = list(profile.planes)
    device = [plane for plane in planes if plane.name.startswith("/device:")]
    found = [line for p in device for line in p.lines if "Stream" in line.name]
    found = found or [line for p in device for line in p.lines if line.name == "XLA Ops"]
    return found or [line for p in planes for line in p.lines if "XLA" in line.name]
