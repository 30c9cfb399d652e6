"""The matmuls of routed experts on NVIDIA GPUs, as Pallas kernels through the Triton lowering.

Rows stand sorted by expert; a tile is a stretch of at most `m` rows of one expert, and a program makes `n` columns of
it: it loops over the contracted side, `k` at a time, with sums in float32. Tiles past the last are programs that end at
once. Nothing is added by several programs, so results are the same from run to run.

Weights are one stack [G, ...] of all layers and experts, of which a tile names its matrix. FP8 (e4m3) weights are
widened as they come, and their scales, one an output channel, multiply the sums."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Shaped

from glm_jax.errors import UsageError
from glm_jax.kernels.routing import varying

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # deprecated since jax 0.11: a jax without it has plain XLA
    plgpu: Any = None

INTERPRET = False  # tests run the kernels on a CPU with it
FEW = 4  # tokens up to which every choice is a tile of its own: sorting takes longer than reading an expert twice


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows, columns and contracted numbers of a tile, warps of its program, and stages of its pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def within(self, N: int, K: int) -> "Tile":
        """With columns and contracted numbers that divide N and K."""
        cut = lambda size, whole: next((b for b in (256, 128, 64, 32, 16) if b <= size and whole % b == 0), 0)
        return dataclasses.replace(self, n=cut(self.n, N), k=cut(self.k, K))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile t has rows start[t] to start[t] + count[t] - 1, all of matrix matrix[t] of the stack."""

    matrix: Int[Array, "tiles"]
    start: Int[Array, "tiles"]
    count: Int[Array, "tiles"]  # 0 of those past the last


