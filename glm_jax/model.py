"""GLM-4.5, 4.6 and 4.7: embedding, dense layers, mixture-of-experts layers, head, and the MTP layer.

Dimensions: B batch, T new tokens, S cache slots, D model width, N query heads, K key/value heads, H head width,
R rotated part of a head, E experts, k experts a token, F inner width, V vocabulary, L layers.
Weights keep the checkpoint's [out, in] orientation, stacked over layers (and experts) in front.

Shardings are explicit: a sum over a sharded dimension names its result's sharding, and a missing one is an error while
tracing. Two islands are `shard_map`s, attention and routed experts; kernels are called only there, and on one device by
`linear` too."""

import dataclasses
import functools
import logging
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from glm_jax import dispatch, kernels
from glm_jax.cache import Cache, write
from glm_jax.config import Config
from glm_jax.errors import UsageError
from glm_jax.processes import everywhere, index, placed
from glm_jax.sharding import Rules, auto, describe, device_kind, mesh_axes
from glm_jax.sharding import mesh as make_mesh
from glm_jax.sharding import rules as make_rules

FLOAT32 = jnp.dtype("float32")
QUERY_BLOCK = 256  # queries that attend at once, at most
SCORES = 2**28  # and the scores they may have, in numbers: 1 GiB in float32
PREFILL_CHUNK = 2048  # tokens of each prompt that go through the model at once
KEPT_SCORES = 2**22  # up to which a layer's scores are kept for its backward pass


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matrix:
    """Matrix i of a stack [G, ...], not cut out: what multiplies a few rows by it reads it where it lies."""

    stack: jax.Array
    i: "jax.Array | int"

    def __getitem__(self, c) -> "Matrix":
        """Of a stack [G, n, ...], the c-th of the n; with `...`, as of an array, itself."""
        if c is ...:
            return self
        G, n, *rest = self.stack.shape
        return Matrix(self.stack.reshape(G * n, *rest), self.i * n + c)


def reads_in_place(x) -> bool:
    """Whether x [B, T, D] has so few rows that on a CPU they multiply a `Matrix` without a copy of it."""
    return jax.sharding.get_abstract_mesh().size == 1 and kernels.is_few(x.shape[0] * x.shape[1], x.dtype)


def linear(x: Float[Array, "B T *in"], w: "Array | Matrix", spec: jax.P | None = None) -> Float[Array, "B T *out"]:
    """x times w [*out, *in]. `spec` is the result's sharding where `in` is sharded and the products are summed."""
    if isinstance(w, Matrix):
        return _linear_in_place(x, w, spec)
    out = w.shape[: w.ndim - x.ndim + 2]
    # As one matrix of rows: XLA on CPU would transpose a stack of them.
    rows, matrix = x.reshape(x.shape[0], x.shape[1], -1), w.reshape(int(np.prod(out)), -1)
    y = jnp.einsum("btd,id->bti", rows, matrix, out_sharding=spec)
    if len(out) == 1:
        return y
    # Left to itself, a reshape of a dimension cut by two axes gives the second one to the next dimension if it can.
    spec = jax.P(*jax.typeof(y).sharding.spec[:2], *jax.typeof(w).sharding.spec[: len(out)])
    return jnp.reshape(y, (*y.shape[:2], *out), out_sharding=spec)


