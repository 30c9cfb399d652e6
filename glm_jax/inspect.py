"""Tables of what a model or a folder holds."""

import dataclasses
import math
from collections.abc import Iterable

import jax

from glm_jax.convert.planning import Array
from glm_jax.convert.safetensors import DTYPES
from glm_jax.model import GLM, weight_path


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of a model: `sharding` names the mesh axes of each dimension that is cut, `device_bytes` is what the
    fullest device holds of it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sharding: str
    parameters: int
    bytes: int
    device_bytes: int


def stored(arrays: Iterable[Array]) -> list[Weight]:
    """The arrays of a checkpoint as they are stored, its scales too, on one device."""
    found = []
    for a in arrays:
        size, width = math.prod(a.shape), DTYPES[a.dtype].itemsize
        text = f"[{', '.join(map(str, a.shape))}]"
        found.append(Weight(a.path, a.shape, DTYPES[a.dtype].name, text, size, size * width, size * width))
    return found


def describe(model: GLM) -> list[Weight]:
    """Every weight of a model, abstract or not, in the order of the forward pass."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        spec = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
        cuts = [axis if isinstance(axis, str) else "+".join(axis) if axis else None for axis in spec]
        text = "[" + ", ".join(f"{n}@{cut}" if cut else str(n) for n, cut in zip(leaf.shape, cuts, strict=True)) + "]"
        size, held = math.prod(leaf.shape), math.prod(leaf.sharding.shard_shape(leaf.shape))
        width = leaf.dtype.itemsize
        found.append(Weight(weight_path(path), leaf.shape, leaf.dtype.name, text, size, size * width, held * width))
    order = ("embed", "dense", "moe", "norm", "head", "mtp")
    return sorted(found, key=lambda w: order.index(w.name.split(".", 1)[0]))
