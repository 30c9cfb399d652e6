"""transformers' own GLM on small configs of our choice: the checkpoint it writes and the numbers it computes.

Every checkpoint has non-zero biases, a non-zero router bias and norms away from one, and matrices of std
1/sqrt(fan in), so that no part can be left out unseen.

What transformers 5 writes with `save_pretrained`: experts one by one under the published names (it fuses them in memory
only), the router bias in the dtype its buffer has (F32 after `from_pretrained`, but BF16 after `model.to(bfloat16)`),
no `lm_head.weight` when the head is tied, no MTP tensor while config.json still says `num_nextn_predict_layers: 1`, and
`eos_token_id: null`. The MTP layer is added here, with safetensors' own writer.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.modeling_layers import MtpModel

BASE = {
    "vocab_size": 101,
    "hidden_size": 40,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "use_qk_norm": True,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 202752,
    "tie_word_embeddings": False,
}
NAMED = {
    "like-4.6": {},
    "like-air": {"use_qk_norm": False, "routed_scaling_factor": 1.0},
    "two-shared-experts": {"n_shared_experts": 2},
    "grouped-router": {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, "num_experts_per_tok": 5},
    "odd-widths": {
        "hidden_size": 36,
        "head_dim": 12,
        "intermediate_size": 53,
        "moe_intermediate_size": 19,
        "n_routed_experts": 7,
    },
    "one-kv-head": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 20, "num_experts_per_tok": 1},
    "tied-head": {"tie_word_embeddings": True},
    "no-qkv-bias": {"attention_bias": False, "num_key_value_heads": 6},
    "no-dense-layer": {"first_k_dense_replace": 0, "partial_rotary_factor": 1.0},
    "three-dense-layers": {"first_k_dense_replace": 3, "norm_topk_prob": False},
    "all-dense": {"first_k_dense_replace": 4, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
}


def drawn(seed: int) -> dict:
    """A random config; the same seed gives the same one."""
    rng = np.random.default_rng([7, seed])

    def pick(*values):
        return values[rng.integers(len(values))]

    kv, groups, layers = pick(1, 2, 3), pick(1, 1, 2, 4), pick(2, 3, 5)
    topk_group = int(rng.integers(1, groups + 1))
    in_group = pick(2, 3, 5)  # transformers ranks a group by its two best experts
    return BASE | {
        "hidden_size": pick(28, 40, 52),
        "num_attention_heads": kv * pick(1, 2, 3),
        "num_key_value_heads": kv,
        "head_dim": pick(8, 12, 20),
        "intermediate_size": pick(33, 64, 90),
        "moe_intermediate_size": pick(17, 24, 40),
        "num_hidden_layers": layers,
        "first_k_dense_replace": pick(0, 1, layers - 1),
        "n_group": groups,
        "topk_group": topk_group,
        "n_routed_experts": groups * in_group,
        "num_experts_per_tok": int(rng.integers(1, topk_group * in_group + 1)),
        "n_shared_experts": pick(1, 2),
        "use_qk_norm": pick(True, False),
        "attention_bias": pick(True, True, False),
        "tie_word_embeddings": pick(False, False, True),
        "norm_topk_prob": pick(True, True, False),
        "routed_scaling_factor": pick(1.0, 2.5),
        "rope_theta": pick(10000.0, 1000000.0),
        "vocab_size": pick(64, 101),
    }


def value(name: str, shape, rng) -> torch.Tensor:
    """A random fp32 weight for a tensor of this name: matrices of unit gain, norms of 1 +- 0.3, biases of 0.3."""
    x = torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))
    if name.endswith("norm.weight"):
        return 1 + 0.3 * x
    if name.endswith("bias"):
        return 0.3 * x
    return x if "embed_tokens" in name else x * shape[-1] ** -0.5


def build(fields: dict, seed: int = 0, dtype: str = "float32", bf16_router_bias: bool = False) -> Glm4MoeForCausalLM:
    """transformers' model with random weights, in eager mode. In bfloat16 the router bias stays fp32 unless asked."""
    config = Glm4MoeConfig(**BASE | fields, dtype=getattr(torch, dtype))
    config._attn_implementation = config._experts_implementation = "eager"
    model, rng = Glm4MoeForCausalLM(config).eval(), np.random.default_rng([11, seed])
    with torch.no_grad():
        for name, weight in (*model.named_parameters(), *_router_biases(model).items()):
            weight.copy_(value(name, weight.shape, rng))
        if config.tie_word_embeddings:  # or the last token read wins at every position
            model.lm_head.weight.mul_(config.hidden_size**-0.5)
    if dtype == "bfloat16":
        biases = {name: bias.clone() for name, bias in _router_biases(model).items()}
        model.to(torch.bfloat16)
        for name, bias in biases.items() if not bf16_router_bias else ():
            model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = bias
    return model


