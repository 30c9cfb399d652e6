"""What others hand us (configurations, indexes, links, journals, seals that fit) is refused: with one of our errors, on
one line that names the file, at once, in little memory, with nothing written and nothing touched that is outside.

Headers of safetensors files and indexes alone are in test_safetensors.py; the tables here are what reaches plan,
convert, verify, export and load. benchmarks/fuzz.py begins with them too."""

import contextlib
import functools
import gzip
import importlib
import json
import os
import shutil
import signal
import stat
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from folders import SMALL, random_tensors, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_convert import shard_of
from test_safetensors import JSON_PIECES

from glm_jax.config import Config, tiny
from glm_jax.convert import convert, export, gc, native, ocdbt, plan, verify
from glm_jax.convert.conversion import LOCK, STAGING
from glm_jax.convert.hub import fetch
from glm_jax.convert.safetensors import INDEX, read_folder
from glm_jax.errors import BadInput, DestinationError, GLMError, MissingInput
from glm_jax.loading import read_config, read_tensors


def some(table: dict) -> list:
    """The cases of a table, of which the quick suite runs every fourth: they differ more in what is wrong than in what
    finds it."""
    case = lambda value: value if isinstance(value, tuple) else (value,)
    slow = lambda i: () if i % 4 == 0 else pytest.mark.slow
    return [pytest.param(*case(value), id=name, marks=slow(i)) for i, (name, value) in enumerate(table.items())]


CONFIG = tiny(**SMALL)
RAW = CONFIG.to_dict()
SECONDS, BYTES = 1.0, 64 << 20
SHARD = "model-1.safetensors"
EMBED = "model.embed_tokens.weight"


def look(folder: Path):
    """All that `load` does before it reads a weight."""
    folder = fetch(folder)
    config, _, wanted = read_config(folder)
    return read_tensors(folder, config, wanted)


def state_of(folder: Path) -> dict[str, tuple]:
    """Every file, link and folder, without opening what is none."""
    found = {}
    for at, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(at) / name
            mode = path.lstat().st_mode
            what = os.readlink(path) if stat.S_ISLNK(mode) else None
            if stat.S_ISREG(mode) and path.stat().st_size < 10_000_000:
                what = path.read_bytes()
            found[str(path.relative_to(folder))] = stat.S_IFMT(mode), what
    return found


OUTSIDE: list[str] = []  # folders of which nothing may be opened
OPENED: list[str] = []  # what was, all the same


def _audit(event: str, args: tuple) -> None:
    if event == "open" and OUTSIDE and isinstance(args[0], str | Path):
        path, flags = os.path.abspath(args[0]), args[2] or 0
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        real = real if flags & os.O_NOFOLLOW else os.path.realpath(real)
        if any(real.startswith(folder + os.sep) for folder in OUTSIDE) or real.startswith("/dev/"):
            OPENED.append(real)


sys.addaudithook(_audit)


@contextlib.contextmanager
def bounded(outside: Path | None = None):
    """Within these bounds of time and memory, and of `outside` nothing is opened or changed."""

    def too_long(*_):
        raise AssertionError("this takes for ever")

    before, previous = outside and state_of(outside), signal.signal(signal.SIGALRM, too_long)
    OUTSIDE[:], OPENED[:] = [str(outside.resolve())] if outside else [], []
    signal.alarm(20)
    tracemalloc.start()
    begin = time.process_time()
    try:
        yield
        seconds, (_, peak) = time.process_time() - begin, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        OUTSIDE.clear()
    assert seconds < SECONDS and peak < BYTES, (seconds, peak)
    assert not OPENED and (outside is None or state_of(outside) == before)


def refused(call: Callable, kind: type[GLMError], says: str, *names: object, outside: Path | None = None) -> None:
    with bounded(outside):
        with pytest.raises(kind) as error:
            call()
    text = str(error.value)
    assert text.isprintable() and len(text) < 4000, text[:4000]
    assert any(part in text for part in says.split("|")), text
    assert all(str(name) in text for name in names), text


# ---- what all tests copy: a source, the folder it becomes, one that is half way there


@pytest.fixture(autouse=True, scope="module")
def _():
    """Checksums of files of one length, some hundred times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocdbt, "_moved", functools.cache(ocdbt._moved))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("made"))


def make(root: Path) -> Path:
    from glm_jax.convert import conversion

    write_model(root / "hf", CONFIG, random_tensors(CONFIG), shard_of)
    (root / "hf/tokenizer_config.json").write_text("{}")
    convert(root / "hf", root / "to", "copy")
    finish, conversion.finish = conversion.finish, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    try:
        convert(root / "hf", root / "new", "copy")
    except KeyboardInterrupt:
        pass
    finally:
        conversion.finish = finish
    assert (root / f"new{STAGING}/journal-0.jsonl").is_file()
    return root


@pytest.fixture
def outside(tmp_path) -> Path:
    """Somebody else's folder."""
    folder = tmp_path / "outside"
    (folder / "hf").mkdir(parents=True)
    (folder / "secret.json").write_text("{}")
    (folder / SHARD).write_bytes(b"secret")
    return folder


def copied(made: Path, to: Path, *names: str) -> Path:
    for name in names:
        shutil.copytree(made / name, to / name, symlinks=True)
    return to


# ---- config.json


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def text_of(**changes: str) -> bytes:
    """config.json with these values as they are written."""
    fields = {name: json.dumps(value) for name, value in RAW.items()} | changes
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}").encode()


