"""The classic mistakes of a GLM-4.5/4.6/4.7 port, each made here on purpose: the comparison that passes without it must
fail with it, and by about as much as was measured for it. Nothing in glm_jax has a switch for a mistake; the tests
change a function, a config value or a weight.

| row | mistake                                                    | test                                          |
|-----|------------------------------------------------------------|-----------------------------------------------|
| 1   | RoPE interleaved, on the last half, on all dims, theta 1e4 | test_mistake_moves_the_logits                 |
| 2   | QK-norm missing, after RoPE                                | test_mistake_moves_the_logits                 |
|     | QK-norm in Air                                             | test_qk_norm_and_biases_where_they_belong     |
| 3   | q/k/v biases dropped                                       | test_mistake_moves_the_logits                 |
|     | a bias on o                                                | test_qk_norm_and_biases_where_they_belong     |
| 4   | scale or head width from hidden size / heads               | test_mistake_moves_the_logits                 |
| 5   | query head j reads KV head j % K                           | test_mistake_moves_the_logits                 |
| 6   | post_attention_layernorm used as a post-norm               | test_mistake_moves_the_logits                 |
| 7   | softmax gating                                             | test_mistake_moves_the_logits                 |
| 8   | router bias ignored, or in the weights                     | test_mistake_moves_the_logits                 |
| 9   | scaling missing, doubled, on the shared expert             | test_mistake_moves_the_logits                 |
|     | Air cannot show it                                         | test_air_cannot_show_a_missing_scaling_factor |
| 10  | no renormalisation; shared expert missing or misfed        | test_mistake_moves_the_logits                 |
| 11  | bf16 router logits or sigmoid                              | test_bf16_router_at_real_width                |
| 12  | router bias in bf16                                        | test_router_bias_in_bf16_takes_other_experts  |
|     | router bias not fp32 after load, cast, save                | test_router_bias_stays_float32                |
| 13  | score recovered as (s + b) - b                             | test_score_recovered_from_the_biased_one      |
| 14  | groups masked with 0 instead of -inf                       | test_group_mask_of_zero                       |
| 15  | renormalisation clamped                                    | test_renormalisation_clamped                  |
| 16  | eps 1e-6                                                   | test_eps_of_1e6                               |
| 17  | norm weight multiplied in fp32                             | test_norm_weight_multiplied_in_fp32           |
| 18  | RoPE angles in fp64, positions in bf16                     | test_rope_in_another_precision                |
| 19  | MTP input order, MTP fed the state before the norm         | test_mtp_mistakes                             |
| 20  | MTP recursion fed the state before its norm                | test_mtp_recursion_feeds_the_normed_state     |
| 21  | MTP layer dense, or with a main layer's weights            | test_mtp_layer_has_its_own_experts            |
| 22  | prefix model.layers.9 also takes 90 to 92                  | test_layer_prefix                             |
| 23  | mtp.safetensors missed; copies required                    | test_mtp_file_is_found                        |
| 24  | FP8 numbers read without their scales                      | test_fp8_is_refused                           |
| 26  | rope_theta of transformers 5 missed; dtype or torch_dtype  | test_both_config_styles                       |
| 27  | num_nextn_predict_layers 1 without the layer               | test_mtp_layer_absent                         |
| 28  | fp16                                                       | test_float16_is_refused                       |
| 29  | one stop id of three                                       | test_every_stop_id_stops                      |
| 30  | [gMASK]<sop> twice                                         | test_prompt_prefix_once                       |
| 31  | ids above the tokenizer's size sampled                     | test_padding_ids_are_never_sampled            |
| 32  | think and tool tags lost in decoding                       | test_tags_survive_decoding                    |
| 33  | a template that drifted                                    | test_template_drift                           |
| 34  | history's thoughts cleared: the prefix cache is lost       | test_cleared_thoughts_end_the_common_prefix   |
| 35  | top-k order relied on                                      | test_order_of_the_chosen_experts              |
| 36  | experts summed in bf16                                     | test_experts_are_summed_in_float32            |
| 37  | fused shared expert in the renormalisation                 | test_shared_expert_fused                      |
| 38  | Air's odd widths, 1408 and 10944                           | test_odd_widths_in_the_kernel                 |
|     | 10944 over 8 devices                                       | test_odd_widths_over_eight_devices            |

Row 25 is about a quantiser, and there is none here.
"""

import dataclasses
import json

import glm4_moe_reference as reference
import golden
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from flax import nnx
from golden import CLOSE, far
from make_tokenizer import TEMPLATES, write_tokenizer

import glm_jax.model as model_module
from glm_jax import GLM, generate_ids, kernels, load, loading, save
from glm_jax.config import PRESETS, Config, preset, tiny
from glm_jax.convert.safetensors import Tensor, read_folder, write
from glm_jax.errors import BadInput, UsageError
from glm_jax.model import rms_norm, rope_angles
from glm_jax.sharding import Rules, abstract
from glm_jax.tokenizer import Tokenizer

IDS = [reference.IDS]
BIG = "tiny_355b_like"


