"""The routed experts of one layer, and the grouped matmul they are made of: what a caller calls.

Which implementation runs is chosen while tracing (`choice`). "xla": loops over row tiles on plain XLA, everywhere
(`row_tiles`). "triton": two Pallas kernels on NVIDIA GPUs (`triton`): gather, gate, up and SiLU; then down times the
routing weight, into the order of the choices; a dense sum over each token's choices remains for XLA. "mosaic": two on
Hopper (`mosaic`), and "megablox": two on TPUs (`megablox`), which leave the gather and the order of the choices to XLA
too. The modules of kernels have the same functions; the experts' formula, forward and backward, is here."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from glm_jax.errors import UsageError
from glm_jax.kernels import choice, megablox, mosaic, row_tiles, tiles, triton
from glm_jax.kernels.routing import by_expert, quantised, varying

KERNELS = {"triton": triton, "mosaic": mosaic, "megablox": megablox}
GATHERED = 2**28  # numbers in the rows that experts work on at once, at most: 4,096 tokens of GLM-4.6


def routed_experts(
    x: Float[Array, "T D"],
    ids: Int[Array, "T k"],
    share: Float[Array, "T k"],
    gate_up: Float[Array, "L E 2 F D"],
    down: Float[Array, "L E D F"],
    layer: "int | Int[Array, '']" = 0,
    dtype: Any = jnp.float32,
    scales: "tuple[Float[Array, 'L E 2 F'], Float[Array, 'L E D']] | None" = None,
    implementation: str = "auto",
    device: str | None = None,
    experts: int | None = None,
    activations: Any = None,
) -> Float[Array, "T D"]:
    """The sum over each token's experts of `share * down(silu(gate x) * up x)`, added in float32 and given as `dtype`.

    A token's ids differ from each other. An id outside 0..E-1 is another device's expert and adds nothing here. Many
    tokens go through in parts, so that what is held beside the weights has a bound whatever the routing.

    `scales` are those of FP8 weights (float8_e4m3fn), of each expert's output channels: they multiply what comes of
    the stored numbers. FP8 weights and scales have no gradient. `device` is the kind of device it is traced for, by
    default that of the mesh that is set, of the arrays, or of jax's default device. `experts` is how many there are on
    all devices, by default E: tiles are as high as an expert has rows then. Stacks are not to be vmapped: whether a
    kernel can address them is checked before.

    `activations=float8_e4m3fn`: before each matmul every row is rounded to FP8 numbers with a scale of its own, as the
    published FP8 checkpoints are served (W8A8); gradients pass through the rounding. A row of h is what this device has
    of it. Raises UsageError for an `implementation` that is none or cannot run there, and for FP8 weights without
    scales."""
    x, ids, share, gate_up, down = map(jnp.asarray, (x, ids, share, gate_up, down))
    scales = None if scales is None else (jnp.asarray(scales[0]), jnp.asarray(scales[1]))
    (T, D), k = x.shape, ids.shape[1]
    if (scales is None) != (gate_up.dtype.itemsize > 1 and down.dtype.itemsize > 1):
        raise UsageError(f"weights of {gate_up.dtype} and {down.dtype} with{'out' if scales is None else ''} scales")
    kind = choice.kind_here(x, gate_up) if device is None else device
    if activations is not None and (jnp.dtype(activations) != jnp.float8_e4m3fn or scales is None):
        raise UsageError(
            f"activations of {jnp.dtype(activations)}; they are float8_e4m3fn, with weights of that and scales"
        )
    chosen = choice.choose(implementation, kind, x, [gate_up, down], activations)
    if T == 0 or k == 0:
        return jnp.zeros((T, D), dtype)
    run: Any
    if chosen == "xla":
        run = lambda x, ids, share: row_tiles.routed(
            x, ids, share, gate_up, down, layer, scales, activations, experts, kind
        )
    else:
        plan = Plan(KERNELS[chosen], kind, gate_up.shape[1], experts or gate_up.shape[1], activations)
        run = lambda x, ids, share: _by_kernels(plan, x, ids, share, gate_up, down, layer, scales)

    most = rows_at_once(k, D)
    parts = -(-T // most)
    if parts == 1:
        return run(x, ids, share).astype(dtype)
    each = most if T % most == 0 else -(-T // parts)
    pad = lambda a, value: jnp.pad(a, ((0, parts * each - T), (0, 0)), constant_values=value).reshape(parts, each, -1)
    part = jax.checkpoint(lambda item: run(*item).astype(dtype))
    return jax.lax.map(part, (pad(x, 0), pad(ids, -1), pad(share, 0))).reshape(parts * each, D)[:T]


def rows_at_once(k: int, D: int) -> int:
    """How many tokens of k experts and width D go through at once."""
    return 1 << max(0, (GATHERED // (k * D)).bit_length() - 1)  # a power of two, as numbers of tokens often are


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "L E N K"],
    group_sizes: Int[Array, "E"],
    layer: "int | Int[Array, '']" = 0,
    largest_group: int | None = None,
    scales: "Float[Array, 'L E N'] | None" = None,
    implementation: str = "auto",
    device: str | None = None,
) -> Float[Array, "M N"]:
    """`lhs[m] @ rhs[layer, e].T` for the rows of each group e: the first `group_sizes[0]` rows are group 0's, then on.

    `layer` is 0..L-1. Rows past the last group come out as zeros. Sums are in float32, the result has lhs's dtype.
    `largest_group`, if the caller knows a bound (default M), says up to which height tiles are compiled. The other
    arguments and the errors are those of `routed_experts`."""
    lhs, rhs, group_sizes = map(jnp.asarray, (lhs, rhs, group_sizes))
    scales = None if scales is None else jnp.asarray(scales)
    if (scales is None) != (rhs.dtype.itemsize > 1):
        raise UsageError(f"weights of {rhs.dtype} with{'out' if scales is None else ''} scales")
    kind = choice.kind_here(lhs, rhs) if device is None else device
    chosen = choice.choose(implementation, kind, lhs, [rhs])
    if lhs.shape[0] == 0:
        return jnp.zeros((0, rhs.shape[2]), lhs.dtype)
    if chosen == "xla":
        return row_tiles.grouped_matmul(lhs, rhs, group_sizes, layer, largest_group, scales, None, kind)
    L, E, N, K = rhs.shape
    first = jnp.asarray(layer, jnp.int32) * E
    rhs = _for_kernels(rhs.reshape(L * E, N, K), kind)
    scales = None if scales is None else scales.astype(jnp.float32).reshape(L * E, N)
    lhs, rhs, first, sizes, *scale = varying(lhs, rhs, first, group_sizes, *([] if scales is None else [scales]))
    y: Any = _grouped_matmul(Plan(KERNELS[chosen], kind, E, E), lhs, rhs, scale[0] if scale else None, sizes, first)
    return jnp.where(jnp.arange(lhs.shape[0])[:, None] < sizes.sum(), y, 0)


# ---- by kernels


class Plan(NamedTuple):
    """What a kernel's call is decided by, beside shapes."""

    kernels: Any  # the module that has them
    kind: str
    E: int
    all_experts: int
    activations: Any = None
    train: bool = False

    def tile(self, kernel: str, rows: int, N: int, K: int, x, weights, axis: int = 1) -> Any:
        x = x[0] if isinstance(x, tuple) else x
        sizes = rows / self.all_experts, N, K, x.dtype, weights.dtype
        if self.kernels is mosaic:
            return mosaic.tile(kernel, choice.cores(self.kind), *sizes, self.train, self.kind, axis)
        if self.kernels is megablox:
            return megablox.tile(kernel, self.kind, rows, *sizes)
        return tiles.tile(kernel, self.kind, choice.shared_memory(self.kind), *sizes, axis)

    def rounded(self, x):
        """Rows as they are multiplied: where FP8 is not, as numbers of their own dtype."""
        if self.activations is None:
            return x
        x8, scale = quantised(x)
        return (x8, scale) if self.kernels is mosaic else (x8.astype(jnp.float32) * scale[:, None]).astype(x.dtype)

    def spaced(self, order, place, sizes, tile):
        """The order of rows and its inverse, with each expert's rows where these kernels look for them."""
        return mosaic.spaced(order, place, sizes, tile.m) if self.kernels is mosaic else (order, place)