NOT_INTEGER = "not an integer"
CONFIGS: dict[str, tuple[bytes | dict, str]] = {  # refused by whoever reads it
    "layers: 10^9": ({"num_hidden_layers": 10**9}, "experts, more than 100,000"),
    "layers: 2^31": ({"num_hidden_layers": 2**31}, f"num_hidden_layers is 2147483648, {NOT_INTEGER}"),
    "layers: 10^400": ({"num_hidden_layers": 10**400}, NOT_INTEGER),
    "layers: 10^4299": (text_of(num_hidden_layers="1" + "0" * 4299), NOT_INTEGER),
    "layers: 10^5000": (text_of(num_hidden_layers="1" + "0" * 5000), "not JSON|not valid"),
    "layers: -1": ({"num_hidden_layers": -1}, NOT_INTEGER),
    "layers: a list": ({"num_hidden_layers": [1] * 1000}, NOT_INTEGER),
    "layers: a text to repeat": ({"num_hidden_layers": "a" * 1000, "n_routed_experts": 10**9}, NOT_INTEGER),
    "heads: a text that formats a gigabyte": ({"num_attention_heads": "%1000000000d"}, NOT_INTEGER),
    "heads: true": ({"num_attention_heads": True}, NOT_INTEGER),
    "heads: 8.0": ({"num_attention_heads": 8.0}, NOT_INTEGER),
    "heads: null": ({"num_attention_heads": None}, NOT_INTEGER),
    "heads: NaN": (text_of(num_attention_heads="NaN"), NOT_INTEGER),
    "heads: 0 for keys": ({"num_key_value_heads": 0}, NOT_INTEGER),
    "experts: 10^9": ({"n_routed_experts": 10**9}, "experts, more than 100,000"),
    "experts: 10^9, of 10^9 groups": ({"n_routed_experts": 10**9, "n_group": 10**9}, "experts, more than 100,000"),
    "experts: -8": ({"n_routed_experts": -8}, NOT_INTEGER),
    "vocabulary: 2^63": ({"vocab_size": 2**63}, NOT_INTEGER),
    "width: 1e3": (text_of(hidden_size="1e3"), NOT_INTEGER),
    "width: Infinity": (text_of(hidden_size="Infinity"), NOT_INTEGER),
    "head width: 2^62": ({"head_dim": 2**62}, NOT_INTEGER),
    "MTP layers: 10^9": ({"num_nextn_predict_layers": 10**9}, "at most one"),
    "dense layers: 2^70": ({"first_k_dense_replace": 2**70}, NOT_INTEGER),
    "theta: 10^400": (text_of(rope_theta="1" + "0" * 400, rope_parameters="null"), "not a number > 0"),
    "theta: 1e999": (text_of(rope_theta="1e999", rope_parameters="null"), "not a number > 0"),
    "theta: NaN": (text_of(rope_theta="NaN", rope_parameters="null"), "not a number > 0"),
    "theta: NaN twice": (text_of(rope_theta="NaN", rope_parameters='{"rope_theta": NaN}'), "rope_theta is nan"),
    "epsilon: -Infinity": (text_of(rms_norm_eps="-Infinity"), "not a number > 0"),
    "epsilon: 1e-999": (text_of(rms_norm_eps="1e-999"), "not a number > 0"),
    "scaling: true": ({"routed_scaling_factor": True}, "not a number > 0"),
    "part of a head: 1e308": (
        {"partial_rotary_factor": 1e308, "head_dim": 2000, "rope_parameters": None},
        "not an even number",
    ),
    "stops: a hundred thousand texts": ({"eos_token_id": ["x"] * 100_000}, "not an id or a list of ids"),
    "stops: 2^64": ({"eos_token_id": [2**64]}, "not an id or a list of ids"),
    "stops: deep": ({"eos_token_id": deep(900)}, "not an id or a list of ids"),
    "padding: 10^400": ({"pad_token_id": 10**400}, "not an id"),
    "activation: of two lines": ({"hidden_act": "silu\n\x1b[31m"}, r"hidden_act is 'silu\n\x1b[31m'"),
    "activation: long": ({"hidden_act": "a" * 500_000}, "hidden_act is 'aaa"),
    "activation: half a pair": (text_of(hidden_act='"\\ud800"'), r"hidden_act is '\ud800'"),
    "model type: a list": ({"model_type": [["glm4_moe"]]}, "model_type is"),
    "model type: deep": ({"model_type": deep(900)}, "model_type is"),
    "dtype: of two lines": ({"dtype": "float32\nfloat32"}, "dtype"),
    "dtype: deep": ({"dtype": deep(900)}, "dtype"),
    "rope: deep": ({"rope_parameters": deep(900)}, "rope_parameters is"),
    "rope: a field of two lines": ({"rope_parameters": {"a\nb": 1}}, r"rope_parameters has 'a\nb'"),
    "rope: a thousand fields": ({"rope_parameters": {f"field{i}": 1 for i in range(1000)}}, "and 996 more"),
    "rope: a type that is a list": ({"rope_parameters": {"rope_type": [["default"]]}}, "rope_parameters is"),
    "deep": (b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not JSON|not valid"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not JSON|not valid"),
    "empty": (b"", "not JSON|not valid"),
    "cut off": (text_of()[:-20], "not JSON|not valid"),
    "a list": (b"[]", "not an object|not a JSON object"),
    "UTF-16": (text_of().decode().encode("utf-16"), "not JSON|not valid"),
    "zeros": (bytes(1000), "not JSON|not valid"),
    "a megabyte of lists": (b'{"x": [' + b"[]," * 500_000 + b"1]}", "bytes, a config.json|bytes, the configuration"),
}
PLANNED: dict[str, tuple[bytes | dict, str]] = {  # each number may be; beside the weights, or as JSON, it may not
    "100,000 layers of one expert": (
        {"num_hidden_layers": 100_000, "n_routed_experts": 1, "num_experts_per_tok": 1, "num_nextn_predict_layers": 0},
        "config.json implies 2,|tensors, and 141 are there",
    ),
    "10^9 dense layers": (
        {
            "num_hidden_layers": 90_000,
            "first_k_dense_replace": 10**9,
            "n_routed_experts": 1,
            "num_experts_per_tok": 1,
            "num_nextn_predict_layers": 0,
        },
        "config.json implies",
    ),
    "30,000 experts": ({"n_routed_experts": 30_000}, "config.json implies"),
    "a matrix of 2^62 numbers": ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 2}, "the config implies [2147483647"),
    "one layer too many": (
        {"num_hidden_layers": 4, "num_nextn_predict_layers": 0},
        "model.layers.3.enorm.weight, model.layers.3.hnorm.weight",
    ),
}
BLOCKS: dict[str, tuple[bytes | dict, str]] = {  # said to `plan` only
    "a key twice": (text_of()[:-1] + b', "vocab_size": 128}', "the key 'vocab_size' is given twice"),
    "blocks of 0": ({"quantization_config": {"weight_block_size": [0, 128]}}, "weight_block_size is [0, 128]"),
    "blocks of text": ({"quantization_config": {"weight_block_size": "a\nb"}}, r"weight_block_size is 'a\nb'"),
    "blocks of true": ({"quantization_config": {"weight_block_size": [True, 1]}}, "weight_block_size is [True, 1]"),
    "blocks, deep": ({"quantization_config": {"weight_block_size": deep(900)}}, "weight_block_size is"),
}


def put_config(folder: Path, what: bytes | dict) -> None:
    (folder / "config.json").write_bytes(what if isinstance(what, bytes) else json.dumps(RAW | what).encode())


@pytest.fixture(scope="module")
def spoiled(made, tmp_path_factory) -> Path:
    """A source of which each test puts its own config.json."""
    return copied(made, tmp_path_factory.mktemp("spoiled"), "hf") / "hf"


@pytest.mark.parametrize("what, says", CONFIGS.values(), ids=CONFIGS)
def test_hostile_config(what, says, spoiled):
    put_config(spoiled, what)
    for call in (Config.read, look, plan, lambda f: convert(f, f.parent / "to", dtype="bf16")):
        refused(lambda call=call: call(spoiled), BadInput, says, spoiled / "config.json")
    assert os.listdir(spoiled.parent) == ["hf"]


@pytest.mark.parametrize("what, says", PLANNED.values(), ids=PLANNED)
def test_hostile_config_of_these_weights(what, says, spoiled):
    put_config(spoiled, what)
    for call in (look, plan):
        refused(lambda call=call: call(spoiled), BadInput, says, spoiled)


@pytest.mark.parametrize("what, says", BLOCKS.values(), ids=BLOCKS)
def test_hostile_config_of_a_plan(what, says, spoiled):
    put_config(spoiled, what)
    refused(lambda: plan(spoiled), BadInput, says, spoiled / "config.json")


