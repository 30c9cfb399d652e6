"""Prefill and decode on this machine's CPU, ours against transformers on torch, two threads each.

    python benchmarks/cpu_vs_transformers.py

One fp32 checkpoint (9 layers, hidden 1024, 64 experts top-8) is written once into a cache folder and read by both
sides. Each side is a process of its own; the two take turns, one measurement each, so that what else the machine does
falls on both. Before anything is timed their greedy tokens must agree. Prints a table of medians and appends one JSON
line to benchmarks/results/.

Prefill is the time from the ids to the first new token. Decode is the time of the tokens after it: for transformers a
loop around `model(token, past_key_values=...)`, which is its fastest plain use (`generate` adds its own host work); for
us `generate_steps`, which `generate_ids` and `stream_generate` are loops around.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

THREADS = 2
PROMPT, TOKENS = 512, 64
CONFIG = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "dtype": "float32",
    "eos_token_id": None,
    "first_k_dense_replace": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 2816,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 384,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 9,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 0,
    "pad_token_id": None,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 32768,
}


def checkpoint(folder):
    """Write the benchmark's checkpoint into the folder unless it is there already."""
    from glm_jax.convert.safetensors import write

    index, config = folder / "model.safetensors.index.json", folder / "config.json"
    if config.exists() and json.loads(config.read_text()) != CONFIG:
        sys.exit(f"{folder} holds another checkpoint; remove it or give another --folder")
    if index.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(CONFIG, indent=2))
    print(f"writing the checkpoint (2.9 GB, once) into {folder}", file=sys.stderr)
    h, width, vocab = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"], CONFIG["vocab_size"]
    n, k, d = (CONFIG[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    rng, weight_map = np.random.default_rng(0), {}

    def mlp(prefix, inner):
        shapes = {"gate_proj": (inner, h), "up_proj": (inner, h), "down_proj": (h, inner)}
        return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}

    parts = [{"model.embed_tokens.weight": (vocab, h), "model.norm.weight": (h,), "lm_head.weight": (vocab, h)}]
    for layer in range(CONFIG["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        part = {f"{p}.input_layernorm.weight": (h,), f"{p}.post_attention_layernorm.weight": (h,)}
        for name, heads in (("q", n), ("k", k), ("v", k)):
            part[f"{p}.self_attn.{name}_proj.weight"] = (heads * d, h)
            part[f"{p}.self_attn.{name}_proj.bias"] = (heads * d,)
        part |= {f"{p}.self_attn.o_proj.weight": (h, n * d)}
        part |= {f"{p}.self_attn.q_norm.weight": (d,), f"{p}.self_attn.k_norm.weight": (d,)}
        if layer < CONFIG["first_k_dense_replace"]:
            part |= mlp(f"{p}.mlp", CONFIG["intermediate_size"])
        else:
            part[f"{p}.mlp.gate.weight"] = (CONFIG["n_routed_experts"], h)
            part[f"{p}.mlp.gate.e_score_correction_bias"] = (CONFIG["n_routed_experts"],)
            part |= mlp(f"{p}.mlp.shared_experts", width)
            for expert in range(CONFIG["n_routed_experts"]):
                part |= mlp(f"{p}.mlp.experts.{expert}", width)
        parts.append(part)
    total = 0
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for name, shape in part.items():
            value = rng.standard_normal(shape, dtype=np.float32)
            if len(shape) == 1:
                value = 1 + 0.1 * value if "norm" in name else 0.1 * value
            elif "embed" not in name:
                value *= shape[-1] ** -0.5
            tensors[name] = value
            total += value.nbytes
        if not (folder / file).exists():  # a shard is written whole or not at all, so this resumes
            write(folder / file, tensors)
        weight_map |= dict.fromkeys(part, file)
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def ours(folder):
    from importlib.metadata import version

    os.environ["JAX_PLATFORMS"] = "cpu"
    from glm_jax import load
    from glm_jax.generation import generate_steps

    model, _ = load(folder)

    def run(prompts):
        start, out = time.perf_counter(), []
        for tokens, _ in generate_steps(model, prompts, 1 + TOKENS):
            if not out:
                middle = time.perf_counter()
            out.append(tokens)
        return middle - start, time.perf_counter() - middle, np.stack(out, 1).tolist()

    return run, {"jax": version("jax"), "flax": version("flax")}


def transformers(folder):
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.inference_mode()
    def run(prompts):
        ids, out = torch.tensor(prompts), []
        start = time.perf_counter()
        step = model(ids, use_cache=True, logits_to_keep=1)
        out.append(step.logits[:, -1].argmax(-1, keepdim=True))
        middle = time.perf_counter()
        for _ in range(TOKENS):
            step = model(out[-1], past_key_values=step.past_key_values, use_cache=True)
            out.append(step.logits[:, -1].argmax(-1, keepdim=True))
        return middle - start, time.perf_counter() - middle, torch.cat(out, 1).tolist()

    experts, attention = model.config._experts_implementation, model.config._attn_implementation
    return run, {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "experts": experts,
        "attention": attention,
    }


def work(side, folder):
    """One side's process: a line of JSON prompts in, a line of JSON times and tokens out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr, stdout carries the answers alone
    run, versions = {"ours": ours, "transformers": transformers}[side](folder)
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        prefill, decode, tokens = run(json.loads(line))
        print(json.dumps({"prefill": prefill, "decode": decode, "tokens": tokens}), file=answers, flush=True)


class Side:
    """A worker process and what it answered."""

    def __init__(self, name, folder):
        command = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
        self.name, self.pipe = name, dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, **self.pipe)
        self.versions = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process of {self.name} ended with {self.process.wait()}")
        return json.loads(line)

    def run(self, prompts):
        self.process.stdin.write(json.dumps(prompts) + "\n")
        self.process.stdin.flush()
        return self.answer()


def processor():
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main():
    root = Path(__file__).resolve().parents[1]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=cache / "glm_jax" / "cpu_vs_transformers", help="the checkpoint")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side, after one to warm up")
    parser.add_argument("--worker", choices=("ours", "transformers"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # jax has no other way to be given two threads; inherited by the workers
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    sys.path.insert(0, str(root))
    if args.worker:
        return work(args.worker, args.folder)

    checkpoint(args.folder)
    sides = [Side(name, args.folder) for name in ("ours", "transformers")]
    rng, rows = np.random.default_rng(1), []
    for batch in (1, 8):
        prompts = rng.integers(0, CONFIG["vocab_size"], (batch, PROMPT)).tolist()
        first, second = (side.run(prompts)["tokens"] for side in sides)
        if first != second:
            place = np.argwhere(np.array(first) != np.array(second))[0].tolist()
            sys.exit(f"batch {batch}: the greedy tokens differ first at (row, step) {place}; nothing timed")
        times = {side.name: {"prefill": [], "decode": []} for side in sides}
        for number in range(args.rounds):
            for side in sides if number % 2 else sides[::-1]:
                answer = side.run(prompts)
                for phase in ("prefill", "decode"):
                    times[side.name][phase].append(answer[phase])
        for phase, count in (("prefill", PROMPT), ("decode", TOKENS)):
            row = {"phase": phase, "batch": batch}
            for side in sides:
                seconds = statistics.median(times[side.name][phase])
                row[f"{side.name}_tok_s"] = round(batch * count / seconds, 2)
                row[f"{side.name}_ms"] = round(1e3 * seconds / (count if phase == "decode" else 1), 2)
                row[f"{side.name}_spread"] = round(max(times[side.name][phase]) / min(times[side.name][phase]), 3)
            row["ratio"] = round(row["ours_tok_s"] / row["transformers_tok_s"], 2)
            rows.append(row)
    for side in sides:
        side.process.stdin.close()
        side.process.wait()

    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    line = {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": processor(),
        "threads": THREADS,
        "python": platform.python_version(),
        **sides[0].versions,
        **sides[1].versions,
        "prompt": PROMPT,
        "tokens": TOKENS,
        "rounds": args.rounds,
        "greedy_tokens_equal": True,
        "rows": rows,
    }
    print(f"{line['device']}, {THREADS} threads, fp32; prompt {PROMPT}, {TOKENS} new tokens, medians of {args.rounds}")
    print(f"{'':16}{'ours tok/s':>12}{'ms':>10}{'transformers tok/s':>20}{'ms':>10}{'ratio':>8}")
    for row in rows:
        ours = f"{row['ours_tok_s']:>12.1f}{row['ours_ms']:>10.1f}"
        theirs = f"{row['transformers_tok_s']:>20.1f}{row['transformers_ms']:>10.1f}"
        print(f"{row['phase']:<8}batch {row['batch']:<2}{ours}{theirs}{row['ratio']:>8.2f}")
    print("ms: the whole prefill, or one decode step")
    results = root / "benchmarks" / "results" / "cpu_vs_transformers.jsonl"
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
