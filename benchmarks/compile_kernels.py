"""What the compilers for GPUs and TPUs make of the experts' kernels at full size, with none of these there: of each
kernel on a GPU registers, bytes spilt and matrix instructions, on a TPU the VMEM that it uses; and the temporary bytes
of the step around them.

    python benchmarks/compile_kernels.py                 all cases, a process each; writes results/kernels.jsonl
    python benchmarks/compile_kernels.py --only h100
    python benchmarks/compile_kernels.py --case triton h100 glm-4.6 bfloat16 160 decode 64

A "decode" step is four layers in a scan, the stack closed over; "train" is one layer's gradients, of FP8 weights the
tokens' alone. A program that takes more shared memory than a block may have, or more VMEM than was asked for, does not
compile. Needs jax's CUDA plugin (docs/plan.md) and no driver; for TPUs libtpu."""

import argparse
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kernels.jsonl"
FIELDS = ("kernels", "device", "model", "weights", "experts", "step", "tokens")
TRITON: list[tuple] = [
    *[("h100", "glm-4.6", "bfloat16", 160, "decode", T) for T in (1, 8, 64, 256, 1024, 4096, 16384)],
    *[("h100", "glm-4.6", "bfloat16", 20, "decode", T) for T in (8, 512, 8192)],
    *[("h100", "glm-4.6", "float8_e4m3fn", 160, "decode", T) for T in (1, 64, 1024, 4096)],
    *[("h100", "glm-4.5-air", "bfloat16", 128, "decode", T) for T in (1, 64, 1024, 4096)],
    ("h100", "glm-4.5-air", "float8_e4m3fn", 16, "decode", 64),
    *[("h100", "glm-4.6", "bfloat16", 20, "train", T) for T in (64, 4096)],
    ("h100", "glm-4.5-air", "bfloat16", 16, "train", 4096),
    *[(d, "glm-4.6", "bfloat16", 20, "decode", T) for d in ("a100", "b200") for T in (1, 64, 4096)],
    *[("a100", "glm-4.6", "float8_e4m3fn", 20, "decode", T) for T in (1, 64, 4096)],
    *[("l4", "glm-4.5-air", "bfloat16", 16, "decode", T) for T in (1, 64, 4096)],
    ("l4", "glm-4.5-air", "float8_e4m3fn", 16, "decode", 64),
    *[(d, "glm-4.6", "bfloat16", 20, "train", 4096) for d in ("a100", "l4")],
    *[(d, "glm-4.6", "float8_e4m3fn", 20, "train", T) for d, T in (("h100", 64), ("h100", 4096), ("a100", 4096))],
]
# "fp8 activations" are FP8 weights too.
MOSAIC: list[tuple] = [
    *[("h100", "glm-4.6", w, 160, "decode", T) for w in ("bfloat16", "float8_e4m3fn") for T in (1, 64, 1024, 4096)],
    *[("h100", "glm-4.6", "fp8 activations", 160, "decode", T) for T in (64, 4096)],
    ("h100", "glm-4.5-air", "bfloat16", 128, "decode", 4096),
    ("h100", "glm-4.5-air", "float8_e4m3fn", 16, "decode", 64),
    *[("h100", "glm-4.6", w, 20, "train", 4096) for w in ("bfloat16", "float8_e4m3fn", "fp8 activations")],
    *[("h100", "glm-4.6", "bfloat16", 20, "train", 64)],
    ("h100", "glm-4.5-air", "bfloat16", 16, "train", 4096),
]
MEGABLOX: list[tuple] = [
    *[(d, "glm-4.6", "bfloat16", 20, "decode", T) for d in ("v5e", "v5p", "v6e") for T in (1, 64, 512, 4096, 16384)],
    *[(d, "glm-4.5-air", "bfloat16", 16, "decode", T) for d in ("v5e", "v5p", "v6e") for T in (1, 64, 4096)],
    *[("v5p", "glm-4.6", "bfloat16", 160, "decode", T) for T in (64, 4096)],
    *[(d, "glm-4.6", "float8_e4m3fn", 20, "decode", T) for d in ("v5e", "v5p", "v6e") for T in (64, 4096)],
    *[("v5p", "glm-4.6", "float32", 20, "decode", T) for T in (64, 4096)],
    *[("v4", "glm-4.6", wide, 20, "decode", 64) for wide in ("bfloat16", "float8_e4m3fn")],
    *[(d, "glm-4.6", "bfloat16", 20, "train", 4096) for d in ("v5e", "v5p", "v6e")],
    ("v5p", "glm-4.5-air", "bfloat16", 16, "train", 4096),
]
FOR = {"triton": TRITON, "mosaic": MOSAIC, "megablox": MEGABLOX}
CASES = [(kernels, *case) for kernels, cases in FOR.items() for case in cases]


