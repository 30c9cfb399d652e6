"""Grouped matmul as a scan over row tiles, on plain XLA: the path that runs everywhere.

Each tile holds rows of one expert, padded to the tile's height, so the work is the rows' own and not E times that, as
`jax.lax.ragged_dot` costs on CPU and GPU. A few rows (decoding) are tiles of one row: only the chosen experts are
read, one matrix-vector product each.
The weights stay one `[L, E, ...]` stack with a layer index: slicing a layer out would copy it at every step."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ONE_ROW_TILES = 256  # rows up to which tiles have one row; above, a matmul a tile beats a product a row


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "L E N K"],
    group_sizes: Int[Array, "E"],
    layer: "int | Int[Array, '']" = 0,
) -> Float[Array, "M N"]:
    """`lhs[m] @ rhs[layer, e].T` for the rows of each group e: the first `group_sizes[0]` rows are group 0's, then on.

    Rows past the last group come out as zeros. Sums are in float32, the result has lhs's dtype."""
    ends = jnp.cumsum(group_sizes)
    group = (jnp.arange(lhs.shape[0])[:, None] >= ends[None]).sum(1)
    tiles = _lay_out(group, rhs.shape[1])
    return tiles.to_rows(_matmul(tiles.of_rows(lhs), rhs, tiles.expert, jnp.asarray(layer)))


def routed_experts(
    x: Float[Array, "T D"],
    ids: Int[Array, "T k"],
    share: Float[Array, "T k"],
    gate_up: Float[Array, "L E 2 F D"],
    down: Float[Array, "L E D F"],
    layer: "int | Int[Array, '']" = 0,
    all_experts: int | None = None,
) -> Float[Array, "T D"]:
    """The sum over each token's experts of `share * down(silu(gate x) * up x)`, in float32.

    An id outside 0..E-1 is another device's expert and adds nothing here; `all_experts` (default E) says over how many
    the tokens are spread, which sets the tiles' height and not the result."""
    (L, E, _, F, D), k, layer = gate_up.shape, ids.shape[-1], jnp.asarray(layer)
    tiles = _lay_out(jnp.where((ids >= 0) & (ids < E), ids, E).reshape(-1), E, all_experts)
    h = _matmul(tiles.of_rows(x, k), gate_up.reshape(L, E, 2 * F, D), tiles.expert, layer)
    gate, up = h[..., :F].astype(jnp.float32), h[..., F:].astype(jnp.float32)
    y = _matmul((jax.nn.silu(gate) * up).astype(x.dtype), down, tiles.expert, layer)
    y = tiles.to_rows(y).reshape(*ids.shape, D).astype(jnp.float32)
    return jnp.einsum("tk,tkd->td", share.astype(jnp.float32), y, precision=jax.lax.Precision.HIGHEST)


