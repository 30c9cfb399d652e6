"""The reader takes exactly what the format allows, whoever wrote it; the writer writes what every reader takes."""

import errno
import json
import os
import shutil
import struct
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm_jax.convert.safetensors import DTYPES, INDEX, read_folder, read_header, write, write_folder
from glm_jax.errors import BadInput, DestinationError, GLMError, IOFailed, MissingInput, NoSpace, UsageError

bf16 = ml_dtypes.bfloat16


def patterns(dtype: str, shape: tuple[int, ...] = (16, 32), seed: int = 0) -> np.ndarray:
    """An array of random bits: NaNs with payloads, infinities and subnormals among them."""
    count = int(np.prod(shape)) * DTYPES[dtype].itemsize
    top = 2 if dtype == "BOOL" else 256
    return np.random.default_rng(seed).integers(0, top, count, np.uint8).view(DTYPES[dtype]).reshape(shape)


def bits(array: np.ndarray) -> tuple:
    return array.dtype, array.shape, array.tobytes()


def file(path: Path, header: object, data: bytes = b"", pad: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += pad
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def f32(begin: int, end: int, *shape: int) -> dict:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


# ---- round trips


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_keeps_its_bits(dtype, tmp_path):
    arrays = {
        "a": patterns(dtype),
        "scalar": patterns(dtype, ()),
        "none": patterns(dtype, (0, 3)),
        "b": patterns(dtype),
    }
    write(tmp_path / "model.safetensors", arrays)
    tensors = read_folder(tmp_path)
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        back = tensors[name].read()
        assert bits(back) == bits(array)
        assert tensors[name].dtype == dtype and tensors[name].nbytes == array.nbytes
        assert back.flags.writeable and back.flags.c_contiguous and back.flags.owndata


def test_all_65536_bfloat16_and_all_fp8_patterns(tmp_path):
    arrays = {
        "bf16": np.arange(65536, dtype=np.uint16).view(bf16),
        "e4m3": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
        "e5m2": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2),
        "e8m0": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu),
    }
    write(tmp_path / "x.safetensors", arrays)
    tensors, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    for name, array in arrays.items():
        assert bits(tensors[name].read()) == bits(array)


def test_strided_and_transposed_arrays_are_stored_in_c_order(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {
        "T": base.T,
        "F": np.asfortranarray(base),
        "step": base[::2, ::3],
        "back": base[::-1],
        "broadcast": np.broadcast_to(base[0], (3, 6)),
        "frozen": base.copy(),
    }
    arrays["frozen"].flags.writeable = False
    write(tmp_path / "x.safetensors", arrays)
    ours, _ = read_header(tmp_path / "x.safetensors")
    theirs = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(ours[name].read(), array)
        np.testing.assert_array_equal(theirs[name], array)


def test_mixed_dtypes_are_aligned_whatever_the_order(tmp_path):
    arrays = {
        "u8": patterns("U8", (3,)),
        "bf16": patterns("BF16", (5,)),
        "f32": patterns("F32", (1,)),
        "f64": patterns("F64", (1,)),
    }
    write(tmp_path / "x.safetensors", arrays)
    tensors, _ = read_header(tmp_path / "x.safetensors")
    assert list(tensors) == ["f64", "f32", "bf16", "u8"]
    for name, tensor in tensors.items():
        assert tensor.offset % DTYPES[tensor.dtype].itemsize == 0
        assert bits(tensor.read()) == bits(arrays[name])


LIBRARY = [d for d in DTYPES if not d.startswith("F8")]  # the numpy side of safetensors 0.8 knows no fp8


def test_the_safetensors_library_reads_ours(tmp_path):
    arrays = {d: patterns(d, (8, 3), i) for i, d in enumerate(DTYPES)}
    write(tmp_path / "x.safetensors", arrays, {"format": "pt", "who": "glm_jax"})
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt", "who": "glm_jax"}
        assert set(opened.keys()) == set(arrays)
        for name in arrays:
            assert opened.get_slice(name).get_dtype() == name
            assert opened.get_slice(name).get_shape() == [8, 3]
        for name in LIBRARY:
            assert bits(opened.get_tensor(name)) == bits(arrays[name])


def test_we_read_what_the_safetensors_library_writes(tmp_path):
    arrays = {d: patterns(d, (8, 3), i) for i, d in enumerate(DTYPES) if d != "BF16" and not d.startswith("F8")}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"k": "v"})
    tensors, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"k": "v"} and set(tensors) == set(arrays)
    for name, array in arrays.items():
        assert bits(tensors[name].read()) == bits(array)