def compiled(kernels: str, device: str, model: str, form: str, E: int, step: str, T: int) -> dict:
    """One case, in this process, which sets where XLA writes its PTX before jax starts."""
    dump = tempfile.mkdtemp()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_emitter_re=.*"
    os.environ.update(MOSAIC_GPU_DUMP_TO=dump, MOSAIC_GPU_DUMP_PTX="1")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # what is not compiled leaves no PTX
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp
    import numpy as np

    from glm_jax.config import preset
    from glm_jax.kernels import routed_experts
    from glm_jax.targets import SLICES, chip, topology

    on_gpu = chip(device).platform == "cuda"
    c, kind, L = preset(model), chip(device).kind, 4 if step == "decode" else 1
    F, D = c.moe_intermediate_size, c.hidden_size
    activations = jnp.float8_e4m3fn if form == "fp8 activations" else None
    wide = "float8_e4m3fn" if activations is not None else form
    states = "float32" if wide == "float32" else "bfloat16"
    single = "1" if on_gpu else "x".join(["2", "2", "1"][: SLICES[device][0]])
    mesh = jax.sharding.Mesh(np.array(topology(f"{device}:{single}"))[:1], ("x",))
    array = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, jax.P()))
    x, ids, share = array(states, T, D), array("int32", T, 8), array("float32", T, 8)
    weights = array(wide, L, E, 2, F, D), array(wide, L, E, D, F)
    scales = (array("float32", L, E, 2, F), array("float32", L, E, D)) if jnp.dtype(wide).itemsize == 1 else None

    def experts(x, ids, share, gate_up, down, scales, i):
        n = c.n_routed_experts
        return routed_experts(x, ids, share, gate_up, down, i, x.dtype, scales, kernels, kind, n, activations)

    def decode(x, ids, share, gate_up, down, scales):
        body = lambda x, i: (x + experts(x, ids, share, gate_up, down, scales, i), None)
        return jax.lax.scan(body, x, jnp.arange(L, dtype=jnp.int32))[0]

    def loss(x, share, gate_up, down, ids, scales):
        return experts(x, ids, share, gate_up, down, scales, jnp.int32(0)).astype(jnp.float32).sum()

    if step == "decode":
        traced = jax.jit(decode).trace(x, ids, share, *weights, scales)
    else:
        of = (0, 1) if scales else (0, 1, 2, 3)
        traced = jax.jit(jax.grad(loss, of)).trace(x, share, *weights, ids, scales)
    # The lowerings of newer jax ask what the device is.
    here = jax.sharding.AbstractMesh((), (), abstract_device=mesh.abstract_mesh.abstract_device)
    with jax.sharding.use_abstract_mesh(here):
        program = traced.lower(lowering_platforms=(chip(device).platform,)).compile()
    found = {} if on_gpu else on_chip(program.as_text())
    for file in sorted(glob.glob(f"{dump}/*.ptx")):
        text = Path(file).read_text()
        for entry in re.findall(r"\.entry (glm_\w+)", text):
            name = entry.removesuffix("_mosaic_gpu_kernel")
            if (n := sum(other.split("__")[0] == name for other in found)) and entry != name:
                name = f"{name}__{n}"  # Triton's have numbers of their own
            found[name] = assembled(text)
    used = program.memory_analysis()
    assert used is not None
    case = dict(zip(FIELDS, (kernels, device, model, form, E, step, T), strict=True))
    return case | {"compiled": found, "temporary_bytes": used.temp_size_in_bytes}


