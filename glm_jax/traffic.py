"""The collectives of one step of generation, by formula: what docs/sharding.md derives and what tests hold the compiled
program to."""

import math

from glm_jax import dispatch
from glm_jax.config import Config
from glm_jax.hlo import Collective
from glm_jax.model import attention_blocks, axes_size, cached_heads, rules_for
from glm_jax.sharding import Rules, device_kind, mesh_axes


def expected(config: Config, mesh, rules: Rules, rows: int, tokens: int, slots: int, fresh: bool) -> list[Collective]:
    """Every collective of a step in which each of `rows` rows has `tokens` new tokens, with a cache of `slots`, which
    is empty if `fresh`. Axes of size 1 move nothing and are left out. Rules with a `width` are for training: their
    weights come together besides. Of a ragged all-to-all `sent` is what a device sends if every choice of experts is as
    likely. A CPU reduces the shared expert's output and the routed experts' apart, other devices add them before."""
    c, wide, found = config, config.dtype.itemsize, []
    rules = rules_for(mesh, rules, tokens)
    size = lambda *axes: axes_size(mesh, *axes)

    def above_one(*axes):
        return tuple(a for a in mesh.shape if a in mesh_axes(axes) and mesh.shape[a] > 1)

    def add(kind: str, axes, numbers: int, width: int, count: int, source: str, sent: float | None = None):
        if (axes := above_one(axes)) and count:
            sends = None if sent is None else round(sent * width)
            found.append(Collective(kind, axes, numbers * width, count, source, sent=sends))

    B, T = rows // size(rules.batch), tokens // size(rules.seq)  # on one device
    D, N, H, k = c.hidden_size, c.num_attention_heads // size(rules.heads), c.head_dim, c.num_experts_per_tok
    states, L = B * T * D, c.num_hidden_layers
    add("all-reduce", rules.vocab, states, wide, 1, "embedding: each device has some rows of the table")
    # Attention.
    kv = cached_heads(c, mesh, rules) // size(rules.heads)
    held = T
    for axis in mesh_axes([rules.seq])[::-1]:
        held *= mesh.shape[axis]
        add("all-gather", axis, B * held * kv * H, wide, 2 * L, "keys and values of the other tokens")
    if rules.slots and not fresh:
        asked, own = T, [a for a in mesh_axes([rules.seq]) if a in mesh_axes([rules.slots])]
        for axis in own[::-1]:
            asked *= mesh.shape[axis]
            add("all-gather", axis, B * asked * N * H, wide, L, "queries of the other tokens")
            add("all-gather", axis, B * asked, 4, L, "and their positions")
        blocks, block = attention_blocks(B, asked, N, slots // size(rules.slots))
        each = B * block * N
        add("all-reduce", rules.slots, each, 4, L * blocks, "the highest score of all slots")
        add("all-reduce", rules.slots, each * H, 4, L * blocks, "values weighed over all slots")
        add("all-reduce", rules.slots, each, 4, L * blocks, "and the weights' sum")
    add("all-reduce", rules.heads, states, wide, L, "attention's output: each device has some heads")
    # MLPs.
    M = c.moe_layers
    add("all-reduce", rules.ffn, states, wide, c.dense_layers, "dense layers: each device has some hidden units")
    experts, together = mesh_axes([rules.experts]), mesh_axes([rules.batch, rules.seq])
    own = [a for a in experts if a in together]
    summed = tuple(a for a in (*experts, *mesh_axes([rules.expert_ffn])) if a not in own)
    added = above_one(*summed) == above_one(rules.ffn) and device_kind(mesh) != "cpu"
    shared = M if c.n_shared_experts and not added else 0
    add("all-reduce", rules.ffn, states, wide, shared, "the shared expert, likewise")
    if dispatch.sends(size(*own), device_kind(mesh)):
        P, E, ragged, axes = size(*own), c.n_routed_experts, "ragged-all-to-all", tuple(own)
        copies = B * T * (P - 1) * (1 - math.comb(E - E // size(*experts), k) / math.comb(E, k))  # to other devices
        add("all-gather", axes, P * P, 4, M, "how many tokens go where")
        add(ragged, axes, P * B * T * D, wide, M, "tokens to their experts' devices", copies * D)
        add(ragged, axes, P * B * T * 2 * k, 4, M, "their experts and shares", copies * 2 * k)
        add(ragged, axes, B * T * min(k, P) * D, wide, M, "what the experts made of them, back", copies * D)
    else:
        many = B * T
        for axis in own[::-1]:
            many *= mesh.shape[axis]
            add("all-gather", axis, many * D, wide, M, "the tokens of the expert group")
            add("all-gather", axis, many * k, 4, M, "their experts")
            add("all-gather", axis, many * k, 4, M, "and shares")
        for axis in own:
            add("reduce-scatter", axis, many * D, 4, M, "each device's tokens, summed over the experts")
            many //= mesh.shape[axis]
    what = "the experts' output: each device has some, or some of their hidden units"
    add("all-reduce", summed, states, wide, M, f"{what}; the shared expert's added" if added else what)
    # The next token.
    if tokens > 1:
        add("all-reduce", rules.seq, B * D, wide, 1, "each row's last state")
    add("all-gather", rules.vocab, B * c.vocab_size, wide, 1, "logits: each device has some of the vocabulary")
    return found
