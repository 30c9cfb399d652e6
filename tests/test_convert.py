"""Conversion to what Orbax restores, checks of it, and back: every mode, what is wrong with a source, every end of a
run."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from folders import SMALL, random_tensors, write_model, write_text_model
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax import load
from glm_jax.cli import main
from glm_jax.config import tiny
from glm_jax.console import size
from glm_jax.convert import checking, convert, export, gc, native, ocdbt, streaming, table, verify
from glm_jax.convert.conversion import LOCK, STAGING, in_parallel
from glm_jax.convert.safetensors import read_folder
from glm_jax.errors import BadInput, DestinationError, Locked, MissingInput, NoSpace, UsageError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = tiny(**SMALL)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def shard_of(name: str) -> str:
    return "mtp.safetensors" if ".layers.3." in name else f"model-{1 + (len(name) + ord(name[-9])) % 3}.safetensors"


def source(folder: Path, tensors=None, **changes) -> Path:
    return write_model(folder, CONFIG, tensors, shard_of, **changes)


def quantised(x: dict[str, np.ndarray], scale_shape=lambda out: (out, 1)) -> dict[str, np.ndarray]:
    """By the published rule: a scale for each output, and the rest in bfloat16."""
    small = ("layernorm", "embed", "mlp.gate.", "norm", "lm_head", "eh_proj")
    made = {}
    for name, w in x.items():
        if not name.endswith(".weight") or any(word in name for word in small):
            made[name] = w if "e_score" in name else w.astype(ml_dtypes.bfloat16)
            continue
        scale = np.maximum(np.abs(w).max(1, keepdims=True), 1e-12).astype(np.float32) / 448
        made[name], made[name + "_scale"] = (w / scale).astype(FP8), scale.reshape(scale_shape(len(w)))
    return made


def tree_of(folder: Path) -> dict[str, bytes]:
    """Every file by its path, and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def restored(folder: Path, sharding=lambda path, shape: PartitionSpec()):
    """What stock Orbax makes of a folder, by path."""
    from orbax.checkpoint import v1 as ocp

    mesh = jax.make_mesh((8,), ("x",))
    metadata = ocp.metadata(folder).metadata
    path_of = lambda keys: ".".join(k.key for k in keys)
    want = jax.tree_util.tree_map_with_path(
        lambda keys, a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(mesh, sharding(path_of(keys), a.shape))
        ),
        metadata,
    )
    leaves = jax.tree_util.tree_leaves_with_path(ocp.load(folder, want))
    return {path_of(keys): leaf for keys, leaf in leaves}


def same_arrays(arrays, tensors, config=CONFIG) -> None:
    for row in table.rows(config):
        for name, at in row.tensors():
            got = np.asarray(arrays[row.path])[at].reshape(row.tensor_shape)
            np.testing.assert_array_equal(got.view(np.uint8), np.asarray(tensors[name]).view(np.uint8), name)


# ---- the format


def test_crc32c():
    assert ocdbt.crc32c(b"123456789") == 0xE3069283 and ocdbt.crc32c(b"") == 0
    assert ocdbt.crc32c(bytes(32)) == 0x8A9136AA and ocdbt.crc32c(b"\xff" * 32) == 0x62A8AB43
    data = np.random.default_rng(0).bytes(5000)
    assert len({ocdbt.crc32c(data, lanes) for lanes in (1, 7, 1024, 5000, 8192)}) == 1


def test_the_table_has_the_models_shapes():
    """The table knows the shapes without jax; the model is what they are of."""
    from glm_jax import GLM
    from glm_jax.config import preset
    from glm_jax.model import weight_path

    no_mtp = dict(num_nextn_predict_layers=0, attention_bias=False, use_qk_norm=False, tie_word_embeddings=True)
    for config in (CONFIG, preset("glm-4.6"), preset("glm-4.5-air"), tiny(n_shared_experts=2), tiny(**no_mtp)):
        leaves = jax.tree_util.tree_leaves_with_path(GLM(config, seed=None))
        assert {r.path: r.shape for r in table.rows(config)} == {weight_path(path): leaf.shape for path, leaf in leaves}


# ---- modes


@pytest.mark.parametrize("mode", ["index", "copy"])
def test_orbax_restores_what_was_converted(tmp_path, mode):
    x = random_tensors(CONFIG)
    made = convert(source(tmp_path / "hf", x), tmp_path / "to", mode)
    assert made.mode == mode and made.aliases == {"mtp.embed": "embed", "mtp.head": "head"}
    linked = {os.stat(tmp_path / "hf" / f).st_ino == os.stat(tmp_path / "to/state/hf" / f).st_ino for f in made.files}
    assert linked == {mode == "index"}
    cuts = [
        lambda path, shape: PartitionSpec(),
        lambda path, shape: PartitionSpec(None, "x") if path == "moe.mlp.gate_up" else PartitionSpec(),
        lambda path, shape: PartitionSpec(*[None] * (len(shape) - 1), "x") if shape[-1] % 8 == 0 else PartitionSpec(),
    ]
    for cut in cuts:
        same_arrays(restored(tmp_path / "to", cut), x)
    digests = verify(tmp_path / "to")
    assert digests.root and digests.root == verify(tmp_path / "to").root
    assert not (tmp_path / ("to" + STAGING)).exists() and not (tmp_path / ("to" + LOCK)).exists()


def test_orbax_restores_a_part(tmp_path):
    from orbax.checkpoint import v1 as ocp

    x = random_tensors(CONFIG)
    convert(source(tmp_path / "hf", x), tmp_path / "to")
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    sharding = NamedSharding(jax.make_mesh((1,), ("x",)), PartitionSpec())
    with context:
        part = ocp.load(tmp_path / "to", {"norm": jax.ShapeDtypeStruct((32,), np.float32, sharding=sharding)})
    np.testing.assert_array_equal(part["norm"], x["model.norm.weight"])


