"""The matmuls of routed experts on Hopper, as Pallas kernels through Mosaic GPU: one warpgroup that issues TMA copies
and one or two that multiply with WGMMA.

Rows stand sorted by expert, each expert's from a multiple of the tiles' height on (`spaced`), since a TMA
copy is a whole tile; the rows between are zeros. A weight's rows are what WGMMA calls M, 64 a warpgroup, and tokens its
N, 8 to 256: so a tile of a few tokens wastes little, weights are read in the same way for every height, and FP8 weights
can be widened in registers, which WGMMA takes for M alone. Results are turned around on their way out.

There are as many programs as the device has multiprocessors. They go on from tile to tile, through the columns of one
tile first: its rows and its expert's matrix then come from L2. One program makes a tile, in one order, so results do
not change from run to run."""

import dataclasses
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Shaped

from glm_jax.kernels.routing import varying
from glm_jax.kernels.tiles import measured

try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:
    plgpu: Any = None

# A jax before 0.11 asks where in it to load from.
_idx = None if plgpu is None else inspect.signature(plgpu.load).parameters.get("idx")
INDEX: dict = {"idx": ()} if _idx is not None and _idx.default is inspect.Parameter.empty else {}
INTERPRET = False  # tests run the kernels on a CPU with it
FEW = 0  # of few tokens rows are sorted too
HIGH = 64  # a WGMMA's M
MEMORY_REGISTERS = 40  # a thread of the warpgroup that copies
ROOM = 230_000  # bytes of shared memory that a program's blocks may take

Rows = Any  # [rows, width], or of FP8 numbers that and the scale of each row


