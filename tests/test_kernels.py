"""The routed experts' matmuls against plain NumPy in float64: every layout of rows, gradients, inside a shard_map, and
what they cost in memory at full size."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import P

from glm_jax.kernels import few_rows, grouped_matmul, is_few, routed_experts
from glm_jax.sharding import mesh

FLOAT32: np.dtype = np.dtype("float32")
BFLOAT16: np.dtype = np.dtype(ml_dtypes.bfloat16)


def normal(shape, dtype: np.dtype = FLOAT32, seed=0):
    """Unit-gain noise: standard deviation 1 / sqrt(the last axis)."""
    noise = np.random.default_rng([seed, *shape]).standard_normal(shape) * shape[-1] ** -0.5
    return noise.astype(dtype)


def grouped_in_numpy(lhs, rhs, sizes):
    lhs, rhs = lhs.astype(np.float64), rhs.astype(np.float64)
    out, row = np.zeros((lhs.shape[0], rhs.shape[1])), 0
    for e, size in enumerate(sizes):
        out[row : row + size] = lhs[row : row + size] @ rhs[e].T
        row += size
    return out


def routed_in_numpy(x, ids, share, gate_up, down, rounded=lambda rows: rows):
    x, share, gate_up, down = (a.astype(np.float64) for a in (x, share, gate_up, down))
    out = np.zeros(x.shape)
    for t, k in np.ndindex(*ids.shape):
        if 0 <= (e := ids[t, k]) < gate_up.shape[0]:
            gate, up = gate_up[e] @ rounded(x[t])
            out[t] += share[t, k] * (down[e] @ rounded(gate / (1 + np.exp(-gate)) * up))
    return out


def routed_densely(x, ids, share, gate_up, down):
    """The same in jax, every expert for every token, to be differentiated."""
    einsum = lambda *args: jnp.einsum(*args, precision="highest")
    weight = (share[..., None] * (ids[..., None] == jnp.arange(gate_up.shape[0]))).sum(1)  # [T, E]
    h = einsum("td,ecfd->tecf", x, gate_up)
    y = einsum("tef,edf->ted", jax.nn.silu(h[:, :, 0]) * h[:, :, 1], down)
    return einsum("te,ted->td", weight, y)


def choose(T, E, k, seed=0):
    """Each token's k different experts, and its shares, which add up to one."""
    rng = np.random.default_rng([seed, T, E, k])
    ids = np.stack([rng.permutation(E)[:k] for _ in range(T)]).astype(np.int32)
    share = rng.random((T, k), np.float32)
    return ids, share / share.sum(-1, keepdims=True)


# Groups below, at and above the heights of tiles, several tiles of one group, and lone rows.
SIZES = {
    "one row": [0, 0, 1, 0],
    "one group": [0, 40, 0],
    "uneven": [3, 0, 17, 1, 0, 90, 2],
    "sixteen rows": [1, 2, 4, 5, 3, 1],
    "up to 64 rows": [1, 4, 16, 17, 0, 5, 2, 9],
    "heights": [16, 17, 32, 33, 64, 0, 65, 96, 97, 128, 192, 1, 255],
    "several tiles": [1, 0, 1300, 129, 0, 8, 512, 513, 7],
    "all in the last": [0, 0, 0, 0, 400],
    "nothing": [0, 0, 0],
}


# Each layout in float32, and some of them in bfloat16 too.
IN_BFLOAT16 = ("uneven", "several tiles", "nothing")
LAYOUTS = [pytest.param(sizes, FLOAT32, id=f"{name}-float32") for name, sizes in SIZES.items()]
LAYOUTS += [
    pytest.param(sizes, BFLOAT16, id=f"{name}-bfloat16", marks=() if name in IN_BFLOAT16 else pytest.mark.slow)
    for name, sizes in SIZES.items()
]


@pytest.mark.parametrize("sizes, dtype", LAYOUTS)
@pytest.mark.parametrize("rest", [pytest.param(0, marks=pytest.mark.slow), 9])
def test_grouped_matmul(sizes, rest, dtype):
    rows = max(1, sum(sizes) + rest)
    lhs, rhs = normal((rows, 24), dtype), normal((2, len(sizes), 12, 24), dtype)
    out = jax.jit(grouped_matmul)(lhs, rhs, np.asarray(sizes, np.int32), 1)
    want = grouped_in_numpy(lhs, rhs[1], sizes)
    assert out.dtype == dtype and out.shape == want.shape
    # Sums are in float32 and rounded once: half a unit of bfloat16's last place is 2^-9 of a number.
    rtol = 2**-8 if dtype == BFLOAT16 else 0
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=rtol, atol=1e-6)
    assert not np.asarray(out)[sum(sizes) :].any()  # exactly zero past the last group


