"""What a conversion makes, worked out from headers, index and config.json alone: the arrays, the tensors of which each
is a stack, and the files they are in. Nothing is read of the weights, and nothing written."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glm_jax.config import MOST_BYTES, Config
from glm_jax.convert.safetensors import (
    DTYPES,
    INDEX,
    SMALL,
    Tensor,
    header_bytes,
    read_folder,
    read_json,
    read_raw_header,
    read_small,
)
from glm_jax.convert.table import Row, copies, grouped, refuse_many, rows, without_missing_mtp
from glm_jax.errors import BadInput, UsageError, show

FORMAT = 1  # of the folder that is made
FP8 = "F8_E4M3"
SCALES = ("_scale", "_scale_inv")  # of X.weight: one for each output, or one for each block
STORED = {"bf16": "BF16", "f32": "F32"}  # what --dtype may say
TEXTS = (".json", ".txt", ".jinja", ".model", ".md")
ROUTER_BIAS = "e_score_correction_bias"


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of the checkpoint: a stack of tensors in their own orientation."""

    path: str  # in the tree, as "moe.mlp.gate_up"
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    stacked: int  # axes in front that tell the tensors apart
    tensors: tuple[str, ...]  # in the C order of these


@dataclasses.dataclass(frozen=True, slots=True)  # there are as many as tensors
class Part:
    """One tensor of a file that is made."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Output:
    """A file of weights that is made: byte for byte the source's if `verbatim`."""

    name: str
    verbatim: bool
    header: bytes  # its length in front
    parts: tuple[Part, ...]  # in the order of their bytes

    @property
    def size(self) -> int:
        return self.parts[-1].offset + self.parts[-1].nbytes if self.parts else len(self.header)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion of the folder `source`. Plans with equal facts make equal bytes."""

    source: Path
    dtype: str | None  # "BF16" or "F32"; None: as stored
    mtp: str  # "keep" or "drop"
    tensors: dict[str, Tensor]  # all of the source
    arrays: tuple[Array, ...]
    outputs: tuple[Output, ...]
    aliases: dict[str, str]  # weights without tensors because they are other weights: path -> path
    dropped: tuple[str, ...]  # tensors that are in no array: the MTP layer's
    scales: dict[str, str]  # of tensors whose scale goes into them: its name
    blocks: tuple[int, int] | None  # and of how many numbers each is the scale; None: of an output
    beside: dict[str, bytes | None]  # files that come along: None as they are, else what is in them now
    left: tuple[str, ...]  # and files that do not
    facts: dict[str, Any]  # what the result depends on

    @property
    def nbytes(self) -> int:
        """Of all files of weights that are made."""
        return sum(output.size for output in self.outputs)


def plan(source: "str | Path", dtype: str | None = None, mtp: str = "keep") -> Plan:
    """The conversion of a Hugging Face folder. `dtype`: "bf16" or "f32", which all weights but the routers' biases get
    (default: as stored); `mtp`: "keep" the MTP layer or "drop" it.

    Raises MissingInput and BadInput for a folder that is not whole: every tensor of it must have its place, and every
    place its tensor, with missing experts named by layer, projection and number."""
    source = Path(source).expanduser()
    if mtp not in ("keep", "drop"):
        raise UsageError(f"--mtp {mtp}: keep or drop")
    if dtype is not None and dtype not in STORED:
        raise UsageError(f"--dtype {dtype}: weights are stored as bf16 or f32, or as they are without it")
    to = STORED[dtype] if dtype else None
    tensors = read_folder(source)
    raw = read_json(source / "config.json", "the configuration", MOST_BYTES)  # first: it follows no link
    config = without_missing_mtp(Config.read(source), tensors, source)
    blocks = _blocks(raw.get("quantization_config"), source)
    there = _places(config, tensors, source)
    scales = _scales(there, tensors, blocks, source)

    layer = f"model.layers.{config.num_hidden_layers}."
    dropped = [n for n in tensors if n.startswith(layer)] if mtp == "drop" and config.num_nextn_predict_layers else []
    gone = set(dropped) | (set(scales.values()) if to else set())
    stored = {n: _stored(n, t, to) for n, t in tensors.items() if n not in gone}
    outputs = tuple(_outputs(tensors, stored, source))
    arrays = tuple(_arrays(there, scales, tensors, stored, source))
    aliases = {"head": "embed"} if config.tie_word_embeddings and "head" not in {r.path for r in there} else {}
    if config.num_nextn_predict_layers and mtp == "keep":
        missing = {"mtp.embed": "embed", "mtp.head": "head"}.items() - {(r.path, r.path[4:]) for r in there}
        aliases |= dict(sorted(missing))
    verbatim = all(output.verbatim for output in outputs) and not dropped
    beside, left = _beside(source, {t.file.name for t in tensors.values()})
    if not verbatim:
        beside |= _rewritten(source, raw, outputs, to, mtp if dropped else "keep")
    files = {path.name: path for path in sorted({t.file for t in tensors.values()})}
    headers = {o.name: o.header for o in outputs if o.verbatim}
    facts = {
        "format": FORMAT,
        "dtype": to,
        "mtp": mtp,
        "files": {
            name: [path.stat().st_size, sha256(headers.get(name) or read_raw_header(path))]
            for name, path in files.items()
        },
        "beside": {n: sha256(read_small(source / n) if b is None else b) for n, b in sorted(beside.items())},
    }
    return Plan(
        source,
        to,
        mtp,
        tensors,
        arrays,
        outputs,
        aliases,
        tuple(dropped),
        scales if to else {},
        blocks,
        beside,
        tuple(left),
        facts,
    )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest(facts: Mapping[str, Any]) -> str:
    """The digest of a plan's facts."""
    return sha256(json.dumps(facts, sort_keys=True).encode())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In words, field by field, how one plan's facts differ from another's."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names = sorted(n for n in {*a, *b} if a.get(n) != b.get(n))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found += [f"{_plain(key)}: {', '.join(map(_plain, names[:3]))}{more}"] if names else []
        elif a != b:
            found.append(f"{_plain(key)} was {_plain(a)}, is {_plain(b)}")
    return found


