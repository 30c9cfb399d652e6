"""Rows in the order of their experts, and back; rows as FP8 numbers; what they vary over."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

E4M3_MAX = 448


def by_expert(ids: Int[Array, "T k"], E: int) -> tuple[Int[Array, "M"], Int[Array, "M"], Int[Array, "E"]]:
    """Choices in the order of their experts, those of experts outside 0..E-1 last: row m is choice order[m], that is of
    token order[m] // k; choice c is row place[c]; expert e has sizes[e] rows."""
    group = jnp.where((ids >= 0) & (ids < E), ids, E).reshape(-1)
    # Not argsort: inside a shard_map it types the order as the same on every device, since what it carries along is an
    # iota, and the gradient of rows looked up by it would then be summed over devices row by row.
    iota = jnp.arange(group.size, dtype=jnp.int32) + 0 * group
    _, order = jax.lax.sort_key_val(group, iota)
    _, place = jax.lax.sort_key_val(order, iota)  # a scatter would be a loop on CPU
    return order, place, (group[:, None] == jnp.arange(E)).sum(0)


@jax.custom_vjp
def look_up(x: Shaped[Array, "A D"], source: Int[Array, "M"], places: Int[Array, "A k"]) -> Shaped[Array, "M D"]:
    """Rows `source` of x; `places` says which of them come from each of x's rows."""
    return x.at[source].get(mode="promise_in_bounds")


def _look_up_backward(places, dy):  # by looking up too: adding to rows in place is a loop on CPU
    part = lambda j: dy.at[places[:, j]].get(mode="promise_in_bounds").astype(jnp.float32)
    return functools.reduce(jnp.add, map(part, range(places.shape[1]))).astype(dy.dtype), None, None


look_up.defvjp(lambda x, source, places: (look_up(x, source, places), places), _look_up_backward)


def quantised(x: Float[Array, "A K"]) -> "tuple[Shaped[Array, 'A K'], Float[Array, 'A']]":
    """Rows as e4m3 numbers and each row's scale, its largest magnitude over 448 (1 of a row of zeros, or of numbers so
    small that their scale would be no normal float32, which become zeros): the dynamic
    per-token activations of compressed-tensors."""
    wide = x.astype(jnp.float32)
    most = jnp.abs(wide).max(1)
    scale = jnp.where(most > E4M3_MAX * jnp.finfo(jnp.float32).tiny, most / E4M3_MAX, 1)
    return (wide / scale[:, None]).astype(jnp.float8_e4m3fn), scale


def varying(*arrays):
    """Inside a shard_map, the arrays as varying over the mesh axes that any of them varies over. Before a custom_vjp
    this is what makes a cotangent of a replicated weight a sum over the devices, not one device's own share."""
    own = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    axes = frozenset().union(*own)
    return [
        jax.lax.pcast(a, tuple(axes - mine), to="varying") if axes - mine else a
        for a, mine in zip(arrays, own, strict=True)
    ]
