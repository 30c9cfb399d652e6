"""Between Hugging Face tensors and the model's weights: one table, read both ways, strict both ways.

Every weight is a stack of checkpoint tensors in their own orientation, so nothing is transposed: reading a device's
share is reading byte ranges. Nothing here needs jax: what looks at checkpoints starts at once."""

import dataclasses
import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path

from glm_jax.config import Config
from glm_jax.convert.safetensors import Tensor
from glm_jax.errors import BadInput

# Our weight -> the tensor's name, and its axes as ours: "(n h)" is one axis of theirs that holds two of ours. {l}, {e}
# and {c} are the stacked axes in front: layer, expert, and gate or up. d: the model's width, w: two of it, n: query
# heads, k: KV heads, h: a head's width, e: experts, f: an MLP's inner width, v: the vocabulary.
_LAYER = {
    "attn_norm": ("input_layernorm.weight", "d"),
    "mlp_norm": ("post_attention_layernorm.weight", "d"),
    **{f"attn.{w}": (f"self_attn.{w}_proj.weight", f"({n} h) d") for w, n in ("qn", "kk", "vk")},
    **{f"attn.{w}_bias": (f"self_attn.{w}_proj.bias", f"({n} h)") for w, n in ("qn", "kk", "vk")},
    **{f"attn.{w}_norm": (f"self_attn.{w}_norm.weight", "h") for w in "qk"},
    "attn.o": ("self_attn.o_proj.weight", "d (n h)"),
}
_MLP = {"gate_up": ("{c}_proj.weight", "f d"), "down": ("down_proj.weight", "d f")}
_MOE = {
    "mlp.router": ("mlp.gate.weight", "e d"),
    "mlp.bias": ("mlp.gate.e_score_correction_bias", "e"),
    **{f"mlp.{w}": ("mlp.experts.{e}." + name, axes) for w, (name, axes) in _MLP.items()},
    **{f"mlp.shared.{w}": ("mlp.shared_experts." + name, axes) for w, (name, axes) in _MLP.items()},
}
_DENSE = {f"mlp.{w}": ("mlp." + name, axes) for w, (name, axes) in _MLP.items()}
_PREFIX = "model.layers.{l}."


def _stacked(stack, rows):
    return {f"{stack}.{w}": (_PREFIX + name, axes) for w, (name, axes) in rows.items()}


TABLE: dict[str, tuple[str, str]] = {
    "embed": ("model.embed_tokens.weight", "v d"),
    "head": ("lm_head.weight", "v d"),
    "norm": ("model.norm.weight", "d"),
    **_stacked("dense", _LAYER | _DENSE),
    **_stacked("moe", _LAYER | _MOE),
    **_stacked("mtp.layer", _LAYER | _MOE),
    **{f"mtp.{w}": (f"{_PREFIX}{w}.weight", axes) for w, axes in (("enorm", "d"), ("hnorm", "d"), ("eh_proj", "d w"))},
    "mtp.norm": (_PREFIX + "shared_head.norm.weight", "d"),
}
# The MTP layer's own embedding and head stand for the main ones; some repositories hold copies of them.
COPIES = {
    "mtp.embed": (_PREFIX + "embed_tokens.weight", "v d"),
    "mtp.head": (_PREFIX + "shared_head.head.weight", "v d"),
}
_GATE_UP = ("gate", "up")


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight of the model and the checkpoint tensors it is a stack of."""

    path: str
    shape: tuple[int, ...]  # ours
    name: str
    first_layer: int
    axes: tuple[tuple[int, ...], ...]  # the sizes of our axes that each axis of theirs holds

    @classmethod
    def of(cls, path: str, config: Config) -> "Row":
        (name, axes), c = (TABLE | COPIES)[path], config
        first = {"moe": c.dense_layers, "mtp": c.num_hidden_layers}.get(path.split(".", 1)[0], 0)
        if path.startswith("mtp.") and not path.startswith("mtp.layer."):  # in no stack of ours
            name = name.replace("{l}", str(first))
        inner = c.intermediate_size if path.startswith("dense.") else c.moe_intermediate_size
        sizes = {
            "d": c.hidden_size,
            "w": 2 * c.hidden_size,
            "n": c.num_attention_heads,
            "k": c.num_key_value_heads,
            "h": c.head_dim,
            "e": c.n_routed_experts,
            "f": inner * (c.n_shared_experts if ".shared." in path else 1),
            "v": c.vocab_size,
        }
        stacks = {"l": {"dense": c.dense_layers, "moe": c.moe_layers}.get(path.split(".", 1)[0], 1), "c": 2}
        stacked = [(stacks | sizes)[key] for key in re.findall(r"\{(\w)\}", name)]
        groups = [tuple(sizes[letter] for letter in re.findall(r"\w", g)) for g in re.findall(r"\([^)]*\)|\S+", axes)]
        return cls(path, (*stacked, *(n for g in groups for n in g)), name, first, tuple(groups))

    @property
    def stacked(self) -> tuple[int, ...]:
        """Sizes of the axes in front that tell tensors apart."""
        return self.shape[: len(self.shape) - sum(map(len, self.axes))]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor in the checkpoint."""
        return tuple(map(math.prod, self.axes))

    def tensor(self, *at: int) -> str:
        """The name of the tensor at an index of the stacked axes."""
        index, values = iter(at), {}
        for key in re.findall(r"\{(\w)\}", self.name):
            if key == "l":
                values[key] = self.first_layer + next(index)
            else:
                values[key] = _GATE_UP[next(index)] if key == "c" else next(index)
        return self.name.format(**values)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name, with its index in the stacked axes."""
        choices: list[Iterable] = []
        for key, size in zip(re.findall(r"\{(\w)\}", self.name), self.stacked, strict=True):
            first = self.first_layer if key == "l" else 0
            choices.append(_GATE_UP if key == "c" else range(first, first + size))
        name = re.sub(r"\{\w\}", "{}", self.name)
        for values, at in zip(product(*choices), product(*map(range, self.stacked)), strict=True):
            yield name.format(*values), at

    def cut(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """What `index` of our axes after the stacked ones cuts out of each tensor."""
        cuts, index = [], iter(index)  # type: ignore[assignment]
        for group in self.axes:
            spans = [next(index).indices(size)[:2] for size in group]  # type: ignore[call-overload]
            # Only the first of several packed axes may be sharded: its parts are contiguous.
            assert all(span == (0, size) for span, size in zip(spans[1:], group[1:], strict=True)), self.path
            step = math.prod(group[1:])
            cuts.append(slice(spans[0][0] * step, spans[0][1] * step))
        return tuple(cuts)


def rows(config: Config) -> list[Row]:
    """The row of every weight of the model."""
    return [Row.of(path, config) for path in TABLE if _is_there(path, config)]


def _is_there(path: str, c: Config) -> bool:
    stack, last = path.split(".", 1)[0], path.rsplit(".", 1)[-1]
    layers = {"dense": c.dense_layers, "moe": c.moe_layers, "mtp": c.num_nextn_predict_layers}
    return not (
        not layers.get(stack, 1)
        or (path == "head" and c.tie_word_embeddings)
        or (last in ("q_bias", "k_bias", "v_bias") and not c.attention_bias)
        or (last in ("q_norm", "k_norm") and not c.use_qk_norm)
    )


def copies(config: Config) -> list[Row]:
    """The rows of the MTP layer's copies of embedding and head, which a checkpoint may have or not."""
    return [Row.of(path, config) for path in COPIES] if config.num_nextn_predict_layers else []


