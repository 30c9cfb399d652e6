"""What XLA made of a program: its collectives, by mesh axis, count and bytes; its large buffers; its bytes and FLOPs.

Everything is read from the text of the optimised program, so it holds for hardware that is not there. The text is read
as the CPU, GPU and TPU compilers of jax 0.10.2 and 0.12 write it."""

import ast
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from glm_jax.sharding import across
from glm_jax.targets import Chip

WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
KINDS = ("ragged-all-to-all", "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
UNKNOWN = ("?",)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of one array, as the device runs it.

    `axes`: the mesh axes its groups of devices span, in the mesh's order; ("?",) if they are no set of whole axes.
    `bytes`: of the whole array on one device, each time: what all-gather gives, what reduce-scatter takes, what a
    ragged all-to-all writes into (more than comes), of the others either. `dtype` and `shape` are that array's; of an
    all-to-all that XLA cut in pieces the pieces stand in front. `count`: how often it runs in one step, None where that
    depends on data: in a loop without a fixed length, in a branch. `source`: the operation it came from, "" if XLA
    did not keep it."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int | None = 1
    source: str = ""
    dtype: str = dataclasses.field(default="", compare=False)  # a formula of the traffic knows neither
    shape: tuple[int, ...] = dataclasses.field(default=(), compare=False)
    sent: int | None = dataclasses.field(default=None, compare=False)  # by a device, where `bytes` do not say it


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A large result of one operation, on one device."""

    bytes: int
    shape: str  # as bf16[20,5120,192]
    op: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Bytes on one device, by XLA's own account, and what one step does there.

    `flops` and `accessed_bytes` are XLA's cost analysis, which is of little use here: it counts the body of a loop
    once, however often it runs (on CPU and TPU, jax 0.10.2 and 0.12), and a GPU that is not there has none: None."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # of the outputs, which lie in donated arguments
    temp_bytes: int
    flops: float | None
    accessed_bytes: float | None
    collectives: list[Collective]

    @property
    def total_bytes(self) -> int:
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that a step cannot be faster than, by each of what a device has."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.network)


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
        cost.get("flops"),
        cost.get("bytes accessed"),
        collectives(compiled, mesh),
    )


def collectives(compiled, mesh) -> list[Collective]:
    """Every collective of a compiled program, or of its text, on `mesh`, whose devices are the program's, in its order.

    An asynchronous one counts once, one of several arrays as one each, one over axes of size 1 moves nothing and is
    left out. They are what the device runs, not what was asked for: a TPU may make an all-gather of a few numbers an
    all-reduce, or a small reduce-scatter an all-reduce of which each device keeps a part. A large reduce-scatter, which
    a TPU writes as a fusion named all-reduce-scatter, is one; its bytes are those of the array as padded to whole
    tiles, and a collective-permute after it moves rows that lie in the tile of a neighbour. Between slices a TPU's
    program hands arrays to the host and takes others from it; each such exchange is one, of axes ("?",), for which of
    the slices take part is not in the program."""
    program, entry = _program(compiled if isinstance(compiled, str) else compiled.as_text())
    return list(_visit(program, entry, 1, mesh))


def sent_bytes(c: Collective, mesh) -> float:
    """Bytes that one device sends each time, round a ring of the n devices of its group: (n-1)/n of `c.bytes`, twice
    that for an all-reduce (a reduce-scatter and an all-gather), all of it for a permute; or `c.sent` where that is
    known. Of a ragged all-to-all without it this is a bound: how much is really sent depends on the routing. So it is
    where the axes are not known: n is then taken to be large."""
    if c.sent is not None:
        return c.sent
    share = 1.0 if c.axes == UNKNOWN else 1 - 1 / math.prod(mesh.shape[a] for a in c.axes)
    if c.kind == "collective-permute":
        share = 1.0
    return c.bytes * share * (2 if c.kind == "all-reduce" else 1)


def roofline(flops: float, hbm_bytes: float, collectives: list[Collective], chip: Chip, mesh) -> Roofline:
    """What one step takes at least, in seconds, if it reached the chip's rates, by

        compute = flops / chip.bf16
        memory  = hbm_bytes / chip.bandwidth
        network = sum of count * max(sent_bytes / chip.link, crossing_bytes / chip.network)

    and the largest of them, which is to say that the three overlap. `flops` and `hbm_bytes` are one device's. A
    collective that runs an unknown number of times counts once. Where the devices lie is as in `places`."""
    place = places(chip, mesh)
    network = 0.0
    for c in collectives:
        seconds = max(sent_bytes(c, mesh) / chip.link, crossing_bytes(c, mesh, place) / chip.network)
        network += (1 if c.count is None else c.count) * seconds
    return Roofline(flops / chip.bf16, hbm_bytes / chip.bandwidth, network)


def crossing_bytes(c: Collective, mesh, place: np.ndarray) -> float:
    """Of what one device sends each time, the bytes that must leave its host or slice, by `place` as in `places`: a
    group's n devices of which m are on one host bring (n-m)/n of the array into it once, over m adapters. Of an
    all-to-all the part that is for others' hosts."""
    if c.axes == UNKNOWN or c.kind == "collective-permute":
        leaves = (place != place.flat[0]).any() if c.axes == UNKNOWN else groups_of(mesh, c.axes, place)[1] > 1
        return sent_bytes(c, mesh) if leaves else 0.0
    m, hosts = groups_of(mesh, c.axes, place)
    n = math.prod(mesh.shape[a] for a in c.axes)
    if hosts == 1:
        return 0.0
    if "all-to-all" in c.kind:
        return sent_bytes(c, mesh) * (n - m) / (n - 1)
    return c.bytes * (n - m) / n / m * (2 if c.kind == "all-reduce" else 1)


def groups_of(mesh, axes: tuple[str, ...], place: np.ndarray) -> tuple[int, int]:
    """Of a group of devices along these axes, how many are on one host or slice at the most, and on how many it is."""
    within = [i for i, a in enumerate(mesh.shape) if a in axes]
    groups = np.moveaxis(place, within, range(-len(within), 0)).reshape(-1, math.prod(mesh.shape[a] for a in axes))
    ordered = np.sort(groups, 1)
    run = np.cumsum(np.diff(ordered, axis=1, prepend=-1) != 0)  # all that one group has on one host have one number
    hosts = np.diff(ordered, axis=1).astype(bool).sum(1).max() + 1
    return int(np.bincount(run).max()), int(hosts)


def places(chip: Chip, mesh) -> np.ndarray:
    """The number of the host of each GPU, of the slice of each TPU, in the mesh's shape. GPUs are taken to lie on their
    hosts in the order of the mesh; TPUs in the slices that they say, or without devices in `chip.slices` as
    `sharding.mesh` would lay them."""
    shape = tuple(mesh.shape.values())
    if chip.platform != "tpu":
        return (np.arange(math.prod(shape)) // chip.host).reshape(shape)
    if isinstance(mesh, Mesh):
        return np.asarray([getattr(d, "slice_index", 0) or 0 for d in mesh.devices.flat]).reshape(shape)
    between = across(dict(mesh.shape), chip.slices)
    block = [i // (n // m) for i, n, m in zip(np.indices(shape), shape, between, strict=True)]
    return np.asarray(np.ravel_multi_index(block, between))


def big_buffers(compiled, at_least_bytes: int) -> list[Buffer]:
    """Results of at least so many bytes in a compiled program or its text, largest first: what XLA computes into
    memory, so none inside a fusion, and none that is only another name for a buffer, or an update of one in place."""
    program, _ = _program(compiled if isinstance(compiled, str) else compiled.as_text())
    fused = {c for ops in program.values() for op in ops.values() if op.kind == "fusion" for c in op.called()}
    names = ("parameter", "get-tuple-element", "bitcast", "tuple", "while", "dynamic-update-slice", "conditional")
    found = set()
    for name, ops in program.items():
        for op in () if name in fused else ops.values():
            if op.kind in names or op.shape.startswith("("):
                continue
            inner = [x.kind for c in op.called() for x in program.get(c, {}).values()] if op.kind == "fusion" else []
            ((dtype, shape),) = _arrays(_shape(op.shape))
            if "dynamic-update-slice" not in inner and (size := _bytes(dtype, shape)) >= at_least_bytes:
                found.add(Buffer(size, f"{dtype}[{','.join(map(str, shape))}]", op.kind))
    return sorted(found, key=lambda b: (-b.bytes, b.shape, b.op))


# ------------------------------------------------------------------------------------------------- reading the program


@dataclasses.dataclass(frozen=True)
class _Op:
    """One line: `%name = shape kind(arguments), attributes`."""

    name: str
    shape: str
    kind: str
    rest: str  # from the first argument on

    @functools.cached_property
    def _split(self) -> int:
        depth = 1
        for match in re.finditer(r"[()]", self.rest):
            depth += 1 if match[0] == "(" else -1
            if not depth:
                return match.start()
        return len(self.rest)

    @property
    def arguments(self) -> list[str]:
        text = re.sub(r"/\*.*?\*/|\{[^}]*\}|\[[^\]]*\]", "", self.rest[: self._split])
        return [a.split()[-1].strip("%() ") for a in text.split(",") if a.strip()]

    @property
    def attributes(self) -> str:
        return self.rest[self._split :]

    def called(self) -> list[str]:
        """The computations it runs. What a reduction does to two numbers is not among them."""
        words = "body|calls|true_computation|false_computation"
        words += "|to_apply" if self.kind in ("call", "call-start") else ""
        single = re.findall(rf"\b(?:{words})=%?([\w.\-]+)", self.attributes)
        several = re.findall(r"\b(?:branch_computations|calls)=\{([^}]*)\}", self.attributes)
        return single + [name.strip().lstrip("%") for names in several for name in names.split(",")]


Ops = dict[str, _Op]  # by name, in order; the last is the result


def _program(text: str) -> tuple[dict[str, Ops], str]:
    """The operations of each computation, and the name of the one that begins."""
    program: dict[str, Ops] = {}
    ops, entry = {}, ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            ops = program.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", line):
            ops[match[2]] = _Op(*match.groups()[1:])
            if match[1]:  # print order need not put it last
                ops["ROOT"] = ops[match[2]]
    return program, entry


def _visit(program: dict[str, Ops], name: str, times: int | None, mesh, chains=None) -> Iterator[Collective]:
    """The collectives of a computation that runs so many times. `chains`: those that a fusion before it began."""
    ops, chains = program[name], set() if chains is None else chains
    for key, op in ops.items():
        if key == "ROOT" or op.kind in ("async-done", "async-update"):  # whose computation ran with async-start
            continue
        # A collective that a TPU runs beside other work is a fusion that starts it, some that go on with it, and one
        # that ends it, each with the whole of it inside.
        chain = re.search(r'chain_id="(\d+)"', op.attributes) if _kind(op) else None
        if chain and chain[1] in chains:
            continue
        chains |= {chain[1]} if chain else set()
        for c in _parse(op, mesh):
            kind = "reduce-scatter" if "all-reduce-scatter" in name and c.kind == "all-reduce" else c.kind
            yield dataclasses.replace(c, kind=kind, count=times)
        often = {"while": _trips(op, ops, program) if op.kind == "while" else 1, "conditional": None}.get(op.kind, 1)
        inner = None if times is None or often is None else times * often
        for callee in op.called():
            if callee in program:
                yield from _visit(program, callee, inner, mesh, chains if op.kind == "fusion" else None)


def _kind(op: _Op) -> tuple[str, bool] | None:
    """The kind of a collective, and whether it is the start of one; None of any other operation, of its end too."""
    start = op.kind.endswith("-start")
    kind = op.kind.removesuffix("-start")
    return (kind, start) if kind in KINDS else None


def _parse(op: _Op, mesh) -> list[Collective]:
    if exchange := re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes):
        return _between_slices(op, exchange[1].lower().replace("_", "-"))
    if not (found := _kind(op)):
        return []
    (kind, start), shape = found, _shape(op.shape)
    # A start has (what goes in, what comes out, contexts); that of an all-reduce may have what comes out alone.
    both = start and (kind != "all-reduce" or not (_is_array(shape) or all(map(_is_array, shape))))
    whole = both or kind != "reduce-scatter"  # the shape of a reduce-scatter is of the part that is kept
    arrays = _arrays(shape[0 if kind == "reduce-scatter" else 1] if both else shape)
    axes, devices = _axes(op.attributes, mesh)
    if not axes:
        return []
    if kind == "all-to-all" and len(arrays) == devices > 1:  # one array in as many pieces
        arrays = [(arrays[0][0], (devices, *arrays[0][1]))]
    if not whole:
        dimension = _int(r"dimensions=\{(\d+)\}", op.attributes)
        grown = lambda s: (*s[:dimension], s[dimension] * devices, *s[dimension + 1 :])
        arrays = [(dtype, grown(s)) for dtype, s in arrays]
    name = re.search(r'op_name="([^"]*)"', op.attributes)
    source = name[1].rsplit("/", 1)[-1] if name else ""
    return [Collective(kind, axes, _bytes(dtype, s), 1, source, dtype, s) for dtype, s in arrays]


def _between_slices(op: _Op, kind: str) -> list[Collective]:
    """Of the send and the recv that make one exchange between slices the one with the whole array."""
    if op.kind != ("recv" if kind == "all-gather" else "send"):
        return []
    kind = "collective-permute" if kind == "one-to-one" else kind
    dtype, s = _shape(op.shape)[0]  # then a context and a token
    return [Collective(kind, UNKNOWN, _bytes(dtype, s), 1, "", dtype, s)]


def _shape(text: str):
    """`(bf16[2,3]{1,0}, s32[])` as (("bf16", (2, 3)), ("s32", ()))."""
    text = re.sub(r"/\*.*?\*/|\{[^}]*\}", "", text).replace("<=", "")
    text = text.replace(")", ",)").replace("(,)", "()")  # a tuple of one stays a tuple
    return ast.literal_eval(re.sub(r"(\w+)\[([\d,]*)\]", lambda m: f"('{m[1]}', ({m[2]}{',' * bool(m[2])}))", text))


def _is_array(shape) -> bool:
    return bool(shape) and isinstance(shape[0], str)


def _arrays(shape) -> list[tuple[str, tuple[int, ...]]]:
    if _is_array(shape):
        return [shape]
    return [array for part in shape for array in _arrays(part)]


def _int(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    digits = re.search(r"\d+", dtype)  # f8e4m3fn, s32, u8; a token has none and no bytes
    width = WIDTHS.get(dtype) or (int(digits[0]) / 8 if digits else 0)
    return int(width * math.prod(shape))


# ---------------------------------------------------------------------------------------------------- length of a loop


def _trips(loop: _Op, outside: Ops, program: dict[str, Ops]) -> int | None:
    """How often a loop runs: as XLA says (CPU, GPU), else (TPU) by its condition, if that compares a number that starts
    at one constant and grows by another with a third. None for any other."""
    if match := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
        return int(match[1])
    part = {k: re.search(rf"{k}=%?([\w.\-]+)", loop.attributes) for k in ("condition", "body")}
    if not all(m and m[1] in program for m in part.values()):
        return None
    condition, body = (program[m[1]] for m in part.values() if m)
    initial = _follow(loop.arguments[0], outside)
    if condition["ROOT"].kind != "compare" or not initial or initial.kind != "tuple":
        return None
    left, right = (_follow(a, condition) for a in condition["ROOT"].arguments)
    if "direction=GT" in condition["ROOT"].attributes:
        left, right = right, left
    elif "direction=LT" not in condition["ROOT"].attributes:
        return None
    if not left or left.kind != "get-tuple-element":
        return None
    index = _index(left)
    start = _number(_follow(initial.arguments[index], outside))
    limit = _number(right)
    if limit is None and right and right.kind == "get-tuple-element" and _kept(_index(right), body):
        limit = _number(_follow(initial.arguments[_index(right)], outside))
    step = _step(index, body)
    if start is None or limit is None or not step:
        return None
    return max(0, -(-(limit - start) // step))


def _follow(name: str, ops: Ops) -> _Op | None:
    """The operation that makes a value, past those that only hand it on."""
    op = ops.get(name)
    while op and op.kind in ("copy", "bitcast", "reshape", "opt-barrier") and op.arguments[0] in ops:
        op = ops[op.arguments[0]]
    return op


def _index(op: _Op) -> int:
    return _int(r"index=(\d+)", op.attributes)


def _number(op: _Op | None) -> int | None:
    match = re.match(r"(-?\d+)\)", op.rest) if op and op.kind == "constant" else None
    return int(match[1]) if match else None


def _result(index: int, body: Ops) -> _Op | None:
    root = body["ROOT"]
    return _follow(root.arguments[index], body) if root.kind == "tuple" and index < len(root.arguments) else None


def _kept(index: int, body: Ops) -> bool:
    op = _result(index, body)
    return bool(op and op.kind == "get-tuple-element" and _index(op) == index)


def _step(index: int, body: Ops) -> int | None:
    """By how much the body adds to one number of what it carries."""
    op = _result(index, body)
    if not op or op.kind != "add":
        return None
    one, other = (_follow(a, body) for a in op.arguments)
    if one and one.kind == "constant":
        one, other = other, one
    same = one and one.kind == "get-tuple-element" and _index(one) == index
    return _number(other) if same else None


# ------------------------------------------------------------------------------------------------- groups to mesh axes


def _axes(attributes: str, mesh) -> tuple[tuple[str, ...], int]:
    """The mesh axes that the groups of a collective span, and the devices in each. Ids are places in the flattened
    mesh."""
    shape = tuple(mesh.shape.values())
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        groups = [[int(i) for i in pair] for pair in re.findall(r"(\d+),(\d+)", pairs[1])]
        if max(map(max, groups), default=0) >= math.prod(shape):
            return UNKNOWN, len(groups)
        along = {axis for pair in groups for axis in _varying(np.asarray([pair]), shape)}
        return tuple(name for i, name in enumerate(mesh.shape) if i in along), len(groups)
    groups = _groups(attributes, math.prod(shape))
    if groups is None or groups.max() >= math.prod(shape):
        return UNKNOWN, 0 if groups is None else groups.shape[1]
    axes = _varying(groups, shape)
    if math.prod(shape[i] for i in axes) == groups.shape[1]:
        return tuple(list(mesh.shape)[i] for i in axes), groups.shape[1]
    return UNKNOWN, groups.shape[1]


def _varying(groups: np.ndarray, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes along which the devices of some group differ."""
    places = np.stack(np.unravel_index(groups, shape))
    return tuple(int(i) for i in np.flatnonzero((places != places[:, :, :1]).any((1, 2))))


def _iota(sizes: str, turn: str | None) -> np.ndarray:
    shape = [int(n) for n in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in turn.split(",")]) if turn else ids


def _groups(attributes: str, devices: int) -> np.ndarray | None:
    """The groups of a collective [groups, devices in each], in the three ways that XLA writes them: a list, a turned
    iota, axes of a mesh. None if they are not all of one size."""
    if match := re.search(r"replica_groups=\{\{(.*?)\}\}", attributes):
        groups = [[int(i) for i in group.split(",")] for group in match[1].split("},{")]
        return np.asarray(groups) if len({len(g) for g in groups}) == 1 else None
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _iota(match[2], match[3]).reshape([int(n) for n in match[1].split(",")])
    order = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if match := re.search(rf"replica_groups=mesh\[(.*?)\]{order} \{{(.*?)\}}", attributes):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        over = re.findall(r"'(\w+)'", match[4])
        shape = list(sizes.values())
        ids = (_iota(match[2], match[3]) if match[2] else np.arange(math.prod(shape))).reshape(shape)
        along = [list(sizes).index(name) for name in over]
        rest = [i for i in range(len(shape)) if i not in along]
        return ids.transpose(rest + along).reshape(-1, math.prod(shape[i] for i in along))
    if re.search(r"replica_groups=\{\}", attributes):
        return np.arange(devices)[None]
    return None
