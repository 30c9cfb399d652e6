"""The GPU kernels through Triton, interpreted on a CPU, against NumPy in float64; which implementation is chosen; and,
compiled for GPUs that are not here, registers, spills, instructions and memory at full size."""

import inspect
import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import P
from test_kernels import (
    BFLOAT16,
    FLOAT32,
    LAYOUTS,
    SIZES,
    choose,
    grouped_in_numpy,
    normal,
    routed_densely,
    routed_in_numpy,
)

from glm_jax.config import preset
from glm_jax.errors import UsageError
from glm_jax.kernels import choice, experts, grouped_matmul, megablox, routed_experts, rows_at_once, tiles, triton
from glm_jax.kernels.mosaic import tile as mosaic_tile
from glm_jax.kernels.routing import quantised as quantised_rows
from glm_jax.kernels.triton import Tile
from glm_jax.sharding import abstract, mesh

ROOT = Path(__file__).resolve().parents[1]
E4M3: np.dtype = np.dtype(ml_dtypes.float8_e4m3fn)
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run on the CPU, with tiles so small that groups need several."""
    monkeypatch.setattr(triton, "INTERPRET", True)
    small = {"gate_up": Tile(16, 32, 32, 4, 2), "matmul": Tile(32, 16, 32, 4, 2), "outer": Tile(16, 32, 16, 4, 2)}
    monkeypatch.setattr(tiles, "tile", lambda kernel, *_: small[kernel])


def quantised(w):
    """FP8 numbers and the scale of each output channel, its largest number over 448; a row of zeros has scale 1."""
    scale = np.abs(w.astype(np.float32)).max(-1) / 448
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return (w.astype(np.float32) / scale[..., None]).astype(E4M3), scale


def in_fp8(rows):
    """Rows as the numbers that they are rounded to with a scale each."""
    stored, scale = quantised(rows)
    return stored.astype(np.float64) * scale[..., None]


def distance(got, want):
    return np.sqrt(((np.asarray(got, np.float64) - want) ** 2).mean()) / want.std()


def case(T, E, D, F, dtype, L=2, k=4):
    seed = [int(n) for n in np.random.SeedSequence().generate_state(1)]  # fresh every time; the numbers have bounds
    print("seed", seed)  # shown where a test fails
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((T, D)).astype(dtype)
    gate_up = (rng.standard_normal((L, E, 2, F, D)) * D**-0.5).astype(dtype)
    down = (rng.standard_normal((L, E, D, F)) * F**-0.5).astype(dtype)
    ids, share = choose(T, E, k, seed[0])
    return x, ids, share, gate_up, down


# In bfloat16 what is between gate and down and each expert's answer are rounded: 2 to 3e-3 in the mean.
FLOAT16 = np.dtype("float16")
BOUND = {FLOAT32: 2e-6, BFLOAT16: 5e-3, FLOAT16: 1e-3}
# Where what is between gate and down differs in bfloat16, it may round to the next FP8 number: 1.7e-2 in the mean.
# Tokens that were not rounded would be 4.4e-2 away; that what follows is rounded too, `is_rounded` sees.
ROUNDED = 3e-2


def is_rounded(run, dtype=BFLOAT16):
    """Whether what is between gate and down is rounded to FP8: through a `down` of ones on its diagonal it comes out as
    it is, and to round it again changes nothing; of other numbers that would be 2.6e-2."""
    x, ids, share, gate_up, _ = case(24, 3, 128, 128, dtype, L=1, k=1)
    (gate_up, a), one = quantised(gate_up), np.ones((1, 3, 128), np.float32)
    down = np.broadcast_to(np.eye(128), (1, 3, 128, 128)).astype(E4M3)
    y = np.asarray(run(x, ids, np.ones_like(share), gate_up, down, 0, (a, one)), np.float64)
    return distance(in_fp8(y), y) < 5e-3


@pytest.mark.parametrize("T", [1, 40, *(pytest.param(T, marks=pytest.mark.slow) for T in (3, triton.FEW + 1))])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, pytest.param(FLOAT16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_routed_experts(interpreted, T, dtype, fp8):
    x, ids, share, gate_up, down = case(T, 6, 64, 96, dtype)
    ids[ids == 2] -= 7  # another device's
    (gate_up, a), (down, b) = (quantised(w) if fp8 else (w, np.ones(w.shape[:-1])) for w in (gate_up, down))
    run = jax.jit(lambda *args: routed_experts(*args, implementation="triton"), static_argnums=6)
    for layer in (0, 1):
        out = run(x, ids, share, gate_up, down, layer, jnp.float32, (a, b) if fp8 else None)
        wide = lambda w, s, at: w[at].astype(np.float64) * s[at][..., None]
        want = routed_in_numpy(x, ids, share, wide(gate_up, a, layer), wide(down, b, layer))
        assert out.dtype == FLOAT32 and distance(out, want) < BOUND[dtype]


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_fp8_activations_where_fp8_is_not_multiplied(interpreted, implementation):
    """Rows are rounded all the same (W8A8), and gradients pass through."""
    x, ids, share, gate_up, down = case(24, 5, 128, 64, BFLOAT16, L=1, k=3)
    (gate_up, a), (down, b) = (tuple(map(jnp.asarray, quantised(w))) for w in (gate_up, down))
    ids = jnp.asarray(ids)
    run = lambda x, share, of: routed_experts(
        x, ids, share, gate_up, down, 0, jnp.float32, (a, b), implementation, activations=of
    )
    wide = lambda w, s: np.asarray(w[0], np.float64) * np.asarray(s[0])[..., None]
    want = routed_in_numpy(x, np.asarray(ids), share, wide(gate_up, a), wide(down, b), in_fp8)
    assert distance(jax.jit(run, static_argnums=2)(x, share, E4M3), want) < ROUNDED
    of = lambda **rest: jax.jit(
        lambda *a: routed_experts(*a[:6], jnp.float32, a[6], implementation=implementation, **rest)
    )
    assert is_rounded(of(activations=E4M3)) and not is_rounded(of())
    back = jax.jit(jax.grad(lambda x, share, of: run(x, share, of).sum(), (0, 1)), static_argnums=2)
    for rounded, plain in zip(back(x, share, E4M3), back(x, share, None), strict=True):
        # Of the same weights, gate and up that are some per cent off: no gradient goes through a rounding, nor is lost.
        assert distance(rounded, np.asarray(plain, np.float64)) < 0.1 and np.asarray(rounded).any()
    with pytest.raises(UsageError, match="activations of bfloat16; they are float8_e4m3fn, with weights of that"):
        run(jnp.asarray(x), jnp.asarray(share), jnp.bfloat16)


def test_fp8_weights_are_the_weights_within_their_rounding():
    """GLM.md 8, row 24: 2.6 % of one linear layer's output, here for Gaussian weights."""
    x, w = normal((64, 512)), normal((1, 1, 256, 512))
    stored, scale = quantised(w)
    y = jax.jit(grouped_matmul)(x, stored, np.asarray([64]), scales=scale)
    assert 0.02 < distance(y, x.astype(np.float64) @ w[0, 0].T) < 0.03


