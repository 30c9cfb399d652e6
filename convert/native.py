"""The folder that `convert` makes: one set of bytes, of which Hugging Face's tools and Orbax's each see their own.

    state/hf/                       a Hugging Face folder: shards, index, config.json, tokenizer
    state/manifest.ocdbt, state/d/  Orbax's arrays, as byte ranges of those shards
    state/_METADATA, ...            what makes it an Orbax checkpoint
    glm_manifest-*.json.gz          every tensor: where it is, its SHA-256, how many of its numbers are not finite
    glm_seal.json                   the digest of every file but the shards; written last, it is what makes it whole

Nothing here imports jax or orbax: what looks at checkpoints starts at once."""

import dataclasses
import gzip
import io
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from glm_jax.convert import ocdbt
from glm_jax.convert.planning import FORMAT, Array, Plan, belongs, digest, sha256
from glm_jax.convert.safetensors import DTYPES, SHARD, Tensor, blamed_on, is_name, read_small
from glm_jax.errors import BadInput, MissingInput, show

SEAL = "glm_seal.json"
HF = "state/hf"
MOST_SEAL = 1 << 20  # bytes: of some thousand small files
_NODE = "d/index"
_MOST_MANIFEST = 1 << 29  # bytes of a manifest's text: fifty times GLM-4.6's
_LEFTOVER = re.compile(r"glm_manifest-[0-9a-f]{16}\.json\.gz(\.tmp)?|glm_seal\.json\.tmp")
_MOST_PACKED = 30  # times as much text as there are bytes, beyond the first million; without digests it is 14 times
_MANIFEST = re.compile(r"glm_manifest-[0-9a-f]{16}\.json\.gz")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FACTS = {"format", "dtype", "mtp", "files", "beside", "mode"}
_ALIASES = {("head", "embed"), ("mtp.embed", "embed"), ("mtp.head", "head")}
_ZARR = {"BF16": "bfloat16", "F32": "float32", "F8_E4M3": "float8_e4m3fn"}
_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"


@dataclasses.dataclass(slots=True)
class Record:
    """One tensor: where it is, and, once it was read, its digest and how many of its numbers are not finite."""

    dtype: str
    shape: tuple[int, ...]
    file: str  # in state/hf
    offset: int
    nbytes: int
    sha256: str | None = None
    nonfinite: int | None = None