def _router_biases(model):
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}


def mtp_tensors(model, seed: int = 0, copies: str | None = None) -> dict[str, torch.Tensor]:
    """The MTP layer of a checkpoint, by its published names. `copies`: its own embedding and head as the files of
    GLM-4.5 and 4.7 have them, "same" as the main ones or of "other" values; None as in GLM-4.6, without."""
    c, rng = model.config, np.random.default_rng([13, seed])
    h, n, k = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    width, prefix = c.moe_intermediate_size, f"model.layers.{c.num_hidden_layers}."
    shapes = {
        "eh_proj.weight": (h, 2 * h),
        "enorm.weight": (h,),
        "hnorm.weight": (h,),
        "shared_head.norm.weight": (h,),
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
        "self_attn.q_proj.weight": (n, h),
        "self_attn.k_proj.weight": (k, h),
        "self_attn.v_proj.weight": (k, h),
        "self_attn.o_proj.weight": (h, n),
        "mlp.gate.weight": (c.n_routed_experts, h),
        "mlp.gate.e_score_correction_bias": (c.n_routed_experts,),
    }
    if c.attention_bias:
        shapes |= {"self_attn.q_proj.bias": (n,), "self_attn.k_proj.bias": (k,), "self_attn.v_proj.bias": (k,)}
    if c.use_qk_norm:
        shapes |= {"self_attn.q_norm.weight": (c.head_dim,), "self_attn.k_norm.weight": (c.head_dim,)}
    mlps = {f"experts.{e}": width for e in range(c.n_routed_experts)} | {"shared_experts": width * c.n_shared_experts}
    for mlp, inner in mlps.items():
        shapes |= {f"mlp.{mlp}.gate_proj.weight": (inner, h), f"mlp.{mlp}.up_proj.weight": (inner, h)}
        shapes[f"mlp.{mlp}.down_proj.weight"] = (h, inner)
    tensors = {}
    for name, shape in shapes.items():
        tensor = value(name, shape, rng)
        tensors[prefix + name] = tensor if name.endswith("correction_bias") else tensor.to(model.dtype)
    if copies:
        for name, main in (("embed_tokens", model.model.embed_tokens), ("shared_head.head", model.lm_head)):
            main = main.weight.detach()
            tensors[f"{prefix}{name}.weight"] = main.clone() if copies == "same" else torch.flip(main, (0,)).clone()
    return tensors


def save(model, folder: Path, mtp: str | None = None, copies: str | None = None, shard: str = "1GB") -> Path:
    """save_pretrained, in shards of this size, then the MTP layer in a file of its own named by the index ("file"), or
    inside the last shard ("shard"), or not at all (None)."""
    model.save_pretrained(folder, max_shard_size=shard)
    model.config.name_or_path, model.config.dtype = str(folder), model.dtype  # save_pretrained leaves the dtype as text
    if mtp is None:
        return folder
    extra = mtp_tensors(model, copies=copies)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
    else:  # transformers reads a model.safetensors before it looks for an index
        only = single.rename(folder / "model-00001-of-00001.safetensors") if mtp == "file" else single
        weight_map = dict.fromkeys(load_file(only), only.name)
    home = "mtp.safetensors" if mtp == "file" else max(weight_map.values())
    inside = load_file(folder / home) if mtp == "shard" else {}
    save_file(inside | extra, folder / home, {"format": "pt"})
    weight_map |= dict.fromkeys(extra, home)
    if index.exists() or mtp == "file":
        index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


