"""The GPU kernels through Mosaic, interpreted on a CPU, against NumPy in float64, and searched for races; and lowered
for an H100. Registers, spills and memory at full size are in test_triton.py, with Triton's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from test_kernels import BFLOAT16, FLOAT32, SIZES, grouped_in_numpy, normal, routed_densely, routed_in_numpy
from test_triton import BOUND, E4M3, H100, ROUNDED, case, distance, in_fp8, is_rounded, quantised, weights

from glm_jax import GLM
from glm_jax.config import tiny
from glm_jax.errors import UsageError
from glm_jax.generation import lower_step
from glm_jax.kernels import choice, grouped_matmul, mosaic, routed_experts, routing, triton
from glm_jax.sharding import abstract, mesh

try:
    from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams, force_gpu_interpret_mode
except ImportError:  # a jax before 0.11, whose interpreter multiplies no block the other way round
    InterpretGPUParams = force_gpu_interpret_mode = None

interprets = pytest.mark.skipif(force_gpu_interpret_mode is None, reason="jax's interpreter before 0.11 has no A @ B.T")


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run on the CPU, as on a GPU of two multiprocessors, without a race."""
    monkeypatch.setattr(mosaic, "INTERPRET", True)
    monkeypatch.setattr(choice, "cores", lambda kind: 2)
    with force_gpu_interpret_mode(InterpretGPUParams(detect_races=True)):  # pyright: ignore[reportOptionalCall]
        yield
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    assert not gpu_callbacks.get_races().races_found
    gpu_callbacks.reset_gpu_interpret_mode_state()


@interprets
@pytest.mark.parametrize(
    "form, T",
    [
        ("plain", 1),
        ("plain", 20),
        ("float16", 20),
        pytest.param("fp8", 1, marks=pytest.mark.slow),
        ("fp8", 20),
        ("fp8 activations", 20),
    ],
)
def test_routed_experts(interpreted, T, form):
    """With NaN in every matrix that nobody chose, and ids of other devices."""
    x, ids, share, gate_up, down = case(T, 5, 128, 64, np.dtype("float16") if form == "float16" else BFLOAT16, k=3)
    ids[ids == 2] -= 7
    ids[0, 0] = 1
    wide, scales = (gate_up, down), None
    if "fp8" in form:
        (gate_up, a), (down, b) = quantised(gate_up), quantised(down)
        wide, scales = (
            [w.astype(np.float64) * s[..., None] for w, s in ((gate_up, a), (down, b))],
            tuple(map(jnp.asarray, (a, b))),
        )
    gate_up[0], down[0], gate_up[:, 2], down[:, 2] = (np.nan,) * 4
    activations = E4M3 if form == "fp8 activations" else None
    options = jnp.float32, scales, "mosaic", H100, None, activations
    out = jax.jit(lambda *a: routed_experts(*a, *options))(x, ids, share, gate_up, down, 1)
    want = routed_in_numpy(x, ids, share, wide[0][1], wide[1][1], in_fp8 if activations is not None else lambda r: r)
    assert distance(out, want) < (ROUNDED if activations is not None else BOUND[BFLOAT16])
    if activations is not None:
        rest = "mosaic", H100, None, activations
        assert is_rounded(jax.jit(lambda *a: routed_experts(*a[:6], jnp.float32, a[6], *rest)))


@interprets
def test_degenerate_routing_and_the_same_bits(interpreted):
    """All tokens to one expert, whose rows fill several tiles; nobody here; one expert; no tokens; and twice the
    same."""
    x, ids, share, gate_up, down = case(40, 3, 64, 64, BFLOAT16, L=1, k=2)
    run = jax.jit(lambda *a: routed_experts(*a, implementation="mosaic", device=H100))
    ids[:] = 1, 7
    first = run(x, ids, share, gate_up, down)
    assert distance(first, routed_in_numpy(x, ids, share, gate_up[0], down[0])) < BOUND[BFLOAT16]
    assert np.array_equal(first, run(x, ids, share, gate_up, down))
    assert not np.asarray(run(x, np.full_like(ids, -1), share, gate_up, down)).any()
    one = run(x, ids[:, :1] - 1, share[:, :1], gate_up[:, 1:2], down[:, 1:2])
    assert distance(one, np.asarray(first, np.float64)) < 1e-6
    assert run(x[:0], ids[:0], share[:0], gate_up, down).shape == (0, 64)