@pytest.mark.oracle
def test_torch_and_we_agree_on_bfloat16_and_fp8(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    kinds = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    arrays = {d: patterns(d, (7, 3)) for d in kinds} | {"F32": patterns("F32", (1,)), "odd": patterns("BF16", (1,))}
    write(tmp_path / "ours.safetensors", arrays)
    theirs = load_file(tmp_path / "ours.safetensors")
    for name, array in arrays.items():
        assert theirs[name].view(torch.uint8).numpy().tobytes() == array.tobytes()
    save_file(theirs, tmp_path / "theirs.safetensors")
    tensors, _ = read_header(tmp_path / "theirs.safetensors")
    for name, array in arrays.items():
        assert bits(tensors[name].read()) == bits(array)


# ---- rows


def test_rows_are_read_and_nothing_else(tmp_path, monkeypatch):
    array = patterns("BF16", (10, 4, 3))
    write(tmp_path / "x.safetensors", {"before": patterns("F32", (5,)), "a": array, "after": patterns("U8", (9,))})
    tensor = read_header(tmp_path / "x.safetensors")[0]["a"]
    asked, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: (asked.append((at, len(into[0]))), preadv(fd, into, at))[1])
    for rows in (slice(0, 10), slice(3, 7), slice(9, None), slice(None, 2), slice(None), slice(4, 4), slice(10, 10)):
        asked.clear()
        back = tensor.read(rows)
        assert bits(back) == bits(np.ascontiguousarray(array[rows]))
        assert asked == ([(tensor.offset + (rows.start or 0) * 24, back.nbytes)] if back.nbytes else [])


@pytest.mark.parametrize("rows", [slice(0, 11), slice(-1, None), slice(5, 3), slice(0, 10, 2), slice(11, 11)])
def test_rows_that_are_not_there(rows, tmp_path):
    write(tmp_path / "x.safetensors", {"a": patterns("F32", (10, 4))})
    with pytest.raises(UsageError, match=r"x\.safetensors: tensor 'a' has 10 rows, not slice"):
        read_header(tmp_path / "x.safetensors")[0]["a"].read(rows)


def test_rows_of_scalars_and_of_empty_tensors(tmp_path):
    write(
        tmp_path / "x.safetensors",
        {"s": patterns("F32", ()), "e": patterns("F32", (0, 4)), "w": patterns("F32", (4, 0))},
    )
    tensors, _ = read_header(tmp_path / "x.safetensors")
    assert tensors["s"].read(slice(0, 1)).shape == ()
    assert tensors["e"].read(slice(0, 0)).shape == (0, 4)
    assert tensors["w"].read(slice(1, 3)).shape == (2, 0)


def test_many_threads_read_at_once_and_leave_no_descriptor(tmp_path):
    array = np.arange(64 * 1024, dtype=np.uint32).reshape(64, 1024)
    write(tmp_path / "x.safetensors", {"a": array})
    tensor = read_header(tmp_path / "x.safetensors")[0]["a"]
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    start = threading.Barrier(16)

    def work(i):
        start.wait(10)
        return all((tensor.read(slice(r, r + 1)) == array[r]).all() for r in range(i, 64, 3))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def test_reads_in_small_pieces_and_stops_at_a_short_file(tmp_path, monkeypatch):
    array = patterns("F32", (100,))
    write(tmp_path / "x.safetensors", {"a": array})
    tensor = read_header(tmp_path / "x.safetensors")[0]["a"]
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:7]], at))
    assert bits(tensor.read()) == bits(array)
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, into, at + 40))
    with pytest.raises(BadInput, match=r"x\.safetensors: tensor 'a': the file ends after 360 of 400 bytes"):
        tensor.read()

    tries = []

    def broken(fd, into, at):
        tries.append(at)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(IOFailed, match=r"x\.safetensors: tensor 'a': reading byte \d+ failed: Input/output error"):
        tensor.read()
    assert len(tries) == 3 and IOFailed.exit_code == 74
    fails = iter([True, True])
    monkeypatch.setattr(os, "preadv", lambda *a: broken(*a) if next(fails, False) else preadv(*a))
    assert bits(tensor.read()) == bits(array)


def test_a_file_that_changed_after_its_header_was_read(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, {"a": patterns("F32", (100,))})
    tensor = read_header(path)[0]["a"]
    with open(path, "r+b") as opened:
        opened.truncate(200)
    with pytest.raises(
        BadInput, match=r"x\.safetensors: the file changed after its header was read \(\d+ bytes then, 200"
    ):
        tensor.read()
    path.unlink()
    with pytest.raises(MissingInput, match=r"x\.safetensors: no such file"):
        tensor.read()


# ---- hostile files: each is refused by read_header with one line that names the file and says this


