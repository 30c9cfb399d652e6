"""The glm4_moe forward pass in plain numpy: an executable specification, and 23 classic mistakes to switch on.

It agrees with transformers 5.23 (fp32) to 3e-6 on logits, MTP logits and every routing decision, see
data/golden_tiny.json. Weights are a function of the checkpoint tensor's NAME and the flat index, so a test needs no
weight file:
    value = (uniform(0, 1) - 0.5) * gain + offset, uniform = top 53 bits of splitmix64(crc32(name) << 32 + i)
`mut` makes one mistake of MUTATIONS. `python tests/glm4_moe_reference.py` prints how far each moves the logits;
`--check tests/data/golden_tiny.json` compares with what transformers computed.
"""

import json
import sys
import zlib

import numpy as np

TINY = dict(
    vocab_size=97,
    hidden_size=40,
    intermediate_size=96,
    moe_intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    partial_rotary_factor=0.5,
    rope_theta=1000000,
    rms_norm_eps=1e-5,
    attention_bias=True,
    use_qk_norm=True,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
)
VARIANTS = {
    "tiny_355b_like": TINY,
    "tiny_air_like": dict(TINY, use_qk_norm=False, routed_scaling_factor=1.0),
    "tiny_grouped": dict(TINY, n_group=4, topk_group=2),
}  # no released model groups; code path only
IDS = [5, 17, 96, 3, 3, 41, 88, 0, 23, 64, 7, 50]


def _uniform(name, n):
    with np.errstate(over="ignore"):
        z = (np.uint64(zlib.crc32(name.encode())) << np.uint64(32)) + np.arange(1, n + 1, dtype=np.uint64)
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


def weight(name, shape):
    u = _uniform(name, int(np.prod(shape))).reshape(shape) - 0.5
    if name.endswith("norm.weight"):  # every RMSNorm: around 1
        return (1.0 + 0.8 * u).astype(np.float32)
    if name.endswith("e_score_correction_bias"):
        return (1.5 * u).astype(np.float32)
    if name.endswith(".bias"):
        return (0.6 * u).astype(np.float32)
    if "embed_tokens" in name:
        return (2.0 * u).astype(np.float32)
    return (u * 2.0 * np.sqrt(3.0 / shape[-1])).astype(np.float32)  # unit-gain matrices


