"""Folders to models and back: every bit, every mesh, what transformers' folders do differently, and every refusal."""

import collections
import dataclasses
import json
import re
import shutil
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import BF16, LAYERS, ROUTER_BIAS, SMALL, random_tensors, write_model, write_text_model

from glm_jax import GLM, load, save
from glm_jax.config import preset, tiny
from glm_jax.convert import hf
from glm_jax.convert.safetensors import Tensor, read_folder
from glm_jax.errors import BadInput, DestinationError, MissingInput, NoSpace, UsageError
from glm_jax.loading import read_config
from glm_jax.model import weight_path
from glm_jax.planner import GIB, default_mesh, first_layers, needs
from glm_jax.sharding import Rules, mesh

FLOAT = tiny(**SMALL)
HALF = tiny(**SMALL, dtype=jnp.dtype("bfloat16"))
SHARDS = "model-{:05}-of-00003.safetensors"
MTP = f"model.layers.{LAYERS}."


def three_shards(name: str) -> str:
    """Layer 0 and what is in no layer, layer 1, layer 2; the MTP layer in its own file."""
    if name.startswith(MTP):
        return "mtp.safetensors"
    layer = re.search(r"layers\.(\d+)", name)
    return SHARDS.format(int(layer[1]) + 1 if layer else 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float32 model in one file; never written to."""
    return write_model(tmp_path_factory.mktemp("model"), FLOAT)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A bfloat16 model in shards, with router biases in float32; never written to."""
    return write_model(tmp_path_factory.mktemp("shards"), HALF, file_of=three_shards)


def stored(folder) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (t.dtype, t.shape, t.read().tobytes()) for name, t in read_folder(folder).items()}


def leaves(model: GLM) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(model)
    return {weight_path(path): np.asarray(leaf) for path, leaf in found}


def same(a: GLM, b: GLM) -> bool:
    x, y = leaves(a), leaves(b)
    return x.keys() == y.keys() and all(v.dtype == y[k].dtype and v.tobytes() == y[k].tobytes() for k, v in x.items())


# ---- round trips


@pytest.mark.parametrize(
    "source, cut",
    [
        ("folder", "data=1"),
        ("folder", "expert=2,tensor=2"),
        ("shards", None),
        ("shards", "data=2,expert=4"),
        ("shards", "tensor=4"),
    ],
)
def test_what_is_loaded_and_saved_is_the_same_to_the_bit(source, cut, request, tmp_path):
    source = request.getfixturevalue(source)
    model, tokenizer = load(source, mesh=cut)
    assert tokenizer is None
    save(model, tmp_path / "again")
    assert stored(tmp_path / "again") == stored(source)
    assert read_config(tmp_path / "again")[0] == read_config(source)[0]


def test_stored_dtypes_stay_and_the_router_bias_is_float32(shards):
    found = {name: kind for name, (kind, _, _) in stored(shards).items()}
    assert set(found.values()) == {"BF16", "F32"}
    assert {name for name, kind in found.items() if kind == "F32"} == {name for name in found if ROUTER_BIAS in name}
    weights = leaves(load(shards, mesh="data=1")[0])
    assert {name for name, w in weights.items() if w.dtype == np.float32} == {"moe.mlp.bias", "mtp.layer.mlp.bias"}


@pytest.mark.parametrize("rules", ["ep", "tp", Rules(batch="data", heads=("expert", "tensor"))])
def test_rules_change_where_weights_lie_and_not_what_they_are(folder, rules):
    assert same(load(folder, mesh="expert=2,tensor=2", rules=rules)[0], load(folder, mesh="data=1")[0])


@pytest.mark.parametrize("cut", [pytest.param("data=2,expert=2,tensor=2", marks=pytest.mark.slow), "tensor=4"])
@pytest.mark.parametrize("parts", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "in parts"])
def test_every_byte_is_read_once(cut, parts, folder, monkeypatch):
    seen, read = [], Tensor.read
    monkeypatch.setattr(
        Tensor,
        "read",
        lambda t, rows=None, out=None: (seen.append((t.name, (a := read(t, rows, out)).nbytes)), a)[1],
    )
    if parts:
        monkeypatch.setattr(hf, "_is_host", lambda readings: False)
    monkeypatch.setattr(hf, "_LEAST", 1)
    model, _ = load(folder, mesh=cut, memory=40_000)
    total = collections.Counter()
    for name, nbytes in seen:
        total[name] += nbytes
    assert total == {name: t.nbytes for name, t in read_folder(folder).items()}
    assert same(model, load(folder, mesh="data=1")[0])