@dataclasses.dataclass
class Manifest:
    """What glm_manifest-*.json.gz holds."""

    mode: str  # "index", "copy" or "repack"
    why: str
    facts: dict[str, Any]  # of the plan
    files: dict[str, dict[str, Any]]  # shard -> size, header (its SHA-256), verbatim
    tensors: dict[str, Record]
    arrays: tuple[Array, ...]
    aliases: dict[str, str]
    dropped: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def root(self) -> str | None:
        """The root of the Merkle tree over all tensors in the order of their names; None while a digest is missing."""
        if any(t.sha256 is None for t in self.tensors.values()):
            return None
        leaf = lambda name, t: bytes.fromhex(sha256(b"\0" + name.encode() + b"\0" + bytes.fromhex(t.sha256)))
        level = [leaf(name, t) for name, t in sorted(self.tensors.items())]
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2], strict=False)
            odd = level[-1:] if len(level) % 2 else []
            level = [bytes.fromhex(sha256(b"\1" + a + b)) for a, b in pairs] + odd
        return level[0].hex() if level else sha256(b"")

    def summary(self) -> dict[str, Any]:
        """What a person wants to know of a converted folder."""
        digested = sum(t.sha256 is not None for t in self.tensors.values())
        return {
            "mode": self.mode,
            "why": self.why,
            "dtype": self.facts["dtype"] or "as stored",
            "mtp": self.facts["mtp"],
            "tensors": len(self.tensors),
            "digested": digested,
            "not_finite": sum(t.nonfinite or 0 for t in self.tensors.values()),
            "root": self.root,
            "aliases": self.aliases,
        }

    def to_bytes(self) -> bytes:
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("tensors", "arrays")}
        out = io.BytesIO()
        with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0) as file:  # in parts: the text is long
            dump = lambda value: json.dumps(value, separators=(",", ":")).encode()
            file.write(dump(rest | {"root": self.root})[:-1] + b',"arrays":[')
            for i, a in enumerate(self.arrays):
                file.write(b"," * bool(i) + dump([a.path, a.dtype, a.shape, a.stacked, a.tensors]))
            file.write(b'],"tensors":{')
            every, comma = iter(self.tensors.items()), b""
            while some := list(itertools.islice(every, 1000)):
                values = {n: (t.dtype, t.shape, t.file, t.offset, t.nbytes, t.sha256, t.nonfinite) for n, t in some}
                file.write(comma + dump(values)[1:-1])
                comma = b","
            file.write(b"}}")
        return out.getvalue()

    @classmethod
    def of_bytes(cls, data: bytes, where: Path) -> "Manifest":
        try:
            most = min(_MOST_MANIFEST, (1 << 20) + _MOST_PACKED * len(data))
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                text = file.read(most + 1)
            if len(text) > most:
                raise ValueError(f"{len(data):,} bytes unpack to more than {most:,}")
            if text.count(b"[") + text.count(b"{") > 100 + len(text) // 20:  # lists are many times their text
                raise ValueError("more lists and objects than names")
            raw = json.loads(text)
            raw.pop("root")
            raw["tensors"] = {n: Record(t[0], tuple(t[1]), *t[2:]) for n, t in raw["tensors"].items()}
            raw["arrays"] = tuple(Array(p, d, tuple(s), k, tuple(t)) for p, d, s, k, t in raw["arrays"])
            made = cls(**{**raw, "dropped": tuple(raw["dropped"]), "left": tuple(raw["left"])})
            if wrong := next(_wrong(made), None):
                raise ValueError(wrong)
            return made
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            IndexError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            zlib.error,
        ) as error:
            why = str(error) if str(error).isprintable() and len(str(error)) < 600 else show(str(error))
            raise BadInput(f"{where}: not a manifest of this version ({why}): convert again") from None


def _wrong(m: Manifest) -> Iterator[str]:
    """What cannot be in a manifest, which may be anybody's: no path leads out of the folder, no number out of a file.
    May raise what operations on wrong types do."""
    facts = m.facts
    if m.mode not in ("index", "copy", "repack") or facts.keys() != _FACTS or facts["mode"] != m.mode:
        yield f"mode {show(m.mode)} with facts {show(facts)}"
    if facts["format"] != FORMAT or facts["dtype"] not in (None, "BF16", "F32") or facts["mtp"] not in ("keep", "drop"):
        yield f"facts {show(facts)}"
    if not all(type(text) is str and text.isprintable() for text in (m.why, *m.dropped, *m.left)):
        yield "why, dropped or left are not text"
    if not m.aliases.items() <= _ALIASES:
        yield f"aliases {show(m.aliases)}"
    for name, sha in facts["beside"].items():
        if not belongs(name) or not is_digest(sha):
            yield f"{show(name)} is no file that comes along"
    for name, (size, sha) in facts["files"].items():
        if not SHARD.fullmatch(name) or not is_count(size) or not is_digest(sha):
            yield f"{show(name)} is no file of weights"
    for name, file in m.files.items():
        if not SHARD.fullmatch(name) or file.keys() != {"size", "header", "verbatim"}:
            yield f"{show(name)} is not the bare name of a .safetensors file, with size, header and verbatim"
        if not is_count(file["size"]) or not is_digest(file["header"]) or type(file["verbatim"]) is not bool:
            yield f"file {show(name)}: {show(file)}"
    for name, t in m.tensors.items():
        whole = is_name(name) and all(map(is_count, (*t.shape, t.offset, t.nbytes)))
        if not whole or t.nbytes != math.prod(t.shape) * DTYPES[t.dtype].itemsize:
            yield f"tensor {show(name)}: {show(t.dtype)} {show(list(t.shape))} of {show(t.nbytes)} bytes"
        elif t.offset < 8 or t.offset + t.nbytes > m.files[t.file]["size"]:
            yield f"tensor {show(name)}: {t.nbytes:,} bytes from {t.offset:,} on are not in {show(t.file)}"
        elif not (t.sha256 is None or is_digest(t.sha256)) or not (t.nonfinite is None or is_count(t.nonfinite)):
            yield f"tensor {show(name)}: SHA-256 {show(t.sha256)}, {show(t.nonfinite)} not finite"
    if not 0 < len({a.path for a in m.arrays}) == len(m.arrays):
        yield "no array, or one that is given twice"
    for a in m.arrays:
        if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", a.path) or a.dtype not in _ZARR or not all(map(is_count, a.shape)):
            yield f"array {show(a.path)}: {show(a.dtype)} {show(list(a.shape))}"
        elif not is_count(a.stacked) or math.prod(a.shape[: a.stacked]) != len(a.tensors):
            yield f"array {show(a.path)}: {len(a.tensors):,} tensors are no stack of {show(list(a.shape))}"
        numbers = math.prod(a.shape[a.stacked :])
        for t in map(m.tensors.__getitem__, a.tensors):
            if t.dtype != a.dtype or math.prod(t.shape) != numbers:
                yield f"array {show(a.path)}: one of its tensors is {t.dtype} {show(list(t.shape))}"


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_digest(value: Any) -> bool:
    return type(value) is str and bool(_SHA256.fullmatch(value))