def assembled(ptx: str) -> dict:
    """What ptxas says of a kernel, and the kinds of matrix instruction in it."""
    import nvidia  # a namespace that the CUDA wheels share

    ptxas = next(p for root in nvidia.__path__ for p in glob.glob(f"{root}/*/bin/ptxas"))
    arch = next(iter(re.findall(r"\.target (\w+)", ptx)))
    argv = [ptxas, "-v", f"-arch={arch}", "-o", os.devnull, "-"]
    done = subprocess.run(argv, input=ptx, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    number = lambda pattern: sum(map(int, re.findall(pattern, said)))
    kinds = {kind for kind in ("wgmma.mma", "tcgen05.mma", "mma.sync") if re.search(rf"\b{re.escape(kind)}", ptx)}
    return {
        "arch": arch,
        "registers": number(r"Used (\d+) registers"),
        "spilt": number(r"(\d+) bytes spill"),
        "mma": sorted(kind.split(".")[0] for kind in kinds),
    }


def on_chip(hlo: str) -> dict:
    """The bytes of VMEM that each kernel on a TPU uses: blocks that come and go, sums, and what is spilt."""
    kernels: dict = {}
    for line in (line for line in hlo.splitlines() if 'custom_call_target="tpu_custom_call"' in line):
        (name,) = re.findall(r'op_name="[^"]*\b(glm_\w+)[^"]*"', line)
        same = sum(n.split("__")[0] == name for n in kernels)
        # Up to where, and from where on: before it may lie arrays that XLA keeps there.
        place = r'_memory_configs":\[\{"memory_space":"1","offset":"(\d+)","size":"(\d+)"'
        ((start, _),), ((_, end),) = (re.findall(f'"{key}{place}', line) for key in ("scoped", "used_scoped"))
        kernels[f"{name}__{same}" if same else name] = {"vmem": int(end) - int(start)}
    return kernels


GPU_HEADINGS, TPU_HEADINGS = ["registers", "bytes spilt", "instructions"], ["VMEM MiB"]


def is_tpu(line: dict) -> bool:
    return any("vmem" in kernel for kernel in line["compiled"].values())


def rows(line: dict) -> list[str]:
    """The table's rows of a case."""
    head = [str(line[f]) for f in FIELDS]
    if is_tpu(line):
        said = lambda k: [f"{k['vmem'] / 2**20:.1f}"]
    else:
        said = lambda k: [str(k["registers"]), str(k["spilt"]), " ".join(k["mma"])]
    return [
        "| " + " | ".join([*head, name, *said(k)]) + f" | {line['temporary_bytes'] / 2**20:,.0f} |"
        for name, k in line["compiled"].items()
    ]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="the cases whose line has this text in it")
    p.add_argument("--table", action="store_true", help="compile nothing")
    p.add_argument(
        "--case", nargs=len(FIELDS), metavar=tuple(f.upper() for f in FIELDS), help="one case, its line to stdout"
    )
    args = p.parse_args()
    if args.case:
        kernels, device, model, weights, experts, step, tokens = args.case
        print(json.dumps(compiled(kernels, device, model, weights, int(experts), step, int(tokens))))
        return 0
    from compile_table import versions

    failed = 0
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    last = {tuple(line[f] for f in FIELDS): line for line in lines}
    for case in CASES:
        if args.table or args.only not in " ".join(map(str, case)):
            continue
        argv = [sys.executable, __file__, "--case", *map(str, case)]
        made = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
        if made.returncode:
            failed += 1
            print(*case, "failed:", *made.stderr.strip().splitlines()[-1:], file=sys.stderr, flush=True)
            continue
        last[case] = json.loads(made.stdout.strip().splitlines()[-1]) | versions()
        print(*rows(last[case]), sep="\n", file=sys.stderr, flush=True)
        RESULTS.write_text("".join(json.dumps(last[case]) + "\n" for case in CASES if case in last))
    shown = [last[case] for case in CASES if case in last and args.only in " ".join(map(str, case))]
    for tpu, own in ((False, GPU_HEADINGS), (True, TPU_HEADINGS)):
        headings = [*FIELDS, "kernel", *own, "temporaries MiB"]
        print("| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
        for line in shown:
            if is_tpu(line) == tpu:
                print(*rows(line), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
