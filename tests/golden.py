"""The golden checkpoints: tiny models whose weights are a formula of the tensor's name, and what transformers computed
from them. Needs no torch; names and shapes are those that the numpy reference asks for, not those our code derives."""

import json
from pathlib import Path
from typing import NamedTuple

import glm4_moe_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from glm_jax import load
from glm_jax.convert.safetensors import write
from glm_jax.model import in_mesh
from glm_jax.sharding import Rules

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden_tiny.json").read_text())["variants"]
RULES = Rules(vocab=None)  # the tiny vocabulary, 97, divides over nothing
CLOSE = 2e-5  # times the logits' standard deviation: seven times what fp32 rounding does to a right model
QUICK = {"xla_backend_optimization_level": 0}  # what is run once is compiled in half the time


def config_json(variant: str) -> dict:
    """The variant's config.json, as the published files are written."""
    return GOLDEN[variant]["config"] | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "hidden_act": "silu",
        "max_position_embeddings": 202752,
        "num_nextn_predict_layers": 1,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": None,
    }


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors, the MTP layer's included: all that the reference asks for."""
    asked = {}

    def weight(name, shape):
        asked[name] = tuple(int(n) for n in shape)
        return reference.weight(name, shape)

    _, hidden, _, _ = reference.forward([0, 1], config, weight)
    reference.mtp([0, 1], hidden, config, weight)
    h, width = config["hidden_size"], config["moe_intermediate_size"]
    # the reference reads the chosen experts only
    for layer in range(config["first_k_dense_replace"], config["num_hidden_layers"] + 1):
        for expert in range(config["n_routed_experts"]):
            for part, shape in (("gate", (width, h)), ("up", (width, h)), ("down", (h, width))):
                asked[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"] = shape
    return asked


def save(variant: str, folder: Path, mtp_file: bool = True, copies: bool = False) -> Path:
    """Writes the variant's Hugging Face folder, in two shards and their index. The MTP layer is in a file of its own as
    in GLM-4.6 and 4.7 or in the last shard, with or without its copies of the embedding and the head."""
    config = config_json(variant)
    folder.mkdir(exist_ok=True)
    layer = f"model.layers.{config['num_hidden_layers']}."
    tensors = {name: reference.weight(name, shape) for name, shape in shapes(config).items()}
    if copies:
        tensors[f"{layer}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors[f"{layer}shared_head.head.weight"] = tensors["lm_head.weight"]
    where = {}
    for number, name in enumerate(sorted(tensors)):
        where[name] = f"model-0000{1 + (number > len(tensors) // 2)}-of-00002.safetensors"
        if name.startswith(layer):
            where[name] = "mtp.safetensors" if mtp_file else "model-00002-of-00002.safetensors"
    for file in set(where.values()):
        write(folder / file, {name: tensors[name] for name in where if where[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def one_device(folder: Path, **options):
    """The model in a folder, in fp32, on the first device."""
    return load(folder, mesh="data=1", rules=RULES, dtype="float32", **options)[0]


class Seen(NamedTuple):
    """One forward pass laid open, as NumPy arrays."""

    logits: np.ndarray  # [B, T, V]
    layers: np.ndarray  # [L, B, T, D]: the state after each layer
    final: np.ndarray  # [B, T, D]: after the final norm
    experts: np.ndarray  # [layers with experts, B, T, k]
    share: np.ndarray  # the same shape


def look(model, ids) -> Seen:
    """Runs the model without a cache and shows what is inside. Traced afresh at every call, so that a changed function
    or config counts."""

    collect = ("hidden", "routing") if model.moe else ("hidden",)

    def run(model, ids):
        final, _, seen = model.trunk(ids, collect=collect)
        return model.logits(final), seen["hidden"], final, *seen.get("routing", (jnp.zeros(0), jnp.zeros(0)))

    graph, state = nnx.split(model)
    out = jax.jit(in_mesh(run), static_argnums=0, compiler_options=QUICK)(graph, state, np.asarray(ids, np.int32))
    return Seen(*(np.asarray(x) for x in out))


def mtp(model, ids, hidden) -> np.ndarray:
    """`model.mtp_logits`, traced afresh like `look`."""
    graph, state = nnx.split(model)
    run = in_mesh(lambda model, ids, hidden: model.logits(model.mtp_hidden(ids, hidden)[0]))
    run = jax.jit(run, static_argnums=0, compiler_options=QUICK)
    return np.asarray(run(graph, state, np.asarray(ids, np.int32), hidden))[:, :-1]  # the last has no next token


def far(ours, theirs) -> float:
    """The largest difference, in standard deviations of what it should be."""
    theirs = np.asarray(theirs, np.float64)
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / max(theirs.std(), 1e-30))


def check_sums(ours, theirs, largest=5e-5):
    """Arrays by name, as gradients, are the same within 1e-5 of the standard deviation of each, by root mean square.
    Of all their numbers some one is 1.3e-5 off, on any mesh: sums in another order, held to `largest`."""
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        off = (np.asarray(ours[name], np.float64) - want) / max(want.std() if want.ndim else abs(want), 1e-30)
        assert np.sqrt(np.mean(off**2)) < 1e-5 and np.abs(off).max() < largest, name