def _for_kernels(w, kind):
    """FP8 weights as bytes where the compiler knows no such numbers: below compute capability 8.9 it aborts."""
    known = choice.capability(kind)
    if w.dtype == jnp.float8_e4m3fn and known is not None and known < (8, 9):
        return jax.lax.bitcast_convert_type(w, jnp.uint8)
    return w


def _by_kernels(plan, x, ids, share, gate_up, down, layer, scales):
    L, E, _, F, D = gate_up.shape
    first = jnp.asarray(layer, jnp.int32) * E
    gate_up, down = (_for_kernels(w.reshape(L * E, -1, w.shape[-1]), plan.kind) for w in (gate_up, down))
    own = [] if scales is None else [s.astype(jnp.float32).reshape(L * E, -1) for s in scales]
    x, ids, share, gate_up, down, first, *own = varying(x, ids, share, gate_up, down, first, *own)
    return _experts(plan, x, share, gate_up, down, tuple(own) or None, ids, first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(plan, x, share, gate_up, down, scales, ids, first):
    return _forward(plan, x, share, gate_up, down, scales, ids, first)[0]


def _forward(plan, x, share, gate_up, down, scales, ids, first):
    (T, D), k, F = x.shape, ids.shape[1], down.shape[2]
    M, local = T * k, (ids >= 0) & (ids < plan.E)
    of_gate_up, of_down = scales or (None, None)
    rows = plan.rounded(x)
    up_tile = plan.tile("gate_up", M, 2 * F, D, rows, gate_up)
    down_tile = plan.tile("matmul", M, D, F, rows, down)
    if T <= plan.kernels.FEW and not plan.train:
        order = place = jnp.arange(M, dtype=jnp.int32)
        mine, sizes = local.reshape(-1), None
        up_tiles = triton.Tiles(first + jnp.where(mine, ids.reshape(-1), 0), order, mine.astype(jnp.int32))
        down_tiles = up_tiles
    else:
        order, place, sizes = by_expert(ids, plan.E)
        order, place = plan.spaced(order, place, sizes, up_tile)
        up_tiles = plan.kernels.tiles_of(sizes, M, up_tile.m, first)
        same = down_tile.m == up_tile.m
        down_tiles = up_tiles if same else plan.kernels.tiles_of(sizes, M, down_tile.m, first)
    h, both = plan.kernels.gate_up(
        rows, order // k, gate_up, of_gate_up, up_tiles, up_tile, keep=plan.train, dtype=x.dtype
    )
    weight = share.astype(jnp.float32).reshape(-1)
    y = plan.kernels.matmul(
        plan.rounded(h), down, of_down, down_tiles, down_tile, choices=(order, place), share=weight, dtype=x.dtype
    )
    return _summed(y, local), (order, place, sizes, both)


def _summed(y, local):
    """Rows [T * k, D] in the order of the choices -> their sums [T, D] in float32, of those that are local: nobody has
    written the others."""
    y = jnp.where(local[..., None], y.reshape(*local.shape, -1).astype(jnp.float32), 0)
    return y.sum(1)


def _experts_forward(plan, x, share, gate_up, down, scales, ids, first):
    y, kept = _forward(plan._replace(train=True), x, share, gate_up, down, scales, ids, first)
    return y, (x, share, gate_up, down, scales, ids, first, kept)


def _experts_backward(plan, saved, dy):
    plan = plan._replace(train=True)
    x, share, gate_up, down, scales, ids, first, (order, place, sizes, both) = saved
    (T, k), F = ids.shape, down.shape[2]
    local, token = (ids >= 0) & (ids < plan.E), order // k
    of_rows = lambda a: a.reshape(-1).at[order].get(mode="fill", fill_value=0)
    dy, weight = dy.astype(x.dtype), of_rows(share.astype(jnp.float32))[:, None]
    of_gate_up, of_down = scales or (None, None)
    expert = None if scales is None else jnp.clip(of_rows(ids), 0, plan.E - 1)
    multiply = functools.partial(_rows_back, plan, sizes, first, T * k, expert)

    # Of each row, before its share: what comes back through `down`, and with it the share's own gradient.
    back = multiply(dy, down, of_down, source=token)
    gate, up = (both[:, c * F : (c + 1) * F].astype(jnp.float32) for c in (0, 1))
    sigmoid = jax.nn.sigmoid(gate)
    silu, back = gate * sigmoid, back.astype(jnp.float32)
    dshare = jnp.where(local, (back * silu * up).sum(-1)[place].reshape(T, k), 0).astype(share.dtype)
    back = weight * back
    dgate, dup = back * up * sigmoid * (1 + gate * (1 - sigmoid)), back * silu
    dboth = jnp.concatenate([dgate, dup], 1).astype(x.dtype)
    dx = multiply(dboth, gate_up, of_gate_up, choices=(order, place))
    dx = _summed(dx, local).astype(x.dtype)
    if scales is not None:
        return dx, dshare, None, None, None, None, None
    h = (weight * silu * up).astype(x.dtype)
    weights_back = functools.partial(_weights_back, plan, sizes, first, T * k)
    ddown = weights_back(down, dy, h, source_a=token)
    dgate_up = weights_back(gate_up, dboth, x, source_b=token)
    return dx, dshare, dgate_up, ddown, None, None, None


_experts.defvjp(_experts_forward, _experts_backward)


def _rows_back(plan, sizes, first, M, expert, dy, w, scales, source=None, choices=None):
    """Each row of dy times its matrix [N, K] as it is: the gradient of the rows that the matrix has multiplied.
    `expert` is each row's, if there are scales."""
    if scales is not None:  # of the side that is contracted now
        rows = dy if source is None else dy.at[source].get(mode="fill", fill_value=0)
        dy, source = (rows.astype(jnp.float32) * scales[first + expert]).astype(dy.dtype), None
    tile = plan.tile("matmul", M, w.shape[2], w.shape[1], dy, w, 0)
    made = plan.kernels.tiles_of(sizes, M, tile.m, first)
    return plan.kernels.matmul(dy, w, None, made, tile, axis=0, source=source, choices=choices)


def _weights_back(plan, sizes, first, M, w, a, b, source_a=None, source_b=None):
    """The gradient of the stack w [G, N, K]: of the E matrices from `first` on the sums over their rows, else zeros."""
    tile = plan.tile("outer", M, w.shape[1], w.shape[2], a, w)
    dw = plan.kernels.outer(a, b, sizes, tile, source_a=source_a, source_b=source_b, dtype=w.dtype)
    if w.shape[0] == plan.E:
        return dw
    (nothing, *_) = varying(jnp.zeros_like(w), w)
    return jax.lax.dynamic_update_slice(nothing, dw, (first, 0 * first, 0 * first))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(plan, lhs, rhs, scales, sizes, first):
    M = lhs.shape[0]
    tile = plan.tile("matmul", M, rhs.shape[1], rhs.shape[2], lhs, rhs)
    source, choices = _grouped_rows(plan, sizes, M, tile)
    made = plan.kernels.tiles_of(sizes, M, tile.m, first)
    return plan.kernels.matmul(lhs, rhs, scales, made, tile, source=source, choices=choices)


def _grouped_rows(plan, sizes, M, tile):
    """For rows that stand sorted: where the kernels' rows come from and where they go, if it is not where they are."""
    rows = jnp.arange(M, dtype=jnp.int32) + 0 * sizes.sum()
    source, place = plan.spaced(rows, rows, sizes, tile)
    return (None, None) if source is rows else (source, (source, place))


def _grouped_matmul_backward(plan, saved, dy):
    plan = plan._replace(train=True)
    lhs, rhs, scales, sizes, first = saved
    M = lhs.shape[0]
    source, choices = _grouped_rows(plan, sizes, M, plan.tile("matmul", M, rhs.shape[2], rhs.shape[1], dy, rhs, 0))
    expert = None
    if scales is not None:
        expert = jnp.minimum((jnp.arange(M)[:, None] >= jnp.cumsum(sizes)).sum(1), plan.E - 1)
        expert = expert if source is None else expert.at[source].get(mode="fill", fill_value=0)
    dlhs = _rows_back(plan, sizes, first, M, expert, dy, rhs, scales, source=source, choices=choices)
    dlhs = jnp.where(jnp.arange(M)[:, None] < sizes.sum(), dlhs, 0).astype(lhs.dtype)
    if scales is not None:
        return dlhs, None, None, None, None
    drhs = _weights_back(plan, sizes, first, M, rhs, dy, lhs, source_a=source, source_b=source)
    return dlhs, drhs, None, None, None


_grouped_matmul.defvjp(lambda plan, *args: (_grouped_matmul(plan, *args), args), _grouped_matmul_backward)