def test_another_dtype_casts_all_but_the_router_bias(folder, shards):
    narrow, wide = leaves(load(folder, dtype="bfloat16")[0]), leaves(load(folder)[0])
    for name, weight in narrow.items():
        assert weight.dtype == (np.float32 if name.endswith("mlp.bias") else BF16)
        assert np.array_equal(weight, wide[name].astype(weight.dtype))
    assert all(w.dtype == np.float32 for w in leaves(load(shards, dtype="float32")[0]).values())


def test_every_weight_gets_its_own_tensor(folder):
    """Against the files, not against `save`: the two could be wrong alike."""
    t, w = {name: tensor.read() for name, tensor in read_folder(folder).items()}, leaves(load(folder)[0])
    N, K, H, D = (FLOAT.num_attention_heads, FLOAT.num_key_value_heads, FLOAT.head_dim, FLOAT.hidden_size)
    assert np.array_equal(w["embed"], t["model.embed_tokens.weight"])
    assert np.array_equal(w["head"], t["lm_head.weight"])
    assert np.array_equal(w["norm"], t["model.norm.weight"])
    assert np.array_equal(w["dense.mlp.gate_up"][0, 0], t["model.layers.0.mlp.gate_proj.weight"])
    assert np.array_equal(w["dense.mlp.gate_up"][0, 1], t["model.layers.0.mlp.up_proj.weight"])
    assert np.array_equal(w["moe.attn.q"][1], t["model.layers.2.self_attn.q_proj.weight"].reshape(N, H, D))
    assert np.array_equal(w["moe.attn.v_bias"][0], t["model.layers.1.self_attn.v_proj.bias"].reshape(K, H))
    assert np.array_equal(w["moe.attn.o"][1], t["model.layers.2.self_attn.o_proj.weight"].reshape(D, N, H))
    assert np.array_equal(w["moe.mlp_norm"][1], t["model.layers.2.post_attention_layernorm.weight"])
    assert np.array_equal(w["moe.mlp.gate_up"][1, 5, 0], t["model.layers.2.mlp.experts.5.gate_proj.weight"])
    assert np.array_equal(w["moe.mlp.gate_up"][0, 7, 1], t["model.layers.1.mlp.experts.7.up_proj.weight"])
    assert np.array_equal(w["moe.mlp.down"][0, 3], t["model.layers.1.mlp.experts.3.down_proj.weight"])
    assert np.array_equal(w["moe.mlp.bias"][0], t["model.layers.1.mlp.gate.e_score_correction_bias"])
    assert np.array_equal(w["mtp.eh_proj"], t[MTP + "eh_proj.weight"])
    assert np.array_equal(w["mtp.norm"], t[MTP + "shared_head.norm.weight"])
    assert np.array_equal(w["mtp.layer.mlp.shared.down"][0], t[MTP + "mlp.shared_experts.down_proj.weight"])


@pytest.mark.parametrize("cut", ["expert=2", "expert=2,tensor=2", "data=2,expert=2,tensor=2"])
def test_in_parts_within_a_budget_it_is_the_same(folder, monkeypatch, cut):
    """As on a device with memory of its own: what the host holds of the weights stays below what it may."""
    whole, memory, held, most = load(folder, mesh=cut)[0], 20_000, [], []
    aligned = hf._aligned

    def counted(shape, dtype):
        raw = aligned(shape, dtype)
        held.append(weakref.ref(raw))
        most.append(sum(r.nbytes for ref in held if (r := ref()) is not None))
        return raw

    monkeypatch.setattr(hf, "_aligned", counted)
    monkeypatch.setattr(hf, "_is_host", lambda readings: False)
    monkeypatch.setattr(hf, "_LEAST", 1)
    done = []
    parts = load(folder, mesh=cut, memory=memory, progress=lambda n, total: done.append((n, total)))[0]
    assert same(whole, parts)
    assert done[-1][0] == done[-1][1]
    assert len(held) > parts.mesh.shape["expert"] * parts.mesh.shape["tensor"] * len(leaves(parts))  # in parts
    assert 0 < max(most) <= memory