def load_variant(variant, folder):
    return golden.one_device(golden.save(variant, folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return golden.save(BIG, tmp_path_factory.mktemp(BIG))


@pytest.fixture
def model(folder):
    """The golden model, fresh for each test, since tests change it."""
    return golden.one_device(folder)


# ---------------------------------------------------------------------------------- mistakes that the logits show


def change_config(**fields):
    return lambda model, patch: setattr(model, "config", dataclasses.replace(model.config, **fields))


def change(name):
    """A mistake that replaces one function of glm_jax.model by a wrong one made from the right one."""

    def decorator(wrong):
        right = getattr(model_module, name)
        return lambda model, patch: patch.setattr(model_module, name, lambda *args: wrong(right, *args))

    return decorator


@change("rope")
def rope_interleaved(right, x, angles):
    cos, sin = angles
    half = cos.shape[-1]
    a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(*x.shape[:-1], 2 * half)
    return jnp.concatenate([turned, x[..., 2 * half :]], -1)


@change("rope")
def rope_last_half(right, x, angles):
    return jnp.roll(right(jnp.roll(x, x.shape[-1] // 2, -1), angles), x.shape[-1] // 2, -1)


def qk_norm_after_rope(model, patch):
    right_norm, right_rope, kept = model_module.rms_norm, model_module.rope, {}

    def norm(x, scale, eps):  # only q and k have four axes; they differ in their heads
        if x.ndim < 4:
            return right_norm(x, scale, eps)
        kept[x.shape[2]] = scale
        return x

    patch.setattr(model_module, "rms_norm", norm)
    patch.setattr(model_module, "rope", lambda x, a: right_norm(right_rope(x, a), kept[x.shape[2]], 1e-5))


@change("attention")
def scale_hidden_over_heads(right, q, k, v, positions):
    return right(q * (40 / 6) ** -0.5 * 16**0.5, k, v, positions)


@change("attention")
def gqa_modulo(right, q, k, v, positions):
    heads, kv = q.shape[2], k.shape[1]
    order = np.arange(heads).reshape(-1, kv).T.ravel()  # the heads with j % kv == 0, then those with 1, ...
    return right(q[:, :, order], k, v, positions)[:, :, np.argsort(order)]


def post_attn_norm_on_attn_output(model, patch):
    def call(self, x, step, cache, cache_layer, expert_layer):
        eps = step.config.rms_norm_eps
        y, cache = self.attn(rms_norm(x, self.attn_norm[...], eps), step, cache, cache_layer)
        x = x + rms_norm(y, self.mlp_norm[...], eps)
        if isinstance(self.mlp, model_module.MoE):
            y, routing = self.mlp(x, step, expert_layer)
            return x + y, cache, routing
        return x + self.mlp(x, step), cache, None

    patch.setattr(model_module.Layer, "__call__", call)


def softmax_router(model, patch):
    patch.setattr(jax.nn, "sigmoid", lambda x: jax.nn.softmax(x, -1))


@change("route")
def ignore_bias(right, x, router, bias, config):
    return right(x, router, jnp.zeros_like(bias), config)


@change("route")
def bias_in_weights(right, x, router, bias, config):
    ids, _ = right(x, router, bias, config)
    share = jnp.take_along_axis(jax.nn.sigmoid(x @ router.T) + bias, ids, -1)
    return ids, share / share.sum(-1, keepdims=True) * config.routed_scaling_factor


def change_shared(wrong):
    """A mistake that replaces the shared expert's output y by wrong(y)."""

    def make(model, patch):
        right, width = model_module.MLP.__call__, model.config.moe_intermediate_size
        is_shared = lambda mlp: mlp.down[...].shape[-1] == width
        call = lambda mlp, x, step: wrong(right(mlp, x, step)) if is_shared(mlp) else right(mlp, x, step)
        patch.setattr(model_module.MLP, "__call__", call)

    return make


def shared_on_routed_output(model, patch):
    right_moe, right_mlp = model_module.MoE.__call__, model_module.MLP.__call__

    def moe(self, x, step, layer):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(model_module.MLP, "__call__", lambda mlp, x, step: jnp.zeros_like(x))
            routed, chosen = right_moe(self, x, step, layer)
        return routed + right_mlp(self.shared, routed, step), chosen

    patch.setattr(model_module.MoE, "__call__", moe)


# The name of the reference's mutation, the mistake made in our model, and max |difference| / std of the logits that was
# measured for it.
LOGITS = [
    ("rope_interleaved", rope_interleaved, 3.2),
    ("rope_last_half", rope_last_half, 3.1),
    ("rope_full", change_config(partial_rotary_factor=1.0), 2.4),
    ("theta_1e4", change_config(rope_theta=1e4), 1.4),
    ("no_qk_norm", change_config(use_qk_norm=False), 2.6),
    ("qk_norm_after_rope", qk_norm_after_rope, 1.7),
    ("no_qkv_bias", change_config(attention_bias=False), 3.2),
    ("scale_hidden_over_heads", scale_hidden_over_heads, 2.5),
    ("gqa_modulo", gqa_modulo, 4.2),
    ("post_attn_norm_on_attn_output", post_attn_norm_on_attn_output, 5.0),
    ("softmax_router", softmax_router, 2.1),
    ("ignore_bias", ignore_bias, 3.7),
    ("bias_in_weights", bias_in_weights, 1.5),
    ("no_scaling", change_config(routed_scaling_factor=1.0), 2.1),
    ("double_scaling", change_config(routed_scaling_factor=6.25), 2.6),
    ("scale_shared_too", change_shared(lambda y: 2.5 * y), 2.6),
    ("no_renorm", change_config(norm_topk_prob=False), 2.3),
    ("no_shared", change_shared(jnp.zeros_like), 3.9),
    ("shared_on_routed_output", shared_on_routed_output, 3.7),
]


# The quick suite has one of each row of the table above.
QUICK = ("rope_interleaved", "no_qk_norm", "no_qkv_bias", "scale_hidden_over_heads", "gqa_modulo", "softmax_router")
QUICK += ("post_attn_norm_on_attn_output", "ignore_bias", "no_scaling", "no_shared")
MARKED = [pytest.param(*row, id=row[0], marks=() if row[0] in QUICK else pytest.mark.slow) for row in LOGITS]


@pytest.mark.parametrize("name, mistake, moved", MARKED)
def test_mistake_moves_the_logits(model, monkeypatch, name, mistake, moved):
    want = golden.GOLDEN[BIG]["logits"]
    mistake(model, monkeypatch)
    wrong = golden.look(model, IDS).logits[0]
    assert far(wrong, want) > CLOSE
    assert far(wrong, want) == pytest.approx(moved, rel=0.05)
    # and it is the mistake of that name, not some other: the reference makes the same one
    assert far(wrong, reference.forward(IDS[0], golden.GOLDEN[BIG]["config"], mut=name)[0]) < 2 * CLOSE


def test_without_a_mistake_the_logits_agree(model):
    assert far(golden.look(model, IDS).logits[0], golden.GOLDEN[BIG]["logits"]) < CLOSE


def test_air_cannot_show_a_missing_scaling_factor(tmp_path, monkeypatch):
    air = load_variant("tiny_air_like", tmp_path)
    change_shared(lambda y: air.config.routed_scaling_factor * y)(air, monkeypatch)
    assert far(golden.look(air, IDS).logits[0], golden.GOLDEN["tiny_air_like"]["logits"]) < CLOSE


def attention_parts(config):
    return {name for name in ("q_norm", "k_norm", "q_bias", "k_bias", "v_bias", "o_bias") if hasattr(config, name)}


def test_qk_norm_and_biases_where_they_belong(tmp_path):
    biases, norms = {"q_bias", "k_bias", "v_bias"}, {"q_norm", "k_norm"}
    for name, parts in (("glm-4.6", biases | norms), ("glm-4.5-air", biases)):
        glm = GLM(preset(name), seed=None)
        for stack in (glm.dense, glm.moe, glm.mtp.layer):
            assert attention_parts(stack.attn) == parts
    wrong = dataclasses.replace(preset("glm-4.5-air"), use_qk_norm=True)
    assert attention_parts(GLM(wrong, seed=None).moe.attn) != biases
    # on the numbers: norms of one in Air move the logits
    air = load_variant("tiny_air_like", tmp_path)
    for stack in (air.dense, air.moe):
        ones = jnp.ones((len(stack.attn_norm[...]), 16))
        stack.attn.q_norm, stack.attn.k_norm = type(air.norm)(ones), type(air.norm)(ones)
    air.config = dataclasses.replace(air.config, use_qk_norm=True)
    assert far(golden.look(air, IDS).logits[0], golden.GOLDEN["tiny_air_like"]["logits"]) > 0.3


# ------------------------------------------------------------------------------------------- the router, on its own


def route(x, router, bias, config):
    """The model's, as it is now, on NumPy arrays."""
    return tuple(np.asarray(a) for a in model_module.route(*map(jnp.asarray, (x, router, bias)), config))


def routed(scores, bias, config):
    """`route` on tokens whose logits are given: experts [T, k] in order of their ids, and their shares."""
    logits = np.log(scores) - np.log1p(-np.asarray(scores, np.float64))
    x = np.asarray(logits, np.float32)  # the router is the identity
    ids, share = route(x, np.eye(x.shape[-1], dtype=np.float32), np.asarray(bias, np.float32), config)
    order = np.argsort(ids, -1)
    return np.take_along_axis(ids, order, -1), np.take_along_axis(share, order, -1)


def experts(x, ids, share, gate_up, down):
    return np.asarray(kernels.routed_experts(*map(jnp.asarray, (x, ids, share, gate_up, down))))


def plain_router(E=8, k=2, **changes):
    return tiny(n_routed_experts=E, num_experts_per_tok=k, routed_scaling_factor=1.0, **changes)


def other_choice(a, b):
    """The share of tokens whose sets of experts differ."""
    return (np.sort(a, -1) != np.sort(b, -1)).any(-1).mean()


@pytest.fixture(scope="module")
def real_width():
    """1024 tokens at the width of GLM-4.6, bf16 values: x, the router, the exact logits."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1024, 5120), np.float32).astype(ml_dtypes.bfloat16)
    router = (rng.standard_normal((160, 5120), np.float32) * 5120**-0.5).astype(ml_dtypes.bfloat16)
    return x, router, x.astype(np.float64) @ router.astype(np.float64).T


@pytest.mark.parametrize(
    "part, least, most", [("einsum", 0.015, 0.06), ("sigmoid", 0.06, 0.2)], ids=["logits", "sigmoid"]
)
def test_bf16_router_at_real_width(real_width, monkeypatch, part, least, most):
    x, router, logits = real_width
    exact = np.argsort(-logits, -1)[:, :8]
    choose = lambda: route(x, router, np.zeros(160, np.float32), preset("glm-4.6"))[0]
    assert other_choice(choose(), exact) < 1e-3
    home = jnp if part == "einsum" else jax.nn
    right = getattr(home, part)
    rounded = lambda *args, **options: right(*args, **options).astype(jnp.bfloat16).astype(jnp.float32)
    monkeypatch.setattr(home, part, rounded)
    assert least < other_choice(choose(), exact) < most


@pytest.mark.parametrize("centre, spread, least, most", [(10, 0.04, 0.5, 0.9), (0, 0.1, 0.001, 0.05)])
def test_router_bias_in_bf16_takes_other_experts(real_width, centre, spread, least, most):
    x, router, logits = real_width
    bias = np.random.default_rng(1).uniform(centre - spread, centre + spread, 160).astype(np.float32)
    choose = lambda bias: route(x, router, bias, preset("glm-4.6"))[0]
    exact = np.argsort(-(1 / (1 + np.exp(-logits)) + bias), -1)[:, :8]
    assert other_choice(choose(bias), exact) < 2e-3
    wrong = choose(bias.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert least < other_choice(wrong, exact) < most


def test_score_recovered_from_the_biased_one():
    config, b = plain_router(k=4), np.float32(35)
    recover = lambda ids, scores: np.take_along_axis((scores.astype(np.float32) + b) - b, ids, -1)
    # at 35 an fp32 number has steps of 4e-6
    scores = np.linspace(5e-6, 4e-5, 8)[None].repeat(3, 0)
    want = scores[:, -4:] / scores[:, -4:].sum(-1, keepdims=True)
    ids, share = routed(scores, np.full(8, b), config)
    assert (ids == [4, 5, 6, 7]).all()
    np.testing.assert_allclose(share, want, rtol=1e-4)
    wrong = recover(ids, scores)
    assert not np.allclose(wrong / wrong.sum(-1, keepdims=True), want, rtol=0.02)
    # and a score below that is lost: 0 / 0
    scores = np.full((3, 8), 1e-7)
    ids, share = routed(scores, np.full(8, b), config)
    np.testing.assert_allclose(share, 0.25, rtol=1e-4)
    assert (recover(ids, scores) == 0).all()


def test_group_mask_of_zero(monkeypatch):
    scores = np.random.default_rng(0).uniform(0.05, 0.95, (64, 16))
    config = plain_router(16, 4, n_group=4, topk_group=2)
    choice = scores - 2
    best = np.sort(choice.reshape(64, 4, 4), -1)[..., -2:].sum(-1)
    kept = np.repeat(best >= np.sort(best, -1)[:, -2:-1], 4, -1)
    want = np.argsort(-np.where(kept, choice, -np.inf), -1)[:, :4]
    choose = lambda: routed(scores, np.full(16, -2.0), config)[0]
    assert other_choice(choose(), want) == 0
    right = jnp.where
    monkeypatch.setattr(jnp, "where", lambda c, a, b: right(c, a, 0.0 if np.ndim(b) == 0 and b == -np.inf else b))
    assert other_choice(choose(), want) == 1


def test_renormalisation_clamped(monkeypatch):
    scores = np.full((2, 8), 1e-7)
    share = lambda: routed(scores, np.zeros(8), plain_router(k=8))[1]
    np.testing.assert_allclose(share(), 0.125, rtol=1e-3)
    right = model_module.route

    def clamped(x, router, bias, config):
        ids, s = right(x, router, bias, dataclasses.replace(config, norm_topk_prob=False))
        return ids, s / jnp.maximum(s.sum(-1, keepdims=True), 6.1e-5)

    monkeypatch.setattr(model_module, "route", clamped)
    np.testing.assert_allclose(share(), 0.0016, rtol=0.05)


@pytest.mark.slow
def test_order_of_the_chosen_experts():
    # equal scores at the border: which of them is taken is not fixed, that the others are taken is
    scores = np.array([[0.9, 0.5, 0.5, 0.8, 0.5, 0.1, 0.1, 0.1]])
    ids, share = routed(scores, np.zeros(8), plain_router(k=4))
    assert {0, 3} < set(ids[0]) <= {0, 1, 2, 3, 4} and share.sum() == pytest.approx(1)
    assert list(ids[0]) != [0, 3, 1, 2]  # as torch would list them: a comparison by place fails
    # tokens are combined by expert id: the order in which the experts are listed does not matter
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 16), np.float32)
    gate_up, down = (rng.standard_normal(shape, np.float32) / 4 for shape in ((1, 8, 2, 12, 16), (1, 8, 16, 12)))
    ids = np.stack([rng.permutation(8)[:4] for _ in range(5)])
    share = rng.uniform(0.1, 1, (5, 4)).astype(np.float32)
    want = experts(x, ids, share, gate_up, down)
    assert far(experts(x, ids[:, ::-1], share[:, ::-1], gate_up, down), want) < 1e-6
    assert far(experts(x, ids[:, ::-1], share, gate_up, down), want) > 0.1


@pytest.mark.slow
def test_shared_expert_fused():
    """One more expert, chosen by every token with weight one, is the same as a separate shared expert, but only if the
    renormalisation and the scaling do not see it."""
    rng, config = np.random.default_rng(0), tiny(hidden_size=16, n_routed_experts=8, num_experts_per_tok=3)
    x = rng.standard_normal((6, 16), np.float32)
    router = rng.standard_normal((8, 16), np.float32) / 4
    gate_up, down = (rng.standard_normal(shape, np.float32) / 4 for shape in ((1, 9, 2, 12, 16), (1, 9, 16, 12)))
    ids, share = route(x, router, np.zeros(8, np.float32), config)
    separate = experts(x, ids, share, gate_up[:, :8], down[:, :8])
    separate = separate + experts(x, np.full((6, 1), 8), np.ones((6, 1), np.float32), gate_up, down)
    fused_ids, one = np.concatenate([ids, np.full((6, 1), 8)], 1), np.ones((6, 1), np.float32)
    fused = lambda share: experts(x, fused_ids, share.astype(np.float32), gate_up, down)
    assert far(fused(np.concatenate([share, one], 1)), separate) < 1e-6
    scores = share / config.routed_scaling_factor
    counted = np.concatenate([scores, one], 1) / (scores.sum(-1, keepdims=True) + 1)
    assert far(fused(counted * config.routed_scaling_factor), separate) > 0.1
    assert far(fused(np.concatenate([share, one * config.routed_scaling_factor], 1)), separate) > 0.1


@pytest.mark.slow
def test_experts_are_summed_in_float32():
    """In whatever order a token's experts are listed, their sum is the same to fp32 rounding. In bf16 it is not."""
    rng = np.random.default_rng(0)
    bf16 = lambda *shape: (rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5).astype(ml_dtypes.bfloat16)
    x, gate_up, down = bf16(16, 48), bf16(1, 16, 2, 32, 48), bf16(1, 16, 48, 32)
    ids = np.stack([rng.permutation(16)[:8] for _ in range(16)])
    share = rng.uniform(0.1, 1, (16, 8)).astype(np.float32)
    summed = experts(x, ids, share, gate_up, down)
    assert summed.dtype == np.float32
    assert far(experts(x, ids[:, ::-1], share[:, ::-1], gate_up, down), summed) < 1e-6
    each = [experts(x, ids, share * (np.arange(8) == j), gate_up, down) for j in range(8)]
    assert far(sum(each), summed) < 1e-6
    in_bf16 = lambda parts: sum((y.astype(ml_dtypes.bfloat16) for y in parts), np.zeros((), ml_dtypes.bfloat16))
    assert far(in_bf16(each), summed) > 0.01 and far(in_bf16(each[::-1]), in_bf16(each)) > 0.01


# ----------------------------------------------------------------------------------------------- the widths of Air


@pytest.mark.slow
def test_odd_widths_in_the_kernel():
    """1408 is 11 * 128. A kernel in blocks of 512, as sglang-jax has, would leave out the last 384."""
    air, rng = preset("glm-4.5-air"), np.random.default_rng(0)
    assert air.moe_intermediate_size == 1408 and air.intermediate_size == 10944
    normal = lambda *shape: rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
    x, gate_up, down = normal(9, 16), normal(1, 3, 2, 1408, 16), normal(1, 3, 16, 1408)
    ids, share = rng.integers(0, 3, (9, 1)), np.ones((9, 1), np.float32)
    gate, up = np.einsum("td,tcfd->ctf", x.astype(np.float64), gate_up[0][ids[:, 0]])
    want = np.einsum("tf,tdf->td", gate / (1 + np.exp(-gate)) * up, down[0][ids[:, 0]])
    assert far(experts(x, ids, share, gate_up, down), want) < CLOSE
    assert far(experts(x, ids, share, gate_up[..., :1024, :], down[..., :1024]), want) > 0.5


@pytest.mark.slow
def test_odd_widths_over_eight_devices():
    """1368 columns of 10944 a device, which is no multiple of 128 either."""
    glm = GLM(preset("glm-4.5-air"), "tensor=8", seed=None)
    held = lambda weight: weight.get_value().sharding.shard_shape(weight.get_value().shape)
    assert held(glm.dense.mlp.gate_up) == (1, 2, 1368, 4096) and held(glm.dense.mlp.down) == (1, 4096, 1368)
    assert held(glm.moe.mlp.gate_up)[-2] == held(glm.moe.mlp.down)[-1] == 176
    wide = abstract("tensor=128")  # 10944 is 85.5 * 128
    with pytest.raises(
        UsageError, match="intermediate_size 10,944 does not divide over tensor=128, the next that do are 114 or 144"
    ):
        GLM(preset("glm-4.5-air"), wide, Rules(heads=None, vocab=None), seed=None)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "hidden_size": 32}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    config = tiny(**heads, **experts, intermediate_size=10944, moe_intermediate_size=1408)
    one = GLM(config)
    want = golden.look(one, IDS).logits
    assert far(golden.look(GLM(config, "tensor=8"), IDS).logits, want) < CLOSE
    down = np.array(one.dense.mlp.down[...]).reshape(1, 32, 8, 1368)
    down[..., 1280:] = 0  # whole blocks of 128 alone
    one.dense.mlp.down[...] = jnp.asarray(down.reshape(1, 32, 10944))
    assert far(golden.look(one, IDS).logits, want) > 0.1


# ------------------------------------------------------------------------------------------------------ norm, RoPE


def norm(x, scale, eps):
    return np.asarray(rms_norm(jnp.asarray(x), jnp.asarray(scale), eps))


def exact_rms(x, scale, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.asarray(scale, np.float64)


def test_eps_of_1e6(model):
    x = np.random.default_rng(0).standard_normal((64, 5120), np.float32) * 0.02
    scale, eps = np.ones(5120, np.float32), preset("glm-4.6").rms_norm_eps
    want = exact_rms(x, scale, 1e-5)
    assert far(norm(x, scale, eps), want) < 1e-5
    ratio = norm(x, scale, 1e-6) / want
    assert np.median(ratio) - 1 == pytest.approx(0.011, rel=0.1)
    # the tiny model's states are larger, it moves six times the tolerance
    model.config = dataclasses.replace(model.config, rms_norm_eps=1e-6)
    assert 3 * CLOSE < far(golden.look(model, IDS).logits[0], golden.GOLDEN[BIG]["logits"]) < 2e-4


def test_norm_weight_multiplied_in_fp32():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 5120), np.float32).astype(ml_dtypes.bfloat16)
    scale = (1 + 0.3 * rng.standard_normal(5120, np.float32)).astype(ml_dtypes.bfloat16)
    normed = exact_rms(x, 1, 1e-5)
    want = normed.astype(np.float32).astype(ml_dtypes.bfloat16) * scale  # both bf16: rounded twice
    other = lambda y: (y != want).mean()
    assert norm(x, scale, 1e-5).dtype == jnp.bfloat16
    assert other(norm(x, scale, 1e-5)) < 1e-3  # a sum in another order may round differently
    wrong = (normed * scale.astype(np.float64)).astype(np.float32).astype(ml_dtypes.bfloat16)
    assert other(wrong) == pytest.approx(0.26, abs=0.05)


def test_rope_in_another_precision():
    stored = json.loads((golden.DATA / "golden_rope.json").read_text())
    positions, want = np.array(stored["positions"]), np.array(stored["cos"])
    worst = lambda cos, at: np.abs(np.asarray(cos).reshape(len(positions), -1) - want)[at].max()
    ours = rope_angles(positions[None].astype(np.int32), preset("glm-4.6"))[0]
    exact = np.cos(positions[:, None] * 1e6 ** (-np.arange(0, 64, 2) / 64))
    for at, moved in ((2, 1e-3), (3, 5.9e-3)):  # positions 131,071 and 202,751
        assert worst(ours, at) < 2e-7
        assert worst(exact, at) == pytest.approx(moved, rel=0.5)
    rounded = positions.astype(ml_dtypes.bfloat16).astype(np.int32)
    assert rounded[2] == 131072
    assert worst(rope_angles(rounded[None], preset("glm-4.6"))[0], 2) > 0.1


# ------------------------------------------------------------------------------------------------------------- MTP


def test_mtp_mistakes(model):
    want, seen = golden.GOLDEN[BIG]["mtp_logits"], golden.look(model, IDS)
    assert far(golden.mtp(model, IDS, seen.final)[0], want) < CLOSE
    before_the_norm = seen.layers[-1]
    assert far(golden.mtp(model, IDS, before_the_norm)[0], want) == pytest.approx(0.8, rel=0.1)
    w = model.mtp.eh_proj[...]
    model.mtp.eh_proj[...] = jnp.concatenate([w[:, 40:], w[:, :40]], 1)  # as if the state came first
    assert far(golden.mtp(model, IDS, seen.final)[0], want) == pytest.approx(5.1, rel=0.05)


def test_mtp_recursion_feeds_the_normed_state(model, monkeypatch):
    """The second draft step takes what the first gives out, after shared_head.norm."""
    config, seen = golden.GOLDEN[BIG]["config"], golden.look(model, IDS)
    _, first = reference.mtp(IDS[0], seen.final[0], config)
    want, _ = reference.mtp(IDS[0][1:], first, config, pos0=2)

    right, inputs = model_module.rms_norm, []

    def keeping(x, scale, eps):
        inputs.append(x)
        return right(x, scale, eps)

    monkeypatch.setattr(model_module, "rms_norm", keeping)

    def run(model, ids, hidden):
        state = model.mtp_hidden(ids, hidden)[0]
        before = inputs[-1]  # the last norm is shared_head.norm
        return tuple(model.logits(model.mtp_hidden(ids[:, 1:], h[:, :-1])[0])[:, :-1] for h in (state, before))

    graph, weights = nnx.split(model)
    traced = jax.jit(model_module.in_mesh(run), static_argnums=0)
    good, bad = traced(graph, weights, np.array(IDS, np.int32), seen.final)
    assert far(good[0], want) < CLOSE
    assert far(bad[0], want) > 0.1


@pytest.mark.slow
def test_mtp_layer_has_its_own_experts(model, monkeypatch):
    # a main model of dense layers alone still has experts in its MTP layer
    build = lambda: GLM(tiny(first_k_dense_replace=4), seed=None)
    assert isinstance(build().mtp.layer.mlp, model_module.MoE)
    right = model_module.Layer
    wrong = lambda config, weight, L, moe: right(config, weight, L, moe=config.first_k_dense_replace <= 0)
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "Layer", wrong)
        assert not isinstance(build().mtp.layer.mlp, model_module.MoE)
    # with the weights of a main layer the MTP logits are wrong
    seen = golden.look(model, IDS)
    last = jax.tree.map(lambda w: w[-1:], nnx.state(model.moe))
    nnx.update(model.mtp.layer, last)
    assert far(golden.mtp(model, IDS, seen.final)[0], golden.GOLDEN[BIG]["mtp_logits"]) > 1


# --------------------------------------------------------------------------------------------------------- loading


def stored_faults(folder):
    """What is wrong with the dtypes of a bf16 folder."""
    bias = lambda name: name.endswith("e_score_correction_bias")
    return [t.name for t in read_folder(folder).values() if t.dtype != ("F32" if bias(t.name) else "BF16")]


def test_router_bias_stays_float32(model, tmp_path):
    spread = np.random.default_rng(0).uniform(9.96, 10.04, (3, 8)).astype(np.float32)
    model.moe.mlp.bias[...] = jnp.asarray(spread)
    save(model, tmp_path / "fp32")
    cast, _ = load(tmp_path / "fp32", mesh="data=1", rules=golden.RULES, dtype="bfloat16")
    assert cast.moe.mlp.router[...].dtype == jnp.bfloat16
    assert cast.moe.mlp.bias[...].dtype == cast.mtp.layer.mlp.bias[...].dtype == jnp.float32
    assert np.array_equal(cast.moe.mlp.bias[...], spread)
    save(cast, tmp_path / "bf16")
    assert stored_faults(tmp_path / "bf16") == []
    again, _ = load(tmp_path / "bf16", mesh="data=1", rules=golden.RULES)
    assert np.array_equal(again.moe.mlp.bias[...], spread)
    # a cast of the whole tree
    nnx.update(again, jax.tree.map(lambda w: w.astype(jnp.bfloat16), nnx.state(again)))
    save(again, tmp_path / "wrong")
    assert len(stored_faults(tmp_path / "wrong")) == 4
    with pytest.warns(UserWarning, match="router biases are stored in BF16"):
        wrong, _ = load(tmp_path / "wrong", mesh="data=1", rules=golden.RULES)
    assert not np.array_equal(wrong.moe.mlp.bias[...], spread)


def test_layer_prefix(tmp_path, monkeypatch):
    """Ten layers of 92: none of the tensors of 10 to 92."""
    narrow = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 8, "n_routed_experts": 2}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "num_experts_per_tok": 1}
    save(GLM(tiny(num_hidden_layers=92, **narrow, **heads), mesh="data=1"), tmp_path / "all")
    everything, read = read_folder(tmp_path / "all"), []
    right = Tensor.read
    monkeypatch.setattr(Tensor, "read", lambda self, *rows: read.append(self.name) or right(self, *rows))
    load(tmp_path / "all", mesh="data=1", layers=10)
    layers = lambda names: {int(name.split(".")[2]) for name in names if "layers" in name}
    assert layers(everything) == set(range(93)) and layers(read) == set(range(10))
    by_prefix = [name for name in everything for i in range(10) if name.startswith(f"model.layers.{i}")]
    assert layers(by_prefix) == set(range(93))


