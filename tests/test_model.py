"""The model against itself: every mesh and rule like one device, the loss and what it counts, causality, blocks of
attention, and what XLA makes of it: collectives, bytes a device, temporaries."""

import dataclasses
import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import QUICK, check_sums, far, look, mtp

import glm_jax.model as model_module
from glm_jax import GLM, loss
from glm_jax.cache import Cache, cache_bytes
from glm_jax.config import preset, tiny
from glm_jax.errors import UsageError
from glm_jax.inspect import describe
from glm_jax.model import Matrix, attention, bucket, in_mesh, linear, rope, rope_angles, self_attention, weight_path
from glm_jax.planner import needs
from glm_jax.sharding import PRESETS, abstract, rules
from glm_jax.sharding import mesh as make_mesh

VARIANTS = {
    "all the parts": {},
    "tied, no biases, no QK-norm": {"tie_word_embeddings": True, "attention_bias": False, "use_qk_norm": False},
    "two shared experts, groups": {"n_shared_experts": 2, "n_group": 4, "topk_group": 2},
    "no dense layer": {"first_k_dense_replace": 0},
    "no experts": {"first_k_dense_replace": 4, "num_nextn_predict_layers": 0},
}
# 1, 2, 4 and 8 devices; each axis and each pair of axes is cut at least once.
MESHES = ["expert=2", "data=2,tensor=2", "expert=4,tensor=2", "data=2,expert=2,tensor=2"]
IDS = np.random.default_rng(0).integers(0, 128, (3, 11)).astype(np.int32)  # 3 rows divide over 1 device only
CLOSE = 2e-5


def variant(name, **changes):
    """Small enough to compile fast: three layers, of which one dense, and the MTP layer."""
    changes = {"num_hidden_layers": 3} | VARIANTS[name] | changes
    return tiny(**{k: min(v, 3) if k == "first_k_dense_replace" else v for k, v in changes.items()})


def stir(model):
    """Biases, router biases and norms that are not zero and one, the same on every mesh."""

    def change(path, leaf):
        name = weight_path(path)
        if "norm" not in name and "bias" not in name:
            return leaf
        noise = np.random.default_rng([len(name), *name.encode()]).standard_normal(leaf.shape)
        scale = 0.02 if name.endswith("mlp.bias") else 0.3  # sigmoid scores lie that close together
        return jax.device_put((np.asarray(leaf) + scale * noise).astype(leaf.dtype), leaf.sharding)

    nnx.update(model, jax.tree_util.tree_map_with_path(change, nnx.state(model)))
    return model


def made(name, at="data=1", by="ep", **changes):
    return stir(GLM(variant(name, **changes), at, by))


def gradients(model, ids, mask=None, **options):
    """The loss, its metrics and its gradient by name, as NumPy."""
    graph, state = nnx.split(model)

    def run(state, ids, mask):  # ids are an argument, so that other ids are the same program
        return loss(nnx.merge(graph, state), ids, mask, **options)

    run = jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options=QUICK)
    (value, metrics), grads = run(state, ids, mask)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    return float(value), metrics, {weight_path(path): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def single(name):
    """A variant's logits on one device."""
    logits, cache = made(name)(IDS)
    assert cache is None and logits.shape == (3, 11, 128) and logits.dtype == jnp.float32
    return np.asarray(logits)


ROWS = IDS  # three, so that most meshes below pad them
mtp_weight = lambda name: 0.0 if name == "no experts" else 0.3


@functools.cache
def single_gradients(name):
    """A variant's loss on one device, its metrics and its gradients."""
    return gradients(made(name), ROWS, mtp_weight=mtp_weight(name))


SLOW_VARIANTS = ("tied, no biases, no QK-norm", "no dense layer")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_VARIANTS else ()) for name in VARIANTS]
)
@pytest.mark.parametrize(
    "at, by",
    [("expert=4,tensor=2", "ep"), pytest.param("data=2,expert=2,tensor=2", "tp", marks=pytest.mark.slow)],
)
def test_every_mesh_gives_the_same_logits(name, at, by):
    want = single(name)
    logits, _ = made(name, at, by)(IDS)  # three rows: padded to what the mesh divides
    assert logits.shape == want.shape and far(logits, want) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, at, by",
    [
        ("no experts", "data=2,expert=2,tensor=2", "ep"),
        ("tied, no biases, no QK-norm", "data=2,expert=2,tensor=2", "tp"),
        ("two shared experts, groups", "tensor=2", "ep"),
    ],
)
def test_every_mesh_gives_the_same_gradients(name, at, by):
    """Some of each; test_sharding.py has more, benchmarks/every_mesh.py all rules on 1 to 16 devices."""
    want, want_metrics, want_grads = single_gradients(name)
    value, metrics, grads = gradients(made(name, at, by), ROWS, mtp_weight=mtp_weight(name))
    assert abs(value - want) < 1e-5 * want
    assert metrics.keys() == want_metrics.keys()
    assert all(np.array_equal(metrics[key], want_metrics[key]) for key in ("load", "mtp_load") if key in metrics)
    check_sums(grads, want_grads, largest=2e-4)  # without QK-norm attention is sharper: rms 3e-6, one number 8e-5


