"""Weights from Hugging Face tensors onto the devices of a mesh, and back: a layer at a time, by `table`."""

import concurrent.futures
import functools
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import processes
from glm_jax.convert.safetensors import DTYPES, Tensor, write_folder
from glm_jax.convert.table import Row, file_order, rows
from glm_jax.errors import UsageError
from glm_jax.model import GLM, fill, weight_path
from glm_jax.processes import everywhere, exchange
from glm_jax.sharding import auto

WHOLE = 256 << 20  # bytes that several processes hold at once of a weight that one of them writes
MEMORY = 1 << 30  # bytes of host memory for weights on their way to devices
PIECE = 16 << 20  # bytes that are read at once, at most
WORKERS = min(16, max(4, os.cpu_count() or 4))  # that read
_LEAST = 1 << 16  # and at least


def load_weights(
    model: GLM,
    tensors: Mapping[str, Tensor],
    progress: Callable[[int], None] = lambda nbytes: None,
    workers: int = WORKERS,
    memory: int = MEMORY,
) -> GLM:
    """Fills an abstract model from checked tensors: each device gets its own byte ranges, through at most `memory`
    bytes of the host's; of devices that are the host itself each is read where it stays. `progress` is told the bytes
    of each piece that was read. Raises UsageError for a `memory` that is too small to read anything."""
    by_path = {row.path: row for row in rows(model.config)}
    biases = [name for path, row in by_path.items() if path.endswith("mlp.bias") for name, _ in row.tensors()]
    if narrow := [name for name in biases if tensors[name].dtype != "F32"]:
        warnings.warn(
            f"{len(narrow)} router biases are stored in {tensors[narrow[0]].dtype}, not F32, as {narrow[0]}: widened, "
            "but what the rounding cost is lost and some tokens may choose other experts",
            stacklevel=3,
        )
    piece = min(PIECE, memory // (2 * workers))  # of which each worker may hold one, to cut columns out of it
    if piece < _LEAST:
        raise UsageError(f"memory: {memory:,} bytes for {workers} readers; at least {2 * workers * _LEAST:,}")
    budget = memory - workers * piece
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        place = lambda path, leaf: _place(by_path[weight_path(path)], leaf, tensors, pool, progress, budget, piece)
        return fill(model, place)
    finally:
        pool.shutdown(cancel_futures=True)


def bytes_to_read(model: GLM, tensors: Mapping[str, Tensor]) -> int:
    """How many bytes of weights this process reads for its devices."""
    by_path, total = {row.path: row for row in rows(model.config)}, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        row = by_path[weight_path(path)]
        width = DTYPES[tensors[row.tensor(*(0 for _ in row.stacked))].dtype].itemsize
        for spans in _readings(row, leaf):
            total += math.prod((*(stop - start for start, stop in spans), *leaf.shape[len(spans) :])) * width
    return total


def _readings(row: Row, leaf) -> dict[tuple, dict[tuple, list[jax.Device]]]:
    """What is to be read of a weight for this process's devices: blocks, and of each the columns that devices hold.
    What several devices hold is read once, and so are rows of which each holds some columns."""
    columns = _columns(row)
    readings: dict[tuple, dict[tuple, list[jax.Device]]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        # Slices are no keys in Python 3.11.
        spans = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        rows, cut = spans[: len(spans) - columns], spans[len(spans) - columns :]
        readings.setdefault(rows, {}).setdefault(cut, []).append(device)
    return readings


def _columns(row: Row) -> int:
    """How many of our axes, the last ones, are columns of the tensors, which lie apart in the file."""
    return len(row.axes[-1]) if len(row.axes) > 1 else 0


def _place(row: Row, leaf, tensors, pool, progress, budget: int, piece: int) -> jax.Array:
    """One weight on its devices: each has its shard whole, or in parts of which the host holds no more than `budget`
    bytes at once."""
    readings, shape = _readings(row, leaf), leaf.sharding.shard_shape(leaf.shape)
    several = sum(map(len, readings.values()))  # shards that differ
    inside = _is_host(readings)
    most = math.prod(shape) if inside else budget // several // leaf.dtype.itemsize
    n = len(row.stacked) + (len(row.axes) > 1)  # a shard may be cut along these axes, which are rows of tensors
    chunks = list(_chunks(shape[:n], max(1, most // math.prod(shape[n:]))))
    count, stack = len(leaf.sharding.addressable_devices), None
    wide = lambda size: (*size[:-1], size[-1] * count)
    for chunk in chunks:
        devices, put = _part(row, leaf, readings, chunk, tensors, pool, progress, piece)
        if not inside:
            jax.block_until_ready(put)  # before more of the host's memory is taken
        if len(chunks) == 1:
            return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, put)
        sharding = _side_by_side(devices, len(shape))
        part = jax.make_array_from_single_device_arrays(wide(put[0].shape), sharding, put)
        if stack is None:
            stack = jnp.zeros(wide(shape), leaf.dtype, device=sharding)
        stack = _insert(stack, part, (*(s.start for s in chunk), *(0 for _ in shape[n:])))
        jax.block_until_ready(stack)
        del put, part
    assert stack is not None
    shards = [shard.data for shard in stack.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _is_host(readings) -> bool:
    """Whether the memory of the devices is the host's own."""
    return all(d.platform == "cpu" for cuts in readings.values() for devices in cuts.values() for d in devices)


def _part(row: Row, leaf, readings, chunk, tensors, pool, progress, piece) -> tuple[list[jax.Device], list[jax.Array]]:
    """The same part of the shards of all devices: `chunk` says which, along the first axes."""
    n, host, jobs = len(chunk), {}, []
    for spans, cuts in readings.items():
        at = [slice(a + s.start, a + s.stop) for (a, _), s in zip(spans, chunk, strict=False)]
        at += itertools.starmap(slice, spans[n:])
        buffers = []
        for cut, devices in cuts.items():
            index = [*at, *itertools.starmap(slice, cut)]
            buffer = _aligned([s.stop - s.start for s in index], leaf.dtype)
            buffers.append((buffer, index))
            host |= dict.fromkeys(devices, buffer)
        jobs += _jobs(row, buffers, tensors, piece)
    for nbytes in pool.map(lambda job: job(), jobs):
        progress(nbytes)
    return list(host), [jax.device_put(buffer, device) for device, buffer in host.items()]


def _chunks(shape: tuple[int, ...], most: int) -> Iterator[tuple[slice, ...]]:
    """Blocks of at most so many elements, or of one, that together are all of a shape, in C order."""
    axis = next(i for i in range(len(shape) + 1) if math.prod(shape[i:]) <= most or i == len(shape))
    if axis:  # the axes from here on are whole, the one before in stretches, those before that one by one
        axis -= 1
        size = max(1, most // math.prod(shape[axis + 1 :]))
        whole = tuple(slice(0, n) for n in shape[axis + 1 :])
        for at in np.ndindex(*shape[:axis]):
            for start in range(0, shape[axis], size):
                stretch = slice(start, min(start + size, shape[axis]))
                yield (*(slice(i, i + 1) for i in at), stretch, *whole)
    else:
        yield tuple(slice(0, n) for n in shape)


def _aligned(shape, dtype) -> np.ndarray:
    """An empty array that a device which is the host takes as it is: XLA wants 64 bytes."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _jobs(row: Row, buffers, tensors, piece: int) -> Iterator[Callable[[], int]]:
    """Calls that each read at most `piece` bytes of a tensor into the buffers that have them, and return how many.
    `buffers` are (array, where it lies in the weight), and differ in their columns alone."""
    n, index, flat = len(row.stacked), buffers[0][1], []
    rows = row.cut(tuple(index[n:]))[0]
    for buffer, at in buffers:
        _, *cuts = row.cut(tuple(at[n:]))
        flat.append((buffer.reshape(*buffer.shape[:n], -1, *(c.stop - c.start for c in cuts)), cuts))
    row_bytes = tensors[row.tensor(*(0 for _ in row.stacked))].nbytes // row.tensor_shape[0]
    step = max(1, piece // row_bytes)
    for stacked in np.ndindex(*(s.stop - s.start for s in index[:n])):
        tensor = tensors[row.tensor(*(s.start + i for s, i in zip(index, stacked, strict=False)))]
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            here = (*stacked, slice(start - rows.start, stop - rows.start))
            yield functools.partial(_read, tensor, slice(start, stop), [(buffer[here], cuts) for buffer, cuts in flat])


def _read(tensor: Tensor, rows: slice, to) -> int:
    """Reads these rows of a tensor into arrays, each of some of the columns and perhaps of another dtype."""
    (only, cuts), *others = to
    if not others and only.dtype == DTYPES[tensor.dtype] and only.shape[1:] == tensor.shape[1:]:
        return tensor.read(rows, only).nbytes
    data = tensor.read(rows)
    for part, cuts in to:
        part[...] = data[(slice(None), *cuts)]
    return data.nbytes


def _side_by_side(devices: list[jax.Device], ndim: int) -> jax.NamedSharding:
    """Arrays of one shape as one, along the last axis, so that one program fills all of this process's shards."""
    mesh = jax.sharding.Mesh(np.array(devices), ("shard",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.NamedSharding(mesh, jax.P(*(None,) * (ndim - 1), "shard"))


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack, part, at):
    return jax.lax.dynamic_update_slice(stack, part, at)


def save_weights(model: GLM, folder: str | Path, shard_bytes: int = 5_000_000_000) -> list[Path]:
    """Writes the weights as Hugging Face safetensors, a layer of one weight in host memory at a time."""
    leaves = {weight_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
    if processes.index():  # of several processes the first writes, and the others help it to what their devices hold
        while order := exchange(None)[0]:
            path, *at = order
            _fetch(leaves[path], *at)
        return []
    entries, held = [], _Held()
    for row in rows(model.config):
        leaf = leaves[row.path]
        dtype = {"bfloat16": "BF16", "float32": "F32"}[leaf.dtype.name]
        for name, at in row.tensors():
            get = lambda row=row, leaf=leaf, at=at: held(row, leaf, at)
            entries.append((file_order(name), name, (dtype, row.tensor_shape, get)))
    try:
        return write_folder(folder, {n: entry for _, n, entry in sorted(entries, key=lambda e: e[0])}, shard_bytes)
    finally:
        exchange(None)  # the others may go on


def _fetch(leaf: jax.Array, layer: int | None = None, start: int = 0, size: int = 0) -> jax.Array:
    """A weight that several processes hold, or of one layer the rows [start, start + size), on every device: called by
    all of them."""
    loose = jax.device_put(leaf, jax.NamedSharding(auto(leaf.sharding.mesh), leaf.sharding.spec))
    return everywhere(loose if layer is None else _rows(loose, layer, start, size))


@functools.partial(jax.jit, static_argnums=3)
def _rows(stack, layer, start, size):
    return jax.lax.dynamic_slice_in_dim(jax.lax.dynamic_index_in_dim(stack, layer, 0, False), start, size, 0)


class _Held:
    """The layer fetched last, since the tensors of one layer of one weight are asked for one after the other."""

    def __init__(self):
        self.key, self.value = None, None

    def __call__(self, row: Row, leaf, at) -> np.ndarray:
        together = leaf.is_fully_addressable
        if not row.stacked:
            return np.asarray(leaf if together else _ask(row.path, leaf)).reshape(row.tensor_shape)
        if self.key != (row.path, at[0]) and not together:
            n = leaf.shape[1]  # a part at a time, since every device gets it whole
            row_bytes = math.prod(leaf.shape[2:]) * leaf.dtype.itemsize
            size = max(d for d in range(1, n + 1) if n % d == 0 and (d == 1 or d * row_bytes <= WHOLE))
            parts = [np.asarray(_ask(row.path, leaf, at[0], start, size)) for start in range(0, n, size)]
            self.key, self.value = (row.path, at[0]), np.concatenate(parts)
        elif self.key != (row.path, at[0]):
            loose = jax.device_put(leaf, jax.NamedSharding(auto(leaf.sharding.mesh), leaf.sharding.spec))
            self.key, self.value = (row.path, at[0]), np.asarray(loose[at[0]])
        assert self.value is not None
        return self.value[at[1:]].reshape(row.tensor_shape)


def _ask(path: str, leaf, *at) -> jax.Array:
    """`_fetch`, of which the other processes are told."""
    exchange([path, *at])
    return _fetch(leaf, *at)