def test_no_memory_to_read_with(folder):
    with pytest.raises(UsageError, match=rf"memory: 1,000 bytes for {hf.WORKERS} readers; at least [\d,]+$"):
        load(folder, memory=1000)


def test_parts_are_all_of_a_shape():
    rng = np.random.default_rng(0)
    for shape in [(), (1,), (7,), (3, 5), (2, 3, 4), (1, 1, 9), (5, 1, 2)]:
        for most in {1, 2, 3, 4, 6, 24, 1000, int(rng.integers(1, 30))}:
            seen = np.zeros(shape, int)
            for chunk in hf._chunks(shape, most):
                seen[chunk] += 1
                assert seen[chunk].size <= most
            assert np.all(seen == 1)


def test_progress_goes_up_to_the_total(shards):
    seen = []
    model, _ = load(shards, mesh="expert=2,tensor=2", progress=lambda done, total: seen.append((done, total)))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done) and len(set(done)) == len(done)
    assert set(totals) == {done[-1]} == {sum(w.nbytes for w in leaves(model).values())}


# ---- the first layers


def test_the_first_layers_without_the_files_of_the_rest(shards, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(shards, part)
    for gone in (SHARDS.format(3), "mtp.safetensors"):
        (part / gone).unlink()
    model, _ = load(part, layers=2, mesh="expert=2")
    assert model.config == dataclasses.replace(HALF, num_hidden_layers=2, num_nextn_predict_layers=0)
    whole, found = leaves(load(shards)[0]), leaves(model)
    assert found["moe.attn.q"].shape[0] == 1
    for name, weight in found.items():
        assert np.array_equal(weight, whole[name][: len(weight)]), name
    with pytest.raises(MissingInput, match=r"2 of 4 files .* are missing: .*00003-of-00003.* mtp\.safetensors"):
        load(part)


@pytest.mark.parametrize("layers", [0, -1, LAYERS + 1])
def test_layers_out_of_range(folder, layers):
    with pytest.raises(UsageError, match=f"--layers {layers}: this model has 1 to {LAYERS}$"):
        load(folder, layers=layers)


def test_only_dense_layers(folder):
    model, _ = load(folder, layers=1)
    assert model.moe is None and model([[1, 2]])[0].shape == (1, 2, FLOAT.vocab_size)


# ---- what transformers writes


def test_a_bf16_router_bias_is_widened_with_one_warning(tmp_path):
    tensors = random_tensors(HALF)
    tensors = {name: x.astype(BF16) for name, x in tensors.items()}
    source = write_model(tmp_path / "a", HALF, tensors)
    with pytest.warns(UserWarning) as told:
        model, _ = load(source)
    assert len(told) == 1
    assert re.match(
        r"3 router biases are stored in BF16, not F32, as model\.layers\.1\.mlp\.gate", str(told[0].message)
    )
    bias = leaves(model)["moe.mlp.bias"]
    assert bias.dtype == np.float32
    assert np.array_equal(bias[0], tensors["model.layers.1.mlp.gate.e_score_correction_bias"].astype(np.float32))
    save(model, tmp_path / "b")
    assert stored(tmp_path / "b")["model.layers.1.mlp.gate.e_score_correction_bias"][0] == "F32"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "b")


def test_a_promised_mtp_layer_that_is_not_there_is_one_warning(tmp_path):
    tensors = {name: x for name, x in random_tensors(FLOAT).items() if not name.startswith(MTP)}
    with pytest.warns(UserWarning) as told:
        model, _ = load(write_model(tmp_path, FLOAT, tensors))
    assert [str(w.message) for w in told] == [
        f"{tmp_path}: config.json has num_nextn_predict_layers 1, but there is no tensor {MTP}*; "
        "loading without the MTP layer"
    ]
    assert model.mtp is None and model.config.num_nextn_predict_layers == 0


def test_half_an_mtp_layer_is_an_error(tmp_path):
    tensors = random_tensors(FLOAT)
    del tensors[MTP + "eh_proj.weight"]
    with pytest.raises(BadInput, match=rf"1 tensors are missing: {re.escape(MTP)}eh_proj\.weight$"):
        load(write_model(tmp_path, FLOAT, tensors))


