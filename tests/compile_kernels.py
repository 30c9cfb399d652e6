"""What the compilers for GPUs make of the kernels, without a GPU: a JSON line a kernel, of registers, bytes spilt and
kinds of matrix instruction. A process of its own, since the dump is set before jax starts.

    PYTHONPATH=. python tests/compile_kernels.py h100 glm-4.6 bfloat16 1 8 64 1024 16384 [--experts 20] [--train]"""

import argparse
import glob
import json
import os
import re
import subprocess
import sys
import tempfile

DUMP = tempfile.mkdtemp()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_dump_to={DUMP} --xla_dump_emitter_re=.*"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from glm_jax.config import preset  # noqa: E402
from glm_jax.kernels import routed_experts  # noqa: E402
from glm_jax.targets import chip, topology  # noqa: E402


def ptxas() -> str:
    import nvidia

    (found,) = [p for root in nvidia.__path__ for p in glob.glob(f"{root}/*/bin/ptxas")][:1]
    return found


def report(kernel: str, ptx: str) -> dict:
    arch = re.search(r"\.target (\w+)", ptx).group(1)
    done = subprocess.run(
        [ptxas(), "-v", f"-arch={arch}", "-o", os.devnull, "-"], input=ptx, capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    number = lambda pattern, text: sum(map(int, re.findall(pattern, text)))
    return {
        "kernel": kernel,
        "arch": arch,
        "registers": number(r"Used (\d+) registers", said),
        "spilt": number(r"(\d+) bytes spill", said),
        "mma": sorted(
            set(re.findall(r"(wgmma|tcgen05)\.mma|(?<=\s)(mma)\.sync", ptx))
            and {next(filter(None, m)) for m in re.findall(r"(wgmma|tcgen05)\.mma|(?<=\s)(mma)\.sync", ptx)}
        ),
    }


def shape(*dims, dtype, sharding):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("model")
    parser.add_argument("weights", choices=["bfloat16", "float8_e4m3fn", "float32"])
    parser.add_argument("tokens", type=int, nargs="+")
    parser.add_argument("--experts", type=int, help="of this device")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--train", action="store_true")
    args = parser.parse_args()
    c, kind = preset(args.model), chip(args.device).kind
    E, F, D, L = args.experts or c.n_routed_experts, c.moe_intermediate_size, c.hidden_size, args.layers
    mesh = jax.sharding.Mesh(np.array(topology(f"{args.device}:1")), ("x",))
    put = jax.NamedSharding(mesh, jax.P())
    weights = jnp.dtype(args.weights)
    x = jnp.dtype("float32" if args.weights == "float32" else "bfloat16")
    one = lambda *dims, dtype: shape(*dims, dtype=dtype, sharding=put)
    for T in args.tokens:
        for file in glob.glob(f"{DUMP}/*"):
            os.remove(file)
        call = [one(T, D, dtype=x), one(T, 8, dtype="int32"), one(T, 8, dtype="float32")]
        stack = [one(L, E, 2, F, D, dtype=weights), one(L, E, D, F, dtype=weights)]
        scales = ([one(L, E, 2, F, dtype="float32"), one(L, E, D, dtype="float32")],) if weights.itemsize == 1 else ()

        def layer(x, ids, share, gate_up, down, i, *scales):
            return routed_experts(
                x,
                ids,
                share,
                gate_up,
                down,
                i,
                x.dtype,
                *scales,
                implementation="triton",
                device=kind,  # noqa: B023
            )

        def step(x, ids, share, gate_up, down, *scales):
            body = lambda x, i: (x + layer(x, ids, share, gate_up, down, i, *map(tuple, scales)), None)
            return jax.lax.scan(body, x, jnp.arange(L, dtype=jnp.int32))[0]

        def loss(x, share, gate_up, down, ids):
            return layer(x, ids, share, gate_up, down, jnp.int32(0)).astype(jnp.float32).sum()

        if args.train:
            run = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
            call = [call[0], call[2], *[one(1, *w.shape[1:], dtype=w.dtype) for w in stack], call[1]]
        else:
            run, call = jax.jit(step), [*call, *stack, *scales]
        program = run.trace(*call).lower(lowering_platforms=("cuda",)).compile()
        found: dict = {}
        for file in sorted(glob.glob(f"{DUMP}/*.ptx")):
            for entry in re.findall(r"\.entry (glm_\w+)", text := open(file).read()):
                found.setdefault(entry, report(entry, text))
        for kernel in found.values():
            print(json.dumps({"tokens": T} | kernel), flush=True)
        memory = program.memory_analysis()
        print(json.dumps({"tokens": T, "temporary_bytes": memory.temp_size_in_bytes}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
