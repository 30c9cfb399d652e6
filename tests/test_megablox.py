"""The TPU kernels, interpreted on a CPU, against NumPy in float64; which devices get them; and, compiled for TPUs
that are not here, memory at full size."""

import itertools
import json
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from test_kernels import BFLOAT16, FLOAT32, SIZES, grouped_in_numpy, normal, routed_densely, routed_in_numpy
from test_triton import BOUND, COMPILED, H100, ROOT, W, X, case, distance, is_tpu, quantised, table_rows, weights

from glm_jax.config import preset
from glm_jax.errors import UsageError
from glm_jax.kernels import choice, experts, grouped_matmul, megablox, routed_experts, rows_at_once
from glm_jax.kernels.megablox import Tile
from glm_jax.sharding import abstract, mesh
from glm_jax.targets import CHIPS, chip


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run on the CPU, with tiles so small that groups need several, and that do not divide the sides."""
    monkeypatch.setattr(megablox, "INTERPRET", True)
    small = {"gate_up": Tile(16, 32, 0, 0), "matmul": Tile(32, 48, 0, 0), "outer": Tile(48, 32, 16, 0)}
    cut = lambda kernel, _, M, *rest: small[kernel]._replace(m=min(M, small[kernel].m))
    monkeypatch.setattr(megablox, "tile", cut)


def routed(*args, **named):
    return routed_experts(*args, implementation="megablox", **named)


@pytest.mark.parametrize("T", [1, 40, *(pytest.param(T, marks=pytest.mark.slow) for T in (3, 130))])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_routed_experts(interpreted, T, dtype, fp8):
    x, ids, share, gate_up, down = case(T, 6, 64, 80, dtype)
    ids[ids == 2] -= 7  # another device's
    (gate_up, a), (down, b) = (quantised(w) if fp8 else (w, np.ones(w.shape[:-1])) for w in (gate_up, down))
    run = jax.jit(routed, static_argnums=6)
    for layer in (0, 1):
        out = run(x, ids, share, gate_up, down, layer, jnp.float32, (a, b) if fp8 else None)
        wide = lambda w, s, at: w[at].astype(np.float64) * s[at][..., None]
        want = routed_in_numpy(x, ids, share, wide(gate_up, a, layer), wide(down, b, layer))
        assert out.dtype == FLOAT32 and distance(out, want) < BOUND[dtype]


@pytest.mark.parametrize("T", [40, pytest.param(7, marks=pytest.mark.slow)])
def test_all_tokens_to_one_expert_and_all_elsewhere(interpreted, T):
    x, ids, share, gate_up, down = case(T, 6, 32, 32, FLOAT32, L=1, k=3)
    run = jax.jit(routed)
    ids[:] = 4
    want = routed_in_numpy(x, ids, share, gate_up[0], down[0])
    assert distance(run(x, ids, share, gate_up, down), want) < BOUND[FLOAT32]
    for stranger in (-1, 6, 2**30, -(2**30)):
        assert not np.asarray(run(x, np.full_like(ids, stranger), share, gate_up, down)).any()


def test_foreign_ids_read_nothing(interpreted):
    """NaN in every matrix that nobody chose, and in what an interpreted kernel has not written."""
    for T in (2, 40):
        x, ids, share, gate_up, down = case(T, 6, 32, 32, FLOAT32, k=3)
        ids -= 4
        ids[0, 0] = 1  # one at least is here
        gate_up[:, 2:], down[:, 2:], gate_up[0], down[0] = (np.nan,) * 4
        out = jax.jit(routed)(x, ids, share, gate_up, down, 1)
        want = routed_in_numpy(x, ids, share, gate_up[1], down[1])
        assert distance(out, want) < BOUND[FLOAT32]


def test_no_tokens(interpreted):
    x, ids, share, gate_up, down = case(1, 3, 32, 16, BFLOAT16, k=2)
    out = jax.jit(routed)(x[:0], ids[:0], share[:0], gate_up, down)
    assert out.shape == (0, 32) and out.dtype == FLOAT32


# With 128 by 48, sides of which a TPU turns `down` around.
@pytest.mark.parametrize(
    "dtype, D, F",
    [
        (FLOAT32, 128, 48),
        (BFLOAT16, 64, 48),
        pytest.param(FLOAT32, 64, 48, marks=pytest.mark.slow),
        pytest.param(BFLOAT16, 128, 48, marks=pytest.mark.slow),
    ],
)
def test_gradients(interpreted, dtype, D, F):
    x, ids, share, gate_up, down = case(40, 7, D, F, dtype, k=3)
    ids[ids == 2] = -1  # nobody here chooses expert 2
    pull = normal((40, D), seed=1)

    def ours(x, share, gate_up, down):
        return (routed(x, jnp.asarray(ids), share, gate_up, down, 1) * pull).sum()

    def theirs(x, share, gate_up, down):
        return (routed_densely(x, ids, share, gate_up[1], down[1]) * pull).sum()

    wide = (a.astype(FLOAT32) for a in (x, share, gate_up, down))
    got = jax.jit(jax.grad(ours, (0, 1, 2, 3)))(x, share, gate_up, down)
    want = jax.jit(jax.grad(theirs, (0, 1, 2, 3)))(*wide)
    for name, g, w in zip(("x", "share", "gate_up", "down"), got, want, strict=True):
        assert g.shape == w.shape and g.dtype == (np.float32 if name == "share" else dtype)
        assert distance(g, np.asarray(w)) < (5e-6 if dtype == FLOAT32 else 1e-2), name
    for g in got[2:]:
        assert not np.asarray(g[0]).any() and not np.asarray(g[1, 2]).any()  # another layer; an empty expert
        assert np.asarray(g[1, 3]).any()


def test_gradients_through_frozen_fp8_weights(interpreted):
    """Of the tokens and the shares, as through the same numbers in float32."""
    x, ids, share, gate_up, down = case(40, 7, 64, 32, FLOAT32, k=3)
    (gate_up, a), (down, b) = quantised(gate_up), quantised(down)
    pull = normal((40, 64), seed=1)

    def ours(x, share):
        args = x, jnp.asarray(ids), share, jnp.asarray(gate_up), jnp.asarray(down), 1, jnp.float32
        return (routed(*args, (jnp.asarray(a), jnp.asarray(b))) * pull).sum()

    wide = lambda w, s: w[1].astype(np.float32) * s[1][..., None]
    theirs = lambda x, share: (routed_densely(x, ids, share, wide(gate_up, a), wide(down, b)) * pull).sum()
    for g, w in zip(*(jax.jit(jax.grad(f, (0, 1)))(x, share) for f in (ours, theirs)), strict=True):
        assert distance(g, np.asarray(w)) < 1e-5


QUICK = ("heights", "nothing")


@pytest.mark.parametrize(
    "sizes", [pytest.param(SIZES[n], id=n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in SIZES]
)
def test_grouped_matmul(interpreted, sizes):
    if sum(sizes) > 600:
        sizes = [n // 4 for n in sizes]
    rows = max(1, sum(sizes) + 9)
    lhs, rhs, pull = normal((rows, 32)), normal((2, len(sizes), 64, 32)), normal((rows, 64), seed=1)
    run = lambda lhs, rhs: grouped_matmul(lhs, rhs, jnp.asarray(sizes, jnp.int32), 1, implementation="megablox")
    out, back = jax.jit(lambda *a: jax.vjp(run, *a))(lhs, rhs)
    np.testing.assert_allclose(np.asarray(out, np.float64), grouped_in_numpy(lhs, rhs[1], sizes), rtol=0, atol=1e-6)
    assert not np.asarray(out)[sum(sizes) :].any()
    dlhs, drhs = jax.jit(back)(jnp.asarray(pull))
    ends = np.cumsum(sizes)
    want = np.stack([pull[a:b].T @ lhs[a:b] for a, b in zip(ends - sizes, ends, strict=True)])
    np.testing.assert_allclose(drhs[1], want, rtol=0, atol=2e-5)
    np.testing.assert_allclose(dlhs, grouped_in_numpy(pull, rhs[1].swapaxes(1, 2), sizes), rtol=0, atol=1e-5)
    assert not np.asarray(drhs[0]).any() and not np.asarray(dlhs)[sum(sizes) :].any()


def test_runs_are_bit_identical_and_the_layer_may_be_traced(interpreted):
    x, ids, share, gate_up, down = case(40, 6, 32, 32, BFLOAT16, k=3)

    @jax.jit
    def layers(x, *rest):
        return jax.lax.scan(lambda x, i: (routed(x, *rest, i, x.dtype), x), x, jnp.arange(2))

    out, first = layers(x, ids, share, gate_up, down)[0], np.asarray(x)
    for layer in (0, 1):
        first = routed_in_numpy(first, ids, share, gate_up[layer], down[layer])
    assert distance(out, first) < 2 * BOUND[BFLOAT16]
    assert all(np.array_equal(out, layers(x, ids, share, gate_up, down)[0]) for _ in range(3))


@pytest.mark.parametrize("T", [24, pytest.param(2, marks=pytest.mark.slow)])
def test_inside_shard_map(interpreted, T):
    """On eight devices, experts over four and their width over two. Interpreted kernels know nothing of what varies
    over devices, so that this is not checked here: lowered, below, it is."""
    x, ids, share, gate_up, down = case(T, 16, 32, 64, FLOAT32, k=3)
    with jax.set_mesh(mesh("expert=4,tensor=2")):
        args = [jax.device_put(a, s) for a, s in zip((x, ids, share, gate_up, down), SPECS, strict=True)]
        out = jax.jit(jax.shard_map(island, in_specs=SPECS, out_specs=P(), check_vma=False))(*args)
    assert distance(out, routed_in_numpy(x, ids, share, gate_up[1], down[1])) < BOUND[FLOAT32]


SPECS = P(), P(), P(), P(None, "expert", None, "tensor", None), P(None, "expert", None, "tensor")


def island(x, ids, share, gate_up, down):
    y = routed(x, ids - jax.lax.axis_index("expert") * down.shape[1], share, gate_up, down, jnp.int32(1))
    return jax.lax.psum(y, ("expert", "tensor"))


@pytest.mark.slow
def test_many_tokens_in_parts(interpreted, monkeypatch):
    monkeypatch.setattr(experts, "GATHERED", 2 * 32 * 8)  # 8 tokens at once
    x, ids, share, gate_up, down = case(21, 5, 32, 32, FLOAT32, k=2)
    rest = tuple(map(jnp.asarray, (ids, share, gate_up, down)))
    run = lambda x: routed(x, *rest, 1)
    want = routed_in_numpy(x, ids, share, gate_up[1], down[1])
    assert distance(jax.jit(run)(x), want) < BOUND[FLOAT32]
    theirs = lambda x: routed_densely(x, ids, share, gate_up[1], down[1]).sum()
    got = jax.jit(jax.grad(lambda x: run(x).sum()))(x)
    assert distance(got, np.asarray(jax.grad(theirs)(x))) < 5e-6


def test_visits_cover_every_row_once():
    for sizes, height in (("uneven", 16), ("heights", 64), ("nothing", 16)):
        sizes, M = SIZES[sizes], sum(SIZES[sizes]) + 3
        for empty in (False, True):
            made = jax.jit(megablox.tiles_of, static_argnums=(1, 2, 4))(np.asarray(sizes), M, height, 5, empty)
            total = int(made.total)
            columns = (np.asarray(a)[:total].tolist() for a in (made.group, made.block, made.start, made.end))
            visits = list(zip(*columns, strict=True))
            rows = [(g, r) for g, b, s, e in visits for r in range(max(s, b * height), min(e, (b + 1) * height))]
            groups = np.repeat(np.arange(len(sizes)), sizes)
            assert rows == [(e, r) for e, r in zip(groups, range(sum(sizes)), strict=True)]
            assert (np.asarray(made.matrix) == np.asarray(made.group) + 5).all() and len(made.matrix) >= total
            assert {g for g, *_ in visits} >= (set(range(len(sizes))) if empty else set(groups))


@pytest.mark.parametrize("name", [name for name, chip in CHIPS.items() if chip.platform == "tpu"])
def test_tiles_fit(name):
    """Twice what comes and goes, and the sums, with a third to spare for what the compiler spills."""
    kernels, sides = ("gate_up", "matmul", "outer"), ((1536, 5120), (1408, 4096), (192, 5120))
    dtypes = (BFLOAT16,) if name == "v4" else (BFLOAT16, FLOAT32)
    for kernel, T, (F, D), dtype in itertools.product(kernels, (1, 64, 4096, 65536), sides, dtypes):
        for N, K in ((2 * F, D),) if kernel == "gate_up" else ((D, F), (F, D)):
            m, n, k, vmem = megablox.tile(kernel, CHIPS[name].kind, T * 8, T / 20, N, K, dtype, dtype)
            wide, matrices = dtype.itemsize, 2 if kernel == "gate_up" else 1
            used = (
                2 * k * (m + n) * wide + m * n * (4 + 2 * wide)
                if kernel == "outer"
                else 2 * k * (m + matrices * n) * wide + matrices * m * n * (4 + 2 * wide)
            )
            assert used < 2 / 3 * vmem, (kernel, T, F, dtype)
            assert n % 128 == 0 or n in (N // matrices, K)


# ---- which devices

WIDE = weights(8, 5120, dtype="float32"), weights(89, 160, 2, 1536, 5120, dtype="float32")


def test_tpus_get_it():
    for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"):
        assert choice.choose("auto", kind, X, [W]) == choice.choose("pallas", kind, X, [W]) == "megablox"
        assert choice.choose("xla", kind, X, [W]) == "xla"
    assert choice.choose("auto", "TPU v5", WIDE[0], [WIDE[1]]) == "megablox"
    fp8 = weights(89, 160, 2, 1536, 5120, dtype="float8_e4m3fn")
    assert choice.choose("auto", "TPU v5", X, [fp8]) == "megablox"


@pytest.mark.parametrize(
    "kind, x, w, words",
    [
        ("cpu", X, W, "it needs a TPU v4 or newer, the device is 'cpu'"),
        (H100, X, W, "it needs a TPU v4 or newer"),
        ("TPU v3", X, W, "it needs a TPU v4 or newer"),
        ("TPU v5", X, weights(1, 4, 2, 24, 5120), "a side of 24, which is no multiple of 16"),
        (
            "TPU v5",
            X,
            weights(1, 4, 2, 1536, 32768),
            "a side of 32,768; of bfloat16 its memory on the chip holds 20,480",
        ),
        ("TPU v4", *WIDE, "a side of 5,120; of float32 its memory on the chip holds 2,048"),
        ("TPU v5", weights(8, 5120, dtype="float16"), W, "it multiplies bfloat16 or float32, not float16"),
        ("TPU v5", weights(8, 5120, dtype="float32"), W, "weights of bfloat16 with states of float32"),
    ],
)
def test_a_forced_kernel_that_cannot_run_says_why(kind, x, w, words, caplog):
    with pytest.raises(UsageError, match="kernels 'megablox' cannot run here") as error:
        choice.choose("megablox", kind, x, [w])
    assert words in str(error.value)
    if kind.startswith("TPU"):
        choice._SAID.clear()
        with caplog.at_level(logging.WARNING, "glm_jax"):
            assert choice.choose("auto", kind, x, [w]) == choice.choose("auto", kind, x, [w]) == "xla"
        assert len(caplog.messages) == 1


def test_a_jax_without_the_lowering(monkeypatch):
    monkeypatch.setattr(megablox, "pltpu", None)
    choice._SAID.clear()
    assert choice.choose("auto", "TPU v5", X, [W]) == "xla"
    with pytest.raises(UsageError, match=r"cannot run here: jax [\d.]+ has no Mosaic lowering for TPUs"):
        choice.choose("megablox", "TPU v5", X, [W])


@pytest.mark.parametrize("x64", [False, True])
def test_lowered_for_a_tpu(x64):
    """Forward and backward, in a shard_map that checks what varies over devices, by the jax that is here; it needs no
    compiler."""
    at = abstract("expert=4,tensor=2", "TPU v5")
    shapes = (300, 128), (300, 2), (300, 2), (2, 8, 2, 128, 128), (2, 8, 128, 128)
    dtypes = "bfloat16", "int32", "float32", "bfloat16", "bfloat16"
    with jax.enable_x64(x64), jax.sharding.use_abstract_mesh(at):
        args = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(at, spec))
            for shape, dtype, spec in zip(shapes, dtypes, SPECS, strict=True)
        ]
        run = lambda x, ids, *rest: jax.shard_map(island, in_specs=SPECS, out_specs=P())(x, ids, *rest).sum()
        lowered = jax.jit(jax.value_and_grad(run, (0, 2, 3, 4))).trace(*args).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") >= 6


# ---- compiled for TPUs that are not here


def is_sound(line):
    """VMEM with some to spare, and no temporary of the size of an expert stack: rows that are looked up, between gate
    and down and answers, never weights. Of 64 tokens they are less than a fiftieth of one layer's."""
    c, of_training = preset(line["model"]), line["step"] == "train"
    F, D, wide = c.moe_intermediate_size, c.hidden_size, 4 if line["weights"] == "float32" else 2
    assert len(line["compiled"]) == (5 if of_training else 2)
    most = megablox.tile("matmul", chip(line["device"]).kind, 1, 1, D, F, jnp.bfloat16, jnp.bfloat16).vmem
    assert all(0 < kernel["vmem"] < 0.75 * most for kernel in line["compiled"].values()), line
    rows = 8 * min(line["tokens"], rows_at_once(8, D))
    width = 2 * D + 8 * F if of_training else 2 * D + F
    assert line["temporary_bytes"] < rows * width * wide + 3 * line["tokens"] * D * 4 + 4 * 2**20, line
    if line["tokens"] <= 64:
        assert line["temporary_bytes"] < 0.02 * line["experts"] * 3 * F * D * wide, line


@pytest.mark.parametrize(
    "line",
    [line for line in COMPILED if is_tpu(line)],
    ids=lambda line: "-".join(map(str, list(line.values())[:7])),
)
def test_what_was_compiled_without_a_tpu(line):
    """benchmarks/compile_kernels.py compiled these, and docs/kernels.md has them."""
    is_sound(line)
    assert all(row in (ROOT / "docs/kernels.md").read_text() for row in table_rows(line))


@pytest.mark.aot
def test_compiled_without_a_tpu():
    pytest.importorskip("libtpu")
    case = "megablox v6e glm-4.6 bfloat16 20 decode 64".split()
    argv = [sys.executable, str(ROOT / "benchmarks/compile_kernels.py"), "--case", *case]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    is_sound(json.loads(done.stdout.splitlines()[-1]))
