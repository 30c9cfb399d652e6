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
from glm_jax.kernels.routing import by_expert, look_up, quantised, varying

# Heights of tiles, in mean rows of a group: a tile computes as many rows as it is high, whatever the group has. Between
# 16, 32, 64 and 128 alone, a third of the work at 32 rows a group was for nobody.
NEAR = (0.9, 1.05, 1.2, 1.4, 1.7)


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "L E N K"],
    group_sizes: Int[Array, "E"],
    layer: "int | Int[Array, '']" = 0,
    largest_group: int | None = None,
    scales: "Float[Array, 'L E N'] | None" = None,
    experts: int | None = None,
    kind: str = "cpu",
) -> Float[Array, "M N"]:
    """As `experts.grouped_matmul`, on a device of this kind; of `experts` on all devices (default E) the rows are, and
    heights are chosen by how many each has."""
    L, E, N, K = rhs.shape
    M = lhs.shape[0]
    heights = _heights(M if largest_group is None else largest_group, M / (experts or E))
    first = jnp.asarray(layer, jnp.int32) * E
    own = [] if scales is None else [scales.astype(jnp.float32).reshape(L * E, N)]
    lhs, rhs, sizes, first, *own = varying(lhs, rhs.reshape(L * E, N, K), group_sizes, first, *own)
    args = lhs, rhs, own[0] if own else None, sizes, first
    multiply: Any = functools.partial(_grouped_matmul, heights, kind == "cpu")
    if not kind.startswith("TPU") or K % 128 == 0 or N % 128:
        return multiply(1, *args)
    # A TPU keeps an argument [..., N, K] with N innermost where K is no multiple of its 128 lanes and N is. In the
    # loops it would not, and turn the whole stack around; written as [..., K, N] it lies as it is.
    lhs, rhs, *rest = args
    return multiply(0, lhs, rhs.swapaxes(1, 2), *rest)


def routed(
    x: Float[Array, "T D"],
    ids: Int[Array, "T k"],
    share: Float[Array, "T k"],
    gate_up: Float[Array, "L E 2 F D"],
    down: Float[Array, "L E D F"],
    layer: "int | Int[Array, '']" = 0,
    scales: "tuple[Float[Array, 'L E 2 F'], Float[Array, 'L E D']] | None" = None,
    activations: Any = None,
    experts: int | None = None,
    kind: str = "cpu",
) -> Float[Array, "T D"]:
    """`routed_experts` in float32, all tokens at once, on a device of this kind."""
    (L, E, _, F, D), (T, k) = gate_up.shape, ids.shape
    order, place, sizes = by_expert(ids, E)
    of_gate_up, of_down = (None, None) if scales is None else (scales[0].reshape(L, E, 2 * F), scales[1])
    multiply = functools.partial(
        grouped_matmul, group_sizes=sizes, layer=layer, largest_group=T, experts=experts, kind=kind
    )
    rounded = _rounded if activations is not None else lambda x: x
    x_ = look_up(*varying(rounded(x), order // k, place.reshape(T, k)))
    h = multiply(x_, gate_up.reshape(L, E, 2 * F, D), scales=of_gate_up)
    gate, up = h[:, :F].astype(jnp.float32), h[:, F:].astype(jnp.float32)
    y = multiply(rounded((jax.nn.silu(gate) * up).astype(x.dtype)), down, scales=of_down)
    y = look_up(*varying(y, place, order[:, None])).reshape(T, k, D)
    return (share[..., None].astype(jnp.float32) * y.astype(jnp.float32)).sum(1)


def _rounded(x):
    """Rows rounded to FP8 numbers, as numbers of their own dtype; the gradient passes through."""
    x8, scale = quantised(x)
    return x + jax.lax.stop_gradient((x8.astype(jnp.float32) * scale[:, None]).astype(x.dtype) - x)


def _heights(rows, mean):
    """The heights for groups of up to `rows` rows, and `mean` rows in the mean: close to each other where most groups
    are. Every one is a loop to compile. Of hundreds of rows few groups are so short that `few_rows` is worth it."""
    if rows <= 16:
        heights = (1, 2, 4, 8, 16)
    elif rows <= 64:
        heights = (1, 4, 8, 16, 64)
    else:
        near = {-(-int(mean * part) // 8) * 8 for part in NEAR} if 16 <= mean <= 512 else set()
        far = {h for h in (16, 32, 64, 128, 256, 512) if not near or h < 0.7 * min(near) or h > 1.3 * max(near)}
        heights = sorted(near | far)
    enough = next((i for i, h in enumerate(heights) if h >= rows), len(heights) - 1)
    return tuple(heights[: enough + 1])


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
    w = w.astype(x.dtype) if w.dtype.itemsize == 1 else w  # FP8 is widened exactly
    return jax.lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)


def _product(x, w, i, axis, on_cpu):
    """x [h, K] times matrix i of w [G, N, K] transposed, or with axis=0 x [h, N] times it, in float32."""
    h, dot = x.shape[0], lambda x, i: _dot(x, w[i], 1, axis)
    if not on_cpu or (w.dtype == jnp.float32 and not (axis == 1 and is_few(h, x.dtype))):
        return dot(x, i)
    if w.dtype == jnp.float32:
        return few_rows(x, w, i)
    # A CPU multiplies no bfloat16, and XLA would widen the whole stack before the loop; it does not from a branch.
    nothing = jnp.zeros_like(x[:1, 0], jnp.float32)
    zeros = lambda x, i: jnp.broadcast_to(nothing, (h, w.shape[2 - axis]))
    return jax.lax.cond(i >= 0, dot, zeros, x, i)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _grouped_matmul(heights, on_cpu, axis, lhs, rhs, scales, sizes, first):
    """lhs [M, K], rhs [G, N, K] with `axis` 1 or [G, K, N] with 0, scales [G, N] or None, sizes [E], group 0's place in
    G -> [M, N]."""

    def product(x, e):
        y = _product(x, rhs, first + e, axis, on_cpu)
        return y if scales is None else y * scales[first + e]

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


def _grouped_matmul_forward(heights, on_cpu, axis, *args):
    return _grouped_matmul(heights, on_cpu, axis, *args), args


def _grouped_matmul_backward(heights, on_cpu, axis, saved, dy):
    lhs, rhs, scales, sizes, first = saved
    heights = (16, 64, 256)[: 1 + sum(heights[-1] > h for h in (16, 64))]

    def back(dy, e):
        dy = dy if scales is None else (dy.astype(jnp.float32) * scales[first + e]).astype(dy.dtype)
        return _product(dy, rhs, first + e, 1 - axis, on_cpu)

    dlhs = _by_tiles(heights, dy, rhs.shape[1 + axis], sizes, back)
    if scales is not None:
        return dlhs, None, None, None, None
    pad = lambda a: jnp.pad(a, ((0, heights[-1]), (0, 0)))
    x, dy = pad(lhs), pad(dy)

    def tile(h, e, start, end, drhs):
        mine = start + jnp.arange(h)[:, None] < end
        own = lambda a: jnp.where(mine, _rows(a, start, h), 0)  # of both: 0 times another row's inf is NaN
        one, other = (own(dy), own(x)) if axis else (own(x), own(dy))
        return drhs.at[first + e].add(_dot(one, other, 0, 0))

    (nothing, *_) = varying(jnp.zeros_like(rhs, dtype=jnp.float32), rhs)
    drhs = _for_tiles(heights, sizes, lhs.shape[0], tile, nothing)
    return dlhs, drhs.astype(rhs.dtype), None, None, None


_grouped_matmul.defvjp(_grouped_matmul_forward, _grouped_matmul_backward)