def _plain(value: Any) -> str:
    """A value of a plan as it is said, which may be from anybody's file."""
    return value if isinstance(value, str) and value.isprintable() and len(value) < 100 else show(value)


# ---- what goes where


def _places(config: Config, tensors: Mapping[str, Tensor], source: Path) -> list[Row]:
    """The rows whose tensors are there, all of them; BadInput if any is missing, has another shape, or has no place."""
    optional = copies(config)
    if config.tie_word_embeddings:
        optional.append(Row.of("head", config))
    refuse_many(config, tensors, source)
    found = rows(config) + [row for row in optional if row.tensor(*(0 for _ in row.stacked)) in tensors]
    names = {name: row for row in found for name, _ in row.tensors()}
    problems = []
    if missing := [name for name in names if name not in tensors]:
        problems.append(f"{len(missing)} tensors are missing: {grouped(missing)}")
    is_scale = lambda name: any(name.endswith(s) and name.removesuffix(s) in names for s in SCALES)
    if extra := [name for name in tensors if name not in names and not is_scale(name)]:
        problems.append(f"{len(extra)} tensors have no place in this model: {grouped(extra)}")
    for name, row in names.items():
        if name in tensors and tensors[name].shape != row.tensor_shape:
            problems.append(f"{name} is {list(tensors[name].shape)}, the config implies {list(row.tensor_shape)}")
        elif name in tensors and tensors[name].dtype not in ("BF16", "F32", FP8):
            problems.append(f"{name} is {tensors[name].dtype}, not BF16, F32 or {FP8}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise BadInput(f"{source}: " + "; ".join(problems[:8]) + more)
    return found


def _blocks(quantised: Any, source: Path) -> tuple[int, int] | None:
    """The block that has one scale, by config.json; None for one scale for each output."""
    size = quantised.get("weight_block_size") if isinstance(quantised, dict) else None
    if size is None:
        return None
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise BadInput(f"{source / 'config.json'}: weight_block_size is {show(size)}, not two sizes")
    return size[0], size[1]


def _scales(there: list[Row], tensors: Mapping[str, Tensor], blocks, source: Path) -> dict[str, str]:
    """The scale of every FP8 tensor; BadInput for an FP8 tensor without one, a scale of no FP8 tensor, other sizes."""
    found, problems = {}, []
    for name in (name for row in there for name, _ in row.tensors()):
        own = [name + s for s in SCALES if name + s in tensors]
        if tensors[name].dtype != FP8:
            problems += [f"{scale} scales {name}, which is {tensors[name].dtype}" for scale in own]
            continue
        if len(tensors[name].shape) != 2:
            problems.append(f"{name} is {FP8} and {list(tensors[name].shape)}: only matrices are, with their scales")
            continue
        if len(own) != 1:
            problems.append(
                f"{name} is {FP8} and has {len(own) or 'no'} scale{'s' * (len(own) != 1)} (X_scale or X_scale_inv)"
            )
            continue
        found[name], scale, (out, *in_) = own[0], tensors[own[0]], tensors[name].shape
        each = [(out,), (out, 1)] if blocks is None else [(-(-out // blocks[0]), -(-math.prod(in_) // blocks[1]))]
        if scale.shape not in each or scale.dtype not in ("F32", "BF16"):
            want = " or ".join(str(list(shape)) for shape in each)
            problems.append(f"{own[0]} is {scale.dtype} {list(scale.shape)}, not F32 or BF16 {want}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise BadInput(f"{source}: " + "; ".join(problems[:8]) + more)
    return found


def _stored(name: str, tensor: Tensor, to: str | None) -> str:
    """The dtype that a tensor gets. The router bias stays in float32: in bfloat16 it would choose other experts."""
    return tensor.dtype if to is None or name.endswith(ROUTER_BIAS) else to


def _outputs(tensors: Mapping[str, Tensor], stored: Mapping[str, str], source: Path) -> Iterable[Output]:
    """One file for each of the source's, without the tensors that go and with their new dtypes."""
    files: dict[str, list[Tensor]] = {}
    for tensor in tensors.values():
        files.setdefault(tensor.file.name, []).append(tensor)
    for name, held in sorted(files.items()):
        kept = [t for t in held if t.name in stored]
        if all(stored.get(t.name) == t.dtype for t in held):
            parts = tuple(Part(t.name, t.dtype, t.shape, t.offset, t.nbytes) for t in held)
            yield Output(name, True, read_raw_header(held[0].file), parts)
        elif kept:
            header = header_bytes([(t.name, stored[t.name], t.shape) for t in kept], {"format": "pt"}, source / name)
            parts, offset = [], len(header)
            for t in kept:
                nbytes = math.prod(t.shape) * DTYPES[stored[t.name]].itemsize
                parts.append(Part(t.name, stored[t.name], t.shape, offset, nbytes))
                offset += nbytes
            yield Output(name, False, header, tuple(parts))


def _arrays(there: list[Row], scales, tensors, stored, source: Path) -> Iterable[Array]:
    for row in there:
        names = tuple(tensors[name].name for name, _ in row.tensors())  # one string for each, not two
        if names[0] not in stored:
            continue
        stacked = row.stacked
        yield Array(row.path, _one("dtype", row, names, stored, source), row.shape, len(stacked), names)
        own = tuple(scales[name] for name in names if name in scales)
        if own and own[0] in stored:
            shape = _one("shape", row, own, {name: tensors[name].shape for name in own}, source)
            dtype = _one("dtype", row, own, stored, source)
            yield Array(row.path + "_scale", dtype, (*stacked, *shape), len(stacked), own)


def _one(what: str, row: Row, names, values: Mapping[str, Any], source: Path) -> Any:
    """What all of a stack have; an array has one dtype and one shape."""
    if len(found := {values[name] for name in names}) > 1:
        each = {value: next(name for name in names if values[name] == value) for value in found}
        told = " and ".join(f"{name} {value}" for value, name in sorted(each.items(), key=str)[:2])
        raise BadInput(f"{source}: {row.path} is one array, but {told}: --dtype bf16 gives all of it one {what}")
    return found.pop()


def _beside(source: Path, weights: set[str]) -> tuple[dict[str, bytes | None], list[str]]:
    """The files that belong to a checkpoint besides its weights, and those that are left: code, pickles, folders."""
    taken: dict[str, bytes | None] = {}
    left = []
    for entry in sorted(os.scandir(source), key=lambda e: e.name):
        if entry.name in weights:
            continue
        if belongs(entry.name) and entry.is_file() and entry.stat().st_size <= SMALL:
            taken[entry.name] = None
        else:
            left.append(_plain(entry.name))
    return taken, left


def belongs(name: str) -> bool:
    """Whether a file of this name comes along with a checkpoint."""
    text = name.endswith(TEXTS) or name.upper().startswith(("LICENSE", "NOTICE"))
    return text and name.isprintable() and "/" not in name and not name.startswith(".")


def _rewritten(source: Path, raw: dict[str, Any], outputs, to: str | None, mtp: str) -> dict[str, bytes | None]:
    """config.json and the index of files that are not the source's."""
    config, where = dict(raw), {part.name: output.name for output in outputs for part in output.parts}
    if to:
        config.pop("quantization_config", None)
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = {"BF16": "bfloat16", "F32": "float32"}[to]
    if mtp == "drop":
        config["num_nextn_predict_layers"] = 0
    try:
        made: dict[str, bytes | None] = {"config.json": (json.dumps(config, indent=2) + "\n").encode()}
    except RecursionError:
        raise BadInput(f"{source / 'config.json'}: lists and objects in it are too deep in each other") from None
    if len(outputs) > 1 or outputs[0].name != "model.safetensors":
        total = sum(part.nbytes for output in outputs for part in output.parts)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        made[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    return made
