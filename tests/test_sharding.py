"""Rules and meshes, the collectives of a step by formula and in the program, tokens sent to their experts, and every
preset against one device."""

import collections
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import check_sums, far
from jax.sharding import AbstractMesh, AxisType, Mesh
from test_model import IDS, gradients, made

from glm_jax import GLM, dispatch, generate_ids
from glm_jax.cache import write
from glm_jax.config import preset, tiny
from glm_jax.errors import UsageError
from glm_jax.generation import lower_step
from glm_jax.hlo import Collective, collectives, sent_bytes
from glm_jax.model import cached_heads, check_mesh, kv_axes
from glm_jax.sharding import AXES, Rules, abstract, default_sizes, describe, device_kind, mesh, rules
from glm_jax.sharding.mesh import _ordered, across
from glm_jax.targets import chip
from glm_jax.traffic import expected

ROOT = Path(__file__).resolve().parents[1]


# ---- meshes and rules


@pytest.mark.parametrize(
    "devices, want", [(1, (1, 1)), (6, (3, 2)), (7, (7, 1)), (8, (1, 8)), (64, (2, 32)), (96, (3, 32))]
)
def test_a_default_for_any_count(devices, want):
    sizes = default_sizes(devices)
    assert (sizes["data"], sizes["expert"]) == want and sizes["tensor"] == sizes["context"] == 1


def test_a_mesh_of_all_devices_and_one_of_no_devices():
    assert mesh().shape == {"data": 1, "expert": 8, "context": 1, "tensor": 1}
    at = abstract("expert=64,tensor=2")
    assert isinstance(at, AbstractMesh) and at.size == 128 and describe(at) == "expert=64,tensor=2"
    with pytest.raises(UsageError, match="needs 128 devices, there are 8"):
        mesh("expert=64,tensor=2")


def test_a_mesh_of_some_axes_in_another_order():
    devices = np.array(jax.devices()).reshape(2, 4)
    ours = mesh(Mesh(devices, ("tensor", "expert"), axis_types=(AxisType.Auto,) * 2))
    assert ours.axis_names == AXES and describe(ours) == "expert=4,tensor=2"
    assert (ours.devices.reshape(4, 2) == devices.T).all()
    with pytest.raises(UsageError, match="'x'"):
        mesh(Mesh(devices, ("x", "expert")))


def fake(i, slice_index, process):
    """A TPU v4 by what a mesh asks of it: two slices of 2x2 chips with one device each."""
    place = divmod(i % 4, 2)
    return SimpleNamespace(
        id=i, platform="tpu", device_kind="TPU v4", slice_index=slice_index, process_index=process,
        coords=(*place, 0), core_on_chip=0,
    )  # fmt: skip


def test_slices_go_to_the_outer_axes():
    devices = [fake(i, i // 4, i // 4) for i in range(8)]
    at = _ordered(devices, {"data": 2, "expert": 2, "context": 1, "tensor": 2})
    assert at.shape == (2, 2, 1, 2)
    assert [{d.slice_index for d in part.flat} for part in at] == [{0}, {1}]  # data between, the rest within
    at = _ordered(devices, {"data": 1, "expert": 4, "context": 1, "tensor": 2})
    assert [{d.slice_index for d in part.flat} for part in at[0]] == [{0}, {0}, {1}, {1}]
    assert across({"data": 2, "expert": 4, "context": 1, "tensor": 8}, 8) == (2, 4, 1, 1)
    with pytest.raises(UsageError, match="cannot be laid over 3 slices: make one of its axes a multiple of 3"):
        across({"data": 2, "expert": 4, "context": 1, "tensor": 8}, 3)


def test_hosts_go_one_after_the_other():
    devices = [SimpleNamespace(id=i, platform="gpu", process_index=1 - i // 4, slice_index=None) for i in range(8)]
    at = _ordered(devices, {"data": 1, "expert": 2, "context": 1, "tensor": 4})
    assert [{d.process_index for d in part.flat} for part in at[0]] == [{0}, {1}]


def test_axes_in_a_list_are_a_tuple():
    assert Rules(batch=["data", "expert"]) == Rules() and hash(Rules(batch=["data", "expert"])) == hash(Rules())


def test_what_is_left_of_the_width():
    by = rules("fsdp")
    assert by("experts", None, "expert_ffn", "width") == jax.P("expert", None, "tensor", ("data",))
    assert by("heads", None, "width") == jax.P("tensor", None, ("data", "expert"))
    assert rules("ep")("heads", None, "width") == jax.P("tensor", None, None)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"ffn": "expert"}, r"the hidden units of an MLP over 'expert' \(expert=4\) twice: batch=.* and ffn='expert'"),
        ({"experts": "tensor"}, r"the experts' weights over 'tensor' \(tensor=2\) twice: experts=.* and expert_ffn="),
        ({"slots": "expert"}, r"the cache over 'expert' \(expert=4\) twice: batch=.* and slots='expert'"),
        ({"seq": "context"}, r"over 'context' \(context=1\) and not the cache's slots: seq='context' and slots=None"),
        ({"heads": "model"}, "the rule heads names 'model', the mesh has data, expert, context, tensor"),
    ],
)
def test_a_wrong_rule_fails_before_anything_is_made(changes, said):
    before = jax.live_arrays()
    with pytest.raises(UsageError, match=said):
        GLM(tiny(), "expert=4,tensor=2", Rules(**changes))
    assert len(jax.live_arrays()) == len(before)


