"""Everything that only an accelerator can show, in one command: checks first, then speed.

    PYTHONPATH=. python benchmarks/gpu.py            # on a GPU or TPU
    PYTHONPATH=. python benchmarks/gpu.py --dry      # the same at toy sizes on any machine, nothing written

Checks: the stored logits of transformers, the demo's greedy text against this machine's CPU, and the routed experts
against float64. Speed: the routed experts of one layer of GLM-4.6, and prompts and generation with the first layers of
GLM-4.5-Air, random weights made on the device. Every number is printed as it is measured; at the end one JSON line goes
to benchmarks/results/gpu.jsonl. A check that fails is a number too: exit code 1, and the rest still runs."""

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from glm_jax import GLM, generate_ids, load  # noqa: E402
from glm_jax.config import preset, tiny  # noqa: E402
from glm_jax.generation import generate_steps, peak_memory  # noqa: E402
from glm_jax.kernels import routed_experts  # noqa: E402
from glm_jax.loading import DEMO  # noqa: E402
from glm_jax.model import fill  # noqa: E402
from glm_jax.planner import first_layers  # noqa: E402


def golden_logits(dry: bool) -> dict:
    """The largest error of each stored variant, in standard deviations of the logits."""
    import golden

    errors = {}
    for variant, want in list(golden.GOLDEN.items())[: 1 if dry else None]:
        with tempfile.TemporaryDirectory() as folder:
            model = golden.one_device(golden.save(variant, Path(folder)))
        errors[variant] = golden.far(model([want["input_ids"]])[0][0], want["logits"])
    return {"errors": errors, "ok": max(errors.values()) < golden.CLOSE}


def demo_text(dry: bool) -> dict:
    """Greedy ids of the demo in float32, here and on this machine's CPU."""
    prompt, rows = [[5, 6, 7], [300, 301]], []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            mesh = jax.make_mesh((1, 1, 1), ("data", "expert", "tensor"), devices=[device])
            rows.append(generate_ids(load(DEMO, mesh=mesh, dtype="float32")[0], prompt, max_tokens=4 if dry else 32))
    return {"equal": rows[0] == rows[1], "ok": rows[0] == rows[1]}


def experts_case(T, E, F, D, dtype, k=8):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (T, D), dtype)
    ids = jnp.argsort(jax.random.uniform(keys[1], (T, E)), -1)[:, :k].astype(jnp.int32)
    share = jnp.full((T, k), 1 / k, jnp.float32)
    gate_up = (jax.random.normal(keys[2], (1, E, 2, F, D), jnp.float32) * D**-0.5).astype(dtype)
    down = (jax.random.normal(keys[3], (1, E, D, F), jnp.float32) * F**-0.5).astype(dtype)
    return x, ids, share, gate_up, down


def experts_error(dry: bool) -> dict:
    """The error of the routed experts against float64, root mean square, in standard deviations."""
    E, F, D = (4, 24, 32) if dry else (20, 1536, 5120)
    bound, errors = {"float32": 3e-6, "bfloat16": 6e-3}, {}
    for dtype in bound:
        for T in (1, 7, 150):
            args = experts_case(T, E, F, D, jnp.dtype(dtype), k=4)
            ours = np.asarray(jax.jit(routed_experts)(*args), np.float64)
            x, ids, share, gate_up, down = (np.asarray(a, np.float64 if a.dtype != jnp.int32 else None) for a in args)
            want = np.zeros_like(ours)
            for e in range(E):
                rows = np.argwhere(ids == e)
                h = x[rows[:, 0]] @ gate_up[0, e].reshape(2 * F, D).T
                y = (h[:, :F] / (1 + np.exp(-h[:, :F])) * h[:, F:]) @ down[0, e].T
                np.add.at(want, rows[:, 0], share[rows[:, 0], rows[:, 1], None] * y)
            errors[f"{dtype} T={T}"] = float(np.sqrt(((ours - want) ** 2).mean()) / want.std())
    return {"errors": errors, "ok": all(error < bound[name.split()[0]] for name, error in errors.items())}