def tiles_of(sizes: Int[Array, "E"], rows: int, height: int, first: "int | Int[Array, '']") -> Tiles:
    """The tiles of groups of so many rows, the first group's at the top; group e multiplies with matrix first + e.
    As many tiles as there can be whatever the sizes."""
    groups = sizes.shape[0]
    number = jnp.arange(min(-(-rows // height) + groups - 1, max(rows, 1)), dtype=jnp.int32)
    sizes = sizes.astype(jnp.int32)
    ends, tiles = jnp.cumsum(sizes), -(-sizes // height)
    last = jnp.cumsum(tiles)
    group = (number[:, None] >= last).sum(1, dtype=jnp.int32)  # compared with all: a search is a loop on GPU
    there = group < groups
    group = jnp.minimum(group, groups - 1)
    start = (ends - sizes)[group] + (number - (last - tiles)[group]) * height
    count = jnp.where(there, jnp.clip(ends[group] - start, 0, height), 0)
    return Tiles(first + group, jnp.where(there, start, 0), count)


def gate_up(
    x: Float[Array, "T D"],
    token: Int[Array, "M"],
    w: Shaped[Array, "G F2 D"],
    scales: "Float[Array, 'G F2'] | None",
    tiles: Tiles,
    tile: Tile,
    keep: bool = False,
    dtype: Any = None,
) -> tuple[Float[Array, "M F"], "Float[Array, 'M F2'] | None"]:
    """silu(gate x) * up x for every row, x's row `token[m]`, gate the first half of its matrix and up the second: K1.
    In `dtype`, x's by default. `keep`: and the rows of gate and up themselves, for the backward pass, else None. Rows
    in no tile are undefined."""
    M, F = token.shape[0], w.shape[1] // 2
    tile = tile.within(F, x.shape[1])
    dtype = dtype or x.dtype
    out = [((M, F), dtype), *([((M, 2 * F), dtype)] if keep else [])]
    kernel = functools.partial(_gate_up, tile=tile, F=F, scaled=scales is not None, keep=keep)
    args = [tiles.matrix, tiles.start, tiles.count, token, x, w, *([] if scales is None else [scales])]
    h, *both = _call(kernel, "glm_gate_up", (F // tile.n, tiles.count.shape[0]), out, tile, args)
    return h, both[0] if keep else None


def matmul(
    x: Float[Array, "A K"],
    w: Shaped[Array, "G a b"],
    scales: "Float[Array, 'G N'] | None",
    tiles: Tiles,
    tile: Tile,
    *,
    axis: int = 1,
    source: "Int[Array, 'M'] | None" = None,
    choices: "tuple[Int[Array, 'M'], Int[Array, 'M']] | None" = None,
    share: "Float[Array, 'M'] | None" = None,
    dtype: Any = None,
) -> Float[Array, "M N"]:
    """Every row times its matrix, transposed if `axis` is 1 and it is [N, K], as it is if 0 and [K, N]: K2 and more.

    Row m is x's row `source[m]` (default m). With `choices`, an order of rows and its inverse, it becomes row order[m]
    of the result, times `share[order[m]]`. In `dtype`, x's by default. Rows that are in no tile are undefined."""
    N, K = (w.shape[1], w.shape[2]) if axis else (w.shape[2], w.shape[1])
    M = x.shape[0] if source is None else source.shape[0]
    tile = tile.within(N, K)
    optional = {"source": source, "target": choices and choices[0], "share": share, "scales": scales}
    has = tuple(name for name, a in optional.items() if a is not None)
    kernel = functools.partial(_matmul, tile=tile, K=K, axis=axis, has=has)
    args = [tiles.matrix, tiles.start, tiles.count, x, w, *(optional[name] for name in has)]
    return _call(kernel, "glm_matmul", (N // tile.n, tiles.count.shape[0]), [((M, N), dtype or x.dtype)], tile, args)[0]


def outer(
    a: Float[Array, "A N"],
    b: Float[Array, "B K"],
    sizes: Int[Array, "E"],
    tile: Tile,
    *,
    source_a: "Int[Array, 'M'] | None" = None,
    source_b: "Int[Array, 'M'] | None" = None,
    dtype: Any = None,
) -> Float[Array, "E N K"]:
    """The sum over each group's rows of a's row times b's row: the gradient of a weight. Row m is a's row
    `source_a[m]` and b's row `source_b[m]` (default m). Zeros for a group of none. `tile`: m of N by n of K, k rows
    at a time."""
    N, K = a.shape[1], b.shape[1]
    cut = tile.within(K, K)
    m = dataclasses.replace(tile, n=tile.m).within(N, N).n
    tile = dataclasses.replace(tile, m=m, n=cut.n)
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    optional = {"source_a": source_a, "source_b": source_b}
    has = tuple(name for name, s in optional.items() if s is not None)
    args = [ends - sizes.astype(jnp.int32), ends, a, b, *(optional[name] for name in has)]
    grid = (N // tile.m, K // tile.n, sizes.shape[0])
    out = [((sizes.shape[0], N, K), dtype or a.dtype)]
    return _call(functools.partial(_outer, tile=tile, has=has), "glm_outer", grid, out, tile, args)[0]


# ---- the kernels


def _gate_up(matrix_ref, start_ref, count_ref, token_ref, x_ref, w_ref, *refs, tile, F, scaled, keep):
    scale_ref, refs = refs[0], refs[scaled:]
    j, t = pl.program_id(0), pl.program_id(1)
    count = count_ref[t]

    @pl.when(count > 0)
    def _():
        matrix, rows, mine = matrix_ref[t], start_ref[t] + jnp.arange(tile.m), jnp.arange(tile.m) < count
        token = plgpu.load(token_ref.at[rows], mask=mine, other=0)
        gates, ups = pl.ds(j * tile.n, tile.n), pl.ds(F + j * tile.n, tile.n)

        def add(i, sums):
            x = plgpu.load(x_ref.at[token[:, None], (i * tile.k + jnp.arange(tile.k))[None, :]])
            ks = pl.ds(i * tile.k, tile.k)
            load = lambda columns: _widened(plgpu.load(w_ref.at[matrix, columns, ks]), x.dtype)
            return sums[0] + _dot(x, load(gates), 1, 1), sums[1] + _dot(x, load(ups), 1, 1)

        nothing = jnp.zeros((tile.m, tile.n), jnp.float32)
        gate, up = jax.lax.fori_loop(0, x_ref.shape[1] // tile.k, add, (nothing, nothing))
        if scaled:
            gate *= plgpu.load(scale_ref.at[matrix, gates])[None, :]
            up *= plgpu.load(scale_ref.at[matrix, ups])[None, :]
        store = lambda ref, columns, value: plgpu.store(
            ref.at[rows[:, None], (columns + jnp.arange(tile.n))[None, :]], value.astype(ref.dtype), mask=mine[:, None]
        )
        store(refs[0], j * tile.n, gate * jax.nn.sigmoid(gate) * up)
        if keep:
            store(refs[1], j * tile.n, gate)
            store(refs[1], F + j * tile.n, up)


def _matmul(matrix_ref, start_ref, count_ref, x_ref, w_ref, *refs, tile, K, axis, has):
    given, y_ref = dict(zip(has, refs, strict=False)), refs[-1]
    j, t = pl.program_id(0), pl.program_id(1)
    count = count_ref[t]

    @pl.when(count > 0)
    def _():
        matrix, rows, mine = matrix_ref[t], start_ref[t] + jnp.arange(tile.m), jnp.arange(tile.m) < count
        named = lambda name: plgpu.load(given[name].at[rows], mask=mine, other=0) if name in given else rows
        source, target, columns = named("source"), named("target"), pl.ds(j * tile.n, tile.n)

        def add(i, sums):
            ks = pl.ds(i * tile.k, tile.k)
            at = (i * tile.k + jnp.arange(tile.k))[None, :]
            x = plgpu.load(x_ref.at[source[:, None], at], mask=mine[:, None], other=0)
            w = plgpu.load(w_ref.at[(matrix, columns, ks) if axis else (matrix, ks, columns)])
            return sums + _dot(x, _widened(w, x.dtype), 1, axis)

        y = jax.lax.fori_loop(0, K // tile.k, add, jnp.zeros((tile.m, tile.n), jnp.float32))
        if "scales" in given:
            y *= plgpu.load(given["scales"].at[matrix, columns])[None, :]
        if "share" in given:
            y *= plgpu.load(given["share"].at[target], mask=mine, other=0)[:, None]
        # Interpreted, a store writes what it masks too, as it was: those must be no row of another tile's.
        target = jnp.where(mine, target, y_ref.shape[0])
        at = (j * tile.n + jnp.arange(tile.n))[None, :]
        plgpu.store(y_ref.at[target[:, None], at], y.astype(y_ref.dtype), mask=mine[:, None])


def _outer(start_ref, end_ref, a_ref, b_ref, *refs, tile, has):
    given, y_ref = dict(zip(has, refs, strict=False)), refs[-1]
    i, j, e = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    start, end = start_ref[e], end_ref[e]

    def add(s, sums):
        rows = start + s * tile.k + jnp.arange(tile.k)
        mine = rows < end

        def load(ref, name, columns):
            source = plgpu.load(given[name].at[rows], mask=mine, other=0) if name in given else rows
            return plgpu.load(ref.at[source[:, None], columns[None, :]], mask=mine[:, None], other=0)

        a = load(a_ref, "source_a", i * tile.m + jnp.arange(tile.m))
        b = load(b_ref, "source_b", j * tile.n + jnp.arange(tile.n))
        return sums + _dot(a, b, 0, 0)

    nothing = jnp.zeros((tile.m, tile.n), jnp.float32)
    y = jax.lax.fori_loop(0, (end - start + (tile.k - 1)) // tile.k, add, nothing)
    plgpu.store(y_ref.at[e, pl.ds(i * tile.m, tile.m), pl.ds(j * tile.n, tile.n)], y.astype(y_ref.dtype))


def _dot(a, b, axis_a, axis_b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # else TF32
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _widened(w, dtype):
    """Weights as numbers of `dtype`; bytes are e4m3 numbers, for GPUs that do not know them."""
    if w.dtype != jnp.uint8:
        return w.astype(dtype)
    bits = w.astype(jnp.int32)
    low = bits & 0x7F
    # Sign aside, 4 bits of exponent with bias 7 and 3 of fraction: in float32's places, with its bias. A subnormal,
    # low * 2^-9, is read as (1 + low / 8) * 2^-7: less 2^-7, and times 2. Exact, and with no float32 subnormal.
    value = jax.lax.bitcast_convert_type((low << 20) + (120 << 23), jnp.float32)
    value = jnp.where(low < 8, (value - 2.0**-7) * 2, value)
    value = jnp.where(low == 0x7F, jnp.nan, value)
    return jnp.where(bits >= 128, -value, value).astype(dtype)


def _call(kernel, name, grid, out, tile, args):
    for a in args:
        if offsets_overflow(a.shape, a.dtype):
            raise UsageError(
                f"an array of {a.size:,} numbers in {a.nbytes:,} bytes is what the Triton lowering cannot address: it "
                "counts numbers in 32 bits up to 2^32 bytes; stack more layers or fewer, or take kernels 'xla'"
            )
    if max(grid[1:]) > 65_535:
        raise UsageError(f"{name}: {max(grid[1:]):,} tiles, a GPU's grid has up to 65,535; take kernels 'xla'")
    args = varying(*args)
    kind = jax.typeof(args[0]).manual_axis_type
    out = [jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype in out]
    whole = lambda a: pl.BlockSpec(a.shape, lambda *_: (0,) * len(a.shape))
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=[whole(a) for a in args],
        out_specs=[whole(o) for o in out],
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=INTERPRET,
    )(*args)


def offsets_overflow(shape: tuple[int, ...], dtype) -> bool:
    """Whether the Triton lowering of such an array would compute offsets in 32 bits that they do not fit into: it takes
    64 bits from 2^32 bytes on, and counts numbers."""
    size = 1
    for n in shape:
        size *= n
    return size > 2**31 and size * jnp.dtype(dtype).itemsize <= 2**32