class _Tiles(NamedTuple):
    """Which row stands where: `source [n, height]` the row of each place (M where none is), `place [M]` the place of
    each row (n * height where none is: its group is E), `expert [n]` the group of each tile (E: an empty tile)."""

    source: jax.Array
    place: jax.Array
    expert: jax.Array

    def of_rows(self, x, repeat=1):  # [M / repeat, K] -> [n, height, K], zeros where no row is
        x = jnp.concatenate([x, jnp.zeros_like(x[:1])])
        return x[jnp.minimum(self.source // repeat, x.shape[0] - 1)]

    def to_rows(self, tiles):  # [n, height, N] -> [M, N], zeros where a row has no place
        flat = tiles.reshape(-1, tiles.shape[-1])
        return flat.at[self.place].get(mode="fill", fill_value=0)


def _lay_out(group, groups, all_groups=None):  # group [M] in 0..groups, where `groups` means none
    rows = group.shape[0]
    # Not argsort: inside a shard_map it types the order as the same on every device, since what it carries along is an
    # iota, and the gradient of rows looked up by it would then be summed over devices row by row.
    _, order = jax.lax.sort_key_val(group, jnp.arange(rows, dtype=group.dtype) + 0 * group)
    if rows <= ONE_ROW_TILES:  # rows of one expert one after the other, so that its matrix may still be in a cache
        place = jnp.zeros(rows, order.dtype).at[order].set(jnp.arange(rows), unique_indices=True)
        return _Tiles(order[:, None], place, group[order])
    height = _tile_height(rows, all_groups or groups)
    n = rows // height + groups
    sizes = (group[:, None] == jnp.arange(groups)).sum(0)
    tiles = -(-sizes // height)
    last_tile, last_row = jnp.cumsum(tiles), jnp.cumsum(sizes)
    sorted_group = group[order]
    mine = jnp.minimum(sorted_group, groups - 1)
    rank = jnp.arange(rows) - (last_row - sizes)[mine]
    place = jnp.where(sorted_group < groups, (last_tile - tiles)[mine] * height + rank, n * height)
    place = jnp.zeros(rows, place.dtype).at[order].set(place, unique_indices=True)
    source = jnp.full(n * height, rows, place.dtype).at[place].set(jnp.arange(rows), mode="drop")
    expert = (jnp.arange(n)[:, None] >= last_tile[None]).sum(1)  # not searchsorted: on GPU that is a while loop
    return _Tiles(source.reshape(n, height), place, expert)


def _tile_height(rows, groups):
    """The mean group and two standard deviations of it, so that most groups are one tile: a second one would read the
    expert's matrix again. In steps of 16, at most 512."""
    mean = rows / groups
    return min(512, 16 * math.ceil((mean + 2 * math.sqrt(mean)) / 16))


def _varying(*arrays):
    """Inside a shard_map, the arrays as varying over the mesh axes that any of them varies over. Before a custom_vjp
    this is what makes a cotangent of a replicated weight a sum over the devices, not one device's own share."""
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    axes = frozenset().union(*varying)
    return [
        jax.lax.pcast(a, tuple(axes - own), to="varying") if axes - own else a
        for a, own in zip(arrays, varying, strict=True)
    ]


def _matmul(x, w, expert, layer):  # x [n, height, K], w [L, E, N, K], expert [n] -> [n, height, N] in x's dtype
    layers, experts = w.shape[:2]
    index = jnp.where(expert < experts, expert + layer * experts, layers * experts)
    return _tile_matmul(*_varying(x, w.reshape(layers * experts, *w.shape[2:]), index))


def _precision(x):  # GPUs would use TF32, TPUs bfloat16
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _dot(x, w, out, in_):
    """One matmul, contracting axis `out` of x with axis `in_` of w, summed in float32."""
    dims = (((out,), (in_,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, precision=_precision(x), preferred_element_type=jnp.float32)


def _scan_tiles(x, w, index, contract):
    """`x[t] . w[index[t]]` for every tile t; zeros where the index is out of range. Tiles of one row are vectors, so
    that XLA sees a matrix-vector product."""
    vector = x.shape[1] == 1
    width = w.shape[1 if contract == 1 else 2]
    like = x[0, 0, :1] if vector else x[0, :, :1]

    def tile(_, item):
        x, i = item
        zeros = lambda x, i: jnp.broadcast_to(jnp.zeros_like(like), (*x.shape[:-1], width))
        product = lambda x, i: _dot(x, w[i], x.ndim - 1, contract).astype(x.dtype)
        return None, jax.lax.cond(i < w.shape[0], product, zeros, x, i)

    y = jax.lax.scan(tile, None, (x[:, 0] if vector else x, index))[1]
    return y[:, None] if vector else y


@jax.custom_vjp
def _tile_matmul(x, w, index):  # x [n, height, K], w [G, N, K], index [n] -> [n, height, N]
    return _scan_tiles(x, w, index, 1)


def _tile_matmul_forward(x, w, index):
    return _tile_matmul(x, w, index), (x, w, index)


def _tile_matmul_backward(saved, dy):
    x, w, index = saved
    dx = _scan_tiles(dy, w, index, 0)

    def tile(dw, item):
        x, dy, i = item
        add = lambda dw: dw.at[i].add(_dot(dy, x, 0, 0))  # a group's tiles all add to its one matrix
        return jax.lax.cond(i < w.shape[0], add, lambda dw: dw, dw), None

    nothing, _ = _varying(jnp.zeros_like(w, dtype=jnp.float32), w)
    dw, _ = jax.lax.scan(tile, nothing, (x, dy, index))
    return dx, dw.astype(w.dtype), None


_tile_matmul.defvjp(_tile_matmul_forward, _tile_matmul_backward)