def timed(run, repeat=10) -> float:
    """The median time of a call, in milliseconds, after one to compile and one to warm up."""
    for _ in range(2):
        jax.block_until_ready(run())
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def experts_speed(dry: bool) -> dict:
    """One layer's 160 experts in bfloat16: milliseconds, TFLOP/s of the rows' own work, GB/s of the experts chosen."""
    E, F, D = (8, 24, 32) if dry else (160, 1536, 5120)
    found = {}
    for T in (1, 4) if dry else (1, 8, 64, 512, 4096):
        x, ids, share, gate_up, down = experts_case(T, E, F, D, jnp.bfloat16)
        run = jax.jit(routed_experts)
        ms = timed(lambda: run(x, ids, share, gate_up, down))  # noqa: B023
        read = len(np.unique(np.asarray(ids))) * 3 * F * D * 2
        found[f"T={T}"] = {"ms": ms, "tflop_s": ids.size * 6 * F * D / ms / 1e9, "gb_s": read / ms / 1e6}
    return found


def model_speed(dry: bool) -> dict:
    """Prompts of 512 tokens and 64 new ones with the first layers of GLM-4.5-Air in bfloat16."""
    layers = 8
    config = tiny() if dry else dataclasses.replace(first_layers(preset("glm-4.5-air"), layers), eos_token_id=())

    def noise(path, leaf):
        make = lambda: jax.random.normal(jax.random.key(0), leaf.shape, leaf.dtype) * leaf.shape[-1] ** -0.5
        return jax.jit(make, out_shardings=leaf.sharding)()

    model = fill(GLM(config, mesh="data=1", seed=None), noise)
    prompt, new = (8, 4) if dry else (512, 64)
    found: dict = {"layers": config.num_hidden_layers}
    rng = np.random.default_rng(0)
    for batch in (1, 2) if dry else (1, 8, 32):
        rows = rng.integers(1, config.vocab_size, (batch, prompt)).tolist()
        times = []
        for _ in range(2 if dry else 4):  # the first compiles
            steps = generate_steps(model, rows, new)
            start = time.perf_counter()
            next(steps)
            first = time.perf_counter()
            for _ in steps:
                pass
            times.append((1e3 * (first - start), 1e3 * (time.perf_counter() - first) / (new - 1)))
        prefill, step = (statistics.median(t) for t in zip(*times[1:], strict=True))
        found[f"batch {batch}"] = {
            "prompt_ms": prefill,
            "prompt_tok_s": 1e3 * batch * prompt / prefill,
            "step_ms": step,
            "generation_tok_s": 1e3 * batch / step,
            "first_call_ms": times[0][0],
        }
    return found | {"peak_gib": peak_memory(model) / 2**30}


PARTS = (golden_logits, demo_text, experts_error, experts_speed, model_speed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="toy sizes, on any machine; writes nothing")
    parser.add_argument(
        "--only", choices=[p.__name__ for p in PARTS], action="append", help="this part; may be repeated"
    )
    args = parser.parse_args()
    if jax.default_backend() == "cpu" and not args.dry:
        parser.error("this machine has no accelerator that jax sees; --dry runs everything at toy sizes")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    result: dict = {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": version("jax"),
        "flax": version("flax"),
    }
    print(json.dumps(result), flush=True)
    failed = False
    for part in PARTS:
        if args.only and part.__name__ not in args.only:
            continue
        start = time.perf_counter()
        try:
            found = part(args.dry)
        except Exception as error:  # the device is lent for minutes: the other parts still count
            traceback.print_exc()
            found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
        failed |= not found.get("ok", True)
        result[part.__name__] = found | {"s": time.perf_counter() - start}
        print(part.__name__, json.dumps(result[part.__name__]), flush=True)
    if not args.dry:
        results = ROOT / "benchmarks" / "results" / "gpu.jsonl"
        results.parent.mkdir(exist_ok=True)
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