def tensor_shapes(config: Config, mtp_copies: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds; `mtp_copies` adds the MTP layer's own
    embedding and head, which some repositories have."""
    wanted = rows(config) + (copies(config) if mtp_copies else [])
    return {name: row.tensor_shape for row in wanted for name, _ in row.tensors()}


def without_missing_mtp(config: Config, tensors: Iterable[str], where: str | Path) -> Config:
    """The config without the MTP layer it promises, after one warning, if the folder has none of its tensors."""
    prefix = _PREFIX.format(l=config.num_hidden_layers)
    if config.num_nextn_predict_layers and not any(name.startswith(prefix) for name in tensors):
        warnings.warn(
            f"{where}: config.json has num_nextn_predict_layers {config.num_nextn_predict_layers}, but there is no "
            f"tensor {prefix}*; loading without the MTP layer",
            stacklevel=3,
        )
        return dataclasses.replace(config, num_nextn_predict_layers=0)
    return config


def refuse_many(config: Config, tensors: Collection[str], where: str | Path) -> None:
    """Raises BadInput if a config implies many times the tensors that are there, before any is named: a few characters
    of config.json can ask for more names than memory holds."""
    implied = sum(math.prod(row.stacked) for row in rows(config))
    if implied > 2 * len(tensors) + 10_000:
        raise BadInput(
            f"{where}: config.json implies {implied:,} tensors, and {len(tensors):,} are there: it is of another model"
        )


def check(config: Config, tensors: Mapping[str, Tensor | None], where: str | Path) -> None:
    """Raises BadInput unless the folder has exactly the tensors the config implies, in shapes and dtypes that are
    theirs; None is a tensor of which the name alone is known. All that is wrong is said at once."""
    refuse_many(config, tensors, where)
    wanted, known = tensor_shapes(config), {row.name: row.tensor_shape for row in copies(config)}
    if config.tie_word_embeddings:
        known["lm_head.weight"] = (config.vocab_size, config.hidden_size)  # another copy of the embedding
    problems = []
    if missing := [name for name in wanted if name not in tensors]:
        problems.append(f"{len(missing)} tensors are missing: {grouped(missing)}")
    if extra := [name for name in tensors if name not in wanted and name not in known]:
        problems.append(f"{len(extra)} tensors have no place in this model: {grouped(extra)}")
    for name, tensor in tensors.items():
        shape = tensor and (wanted.get(name) or known.get(name))
        if shape and tensor.shape != shape:
            problems.append(f"{name} is {list(tensor.shape)}, the config implies {list(shape)}")
        elif shape and tensor.dtype not in ("BF16", "F32"):
            problems.append(f"{name} is {tensor.dtype}, not BF16 or F32")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise BadInput(f"{where}: " + "; ".join(problems[:8]) + more)


def grouped(names: list[str]) -> str:
    """Long lists of names with the experts of one projection, and then the layers, drawn together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=experts\.)\d+", "*", name), []).append(name)
    shown = [k if len(v) > 1 else v[0] for k, v in groups.items()]
    told = [f"{s} ({len(groups[s])})" if "*" in s else s for s in shown[:6]]
    return ", ".join(told) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")


def file_order(name: str):
    """Embedding first, then layer by layer, tensors of one weight together, then norm and head."""
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    if not layer:
        return (0 if "embed" in name else 2, 0, name)
    pieces = re.sub(r"experts\.\d+\.", "experts.", layer[2]).replace("up_proj", "gate_proj")
    return (1, int(layer[1]), pieces, name)
