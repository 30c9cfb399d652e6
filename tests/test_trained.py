"""Trained weights back into a Hugging Face folder: from arrays, and from checkpoints that Orbax wrote."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from folders import SMALL, random_tensors, write_model

from glm_jax import load
from glm_jax.cli import main
from glm_jax.config import tiny
from glm_jax.convert import convert, export, table, trained
from glm_jax.convert.conversion import STAGING
from glm_jax.convert.safetensors import read_folder
from glm_jax.errors import BadInput, DestinationError, UsageError
from glm_jax.model import weight_path

CONFIG = tiny(**SMALL)
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder in bfloat16, with router biases in float32."""
    at = tmp_path_factory.mktemp("trained")
    narrow = {n: x if "e_score" in n else x.astype(BF16) for n, x in random_tensors(CONFIG).items()}
    convert(write_model(at / "hf", tiny(**SMALL, dtype=jnp.dtype("bfloat16")), narrow), at / "to", "copy")
    return at / "to"


def arrays(folder) -> dict[str, np.ndarray]:
    return {
        weight_path(p): np.asarray(a) for p, a in jax.tree_util.tree_leaves_with_path(load(folder, mesh="data=1")[0])
    }


def another(folder, *paths: str) -> dict[str, np.ndarray]:
    """These arrays in float32, with other numbers."""
    return {path: arrays(folder)[path].astype(np.float32) * 1.5 + 0.01 for path in paths}


def nested(flat) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *keys, last = path.split(".")
        inner = tree
        for key in keys:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return tree


PATHS = ("moe.mlp.gate_up", "moe.attn.q", "moe.attn.o", "moe.mlp.bias", "norm", "embed", "mtp.eh_proj", "moe.mlp.down")


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 40_000])
def test_arrays_take_the_place_of_tensors(converted, tmp_path, shard_bytes):
    changed = another(converted, *PATHS)
    export(converted, tmp_path / "out", weights=changed, shard_bytes=shard_bytes)
    found, before = arrays(tmp_path / "out"), arrays(converted)
    for path, array in found.items():
        want = changed[path].astype(array.dtype) if path in changed else before[path]
        np.testing.assert_array_equal(array, want, path)
    assert {n: (t.dtype, t.shape) for n, t in read_folder(tmp_path / "out").items()} == {
        n: (t.dtype, t.shape) for n, t in read_folder(converted / "state/hf").items()
    }
    assert not (tmp_path / ("out" + STAGING)).exists()


@pytest.mark.parametrize("below", ["", "params"])
@pytest.mark.parametrize("leaf", ["", pytest.param("value", marks=pytest.mark.slow)])
def test_a_checkpoint_of_orbax(converted, tmp_path, below, leaf):
    from orbax.checkpoint import v1 as ocp

    changed = another(converted, *PATHS)
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    cut = {"moe.mlp.gate_up": jax.P(None, "x", None, "y"), "moe.attn.q": jax.P(None, "y", None, "x")}
    placed = {p: jax.device_put(a, jax.NamedSharding(mesh, cut.get(p, jax.P()))) for p, a in changed.items()}
    tree = nested({p + ".value" if leaf else p: a for p, a in placed.items()})
    ocp.save(tmp_path / "ckpt", {below: tree, "step": jnp.int32(3)} if below else tree)
    assert main(["export", str(converted), str(tmp_path / "out"), "--weights", str(tmp_path / "ckpt")]) == 0
    export(converted, tmp_path / "same", weights=changed)
    for name, tensor in read_folder(tmp_path / "same").items():
        np.testing.assert_array_equal(tensor.read(), read_folder(tmp_path / "out")[name].read(), name)


@pytest.mark.slow
def test_rows_are_read_in_pieces(converted, tmp_path, monkeypatch):
    changed = another(converted, *PATHS)
    export(converted, tmp_path / "whole", weights=changed)
    monkeypatch.setattr("glm_jax.convert.streaming._MADE", 96)
    monkeypatch.setattr("glm_jax.convert.streaming.PIECE", 4096)
    export(converted, tmp_path / "pieces", weights=changed)
    name = "model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "pieces" / name).read_bytes()


def test_the_whole_model_that_orbax_saved_loads_again(converted, tmp_path):
    """As a trainer saves it: every weight of the model, by its path."""
    from orbax.checkpoint import v1 as ocp

    model, _ = load(converted, mesh="expert=2,tensor=2", dtype="float32")
    bump = lambda a: a + jnp.asarray(0.25, a.dtype)
    flat = {weight_path(p): bump(a) for p, a in jax.tree_util.tree_leaves_with_path(model)}
    ocp.save(tmp_path / "ckpt", nested(flat))
    export(converted, tmp_path / "out", weights=tmp_path / "ckpt")
    for path, array in arrays(tmp_path / "out").items():
        np.testing.assert_array_equal(array, np.asarray(flat[path]).astype(array.dtype), path)
    assert set(flat) == {row.path for row in table.rows(CONFIG)}