# ---- KV heads


@pytest.mark.parametrize(
    "at, by, weights, cached",
    [
        ("tensor=8", "ep", ("tensor",), 8),
        ("tensor=16", "ep", (), 16),
        ("tensor=3", "ep", (), 24),
        ("expert=8,tensor=2", "latency", ("expert",), 16),
        ("expert=4,tensor=2", "latency", ("expert", "tensor"), 8),
    ],
)
def test_kv_heads_over_more_devices_than_there_are(at, by, weights, cached):
    config = preset("glm-4.6")
    assert kv_axes(config, abstract(at), rules(by)) == weights
    assert cached_heads(config, abstract(at), rules(by)) == cached


def test_queries_that_would_read_parts_of_kv_heads_are_refused():
    check_mesh(preset("glm-4.6"), abstract("tensor=3"), Rules(vocab=None, ffn=None))
    with pytest.raises(UsageError, match="num_attention_heads 96 does not divide over tensor=9"):
        check_mesh(preset("glm-4.6"), abstract("tensor=9"), Rules(vocab=None, ffn=None, expert_ffn=None))


def test_a_cache_is_written_where_it_is_and_nowhere_else():
    rng = np.random.default_rng(0)
    stack = rng.standard_normal((2, 3, 2, 8, 4), np.float32)
    for T, start in ((1, [0, 7, 8]), (3, [-2, 4, 7]), (5, [-5, 6, 2]), (12, [0, -3, 7])):
        new = rng.standard_normal((3, T, 2, 4), np.float32)
        want = stack.copy()
        for b in range(3):
            for t in range(T):
                if 0 <= start[b] + t < 8:
                    want[1, b, :, start[b] + t] = new[b, t]
        got = jax.jit(write)(stack, new, jnp.int32(1), jnp.asarray(start, jnp.int32))
        np.testing.assert_array_equal(got, want)


# ---- tokens to their experts