@pytest.mark.parametrize(
    "config, generation, want",
    [
        (None, "absent", ()),
        ([1, 2], "absent", (1, 2)),
        (7, "absent", (7,)),
        ([1, 2], None, ()),
        (None, [3, 4, 5], (3, 4, 5)),
        ([1, 2], 9, (9,)),
    ],
)
def test_stop_ids_are_the_generation_configs_else_the_configs(folder, tmp_path, config, generation, want):
    raw = json.loads((folder / "config.json").read_text()) | {"eos_token_id": config}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if generation != "absent":
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert read_config(tmp_path)[0].eos_token_id == want


@pytest.mark.parametrize("eos", ["<|user|>", [1, None], True, {}])
def test_stop_ids_that_are_none_are_refused(folder, tmp_path, eos):
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(BadInput, match="eos_token_id is .*, not an id, a list of ids, or null"):
        read_config(tmp_path)


def test_a_tied_head_with_and_without_a_copy(tmp_path):
    config = dataclasses.replace(FLOAT, tie_word_embeddings=True)
    tensors = random_tensors(config)
    assert "lm_head.weight" not in tensors
    plain = load(write_model(tmp_path / "a", config, tensors))[0]
    copy = load(
        write_model(tmp_path / "b", config, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    )[0]
    assert plain.head is None and same(plain, copy)
    wrong = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"][:-1]}
    with pytest.raises(BadInput, match=r"lm_head\.weight is \[127, 32\], the config implies \[128, 32\]"):
        load(write_model(tmp_path / "c", config, wrong))


def test_copies_of_embedding_and_head_in_the_mtp_layer(folder, tmp_path):
    tensors = random_tensors(FLOAT, mtp_copies=True)
    names = {MTP + "embed_tokens.weight", MTP + "shared_head.head.weight"}
    assert names < tensors.keys()
    model, _ = load(write_model(tmp_path / "a", FLOAT, tensors))
    assert leaves(model).keys() == leaves(load(folder)[0]).keys()
    for i, name in enumerate(names):
        wrong = tensors | {name: tensors[name][:, :-1]}
        with pytest.raises(BadInput, match=rf"{re.escape(name)} is \[128, 31\], the config implies \[128, 32\]"):
            load(write_model(tmp_path / f"wrong{i}", FLOAT, wrong))


# ---- refusals


def changed(**edits):
    """The tensors of FLOAT with some left out (None) or replaced."""
    tensors = random_tensors(FLOAT) | {name.replace("__", "."): x for name, x in edits.items()}
    return {name: x for name, x in tensors.items() if x is not None}


Q, EXPERT = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.mark.parametrize(
    "edits, said",
    [
        ({Q: None}, rf"1 tensors are missing: {Q}$"),
        ({EXPERT: None}, rf"1 tensors are missing: {EXPERT}$"),
        (
            {f"model.layers.2.mlp.experts.{e}.up_proj.weight": None for e in range(8)},
            r"8 tensors are missing: model\.layers\.2\.mlp\.experts\.\*\.up_proj\.weight \(8\)$",
        ),
        ({"model.extra": np.zeros(3, np.float32)}, r"1 tensors have no place in this model: model\.extra$"),
        (
            {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)},
            r"no place in this model: model\.layers\.0\.self_attn\.rotary_emb\.inv_freq$",
        ),
        ({Q: np.zeros((32, 128), np.float32)}, rf"{Q} is \[32, 128\], the config implies \[128, 32\]$"),
        ({"model.norm.weight": np.zeros(31, np.float32)}, r"model\.norm\.weight is \[31\], the config implies \[32\]$"),
        ({Q: np.zeros((128, 32), np.float16)}, rf"{Q} is F16, not BF16 or F32$"),
        ({Q: np.zeros((128, 32), np.int8)}, rf"{Q} is I8, not BF16 or F32$"),
        (
            {Q: None, "model.extra": np.zeros(3, np.float32), "lm_head.weight": np.zeros((2, 2), np.float32)},
            rf"1 tensors are missing: {Q}; 1 tensors have no place in this model: model\.extra; lm_head",
        ),
    ],
    ids=[
        "missing",
        "missing expert",
        "missing projection",
        "unknown",
        "rotary",
        "transposed",
        "norm",
        "F16",
        "I8",
        "all at once",
    ],
)
def test_what_is_not_this_model_is_refused_before_a_weight_is_read(edits, said, tmp_path, monkeypatch):
    source = write_model(tmp_path, FLOAT, changed(**edits))
    monkeypatch.setattr(Tensor, "read", None)
    with pytest.raises(BadInput, match=said) as error:
        load(source)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path))