@pytest.mark.parametrize("mtp_file, copies", [(True, False), (True, True), (False, True)])
def test_mtp_file_is_found(tmp_path, monkeypatch, mtp_file, copies):
    folder, want = golden.save(BIG, tmp_path / "it", mtp_file, copies), golden.GOLDEN[BIG]["mtp_logits"]
    good = golden.one_device(folder)
    if (mtp_file, copies) == (True, False):
        assert far(golden.mtp(good, IDS, golden.look(good, IDS).final)[0], want) < CLOSE
    else:  # the same weights as those
        plain = golden.one_device(golden.save(BIG, tmp_path / "plain"))
        assert good.mtp is not None and jax.tree.structure(good) == jax.tree.structure(plain)
        for ours, theirs in zip(jax.tree.leaves(good), jax.tree.leaves(plain), strict=True):
            assert np.array_equal(ours, theirs)
    if mtp_file:  # a loader that looks for model*.safetensors
        right = loading.read_folder
        shards = lambda folder, *args: {n: t for n, t in right(folder, *args).items() if t.file.match("model*")}
        monkeypatch.setattr(loading, "read_folder", shards)
        with pytest.warns(UserWarning, match="without the MTP layer"):
            assert golden.one_device(folder).mtp is None


def test_mtp_layer_absent(model, tmp_path, monkeypatch):
    """A converter dropped the MTP layer and left the config alone: one warning. Half of it gone is an error."""
    promise = model.config
    model.mtp, model.config = None, dataclasses.replace(promise, num_nextn_predict_layers=0)
    save(model, tmp_path / "dropped")
    (tmp_path / "dropped" / "config.json").write_text(json.dumps(promise.to_dict()))
    with pytest.warns(UserWarning, match="num_nextn_predict_layers 1.*without the MTP layer") as caught:
        loaded = golden.one_device(tmp_path / "dropped")
    assert len(caught) == 1 and loaded.mtp is None
    assert far(golden.look(loaded, IDS).logits[0], golden.GOLDEN[BIG]["logits"]) < CLOSE
    with monkeypatch.context() as patch:  # a loader that takes the config's word
        patch.setattr(loading.table, "without_missing_mtp", lambda config, *rest: config)
        with pytest.raises(BadInput, match="missing"):
            golden.one_device(tmp_path / "dropped")
    folder = golden.save(BIG, tmp_path)
    right = loading.read_folder
    half = lambda folder, *args: {n: t for n, t in right(folder, *args).items() if "layers.4.self_attn" not in n}
    monkeypatch.setattr(loading, "read_folder", half)
    with pytest.raises(BadInput, match="model.layers.4.self_attn"):
        golden.one_device(folder)