@pytest.mark.parametrize("rows", [1, 3, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4, 5, 6, 7))])
@pytest.mark.parametrize("K", [12, 24, 200, 257, 1024, 5120])
def test_few_rows(rows, K):
    assert is_few(rows, FLOAT32)
    x, w = normal((rows, K)), normal((3, 7, K))
    out = jax.jit(few_rows)(x, w, 2)
    want = np.asarray(x, np.float64) @ np.asarray(w[2], np.float64).T
    assert out.dtype == FLOAT32 and out.shape == want.shape
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-6 * K**-0.5)  # numbers of K^-1/2


def test_gradients_of_few_rows():
    x, w, dy = normal((8, 1024)), normal((4, 256, 1024)), normal((8, 256))
    run = lambda x, w, i: (few_rows(x, w, i) * dy).sum()
    dx, dw = jax.jit(jax.grad(run, (0, 1)))(x, w, 2)
    np.testing.assert_allclose(dx, dy @ w[2], rtol=0, atol=1e-5)
    np.testing.assert_allclose(dw[2], dy.T @ x, rtol=0, atol=1e-5)
    assert not np.delete(dw, 2, 0).any()
    # Measured: 2.0 MiB. Differentiated strip by strip it is 4.2, and takes ten times as long to compile.
    used = jax.jit(jax.grad(run, (0, 1))).lower(x, w, 2).compile().memory_analysis()
    assert used is not None and used.temp_size_in_bytes < 3 << 20


def test_what_is_not_few_rows():
    assert not is_few(9, FLOAT32) and not is_few(1, BFLOAT16)


@pytest.mark.parametrize("T", [1, 3, 17, 150, *(pytest.param(T, marks=pytest.mark.slow) for T in (2, 16, 64, 65))])
@pytest.mark.parametrize("E", [pytest.param(5, marks=pytest.mark.slow), 16])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_routed_experts(T, E, dtype):
    x, (ids, share) = normal((T, 24), dtype), choose(T, E, 4)
    gate_up, down = normal((3, E, 2, 12, 24), dtype), normal((3, E, 24, 12), dtype)
    run = jax.jit(routed_experts)
    for layer in (0, 2):
        out = run(x, ids, share, gate_up, down, layer)
        want = routed_in_numpy(x, ids, share, gate_up[layer], down[layer])
        assert out.dtype == FLOAT32 and out.shape == x.shape
        # In bfloat16 gate, up, their product and each expert's answer are rounded, 4e-3 in the mean; one wrong number
        # of the 3,600 would make it 1.7e-2. In float32 nothing is rounded but the sums.
        # The mean of a token or two, 24 numbers each, scatters.
        error = np.asarray(out - want)
        bound = 1e-6 if dtype == FLOAT32 else 5e-3 if T > 2 else 6e-3
        assert np.sqrt((error**2).mean()) < bound * want.std()


@pytest.mark.parametrize("T", [7, 130])
def test_all_tokens_to_one_expert(T):
    x, (_, share) = normal((T, 24)), choose(T, 6, 3)
    gate_up, down = normal((1, 6, 2, 12, 24)), normal((1, 6, 24, 12))
    ids = np.full((T, 3), 4, np.int32)
    out = jax.jit(routed_experts)(x, ids, share, gate_up, down)
    want = routed_in_numpy(x, ids, share, gate_up[0], down[0])
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5 * want.std())


