"""Trains the demo checkpoint on the CPU: `python -m glm_jax.demo.train --out FOLDER`.

The same command again goes on from the last state in FOLDER/work, to the bit: what a step reads follows from its
number alone. Ctrl-C or SIGTERM saves the state and writes the checkpoint as it then is; `--finish` writes it from the
last state. Model, loss and optimizer are those that a user has. The one addition: after every step the router biases
move so that busy experts are chosen less, which balances the load without a loss of its own.
"""

import argparse
import functools
import json
import math
import platform
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer as BPE

from glm_jax.config import Config
from glm_jax.convert.safetensors import read_header, write
from glm_jax.demo import batches, bpe, corpus
from glm_jax.generation import generate
from glm_jax.loading import load, save
from glm_jax.losses import loss
from glm_jax.model import GLM, weight_path
from glm_jax.tokenizer import Tokenizer

TEMPLATE = Path(__file__).parents[1] / "templates/glm-4.6.jinja"
END, USER, OBSERVATION = (bpe.SIZE - len(bpe.SPECIAL) + bpe.SPECIAL.index(token) for token in bpe.STOPS)
CONFIG = {  # in the published files' spelling
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "pad_token_id": END,
    "eos_token_id": [END, USER, OBSERVATION],
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 192,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 2048,
}

GENERATION = {
    "_from_model_config": True,
    "do_sample": True,
    "eos_token_id": [END, USER, OBSERVATION],
    "pad_token_id": END,
    "temperature": 0.7,
    "top_p": 0.95,
}

SEED = 0
EMBED_STD = 0.3
STEPS = 3200
SHORT, LONG, LONG_FROM = 256, 1024, 0.9  # tokens in a window; long ones cost twice as much, so they come at the end
PEAK, WARMUP, DECAY = 3e-3, 100, 0.35  # the learning rate falls to zero over the last 35 % of the steps
BALANCE = 2e-3  # how far a router bias moves in one step
MTP_WEIGHT = 0.3
LOG_EVERY, HELD_OUT_EVERY, SAVE_SECONDS = 50, 250, 240
SHIPPED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def learning_rate(step, steps: int):
    """Warm-up, constant, and a straight fall to zero: until the fall begins, `steps` may still be changed."""
    return PEAK * jnp.minimum(1.0, jnp.minimum((step + 1) / WARMUP, (steps - step) / (DECAY * steps)))


def window(step: int, steps: int) -> int:
    """The length of the windows that a step reads."""
    return LONG if step >= LONG_FROM * steps else SHORT


def prepare(out: Path) -> dict[str, np.ndarray]:
    """Tokenizer, chat template and tokens: made the first time, read from `out` afterwards."""
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokens.safetensors").is_file():
        seen = [s for s in corpus.sources() if not s.test and not s.held_out]
        chats = (m["content"] for s in seen for c in corpus.chats(s) for m in c.messages)
        bpe.write(bpe.train([*(s.text for s in seen), *chats]), out, CONFIG["max_position_embeddings"])
        shutil.copyfile(TEMPLATE, out / "chat_template.jinja")
        tokenizer = Tokenizer.read(out)
        assert tokenizer is not None

        def render(chat: corpus.Chat) -> str:  # the answer ends where the user's next turn would begin
            return tokenizer.render(chat.messages, chat.tools, chat.enable_thinking, False) + "<|user|>"

        tokens = batches.tokenize(BPE.from_file(str(out / "tokenizer.json")), render)
        write(work / "tokens.safetensors", tokens)
    return {name: tensor.read() for name, tensor in read_header(work / "tokens.safetensors")[0].items()}