def test_what_cannot_be_linked_is_copied_and_never_so_in_silence(tmp_path, monkeypatch):
    """Another file system, by fault injection, and a real one where /dev/shm is that."""
    folder, shm = source(tmp_path / "hf"), Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else tmp_path) as other:
        if os.stat(other).st_dev == os.stat(tmp_path).st_dev:

            def refused(*_):
                raise OSError(errno.EXDEV, "Invalid cross-device link")

            monkeypatch.setattr(os, "link", refused)
        with pytest.raises(DestinationError, match="--mode index: .*: --mode copy, or a target beside the source"):
            convert(folder, Path(other) / "to", "index")
        assert os.listdir(other) == []
        made = convert(folder, Path(other) / "to")
        assert made.mode == "copy" and ("another file system" in made.why or "cannot be linked" in made.why)
        assert verify(Path(other) / "to", source=folder).root == made.root


def test_modes_have_one_root(tmp_path):
    folder = source(tmp_path / "hf")
    roots = {
        convert(folder, tmp_path / "copy", "copy").root,
        convert(folder, tmp_path / "digest", "index", digest=True).root,
        verify((convert(folder, tmp_path / "index"), tmp_path / "index")[1]).root,
    }
    assert len(roots) == 1 and None not in roots


@pytest.mark.parametrize("to", ["bf16", "f32"])
def test_another_dtype_is_repacked_and_the_router_bias_is_not(tmp_path, to):
    x = random_tensors(CONFIG)
    if to == "f32":
        x = {name: w if "e_score" in name else w.astype(ml_dtypes.bfloat16) for name, w in x.items()}
    made = convert(source(tmp_path / "hf", x), tmp_path / "to", dtype=to)
    assert made.mode == "repack" and verify(tmp_path / "to").root
    dtype = {"bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32)}[to]
    want = {name: w if "e_score" in name else w.astype(dtype) for name, w in x.items()}
    same_arrays(restored(tmp_path / "to"), want)
    assert json.loads((tmp_path / "to/state/hf/config.json").read_text())["dtype"] == {"bf16": "bfloat16"}.get(
        to, "float32"
    )


def test_fp8_is_inspected_as_it_is_stored(tmp_path, capsys):
    folder = source(
        tmp_path / "hf", x := quantised(random_tensors(CONFIG)), quantization_config={"quant_method": "fp8"}
    )
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    weights = {w["name"]: (w["dtype"], w["shape"]) for w in found["weights"]}
    assert weights["moe.mlp.gate_up"] == ("float8_e4m3fn", [2, 8, 2, 32, 32])
    assert weights["moe.mlp.gate_up_scale"] == ("float32", [2, 8, 2, 32, 1])
    assert found["total"]["bytes"] == sum(a.nbytes for a in x.values())


@pytest.mark.parametrize("shape", [lambda out: (out, 1), lambda out: (out,)], ids=["out,1", "out"])
def test_fp8_is_carried_as_it_is_or_multiplied_out(tmp_path, shape):
    x = quantised(random_tensors(CONFIG), shape)
    folder = source(tmp_path / "hf", x, quantization_config={"format": "float-quantized"}, dtype="bfloat16")
    made = convert(folder, tmp_path / "kept")
    assert made.mode == "index"
    arrays = restored(tmp_path / "kept")
    same_arrays(arrays, x)
    scale = np.asarray(arrays["moe.mlp.gate_up_scale"])
    assert scale.shape == (2, 8, 2, *shape(32))
    np.testing.assert_array_equal(scale[1, 3, 0], x["model.layers.2.mlp.experts.3.gate_proj.weight_scale"])
    export(tmp_path / "kept", tmp_path / "back", exact=True)
    assert tree_of(tmp_path / "back") == tree_of(folder)

    made = convert(folder, tmp_path / "wide", dtype="bf16")
    assert made.mode == "repack" and not any("scale" in a.path for a in made.arrays)
    want = {
        name: (w.astype(np.float32) * x[name + "_scale"].reshape(-1, 1)).astype(ml_dtypes.bfloat16)
        if w.dtype == FP8
        else w
        for name, w in x.items()
    }
    same_arrays(restored(tmp_path / "wide"), want)
    assert "quantization_config" not in json.loads((tmp_path / "wide/state/hf/config.json").read_text())
    model, _ = load(tmp_path / "wide")
    assert model.config.dtype == np.dtype(ml_dtypes.bfloat16)


def test_fp8_in_blocks(tmp_path):
    x, made = random_tensors(CONFIG), {}
    for name, w in x.items():
        made[name] = w if "e_score" in name else w.astype(ml_dtypes.bfloat16)
        if name.endswith("proj.weight") and "eh_proj" not in name:
            out, in_ = -(-w.shape[0] // 24), -(-w.shape[1] // 20)  # which divide nothing here
            scale = np.random.default_rng(len(name)).uniform(0.5, 2, (out, in_)).astype(np.float32)
            made[name], made[name + "_scale_inv"] = w.astype(FP8), scale
    folder = source(
        tmp_path / "hf",
        made,
        quantization_config={"quant_method": "fp8", "weight_block_size": [24, 20]},
        dtype="bfloat16",
    )
    convert(folder, tmp_path / "to", dtype="bf16")
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    scale = np.repeat(np.repeat(made[name + "_scale_inv"], 24, 0), 20, 1)[:32, :32]
    got = read_folder(tmp_path / "to/state/hf")[name].read()
    np.testing.assert_array_equal(got, (made[name].astype(np.float32) * scale).astype(ml_dtypes.bfloat16))


def test_the_mtp_layer_may_be_dropped(tmp_path):
    folder = source(tmp_path / "hf")
    made = convert(folder, tmp_path / "to", mtp="drop")
    assert made.mode == "index" and "mtp.safetensors" not in made.files  # its file is simply not linked
    assert len(made.dropped) == sum(".layers.3." in name for name in read_folder(folder))
    assert load(tmp_path / "to")[0].mtp is None
    with pytest.raises(UsageError, match="--exact: .* was converted with --mtp drop"):
        export(tmp_path / "to", tmp_path / "back", exact=True)
    mixed = write_model(tmp_path / "mixed", CONFIG)
    with pytest.raises(DestinationError, match="model.safetensors holds the MTP layer beside others: --mode copy"):
        convert(mixed, tmp_path / "no", "index", mtp="drop")
    made = convert(mixed, tmp_path / "mixed to", mtp="drop")
    assert made.mode == "copy" and verify(tmp_path / "mixed to").root and load(tmp_path / "mixed to")[0].mtp is None


def test_copies_of_embedding_and_head_are_arrays_of_their_own(tmp_path):
    x = random_tensors(CONFIG, mtp_copies=True)
    made = convert(source(tmp_path / "hf", x), tmp_path / "to")
    assert made.aliases == {}
    arrays = restored(tmp_path / "to")
    np.testing.assert_array_equal(arrays["mtp.head"], x["model.layers.3.shared_head.head.weight"])


# ---- back, and on


def test_back_is_the_same_to_the_byte_or_in_other_shards(tmp_path):
    folder = write_text_model(tmp_path / "hf")
    (folder / "evil.py").write_text("raise SystemExit")
    made = convert(folder, tmp_path / "to")
    assert made.left == ("evil.py",)
    export(tmp_path / "to", tmp_path / "exact", exact=True)
    assert tree_of(tmp_path / "exact") == {k: v for k, v in tree_of(folder).items() if k != "evil.py"}
    files = export(tmp_path / "to", tmp_path / "shards", shard_bytes=50_000)
    assert len(files) > 3 and all(f.stat().st_size < 60_000 or len(read_folder(tmp_path / "shards")) for f in files)
    ours, theirs = read_folder(tmp_path / "shards"), read_folder(folder)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name].read(), theirs[name].read()) for name in ours)
    assert export(tmp_path / "to", tmp_path / "exact", exact=True)  # done already
    with pytest.raises(DestinationError, match="is there already and not empty"):
        export(tmp_path / "to", tmp_path / "exact")


