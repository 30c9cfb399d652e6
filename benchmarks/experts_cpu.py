"""The routed experts of one layer on this machine's CPU: ours, transformers' on torch, and `jax.lax.ragged_dot`, in
float32, two threads each.

    python benchmarks/experts_cpu.py

Each side is a process of its own and they take turns, one call each, a round after the other, so that what else the
machine does falls on all. Every call takes the next of the layers, so that weights come from memory. Before anything is
timed their results must agree. Prints medians in ms, and ratios of the medians with the quartiles of the rounds'
own ratios, and appends a line to benchmarks/results/experts_cpu.jsonl."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "experts_cpu.jsonl"
THREADS = 2
L, E, K, F, D = 6, 64, 8, 384, 1024  # layers, experts, of which a token chooses, their width, the model's
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
RAGGED = 64  # tokens beyond which ragged_dot is timed once: it does E times the work, and takes a minute a call


def data(T: int):
    """x [T, D], ids and share [T, K] for so many tokens, the same in every process."""
    rng = np.random.default_rng(T)
    ids = np.argsort(rng.random((T, E)), 1)[:, :K].astype(np.int32)
    share = rng.random((T, K), np.float32)
    return rng.standard_normal((T, D), np.float32), ids, share / share.sum(1, keepdims=True)


def weights(layer: int):
    """gate_up [E, 2F, D] and down [E, D, F]."""
    rng = np.random.default_rng([7, layer])
    normal = lambda *shape: rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
    return normal(E, 2 * F, D), normal(E, D, F)


def ours(side: str):
    import jax
    import jax.numpy as jnp

    from glm_jax.kernels import routed_experts

    gate_up, down = (jnp.asarray(np.stack(parts)) for parts in zip(*map(weights, range(L)), strict=True))
    gate_up = gate_up.reshape(L, E, 2, F, D)

    @jax.jit
    def ragged(x, ids, share, gate_up, down, layer):
        order = jnp.argsort(ids.reshape(-1))
        sizes = jnp.bincount(ids.reshape(-1), length=E)
        h = jax.lax.ragged_dot(x[order // K], gate_up[layer].reshape(E, 2 * F, D).swapaxes(1, 2), sizes)
        y = jax.lax.ragged_dot(jax.nn.silu(h[:, :F]) * h[:, F:], down[layer].swapaxes(1, 2), sizes)
        y = y[jnp.argsort(order)].reshape(*ids.shape, D)
        return (share[..., None] * y).sum(1)

    run = jax.jit(routed_experts) if side == "ours" else ragged
    put = lambda args: tuple(map(jnp.asarray, args))
    return put, lambda args, layer: np.asarray(run(*args, gate_up, down, layer))


def theirs(side: str):
    import torch
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

    torch.set_num_threads(THREADS)
    config = Glm4MoeConfig(hidden_size=D, moe_intermediate_size=F, n_routed_experts=E, num_experts_per_tok=K)
    config._experts_implementation = side.partition(":")[2] or "eager"
    layers = []
    for layer in range(L):
        made = Glm4MoeExperts(config)
        for name, array in zip(("gate_up_proj", "down_proj"), weights(layer), strict=True):
            getattr(made, name).data = torch.from_numpy(array)
        layers.append(made)
    put = lambda args: (torch.from_numpy(args[0]), torch.from_numpy(args[1]).long(), torch.from_numpy(args[2]))

    def run(args, layer):
        with torch.inference_mode():
            return layers[layer](*args).numpy()

    return put, run


def serve(side: str) -> None:
    """Answers lines {"tokens", "layer", "save"} with the milliseconds of a call."""
    put, run = (theirs if side.startswith("torch") else ours)(side)
    given: dict = {}
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        args = given.setdefault(task["tokens"], put(data(task["tokens"])))
        start = time.perf_counter()
        y = run(args, task["layer"])
        ms = 1e3 * (time.perf_counter() - start)
        if task["save"]:
            np.save(task["save"], y)
        print(ms, flush=True)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    p.add_argument("--serve", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.serve:
        serve(args.serve)
        return 0
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(THREADS)}
    env |= {"XLA_FLAGS": ""}
    if hasattr(os, "sched_setaffinity"):  # XLA has as many threads as a process has cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    sides = ["ours", "torch:eager", "torch:grouped_mm", "ragged_dot"]
    pipes: dict = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    children = {}
    for side in sides:
        child = subprocess.Popen([sys.executable, __file__, "--serve", side], **pipes)
        if child.stdout.readline().strip() == "ready":
            children[side] = child
        else:
            print(f"{side}: not available", file=sys.stderr)

    def ask(side, tokens, layer, save=None):
        children[side].stdin.write(json.dumps({"tokens": tokens, "layer": layer, "save": save}) + "\n")
        children[side].stdin.flush()
        return float(children[side].stdout.readline())

    git = lambda *argv: subprocess.run(["git", *argv], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "-uno", "--", "glm_jax", "benchmarks/*.py")
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    found: dict = {}
    for T in args.tokens:
        here = list(children)
        with tempfile.TemporaryDirectory() as folder:
            made = {}
            for side in here:
                ask(side, T, 1, f"{folder}/{len(made)}.npy")  # compiles
                made[side] = np.load(f"{folder}/{len(made)}.npy")
            for side, y in made.items():
                far = np.abs(y - made["ours"]).max() / made["ours"].std()
                assert far < 1e-4, f"{side} is {far} standard deviations from ours at {T} tokens"
        times = {side: [] for side in here}
        for i in range(args.rounds + 1):
            for side in here:
                if side != "ragged_dot" or T <= RAGGED or i < 2:
                    times[side].append(ask(side, T, i % L))
        times = {side: ms[1:] for side, ms in times.items()}
        row: dict = {side: round(statistics.median(ms), 3) for side, ms in times.items()}
        for side in here[1:]:
            each = sorted(b / a for a, b in zip(times["ours"], times[side], strict=False))
            quartiles = each[len(each) // 4], each[-1 - len(each) // 4]
            row[f"{side} / ours"] = [round(row[side] / row["ours"], 2), *(round(q, 2) for q in quartiles)]
        found[T] = row
        print(T, json.dumps(row), flush=True)
    line = {
        "commit": git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else ""),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": cpu,
        "threads": THREADS,
        "shape": {"layers": L, "experts": E, "k": K, "F": F, "D": D},
        "python": platform.python_version(),
        **{package: version(package) for package in ("jax", "torch", "transformers")},
        "ms": found,
    }
    if tuple(args.tokens) == TOKENS:
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