class Trainer:
    """The state of a run (weights, router biases, optimizer) and its one compiled step."""

    def __init__(self, steps: int):
        config = Config.read(CONFIG | {"torch_dtype": "float32"})  # the master weights
        is_router_bias = lambda path, _: path[-1] == "bias"
        model = GLM(config, seed=SEED)
        self.graph, self.biases, self.weights = nnx.split(model, is_router_bias, ...)
        assert isinstance(model.mesh, jax.sharding.Mesh)
        self.mesh = model.mesh
        depth = config.num_hidden_layers
        self.weights = jax.tree_util.tree_map_with_path(lambda p, w: w * (_gain(p, depth) or 1.0), self.weights)
        is_matrix = lambda tree: jax.tree_util.tree_map_with_path(lambda p, _: _gain(p, depth) is not None, tree)
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(lambda n: learning_rate(n, steps), b2=0.98, weight_decay=0.1, mask=is_matrix),
        )
        self.moments = self.optimizer.init(self.weights)
        self.steps, self.done = steps, 0

    @functools.cached_property
    def step(self) -> Callable:
        @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
        def step(weights, biases, moments, ids, number):
            objective = lambda weights: loss(nnx.merge(self.graph, weights, biases), ids, mtp_weight=MTP_WEIGHT)
            (_, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(weights)
            update, moments = self.optimizer.update(gradient, moments, weights)
            rate = BALANCE * jnp.minimum(1.0, (self.steps - number) / (DECAY * self.steps))  # at rest at the end

            def balance(path, bias):
                load = metrics["mtp_load" if weight_path(path).startswith("mtp") else "load"]
                return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)

            biases = jax.tree_util.tree_map_with_path(balance, biases)
            return optax.apply_updates(weights, update), biases, moments, metrics

        return step

    def train(self, ids: np.ndarray) -> dict[str, jax.Array]:
        with jax.set_mesh(self.mesh):  # metrics and weights meet in the step, so both must be on the model's own mesh
            state = self.weights, self.biases, self.moments
            self.weights, self.biases, self.moments, metrics = self.step(*state, ids, np.int32(self.done))
        self.done += 1
        return metrics

    def model(self) -> GLM:
        return nnx.merge(self.graph, self.weights, self.biases)

    def save(self, work: Path) -> None:
        """Write the state, then remove the older ones."""
        path = work / f"state-{self.done:06d}.safetensors"
        leaves = jax.tree_util.tree_leaves_with_path((self.weights, self.biases, self.moments))
        path.unlink(missing_ok=True)
        write(path, {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in leaves})
        for old in work.glob("state-*.safetensors"):
            if old != path:
                old.unlink()

    def resume(self, work: Path) -> None:
        """Take the last state, if there is one."""
        states = sorted(work.glob("state-*.safetensors"))
        if states:
            tensors, _ = read_header(states[-1])
            read = lambda p, leaf: jax.device_put(tensors[jax.tree_util.keystr(p)].read(), leaf.sharding)
            tree = (self.weights, self.biases, self.moments)
            self.weights, self.biases, self.moments = jax.tree_util.tree_map_with_path(read, tree)
            self.done = int(states[-1].stem.split("-")[1])


def _gain(path, depth: int):
    """What a matrix's first value is multiplied by, None for a norm or bias."""
    last = weight_path(path).rsplit(".", 1)[-1]
    if "norm" in last or "bias" in last:
        return None
    return {"embed": EMBED_STD, "o": (2 * depth) ** -0.5, "down": (2 * depth) ** -0.5}.get(last, 1.0)


def held_out(model: GLM, windows: np.ndarray, rows: int = 8) -> dict[str, float]:
    """The loss on held-out windows, and the MTP layer's, in nats a token."""
    parts = [loss(model, windows[i : i + rows], mtp_weight=1.0, remat=False)[1] for i in range(0, len(windows), rows)]
    mean = lambda name: float(np.average([p[name] for p in parts], weights=[p["tokens"] for p in parts]))
    return {"loss": mean("loss"), "mtp_loss": mean("mtp_loss")}