def drawn(P, T, k, E, kind, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((P * T, 8)).astype(np.float32)
    ids = np.stack([rng.permutation(E)[:k] for _ in range(P * T)]).astype(np.int32)
    if kind == "all to one":
        ids = np.broadcast_to(np.arange(k, dtype=np.int32), ids.shape).copy()
    if kind == "some to none":
        ids[rng.random(P * T) < 0.5] = E
    return x, ids, rng.random((P * T, k)).astype(np.float32)


@pytest.mark.parametrize("way", ["gathered", "sent"])
@pytest.mark.parametrize("T", [1, 5])
def test_tokens_reach_their_experts(way, T):
    """A toy expert e multiplies by e + 1: the sums, and their gradients, of both ways over eight devices."""
    P, k, E = 8, 3, 16
    at, per = mesh("expert=8"), E // P

    @functools.partial(jax.shard_map, mesh=at, in_specs=jax.P("expert"), out_specs=jax.P("expert"))
    def answers(x, ids, share):
        first = jax.lax.axis_index("expert") * per

        def work(tokens, ids, share, dtype):
            here = (ids >= first) & (ids < first + per)
            return (jnp.where(here, share * (ids + 1), 0).sum(1, keepdims=True) * tokens).astype(dtype)

        if way == "gathered":
            return dispatch.gathered(x, ids, share, work, ("expert",))
        return dispatch.sent(x, ids, share, work, ("expert",), jnp.where(ids < E, ids // per, P))

    @jax.jit
    def run(x, ids, share):
        y, back = jax.vjp(lambda x, share: answers(x, ids, share), x, share)
        return y, *back(2 * y)

    place = functools.partial(jax.device_put, device=jax.NamedSharding(at, jax.P("expert")))
    for kind in ("even", "all to one", "some to none"):
        x, ids, share = drawn(P, T, k, E, kind)
        y, dx, dshare = run(place(x), place(ids), place(share))
        real = ids < E
        factor = np.where(real, share * (ids + 1), 0).sum(1, keepdims=True)
        want = factor * x
        np.testing.assert_allclose(y, want, rtol=1e-6, err_msg=kind)
        np.testing.assert_allclose(dx, 2 * want * factor, rtol=1e-5, err_msg=kind)
        pull = np.where(real, (ids + 1) * (2 * want * x).sum(1, keepdims=True), 0)
        np.testing.assert_allclose(dshare, pull, rtol=2e-5, atol=1e-5, err_msg=kind)


def test_small_groups_are_gathered_and_so_is_a_v5e():
    assert not dispatch.sends(8, "TPU v5") and dispatch.sends(16, "TPU v5")
    assert not dispatch.sends(16, device_kind(abstract("expert=16", chip("v5e").kind)))
    assert dispatch.sends(16, device_kind(abstract("expert=16"))) and device_kind(mesh()) == "cpu"


# ---- the program's collectives are the formula's


def totals(found):
    """(kind, axes) -> how many in a step, and their bytes."""
    table = collections.defaultdict(lambda: [0, 0])
    for c in found:
        table[c.kind, c.axes][0] += c.count
        table[c.kind, c.axes][1] += c.count * c.bytes
    return dict(table)


CASES = [
    ("expert=2,tensor=2", "ep", 16),
    ("data=2,expert=2,tensor=2", "ep", 16),
    ("data=2,expert=2,tensor=2", "ep", 8),
    ("expert=4,tensor=2", "latency", 16),
    ("expert=4,tensor=2", "latency", 1),
    ("tensor=4", "tp", 16),
    ("context=2,tensor=2", "long", 16),
    ("expert=2,context=2", "long", 16),
    ("expert=2,context=2", "long", 8),
]


def same_collectives(at, by, rows, T):
    config = tiny(num_hidden_layers=3, first_k_dense_replace=1, num_nextn_predict_layers=0)
    model = GLM(config, at, by, seed=None)
    got = totals(collectives(lower_step(model, rows, T, 64).compile(), model.mesh))
    assert got == totals(expected(config, model.mesh, model.rules, rows, T, 64, T > 1))
    assert got  # and there are some


@pytest.mark.parametrize(
    "at, by, rows, T",
    [
        ("data=2,expert=2,tensor=2", "ep", 16, 1),
        ("data=2,expert=2,tensor=2", "ep", 16, 32),
        ("expert=4,tensor=2", "latency", 1, 1),
        ("expert=2,context=2", "long", 8, 1),
        ("context=2,tensor=2", "long", 8, 32),
    ],
)
def test_the_collectives_are_those_of_the_formula(at, by, rows, T):
    same_collectives(at, by, rows, T)


@pytest.mark.slow
@pytest.mark.parametrize("at, by, rows", CASES)
@pytest.mark.parametrize("T", [1, 32], ids=["decode", "prefill"])
def test_the_collectives_are_those_of_the_formula_everywhere(at, by, rows, T):
    same_collectives(at, by, rows, T)


def test_collectives_are_counted_and_named():
    at = mesh("data=2,expert=2,tensor=2")

    cut = jax.P(("data", "expert"), "tensor")

    @functools.partial(jax.shard_map, mesh=at, in_specs=cut, out_specs=jax.P())
    def run(x):  # [4, 8] on one device
        def inner(x, _):
            return x + jax.lax.psum(x, "tensor") * 1e-3, None

        def outer(x, _):
            x, _ = jax.lax.scan(inner, x, None, length=3)
            y = jax.lax.all_gather(x, ("data", "expert"), tiled=True)  # [16, 8]
            return x + jax.lax.psum_scatter(y, ("data", "expert"), tiled=True), None

        x, _ = jax.lax.scan(outer, x, None, length=5)
        x = jax.lax.all_to_all(x, "expert", 0, 1, tiled=True)
        x = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
        return jax.lax.psum(x.sum(), ("data", "expert", "tensor"))

    x = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=jax.NamedSharding(at, cut))
    got = totals(collectives(jax.jit(run).lower(x).compile(), at))
    assert got[("all-reduce", ("tensor",))] == [15, 15 * 128]
    assert got[("all-gather", ("data", "expert"))] == [5, 5 * 512]
    assert got[("reduce-scatter", ("data", "expert"))] == [5, 5 * 512]
    assert got[("all-to-all", ("expert",))] == [1, 128]
    assert got[("collective-permute", ("data",))] == [1, 128]
    assert got[("all-reduce", ("data", "expert", "tensor"))] == [1, 4]


def test_bytes_round_a_ring():
    at = abstract("expert=4,tensor=2")
    sent = lambda kind, *axes: sent_bytes(Collective(kind, axes, 800), at)
    assert sent("all-gather", "expert") == sent("reduce-scatter", "expert") == 600
    assert sent("all-reduce", "expert") == 1200 and sent("all-reduce", "expert", "tensor") == 1400
    assert sent("collective-permute", "tensor") == 800


# ---- every preset gives what one device gives

PRESET_CASES = ["expert=4,tensor=2/latency", "expert=2,context=2,tensor=2/long"]  # benchmarks/every_mesh.py has more


@functools.cache
def single():
    model = made("all the parts")
    prompts = [[1, 2, 3], [4] * 9, [7] * 30]
    return np.asarray(model(IDS)[0]), prompts, generate_ids(model, prompts, max_tokens=6)


@pytest.mark.slow
@pytest.mark.parametrize("case", PRESET_CASES)
def test_every_preset_gives_the_same(case):
    """Logits and tokens: three rows and one, which most of these meshes do not divide."""
    want, prompts, tokens = single()
    at, by = case.split("/")
    model = made("all the parts", at, by)
    assert far(model(IDS)[0], want) < 1e-5
    assert generate_ids(model, prompts, max_tokens=6) == tokens
    assert generate_ids(model, prompts[:1], max_tokens=6) == tokens[:1]


def test_long_in_the_quick_suite():
    want, _, _ = single()
    assert far(made("all the parts", "context=2,tensor=2", "long")(IDS)[0], want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", ["data=2,expert=2,tensor=2/fsdp"])  # benchmarks/every_mesh.py has more
def test_every_preset_gives_the_same_gradients(case):
    ids = np.resize(IDS, (5, 16))  # which neither mesh divides
    _, metrics, want = gradients(made("all the parts"), ids, mtp_weight=0.3)
    at, by = case.split("/")
    _, ours, got = gradients(made("all the parts", at, by), ids, mtp_weight=0.3)
    assert np.array_equal(ours["load"], metrics["load"]) and np.array_equal(ours["mtp_load"], metrics["mtp_load"])
    assert (np.asarray(metrics["load"]) == 0).any()  # an expert that no token chose
    check_sums(got, want)


@pytest.mark.slow
def test_sixteen_devices():
    """Tokens sent to sixteen devices' experts, in a process of its own: benchmarks/every_mesh.py has all cases."""
    command = [sys.executable, str(ROOT / "benchmarks/every_mesh.py"), "--devices", "16", "--case", "expert=16/ep"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert row["tokens_equal"] and row["logits_rms"] < 1e-5 and row["gradients_rms"] < 1e-5
