"""The matmuls of routed experts on TPUs, as Pallas kernels of the kind of jax's megablox.

Rows stand sorted by expert and are cut into blocks of `m`, wherever groups begin. A visit is a block and a group that
has rows in it: its matrix multiplies the block, and of the product those rows are kept that are its own. The visits of
a group follow each other, and the whole contracted side is in VMEM at once, so every matrix that has rows is read once,
in pieces of megabytes. What has no rows is not visited. Looking rows up and putting them back is left to XLA.

jax's own megablox multiplies float32 in bfloat16 and knows no FP8, and inside a shard_map it cannot be traced with the
axes checked that values vary over.

Weights are one stack [G, ...] of all layers and experts, of which a visit names its matrix. FP8 (e4m3) weights are
widened as they come, and their scales, one an output channel, multiply the sums."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Shaped

from glm_jax.kernels.routing import varying

try:
    from jax.experimental.pallas import tpu as pltpu
except ImportError:  # a jax without it has plain XLA
    pltpu: Any = None

INTERPRET = False  # tests run the kernels on a CPU with it
FEW = 0  # of few tokens rows are sorted too: sorting is little beside a matrix
MIB = 2**20
LANES = 128


class Tile(NamedTuple):
    """Rows and columns of a product, and for `outer` the rows of a step; and the VMEM that a kernel may take."""

    m: int
    n: int
    k: int
    vmem: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """Visit v is of rows start[v] to end[v] - 1, those of group[v], as far as they are in block block[v]; they meet
    matrix matrix[v] of the stack. The first `total` are to be made."""

    matrix: Int[Array, "visits"]
    group: Int[Array, "visits"]
    block: Int[Array, "visits"]
    start: Int[Array, "visits"]
    end: Int[Array, "visits"]
    total: Int[Array, ""]  # at least one, of no rows if there are none


def tile(kernel: str, kind: str, M: int, mean: "int | float", N: int, K: int, x, weights) -> Tile:
    """The tile of a kernel on a kind of TPU, for M rows, `mean` to an expert, and matrices [N, K] of dtype `weights`; x
    is the rows' dtype. Pieces of a matrix have few megabytes where rows are few, so that the first is soon there, and
    more where rows are many, so that these are read less often."""
    x, weights, vmem = _held(x), _held(weights), _vmem(kind)
    if kernel == "outer":
        side = 512 if vmem < 32 * MIB or weights > 2 else 1024
        return Tile(_even(N, side), _even(K, side), min(M, 256), vmem)
    matrices, N = (2, N // 2) if kernel == "gate_up" else (1, N)
    n = _even(N, min(vmem // 6, (3 if mean < 32 else 6) * MIB) // (matrices * K * weights))
    height = 128 if mean < 256 else 256 if mean < 2048 else 512
    while height > 16 and height * max(K * x, n * 8) > vmem // 8:
        height //= 2
    return Tile(min(M, height), n, K, vmem)


def widest(kind: str, dtype) -> int:
    """The longest side of a matrix for rows of such a dtype: of a contracted one VMEM holds the whole."""
    return _vmem(kind) // 1024 // _held(dtype)


def _held(dtype) -> int:
    """Bytes that a number takes in VMEM: FP8 is widened there, and float32 is multiplied as several of bfloat16."""
    return {1: 2, 2: 2, 4: 8}[jnp.dtype(dtype).itemsize]


def _vmem(kind: str) -> int:
    """What a kernel takes of it at most. A core has 16 MiB on a v4, 64 on v5p and 7x, 128 on v5e and v6e."""
    return (16 if kind == "TPU v4" else 40) * MIB


def _even(whole: int, most: int) -> int:
    """The side of as few pieces as there can be of at most `most`, in whole lanes, or of one."""
    most = max(LANES, most // LANES * LANES)
    if whole <= most:
        return whole
    each = -(-whole // -(-whole // most))
    return -(-each // LANES) * LANES


def tiles_of(
    sizes: Int[Array, "E"], rows: int, height: int, first: "int | Int[Array, '']", empty: bool = False
) -> Visits:
    """The visits of groups of so many rows, the first group's at the top, in blocks of `height`; group e multiplies
    with matrix first + e. With `empty`, one of each group that has no rows too. As many as there can be whatever the
    sizes."""
    groups, sizes = sizes.shape[0], sizes.astype(jnp.int32)
    number = jnp.arange(-(-rows // height) + (groups if empty else min(groups, rows) - 1), dtype=jnp.int32)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    begin = jnp.minimum(starts, rows - 1) // height
    count = jnp.where(sizes > 0, (ends - 1) // height - begin + 1, int(empty))
    last = jnp.cumsum(count)
    group = jnp.minimum((number[:, None] >= last).sum(1, dtype=jnp.int32), groups - 1)
    there = number < last[-1]
    block = jnp.where(there, begin[group] + number - (last - count)[group], 0)
    own = lambda ends: jnp.where(there, ends[group], 0)
    return Visits(first + group, group, block, own(starts), own(ends), jnp.maximum(last[-1], 1))


def gate_up(
    x: Float[Array, "T D"],
    token: Int[Array, "M"],
    w: Shaped[Array, "G F2 D"],
    scales: "Float[Array, 'G F2'] | None",
    visits: Visits,
    tile: Tile,
    keep: bool = False,
    dtype: Any = None,
) -> tuple[Float[Array, "M F"], "Float[Array, 'M F2'] | None"]:
    """silu(gate x) * up x for every row, x's row `token[m]`, gate the first half of its matrix and up the second.
    In `dtype`, x's by default. `keep`: and the rows of gate and up themselves, for the backward pass, else None. Rows
    in no visit are undefined."""
    (G, F, D), M = (w.shape[0], w.shape[1] // 2, w.shape[2]), token.shape[0]
    at = lambda n, v, matrix, group, block, start, end: (matrix[v], 0, jnp.where(end[v] > start[v], n, 0))
    specs = [_rows(tile.m, D), pl.BlockSpec((None, 2, tile.n, D), lambda *a: (*at(*a), 0))]
    args = [x.at[token].get(mode="promise_in_bounds"), w.reshape(G, 2, F, D)]
    if scales is not None:
        specs.append(pl.BlockSpec((None, 2, tile.n), at))
        args.append(scales.reshape(G, 2, F))
    out = [((M, F), dtype or x.dtype, _columns(tile))] * (3 if keep else 1)
    kernel = functools.partial(_gate_up, scaled=scales is not None)
    h, *both = _call(kernel, "glm_gate_up", (pl.cdiv(F, tile.n),), visits, specs, args, out, tile, 6 * M * F * D)
    return h, jnp.concatenate(both, 1) if keep else None


def matmul(
    x: Float[Array, "A K"],
    w: Shaped[Array, "G a b"],
    scales: "Float[Array, 'G N'] | None",
    visits: Visits,
    tile: Tile,
    *,
    axis: int = 1,
    source: "Int[Array, 'M'] | None" = None,
    choices: "tuple[Int[Array, 'M'], Int[Array, 'M']] | None" = None,
    share: "Float[Array, 'M'] | None" = None,
    dtype: Any = None,
) -> Float[Array, "M N"]:
    """Every row times its matrix, transposed if `axis` is 1 and it is [N, K], as it is if 0 and [K, N].

    Row m is x's row `source[m]` (default m). With `choices`, an order of rows and its inverse, the result is in the
    order of choices, times `share` of each and then in float32. In `dtype`, x's by default. Rows in no visit are
    undefined."""
    N, K = (w.shape[1], w.shape[2]) if axis else (w.shape[2], w.shape[1])
    if _turned(w.shape):
        w, axis = w.swapaxes(1, 2), 1 - axis
    x = x if source is None else x.at[source].get(mode="promise_in_bounds")
    at = lambda n, v, matrix, group, block, start, end: (matrix[v], jnp.where(end[v] > start[v], n, 0))
    if axis:
        spec = pl.BlockSpec((None, tile.n, K), lambda *a: (*at(*a), 0))
    else:
        spec = pl.BlockSpec((None, K, tile.n), lambda *a: (at(*a)[0], 0, at(*a)[1]))
    specs, args = [_rows(tile.m, K), spec], [x, w]
    if scales is not None:
        specs.append(pl.BlockSpec((None, 1, tile.n), lambda *a: (at(*a)[0], 0, at(*a)[1])))
        args.append(scales[:, None])
    kernel = functools.partial(_matmul, axis=axis, scaled=scales is not None)
    out = [((x.shape[0], N), dtype or x.dtype, _columns(tile))]
    flops = 2 * x.shape[0] * N * K
    (y,) = _call(kernel, "glm_matmul", (pl.cdiv(N, tile.n),), visits, specs, args, out, tile, flops)
    if choices is not None:
        y = y.at[choices[1]].get(mode="promise_in_bounds")
    return y if share is None else y.astype(jnp.float32) * share[:, None]


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
    `source_a[m]` and b's row `source_b[m]` (default m). Zeros for a group of none."""
    E, N, K = sizes.shape[0], a.shape[1], b.shape[1]
    if _turned((E, N, K)):
        tile = tile._replace(m=tile.n, n=tile.m)
        return outer(b, a, sizes, tile, source_a=source_b, source_b=source_a, dtype=dtype or a.dtype).swapaxes(1, 2)
    a, b = (
        rows if source is None else rows.at[source].get(mode="promise_in_bounds")
        for rows, source in ((a, source_a), (b, source_b))
    )
    M = a.shape[0]
    visits = tiles_of(sizes, M, tile.k, 0, empty=True)
    specs = [
        pl.BlockSpec((tile.k, tile.m), lambda i, j, v, matrix, group, block, start, end: (block[v], i)),
        pl.BlockSpec((tile.k, tile.n), lambda i, j, v, matrix, group, block, start, end: (block[v], j)),
    ]
    at = pl.BlockSpec((None, tile.m, tile.n), lambda i, j, v, matrix, group, block, start, end: (group[v], i, j))
    out, grid = [((E, N, K), dtype or a.dtype, at)], (pl.cdiv(N, tile.m), pl.cdiv(K, tile.n))
    scratch = [pltpu.VMEM((tile.m, tile.n), jnp.float32)]
    return _call(_outer, "glm_outer", grid, visits, specs, [a, b], out, tile, 2 * M * N * K, scratch)[0]