@pytest.mark.parametrize("name", [pytest.param("all the parts", marks=pytest.mark.slow), "no experts"])
def test_gradients_reach_every_weight(name):
    _, _, grads = single_gradients(name)
    # The router's correction bias moves a choice, which has no gradient; it is balanced by hand.
    assert [path for path, g in grads.items() if not g.any()] == [path for path in grads if path.endswith("mlp.bias")]


@pytest.mark.slow
@pytest.mark.parametrize("by", PRESETS)
@pytest.mark.parametrize("at", ["expert=8", "data=2,tensor=4"])  # an axis that is as long as there are heads
def test_every_mesh_of_every_rule(at, by):
    want = np.asarray(made("all the parts")(IDS)[0])
    logits, _ = made("all the parts", at, by)(IDS)
    assert far(logits, want) < CLOSE


def test_weights_are_unit_gain_and_the_same_on_every_mesh():
    # A missing reduction hides behind weights of standard deviation 0.02.
    model, other = GLM(variant("all the parts")), GLM(variant("all the parts"), "expert=4,tensor=2")
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert model.moe is not None
    assert abs(np.std(np.asarray(model.moe.mlp.gate_up[...])) * 64**0.5 - 1) < 0.02
    assert abs(np.std(np.asarray(model.moe.attn.o[...])) * 128**0.5 - 1) < 0.02
    assert np.asarray(GLM(variant("all the parts"), seed=1).embed[...] != model.embed[...]).any()


# The loss.


def test_loss_is_the_mean_over_masked_targets():
    model = made("all the parts")
    logits = np.asarray(model(IDS)[0], np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logp[:, :-1], IDS[:, 1:, None], -1)[..., 0]  # [3, 10]
    value, metrics = loss(model, IDS)
    np.testing.assert_allclose(value, nats.mean(), rtol=1e-5)
    assert metrics["tokens"] == 30 and float(metrics["loss"]) == float(value)
    mask = np.random.default_rng(1).random(IDS.shape) < 0.4
    mask[:, 0] = True  # the first token is nobody's target
    value, metrics = loss(model, IDS, mask)
    np.testing.assert_allclose(value, nats[mask[:, 1:]].mean(), rtol=1e-5)
    assert metrics["tokens"] == mask[:, 1:].sum()
    value, metrics = loss(model, IDS, np.zeros(IDS.shape, int))
    assert (value, metrics["tokens"]) == (0, 0)  # no target: no loss, and no division by zero


@pytest.mark.slow
def test_masked_tokens_have_no_gradient():
    model, mask = made("all the parts"), np.ones(IDS.shape, bool)
    mask[:, 6:] = False
    changed = IDS.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % 128
    (a, _, grads), (b, _, others) = (gradients(model, ids, mask=mask) for ids in (IDS, changed))
    assert abs(a - b) < 1e-6
    check_sums(others, grads)


def test_mtp_loss():
    model = made("all the parts")
    seen = look(model, IDS)
    logits = np.asarray(mtp(model, IDS, seen.final), np.float64)  # [3, 10, V]: at i the token i+2
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logp[:, :-1], IDS[:, 2:, None], -1)
    plain, _ = loss(model, IDS)
    value, metrics = loss(model, IDS, mtp_weight=0.3)
    np.testing.assert_allclose(metrics["mtp_loss"], nats.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], plain, rtol=1e-6)
    np.testing.assert_allclose(value, plain + 0.3 * nats.mean(), rtol=1e-5)