def _linear_in_place(x, w: Matrix, spec):
    B, T, *in_ = x.shape
    out = w.stack.shape[1 : w.stack.ndim - len(in_)]
    x, stack = x.reshape(B, T, -1), w.stack.reshape(w.stack.shape[0], int(np.prod(out)), -1)
    spec = spec or jax.P(*jax.typeof(x).sharding.spec[:2], jax.typeof(stack).sharding.spec[1])

    @functools.partial(jax.sharding.auto_axes, out_sharding=spec)  # there is one device, so nothing to shard
    def multiply(x, stack, i):
        matmul = lambda x, stack, i: x @ stack[i].T
        y = jax.lax.platform_dependent(x.reshape(B * T, -1), stack, i, cpu=kernels.few_rows, default=matmul)
        return y.reshape(B, T, -1)

    return multiply(x, stack, w.i).reshape(B, T, *out)  # pyright: ignore[reportCallIssue]


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """RMSNorm in float32, cast to x's dtype before the weight is applied, as the published model does."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)).astype(x.dtype) * scale


def rope_angles(positions: Int[Array | np.ndarray, "B T"], config: Config) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, 1, R/2] of the rotary angles, in float32.

    The frequencies are rounded to float32 step by step as the reference rounds them: at position 202,751 one unit in
    their last place is already 1e-2 radians."""
    R = config.rotary_dim
    exponent = (np.arange(0, R, 2, dtype=np.float32) / np.float32(R)).astype(np.float64)
    power = (np.float64(config.rope_theta) ** exponent).astype(np.float32)
    frequency = np.float32(1) / power
    angle = jnp.asarray(positions).astype(jnp.float32)[:, :, None, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rope(x: Float[Array, "B T N H"], angles: tuple[jax.Array, jax.Array]) -> Float[Array, "B T N H"]:
    """Rotates the pairs (j, j + R/2) of the first R entries of each head; the rest passes through."""
    cos, sin = (a.astype(x.dtype) for a in angles)
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    positions: Int[Array, "B T"],
    first: "int | Int[Array, '']" = 0,
    over: tuple[str, ...] = (),
) -> Float[Array, "B T N H"]:
    """Causal attention of queries at `positions` over slots 0, 1, ...: query head n reads KV head n // (N / K).

    Inside a shard_map, k and v may hold only the slots from `first` on, the others being on the devices along the mesh
    axes `over`: each weighs its own, and the sum over them is what every one gets.

    A block of queries at a time, so that no [T, S] matrix of all queries is ever held, forward or backward."""
    (B, T, N, H), K = q.shape, k.shape[1]
    blocks, t = attention_blocks(B, T, N, k.shape[2])
    q, positions = (jnp.pad(a, [(0, 0), (0, blocks * t - T)] + [(0, 0)] * (a.ndim - 2)) for a in (q, positions))
    # [blocks, B, K, query heads of one KV head * t, H]: each KV head is one matmul
    q = q.reshape(B, blocks, t, K, N // K, H).transpose(1, 0, 3, 4, 2, 5).reshape(blocks, B, K, -1, H)
    positions = positions.reshape(B, blocks, t).swapaxes(0, 1)

    def attend(q, positions):
        scores = jnp.einsum("bkih,bksh->bkis", q, k, preferred_element_type=jnp.float32) * H**-0.5
        seen = first + jnp.arange(k.shape[2]) <= positions[:, None, None, :, None]
        scores = jnp.where(seen, scores.reshape(B, K, N // K, t, -1), -jnp.inf).reshape(B, K, -1, k.shape[2])
        if not over:
            return jnp.einsum("bkis,bksh->bkih", jax.nn.softmax(scores, -1).astype(v.dtype), v)
        highest = jax.lax.pmax(scores.max(-1, keepdims=True), over)  # slot 0 is seen by every query, so it is finite
        weights = jnp.exp(scores - highest)
        y = jnp.einsum("bkis,bksh->bkih", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        y, total = jax.lax.psum((y, weights.sum(-1, keepdims=True)), over)
        return (y / total).astype(v.dtype)

    if blocks == 1:
        y = attend(q[0], positions[0])[None]
    else:
        y = jax.lax.map(lambda item: jax.checkpoint(attend)(*item), (q, positions))
    y = y.reshape(blocks, B, K, N // K, t, H).transpose(1, 0, 4, 2, 3, 5)
    return y.reshape(B, blocks * t, N, H)[:, :T]


def attention_blocks(B: int, T: int, N: int, S: int) -> tuple[int, int]:
    """Into how many blocks attention takes its queries, and how many of each row are in one."""
    blocks = -(-T // max(1, min(QUERY_BLOCK, SCORES // (B * N * S))))
    return blocks, -(-T // blocks)


def self_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T H"]
) -> Float[Array, "B T N H"]:
    """The same over the queries' own keys: a quarter of the queries at a time, over no later keys than theirs, which
    saves three eighths of the work. More parts save up to half, but XLA holds all of them at once.

    For the backward pass the scores are kept if they are few, else computed again."""
    B, T, N, _ = q.shape
    part = max(64, -(-T // 4))

    def attend(start, q, k, v):
        end = min(start + part, T)
        positions = jnp.broadcast_to(jnp.arange(start, end), (B, end - start))
        return attention(q[:, start:end], k[:, :, :end], v[:, :, :end], positions)

    if B * N * T * T > KEPT_SCORES:  # with the slicing inside, or every slice of the keys would be kept instead
        attend = jax.checkpoint(attend, static_argnums=0)
    return jnp.concatenate([attend(start, q, k, v) for start in range(0, T, part)], 1)


def route(
    x: Float[Array, "T D"], router: Float[Array, "E D"], bias: Float[Array, "E"], config: Config
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """Which experts each token goes to, and the weight of each, in float32 throughout.

    The correction bias moves the choice and never the weight. Whole groups outside the best `topk_group`, by the sum
    of their two best experts, are out."""
    c = config
    logits = jnp.einsum(
        "td,ed->te", x.astype(jnp.float32), router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    scores = jax.nn.sigmoid(logits)
    choice = scores + bias
    if c.n_group > 1:
        grouped = choice.reshape(-1, c.n_group, c.n_routed_experts // c.n_group)
        best_two = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
        _, kept = jax.lax.top_k(best_two, c.topk_group)
        kept = (kept[:, :, None] == jnp.arange(c.n_group)).any(1)
        choice = jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
    _, ids = jax.lax.top_k(choice, c.num_experts_per_tok)
    share = jnp.take_along_axis(scores, ids, -1)
    if c.norm_topk_prob:
        share = share / (share.sum(-1, keepdims=True) + 1e-20)
    return ids, share * c.routed_scaling_factor


class Attention(nnx.Module):
    def __init__(self, config: Config, weight, L: int):
        c = config
        D, N, K, H = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q = weight((L, N, H, D), "heads", None, "width")
        self.k = weight((L, K, H, D), "kv_heads", None, "width")
        self.v = weight((L, K, H, D), "kv_heads", None, "width")
        self.o = weight((L, D, N, H), "width", "heads", None)
        if c.attention_bias:
            self.q_bias = weight((L, N, H), "heads", None)
            self.k_bias = weight((L, K, H), "kv_heads", None)
            self.v_bias = weight((L, K, H), "kv_heads", None)
        if c.use_qk_norm:
            self.q_norm, self.k_norm = weight((L, H), None), weight((L, H), None)

    def __call__(self, x, step: "Step", cache: Cache | None, layer):  # x [B, T, D]
        c, rules = step.config, step.rules
        q, k, v = (linear(x, w[...]) for w in (self.q, self.k, self.v))
        if c.attention_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        if c.use_qk_norm:
            q, k = rms_norm(q, self.q_norm[...], c.rms_norm_eps), rms_norm(k, self.k_norm[...], c.rms_norm_eps)
        q, k = rope(q, step.angles), rope(k, step.angles)

        tokens, slots = mesh_axes([rules.seq]), mesh_axes([rules.slots])
        whole = lambda a: functools.reduce(
            lambda a, axis: jax.lax.all_gather(a, axis, axis=1, tiled=True), tokens[::-1], a
        )

        # Per device: some rows, some tokens of each, and the query heads and the KV heads that these read.
        @jax.shard_map(out_specs=rules("batch", "seq", "heads", None))
        def attend(q, k, v, places):
            k, v = (whole(step.own_kv_heads(a)).swapaxes(1, 2) for a in (k, v))  # [B, K, T, H]
            return attention(q, k, v, places) if tokens else self_attention(q, k, v)

        cache_spec = rules(None, "batch", "heads", "slots", None)

        @jax.shard_map(out_specs=(rules("batch", "seq", "heads", None), cache_spec, cache_spec))
        def write_and_attend(q, k, v, positions, start, ck, cv, layer):
            k, v = (whole(step.own_kv_heads(a)) for a in (k, v))
            first = jax.lax.axis_index(slots) * ck.shape[3] if slots else 0
            ck, cv = write(ck, k, layer, start - first), write(cv, v, layer, start - first)
            if step.fresh:  # there are no earlier keys, and the cache may be much longer than these
                k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
                return (attention(q, k, v, positions) if tokens else self_attention(q, k, v)), ck, cv
            # Each device asks its slots for the tokens of all the others along them.
            shared = tuple(a for a in tokens if a in slots)
            for axis in reversed(shared):
                q, positions = (jax.lax.all_gather(a, axis, axis=1, tiled=True) for a in (q, positions))
            y = attention(q, ck[layer], cv[layer], positions, first, slots)
            for axis in shared:
                T = y.shape[1] // jax.lax.axis_size(axis)
                y = jax.lax.dynamic_slice_in_dim(y, jax.lax.axis_index(axis) * T, T, 1)
            return y, ck, cv

        if cache is None:
            y = attend(q, k, v, step.places)
        else:
            y, ck, cv = write_and_attend(q, k, v, step.positions, step.start, cache.k, cache.v, layer)
            cache = Cache(ck, cv, cache.length)
        return linear(y, self.o[...], rules("batch", "seq", None)), cache


class MLP(nnx.Module):
    def __init__(self, config: Config, weight, L: int, F: int):
        self.gate_up = weight((L, 2, F, config.hidden_size), None, "ffn", "width")
        self.down = weight((L, config.hidden_size, F), "width", "ffn")

    def __call__(self, x, step: "Step"):  # x [B, T, D]
        gate, up = (linear(x, self.gate_up[...][c]) for c in (0, 1))
        h = jax.nn.silu(gate) * up
        return linear(h, self.down[...], step.rules("batch", "seq", None))


class MoE(nnx.Module):
    def __init__(self, config: Config, weight, L: int):
        D, E, F = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
        self.router = weight((L, E, D), None, "width")
        self.bias = weight((L, E), None, dtype=FLOAT32)  # e_score_correction_bias; in bfloat16 it picks other experts
        self.gate_up = weight((L, E, 2, F, D), "experts", None, "expert_ffn", "width")
        self.down = weight((L, E, D, F), "experts", "width", "expert_ffn")
        self.shared = MLP(config, weight, L, F * config.n_shared_experts)

    def __call__(self, x, step: "Step", layer):  # x [B, T, D] -> the same, and ids [B, T, k], share [B, T, k]
        c, rules = step.config, step.rules
        tokens_spec = rules("batch", "seq", None)
        experts = mesh_axes([rules.experts])
        own = tuple(a for a in experts if a in mesh_axes([rules.batch, rules.seq]))  # along which tokens differ
        summed = tuple(a for a in (*experts, *mesh_axes([rules.expert_ffn])) if a not in own)
        gate_up, down = self.gate_up[...], self.down[...]
        kind = device_kind(step.mesh)
        if gate_up.ndim == 4:  # this layer's own experts, a slice that the scan made: a stack of one
            gate_up, down, layer = gate_up[None], down[None], jnp.zeros_like(layer)

        # Per device: its own tokens choose, they come to the devices of their experts, these work on them, and each
        # device gets the sum for its own tokens back.
        @jax.shard_map(out_specs=(tokens_spec,) * 3)
        def routed(x, real, router, bias, gate_up, down, layer):
            tokens = x.reshape(-1, x.shape[-1])
            ids, share = chosen = route(tokens, router, bias, c)
            ids = jnp.where(real.reshape(-1, 1), ids, c.n_routed_experts)  # padding is no expert's work
            first = jax.lax.axis_index(experts) * down.shape[1] if experts else 0

            def work(tokens, ids, share, dtype):
                weights = gate_up, down, layer
                return kernels.routed_experts(
                    tokens, ids - first, share, *weights, dtype, None, step.kernels, kind, c.n_routed_experts
                )

            if not dispatch.sends(jax.lax.axis_size(own) if own else 1, kind):
                y = dispatch.gathered(tokens, ids, share, work, own)
            else:
                sizes = [jax.lax.axis_size(a) for a in experts]
                at = dict(zip(experts, jnp.unravel_index(ids // down.shape[1], sizes), strict=True))
                peer = jnp.ravel_multi_index([at[a] for a in own], [jax.lax.axis_size(a) for a in own], mode="wrap")
                peer = jnp.where(ids < c.n_routed_experts, peer, c.n_routed_experts)
                y = dispatch.sent(tokens, ids, share, work, own, peer)
            y = jax.lax.psum(y.astype(x.dtype), summed)
            return y.reshape(x.shape), *(a.reshape(*x.shape[:2], -1) for a in chosen)

        y, ids, share = routed(x, step.real, self.router[...], self.bias[...], gate_up, down, layer)
        return y + self.shared(x, step), (ids, share)


class Layer(nnx.Module):
    """A stack of L alike layers; called inside the layer scan, where L is gone."""

    def __init__(self, config: Config, weight, L: int, moe: bool):
        self.attn_norm, self.attn = weight((L, config.hidden_size), None), Attention(config, weight, L)
        self.mlp_norm = weight((L, config.hidden_size), None)
        self.mlp = MoE(config, weight, L) if moe else MLP(config, weight, L, config.intermediate_size)

    def __call__(self, x, step: "Step", cache, cache_layer, expert_layer):
        eps = step.config.rms_norm_eps
        y, cache = self.attn(rms_norm(x, self.attn_norm[...], eps), step, cache, cache_layer)
        x = x + y
        y, routing = rms_norm(x, self.mlp_norm[...], eps), None
        if isinstance(self.mlp, MoE):
            y, routing = self.mlp(y, step, expert_layer)
        else:
            y = self.mlp(y, step)
        return x + y, cache, routing


class MTP(nnx.Module):
    """The layer that drafts the token after the next (multi-token prediction). Embedding and head are the main ones."""

    def __init__(self, config: Config, weight):
        D = config.hidden_size
        self.enorm, self.hnorm, self.norm = weight((D,)), weight((D,)), weight((D,))
        self.eh_proj = weight((D, 2 * D), "width", None, stacked=False)
        self.layer = Layer(config, weight, 1, moe=True)  # always with experts, whatever first_k_dense_replace says


class Step:
    """What every layer of one forward pass shares. Lives only while tracing."""

    def __init__(self, model: "GLM", rules: Rules, start, real, fresh=False):
        """start [B]: the position of each row's first token; real [B, T]: which are tokens and not padding."""
        self.config, self.mesh, self.rules, self.fresh = model.config, model.mesh, rules, fresh
        self.kernels = model.kernels
        self.start, self.real = jax.reshard(start, rules("batch")), jax.reshard(real, rules("batch", "seq"))
        places = jnp.broadcast_to(jnp.arange(real.shape[1], dtype=jnp.int32), real.shape)
        self.places = jax.reshard(places, rules("batch", "seq"))  # [B, T], where among the new tokens
        self.positions = self.start[:, None] + self.places  # and where among all
        self.angles = rope_angles(self.positions, model.config)
        self.kv = model.kv_axes, cached_heads(model.config, model.mesh, rules)

    def own_kv_heads(self, a):
        """Inside a shard_map: of keys or values [B, T, K, H] the heads that this device's query heads read. Where there
        are fewer KV heads than devices, several devices have the same."""
        (kv_axes, cached), heads, K = self.kv, mesh_axes([self.rules.heads]), self.config.num_key_value_heads
        if cached == K:
            return a
        each = cached // jax.lax.axis_size(heads)
        mine = (jax.lax.axis_index(heads) * each + jnp.arange(each)) * K // cached  # their numbers, of all KV heads
        first = jax.lax.axis_index(kv_axes) * a.shape[2] if kv_axes else 0
        return a.at[:, :, mine - first].get(mode="promise_in_bounds")


class GLM(nnx.Module):
    """The model. `logits, cache = model(ids)`.

    `GLM(config)` has random weights (`seed`), spread over `mesh` by `rules`; with `seed=None` the weights stay
    abstract, shapes and shardings only. `mesh` is a text as "expert=4,tensor=2", a Mesh, or None for one device.
    `kernels` of the experts' matmuls: one of `kernels.IMPLEMENTATIONS`; an error where they cannot run."""

    def __init__(
        self,
        config: Config,
        mesh=None,
        rules: "str | Rules" = "ep",
        seed: int | None = 0,
        kernels: str = "auto",
    ):
        self.config, self.rules, self.kernels = config, make_rules(rules), kernels
        self.mesh: Any = make_mesh(mesh or "")  # a Mesh; an AbstractMesh while planning
        check_mesh(config, self.mesh, self.rules)
        check_kernels(config, self.mesh, self.rules, kernels)
        self.kv_axes = kv_axes(config, self.mesh, self.rules)
        self.token_limit = config.vocab_size  # ids from here on are padding and never sampled: the loader knows
        D, weight = config.hidden_size, functools.partial(_weight, self)
        self.embed = weight((config.vocab_size, D), "vocab", "width", stacked=False)
        self.dense = Layer(config, weight, config.dense_layers, moe=False) if config.dense_layers else None
        self.moe = Layer(config, weight, config.moe_layers, moe=True) if config.moe_layers else None
        self.norm = weight((D,))
        self.head = (
            None if config.tie_word_embeddings else weight((config.vocab_size, D), "vocab", "width", stacked=False)
        )
        self.mtp = MTP(config, weight) if config.num_nextn_predict_layers else None
        if seed is not None:
            fill(self, functools.partial(_noise, seed))

    def __call__(self, ids, cache: Cache | None = None):
        """ids [B, T], a list or an array of integers -> logits [B, T, V] in the model's dtype, and the longer cache
        (None if none was given; the one that was given is spent). Compiled once per shape bucket; needs no ambient
        mesh; may be called inside jit and grad. Raises UsageError for ids that are no table of tokens, or more tokens
        than the cache has room for."""
        is_traced = lambda tree: any(isinstance(a, Tracer) for a in jax.tree.leaves(tree))
        if not isinstance(ids, Tracer):
            ids = checked_ids(ids, self.config.vocab_size)
        B, T = ids.shape
        rows, width = padded_rows(self, B), bucket(T)
        rules = self.rules_for(width)
        if cache is not None:
            if cache.length.shape[0] != B:
                raise UsageError(f"ids has {B} rows, the cache {cache.length.shape[0]}")
            if not is_traced(cache.length):
                if cache.length.is_deleted():
                    raise UsageError("this cache is spent: go on with the one that the call it was given to returned")
                _check_room(int(np.max(everywhere(cache.length))), T, cache.size)
        ids = (jnp if isinstance(ids, Tracer) else np).pad(ids, ((0, rows - B), (0, width - T)))
        # Placed, so that no part of the computation is left without an array that says which devices it runs on.
        ids = placed(ids, jax.NamedSharding(self.mesh, rules("batch", "seq")))
        graph, state = nnx.split(self)
        advance = np.where(np.arange(rows) < B, T, 0).astype(np.int32)
        logits, cache = _call(graph, state, ids, cache, advance, is_traced(self))
        logits = hand_out(self, logits, rules("batch", "seq", "vocab"))
        if (rows, width) != (B, T) and not jax.sharding.get_abstract_mesh().empty:  # a cut dimension takes no slice
            logits = jax.reshard(logits, rules("batch" if rows == B else None, "seq" if width == T else None, "vocab"))
        return (logits if (rows, width) == (B, T) else logits[:B, :T]), cache

    def cache(self, batch: int, size: int) -> Cache:
        """An empty cache of `size` tokens for `batch` rows; the batch must divide by the mesh axes it is cut over."""
        parts = batch_shards(self)
        if batch % parts:
            raise UsageError(f"a cache of {batch} rows cannot be cut into {parts} parts: take {round_up(batch, parts)}")
        slots = round_up(size, axes_size(self.mesh, self.rules.slots))
        return Cache.empty(
            self.config, self.rules, self.mesh, batch, slots, cached_heads(self.config, self.mesh, self.rules)
        )

    def mtp_logits(self, ids):
        """ids [B, T] -> the MTP layer's logits [B, T-1, V]: at i those of token i+2, from the model's state of token i
        and the embedding of token i+1. Errors and compilation as when the model is called."""
        if self.mtp is None:
            raise UsageError("this model has no MTP layer (num_nextn_predict_layers is 0, or the folder holds none)")
        ids = checked_ids(ids, self.config.vocab_size)
        (B, T), rows = ids.shape, padded_rows(self, len(ids))
        if T < 2:
            raise UsageError("the MTP layer reads a token and the next: ids must have at least 2 tokens a row")
        ids = np.pad(ids, ((0, rows - B), (0, bucket(T) - T)))
        graph, state = nnx.split(self)
        spec = self.rules_for(ids.shape[1])("batch", "seq", "vocab")
        return hand_out(self, _mtp_logits(graph, state, ids), spec)[:B, : T - 1]

    def rules_for(self, tokens: int) -> Rules:
        """The rules for so many tokens a row."""
        return rules_for(self.mesh, self.rules, tokens)

    # The functions below are called while tracing, under the model's mesh: see `in_mesh`.

    def trunk(self, ids, cache=None, advance=None, fresh=False, collect=(), scan_experts=False, remat=False):
        """ids [B, T], of which row b has `advance[b]` and the rest is padding (None: all are tokens) -> states
        [B, T, D] after the final norm, the cache with that many tokens more, and what `collect` names: "hidden"
        [L, B, T, D] (each layer's output), "routing" (ids, share) [L, B, T, k]. `fresh`: the cache is empty."""
        rules, c = self.rules_for(ids.shape[1]), self.config
        ids = jax.reshard(ids, rules("batch", "seq"))
        start = jnp.zeros(ids.shape[0], jnp.int32) if cache is None else cache.length
        real = jnp.ones(ids.shape, bool) if advance is None else jnp.arange(ids.shape[1]) < advance[:, None]
        step = Step(self, rules, start, real, fresh)
        x = self.embedded(ids, rules)
        found: dict[str, list[Any]] = {name: [] for name in collect}
        for stack, first in ((self.dense, 0), (self.moe, c.dense_layers)):
            if stack is None:
                continue
            x, cache, outputs = scan_layers(stack, x, step, cache, first, collect, scan_experts, remat)
            for name, output in outputs.items():
                if output is not None:  # dense layers route nothing
                    found[name].append(output)
        x = rms_norm(x, self.norm[...], c.rms_norm_eps)
        if cache is not None:
            cache = Cache(cache.k, cache.v, step.start + jax.reshard(advance, rules("batch")))
        merge = lambda *parts: jnp.concatenate(parts)
        return x, cache, {name: jax.tree.map(merge, *parts) for name, parts in found.items() if parts}

    def embedded(self, ids, rules: Rules):
        """ids [B, T] -> their embeddings [B, T, D]."""
        table, spec = together("embed", self.embed[...], self.rules), rules("batch", "seq", None)
        vocab = mesh_axes([rules.vocab])
        if not vocab:
            return table.at[ids].get(out_sharding=spec)

        # Each device looks up what it has of the table, and the sum is over zeros elsewhere. Left to the partitioner, a
        # single id is a slice, for which it brings the whole table together.
        @jax.shard_map(out_specs=spec)
        def look_up(table, ids):
            row = ids - jax.lax.axis_index(vocab) * table.shape[0]
            mine = (row >= 0) & (row < table.shape[0])
            x = table.at[jnp.where(mine, row, 0)].get(mode="promise_in_bounds")
            return jax.lax.psum(jnp.where(mine[..., None], x, 0), vocab)

        return look_up(table, ids)

    def logits(self, hidden):
        """States after the final norm [..., D] -> logits [..., V]."""
        head = together("embed", (self.embed if self.head is None else self.head)[...], self.rules)
        return linear(hidden, Matrix(head[None], 0) if reads_in_place(hidden) else head)

    def mtp_hidden(self, ids, hidden, scan_experts=False, remat=False):
        """`mtp_logits` before the head, from the states [B, T, D] after the final norm: the states [B, T, D] after the
        MTP layer's own norm, and its routing. There is no next token for the last state: what comes of it means
        nothing, and is seen by no other."""
        assert self.mtp is not None
        m, c, rules = self.mtp, self.config, self.rules_for(ids.shape[1])
        e = rms_norm(self.embedded(ahead(ids, 1, rules), rules), m.enorm[...], c.rms_norm_eps)
        h = rms_norm(jax.reshard(hidden, rules("batch", "seq", None)), m.hnorm[...], c.rms_norm_eps)
        x = linear(jnp.concatenate([e, h], -1), together("eh_proj", m.eh_proj[...], self.rules))  # the embedding first
        real = jnp.broadcast_to(jnp.arange(ids.shape[1]) < ids.shape[1] - 1, ids.shape)
        step = Step(self, rules, jnp.ones(ids.shape[0], jnp.int32), real)
        x, _, outputs = scan_layers(m.layer, x, step, None, 0, ("routing",), scan_experts, remat)
        return rms_norm(x, m.norm[...], c.rms_norm_eps), outputs["routing"]


def ahead(a, n: int, rules: Rules):
    """Of a table [B, T] what stands n places further on, and zeros at the end."""
    a = jax.reshard(a, rules("batch", None))  # a cut dimension takes no slice
    return jax.reshard(jnp.pad(a[:, n:], ((0, 0), (0, n))), rules("batch", "seq"))


# Which dimension of a weight is the model's width, from the end; norms are small and never cut.
WIDTH = {"q": -1, "k": -1, "v": -1, "o": -3, "gate_up": -1, "down": -2, "router": -1, "embed": -1, "eh_proj": -2}


def together(name: str, weight, rules: Rules):
    """A weight that `rules.width` may have cut, with its width whole."""
    if rules.width is None or name not in WIDTH:
        return weight
    spec = [*jax.typeof(weight).sharding.spec, *(None,) * (weight.ndim - len(jax.typeof(weight).sharding.spec))]
    spec[WIDTH[name]] = None
    return jax.reshard(weight, jax.P(*spec))


def scan_layers(stack: Layer, x, step: Step, cache, first: int, collect, scan_experts: bool, remat: bool):
    """Runs x through a stack of layers whose first is layer `first` of the cache.

    With `scan_experts` each step gets a slice of the expert stack: a copy, but its gradient is then a slice too.
    Without, the whole stack is closed over and the kernel gets the layer's index; so it is with the other matrices
    where they are read in place."""
    scan_experts = scan_experts or step.rules.width is not None  # a layer that has to be brought together is a copy
    is_expert = lambda path, _: not scan_experts and path[-1] in ("gate_up", "down") and path[:-1] == ("mlp",)
    is_expert = is_expert if isinstance(stack.mlp, MoE) else lambda path, _: False
    in_place = reads_in_place(x) and not scan_experts
    is_matrix = lambda path, _: in_place and path[-1] in ("q", "k", "v", "o", "gate_up", "down")
    graph, experts, matrices, rest = nnx.split(stack, is_expert, is_matrix, ...)

    def body(carry, item):
        weights, i = item
        x, cache = carry
        here = jax.tree.map(lambda stack: Matrix(stack, i), matrices)
        last_name = lambda path: weight_path(path).rsplit(".", 1)[-1]
        weights = jax.tree_util.tree_map_with_path(lambda path, w: together(last_name(path), w, step.rules), weights)
        x, cache, routing = nnx.merge(graph, experts, here, weights)(x, step, cache, first + i, i)
        return (x, cache), {name: {"hidden": x, "routing": routing}[name] for name in collect}

    (x, cache), outputs = jax.lax.scan(
        jax.checkpoint(body, prevent_cse=False) if remat else body,
        (x, cache),
        (rest, jnp.arange(stack.attn_norm[...].shape[0])),
    )
    return x, cache, outputs


def in_mesh(function):
    """A function of a model, to be jitted: traces under the model's mesh, whatever the caller's is, and multiplies
    float32 models in float32."""

    def run(graph, state, *args):
        model = nnx.merge(graph, state)
        mesh = getattr(model.mesh, "abstract_mesh", model.mesh)
        precision = "highest" if model.config.dtype == FLOAT32 else None
        with jax.sharding.use_abstract_mesh(mesh), jax.default_matmul_precision(precision):
            return function(model, *args)

    return run


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=3)
@in_mesh
def _call(model, ids, cache, advance, scan_experts):
    x, cache, _ = model.trunk(ids, cache, advance, scan_experts=scan_experts)
    logits = model.logits(x)
    return (with_all_gradients(logits, nnx.state(model)) if scan_experts else logits), cache


@jax.custom_vjp
def with_all_gradients(result, weights):
    """Hands the result on. Outside jit, jax.grad makes the gradient of a weight without influence (the MTP layer, the
    correction bias) itself, and cannot where a weight has an explicit sharding and no mesh is set: here it is made."""
    return result


with_all_gradients.defvjp(lambda result, w: (result, w), lambda w, g: (g, jax.tree.map(jnp.zeros_like, w)))


@functools.partial(jax.jit, static_argnums=0)
@in_mesh
def _mtp_logits(model, ids):
    hidden, _, _ = model.trunk(ids)
    return model.logits(model.mtp_hidden(ids, hidden)[0])


def hand_out(model: GLM, tree, spec: jax.P):
    """Results for the caller's own code: the same bytes under a mesh whose axes do not ask to spell every sharding, or
    as they are where the caller has set a mesh."""
    if not jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.device_put(tree, jax.NamedSharding(auto(model.mesh), spec))


def bucket(n: int, least: int = 16) -> int:
    """The lengths things are compiled for: powers of two and the steps half-way between them, from `least`; 1 is 1."""
    if n <= 1:
        return n
    power = 1 << (n - 1).bit_length()
    return max(least, power * 3 // 4 if n <= power * 3 // 4 else power)


def round_up(n: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-n // step) * step


def axes_size(mesh, *axes) -> int:
    """Into how many parts these mesh axes cut."""
    return math.prod(mesh.shape[a] for a in mesh_axes(axes))


def rules_for(mesh, rules: Rules, tokens: int) -> Rules:
    """The rules for so many tokens a row: a sequence is cut where its axes divide it, and else every device along them
    has all of it, as in decoding."""
    return rules if tokens % axes_size(mesh, rules.seq) == 0 else dataclasses.replace(rules, seq=None)


def batch_shards(model: GLM) -> int:
    """Into how many parts the batch is cut; batches are padded to a multiple of it."""
    return axes_size(model.mesh, model.rules.batch)


def padded_rows(model: GLM, rows: int) -> int:
    """As many rows as the mesh cuts into equal parts: those of a batch, and padding. Says so, once for each number."""
    padded = round_up(rows, batch_shards(model))
    if padded > rows and index() == 0:
        _say_padding(rows, padded, mesh_axes([model.rules.batch]))
    return padded


def padding_costs(rows: int, padded: int, axes: tuple[str, ...]) -> str:
    """What to do about so many rows that are padded for these mesh axes."""
    if rows == 1 and "expert" in axes:
        return "--rules latency has more devices work on one row"
    return f"{padded} rows cost the same"


@functools.cache
def _say_padding(rows: int, padded: int, axes: tuple[str, ...]):
    text = f"{rows} row{'s'[: rows > 1]} padded to {padded} for the mesh axes {' and '.join(axes)}"
    logging.getLogger("glm_jax").warning(f"{text}; {padding_costs(rows, padded, axes)}")


def kv_axes(config: Config, mesh, rules: Rules) -> tuple[str, ...]:
    """The mesh axes that KV heads are cut over: of those of the heads as many, from the outermost, as divide them.
    Along the rest the devices have the same KV heads, and each takes those that its query heads read."""
    axes = mesh_axes([rules.heads])
    cuts = (axes[:n] for n in range(len(axes), -1, -1))
    return next(a for a in cuts if config.num_key_value_heads % axes_size(mesh, a) == 0)


def cached_heads(config: Config, mesh, rules: Rules) -> int:
    """The KV heads of a cache: as many as there are, or, where the devices of the heads do not divide those, repeated
    until they do."""
    return math.lcm(config.num_key_value_heads, axes_size(mesh, rules.heads))


# What must not have one mesh axis on two dimensions.
_TOGETHER = {
    "the states and their heads": ("batch", "seq", "heads"),
    "the hidden units of an MLP": ("batch", "seq", "ffn"),
    "the logits": ("batch", "seq", "vocab"),
    "the cache": ("batch", "heads", "slots"),
    "the experts' weights": ("experts", "expert_ffn"),
    "tokens and an expert's hidden units": ("batch", "seq", "expert_ffn"),
}
# Which dimensions an axis of the rules cuts, and of which weights.
DIMENSIONS = {
    "heads": {"num_attention_heads": "attention's q and o"},
    "experts": {"n_routed_experts": "the experts' gate_up and down"},
    "expert_ffn": {"moe_intermediate_size": "the experts' gate_up and down"},
    "ffn": {
        "intermediate_size": "the dense layers' gate_up and down",
        "moe_intermediate_size": "the shared expert's gate_up and down",
    },
    "vocab": {"vocab_size": "embedding and head"},
    "width": {"hidden_size": "every matrix"},
}


def check_mesh(config: Config, mesh, rules: Rules) -> None:
    """Raises UsageError for rules that cannot be, naming what they cut twice, and for every dimension that its mesh
    axes do not divide, with its weights, its size and theirs."""
    for field in dataclasses.fields(rules):
        if unknown := [a for a in mesh_axes([getattr(rules, field.name)]) if a not in mesh.shape]:
            raise UsageError(f"the rule {field.name} names {unknown[0]!r}, the mesh has {', '.join(mesh.shape)}")
    for what, names in _TOGETHER.items():
        used = [(axis, name) for name in names for axis in mesh_axes([getattr(rules, name)])]
        for i, (axis, name) in enumerate(used):
            for other in (n for a, n in used[:i] if a == axis):
                raise UsageError(
                    f"the rules cut {what} over {axis!r} ({axis}={mesh.shape[axis]}) twice: {other}="
                    f"{getattr(rules, other)!r} and {name}={getattr(rules, name)!r}; change one of them"
                )
    if apart := [a for a in mesh_axes([rules.seq]) if a not in mesh_axes([rules.slots])]:
        raise UsageError(
            f"the rules cut sequences over {apart[0]!r} ({apart[0]}={mesh.shape[apart[0]]}) and not the cache's slots: "
            f"seq={rules.seq!r} and slots={rules.slots!r}; name it in slots too, or in neither"
        )
    if problems := list(undivided(config, mesh, rules)):
        raise UsageError(f"--mesh {describe(mesh)}: " + "; ".join(problems))


def check_kernels(config: Config, mesh, rules: Rules, implementation: str) -> None:
    """Raises UsageError for kernels that the experts' matmuls cannot have on the mesh's devices."""
    c, F = config, config.moe_intermediate_size // axes_size(mesh, rules.expert_ffn)
    D, E, L = c.hidden_size, c.n_routed_experts // axes_size(mesh, rules.experts), max(1, c.moe_layers)
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, c.dtype)
    if implementation != "auto" and (c.moe_layers or c.num_nextn_predict_layers):
        kernels.choose(implementation, device_kind(mesh), shape(1, D), [shape(L, E, 2, F, D), shape(L, E, D, F)])


def undivided(config: Config, mesh, rules: Rules):
    """In words every dimension that its mesh axes do not divide, with the sizes nearest to theirs that would."""
    for axis, names in DIMENSIONS.items():
        size = axes_size(mesh, getattr(rules, axis))
        for name, weights in names.items():
            fine = getattr(config, name) % size == 0
            if name == "num_attention_heads":  # and each device's queries must fall to whole KV heads of its cache
                fine = fine and config.num_attention_heads % cached_heads(config, mesh, rules) == 0
            if not fine and not (name == "intermediate_size" and not config.dense_layers):
                value, axes = getattr(config, name), "*".join(mesh_axes([getattr(rules, axis)]))
                fits = [n for n in range(1, 2 * size + 1) if value % n == 0]
                near = [max(n for n in fits if n < size), *[n for n in fits if n > size][:1]]
                near = f"do are {' or '.join(map(str, near))}" if len(near) > 1 else f"does is {near[0]}"
                yield f"{name} {value:,} does not divide over {axes}={size}, the next that {near} ({weights})"


def _weight(model: GLM, shape, *axes, dtype=None, stacked=True):
    """An abstract weight; `axes` name the logical axes after the stacked one."""
    if axes or not stacked:
        axes = (None,) * (len(shape) - len(axes)) + axes
    else:
        axes = (None,) * len(shape)
    spec = list(model.rules(*("heads" if a == "kv_heads" else a for a in axes)))
    if "kv_heads" in axes:
        spec[axes.index("kv_heads")] = kv_axes(model.config, model.mesh, model.rules) or None
    sharding = jax.NamedSharding(model.mesh, jax.P(*spec))
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype or model.config.dtype, sharding=sharding))


def fill(model: GLM, make) -> GLM:
    """Gives every abstract weight the array that `make(key path, ShapeDtypeStruct)` returns, in place."""
    nnx.update(model, jax.tree_util.tree_map_with_path(make, nnx.state(model)))
    return model


def weight_path(path) -> str:
    """The dotted name of a leaf, as `moe.attn.q`, from its key path."""
    key = lambda k: str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", ""))))
    return ".".join(map(key, path)).removesuffix(".value")


def _noise(seed: int, path, leaf):
    """Random weights as a function of the leaf's name, the same on every mesh: unit-gain matrices, norms of one, biases
    of zero. Made on the host: compiling initialisers takes longer than running them."""
    name = weight_path(path)
    last = name.rsplit(".", 1)[-1]
    scale = 1.0 if last == "embed" else (leaf.shape[-1] * (leaf.shape[-2] if last == "o" else 1)) ** -0.5
    first_slab = max(0, len(leaf.shape) - 2)  # a device draws only the matrices it holds

    def block(index):
        span = [range(*cut.indices(size)) for cut, size in zip(index, leaf.shape, strict=True)]
        if "norm" in last or "bias" in last:
            return np.full([len(s) for s in span], "norm" in last, leaf.dtype)
        out = np.empty([len(s) for s in span], leaf.dtype)
        for at in np.ndindex(*out.shape[:first_slab]):
            key = [seed, zlib.crc32(name.encode()), *(s[i] for s, i in zip(span, at, strict=False))]
            matrix = np.random.default_rng(key).standard_normal(leaf.shape[first_slab:], np.float32)
            out[at] = (scale * matrix)[index[first_slab:]]
        return out

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, block)


def checked_ids(ids, vocab_size: int) -> np.ndarray:
    """ids as an int32 table, or a UsageError that says what is wrong with them."""
    try:
        array = np.asarray(ids)
    except ValueError:  # NumPy's words for a ragged list are no help
        raise UsageError("ids has rows of unequal length; pad them, or use generate_ids") from None
    if array.ndim != 2 or 0 in array.shape:
        raise UsageError(f"ids must be a table [batch, tokens] with at least one token, its shape is {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise UsageError(f"ids must be integers, they are {array.dtype}")
    if array.min() < 0 or array.max() >= vocab_size:
        raise UsageError(f"ids run from {array.min()} to {array.max()}, the vocabulary from 0 to {vocab_size - 1}")
    return array.astype(np.int32)


def _check_room(used: int, new: int, size: int):
    if used + new > size:
        raise UsageError(f"the cache has {size} slots, {used} are used and {new} tokens are to be added")
