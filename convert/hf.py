"""Between Hugging Face tensors and the model's weights: one table, read both ways, strict both ways.

Every weight is a stack of checkpoint tensors in their own orientation, so nothing is transposed: reading a device's
share is reading byte ranges."""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import processes
from glm_jax.config import Config
from glm_jax.convert.safetensors import Tensor, write_folder
from glm_jax.errors import BadInput
from glm_jax.model import GLM, fill, weight_path
from glm_jax.processes import everywhere, exchange
from glm_jax.sharding import auto

# Our weight -> the tensor's name, and its axes as ours: "(n h)" is one axis of theirs that holds two of ours.
# {l}, {e} and {c} are the stacked axes in front: layer, expert, and gate or up.
_LAYER = {
    "attn_norm": ("input_layernorm.weight", "d"),
    "mlp_norm": ("post_attention_layernorm.weight", "d"),
    **{f"attn.{w}": (f"self_attn.{w}_proj.weight", "(n h) d") for w in "qkv"},
    **{f"attn.{w}_bias": (f"self_attn.{w}_proj.bias", "(n h)") for w in "qkv"},
    **{f"attn.{w}_norm": (f"self_attn.{w}_norm.weight", "h") for w in "qk"},
    "attn.o": ("self_attn.o_proj.weight", "d (n h)"),
}
_MLP = {"gate_up": ("{c}_proj.weight", "f d"), "down": ("down_proj.weight", "d f")}
_MOE = {
    "mlp.router": ("mlp.gate.weight", "e d"),
    "mlp.bias": ("mlp.gate.e_score_correction_bias", "e"),
    **{f"mlp.{w}": ("mlp.experts.{e}." + name, axes) for w, (name, axes) in _MLP.items()},
    **{f"mlp.shared.{w}": ("mlp.shared_experts." + name, axes) for w, (name, axes) in _MLP.items()},
}
_DENSE = {f"mlp.{w}": ("mlp." + name, axes) for w, (name, axes) in _MLP.items()}
_PREFIX = "model.layers.{l}."


def _stacked(stack, rows):
    return {f"{stack}.{w}": (_PREFIX + name, axes) for w, (name, axes) in rows.items()}


TABLE: dict[str, tuple[str, str]] = {
    "embed": ("model.embed_tokens.weight", "v d"),
    "head": ("lm_head.weight", "v d"),
    "norm": ("model.norm.weight", "d"),
    **_stacked("dense", _LAYER | _DENSE),
    **_stacked("moe", _LAYER | _MOE),
    **_stacked("mtp.layer", _LAYER | _MOE),
    **{f"mtp.{w}": (f"{_PREFIX}{w}.weight", axes) for w, axes in (("enorm", "d"), ("hnorm", "d"), ("eh_proj", "d c"))},
    "mtp.norm": (_PREFIX + "shared_head.norm.weight", "d"),
}
# The MTP layer's own embedding and head stand for the main ones; some repositories hold copies of them.
_COPIES = {_PREFIX + "embed_tokens.weight": "embed", _PREFIX + "shared_head.head.weight": "head"}
_GATE_UP = ("gate", "up")
WHOLE = 256 << 20  # bytes up to which what is read of a weight at once is all of it, not a layer


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight of the model and the checkpoint tensors it is a stack of."""

    path: str
    shape: tuple[int, ...]  # ours
    name: str
    first_layer: int
    axes: tuple[tuple[int, ...], ...]  # the sizes of our axes that each axis of theirs holds

    @classmethod
    def of(cls, path: str, shape: tuple[int, ...], config: Config) -> "Row":
        name, axes = TABLE[path]
        first = {"moe": config.dense_layers, "mtp": config.num_hidden_layers}.get(path.split(".", 1)[0], 0)
        if path.startswith("mtp.") and not path.startswith("mtp.layer."):  # in no stack of ours
            name = name.replace("{l}", str(first))
        groups = [g.strip("()").split() for g in re.findall(r"\([^)]*\)|\S+", axes)]
        sizes = iter(shape[len(shape) - sum(map(len, groups)) :])
        return cls(path, shape, name, first, tuple(tuple(next(sizes) for _ in g) for g in groups))

    @property
    def stacked(self) -> tuple[int, ...]:
        """Sizes of the axes in front that tell tensors apart."""
        return self.shape[: len(self.shape) - sum(map(len, self.axes))]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor in the checkpoint."""
        return tuple(int(np.prod(g)) for g in self.axes)

    def tensor(self, *at: int) -> str:
        """The name of the tensor at an index of the stacked axes."""
        index, values = iter(at), {}
        for key in re.findall(r"\{(\w)\}", self.name):
            if key == "l":
                values[key] = self.first_layer + next(index)
            else:
                values[key] = _GATE_UP[next(index)] if key == "c" else next(index)
        return self.name.format(**values)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name, with its index in the stacked axes."""
        for at in np.ndindex(*self.stacked):
            yield self.tensor(*at), at

    def cut(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """What `index` of our axes after the stacked ones cuts out of each tensor."""
        cuts, index = [], iter(index)  # type: ignore[assignment]
        for group in self.axes:
            spans = [next(index).indices(size)[:2] for size in group]  # type: ignore[call-overload]
            # Only the first of several packed axes may be sharded: its parts are contiguous.
            assert all(span == (0, size) for span, size in zip(spans[1:], group[1:], strict=True)), self.path
            step = int(np.prod(group[1:]))
            cuts.append(slice(spans[0][0] * step, spans[0][1] * step))
        return tuple(cuts)


def rows(model: GLM) -> list[Row]:
    """The rows of every weight of a model, abstract or not."""
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return [Row.of(weight_path(path), leaf.shape, model.config) for path, leaf in leaves]


def tensor_shapes(config: Config, mtp_copies: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds; `mtp_copies` adds the MTP layer's own
    embedding and head, which some repositories have."""
    shapes = {name: row.tensor_shape for row in rows(GLM(config, seed=None)) for name, _ in row.tensors()}
    return shapes | (_copies(config) if mtp_copies else {})


