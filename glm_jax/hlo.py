"""What XLA made of a program: its collectives, by mesh axis, count and bytes; its large buffers; its bytes and FLOPs.

Everything is read from the text of the optimised program, so it holds for hardware that is not there."""

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}
KINDS = ("ragged-all-to-all", "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
UNKNOWN = ("?",)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of one array.

    `axes`: the mesh axes its groups of devices span, in the mesh's order; ("?",) if they are no set of whole axes.
    `bytes`: of the whole array on one device, each time: what all-gather gives, what reduce-scatter takes, of the
    others either. `count`: how often it runs in one step, None inside a loop whose length depends on data. `source`:
    the operation it came from."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int | None = 1
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A large result of one operation, on one device."""

    bytes: int
    shape: str  # as bf16[20,5120,192]
    op: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Bytes on one device, by XLA's own account, and what one step does there. `flops` and `accessed_bytes` are XLA's
    cost analysis, which counts the body of a loop once: see `planner.step_cost` for what a step costs."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # of the outputs, which lie in donated arguments
    temp_bytes: int
    flops: float
    accessed_bytes: float
    collectives: list[Collective]

    @property
    def total_bytes(self) -> int:
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


def report(compiled, mesh) -> Report:
    """The facts of a `jax.stages.Compiled` of a program on `mesh`."""
    memory = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    return Report(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        collectives(compiled, mesh),
    )


def collectives(compiled, mesh) -> list[Collective]:
    """Every collective of a compiled program, or of its text, on `mesh`. An asynchronous one counts once, one of
    several arrays as one each, one over axes of size 1 moves nothing and is left out."""
    computations, entry = _computations(compiled if isinstance(compiled, str) else compiled.as_text())
    found: list[Collective] = []
    pieces = set()  # a TPU runs one collective beside other work as pieces in several fusions, all of one channel

    def visit(name: str, times: int | None, fused: bool):
        for line in computations[name]:
            for c in _parse(line, mesh):
                channel = re.search(r"channel_id=(\d+)", line)
                piece = (c.kind, c.axes, c.bytes, channel and channel[1])
                if not c.axes or (fused and piece in pieces):
                    continue
                if fused:
                    pieces.add(piece)
                found.append(dataclasses.replace(c, count=times))
            trips = _trips(line, computations) if " while(" in line else 1
            inner = None if trips is None or times is None else times * trips
            for callee in _called(line):
                if callee in computations:
                    visit(callee, inner, fused or " fusion(" in line)

    visit(entry, 1, False)
    return found


def _trips(line: str, computations) -> int | None:
    """How often a loop runs: as XLA says, or by its condition, of a counter from 0 against a constant; else None."""
    if match := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    root = next((re.search(r"compare\((.*?)\), direction=LT", x) for x in lines if x.startswith("ROOT")), None)
    values = {m[1]: int(m[2]) for x in lines if (m := re.match(r"%?([\w.\-]+) = .* constant\((\d+)\)", x))}
    named = [name.split()[-1].lstrip("%") for name in root[1].split(",")] if root else []
    return next((values[name] for name in named if name in values), None)


def sent_bytes(c: Collective, mesh) -> float:
    """Bytes that one device sends each time, round a ring of the n devices of its group: (n-1)/n of the array, twice
    that for an all-reduce (a reduce-scatter and an all-gather), all of it for a permute. Of a ragged all-to-all this is
    a bound: how much is really sent depends on the routing."""
    n = math.prod(mesh.shape[a] for a in c.axes if a in mesh.shape)
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(c.kind, (n - 1) / n)
    return share * c.bytes


def large_buffers(compiled, least: int) -> list[Buffer]:
    """Results of at least `least` bytes, largest first: what XLA computes into memory, so none inside a fusion, and
    none that is only another name for a buffer, or an update of one in place."""
    computations, _ = _computations(compiled if isinstance(compiled, str) else compiled.as_text())
    fused = {c for lines in computations.values() for line in lines if " fusion(" in line for c in _called(line)}
    names = ("parameter", "get-tuple-element", "bitcast", "tuple", "while", "dynamic-update-slice", "conditional")
    found = []
    for name, lines in computations.items():
        for line in () if name in fused else lines:
            if match := re.match(r"(?:ROOT )?%?[\w.\-]+ = (\w+\[[\d,]*\])(?:\{[^ ]*\})? ([\w\-]+)\(", line):
                shape, op = match.groups()
                updates = op == "fusion" and "dynamic-update-slice" in "".join(
                    map("".join, _bodies(computations, line))
                )
                if op not in names and not updates and (size := _bytes(shape)) >= least:
                    found.append(Buffer(size, shape, op))
    return sorted(set(found), key=lambda b: (-b.bytes, b.shape, b.op))


def _bodies(computations, line):
    return [computations.get(c, []) for c in _called(line)]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the one that begins."""
    computations: dict[str, list[str]] = {}
    lines, entry = [], ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith(" "):
            lines.append(line.strip())
    return computations, entry


def _called(line: str) -> list[str]:
    single = re.findall(r"\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line)
    branches = re.findall(r"branch_computations=\{([^}]*)\}", line)
    return single + [name.strip().lstrip("%") for names in branches for name in names.split(",")]


def _parse(line: str, mesh) -> list[Collective]:
    match = re.match(r"(?:ROOT )?%?[\w.\-]+ = (.*?) (" + "|".join(KINDS) + r")(-start)?\(", line)
    if not match:
        return []
    shapes, kind, start = re.findall(r"(\w+\[[\d,]*\])", match[1]), match[2], match[3]
    if start and kind in ("all-gather", "reduce-scatter"):  # (operands, results)
        shapes = shapes[len(shapes) // 2 :]
    elif start and kind == "collective-permute":  # (operand, result, two contexts)
        shapes = shapes[1:2]
    elif start and kind == "ragged-all-to-all":  # (six operands, result)
        shapes = shapes[-1:]
    axes, devices = _axes(line, mesh)
    op = re.search(r'op_name="([^"]*)"', line)
    source = op[1].rsplit("/", 1)[-1] if op else ""
    sizes = [_bytes(shape) for shape in shapes]
    if kind == "all-to-all":  # one array in as many pieces as there are devices
        sizes = [sum(sizes)]
    if kind == "reduce-scatter":
        sizes = [size * devices for size in sizes]
    if source.startswith("reduce_scatter"):  # a TPU may reduce all, keep a part, and exchange what its tiles overlap
        if kind == "collective-permute":
            return []
        kind = "reduce-scatter"
    return [Collective(kind, axes, size, 1, source) for size in sizes]


def _bytes(shape: str) -> int:
    dtype, dims = re.fullmatch(r"(\w+)\[([\d,]*)\]", shape).groups()  # pyright: ignore[reportOptionalMemberAccess]
    width = BYTES.get(dtype) or int(re.findall(r"\d+", dtype)[0]) / 8  # f8e4m3fn, s32, u8
    return int(width * math.prod(int(n) for n in dims.split(",") if n))


def _axes(line: str, mesh) -> tuple[tuple[str, ...], int]:
    """The mesh axes that the groups of a collective span, and the devices in each."""
    shape = tuple(mesh.shape.values())
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        groups = [[int(i) for i in pair] for pair in re.findall(r"(\d+),(\d+)", pairs[1])]
        along = {axis for pair in groups for axis in _varying(np.asarray(pair), shape)}
        return tuple(name for i, name in enumerate(mesh.shape) if i in along), len(groups)
    groups = _groups(line, math.prod(shape))
    spans = {_varying(group, shape) for group in groups}
    if len(spans) == 1:
        (axes,) = spans
        if math.prod(shape[i] for i in axes) == groups.shape[1]:
            return tuple(list(mesh.shape)[i] for i in axes), groups.shape[1]
    return UNKNOWN, groups.shape[1]


def _varying(group, shape) -> tuple[int, ...]:
    places = np.stack(np.unravel_index(group, shape))
    return tuple(int(i) for i in np.flatnonzero((places != places[:, :1]).any(1)))


@functools.cache
def _iota(dims: str, turn: str) -> np.ndarray:
    sizes = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in turn.split(",")]) if turn else ids


def _groups(line: str, devices: int) -> np.ndarray:
    """The groups of a collective [groups, devices in each], in the three ways that XLA writes them."""
    if match := re.search(r"replica_groups=\{\{(.*?)\}\}", line):
        return np.asarray([[int(i) for i in group.split(",")] for group in match[1].split("},{")])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return _iota(match[2], match[3] or "").reshape([int(n) for n in match[1].split(",")])
    if match := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", line
    ):
        named = re.findall(r"'(\w+)'=(\d+)", match[1])
        sizes, over = [int(n) for _, n in named], re.findall(r"'(\w+)'", match[4])
        ids = (_iota(match[2], match[3] or "") if match[2] else np.arange(math.prod(sizes))).reshape(sizes)
        rest = [i for i, (name, _) in enumerate(named) if name not in over]
        along = [[name for name, _ in named].index(name) for name in over]
        return ids.transpose(rest + along).reshape(-1, math.prod(sizes[i] for i in along))
    return np.arange(devices)[None]  # replica_groups={}: all of them
