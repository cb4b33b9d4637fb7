"""Seconds of something that is done when its call returns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

MOST = 25.0  # seconds of a measurement
WARM_UP = 2
STEPS = 4  # of training at a time: neither side waits for a step's loss before it starts the next


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def spread(run: Callable[[], object], rounds: int, each: int = 1) -> dict[str, float]:
    """Of so many calls, or of as many as `MOST` allows, after those that warm up: the median in
    `seconds`, the `fastest`, the `slowest`, divided by `each`: what a call does so many times."""
    began = time.perf_counter()
    for _ in range(WARM_UP):
        run()
    times = [seconds(run)]
    while len(times) < rounds and time.perf_counter() - began < MOST:
        times.append(seconds(run))
    found = {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}
    return {name: value / each for name, value in found.items()}


def rate(run: Callable[[], object], side: int, products: int) -> dict[str, float]:
    """TFLOP/s of a call that takes so many products of square matrices; the best of five."""
    run()
    best = min(seconds(run) for _ in range(5))
    return {
        "side": side,
        "seconds": best / products,
        "tflop_per_second": 2 * side**3 * products / best / 1e12,
    }
