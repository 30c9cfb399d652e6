"""The demo checkpoint that ships: what is in it, that it learned, and the code that made it."""

import io
import json
import math
import re
import tokenize

import jax
import numpy as np
import pytest

from glm_jax.config import Config
from glm_jax.convert.safetensors import read_folder
from glm_jax.demo import batches, bpe, corpus, train
from glm_jax.generation import generate, generate_ids, stream_generate
from glm_jax.loading import DEMO, load
from glm_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def demo():
    missing = [name for name in (*train.SHIPPED, "train.jsonl", "README.md") if not (DEMO / name).is_file()]
    assert not missing, f"the demo checkpoint is not whole, {missing} missing: python -m glm_jax.demo.train makes it"
    model, tokenizer = load(DEMO, mesh="data=1", dtype="float32")
    assert tokenizer is not None
    return model, tokenizer


@pytest.fixture(scope="module")
def log() -> list[dict]:
    return [json.loads(line) for line in (DEMO / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def library() -> list[corpus.Source]:
    return [s for s in corpus.sources() if not s.test]


# ---- the checkpoint


def test_it_is_small_and_has_every_part(demo):
    model, tokenizer = demo
    files = [p for p in DEMO.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 10_000_000
    config = Config.read(DEMO)
    assert config.dense_layers >= 1 and config.moe_layers >= 2 and config.num_nextn_predict_layers == 1
    assert config.use_qk_norm and config.attention_bias and config.rotary_dim == config.head_dim // 2
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    assert config.dtype.name == "bfloat16" and config.n_shared_experts == 1 and not config.tie_word_embeddings
    assert tokenizer.size == bpe.SIZE < config.vocab_size  # padding rows
    assert json.loads((DEMO / "config.json").read_text()) == train.CONFIG


def test_router_biases_moved_and_are_float32(demo):
    biases = {n: t for n, t in read_folder(DEMO).items() if n.endswith("e_score_correction_bias")}
    assert len(biases) == demo[0].config.moe_layers + 1  # the MTP layer's too
    for name, tensor in biases.items():
        values = tensor.read()
        assert tensor.dtype == "F32" and np.count_nonzero(values) == len(values) and values.std() > 1e-3, name


def test_training_learned_and_balanced(log):
    first, last = log[0], log[-1]
    assert [line["step"] for line in log] == sorted({line["step"] for line in log})
    assert last["held_out_loss"] < 0.6 * first["loss"] and last["held_out_mtp_loss"] < 0.8 * first["mtp_loss"]
    assert last["load_max_over_mean"] < 2 < max(line["load_max_over_mean"] for line in log)


@pytest.mark.slow
def test_held_out_loss_is_the_logged_one(demo, library, log):
    model, tokenizer = demo
    ids = [tokenizer.encode(s.text) for s in library if s.held_out]
    windows = np.concatenate([batches.windows(np.asarray(row), train.SHORT, 2) for row in ids])[:40]
    found = train.held_out(model, windows)
    share = np.bincount(windows.reshape(-1)) / windows.size
    unigram = -sum(p * math.log(p) for p in share if p)
    logged = [line for line in log if "held_out_loss" in line][-1]
    assert abs(found["loss"] - logged["held_out_loss"]) < 0.35, found  # other windows, and perhaps another Python
    assert abs(found["mtp_loss"] - logged["held_out_mtp_loss"]) < 0.35, found
    assert found["loss"] < 0.7 * unigram and found["mtp_loss"] < unigram


def test_it_writes_python(demo):
    model, tokenizer = demo
    text = "def " + generate(model, tokenizer, "def ", raw=True, max_tokens=150, temperature=0.7, top_p=0.95)
    assert re.match(r"def \w+\(.*\):\n +\S", text), text
    readable = 0
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        try:
            list(tokenize.generate_tokens(io.StringIO(line).readline))
            readable += 1
        except (tokenize.TokenError, SyntaxError):
            pass  # a docstring or a bracket that goes on
    assert readable >= 0.6 * len(lines) >= 3, text


@pytest.mark.slow
def test_it_chats(demo):
    model, tokenizer = demo
    *_, last = stream_generate(model, tokenizer, [{"role": "user", "content": "Who are you?"}], max_tokens=100)
    assert last.finish_reason == "stop" and last.token == train.USER
    messages = [{"role": "user", "content": "Write a Python function `add(a, b)`. Return the sum of a and b."}]
    text = generate(model, tokenizer, messages, max_tokens=40, enable_thinking=False)
    assert text.lstrip().startswith("```python\ndef "), text


@pytest.mark.slow
def test_it_never_writes_a_padding_id(demo):
    rows = generate_ids(demo[0], [[1, 2, 3]] * 4, max_tokens=64, temperature=100.0, seed=[0, 1, 2, 3], stop_ids=())
    assert max(max(row) for row in rows) < bpe.SIZE


def test_tokenizer_is_glms(demo):
    tokenizer = demo[1]
    first = bpe.SIZE - len(bpe.SPECIAL)
    assert [tokenizer.encode(token) for token in bpe.SPECIAL] == [[first + i] for i in range(36)]
    assert demo[0].config.eos_token_id == tokenizer.stop_ids == (train.END, train.USER, train.OBSERVATION)
    assert tokenizer.decode(range(first, bpe.SIZE)) == "".join(token for token in bpe.SPECIAL if token in bpe.KEPT)
    assert tokenizer.has_chat_template and tokenizer.format == "glm-4.5" and tokenizer.continues_text
    for text in ("def f(x):\n\treturn  x\n\n", "Ünïcödé → 𝔘 \x00\x7f\r\n", "12345  1e-5", " ", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    groups = [i for digits in ("123", "456", "7") for i in tokenizer.encode(digits)]
    assert tokenizer.encode("1234567") == groups  # no token reaches over a group of three digits


@pytest.mark.oracle
def test_transformers_reads_it_with_the_same_logits(demo):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = demo
    theirs = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    text = "def read(path):\n    return open(path).read()\n"
    ids = AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"]
    assert ids == tokenizer.encode(text)
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits.numpy()
    got = np.asarray(model([ids])[0])
    assert np.abs(got - want).max() < 2e-5 * want.std()


# ---- what it was made with


def test_corpus_is_the_same_every_time(library):
    assert corpus.sources() == corpus.sources()
    held = [s for s in library if s.held_out]
    assert 0.02 < len(held) / len(library) < 0.15
    for source in library[:40]:
        assert "".join(corpus.pieces(source)) == source.text and corpus.pieces(source) == corpus.pieces(source)
        assert list(corpus.chats(source)) == list(corpus.chats(source))


def test_prompts_end_inside_the_text():
    cut = corpus.pieces(corpus.Source("a.py", "def f(x): return x\n" * 2000))
    assert any(piece.endswith("def ") for piece in cut) and len(cut) < 2000


def test_functions_become_chats():
    text = 'class A:\n    def f(self, x=1):\n        """Return x twice.\n\n        More."""\n        return 2 * x\n'
    source = corpus.Source("pkg/mod/__init__.py", text)
    (function,) = corpus.functions(source)
    assert (function.full, function.call, function.summary) == ("pkg.mod.A.f", "f(self, x=1)", "Return x twice.")
    assert function.code == "def f(self, x=1):\n    return 2 * x"
    assert function.source.startswith('def f(self, x=1):\n    """Return x twice.')
    (chat,) = (c for c in corpus.chats(source) if "demo" not in str(c))
    assert chat.messages[-1]["content"] in ("Return x twice.", f"```python\n{function.source}\n```")


def test_chats_cover_what_the_template_can(library):
    found = [c for s in library[:200] for c in corpus.chats(s)]
    roles = {m["role"] for c in found for m in c.messages}
    assert roles == {"system", "user", "assistant", "tool"}
    assert {c.enable_thinking for c in found} == {True, False} and any(c.tools for c in found)
    assert any("reasoning_content" in m for c in found for m in c.messages)


def test_new_tokenizer_has_the_published_form(tmp_path):
    bpe.write(bpe.train(["def f(self):\n    return self\n" + "".join(map(chr, range(32, 2000)))] * 9), tmp_path, 4096)
    tokenizer = Tokenizer.read(tmp_path)
    assert tokenizer is not None and tokenizer.encode("<|user|>/nothink") == tokenizer.encode("<|user|>") + [
        tokenizer.tokenizer.convert_tokens_to_ids("/nothink")
    ]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizer" and len(config["added_tokens_decoder"]) == 36
    assert config["additional_special_tokens"] == [t for t in bpe.SPECIAL if t not in bpe.KEPT]


def tokens() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    text = lambda n: (draw.zipf(1.3, n) % 500).astype(np.uint16)
    parts = {n: text(9000) for n in ("library", "tests", "chat", "held_out", "held_out_chat")}
    return parts | {f"{part}_starts": np.arange(0, 9000, 300) for part in batches.MIX}


def test_batches_follow_from_the_step():
    data = tokens()
    assert np.array_equal(batches.batch(data, 7, 256), batches.batch(data, 7, 256))
    assert not np.array_equal(batches.batch(data, 7, 256), batches.batch(data, 8, 256))
    assert batches.batch(data, 7, 1024).shape == (batches.BATCH_TOKENS // 1024, 1024)
    assert np.array_equal(batches.windows(np.arange(10), 4), [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_learning_rate_rises_holds_and_falls():
    rate = lambda step: float(train.learning_rate(step, 1000))
    assert rate(0) < rate(50) < rate(train.WARMUP) == rate(600) > rate(800) > rate(999) > 0
    assert [train.window(step, 1000) for step in (0, 899, 900)] == [train.SHORT, train.SHORT, train.LONG]
    # While the rate is constant the number of steps may still change: nothing done so far would have been different.
    assert rate(300) == float(train.learning_rate(300, 5000))


@pytest.mark.slow
def test_training_resumes_to_the_bit(tmp_path, monkeypatch):
    small = dict(hidden_size=32, num_hidden_layers=3, intermediate_size=64, moe_intermediate_size=16, vocab_size=512)
    monkeypatch.setattr(train, "CONFIG", train.CONFIG | small | {"eos_token_id": [0], "pad_token_id": 0})
    monkeypatch.setattr(batches, "BATCH_TOKENS", 1024)
    data = tokens()

    def steps(trainer: train.Trainer, number: int):
        for _ in range(number):
            trainer.train(batches.batch(data, trainer.done, 64))
        return jax.tree.leaves((trainer.weights, trainer.biases, trainer.moments))

    whole = train.Trainer(10)
    steps(whole, 2)
    whole.save(tmp_path)
    resumed = train.Trainer(10)
    resumed.resume(tmp_path)
    assert resumed.done == 2
    for a, b in zip(steps(whole, 2), steps(resumed, 2), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(np.any(np.asarray(b)) for b in jax.tree.leaves(resumed.biases))