@pytest.mark.parametrize("T", [9, 130])
def test_foreign_ids_add_exactly_nothing(T):
    # Ids below 0 and from E on are another device's experts. With NaN in every weight that nobody chose, a product
    # with the wrong expert, or with any expert, would show, whatever it were multiplied by afterwards.
    x, (ids, share) = normal((T, 24)), choose(T, 6, 3)
    gate_up, down = normal((2, 6, 2, 12, 24)), normal((2, 6, 24, 12))
    ids = ids - 4  # -4 .. 1
    ids[0] = [-1, 6, 2**30]
    ids[1] = [1, 7, -(2**30)]
    gate_up[:, 2:], down[:, 2:], gate_up[0], down[0] = (np.nan,) * 4
    out = np.asarray(jax.jit(routed_experts)(x, ids, share, gate_up, down, 1))
    want = routed_in_numpy(x, ids, share, gate_up[1], down[1])
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5 * want.std())
    assert not out[0].any()
    assert out[1].any()
    other = np.where((ids < 0) | (ids > 5), 99, ids)  # other strangers, and the same to the bit
    assert np.array_equal(out, jax.jit(routed_experts)(x, other, share, gate_up, down, 1))


@pytest.mark.parametrize("T", [9, 130])
def test_runs_are_bit_identical(T):
    x, (ids, share) = normal((T, 24), BFLOAT16), choose(T, 6, 3)
    gate_up, down = normal((1, 6, 2, 12, 24), BFLOAT16), normal((1, 6, 24, 12), BFLOAT16)
    run = jax.jit(routed_experts)
    first = np.asarray(run(x, ids, share, gate_up, down))
    assert all(np.array_equal(first, run(x, ids, share, gate_up, down)) for _ in range(3))


@pytest.mark.parametrize("T", [9, 130])
def test_gradients(T):
    x, (ids, share) = normal((T, 24)), choose(T, 7, 3)
    ids[ids == 2] = -1  # nobody here chooses expert 2, and some choices are foreign
    gate_up, down, pull = normal((2, 7, 2, 12, 24)), normal((2, 7, 24, 12)), normal((T, 24), seed=1)

    def ours(x, share, gate_up, down):
        return (routed_experts(x, jnp.asarray(ids), share, gate_up, down, 1) * pull).sum()

    def theirs(x, share, gate_up, down):
        return (routed_densely(x, ids, share, gate_up[1], down[1]) * pull).sum()

    got, want = (jax.jit(jax.grad(f, (0, 1, 2, 3)))(x, share, gate_up, down) for f in (ours, theirs))
    for name, g, w in zip(("x", "share", "gate_up", "down"), got, want, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        assert np.abs(g - w).max() < 1e-5 * np.asarray(w).std(), name
    for g in got[2:]:
        assert not np.asarray(g[0]).any() and not np.asarray(g[1, 2]).any()  # another layer; an empty expert
        assert np.asarray(g[1, 3]).any()


@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [100, 0, 190, 3]], ids=["rows", "tiles"])
def test_gradients_of_grouped_matmul(sizes):
    rows = sum(sizes) + 2
    lhs, rhs, pull = normal((rows, 24)), normal((2, 4, 12, 24)), normal((rows, 12), seed=1)
    group = np.repeat(np.arange(5), [*sizes, 2])
    dense = lambda lhs, rhs: jnp.einsum("mk,enk,me->mn", lhs, rhs[1], jnp.eye(5)[group, :4], precision="highest")
    ours = lambda lhs, rhs: grouped_matmul(lhs, rhs, jnp.asarray(sizes), 1)
    got, want = (jax.jit(jax.grad(lambda *a, f=f: (f(*a) * pull).sum(), (0, 1)))(lhs, rhs) for f in (ours, dense))
    for g, w in zip(got, want, strict=True):
        assert np.abs(g - w).max() < 1e-5 * np.asarray(w).std()
    assert not np.asarray(got[0][-2:]).any() and not np.asarray(got[1][1, 1]).any()


def test_a_row_that_is_not_finite_stays_out_of_other_gradients():
    lhs, rhs = normal((4, 24)), normal((1, 2, 12, 24))
    lhs[3] = np.inf  # past the last group
    ours = lambda rhs: grouped_matmul(jnp.asarray(lhs), rhs, jnp.asarray([2, 1]))[:2].sum()
    assert np.isfinite(jax.jit(jax.grad(ours))(rhs)).all()


