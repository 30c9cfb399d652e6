"""Checkpoints as they are published, at their size: 714 GB of sparse files that take no room."""

import collections
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import golden
import pytest

from glm_jax.convert import convert, export, verify
from glm_jax.convert.safetensors import read_folder
from glm_jax.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
full_size = importlib.import_module("full_size")

MANIFEST = json.loads((golden.DATA / "tensor_manifest.json").read_text())
PUBLISHED = {name: next(v for k, v in MANIFEST.items() if k.startswith(name)) for name in ("glm-4.5-air", "glm-4.6")}
PUBLISHED |= dict.fromkeys(("glm-4.5", "glm-4.7"), next(v for k, v in MANIFEST.items() if k.startswith("glm-4.5 ")))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of each model, made when first asked for."""
    made: dict = {}

    def folder(name: str, fp8: bool = False) -> Path:
        if (name, fp8) not in made:
            made[name, fp8] = tmp_path_factory.mktemp(name) / "hf"
            full_size.write(name, made[name, fp8], fp8)
        return made[name, fp8]

    return folder


def drawn_together(tensors) -> collections.Counter:
    """How many there are of each name without its numbers, in each dtype and shape."""
    plain = lambda name: re.sub(r"experts\.\d+", "experts.{e}", re.sub(r"layers\.\d+", "layers.{i}", name))
    return collections.Counter((plain(n), t.dtype, t.shape) for n, t in tensors.items())


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    "name", ["glm-4.5-air", *(pytest.param(n, marks=pytest.mark.slow) for n in ("glm-4.6", "glm-4.7"))]
)
def test_names_shapes_dtypes_and_bytes_are_the_published_ones(folders, name, fp8):
    tensors, want = read_folder(folders(name, fp8)), collections.Counter()
    for entry in PUBLISHED[name]["tensors"]:
        names = [re.sub(r"layers\.\d+", "layers.{i}", entry["name"]), tuple(entry["shape"])]
        dtype = entry["fp8_dtype"] if fp8 else entry["dtype"]
        want[names[0], dtype.split(" ")[0], names[1]] += entry["count"]
        if dtype.startswith("F8"):
            want[names[0] + "_scale", "F32", (names[1][0], 1)] += entry["count"]
    found = drawn_together(tensors)
    if name == "glm-4.6" and fp8:  # has a head for its MTP layer, which the one in bfloat16 has not
        head = "model.layers.{i}.shared_head.head.weight"
        assert found - want == {(head, "F8_E4M3", (151552, 5120)): 1, (head + "_scale", "F32", (151552, 1)): 1}
        found = found & want
    assert found == want
    if not fp8:
        assert len(tensors) == PUBLISHED[name]["total_tensors"]
        assert sum(t.nbytes for t in tensors.values()) == PUBLISHED[name]["total_bytes_bf16_fp32bias"]
    elif name != "glm-4.6":
        assert len(tensors) == PUBLISHED[name]["fp8_total_tensors"]
        assert sum(t.nbytes for t in tensors.values()) == PUBLISHED[name]["fp8_total_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, fp8", [("glm-4.5-air", False), ("glm-4.6", False), ("glm-4.6", True)], ids=["air", "4.6", "4.6-fp8"]
)
def test_index_mode_writes_little_and_exports_exactly(folders, name, fp8, tmp_path):
    folder = folders(name, fp8)
    made = convert(folder, folder.parent / "to")
    assert made.mode == "index" and set(made.tensors) == set(read_folder(folder))
    assert made.aliases == ({"mtp.embed": "embed"} | ({} if fp8 else {"mtp.head": "head"}) if name == "glm-4.6" else {})
    own = [p for p in (folder.parent / "to").rglob("*") if p.is_file() and p.stat().st_nlink == 1]
    assert sum(p.stat().st_size for p in own) <= 125 * len(made.tensors)  # 5.4 MB for 714 GB
    assert verify(folder.parent / "to", structure=True).root is None


@pytest.mark.slow
def test_a_large_folder_that_is_wrong_is_refused_with_all_that_is_missing(folders, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in folders("glm-4.6").iterdir():
        os.link(path, folder / path.name)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["model.layers.9.mlp.experts.10.up_proj.weight"]
    (folder / shard).unlink()
    with pytest.raises(Exception, match=rf"1 of 93 files named by .* are missing: {shard} \("):
        convert(folder, tmp_path / "to")
    kept = {n: f for n, f in index["weight_map"].items() if f != shard}
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": kept}))
    with pytest.raises(BadInput, match=r"\d+ tensors are missing: model\.layers\.9\.input_layernorm"):
        convert(folder, tmp_path / "to")
    assert not list(tmp_path.glob("to*"))


@pytest.mark.slow
def test_these_verbs_at_full_size_within_a_limit_of_memory(folders, tmp_path):
    """By the kernel's limit on data, which counts all that is allocated."""
    folder = folders("glm-4.6")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (256 << 20, 256 << 20)); "
        "from glm_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    run = lambda *argv: subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    done = run("convert", folder, folder.parent / "limited")
    assert done.returncode == 0 and "index" in done.stdout, done.stderr
    done = run("verify", "--structure", folder.parent / "limited")
    assert done.returncode == 0, done.stderr
    done = run("export", "--exact", folder.parent / "limited", tmp_path / "out", "--memory", "40MB")
    assert done.returncode == 2 and "--memory 40,000,000" in done.stderr
    with pytest.raises(Exception, match="bytes are to be written"):  # 714 GB, which nobody's test machine has
        export(folder.parent / "limited", tmp_path / "out", exact=True)
    assert not list(tmp_path.glob("out*"))