def test_fp8_is_refused(tmp_path, monkeypatch):
    folder, want = golden.save(BIG, tmp_path), golden.GOLDEN[BIG]["logits"]
    stored = read_folder(folder)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors = {other: t.read() for other, t in stored.items() if t.file == stored[name].file}
    scale = np.abs(tensors[name]).max(1, keepdims=True) / 448
    stored[name].file.unlink()
    write(stored[name].file, tensors | {name: (tensors[name] / scale).astype(ml_dtypes.float8_e4m3fn)})
    with pytest.raises(BadInput, match=f"{name} is F8_E4M3, not BF16 or F32"):
        golden.one_device(folder)
    with monkeypatch.context() as patch:  # a loader that takes numbers of any kind, and knows of no scales
        patch.setattr(loading.table, "check", lambda *args: None)
        assert far(golden.look(golden.one_device(folder), IDS).logits[0], want) > 1
    said = golden.config_json(BIG) | {"quantization_config": {"quant_method": "compressed-tensors"}}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(BadInput, match=r"quantised \(compressed-tensors\)"):
        golden.one_device(folder)


def test_float16_is_refused(folder):
    """Activations of these models come near fp16's limit, and gradients pass it."""
    written = golden.config_json(BIG)
    with pytest.raises(BadInput, match="'float16', not one of bfloat16, float32"):
        Config.read(written | {"torch_dtype": "float16"})
    assert Config.read(written | {"torch_dtype": "bfloat16"}).dtype == preset("glm-4.6").dtype == jnp.bfloat16
    with pytest.raises(UsageError, match="--dtype float16: weights are loaded in bfloat16 or float32"):
        load(folder, mesh="data=1", rules=golden.RULES, dtype="float16")