A = f32(0, 8, 2)
EIGHT = bytes(8)
HOSTILE = {
    "empty": (lambda p: p.write_bytes(b""), "0 bytes are too few"),
    "seven bytes": (lambda p: p.write_bytes(b"\x02" + bytes(6)), "7 bytes are too few"),
    "length alone": (lambda p: p.write_bytes(struct.pack("<Q", 2)), "2 bytes, but at most 0 are possible"),
    "length 0": (lambda p: file(p, b""), "does not begin with '{'"),
    "length past the end": (lambda p: file(p, {"a": A}, length=500), "says it has 500 bytes, but at most"),
    "length 2^62": (lambda p: file(p, {"a": A}, length=2**62), "4,611,686,018,427,387,904 bytes"),
    "length 2^64-1": (lambda p: file(p, {"a": A}, length=2**64 - 1), "18,446,744,073,709,551,615 bytes"),
    "length over 100 MB": (
        lambda p: (file(p, {"a": A}, length=100_000_001), os.truncate(p, 200_000_000)),
        "100,000,001 bytes, but at most 100,000,000",
    ),
    "git lfs pointer": (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "Git LFS pointer"),
    "a web page": (lambda p: p.write_bytes(b"<!DOCTYPE html><html>" * 20), "truncated, or no safetensors file"),
    "zip of a pickle": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(200)), "does not begin with|but at most"),
    "not UTF-8": (lambda p: file(p, b'{"\xff": 1}'), "not valid: 'utf-8'"),
    "UTF-16": (lambda p: file(p, '{"a":1}'.encode("utf-16-le")), "not valid"),
    "byte order mark": (lambda p: file(p, b"\xef\xbb\xbf{}"), "does not begin with '{'"),
    "space first": (lambda p: file(p, b" {}"), "does not begin with '{'"),
    "not JSON": (lambda p: file(p, b"{a: 1}"), "not valid: Expecting property name"),
    "a list": (lambda p: file(p, []), "does not begin with '{'"),
    "two values": (lambda p: file(p, b"{}{}"), "not valid: Extra data"),
    "deep": (lambda p: file(p, b'{"a":' + b"[" * 200_000), "not valid: "),
    "deep, closed": (lambda p: file(p, b'{"a":' + b'{"a":' * 90_000 + b"1" + b"}" * 90_001), "not valid: "),
    "a million braces": (lambda p: file(p, b'{"a":[' + b"{}," * 1_000_003 + b"1]}"), "more than 1,000,000 tensors"),
    "key twice": (lambda p: file(p, b'{"a":1,"a":2}'), "the key 'a' is given twice"),
    "shape twice": (
        lambda p: file(p, b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', EIGHT),
        "the key 'shape' is given twice",
    ),
    "metadata twice": (lambda p: file(p, b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' is given twice"),
    "metadata of numbers": (lambda p: file(p, {"__metadata__": {"a": 1}}), "not an object of strings"),
    "metadata nested": (lambda p: file(p, {"__metadata__": {"a": {"b": "c"}}}), "not an object of strings"),
    "metadata a list": (lambda p: file(p, {"__metadata__": ["a"]}), "not an object of strings"),
    "metadata null": (lambda p: file(p, {"__metadata__": None}), "not an object of strings"),
    "metadata surrogate": (lambda p: file(p, b'{"__metadata__":{"a":"\\ud800"}}'), "not an object of strings"),
    "entry a number": (lambda p: file(p, {"a": 1}), "tensor 'a': want an object"),
    "entry a list": (lambda p: file(p, {"a": [1]}), "tensor 'a': want an object"),
    "entry null": (lambda p: file(p, {"a": None}), "tensor 'a': want an object"),
    "no dtype": (lambda p: file(p, {"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT), "want an object of dtype"),
    "no shape": (lambda p: file(p, {"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT), "want an object of dtype"),
    "no offsets": (lambda p: file(p, {"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "want an object of dtype"),
    "a field too many": (lambda p: file(p, {"a": A | {"strides": [1]}}, EIGHT), "want an object of dtype"),
    "unknown dtype": (lambda p: file(p, {"a": A | {"dtype": "F128"}}, EIGHT), "dtype 'F128' is none of"),
    "dtype in torch's words": (lambda p: file(p, {"a": A | {"dtype": "float32"}}, EIGHT), "dtype 'float32' is none of"),
    "dtype of half bytes": (lambda p: file(p, {"a": A | {"dtype": "F4"}}, EIGHT), "dtype 'F4' is none of"),
    "dtype a list": (lambda p: file(p, {"a": A | {"dtype": ["F32"]}}, EIGHT), "dtype ['F32'] is none of"),
    "dtype null": (lambda p: file(p, {"a": A | {"dtype": None}}, EIGHT), "dtype None is none of"),
    "shape a number": (lambda p: file(p, {"a": A | {"shape": 2}}, EIGHT), "shape 2 is not a list"),
    "shape of floats": (lambda p: file(p, {"a": A | {"shape": [2.0]}}, EIGHT), "shape [2.0] is not a list"),
    "shape of bools": (lambda p: file(p, {"a": A | {"shape": [True, 2]}}, EIGHT), "shape [True, 2] is not a list"),
    "shape of text": (lambda p: file(p, {"a": A | {"shape": ["2"]}}, EIGHT), "shape ['2'] is not a list"),
    "shape negative": (lambda p: file(p, {"a": A | {"shape": [-1, -2]}}, EIGHT), "shape [-1, -2] is not a list"),
    "shape nested": (lambda p: file(p, {"a": A | {"shape": [[2]]}}, EIGHT), "shape [[2]] is not a list"),
    "shape NaN": (lambda p: file(p, {"a": A | {"shape": [float("nan")]}}, EIGHT), "shape [nan] is not a list"),
    "shape of 33 axes": (lambda p: file(p, {"a": A | {"shape": [1] * 32 + [2]}}, EIGHT), "at most 32 integers"),
    "shape overflows": (lambda p: file(p, {"a": A | {"shape": [2**32, 2**32]}}, EIGHT), "more than 2^63 bytes"),
    "shape overflows to the size": (lambda p: file(p, {"a": A | {"shape": [2**62 + 1, 2]}}, EIGHT), "more than 2^63"),
    "shape overflows times 0": (lambda p: file(p, {"a": f32(0, 0, 2**40, 2**40, 0)}), "more than 2^63 bytes"),
    "a number of 5000 digits": (lambda p: file(p, b'{"a":{"shape":[' + b"9" * 5000 + b"]}}"), "not valid: "),
    "a number of 4000 digits": (
        lambda p: file(p, b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,8]}}', EIGHT),
        "more than 2^63 bytes",
    ),
    "offsets floats": (lambda p: file(p, {"a": A | {"data_offsets": [0, 8.0]}}, EIGHT), "not a pair of integers"),
    "offsets bools": (lambda p: file(p, {"a": A | {"data_offsets": [False, 8]}}, EIGHT), "not a pair of integers"),
    "offsets three": (lambda p: file(p, {"a": A | {"data_offsets": [0, 4, 8]}}, EIGHT), "not a pair of integers"),
    "offsets a number": (lambda p: file(p, {"a": A | {"data_offsets": 8}}, EIGHT), "not a pair of integers"),
    "offsets negative": (lambda p: file(p, {"a": A | {"data_offsets": [-8, 0]}}, EIGHT), "negative or in the wrong"),
    "offsets reversed": (lambda p: file(p, {"a": A | {"data_offsets": [8, 0]}}, EIGHT), "negative or in the wrong"),
    "size below the shape": (
        lambda p: file(p, {"a": f32(0, 8, 3)}, EIGHT),
        "[3] of F32 is 12 bytes, data_offsets [0, 8] are 8",
    ),
    "size above the shape": (
        lambda p: file(p, {"a": f32(0, 8, 1)}, EIGHT),
        "[1] of F32 is 4 bytes, data_offsets [0, 8] are 8",
    ),
    "begins late": (
        lambda p: file(p, {"a": f32(4, 12, 2)}, bytes(12)),
        "begins at byte 4 of the data, but the one before it ends at 0: a hole",
    ),
    "hole": (
        lambda p: file(p, {"a": A, "b": f32(12, 20, 2)}, bytes(20)),
        "begins at byte 12 of the data, but the one before it ends at 8: a hole",
    ),
    "overlap": (lambda p: file(p, {"a": A, "b": f32(4, 12, 2)}, bytes(12)), "ends at 8: they overlap"),
    "same bytes twice": (lambda p: file(p, {"a": A, "b": A}, EIGHT), "ends at 8: they overlap"),
    "empty tensor inside another": (lambda p: file(p, {"a": A, "b": f32(4, 4, 0)}, EIGHT), "they overlap"),
    "empty tensor past the end": (lambda p: file(p, {"a": A, "b": f32(12, 12, 0)}, EIGHT), "a hole"),
    "truncated": (lambda p: file(p, {"a": A}, bytes(5)), "truncated by 3"),
    "no data": (lambda p: file(p, {"a": A}), "truncated by 8"),
    "bytes behind": (lambda p: file(p, {"a": A}, bytes(9)), "1 too many"),
    "bytes and no tensor": (lambda p: file(p, {}, bytes(9)), "9 too many"),
    "name empty": (lambda p: file(p, {"": A}, EIGHT), "tensor '': a name is"),
    "name with NUL": (lambda p: file(p, {"a\0b": A}, EIGHT), r"tensor 'a\x00b': a name is"),
    "name of two lines": (lambda p: file(p, {"a\nb": A}, EIGHT), r"tensor 'a\nb': a name is"),
    "name in colour": (lambda p: file(p, {"\x1b[31ma": A}, EIGHT), r"tensor '\x1b[31ma': a name is"),
    "name backwards": (lambda p: file(p, {"a\u202eb": A}, EIGHT), "a name is"),
    "name of half a pair": (lambda p: file(p, b'{"\\ud800":' + json.dumps(A).encode() + b"}", EIGHT), "a name is"),
    "name of 513 bytes": (lambda p: file(p, {"é" * 256 + "a": A}, EIGHT), "a name is 1 to 512 bytes"),
    "a named pipe": (lambda p: os.mkfifo(p), "not a regular file"),
    "a folder": (lambda p: p.mkdir(), "not a regular file"),
    "a link": (lambda p: p.symlink_to("/etc/passwd"), "a symbolic link to '/etc/passwd'"),
    "a link to nothing": (lambda p: p.symlink_to("gone"), "a symbolic link to 'gone'"),
    "a link to itself": (lambda p: p.symlink_to(p.name), "a symbolic link"),
    "a device": (lambda p: p.symlink_to("/dev/zero"), "a symbolic link to '/dev/zero'"),
}


def one_line(error: pytest.ExceptionInfo, *names: object) -> str:
    text = str(error.value)
    assert "\n" not in text and text.isprintable() and len(text) < 1500
    for name in names:
        assert str(name) in text
    return text


@pytest.mark.parametrize("make, says", HOSTILE.values(), ids=HOSTILE)
def test_hostile_file(make, says, tmp_path):
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(BadInput) as error:
        read_header(path)
    text = one_line(error, path)
    assert any(part in text for part in says.split("|")), text


STRICTER = {  # than safetensors 0.8, on purpose
    "space first",
    "metadata null",
    "a field too many",
    "shape of 33 axes",
    "name empty",
    "name with NUL",
    "name of two lines",
    "name in colour",
    "name backwards",
    "name of 513 bytes",
}


def test_the_library_too_refuses_what_is_malformed(tmp_path):
    """Ours is nowhere laxer: what safetensors refuses is in the table, what it takes and we do not is listed here."""
    stricter = set()
    for what, (make, _) in HOSTILE.items():
        path = tmp_path / f"{what}.safetensors"
        if what in ("a named pipe", "a device", "length over 100 MB"):  # it would hang on the first two
            continue
        make(path)
        try:
            with safetensors.safe_open(path, "np"):
                stricter.add(what)
        except Exception:
            pass
    assert stricter <= STRICTER, stricter


def test_no_such_file(tmp_path):
    with pytest.raises(MissingInput) as error:
        read_header(tmp_path / "x.safetensors")
    one_line(error, tmp_path / "x.safetensors", "no such file")


def test_lawful_oddities_are_read(tmp_path):
    header = {"z": f32(8, 16, 2), "none": f32(8, 8, 0, 5), "a": A, "__metadata__": {}, "../x y/é": f32(16, 20)}
    tensors, metadata = read_header(file(tmp_path / "x.safetensors", header, bytes(range(20)), pad=b" " * 5))
    assert list(tensors) == ["a", "none", "z", "../x y/é"] and metadata == {}
    assert tensors["z"].read().tobytes() == bytes(range(8, 16))
    assert tensors["none"].read().shape == (0, 5)
    assert read_header(file(tmp_path / "y.safetensors", {})) == ({}, {})


GOOD = json.dumps({"__metadata__": {"format": "pt"}, "a": A, "b": f32(8, 12, 1, 1), "c": f32(12, 12, 0)}).encode()
JSON_PIECES = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"-1", b"0", b"1e9", b"true", b"null", b"NaN"]
TOKENS = st.sampled_from(
    [
        *JSON_PIECES,
        b"\\u0000",
        b'"a"',
        b'"F32"',
        b"8",
        b"\xff",
        b" ",
    ]
)


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 6), TOKENS | st.binary(max_size=4)), max_size=4),
    length=st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 300),
    data=st.sampled_from([12, 12, 12, 0, 11, 13]),
)
def test_whatever_the_bytes_only_our_errors_escape(edits, length, data, tmp_path):
    text = GOOD
    for at, cut, new in edits:
        text = text[:at] + new + text[at + cut :]
    path = file(tmp_path / "x.safetensors", text, bytes(data), length=length)
    try:
        tensors, metadata = read_header(path)
    except BadInput as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    with safetensors.safe_open(path, "np") as opened:  # what we take, the library takes
        assert set(opened.keys()) == set(tensors) and (opened.metadata() or {}) == metadata
    assert sum(tensor.read().nbytes for tensor in tensors.values()) == data  # every byte belongs to one tensor


FIELDS = st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"])
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(ATOMS, lambda v: st.lists(v, max_size=3) | st.dictionaries(FIELDS, v, max_size=4), max_leaves=12)


@settings(max_examples=60, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=VALUES)
def test_whatever_the_json_only_our_errors_escape(value, tmp_path):
    path = file(tmp_path / "x.safetensors", {"a": value, "b": A}, bytes(8))
    try:
        read_header(path)
    except BadInput as error:
        assert str(path) in str(error) and str(error).isprintable()
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": value}))
    with pytest.raises((BadInput, MissingInput)) as error:
        read_folder(tmp_path / "m")
    assert str(error.value).isprintable()


# ---- folders


def sharded(folder: Path, **files: list[str]) -> Path:
    """A folder of files <keyword>.safetensors, each with the tensors named, and their index."""
    folder.mkdir(exist_ok=True)
    for shard, names in files.items():
        write(folder / f"{shard}.safetensors", {name: np.full((2, 3), i, np.float32) for i, name in enumerate(names)})
    index(folder, {name: f"{shard}.safetensors" for shard, names in files.items() for name in names})
    return folder


def index(folder: Path, weight_map: object, **rest: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map} | rest))


def test_the_index_names_the_files_and_total_size_is_not_believed(tmp_path):
    sharded(tmp_path, model_1=["x", "y"], mtp=["z"])
    tensors = read_folder(str(tmp_path))
    assert list(tensors) == ["x", "y", "z"]
    assert [tensor.file.name for tensor in tensors.values()] == ["model_1.safetensors"] * 2 + ["mtp.safetensors"]
    assert (tensors["y"].read() == 1).all()
    for name in ("config.json", "model.py", "pytorch_model.bin", "tokenizer.json"):  # none of its business
        (tmp_path / name).write_bytes(b"?")
    assert list(read_folder(tmp_path)) == ["x", "y", "z"]


def test_model_safetensors_alone_and_with_an_index(tmp_path):
    write(tmp_path / "model.safetensors", {"x": patterns("BF16")})
    assert list(read_folder(tmp_path)) == ["x"]
    index(tmp_path, {"x": "model.safetensors"})
    assert list(read_folder(tmp_path)) == ["x"]


def test_missing_shards_are_all_named_with_some_of_their_tensors(tmp_path):
    sharded(tmp_path, a=["a1"], b=["b1", "b2", "b3", "b4", "b5"], c=["c1"])
    (tmp_path / "b.safetensors").unlink()
    (tmp_path / "c.safetensors").unlink()
    (tmp_path / "c.safetensors").symlink_to("../../blobs/" + "0" * 64)  # a cache whose blob was deleted
    with pytest.raises(MissingInput) as error:
        read_folder(tmp_path)
    text = one_line(
        error, tmp_path, "2 of 3 files", "b.safetensors ('b1', 'b2', 'b3' and 2 more)", "c.safetensors ('c1')"
    )
    assert "a.safetensors" not in text


def extra(folder):
    write(folder / "mtp.safetensors", {"m": patterns("F32")})


def moved(folder):
    index(folder, {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"})


def replaced(folder, **tensors):
    (folder / "a.safetensors").unlink()
    write(folder / "a.safetensors", {name: patterns("F32") for name in tensors})


FOLDERS = {
    "a file on disk that the index lacks": (extra, BadInput, f"{INDEX} does not name mtp.safetensors"),
    "a tensor in another file": (moved, BadInput, f"'x' in the file, but {INDEX} says b.safetensors"),
    "a tensor the index lacks": (
        lambda f: index(f, {"x": "a.safetensors", "z": "b.safetensors"}),
        BadInput,
        f"a.safetensors: 'y' in the file, but not in {INDEX}",
    ),
    "a tensor the file lacks": (lambda f: replaced(f, x=1), BadInput, f"a.safetensors: 'y' not in it as {INDEX} says"),
    "a tensor twice": (
        lambda f: replaced(f, x=1, y=1, z=1),
        BadInput,
        f"a.safetensors: 'z' in the file, but {INDEX} says b.safetensors",
    ),
    "a truncated shard": (lambda f: os.truncate(f / "b.safetensors", 90), BadInput, "b.safetensors: "),
    "index: not JSON": (lambda f: (f / INDEX).write_text("{"), BadInput, "the index is not valid"),
    "index: not UTF-8": (lambda f: (f / INDEX).write_bytes(b"\xff\xfe{}"), BadInput, "the index is not valid"),
    "index: empty": (lambda f: (f / INDEX).write_text(""), BadInput, "the index is not valid"),
    "index: a list": (lambda f: (f / INDEX).write_text("[]"), BadInput, "not a JSON object"),
    "index: no map": (lambda f: (f / INDEX).write_text("{}"), BadInput, "weight_map is not an object"),
    "index: empty map": (lambda f: index(f, {}), BadInput, "weight_map is not an object"),
    "index: map a list": (lambda f: index(f, ["x"]), BadInput, "weight_map is not an object"),
    "index: deep": (lambda f: (f / INDEX).write_text("[" * 200_000), BadInput, "the index is not valid"),
    "index: key twice": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}'),
        BadInput,
        "the key 'x' is given twice",
    ),
    "index: file a number": (lambda f: index(f, {"x": 1}), BadInput, "tensor 'x': 1 is not the bare name"),
    "index: parent": (
        lambda f: index(f, {"x": "../a.safetensors"}),
        BadInput,
        "'../a.safetensors' is not the bare name",
    ),
    "index: absolute": (
        lambda f: index(f, {"x": "/etc/a.safetensors"}),
        BadInput,
        "'/etc/a.safetensors' is not the bare name",
    ),
    "index: subfolder": (
        lambda f: index(f, {"x": "b/a.safetensors"}),
        BadInput,
        "'b/a.safetensors' is not the bare name",
    ),
    "index: backslash": (lambda f: index(f, {"x": "..\\a.safetensors"}), BadInput, "is not the bare name"),
    "index: line": (lambda f: index(f, {"x": "a.safetensors\n"}), BadInput, "is not the bare name"),
    "index: NUL": (lambda f: index(f, {"x": "a\0.safetensors"}), BadInput, "is not the bare name"),
    "index: pickle": (
        lambda f: index(f, {"x": "pytorch_model.bin"}),
        BadInput,
        "'pytorch_model.bin' is not the bare name",
    ),
    "index: long": (lambda f: index(f, {"x": "a" * 5000 + ".safetensors"}), BadInput, "is not the bare name"),
    "index: name of a tensor": (lambda f: index(f, {"x\ny": "a.safetensors"}), BadInput, "a name is 1 to 512 bytes"),
    "index: a link": (
        lambda f: ((f / INDEX).unlink(), (f / INDEX).symlink_to("/etc/passwd")),
        BadInput,
        "symbolic link to '/etc/passwd'",
    ),
    "index: a named pipe": (lambda f: ((f / INDEX).unlink(), os.mkfifo(f / INDEX)), BadInput, "not a regular file"),
    "index: huge": (lambda f: os.truncate(f / INDEX, 100_000_001), BadInput, "100,000,001 bytes"),
    "a shard that is a link": (
        lambda f: ((f / "a.safetensors").rename(f / "old"), (f / "a.safetensors").symlink_to("old")),
        BadInput,
        "a.safetensors: a symbolic link to 'old'",
    ),
    "a shard that is a folder": (
        lambda f: ((f / "a.safetensors").unlink(), (f / "a.safetensors").mkdir()),
        BadInput,
        "a.safetensors: not a regular file",
    ),
    "no index, odd names": (
        lambda f: (f / INDEX).unlink(),
        BadInput,
        f"2 safetensors (a.safetensors, b.safetensors), but missing {INDEX}",
    ),
}


@pytest.mark.parametrize("harm, kind, says", FOLDERS.values(), ids=FOLDERS)
def test_hostile_folder(harm, kind, says, tmp_path):
    sharded(tmp_path, a=["x", "y"], b=["z"])
    harm(tmp_path)
    with pytest.raises(kind) as error:
        read_folder(tmp_path)
    one_line(error, tmp_path, says)


ALONE = {
    "no folder": (lambda f: f.rmdir(), MissingInput, "no such folder"),
    "a file": (lambda f: (f.rmdir(), f.write_bytes(b"x")), BadInput, "this is a file; give the folder"),
    "nothing in it": (lambda f: None, MissingInput, "no model.safetensors and no model.safetensors.index.json"),
    "a cache's repository": (lambda f: (f / "snapshots").mkdir(), MissingInput, "in snapshots/"),
    "pickles": (
        lambda f: [(f / n).write_bytes(b"x") for n in ("pytorch_model.bin", "consolidated.00.pth", "model.pt")],
        BadInput,
        "'model.pt', 'pytorch_model.bin': pickled weights are never read",
    ),
    "gguf": (
        lambda f: (f / "glm-4.6-Q4.gguf").write_bytes(b"GGUF"),
        BadInput,
        "'glm-4.6-Q4.gguf': pickled weights are never read",
    ),
    "mtp without an index": (
        lambda f: [write(f / n, {"x": patterns("F32")}) for n in ("model.safetensors", "mtp.safetensors")],
        BadInput,
        f"mtp.safetensors beside model.safetensors, but no {INDEX}",
    ),
    "shards without an index": (
        lambda f: [write(f / f"model-0000{i}-of-00004.safetensors", {f"{i}": patterns("F32")}) for i in (1, 3)],
        BadInput,
        f"missing {INDEX}, model-00002-of-00004.safetensors, model-00004-of-00004.safetensors: ",
    ),
    "one file of another name": (
        lambda f: write(f / "weights.safetensors", {"x": patterns("F32")}),
        BadInput,
        "one file alone must be called model.safetensors",
    ),
    "no tensors": (lambda f: file(f / "model.safetensors", {}), BadInput, "no tensors in it"),
}


@pytest.mark.parametrize("make, kind, says", ALONE.values(), ids=ALONE)
def test_folder_that_is_no_checkpoint(make, kind, says, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    with pytest.raises(kind) as error:
        read_folder(folder)
    text = one_line(error, folder)
    assert any(part in text for part in says.split("|")), text


def cache(root: Path, shared: bool) -> tuple[Path, Path]:
    """The layout of huggingface_hub's cache, before 2.0 and since: a snapshot of links, and the file behind them."""
    repo = root / "models--zai-org--GLM-4.6"
    snapshot = repo / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    blob = root / "blobs" / "ab" / ("ab" + "1" * 62) if shared else repo / "blobs" / ("1" * 64)
    blob.parent.mkdir(parents=True, exist_ok=True)
    write(blob, {"x": np.arange(6, dtype=np.float32)})
    if shared:
        (repo / "blobs" / ("1" * 64)).symlink_to(f"../../blobs/ab/{blob.name}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/" + "1" * 64)
    return snapshot, blob


@pytest.mark.parametrize("shared", [False, True])
def test_links_of_the_hugging_face_cache_are_followed(shared, tmp_path):
    snapshot, _ = cache(tmp_path / "hub", shared)
    (tmp_path / "mine").symlink_to(snapshot)  # the folder itself may be given by any path
    for folder in (snapshot, tmp_path / "mine", snapshot / ".." / snapshot.name):
        tensor = read_folder(folder)["x"]
        assert tensor.file == folder / "model.safetensors"
        np.testing.assert_array_equal(tensor.read(slice(2, 5)), [2, 3, 4])


@pytest.mark.parametrize("link", ["../../../x", "../../blobs/../x", "../../blobs/" + "g" * 64, "/tmp/" + "1" * 64])
def test_other_links_in_the_cache_are_not(link, tmp_path):
    snapshot, blob = cache(tmp_path, shared=False)
    write(tmp_path / "x", {"x": patterns("F32")})
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(link)
    with pytest.raises(BadInput, match="a symbolic link to"):
        read_header(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    blob.unlink()
    blob.symlink_to(link)
    with pytest.raises(BadInput, match="a symbolic link to"):
        read_header(snapshot / "model.safetensors")


def test_a_shared_blob_that_is_a_link_itself(tmp_path):
    snapshot, blob = cache(tmp_path, shared=True)
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="cannot be opened"):
        read_folder(snapshot)


# ---- writing


def plan(arrays: dict[str, np.ndarray]) -> dict:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {name: (names[array.dtype], array.shape, lambda array=array: array) for name, array in arrays.items()}


def test_write_folder_shards_as_hugging_face_does(tmp_path):
    arrays = {f"layer.{i}": patterns("BF16", (4, 8), i) for i in range(5)} | {"big": patterns("F32", (100,))}
    files = write_folder(tmp_path / "new" / "m", plan(arrays), shard_bytes=130)
    assert [file.name for file in files] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)] + [INDEX]
    assert sorted(os.listdir(tmp_path / "new" / "m")) == sorted(file.name for file in files)
    text = json.loads((tmp_path / "new" / "m" / INDEX).read_text())
    assert text["metadata"] == {"total_size": sum(array.nbytes for array in arrays.values())}
    assert list(text["weight_map"]) == sorted(arrays)
    tensors = read_folder(tmp_path / "new" / "m")
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        assert bits(tensors[name].read()) == bits(array)
    with safetensors.safe_open(files[3], "np") as opened:
        assert opened.metadata() == {"format": "pt"} and list(opened.keys()) == ["big"]
    assert files[0].stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_write_folder_one_file_has_no_index(tmp_path):
    arrays = {"x": patterns("F32"), "s": patterns("BF16", ())}
    assert write_folder(tmp_path, plan(arrays)) == [tmp_path / "model.safetensors"]
    assert {name: bits(tensor.read()) for name, tensor in read_folder(tmp_path).items()} == {
        name: bits(array) for name, array in arrays.items()
    }