@pytest.mark.parametrize(
    "change, error, said",
    [
        (lambda x: {"moe.mlp.up": x["norm"]}, UsageError, "moe.mlp.up is none of the checkpoint's arrays, as embed"),
        (lambda x: {"norm": x["norm"][:-1]}, UsageError, r"norm is \[31\], the checkpoint's is \[32\]"),
        (lambda x: {"norm": x["norm"] * np.nan}, BadInput, r"model.norm.weight \(32 not finite\)"),
    ],
)
def test_weights_that_cannot_be(converted, tmp_path, change, error, said):
    with pytest.raises(error, match=said):
        export(converted, tmp_path / "out", weights=change(another(converted, "norm")))
    assert not (tmp_path / "out").exists()


def test_not_exact_and_not_over_another(converted, tmp_path):
    with pytest.raises(UsageError, match="--exact and --weights exclude each other"):
        export(converted, tmp_path / "out", exact=True, weights=another(converted, "norm"))
    export(converted, tmp_path / "out")
    before, changed = (tmp_path / "out/model.safetensors").read_bytes(), another(converted, "norm")
    with pytest.raises(DestinationError, match="is there already, with another model.norm.weight; give another folder"):
        export(converted, tmp_path / "out", weights=changed)
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    export(converted, tmp_path / "tuned", weights=changed)
    events = []
    export(converted, tmp_path / "tuned", weights=changed, on_event=events.append)
    assert events[-1]["already"]
    with pytest.raises(DestinationError, match="with another model.norm.weight"):
        export(converted, tmp_path / "tuned")
    (tmp_path / "out/config.json").unlink()
    with pytest.raises(DestinationError, match="with another config.json"):
        export(converted, tmp_path / "out")


def test_a_chunk_is_read_once_and_must_fit(converted, tmp_path, monkeypatch, capsys):
    from orbax.checkpoint import v1 as ocp

    changed = another(converted, "embed", "moe.mlp.gate_up")
    ocp.save(tmp_path / "ckpt", nested({p: jnp.asarray(a) for p, a in changed.items()}))
    monkeypatch.setattr("glm_jax.convert.streaming._MADE", 96)
    opened, reads = trained._opened, []

    def counted(*args):
        found, *rest = opened(*args)
        for store in found.values():
            reads.append(store.spec().to_json())
        return found, *rest

    monkeypatch.setattr(trained, "_opened", counted)
    export(converted, tmp_path / "out", weights=tmp_path / "ckpt")
    assert len(reads) == 2
    with pytest.raises(
        UsageError, match=r"moe.mlp.gate_up is stored in chunks of 131,072 bytes.*--memory 1MiB, or save"
    ):
        opened(tmp_path / "ckpt", ["embed", "moe.mlp.gate_up"], 200_000, 0, 3)
    assert opened(tmp_path / "ckpt", ["embed", "moe.mlp.gate_up"], 700_000, 100_000, 3)[2] == 2  # workers


def test_arrays_that_are_no_weights(converted, tmp_path, capsys):
    from orbax.checkpoint import v1 as ocp

    with pytest.raises(UsageError, match="norm is int32, not bfloat16"):
        export(converted, tmp_path / "out", weights={"norm": np.ones(32, np.int32)})
    at = tmp_path / "per%20cent #1"
    ocp.save(at, {"value": np.zeros(3), "norm": another(converted, "norm")["norm"]})
    assert main(["export", str(converted), str(tmp_path / "out"), "--weights", str(at)]) == 0
    assert f"1 of 54 arrays from {at}" in capsys.readouterr().out


def test_checkpoints_that_are_none(converted, tmp_path, capsys):
    from orbax.checkpoint import v1 as ocp

    tell = lambda path: (
        main(["export", str(converted), str(tmp_path / "out"), "--weights", str(path)]),
        capsys.readouterr().err,
    )
    assert tell(tmp_path / "nowhere") == (66, f"glm-jax: {tmp_path}/nowhere: no such folder\n")
    code, err = tell(converted.parent / "hf")
    assert code == 65 and "0 of its folders have a _METADATA" in err
    ocp.save(tmp_path / "other", {"a": np.zeros(3)})
    code, err = tell(tmp_path / "other")
    assert code == 65 and "has none of the weights of this model, such as embed" in err
    norm = np.zeros(32, np.float32)
    ocp.save(tmp_path / "several", {"params": {"norm": norm}, "mu": {"norm": norm}})
    code, err = tell(tmp_path / "several")
    assert code == 65 and "several sets of weights of this model, below 'mu', 'params'" in err
    assert not (tmp_path / "out").exists()
