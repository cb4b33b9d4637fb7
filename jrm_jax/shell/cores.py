"""How many processors this process may use, which need not be all that the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: processor time, of how much time


def bound() -> int:
    """Processors that the system runs this process on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable() -> int:
    """So many threads or processes have a processor each: of `bound`, as many as a container's
    quota pays for."""
    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
        return max(1, min(bound(), math.ceil(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no container, or 'max': no quota
        return bound()