@interprets
def test_inside_shard_map(interpreted):
    """Of one device: the interpreter knows no two at once. Of eight, below."""
    x, ids, share, gate_up, down = case(6, 4, 64, 64, BFLOAT16, L=1, k=2)
    specs = (P(), P(), P(), P(None, "expert"), P(None, "expert"))
    run = lambda *a: routed_experts(*a, implementation="mosaic", device=H100)
    with jax.set_mesh(mesh("expert=1")):
        args = [jax.device_put(a, s) for a, s in zip((x, ids, share, gate_up, down), specs, strict=True)]
        out = jax.jit(jax.shard_map(run, in_specs=specs, out_specs=P(), check_vma=False))(*args)
    assert distance(out, routed_in_numpy(x, ids, share, gate_up[0], down[0])) < BOUND[BFLOAT16]


@interprets
def test_fp8_times_fp8(interpreted):
    """Exactly the numbers that were rounded, summed in float32."""
    x, (w, scale) = normal((32, 128), BFLOAT16), quantised(normal((3, 64, 128)))
    x8, of_rows = routing.quantised(jnp.asarray(x))
    off = np.abs(np.asarray(x8, np.float64) * np.asarray(of_rows)[:, None] - x)
    assert (
        off <= np.maximum(np.abs(x.astype(np.float64)) / 16, np.asarray(of_rows)[:, None] * 2.0**-10) * 1.00001
    ).all()
    np.testing.assert_array_equal(np.abs(np.asarray(x8, np.float32)).max(1), 448)
    tiles = mosaic.Tiles(jnp.asarray([2, 1]), jnp.asarray([2]))
    tile = mosaic.tile("matmul", 2, 16, 64, 128, x8.dtype, E4M3, False)
    multiply = jax.jit(
        lambda x, of_rows, w, scale: mosaic.matmul((x, of_rows), w, scale, tiles, tile, dtype=jnp.bfloat16)
    )
    y = multiply(x8, of_rows, w, scale)
    wide = lambda a, s: np.asarray(a, np.float64) * np.asarray(s)[..., None]
    want = [wide(x8, of_rows)[16 * t : 16 * t + 16] @ wide(w, scale)[e].T for t, e in ((0, 2), (1, 1))]
    assert distance(y, np.concatenate(want)) < BOUND[BFLOAT16]