def _turned(shape) -> bool:
    """Whether a TPU keeps such an array [..., N, K] with N innermost: where K is no multiple of its lanes and N is. A
    kernel would get it turned around, the whole stack; written as [..., K, N] it lies as it is."""
    return shape[2] % LANES != 0 and shape[1] % LANES == 0


# ---- the kernels


def _gate_up(matrix_ref, group_ref, block_ref, start_ref, end_ref, x_ref, w_ref, *refs, scaled):
    scale_ref, refs = refs[0], refs[scaled:]
    x = x_ref[...]
    gate, up = (_dot(x, w_ref[c].astype(x.dtype), 1, 1) for c in (0, 1))
    if scaled:
        gate *= scale_ref[0][None, :]
        up *= scale_ref[1][None, :]
    mine = _mine(block_ref, start_ref, end_ref, pl.program_id(1), gate.shape)
    for ref, value in zip(refs, (gate * jax.nn.sigmoid(gate) * up, gate, up), strict=False):
        ref[...] = jnp.where(mine, value, ref[...].astype(jnp.float32)).astype(ref.dtype)


def _matmul(matrix_ref, group_ref, block_ref, start_ref, end_ref, x_ref, w_ref, *refs, axis, scaled):
    y_ref, x = refs[-1], x_ref[...]
    y = _dot(x, w_ref[...].astype(x.dtype), 1, axis)
    if scaled:
        y *= refs[0][...]
    mine = _mine(block_ref, start_ref, end_ref, pl.program_id(1), y.shape)
    y_ref[...] = jnp.where(mine, y, y_ref[...].astype(jnp.float32)).astype(y_ref.dtype)