def test_many_problems_are_still_one_short_line(tmp_path):
    half = {name: x[: len(x) // 2] for name, x in random_tensors(FLOAT).items()}
    with pytest.raises(BadInput, match=r"; and \d+ more$") as error:
        load(write_model(tmp_path, FLOAT, half))
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_quantised_weights_are_refused_by_name(tmp_path, method):
    source = write_model(tmp_path, FLOAT, quantization_config={"quant_method": method, "activation_scheme": "dynamic"})
    with pytest.raises(BadInput, match=rf"quantised \({method}\).* take the BF16 model"):
        load(source)


@pytest.mark.parametrize("dtype", ["float16", "fp8", "int8", ""])
def test_unknown_dtype(folder, dtype):
    with pytest.raises(UsageError, match=f"--dtype {dtype}: weights are loaded in bfloat16 or float32"):
        load(folder, dtype=dtype)


def test_no_folder_no_config_no_json(tmp_path):
    with pytest.raises(MissingInput, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(MissingInput, match=r"config\.json: no such file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config\.json: not JSON"):
        load(tmp_path)


def test_a_truncated_file(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadInput, match="truncated by 1$"):
        load(tmp_path / "cut")


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path):
    source = write_text_model(tmp_path, vocab_size=352)
    with pytest.raises(BadInput, match="the tokenizer has 356 ids, the model only 352"):
        load(source)


# ---- meshes and memory


@pytest.mark.parametrize("devices, want", [(1, "data=1"), (2, "expert=2"), (8, "expert=8")])
def test_default_mesh(devices, want):
    assert default_mesh(FLOAT, Rules(), jax.devices()[:devices]) == want
    odd = dataclasses.replace(FLOAT, n_routed_experts=6)
    assert (
        default_mesh(odd, Rules(), jax.devices()[:devices])
        == {1: "data=1", 2: "expert=2", 8: "expert=2,tensor=4"}[devices]
    )


def test_default_mesh_leaves_devices_out_that_do_not_divide():
    odd = dataclasses.replace(FLOAT, n_routed_experts=9)
    assert default_mesh(odd, Rules(heads=None, ffn=None, vocab=None, batch=None), jax.devices()[:2]) == "tensor=2"
    prime = dataclasses.replace(FLOAT, n_routed_experts=7, moe_intermediate_size=33, vocab_size=353)
    assert default_mesh(prime, Rules(batch="expert"), jax.devices()[:2]) == "data=1"


def test_the_default_mesh_is_the_one_that_fits(monkeypatch):
    """GLM-4.6 in bfloat16: expert=16 needs 71.1 GiB of weights, with its MTP layer, expert=8,tensor=2 55.6."""
    config = preset("glm-4.6")
    sixteen = jax.devices() * 2
    monkeypatch.setattr("glm_jax.planner.device_bytes", lambda device: 100 * GIB)
    assert default_mesh(config, Rules(), sixteen) == "expert=16"
    monkeypatch.setattr("glm_jax.planner.device_bytes", lambda device: 70 * GIB)
    assert default_mesh(config, Rules(), sixteen) == "expert=8,tensor=2"


@pytest.mark.parametrize(
    "cut, said",
    [
        ("expert=3", r"n_routed_experts 8 does not divide over expert=3, the next that do are 2 or 4"),
        (
            "tensor=3",
            r"num_attention_heads 8 does not divide over tensor=3.*; moe_intermediate_size 32 [^;]*; vocab_size 128",
        ),
        ("expert=16", r"needs 16 devices, there are 8"),
        ("experts=2", r"no axis 'experts', the axes are data, expert, context, tensor"),
        ("expert=0", r"expert='0' is not a size"),
        ("expert", r"expert='' is not a size"),
    ],
)
def test_meshes_that_cannot_be(folder, cut, said):
    with pytest.raises(UsageError, match=said):
        load(folder, mesh=cut)


def small_devices(monkeypatch, nbytes: int):
    """Devices of so much memory, and weights that nobody may read."""
    monkeypatch.setattr("glm_jax.planner.device_bytes", lambda device: nbytes)
    monkeypatch.setattr(Tensor, "read", None)


def test_a_model_that_does_not_fit_is_refused_with_what_would(folder, monkeypatch):
    one = mesh("data=1")
    half = needs(HALF, one, Rules())
    small_devices(monkeypatch, half.total)
    with pytest.raises(NoSpace) as error:
        load(folder, mesh="data=1")
    text = str(error.value)
    gib = lambda n: f"{n / GIB:.1f}"
    need = needs(FLOAT, one, Rules())
    assert f"needs {gib(need.total)} GiB (weights {gib(need.weights)}, cache {gib(need.cache)}, working" in text
    assert "on each of 1 devices (--mesh data=1), these have" in text and "\n" not in text
    assert "what would fit: " in text and f"--dtype bfloat16 ({gib(half.total)} GiB)" in text
    monkeypatch.undo()
    monkeypatch.setattr("glm_jax.planner.device_bytes", lambda device: half.total)
    load(folder, mesh="data=1", dtype="bfloat16")  # what it said is so


def test_fewer_layers_that_would_fit_do(folder, monkeypatch):
    have = needs(first_layers(FLOAT, 2), mesh("data=1"), Rules()).total
    small_devices(monkeypatch, have)
    with pytest.raises(NoSpace, match=r"--layers 2 \(the first 2 of 3\)"):
        load(folder, mesh="data=1")
    monkeypatch.undo()
    monkeypatch.setattr("glm_jax.planner.device_bytes", lambda device: have)
    load(folder, mesh="data=1", layers=2)


def test_another_mesh_that_would_fit_does(folder, monkeypatch):
    have = needs(FLOAT, mesh("tensor=2"), Rules()).total
    small_devices(monkeypatch, have)
    with pytest.raises(NoSpace) as error:
        load(folder, mesh="data=1")
    offered = re.search(r"--mesh (\S+) \(\d+\.\d GiB, \d+ devices\)", str(error.value))
    assert offered, error.value
    monkeypatch.undo()
    monkeypatch.setattr("glm_jax.planner.device_bytes", lambda device: have)
    load(folder, mesh=offered[1])


def test_nothing_fits(folder, monkeypatch):
    small_devices(monkeypatch, 1)
    with pytest.raises(NoSpace, match="no mesh, dtype or --layers of it fits$"):
        load(folder)


def test_the_real_model_says_numbers(monkeypatch):
    """The refusal of GLM-4.6 on one device of 80 GiB: 664 GiB of weights."""
    from glm_jax.planner import refuse_if_too_large

    monkeypatch.setattr("glm_jax.planner.device_bytes", lambda device: 80 * GIB)
    with pytest.raises(
        NoSpace, match=r"GLM-4.6 needs 66\d\.\d GiB \(weights 66\d\.\d, .*--mesh expert=\S+ .*--layers 1\d "
    ):
        refuse_if_too_large(preset("glm-4.6"), mesh("data=1"), Rules(), "GLM-4.6")


# ---- saving


def test_save_never_writes_over_a_model(folder, tmp_path):
    model = load(folder, mesh="data=1", layers=1)[0]
    for place in (folder, folder / "config.json"):
        with pytest.raises(DestinationError, match="is a file or holds a model already"):
            save(model, place)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(DestinationError, match="is there already and not empty"):
        save(model, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_saved_folder_has_the_tokenizer_and_the_stop_ids(tmp_path):
    source = write_text_model(tmp_path / "a", num_hidden_layers=1)
    model, tokenizer = load(source)
    assert tokenizer is not None and tokenizer.size == model.token_limit == 356
    assert len(tokenizer.stop_ids) == 3 and tokenizer.stop_ids == model.config.eos_token_id
    save(model, tmp_path / "new" / "b", tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "new" / "b" / name).read_bytes() == (source / name).read_bytes()
    again, tokenizer = load(tmp_path / "new" / "b")
    assert tokenizer is not None and tokenizer.has_chat_template
    assert again.config == model.config and again.token_limit == 356 and same(again, model)


def test_edited_weights_are_saved_as_they_are(folder, tmp_path):
    model = load(folder, mesh="expert=2,tensor=2")[0]
    assert model.head is not None
    model.head.set_value(model.head[...] * 2)
    save(model, tmp_path / "edited")
    before, after = read_folder(folder), read_folder(tmp_path / "edited")
    for name, tensor in after.items():
        assert np.array_equal(tensor.read(), before[name].read() * (2 if name == "lm_head.weight" else 1)), name