@pytest.mark.parametrize("name", PRESETS)
def test_both_config_styles(name):
    both = preset(name).to_dict()
    rope = ("rope_theta", "partial_rotary_factor")
    v5 = {key: value for key, value in both.items() if key not in rope}
    v4 = {key: value for key, value in both.items() if key != "rope_parameters"}
    v4["torch_dtype"] = v4.pop("dtype")
    assert v5["rope_parameters"]["rope_theta"] == v4["rope_theta"] == 1e6
    assert Config.read(v4) == Config.read(v5) == preset(name)
    # a reader of the old style alone, with a default as transformers had it
    old = {key: v5.get(key, default) for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 0.5))}
    old_style = {key: value for key, value in v5.items() if key != "rope_parameters"}
    assert Config.read(old_style | old) != preset(name)
    for absent in ("rope_theta", "partial_rotary_factor"):  # and we have no default
        with pytest.raises(BadInput, match=absent):
            Config.read({key: value for key, value in v4.items() if key != absent})
    with pytest.raises(BadInput, match="dtype"):
        Config.read({key: value for key, value in v4.items() if key != "torch_dtype"})


# ------------------------------------------------------------------------------------------------------------ text


@pytest.mark.slow
def test_every_stop_id_stops(folder, tmp_path):
    """Three prompts, each answered with another of three stop ids."""
    prompts = [[5, 17, 96], [3, 41, 88, 0, 23], [64]]
    texts = generate_ids(golden.one_device(folder), prompts, max_tokens=12, stop_ids=())
    others = lambda text: {token for other in texts if other is not text for token in other}
    stop_ids = [next(token for token in text[4:-1] if token not in others(text)) for text in texts]
    want = [text[: text.index(stop) + 1] for text, stop in zip(texts, stop_ids, strict=True)]
    for file in folder.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids}))
    model = golden.one_device(tmp_path)
    assert generate_ids(model, prompts, max_tokens=12) == want
    for known in stop_ids:  # a reader that takes one id of the list
        wrong = generate_ids(model, prompts, max_tokens=12, stop_ids=[known])
        assert [row == right for row, right in zip(wrong, want, strict=True)] == [known == stop for stop in stop_ids]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.read(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_prompt_prefix_once(tmp_path, monkeypatch):
    """The template writes [gMASK]<sop>. This tokenizer would add them too, as that of ChatGLM does."""
    file = write_tokenizer(tmp_path) / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    prefix = [(token, backend.token_to_id(token)) for token in ("[gMASK]", "<sop>")]
    backend.post_processor = tokenizers.processors.TemplateProcessing("[gMASK] <sop> $A", special_tokens=prefix)
    backend.save(str(file))
    ours, first = Tokenizer.read(tmp_path), [id for _, id in prefix]
    chat = lambda: ours.chat([{"role": "user", "content": "hello"}])
    ids = chat()
    assert ids[:2] == first and not {*first} & {*ids[2:]}
    assert not {*first} & {*ours.encode("hello")}
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: self.tokenizer.encode(text))
    assert chat() == first + ids