def misplaced(manifest: Manifest, tensors: Mapping[str, Tensor]) -> list[str]:
    """The tensors of which the manifest does not say what the headers of the shards do."""
    told = {n: (t.dtype, t.shape, t.file, t.offset, t.nbytes) for n, t in manifest.tensors.items()}
    there = {n: (t.dtype, t.shape, t.file.name, t.offset, t.nbytes) for n, t in tensors.items()}
    return sorted(n for n in {*told, *there} if told.get(n) != there.get(n))


def manifest_of(plan: Plan, mode: str, why: str) -> Manifest:
    files = {o.name: {"size": o.size, "header": sha256(o.header), "verbatim": o.verbatim} for o in plan.outputs}
    records = {p.name: Record(p.dtype, p.shape, o.name, p.offset, p.nbytes) for o in plan.outputs for p in o.parts}
    return Manifest(
        mode, why, plan.facts | {"mode": mode}, files, records, plan.arrays, plan.aliases, plan.dropped, plan.left
    )


def index_files(manifest: Manifest) -> dict[str, bytes]:
    """Every small file that makes Orbax's arrays of the shards, by its path in the folder."""
    shards = sorted(manifest.files)
    number = {name: i for i, name in enumerate(shards)}
    values: dict[str, bytes | ocdbt.Range] = {}
    tree = {}
    for array in manifest.arrays:
        inner = array.shape[array.stacked :]
        values[f"{array.path}/zarr.json"] = _zarr(array)
        tail = "/0" * len(inner)
        for at, name in zip(np.ndindex(*array.shape[: array.stacked]), array.tensors, strict=True):
            t = manifest.tensors[name]
            values[f"{array.path}/c{''.join(f'/{i}' for i in at)}{tail}"] = (number[t.file], t.offset, t.nbytes)
        keys = tuple(array.path.split("."))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    name = bytes.fromhex(digest(manifest.facts))[:16]
    database = ocdbt.database(values, [f"hf/{shard}" for shard in shards], _NODE, name)
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    checkpoint = {
        "item_handlers": {"state": _HANDLER},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": 1,
        "commit_timestamp_nsecs": 2,
        "custom_metadata": {"glm_jax": {"format": FORMAT, "mode": manifest.mode}},
    }
    return {f"state/{path}": data for path, data in database.items()} | {
        "state/_METADATA": json.dumps(metadata, separators=(",", ":")).encode(),
        "_CHECKPOINT_METADATA": json.dumps(checkpoint, separators=(",", ":")).encode(),
        "orbax.checkpoint": b"",
        "commit_success.txt": b"Checkpoint commit was successful\n",
    }