def test_load_takes_both_folders(tmp_path):
    folder = write_text_model(tmp_path / "hf")
    convert(folder, tmp_path / "to")
    (one, tokenizer), (other, _) = load(folder), load(tmp_path / "to", mesh="expert=4,tensor=2")
    assert tokenizer is not None
    want = jax.tree.map(np.asarray, jax.tree.leaves(one))
    assert all(np.array_equal(a, b) for a, b in zip(want, jax.tree.leaves(other), strict=True))


# ---- what is wrong with a source


def lose(x, *names):
    return {name: w for name, w in x.items() if not name.endswith(names)}


@pytest.mark.parametrize(
    "spoil, said",
    [
        (
            lambda x: lose(x, "layers.2.mlp.experts.5.up_proj.weight"),
            r"1 tensors are missing: .*2\.mlp\.experts\.5\.up_proj",
        ),
        (
            lambda x: lose(x, "experts.5.up_proj.weight", "experts.6.up_proj.weight"),
            r"6 tensors are missing: .*experts\.\*\.up_proj",
        ),
        (
            lambda x: x | {"model.layers.9.mlp.up_proj.weight": x["model.norm.weight"]},
            "1 tensors have no place in this model",
        ),
        (
            lambda x: x | {"model.norm.weight_scale": x["model.norm.weight"]},
            "model.norm.weight_scale scales model.norm.weight, which is F32",
        ),
        (
            lambda x: x | {"model.norm.weight": np.ones(31, np.float32)},
            r"model.norm.weight is \[31\], the config implies \[32\]",
        ),
        (
            lambda x: x | {"model.norm.weight": np.ones(32, np.float16)},
            "model.norm.weight is F16, not BF16, F32 or F8_E4M3",
        ),
        (
            lambda x: lose(quantised(x), "layers.1.self_attn.q_proj.weight_scale"),
            "q_proj.weight is F8_E4M3 and has no scales",
        ),
        (
            lambda x: (
                (q := quantised(x))
                | {"model.layers.1.self_attn.k_proj.weight_scale": q["model.layers.1.self_attn.q_proj.weight_scale"]}
            ),
            r"k_proj.weight_scale is F32 \[128, 1\], not F32 or BF16 \[64\] or \[64, 1\]",
        ),
        (
            lambda x: x | {"model.norm.weight": np.ones(32, FP8), "model.norm.weight_scale": np.ones(32, np.float32)},
            r"model.norm.weight is F8_E4M3 and \[32\]: only matrices are, with their scales",
        ),
        (
            lambda x: (
                x
                | {
                    "model.layers.1.self_attn.q_proj.weight": x["model.layers.1.self_attn.q_proj.weight"].astype(
                        ml_dtypes.bfloat16
                    )
                }
            ),
            "moe.attn.q is one array, but .*: --dtype bf16 gives all of it one dtype",
        ),
    ],
)
def test_a_source_that_is_not_whole_is_refused_before_anything_is_made(tmp_path, spoil, said):
    folder = source(tmp_path / "hf", spoil(random_tensors(CONFIG)))
    with pytest.raises(BadInput, match=said):
        convert(folder, tmp_path / "to")
    assert sorted(os.listdir(tmp_path)) == ["hf"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(tmp_path, value):
    x = random_tensors(CONFIG)
    x["model.layers.2.mlp.experts.1.down_proj.weight"][3, 5:7] = value
    folder = source(tmp_path / "hf", x)
    with pytest.raises(BadInput, match=r"layers.2.mlp.experts.1.down_proj.weight \(2 not finite\): --nonfinite record"):
        convert(folder, tmp_path / "to", "copy")
    assert not (tmp_path / "to").exists()
    made = convert(folder, tmp_path / "to", "copy", nonfinite="record")
    assert {n: t.nonfinite for n, t in made.tensors.items() if t.nonfinite} == {
        "model.layers.2.mlp.experts.1.down_proj.weight": 2
    }


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_scales_that_are_multiplied_in_are_looked_at_too(tmp_path, value):
    x = quantised(random_tensors(CONFIG))
    x["model.layers.1.self_attn.q_proj.weight_scale"][3] = value
    folder = source(tmp_path / "hf", x)
    with pytest.raises(BadInput, match=r"q_proj.weight \(\d+ zero scales or not finite\): --nonfinite record"):
        convert(folder, tmp_path / "to", dtype="bf16")
    made = convert(folder, tmp_path / "to", dtype="bf16", nonfinite="record")
    assert made.tensors["model.layers.1.self_attn.q_proj.weight"].nonfinite == (1 if value == 0 else 33)


def test_scales_that_are_zero_or_nan(tmp_path):
    for value in (0, np.nan):
        x = quantised(random_tensors(CONFIG))
        x["model.layers.2.self_attn.o_proj.weight_scale"][3] = value
        folder = source(tmp_path / f"hf{value}", x, quantization_config={}, dtype="bfloat16")
        with pytest.raises(BadInput, match=r"o_proj.weight_scale \(1 zero or not finite\)"):
            convert(folder, tmp_path / "to", "copy")


def test_wrong_numbers_by_hand():
    rng = np.random.default_rng(0)
    for name, dtype in (("BF16", ml_dtypes.bfloat16), ("F32", np.float32), ("F8_E4M3", ml_dtypes.float8_e4m3fn)):
        bits = rng.integers(0, 256, 400_001 * np.dtype(dtype).itemsize, np.uint8)
        x = bits.view(dtype)
        want = int((~np.isfinite(x.astype(np.float32))).sum())
        assert streaming.wrong_numbers(memoryview(bits), name) == want > 0


@pytest.mark.parametrize("piece", [4096, 12_288])
def test_numbers_that_two_pieces_share(tmp_path, piece, monkeypatch):
    """A header may have any length, so that a number may lie across the end of a piece."""
    monkeypatch.setattr(streaming, "PIECE", piece)
    x = np.full(20_000, np.nan, np.float32)
    for odd in range(4):
        path, part = tmp_path / f"{odd}", streaming.Part("x", "F32", x.shape, 101 + odd, x.nbytes)
        path.write_bytes(bytes(101 + odd) + x.tobytes())
        found = []
        import threading

        streaming.stream(path, path.stat().st_size, [part], found.extend, lambda *_: None, threading.Event())
        ((_, digest, wrong),) = found
        import hashlib

        assert (digest, wrong) == (hashlib.sha256(x.tobytes()).hexdigest(), 20_000)


# ---- other plans, other writers, other ends


def test_the_same_again_is_done_and_another_plan_is_refused(tmp_path):
    folder = source(tmp_path / "hf")
    convert(folder, tmp_path / "to")
    before, told = tree_of(tmp_path / "to"), []
    convert(folder, tmp_path / "to", on_event=told.append)
    assert told[-1]["already"] and tree_of(tmp_path / "to") == before
    with pytest.raises(DestinationError, match="of another plan .*mtp was keep, is drop"):
        convert(folder, tmp_path / "to", mtp="drop")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(DestinationError, match="beside: config.json"):
        convert(folder, tmp_path / "to")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    with pytest.raises(DestinationError, match="was not made by convert"):
        convert(folder, tmp_path / "mine")
    with pytest.raises(DestinationError, match="this is the source"):
        convert(folder, folder)
    with pytest.raises(UsageError, match="index keeps every byte, another dtype needs repack"):
        convert(folder, tmp_path / "x", "index", dtype="bf16")
    with pytest.raises(UsageError, match="everything would stay as it is"):
        convert(folder, tmp_path / "x", "repack")
    assert sorted(os.listdir(tmp_path)) == ["hf", "mine", "to"]


def test_a_begun_conversion_goes_on_by_the_same_plan_only(tmp_path, monkeypatch):
    folder = source(tmp_path / "hf")
    monkeypatch.setattr("glm_jax.convert.conversion.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "to", "copy")
    monkeypatch.undo()
    assert (tmp_path / ("to" + STAGING)).is_dir()
    with pytest.raises(DestinationError, match="was begun by another plan .*mtp was keep, is drop"):
        convert(folder, tmp_path / "to", "copy", mtp="drop")
    read = []
    monkeypatch.setattr(streaming, "read_exactly", lambda *a: read.append(a))
    convert(folder, tmp_path / "to", "copy")
    assert not read  # nothing was read again
    monkeypatch.undo()
    assert verify(tmp_path / "to").root and not (tmp_path / ("to" + STAGING)).exists()


def test_a_source_that_changed_meanwhile_is_begun_anew(tmp_path, monkeypatch):
    folder = source(tmp_path / "hf")
    monkeypatch.setattr("glm_jax.convert.conversion.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "to", "copy")
    monkeypatch.undo()
    flip(folder / "mtp.safetensors", 8 * 100_000)
    convert(folder, tmp_path / "to", "copy")
    assert verify(tmp_path / "to", source=folder).root
    assert tree_of(tmp_path / "to/state/hf")["mtp.safetensors"] == (folder / "mtp.safetensors").read_bytes()


def test_a_source_that_changes_while_it_is_copied(tmp_path, monkeypatch):
    folder, real = source(tmp_path / "hf"), streaming.read_exactly

    def touched(fd, into, offset, path, what):
        real(fd, into, offset, path, what)
        os.utime(path)

    monkeypatch.setattr(streaming, "read_exactly", touched)
    with pytest.raises(BadInput, match="the file changed while it was converted"):
        convert(folder, tmp_path / "to", "copy")
    assert not (tmp_path / "to").exists()


def test_no_link_is_followed_out_of_a_source(tmp_path):
    folder = source(tmp_path / "hf")
    (tmp_path / "secret").write_text("{}")
    (folder / "generation_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match="a symbolic link to"):
        convert(folder, tmp_path / "to")
    assert sorted(os.listdir(tmp_path)) == ["hf", "secret"]


def test_gc_removes_what_nobody_goes_on_with(tmp_path, monkeypatch):
    folder = source(tmp_path / "hf")
    monkeypatch.setattr("glm_jax.convert.conversion.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for name in ("one", "two"):
        with pytest.raises(KeyboardInterrupt):
            convert(folder, tmp_path / name, "copy")
    from glm_jax.convert.conversion import locked

    with locked(tmp_path / "two"):
        assert gc(tmp_path) == [tmp_path / ("one" + STAGING)]
        with pytest.raises(Locked, match=f"process {os.getpid()} on .* is writing it now"):
            convert(folder, tmp_path / "two", "copy")
    assert gc(tmp_path) == [tmp_path / ("two" + STAGING)] and os.listdir(tmp_path) == ["hf"]


def test_a_full_disk(tmp_path, monkeypatch):
    folder = source(tmp_path / "hf")

    def full(fd, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpace, match=r"\.safetensors: the disk filled up while [\d,]+ bytes were written"):
        convert(folder, tmp_path / "to", "copy")
    monkeypatch.undo()
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*real[:3], 0, 0, *real[5:]]))
    with pytest.raises(NoSpace, match=r"bytes are to be written, [\d,]+ are free: [\d,]+ short"):
        convert(folder, tmp_path / "other", "copy")
    monkeypatch.undo()
    assert not (tmp_path / "to").exists() and not (tmp_path / "other").exists()
    assert convert(folder, tmp_path / "to", "copy").root


def test_a_target_that_cannot_be_written(tmp_path, monkeypatch):
    folder = source(tmp_path / "hf")
    (tmp_path / "file").write_text("")
    with pytest.raises(DestinationError, match="file: cannot be made"):
        convert(folder, tmp_path / "file" / "to")
    real = os.link

    def read_only(path, at, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "link", read_only)
    with pytest.raises(DestinationError, match="cannot be written: Read-only file system"):
        convert(folder, tmp_path / "to")
    monkeypatch.setattr(
        os, "link", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.EXDEV, "Invalid cross-device link"))
    )
    assert convert(folder, tmp_path / "to").mode == "copy"
    with pytest.raises(DestinationError, match="--mode index: .*cross-device link.*: --mode copy"):
        convert(folder, tmp_path / "too", "index")
    monkeypatch.setattr(os, "link", real)


