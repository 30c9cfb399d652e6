"""An OCDBT database whose values are byte ranges of files that are there already: what makes arrays of a checkpoint
without copying it.

OCDBT (https://google.github.io/tensorstore/kvstore/ocdbt) is the key-value store in which Orbax keeps arrays. A
database is a manifest, which points to the root of a B-tree; a leaf of that gives for each key a short value or the
file, offset and length of a long one. Nothing asks that these files were written by OCDBT, so a leaf may point into
safetensors. What is written here is one leaf, enough for a million keys. Equal arguments give equal bytes."""

import functools
import struct
from collections.abc import Mapping, Sequence

import numpy as np

MANIFEST = "manifest.ocdbt"
INLINE = 1024  # bytes up to which a value stands in the leaf
_MOST_NODE = 100_000_000  # bytes of a decoded leaf, as readers are told; Orbax has it so too
_MANIFEST_MAGIC, _NODE_MAGIC = 0x0CDB3A2A, 0x0CDB20DE

Range = tuple[int, int, int]  # number of the file, offset, bytes


def database(values: Mapping[str, "bytes | Range"], files: Sequence[str], node: str, name: bytes) -> dict[str, bytes]:
    """The two files of a database, by their paths in its folder: the manifest, and the leaf, which is called `node`.

    `values`: for each key the bytes themselves or where they are in `files`, which are paths in the folder. `name`: 16
    bytes that tell this database from others. Raises ValueError for a leaf that readers would refuse."""
    leaf = _leaf(values, files)
    if len(leaf) > _MOST_NODE:
        raise ValueError(f"{len(values):,} keys need a leaf of {len(leaf):,} bytes, at most {_MOST_NODE:,} are read")
    elsewhere = sum(v[2] for v in values.values() if not isinstance(v, bytes))
    body = name + _varint(0)  # of the kind that has everything in one file
    body += _varint(INLINE) + _varint(_MOST_NODE) + bytes([4]) + _varint(0)  # versions a node 2^4; not compressed
    body += _file_table([node])
    # One version: number, height, the leaf's file, offset and length; keys, bytes of leaves and of values; nanoseconds.
    body += b"".join(map(_varint, (1, 1))) + bytes([0]) + b"".join(map(_varint, (0, 0, len(leaf), len(values))))
    body += _varint(len(leaf)) + _varint(elsewhere) + struct.pack("<Q", 1)
    body += _varint(0)  # older versions
    return {MANIFEST: _framed(_MANIFEST_MAGIC, body), node: leaf}


def _leaf(values: Mapping[str, "bytes | Range"], files: Sequence[str]) -> bytes:
    entries = sorted((key.encode(), value) for key, value in values.items())
    keys = [key for key, _ in entries]
    shared = [0, *map(_common, keys, keys[1:])]
    ranges = [value for _, value in entries if not isinstance(value, bytes)]
    body = bytearray(b"\0")  # the height
    body += _file_table(files) + _varint(len(entries))
    for n in shared[1:]:
        body += _varint(n)
    for key, n in zip(keys, shared, strict=True):
        body += _varint(len(key) - n)
    for key, n in zip(keys, shared, strict=True):
        body += key[n:]
    for _, v in entries:
        body += _varint(len(v) if isinstance(v, bytes) else v[2])
    for _, v in entries:
        body.append(not isinstance(v, bytes))
    for file, _, _ in ranges:
        body += _varint(file)
    for _, offset, _ in ranges:
        body += _varint(offset)
    for _, v in entries:
        body += v if isinstance(v, bytes) else b""
    return _framed(_NODE_MAGIC, bytes(body))


def _file_table(files: Sequence[str]) -> bytes:
    names = [file.encode() for file in files]
    shared = [0, *map(_common, names, names[1:])]
    rest = [name[n:] for name, n in zip(names, shared, strict=True)]
    # Counts, lengths, and for each name how much of it is a base path: nothing.
    numbers = [len(names), *shared[1:], *map(len, rest), *[0] * len(names)]
    return b"".join(map(_varint, numbers)) + b"".join(rest)


def _framed(magic: int, body: bytes) -> bytes:
    """Magic number, length, version, compression, body, checksum."""
    head = struct.pack(">I", magic) + struct.pack("<Q", 4 + 8 + 2 + len(body) + 4) + b"\0\0"
    return head + body + struct.pack("<I", crc32c(head + body))


def _common(a: bytes, b: bytes) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


# ---- CRC-32C


@functools.cache
def _table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(0x82F63B78), np.uint32(0))
    return table


def crc32c(data: bytes, lanes: int = 1024) -> int:
    """The CRC-32C (Castagnoli) of some bytes: of `lanes` pieces side by side, since a loop over bytes is slow.

    The remainder is linear in the bits: of two pieces it is that of the first, moved on by the length of the second,
    plus that of the second; and zeros in front of all change nothing but what the first bits count for."""
    table = _table()
    bytes_ = np.frombuffer(data, np.uint8)
    length = -(-len(bytes_) // lanes)
    if length == 0:
        return 0
    pieces = np.zeros(lanes * length, np.uint8)
    pieces[lanes * length - len(bytes_) :] = bytes_
    pieces = pieces.reshape(lanes, length)
    state = np.zeros(lanes, np.uint32)
    for column in pieces.T:
        state = table[(state ^ column) & 0xFF] ^ (state >> 8)
    move = _moved(length)
    crc = 0
    for piece in state.tolist():
        crc = _apply(move, crc) ^ piece
    # The register begins with ones, which have gone past all the bytes.
    return crc ^ _apply(_moved(len(bytes_)), 0xFFFFFFFF) ^ 0xFFFFFFFF


def _moved(count: int) -> list[int]:
    """What becomes of each bit of the register when so many zero bytes go by."""
    table = _table().tolist()
    one = [table[bit & 0xFF] ^ (bit >> 8) for bit in (1 << i for i in range(32))]
    result = [1 << i for i in range(32)]
    while count:
        if count & 1:
            result = [_apply(one, bits) for bits in result]
        one = [_apply(one, bits) for bits in one]
        count >>= 1
    return result


def _apply(matrix: list[int], bits: int) -> int:
    out = 0
    while bits:
        low = bits & -bits
        out ^= matrix[low.bit_length() - 1]
        bits ^= low
    return out
