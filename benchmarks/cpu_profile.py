"""Where the time of `cpu_vs_transformers.py` goes on our side: the operations of one phase, the slowest first.

    python benchmarks/cpu_profile.py decode --batch 8

Prints for each operation of the compiled program its milliseconds and how often it ran, per token for decode and in all
for prefill, and the time of the phase without the profiler. What an operation is, XLA's dump says
(`XLA_FLAGS=--xla_dump_to=FOLDER`). A tile of the experts' matmuls runs once for every expert with rows of that height.
"""

import argparse
import collections
import gzip
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import cpu_vs_transformers as paired
import numpy as np

os.environ["JAX_PLATFORMS"] = "cpu"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("prefill", "decode"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/glm_jax/cpu_vs_transformers")
    parser.add_argument("--top", type=int, default=30, help="how many operations")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: paired.THREADS])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import jax

    from glm_jax import load
    from glm_jax.generation import generate_steps

    paired.checkpoint(args.folder)
    model, _ = load(args.folder)
    shape = args.batch, paired.PROMPT
    prompts = np.random.default_rng(1).integers(0, paired.CONFIG["vocab_size"], shape).tolist()

    new = 16 if args.phase == "decode" else 0  # of many more tokens the profiler would drop operations
    per = max(1, new)

    def run(folder=None):
        """Seconds of the phase, which is profiled into the folder if there is one."""
        steps = generate_steps(model, prompts, 1 + new)
        if args.phase == "decode":
            next(steps)
        if folder:
            jax.profiler.start_trace(folder)
        start = time.perf_counter()
        if args.phase == "decode":
            collections.deque(steps, 0)
        else:
            next(steps)
        seconds = time.perf_counter() - start
        if folder:
            jax.profiler.stop_trace()
        return seconds

    run()
    whole = min(run() for _ in range(3))
    total, times = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        run(folder)
        (trace,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    for event in events:
        if event.get("ph") == "X" and (op := event.get("args", {}).get("hlo_op")):
            total[op] += event["dur"]
            times[op] += 1
    print(f"{args.phase}, batch {args.batch}: {1e3 * whole / per:.1f} ms" + (" a token" if per > 1 else ""))
    for op, microseconds in total.most_common(args.top):
        print(f"{microseconds / 1e3 / per:9.2f} ms {times[op] / per:8.1f} times  {op}")


if __name__ == "__main__":
    main()