# What an edit of a template may lose: a part of its text, and what stands there afterwards.
DRIFTS = {
    "glm-4.6": [
        ('"[gMASK]<sop>"', '"[gMASK]<sop>\\n"'),
        (r"<|user|>\n", "<|user|>"),
        ('{{- "/nothink" -}}', ""),
        (' and not text.endswith("/nothink")', ""),
        ("thought.strip() if loop.index0 > asked.at else", "thought.strip() if true else"),
        (r'"\n" ~ answer.strip()', r'"\n" ~ answer'),
        ("ensure_ascii=False", "ensure_ascii=True"),
        ('loop.previtem.role != "tool"', "true"),
        (r"<|assistant|>\n<think></think>", "<|assistant|>"),
    ],
    "glm-4.7": [
        ('"[gMASK]<sop>"', '""'),
        ('"<|" ~ message.role ~ "|>"', r'"<|" ~ message.role ~ "|>\n"'),
        ("keep_thoughts or ", ""),
        ("loop.index0 > asked.at", "true"),
        ('"</think>" ~ answer.strip()', '"</think>" ~ answer'),
        ("ensure_ascii=False", "ensure_ascii=True"),
        ('loop.previtem.role != "tool"', "true"),
        ("<|assistant|><think>", "<|assistant|>"),
        ("<|assistant|></think>", "<|assistant|><think></think>"),
    ],
}


