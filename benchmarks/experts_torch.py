"""What others' kernels take for the experts' matmuls: torch's grouped matmul, and a Triton kernel written here of the
kind that serves in vLLM. A process of its own, which experts_gpu.py starts: no jax beside it holds the GPU's memory.

Reads a JSON list of {"L": layers, "F": width, "D": width of a token, "sizes": rows of each expert}, writes a JSON line
for each and both. Rows are sorted by expert already; timed are the matmul with gate and up, SiLU, and that with down,
of all layers in turn, captured as a graph."""

import functools
import itertools
import json
import statistics
import sys

HEIGHTS = (16, 64, 128)
TILES = {  # rows: columns, contracted numbers, tiles of rows that share columns, warps, stages
    16: [(64, 128, 1, 4, 4), (32, 256, 1, 4, 3), (128, 64, 1, 4, 4)],
    64: [(128, 64, 8, 4, 4), (128, 128, 8, 8, 3)],
    128: [(256, 64, 8, 8, 3), (128, 64, 16, 8, 4)],
}


@functools.cache
def kernels():
    """`multiply` and `silu`, compiled by triton when they are called."""
    global tl  # triton looks names up in the module
    import triton
    import triton.language as tl

    @triton.jit
    def multiply(
        a,
        w,
        out,
        row_ids,
        expert_ids,
        rows,
        tiles,
        N,
        K,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
        GROUP: tl.constexpr,
    ):
        program, columns = tl.program_id(0), tl.cdiv(N, BN)
        first = program // (GROUP * columns) * GROUP
        high = min(tiles - first, GROUP)
        inside = program % (GROUP * columns)
        m, n = first + inside % high, inside // high
        row = tl.load(row_ids + m * BM + tl.arange(0, BM)).to(tl.int64)
        mine = row < rows
        expert = tl.load(expert_ids + m).to(tl.int64)
        column, k = n * BN + tl.arange(0, BN), tl.arange(0, BK)
        a_at = a + row[:, None] * K + k[None, :]
        w_at = w + expert * N * K + column[None, :] * K + k[:, None]
        sums = tl.zeros((BM, BN), dtype=tl.float32)
        for _ in range(0, K // BK):
            sums += tl.dot(tl.load(a_at, mask=mine[:, None], other=0.0), tl.load(w_at))
            a_at += BK
            w_at += BK
        tl.store(out + row[:, None] * N + column[None, :], sums.to(out.dtype.element_ty), mask=mine[:, None])

    @triton.jit
    def silu(both, out, F, BLOCK: tl.constexpr):
        row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        gate = tl.load(both + row * 2 * F + at).to(tl.float32)
        up = tl.load(both + row * 2 * F + F + at).to(tl.float32)
        tl.store(out + row * F + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty))

    return multiply, silu


def grouped(x, gate_up, down, sizes):
    """A function of the layer: torch's own."""
    import torch

    multiply = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    ends, F = torch.tensor(list(itertools.accumulate(sizes)), dtype=torch.int32, device=x.device), down.shape[-1]

    def run(layer):
        both = multiply(x, gate_up[layer].mT, offs=ends)
        h = torch.nn.functional.silu(both[:, :F]) * both[:, F:]
        return multiply(h, down[layer].mT, offs=ends)

    return run


def aligned(sizes, height):
    """Rows in tiles of one expert each, filled up with a number past the last; and each tile's expert."""
    rows, experts, start, total = [], [], 0, sum(sizes)
    for expert, size in enumerate(sizes):
        tiles = -(-size // height)
        rows += [*range(start, start + size), *[total] * (tiles * height - size)]
        experts += [expert] * tiles
        start += size
    return rows, experts


def vllm_kind(x, gate_up, down, sizes, height, tile):
    """A function of the layer: one kernel for both matmuls, of tiles that each are of one expert."""
    import torch

    multiply, silu = kernels()
    rows, experts = (torch.tensor(a, dtype=torch.int32, device=x.device) for a in aligned(sizes, height))
    M, D, F = x.shape[0], x.shape[1], down.shape[-1]
    both, h = x.new_empty(M, 2 * F), x.new_empty(M, F)
    BN, BK, group, warps, stages = tile

    def product(a, w, out):
        N, K = w.shape[-2:]
        grid = (len(experts) * (N // BN),)
        args = a, w, out, rows, experts, M, len(experts), N, K, height, BN, BK, group
        multiply[grid](*args, num_warps=warps, num_stages=stages)
        return out

    def run(layer):
        product(x, gate_up[layer], both)
        silu[(M, F // 512)](both, h, F, 512)
        return product(h, down[layer], x.new_empty(M, D))

    return run


def timed(run, layers):
    """Milliseconds of a layer: the median of nine runs of a graph of all, and the range of them over it."""
    import torch

    for layer in range(layers):
        y = run(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            run(layer)
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(4):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 4 / layers)
    times = times[1:]  # the first one warms up
    middle = statistics.median(times)
    return y, {"ms": middle, "spread": (max(times) - min(times)) / middle}


def right(y, x, gate_up, down, sizes):
    """Whether the rows of the expert with the most are as torch's dense matmuls have them, within 2 %."""
    import torch

    expert = max(range(len(sizes)), key=lambda e: sizes[e])
    rows, F = slice(sum(sizes[:expert]), sum(sizes[: expert + 1])), down.shape[-1]
    both = (x[rows] @ gate_up[-1, expert].mT).float()
    h = (torch.nn.functional.silu(both[:, :F]) * both[:, F:]).to(x.dtype)
    want = (h @ down[-1, expert].mT).float()
    return bool((y[rows].float() - want).norm() < 0.02 * want.norm())


def tried(what, choices, args, layers):
    """The fastest of some ways to build a run, with `tile` if it has one; the last reason if none works."""
    best: dict = {"ms": None, "reason": "nothing was tried"}
    for tile, build in choices:
        try:
            y, spent = timed(build(*args), layers)
            assert right(y, *args), "its numbers are wrong"
            if best["ms"] is None or spent["ms"] < best["ms"]:
                best = spent | ({"tile": tile} if tile else {})
        except Exception as error:
            if best["ms"] is None:
                best = {"ms": None, "reason": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    return {"what": what} | best


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("torch sees no GPU", file=sys.stderr)
        return 1
    held = None
    for number, case in enumerate(json.load(sys.stdin)):
        L, F, D, sizes = case["L"], case["F"], case["D"], case["sizes"]
        if held is None or held[0].shape[:2] != (L, len(sizes)):
            held = None
            new = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(shape[-1] ** -0.5)
            held = new(L, len(sizes), 2 * F, D), new(L, len(sizes), D, F)
        args = torch.randn(sum(sizes), D, device="cuda", dtype=torch.bfloat16), *held, sizes
        mean = sum(sizes) / len(sizes)
        height = next((h for h in HEIGHTS if mean <= h), HEIGHTS[-1])
        build = lambda tile: lambda *a: vllm_kind(*a, height, tile)  # noqa: B023
        choices = [([height, *tile], build(tile)) for tile in TILES[height]]
        for what, ways in (("torch", [(None, grouped)]), ("vllm_kind", choices)):
            print(json.dumps({"case": number} | tried(what, ways, args, L)), flush=True)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