KILL = """
import os, sys, signal, threading, time
sys.path.insert(0, sys.argv[1])
from glm_jax.convert import convert, export, streaming, verify
streaming.PIECE, streaming.SYNCED = 1 << 14, 1 << 15
streaming_read = streaming.read_exactly
calls = [int(sys.argv[4])]
def counted(function):
    def run(*a, **k):
        calls[0] -= 1
        if calls[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*a, **k)
    return run
for name in ("pwrite", "write", "replace", "rename", "fsync", "fdatasync", "unlink", "rmdir", "open"):
    setattr(os, name, counted(getattr(os, name)))
exec(sys.argv[5], {"source": sys.argv[2], "target": sys.argv[3]} | globals())
print(int(sys.argv[4]) - calls[0])
"""
KILLED = {
    "copy": "convert(source, target, 'copy')",
    "repack": "convert(source, target, dtype='bf16')",
    "digest": "convert(source, target, 'index', digest=True)",
    "check": "convert(source, target, 'index'); verify(target)",
    "export": "export(source + '-native', target)",
}


def killed_at(calls: int, folder: Path, target: Path, what: str) -> subprocess.CompletedProcess:
    """One of these, in a process that dies before so many calls that change the disk."""
    argv = [sys.executable, "-c", KILL, str(ROOT), str(folder), str(target), str(calls), KILLED[what]]
    return subprocess.run(argv, capture_output=True, text=True)


