"""Every preset on meshes of 1 to 16 CPU devices, and on two processes of four, against one device, in float32: logits,
generated tokens (three prompts and one), the loss of 13 rows, its gradients and the experts' load. Two experts of each
layer get no token.

    python benchmarks/every_mesh.py              all cases, a process for each number of devices; writes results/
    python benchmarks/every_mesh.py --devices 16 --case expert=16/ep
    python benchmarks/every_mesh.py --processes

Differences are in standard deviations of what they should be: root mean square and largest. Of two processes: the bytes
that each read of the checkpoint, which has `bytes`, and the tokens are greedy and drawn ones."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    1: ["data=1/ep", "data=1/latency", "data=1/tp", "data=1/fsdp", "data=1/long"],
    2: ["expert=2/ep", "expert=2/latency", "tensor=2/tp", "data=2/fsdp", "context=2/long"],
    4: [
        "expert=2,tensor=2/ep",
        "expert=2,tensor=2/latency",
        "tensor=4/tp",
        "data=2,expert=2/fsdp",
        "expert=2,context=2/long",
    ],
    8: [
        "expert=8/ep",
        "data=2,expert=2,tensor=2/ep",
        "expert=8/latency",
        "expert=4,tensor=2/latency",
        "data=2,tensor=4/tp",
        "data=2,expert=2,tensor=2/fsdp",
        "expert=2,context=2,tensor=2/long",
    ],
    16: [
        "expert=16/ep",
        "data=2,expert=4,tensor=2/ep",
        "data=2,expert=2,tensor=4/latency",
        "data=4,tensor=4/tp",
        "data=2,expert=4,tensor=2/fsdp",
        "expert=8,context=2/long",
    ],
}
PROCESSES = [
    "expert=4,tensor=2/ep",
    "expert=4,tensor=2/latency",
    "tensor=8/tp",
    "data=4,expert=2/fsdp",
    "expert=2,context=2,tensor=2/long",
]


def rms(ours, theirs) -> float:
    import numpy as np

    theirs = np.asarray(theirs, np.float64)
    return float(np.sqrt(np.mean((np.asarray(ours) - theirs) ** 2)) / max(theirs.std(), 1e-30))


def run(devices: int, cases: list[str]) -> None:
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} --xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import jax
    import numpy as np
    from golden import far
    from test_model import IDS, gradients, made

    from glm_jax import generate_ids

    def made_so(at="data=1", by="ep"):
        """With two experts in each layer that no token chooses: on sixteen devices all that two of them hold."""
        model = made("all the parts", at, by, n_routed_experts=16)
        for layer in (model.moe, model.mtp.layer):
            bias = layer.mlp.bias
            less = np.asarray(bias[...]) - 100 * (np.arange(16) >= 14)
            bias[...] = jax.device_put(less.astype(np.float32), bias[...].sharding)
        return model

    # 13 rows: most of the meshes do not divide them
    rows, prompts = np.resize(IDS, (13, 16)), [[1, 2, 3], [4] * 9, [7] * 30]
    one = made_so()
    logits, tokens = np.asarray(one(IDS)[0]), generate_ids(one, prompts, max_tokens=6)
    value, metrics, grads = gradients(one, rows, mtp_weight=0.3)
    for case in cases:
        began, (at, by) = time.perf_counter(), case.split("/")
        model = made_so(at, by)
        ours, (loss, load, got) = model(IDS)[0], gradients(model, rows, mtp_weight=0.3)
        line = {
            "devices": devices,
            "mesh": at,
            "rules": by,
            "logits_rms": rms(ours, logits),
            "logits_max": far(ours, logits),
            "tokens_equal": generate_ids(model, prompts, max_tokens=6) == tokens
            and generate_ids(model, prompts[:1], max_tokens=6) == tokens[:1],
            "loss_difference": abs(loss - value),
            "gradients_rms": max(rms(got[path], g) for path, g in grads.items()),
            "gradients_max": max(far(got[path], g) for path, g in grads.items()),
            "load_equal": all(np.array_equal(load[key], metrics[key]) for key in ("load", "mtp_load")),
            "unused_experts": int((np.asarray(metrics["load"]) == 0).sum()),
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(json.dumps(line), flush=True)


def run_processes(cases: list[str]) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import numpy as np
    from golden import far
    from test_processes import by_one_process, by_two_processes

    from glm_jax.convert.safetensors import read_folder

    with tempfile.TemporaryDirectory() as scratch:
        folder, alone = by_one_process(Path(scratch))
        gradients = [name for name in alone if name.startswith("gradient ")]
        logits = ("logits", "jit", "cached")
        for i, case in enumerate(cases):
            began, (at, by), out = time.perf_counter(), case.split("/"), Path(scratch) / f"case{i}"
            out.mkdir()
            answers = by_two_processes(folder, out, at, by)
            worst = lambda measure, names, answers=answers: max(
                measure(found[name], alone[name]) for found, _ in answers for name in names
            )
            line = {
                "processes": 2,
                "devices": 8,
                "mesh": at,
                "rules": by,
                "logits_rms": worst(rms, logits),
                "logits_max": worst(far, logits),
                "tokens_equal": all(np.array_equal(f[k], alone[k]) for f, _ in answers for k in ("tokens", "drawn")),
                "loss_difference": max(abs(float(found["loss"] - alone["loss"])) for found, _ in answers),
                "gradients_rms": worst(rms, gradients),
                "gradients_max": worst(far, gradients),
                "bytes": sum(t.nbytes for t in read_folder(folder).values()),
                "bytes_read": [said[0] for _, said in answers],
                "seconds": round(time.perf_counter() - began, 1),
            }
            print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", type=int, choices=CASES)
    parser.add_argument("--case", action="append", help="MESH/RULES (default: all for so many devices)")
    parser.add_argument("--processes", action="store_true", help="two processes of four devices")
    args = parser.parse_args()
    if args.processes:
        run_processes(args.case or PROCESSES)
        return 0
    if args.devices:
        run(args.devices, args.case or CASES[args.devices])
        return 0
    lines = []
    for chosen in (*(["--devices", str(n)] for n in CASES), ["--processes"]):
        done = subprocess.run([sys.executable, __file__, *chosen], stdout=subprocess.PIPE, text=True, check=True)
        lines += [json.loads(line) for line in done.stdout.splitlines()]
        print(done.stdout, end="", flush=True)
    import jax

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    about = {"commit": commit, "jax": jax.__version__, "python": platform.python_version()}
    path = ROOT / "benchmarks/results/every_mesh.jsonl"
    path.write_text("".join(json.dumps(about | line) + "\n" for line in lines))
    right = all(
        line["tokens_equal"]
        and line.get("load_equal", True)
        and line.get("unused_experts", 1) > 0
        and all(read < line["bytes"] for read in line.get("bytes_read", ()))
        and max(line["logits_rms"], line["gradients_rms"]) < 1e-5
        for line in lines
    )
    print(
        f"{len(lines)} cases, {'all as one device' if right else 'NOT ALL RIGHT'}; written to {path.relative_to(ROOT)}"
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