def run(out: Path, steps: int) -> None:
    """Train up to `steps`, or until a signal says to stop."""
    tokens, trainer, work, log = prepare(out), Trainer(steps), out / "work", out / "train.jsonl"
    trainer.resume(work)
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    log.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= trainer.done))
    sizes = {name: len(tokens[name]) for name in (*batches.MIX, "held_out")}
    print(f"{sizes} tokens; step {trainer.done} of {steps}", flush=True)

    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    check = batches.windows(tokens["held_out"], SHORT, 64)
    seen = sum(batches.size(window(n, steps)) for n in range(trainer.done))
    recent, saved, begin, begun = [], time.monotonic(), time.monotonic(), seen
    while trainer.done < steps and not stop:
        length = window(trainer.done, steps)
        metrics = trainer.train(batches.batch(tokens, trainer.done, length))
        recent.append(jax.device_get(metrics))  # waits for the step, so that a signal is heeded after this one
        seen += batches.size(length)
        if trainer.done % LOG_EVERY == 0 or trainer.done == steps:
            loads = np.concatenate([sum(m["load"] for m in recent), sum(m["mtp_load"] for m in recent)])
            line: dict[str, Any] = {
                "step": trainer.done,
                "tokens": seen,
                "loss": round(float(np.mean([m["loss"] for m in recent])), 4),
                "mtp_loss": round(float(np.mean([m["mtp_loss"] for m in recent])), 4),
                "load_max_over_mean": round(float((loads.max(-1) / loads.mean(-1)).max()), 3),
                "learning_rate": round(float(learning_rate(trainer.done - 1, steps)), 6),
                "tokens_per_s": round((seen - begun) / (time.monotonic() - begin)),
            }
            if trainer.done % HELD_OUT_EVERY == 0 or trainer.done == steps:
                line |= {f"held_out_{k}": round(v, 4) for k, v in held_out(trainer.model(), check).items()}
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            recent, begin, begun = [], time.monotonic(), seen
        if time.monotonic() - saved > SAVE_SECONDS:
            trainer.save(work)
            saved = time.monotonic()
    trainer.save(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    finish(out, trainer, tokens)


def finish(out: Path, trainer: Trainer, tokens: dict[str, np.ndarray]) -> None:
    """Write the checkpoint in the published layout and dtypes, and its card."""
    export = out / "work/export"
    shutil.rmtree(export, ignore_errors=True)
    model = GLM(Config.read(CONFIG), seed=None)
    cast = lambda small, whole: whole.astype(small.dtype)
    nnx.update(model, jax.tree.map(cast, nnx.state(model), nnx.state(trainer.model())))
    save(model, export, Tokenizer.read(out))
    for name, value in {"config.json": CONFIG, "generation_config.json": GENERATION}.items():
        (export / name).write_text(json.dumps(value, indent=2) + "\n")
    for name in SHIPPED:
        if not (out / name).exists() or not (out / name).samefile(export / name):
            shutil.copyfile(export / name, out / name)
    (out / "README.md").write_text(card(out, trainer, tokens))
    print((out / "README.md").read_text())


PROMPTS = ("def ", "import ", "class Stack:\n", 'def read_lines(path):\n    """Return ')
QUESTIONS = (
    "Who are you?",
    "What does `os.path.join` do?",
    "Write a Python function `add(a, b)`. Return the sum of a and b.",
)


def card(out: Path, trainer: Trainer, tokens: dict[str, np.ndarray]) -> str:
    """The model card: every number in it is measured here, on the written checkpoint, or read from the log."""
    model, tokenizer = load(out, dtype="float32")
    assert tokenizer is not None
    per_token = int(tokens["bytes"]) / len(tokens["held_out"])
    rows = []
    for title, part, length in (
        ("library", "held_out", SHORT),
        ("library", "held_out", LONG),
        ("chats", "held_out_chat", SHORT),
    ):
        found = held_out(model, batches.windows(tokens[part], length))
        bits = f"{found['loss'] / math.log(2) / per_token:.3f}" if part == "held_out" else ""
        rows.append(f"| {title} | {length} | {found['loss']:.3f} | {bits} | {found['mtp_loss']:.3f} |")
    share = np.bincount(tokens["held_out"], minlength=bpe.SIZE) / len(tokens["held_out"])
    unigram = -float((share * np.log(share, where=share > 0, out=np.zeros_like(share))).sum())
    options = {"max_tokens": 120, "temperature": 0.7, "top_p": 0.95}
    samples = [p + generate(model, tokenizer, p, raw=True, **options) for p in PROMPTS]
    answers = [
        f"> {q}\n\n{generate(model, tokenizer, [{'role': 'user', 'content': q}], **options).strip()}" for q in QUESTIONS
    ]
    weights = sum(a.size for a in jax.tree.leaves(nnx.state(model)))
    seen = sum(batches.size(window(n, trainer.steps)) for n in range(trainer.done))
    state = "" if trainer.done == trainer.steps else f" It was stopped there, before the {trainer.steps} it was to do."
    part = lambda name: f"{len(tokens[name]) / 1e6:.2f} M"
    return CARD.format(
        weights=f"{weights / 1e6:.2f} M",
        megabytes=f"{(out / 'model.safetensors').stat().st_size / 1e6:.2f} MB",
        library=part("library"),
        tests=part("tests"),
        chat=part("chat"),
        held_out=part("held_out"),
        python=platform.python_version(),
        bytes_per_token=f"{per_token:.2f}",
        steps=trainer.done,
        state=state,
        seen=f"{seen / 1e6:.1f} M",
        unigram=f"{unigram:.2f}",
        rows="\n".join(rows),
        short=SHORT,
        long=LONG,
        samples="\n\n".join(f"```python\n{text.rstrip()}\n```" for text in samples),
        answers="\n\n".join(answers),
        shares=", ".join(f"{name} {share:.0%}" for name, share in batches.MIX.items()),
    )


CARD = """---
license: apache-2.0
library_name: glm_jax
tags: [glm4_moe, demo]
---
# The demo model of glm_jax

A GLM in miniature, really trained: {weights} weights ({megabytes}, bfloat16, router biases float32), with every part of
GLM-4.6: a dense layer and five of 16 experts (4 chosen, and a shared one), QK-norm, partial RoPE, biases, a router bias
that training moved, and a trained MTP layer. The files have the published layout. It writes text that looks like
Python; what it says is not to be relied on.

## Data

The source of the standard library of Python {python}, as found on the machine: {library} tokens of the library,
{tests} of its tests, and {chat} of short chats made from the library's functions and docstrings in GLM-4.6's chat form
(windows drawn: {shares}). One in 16 files of the library, by a hash of the name,
is held out ({held_out} tokens, {bytes_per_token} bytes each). The text is under the PSF licence.

## Training

`python -m glm_jax.demo.train --out FOLDER` on two CPU cores: {steps} steps, {seen} tokens in windows of {short}, at the
end {long}.{state} AdamW, float32; the log is `train.jsonl`. No balance loss: the router biases did it.

## Held-out loss, of these files

| text | context | nats a token | bits a byte | MTP, nats a token |
|---|---|---|---|---|
{rows}

The same text by its token frequencies alone is {unigram} nats a token.

## What it writes (temperature 0.7, top-p 0.95, seed 0, nothing picked)

{samples}

In the chat form:

{answers}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint; its work/ holds the state")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps in all (default {STEPS})")
    parser.add_argument(
        "--finish", action="store_true", help="train no further, write the checkpoint of the last state"
    )
    args = parser.parse_args()
    if args.finish:
        trainer = Trainer(args.steps)
        trainer.resume(args.out / "work")
        finish(args.out, trainer, prepare(args.out))
    else:
        run(args.out, args.steps)


if __name__ == "__main__":
    main()
