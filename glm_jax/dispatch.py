"""Tokens to the devices that hold their experts, and what the experts made of them back. Called inside a shard_map.

Two ways. Gathered: every device of a group gets all tokens of the group and works on those that are its experts'.
Sent: a token goes to the devices that hold its experts and to no others. With k experts a token and P devices a group,
a device receives P - 1 tokens for each of its own by gathering, and at most min(k, P) by sending: the same up to P = k,
and a quarter for P = 32. Neither drops a token, whatever the routing."""

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp

GATHERED = 8  # devices of a group up to which gathering moves no more: the experts of a token, in every published GLM
NEVER_SENT = ("TPU v5 lite",)  # kinds of device that have no ragged all-to-all

Work = Callable[..., jax.Array]  # (tokens, ids, share, dtype of the sum)


def sends(devices: int, kind: str) -> bool:
    """Whether the tokens of groups of so many devices of this kind are sent, not gathered."""
    return devices > GATHERED and kind not in NEVER_SENT


def gathered(tokens, ids, share, work: Work, axes: tuple[str, ...]):
    """tokens [T, D], ids [T, k], share [T, k] of one device -> the sum [T, D] over the devices along `axes` of what
    `work(tokens, ids, share)`, given those of all of them, makes of its own."""
    for axis in reversed(axes):
        tokens, ids, share = (jax.lax.all_gather(a, axis, tiled=True) for a in (tokens, ids, share))
    y = work(tokens, ids, share, jnp.float32)
    for axis in axes:
        y = jax.lax.psum_scatter(y, axis, tiled=True)
    return y


def sent(tokens, ids, share, work: Work, axes: tuple[str, ...], peer):
    """The same, by sending each token once to each device that has some of its experts: `peer [T, k]` says which, as
    their number along `axes`, or a number past the last one for no device. The parts of the sum travel in the tokens'
    dtype and are added in float32."""
    T, k = ids.shape
    P = jax.lax.axis_size(axes)
    # The first of a token's choices that lie on one device stands for all of them there.
    same = (peer[:, :, None] == peer[:, None, :]) & jnp.tri(k, k, -1, dtype=bool)
    stands = (peer < P) & ~same.any(-1)  # [T, k]
    to = jnp.where(stands, peer, P).reshape(-1)
    iota = jnp.arange(T * k, dtype=jnp.int32) + 0 * to  # not plain: see routed_experts
    _, order = jax.lax.sort_key_val(to, iota)  # row r to be sent is choice order[r], that is of token order[r] // k
    _, place = jax.lax.sort_key_val(order, iota)
    rows = order[: T * min(k, P)] // k
    counts = jax.lax.all_gather((to[:, None] == jnp.arange(P)).sum(0, dtype=jnp.int32), axes)  # [from, to]
    # Ids travel as float32, which holds them exactly, beside the shares, which have a gradient.
    extra = jnp.concatenate([jax.lax.stop_gradient(ids).astype(jnp.float32), share], 1)
    got, extra = (cast(jax.Array, _send(a[rows], counts, P * T, axes)) for a in (tokens, extra))
    here = jnp.arange(P * T)[:, None] < counts[:, jax.lax.axis_index(axes)].sum()
    y = work(got, jnp.where(here, extra[:, :k].astype(jnp.int32), -1), extra[:, k:], tokens.dtype)
    back = cast(jax.Array, _send(y, counts.T, rows.shape[0], axes))
    place = jnp.minimum(place, rows.shape[0] - 1).reshape(T, k)
    part = lambda j: jnp.where(stands[:, j, None], back[place[:, j]].astype(jnp.float32), 0)
    return functools.reduce(jnp.add, map(part, range(k)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _send(x, counts, rows: int, axes: tuple[str, ...]):
    """x [M, ...], of which the first counts[me, 0] rows go to device 0 along `axes`, the next counts[me, 1] to device
    1, and so on -> [rows, ...]: what device 0 sent here, then device 1, and zeros."""
    me = jax.lax.axis_index(axes)
    before = lambda a, axis: jnp.cumsum(a, axis) - a
    arguments = x, before(counts[me], 0), counts[me], before(counts, 0)[me], counts[:, me]
    ragged = functools.partial(_ragged, rows=rows, axes=axes)
    return jax.lax.platform_dependent(
        *arguments, cpu=functools.partial(_ragged_on_cpu, rows=rows, axes=axes), default=ragged
    )


def _send_forward(x, counts, rows, axes):
    return _send(x, counts, rows, axes), (counts, x[:, :0])


def _send_backward(rows, axes, saved, dy):  # back to where they came from
    counts, x = saved
    return _send(dy, counts.T, x.shape[0], axes), None


_send.defvjp(_send_forward, _send_backward)


def _ragged(x, starts, sizes, places, comes, rows, axes):
    nothing = jnp.broadcast_to(jnp.zeros_like(x[:1]), (rows, *x.shape[1:]))
    return jax.lax.ragged_all_to_all(x, nothing, starts, sizes, places, comes, axis_name=axes)


def _ragged_on_cpu(x, starts, sizes, places, comes, rows, axes):
    """The same with collectives that a CPU has: everything comes, and what was meant for this device is looked up."""
    me = jax.lax.axis_index(axes)
    theirs = jax.lax.all_gather(x, axes)  # [P, M, ...]
    starts, sizes, places = (jax.lax.all_gather(a, axes)[:, me] for a in (starts, sizes, places))  # [P], sent here
    row = jnp.arange(rows)[:, None] - places  # [rows, P]
    inside = (row >= 0) & (row < sizes)
    source = jnp.argmax(inside, 1)
    at = source * x.shape[0] + starts[source] + jnp.take_along_axis(row, source[:, None], 1)[:, 0]
    at = jnp.where(inside.any(1), at, 0)
    y = theirs.reshape(-1, *x.shape[1:])[at]
    return jnp.where(inside.any(1).reshape(-1, *(1,) * (x.ndim - 1)), y, 0)
