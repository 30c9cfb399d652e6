"""Rows in the order of their experts, and back."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


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


def varying(*arrays):
    """Inside a shard_map, the arrays as varying over the mesh axes that any of them varies over. Before a custom_vjp
    this is what makes a cotangent of a replicated weight a sum over the devices, not one device's own share."""
    own = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    axes = frozenset().union(*own)
    return [
        jax.lax.pcast(a, tuple(axes - mine), to="varying") if axes - mine else a
        for a, mine in zip(arrays, own, strict=True)
    ]