def _copies(config: Config) -> dict[str, tuple[int, ...]]:
    shape = (config.vocab_size, config.hidden_size)
    return (
        {name.format(l=config.num_hidden_layers): shape for name in _COPIES} if config.num_nextn_predict_layers else {}
    )


def without_missing_mtp(config: Config, tensors: Iterable[str], where: str | Path) -> Config:
    """The config without the MTP layer it promises, after one warning, if the folder has none of its tensors."""
    prefix = _PREFIX.format(l=config.num_hidden_layers)
    if config.num_nextn_predict_layers and not any(name.startswith(prefix) for name in tensors):
        warnings.warn(
            f"{where}: config.json has num_nextn_predict_layers {config.num_nextn_predict_layers}, but there is no "
            f"tensor {prefix}*; loading without the MTP layer",
            stacklevel=3,
        )
        return dataclasses.replace(config, num_nextn_predict_layers=0)
    return config


def check(config: Config, tensors: Mapping[str, Tensor | None], where: str | Path) -> None:
    """Raises BadInput unless the folder has exactly the tensors the config implies, in shapes and dtypes that are
    theirs; None is a tensor of which the name alone is known. All that is wrong is said at once."""
    wanted, known = tensor_shapes(config), dict(_copies(config))
    if config.tie_word_embeddings:
        known["lm_head.weight"] = (config.vocab_size, config.hidden_size)  # another copy of the embedding
    problems = []
    if missing := [name for name in wanted if name not in tensors]:
        problems.append(f"{len(missing)} tensors are missing: {_grouped(missing)}")
    if extra := [name for name in tensors if name not in wanted and name not in known]:
        problems.append(f"{len(extra)} tensors have no place in this model: {_grouped(extra)}")
    for name, tensor in tensors.items():
        shape = tensor and (wanted.get(name) or known.get(name))
        if shape and tensor.shape != shape:
            problems.append(f"{name} is {list(tensor.shape)}, the config implies {list(shape)}")
        elif shape and tensor.dtype not in ("BF16", "F32"):
            problems.append(f"{name} is {tensor.dtype}, not BF16 or F32")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise BadInput(f"{where}: " + "; ".join(problems[:8]) + more)


def _grouped(names: list[str]) -> str:
    """Long lists of names with the experts of one projection, and then the layers, drawn together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=experts\.)\d+", "*", name), []).append(name)
    shown = [k if len(v) > 1 else v[0] for k, v in groups.items()]
    told = [f"{s} ({len(groups[s])})" if "*" in s else s for s in shown[:6]]
    return ", ".join(told) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")


def load_weights(
    model: GLM,
    tensors: Mapping[str, Tensor],
    progress: Callable[[int], None] = lambda nbytes: None,
    workers: int = 8,
) -> GLM:
    """Fills an abstract model from checked tensors: each device gets its own byte ranges, a layer at a time, so that
    no more than one layer of one weight is in host memory. `progress` is told the bytes of each part put in place."""
    by_path = {row.path: row for row in rows(model)}
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
    by_path, total = {row.path: row for row in rows(model)}, 0
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
    for rows, parts in _readings(row, leaf).items():
        index = (*itertools.starmap(slice, rows), *(slice(0, n) for n in leaf.shape[len(rows) :]))
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
    for row in rows(model):
        leaf = leaves[row.path]
        dtype = {"bfloat16": "BF16", "float32": "F32"}[leaf.dtype.name]
        for name, at in row.tensors():
            get = lambda row=row, leaf=leaf, at=at: held(row, leaf, at)
            entries.append((_order(name), name, (dtype, row.tensor_shape, get)))
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


def _order(name: str):
    """Embedding first, then layer by layer, tensors of one weight together, then norm and head."""
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    if not layer:
        return (0 if "embed" in name else 2, 0, name)
    pieces = re.sub(r"experts\.\d+\.", "experts.", layer[2]).replace("up_proj", "gate_proj")
    return (1, int(layer[1]), pieces, name)
