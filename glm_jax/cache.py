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

    k: jax.Array  # [L, B, K, S, H]: slots next to the head, so that a step writes and reads whole rows
    v: jax.Array  # [L, B, K, S, H]
    length: jax.Array  # [B] int32, tokens written so far

    @classmethod
    def empty(cls, config: Config, rules: Rules, mesh: jax.sharding.Mesh, batch: int, size: int) -> "Cache":
        """A cache of `size` slots for `batch` rows, which must divide by the mesh axes of `rules.batch`."""
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, size, config.head_dim)
        place = lambda *axes: jax.NamedSharding(mesh, rules(*axes))
        zeros = lambda: jnp.zeros(shape, config.dtype, device=place(None, "batch", "heads", "seq", None))
        return cls(zeros(), zeros(), jnp.zeros(batch, jnp.int32, device=place("batch")))

    @property
    def size(self) -> int:
        """Slots for tokens in each row."""
        return self.k.shape[3]


def cache_bytes(config: Config, batch: int, size: int) -> int:
    """Bytes of a cache over all devices, for the layers a forward pass caches."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * config.dtype.itemsize
    return batch * size * per_token


def write(stack: jax.Array, new: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
    """One device's share of `stack [L, B, K, S, H]` with `new [B, T, K, H]` in slots `start[b] ...` of row b.

    What would fall past the last slot is dropped, never moved."""
    slots = start[:, None] + jnp.arange(new.shape[1])  # [B, T]
    rows = jnp.arange(new.shape[0])[:, None]
    stack = stack.at[layer, rows, :, slots].set(new.astype(stack.dtype), mode="drop", unique_indices=True)
    # Without this XLA may keep the scan's cache in another order and copy the whole of it on the way in and out.
    return with_layout_constraint(stack, Layout((0, 1, 2, 3, 4)))