@pytest.mark.parametrize("version, template", [("4.5", "glm-4.6"), ("4.6", "glm-4.6"), ("4.7", "glm-4.7")])
def test_template_drift(tokenizer, monkeypatch, version, template):
    vectors = json.loads((golden.DATA / "chat_template_vectors.json").read_text(encoding="utf-8"))
    text = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")

    def differ(template):
        monkeypatch.setattr(tokenizer.tokenizer, "chat_template", template)
        return [v["name"] for v in vectors if tokenizer.render(**v["inputs"]) != v["rendered"][version]]

    assert differ(text) == []
    for part, drifted in DRIFTS[template]:
        assert part in text and differ(text.replace(part, drifted)), part


def test_cleared_thoughts_end_the_common_prefix(tmp_path):
    """A cache of the first turn and its answer serves the second turn whole, or, with thoughts cleared as GLM-4.7's
    template does unless told otherwise, up to the first answer."""
    ours = Tokenizer.read(write_tokenizer(tmp_path, "glm-4.7"))
    question = [{"role": "user", "content": "hello"}]
    first = ours.chat(question)
    cached = np.array(first + ours.encode("easy</think>hi"))
    turns = [*question, {"role": "assistant", "reasoning_content": "easy", "content": "hi"}, *question]
    hits = lambda **options: np.argmin(np.append(cached == ours.chat(turns, **options)[: len(cached)], False))
    assert hits(clear_thinking=False) == len(cached)
    assert hits() == hits(clear_thinking=True) == len(first) - 1  # the opened thought is the first to differ


