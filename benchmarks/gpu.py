"""Everything that only an accelerator can show, in one command: checks first, then speed.

    PYTHONPATH=. python benchmarks/gpu.py            # on a GPU or TPU
    PYTHONPATH=. python benchmarks/gpu.py --dry      # the same at toy sizes on any machine, nothing written

Checks: the stored logits of transformers, the demo's greedy text against this machine's CPU, and the routed experts
against float64, by every path of kernels that runs here. Speed: prompts and generation with the first layers of
GLM-4.5-Air, random weights made on the device, and the routed experts of one layer of GLM-4.6 (experts_gpu.py), which
take what `--minutes` leave. Every number is printed as it is
measured; at the end one JSON line goes to benchmarks/results/gpu.jsonl. A check that fails is a number too: exit code
1, and the rest still runs."""

import argparse
import dataclasses
import functools
import json
import os
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch, in a process of its own, needs memory too

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from experts_gpu import (  # noqa: E402
    BF16,
    FP8,
    OURS,
    experts_speed,
    implementation,
    layers,
    random_weights,
    why_not,
)

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


def in_float64(tokens, x, ids, share, gate_up, down, layer, scales, activations) -> np.ndarray:
    """The routed experts' answers to some tokens, of which an expert at a time leaves the device."""
    rounded = lambda rows: rows if activations is None else in_fp8(rows)
    wide = lambda a: np.asarray(a).astype(np.float64)
    x, ids, share = rounded(wide(x[tokens])), np.asarray(ids)[tokens], wide(share)[tokens]
    out = np.zeros((len(tokens), x.shape[1]))
    for e in np.unique(ids):
        w, v = (wide(a[layer, e]) for a in (gate_up, down))
        if scales:
            w, v = (a * wide(s[layer, e])[..., None] for a, s in zip((w, v), scales, strict=True))
        at, choice = np.nonzero(ids == e)
        gate, up = x[at] @ w[0].T, x[at] @ w[1].T
        out[at] += share[at, choice, None] * (rounded(gate / (1 + np.exp(-gate)) * up) @ v.T)
    return out


def in_fp8(rows: np.ndarray) -> np.ndarray:
    """Rows of bfloat16 numbers, each rounded to e4m3 with the row's largest magnitude at 448."""
    rows = rows.astype(jnp.bfloat16).astype(np.float32)
    most = np.abs(rows).max(-1, keepdims=True)
    scale = np.where(most > 0, most / np.float32(448), np.float32(1))
    return (rows / scale).astype(jnp.float8_e4m3fn).astype(np.float64) * scale


def experts_case(T, among, k, D, dtype):
    """Tokens, ids of the experts `among`, shares."""
    rng = np.random.default_rng(T)
    ids = among[np.argsort(rng.random((T, len(among))), 1)[:, :k]].astype(np.int32)
    share = rng.uniform(0.5, 1.5, (T, k)).astype(np.float32) / k
    return jax.random.normal(jax.random.key(T), (T, D), dtype), jnp.asarray(ids), jnp.asarray(share)


def far(got, want) -> float:
    """The root mean square of the error, in standard deviations."""
    got, want = (np.asarray(a).astype(np.float64) for a in (got, want))
    return float(np.sqrt(((got - want) ** 2).mean()) / want.std())