@pytest.mark.parametrize("T", [7, 40])
def test_all_tokens_to_one_expert_and_all_elsewhere(interpreted, T):
    x, ids, share, gate_up, down = case(T, 6, 32, 32, FLOAT32, L=1, k=3)
    run = jax.jit(lambda *args: routed_experts(*args, implementation="triton"))
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
        out = jax.jit(lambda *args: routed_experts(*args, implementation="triton"))(x, ids, share, gate_up, down, 1)
        want = routed_in_numpy(x, ids, share, gate_up[1], down[1])
        assert distance(out, want) < BOUND[FLOAT32]


def test_rows_of_zeros_and_of_tiny_numbers():
    """Have a scale of 1 and are zeros: 1e-36 over 448 is no normal float32, and on most devices 0."""
    x = jnp.asarray([[0.0] * 4, [1e-36] * 4, [1e-30, 0, 0, -1e-30], [3, -1, 0.5, 0]], jnp.bfloat16)
    x8, scale = jax.jit(quantised_rows)(x)
    assert scale[0] == scale[1] == 1 and not np.asarray(x8[:2], np.float32).any()
    np.testing.assert_allclose(np.asarray(x8, np.float32)[2:] * scale[2:, None], np.asarray(x, np.float32)[2:], 1 / 16)