@pytest.mark.slow
def test_padding_ids_are_never_sampled(tokenizer, tmp_path):
    glm, size = GLM(tiny(vocab_size=384), mesh="data=1"), tokenizer.size
    assert size < 384
    head = np.array(glm.head[...])
    head[size:] = 3 * head[: 384 - size]  # so that padding often has the highest logit
    glm.head[...] = jnp.asarray(head)
    save(glm, tmp_path / "plain")
    save(glm, tmp_path / "with")
    write_tokenizer(tmp_path / "with")
    prompts = [[1, 2, 3], [7], [300, 5]]

    def largest(model):
        return [max(map(max, generate_ids(model, prompts, max_tokens=20, temperature=t))) for t in (0.0, 1.0)]

    masked, _ = load(tmp_path / "with", mesh="data=1")
    assert max(largest(masked)) < size
    masked.token_limit = 384
    assert min(largest(masked)) >= size
    assert min(largest(load(tmp_path / "plain", mesh="data=1")[0])) >= size  # nothing says which ids are real


def test_tags_survive_decoding(tokenizer):
    answer = "<think>so</think>well<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
    ids = tokenizer.encode(f"[gMASK]<sop><|user|>{answer}<|observation|>")
    assert tokenizer.decode(ids) == answer
    stream = tokenizer.stream()
    assert "".join(map(stream.add, ids)) + stream.finish() == answer
    inner = tokenizer.tokenizer
    assert "<|user|>" in inner.decode(ids, skip_special_tokens=False)
    added = set(inner.added_tokens_decoder)  # special or not: all of them hidden
    assert "<think>" not in inner.decode([id for id in ids if id not in added])
