"""The bytes of tensors as they go by: read, digested, looked through for numbers that are not finite, and written.

Everything that touches weights is here: a conversion that copies, the first digests of one that does not, a check
against them, an export. A worker holds a few megabytes, whatever the size of a tensor."""

import bisect
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from glm_jax.convert.planning import FP8, SCALES, Part
from glm_jax.convert.safetensors import DTYPES, Tensor, blamed_on, opened, read_exactly
from glm_jax.errors import BadInput

PIECE = 8 << 20  # bytes that are read, digested and written at once; a multiple of a disk's blocks
SYNCED = 64 << 20  # bytes after which what was written is brought to the disk
BLOCK = 4096  # bytes of a disk's block, or several
_MADE = 1 << 20  # bytes of another dtype that are made at once
_SLICE = 1 << 17  # numbers that are looked through at once, few enough for the processor's cache
_EXPONENT = {"BF16": (np.uint16, 0x7F80), "F32": (np.uint32, 0x7F800000), FP8: (np.uint8, 0x7F)}

Found = Callable[[list[tuple[Part, str, int]]], None]  # tensors, their SHA-256, their numbers that are wrong
Fill = Callable[[memoryview, int], None]  # (buffer, position in the file)


class Stopped(Exception):
    """The work was asked to end before its end."""


def wrong_numbers(data: "memoryview | bytes", dtype: str, scale: bool = False) -> int:
    """How many of the numbers in some bytes are NaN or infinite (of F8_E4M3, which has no infinities: NaN), or, of
    scales, zero."""
    if dtype not in _EXPONENT:
        return 0
    integer, ones = _EXPONENT[dtype]
    bits, count = np.frombuffer(data, integer), 0
    masked = np.empty(min(_SLICE, len(bits)), integer)
    for start in range(0, len(bits), _SLICE):
        part = bits[start : start + _SLICE]
        out = np.bitwise_and(part, integer(ones), out=masked[: len(part)])
        count += int(np.count_nonzero(out == integer(ones)))
        if scale:
            count += int(np.count_nonzero(part == 0))
    return count


class _Tensor:
    """One tensor that goes by in stretches, which may end inside a number."""

    def __init__(self, part: Part):
        self.part, self.hash, self.wrong, self.rest = part, hashlib.sha256(), 0, b""
        self.width, self.scale = DTYPES[part.dtype].itemsize, part.name.endswith(SCALES)

    def take(self, data: memoryview) -> None:
        self.hash.update(data)
        if self.rest:
            missing = self.width - len(self.rest)
            self.rest += bytes(data[:missing])
            data = data[missing:]
            if len(self.rest) < self.width:
                return
            self.wrong += wrong_numbers(self.rest, self.part.dtype, self.scale)
        whole = len(data) // self.width * self.width
        self.wrong += wrong_numbers(data[:whole], self.part.dtype, self.scale)
        self.rest = bytes(data[whole:])


def stream(
    source: "Path | Fill",
    size: int,
    parts: Sequence[Part],
    found: Found,
    passed: Callable[[int, str], None],
    stop: threading.Event,
    target: Path | None = None,
    stamp: tuple[int, int] | None = None,
    start: int = 0,
) -> None:
    """Takes the bytes of a file of so many, piece by piece, from a file or as a function makes them, from `start` on,
    for `parts`, which are the tensors that are wanted in the order of their bytes; without any, nothing.

    They are written to `target` if that is given. `found` is told of tensors that have gone by and are on the disk,
    `passed` of every piece. A file must be of the same (size, mtime_ns) as `stamp` before and afterwards."""
    if not parts:
        return
    position = start // BLOCK * BLOCK
    buffer, done, left = memoryview(mmap.mmap(-1, PIECE)), [], list(parts)[::-1]
    now = _Tensor(left.pop())
    out = _Target(target, size) if target else None
    try:
        with opened(source) if isinstance(source, Path) else _nothing() as (fd, seen):
            _check_same(source, stamp, seen)
            while position < size:
                if stop.is_set():
                    raise Stopped
                piece = buffer[: min(PIECE, size - position)]
                end = position + len(piece)
                if isinstance(source, Path):
                    read_exactly(fd, piece, position, source, "the weights")
                else:
                    source(piece, position)
                while now and now.part.offset < end:
                    a, b = max(now.part.offset, position), min(now.part.offset + now.part.nbytes, end)
                    now.take(piece[a - position : b - position])
                    if b < now.part.offset + now.part.nbytes:
                        break
                    done.append((now.part, now.hash.hexdigest(), now.wrong))
                    now = _Tensor(left.pop()) if left else None
                if out:
                    out.write(piece, position)
                passed(len(piece), now.part.name if now else parts[-1].name)
                position = end
                if done and (not out or out.sync()):
                    found(done)
                    done = []
            if isinstance(source, Path):
                _check_same(source, stamp, (os.fstat(fd).st_size, os.fstat(fd).st_mtime_ns))
        while now:  # without bytes, at the end
            done.append((now.part, now.hash.hexdigest(), now.wrong))
            now = _Tensor(left.pop()) if left else None
        if out:
            out.sync(always=True)
        if done:
            found(done)
    finally:
        if out:
            out.close()


