"""Numbers for Prometheus, in a registry of their own."""

from __future__ import annotations

from typing import Any

import prometheus_client
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)


class Metrics:
    """One attribute for each series."""

    def __init__(self):
        self.registry = registry = prometheus_client.CollectorRegistry()

        def make(kind: type, name: str, words: str, labels: tuple = (), **options: Any):
            return kind(f"jrm_{name}", words, labels, registry=registry, **options)

        self.requests = make(Counter, "requests", "Answered requests", ("route", "status"))
        self.rejections = make(Counter, "rejections", "Refused requests", ("reason",))
        self.seconds = make(
            Histogram, "request_seconds", "From the head to the end of the answer", ("route",),
            buckets=SECONDS,
        )  # fmt: skip
        self.groups = make(Counter, "groups", "Groups scored")
        self.candidates = make(Counter, "candidates", "Candidates scored")
        self.pictures = make(Counter, "pictures", "Pictures scored, sources among them")
        self.faults = make(Counter, "faults", "Candidates answered with an error", ("code",))
        self.batch_groups = make(Histogram, "batch_groups", "Groups of a batch", buckets=ROWS)
        self.batch_rows = make(Counter, "batch_rows", "Rows of all batches, empty ones among them")
        self.program_seconds = make(
            Histogram, "program_seconds", "One call of the device, by bucket", ("bucket",),
            buckets=SECONDS,
        )  # fmt: skip
        self.cost = make(Gauge, "cost_flops", "FLOPs of everything that was run, padding included")
        self.cost_used = make(Gauge, "cost_used_flops", "Those that were not padding")
        self.padded = make(Gauge, "padded_share", "Share of them that was padding, since the start")
        self.device_errors = make(Counter, "device_errors", "Calls of the device that failed")
        self.waiting = make(Gauge, "waiting_groups", "Groups in the queue")
        self.pending = make(Gauge, "pending_groups", "Groups accepted and not answered")
        self.ready = make(Gauge, "ready", "1: loaded, compiled and not draining")

    def text(self) -> bytes:
        """What GET /metrics answers."""
        return prometheus_client.generate_latest(self.registry)
