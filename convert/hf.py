"""Weights from Hugging Face tensors onto the devices of a mesh, and back: a layer at a time, by `table`."""

import concurrent.futures
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import processes
from glm_jax.convert.safetensors import Tensor, write_folder
from glm_jax.convert.table import Row, file_order, rows
from glm_jax.model import GLM, fill, weight_path
from glm_jax.processes import everywhere, exchange
from glm_jax.sharding import auto

WHOLE = 256 << 20  # bytes up to which what is read of a weight at once is all of it, not a layer


def load_weights(
    model: GLM,
    tensors: Mapping[str, Tensor],
    progress: Callable[[int], None] = lambda nbytes: None,
    workers: int = 8,
) -> GLM:
    """Fills an abstract model from checked tensors: each device gets its own byte ranges, a layer at a time, so that
    no more than one layer of one weight is in host memory. `progress` is told the bytes of each part put in place."""
    by_path = {row.path: row for row in rows(model.config)}
    biases = [name for path, row in by_path.items() if path.endswith("mlp.bias") for name, _ in row.tensors()]
    if narrow := [name for name in biases if tensors[name].dtype != "F32"]:
        warnings.warn(
            f"{len(narrow)} router biases are stored in {tensors[narrow[0]].dtype}, not F32, as {narrow[0]}: widened, "
            "but what the rounding cost is lost and some tokens may choose other experts",
            stacklevel=3,
        )
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        place = lambda path, leaf: _place(by_path[weight_path(path)], leaf, tensors, pool, progress)
        return fill(model, place)


def bytes_to_read(model: GLM) -> int:
    """How many bytes of weights, in the model's dtype, this process reads for its devices."""
    by_path, total = {row.path: row for row in rows(model.config)}, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        for spans in _readings(by_path[weight_path(path)], leaf):
            whole = (*(stop - start for start, stop in spans), *leaf.shape[len(spans) :])
            total += math.prod(whole) * leaf.dtype.itemsize
    return total


def _readings(row: Row, leaf) -> dict[tuple, dict[tuple, list[jax.Device]]]:
    """What is to be read of a weight for this process's devices: blocks, and of each the columns that devices hold.
    What several devices hold is read once, and so are rows of which each holds some columns."""
    columns = len(row.axes[-1]) if len(row.axes) > 1 else 0  # so many of our axes, the last ones
    readings: dict[tuple, dict[tuple, list[jax.Device]]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        spans = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, leaf.shape, strict=True))
        rows, cut = spans[: len(spans) - columns], spans[len(spans) - columns :]
        # Slices are no keys in Python 3.11.
        key = tuple((s.start, s.stop) for s in rows), tuple((s.start, s.stop) for s in cut)
        readings.setdefault(key[0], {}).setdefault(key[1], []).append(device)
    return readings


def _place(row: Row, leaf, tensors, pool, progress) -> jax.Array:
    """One weight on its devices."""
    shards = []
    for spans, parts in _readings(row, leaf).items():
        index = (*itertools.starmap(slice, spans), *(slice(0, n) for n in leaf.shape[len(spans) :]))
        cuts = [((..., *itertools.starmap(slice, cut)), device) for cut, to in parts.items() for device in to]
        shards += _put(row, index, leaf.dtype, cuts, tensors, pool, progress)
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _put(row: Row, index, dtype, cuts, tensors, pool, progress) -> list[jax.Array]:
    """Reads the block `index` and puts of it what each of `cuts` (columns, device) says."""
    if not row.stacked or math.prod(s.stop - s.start for s in index) * dtype.itemsize <= WHOLE:
        part = _read(row, index, dtype, tensors, pool)
        progress(part.nbytes)
        return [jax.device_put(part[cut], device) for cut, device in cuts]
    layers = range(index[0].start, index[0].stop)
    shards: list[jax.Array] = []
    for i, layer in enumerate(layers):
        part = _read(row, (slice(layer, layer + 1), *index[1:]), dtype, tensors, pool)
        if not shards:
            shards = [_zeros((len(layers), *part[cut].shape[1:]), dtype, device) for cut, device in cuts]
        put = [jax.device_put(part[cut], device) for cut, device in cuts]
        shards = [_insert(*pair, i) for pair in zip(shards, put, strict=True)]
        progress(part.nbytes)
    return shards


def _zeros(shape, dtype, device):
    with jax.default_device(device):  # made there; a new jit for each would compile each time
        return jnp.zeros(shape, dtype)


_insert = jax.jit(lambda stack, part, at: jax.lax.dynamic_update_slice_in_dim(stack, part, at, 0), donate_argnums=0)


def _read(row: Row, index, dtype, tensors, pool) -> np.ndarray:
    """The block `index` of a weight, whole in its columns, read tensor by tensor in parallel."""
    n = len(row.stacked)
    out = np.empty([s.stop - s.start for s in index], dtype)
    rows = row.cut(index[n:])[0]

    def one(at):
        tensor = tensors[row.tensor(*(s.start + i for s, i in zip(index, at, strict=False)))]
        out[at] = tensor.read(rows).reshape(out.shape[n:]).astype(dtype, copy=False)

    list(pool.map(one, np.ndindex(*out.shape[:n])))
    return out


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
