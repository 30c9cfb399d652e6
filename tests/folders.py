"""Small model folders for tests: random tensors under the names of table.tensor_shapes, in any files and any dtype."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from make_tokenizer import write_tokenizer
from tokenizers import Tokenizer

from glm_jax import Config
from glm_jax.config import tiny
from glm_jax.convert import table
from glm_jax.convert.safetensors import write

BF16 = np.dtype(ml_dtypes.bfloat16)
ROUTER_BIAS = "e_score_correction_bias"
LAYERS = 3
SMALL = dict(num_hidden_layers=LAYERS, n_routed_experts=8, num_experts_per_tok=2, hidden_size=32)
TEXT_STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")


def random_tensors(config: Config, seed: int = 0, mtp_copies: bool = False) -> dict[str, np.ndarray]:
    """What a checkpoint of this config holds, the router bias in float32; no bias is zero, no norm one."""
    rng, out = np.random.default_rng(seed), {}
    for name, shape in table.tensor_shapes(config, mtp_copies).items():
        x = rng.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            x = 1 + 0.3 * x
        elif len(shape) == 1:
            x = 0.3 * x
        elif "embed" not in name:
            x = x * shape[-1] ** -0.5
        out[name] = np.asarray(x, np.float32 if ROUTER_BIAS in name else config.dtype)
    return out


def write_model(
    folder: Path,
    config: Config,
    tensors: dict[str, np.ndarray] | None = None,
    file_of: Callable[[str], str] | None = None,
    **changes,
) -> Path:
    """A Hugging Face folder. `file_of` gives each tensor's file, with an index; without it there is one file. `changes`
    are fields of config.json, put there unchecked."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(config) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config.to_dict() | changes))
    if file_of is None:
        write(folder / "model.safetensors", tensors)
        return folder
    where = {name: file_of(name) for name in tensors}
    for file in sorted(set(where.values())):
        write(folder / file, {name: tensors[name] for name in tensors if where[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_text_model(folder: Path, **changes) -> Path:
    """A tiny model with a tokenizer of 356 ids, a vocabulary padded to 384 and the three stop ids."""
    write_tokenizer(folder)
    known = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stops = tuple(known.token_to_id(token) for token in TEXT_STOPS)
    return write_model(folder, tiny(**SMALL | dict(vocab_size=384, eos_token_id=stops) | changes))
