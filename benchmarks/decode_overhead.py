"""Python's share of a decode step: the time the host spends before the device can begin, aims under 1 ms.

    python benchmarks/decode_overhead.py

Calls are asynchronous, so the time until a step's call returns is the host's own: the tree of weights taken apart, the
arguments looked up, the program launched. On CPU with a tiny model the step itself is soon over; each call is timed
with the device idle (the step before is waited for, outside the clock). Also timed is the whole of a token in
`generate_steps`, device included. The second model has every kind of leaf and as many as a full-size one has,
at tiny sizes. Prints a table and appends one JSON line to benchmarks/results/."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AIM_MS = 1.0


def measure(config, steps: int) -> dict:
    import jax
    import numpy as np

    from glm_jax import GLM, generation

    model, times = GLM(config), []
    compiled = generation._step

    def timed(*args):
        jax.block_until_ready(args)
        start = time.perf_counter()
        out = compiled(*args)
        times.append(time.perf_counter() - start)
        return out

    prompt = [list(range(1, 9))]
    for _ in generation.generate_steps(model, prompt, 4):  # compiles
        pass
    generation._step = timed
    try:
        for _ in generation.generate_steps(model, prompt, steps + 1):
            pass
    finally:
        generation._step = compiled
    host = 1e3 * np.asarray(times[1:])  # without the prompt
    start = None
    for _ in generation.generate_steps(model, prompt, steps + 1):
        start = start or time.perf_counter()
    assert start
    whole = 1e3 * (time.perf_counter() - start) / steps
    return {
        "leaves": len(jax.tree.leaves(model)),
        "host_ms": round(statistics.median(host), 3),
        "host_p90_ms": round(float(np.percentile(host, 90)), 3),
        "step_ms": round(whole, 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    import jax

    from glm_jax.config import tiny

    models = {
        "4 layers": tiny(num_nextn_predict_layers=0),
        "92 layers, every kind of leaf": tiny(
            num_hidden_layers=92, first_k_dense_replace=3, hidden_size=16, head_dim=4, n_routed_experts=8
        ),
    }
    rows = {name: measure(config, args.steps) for name, config in models.items()}
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    line = {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": f"{jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}",
        "python": platform.python_version(),
        "jax": version("jax"),
        "flax": version("flax"),
        "steps": args.steps,
        "aim_ms": AIM_MS,
        "rows": rows,
    }
    print(f"{'':32}{'leaves':>8}{'host ms':>10}{'p90':>8}{'whole step ms':>16}")
    for name, row in rows.items():
        print(f"{name:32}{row['leaves']:>8}{row['host_ms']:>10}{row['host_p90_ms']:>8}{row['step_ms']:>16}")
    results = ROOT / "benchmarks" / "results" / "decode_overhead.jsonl"
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
