"""The plan beside XLA's own account: full-size steps compiled for accelerators that are not here.

    PYTHONPATH=. python benchmarks/compile_table.py               # compiles every case, minutes each on two cores
    PYTHONPATH=. python benchmarks/compile_table.py --only v6e    # those whose line has this text in it
    PYTHONPATH=. python benchmarks/compile_table.py --table       # compiles nothing: the last results, the plan of now

Needs libtpu for the TPU cases and jax's CUDA plugin for H100. A line of JSON a case goes to
benchmarks/results/compile.jsonl, with commit and versions; then the table is printed. Each case has a process of its
own: one process holds one kind of accelerator's compiler, and gives no memory back."""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compile.jsonl"
sys.path[:0] = [str(ROOT)]
os.environ["JAX_PLATFORMS"] = "cpu"

# target, model, mesh, rules, rows, new tokens a row, context; and whether a prompt begins
CASES: list[tuple] = [
    ("h100:8", "glm-4.5-air", "expert=8", "ep", 8, 2048, 4096, True),
    ("h100:8", "glm-4.5-air", "expert=8", "ep", 8, 1, 4096, True),
    ("h100:16", "glm-4.6", "expert=16", "ep", 16, 2048, 4096, True),
    ("h100:16", "glm-4.6", "expert=16", "ep", 16, 1, 4096, True),
    ("h100:16", "glm-4.6", "expert=8,tensor=2", "ep", 8, 2048, 4096, True),
    ("h100:16", "glm-4.6", "expert=8,tensor=2", "ep", 8, 1, 4096, True),
    ("v5e:8x8", "glm-4.5-air", "expert=16,tensor=4", "ep", 16, 2048, 4096, True),
    ("v5e:8x8", "glm-4.5-air", "expert=16,tensor=4", "ep", 64, 1, 4096, True),
    ("v5p:2x2x4", "glm-4.6", "expert=16", "ep", 16, 2048, 4096, True),
    ("v5p:2x2x4", "glm-4.6", "expert=16", "ep", 16, 1, 4096, True),
    ("v6e:8x8", "glm-4.6", "expert=8,tensor=8", "ep", 8, 2048, 4096, True),
    ("v6e:8x8", "glm-4.6", "expert=8,tensor=8", "ep", 64, 1, 4096, True),
    ("v5e:16x16", "glm-4.6", "expert=32,tensor=8", "ep", 32, 2048, 4096, True),
    ("v5e:16x16", "glm-4.6", "expert=32,tensor=8", "ep", 64, 1, 4096, True),
    ("h100:16", "glm-4.6", "expert=8,tensor=2", "latency", 1, 2048, 4096, True),
    ("h100:16", "glm-4.6", "expert=8,tensor=2", "latency", 1, 1, 4096, True),
    ("v5p:2x2x4", "glm-4.6", "expert=16", "latency", 1, 2048, 4096, True),
    ("v5p:2x2x4", "glm-4.6", "expert=16", "latency", 1, 1, 4096, True),
    ("v5p:2x2x4", "glm-4.6", "expert=4,context=4", "long", 4, 2048, 202752, True),
    ("v5p:2x2x4", "glm-4.6", "expert=4,context=4", "long", 4, 1, 202752, True),
    ("h100:16", "glm-4.6", "expert=8,tensor=2", "ep", 8, 2048, 32768, False),
    ("h100:64", "glm-4.6", "context=8,tensor=8", "long", 1, 2048, 202752, False),
    ("v5p:2x2x4", "glm-4.6", "expert=4,context=4", "long", 4, 2048, 202752, False),
]
FIELDS = ("target", "model", "mesh", "rules", "rows", "tokens", "context", "fresh")


def compiled(case) -> dict:
    """One case's line, in this process."""
    from glm_jax.config import preset
    from glm_jax.sharding import rules
    from glm_jax.steps import compile_step

    target, model, mesh, by, rows, tokens, context, fresh = case
    step = compile_step(preset(model), mesh, rules(by), target, rows, tokens, context, fresh)
    return dict(zip(FIELDS, case, strict=True)) | step.to_json() | versions()


def versions() -> dict:
    def installed(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "-uno", "--", "glm_jax", "sharding", "convert", "benchmarks/*.py")
    commit = git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return {"commit": commit} | {p: installed(p) for p in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")}


def row(line: dict) -> str:
    """The table's row: XLA's bytes, and by how much the plan of now is off."""
    import dataclasses

    from glm_jax.config import preset
    from glm_jax.planner import cache_on_device, weight_bytes, working_bytes
    from glm_jax.sharding import abstract, rules
    from glm_jax.targets import chip

    config = dataclasses.replace(preset(line["model"]), num_nextn_predict_layers=0)
    at, by = abstract(line["mesh"], chip(line["target"]).kind), rules(line["rules"])
    arguments = sum(weight_bytes(config, at, by).values())
    arguments += cache_on_device(config, at, by, line["rows"], line["slots"])
    temporaries = sum(
        working_bytes(config, at, by, line["rows"], line["tokens"], line["slots"], line["fresh"]).values()
    )
    gib, off = lambda n: f"{n / 2**30:.3f}", lambda planned, got: f"{planned / got - 1:+.1%}"
    a, t, n = (line[f"{key}_bytes"] for key in ("argument", "temporary", "total"))
    cells = [line[key] for key in ("target", "model", "mesh", "rules", "step")] + [f"{line['rows']} x {line['tokens']}"]
    cells += [gib(a), off(arguments, a), gib(t), gib(temporaries), off(temporaries, t)]
    cells += [gib(n), off(arguments + temporaries, n), f"{line['compile_s']:.0f}", line["commit"]]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="the cases whose line has this text in it")
    p.add_argument("--table", action="store_true", help="compile nothing")
    p.add_argument("--case", type=int, help=argparse.SUPPRESS)  # one case, its line to stdout
    args = p.parse_args()
    if args.case is not None:
        print(json.dumps(compiled(CASES[args.case])))
        return 0
    failed = 0
    for i, case in enumerate(CASES):
        if args.table or args.only not in " ".join(map(str, case)):
            continue
        made = subprocess.run([sys.executable, __file__, "--case", str(i)], capture_output=True, text=True, cwd=ROOT)
        if made.returncode:
            failed += 1
            print(" ".join(map(str, case)), "failed:", made.stderr.strip().splitlines()[-1:], file=sys.stderr)
            continue
        with RESULTS.open("a") as file:
            file.write(made.stdout.strip().splitlines()[-1] + "\n")
        print(row(json.loads(made.stdout.strip().splitlines()[-1])), file=sys.stderr, flush=True)
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    last = {tuple(line[f] for f in FIELDS): line for line in lines}
    if not args.table:
        RESULTS.write_text("".join(json.dumps(last[case]) + "\n" for case in CASES if case in last))
    headings = "target|model|mesh|rules|step|rows x tokens|arguments GiB|plan|temporaries GiB|plan GiB|off".split("|")
    headings += ["total GiB", "plan", "compiled s", "commit"]
    print("| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    for case in CASES:
        if case in last and args.only in " ".join(map(str, case)):
            print(row(last[case]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
