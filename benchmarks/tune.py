"""The fastest tiles of the experts' kernels on this GPU, into glm_jax/kernels/measured/KIND.json, where kernels look.

    PYTHONPATH=. python benchmarks/tune.py --minutes 8     # the same again goes on where it stopped
    PYTHONPATH=. python benchmarks/tune.py --only "mosaic gate_up" --again
    PYTHONPATH=. python benchmarks/tune.py --dry           # toy sizes on a CPU, Triton's kernels interpreted

A bucket is a kernel, through Triton or Mosaic, a matrix of GLM-4.6 or GLM-4.5-Air, its weights' numbers and an expert's
mean rows. Experts are those of one device of eight, routing is uniform. Tiles are compiled on all of the host's cores;
what does not compile, or gives other numbers than the rule's tile, is out. A time is experts_gpu.py's: a loop on the
device over stacked layers, so that nothing is in its cache. All tiles are timed for some 30 ms, the fastest and the
rule's once more for longer; a tile that is not 1 % faster than the rule's does not go before it.

An entry has the tile, its milliseconds, the rule's tile and its, and the least that the device's own memory and
multiplication allow. The file is written anew after every bucket, as a whole or not at all. Of Mosaic's a tile is [n,
k, stages]: heights are by rule, in glm_jax/kernels/mosaic.py, since a pass has one for all its kernels."""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from experts_gpu import BF16, FP8, HUGE, ceilings, random_routing, random_weights, timed, why_not  # noqa: E402
from experts_gpu import DRY as TOY  # noqa: E402
from experts_gpu import FULL as SIZES  # noqa: E402

from glm_jax.config import preset  # noqa: E402
from glm_jax.kernels import choice, mosaic, tiles, triton  # noqa: E402
from glm_jax.kernels.routing import by_expert, quantised  # noqa: E402

LAYERS = 4  # of an eighth of all experts: more than the cache holds, and fewer than 2^31 numbers
EP = 8
MATTERS = 0.99  # of the rule's time: what is above is noise


class Model(NamedTuple):
    """Experts, those of a token, their width and that of a token."""

    E: int
    k: int
    F: int
    D: int


class Bucket(NamedTuple):
    """What a tile is found for; `which` of the model's matmuls says which matrix it is, and which way it is read."""

    kernels: str
    kernel: str
    which: str  # up, down; back through them; the gradient of them
    weights: str
    states: str
    rows: float
    N: int
    K: int
    model: Model

    @property
    def key(self) -> dict:
        """What an entry of the file is known by."""
        names = ("kernels", "kernel", "weights", "states", "rows", "N", "K")
        return {name: getattr(self, name) for name in names} | {"axis": 0 if self.which.startswith("back") else 1}

    def __str__(self):
        return (
            f"{self.kernels} {self.kernel} ({self.which}) {self.weights} by {self.states} [{self.N}, {self.K}], "
            f"{self.rows:g} rows"
        )


class Case(NamedTuple):
    """A bucket's arrays; `run(arrays, tiles, tile)`, which multiplies them; the shape of what it makes, in bfloat16; of
    that the rows that are defined (None: all); and the least bytes and FLOP of it."""

    arrays: dict
    run: Callable
    shape: tuple
    mine: Any
    gb: float
    gflop: float


# ---- what there is to measure


def plan(models: list[Model], rows: Iterable[float], fp8: str) -> list[Bucket]:
    """All buckets, in order of importance; those of the same weights stand together. `fp8` is what FP8 weights are
    here: bytes, where compilers know no such numbers."""
    found = []
    for model, back, weights, kernels in itertools.product(models, (False, True), (BF16, fp8), ("triton", "mosaic")):
        F, D, states = model.F, model.D, [BF16]
        if back:
            parts = [("matmul", "back through down", F, D), ("matmul", "back through up", D, 2 * F)]
            if weights == BF16:
                parts += [("outer", "gradient of up", 2 * F, D), ("outer", "gradient of down", D, F)]
        else:
            parts = [("gate_up", "up", 2 * F, D), ("matmul", "down", D, F)]
            states += [FP8] if weights == FP8 and kernels == "mosaic" else []
        found += [
            Bucket(kernels, kernel, which, weights, state, mean, N, K, model)
            for state in states
            for mean in rows
            for kernel, which, N, K in parts
            if not back or mean >= 12  # of a step of training an expert has many
        ]
    return found