def _zarr(array: Array) -> bytes:
    chunk = [1] * array.stacked + list(array.shape[array.stacked :])
    facts = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": array.shape,
        "data_type": _ZARR[array.dtype],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "fill_value": 0.0,
    }
    return json.dumps(facts, separators=(",", ":")).encode()


def seal_bytes(manifest_name: str, files: Mapping[str, str]) -> bytes:
    """The seal of a folder with this manifest and these digests of small files."""
    facts = {"format": FORMAT, "manifest": manifest_name, "files": dict(sorted(files.items()))}
    return (json.dumps(facts, indent=1) + "\n").encode()


def manifest_name(data: bytes) -> str:
    return f"glm_manifest-{sha256(data)[:16]}.json.gz"


def is_native(folder: "str | Path") -> bool:
    return (Path(folder).expanduser() / SEAL).is_file()


def read(folder: Path, again: bool = True) -> tuple[Manifest, dict[str, str]]:
    """The manifest of a folder, and the digests of its small files, both checked against the seal."""
    path = folder / SEAL
    for inner in (folder / "state", folder / HF):
        if inner.is_symlink():
            raise BadInput(f"{inner}: a symbolic link, of which a converted folder has none: convert again")
    sealed = read_small(path, MOST_SEAL)
    try:
        seal = json.loads(sealed)
        name, files = seal["manifest"], seal["files"]
        same = seal_bytes(name, files) == sealed and seal["format"] == FORMAT
        same = same and bool(_MANIFEST.fullmatch(name)) and all(map(_is_inside, files))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        same = False
    if not same:
        raise BadInput(f"{path}: is damaged, or of another version of glm_jax: convert again")
    try:
        data = read_small(folder / name)
    except MissingInput:
        if again and read_small(path, MOST_SEAL) != sealed:  # another process has just recorded digests
            return read(folder, again=False)
        raise
    if sha256(data) != files.get(name):
        raise BadInput(f"{folder / name}: is not what the seal says: it was changed or is damaged")
    return Manifest.of_bytes(data, folder / name), files


def _is_inside(name: str) -> bool:
    """Whether a path of the seal is that of a file below its folder, in its shortest form."""
    path = PurePosixPath(name)
    return name.isprintable() and str(path) == name and not path.is_absolute() and not {"..", "."} & {*path.parts, name}


def hf_folder(folder: Path) -> Path:
    """The Hugging Face folder in a converted one, after a look at the seal and the sizes; any other folder as it is."""
    if not is_native(folder):
        return folder
    check_sizes(folder, read(folder)[0])
    return folder / HF


def check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, facts in manifest.files.items():
        path = folder / HF / name
        size = path.stat().st_size if path.is_file() else None
        if size != facts["size"]:
            raise BadInput(f"{path}: has {size} bytes, the manifest says {facts['size']:,}: glm-jax verify {folder}")


def is_leftover(name: str, files: Collection[str]) -> bool:
    """Whether a file in a folder whose seal names `files` is of a check that was cut off while it recorded digests."""
    return name not in files and bool(_LEFTOVER.fullmatch(name))


def write_small(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes small files and brings them to the disk, each whole or not at all. Raises NoSpace and DestinationError."""
    for name, data in files.items():
        path = folder / name
        temporary = path.with_name(path.name + ".tmp")
        with blamed_on(path, len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            try:
                with open(temporary, "xb") as file:  # not what a link of this name leads to
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
    with blamed_on(folder, 0):
        sync_folders({(folder / name).parent for name in files} | {folder})


def sync_folders(folders: Iterable[Path]) -> None:
    for folder in folders:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
