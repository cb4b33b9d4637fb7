"""What one TPU chip can do: the numbers behind every bound, and the names of topologies.

Sources, read in November 2026: the "Key specifications" tables of docs.cloud.google.com/tpu/docs/
v5e, /v5p, /v6e and /tpu7x. Bandwidths of links are the documented bidirectional totals of a chip
halved: what it can send while it receives as much. Network bandwidth between slices is the
documented one per chip (v5p), or per pod or host divided by its chips.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jrm_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """Per chip: bfloat16 FLOP/s, bytes of memory, and bytes/s of memory, links and network.

    `devices`: JAX devices of a chip; each has its share of everything.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    dimensions: int
    devices: int = 1


# name: documented figures (TFLOP/s, GiB, GB/s, bidirectional GB/s, network Gbit/s per chip)
CHIPS: dict[str, Chip] = {
    # network: 6.4 Tbit/s for a pod of 256 chips
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 400e9 / 2, 6.4e12 / 256 / 8, 2),
    # network: 50 Gbit/s per chip
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 1200e9 / 2, 50e9 / 8, 3),
    # network: 4 x 200 Gbit/s per host of 8 chips
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 800e9 / 2, 4 * 200e9 / 8 / 8, 2),
}


@dataclass(frozen=True)
class Topology:
    """A slice's kind of chip and shape, and how many such slices."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices


def parse_topology(text: str, slices: int = 1) -> Topology:
    """'v5p:4x4x4' -> Topology.

    Raises:
        UserError: not of that form, an unknown chip, or a shape of the wrong number of dimensions.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    examples = "v5e:16x16, v5p:4x4x4 or v6e:8x8"
    if match is None:
        raise UserError(f"--topology={text!r} is no CHIP:SHAPE, such as {examples}")
    name, shape = match[1], tuple(int(size) for size in match[2].split("x"))
    if name not in CHIPS:
        raise UserError(f"--topology={text!r}: chip {name!r} is none of {', '.join(CHIPS)}")
    chip = CHIPS[name]
    if len(shape) != chip.dimensions or min(shape) < 1:
        raise UserError(
            f"--topology={text!r}: a {name} slice has {chip.dimensions} dimensions, such as "
            f"{examples}"
        )
    if slices < 1:
        raise UserError(f"--num_slices={slices}: give 1 or more")
    return Topology(text, chip, shape, slices)