def candidates(bucket: Bucket, shared: int) -> list:
    """Tiles to try, the rule's first."""
    _, kernel, _, weights, states, mean, N, K, _ = bucket
    if bucket.kernels == "mosaic":
        height, *first = rule(bucket, shared)[:4]
        ok = lambda sizes: mosaic.fits(kernel, list(sizes), height, N, K, states, weights)
        found = [sizes for sizes in itertools.product((64, 128), (64, 128, 256), (2, 3, 4, 6, 8)) if ok(sizes)]
        return list(dict.fromkeys([tuple(first), *found]))
    first = dataclasses.astuple(rule(bucket, shared))
    heights = (first[0] // 2, first[0]) if kernel == "outer" or mean > first[0] else (first[0],)
    found = []
    for m in heights:
        low = m <= 32
        of_sums = lambda n, warps: m * n * (2 if kernel == "gate_up" else 1) / (32 * warps)  # noqa: B023
        found += [
            (m, n, k, warps, stages)
            for n in ((32, 64, 128) if low else (64, 128, 256))
            for k in ((64, 128, 256) if low else (32, 64, 128))
            for warps in (4, 8)
            for stages in ((3, 4, 5) if low else (2, 3, 4))
            # Sums of up to half a thread's registers; at least one matrix instruction a warp.
            if 4 <= of_sums(n, warps) <= 128 and n >= 8 * warps
        ]
    ok = lambda sizes: tiles.fits(kernel, list(sizes), shared, N, K, states, weights)
    return list(dict.fromkeys([first, *filter(ok, found)]))


def rule(bucket: Bucket, shared: int) -> Any:
    """The tile that its kernels take where none was measured."""
    _, kernel, which, weights, states, mean, N, K, _ = bucket
    if bucket.kernels == "mosaic":
        train = which not in ("up", "down")
        return mosaic.rule(kernel, cores(), mean, N, K, states, weights, train)
    return tiles.rule(kernel, shared, mean, N, K, states, weights)


def cores() -> int:
    return choice.cores(jax.devices()[0].device_kind)


def made_of(bucket: Bucket, sizes: tuple, shared: int) -> Any:
    """The tile that a candidate stands for."""
    if bucket.kernels == "mosaic":
        n, k, stages = sizes
        return rule(bucket, shared)._replace(n=n, k=k, stages=stages)
    return triton.Tile(*sizes)


# ---- a bucket's arrays, and its kernel


def case_of(bucket: Bucket, shared: int, held: dict) -> Case:
    """`held` has the weights of the last bucket, by what they are."""
    kernels, kernel, which, weights, states, mean, N, K, model = bucket
    local, T = model.E // EP, max(1, round(mean * model.E / model.k))
    M, by_triton, forward, fp8 = T * model.k, kernels == "triton", which in ("up", "down"), weights != BF16
    if (kind := (LAYERS, local, model.F, model.D, FP8 if fp8 else BF16)) not in held:
        held.clear()
        held[kind] = random_weights(*kind)
    ids, share = random_routing(model.E, model.k, T, EP, "uniform")
    order, place, sizes = jax.jit(by_expert, static_argnums=1)(ids[0], local)
    live, active = int(sizes.sum()), int((sizes > 0).sum())
    there = (jnp.arange(M) < live)[:, None]
    if not by_triton:
        order = jax.jit(mosaic.spaced, static_argnums=3)(order, place, sizes, rule(bucket, shared).m)[0]
        there = (order < M)[:, None]
    token = jnp.minimum(order, M - 1) // model.k
    arrays: dict = {"sizes": sizes, "order": order, "place": place, "token": token}
    normal = lambda seed, rows, width: jax.random.normal(jax.random.key(seed), (rows, width), BF16)
    of_choices = lambda seed, width: jnp.where(there, normal(seed, len(order), width), 0)
    # Triton's kernels look tokens up themselves; Mosaic's find them in their place.
    of_tokens = lambda seed, width: normal(seed, T, width) if by_triton else of_choices(seed, width)
    made_gb = 2 * live * (N // 2 if kernel == "gate_up" else N) / 1e9
    gflop, read_gb = 2 * live * N * K / 1e9, live * K * (1 if states == FP8 else 2) / 1e9

    if kernel == "outer":
        of_up = which == "gradient of up"
        arrays["a"], arrays["b"] = (of_choices(2, N), of_tokens(3, K)) if of_up else (of_tokens(2, N), of_choices(3, K))

        def outer(has, made, tile):
            sources = {"source_b" if of_up else "source_a": has["token"]} if by_triton else {}
            return (triton if by_triton else mosaic).outer(has["a"], has["b"], has["sizes"], tile, **sources)

        return Case(arrays, outer, (local, N, K), None, 2 * local * N * K / 1e9 + read_gb + made_gb, gflop)

    at = 0 if which in ("up", "back through up") else 1
    w, scales = held[kind][at], held[kind][2]
    w = w.reshape(LAYERS * local, -1, w.shape[-1])
    arrays["w"] = jax.lax.bitcast_convert_type(w, jnp.uint8) if weights == "uint8" else w
    if forward and scales:
        arrays["scales"] = scales[at].reshape(LAYERS * local, -1)
    x = of_tokens(2, K) if which in ("up", "back through down") else of_choices(2, K)
    arrays["x"] = jax.jit(quantised)(x) if states == FP8 else x
    if which == "down":
        arrays["share"] = share.reshape(-1)

    def multiply(has, made, tile):
        x, w, scales = has["x"], has["w"], has.get("scales")
        if kernel == "gate_up" and by_triton:
            return triton.gate_up(x, has["token"], w, scales, made, tile)[0]
        if kernel == "gate_up":
            return mosaic.gate_up(x, None, w, scales, made, tile, dtype=jnp.bfloat16)[0]
        if not by_triton:
            return mosaic.matmul(x, w, scales, made, tile, axis=int(forward), dtype=jnp.bfloat16)
        if which == "back through down":
            return triton.matmul(x, w, None, made, tile, axis=0, source=has["token"])
        choices = has["order"], has["place"]
        return triton.matmul(x, w, scales, made, tile, axis=int(forward), choices=choices, share=has.get("share"))

    if by_triton and which in ("down", "back through up"):
        there = (ids[0].reshape(-1) >= 0)[:, None]
    shape = len(order), N // 2 if kernel == "gate_up" else N
    return Case(arrays, multiply, shape, there, active * N * K * w.dtype.itemsize / 1e9 + read_gb + made_gb, gflop)


def looped(case: Case, bucket: Bucket, tile: Any, n: int) -> Any:
    """n turns of a case, its layers in turn, of which XLA can take none out."""
    module = triton if bucket.kernels == "triton" else mosaic
    local = bucket.model.E // EP
    M = case.arrays["place"].shape[0]

    def loop(arrays):
        tiles_made = module.tiles_of(arrays["sizes"], M, tile.m, 0)

        def turn(i, y):
            more = (y[(0,) * y.ndim] > HUGE).astype(jnp.int32)
            matrix = tiles_made.matrix + (i + more) % LAYERS * local
            has = arrays | {"sizes": arrays["sizes"] + more}
            return case.run(has, dataclasses.replace(tiles_made, matrix=matrix), tile)

        return jax.lax.fori_loop(0, n, turn, jnp.zeros(case.shape, jnp.bfloat16))

    return jax.jit(loop)


@jax.jit
def distance(got, want, mine) -> Any:
    """The root mean square of the error over that of what is wanted, of the rows that are defined."""
    take = lambda a: (a if mine is None else jnp.where(mine, a, 0)).astype(jnp.float32)
    got, want = take(got), take(want)
    return jnp.sqrt(jnp.square(got - want).mean() / jnp.square(want).mean())


# ---- the search


def best_of(bucket: Bucket, shared: int, ceiling: dict, held: dict, most: int | None) -> dict:
    """A bucket's entry: its candidates (or the first `most`) compiled, checked against the rule's tile, and timed."""
    case = case_of(bucket, shared, held)
    flop_s = ceiling["fp8_flop_s" if bucket.states == FP8 else "flop_s"]
    floor = 1e3 * max(case.gb * 1e9 / ceiling["bytes_s"], case.gflop * 1e9 / flop_s)
    n = LAYERS * (1 if most else min(64, max(1, round(8 / floor / LAYERS))))
    tried = candidates(bucket, shared)[:most]
    start = time.monotonic()

    def compiled(sizes):
        try:
            return looped(case, bucket, made_of(bucket, sizes, shared), n).lower(case.arrays).compile()
        except Exception as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            programs = dict(zip(tried, pool.map(compiled, tried), strict=True))
        except BaseException:  # an interrupt does not wait for those that have not begun
            pool.shutdown(cancel_futures=True)
            raise
    seconds, out = time.monotonic() - start, Counter()
    want, quick = None, {}
    for sizes, program in programs.items():
        try:
            if isinstance(program, Exception):
                raise program
            y = program(case.arrays)
            want = y if want is None else want
            if not (far := float(distance(y, want, case.mine))) < 1e-2:
                raise ArithmeticError(f"{far:.2g} away from the others' numbers")
            quick[sizes] = timed(functools.partial(program, case.arrays), n, 0)["ms"]
        except Exception as error:
            out[" ".join(f"{type(error).__name__}: {error}".split())[:100]] += 1
    for reason, times in out.items():
        print(f"    {times} out: {reason}", flush=True)
    if not quick:
        raise RuntimeError("none of the tiles runs")
    first = tried[0]
    finalists = dict.fromkeys([*([first] if first in quick else []), *sorted(quick, key=quick.__getitem__)[:3]])
    ms = {sizes: timed(functools.partial(programs[sizes], case.arrays), n, 0.2)["ms"] for sizes in finalists}
    best = min(ms, key=ms.__getitem__)
    if first in ms and ms[best] > MATTERS * ms[first]:
        best = first
    short = lambda a: None if a is None else float(f"{a:.4g}")
    entry = bucket.key | ({"height": rule(bucket, shared).m} if bucket.kernels == "mosaic" else {})
    return entry | {
        "tile": list(best),
        "ms": short(ms[best]),
        "rule": list(first),
        "rule_ms": short(ms.get(first)),
        "floor_ms": short(floor),
        "tried": len(tried),
        "out": sum(out.values()),
        "s": round(time.monotonic() - start, 1),
        "compile_s": round(seconds, 1),
    }


def tuned(file: Path, buckets: list[Bucket], measure: Callable, again: bool, end: float) -> list[Bucket]:
    """Puts what `measure` says of each bucket into a file that is there or not, until the time `end`; buckets that it
    has already only if `again`. Those that were left, for want of time or with an error, are given back."""
    known = json.loads(file.read_text()) if file.exists() else []
    same = lambda bucket, entry: bucket.key.items() <= entry.items()
    left = []
    for number, bucket in enumerate(buckets, 1):
        if not again and any(same(bucket, entry) for entry in known):
            continue
        if time.monotonic() > end:
            left.append(bucket)
            continue
        print(f"{number}/{len(buckets)} {bucket}", flush=True)
        try:
            entry = measure(bucket)
        except Exception as error:  # the other buckets still count
            print("    " + " ".join(f"none: {type(error).__name__}: {error}".split())[:300], flush=True)
            left.append(bucket)
            continue
        known = [e for e in known if not same(bucket, e)] + [entry]
        write(file, known)
    return left


def write(file: Path, entries: list[dict]) -> None:
    """One entry a line; a reader sees the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    order = ("kernels", "kernel", "weights", "states", "N", "K", "rows")
    lines = map(json.dumps, sorted(entries, key=lambda e: [e[name] for name in order]))
    part = file.with_suffix(".part")
    part.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    part.replace(file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the buckets whose line has this text in it")
    parser.add_argument("--minutes", type=float, default=8, help="no bucket is begun after (8)")
    parser.add_argument("--again", action="store_true", help="those too that the file has")
    parser.add_argument("--dry", action="store_true", help="toy sizes, interpreted, into a temporary file")
    args = parser.parse_args(argv)
    end, device = time.monotonic() + 60 * args.minutes, jax.devices()[0]
    kind = device.device_kind
    if args.dry:
        triton.INTERPRET = True
    elif choice.capability(kind) is None:
        parser.error("this machine has no NVIDIA GPU that jax sees; --dry runs everything at toy sizes")
    known = args.dry or (choice.capability(kind) or (0, 0)) >= (8, 9)
    models = [Model(16, 2, 32, 64)] if args.dry else [model_of("glm-4.6"), model_of("glm-4.5-air")]
    rows = (12,) if args.dry else (3, 200, 50, 12, 0.4, 800)
    assert set(rows) <= set(tiles.ROWS)
    shared = choice.shared_memory(kind)
    buckets = [b for b in plan(models, rows, FP8 if known else "uint8") if args.only in str(b)]
    if reason := why_not("mosaic"):
        print(f"mosaic, {sum(b.kernels == 'mosaic' for b in buckets)} buckets, none: {reason}", flush=True)
        buckets = [b for b in buckets if b.kernels != "mosaic"]
    ceiling = ceilings(TOY if args.dry else SIZES)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    held: dict = {}

    def measure(bucket: Bucket) -> dict:
        found = best_of(bucket, shared, ceiling, held, 2 if args.dry else None)
        gain = f"{found['rule_ms'] / found['ms']:.2f} times as fast as" if found["rule_ms"] else "in the place of"
        print(
            f"    {found['tile']} {found['ms']:.4g} ms, {found['floor_ms'] / found['ms']:.0%} of the floor, {gain} the "
            f"rule's {found['rule']}; {found['tried']} tiles in {found['s']:.0f} s",
            flush=True,
        )
        return found | {"commit": commit, "jax": version("jax"), "date": time.strftime("%Y-%m-%d", time.gmtime())}

    file = Path(tempfile.mkdtemp() if args.dry else str(tiles.MEASURED)) / f"{kind}.json"
    try:
        left = tuned(file, buckets, measure, args.again, end)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {file}, and the same command goes on", flush=True)
        return 130
    print(f"{file}: {len(buckets) - len(left)} buckets are there, {len(left)} are left", flush=True)
    return int(bool(left) and time.monotonic() < end)


def model_of(name: str) -> Model:
    c = preset(name)
    return Model(c.n_routed_experts, c.num_experts_per_tok, c.moe_intermediate_size, c.hidden_size)


if __name__ == "__main__":
    sys.exit(main())