def bf16(x):
    i = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return (((i + 0x7FFF + ((i >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


def rms(x, w, eps):
    return w * (x / np.sqrt((x * x).mean(-1, keepdims=True) + eps))


def silu(x):
    return x / (1 + np.exp(-x))


def mlp(x, p, w, i, h):
    return (silu(x @ w(p + "gate_proj.weight", (i, h)).T) * (x @ w(p + "up_proj.weight", (i, h)).T)) @ w(
        p + "down_proj.weight", (h, i)
    ).T


def rope(x, pos, c, mut):  # x [T, H, D]
    d = x.shape[-1] if mut == "rope_full" else int(x.shape[-1] * c["partial_rotary_factor"])
    theta = 10000.0 if mut == "theta_1e4" else c["rope_theta"]
    f = pos[:, None].astype(np.float64) * theta ** (-np.arange(0, d, 2) / d)  # [T, d/2]
    cos, sin = np.cos(f)[:, None], np.sin(f)[:, None]
    if mut == "rope_last_half":
        rest, r = x[..., :-d], x[..., -d:]
    else:
        r, rest = x[..., :d], x[..., d:]
    if mut == "rope_interleaved":
        a, b = r[..., 0::2], r[..., 1::2]
        y = np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(r.shape)
    else:  # neox: pairs (i, i + d/2)
        a, b = r[..., : d // 2], r[..., d // 2 :]
        y = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return np.concatenate([rest, y] if mut == "rope_last_half" else [y, rest], -1)


def attention(x, p, pos, c, w, mut):
    h, nh, nk, d, t = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], len(x)

    def lin(n, o):
        b = 0 if mut == "no_qkv_bias" or not c["attention_bias"] else w(p + n + "_proj.bias", (o,))
        return x @ w(p + n + "_proj.weight", (o, h)).T + b

    q, k, v = lin("q", nh * d).reshape(t, nh, d), lin("k", nk * d).reshape(t, nk, d), lin("v", nk * d).reshape(t, nk, d)
    eps = c["rms_norm_eps"]

    def qkn(q, k):
        return rms(q, w(p + "q_norm.weight", (d,)), eps), rms(k, w(p + "k_norm.weight", (d,)), eps)

    use = c["use_qk_norm"] and mut != "no_qk_norm"
    if use and mut != "qk_norm_after_rope":
        q, k = qkn(q, k)
    q, k = rope(q, pos, c, mut), rope(k, pos, c, mut)
    if use and mut == "qk_norm_after_rope":
        q, k = qkn(q, k)
    g = nh // nk
    m = [j % nk for j in range(nh)] if mut == "gqa_modulo" else [j // g for j in range(nh)]
    scale = (h / nh) ** -0.5 if mut == "scale_hidden_over_heads" else d**-0.5
    s = np.einsum("qhd,khd->hqk", q, k[:, m]) * scale
    s = np.where(np.tril(np.ones((t, t), bool)), s, -np.inf)
    s = np.exp(s - s.max(-1, keepdims=True))
    s = s / s.sum(-1, keepdims=True)
    o = np.einsum("hqk,khd->qhd", s, v[:, m]).reshape(t, nh * d)
    return o @ w(p + "o_proj.weight", (h, nh * d)).T


def route(x, p, c, w, mut):
    e, h = c["n_routed_experts"], c["hidden_size"]
    W, b = w(p + "gate.weight", (e, h)), w(p + "gate.e_score_correction_bias", (e,))
    if mut == "bf16_router_logits":
        logits = bf16(bf16(x) @ bf16(W).T)
    else:
        logits = x @ W.T  # fp32 x fp32 in the real model
    if mut == "bf16_bias":
        b = bf16(b)
    s = 1 / (1 + np.exp(-logits))
    if mut == "softmax_router":
        s = np.exp(logits - logits.max(-1, keepdims=True))
        s /= s.sum(-1, keepdims=True)
    ch = s if mut == "ignore_bias" else s + b  # bias only chooses
    t, G = len(x), c["n_group"]
    gs = np.sort(ch.reshape(t, G, e // G), -1)[..., -2:].sum(-1)
    keep = np.argsort(-gs, -1, kind="stable")[:, : c["topk_group"]]
    mask = np.zeros((t, G), bool)
    np.put_along_axis(mask, keep, True, 1)
    ch = np.where(np.repeat(mask, e // G, 1), ch, 0.0 if mut == "mask_zero" else -np.inf)
    idx = np.argsort(-ch, -1, kind="stable")[:, : c["num_experts_per_tok"]]
    wt = np.take_along_axis(s + b if mut == "bias_in_weights" else s, idx, 1)
    if c["norm_topk_prob"] and mut != "no_renorm":
        wt = wt / (wt.sum(-1, keepdims=True) + 1e-20)
    f = c["routed_scaling_factor"]
    f = {"no_scaling": 1.0, "double_scaling": f * f}.get(mut, f)
    return logits, idx, wt * f


def moe(x, p, c, w, mut, trace=None):
    h, i = c["hidden_size"], c["moe_intermediate_size"]
    logits, idx, wt = route(x, p, c, w, mut)
    if trace is not None:
        trace.append((logits, idx, wt))
    y = np.zeros_like(x)
    for e in range(c["n_routed_experts"]):
        tok, k = np.where(idx == e)
        if len(tok):
            y[tok] += wt[tok, k][:, None] * mlp(x[tok], f"{p}experts.{e}.", w, i, h)
    if mut == "no_shared":
        return y
    sh = mlp(y if mut == "shared_on_routed_output" else x, p + "shared_experts.", w, i * c["n_shared_experts"], h)
    return y + sh * (c["routed_scaling_factor"] if mut == "scale_shared_too" else 1.0)


def layer(x, i, pos, c, w, mut, trace=None, force_moe=False):
    h, eps, p = c["hidden_size"], (1e-6 if mut == "eps_1e-6" else c["rms_norm_eps"]), f"model.layers.{i}."
    a = attention(rms(x, w(p + "input_layernorm.weight", (h,)), eps), p + "self_attn.", pos, c, w, mut)
    wn = w(p + "post_attention_layernorm.weight", (h,))
    x = x + (rms(a, wn, eps) if mut == "post_attn_norm_on_attn_output" else a)
    y = x if mut == "post_attn_norm_on_attn_output" else rms(x, wn, eps)
    dense = i < c["first_k_dense_replace"] and not force_moe
    y = mlp(y, p + "mlp.", w, c["intermediate_size"], h) if dense else moe(y, p + "mlp.", c, w, mut, trace)
    return x + y


def forward(ids, c, w=weight, mut=None, pos=None, dtype=np.float64):
    """-> logits [T,V], hidden after final norm [T,h], list of (router logits, idx, weights) per MoE layer."""
    ww = lambda n, s: w(n, s).astype(dtype)
    h, V = c["hidden_size"], c["vocab_size"]
    pos = np.arange(len(ids)) if pos is None else pos
    x = ww("model.embed_tokens.weight", (V, h))[np.asarray(ids)]
    tr = []
    for i in range(c["num_hidden_layers"]):
        x = layer(x, i, pos, c, ww, mut, tr)
    pre = x
    x = rms(x, ww("model.norm.weight", (h,)), c["rms_norm_eps"])
    return x @ ww("lm_head.weight", (V, h)).T, x, tr, pre


def mtp(ids, hidden, c, w=weight, mut=None, pos0=1, dtype=np.float64):
    """Draft logits for token i+2 from hidden_i (after final norm) and the embedding of token i+1; i = 0..T-2."""
    ww = lambda n, s: w(n, s).astype(dtype)
    h, V, L, eps = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"], c["rms_norm_eps"]
    p = f"model.layers.{L}."
    e = rms(ww("model.embed_tokens.weight", (V, h))[np.asarray(ids[1:])], ww(p + "enorm.weight", (h,)), eps)
    g = rms(hidden[:-1], ww(p + "hnorm.weight", (h,)), eps)
    x = np.concatenate([g, e] if mut == "mtp_hidden_first" else [e, g], -1) @ ww(p + "eh_proj.weight", (h, 2 * h)).T
    x = layer(x, L, np.arange(len(ids) - 1) + pos0, c, ww, mut, None, force_moe=True)
    out = rms(x, ww(p + "shared_head.norm.weight", (h,)), eps)
    return out @ ww("lm_head.weight", (V, h)).T, out


MUTATIONS = [
    "rope_interleaved",
    "rope_last_half",
    "rope_full",
    "theta_1e4",
    "no_qk_norm",
    "qk_norm_after_rope",
    "no_qkv_bias",
    "gqa_modulo",
    "scale_hidden_over_heads",
    "eps_1e-6",
    "post_attn_norm_on_attn_output",
    "softmax_router",
    "ignore_bias",
    "bias_in_weights",
    "bf16_router_logits",
    "bf16_bias",
    "no_renorm",
    "no_scaling",
    "double_scaling",
    "scale_shared_too",
    "no_shared",
    "shared_on_routed_output",
    "mask_zero",
]


def check(path):
    """Compare this spec with the stored transformers outputs."""
    for name, g in json.load(open(path))["variants"].items():
        lg, h0, tr, _ = forward(g["input_ids"], g["config"])
        m, _ = mtp(g["input_ids"], h0, g["config"])
        chosen, want = [np.sort(a[1]) for a in tr], [np.array(b["experts_sorted"]) for b in g["router"]]
        far, mtp_far = abs(lg - np.array(g["logits"])).max(), abs(m - np.array(g["mtp_logits"])).max()
        same = np.array_equal(chosen, want)
        print(f"{name}: max|d| logits {far:.1e}, mtp {mtp_far:.1e}, same experts {same}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        check(sys.argv[2])
        sys.exit()
    for name, c in VARIANTS.items():
        L0, h0, tr, pre = forward(IDS, c)
        print(f"{name}: logits std {L0.std():.4f}  logits[-1,:4] {L0[-1, :4]}")
        for m in MUTATIONS:
            L1, _, tr1, _ = forward(IDS, c, mut=m)
            sel = np.mean([(np.sort(a[1]) != np.sort(b[1])).any(-1).mean() for a, b in zip(tr, tr1, strict=True)])
            far = abs(L1 - L0).max() / L0.std()
            print(f"  {m:32s} max|dlogit|/std = {far:.2e}   tokens with other experts {100 * sel:5.1f}%")
        M0, o0 = mtp(IDS, h0, c)
        sh = mtp(IDS, h0, c, pos0=0)[0]
        for n, M1 in (
            ("mtp_hidden_first", mtp(IDS, h0, c, mut="mtp_hidden_first")[0]),
            ("mtp_prenorm_hidden", mtp(IDS, pre, c)[0]),
            ("mtp_positions_0_based (must be 0)", sh),
        ):
            print(f"  {n:32s} max|dlogit|/std = {abs(M1 - M0).max() / M0.std():.2e}")
