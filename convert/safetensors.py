"""Safetensors files, read strictly and written safely, without torch and without the `safetensors` library.

A checkpoint is other people's bytes: what does not follow the format to the letter is refused with one line that names
the file, the tensor and the numbers. A file is 8 bytes of header length, a JSON header, and the tensors' bytes."""

import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from glm_jax.errors import BadInput, DestinationError, IOFailed, MissingInput, NoSpace, UsageError, show

# The format's names. Its 4- and 6-bit types are left out: their elements have no address of their own.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SMALL = 64 << 20  # bytes that a file beside the weights has at most to be taken along
_MAX_HEADER = 100_000_000
_MAX_TENSORS = 1_000_000
_MAX_AXES = 32
SHARD = re.compile(r"[A-Za-z0-9._-]{1,200}\.safetensors")
_NUMBERED = re.compile(r"(model)-(\d+)-of-(\d+)\.safetensors")
_FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where the bytes of one tensor are: `nbytes` from `offset` (counted from the start of `file`)."""

    name: str
    dtype: str  # the format's own name, a key of DTYPES
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    stamp: tuple[int, int] = field(repr=False, compare=False)  # size and mtime_ns of the file its header was read from

    def read(self, rows: slice | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Reads rows [start, stop) of axis 0, or all, into a new array or a contiguous one of their shape and dtype;
        any number of threads may read at once.

        The file is opened for each read, so no descriptor is shared, kept or run out of. Raises BadInput if the file
        ends early or is not the one whose header was read, UsageError for rows the tensor does not have.
        """
        shape, offset, nbytes = self.shape, self.offset, self.nbytes
        if rows is not None and shape:
            start = 0 if rows.start is None else rows.start
            stop = shape[0] if rows.stop is None else rows.stop
            if rows.step not in (None, 1) or not 0 <= start <= stop <= shape[0]:
                raise UsageError(f"{self.file}: tensor {show(self.name)} has {shape[0]} rows, not {rows}")
            row = nbytes // shape[0] if shape[0] else 0
            shape, offset, nbytes = (stop - start, *shape[1:]), offset + start * row, (stop - start) * row
        out = np.empty(shape, DTYPES[self.dtype]) if out is None else out
        assert out.shape == shape and out.dtype == DTYPES[self.dtype] and out.flags.c_contiguous
        with opened(self.file) as (fd, stamp):
            if stamp != self.stamp:
                raise BadInput(
                    f"{self.file}: the file changed after its header was read ({self.stamp[0]:,} bytes then, "
                    f"{stamp[0]:,} now): load it again when nothing writes to it"
                )
            if nbytes:
                what = f"tensor {show(self.name)}"
                read_exactly(fd, out.reshape(-1).view(np.uint8).data, offset, self.file, what)
        return out


