"""The model's numbers, under their Hugging Face names. A model variant is a `Config` value, nothing else."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from glm_jax.errors import BadInput, MissingInput, UsageError, show

BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
MOST_BYTES = 1 << 20  # of a config.json; a published one has some thousand
_BELOW = 2**31  # every size, so that nothing a file says makes a table or a sum that cannot be held
_MOST_EXPERTS = 100_000  # in all layers together; GLM-4.6 has 14,720


@dataclasses.dataclass(frozen=True)
class Config:
    """The config.json fields the model uses. No field has a default that could hide a missing one.

    Raises BadInput, naming the fields, when the numbers do not fit each other."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int  # MTP layers, stored after the main ones
    first_k_dense_replace: int  # layers before this one have a dense MLP instead of experts
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # not hidden_size / num_attention_heads: 128 where that would be 53.3
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rope_theta: float
    partial_rotary_factor: float
    max_position_embeddings: int
    rms_norm_eps: float
    attention_bias: bool  # biases of q, k and v; o has none
    use_qk_norm: bool  # false in GLM-4.5-Air
    tie_word_embeddings: bool
    eos_token_id: tuple[int, ...]  # () means that nothing stops a generation
    pad_token_id: int | None
    dtype: np.dtype  # BFLOAT16 or FLOAT32; jnp.bfloat16 is equal to it and hashes differently

    def __post_init__(self):
        wrong = [problem for bad, problem in _conflicts(self) if bad]
        if wrong:
            raise BadInput("config: " + "; ".join(wrong))

    @classmethod
    def read(cls, source: "str | Path | Mapping[str, Any]") -> "Config":
        """A Config from a folder, a config.json, or its dict; transformers 4 and 5 spell some fields differently and
        both are read. Raises MissingInput without a config.json, BadInput for a missing or unknown field."""
        if isinstance(source, Mapping):
            return _parse(source, "config")
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise MissingInput(f"{path}: no such file; a model folder needs a config.json")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise BadInput(f"{path}: {size:,} bytes, a config.json has at most {MOST_BYTES:,}")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}: not JSON ({error})") from None
        if not isinstance(raw, dict):
            raise BadInput(f"{path}: holds a {type(raw).__name__}, not an object")
        return _parse(raw, str(path))

    def to_dict(self) -> dict[str, Any]:
        """The config.json of this model, in transformers' present spelling."""
        fields = dataclasses.asdict(self)
        rope = {name: fields.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
        eos = list(fields.pop("eos_token_id"))
        return {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            **fields,
            "dtype": self.dtype.name,
            "eos_token_id": eos or None,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", **rope},
            # transformers before version 5 looks for these on top.
            **rope,
            "rope_scaling": None,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
        }

    @property
    def dense_layers(self) -> int:
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def moe_layers(self) -> int:
        return self.num_hidden_layers - self.dense_layers

    @property
    def rotary_dim(self) -> int:
        return int(min(self.head_dim * self.partial_rotary_factor, _BELOW))


def _conflicts(c: Config):
    for field in dataclasses.fields(c):
        value, least = getattr(c, field.name), 0 if field.name in _MAY_BE_ZERO else 1
        if field.type is int:
            yield (
                not _is_integer(value, least),
                f"{field.name} is {show(value)}, not an integer >= {least} and below 2^31",
            )
        elif field.type is float:
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _LARGEST
            yield not number, f"{field.name} is {show(value)}, not a number > 0"
        elif field.type is bool:
            yield not isinstance(value, bool), f"{field.name} is {show(value)}, not true or false"
    more = _is_integer(c.num_nextn_predict_layers, 2)
    yield more, f"num_nextn_predict_layers is {show(c.num_nextn_predict_layers)}, this model has at most one"
    stops = isinstance(c.eos_token_id, tuple) and all(_is_integer(i, 0) for i in c.eos_token_id)
    yield not stops, f"eos_token_id is {show(c.eos_token_id)}, not an id or a list of ids"
    pad = c.pad_token_id is None or _is_integer(c.pad_token_id, 0)
    yield not pad, f"pad_token_id is {show(c.pad_token_id)}, not an id"
    if not all(_is_integer(getattr(c, name), 1) for name in _RELATED):
        return  # named above; a text times a number, or a text that formats one, could be as long as it likes
    try:
        heads, groups = c.num_attention_heads % c.num_key_value_heads, c.n_routed_experts % c.n_group
        experts = c.num_hidden_layers * c.n_routed_experts
        yield (
            experts > _MOST_EXPERTS,
            f"num_hidden_layers {c.num_hidden_layers} of n_routed_experts {c.n_routed_experts} are {experts:,} "
            f"experts, more than {_MOST_EXPERTS:,}",
        )
        yield heads, f"num_attention_heads {c.num_attention_heads} is no multiple of {c.num_key_value_heads} KV heads"
        yield groups, f"n_routed_experts {c.n_routed_experts} is no multiple of n_group {c.n_group}"
        yield c.topk_group > c.n_group, f"topk_group {c.topk_group} is more than n_group {c.n_group}"
        room = c.n_routed_experts // c.n_group * c.topk_group
        yield (
            c.num_experts_per_tok > room,
            f"num_experts_per_tok {c.num_experts_per_tok} is more than the {room} experts of {c.topk_group} groups",
        )
        yield (
            c.rotary_dim % 2 or not 0 < c.rotary_dim <= c.head_dim,
            f"partial_rotary_factor {c.partial_rotary_factor} of head_dim {c.head_dim} is {c.rotary_dim}, "
            f"not an even number from 2 to {c.head_dim}",
        )
    except (ArithmeticError, TypeError, ValueError):
        pass  # a field above is no number, and is named there


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _BELOW


_LARGEST = sys.float_info.max
_RELATED = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
)
_MAY_BE_ZERO = ("first_k_dense_replace", "num_nextn_predict_layers")
_DTYPES = ("bfloat16", "float32")
# What the file may say about behaviour, and the only values that this model has. A file that says something else is
# refused: it is another model. Absent is fine, these are not numbers of the model.
_BEHAVIOUR = {
    "model_type": ("glm4_moe",),
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "sliding_window": (None,),
    "attention_dropout": (0, 0.0),
    "mlp_bias": (False,),
}


