"""The training loss: next-token cross-entropy, and the MTP layer's."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Shaped

from glm_jax.errors import UsageError
from glm_jax.model import GLM, ahead, checked_ids, hand_out, in_mesh, padded_rows, with_all_gradients
from glm_jax.processes import placed


def loss(model: GLM, ids, mask=None, mtp_weight: float = 0.0, remat: bool = True):
    """The mean cross-entropy in nats of ids [B, T] given the tokens before, and what else a training run looks at.

    `mask [B, T]` says which tokens count as targets (default all; the first never does). With `mtp_weight` above 0 the
    MTP layer's loss, on the token after the next, is added with that weight. `remat` recomputes each layer in the
    backward pass instead of keeping its activations. A batch that the mesh does not divide is padded, which changes
    none of the numbers. To be differentiated, inside jit or not.

    Returns the scalar and a dict: "loss" and "mtp_loss" (nats a token), "tokens" (targets counted), "load" [L, E] and
    "mtp_load" [1, E] (tokens each expert got; every token counts, masked or not)."""
    ids = jnp.asarray(ids if isinstance(ids, Tracer) else checked_ids(ids, model.config.vocab_size))
    if ids.ndim != 2 or ids.shape[1] < 2 + (mtp_weight > 0):
        raise UsageError(f"ids must be [batch, tokens] with a next token to predict, its shape is {ids.shape}")
    if mtp_weight > 0 and model.mtp is None:
        raise UsageError(f"mtp_weight is {mtp_weight}, but this model has no MTP layer")
    mask = jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask)
    if mask.shape != ids.shape:
        raise UsageError(f"mask must say of each of the ids {ids.shape} whether it counts, its shape is {mask.shape}")
    rows = ids.shape[0]
    ids, mask = (jnp.pad(a, ((0, padded_rows(model, rows) - rows), (0, 0))) for a in (ids, mask))
    # Placed, so that outside jit the parts without a weight still know their devices.
    rules = model.rules_for(ids.shape[1])
    ids, mask = placed((ids, mask), jax.NamedSharding(model.mesh, rules("batch", "seq")))
    graph, state = nnx.split(model)
    mean, metrics = _loss(graph, state, ids, mask, rows, float(mtp_weight), remat)
    if isinstance(jnp.zeros(()), Tracer):  # staged, so inside jit and beside weights: as the weights are
        return mean, metrics
    return hand_out(model, mean, jax.P()), jax.lax.stop_gradient(metrics)


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
@in_mesh
def _loss(model, ids, mask, rows, mtp_weight, remat):
    rules, c = model.rules_for(ids.shape[1]), model.config
    ids, mask = (jax.reshard(a, rules("batch", "seq")) for a in (ids, mask))
    collect = ("routing",) if c.moe_layers else ()
    real = jnp.arange(ids.shape[0]) < rows  # the rest fills the mesh
    advance = jnp.where(real, ids.shape[1], 0)
    hidden, _, found = model.trunk(ids, None, advance, collect=collect, scan_experts=True, remat=remat)
    load = lambda chosen, real: expert_load(jnp.where(real[..., None], chosen, -1), c.n_routed_experts)
    mean, count = cross_entropy(model.logits(hidden), ahead(ids, 1, rules), ahead(mask, 1, rules))
    metrics = {"loss": mean, "tokens": count}
    if collect:
        metrics["load"] = load(found["routing"][0], real[:, None])
    if mtp_weight == 0:
        return with_all_gradients(mean, nnx.state(model)), metrics
    hidden, routing = model.mtp_hidden(ids, hidden, scan_experts=True, remat=remat)
    # Its state i has seen token i+1 and predicts token i+2.
    mtp, _ = cross_entropy(model.logits(hidden), ahead(ids, 2, rules), ahead(mask, 2, rules))
    real = real[:, None] & (jnp.arange(ids.shape[1]) < ids.shape[1] - 1)  # the last is no state
    metrics |= {"mtp_loss": mtp, "mtp_load": load(routing[0], real)}
    return with_all_gradients(mean + mtp_weight * mtp, nnx.state(model)), metrics


def cross_entropy(logits: Float[Array, "B T V"], targets: Int[Array, "B T"], mask: Shaped[Array, "B T"]):
    """The mean of -log p(target) over the masked-in places, in float32, and how many they are. Called while tracing."""
    logits = logits.astype(jnp.float32)
    # A sum over a comparison, not a look-up: the vocabulary may be sharded, and this fuses.
    chosen = jnp.where(targets[..., None] == jnp.arange(logits.shape[-1]), logits, 0).sum(-1)
    nats = jax.nn.logsumexp(logits, -1) - chosen
    count = mask.sum()
    return (nats * mask).sum() / jnp.maximum(count, 1), count


def expert_load(ids: Int[Array, "L B T k"], experts: int) -> Int[Array, "L E"]:
    """How many tokens each expert of each layer got."""
    return (ids[..., None] == jnp.arange(experts)).sum((1, 2, 3), dtype=jnp.int32)