class _nothing:
    def __enter__(self):
        return -1, None

    def __exit__(self, *_):
        pass


def _check_same(path, stamp, seen) -> None:
    if stamp is not None and seen is not None and stamp != seen:
        raise BadInput(f"{path}: the file changed while it was converted: do it again when nothing writes to it")


class _Target:
    """A file that is written past the cache where the file system lets that be: a checkpoint is larger than the cache,
    and half the processor's time would go into filling it."""

    def __init__(self, path: Path, size: int):
        self.path, self.size, self.behind = path, size, 0
        with blamed_on(path, size):
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        self.direct = -1
        try:
            with blamed_on(path, size):
                if size and os.fstat(self.fd).st_size != size:
                    os.ftruncate(self.fd, 0)
                    os.posix_fallocate(self.fd, 0, size)  # a disk that will be full is full now
            try:
                self.direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | getattr(os, "O_DIRECT", 0))
            except OSError:
                pass  # not on this file system
        except BaseException:
            self.close()
            raise

    def write(self, piece: memoryview, position: int) -> None:
        with blamed_on(self.path, self.size):
            fd = self.direct if self.direct >= 0 and len(piece) % BLOCK == 0 else self.fd
            while piece:
                n = os.pwrite(fd, piece, position)
                piece, position = piece[n:], position + n
                fd = self.fd if n % BLOCK else fd
                self.behind += n

    def sync(self, always: bool = False) -> bool:
        """Brings to the disk what was written, if that is much; whether it did."""
        if not always and self.behind < SYNCED:
            return False
        with blamed_on(self.path, self.size):
            os.fdatasync(self.fd)
        self.behind = 0
        return True

    def close(self) -> None:
        for fd in (self.fd, self.direct):
            if fd >= 0:
                os.close(fd)


def made_of(
    header: bytes,
    parts: Sequence[Part],
    tensors: Mapping[str, Tensor],
    scales: "Mapping[str, str] | None" = None,
    blocks: tuple[int, int] | None = None,
) -> Fill:
    """The bytes of a file with this header and these parts, each the tensor of its name in the dtype of the part: FP8
    with its scale multiplied in, if `scales` names one, which is for each output or for each block of so many."""
    starts = [part.offset for part in parts]

    def fill(buffer: memoryview, position: int) -> None:
        end, at = position + len(buffer), position
        if at < len(header):
            head = header[at : min(end, len(header))]
            buffer[: len(head)] = head
            at += len(head)
        for part in parts[max(0, bisect.bisect_right(starts, at) - 1) :]:
            a, b = max(at, part.offset), min(end, part.offset + part.nbytes)
            if part.offset >= end:
                break
            if b > a:
                _cast(buffer[a - position : b - position], part, a - part.offset, tensors, scales or {}, blocks)

    return fill


def _cast(buffer: memoryview, part: Part, start: int, tensors, scales, blocks) -> None:
    """Bytes from `start` on of a part, as many as the buffer has."""
    tensor = tensors[part.name]
    row = part.nbytes // part.shape[0] if part.shape else part.nbytes
    while buffer:  # a little at a time: what is made on the way is wider, and stays in the processor's cache
        size = min(len(buffer), max(row, _MADE))
        first, last = start // row, -(-(start + size) // row)
        x = tensor.read(slice(first, last) if part.shape else None)
        if part.dtype != tensor.dtype:
            if part.name in scales and tensor.dtype == FP8:
                x = x.astype(np.float32) * _spread(tensors[scales[part.name]], blocks, tensor.shape, first, last)
            x = x.astype(DTYPES[part.dtype])
        data = memoryview(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
        buffer[:size] = data[start - first * row :][:size]
        buffer, start = buffer[size:], start + size


def _spread(scale: Tensor, blocks, shape: tuple[int, ...], first: int, last: int) -> np.ndarray:
    """The scales of rows [first, last)."""
    if blocks is None:
        return scale.read(slice(first, last)).astype(np.float32).reshape(-1, 1)
    start = first // blocks[0]
    rows = scale.read(slice(start, -(-last // blocks[0]))).astype(np.float32)
    return rows[np.arange(first, last) // blocks[0] - start].repeat(min(blocks[1], shape[1]), 1)[:, : shape[1]]