def _outer(matrix_ref, group_ref, block_ref, start_ref, end_ref, a_ref, b_ref, y_ref, sums_ref):
    v = pl.program_id(2)
    group = group_ref[v]

    @pl.when((v == 0) | (group_ref[jnp.maximum(v - 1, 0)] != group))
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(end_ref[v] > start_ref[v])
    def _():
        # Of both: 0 times another row's inf is NaN, and past the last row there is anything.
        own = lambda ref: jnp.where(
            _mine(block_ref, start_ref, end_ref, v, ref.shape), ref[...].astype(jnp.float32), 0
        ).astype(ref.dtype)
        sums_ref[...] += _dot(own(a_ref), own(b_ref), 0, 0)

    last = pl.num_programs(2) - 1

    @pl.when((v == last) | (group_ref[jnp.minimum(v + 1, last)] != group))
    def _():
        y_ref[...] = sums_ref[...].astype(y_ref.dtype)


def _mine(block_ref, start_ref, end_ref, v, shape):
    """Which numbers of a block are in rows of the visit's group."""
    row = block_ref[v] * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= start_ref[v]) & (row < end_ref[v])


def _dot(a, b, axis_a, axis_b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None  # else in bfloat16
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _rows(height, width):
    """A block of rows."""
    return pl.BlockSpec((height, width), lambda n, v, matrix, group, block, start, end: (block[v], 0))


def _columns(tile):
    """A block of a product."""
    return pl.BlockSpec((tile.m, tile.n), lambda n, v, matrix, group, block, start, end: (block[v], n))


def _call(kernel, name, grid, visits, specs, args, out, tile, flops, scratch=()):
    order = [visits.matrix, visits.group, visits.block, visits.start, visits.end]
    total, *args = varying(visits.total, *order, *args)
    kind = jax.typeof(args[0]).manual_axis_type
    size = lambda shape: functools.reduce(lambda a, b: a * b, shape, 1)
    read = sum(a.nbytes if a.ndim == 2 else a.nbytes // a.shape[0] * order[0].shape[0] for a in args[5:])
    made = sum(size(shape) * jnp.dtype(dtype).itemsize for shape, dtype, _ in out)
    return pl.pallas_call(
        kernel,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(order),
            grid=(*grid, total),
            in_specs=specs,
            out_specs=[spec for *_, spec in out],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype, _ in out],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * len(grid) + ("arbitrary",), vmem_limit_bytes=tile.vmem
        ),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=read + made, transcendentals=0),
        interpret=INTERPRET,
    )(*args)
