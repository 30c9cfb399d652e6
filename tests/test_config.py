"""config.json in both spellings, and what is refused: a field that is missing, a number that cannot be, a behaviour
that is another model's."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from glm_jax import Config
from glm_jax.config import PRESETS, preset, tiny
from glm_jax.errors import BadInput, MissingInput, UsageError

# The published config.json files as of transformers 4, written out here: GLM-4.5's, and what the others have instead.
GLM_4_5 = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "num_hidden_layers": 92,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 151552,
}
AIR = {
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 46,
    "use_qk_norm": False,
}
LONG = {"max_position_embeddings": 202752}
PUBLISHED = {"glm-4.5": {}, "glm-4.5-air": AIR, "glm-4.6": LONG, "glm-4.7": LONG}
FP8 = {
    "quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
}


def published(name: str, spelling: str) -> dict:
    """A model's config.json as transformers 4 spells it, as GLM-4.7's own file does, or as transformers 5 writes it."""
    raw = GLM_4_5 | PUBLISHED[name]
    if spelling != "4":
        raw["dtype"] = raw.pop("torch_dtype")
    if spelling == "5":
        del raw["rope_scaling"]
        rope = {key: float(raw.pop(key)) for key in ("rope_theta", "partial_rotary_factor")}
        raw["rope_parameters"] = {"rope_type": "default", **rope}
    return raw


def raw(**changes) -> dict:
    """A good config.json with some fields changed; ... takes a field out."""
    fields = GLM_4_5 | changes
    return {name: value for name, value in fields.items() if value is not ...}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("spelling", ["4", "4.7", "5"])
@pytest.mark.parametrize("extra", [{}, FP8], ids=["bf16", "fp8"])
def test_published_files_are_the_presets(name, spelling, extra):
    assert Config.read(published(name, spelling) | extra) == PRESETS[name] == preset(name.upper())


@pytest.mark.parametrize("config", [*PRESETS.values(), tiny(), tiny(tie_word_embeddings=True, eos_token_id=(5,))])
def test_to_dict_round_trip(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    for source in (config.to_dict(), tmp_path, tmp_path / "config.json", str(tmp_path)):
        again = Config.read(source)
        assert again == config and hash(again) == hash(config)


def test_to_dict_is_spelled_for_transformers_4_and_5():
    written = preset("glm-4.6").to_dict()
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    assert (written["rope_theta"], written["partial_rotary_factor"]) == (1e6, 0.5)
    assert (written["model_type"], written["hidden_act"]) == ("glm4_moe", "silu")
    assert tiny().to_dict()["eos_token_id"] is None


def test_numbers_written_as_integers_are_floats():
    config = Config.read(raw(rope_theta=1000000, routed_scaling_factor=1))
    assert type(config.rope_theta) is float and type(config.routed_scaling_factor) is float


OPTIONAL = {"eos_token_id", "pad_token_id", "num_nextn_predict_layers"}  # absent means none of it


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Config) if f.name not in OPTIONAL])
@pytest.mark.parametrize("spelling", ["4", "5"])
def test_missing_field_is_named(field, spelling):
    fields = published("glm-4.6", spelling)
    for place in (fields, fields.get("rope_parameters", {})):
        place.pop(field, None)
    if field == "dtype":
        fields.pop("torch_dtype", None)
    with pytest.raises(BadInput, match="^config: dtype .* is missing" if field == "dtype" else f"^config: no {field};"):
        Config.read(fields)


def test_all_missing_fields_are_named_at_once():
    with pytest.raises(BadInput, match="no hidden_size, head_dim, n_group; these have no default"):
        Config.read(raw(hidden_size=..., head_dim=..., n_group=...))


def test_optional_fields():
    config = Config.read(raw(**dict.fromkeys(OPTIONAL, ...)))
    assert (config.eos_token_id, config.pad_token_id, config.num_nextn_predict_layers) == ((), None, 0)


@pytest.mark.parametrize(
    "written, stop_ids", [(7, (7,)), ([7, 8, 9], (7, 8, 9)), ([], ()), (None, ()), (0, (0,)), (..., ())]
)
def test_eos_forms(written, stop_ids):
    assert Config.read(raw(eos_token_id=written)).eos_token_id == stop_ids


@pytest.mark.parametrize(
    "fields, dtype",
    [
        ({"torch_dtype": "float32"}, "float32"),
        ({"torch_dtype": ..., "dtype": "float32"}, "float32"),
        ({"torch_dtype": None, "dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "bfloat16", "dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_dtype_forms(fields, dtype):
    assert Config.read(raw(**fields)).dtype == jnp.dtype(dtype)
    assert type(Config.read(raw(**fields)).dtype) is type(jnp.dtype(dtype))  # not jnp.float32: it hashes differently


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"torch_dtype": "bfloat16", "dtype": "float32"}, "dtype .* is 'bfloat16' and 'float32', not one of"),
        ({"torch_dtype": "float16"}, "is 'float16', not one of bfloat16, float32"),
        ({"torch_dtype": None}, "dtype .* is missing"),
        ({"torch_dtype": ["bfloat16"]}, "not one of bfloat16, float32"),
        ({"torch_dtype": {"": "bfloat16"}}, "not one of bfloat16, float32"),
        ({"torch_dtype": 16}, "is '16', not one of"),
    ],
)
def test_dtype_refused(fields, says):
    with pytest.raises(BadInput, match=says):
        Config.read(raw(**fields))


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"model_type": "glm4"}, "model_type is 'glm4', this model only has 'glm4_moe'"),
        ({"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3'"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ...}, "no model_type"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', this model only has 'silu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling is .*yarn.*, this model only has None"),
        ({"rope_scaling": {}}, "rope_scaling is {}"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax', this model only has 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy', this model only has 'noaux_tc'"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_parameters is .*yarn.* only has rope_type 'def",
        ),
        ({"rope_parameters": {"type": "yarn"}}, "rope_parameters is .*yarn"),
        ({"rope_parameters": {"rope_type": "default", "type": "linear"}}, "rope_parameters is .*linear"),
        ({"rope_parameters": {"rope_type": None}}, "rope_parameters is"),
        ({"rope_parameters": [1e6]}, r"rope_parameters is \[1000000.0\]"),
        ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "rope_parameters has factor, which this model"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 1000000, but 10000.0 in rope_parameters"),
        (
            {"rope_parameters": {"partial_rotary_factor": 1.0}},
            "partial_rotary_factor is 0.5, but 1.0 in rope_parameters",
        ),
    ],
)
def test_other_behaviour_is_refused_by_name(fields, says):
    with pytest.raises(BadInput, match=f"^config: {says}"):
        Config.read(raw(**fields))


def test_known_behaviour_and_unknown_fields_are_read():
    said = raw(scoring_func="sigmoid", topk_method="noaux_tc", sliding_window=None, mlp_bias=False, my_note="fine")
    assert Config.read(said) == Config.read(raw())


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"hidden_size": -1}, "hidden_size is -1, not an integer >= 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not an integer >= 1"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace is -1, not an integer >= 0"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2, this model has at most one"),
        ({"vocab_size": True}, "vocab_size is True, not an integer >= 1"),
        ({"n_shared_experts": 1.0}, "n_shared_experts is 1.0, not an integer >= 1"),
        ({"head_dim": "128"}, "head_dim is '128', not an integer >= 1"),
        ({"head_dim": None}, "head_dim is None, not an integer"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, not an integer >= 1"),
        ({"n_group": [1]}, r"n_group is \[1\], not an integer"),
        ({"use_qk_norm": 1}, "use_qk_norm is 1, not true or false"),
        ({"norm_topk_prob": "true"}, "norm_topk_prob is 'true', not true or false"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None, not true or false"),
        ({"rope_theta": 0}, "rope_theta is 0.0, not a number > 0"),
        ({"rope_theta": True}, "rope_theta is True, not a number > 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', not a number > 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, not a number > 0"),
        ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor is inf, not a number > 0"),
        ({"partial_rotary_factor": float("inf")}, "partial_rotary_factor is inf, not a number > 0"),
        ({"partial_rotary_factor": float("nan")}, "partial_rotary_factor is nan, not a number > 0"),
        ({"num_attention_heads": 90}, "num_attention_heads 90 is no multiple of 8 KV heads"),
        ({"n_group": 7}, "n_routed_experts 160 is no multiple of n_group 7"),
        ({"n_group": 4, "topk_group": 5}, "topk_group 5 is more than n_group 4"),
        ({"n_group": 80, "topk_group": 2}, "num_experts_per_tok 8 is more than the 4 experts of 2 groups"),
        ({"num_experts_per_tok": 161}, "num_experts_per_tok 161 is more than the 160 experts"),
        ({"head_dim": 66}, "partial_rotary_factor 0.5 of head_dim 66 is 33, not an even number from 2 to 66"),
        (
            {"partial_rotary_factor": 1.5},
            "partial_rotary_factor 1.5 of head_dim 128 is 192, not an even number from 2 to 128",
        ),
        (
            {"partial_rotary_factor": 1e-3},
            "partial_rotary_factor 0.001 of head_dim 128 is 0, not an even number from 2 to 128",
        ),
        ({"eos_token_id": "</s>"}, r"eos_token_id is \('</s>',\), not an id or a list of ids"),
        ({"eos_token_id": [1, True]}, r"eos_token_id is \(1, True\), not an id or a list"),
        ({"eos_token_id": [[1]]}, "eos_token_id is"),
        ({"eos_token_id": -1}, "eos_token_id is"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x', not an id"),
    ],
)
def test_bad_value_is_named(fields, says):
    with pytest.raises(BadInput, match=f"^config: {says}"):
        Config.read(raw(**fields))


def test_all_bad_values_are_named_at_once():
    with pytest.raises(
        BadInput, match="hidden_size is 0.*; use_qk_norm is 'no'.*; num_attention_heads 97 is no multiple"
    ):
        Config.read(raw(hidden_size=0, use_qk_norm="no", num_attention_heads=97))


def test_a_config_made_in_python_is_checked_too():
    with pytest.raises(BadInput, match="^config: num_attention_heads 8 is no multiple of 3 KV heads"):
        tiny(num_key_value_heads=3)
    with pytest.raises(TypeError, match="no_such_field"):
        tiny(no_such_field=1)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "not JSON"),
        (b'{"model_type": "glm4_moe"', "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),  # Python's json has a limit of its own on digits
        (b"[" * 100_000, "not JSON"),
        (b'[{"model_type": "glm4_moe"}]', "holds a list, not an object"),
        (b'"glm4_moe"', "holds a str, not an object"),
        (b"null", "holds a NoneType, not an object"),
        (b"{}", "no model_type; a GLM-4.5, 4.6 or 4.7 says glm4_moe"),
    ],
)
def test_bad_file_is_named(tmp_path, content, says):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for source in (tmp_path, path):
        with pytest.raises(BadInput) as error:
            Config.read(source)
        assert str(error.value).startswith(f"{path}: {says}") and error.value.exit_code == 65


def test_problem_in_a_file_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw(hidden_size=-1)))
    with pytest.raises(BadInput) as error:
        Config.read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: hidden_size is -1")


def test_missing_file(tmp_path):
    for source in (tmp_path, tmp_path / "nowhere", tmp_path / "config.json"):
        with pytest.raises(MissingInput, match="no such file; a model folder needs a config.json") as error:
            Config.read(source)
        assert error.value.exit_code == 66


def test_layer_counts():
    counts = lambda **changes: (tiny(**changes).dense_layers, tiny(**changes).moe_layers)
    assert counts() == (1, 3)
    assert counts(first_k_dense_replace=0) == (0, 4)
    assert counts(first_k_dense_replace=9) == (4, 0)
    assert preset("glm-4.6").rotary_dim == 64 and tiny(head_dim=20, partial_rotary_factor=0.2).rotary_dim == 4


def test_unknown_preset():
    with pytest.raises(UsageError, match="no preset 'glm-5', there are glm-4.5, glm-4.5-air, glm-4.6, glm-4.7"):
        preset("glm-5")