def ids(fields: dict, batch: int = 2, length: int = 23, seed: int = 0) -> np.ndarray:
    """Random token ids [batch, length]."""
    return np.random.default_rng([17, seed]).integers(0, (BASE | fields)["vocab_size"], (batch, length))


def _tensor(x) -> torch.Tensor:
    return x if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x))  # a copy: jax's arrays are read-only


@torch.no_grad()
def forward(model, tokens) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Logits [B, T, V], the hidden state after each layer [B, T, D], and the last one after the final norm, as fp32."""
    states = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: states.append(out.float().numpy().copy()))
        for layer in (*model.model.layers, model.model.norm)
    ]
    logits = model(_tensor(tokens)).logits.float().numpy()
    for hook in hooks:
        hook.remove()
    return logits, states[:-1], states[-1]


def mtp_model(model) -> MtpModel:
    """transformers' own MTP model, its weights read from the folder that `model` was saved to."""
    layer = model.config.num_hidden_layers
    # transformers names the layers 46 and 92 here, those of the published models; it loads what this matches
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}\..*"]
    extra = MtpModel.from_pretrained(model).eval()
    extra.set_attn_implementation("eager")
    extra.set_experts_implementation("eager")
    return extra


def mtp_logits(model, tokens, extra: MtpModel | None = None) -> torch.Tensor:
    """Logits [B, T-1, V] of the MTP layer: row i, from the hidden state of token i and the embedding of token i + 1, is
    about token i + 2. Differentiable."""
    extra, tokens = extra or mtp_model(model), _tensor(tokens)
    hidden = model.model(tokens).last_hidden_state[:, :-1]
    positions = torch.arange(1, tokens.shape[1])[None]
    out = extra.forward_layer(0, hidden, positions, None, input_ids=tokens[:, 1:])
    return model.lm_head(out)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def gradients(model, tokens, mtp_weight: float = 0.0) -> tuple[float, dict[str, np.ndarray]]:
    """The mean next-token loss, with mtp_weight times that of the MTP layer added, and its gradients by tensor name."""
    tokens = _tensor(tokens)
    extra = mtp_model(model).requires_grad_(True) if mtp_weight else None
    model.zero_grad()
    loss = cross_entropy(model(tokens).logits[:, :-1], tokens[:, 1:])
    if extra:
        loss = loss + mtp_weight * cross_entropy(mtp_logits(model, tokens, extra)[:, :-1], tokens[:, 2:])
    loss.backward()
    named = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    if extra:
        prefix = f"model.layers.{model.config.num_hidden_layers}."
        for name, weight in extra.layers[0].named_parameters():
            name = "shared_head.norm.weight" if name == "post_norm.weight" else name.removeprefix("mtp_block.")
            named[prefix + name] = weight.grad
    return loss.item(), _published_names(named)


def _published_names(named):
    """Fused experts taken apart: what the file calls experts.{e}.gate_proj.weight and so on."""
    out = {}
    for name, x in named.items():
        x = x.numpy().copy()
        if name.endswith("experts.gate_up_proj"):
            for e, pair in enumerate(x):
                for part, half in zip(("gate_proj", "up_proj"), np.split(pair, 2), strict=True):
                    out[f"{name.removesuffix('gate_up_proj')}{e}.{part}.weight"] = half
        elif name.endswith("experts.down_proj"):
            for e, one in enumerate(x):
                out[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = one
        else:
            out[name] = x
    return out


@torch.no_grad()
def greedy(model, prompts: list[list[int]], count: int) -> list[list[int]]:
    """transformers' `generate`, each prompt alone: the new ids."""
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])  # with the mask said: else an id equal to pad_token_id is taken for padding
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        out.append(tokens[0, len(prompt) :].tolist())
    return out


def rope(fields: dict, positions) -> tuple[np.ndarray, np.ndarray]:
    """transformers' fp32 cos and sin at these positions, [T, rotary dims]: two equal halves."""
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

    rotary = Glm4MoeRotaryEmbedding(Glm4MoeConfig(**BASE | fields))
    cos, sin = rotary(torch.zeros(1), _tensor(positions)[None])
    return cos[0].numpy(), sin[0].numpy()