def _names(names: Iterable[str]) -> str:
    """Names from a file, of which any may be anything."""
    names = sorted(names)
    shown = ", ".join(name if name.isidentifier() and len(name) < 100 else show(name) for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _parse(raw: Mapping[str, Any], where: str) -> Config:
    for name, allowed in _BEHAVIOUR.items():
        if name in raw and raw[name] not in allowed:
            raise BadInput(
                f"{where}: {name} is {show(raw[name])}, this model only has {' or '.join(map(repr, allowed))}"
            )
    if "model_type" not in raw:
        raise BadInput(f"{where}: no model_type; a GLM-4.5, 4.6 or 4.7 says glm4_moe")
    values = dict(raw)
    rope = raw.get("rope_parameters")
    if rope is not None:  # transformers 5 moved the two rope numbers in here
        types = [rope[name] for name in ("rope_type", "type") if name in rope] if isinstance(rope, Mapping) else [None]
        if any(kind != "default" for kind in types):
            raise BadInput(f"{where}: rope_parameters is {show(rope)}, this model only has rope_type 'default'")
        unknown = set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if unknown:
            raise BadInput(f"{where}: rope_parameters has {_names(unknown)}, which this model does not know")
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                if name in raw and raw[name] != rope[name]:
                    raise BadInput(f"{where}: {name} is {show(raw[name])}, but {show(rope[name])} in rope_parameters")
                values[name] = rope[name]
    told = [raw[name] for name in ("dtype", "torch_dtype") if raw.get(name) is not None]
    dtypes = {name if isinstance(name, str) else show(name) for name in told}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        found = " and ".join(map(show, sorted(dtypes))) or "missing"
        raise BadInput(f"{where}: dtype (torch_dtype in older files) is {found}, not one of {', '.join(_DTYPES)}")
    values["dtype"] = {"bfloat16": BFLOAT16, "float32": FLOAT32}[dtypes.pop()]
    eos = raw.get("eos_token_id")
    values["eos_token_id"] = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    values.setdefault("pad_token_id", None)
    values.setdefault("num_nextn_predict_layers", 0)  # absent in files without such a layer
    names = [field.name for field in dataclasses.fields(Config)]
    missing = [name for name in names if name not in values]
    if missing:
        raise BadInput(f"{where}: no {', '.join(missing)}; these have no default that would be right for every GLM")
    for field in dataclasses.fields(Config):  # a float may be written as an integer in JSON
        value = values[field.name]
        if field.type is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST:
            values[field.name] = float(value)
    try:
        return Config(**{name: values[name] for name in names})
    except BadInput as error:
        raise BadInput(str(error).replace("config", where, 1)) from None


_GLM_4_6: dict[str, Any] = dict(
    vocab_size=151552,
    hidden_size=5120,
    num_hidden_layers=92,
    num_nextn_predict_layers=1,
    first_k_dense_replace=3,
    num_attention_heads=96,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    n_routed_experts=160,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    rope_theta=1e6,
    partial_rotary_factor=0.5,
    max_position_embeddings=202752,
    rms_norm_eps=1e-5,
    attention_bias=True,
    use_qk_norm=True,
    tie_word_embeddings=False,
    eos_token_id=(151329, 151336, 151338),
    pad_token_id=151329,
    dtype=BFLOAT16,
)
_AIR: dict[str, Any] = dict(
    hidden_size=4096,
    num_hidden_layers=46,
    first_k_dense_replace=1,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    n_routed_experts=128,
    routed_scaling_factor=1.0,
    max_position_embeddings=131072,
    use_qk_norm=False,
)
_GLM_4_5: dict[str, Any] = dict(max_position_embeddings=131072)
PRESETS = {
    "glm-4.5": Config(**_GLM_4_6 | _GLM_4_5),
    "glm-4.5-air": Config(**_GLM_4_6 | _AIR),
    "glm-4.6": Config(**_GLM_4_6),
    "glm-4.7": Config(**_GLM_4_6),
}


def preset(name: str) -> Config:
    """The Config of a published model: glm-4.5, glm-4.5-air, glm-4.6 or glm-4.7."""
    if name.lower() not in PRESETS:
        raise UsageError(f"no preset {name!r}, there are {', '.join(PRESETS)}")
    return PRESETS[name.lower()]


def tiny(**changes: Any) -> Config:
    """A Config small enough for a test, in float32; every dimension divides by 4, and heads times width is not the
    hidden size."""
    small: dict[str, Any] = dict(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=512,
        eos_token_id=(),
        pad_token_id=None,
        dtype=FLOAT32,
    )
    return Config(**_GLM_4_6 | small | changes)