@pytest.mark.slow  # not jitted, as they come: every operation is compiled by itself
def test_numpy_arrays_and_no_experts(interpreted):
    x, ids, share, gate_up, down = case(7, 4, 32, 16, FLOAT32, k=2)
    want = routed_in_numpy(x, ids, share, gate_up[1], down[1])
    for implementation in ("xla", "triton"):
        unchecked = inspect.unwrap(routed_experts)  # the tests' hook takes jax's arrays only
        run = lambda x, share: unchecked(x, ids, share, gate_up, down, 1, implementation=implementation)  # noqa: B023
        assert distance(run(x, share), want) < BOUND[FLOAT32]
        assert np.isfinite(jax.grad(lambda x: run(x, share).sum())(jnp.asarray(x))).all()  # noqa: B023
        assert not np.asarray(unchecked(x, ids[:, :0], share[:, :0], gate_up, down)).any()


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_no_tokens(interpreted, implementation):
    x, ids, share, gate_up, down = case(1, 3, 32, 16, BFLOAT16, k=2)
    x, ids, share = x[:0], ids[:0], share[:0]
    out = jax.jit(lambda *a: routed_experts(*a, implementation=implementation))(x, ids, share, gate_up, down)
    assert out.shape == (0, 32) and out.dtype == FLOAT32
    multiply = jax.jit(lambda *a: grouped_matmul(*a, implementation=implementation))
    assert multiply(x[:, :16], normal((1, 3, 32, 16), BFLOAT16), np.zeros(3, np.int32)).shape == (0, 32)


@pytest.mark.parametrize("dtype", [FLOAT32, pytest.param(BFLOAT16, marks=pytest.mark.slow)], ids=str)
def test_gradients(interpreted, dtype):
    x, ids, share, gate_up, down = case(40, 7, 64, 32, dtype, k=3)
    ids[ids == 2] = -1  # nobody here chooses expert 2
    pull = normal((40, 64), seed=1)

    def ours(x, share, gate_up, down):
        return (routed_experts(x, jnp.asarray(ids), share, gate_up, down, 1, implementation="triton") * pull).sum()

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


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_gradients_through_frozen_fp8_weights(interpreted, implementation):
    """Of the tokens and the shares, as through the same numbers in float32."""
    x, ids, share, gate_up, down = case(40, 7, 64, 32, FLOAT32, k=3)
    (gate_up, a), (down, b) = quantised(gate_up), quantised(down)
    pull = normal((40, 64), seed=1)

    def ours(x, share):
        args = x, jnp.asarray(ids), share, jnp.asarray(gate_up), jnp.asarray(down), 1, jnp.float32
        return (routed_experts(*args, (jnp.asarray(a), jnp.asarray(b)), implementation=implementation) * pull).sum()

    wide = lambda w, s: w[1].astype(np.float32) * s[1][..., None]
    theirs = lambda x, share: (routed_densely(x, ids, share, wide(gate_up, a), wide(down, b)) * pull).sum()
    for g, w in zip(*(jax.jit(jax.grad(f, (0, 1)))(x, share) for f in (ours, theirs)), strict=True):
        # What goes back is rounded to the tokens' dtype once it has met the scales.
        assert distance(g, np.asarray(w)) < 1e-5


@pytest.mark.parametrize("sizes, dtype", LAYOUTS)
def test_grouped_matmul(interpreted, sizes, dtype):
    if sum(sizes) > 600:
        sizes = [n // 4 for n in sizes]
    rows = max(1, sum(sizes) + 9)
    lhs, rhs = normal((rows, 32), dtype), normal((2, len(sizes), 64, 32), dtype)
    out = jax.jit(lambda *a: grouped_matmul(*a, implementation="triton"))(lhs, rhs, np.asarray(sizes, np.int32), 1)
    want = grouped_in_numpy(lhs, rhs[1], sizes)
    rtol = 2**-8 if dtype == BFLOAT16 else 0
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=rtol, atol=1e-6)
    assert not np.asarray(out)[sum(sizes) :].any()


