"""The routed experts of one layer of GLM-4.6 on one GPU: time, beside the least that this GPU could take.

    PYTHONPATH=. python benchmarks/experts_gpu.py [--minutes 9]   # as gpu.py --only experts_speed, which it calls

First what the device can: bytes/s of a copy, FLOP/s of a large matmul. The floor of a case is the longer of its bytes
at the one and its FLOP at the other, and every speed is given as floor / time too. Bytes: the weights and scales of the
experts that were drawn, once; the tokens that chose one of them, once; what is between gate and down and each choice's
answer, written and read; the sum. FLOP: 6 F D for each row. FP8 weights are multiplied in bfloat16: its FLOP/s count;
with FP8 activations ("w8a8") those of an FP8 matmul, or twice bfloat16's where XLA's cannot be measured.

"forward" and "backward" are the kernels through Triton; "mosaic", "w8a8" and "mosaic back" those through Mosaic, on
Hopper.

EP=8 is one device of a group of eight, with 20 of 160 experts: of T tokens a device it sees 8 T, of whose 64 T choices
about 8 T are its own. Routings: "uniform"; "zipf", where expert r is drawn as 1 / (1 + r) and the device has the most
popular one; "one", where all tokens choose the same eight, of which a device of eight has one.

A time is that of a loop on the device over stacked layers and four draws, so that nothing is in its cache of 50 MB,
divided by its turns. Reading alone may be faster than the copy, and a fraction more than 1. Other implementations,
where they are installed, get rows that are gathered and sorted already, and sum nothing: less work. Cases are in order
of importance, and those that the minutes do not suffice for are named."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch, in a process of its own, needs memory too

import functools  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from glm_jax.kernels import choice, mosaic, routed_experts, triton  # noqa: E402

DRAWS = 4  # of routing, that a loop goes through in turn
HUGE = 1e30  # no number here is: what a turn's answer is compared with, so that none can be left out or taken together
BF16, FP8 = "bfloat16", "float8_e4m3fn"
# Fractions of the floor that tokens a device must reach, and that are good.
AIMS = {
    1: {
        1: (0.5, 0.7),
        8: (0.75, 0.9),
        64: (0.8, 0.92),
        256: (0.8, 0.92),
        1024: (0.7, 0.85),
        4096: (0.5, 0.65),
        16384: (0.55, 0.7),
    },
    8: {
        1: (0.4, 0.6),
        8: (0.65, 0.8),
        64: (0.7, 0.85),
        256: (0.65, 0.8),
        1024: (0.45, 0.6),
        4096: (0.55, 0.7),
        16384: (0.6, 0.75),
    },
}
# Ours: whether they run backward too, their implementation (None: what there is), and what activations are rounded to.
OURS: dict = {
    "forward": (False, None, None),
    "mosaic": (False, "mosaic", None),
    "w8a8": (False, "mosaic", FP8),
    "backward": (True, None, None),
    "mosaic back": (True, "mosaic", None),
    "xla": (False, "xla", None),
}
AIMS_OF_FP8 = {T: (0.6, 0.8) for T in (8, 64, 256)}


class Sizes(NamedTuple):
    """Experts of all devices and of a token, their width, that of a token, tokens a device in order of importance, and
    the sides of the arrays that ceilings are measured with: numbers copied, a matrix."""

    E: int
    k: int
    F: int
    D: int
    tokens: tuple[int, ...]
    copied: int
    side: int


FULL = Sizes(160, 8, 1536, 5120, (64, 4096, 1, 256, 1024, 8, 16384), 2**30, 8192)
DRY = Sizes(32, 2, 64, 64, (4, 1), 2**16, 64)


class Case(NamedTuple):
    """One line of the table."""

    what: str  # one of OURS, or another implementation's name
    ep: int
    weights: str
    routing: str
    tokens: int  # a device

    def __str__(self):
        return f"{self.what} EP={self.ep} {self.weights} T={self.tokens} {self.routing}"


def layers(ep: int, weights: str) -> int:
    """How many to stack: more than the cache holds, and FP8 arrays of fewer than 2^31 bytes or more than 2^32, since
    the kernels refuse what is between."""
    return {(1, BF16): 2, (8, BF16): 8, (1, FP8): 4, (8, FP8): 6}[ep, weights]


def implementation() -> str:
    """The kernels on an NVIDIA GPU, so that a case that does not get them is an error; else what there is."""
    if "NVIDIA" not in jax.devices()[0].device_kind:
        return "auto"
    return "triton" if triton.plgpu is not None else "mosaic"


def why_not(what: str) -> str:
    """Why this device cannot run it; nothing if it can."""
    kind = jax.devices()[0].device_kind
    if OURS.get(what, (0, 0))[1] != "mosaic" or (mosaic.plgpu and choice.capability(kind) == (9, 0)):
        return ""
    return f"Mosaic's kernels need an NVIDIA GPU of compute capability 9.0, the device is {kind!r}"


# ---- arrays, made on the device


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def random_weights(L: int, E: int, F: int, D: int, dtype: str):
    """gate_up [L, E, 2, F, D] and down [L, E, D, F] that keep a token's size, and the scales of FP8 ones or None."""
    fp8, keys = dtype == FP8, jax.random.split(jax.random.key(1), (2, L * E))
    stored = 100.0  # standard deviation of FP8 numbers, whose largest is 448

    def one(key, shape):
        if fp8:
            return jnp.clip(stored * jax.random.normal(key, shape), -448, 448).astype(dtype)
        return jax.random.normal(key, shape, dtype) * jnp.asarray(shape[-1] ** -0.5, dtype)

    # An expert at a time: the random bits of all at once would be twice the weights.
    gate_up = jax.lax.map(lambda key: one(key, (2, F, D)), keys[0]).reshape(L, E, 2, F, D)
    down = jax.lax.map(lambda key: one(key, (D, F)), keys[1]).reshape(L, E, D, F)
    near = lambda seed, shape, K: (
        jax.random.uniform(jax.random.key(seed), shape, minval=0.7, maxval=1.3) * (K**-0.5 / stored)
    )
    return gate_up, down, (near(2, (L, E, 2, F), D), near(3, (L, E, D), F)) if fp8 else None


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def random_routing(E: int, k: int, tokens: int, ep: int, routing: str):
    """Ids [DRAWS, tokens, k] as one of `ep` devices counts its experts, -1 for those of others, and shares."""
    popular = {"uniform": 0.0, "zipf": -jnp.log(1.0 + jnp.arange(E)), "one": -1e3 * jnp.arange(E)}[routing]
    one = lambda key: jax.lax.top_k(popular + jax.random.gumbel(key, (tokens, E)), k)[1].astype(jnp.int32)
    expert = jax.lax.map(one, jax.random.split(jax.random.key(4), DRAWS))
    share = jax.random.uniform(jax.random.key(5), (tokens, k), minval=0.5, maxval=1.5) / k
    return jnp.where(expert % ep == 0, expert // ep, -1), share


# ---- what is timed: loops that XLA can take no turn out of


@functools.partial(jax.jit, static_argnames=("n", "implementation", "experts", "activations"))
def forward(
    x, ids, share, gate_up, down, scales, *, n: int, implementation: str, experts: int, activations: str | None
):
    options = x.dtype, scales, implementation, None, experts, activations and jnp.dtype(activations)

    def turn(i, y):
        chosen = ids[i % DRAWS] + (y[0, 0] > HUGE).astype(ids.dtype)
        layer = (i % gate_up.shape[0]).astype(jnp.int32)
        return routed_experts(x, chosen, share, gate_up, down, layer, *options)

    return jax.lax.fori_loop(0, n, turn, jnp.zeros_like(x))


@functools.partial(jax.jit, static_argnames=("n", "implementation", "experts"))
def backward(x, ids, share, gate_up, down, dy, *, n: int, implementation: str, experts: int):
    """The answer and the gradients of x, share, gate_up and down. Of one layer: a gradient is as large as the stack."""

    def turn(i, found):
        chosen = ids[i % DRAWS] + (found[0][0, 0] > HUGE).astype(ids.dtype)
        run = lambda x, share, gate_up, down: routed_experts(
            x, chosen, share, gate_up, down, 0, x.dtype, None, implementation, None, experts
        )
        y, back = jax.vjp(run, x, share, gate_up, down)
        return y, *back(dy)

    return jax.lax.fori_loop(0, n, turn, tuple(map(jnp.zeros_like, (x, x, share, gate_up, down))))


@functools.partial(jax.jit, static_argnames=("n", "multiply"))
def matmuls(rows, sizes, gate_up, down, *, n: int, multiply: Callable):
    """Another's grouped matmul of rows that are sorted by expert, with gate_up [E, D, 2 F] and down [E, F, D]."""
    F = down.shape[1]

    def turn(_, y):
        groups = sizes + (y[0, 0] > HUGE).astype(sizes.dtype)
        h = multiply(rows, gate_up, groups).astype(jnp.float32)
        return multiply((jax.nn.silu(h[:, :F]) * h[:, F:]).astype(rows.dtype), down, groups).astype(rows.dtype)

    return jax.lax.fori_loop(0, n, turn, jnp.zeros_like(rows))


@functools.partial(jax.jit, static_argnames=("size", "n"))
def copies(size: int, *, n: int):
    return jax.lax.fori_loop(0, n, lambda _, x: x + 1, jnp.zeros(size, jnp.float32))


@functools.partial(jax.jit, static_argnames="n")
def products(a, b, *, n: int):
    return jax.lax.fori_loop(0, n, lambda _, a: a @ b, a)


@functools.partial(jax.jit, static_argnames=("n", "scaled"))
def fp8_products(a, b, *, n: int, scaled: bool):
    """a @ b.T of FP8 numbers over and over, in the two forms that XLA may multiply as they are: with scales, which its
    libraries take, or without, and then the product is rounded to FP8 each time."""

    def turn(_, carry):
        a, one, _ = carry
        if scaled:  # no turn is another's: one depends on the last
            y = (a.astype(BF16) * one) @ (b.astype(BF16) * one).T
            return a, jnp.where(y[0, 0] > HUGE, 2, 1).astype(BF16), y
        y = jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return (y * a.shape[1] ** -0.5).astype(FP8), one, carry[2]

    return jax.lax.fori_loop(0, n, turn, (a, jnp.ones((), BF16), jnp.zeros((a.shape[0], b.shape[0]), BF16)))


def timed(run: Callable, n: int, seconds: float = 0.7) -> dict:
    """Milliseconds of one of a call's `n` turns: the median of 3 calls, or up to 9 in so many seconds, and the range of
    them over it."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    first, times = time.perf_counter() - start, []
    while len(times) < 3 or (len(times) < 9 and sum(times) < seconds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    middle = statistics.median(times)
    return {"ms": 1e3 * middle / n, "spread": (max(times) - min(times)) / middle, "turns": n, "first_call_s": first}


def ceilings(sizes: Sizes) -> dict:
    """Bytes/s, read and written, and FLOP/s of bfloat16 and of FP8, of this device."""
    n = 50
    copy = timed(lambda: copies(sizes.copied, n=n), n)
    keys = jax.random.split(jax.random.key(6))
    a, b = (jax.random.normal(key, (sizes.side, sizes.side), BF16) for key in keys)
    small = b * jnp.asarray(sizes.side**-0.5, BF16)
    product = timed(lambda: products(a, small, n=n), n)
    rate = lambda spent: 2e3 * sizes.side**3 / spent["ms"]
    found = {
        "bytes_s": 2e3 * 4 * sizes.copied / copy["ms"],
        "flop_s": rate(product),
        "fp8_flop_s": 2 * rate(product),
        "fp8_is": "twice bfloat16's",
        "copy": copy,
        "matmul": product,
    }
    try:
        a, b = a.astype(FP8), b.astype(FP8)
        both = [timed(functools.partial(fp8_products, a, b, n=n, scaled=scaled), n) for scaled in (True, False)]
    except Exception as error:
        return found | {"fp8_matmul": f"{type(error).__name__}: {error}"[:200]}
    fp8 = min(both, key=lambda spent: spent["ms"])
    # As fast as bfloat16 it was widened; much more than twice as fast, left out.
    if 1.2 < rate(fp8) / rate(product) < 2.5:
        found |= {"fp8_flop_s": rate(fp8), "fp8_is": "measured"}
    return found | {"fp8_matmul": fp8}


# ---- a case's own numbers


def work(sizes: Sizes, case: Case, ids: np.ndarray) -> dict:
    """Experts drawn, rows, bytes and FLOP of a turn, means over draws [draws, tokens, k]."""
    F, D, size = sizes.F, sizes.D, jnp.dtype(case.weights).itemsize
    rows = (ids >= 0).sum() / len(ids)
    experts = sum(len(np.unique(draw[draw >= 0])) for draw in ids) / len(ids)
    tokens = (ids >= 0).any(-1).sum() / len(ids)
    weights = experts * (3 * F * D * size + (4 * (2 * F + D) if size == 1 else 0))
    between = 1 if case.what == "w8a8" else 2  # bytes a number
    states = 2 * (tokens * D + between * rows * F + 2 * rows * D + ids.shape[1] * D)
    # Back: the weights are read again and as much is written, the states of three passes; each product has two more.
    times = 3 if OURS.get(case.what, (False,))[0] else 1
    return {
        "experts": experts,
        "rows": rows,
        "gb": times * (weights + states) / 1e9,
        "gflop": times * rows * 6 * F * D / 1e9,
    }


def floor_ms(case: Case, done: dict, ceiling: dict) -> float:
    rate = ceiling["fp8_flop_s" if case.what == "w8a8" else "flop_s"]
    return 1e3 * max(done["gb"] * 1e9 / ceiling["bytes_s"], done["gflop"] * 1e9 / rate)


def judged(case: Case, done: dict, spent: dict, ceiling: dict) -> dict:
    """A case's line of the table, from its work, its time and the ceilings; aims are of ours, forward, uniform."""
    floor = floor_ms(case, done, ceiling)
    fraction, rates = floor / spent["ms"], {"tb_s": done["gb"] / spent["ms"], "tflop_s": done["gflop"] / spent["ms"]}
    aims = AIMS_OF_FP8 if case.weights == FP8 else AIMS[case.ep]
    must, good = aims.get(case.tokens, (None, None))
    if case.what not in ("forward", "mosaic") or case.routing != "uniform":
        must = good = None
    found = done | spent | rates | {"floor_ms": floor, "fraction": fraction, "must": must, "good": good}
    return case._asdict() | {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in found.items()}


HEAD = (
    f"{'':24} EP {'weights':13} {'T':>5} {'routing':7} {'experts':>7} {'rows':>8} {'ms':>9} {'range':>5} "
    f"{'TB/s':>5} {'TFLOP/s':>7} {'floor':>8} {'is':>4} {'must':>4} {'good':>4}"
)


def line(row: dict) -> str:
    """A row of the table; of one that is missing, why."""
    start = f"{row['what']:24} {row['ep']:2} {row['weights']:13} {row['tokens']:5} {row['routing']:7} "
    if row["ms"] is None:
        return start + f"none: {row['reason']}"
    percent = lambda p: f"{'' if p is None else format(p, '.0%'):>4}"
    faster = f"  {row['faster_than_bfloat16']:.2f} times as fast as bfloat16" if "faster_than_bfloat16" in row else ""
    return start + (
        f"{row['experts']:7.1f} {row['rows']:8.0f} {row['ms']:9.4f} {row['spread']:5.0%} "
        f"{row['tb_s']:5.2f} {row['tflop_s']:7.1f} {row['floor_ms']:8.4f} "
        f"{percent(row['fraction'])} {percent(row['must'])} {percent(row['good'])}{faster}"
    )


def turns(sizes: Sizes, floor: float, aim: float) -> int:
    """How many so that a call takes about `aim` milliseconds at its floor: a multiple of DRAWS."""
    return DRAWS * (1 if sizes is DRY else min(64, max(1, round(aim / floor / DRAWS))))


def kernels_ms(run: functools.partial, n: int) -> dict:
    """A turn's milliseconds on the device, of each matmul and of everything else, as the GPU's own clock has them."""
    from jax.experimental.mosaic.gpu import profiler

    total: Counter = Counter()
    for name, ms in profiler.measure(run.func, aggregate=False)(*run.args, **run.keywords)[1]:
        total[next((k for k in ("glm_gate_up", "glm_matmul", "glm_outer") if k in name), "others")] += ms / n
    return {name: round(ms, 5) for name, ms in total.items()}


# ---- the benchmark


def plan(sizes: Sizes) -> list[Case]:
    """All cases but torch's, in order of importance; those of the same weights stand together."""
    uniform = lambda what, ep, weights, tokens: [Case(what, ep, weights, "uniform", T) for T in tokens]
    small, large = (1, 4) if sizes is DRY else (64, 4096)
    middle = 4 if sizes is DRY else 1024
    kinds = [(ep, weights) for weights in (BF16, FP8) for ep in (8, 1)]
    cases = [case for kind in kinds for case in uniform("forward", *kind, sizes.tokens)]
    for kind in sorted(kinds, key=lambda kind: -kind[0]):
        cases += uniform("mosaic", *kind, [T for T in sizes.tokens if T not in (1, 256)])
        if kind == (8, BF16):
            for what in ("backward", "mosaic back"):
                cases += uniform(what, *kind, dict.fromkeys((large, middle)))
        elif FP8 in kind:
            cases += uniform("w8a8", *kind, [T for T in sizes.tokens if T >= middle])
    cases += uniform("xla", 8, BF16, (small, middle)) + uniform("ragged_dot", 8, BF16, (small, middle))
    cases += uniform("tokamax", 8, BF16, dict.fromkeys((large, middle, small)))
    cases += [] if sizes is DRY else uniform("tokamax", 1, BF16, (small, large)) + uniform("xla", 1, BF16, (small,))
    for kind in kinds:
        cases += [
            Case("forward", *kind, routing, T) for T in dict.fromkeys((small, large)) for routing in ("zipf", "one")
        ]
    if sizes is FULL:
        return cases
    # Each compiles for a second: everything once, but on a CPU "xla" is what "forward" is.
    some = {(8, BF16, "uniform", 4), (1, FP8, "uniform", 4), (1, FP8, "one", 4)}
    return [c for c in cases if c[1:] in some and c.what != "xla" or c == Case("forward", 8, BF16, "uniform", 1)]


def prepared(sizes: Sizes, case: Case, ceiling: dict, held: dict) -> tuple[functools.partial, int, dict]:
    """What to time, its turns, a turn's work. `held` has the weights of the last case, by what they are: two kinds may
    not fit."""
    E, (back, how, activations) = sizes.E // case.ep, OURS.get(case.what, (False, None, None))
    own, how = case.what in OURS, how or implementation()
    routing = lambda popular: random_routing(sizes.E, sizes.k, case.tokens * case.ep, case.ep, popular)
    ids, share = routing(case.routing)
    if not own:  # rows are as many as a draw has, and an array has one shape
        ids = ids[:1]
    x = jax.random.normal(jax.random.key(7), (case.tokens * case.ep, sizes.D), BF16)
    done = work(sizes, case, np.asarray(ids))
    # Turns as of uniform routing, so that nothing is compiled again; few of what may be many times slower.
    floor = floor_ms(case, work(sizes, case, np.asarray(routing("uniform")[0])), ceiling)
    n = turns(sizes, floor, 40 if own and how != "xla" else 10)
    if (kind := (layers(case.ep, case.weights), E, sizes.F, sizes.D, case.weights)) not in held:
        held.clear()  # before others are made
        held[kind] = random_weights(*kind)
    gate_up, down, scales = held[kind]
    if back:
        dy = jax.random.normal(jax.random.key(8), x.shape, BF16)
        arrays = x, ids, share, gate_up[:1], down[:1], dy
        run = functools.partial(backward, *arrays, n=n, implementation=how, experts=sizes.E)
    elif own:
        arrays = x, ids, share, gate_up, down, scales
        options = dict(implementation=how, experts=sizes.E, activations=activations)
        run = functools.partial(forward, *arrays, n=n, **options)
    else:
        if case.what == "tokamax":
            from tokamax import ragged_dot
        else:
            from jax.lax import ragged_dot
        groups = expert_rows(np.asarray(ids), E)
        rows = jax.random.normal(jax.random.key(7), (int(groups.sum()), sizes.D), BF16)
        turned = jax.jit(lambda w: w[0].reshape(E, -1, w.shape[-1]).swapaxes(1, 2))
        run = functools.partial(
            matmuls, rows, jnp.asarray(groups), turned(gate_up), turned(down), n=n, multiply=ragged_dot
        )
    return run, n, done


def measured(sizes: Sizes, case: Case, ceiling: dict, held: dict) -> dict:
    """A case's line of the table."""
    if reason := why_not(case.what):
        return missing(case, reason)
    run, n, done = prepared(sizes, case, ceiling, held)
    return judged(case, done, timed(run, n), ceiling)


def expert_rows(ids: np.ndarray, E: int) -> np.ndarray:
    return np.bincount(ids[ids >= 0], minlength=E).astype(np.int32)


def missing(case: Case, reason) -> dict:
    if isinstance(reason, Exception):
        reason = " ".join(f"{type(reason).__name__}: {reason}".split())[:200]
    return case._asdict() | {"ms": None, "reason": reason}


def by_torch(sizes: Sizes, cases: list[Case], ceiling: dict, timeout: float) -> list[dict]:
    """torch's grouped matmul and a Triton kernel of the kind that serves in vLLM, from experts_torch.py."""
    both = lambda case: [case._replace(what=what) for what in ("torch", "vllm_kind")]
    if jax.default_backend() != "gpu":
        return [missing(named, "it needs a GPU") for case in cases for named in both(case)]
    draws, asked = [], []
    for case in cases:
        ids = random_routing(sizes.E, sizes.k, case.tokens * case.ep, case.ep, case.routing)[0]
        draws.append(np.asarray(ids[:1]))
        rows = expert_rows(draws[-1], sizes.E // case.ep).tolist()
        asked.append({"L": layers(case.ep, case.weights), "F": sizes.F, "D": sizes.D, "sizes": rows})
    command = [sys.executable, str(Path(__file__).with_name("experts_torch.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as p:
        try:
            said, errors = p.communicate(json.dumps(asked), timeout=timeout)
            why = f"exit code {p.returncode}: {errors.strip()[-200:]}"
        except subprocess.TimeoutExpired:
            p.kill()
            said, why = p.communicate()[0], f"{timeout:.0f} s did not suffice"
    found = [json.loads(text) for text in said.splitlines() if text.startswith("{") and text.endswith("}")]
    spent, rows = {(one.pop("case"), one.pop("what")): one for one in found}, []
    for i, case in enumerate(cases):
        for named in both(case):
            one = spent.get((i, named.what), {"ms": None, "reason": why})
            done = work(sizes, named, draws[i])
            rows.append(missing(named, one["reason"]) if one["ms"] is None else judged(named, done, one, ceiling))
    return rows


def by_kernel(sizes: Sizes, ceiling: dict, held: dict, end: float) -> dict:
    """Some cases' milliseconds, kernel by kernel, until the time `end`. After all else: what it attaches to the driver
    may slow down or end what follows."""
    found: dict = {}
    if jax.default_backend() != "gpu":
        return found
    kinds = [(8, BF16, 64), (8, BF16, 4096), (1, BF16, 64), (1, BF16, 4096), (8, FP8, 64), (1, FP8, 64)]
    for case in [
        *(Case("forward", ep, weights, "uniform", T) for ep, weights, T in kinds),
        *(Case("backward", 8, BF16, "uniform", T) for T in (1024, 4096)),
        *(Case("mosaic", 8, weights, "uniform", T) for weights in (BF16, FP8) for T in (64, 4096)),
        Case("w8a8", 8, FP8, "uniform", 4096),
        Case("mosaic back", 8, BF16, "uniform", 4096),
    ]:
        if why_not(case.what):
            continue
        if time.monotonic() > end:
            break
        try:
            found[str(case)] = kernels_ms(*prepared(sizes, case, ceiling, held)[:2])
        except Exception as error:
            found[str(case)] = f"{type(error).__name__}: {error}"[:200]
        print(f"{case}, ms: {found[str(case)]}", flush=True)
    return found


def experts_speed(dry: bool, minutes: float) -> dict:
    """Ceilings, a row for every case, and the names of those that `minutes` did not suffice for."""
    end, sizes = time.monotonic() + 60 * minutes, DRY if dry else FULL
    ceiling = ceilings(sizes)
    print(
        f"{ceiling['bytes_s'] / 1e12:.3f} TB/s copied, {ceiling['flop_s'] / 1e12:.1f} TFLOP/s, of FP8 "
        f"{ceiling['fp8_flop_s'] / 1e12:.1f} ({ceiling['fp8_is']})",
        flush=True,
    )
    print(HEAD, flush=True)
    held: dict = {}
    rows, left = [], []
    tokens = (4,) if dry else (64, 4096, 1024)  # other implementations' too
    of_torch = [Case("torch", ep, BF16, "uniform", T) for ep in (8, 1) for T in tokens]
    asked: list = plan(sizes)
    asked.insert(next(i for i, case in enumerate(asked) if case.routing != "uniform"), of_torch)
    for case in asked:
        together = case if isinstance(case, list) else [case]
        if (rest := end - time.monotonic()) < 0:
            left += map(str, together)
            continue
        try:
            if isinstance(case, list):
                held.clear()  # it needs the memory
                made = by_torch(sizes, case, ceiling, max(30, min(rest, 120)))
            else:
                made = [measured(sizes, case, ceiling, held)]
        except Exception as error:  # the other cases still count
            made = [missing(c, error) for c in together]
        rows += made
        print("\n".join(map(line, made)), flush=True)
    times = {Case(*(row[f] for f in Case._fields)): row["ms"] for row in rows}
    for row in rows:
        plain = times.get(Case(row["what"].replace("w8a8", "mosaic"), row["ep"], BF16, row["routing"], row["tokens"]))
        if row["weights"] == FP8 and row["ms"] and plain:
            row["faster_than_bfloat16"] = round(plain / row["ms"], 3)
    whats = list(dict.fromkeys(row["what"] for row in rows))
    kind = lambda row: (whats.index(row["what"]), row["routing"] != "uniform", *(row[f] for f in Case._fields[1:]))
    print("\n" + "\n".join([HEAD, *map(line, sorted(rows, key=kind))]))
    print(f"not run: {', '.join(left) or 'none'}", flush=True)
    kernels = by_kernel(sizes, ceiling, held, end)
    ours = [row for row in rows if row["what"] in OURS and row["what"] != "xla" and not why_not(row["what"])]
    return {
        "ceilings": ceiling,
        "rows": rows,
        "not_run": left,
        "kernels_ms": kernels,
        "ok": all(row["ms"] for row in ours),
    }


if __name__ == "__main__":
    import gpu

    sys.exit(gpu.main(["--only", "experts_speed", *sys.argv[1:]]))
