"""Keys and values of the tokens so far."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from glm_jax.config import Config
from glm_jax.sharding import Rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, with each row's own length. Immutable: a step returns a new one, and XLA updates
    the buffers in place because the caller donates them and the layer scan carries them."""

    k: jax.Array  # [L, B, K, S, H]: slots next to the numbers of a head, so that a step writes and reads whole rows
    v: jax.Array  # [L, B, K, S, H]
    length: jax.Array  # [B] int32, tokens written so far

    @classmethod
    def empty(cls, config: Config, rules: Rules, mesh: jax.sharding.Mesh, batch: int, size: int, heads: int) -> "Cache":
        """A cache of `size` slots for `batch` rows and `heads` KV heads, each of which its mesh axes must divide."""
        shape = (config.num_hidden_layers, batch, heads, size, config.head_dim)
        place = lambda *axes: jax.NamedSharding(mesh, rules(*axes))
        zeros = lambda: jnp.zeros(shape, config.dtype, device=place(None, "batch", "heads", "slots", None))
        return cls(zeros(), zeros(), jnp.zeros(batch, jnp.int32, device=place("batch")))

    @property
    def size(self) -> int:
        """Slots for tokens in each row."""
        return self.k.shape[3]


def cache_bytes(config: Config, batch: int, size: int, heads: int | None = None) -> int:
    """Bytes of a cache over all devices, for the layers a forward pass caches; `heads` where KV heads are repeated."""
    per_token = (
        2 * config.num_hidden_layers * (heads or config.num_key_value_heads) * config.head_dim * config.dtype.itemsize
    )
    return batch * size * per_token


def write(stack: jax.Array, new: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
    """One device's share of `stack [L, B, K, S, H]` with `new [B, T, K, H]` in slots `start[b] ...` of row b.

    What falls before slot 0 or past the last one, as for a device that has other slots, is dropped, never moved."""
    (_, B, K, S, H), T = stack.shape, new.shape[1]
    window = min(T, S)

    def row(b, stack):  # an update of a slice, which XLA does in place; its scatter turns the whole cache around on TPU
        at = jnp.clip(start[b], 0, S - window)
        where = (layer, b, 0, at, 0)
        source = at + jnp.arange(window) - start[b]  # which of the new ones goes into each slot of the window
        old = jax.lax.dynamic_slice(stack, where, (1, 1, K, window, H))
        mine = new[b].at[jnp.clip(source, 0, T - 1)].get(mode="promise_in_bounds").swapaxes(0, 1).astype(stack.dtype)
        inside = (source >= 0) & (source < T)
        stack = jax.lax.dynamic_update_slice(stack, jnp.where(inside[:, None], mine, old[0, 0])[None, None], where)
        # Without this XLA may keep a loop's cache in another order and copy the whole of it on the way in and out.
        return with_layout_constraint(stack, Layout((0, 1, 2, 3, 4)))

    return row(0, stack) if B == 1 else jax.lax.fori_loop(0, B, row, stack)