@pytest.mark.parametrize("levels", [300, 900, 980, 3000, 9000])
def test_a_config_that_can_be_read_but_not_written_again(levels, spoiled):
    """How deep each is differs between versions of Python."""
    put_config(spoiled, text_of(unknown="[" * levels + "]" * levels))
    with bounded(), contextlib.suppress(BadInput):
        plan(spoiled, "bf16")


def test_a_block_far_wider_than_its_tensor(tmp_path):
    x, fp8 = random_tensors(CONFIG), {}
    for name, w in x.items():
        fp8[name] = w if "e_score" in name else w.astype(ml_dtypes.bfloat16)
        if name.endswith("proj.weight") and "eh_proj" not in name:
            fp8[name] = w.astype(ml_dtypes.float8_e4m3fn)
            fp8[name + "_scale_inv"] = np.full((-(-len(w) // 24), 1), 2, np.float32)
    blocks = {"quant_method": "fp8", "weight_block_size": [24, 10**9]}
    folder = write_model(tmp_path / "hf", CONFIG, fp8, dtype="bfloat16", quantization_config=blocks)
    with bounded():
        convert(folder, tmp_path / "to", dtype="bf16")
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    want = (fp8[name].astype(np.float32) * 2).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(read_folder(tmp_path / "to/state/hf")[name].read(), want)


# ---- the index and the files of a source


def index(folder: Path, change: Callable[[dict], object]) -> None:
    value = json.loads((folder / INDEX).read_text())
    change(value["weight_map"])
    (folder / INDEX).write_text(json.dumps(value))


def swap(where: dict, a: str, b: str) -> None:
    where[a], where[b] = where[b], where[a]


def instead(path: Path, make: Callable[[Path], object]) -> None:
    """Something else where a file was."""
    path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
    make(path)


def device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes devices")


OTHER = {  # than a file
    "link": (lambda p: p.symlink_to(p.parents[1] / "outside" / "secret.json"), "a symbolic link"),
    "link to a device": (lambda p: p.symlink_to("/dev/zero"), "a symbolic link"),
    "link to nothing": (lambda p: p.symlink_to("gone"), "a symbolic link|no such file|are missing"),
    "link to itself": (lambda p: p.symlink_to(p.name), "a symbolic link|are missing"),
    "pipe": (os.mkfifo, "not a regular file"),
    "folder": (Path.mkdir, "not a regular file"),
    "device": (device, "not a regular file"),
}
INDEXES = {
    "of two files swapped": (
        lambda f: index(f, lambda w: swap(w, EMBED, "model.layers.3.enorm.weight")),
        BadInput,
        "in the file, but",
    ),
    "of a shard that is not there": (
        lambda f: index(f, lambda w: w.update({EMBED: "model-9.safetensors"})),
        MissingInput,
        "1 of 5 files named by",
    ),
    "of 6,000 shards that are not there": (
        lambda f: index(f, lambda w: w.update({f"t{i}": f"model-{i + 9}.safetensors" for i in range(6_000)})),
        MissingInput,
        "6000 of 6004 files named by",
    ),
    "of a tensor that is not there": (
        lambda f: index(f, lambda w: w.update({"more": SHARD})),
        BadInput,
        f"{SHARD}: 'more' not in it",
    ),
    "without a tensor": (lambda f: index(f, lambda w: w.pop(EMBED)), BadInput, f"{EMBED!r} in the file, but not in"),
    "of a tensor of two lines": (
        lambda f: index(f, lambda w: w.update({"a\nb": SHARD})),
        BadInput,
        r"tensor 'a\nb': a name is",
    ),
    "out of the folder": (
        lambda f: index(f, lambda w: w.update({EMBED: f"../outside/{SHARD}"})),
        BadInput,
        "is not the bare name",
    ),
    "to a hidden path": (
        lambda f: index(f, lambda w: w.update({EMBED: f"./{SHARD}"})),
        BadInput,
        "is not the bare name",
    ),
    "to a null": (lambda f: index(f, lambda w: w.update({EMBED: None})), BadInput, "None is not the bare name"),
    "deep": (lambda f: (f / INDEX).write_text('{"weight_map":' * 100_000), BadInput, "the index is not valid"),
    "huge": (lambda f: os.truncate(f / INDEX, 1 << 40), BadInput, "1,099,511,627,776 bytes"),
    "of a shard with an odd name": (
        lambda f: (f / "a\nb.safetensors").write_bytes(b""),
        BadInput,
        r"does not name 'a\nb.safetensors'",
    ),
    "of a thousand shards more": (
        lambda f: [(f / f"extra{i}.safetensors").touch() for i in range(1000)],
        BadInput,
        "and 997 more",
    ),
    **{
        f"{name} is a {what}": (lambda f, n=name, m=make: instead(f / n, m), (BadInput, MissingInput), says)
        for name in (INDEX, "config.json", SHARD)
        for what, (make, says) in OTHER.items()
        if (name, what) not in ((INDEX, "link to nothing"), (INDEX, "link to itself"))
    },
    **{
        f"the tokenizer is a {what}": (
            lambda f, m=OTHER[what][0]: instead(f / "tokenizer_config.json", m),
            BadInput,
            "a symbolic link",
        )
        for what in ("link",)
    },
}


@pytest.mark.parametrize("harm, kind, says", some(INDEXES))
def test_hostile_source(harm, kind, says, made, tmp_path, outside):
    folder = copied(made, tmp_path, "hf") / "hf"
    harm(folder)
    before = state_of(tmp_path)
    refused(lambda: plan(folder), kind, says, folder, outside=outside)
    refused(lambda: convert(folder, tmp_path / "to"), kind, says, folder, outside=outside)
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("what", ["pipe", "folder", "device", "link to a device", "link to nothing"])
def test_what_is_no_file_stays_behind(what, made, tmp_path, outside):
    folder = copied(made, tmp_path, "hf") / "hf"
    instead(folder / "tokenizer_config.json", OTHER[what][0])
    (folder / "b\x1b[31m\n.json").write_text("{}")
    with bounded(outside):
        done = convert(folder, tmp_path / "to", "copy")
    assert done.left == (r"'b\x1b[31m\n.json'", "tokenizer_config.json")
    assert verify(tmp_path / "to").root


# ---- a begun conversion


def journal(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Path], object]:
    def harm(staged: Path) -> None:
        path = staged / "journal-0.jsonl"
        path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))

    return harm


def line(name: object = EMBED, digest: object = "0" * 64, wrong: object = 0) -> bytes:
    return json.dumps([name, digest, wrong]).encode() + b"\n"