def experts_error(dry: bool) -> dict:
    """The error of the routed experts against float64, of up to 16 tokens; whether they are the same bits twice; and
    the error of their gradients against float32's. By each path that runs here: "forward" is Triton's kernels, or what
    there is; "w8a8" is held to a float64 that rounds rows as it does."""
    E, F, D = (4, 64, 64) if dry else (20, 1536, 5120)
    # Of "w8a8": a sum that is 3e-4 away may give another e4m3 number, up to an eighth away: 7e-3 in all, and of XLA's,
    # which widens to bfloat16, 2e-2. Rows that were not rounded would be 4.4e-2 away.
    bound = {"float32": 3e-6, BF16: 5e-3, FP8: 5e-3, "w8a8": 3e-2}
    every = np.arange(E)
    cases = [(dtype, T, (1, E), every, 0) for dtype in ("float32", BF16) for T in (1, 7, 150)]
    if dry:
        cases += [(FP8, 7, (2, E), every[1:], 1)]
    else:
        # The last: of 160 experts' stacks those that stand past 2^31 numbers, and past 2^32.
        cases += [(BF16, 3000, (1, E), every, 0), (FP8, 1, (1, E), every, 0), (FP8, 150, (1, E), every, 0)]
        cases += [(FP8, T, (layers(1, FP8), 160), np.arange(137, 160), layer) for layer in (1, 3) for T in (1, 150)]
    run = jax.jit(routed_experts, static_argnames=("dtype", "implementation", "activations"))
    errors, bounds, same, kind, held = {}, {}, {}, None, None
    for dtype, T, stack, among, layer in cases:
        if kind != (kind := (*stack, F, D, dtype)):
            held = None  # freed before others are made
            held = random_weights(*kind)
        gate_up, down, scales = held
        states = jnp.dtype("float32" if dtype == "float32" else BF16)
        x, ids, share = experts_case(T, among, min(8, len(among) - 1), D, states)
        some = np.unique(np.linspace(0, T - 1, 16).astype(int))
        want = functools.cache(
            lambda *rounded: in_float64(some, x, ids, share, gate_up, down, layer, scales, *rounded)  # noqa: B023
        )
        for what in paths(dtype, T, dry):
            activations = OURS[what][2]
            how = "auto" if dtype == "float32" or why_not(what) else OURS[what][1] or implementation()
            options = {"dtype": jnp.dtype("float32"), "implementation": how}
            options["activations"] = activations and jnp.dtype(activations)
            ours = [np.asarray(run(x, ids, share, gate_up, down, layer, scales=scales, **options)) for _ in range(2)]
            name = f"{what} {dtype} T={T}"
            name += f" layer {layer} experts {among[0]} to {among[-1]}" if stack[0] > 1 else ""
            errors[name] = far(ours[0][some], want(activations))
            bounds[name] = bound["w8a8" if activations else dtype]
            same[name] = bool(np.array_equal(*ours))
    found = {what: gradients_error(dry, what) for what in ("backward", "mosaic back") if not why_not(what)}
    gradients = {what: errors for what, (errors, _) in found.items()}
    same |= {what: twice for what, (_, twice) in found.items()}
    worst = max(error for errors in gradients.values() for error in errors.values())
    return {
        "implementation": implementation(),
        "errors": errors,
        "bounds": bound,
        "same_bits": same,
        "gradients": gradients,
        "not_here": {what: why_not(what) for what in ("mosaic", "w8a8", "mosaic back") if why_not(what)},
        "ok": all(error < bounds[name] for name, error in errors.items()) and all(same.values()) and worst < 1e-2,
    }


def paths(dtype: str, T: int, dry: bool) -> list[str]:
    """What multiplies such weights here; on a dry run "w8a8" is XLA's, so that its reference is tried."""
    if dtype == "float32":
        return ["forward"]
    able = [what for what in ("forward", "mosaic", "w8a8") if not why_not(what) or (dry and what == "w8a8")]
    return [what for what in able if what != "w8a8" or (dtype == FP8 and T > 1)]


def gradients_error(dry: bool, what: str) -> tuple[dict, bool]:
    """The error of the gradients in bfloat16, against all experts for all tokens in float32, and whether they are the
    same bits twice."""
    T, E, F, D, k = (9, 4, 64, 64, 2) if dry else (200, 5, 256, 512, 2)
    how = OURS[what][1] or implementation()
    gate_up, down, _ = random_weights(1, E, F, D, BF16)
    x, ids, share = experts_case(T, np.arange(E - 1), k, D, jnp.bfloat16)  # nobody chooses the last expert
    pull = jax.random.normal(jax.random.key(9), (T, D))

    def dense(x, share, gate_up, down):
        product = functools.partial(jnp.einsum, precision="highest")
        h = product("td,ecfd->tecf", x, gate_up[0])
        y = product("tef,edf->ted", jax.nn.silu(h[:, :, 0]) * h[:, :, 1], down[0])
        return (product("ted,tke,tk->td", y, jax.nn.one_hot(ids, E), share) * pull).sum()

    def ours(x, share, gate_up, down):
        return (routed_experts(x, ids, share, gate_up, down, implementation=how) * pull).sum()

    args = x, share, gate_up, down
    wide = [a.astype(jnp.float32) for a in args]
    run = jax.jit(jax.grad(ours, (0, 1, 2, 3)))
    got, again, want = run(*args), run(*args), jax.jit(jax.grad(dense, (0, 1, 2, 3)))(*wide)
    names = "x", "share", "gate_up", "down"
    same = all(np.array_equal(*map(np.asarray, pair)) for pair in zip(got, again, strict=True))
    return {name: far(g, w) for name, g, w in zip(names, got, want, strict=True)}, same


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
    for batch in (1,) if dry else (1, 8, 32):
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


# The last takes what time is left, and attaches to the driver what may slow down others.
PARTS = (golden_logits, demo_text, experts_error, model_speed, experts_speed)
LEAST = 1  # minute of experts_speed, however long the others took


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="toy sizes, on any machine; writes nothing")
    parser.add_argument(
        "--only", choices=[p.__name__ for p in PARTS], action="append", help="this part; may be repeated"
    )
    parser.add_argument("--minutes", type=float, default=9, help="of all parts, about so many at most (9)")
    args = parser.parse_args(argv)
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
    failed, begin = False, time.monotonic()
    for part in PARTS:
        if args.only and part.__name__ not in args.only:
            continue
        start = time.perf_counter()
        try:
            left = max(LEAST, args.minutes - (time.monotonic() - begin) / 60)
            found = part(args.dry, left) if part is experts_speed else part(args.dry)
        except Exception as error:  # the other parts still count
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
