"""What one step computes, reads and sends on each device, by formula, and the least time that takes."""

import dataclasses

from glm_jax.config import Config
from glm_jax.hlo import Roofline, roofline
from glm_jax.model import axes_size, cached_heads, rules_for
from glm_jax.sharding import Rules, mesh_axes
from glm_jax.targets import Chip
from glm_jax.traffic import expected


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one step, on each device: FLOP, bytes of memory that are read, and `hlo.roofline`'s seconds for them."""

    flops: float
    bytes: float
    roofline: Roofline

    @property
    def seconds(self) -> float:
        return self.roofline.seconds


def step_cost(
    config: Config, mesh, rules: Rules, rows: int, tokens: int, slots: int, on: Chip, fp8=False, real=None, fresh=True
) -> Cost:
    """The least that a step of `tokens` for each of `rows` takes: one token with a cache of `slots`, all full, or the
    first `tokens` of a prompt, or if not `fresh` its last with a full cache. Without the MTP layer and the choice of
    the next token.

    A device has t = rows * tokens / (batch * seq) tokens, and its experts see those of the whole group, n = t * g.

        FLOP  = 2 t (attention + dense, shared and router weights) + 2 n k / E * (a layer's expert weights) * layers
                + 4 t * heads * head width * keys * layers + 2 rows * head
        bytes = the weights that are read, of the experts the expected number, E (1 - (1 - k/E)^n) of E, and the cache

    each as much of it as lies on the device. Of the rows `real` are no padding, whose tokens no expert sees. keys: the
    slots, or on average (tokens + 1) / 2 of a prompt's own. Sent: `traffic.expected`. With `fp8` the matrices have a
    byte a weight and are multiplied at the chip's FP8 rate."""
    c, rules = config, rules_for(mesh, rules, tokens)
    size = lambda *axes: axes_size(mesh, *axes)
    together = mesh_axes([rules.batch, rules.seq])
    t, own_rows = rows * tokens / size(rules.batch, rules.seq), rows / size(rules.batch)
    n = t * size(*(a for a in mesh_axes([rules.experts]) if a in together)) * (rows if real is None else real) / rows
    D, H, E, k, L, M = (
        c.hidden_size,
        c.head_dim,
        c.n_routed_experts,
        c.num_experts_per_tok,
        c.num_hidden_layers,
        c.moe_layers,
    )
    N, kv = c.num_attention_heads / size(rules.heads), cached_heads(c, mesh, rules) / size(rules.heads)
    attention = L * 2 * (N + kv) * H * D
    inner = c.dense_layers * c.intermediate_size + M * c.n_shared_experts * c.moe_intermediate_size
    shared, router, head = 3 * inner * D / size(rules.ffn), M * E * D, c.vocab_size * D / size(rules.vocab)
    experts = M * E / size(rules.experts) * 3 * c.moe_intermediate_size * D / size(rules.expert_ffn)
    full = tokens == 1 or not fresh
    # A device has the queries of all tokens along its slots' axes, each for its own share of the slots.
    keys = slots / size(rules.slots) * size(rules.seq) if full else (tokens + 1) / 2
    touched = 1 - (1 - k / E) ** n if M else 0
    flops = 2 * t * (attention + shared + router) + 2 * n * k / E * experts + 4 * t * N * H * keys * L
    flops += 2 * own_rows * head
    wide = c.dtype.itemsize
    read = (1 if fp8 else wide) * (attention + shared + touched * experts) + wide * (router + head)
    read += own_rows * (slots / size(rules.slots) if full else tokens) * 2 * L * kv * H * wide
    on = dataclasses.replace(on, bf16=on.fp8) if fp8 else on
    sent = expected(c, mesh, rules, rows, tokens, slots, not full)
    return Cost(flops, read, roofline(flops, read, sent, on, mesh))