def other(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda staged: instead(staged / name, make)


def planned(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def harm(staged: Path) -> None:
        value = json.loads((staged / "plan.json").read_text())
        change(value)
        (staged / "plan.json").write_text(json.dumps(value))

    return harm


def beside(staged: Path, end: str) -> Path:
    return staged.with_name(staged.name.removesuffix(STAGING) + end)


DAMAGED = "journal-0.jsonl: line 1 is damaged: remove"
to_outside = lambda name: (
    lambda p: p.symlink_to(Path(os.path.abspath(p)).parent / ("../" * 9) / str(_outside(p) / name)[1:])
)
_outside = lambda p: next(q / "outside" for q in p.parents if (q / "outside").is_dir())
LINES = {
    "garbage": b"garbage\n",
    "zeros": bytes(100) + b"\n",
    "not UTF-8": b"\xff\xfe\n",
    "an empty line": b"\n",
    "a number": b"1\n",
    "null": b"null\n",
    "an object of three": b'{"a": 1, "b": 2, "c": 3}\n',
    "a text of three": b'"abc"\n',
    "two fields": b'["a", "b"]\n',
    "deep": b"[" * 100_000 + b"\n",
    "a number of 5000 digits": b'["a", "b", ' + b"9" * 5000 + b"]\n",
    "a name that is a list": line([EMBED]),
    "a name that is null": line(None),
    "a digest that is short": line(digest="00"),
    "a digest that is no hexadecimal": line(digest="x" * 64),
    "a digest in capitals": line(digest="A" * 64),
    "a digest that is a number": line(digest=0),
    "a digest that is null": line(digest=None),
    "a count that is negative": line(wrong=-1),
    "a count that is true": line(wrong=True),
    "a count that is a text": line(wrong="0"),
    "a count that is NaN": line(wrong=float("nan")),
}
STAGED = {
    **{
        f"journal: {what}": (journal(lambda lines, text=text: [text, *lines]), BadInput, DAMAGED)
        for what, text in LINES.items()
    },
    "journal: torn in the middle": (
        journal(lambda lines: [*lines[:3], lines[3][:40] + b"\n", *lines[4:]]),
        BadInput,
        "journal-0.jsonl: line 4 is damaged",
    ),
    "journal: huge": (lambda s: os.truncate(s / "journal-0.jsonl", 1 << 40), BadInput, "1,099,511,627,776 bytes"),
    "journal: a link": (other("journal-0.jsonl", to_outside("secret.json")), BadInput, "a symbolic link"),
    "journal: a link to nothing": (other("journal-0.jsonl", to_outside("new")), BadInput, "a symbolic link"),
    "journal: a pipe": (other("journal-0.jsonl", os.mkfifo), BadInput, "not a regular file"),
    "journal: a folder": (other("journal-0.jsonl", Path.mkdir), BadInput, "not a regular file"),
    "journal: a device": (other("journal-0.jsonl", device), BadInput, "not a regular file"),
    "plan: another": (
        planned(lambda p: p["facts"].update(mtp="drop\n\x1b[31m")),
        DestinationError,
        r"mtp was 'drop\n\x1b[31m', is keep",
    ),
    "plan: of odd fields": (
        planned(lambda p: p["facts"].update({"a\nb": 1})),
        DestinationError,
        r"'a\nb' was 1, is None",
    ),
    "plan: of odd files": (
        planned(lambda p: p["facts"]["beside"].update({"a\nb": "c"})),
        DestinationError,
        r"beside: 'a\nb'",
    ),
    "plan: deep": (planned(lambda p: p["facts"].update(mtp=deep(900))), DestinationError, "mtp was [["),
    "plan: long": (planned(lambda p: p["facts"].update(mtp="a" * 10**6)), DestinationError, "mtp was 'aaa"),
    "all of it a link": (other("", to_outside("hf")), DestinationError, "is not a folder that a conversion makes"),
    "all of it a link to nothing": (other("", to_outside("new")), DestinationError, "is not a folder that"),
    "all of it a file": (other("", Path.touch), DestinationError, "is not a folder that a conversion makes"),
    "all of it a pipe": (other("", os.mkfifo), DestinationError, "is not a folder that a conversion makes"),
    "state: a link": (other("state", to_outside("")), DestinationError, "state: is not a folder that"),
    "state/hf: a link": (other("state/hf", to_outside("hf")), DestinationError, "hf: is not a folder that"),
    "a shard: a link": (other(f"state/hf/{SHARD}", to_outside(SHARD)), DestinationError, f"{SHARD}: cannot be written"),
    "a shard: a link to nothing": (
        other(f"state/hf/{SHARD}", to_outside("new")),
        DestinationError,
        "cannot be written",
    ),
    "a shard: a folder": (other(f"state/hf/{SHARD}", Path.mkdir), DestinationError, "cannot be written"),
    "config.json: a folder": (other("state/hf/config.json", Path.mkdir), DestinationError, "cannot be written"),
    "config.json.tmp: a folder": (
        lambda s: (s / "state/hf/config.json.tmp").mkdir(),
        DestinationError,
        "config.json: cannot be written",
    ),
    "lock: a link": (lambda s: to_outside("new")(beside(s, LOCK)), DestinationError, "cannot be written"),
    "lock: a folder": (lambda s: beside(s, LOCK).mkdir(), DestinationError, "cannot be written"),
    "lock: a pipe": (lambda s: os.mkfifo(beside(s, LOCK)), DestinationError, "cannot be written"),
    "seal: garbage": (lambda s: (s / native.SEAL).write_bytes(b"{}"), BadInput, "is damaged"),
    "seal: a link": (lambda s: to_outside("secret.json")(s / native.SEAL), BadInput, "a symbolic link"),
    "seal: huge": (
        lambda s: ((s / native.SEAL).touch(), os.truncate(s / native.SEAL, 1 << 40)),
        BadInput,
        "1,099,511,627,776 bytes",
    ),
    "target: a file": (lambda s: beside(s, "").touch(), DestinationError, "was not made by convert"),
    "target: a pipe": (lambda s: os.mkfifo(beside(s, "")), DestinationError, "was not made by convert"),
    "target: a link": (lambda s: to_outside("hf/new")(beside(s, "")), DestinationError, "is a symbolic link"),
}


@pytest.mark.parametrize("harm, kind, says", some(STAGED))
def test_hostile_staging_folder(harm, kind, says, made, tmp_path, outside):
    copied(made, tmp_path, "hf", f"new{STAGING}")
    harm(tmp_path / f"new{STAGING}")
    before = state_of(tmp_path / "hf"), os.path.lexists(tmp_path / "new")
    refused(lambda: convert(tmp_path / "hf", tmp_path / "new", "copy"), kind, says, tmp_path / "new", outside=outside)
    assert before == (state_of(tmp_path / "hf"), os.path.lexists(tmp_path / "new"))
    with bounded(outside), contextlib.suppress(GLMError):
        gc(tmp_path)
    assert state_of(tmp_path / "hf") == before[0]


ANEW = {  # nothing that can be gone on with, so that it begins anew
    "plan: garbage": lambda s: (s / "plan.json").write_bytes(b"\xff"),
    "plan: a list": lambda s: (s / "plan.json").write_text("[]"),
    "plan: deep": lambda s: (s / "plan.json").write_text("[" * 100_000),
    "plan: facts a list": planned(lambda p: p.update(facts=[])),
    "plan: facts a text": planned(lambda p: p.update(facts="facts")),
    "plan: no facts": planned(lambda p: p.pop("facts")),
    "plan: stamps of nonsense": planned(lambda p: p.update(stamps=[None])),
    "plan: huge": lambda s: os.truncate(s / "plan.json", 1 << 40),
    "plan: a link": other("plan.json", to_outside("secret.json")),
    "plan: a pipe": other("plan.json", os.mkfifo),
    "plan: a folder": other("plan.json", Path.mkdir),
    "journal: of unknown tensors": journal(lambda lines: [line(f"t{i}") for i in range(1000)] + lines),
    "journal: without an end": journal(lambda lines: [*lines, b'["a']),
    "config.json.tmp: a link": lambda s: to_outside("secret.json")(s / "state/hf/config.json.tmp"),
    "config.json: a link": other("state/hf/config.json", to_outside("secret.json")),
    "plan.json.tmp: a link": lambda s: ((s / "plan.json").unlink(), to_outside("secret.json")(s / "plan.json.tmp")),
}


@pytest.mark.parametrize("harm", some(ANEW))
def test_staging_folder_that_does_no_harm(harm, made, tmp_path, outside):
    copied(made, tmp_path, "hf", f"new{STAGING}")
    harm(tmp_path / f"new{STAGING}")
    with bounded(outside):
        convert(tmp_path / "hf", tmp_path / "new", "copy")
    assert state_of(tmp_path / "new") == state_of(made / "to")


def test_a_journal_that_lies_is_found(made, tmp_path):
    copied(made, tmp_path, "hf", f"new{STAGING}")
    journal(lambda lines: [*lines, line()])(tmp_path / f"new{STAGING}")
    convert(tmp_path / "hf", tmp_path / "new", "copy")
    refused(lambda: verify(tmp_path / "new"), BadInput, f"{EMBED} in model-", tmp_path / "new")


# ---- a converted folder, with a seal that fits


def reseal(
    folder: Path,
    manifest: Callable[[dict], object] = lambda m: None,
    seal: Callable[[dict], object] = lambda s: None,
    pack: Callable[[bytes], bytes] = lambda text: gzip.compress(text, 1),
) -> None:
    """Changes manifest and seal as who wants to be believed does: Orbax's index, digests and names fit again."""
    facts = json.loads((folder / native.SEAL).read_text())
    raw = json.loads(gzip.decompress((folder / facts["manifest"]).read_bytes()))
    raw = _instead_of(raw, manifest(raw))
    (folder / facts["manifest"]).unlink()
    del facts["files"][facts["manifest"]]
    data = pack(json.dumps(raw).encode())
    small = {facts.setdefault("manifest", "") and native.manifest_name(data): data, **_index_of(raw)}
    for name, content in small.items():
        (folder / name).write_bytes(content)
        facts["files"][name] = native.sha256(content)
    facts["manifest"] = native.manifest_name(data)
    facts["files"] = dict(sorted(facts["files"].items()))
    facts = _instead_of(facts, seal(facts))
    (folder / native.SEAL).write_bytes(
        facts if isinstance(facts, bytes) else (json.dumps(facts, indent=1) + "\n").encode()
    )


def _instead_of(value, changed):
    """What a change gives in place of a value is a tuple of it; else it has changed the value itself."""
    return changed[0] if isinstance(changed, tuple) else value


def _index_of(raw) -> dict[str, bytes]:
    """Orbax's index of a manifest, if one can be made of it."""
    try:
        fields = {key: value for key, value in raw.items() if key != "root"}
        fields["tensors"] = {n: native.Record(t[0], tuple(t[1]), *t[2:]) for n, t in raw["tensors"].items()}
        fields["arrays"] = tuple(native.Array(p, d, tuple(s), k, tuple(t)) for p, d, s, k, t in raw["arrays"])
        assert all(sum(a.shape) + a.stacked < 10_000 for a in fields["arrays"])
        return native.index_files(native.Manifest(**fields))
    except Exception:
        return {}


def tensor(at: int, value: object, name: str = EMBED) -> Callable[[dict], object]:
    return lambda m: m["tensors"][name].__setitem__(at, value)


def array(at: int, value: object, path: str = "moe.mlp.gate_up") -> Callable[[dict], object]:
    return lambda m: next(a for a in m["arrays"] if a[0] == path).__setitem__(at, value)


def field(*keys: str | int, value: object) -> Callable[[dict], object]:
    def change(m: dict) -> None:
        for key in keys[:-1]:
            m = m[key]
        m[keys[-1]] = value

    return change


def order(m: dict) -> None:
    """Two experts of an array change places."""
    names = next(a for a in m["arrays"] if a[0] == "moe.mlp.down")[4]
    names[0], names[1] = names[1], names[0]


def trade(m: dict) -> None:
    """Two tensors of one shape change places, digests and all."""
    a, b = (f"model.layers.1.mlp.experts.{i}.down_proj.weight" for i in (0, 1))
    m["tensors"][a], m["tensors"][b] = m["tensors"][b], m["tensors"][a]


def overlap(m: dict) -> None:
    a, b = (m["tensors"][f"model.layers.1.mlp.experts.{i}.down_proj.weight"] for i in (0, 1))
    a[2], a[3] = b[2], b[3] + 4


NO = "not a manifest of this version"
ALL, THESE = ("verify", "export", "load"), ("verify", "export")  # who refuses
D, S, R, DIGEST, NAMES = 0, 1, 2, 5, 4  # places in a record, and in an array
MANIFESTS: dict[str, tuple[Callable[[dict], object], tuple[str, ...], str]] = {
    "beside: up": (field("facts", "beside", "../../../outside/secret.json", value="0" * 64), ALL, "no file that comes"),
    "beside: up, all of it": (
        field("facts", "beside", value={"../../../outside/secret.json": native.sha256(b"{}")}),
        ALL,
        "no file that comes",
    ),
    "beside: absolute": (field("facts", "beside", "/etc/passwd.txt", value="0" * 64), ALL, "no file that comes"),
    "beside: a folder down": (field("facts", "beside", "a/b.json", value="0" * 64), ALL, "no file that comes"),
    "beside: a shard": (field("facts", "beside", SHARD, value="0" * 64), ALL, "no file that comes"),
    "beside: code": (field("facts", "beside", "run.py", value="0" * 64), ALL, "no file that comes"),
    "beside: NUL": (field("facts", "beside", "a\0.json", value="0" * 64), ALL, "no file that comes"),
    "beside: no digest": (field("facts", "beside", "config.json", value=None), ALL, "no file that comes"),
    "beside: another digest": (field("facts", "beside", "config.json", value="0" * 64), ("export",), "was changed"),
    "beside: not there": (
        field("facts", "beside", "more.json", value="0" * 64),
        ("export",),
        "more.json: no such file",
    ),
    "beside: a list": (field("facts", "beside", value=[]), ALL, NO),
    "facts: a list": (field("facts", value=[]), ALL, NO),
    "facts: deep": (field("facts", "dtype", value=deep(900)), ALL, NO),
    "facts: files of nonsense": (field("facts", "files", SHARD, value=[1]), ALL, NO),
    "facts: files deep": (field("facts", "files", SHARD, value=[1, deep(900)]), ALL, NO),
    "facts: of another mode": (field("facts", "mode", value="index"), ALL, NO),
    "facts: of another format": (field("facts", "format", value=2), ALL, NO),
    "facts: one more": (field("facts", "more", value=2), ALL, NO),
    "mode: of two lines": (field("mode", value="copy\n"), ALL, NO),
    "mode: a list": (field("mode", value=["copy"]), ALL, NO),
    "why: in colour": (field("why", value="\x1b[31m"), ALL, NO),
    "left: a line break": (field("left", value=["a\nb"]), ALL, NO),
    "left: numbers": (field("left", value=[1]), ALL, NO),
    "dropped: a number": (field("dropped", value=1), ALL, NO),
    "aliases: of nonsense": (field("aliases", value={"moe.attn.q": "embed"}), ALL, "aliases"),
    "aliases: of themselves": (field("aliases", value={"embed": "embed"}), ALL, "aliases"),
    "aliases: lists": (field("aliases", value={"head": ["embed"]}), ALL, NO),
    "aliases: none": (field("aliases", value={}), ("verify",), "aliases are not this model's"),
    "files: up": (field("files", "../outside.safetensors", value={}), ALL, "is not the bare name"),
    "files: a list": (field("files", value=[]), ALL, NO),
    "files: none": (field("files", value={}), ALL, NO),
    "files: one more": (
        field("files", "more.safetensors", value={"size": 8, "header": "0" * 64, "verbatim": True}),
        ("verify", "load"),
        "more.safetensors",
    ),
    "files: a size too large": (
        field("files", SHARD, "size", value=10**9),
        ("verify", "load"),
        "the manifest says|not 1,000,000,000",
    ),
    "files: a size of 2^70": (field("files", SHARD, "size", value=2**70), ALL, f"file '{SHARD}'"),
    "files: a negative size": (field("files", SHARD, "size", value=-1), ALL, f"file '{SHARD}'"),
    "files: a size that is true": (field("files", SHARD, "size", value=True), ALL, f"file '{SHARD}'"),
    "files: no size": (lambda m: m["files"][SHARD].pop("size"), ALL, "is not the bare name"),
    "files: another header": (
        field("files", SHARD, "header", value="0" * 64),
        ("verify",),
        f"the header of state/hf/{SHARD} was changed",
    ),
    "tensor: a negative offset": (tensor(3, -8), ALL, f"tensor '{EMBED}'"),
    "tensor: in the length": (tensor(3, 0), ALL, "bytes from 0 on are not in"),
    "tensor: in the header": (tensor(3, 8), THESE, EMBED),
    "tensor: past the end": (tensor(3, 10**9), ALL, "bytes from 1,000,000,000 on are not in"),
    "tensor: at 2^70": (tensor(3, 2**70), ALL, f"tensor '{EMBED}'"),
    "tensor: at 8.0": (tensor(3, 8.0), ALL, f"tensor '{EMBED}'"),
    "tensor: at null": (tensor(3, None), ALL, f"tensor '{EMBED}'"),
    "tensor: a byte short": (tensor(4, 16383), ALL, f"tensor '{EMBED}'"),
    "tensor: negative bytes": (tensor(4, -1), ALL, f"tensor '{EMBED}'"),
    "tensor: another dtype": (tensor(D, "I32"), ALL, "array 'embed': one of its tensors is I32"),
    "tensor: an unknown dtype": (tensor(D, "F4"), ALL, NO),
    "tensor: a dtype that is a list": (tensor(D, ["F32"]), ALL, NO),
    "tensor: turned": (tensor(S, [32, 128]), THESE, EMBED),
    "tensor: negative axes": (tensor(S, [-128, -32]), ALL, f"tensor '{EMBED}'"),
    "tensor: huge axes": (tensor(S, [2**62, 2**62]), ALL, f"tensor '{EMBED}'"),
    "tensor: a million axes": (tensor(S, [1] * 1_000_000), ALL, NO),
    "tensor: axes of text": (tensor(S, "ab"), ALL, f"tensor '{EMBED}'"),
    "tensor: in no file": (tensor(R, "gone.safetensors"), ALL, NO),
    "tensor: in a list": (tensor(R, [SHARD]), ALL, NO),
    "tensor: in another file": (tensor(R, "mtp.safetensors"), THESE, EMBED),
    "tensor: a short digest": (tensor(DIGEST, "00"), ALL, f"tensor '{EMBED}'"),
    "tensor: a digest that is a number": (tensor(DIGEST, 1), ALL, f"tensor '{EMBED}'"),
    "tensor: another digest": (tensor(DIGEST, "0" * 64), THESE, f"{EMBED}"),
    "tensor: a count of text": (tensor(6, "0"), ALL, f"tensor '{EMBED}'"),
    "tensor: a field too many": (lambda m: m["tensors"][EMBED].append(0), ALL, NO),
    "tensor: a field too few": (lambda m: m["tensors"].update({EMBED: ["F32", [1]]}), ALL, NO),
    "tensor: null": (lambda m: m["tensors"].update({EMBED: None}), ALL, NO),
    "tensor: of two lines": (lambda m: m["tensors"].update({"a\nb": m["tensors"][EMBED]}), ALL, r"tensor 'a\nb'"),
    "tensor: one more": (lambda m: m["tensors"].update(more=m["tensors"][EMBED]), THESE, "more"),
    "tensor: one less": (lambda m: m["tensors"].pop(EMBED), ALL, NO),
    "tensors: two change places": (trade, THESE, "model.layers.1.mlp.experts.0.down_proj.weight"),
    "tensors: overlap": (overlap, THESE, "model.layers.1.mlp.experts.0.down_proj.weight"),
    "tensors: a list": (field("tensors", value=[]), ALL, NO),
    "tensors: none": (field("tensors", value={}), ALL, NO),
    "array: of no tensor": (array(NAMES, ["gone"] * 32), ALL, NO),
    "array: of lists": (array(NAMES, [["gone"]] * 32), ALL, NO),
    "array: another order": (order, ("verify",), "array moe.mlp.down is not the stack"),
    "array: a huge stack": (array(2, [2**40, 2**40, 2, 32, 32]), ALL, "are no stack of"),
    "array: huge axes": (array(2, [2, 8, 2, 2**40, 2**40]), ALL, "array 'moe.mlp.gate_up'"),
    "array: negative axes": (array(2, [-2, -8, 2, 32, 32]), ALL, "array 'moe.mlp.gate_up'"),
    "array: stacked 10^9": (array(3, 10**9), ALL, "array 'moe.mlp.gate_up'"),
    "array: stacked -1": (array(3, -1), ALL, "array 'moe.mlp.gate_up'"),
    "array: stacked true": (array(3, True), ALL, "array 'moe.mlp.gate_up'"),
    "array: stacked by two": (array(3, 2), ALL, "array 'moe.mlp.gate_up'"),
    "array: a path up": (array(0, "../../outside"), ALL, "array '../../outside'"),
    "array: a path of two lines": (array(0, "a\nb"), ALL, r"array 'a\nb'"),
    "array: a path that is null": (array(0, None), ALL, NO),
    "array: another path": (array(0, "moe.mlp.more"), ("verify",), "array moe.mlp.gate_up is not the stack"),
    "array: of a dtype that Orbax has not": (array(1, "F16"), ALL, "array 'moe.mlp.gate_up'"),
    "array: another dtype": (array(1, "BF16"), ALL, "one of its tensors is F32"),
    "array: twice": (lambda m: m["arrays"].append(m["arrays"][0]), ALL, "one that is given twice"),
    "array: two fields": (lambda m: m["arrays"].append(["a", "b"]), ALL, NO),
    "arrays: none": (field("arrays", value=[]), ALL, "no array"),
    "arrays: a million lists": (field("arrays", value=[[]] * 300_000), ALL, NO),
    "a field too many": (field("a\nb", value=1), ALL, NO),
    "a field too few": (lambda m: m.pop("aliases"), ALL, NO),
    "no root": (lambda m: m.pop("root"), ALL, NO),
    "a list": (lambda m: ([m],), ALL, NO),
}
PACKED = {
    "not gzip": (lambda text: text, "Not a gzipped file"),
    "nothing": (lambda text: b"", NO),
    "cut off": (lambda text: gzip.compress(text)[:-100], NO),
    "damaged": (lambda text: gzip.compress(text)[:200] + b"\xff" * 200 + gzip.compress(text)[400:], NO),
    "another checksum": (lambda text: gzip.compress(text)[:-8] + bytes(8), NO),
    "a gigabyte of spaces": (lambda text: BOMB() + gzip.compress(text), "unpack to more than"),
    "a million lists": (lambda text: gzip.compress(b"[" + b"[]," * 330_000 + b"1]"), "more lists and objects"),
    "deep": (lambda text: gzip.compress(b"[" * 1000 + b" " * 100_000), NO),
    "not JSON": (lambda text: gzip.compress(b"{"), NO),
    "not UTF-8": (lambda text: gzip.compress(b"\xff\xff\xff"), NO),
    "NaN": (lambda text: gzip.compress(b"NaN"), NO),
    "a number of 5000 digits": (lambda text: gzip.compress(b"9" * 5000), NO),
}


def BOMB() -> bytes:
    return gzip.compress(b" " * 10_000_000, 9) * 100  # members of a file one after the other


def files(**changes: object) -> Callable[[dict], object]:
    return lambda s: s["files"].update(changes)


def resorted(s: dict, **changes: object) -> None:
    s["files"] = dict(sorted((s["files"] | changes).items()))


SEAL_NO = "is damaged, or of another version"
SEALS = {
    "a file up": (lambda s: resorted(s, **{"../outside/secret.json": native.sha256(b"{}")}), SEAL_NO),
    "a file up, further on": (lambda s: resorted(s, **{"state/../../outside/secret.json": "0"}), SEAL_NO),
    "an absolute file": (lambda s: resorted(s, **{"/etc/passwd": "0" * 64}), SEAL_NO),
    "a file with NUL": (lambda s: resorted(s, **{"a\0b": "0" * 64}), SEAL_NO),
    "a file of two lines": (lambda s: resorted(s, **{"a\nb": "0" * 64}), SEAL_NO),
    "a file that is half a pair": (lambda s: resorted(s, **{"\ud800": "0" * 64}), SEAL_NO),
    "the folder": (lambda s: resorted(s, **{".": "0" * 64}), SEAL_NO),
    "no name": (lambda s: resorted(s, **{"": "0" * 64}), SEAL_NO),
    "two slashes": (lambda s: resorted(s, **{"state//hf": "0" * 64}), SEAL_NO),
    "a manifest up": (lambda s: s.update(manifest="../outside/secret.json"), SEAL_NO),
    "a manifest that is none": (lambda s: s.update(manifest="state/hf/config.json"), SEAL_NO),
    "a manifest that is a number": (lambda s: s.update(manifest=1), SEAL_NO),
    "a manifest that is not there": (lambda s: s.update(manifest=f"glm_manifest-{'0' * 16}.json.gz"), "no such file"),
    "a manifest of another digest": (lambda s: s["files"].update({s["manifest"]: "0" * 64}), "not what the seal says"),
    "a manifest without a digest": (lambda s: s["files"].pop(s["manifest"]), "not what the seal says"),
    "another format": (lambda s: s.update(format=2), SEAL_NO),
    "a field too many": (lambda s: s.update(more=2), SEAL_NO),
    "files that are a list": (lambda s: s.update(files=[]), SEAL_NO),
    "files without order": (lambda s: s.update(files=dict(sorted(s["files"].items(), reverse=True))), SEAL_NO),
    "a list": (lambda s: ([s],), SEAL_NO),
    "nothing": (lambda s: (b"",), SEAL_NO),
    "zeros": (lambda s: (bytes(1000),), SEAL_NO),
    "deep": (lambda s: (b"[" * 100_000,), SEAL_NO),
    "two megabytes": (lambda s: (json.dumps(s).encode() + b" " * 2_000_000,), "bytes, at most"),
}
FILES = {  # of a converted folder: (harm, who refuses, says)
    "the seal, a link": (other(native.SEAL, to_outside("secret.json")), ALL, "a symbolic link"),
    "the seal, a pipe": (other(native.SEAL, os.mkfifo), THESE, "no glm_seal.json"),
    "the seal, a folder": (other(native.SEAL, Path.mkdir), THESE, "no glm_seal.json"),
    "the manifest, a link": (
        lambda f: instead(next(f.glob("glm_m*")), to_outside("secret.json")),
        ALL,
        "a symbolic link",
    ),
    "the manifest, a pipe": (lambda f: instead(next(f.glob("glm_m*")), os.mkfifo), ALL, "not a regular file"),
    "the manifest, a folder": (lambda f: instead(next(f.glob("glm_m*")), Path.mkdir), ALL, "not a regular file"),
    "the manifest, a device": (lambda f: instead(next(f.glob("glm_m*")), device), ALL, "not a regular file"),
    "the manifest, huge": (lambda f: os.truncate(next(f.glob("glm_m*")), 1 << 40), ALL, "1,099,511,627,776 bytes"),
    "state, a link": (other("state", to_outside("")), ALL, "state: a symbolic link"),
    "state/hf, a link": (other("state/hf", to_outside("hf")), ALL, "hf: a symbolic link"),
    "state/d, a link": (other("state/d", to_outside("hf")), ("verify",), "state/d does not belong here"),
    "a folder that is a link": (lambda f: to_outside("hf")(f / "more"), ("verify",), "more does not belong here"),
    "a file that is a link": (lambda f: to_outside("secret.json")(f / "a\nb"), ("verify",), r"'a\nb' does not belong"),
    "a pipe": (lambda f: os.mkfifo(f / "state/hf/more"), ("verify",), "state/hf/more does not belong here"),
    "Orbax's index, a link": (
        other("state/d/index", to_outside("secret.json")),
        ("verify",),
        "state/d/index is missing",
    ),
    "Orbax's index, a pipe": (other("state/d/index", os.mkfifo), ("verify",), "state/d/index is missing"),
    "Orbax's index, huge": (
        lambda f: os.truncate(f / "state/d/index", 1 << 40),
        ("verify",),
        "state/d/index was changed",
    ),
    "config.json, a link": (other("state/hf/config.json", to_outside("secret.json")), THESE, "a symbolic|is missing"),
    "config.json, a pipe": (other("state/hf/config.json", os.mkfifo), ALL, "not a regular|is missing|no such file"),
    "config.json, huge": (lambda f: os.truncate(f / "state/hf/config.json", 1 << 40), ALL, "776 bytes|was changed"),
    "a shard, a link": (other(f"state/hf/{SHARD}", to_outside(SHARD)), ALL, "is missing|has 6 bytes|a symbolic link"),
    "a shard, a pipe": (other(f"state/hf/{SHARD}", os.mkfifo), ALL, "is missing|has None bytes|not a regular file"),
    "a shard, of another length": (lambda f: os.truncate(f / "state/hf" / SHARD, 1 << 40), ALL, "776 bytes|the header"),
    "a shard, its length 2^62": (lambda f: length(f / "state/hf" / SHARD, 2**62), ALL, "was changed|the header says"),
    "a shard, its length 2^64-1": (lambda f: length(f / "state/hf" / SHARD, 2**64 - 1), ALL, "was changed|the header"),
    "a shard, its length 0": (lambda f: length(f / "state/hf" / SHARD, 0), ALL, "was changed|the header does not"),
}


def length(path: Path, value: int) -> None:
    with open(path, "r+b") as file:
        file.write(value.to_bytes(8, "little"))


@pytest.fixture
def converted(made, tmp_path) -> Path:
    return copied(made, tmp_path, "to") / "to"


def no_door_opens(folder: Path, doors: tuple[str, ...], kinds, says: str, outside: Path) -> None:
    before = state_of(folder.parent)
    calls = {
        "verify": lambda: verify(folder),
        "export": lambda: export(folder, folder.parent / "back"),
        "load": lambda: look(folder),
    }
    for door in doors:
        refused(calls[door], kinds, says, folder.name, outside=outside)
        if door == "export":
            staged = folder.with_name("back" + STAGING)
            shutil.rmtree(staged, ignore_errors=True)
    if "export" in doors:
        refused(lambda: export(folder, folder.parent / "back", exact=True), kinds, says, outside=outside)
        shutil.rmtree(folder.with_name("back" + STAGING), ignore_errors=True)
    assert state_of(folder.parent) == before


@pytest.mark.parametrize("harm, doors, says", some(MANIFESTS))
def test_hostile_manifest(harm, doors, says, converted, outside):
    reseal(converted, harm)
    no_door_opens(converted, doors, (BadInput, MissingInput), says, outside)


@pytest.mark.parametrize("pack, says", PACKED.values(), ids=PACKED)
def test_hostile_gzip(pack, says, converted, outside):
    reseal(converted, pack=pack)
    no_door_opens(converted, ALL, BadInput, says, outside)


@pytest.mark.parametrize("harm, says", SEALS.values(), ids=SEALS)
def test_hostile_seal(harm, says, converted, outside):
    reseal(converted, seal=harm)
    no_door_opens(converted, ALL, (BadInput, MissingInput), says, outside)


@pytest.mark.parametrize("harm, doors, says", some(FILES))
def test_hostile_converted_folder(harm, doors, says, converted, outside):
    harm(converted)
    no_door_opens(converted, doors, (BadInput, MissingInput), says, outside)


def test_a_seal_that_was_made_again_without_a_change_is_taken(converted):
    reseal(converted)
    assert verify(converted).root and look(converted) and export(converted, converted.parent / "back", exact=True)


def test_the_corpus_is_as_large_as_it_says():
    assert sum(map(len, (CONFIGS, PLANNED, BLOCKS, INDEXES, STAGED, MANIFESTS, PACKED, SEALS, FILES))) > 300


# ---- whatever the bytes


TOKENS = [*JSON_PIECES, b"9" * 30, b"\\ud800"]
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 8), st.sampled_from(TOKENS) | st.binary(max_size=4)),
    min_size=1,
    max_size=4,
)
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def edited(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for at, cut, new in edits:
        start = int(at * len(data))
        data = data[:start] + new + data[start + cut :]
    return data


def only_ours(call: Callable) -> None:
    """Any answer but an error that is not ours, or one of more than a line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except GLMError as error:
            assert str(error).isprintable() and len(str(error)) < 4000, str(error)


@QUICK
@given(name=st.sampled_from(["config.json", INDEX, SHARD, "tokenizer_config.json"]), edits=EDITS)
def test_whatever_the_bytes_of_a_source(name, edits, made, tmp_path_factory):
    folder = copied(made, tmp_path_factory.mktemp("bytes"), "hf") / "hf"
    path = folder / name
    data = path.read_bytes()
    head = int.from_bytes(data[:8], "little") + 8 if name == SHARD else len(data)
    path.write_bytes(edited(data[:head], edits) + data[head:])
    only_ours(lambda: plan(folder))
    only_ours(lambda: look(folder))
    shutil.rmtree(folder.parent)


@QUICK
@given(name=st.sampled_from(["journal-0.jsonl", "plan.json"]), edits=EDITS)
def test_whatever_the_bytes_of_a_staging_folder(name, edits, made, tmp_path_factory):
    folder = copied(made, tmp_path_factory.mktemp("bytes"), "hf", f"new{STAGING}")
    path = folder / f"new{STAGING}" / name
    path.write_bytes(edited(path.read_bytes(), edits))
    only_ours(lambda: convert(folder / "hf", folder / "new", "copy"))
    shutil.rmtree(folder)


@QUICK
@given(what=st.sampled_from(["manifest", "seal", "as it is"]), edits=EDITS)
def test_whatever_the_bytes_of_manifest_and_seal(what, edits, made, tmp_path_factory):
    """Of the manifest with digests that fit, of the seal, of either without."""
    folder = copied(made, tmp_path_factory.mktemp("bytes"), "to") / "to"
    if what == "manifest":
        reseal(folder, pack=lambda text: gzip.compress(edited(text, edits), 1))
    elif what == "seal":
        reseal(folder, seal=lambda s: (edited((json.dumps(s, indent=1) + "\n").encode(), edits),))
    else:
        path = next(folder.glob("glm_m*"))
        path.write_bytes(edited(path.read_bytes(), edits))
    only_ours(lambda: verify(folder))
    only_ours(lambda: look(folder))
    only_ours(lambda: export(folder, folder.parent / "back"))
    shutil.rmtree(folder.parent)


def test_some_thousand_cases_of_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    fuzz = importlib.import_module("fuzz")
    with warnings.catch_warnings():
        found = fuzz.fuzz(5000, 1, tmp_path)
    assert found["escaped"] == 0 and not list(tmp_path.glob("fuzz-*")), found
    assert sum(found["ended"].values()) == 5000 and found["slowest_s"] < SECONDS
    assert found["taken"].keys() == found["by_target"].keys() and found["lines_reached"] > 300


def test_the_benchmark_sees_what_escapes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    fuzz = importlib.import_module("fuzz")
    monkeypatch.setattr(fuzz, "read_index", lambda folder: json.loads((folder / INDEX).read_bytes()))
    with warnings.catch_warnings():
        found = fuzz.fuzz(300, 1, tmp_path)
    assert found["escaped"] and "JSONDecodeError, which is not ours" in found["ended"]
    assert "JSONDecodeError" in next(tmp_path.glob("fuzz-1-*-index.txt")).read_text()