def test_arrays_are_made_one_at_a_time(tmp_path):
    alive = []

    def get(i):
        assert not [a for a in alive if a() is not None][1:]  # at most the one before, still being written
        array = np.full((1000,), i, np.float32)
        alive.append(weakref.ref(array))
        return array

    write_folder(tmp_path, {f"{i}": ("F32", (1000,), lambda i=i: get(i)) for i in range(5)}, shard_bytes=8000)
    assert len(alive) == 5 and len(read_folder(tmp_path)) == 5


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail():
        raise RuntimeError("the source is gone")

    ok = ("F32", (10,), lambda: np.zeros(10, np.float32))
    for bad, kind in (
        (("F32", (10,), fail), RuntimeError),
        (("F32", (10,), lambda: np.zeros(9, np.float32)), UsageError),
        (("F32", (10,), lambda: np.zeros(10, np.float64)), UsageError),
        (("F32", (10,), lambda: np.zeros((10, 1), np.float32)), UsageError),
    ):
        with pytest.raises(kind):
            write_folder(tmp_path / "m", {"a": ok, "b": bad, "c": ok}, shard_bytes=40)
        assert os.listdir(tmp_path / "m") == []


@pytest.mark.parametrize("name", ["model.safetensors", "mtp.safetensors", INDEX])
def test_weights_that_are_there_are_not_mixed_with_ours(name, tmp_path):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(DestinationError) as error:
        write_folder(tmp_path, plan({"x": patterns("F32")}))
    one_line(error, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"mine" and os.listdir(tmp_path) == [name]


def test_what_write_does_not_overwrite(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"")
    write(path, {"x": patterns("F32")})  # an empty file is nobody's
    before = path.read_bytes()
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "folder").mkdir()
    for place in (path, tmp_path / "link", tmp_path / "folder", tmp_path / "no" / "folder", path / "below"):
        with pytest.raises(DestinationError) as error:
            write(place, {"y": patterns("F32")})
        one_line(error, tmp_path)
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["folder", "link", "x.safetensors"]
    with pytest.raises(DestinationError):
        write_folder(path, plan({"x": patterns("F32")}))