@pytest.mark.parametrize(
    "axes, T",
    [("expert=4,tensor=2", 6), ("expert=8", 100), ("tensor=4", 6), ("data=2,expert=2,tensor=2", 100)]
    + [
        pytest.param(axes, T, marks=pytest.mark.slow)
        for axes, T in (("expert=4,tensor=2", 100), ("expert=8", 6), ("tensor=4", 100), ("data=2,expert=2,tensor=2", 6))
    ],
)
def test_inside_shard_map(axes, T):
    # As the model calls it: experts over `expert`, their width over `tensor`, tokens whole. check_vma is on: a result
    # that is not the same on every device of an axis that out_specs leaves out is an error while tracing.
    made = mesh(axes)
    assert isinstance(made, jax.sharding.Mesh)
    x, (ids, share) = normal((T, 24)), choose(T, 16, 3)
    gate_up, down, pull = normal((2, 16, 2, 16, 24)), normal((2, 16, 24, 16)), normal((T, 24), seed=1)

    def routed(x, ids, share, gate_up, down):
        first = jax.lax.axis_index("expert") * down.shape[1]
        y = routed_experts(x, ids - first, share, gate_up, down, jnp.int32(1))
        return jax.lax.psum(y, ("expert", "tensor"))

    tokens, weights = P("data", None), (P(None, "expert", None, "tensor", None), P(None, "expert", None, "tensor"))
    specs = (tokens, tokens, tokens, *weights)
    on_mesh = jax.shard_map(routed, mesh=made, in_specs=specs, out_specs=tokens)

    def value_and_gradients(f, pull):
        def run(x, share, gate_up, down):
            y = f(x, share, gate_up, down)
            return (y * pull).sum(), y

        return jax.jit(jax.value_and_grad(run, (0, 1, 2, 3), has_aux=True))

    place = lambda a, spec: jax.device_put(a, jax.NamedSharding(made, spec))
    with jax.set_mesh(made):
        x_, ids_, *rest = (place(a, spec) for a, spec in zip((x, ids, share, gate_up, down), specs, strict=True))
        ours = lambda x, share, *weights: on_mesh(x, ids_, share, *weights)
        (_, y), got = value_and_gradients(ours, place(pull, tokens))(x_, *rest)
    theirs = lambda x, share, gate_up, down: routed_densely(x, ids, share, gate_up[1], down[1])
    _, want = value_and_gradients(theirs, pull)(x, share, gate_up, down)
    want_y = routed_in_numpy(x, ids, share, gate_up[1], down[1])
    assert np.abs(np.asarray(y) - want_y).max() < 1e-5 * want_y.std()
    for name, g, w in zip(("x", "share", "gate_up", "down"), got, want, strict=True):
        assert np.abs(np.asarray(g) - np.asarray(w)).max() < 1e-5 * np.asarray(w).std(), name


# One layer of GLM-4.6: 160 experts of 90 MiB in float32, 45 in bfloat16, so 7,200 MiB a layer.
E, F, D = 160, 1536, 5120


@pytest.mark.parametrize("T", [1, 64])
def test_no_copy_of_the_experts(T):
    shape = lambda *dims, dtype="bfloat16": jax.ShapeDtypeStruct(dims, dtype)
    tokens = shape(T, D), shape(T, 8, dtype="int32"), shape(T, 8, dtype="float32")
    args = *tokens, shape(2, E, 2, F, D), shape(2, E, D, F), shape(dtype="int32")
    used = jax.jit(routed_experts).lower(*args).compile().memory_analysis()
    assert used is not None and used.argument_size_in_bytes > 2 * 7200 << 20
    # Measured on CPU: 60 and 93 MiB. 60 are one expert's gate and up in float32, since a CPU multiplies no bfloat16;
    # the rest are the rows in their tiles. A slice of the stack would be 7,200.
    assert used.temp_size_in_bytes < 200 << 20


@pytest.mark.parametrize("T", [1, 64])
def test_no_ragged_dot(T):
    # jax.lax.ragged_dot on CPU and GPU multiplies every row with every group's matrix.
    (ids, share), x = choose(T, 16, 8), normal((T, 24))
    weights = normal((1, 16, 2, 12, 24)), normal((1, 16, 24, 12))
    scalar = lambda x, share, *w: routed_experts(x, jnp.asarray(ids), share, *w).sum()
    assert "ragged" not in str(jax.make_jaxpr(jax.grad(scalar, (0, 1, 2, 3)))(x, share, *weights))
    grouped = jax.make_jaxpr(grouped_matmul)(normal((T, 24)), normal((1, 16, 12, 24)), np.full(16, T // 16, np.int32))
    assert "ragged" not in str(grouped)