def without_leftovers(tree: dict[str, bytes]) -> dict[str, bytes]:
    """A manifest that the seal does not name is of a check that was cut off, and means nothing."""
    seal = tree.get(native.SEAL, b"").decode()
    return {n: data for n, data in tree.items() if not (n.startswith("glm_manifest-") and n not in seal)}


@pytest.mark.slow
def test_killed_anywhere_the_same_command_goes_on(tmp_path):
    """Before some of the calls that change the disk, and before each of the last ones, which seal it and give it its
    name; benchmarks/convert.py has 200."""
    folder, target = source(tmp_path / "hf"), tmp_path / "to"
    convert(folder, tmp_path / "want", "copy")
    want, ends = tree_of(tmp_path / "want"), set()
    total = int(killed_at(10**6, folder, target, "copy").stdout)
    for calls in [*range(2, total - 15, total // 8), *range(total - 15, total + 1)]:
        shutil.rmtree(target, ignore_errors=True)
        died = killed_at(calls, folder, target, "copy")
        assert died.returncode == -signal.SIGKILL, died.stderr
        staged = tmp_path / ("to" + STAGING)
        ends.add("whole" if target.exists() else "sealed" if (staged / native.SEAL).exists() else "begun")
        convert(folder, target, "copy")
        assert tree_of(target) == want, calls
        assert {"hf", "to", "want"} <= set(os.listdir(tmp_path)) <= {"hf", "to", "want", "to" + LOCK}
    assert ends == {"begun", "sealed", "whole"}


@pytest.mark.slow
@pytest.mark.parametrize("what", [what for what in KILLED if what != "copy"])
def test_the_others_are_killed_too(tmp_path, what):
    folder, target = source(tmp_path / "hf"), tmp_path / "to"
    convert(folder, tmp_path / "hf-native", "copy")
    total = int(killed_at(10**6, folder, target, what).stdout)
    want = tree_of(target)
    for calls in (total // 5, total // 2, total - 7, total - 4, total - 2, total - 1, total):
        shutil.rmtree(target)
        died = killed_at(calls, folder, target, what)
        assert died.returncode == -signal.SIGKILL, died.stderr
        again = killed_at(10**6, folder, target, what)
        assert again.returncode == 0, (calls, again.stderr)
        assert without_leftovers(tree_of(target)) == want, calls


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("mode", ["copy", "index"])
def test_a_flipped_bit_is_found(tmp_path, mode):
    """In every file, in the first byte, the last, and somewhere."""
    convert(source(tmp_path / "hf"), tmp_path / "to", mode, digest=True)
    rng = np.random.default_rng(0)
    for path in sorted(p for p in (tmp_path / "to").rglob("*") if p.is_file() and p.stat().st_size):
        size = 8 * path.stat().st_size
        for bit in {0, size - 1, *rng.integers(0, size, 3).tolist()}:
            flip(path, bit)
            with pytest.raises((BadInput, MissingInput)):
                verify(tmp_path / "to")
            flip(path, bit)
    assert verify(tmp_path / "to").root
    flip(tmp_path / "to/state/hf/mtp.safetensors", 8 * 100_000)
    with pytest.raises(BadInput, match=r"model.layers.3.*\.weight in mtp.safetensors is not what was recorded"):
        verify(tmp_path / "to")
    assert verify(tmp_path / "to", structure=True)


def test_files_that_come_and_go_are_found(tmp_path):
    convert(source(tmp_path / "hf"), tmp_path / "to", "copy")
    (tmp_path / "to/state/hf/more.safetensors").write_bytes(b"x")
    with pytest.raises(BadInput, match="state/hf/more.safetensors does not belong here"):
        verify(tmp_path / "to")
    (tmp_path / "to/state/hf/more.safetensors").unlink()
    (tmp_path / "to/state/hf/mtp.safetensors").unlink()
    with pytest.raises(BadInput, match="state/hf/mtp.safetensors is missing"):
        verify(tmp_path / "to")
    with pytest.raises(BadInput, match=r"mtp.safetensors: has None bytes, the manifest says"):
        load(tmp_path / "to")
    (tmp_path / "to/glm_seal.json").unlink()
    with pytest.raises(MissingInput, match="not made by glm-jax convert, or never finished"):
        verify(tmp_path / "to")


def test_a_source_is_compared(tmp_path):
    folder = source(tmp_path / "hf")
    convert(folder, tmp_path / "to", "copy")
    assert verify(tmp_path / "to", source=folder).root
    flip(folder / "mtp.safetensors", 8 * 100_000)
    with pytest.raises(BadInput, match="differs from"):
        verify(tmp_path / "to", source=folder)


def test_a_repacked_folder_is_compared_with_its_source(tmp_path):
    folder = source(tmp_path / "hf")
    convert(folder, tmp_path / "to", dtype="bf16")
    assert verify(tmp_path / "to", source=folder).root
    tensor = read_folder(folder)["model.layers.2.mlp.experts.5.up_proj.weight"]
    flip(tensor.file, 8 * (tensor.offset + 3) + 2)
    with pytest.raises(BadInput, match="experts.5.up_proj.weight differs from"):
        verify(tmp_path / "to", source=folder)


# ---- digests that are recorded later


def undigested(tmp_path) -> Path:
    convert(source(tmp_path / "hf"), tmp_path / "to")
    return tmp_path / "to"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(12))
def test_a_check_that_is_killed_while_it_records_harms_nothing(tmp_path, monkeypatch, at):
    folder, calls = undigested(tmp_path), []

    def dying(real):
        def call(*args, **kwargs):
            if str(args[0]).endswith(LOCK):  # goes with a process that is really killed
                return real(*args, **kwargs)
            calls.append(real)
            if len(calls) > at:
                raise Killed
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "fsync"):
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            verify(folder)
        except Killed:
            pass
        else:
            assert at >= 9  # later than all it does
    root = verify(folder).root
    assert root and verify(folder).root == root
    assert export(folder, tmp_path / "back", exact=True) and tree_of(tmp_path / "back") == tree_of(tmp_path / "hf")


def test_two_checks_at_once_do_not_undo_each_other(tmp_path, monkeypatch):
    folder, real = undigested(tmp_path), checking._record
    events = []

    def another_is_faster(*args):
        monkeypatch.setattr(checking, "_record", real)
        verify(folder)
        real(*args)

    monkeypatch.setattr(checking, "_record", another_is_faster)
    assert verify(folder, on_event=events.append).root == verify(folder).root
    assert events[-1]["recorded"] == 141

    def another_saw_other_bytes(folder, manifest, new):
        monkeypatch.setattr(checking, "_record", real)
        verify(folder)
        real(folder, manifest, {name: ("0" * 64, 0) for name in new})

    again = tmp_path / "again"
    again.mkdir()
    monkeypatch.setattr(checking, "_record", another_saw_other_bytes)
    folder = undigested(again)
    with pytest.raises(BadInput, match="is not what another check has just recorded"):
        verify(folder)
    assert verify(folder).root


def test_a_reader_beside_a_check_that_records(tmp_path, monkeypatch):
    folder, small = undigested(tmp_path), native.read_small

    def late(path, *args):
        if path.name.startswith("glm_manifest-"):
            monkeypatch.setattr(native, "read_small", small)
            verify(folder)
        return small(path, *args)

    monkeypatch.setattr(native, "read_small", late)
    assert native.read(folder)[0].root


def test_digests_that_cannot_be_recorded_are_not_looked_for(tmp_path, monkeypatch, capsys):
    folder = undigested(tmp_path)
    monkeypatch.setattr(checking.os, "access", lambda *_: False)
    with pytest.raises(DestinationError, match="cannot be recorded since it cannot be written: --structure"):
        verify(folder)
    assert verify(folder, structure=True).root is None
    monkeypatch.undo()
    assert main(["verify", str(folder)]) == 0
    assert "digests of 141 tensors were not known, and are recorded now" in capsys.readouterr().out


def test_digests_of_a_linked_folder_that_changed_meanwhile(tmp_path, monkeypatch):
    folder = source(tmp_path / "hf")
    monkeypatch.setattr("glm_jax.convert.conversion.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "to", digest=True)
    monkeypatch.undo()
    flip(folder / "mtp.safetensors", 8 * 100_000)
    convert(folder, tmp_path / "to", digest=True)
    assert verify(tmp_path / "to").root


# ---- what is in the way


@pytest.mark.parametrize(
    "again, said",
    [
        (dict(mode="index"), "mode was copy, is index"),
        (dict(mode="copy", mtp="drop"), "mtp was keep, is drop"),
        (dict(dtype="bf16"), "dtype was None, is BF16"),
        ("another source", "files: "),
        ("an export", "export was None"),
    ],
)
def test_what_another_plan_has_begun_is_kept(tmp_path, monkeypatch, again, said):
    folder, other = source(tmp_path / "hf"), source(tmp_path / "other", quantised(random_tensors(CONFIG)))
    convert(other, tmp_path / "made", "copy")
    monkeypatch.setattr("glm_jax.convert.conversion.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "to", "copy")
    monkeypatch.undo()
    before = tree_of(tmp_path / ("to" + STAGING))
    with pytest.raises(DestinationError, match=f"was begun by another plan .*{said}"):
        if again == "another source":
            convert(other, tmp_path / "to", "copy")
        elif again == "an export":
            export(tmp_path / "made", tmp_path / "to")
        else:
            convert(folder, tmp_path / "to", **again)
    with pytest.raises(DestinationError, match="was begun by another plan"):
        convert(other, tmp_path / "to", "copy", dry_run=True)
    assert tree_of(tmp_path / ("to" + STAGING)) == before
    assert gc(tmp_path / "to") == [tmp_path / ("to" + STAGING)]


def test_folders_in_each_other_and_other_peoples(tmp_path):
    folder = source(tmp_path / "hf")
    convert(folder, tmp_path / "to")
    for make in (
        lambda: convert(folder, folder / "out"),
        lambda: convert(tmp_path / "to", tmp_path / "to/out"),
        lambda: convert(folder, tmp_path),
        lambda: export(tmp_path / "to", tmp_path / "to/state/hf/out"),
    ):
        with pytest.raises(DestinationError, match="lie in each other; give a folder apart from it"):
            make()
    (tmp_path / ("new" + STAGING)).mkdir()
    (tmp_path / ("new" + STAGING) / "thesis.txt").write_text("mine")
    with pytest.raises(DestinationError, match="holds 'thesis.txt', which is not ours: move it away"):
        convert(folder, tmp_path / "new")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DestinationError, match="is a symbolic link"):
        convert(folder, tmp_path / "link")
    with pytest.raises(MissingInput, match="no such folder, and nothing was begun beside it"):
        gc(tmp_path / "nowhere")
    assert not (folder / "out").exists() and (tmp_path / ("new" + STAGING) / "thesis.txt").read_text() == "mine"


def test_what_is_done_is_said_to_be(tmp_path, capsys):
    folder = source(tmp_path / "hf")
    tell = lambda *argv: (main([str(a) for a in argv]), capsys.readouterr().out)
    tell("convert", folder, tmp_path / "to", "--mode", "copy")
    code, out = tell("convert", folder, tmp_path / "to")  # by any mode
    assert code == 0 and "to is already complete: copy" in out
    assert json.loads(tell("convert", folder, tmp_path / "to", "--json")[1])["already"]
    assert tell("convert", folder, tmp_path / "to", "--mode", "index")[0] == 73
    tell("export", tmp_path / "to", tmp_path / "back", "--exact")
    assert "back is already complete" in tell("export", tmp_path / "to", tmp_path / "back", "--exact")[1]
    for verb in (
        ("verify", tmp_path / "to"),
        ("export", tmp_path / "to", tmp_path / "x"),
        ("convert", folder, tmp_path / "x"),
    ):
        assert tell(*verb, "--workers", "0")[0] == 2
    (tmp_path / "to/state/hf/mtp.safetensors").unlink()
    assert tell("convert", folder, tmp_path / "to")[0] == 65


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(fd, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(DestinationError, match="cannot be locked on this file system: Operation not supported"):
        convert(source(tmp_path / "hf"), tmp_path / "to")


def test_another_was_faster(tmp_path, monkeypatch):
    from glm_jax.convert import conversion

    folder, real, events = source(tmp_path / "hf"), conversion.make_parent, []

    def late(target):
        monkeypatch.setattr(conversion, "make_parent", real)
        convert(folder, target, "copy")

    monkeypatch.setattr(conversion, "make_parent", late)
    convert(folder, tmp_path / "to", "copy", on_event=events.append)
    assert events[-1]["already"] and verify(tmp_path / "to").root


# ---- the commands


def test_the_commands(tmp_path, capfd):
    folder = write_text_model(tmp_path / "hf")
    tell = lambda *argv: (main([str(a) for a in argv]), *capfd.readouterr())
    code, out, err = tell("convert", folder, tmp_path / "to", "--dry-run")
    assert (code, err) == (0, "") and out.startswith("would convert: index") and not (tmp_path / "to").exists()
    code, out, err = tell("convert", folder, tmp_path / "to", "--json", "--progress", "json", "--mode", "copy")
    assert code == 0 and json.loads(out)["mode"] == "copy"
    events = [json.loads(line) for line in err.splitlines()]
    assert [e["event"] for e in events][0] == "plan" and events[-1]["event"] == "done"
    progress = [e for e in events if e["event"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] and progress[-1]["memory"] > 0
    assert tell("convert", folder, tmp_path / "to", "--mode", "copy")[0] == 0
    assert tell("verify", tmp_path / "to")[0] == 0
    assert tell("export", tmp_path / "to", tmp_path / "back", "--exact")[0] == 0
    assert tell("generate", "-m", tmp_path / "to", "-p", "a", "--max-tokens", "2", "--raw", "--quiet")[0] == 0
    code, out, err = tell("inspect", tmp_path / "to", "--json")
    record = json.loads(out)["converted"]
    assert (record["mode"], record["digested"], record["not_finite"]) == ("copy", record["tensors"], 0)
    assert code == 0 and f"root: {record['root']}\n" in str(tell("inspect", tmp_path / "to")[1])
    assert tell("gc", tmp_path)[:2] == (0, "nothing to remove\n")
    assert tell("convert", folder, tmp_path / "to", "--mtp", "drop")[0] == 73
    flip(tmp_path / "to/state/hf/model.safetensors", 8 * 100_000)
    code, out, err = tell("verify", tmp_path / "to")
    assert (code, out) == (65, "") and err.startswith("glm-jax: ") and err.count("\n") == 1
    assert tell("verify", tmp_path / "nowhere")[0] == 66


def test_a_dry_run_says_what_it_would_take(tmp_path, capsys):
    folder = write_text_model(tmp_path / "hf")
    tell = lambda *argv: (main(["convert", str(folder), str(tmp_path / "to"), "--dry-run", *argv]), capsys.readouterr())
    code, said = tell("--mode", "copy", "--json", "--workers", "2")
    facts, size = json.loads(said.out), sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert code == 0 and facts["writes"] == facts["bytes"] == size and facts["read_bytes_per_s"] > 0
    alone = json.loads(tell("--mode", "copy", "--json", "--workers", "1")[1].out)
    assert facts["memory"] - alone["memory"] == 24 << 20  # a worker
    assert json.loads(tell("--json")[1].out)["writes"] == 0  # linked
    code, said = tell("--dtype", "bf16")
    assert re.search(r"[\d,]+ of them to be written, \d+ MiB of memory, 0 s to read and digest it", said.out), said.out
    code, said = tell("--memory", "40MB")
    assert code == 2 and re.search(r"--memory 40,000,000: [\d,]+ bytes for the plan .* at least [\d,]+\n", said.err)
    with pytest.raises(SystemExit):
        tell("--memory", "much")
    assert "'much' is no size, as 512MiB or 2GB" in capsys.readouterr().err
    assert not list(tmp_path.glob("to*"))


@pytest.mark.parametrize(
    "text, nbytes", [("7", 7), ("7B", 7), ("2GB", 2 * 10**9), ("512MiB", 2**29), ("1.5 gib", 3 * 2**29), ("3k", 3000)]
)
def test_sizes_as_people_write_them(text, nbytes):
    assert size(text) == nbytes


def cached(root: Path, folder: Path) -> Path:
    """A folder as the Hub's cache holds it: links to files under their SHA-256."""
    snapshot = root / "models--zai-org--GLM-4.6" / "snapshots" / ("c" * 40)
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("c" * 40)
    for path in folder.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        digest = digest if path.suffix == ".safetensors" else digest[:40]  # what did not come through LFS
        shutil.copy(path, blobs / digest)
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    return snapshot


def test_a_folder_of_the_hubs_cache(tmp_path, monkeypatch, capsys):
    folder = source(tmp_path / "hf")
    snapshot = cached(tmp_path / "hub", folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    events = []
    assert verify(snapshot, on_event=events.append) is None
    assert events[-1]["files_digested"] == events[-1]["files"] == 4
    assert convert("zai-org/GLM-4.6", tmp_path / "to", offline=True).mode == "index"
    assert verify(tmp_path / "to", source=folder).root == convert(folder, tmp_path / "copy", "copy").root
    assert not any(p.is_symlink() for p in (tmp_path / "to").rglob("*"))
    export(tmp_path / "to", tmp_path / "back", exact=True)
    assert tree_of(tmp_path / "back") == tree_of(folder)
    assert main(["verify", str(snapshot), "--structure"]) == 0
    assert "agree on" in (out := capsys.readouterr().out) and "0 of 4 files are what the Hub's cache calls them" in out
    flip((snapshot / "mtp.safetensors").resolve(), 8 * 100_000)
    with pytest.raises(BadInput, match="mtp.safetensors is not what the Hub has under its name"):
        verify(snapshot)


def test_a_converted_folder_may_be_the_source(tmp_path):
    folder = source(tmp_path / "hf")
    convert(folder, tmp_path / "to")
    again = convert(tmp_path / "to", tmp_path / "narrow", dtype="bf16")
    assert again.root == convert(folder, tmp_path / "direct", dtype="bf16").root
    with pytest.raises(DestinationError, match="this is the source"):
        convert(tmp_path / "to", tmp_path / "to")


def test_a_folder_that_was_not_converted_is_checked_as_far_as_it_can_be(tmp_path):
    folder = source(tmp_path / "hf")
    assert verify(folder) is None
    with pytest.raises(MissingInput, match="not made by glm-jax convert"):
        verify(folder, source=folder)
    os.truncate(folder / "mtp.safetensors", (folder / "mtp.safetensors").stat().st_size - 1)
    with pytest.raises(BadInput, match="mtp.safetensors: the file has .* truncated by 1"):
        verify(folder)


def test_a_header_longer_than_a_piece_is_written_too(tmp_path, monkeypatch):
    convert(source(tmp_path / "hf"), tmp_path / "to", "copy")
    export(tmp_path / "to", tmp_path / "one")
    monkeypatch.setattr(streaming, "PIECE", 4096)
    export(tmp_path / "to", tmp_path / "two")
    assert tree_of(tmp_path / "one") == tree_of(tmp_path / "two")


def test_an_interruption_while_threads_start_ends_them_too():
    stop, began, ended = threading.Event(), threading.Event(), threading.Event()

    def one(_):
        began.set()
        assert stop.wait(60)
        ended.set()

    def those():
        yield 0
        assert began.wait(60)
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_parallel(one, those(), 1, stop)
    assert ended.is_set()


@pytest.mark.parametrize("last", [False, True])
def test_ctrl_c_raises_nothing_inside_the_pool(last):
    """Where it could leave a lock taken or be lost, but when the pool has been told, or has ended."""
    stop, before = threading.Event(), signal.default_int_handler
    ours = signal.signal(signal.SIGINT, before)  # a shell's background commands ignore it

    def one(_):
        assert signal.getsignal(signal.SIGINT) != before
        os.kill(os.getpid(), signal.SIGINT)
        assert last or stop.wait(60)

    try:
        with pytest.raises(KeyboardInterrupt):
            in_parallel(one, range(1), 1, stop)
        assert signal.getsignal(signal.SIGINT) == before
    finally:
        signal.signal(signal.SIGINT, ours)


@pytest.mark.slow
def test_ctrl_c_leaves_what_the_same_command_goes_on_with(tmp_path):
    x = random_tensors(tiny(**SMALL | dict(vocab_size=400_000)))
    folder = write_model(tmp_path / "hf", tiny(**SMALL | dict(vocab_size=400_000)), x)
    code = "import sys, time; from glm_jax.convert import streaming; streaming.PIECE = 4096; "
    code += "read = streaming.read_exactly; streaming.read_exactly = lambda *a: (time.sleep(0.002), read(*a))[1]; "
    code += "from glm_jax.cli import main; sys.exit(main())"
    argv = [sys.executable, "-c", code, "convert", str(folder), str(tmp_path / "to"), "--mode", "copy"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background commands ignore it
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=heed)
    while not (tmp_path / ("to" + STAGING) / "journal-0.jsonl").exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and err == "\nglm-jax: interrupted\n", err
    assert (tmp_path / ("to" + STAGING)).is_dir() and not (tmp_path / "to").exists()
    assert convert(folder, tmp_path / "to", "copy").root


def test_these_verbs_start_without_jax(tmp_path):
    convert(source(tmp_path / "hf"), tmp_path / "to")
    code = f"""
import sys
from glm_jax.cli import main
assert main(["verify", {str(tmp_path / "to")!r}]) == 0
assert main(["convert", {str(tmp_path / "hf")!r}, {str(tmp_path / "again")!r}]) == 0
assert not {{"jax", "orbax", "torch", "tensorstore"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
