"""Grouped matmul as loops over row tiles, on plain XLA: the path that runs everywhere.

Rows stand sorted by expert. A tile is a stretch of them that begins where an expert's rows begin, or where its last
tile ends, and is as high as the smallest of a few heights that holds the rest of them; what it computes past them is
dropped. So the work is the rows' own and not E times that, as `jax.lax.ragged_dot` costs on CPU and GPU, only chosen
experts are read, and each once. The weights stay one `[L, E, ...]` stack with a layer index: a slice would be a copy.

On CPU a tile of a few rows reads its matrix from where it lies; for a higher one XLA copies it out of the stack."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from glm_jax.kernels.few_rows import few_rows, is_few

GATHERED = 2**28  # numbers in the rows that experts work on at once, at most: 4,096 tokens of GLM-4.6


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "L E N K"],
    group_sizes: Int[Array, "E"],
    layer: "int | Int[Array, '']" = 0,
    largest_group: int | None = None,
) -> Float[Array, "M N"]:
    """`lhs[m] @ rhs[layer, e].T` for the rows of each group e: the first `group_sizes[0]` rows are group 0's, then on.

    `layer` is 0..L-1. Rows past the last group come out as zeros. Sums are in float32, the result has lhs's dtype.
    `largest_group`, if the caller knows a bound (default M), says up to which height tiles are compiled."""
    L, E, N, K = rhs.shape
    heights = _heights(lhs.shape[0] if largest_group is None else largest_group)
    first = jnp.asarray(layer, jnp.int32) * E
    lhs, rhs, sizes, first = _varying(lhs, rhs.reshape(L * E, N, K), group_sizes, first)
    multiply: Any = functools.partial(_grouped_matmul, heights, 1)
    if K % 128 == 0 or N % 128:
        return multiply(lhs, rhs, sizes, first)
    # A TPU keeps an argument [..., N, K] with N innermost where K is no multiple of its 128 lanes and N is. In the
    # loops it would not, and turn the whole stack around; written as [..., K, N] it lies as it is.
    turned = lambda lhs, rhs, *rest: _grouped_matmul(heights, 0, lhs, rhs.swapaxes(1, 2), *rest)
    return jax.lax.platform_dependent(lhs, rhs, sizes, first, tpu=turned, default=multiply)


def routed_experts(
    x: Float[Array, "T D"],
    ids: Int[Array, "T k"],
    share: Float[Array, "T k"],
    gate_up: Float[Array, "L E 2 F D"],
    down: Float[Array, "L E D F"],
    layer: "int | Int[Array, '']" = 0,
    dtype=jnp.float32,
) -> Float[Array, "T D"]:
    """The sum over each token's experts of `share * down(silu(gate x) * up x)`, added in float32 and given as `dtype`.

    A token's ids differ from each other. An id outside 0..E-1 is another device's expert and adds nothing here. Many
    tokens go through in parts, so that what is held beside the weights has a bound whatever the routing."""
    (T, D), k = x.shape, ids.shape[1]
    most = rows_at_once(k, D)
    parts = -(-T // most)
    if parts == 1:
        return _routed(x, ids, share, gate_up, down, layer).astype(dtype)
    each = most if T % most == 0 else -(-T // parts)
    pad = lambda a, value: jnp.pad(a, ((0, parts * each - T), (0, 0)), constant_values=value).reshape(parts, each, -1)

    @jax.checkpoint
    def part(item):
        x, ids, share = item
        return _routed(x, ids, share, gate_up, down, layer).astype(dtype)

    return jax.lax.map(part, (pad(x, 0), pad(ids, -1), pad(share, 0))).reshape(parts * each, D)[:T]


def rows_at_once(k: int, D: int) -> int:
    """How many tokens of k experts and width D go through at once."""
    return 1 << max(0, (GATHERED // (k * D)).bit_length() - 1)  # a power of two, as numbers of tokens often are


def _routed(x, ids, share, gate_up, down, layer):
    (L, E, _, F, D), (T, k) = gate_up.shape, ids.shape
    group = jnp.where((ids >= 0) & (ids < E), ids, E).reshape(-1)
    # Not argsort: inside a shard_map it types the order as the same on every device, since what it carries along is an
    # iota, and the gradient of rows looked up by it would then be summed over devices row by row.
    iota = jnp.arange(T * k, dtype=jnp.int32) + 0 * group
    _, order = jax.lax.sort_key_val(group, iota)  # row m is choice order[m], that is of token order[m] // k
    _, place = jax.lax.sort_key_val(order, iota)  # and choice c is row place[c]; a scatter would be a loop on CPU
    sizes = (group[:, None] == jnp.arange(E)).sum(0)
    multiply = functools.partial(grouped_matmul, group_sizes=sizes, layer=layer, largest_group=T)
    h = multiply(_look_up(*_varying(x, order // k, place.reshape(T, k))), gate_up.reshape(L, E, 2 * F, D))
    gate, up = h[:, :F].astype(jnp.float32), h[:, F:].astype(jnp.float32)
    y = multiply((jax.nn.silu(gate) * up).astype(x.dtype), down)
    y = _look_up(*_varying(y, place, order[:, None])).reshape(T, k, D)
    return (share[..., None].astype(jnp.float32) * y.astype(jnp.float32)).sum(1)


@jax.custom_vjp
def _look_up(x, source, places):  # x [A, D], source [M] -> [M, D]; places [A, k] says which rows come from each of x's
    return x.at[source].get(mode="promise_in_bounds")


def _look_up_backward(places, dy):  # by looking up too: adding to rows in place is a loop on CPU
    part = lambda j: dy.at[places[:, j]].get(mode="promise_in_bounds").astype(jnp.float32)
    return functools.reduce(jnp.add, map(part, range(places.shape[1]))).astype(dy.dtype), None, None


_look_up.defvjp(lambda x, source, places: (_look_up(x, source, places), places), _look_up_backward)


def _heights(rows):
    """The heights for groups of up to `rows` rows; every one is a loop to compile. Of hundreds of rows few groups are
    so short that `few_rows` is worth it."""
    if rows <= 16:
        heights = (1, 2, 4, 8, 16)
    elif rows <= 64:
        heights = (1, 4, 8, 16, 64)
    else:
        heights = (16, 32, 64, 96, 128, 192, 256, 512)
    enough = next((i for i, h in enumerate(heights) if h >= rows), len(heights) - 1)
    return heights[: enough + 1]


def _varying(*arrays):
    """Inside a shard_map, the arrays as varying over the mesh axes that any of them varies over. Before a custom_vjp
    this is what makes a cotangent of a replicated weight a sum over the devices, not one device's own share."""
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    axes = frozenset().union(*varying)
    return [
        jax.lax.pcast(a, tuple(axes - own), to="varying") if axes - own else a
        for a, own in zip(arrays, varying, strict=True)
    ]