def test_gradients_of_grouped_matmul(interpreted):
    sizes = [30, 0, 19, 1]
    lhs, rhs, pull = normal((52, 32)), normal((2, 4, 64, 32)), normal((52, 64), seed=1)
    group = np.repeat(np.arange(5), [*sizes, 2])
    dense = lambda lhs, rhs: jnp.einsum("mk,enk,me->mn", lhs, rhs[1], jnp.eye(5)[group, :4], precision="highest")
    ours = lambda lhs, rhs: grouped_matmul(lhs, rhs, jnp.asarray(sizes), 1, implementation="triton")
    got, want = (jax.jit(jax.grad(lambda *a, f=f: (f(*a) * pull).sum(), (0, 1)))(lhs, rhs) for f in (ours, dense))
    for g, w in zip(got, want, strict=True):
        assert distance(g, np.asarray(w)) < 5e-6
    assert not np.asarray(got[0][-2:]).any() and not np.asarray(got[1][1, 1]).any()


def test_runs_are_bit_identical(interpreted):
    x, ids, share, gate_up, down = case(40, 6, 32, 32, BFLOAT16, k=3)
    run = jax.jit(lambda *args: routed_experts(*args, implementation="triton"))
    first = np.asarray(run(x, ids, share, gate_up, down))
    assert all(np.array_equal(first, run(x, ids, share, gate_up, down)) for _ in range(3))


@pytest.mark.parametrize("T", [2, 24])
def test_inside_shard_map(interpreted, T):
    """On eight devices, experts over four and their width over two. Interpreted kernels know nothing of what varies
    over devices, so that this is not checked here: compiled, in the model, it is (test_plan.py)."""
    x, ids, share, gate_up, down = case(T, 16, 32, 64, FLOAT32, k=3)

    def routed(x, ids, share, gate_up, down):
        first = jax.lax.axis_index("expert") * down.shape[1]
        y = routed_experts(x, ids - first, share, gate_up, down, jnp.int32(1), implementation="triton")
        return jax.lax.psum(y, ("expert", "tensor"))

    weights = P(None, "expert", None, "tensor", None), P(None, "expert", None, "tensor")
    with jax.set_mesh(mesh("expert=4,tensor=2")):
        specs = (P(), P(), P(), *weights)
        on_mesh = jax.shard_map(routed, in_specs=specs, out_specs=P(), check_vma=False)
        args = [jax.device_put(a, s) for a, s in zip((x, ids, share, gate_up, down), specs, strict=True)]
        out = jax.jit(on_mesh)(*args)
    assert distance(out, routed_in_numpy(x, ids, share, gate_up[1], down[1])) < BOUND[FLOAT32]


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [triton, megablox], ids=["triton", "megablox"])
def test_gradients_inside_shard_map(interpreted, monkeypatch, kernels):
    """On eight devices too, where the shares of a replicated token's gradient are summed by hand."""
    monkeypatch.setattr(kernels, "INTERPRET", True)
    x, ids, share, gate_up, down = case(24, 16, 32, 64, FLOAT32, k=3)
    pull = normal((24, 32), seed=1)
    name = kernels.__name__.rsplit(".", 1)[-1]

    def gradients(x, share, gate_up, down, ids, pull):
        mine = ids - jax.lax.axis_index("expert") * down.shape[1]
        run = lambda x, *rest: routed_experts(x, mine, *rest, jnp.int32(1), implementation=name)
        dx, dshare, *own = jax.vjp(run, x, share, gate_up, down)[1](pull)
        return jax.lax.psum((dx, dshare), ("expert", "tensor")), tuple(own)

    stacks = P(None, "expert", None, "tensor", None), P(None, "expert", None, "tensor")
    specs = (P(), P(), *stacks, P(), P())
    with jax.set_mesh(mesh("expert=4,tensor=2")):
        on_mesh = jax.shard_map(gradients, in_specs=specs, out_specs=((P(), P()), stacks), check_vma=False)
        args = zip((x, share, gate_up, down, ids, pull), specs, strict=True)
        (dx, dshare), own = jax.jit(on_mesh)(*[jax.device_put(a, s) for a, s in args])
    theirs = lambda x, share, gate_up, down: (routed_densely(x, ids, share, gate_up[1], down[1]) * pull).sum()
    want = jax.jit(jax.grad(theirs, (0, 1, 2, 3)))(x, share, gate_up, down)
    for g, w in zip((dx, dshare, *own), want, strict=True):
        assert distance(g, np.asarray(w)) < 5e-6