class Tile(NamedTuple):
    """Rows of a tile; a weight's rows and contracted numbers of a block, for `outer` a weight's rows and columns and 64
    rows at a time; blocks of each kind that are on their way; and multiprocessors."""

    m: int
    n: int
    k: int
    stages: int
    cores: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile t is rows t * m to (t + 1) * m - 1, m its height, of matrix matrix[t] of the stack, for t < live[0]."""

    matrix: Int[Array, "tiles"]
    live: Int[Array, "1"]


def tile(
    kernel: str,
    cores: int,
    mean: "int | float",
    N: int,
    K: int,
    x,
    weights,
    train: bool,
    device: str = "",
    axis: int = 1,
) -> Tile:
    """The tile of a kernel on a GPU of so many multiprocessors, for experts with `mean` rows, whose matrices are [N,
    K], or with `axis` 0 lie as [K, N]; x and weights are dtypes. All but its height is what was measured on this kind
    of device, if something was. The height is by rule and does not depend on the kernel: rows stand in tiles once for
    all kernels of a pass."""
    made = rule(kernel, cores, mean, N, K, x, weights, train)
    for entry in measured("mosaic", device, kernel, mean, N, K, x, weights, axis):
        if entry["height"] == made.m and fits(kernel, entry["tile"], made.m, N, K, x, weights):
            n, k, stages = entry["tile"]
            return made._replace(n=n, k=k, stages=stages)
    return made


def rule(kernel: str, cores: int, mean: "int | float", N: int, K: int, x, weights, train: bool) -> Tile:
    """The tile that is taken where none was measured."""
    # What is summed over rows takes 64 at a time.
    height = next((h for h in ((64,) if train else (16, 32, 64)) if mean <= h), 128)
    cut = lambda whole, *sizes: next(size for size in sizes if whole % size == 0)
    if kernel == "outer":
        n, k = cut(N, 128, 64), cut(K, 256, 128, 64)
    else:
        narrow = jnp.dtype(weights).itemsize == 1
        widened = jnp.dtype(x).itemsize > jnp.dtype(weights).itemsize
        n = cut(N // 2 if kernel == "gate_up" else N, 128, 64)
        k = cut(K, 128, 64) if narrow and not (widened and height == 128) else 64
    stage, fixed = shared_bytes(kernel, height, n, k, x, weights)
    return Tile(height, n, k, min(8, (ROOM - fixed) // stage), cores)


def fits(kernel: str, sizes: list, height: int, N: int, K: int, x, weights) -> bool:
    """Whether `sizes` are the n, k and stages of a tile that divides such matrices and has room in shared memory."""
    if len(sizes) != 3 or not all(isinstance(size, int) for size in sizes):
        return False
    n, k, stages = sizes
    # Of FP8 products no more than 128 are summed as WGMMA sums them.
    if n not in (64, 128) or k not in ((64, 128) if jnp.dtype(x).itemsize == 1 else (64, 128, 256)):
        return False
    if not 2 <= stages <= 8:
        return False
    stage, fixed = shared_bytes(kernel, height, n, k, x, weights)
    whole = N // 2 if kernel == "gate_up" else N
    return whole % n == 0 and K % k == 0 and fixed + stages * stage <= ROOM


def shared_bytes(kernel: str, height: int, n: int, k: int, x, weights) -> tuple[int, int]:
    """Bytes of shared memory that each stage of a tile takes, and that the rest of it does."""
    x, weights = jnp.dtype(x).itemsize, jnp.dtype(weights).itemsize
    if kernel == "outer":
        return 2 * HIGH * (n + k), 2 * n * k
    return k * (height * x + 2 * n * weights), 2 * n * height + (2 * n * k if x > weights else 0)


def tiles_of(sizes: Int[Array, "E"], rows: int, height: int, first: "int | Int[Array, '']") -> Tiles:
    """The tiles of groups of so many rows, `rows` at most, group e's after group e - 1's; group e multiplies with
    matrix first + e. As many tiles as there can be whatever the sizes."""
    number, last = _numbers(sizes, rows, height)
    group = jnp.minimum((number[:, None] >= last).sum(1, dtype=jnp.int32), sizes.shape[0] - 1)
    return Tiles(first + group, last[-1:])


def spaced(
    order: Int[Array, "M"], place: Int[Array, "M"], sizes: Int[Array, "E"], height: int
) -> tuple[Int[Array, "P"], Int[Array, "M"]]:
    """`order` and `place` of rows sorted by group (`routing.by_expert`) with each group's from a multiple of `height`
    on: row p is choice order[p], M where there is none; choice c is row place[c], 0 if it is in no group."""
    M, groups = order.shape[0], sizes.shape[0]
    number, last = _numbers(sizes, M, height)
    ends, sizes = jnp.cumsum(sizes.astype(jnp.int32)), sizes.astype(jnp.int32)
    begin = (last - -(-sizes // height)) * height  # of each group
    group = jnp.minimum((number[:, None] >= last).sum(1, dtype=jnp.int32), groups - 1)
    within = (number * height - begin[group])[:, None] + jnp.arange(height, dtype=jnp.int32)
    there = (within < sizes[group][:, None]) & (number < last[-1])[:, None]
    from_ = jnp.where(there, (ends - sizes)[group][:, None] + within, M).reshape(-1)
    of = (place[:, None] >= ends).sum(1, dtype=jnp.int32)
    at = jnp.minimum(of, groups - 1)
    moved = jnp.where(of < groups, begin[at] + place - (ends - sizes)[at], 0)
    return order.at[from_].get(mode="fill", fill_value=M), moved


def _numbers(sizes, rows, height):
    """The numbers of all tiles there can be, and of each group the tiles up to its end."""
    most = min(-(-rows // height) + sizes.shape[0] - 1, max(rows, 1))
    return jnp.arange(most, dtype=jnp.int32), jnp.cumsum(-(-sizes.astype(jnp.int32) // height))


def gate_up(
    x: Rows,
    token: "Int[Array, 'P'] | None",
    w: Shaped[Array, "G F2 D"],
    scales: "Float[Array, 'G F2'] | None",
    tiles: Tiles,
    tile: Tile,
    keep: bool = False,
    dtype: Any = None,
) -> tuple[Float[Array, "P F"], "Float[Array, 'P F2'] | None"]:
    """silu(gate x) * up x for every row, x's row `token[p]` (default p), zeros if it has none; gate is the first half
    of a tile's matrix and up the second. In `dtype`, x's by default. `keep`: and the rows of gate and up themselves,
    for the backward pass, else None. Rows in no tile are undefined."""
    F = w.shape[1] // 2
    x, row_scales, dtype = _looked_up(x, token, dtype)

    def finish(gate, up):
        h = [(0, 0, gate / (1 + jnp.exp(-gate)) * up)]
        return [*h, (1, 0, gate), (1, F, up)] if keep else h

    outs = [F, 2 * F] if keep else [F]
    made = _grouped("glm_gate_up", x, w, scales, row_scales, tiles, tile, dtype, 1, [0, F], tile.n, outs, finish)
    return made[0], made[1] if keep else None


def matmul(
    x: Rows,
    w: Shaped[Array, "G a b"],
    scales: "Float[Array, 'G N'] | None",
    tiles: Tiles,
    tile: Tile,
    *,
    axis: int = 1,
    source: "Int[Array, 'P'] | None" = None,
    choices: "tuple[Int[Array, 'P'], Int[Array, 'M']] | None" = None,
    share: "Float[Array, 'M'] | None" = None,
    dtype: Any = None,
) -> Float[Array, "R N"]:
    """Every row times its tile's matrix, transposed if `axis` is 1 and it is [N, K], as it is if 0 and [K, N].

    Row p is x's row `source[p]` (default p), zeros if it has none. With `choices`, an order of rows and its inverse,
    the result is in the order of choices, times `share` of each and then in float32. In `dtype`, x's by default. Rows
    in no tile are undefined."""
    N = w.shape[1] if axis else w.shape[2]
    x, row_scales, dtype = _looked_up(x, source, dtype)
    blocks = [0, tile.n] if N % (2 * tile.n) == 0 else [0]
    finish = lambda *sums: [(0, c, y) for c, y in zip(blocks, sums, strict=True)]
    step = tile.n * len(blocks)
    y = _grouped("glm_matmul", x, w, scales, row_scales, tiles, tile, dtype, axis, blocks, step, [N], finish)[0]
    if choices is None:
        return y
    y = y.at[choices[1]].get(mode="promise_in_bounds")
    return y if share is None else y.astype(jnp.float32) * share[:, None]


def _looked_up(x, source, dtype):
    x, scales = x if isinstance(x, tuple) else (x, None)
    if source is not None:
        x = x.at[source].get(mode="fill", fill_value=0)
        scales = None if scales is None else scales.at[source].get(mode="fill", fill_value=0)
    return x, scales, dtype or x.dtype


def outer(
    a: Float[Array, "A N"],
    b: Float[Array, "B K"],
    sizes: Int[Array, "E"],
    tile: Tile,
    *,
    source_a: "Int[Array, 'P'] | None" = None,
    source_b: "Int[Array, 'P'] | None" = None,
    dtype: Any = None,
) -> Float[Array, "E N K"]:
    """The sum over each group's rows of a's row times b's row: the gradient of a weight. Row p is a's row `source_a[p]`
    and b's row `source_b[p]` (default p); those between a group's end and the next tile must be zeros of both. Zeros
    for a group of none."""
    a, b, dtype = _looked_up(a, source_a, None)[0], _looked_up(b, source_b, None)[0], dtype or a.dtype
    N, K, E = a.shape[1], b.shape[1], sizes.shape[0]
    m, n, k, stages = tile.n, tile.k, HIGH, tile.stages
    warpgroups = m // HIGH
    tiles = -(-sizes.astype(jnp.int32) // tile.m)
    start = (jnp.cumsum(tiles) - tiles) * tile.m

    def kernel(start_ref, size_ref, a_ref, b_ref, y_ref):
        def scoped(a_block, b_block, out, full, empty):
            def fetch(index, step, slot, arrived):
                e, i, j = index
                rows = pl.ds(pl.multiple_of(start_ref[e] + step * k, k), k)
                plgpu.copy_gmem_to_smem(a_ref.at[rows, pl.ds(i * m, m)], a_block.at[slot], arrived)
                plgpu.copy_gmem_to_smem(b_ref.at[rows, pl.ds(j * n, n)], b_block.at[slot], arrived)

            def compute(index, steps, warpgroup, come, release):
                e, i, j = index

                def add(sums):
                    def step(s, _):
                        slot = come(s)
                        a = a_block.at[slot, :, pl.ds(warpgroup * HIGH, HIGH)]
                        plgpu.wgmma(sums, a.T, b_block.at[slot])
                        plgpu.wgmma_wait(1)
                        pl.when(s > 0)(lambda: release(s - 1))

                    lax.fori_loop(0, steps, step, None)
                    plgpu.wgmma_wait(0)
                    pl.when(steps > 0)(lambda: release(steps - 1))
                    return sums[...]

                y = pl.run_scoped(add, plgpu.ACC((HIGH, n), jnp.float32))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out[warpgroup] = y.astype(dtype)
                plgpu.commit_smem()
                to = y_ref.at[e, pl.ds(i * m + warpgroup * HIGH, HIGH), pl.ds(j * n, n)]
                plgpu.copy_smem_to_gmem(out.at[warpgroup], to)

            steps = lambda index: (size_ref[index[0]] + (k - 1)) // k
            _streamed((E, N // m, K // n), steps, warpgroups, stages, fetch, compute, full, empty)

        block = lambda width: plgpu.SMEM((stages, k, width), a.dtype, transforms=_swizzled(a.dtype, HIGH))
        pl.run_scoped(
            scoped,
            block(m),
            block(n),
            plgpu.SMEM((warpgroups, HIGH, n), dtype, transforms=_swizzled(dtype, HIGH)),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            collective_axes="warpgroup",
        )

    args = start, sizes.astype(jnp.int32), a, b
    return _call(kernel, "glm_outer", [((E, N, K), dtype)], tile.cores, warpgroups, args)[0]


# ---- the kernels


def _grouped(name, x, w, scales, row_scales, tiles, tile, dtype, axis, blocks, step, outs, finish):
    """Programs make blocks of tile.n of w's rows (columns, if axis is 0), at j * step + each of `blocks`, for a
    tile's rows of x; `finish` makes of their sums [(which of `outs`, column less j * step, value)]."""
    P, K = x.shape
    m, n, k = tile.m, tile.n, tile.k
    warpgroups, columns, steps = n // HIGH, outs[0] // step, K // k
    stages = min(tile.stages, steps)
    wide = x.dtype.itemsize == 2
    widen = wide and w.dtype.itemsize == 1
    # Registers hold the weights of axis 1 only: WGMMA turns around what lies in shared memory and has 16 bits. The
    # interpreter multiplies nothing else.
    through, one_block = widen and (not axis or INTERPRET), (HIGH, k) if axis else (k, HIGH)

    def kernel(matrix_ref, live_ref, x_ref, w_ref, *refs):
        refs = list(refs)
        scale_ref = refs.pop(0) if scales is not None else None
        row_ref = refs.pop(0) if row_scales is not None else None
        out_refs = refs

        def scoped(x_block, w_blocks, out, widened, full, empty):
            def fetch(index, i, slot, arrived):
                (t, j), ks = index, pl.ds(i * k, k)
                plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(t * m, m), ks], x_block.at[slot], arrived)
                for place, block in zip(blocks, w_blocks, strict=True):
                    cut = pl.ds(j * step + place, n)
                    from_ = w_ref.at[matrix_ref[t], cut, ks] if axis else w_ref.at[matrix_ref[t], ks, cut]
                    plgpu.copy_gmem_to_smem(from_, block.at[slot], arrived)

            def compute(index, _, warpgroup, come, release):
                t, j = index
                rows, mine = pl.ds(t * m, m), pl.ds(warpgroup * HIGH, HIGH)
                take = lambda block, slot: block.at[slot, mine] if axis else block.at[slot, :, mine].T

                def widened_product(sums, a, b):
                    to_wide = lambda r: r[...].astype(jnp.float32).astype(x.dtype)  # from e4m3 nothing goes to bfloat16
                    if not through:
                        return plgpu.wgmma(sums, to_wide(a), b)
                    held = widened.at[warpgroup]
                    plgpu.wgmma_wait(0)
                    held[...] = to_wide(a if axis else a.T)
                    plgpu.commit_smem()
                    plgpu.wgmma(sums, held if axis else held.T, b)

                def added(*sums):
                    def step(i, _):
                        slot = come(i)
                        for s, block in zip(sums, w_blocks, strict=True):
                            (widened_product if widen else plgpu.wgmma)(s, take(block, slot), x_block.at[slot].T)
                        if widen:
                            plgpu.wgmma_wait(0)
                            release(i)
                        else:  # this step's are left to go on
                            plgpu.wgmma_wait(len(sums))
                            pl.when(i > 0)(lambda: release(i - 1))

                    lax.fori_loop(0, steps, step, None)
                    if not widen:
                        plgpu.wgmma_wait(0)
                        release(steps - 1)
                    return [s[...] for s in sums]

                def promoted():  # sums of FP8 products keep 14 bits or so: no more than a step's are left to them
                    def step(i, totals):
                        slot = come(i)
                        one = lambda block: _product(take(block, slot), x_block.at[slot].T, (HIGH, m))
                        totals = tuple(total + one(block) for total, block in zip(totals, w_blocks, strict=True))
                        release(i)
                        return totals

                    zeros = plgpu.layout_cast(jnp.zeros((HIGH, m), jnp.float32), plgpu.Layout.WGMMA)
                    return lax.fori_loop(0, steps, step, (zeros,) * len(blocks))

                sums = pl.run_scoped(added, *[plgpu.ACC((HIGH, m), jnp.float32)] * len(blocks)) if wide else promoted()
                if scale_ref is not None:
                    own = [scale_ref.at[matrix_ref[t], pl.ds(j * step + b + warpgroup * HIGH, HIGH)] for b in blocks]
                    sums = [s * lax.broadcast_in_dim(_load(r, 1), s.shape, [0]) for s, r in zip(sums, own, strict=True)]
                if row_ref is not None:
                    own = _load(row_ref.at[rows], 0)
                    sums = [s * lax.broadcast_in_dim(own, s.shape, [1]) for s in sums]
                for which, column, value in finish(*sums):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    turned = plgpu.layout_cast(value.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                    out.at[warpgroup].T[...] = turned
                    plgpu.commit_smem()
                    to = out_refs[which].at[rows, pl.ds(j * step + column + warpgroup * HIGH, HIGH)]
                    plgpu.copy_smem_to_gmem(out.at[warpgroup], to)

            _streamed((live_ref[0], columns), lambda _: steps, warpgroups, stages, fetch, compute, full, empty)

        smem = lambda shape, dtype, cut: plgpu.SMEM(shape, dtype, transforms=_swizzled(dtype, cut))
        w_block = smem((stages, n, k), w.dtype, k) if axis else smem((stages, k, n), w.dtype, HIGH)
        pl.run_scoped(
            scoped,
            smem((stages, m, k), x.dtype, k),
            [w_block] * len(blocks),
            smem((warpgroups, m, HIGH), dtype, HIGH),
            smem((warpgroups, *one_block), x.dtype, one_block[1]) if through else None,
            plgpu.Barrier(num_arrivals=1 + len(blocks), num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            collective_axes="warpgroup",
        )

    args = tiles.matrix, tiles.live, x, w, *(s for s in (scales, row_scales) if s is not None)
    return _call(kernel, name, [((P, width), dtype) for width in outs], tile.cores, warpgroups, args)


def _streamed(grid, steps, warpgroups, stages, fetch, compute, full, empty):
    """The loop over this program's part of the grid, of the warpgroup that copies and of those that compute.
    `steps(index)` blocks a point, the same stages for all: the next point's come in while this one's results go out.
    (jax's emit_pipeline_warp_specialized begins anew at each, and overwrites what a delayed release may still read.)

    fetch(index, step, slot, barrier) starts a step's copies. compute(index, steps, warpgroup, come, release) makes a
    point: come(step) waits for a step's blocks and says where they are, release(step) gives their place back, once for
    each step in their order."""
    warpgroup, ring = lax.axis_index("warpgroup"), jnp.int32(stages)
    registers = min(256, (512 - MEMORY_REGISTERS) // warpgroups) // 8 * 8

    @pl.when(warpgroup == warpgroups)
    def _():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        @plgpu.nd_loop(grid, collective_axes="core", init_carry=jnp.int32(0))
        def done(loop, carry):
            def step(i, before):
                slot = lax.rem(before, ring)
                pl.when(before >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                fetch(loop.index, i, slot, full.at[slot])
                return before + 1

            return lax.fori_loop(0, steps(loop.index), step, carry)

        # A barrier is left as it was found: every phase of it seen.
        last = lambda i, _: plgpu.barrier_wait(empty.at[lax.rem(i, ring)])
        lax.fori_loop(jnp.maximum(done - stages, 0), done, last, None)

    @pl.when(warpgroup < warpgroups)
    def _():
        plgpu.set_max_registers(registers, action="increase")

        @plgpu.nd_loop(grid, collective_axes="core", init_carry=jnp.int32(0))
        def _(loop, carry):
            def come(i):
                slot = lax.rem(carry + i, ring)
                plgpu.barrier_wait(full.at[slot])
                return slot

            release = lambda i: plgpu.barrier_arrive(empty.at[lax.rem(carry + i, ring)])
            count = steps(loop.index)
            compute(loop.index, count, warpgroup, come, release)
            return carry + count

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _load(ref, reduced):
    """A vector of global memory as one that is the same along a dimension of a WGMMA's sums."""
    layout = plgpu.Layout.WGMMA.reduce(reduced)
    return plgpu.load(ref, **INDEX, layout=layout, optimized=False)


def _product(a, b, shape):
    def multiplied(sums):
        plgpu.wgmma(sums, a, b)
        plgpu.wgmma_wait(0)
        return sums[...]

    return pl.run_scoped(multiplied, plgpu.ACC(shape, jnp.float32))


def _swizzled(dtype, columns):
    """How a block lies in shared memory, as TMA writes it and WGMMA reads it."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * itemsize * 8)
    return (plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle))


def _call(kernel, name, outs, cores, warpgroups, args):
    kernel.__name__ = name
    args = varying(*args)
    kind = jax.typeof(args[0]).manual_axis_type
    made = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype in outs],
        grid=(cores,),
        grid_names=("core",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return made(*args)
