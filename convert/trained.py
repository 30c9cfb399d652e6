"""Weights that were trained, as tensors of a checkpoint: read in slices, from arrays or from an Orbax checkpoint."""

import dataclasses
import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.convert.native import Manifest
from glm_jax.convert.safetensors import DTYPES
from glm_jax.errors import BadInput, MissingInput, UsageError


@dataclasses.dataclass(frozen=True)
class Trained:
    """A tensor of a checkpoint whose numbers are elsewhere: at an index of the stacked axes of an array."""

    name: str
    dtype: str  # the one it is stored in
    shape: tuple[int, ...]
    nbytes: int
    array: Any  # NumPy's or TensorStore's
    at: tuple[int, ...]

    def read(self, rows: slice | None = None) -> np.ndarray:
        """Rows of axis 0, or all, in the dtype in which they are stored."""
        step = self.shape[0] // self.array.shape[len(self.at)]  # rows that one of the array's is: heads have several
        start, stop = (0, self.shape[0]) if rows is None else (rows.start, rows.stop)
        first = start // step
        data = self.array[(*self.at, slice(first, -(-stop // step)))]
        data = np.asarray(data.read().result() if hasattr(data, "read") else data).reshape(-1, *self.shape[1:])
        return data[start - first * step : stop - first * step].astype(DTYPES[self.dtype], copy=False)


def trained(
    weights: "Mapping[str, Any] | str | Path", manifest: Manifest, memory: int, spent: int, workers: int
) -> tuple[dict[str, Trained], str, int]:
    """The tensors of these arrays, by name, what tells them from others, and how many workers can read them at once in
    `memory` bytes, of which `spent` are. Raises UsageError for arrays that the manifest does not have or has in another
    shape, for those that are stored in FP8, and for a checkpoint whose chunks are larger than the memory."""
    mark = secrets.token_hex(16)  # of arrays in memory nothing is known
    if isinstance(weights, str | Path):
        paths = [array.path for array in manifest.arrays]
        weights, mark, workers = _opened(Path(weights).expanduser(), paths, memory, spent, workers)
    known = {array.path: array for array in manifest.arrays}
    found = {}
    for path, values in weights.items():
        if path not in known:
            raise UsageError(f"weights: {path} is none of the checkpoint's arrays, as {next(iter(known))}")
        array = known[path]
        if array.dtype not in ("BF16", "F32"):
            raise UsageError(f"weights: {path} is stored in {array.dtype}: convert the source with --dtype bf16 first")
        if tuple(values.shape) != array.shape:
            raise UsageError(f"weights: {path} is {list(values.shape)}, the checkpoint's is {list(array.shape)}")
        if not getattr(values, "is_fully_addressable", True):
            raise UsageError(f"weights: {path} lies on devices of several processes: glm_jax.save writes it from them")
        values = values if hasattr(values, "read") else np.asarray(values)  # TensorStore's stay on the disk
        dtype = getattr(values.dtype, "numpy_dtype", values.dtype)
        if dtype not in (DTYPES["BF16"], DTYPES["F16"], DTYPES["F32"], DTYPES["F64"]):
            raise UsageError(f"weights: {path} is {dtype}, not bfloat16, float16, float32 or float64")
        for at, name in zip(np.ndindex(*array.shape[: array.stacked]), array.tensors, strict=True):
            t = manifest.tensors[name]
            found[name] = Trained(name, t.dtype, t.shape, t.nbytes, values, at)
    return found, mark, workers


def _opened(folder: Path, paths: list[str], memory: int, spent: int, workers: int) -> tuple[dict[str, Any], str, int]:
    """The arrays of an Orbax checkpoint that have these paths, below at most one key ("params") and without the last
    one where that is "value", as Flax's variables have it; a digest of the checkpoint's index; and for how many workers
    `memory` is enough."""
    if not folder.is_dir():
        raise MissingInput(f"{folder}: no such folder")
    inner = [p.parent for p in (folder / "_METADATA", *sorted(folder.glob("*/_METADATA"))) if p.is_file()]
    if len(inner) != 1:
        raise BadInput(f"{folder}: {len(inner)} of its folders have a _METADATA, so this is no checkpoint of Orbax's")
    try:
        facts = json.loads((inner[0] / "_METADATA").read_bytes())
        keys = [[str(k["key"]) for k in entry["key_metadata"]] for entry in facts["tree_metadata"].values()]
        zarr3, ocdbt = bool(facts.get("use_zarr3")), bool(facts.get("use_ocdbt", True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{inner[0] / '_METADATA'}: cannot be read: {error}") from None
    if not ocdbt:
        raise BadInput(f"{folder}: is not in OCDBT, which Orbax writes by default")
    try:
        import tensorstore
    except ImportError:
        raise UsageError("--weights reads Orbax checkpoints with tensorstore: pip install orbax-checkpoint") from None
    wanted, at = set(paths), {}
    for key in filter(None, keys):
        names = key[:-1] if key[-1] in ("value", "raw_value") else key
        for first, rest in (("", names), (names[0] if names else "", names[1:])):
            if ".".join(rest) in wanted:
                at.setdefault(first, {})[".".join(rest)] = ".".join(key)
    if not at:
        raise BadInput(f"{folder}: has none of the weights of this model, such as {paths[0]}")
    most = max(map(len, at.values()))
    best = [first for first in at if len(at[first]) == most]
    if len(best) > 1 and "" not in best:
        told = ", ".join(sorted(map(repr, best)))
        raise BadInput(f"{folder}: has several sets of weights of this model, below {told}: save one of them alone")
    found, driver = {}, "zarr3" if zarr3 else "zarr"
    # What is read of a chunk is all of it, decoded: it is kept for the slices that come next.
    room = max(0, memory - spent)
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": room // 2}})
    for path, key in at["" if "" in best else best[0]].items():
        base = {"driver": "file", "path": f"{inner[0].resolve()}/"}
        store = {"driver": "ocdbt", "base": base, "path": f"{key}/"}
        spec = {"driver": driver, "kvstore": store, "recheck_cached_data": False, "recheck_cached_metadata": False}
        try:
            found[path] = tensorstore.open(spec, open=True, read=True, context=context).result()
        except (ValueError, OSError) as error:
            raise BadInput(f"{folder}: {key} cannot be opened: {str(error).splitlines()[0][:200]}") from None
    chunk = lambda store: math.prod(store.chunk_layout.read_chunk.shape) * store.dtype.numpy_dtype.itemsize
    path, most = max(((path, chunk(store)) for path, store in found.items()), key=lambda item: item[1])
    if 2 * most > room:  # as it is stored, and decoded
        raise UsageError(
            f"{folder}: {path} is stored in chunks of {most:,} bytes, each of which is read whole: --memory "
            f"{(spent + 2 * most >> 20) + 1}MiB, or save it in smaller chunks (Orbax: chunk_byte_size)"
        )
    mark = hashlib.sha256((inner[0] / "manifest.ocdbt").read_bytes()).hexdigest()
    return found, mark, max(1, min(workers, room // (2 * most + 1)))