def read_header(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads and checks the header of one file: its tensors in the order of their bytes, and its metadata.

    Raises BadInput for anything but a well-formed file: header length, JSON, keys given twice, unknown dtypes, sizes
    that differ from dtype and shape, bytes of the file that belong to no tensor or to two. MissingInput: no such file.
    """
    path = Path(path)
    with opened(path) as (fd, stamp):
        size = stamp[0]
        if size < 8:
            raise BadInput(f"{path}: {size} bytes are too few for a safetensors file, which begins with 8 of length")
        head = bytearray(8)
        read_exactly(fd, memoryview(head), 0, path, "the header's length")
        if head == b"version ":
            raise BadInput(f"{path}: this is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
        length = int.from_bytes(head, "little")
        if length > min(_MAX_HEADER, size - 8):
            raise BadInput(
                f"{path}: the header says it has {length:,} bytes, but at most {min(_MAX_HEADER, size - 8):,} are "
                f"possible in this file of {size:,}: truncated, or no safetensors file"
            )
        raw = bytearray(length)
        read_exactly(fd, memoryview(raw), 8, path, "the header")
    if not raw.startswith(b"{"):
        raise BadInput(f"{path}: the header does not begin with '{{' but with {show(bytes(raw[:16]))}")
    if max(raw.count(b"{"), raw.count(b"[") // 2) > _MAX_TENSORS + 2:  # before any object is made of them
        raise BadInput(f"{path}: the header describes more than {_MAX_TENSORS:,} tensors")
    header = _json(path, raw, "the header")
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(map(_is_text, chain(metadata, metadata.values()))):
        raise BadInput(f"{path}: __metadata__ is not an object of strings: {show(metadata)}")

    data = 8 + length
    tensors = [_tensor(path, name, entry, data, stamp) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    end = data
    for tensor in tensors:
        if tensor.offset != end:
            raise BadInput(
                f"{path}: tensor {show(tensor.name)} begins at byte {tensor.offset - data:,} of the data, but the one "
                f"before it ends at {end - data:,}: {'they overlap' if tensor.offset < end else 'a hole'}"
            )
        end += tensor.nbytes
    if size != end:
        amount = f"truncated by {end - size:,}" if size < end else f"{size - end:,} too many"
        raise BadInput(f"{path}: the file has {size:,} bytes, its header wants {end:,}: {amount}")
    return {tensor.name: tensor for tensor in tensors}, metadata


def read_raw_header(path: Path) -> bytes:
    """The header of a file as it stands there, its length in front, unparsed."""
    with opened(path) as (fd, (size, _)):
        head = bytearray(8)
        read_exactly(fd, memoryview(head), 0, path, "the header's length")
        length = int.from_bytes(head, "little")
        if length > min(_MAX_HEADER, size - 8):
            raise BadInput(f"{path}: the header says it has {length:,} bytes, the file has {size:,}: it was changed")
        raw = bytearray(8 + length)
        read_exactly(fd, memoryview(raw), 0, path, "the header")
    return bytes(raw)


def read_json(path: Path, what: str, most: int = _MAX_HEADER) -> dict[str, Any]:
    """A file that is a JSON object, no key twice; BadInput says `what` it should have been."""
    with opened(path) as (fd, (size, _)):
        if size > most:
            raise BadInput(f"{path}: {size:,} bytes, {what} has at most {most:,}")
        raw = bytearray(size)
        read_exactly(fd, memoryview(raw), 0, path, what)
    return _json(path, raw, what)


def read_small(path: Path, most: int = SMALL) -> bytes:
    """All of a small file; as with weights, no link is followed but the Hugging Face cache's own."""
    with opened(path) as (fd, (size, _)):
        if size > most:
            raise BadInput(f"{path}: {size:,} bytes, at most {most:,} are read of such a file")
        raw = bytearray(size)
        read_exactly(fd, memoryview(raw), 0, path, "the file")
    return bytes(raw)


def read_index(folder: Path) -> dict[str, str] | None:
    """The file of every tensor, as the checkpoint's index says, None without one. Raises BadInput."""
    return _read_index(folder / INDEX) if os.path.exists(folder / INDEX) else None


def read_folder(folder: Path | str, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Reads the headers of a checkpoint: of every file that model.safetensors.index.json names, else of the only one.

    Files in which the index has no tensor that is `wanted` are not opened and need not be there.
    In the order of the files' names and of the bytes in them. Raises MissingInput for files that are not there, and
    BadInput where files, headers and index do not say exactly the same. The index's `total_size` is not looked at:
    published ones are wrong.
    """
    folder = Path(folder)
    try:
        found = sorted(os.listdir(folder))
    except FileNotFoundError:
        raise MissingInput(f"{folder}: no such folder") from None
    except NotADirectoryError:
        raise BadInput(f"{folder}: this is a file; give the folder that holds the checkpoint") from None
    except OSError as error:
        raise BadInput(f"{folder}: cannot be read: {error.strerror}") from None
    files = [name for name in found if name.endswith(".safetensors")]
    if INDEX not in found:
        if files != [SINGLE]:
            raise _no_index(folder, files, found)
        tensors, _ = read_header(folder / SINGLE)
        if not tensors:
            raise BadInput(f"{folder / SINGLE}: no tensors in it")
        return tensors

    where = _read_index(folder / INDEX)  # tensor name -> file name
    named = set(where.values())
    files_wanted = sorted({file for name, file in where.items() if wanted(name)})
    missing = [name for name in files_wanted if not os.path.exists(folder / name)]  # False also for a link to nothing
    if missing:
        held = {name: [t for t, file in where.items() if file == name] for name in missing[:4]}
        each = "; ".join(f"{name} ({_some(names)})" for name, names in held.items())
        each += f"; and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise MissingInput(
            f"{folder}: {len(missing)} of {len(files_wanted)} files named by {INDEX} are missing: {each}"
        )
    if extra := [name for name in files if name not in named]:
        raise BadInput(f"{folder}: {INDEX} does not name {_some(extra)}: move what does not belong here away")
    tensors = {}
    for name in files_wanted:
        header, _ = read_header(folder / name)
        if unnamed := [t for t in header if t not in where]:
            raise BadInput(f"{folder / name}: {_some(unnamed)} in the file, but not in {INDEX}")
        if elsewhere := [t for t in header if where[t] != name]:
            other = where[elsewhere[0]]
            raise BadInput(f"{folder / name}: {_some(elsewhere)} in the file, but {INDEX} says {other}")
        tensors.update(header)
    opened_files = set(files_wanted)
    if absent := [t for t, file in where.items() if file in opened_files and t not in tensors]:
        file = where[absent[0]]
        raise BadInput(f"{folder / file}: {_some([t for t in absent if where[t] == file])} not in it as {INDEX} says")
    return tensors


def write(path: Path | str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file, whole or not at all.

    Any memory layout is stored in C order. Wider dtypes come first, so that each tensor is aligned, else the order is
    the mapping's. Metadata is {"format": "pt"}, which transformers asks for, unless given. Raises DestinationError if
    `path` exists and is not empty or cannot be written, NoSpace, and UsageError for what the format cannot hold.
    """
    entries = []
    for name, array in tensors.items():
        if array.dtype not in _NAMES:
            raise UsageError(f"{path}: tensor {show(name)} is {array.dtype}, which safetensors cannot hold")
        entries.append(_Entry(name, _NAMES[array.dtype], array.shape, lambda array=array: array))
    _write_tensors(Path(path), entries, metadata)


def write_folder(
    folder: Path | str,
    tensors: Mapping[str, tuple[str, tuple[int, ...], Callable[[], np.ndarray]]],
    shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes the weights of a Hugging Face folder and returns the files: model.safetensors, or shards and their index.

    `tensors` gives for each name (dtype, shape, get), dtype as in DTYPES; `get()` is called when the tensor's turn
    comes, and one array is held at a time. A shard has at most `shard_bytes` of tensors, or one tensor. The index is
    written last, and what was written is removed if anything fails. Raises as `write`.
    """
    folder = Path(folder)
    shards: list[list[_Entry]] = [[]]
    used = 0
    for name, (dtype, shape, get) in tensors.items():
        if dtype not in DTYPES:
            raise UsageError(f"{folder}: tensor {show(name)} has dtype {show(dtype)}; known are {', '.join(DTYPES)}")
        entry = _Entry(name, dtype, tuple(shape), get)
        if shards[-1] and used + entry.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += entry.nbytes
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]

    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors") or name == INDEX)
    except OSError as error:
        raise DestinationError(f"{folder}: cannot be written: {error.strerror}") from None
    for name in there:
        _check_free(folder / name)
        if name not in names:
            raise DestinationError(f"{folder}: holds {name} already: choose another folder or empty this one")
    total = sum(entry.nbytes for shard in shards for entry in shard)
    _check_space(folder, total)

    written: list[Path] = []
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_tensors(folder / name, shard, metadata)
            written.append(folder / name)
        if len(shards) > 1:
            where = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            text = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
            _write_bytes(folder / INDEX, len(text), [text])
            written.append(folder / INDEX)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written


# ---- reading


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, tuple[int, int]]]:
    """A descriptor of a regular file, and the file's (size, mtime_ns). Without O_NONBLOCK a named pipe would hang."""
    real = _cached_blob(path) if os.path.islink(path) else path
    try:
        fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MissingInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be opened: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(f"{path}: not a regular file")
        yield fd, (status.st_size, status.st_mtime_ns)
    finally:
        os.close(fd)


def _cached_blob(path: Path) -> Path:
    """The file behind a symbolic link, which only the cache of huggingface_hub may use.

    <cache>/models--x--y/snapshots/<commit>/<file> -> ../../blobs/<hash>, and from huggingface_hub 2 on that may be one
    more link, to the copy all repositories share: -> ../../blobs/<2 digits>/<hash>. Anything else could make a
    downloaded folder read a file of its choice.
    """
    folder = path.parent.resolve()
    link = os.readlink(path)
    if folder.parent.name == "snapshots" and re.fullmatch(r"\.\./\.\./blobs/[0-9a-f]{40,64}", link):
        blob = folder.parent.parent / "blobs" / Path(link).name
        if not blob.is_symlink():
            return blob
        link = os.readlink(blob)
        if re.fullmatch(r"\.\./\.\./blobs/[0-9a-f]{2}/[0-9a-f]{64}", link):
            return folder.parents[2] / Path(*Path(link).parts[2:])  # itself no link: it is opened with O_NOFOLLOW
    raise BadInput(
        f"{path}: a symbolic link to {show(link)}; links are followed only inside the Hugging Face cache: "
        "put the file here, or a hard link to it"
    )


def read_exactly(fd: int, into: memoryview, offset: int, path: Path, what: str) -> None:
    """Fills a buffer from a position of a file. Raises BadInput if the file ends early, IOFailed if the disk does not
    give it at the third try."""
    done = tries = 0
    while done < len(into):
        try:
            count = os.preadv(fd, [into[done : done + (1 << 30)]], offset + done)  # one call moves less than 2 GiB
        except OSError as error:
            if error.errno == errno.EIO and (tries := tries + 1) < 3:
                continue
            raise IOFailed(f"{path}: {what}: reading byte {offset + done:,} failed: {error.strerror}") from None
        if count == 0:
            raise BadInput(f"{path}: {what}: the file ends after {done:,} of {len(into):,} bytes")
        done += count


def _json(path: Path, raw: bytes | bytearray, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys: set[str] = set()
            twice = next(key for key, _ in pairs if key in keys or keys.add(key))
            raise ValueError(f"the key {show(twice)} is given twice")
        return made

    try:  # decoded here: json.loads would also take UTF-16 and UTF-32
        value = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError, MemoryError) as error:
        raise BadInput(f"{path}: {what} is not valid: {str(error) or type(error).__name__}") from None
    if type(value) is not dict:
        raise BadInput(f"{path}: {what} is not a JSON object but {show(value)}")
    return value


def _is_text(value: object) -> bool:
    """Whether a JSON value is a string that UTF-8 can hold; an escape can smuggle in half a surrogate pair."""
    return type(value) is str and not re.search("[\ud800-\udfff]", value)


def is_name(name: str) -> bool:
    """Whether a tensor may be called so."""
    return name.isprintable() and 0 < len(name.encode()) <= 512


def _tensor(path: Path, name: str, entry: Any, data: int, stamp: tuple[int, int]) -> Tensor:
    """One entry of a header, checked by itself; `data` is where the tensors' bytes begin in the file."""

    def bad(why: str) -> BadInput:
        return BadInput(f"{path}: tensor {show(name)}: {why}")

    if not is_name(name):
        raise bad("a name is 1 to 512 bytes of printable text")
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad(f"want an object of dtype, shape and data_offsets, have {show(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise bad(f"dtype {show(dtype)} is none of {', '.join(DTYPES)}")
    if type(shape) is not list or len(shape) > _MAX_AXES or not all(type(n) is int and n >= 0 for n in shape):
        raise bad(f"shape {show(shape)} is not a list of at most {_MAX_AXES} integers >= 0")
    if type(offsets) is not list or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise bad(f"data_offsets {show(offsets)} is not a pair of integers")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise bad(f"data_offsets {show(offsets)} are negative or in the wrong order")
    count = math.prod(shape)
    width = DTYPES[dtype].itemsize
    if count * width >= 2**63 or not count and math.prod(n for n in shape if n) * width >= 2**63:
        raise bad(f"shape {show(shape)} of {dtype} is more than 2^63 bytes")
    if end - begin != count * width:
        raise bad(
            f"shape {show(shape)} of {dtype} is {count * width:,} bytes, data_offsets {show(offsets)} are "
            f"{end - begin:,}"
        )
    return Tensor(name, sys.intern(dtype), tuple(shape), path, data + begin, end - begin, stamp)


def _read_index(path: Path) -> dict[str, str]:
    where = read_json(path, "the index").get("weight_map")
    if type(where) is not dict or not where:
        raise BadInput(f"{path}: weight_map is not an object that gives each tensor's file: {show(where)}")
    for name, file in where.items():
        if not is_name(name):
            raise BadInput(f"{path}: tensor {show(name)}: a name is 1 to 512 bytes of printable text")
        if type(file) is not str or not SHARD.fullmatch(file):
            raise BadInput(f"{path}: tensor {show(name)}: {show(file)} is not the bare name of a .safetensors file")
    return where


def _no_index(folder: Path, files: list[str], found: list[str]) -> MissingInput | BadInput:
    """Why a folder without an index is no checkpoint: anything but the one file model.safetensors."""
    if SINGLE in files:
        rest = _some([name for name in files if name != SINGLE])
        return BadInput(
            f"{folder}: {rest} beside {SINGLE}, but no {INDEX} that names them: fetch it from the same place, or move "
            f"{rest} away to load {SINGLE} alone"
        )
    if files:
        lost: set[str] = set()
        for prefix, _, count in (match.groups() for match in map(_NUMBERED.fullmatch, files) if match):
            if int(count) <= 10_000:
                lost |= {f"{prefix}-{i:0{len(count)}}-of-{count}.safetensors" for i in range(1, int(count) + 1)}
        missing = [INDEX, *sorted(lost - set(files))]
        return BadInput(
            f"{folder}: {len(files)} safetensors ({_some(files)}), but missing {_some(missing, 8)}: fetch what is "
            f"missing from the same place (one file alone must be called {SINGLE})"
        )
    if foreign := [name for name in found if name.endswith(_FOREIGN)]:
        return BadInput(
            f"{folder}: no safetensors, only {_some(foreign)}: pickled weights are never read, since loading them runs "
            "code, and neither are GGUF and the like: fetch the model's safetensors, or save it again with "
            "transformers' save_pretrained"
        )
    if "snapshots" in found:
        return MissingInput(f"{folder}: no {SINGLE} or {INDEX}; in the Hugging Face cache the folder is in snapshots/")
    return MissingInput(f"{folder}: no {SINGLE} and no {INDEX} in this folder")


def _some(names: list[str], most: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    shown = ", ".join(name if SHARD.fullmatch(name) or name == INDEX else show(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


# ---- writing


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    get: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def header_bytes(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], path: Path) -> bytes:
    """The header of a file, its length in front, of tensors (name, dtype, shape) that lie in it one after the other.
    Raises UsageError, with the file's `path`, for what the format cannot hold."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    if not all(map(_is_text, chain.from_iterable(header["__metadata__"].items()))):
        raise UsageError(f"{path}: metadata must be strings: {show(header['__metadata__'])}")
    end = 0
    for name, dtype, shape in tensors:
        if not is_name(name) or name in header:
            raise UsageError(f"{path}: {show(name)} cannot be a tensor's name: 1 to 512 bytes, printable, once")
        offsets = [end, end := end + math.prod(shape) * DTYPES[dtype].itemsize]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
    if not header["__metadata__"]:
        del header["__metadata__"]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER or len(tensors) > _MAX_TENSORS:
        raise UsageError(f"{path}: {len(tensors):,} tensors are too many for one file: give a smaller shard size")
    return len(text).to_bytes(8, "little") + text


def _write_tensors(path: Path, entries: list[_Entry], metadata: Mapping[str, str] | None) -> None:
    # Readers that map a file into memory need every tensor at a multiple of its own width: wide dtypes go first.
    entries = sorted(entries, key=lambda entry: -DTYPES[entry.dtype].itemsize)
    told = [(entry.name, entry.dtype, entry.shape) for entry in entries]
    header = header_bytes(told, {"format": "pt"} if metadata is None else metadata, path)
    nbytes = len(header) + sum(entry.nbytes for entry in entries)
    _write_bytes(path, nbytes, chain([header], map(_bytes_of, entries)))


def _bytes_of(entry: _Entry) -> memoryview:
    array = entry.get()
    if array.dtype != DTYPES[entry.dtype] or array.shape != entry.shape:
        raise UsageError(
            f"tensor {show(entry.name)}: {entry.dtype} {list(entry.shape)} was announced, get() gave "
            f"{_NAMES.get(array.dtype, array.dtype)} {list(array.shape)}"
        )
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data


def _write_bytes(path: Path, nbytes: int, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes to a temporary name, brings it to the disk and renames it: `path` is never half a file."""
    _check_free(path)
    _check_space(path.parent, nbytes)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with blamed_on(path, nbytes):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            for chunk in chunks:  # what makes a chunk may fail too, and that is not blamed on the disk
                view = memoryview(chunk)
                with blamed_on(path, nbytes):
                    while view:
                        view = view[os.write(fd, view[: 1 << 30]) :]
            with blamed_on(path, nbytes):
                os.fsync(fd)
        finally:
            os.close(fd)
        with blamed_on(path, nbytes):
            os.replace(temporary, path)
            fd = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)  # the name too must outlive a power cut
            finally:
                os.close(fd)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def blamed_on(path: Path, nbytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"{path}: the disk filled up while {nbytes:,} bytes were written: {error.strerror}") from None
        if error.errno == errno.EIO:
            raise IOFailed(f"{path}: the disk failed to write it: {error.strerror}") from None
        raise DestinationError(f"{path}: cannot be written: {error.strerror}") from None


def _check_free(path: Path) -> None:
    """An empty file may be replaced: it is what tempfile and touch leave."""
    if os.path.islink(path) or (os.path.exists(path) and (not path.is_file() or path.stat().st_size)):
        raise DestinationError(f"{path}: is there already and not empty: choose another place or remove it")


def _check_space(folder: Path, nbytes: int) -> None:
    with blamed_on(folder, nbytes):
        free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise NoSpace(f"{folder}: {nbytes:,} bytes are to be written, {free:,} are free: {nbytes - free:,} short")
