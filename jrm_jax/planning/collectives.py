"""What a compiled program sends between devices, read from its HLO text.

Loops count with their trip counts, unlike in the compiler's own cost analysis. Bytes are those
that one device sends when each collective runs as a ring: n devices gather m bytes by sending
m * (n - 1) / n each, scatter sums likewise, and reduce in twice that. What crosses TPU slices is
handed to the host by a `send`, which names its kind.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
         "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}  # fmt: skip
_SCATTERING = "all-reduce-scatter"  # a TPU's fusion of a sum and the choice of the own part of it
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_OPERATION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"(?:^|[\s)}])([a-z][a-z\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations|true_computation|"
                     r"false_computation)=\{?%?([\w.\-]+)")  # fmt: skip
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"^[su]32\[\]\S* constant\((\d+)\)")
_ACROSS = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?(?:[^{]*)\{([^}]*)\}")
_ORDER = re.compile(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{} ]*)\}")


class Traffic(NamedTuple):
    """Runs of a kind of collective in a step, and the bytes that a device sends for them."""

    count: int
    bytes: int


class Collectives(NamedTuple):
    """By kind, within a slice and across slices."""

    links: dict[str, Traffic]
    network: dict[str, Traffic]


def read_collectives(program: str, devices: int, slices: int = 1) -> Collectives:
    """The collectives of one run of an optimised HLO module.

    Devices are numbered slice by slice. Raises ValueError where a loop's trip count is not stated.
    """
    computations, entry = _parse(program)
    # A TPU may run one collective beside several products: it then stands in each of their
    # fusions, with the same channel, and counts once.
    channels: dict[tuple, tuple[int, str, str, str]] = {}
    for name, times in _runs(computations, entry).items():
        for place, (operation, line) in enumerate(computations[name]):
            if _is_transfer(operation, line) and times:
                channel = _CHANNEL.search(line)
                key = (operation, channel[1]) if channel else (name, place)
                run = (times, operation, line, name)
                channels[key] = max(channels.get(key, (0, "", "", "")), run)
    found: tuple[dict, dict] = ({}, {})
    for times, operation, line, name in channels.values():
        if across := _ACROSS.search(line):
            kind = across[1].lower().replace("_", "-")
            here, sent = found[1], _sent_across(kind, line, slices)
        else:
            kind = operation.removesuffix("-start")
            group = _first_group(line, devices)
            here = found[len({member * slices // devices for member in group}) > 1]
            sent = _sent(kind, line, operation, len(group))
        if name.startswith(_SCATTERING) and kind == "all-reduce":
            kind, sent = "reduce-scatter", sent // 2
        old = here.get(kind, Traffic(0, 0))
        here[kind] = Traffic(old.count + times, old.bytes + times * sent)
    return Collectives(*found)


def _parse(program: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """({computation: [(operation, line)]}, name of the entry)"""
    computations: dict[str, list[tuple[str, str]]] = {}
    entry = current = ""
    for line in program.splitlines():
        text = line.strip()
        start = _COMPUTATION.match(text)
        if start and not line.startswith(" "):
            current = start[2]
            computations[current] = []
            entry = current if start[1] else entry
        elif current and (assigned := _OPERATION.match(text)):
            name = _NAME.search(assigned[2])
            if name:
                computations[current].append((name[1], assigned[2]))
    return computations, entry


def _runs(computations: dict, entry: str) -> dict[str, int]:
    """How often each computation runs."""
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        if name not in computations:
            return
        runs[name] = runs.get(name, 0) + times
        for operation, line in computations[name]:
            factor = 1
            if operation == "while":
                factor = _trips(computations, line)
                if factor is None:
                    if _touches(computations, line):
                        raise ValueError(f"loop of unknown length with collectives: {line[:200]}")
                    continue
            elif operation in KINDS or operation.removesuffix("-start") in KINDS:
                continue  # what they call is the sum of two numbers
            called = _CALLED.findall(line)
            for branch in _BRANCHES.findall(line):
                called += re.findall(r"[\w.\-]+", branch)
            for other in called:
                visit(other, times * factor)

    visit(entry, 1)
    return runs


def _trips(computations: dict, line: str) -> int | None:
    """Trip count of a loop: stated, or the one constant that its counter is compared with."""
    if stated := _TRIPS.search(line):
        return int(stated[1])
    condition = _CONDITION.search(line)
    body = computations.get(condition[1], []) if condition else []
    limits = [limit for _, text in body if (limit := _CONSTANT.match(text))]
    less = any(name == "compare" and "direction=LT" in text for name, text in body)
    return int(limits[0][1]) if less and len(limits) == 1 else None


def _touches(computations: dict, line: str) -> bool:
    """Whether a collective is reachable from the computations that a line calls."""
    todo, seen = _CALLED.findall(line), set()
    while todo:
        name = todo.pop()
        if name in seen or name not in computations:
            continue
        seen.add(name)
        for operation, other in computations[name]:
            if _is_transfer(operation, other):
                return True
            todo += _CALLED.findall(other)
    return False


def _is_transfer(operation: str, line: str) -> bool:
    """A collective, or a `send` to other slices."""
    if operation == "send":
        return _ACROSS.search(line) is not None
    return operation.removesuffix("-start") in KINDS


def _sent_across(kind: str, line: str, slices: int) -> int:
    """Bytes that a device sends to other slices in one run; the result leads with what it has."""
    own = _size(*_SHAPE.findall(line)[0])
    if kind == "all-gather":
        return own * (slices - 1)
    if kind not in ("all-reduce", "reduce-scatter", "all-to-all"):  # to one other
        return own
    return own * (slices - 1) // slices * (2 if kind == "all-reduce" else 1)


def _sent(kind: str, line: str, operation: str, members: int) -> int:
    """Bytes that a device sends in one run."""
    result = line[: line.index(f"{operation}(")]
    sizes = [_size(*shape) for shape in _SHAPE.findall(result) if shape[0] in _BITS]
    if operation.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # the result holds the operands, then the results (then counters)
        sizes = _second_half(result)
    whole = sum(sizes)
    if kind == "collective-permute":
        return whole
    if kind == "reduce-scatter":
        whole *= members  # the result is one part
    share = (members - 1) / max(1, members)
    return int(whole * share * (2 if kind == "all-reduce" else 1))


def _second_half(result: str) -> list[int]:
    """Sizes of the results in '((operands), (results), ...)' or '(operand, result, ...)'."""
    tuples = re.findall(r"\(([^()]*\[[^()]*(?:\([^()]*\)[^()]*)*)\)", result.strip()[1:])
    chosen = tuples[1] if len(tuples) > 1 and result.strip().startswith("((") else None
    shapes = [_size(*shape) for shape in _SHAPE.findall(chosen or result) if shape[0] in _BITS]
    return shapes if chosen else shapes[1:2]


def _size(dtype: str, dims: str) -> int:
    return math.prod(int(size) for size in dims.split(",") if size) * _BITS[dtype] // 8


def _first_group(line: str, devices: int) -> list[int]:
    """Devices of the first group; all of them where none is stated."""
    if listed := _LISTED.search(line):
        first = listed[1].split("}")[0].strip("{ ")
        return [int(member) for member in first.split(",") if member.strip()]
    if mesh := _MESH.search(line):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        sizes = {name: int(size) for name, size in axes.items()}
        members = _mesh_group(sizes, re.findall(r"'(\w+)'", mesh[2]))
        if order := _ORDER.search(line):
            devices = math.prod(sizes.values())
            places = _iota_group(str(devices), *order.groups())
            members = [places[member] for member in members]
        return members
    if iota := _IOTA.search(line):
        return _iota_group(*iota.groups())
    if pairs := _PAIRS.search(line):
        numbers = [int(number) for number in re.findall(r"\d+", pairs[1])]
        # any pair that crosses slices makes the whole exchange wait for the network
        return max(zip(numbers[::2], numbers[1::2], strict=True), key=lambda p: abs(p[0] - p[1]))
    return list(range(devices))


def _mesh_group(axes: dict[str, int], chosen: list[str]) -> list[int]:
    """Devices that differ from device 0 in the chosen axes only, of a row-major mesh."""
    members, stride = [0], 1
    for name, size in reversed(axes.items()):
        if name in chosen:
            members = [at * stride + member for at in range(size) for member in members]
        stride *= size
    return sorted(members)


def _iota_group(groups: str, dims: str, order: str | None) -> list[int]:
    """First row of iota(dims).transpose(order).reshape(groups)."""
    sizes = [int(size) for size in dims.split(",")]
    count = int(groups.split(",")[-1])
    axes = [int(axis) for axis in order.split(",")] if order else list(range(len(sizes)))
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    members = []
    for place in range(count):
        number = 0
        for axis in reversed(axes):
            place, at = divmod(place, sizes[axis])
            number += at * strides[axis]
        members.append(number)
    return members