def test_every_e4m3_number_from_its_byte():
    """For GPUs that do not know FP8: exactly, subnormals, both zeros and NaN too."""
    codes = np.arange(256, dtype=np.uint8)
    got, want = (np.asarray(a, np.float32) for a in (triton._widened(codes, BFLOAT16), codes.view(E4M3)))
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


def test_bytes_on_gpus_that_do_not_know_fp8(interpreted, monkeypatch):
    monkeypatch.setattr(choice, "capability", lambda kind: (8, 0))
    x, ids, share, gate_up, down = case(9, 6, 64, 32, BFLOAT16)
    (gate_up, a), (down, b) = quantised(gate_up), quantised(down)
    args = x, ids, share, gate_up, down, 0, jnp.float32, (a, b)
    run = lambda *args: routed_experts(*args[:5], 0, jnp.float32, args[5], implementation="triton")
    assert "uint8" in str(jax.make_jaxpr(run)(*args[:5], args[7]))
    want = routed_in_numpy(x, ids, share, gate_up[0] * a[0][..., None], down[0] * b[0][..., None])
    assert distance(jax.jit(run)(*args[:5], args[7]), want) < BOUND[BFLOAT16]


# ---- which implementation


def weights(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


X, W = weights(8, 5120), weights(89, 160, 2, 1536, 5120)


def test_auto_takes_the_kernel_on_gpus_and_xla_elsewhere():
    for kind in (
        H100,
        A100,
        "NVIDIA L4",
        "NVIDIA B200",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA RTX 6000 Ada Generation",
        "NVIDIA GH200 480GB",
    ):
        assert choice.choose("auto", kind, X, [W]) == choice.choose("pallas", kind, X, [W]) == "triton"
        assert choice.choose("xla", kind, X, [W]) == "xla"
    for kind in ("cpu", ""):
        assert choice.choose("auto", kind, X, [W]) == "xla"


def test_a_jax_without_the_lowering(monkeypatch):
    monkeypatch.setattr(triton, "plgpu", None)
    choice._SAID.clear()
    assert choice.choose("auto", H100, X, [W]) == "mosaic"  # as complete, but for Hopper only
    assert choice.choose("auto", A100, X, [W]) == "xla"
    with pytest.raises(UsageError, match=r"cannot run here: jax [\d.]+ has no Triton lowering"):
        choice.choose("triton", H100, X, [W])


def test_the_kind_of_device(monkeypatch):
    """Of the mesh that is set, else of the arrays, else of jax's default."""
    assert choice.kind_here(np.zeros(3)) == choice.kind_here(jnp.zeros(3)) == "cpu"
    array = jnp.zeros(3)
    monkeypatch.setattr(jax, "devices", lambda *_: [SimpleNamespace(device_kind=H100)])
    assert choice.kind_here(np.zeros(3)) == H100 and choice.kind_here(array) == "cpu"
    with jax.sharding.use_abstract_mesh(abstract("expert=4", "TPU v5")):
        assert choice.kind_here(array) == "TPU v5"


def test_the_commands_know_all_implementations():
    said = subprocess.run([sys.executable, "-m", "glm_jax", "generate", "--help"], capture_output=True, text=True)
    assert f"--kernels {{{','.join(choice.IMPLEMENTATIONS)}}}" in " ".join(said.stdout.split())


@pytest.mark.parametrize("x64", [False, True])
def test_lowered_for_a_gpu(x64):
    """As on an H100, forward and backward, by the jax that is here; it needs no compiler."""
    device = abstract("data=1", H100).abstract_device
    args = weights(300, 128), weights(300, 2, dtype="float32"), weights(2, 4, 2, 64, 128), weights(2, 4, 128, 64)
    ids = jax.ShapeDtypeStruct((300, 2), "int32")

    def loss(x, share, gate_up, down, ids):
        return routed_experts(x, ids, share, gate_up, down, 1, device=H100).sum()

    with jax.enable_x64(x64), jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))).trace(*args, ids).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@__gpu$xla.gpu.triton") >= 5