def test_space_is_asked_for_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(NoSpace) as error:
        write_folder(tmp_path, {"x": ("F32", (500,), lambda: pytest.fail("read before the check"))})
    one_line(error, tmp_path, "2,000 bytes are to be written, 1,000 are free: 1,000 short")
    with pytest.raises(NoSpace):
        write(tmp_path / "x.safetensors", {"x": patterns("F32", (500,))})
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    def full(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(NoSpace) as error:
        write(tmp_path / "x.safetensors", {"x": patterns("F32", (500,))})
    monkeypatch.undo()
    one_line(error, tmp_path / "x.safetensors", "No space left on device")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "tensors, metadata",
    [
        ({"": np.zeros(1)}, None),
        ({"__metadata__": np.zeros(1)}, None),
        ({"a\nb": np.zeros(1)}, None),
        ({"a": np.zeros(1, ">f4")}, None),
        ({"a": np.zeros(1, np.complex128)}, None),
        ({"a": np.array(["text"])}, None),
        ({"a": np.zeros(1)}, {"k": "\ud800"}),
    ],
)
def test_what_the_format_cannot_hold(tensors, metadata, tmp_path):
    with pytest.raises(UsageError) as error:
        write(tmp_path / "x.safetensors", tensors, metadata)
    one_line(error, tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


def test_errors_carry_their_exit_codes():
    assert [kind.exit_code for kind in (BadInput, MissingInput, NoSpace, DestinationError, UsageError)] == [
        65,
        66,
        28,
        73,
        2,
    ]
    assert all(issubclass(kind, GLMError) for kind in (BadInput, MissingInput, NoSpace, DestinationError))