def test_load_counts_every_token_k_times():
    model = made("all the parts")
    _, metrics = loss(model, IDS, np.zeros(IDS.shape, bool), mtp_weight=0.1)
    assert metrics["load"].shape == (2, 16) and metrics["mtp_load"].shape == (1, 16)
    assert (metrics["load"].sum(-1) == IDS.size * 4).all()
    assert metrics["mtp_load"].sum() == (IDS.size - len(IDS)) * 4  # the MTP layer has a state less in each row
    seen = look(model, IDS)
    for layer, experts in enumerate(seen.experts):
        assert np.array_equal(np.bincount(experts.ravel(), minlength=16), metrics["load"][layer])


@pytest.mark.slow
def test_remat_changes_nothing():
    value, _, grads = single_gradients("all the parts")
    kept, _, others = gradients(made("all the parts"), ROWS, mtp_weight=0.3, remat=False)
    assert abs(value - kept) < 1e-6 * value
    check_sums(others, grads)


def test_loss_refuses():
    model = made("no experts")
    with pytest.raises(UsageError, match=r"with a next token to predict, its shape is \(3, 1\)"):
        loss(model, IDS[:, :1])
    with pytest.raises(UsageError, match="ids run from 0 to 128, the vocabulary from 0 to 127"):
        loss(model, [[0, 128]])
    with pytest.raises(UsageError, match=r"mask must say of each of the ids \(3, 11\) .* its shape is \(3, 10\)"):
        loss(model, IDS, IDS[:, 1:] > 0)
    with pytest.raises(UsageError, match="mtp_weight is 0.3, but this model has no MTP layer"):
        loss(model, IDS, mtp_weight=0.3)
    with pytest.raises(UsageError, match="this model has no MTP layer"):
        model.mtp_logits(IDS)


# What depends on what.


def test_later_tokens_do_not_change_earlier_outputs():
    model, changed = made("all the parts"), IDS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 128
    before, after = look(model, IDS), look(model, changed)
    # To rounding: an expert that gets another number of rows may add up in another order.
    assert far(before.logits[:, :7], after.logits[:, :7]) < 1e-5
    assert (before.logits[:, 7:] != after.logits[:, 7:]).any(-1).all()
    # mtp_logits[i] has seen tokens up to i+1.
    ours, theirs = mtp(model, IDS, before.final), mtp(model, changed, after.final)
    assert ours.shape == (3, 10, 128)
    assert far(ours[:, :6], theirs[:, :6]) < 1e-5
    assert (ours[:, 6:] != theirs[:, 6:]).any(-1).all()