def test_many_tokens_in_parts(interpreted, monkeypatch):
    monkeypatch.setattr(experts, "GATHERED", 2 * 32 * 8)  # 8 tokens at once
    x, ids, share, gate_up, down = case(21, 5, 32, 32, FLOAT32, k=2)
    rest = tuple(map(jnp.asarray, (ids, share, gate_up, down)))
    run = lambda x: routed_experts(x, *rest, 1, implementation="triton")
    want = routed_in_numpy(x, ids, share, gate_up[1], down[1])
    assert distance(jax.jit(run)(x), want) < BOUND[FLOAT32]
    theirs = lambda x: routed_densely(x, ids, share, gate_up[1], down[1]).sum()
    got = jax.jit(jax.grad(lambda x: run(x).sum()))(x)
    assert distance(got, np.asarray(jax.grad(theirs)(x))) < 5e-6


@pytest.mark.parametrize(
    "kind, x, w, words",
    [
        ("cpu", X, W, "compute capability 8.0 or more, the device is 'cpu'"),
        ("NVIDIA Something New", X, W, "the compute capability of 'NVIDIA Something New' is not known here"),
        ("Tesla V100-SXM2-16GB", X, W, "compute capability 8.0"),
        (H100, X, weights(1, 4, 2, 24, 5120), "a side of 24, which is no multiple of 16"),
        (A100, X, weights(1, 160, 2, 1536, 5120, dtype="float8_e4m3fn"), "2,516,582,400 numbers of one byte"),
        (H100, weights(8, 5120, dtype="float32"), W, "it multiplies bfloat16 or float16, not float32"),
        (H100, weights(8, 5120, dtype="float16"), W, "weights of bfloat16 with states of float16"),
    ],
)
def test_a_forced_kernel_that_cannot_run_says_why(kind, x, w, words, caplog):
    with pytest.raises(UsageError, match="kernels 'triton' cannot run here") as error:
        choice.choose("triton", kind, x, [w])
    assert words in str(error.value)
    choice._SAID.clear()
    with caplog.at_level(logging.WARNING, "glm_jax"):
        assert choice.choose("auto", kind, x, [w]) == choice.choose("auto", kind, x, [w]) == "xla"
    assert len(caplog.messages) == ("NVIDIA" in kind)  # once, and not where nobody expects a kernel


def test_what_is_wrong_is_said():
    x, ids, share, gate_up, down = map(jnp.asarray, case(3, 4, 32, 16, FLOAT32, k=2))
    with pytest.raises(UsageError, match="kernels 'cuda': they are one of auto, xla, pallas, triton, mosaic, megablox"):
        routed_experts(x, ids, share, gate_up, down, implementation="cuda")
    with pytest.raises(UsageError, match="weights of float8_e4m3fn and float8_e4m3fn without scales"):
        routed_experts(x, ids, share, gate_up.astype(E4M3), down.astype(E4M3))
    with pytest.raises(UsageError, match="weights of float32 with scales"):
        grouped_matmul(x, down.swapaxes(2, 3), jnp.ones(4, jnp.int32), scales=jnp.ones((2, 4, 16)))


def test_offsets_of_one_byte_numbers():
    """Between 2^31 numbers and 2^32 bytes; GLM-4.6's experts in FP8 are, all of one layer on one device."""
    assert triton.offsets_overflow((160, 3072, 5120), E4M3) and not triton.offsets_overflow((2, 160, 3072, 5120), E4M3)
    assert not triton.offsets_overflow((20, 3072, 5120), E4M3) and not triton.offsets_overflow((2**31,), E4M3)
    assert triton.offsets_overflow((2**32,), np.uint8) and not triton.offsets_overflow((160, 3072, 5120), BFLOAT16)


# ---- tiles


def test_tiles_cover_every_row_once():
    made_of = jax.jit(triton.tiles_of, static_argnums=(1, 2))
    for sizes, height in itertools.product([*SIZES.values(), [0] * 160, [7] * 160], (16, 64)):
        M = max(1, sum(sizes) + 3)
        if 9 < M < 420:  # of several sizes one program, with more rows past the last group
            sizes, M = sizes + [0] * (8 - len(sizes)), 420
        made = made_of(np.asarray(sizes), M, height, 5)
        columns = (np.asarray(a).tolist() for a in (made.matrix, made.start, made.count))
        rows = [(m - 5, r) for m, s, n in zip(*columns, strict=True) for r in range(s, s + n)]
        assert rows == [(e, r) for e, r in zip(np.repeat(np.arange(len(sizes)), sizes), range(sum(sizes)), strict=True)]
        assert int(made.count.max()) <= height