def _for_tiles(heights, sizes, rows, tile, carry):
    """`tile(height, group, start, end, carry)` for every tile, height by height; end is that of the group's rows. Loops
    of one height each, since a branch for every height in one loop would copy what it carries."""
    highest, groups = heights[-1], sizes.shape[0]
    ends, tiles = jnp.cumsum(sizes), -(-sizes // highest)
    last = jnp.cumsum(tiles)
    number = jnp.arange(min(rows, groups) + rows // highest)  # as many as there can be
    group = jnp.minimum((number[:, None] >= last).sum(1), groups - 1)
    start = (ends - sizes)[group] + highest * (number - (last - tiles)[group])
    end = ends[group]
    kind = (end[:, None] - start[:, None] > jnp.asarray(heights[:-1], sizes.dtype)).sum(1)
    kind = jnp.where(number < last[-1], kind, len(heights))
    _, order = jax.lax.sort_key_val(kind, number + 0 * kind)
    group, start, end = group[order], start[order], end[order]
    until = (kind[:, None] <= jnp.arange(len(heights))).sum(0)
    for k, h in enumerate(heights):
        body = lambda i, carry, h=h: tile(h, group[i], start[i], end[i], carry)
        carry = jax.lax.fori_loop(until[k - 1] if k else 0, until[k], body, carry)
    return carry


def _rows(x, start, height):
    return jax.lax.dynamic_slice_in_dim(x, start, height)


def _dot(x, w, out, in_):
    """One matmul, contracting axis `out` of x with axis `in_` of w, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # not TF32 on GPU, nor bfloat16 on TPU
    dims = (((out,), (in_,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)


def _product(x, w, i, axis):
    """x [h, K] times matrix i of w [G, N, K] transposed, or with axis=0 x [h, N] times it, in float32."""
    h, dot = x.shape[0], lambda x, w, i: _dot(x, w[i], 1, axis)

    def on_cpu(x, w, i):
        if w.dtype == jnp.float32:
            return few_rows(x, w, i) if axis == 1 and is_few(h, x.dtype) else dot(x, w, i)
        # A CPU multiplies no bfloat16, and XLA would widen the whole stack before the loop; it does not from a branch.
        nothing = jnp.zeros_like(x[:1, 0], jnp.float32)
        zeros = lambda x, i: jnp.broadcast_to(nothing, (h, w.shape[2 - axis]))
        return jax.lax.cond(i >= 0, lambda x, i: dot(x, w, i), zeros, x, i)

    return jax.lax.platform_dependent(x, w, i, cpu=on_cpu, default=dot)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_matmul(heights, axis, lhs, rhs, sizes, first):
    """lhs [M, K], rhs [G, N, K] with `axis` 1 or [G, K, N] with 0, sizes [E], group 0's place in G -> [M, N]."""
    product = lambda x, e: _product(x, rhs, first + e, axis)
    return _by_tiles(heights, lhs, rhs.shape[2 - axis], sizes, product)


def _by_tiles(heights, lhs, width, sizes, product):
    (M, _), highest = lhs.shape, heights[-1]
    lhs = jnp.pad(lhs, ((0, highest), (0, 0)))

    def tile(h, e, start, end, y):
        new = product(_rows(lhs, start, h), e).astype(y.dtype)
        if h > 1:  # what stands behind the group's end is another tile's
            new = jnp.where(start + jnp.arange(h)[:, None] < end, new, _rows(y, start, h))
        return jax.lax.dynamic_update_slice_in_dim(y, new, start, 0)

    y = jnp.broadcast_to(jnp.zeros_like(lhs[0, 0]), (M + highest, width))
    y = _for_tiles(heights, sizes, M, tile, y)[:M]
    return jnp.where(jnp.arange(M)[:, None] < sizes.sum(), y, 0)


def _grouped_matmul_forward(heights, axis, lhs, rhs, sizes, first):
    return _grouped_matmul(heights, axis, lhs, rhs, sizes, first), (lhs, rhs, sizes, first)


def _grouped_matmul_backward(heights, axis, saved, dy):
    lhs, rhs, sizes, first = saved
    heights = (16, 64, 256)[: 1 + sum(heights[-1] > h for h in (16, 64))]
    dlhs = _by_tiles(heights, dy, rhs.shape[1 + axis], sizes, lambda dy, e: _product(dy, rhs, first + e, 1 - axis))
    pad = lambda a: jnp.pad(a, ((0, heights[-1]), (0, 0)))
    x, dy = pad(lhs), pad(dy)

    def tile(h, e, start, end, drhs):
        mine = start + jnp.arange(h)[:, None] < end
        own = lambda a: jnp.where(mine, _rows(a, start, h), 0)  # of both: 0 times another row's inf is NaN
        one, other = (own(dy), own(x)) if axis else (own(x), own(dy))
        return drhs.at[first + e].add(_dot(one, other, 0, 0))

    (nothing, *_) = _varying(jnp.zeros_like(rhs, dtype=jnp.float32), rhs)
    drhs = _for_tiles(heights, sizes, lhs.shape[0], tile, nothing)
    return dlhs, drhs.astype(rhs.dtype), None, None


_grouped_matmul.defvjp(_grouped_matmul_forward, _grouped_matmul_backward)