def test_attention_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    q, k, v = normal(2, 37, 8, 16), normal(2, 4, 50, 16), normal(2, 4, 50, 16)
    positions = jnp.asarray([[0], [13]], jnp.int32) + jnp.arange(37, dtype=jnp.int32)

    def run(block):
        monkeypatch.setattr(model_module, "QUERY_BLOCK", block)

        def scalar(q, k, v):
            out = attention(q, k, v, positions)
            return (out**2).sum(), out

        (_, out), grads = jax.jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))(q, k, v)
        return [np.asarray(a) for a in (out, *grads)]

    whole = run(64)
    scores = np.einsum("btkgh,bksh->bkgts", np.asarray(q).reshape(2, 37, 4, 2, 16), k) / 4
    scores = np.where(np.arange(50) <= np.asarray(positions)[:, None, None, :, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bkgts,bksh->btkgh", p / p.sum(-1, keepdims=True), v).reshape(2, 37, 8, 16)
    np.testing.assert_allclose(whole[0], want, rtol=0, atol=1e-5)
    for block in (1, 7, 36, 37):
        for ours, theirs in zip(run(block), whole, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * theirs.std() + 1e-5)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("T", [1, pytest.param(63, marks=pytest.mark.slow), 150])
def test_self_attention_is_attention_over_its_own_keys(T, kept, monkeypatch):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    q, k, v = normal(2, T, 8, 16), normal(2, 4, T, 16), normal(2, 4, T, 16)
    positions = jnp.broadcast_to(jnp.arange(T), (2, T))
    if not kept:
        monkeypatch.setattr(model_module, "KEPT_SCORES", 0)
    for f in (jax.jit, lambda f: jax.jit(jax.grad(lambda *qkv: (f(*qkv) ** 2).sum(), (0, 1, 2)))):
        ours, theirs = f(self_attention)(q, k, v), f(lambda q, k, v: attention(q, k, v, positions))(q, k, v)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert np.abs(np.asarray(a - b)).max() <= 2e-6 * np.abs(np.asarray(b)).max()


def test_model_with_small_attention_blocks(monkeypatch):
    model = made("all the parts", "expert=2,tensor=2")
    want = look(model, np.resize(IDS, (2, 11))).logits
    monkeypatch.setattr(model_module, "QUERY_BLOCK", 4)
    assert far(look(model, np.resize(IDS, (2, 11))).logits, want) < CLOSE


@pytest.mark.parametrize("T, K", [(1, 24), (4, 24), (5, 24), (1, 257)])  # read in place, and two kinds that are not
def test_linear_of_a_matrix_in_its_stack(T, K):
    draw = np.random.default_rng(T * K).standard_normal
    x, stack = draw((2, T, K), np.float32), draw((3, 2, 5, 4, K), np.float32)
    with jax.set_mesh(make_mesh("data=1")):
        of_stack = jax.jit(lambda x, stack, i: linear(x, Matrix(stack, i)[1], jax.P()))(x, stack, 2)
        of_array = jax.jit(lambda x, w: linear(x, w, jax.P()))(x, stack[2, 1])
    want = np.einsum("btk,onk->bton", x.astype(np.float64), stack[2, 1])
    assert of_stack.shape == of_array.shape == want.shape
    np.testing.assert_allclose(of_stack, want, rtol=0, atol=1e-6 * K)
    np.testing.assert_allclose(of_array, want, rtol=0, atol=1e-6 * K)


def test_rope_at_the_end_of_the_context():
    config = preset("glm-4.6")
    last = config.max_position_embeddings - 1
    assert last == 202_751
    cos, sin = (np.asarray(a, np.float64).ravel() for a in rope_angles(np.full((1, 1), last, np.int32), config))
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)
    # The slowest frequencies, where float32 still holds the angle, by exact arithmetic.
    exact = last * 1e6 ** -(np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(cos[16:], np.cos(exact[16:]), atol=2e-5)
    np.testing.assert_allclose(sin[16:], np.sin(exact[16:]), atol=2e-5)
    # What is rotated depends on distances alone: as far apart at the end as at the beginning.
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 128), np.float32)) for _ in "qk")
    turn = lambda x, position: rope(x, rope_angles(np.full((1, 1), position, np.int32), config))
    dot = lambda a, b: float((turn(q, a) * turn(k, b)).sum())
    assert abs(dot(last, last - 100) - dot(100, 0)) < 0.2  # float32 angles of 2e5: a hundredth of a radian
    assert np.array_equal(turn(q, last)[..., 64:], q[..., 64:])


@pytest.mark.parametrize(
    "n, size",
    [(0, 0), (1, 1), (2, 16), (16, 16), (17, 24), (24, 24), (25, 32), (33, 48), (48, 48), (49, 64), (65, 96)]
    + [(97, 128), (1000, 1024), (1025, 1536), (202752, 262144)],
)
def test_bucket(n, size):
    assert bucket(n) == size


def test_bucket_has_few_sizes_and_wastes_little():
    sizes = {bucket(n, 64) for n in range(2, 5000)}
    assert sorted(sizes) == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert all(n <= bucket(n) <= 1.5 * n for n in range(16, 5000))


# What XLA makes of it.


def compiled_text(at, by="ep"):
    model = GLM(variant("all the parts"), at, by, seed=None)
    graph, state = nnx.split(model)
    ids = jax.ShapeDtypeStruct((8, 22), "int32", sharding=jax.NamedSharding(model.mesh, rules(by)("batch", "seq")))
    run = in_mesh(lambda model, ids: model.logits(model.trunk(ids)[0]))
    return jax.jit(run, static_argnums=0).lower(graph, state, ids).compile().as_text()