@pytest.mark.parametrize("N, K", [(1536, 5120), (1408, 4096), (192, 5120), (96, 5120), (48, 80)])
def test_tiles_divide_and_fit(N, K):
    for kernel, mean, wide, shared in itertools.product(
        ("gate_up", "matmul", "outer"),
        (0.05, 3.2, 12, 31, 90, 1638),
        (BFLOAT16, E4M3, FLOAT32),
        (101_376, 166_912, 232_448),
    ):
        x = FLOAT32 if wide == FLOAT32 else BFLOAT16
        made = tiles.tile(kernel, "", shared, mean, 2 * N if kernel == "gate_up" else N, K, x, wide)
        assert N % made.n == 0 or kernel == "outer"
        assert K % (made.n if kernel == "outer" else made.k) == 0
        matrices = 2 if kernel == "gate_up" else 1
        assert made.stages * made.k * (made.m * x.itemsize + matrices * made.n * wide.itemsize) <= shared


# ---- compiled for GPUs that are not here


sys.path.insert(0, str(ROOT / "benchmarks"))
from compile_kernels import RESULTS, is_tpu  # noqa: E402 # pyright: ignore[reportMissingImports]
from compile_kernels import rows as table_rows  # noqa: E402 # pyright: ignore[reportMissingImports]

COMPILED = [json.loads(line) for line in RESULTS.read_text().splitlines()]
KERNELS = [line for line in COMPILED if not is_tpu(line)]


def is_sound(line):
    """Nothing spilt, wgmma on Hopper where tiles are of 64 rows or more, and no temporary of the size of an expert
    stack: the rows of 4,096 tokens take 416 MiB, GLM-4.6's experts 7,200 a layer."""
    mosaic = line["kernels"] == "mosaic"
    of_training = line["step"] == "train"
    assert len(line["compiled"]) >= (4 if of_training and line["weights"] == "bfloat16" else 2)
    for name, kernel in line["compiled"].items():
        assert kernel["spilt"] == 0 and kernel["registers"] <= 255, (line, name)
        rows = line["tokens"] * 8 / preset(line["model"]).n_routed_experts
        if line["device"] == "h100" and (mosaic or rows > 32 or "outer" in name):
            assert kernel["mma"] == ["wgmma"], (line, name)
    c = preset(line["model"])
    F, D, rows = c.moe_intermediate_size, c.hidden_size, 8 * min(line["tokens"], rows_at_once(8, c.hidden_size))
    # Rows between gate and down, and answers; back, gate and up too, and what comes back of each, in float32 at most.
    width = 3 * D + 8 * F if of_training else 1.6 * (D + F)
    if mosaic:  # tokens looked up, too, and every expert's last tile whole
        m = mosaic_tile("matmul", 132, rows / c.n_routed_experts, D, F, BFLOAT16, BFLOAT16, of_training).m
        rows, width = m * min(-(-rows // m) + line["experts"] - 1, rows), width + D
    assert line["temporary_bytes"] < 2 * rows * width + 2**20, line


@pytest.mark.parametrize("line", KERNELS, ids=lambda line: "-".join(map(str, list(line.values())[:7])))
def test_what_was_compiled_without_a_gpu(line):
    """benchmarks/compile_kernels.py compiled these, and docs/kernels.md has them."""
    is_sound(line)
    assert all(row in (ROOT / "docs/kernels.md").read_text() for row in table_rows(line))


@pytest.mark.aot
@pytest.mark.parametrize(
    "case",
    [
        ("triton", "h100", "glm-4.6", "float8_e4m3fn", 160, "decode", 64),
        ("triton", "h100", "glm-4.5-air", "bfloat16", 16, "train", 4096),
        ("triton", "a100", "glm-4.6", "float8_e4m3fn", 20, "decode", 64),
        ("mosaic", "h100", "glm-4.6", "fp8 activations", 160, "decode", 4096),
        ("mosaic", "h100", "glm-4.6", "bfloat16", 20, "train", 64),
    ],
    ids=lambda case: "-".join(map(str, case)),
)
def test_compiled_without_a_gpu(case):
    argv = [sys.executable, str(ROOT / "benchmarks/compile_kernels.py"), "--case", *map(str, case)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    is_sound(json.loads(done.stdout.splitlines()[-1]))