def plain_grouped(name, x, w, scales, row_scales, tiles, tile, dtype, axis, blocks, step, outs, finish):
    """What `mosaic._grouped` promises, without a kernel."""
    of = jnp.repeat(tiles.matrix, tile.m)
    y = jnp.einsum("pk,pnk->pn" if axis else "pk,pkn->pn", x, w[of].astype(x.dtype), preferred_element_type=jnp.float32)
    y = y if scales is None else y * scales[of]
    made = [jnp.full((len(x), width), jnp.nan, dtype) for width in outs]
    made = [m + 0 * y[:, :1].astype(dtype) for m in made]
    there = (jnp.arange(len(x)) < tiles.live * tile.m)[:, None]
    for j in range(outs[0] // step):
        sums = [y[:, j * step + b : j * step + b + tile.n] for b in blocks]
        for which, column, value in finish(*sums):
            at = j * step + column
            made[which] = made[which].at[:, at : at + tile.n].set(jnp.where(there, value, jnp.nan).astype(dtype))
    return made


def plain_outer(a, b, sizes, tile, *, source_a=None, source_b=None, dtype=None):
    a, b = (mosaic._looked_up(*pair, None)[0] for pair in ((a, source_a), (b, source_b)))
    last = jnp.cumsum(-(-sizes // tile.m)) * tile.m
    at = jnp.arange(a.shape[0])[:, None]
    mine = (at < last) & (at >= jnp.concatenate([0 * last[:1], last[:-1]]))
    a, b = (jnp.where(at < last[-1], r, 0) for r in (a, b))  # in no tile: it may be NaN
    return jnp.einsum("pn,pk,pe->enk", a, b, mine.astype(a.dtype), preferred_element_type=jnp.float32).astype(dtype)


def test_inside_the_island_of_eight_devices(monkeypatch):
    """Experts over four and their width over two, forward and backward, with what varies over devices checked. The
    interpreter runs one device at a time, so here the kernels are what they promise."""
    monkeypatch.setattr(mosaic, "INTERPRET", True)
    monkeypatch.setattr(mosaic, "_grouped", plain_grouped)
    monkeypatch.setattr(mosaic, "outer", plain_outer)
    x, ids, share, gate_up, down = case(24, 8, 64, 128, BFLOAT16, k=3)
    pull = normal((24, 64), seed=1)

    def routed(x, share, gate_up, down, ids):
        first = jax.lax.axis_index("expert") * down.shape[1]
        y = routed_experts(x, ids - first, share, gate_up, down, jnp.int32(1), implementation="mosaic", device=H100)
        return jax.lax.psum(y, ("expert", "tensor"))

    stacks = P(None, "expert", None, "tensor", None), P(None, "expert", None, "tensor")
    specs = (P(), P(), *stacks, P())
    with jax.set_mesh(mesh("expert=4,tensor=2")):
        args = [jax.device_put(a, s) for a, s in zip((x, share, gate_up, down, ids), specs, strict=True)]
        island = jax.shard_map(routed, in_specs=specs, out_specs=P())
        out = jax.jit(island)(*args)
        got = jax.jit(jax.grad(lambda *a: (island(*a) * pull).sum(), (0, 1, 2, 3)))(*args)
    assert distance(out, routed_in_numpy(x, ids, share, gate_up[1], down[1])) < BOUND[BFLOAT16]
    theirs = lambda x, share, gate_up, down: (routed_densely(x, ids, share, gate_up[1], down[1]) * pull).sum()
    want = jax.jit(jax.grad(theirs, (0, 1, 2, 3)))(*(a.astype(FLOAT32) for a in (x, share, gate_up, down)))
    for g, w in zip(got, want, strict=True):
        assert distance(g, np.asarray(w)) < 1e-2


@interprets
def test_gradients(interpreted):
    """Of all that has them, in bfloat16; a layer and experts that nobody chose have zeros."""
    x, ids, share, gate_up, down = case(24, 4, 128, 64, BFLOAT16, k=2)
    ids[ids == 2] = -1
    pull = normal((24, 128), seed=1)

    def ours(x, share, gate_up, down):
        return (
            routed_experts(x, jnp.asarray(ids), share, gate_up, down, 1, implementation="mosaic", device=H100) * pull
        ).sum()

    def theirs(x, share, gate_up, down):
        return (routed_densely(x, ids, share, gate_up[1], down[1]) * pull).sum()

    wide = (a.astype(FLOAT32) for a in (x, share, gate_up, down))
    got = jax.jit(jax.grad(ours, (0, 1, 2, 3)))(x, share, gate_up, down)
    want = jax.jit(jax.grad(theirs, (0, 1, 2, 3)))(*wide)
    for name, g, w in zip(("x", "share", "gate_up", "down"), got, want, strict=True):
        assert g.shape == w.shape and g.dtype == (np.float32 if name == "share" else BFLOAT16)
        assert distance(g, np.asarray(w)) < 1e-2, name
    for g in got[2:]:
        assert not np.asarray(g[0]).any() and not np.asarray(g[1, 2]).any() and np.asarray(g[1, 3]).any()


@interprets
def test_gradients_through_frozen_fp8_weights(interpreted):
    x, ids, share, gate_up, down = case(24, 4, 128, 64, BFLOAT16, k=2)
    (gate_up, a), (down, b) = quantised(gate_up), quantised(down)
    pull = normal((24, 128), seed=1)

    def ours(x, share):
        args = x, jnp.asarray(ids), share, jnp.asarray(gate_up), jnp.asarray(down), 1, jnp.float32
        scales = jnp.asarray(a), jnp.asarray(b)
        return (routed_experts(*args, scales, implementation="mosaic", device=H100) * pull).sum()

    wide = lambda w, s: w[1].astype(np.float32) * s[1][..., None]
    theirs = lambda x, share: (routed_densely(x, ids, share, wide(gate_up, a), wide(down, b)) * pull).sum()
    got, want = jax.jit(jax.grad(ours, (0, 1)))(x, share), jax.jit(jax.grad(theirs, (0, 1)))(x.astype(FLOAT32), share)
    for g, w in zip(got, want, strict=True):
        assert distance(g, np.asarray(w)) < 1e-2


@interprets
def test_grouped_matmul_and_its_gradients(interpreted):
    sizes = [30, 0, 19, 1]
    lhs, rhs = normal((52, 64), BFLOAT16), normal((2, 4, 128, 64), BFLOAT16)
    pull = normal((52, 128), seed=1)
    ours = lambda lhs, rhs: grouped_matmul(lhs, rhs, jnp.asarray(sizes), 1, implementation="mosaic", device=H100)
    out, back = jax.jit(lambda *a: jax.vjp(ours, *a))(lhs, rhs)
    np.testing.assert_allclose(np.asarray(out, np.float64), grouped_in_numpy(lhs, rhs[1], sizes), rtol=2**-8, atol=1e-6)
    assert not np.asarray(out)[50:].any()
    group = np.repeat(np.arange(5), [*sizes, 2])
    dense = lambda lhs, rhs: jnp.einsum("mk,enk,me->mn", lhs, rhs[1], jnp.eye(5)[group, :4], precision="highest")
    want = jax.vjp(dense, lhs.astype(FLOAT32), rhs.astype(FLOAT32))[1](pull)
    for g, w in zip(jax.jit(back)(jnp.asarray(pull, jnp.bfloat16)), want, strict=True):
        assert distance(g, np.asarray(w)) < BOUND[BFLOAT16]


def test_rows_are_spaced():
    """Every choice of a group is in a tile of its group, once; the rest of the tiles is nobody's."""
    for sizes, height in zip([*SIZES.values(), [0] * 16, [7] * 16], itertools.cycle((16, 64))):
        M, E = max(1, sum(sizes) + 3), len(sizes)
        ids = np.random.default_rng(0).permutation(np.repeat(np.arange(E + 1), [*sizes, M - sum(sizes)]))

        @jax.jit
        def spaced(ids, E=E, M=M, height=height):
            *rows, counts = routing.by_expert(ids, E)
            made = mosaic.tiles_of(counts, M, height, 5)
            return *mosaic.spaced(*rows, counts, height), made.matrix, made.live[0]

        order, place, matrices, live = map(np.asarray, spaced(ids[:, None]))
        assert live == sum(-(-n // height) for n in sizes) <= len(matrices) == len(order) // height
        tiles = order.reshape(-1, height)
        assert sorted(tiles[:live][tiles[:live] < M]) == np.flatnonzero(ids < E).tolist() and (tiles[live:] == M).all()
        for matrix, tile in zip(matrices[:live], tiles[:live], strict=True):
            assert (ids[tile[tile < M]] == matrix - 5).all()
        mine = np.flatnonzero(ids < E)
        np.testing.assert_array_equal(order[place[mine]], mine)


# ---- which implementation, and what it is compiled to


X, W = weights(8, 5120), weights(89, 160, 2, 1536, 5120)


def test_mosaic_is_for_hopper(monkeypatch):
    for kind, runs in ((H100, True), ("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", False), ("NVIDIA B200", False)):
        assert bool(choice._why_not_mosaic(kind, X, [W])) != runs
    fp8 = weights(89, 160, 2, 1536, 5120, dtype="float8_e4m3fn")
    assert choice.choose("auto", H100, X, [fp8]) == "triton"
    assert choice.choose("auto", H100, X, [fp8], E4M3) == "mosaic"  # who multiplies FP8
    for x, w, words in (
        (weights(8, 96), weights(1, 4, 2, 96, 64), "a side of 96, which is no multiple of 64"),
        (weights(8, 64, dtype="float32"), weights(1, 4, 2, 64, 64), "it multiplies bfloat16 or float16, not float32"),
        (X, weights(1, 4, 2, 64, 64, dtype="float16"), "weights of float16 with states of bfloat16"),
    ):
        with pytest.raises(UsageError, match="kernels 'mosaic' cannot run here") as error:
            choice.choose("mosaic", H100, x, [w])
        assert words in str(error.value)
    with pytest.raises(
        UsageError, match="it needs an NVIDIA GPU of compute capability 9.0, the device is 'NVIDIA B200'"
    ):
        choice.choose("mosaic", "NVIDIA B200", X, [W])
    monkeypatch.setattr(triton, "plgpu", None)
    assert choice.choose("auto", H100, X, [W]) == "mosaic"
    monkeypatch.setattr(mosaic, "plgpu", None)
    with pytest.raises(UsageError, match="has no Mosaic lowering for GPUs"):
        choice.choose("mosaic", H100, X, [W])
    monkeypatch.undo()
    unaddressed = weights(1, 160, 2, 1536, 5120, dtype="float8_e4m3fn")
    assert choice.choose("auto", H100, X, [unaddressed]) == choice.choose("pallas", H100, X, [unaddressed]) == "mosaic"


def test_tiles_divide_and_fit():
    for (N, K), kernel, mean, x, w, train in itertools.product(
        [(1536, 5120), (1408, 4096), (192, 5120), (64, 64)], ("gate_up", "matmul", "outer"), (0.05, 12, 31, 90, 1638),
        (BFLOAT16, E4M3), (BFLOAT16, E4M3), (False, True),
    ):  # fmt: skip
        if x == E4M3 and w != E4M3 or kernel == "outer" and E4M3 in (x, w):
            continue
        made = mosaic.tile(kernel, 132, mean, 2 * N if kernel == "gate_up" else N, K, x, w, train)
        assert N % made.n == 0 and K % made.k == 0 and made.stages >= 3
        assert made.m == mosaic.tile("matmul", 132, mean, K, N, x, w, train).m


@pytest.mark.parametrize("form, x64", [("bfloat16", False), ("fp8", True), ("fp8 activations", False)])
def test_lowered_for_a_gpu(form, x64):
    """As on an H100 by the jax that is here, at which it finds layouts for everything; backward too."""
    device = abstract("data=1", H100).abstract_device
    wide = "bfloat16" if form == "bfloat16" else "float8_e4m3fn"
    args = weights(300, 128), weights(300, 2, dtype="float32")
    stacks = weights(2, 4, 2, 64, 128, dtype=wide), weights(2, 4, 128, 64, dtype=wide)
    scales = (
        None if form == "bfloat16" else (weights(2, 4, 2, 64, dtype="float32"), weights(2, 4, 128, dtype="float32"))
    )
    ids = jax.ShapeDtypeStruct((300, 2), "int32")
    activations = E4M3 if form == "fp8 activations" else None

    def loss(x, share, gate_up, down, ids, scales):
        options = dict(device=H100, implementation="mosaic", activations=activations)
        return routed_experts(x, ids, share, gate_up, down, 1, jnp.float32, scales, **options).sum()

    at = (0, 1, 2, 3) if form == "bfloat16" else (0, 1)
    here = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.enable_x64(x64), jax.sharding.use_abstract_mesh(here):
        lowered = (
            jax.jit(jax.value_and_grad(loss, at)).trace(*args, *stacks, ids, scales).lower(lowering_platforms=("cuda",))
        )
    assert lowered.as_text().count("mosaic_gpu_v2") >= (6 if form == "bfloat16" else 4)


@pytest.mark.parametrize("tokens", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_the_model_is_lowered_with_it(tokens):
    """Experts over four devices and their width over two, where what varies over them is checked."""
    config = tiny(num_hidden_layers=3, hidden_size=128, moe_intermediate_size=128, dtype="bfloat16")
    model = GLM(config, abstract("expert=4,tensor=2", H100), seed=None, kernels="mosaic")
    assert lower_step(model, 4, tokens, 64, "cuda").as_text().count("mosaic_gpu_v2") == 2