def collectives(text):
    """Every collective of an HLO text, as (kind, the shapes of its results)."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= ([^=\n]*?) ({kinds})(?:-start)?\(", text)
    return [(kind, re.findall(r"\[([\d,]*)\]", shapes)) for shapes, kind in found]


def test_collectives():
    # 8 rows of 22 tokens. No width of a weight is 22, 44 or 176, so a shape tells what was moved.
    c, tokens = variant("all the parts"), 8 * 22
    found = collectives(compiled_text("expert=4,tensor=2"))
    moved = lambda kind: {shape for k, shapes in found if k == kind for shape in shapes}
    # The tokens of the 4 experts' groups come together, with the experts they chose; each token's sum goes back.
    assert f"{tokens},{c.hidden_size}" in moved("all-gather")
    assert f"{tokens},{c.num_experts_per_tok}" in moved("all-gather")
    assert f"{tokens // 4},{c.hidden_size}" in moved("reduce-scatter")
    assert any(
        shape.endswith(f"22,{c.hidden_size}") for shape in moved("all-reduce")
    )  # attention and MLPs over `tensor`
    assert not moved("all-to-all") and not moved("collective-permute")
    # And nothing else: no weight, whose shapes all have a width or a vocabulary in them, is ever moved.
    weights = {c.moe_intermediate_size, c.intermediate_size, c.n_routed_experts, c.vocab_size}
    weights |= {n // 2 for n in weights} | {n // 4 for n in weights}
    for kind, shapes in found:
        for shape in shapes:
            dims = [int(n) for n in shape.split(",") if n]
            assert np.prod(dims) <= tokens * c.hidden_size, (kind, shape)
            assert not weights & set(dims) - {2, 4, c.hidden_size}, (kind, shape)


def test_full_size_model_is_abstract_and_its_bytes_are_known():
    config, at = preset("glm-4.6"), abstract("expert=8,tensor=2")
    began = time.perf_counter()
    model = GLM(config, at, "ep", seed=None)
    assert time.perf_counter() - began < 1  # 0.05 s
    leaves = jax.tree.leaves(model)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    held = describe(model)
    gib = lambda keep: sum(w.device_bytes for w in held if keep(w.name)) / 2**30
    main = lambda name: not name.startswith("mtp.")
    # The main model in bfloat16: routed experts in 16 parts, all else that has heads, a width or a vocabulary in 2,
    # norms, routers and their float32 biases whole. Were those in 2 parts too it would be 54.8, half of expert=8.
    assert round(gib(main), 2) == 54.86
    small = lambda name: "norm" in name or name.endswith(("mlp.router", "mlp.bias"))
    assert round(gib(main) - gib(lambda name: main(name) and small(name)) / 2, 1) == 54.8
    assert round(gib(lambda name: not main(name)), 2) == 0.69
    routed = lambda name: name in ("moe.mlp.gate_up", "moe.mlp.down")
    assert gib(routed) == config.moe_layers * 160 * 3 * 1536 * 5120 * 2 / 16 / 2**30
    assert needs(config, at, rules("ep")).weights == sum(w.device_bytes for w in held)
    # A cache of 1,024 tokens for 8 rows: a row for each `expert`, half the KV heads for each `tensor`.
    assert needs(config, at, rules("ep"), 8, 1024).cache == cache_bytes(config, 8, 1024) // 16
    for mesh_gib, axes in ((109.6, "expert=8"), (70.5, "expert=16")):
        held = describe(GLM(dataclasses.replace(config, num_nextn_predict_layers=0), abstract(axes), seed=None))
        assert round(sum(w.device_bytes for w in held) / 2**30, 1) == mesh_gib


# Measured on CPU: 75 and 1,818 MiB. Decoding copies no weight; before a matmul of many rows XLA copies the slice of a
# stack that a step of the layer scan gets, 1,240 for a dense layer. One layer's experts are 14,400, and one copy of the
# cache 2,944. In bfloat16 a CPU first widens every stacked weight to float32, which is 60 GiB and says nothing of an
# accelerator.
@pytest.mark.slow
@pytest.mark.parametrize("T, most_mib", [(1, 120), (512, 2400)], ids=["decode", "prefill"])
def test_full_size_step_compiles(T, most_mib):
    """GLM-4.6 whole, on one CPU device: compiled and never run, so that no weight is made."""
    config = dataclasses.replace(preset("glm-4.6"), dtype=jnp.dtype("float32"))
    model = GLM(config, seed=None)
    graph, state = nnx.split(model)

    def place(dtype, shape, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(model.mesh, model.rules(*axes)))

    kv = place("float32", (92, 1, 8, 4096, 128), None, "batch", "heads", "seq", None)
    ids, row = place("int32", (1, T), "batch", "seq"), place("int32", (1,), "batch")

    def step(model, k, v, length, ids, advance):
        x, cache, _ = model.trunk(ids, Cache(k, v, length), advance)
        return model.logits(x[:, -1:]), cache

    run = jax.jit(in_mesh(step), static_argnums=0, donate_argnums=(2, 3))
    used = run.lower(graph, state, kv, kv, row, ids, row).compile().memory_analysis()
    assert used is not None and used.alias_size_in_bytes == cache_bytes(
        config, 1, 4096
    )  # the cache is updated in place
    assert used.temp_size_in_bytes < most_mib << 20
