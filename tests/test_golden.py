"""The numbers of transformers, stored: logits, routing, states and MTP logits of three tiny models on several meshes,
RoPE at both ends of the context, and the published models' parameter counts and tensor names."""

import json
import math

import golden
import jax
import numpy as np
import pytest
from flax import nnx

from glm_jax import GLM, load
from glm_jax.config import PRESETS, preset
from glm_jax.convert import table
from glm_jax.model import rope_angles, weight_path

COUNTS = json.loads((golden.DATA / "param_counts.json").read_text())
MANIFEST = json.loads((golden.DATA / "tensor_manifest.json").read_text())
ROPE = json.loads((golden.DATA / "golden_rope.json").read_text())


@pytest.fixture(scope="module", params=golden.GOLDEN)
def checkpoint(request, tmp_path_factory):
    return golden.GOLDEN[request.param], golden.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(
    "mesh",
    [
        "data=2,expert=2,tensor=2",
        *(pytest.param(at, marks=pytest.mark.slow) for at in (None, "data=1", "expert=2,tensor=2", "expert=4")),
        pytest.param("tensor=2", marks=pytest.mark.slow),
    ],
)  # test_inside_equals_transformers is one device
def test_equals_transformers_on_every_mesh(checkpoint, mesh):
    want, folder = checkpoint
    model, tokenizer = load(folder, mesh=mesh, rules=golden.RULES, dtype="float32")
    assert tokenizer is None
    logits, _ = model([want["input_ids"]])
    assert golden.far(logits[0], want["logits"]) < golden.CLOSE


def test_inside_equals_transformers(checkpoint):
    want, folder = checkpoint
    model = golden.one_device(folder)
    seen = golden.look(model, [want["input_ids"]])
    assert golden.far(seen.logits[0], want["logits"]) < golden.CLOSE
    assert golden.far(seen.final[0, -1], want["final_hidden_last_token"]) < golden.CLOSE
    assert len(seen.experts) == len(want["router"])
    for experts, share, layer in zip(seen.experts, seen.share, want["router"], strict=True):
        order = np.argsort(experts[0], -1)  # ties and equal weights may come in any order: sets are compared
        assert np.array_equal(np.take_along_axis(experts[0], order, -1), layer["experts_sorted"])
        weights = np.take_along_axis(share[0], order, -1)
        np.testing.assert_allclose(weights, layer["weights_by_sorted_expert"], rtol=1e-5)
    mtp = model.mtp_logits([want["input_ids"]])
    assert golden.far(mtp[0], want["mtp_logits"]) < golden.CLOSE


@pytest.mark.parametrize("position", ROPE["positions"])
def test_rope_equals_transformers_at(position):
    row = ROPE["positions"].index(position)
    cos, sin = rope_angles(np.full((1, 1), position, np.int32), preset("glm-4.6"))
    np.testing.assert_allclose(np.ravel(cos), ROPE["cos"][row], rtol=0, atol=2e-7)
    np.testing.assert_allclose(np.ravel(sin), ROPE["sin"][row], rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name):
    config = preset(name)
    want = COUNTS["glm-4.5-air" if name == "glm-4.5-air" else "glm-4.5 / 4.6 / 4.7 (355B class)"]
    leaves = {
        weight_path(path): math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.state(GLM(config, seed=None)))[0]
    }
    count = lambda prefix: sum(n for path, n in leaves.items() if path.startswith(prefix))
    assert count("") == want["main+mtp_core"]
    assert count("") - count("mtp.") == want["main_total"]
    assert count("mtp.") == want["mtp_core"]
    assert (count("embed"), count("head")) == (want["embed"], want["lm_head"])
    assert count("dense.mlp.") == want["dense_mlp"] * config.dense_layers
    assert count("moe.mlp.") == want["moe_layer_mlp"] * config.moe_layers
    attention = count("moe.attn") + count("moe.mlp_norm")  # moe.attn.* and moe.attn_norm
    assert attention == want["attn/layer"] * config.moe_layers


@pytest.mark.parametrize("name", PRESETS)
def test_tensor_names_and_shapes(name):
    copies = name != "glm-4.6"
    entry = {"glm-4.5-air": "glm-4.5-air", "glm-4.6": "glm-4.6"}.get(name, "glm-4.5 ")
    (want,) = [published(tensors) for title, tensors in MANIFEST.items() if title.startswith(entry)]
    assert len(want) == {"glm-4.5-air": 18329, "glm-4.6": 44689}.get(name, 44691)
    assert table.tensor_shapes(preset(name), mtp_copies=copies) == want


def published(entry: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one manifest entry, its {i} and {e} written out."""
    out = {}
    for row in entry["tensors"]:
        name, shape = row["name"], tuple(row["shape"])
        layers = range(1)
        if row["layers"]:
            first, last = map(int, row["layers"].split(".."))
            layers = range(first, last + 1)
        experts = range(row["count"] // len(layers))
        for i in layers:
            for e in experts:
                out[name.format(i=i, e=e)] = shape
    return out
