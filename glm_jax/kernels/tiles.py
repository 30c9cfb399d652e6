"""Which tiles a kernel takes: what was measured for the device's kind and a shape near this one, or a rule.

`measured/KIND.json`, which benchmarks/tune.py writes, is a list of entries {"kernels": "triton", "kernel": "gate_up",
"axis": 1, "weights": "bfloat16", "states": "bfloat16", "rows": 12, "N": 3072, "K": 5120, "tile": [16, 64, 128, 4, 4]},
rows an expert's mean. Of Mosaic's a tile is [n, k, stages] and "height" what it was measured at: heights are by rule
alone. There is none yet. Here are the rules for Triton; those for Mosaic are `mosaic.rule`."""

import functools
import json
import math
from collections.abc import Iterator
from importlib import resources

import numpy as np

from glm_jax.kernels.triton import Tile

# Mean rows of an expert up to which, and rows, columns, contracted numbers, warps and stages. Registers and spills of
# every one are in docs/kernels.md.
RULES = {
    "gate_up": [
        (1, (16, 32, 128, 4, 4)),
        (16, (16, 64, 128, 4, 4)),
        (32, (32, 64, 128, 4, 4)),
        (96, (64, 128, 64, 8, 4)),
        (math.inf, (128, 128, 64, 8, 3)),
    ],
    "matmul": [
        (1, (16, 32, 128, 4, 4)),
        (16, (16, 64, 128, 4, 3)),
        (32, (32, 64, 128, 4, 4)),
        (96, (64, 128, 128, 8, 4)),
        (math.inf, (128, 256, 64, 8, 3)),
    ],
    "outer": [(math.inf, (128, 256, 64, 8, 3))],
}
# Of many rows with FP8 weights, and before Hopper with any: wider spills.
NARROW = {"gate_up": (128, 64, 64, 8, 3), "matmul": (128, 128, 64, 8, 3), "outer": (128, 128, 64, 8, 3)}
ROWS = (0.4, 3, 12, 50, 200, 800)  # mean rows of an expert that are measured; fewer or more count as the first or last
MEASURED = resources.files("glm_jax.kernels") / "measured"
REACH = {"rows": 5, "N": 2, "K": 2}  # times as many or few, at most: an entry further away says nothing here


def tile(kernel: str, device: str, shared: int, mean: "int | float", N: int, K: int, x, weights, axis: int = 1) -> Tile:
    """The tile of a kernel on a kind of device with so many bytes of shared memory a block, for experts with `mean`
    rows, whose matrices are [N, K], or with `axis` 0 lie as [K, N]; x and weights are dtypes."""
    for entry in measured("triton", device, kernel, mean, N, K, x, weights, axis):
        if fits(kernel, entry["tile"], shared, N, K, x, weights):
            return Tile(*entry["tile"])
    return rule(kernel, shared, mean, N, K, x, weights)


def rule(kernel: str, shared: int, mean: "int | float", N: int, K: int, x, weights) -> Tile:
    """The tile that is taken where none was measured."""
    made = Tile(*next(sizes for most, sizes in RULES[kernel] if mean <= most))
    narrow = np.dtype(weights).itemsize == 1 or shared < 232_448
    if narrow and made.m >= 128:
        made = Tile(*NARROW[kernel])
    made = made.within(N // 2 if kernel == "gate_up" else K if kernel == "outer" else N, K)
    used = lambda tile: shared_bytes(kernel, tile, x, weights)
    while used(made) > shared and made.stages > 2:
        made = Tile(made.m, made.n, made.k, made.warps, made.stages - 1)
    while used(made) > shared and made.k > 16:
        made = Tile(made.m, made.n, made.k // 2, made.warps, made.stages)
    return made


def fits(kernel: str, sizes: list, shared: int, N: int, K: int, x, weights) -> bool:
    """Whether `sizes` are those of a tile that divides such matrices and has room in shared memory."""
    if len(sizes) != 5 or not all(isinstance(size, int) for size in sizes):
        return False
    made = Tile(*sizes)
    if any(size < 16 or size & (size - 1) for size in (made.m, made.n, made.k)) or made.warps not in (1, 2, 4, 8, 16):
        return False
    if not 1 <= made.stages <= 8 or shared_bytes(kernel, made, x, weights) > shared:
        return False
    if kernel == "outer":
        return N % made.m == 0 and K % made.n == 0 and K % made.k == 0
    return (N // 2 if kernel == "gate_up" else N) % made.n == 0 and K % made.k == 0


def shared_bytes(kernel: str, made: Tile, x, weights) -> int:
    """Bytes of shared memory that a tile's blocks take."""
    matrices = 2 if kernel == "gate_up" else 1
    return made.stages * made.k * (made.m * np.dtype(x).itemsize + matrices * made.n * np.dtype(weights).itemsize)


def measured(
    kernels: str, device: str, kernel: str, mean: "int | float", N: int, K: int, x, weights, axis: int = 1
) -> Iterator[dict]:
    """What was measured for a kernel of "triton" or "mosaic" near a shape, the nearest first."""
    here = {"rows": min(max(mean, ROWS[0]), ROWS[-1]), "N": N, "K": K}
    dtypes = {"weights": str(np.dtype(weights)), "states": str(np.dtype(x))}
    kind = {"kernels": kernels, "kernel": kernel, "axis": axis} | dtypes
    found = [e for e in entries(device) if kind.items() <= e.items()]
    away = lambda e: {name: abs(math.log2(e[name] / value)) for name, value in here.items()}
    near = [e for e in found if all(far <= math.log2(REACH[name]) for name, far in away(e).items())]
    return iter(sorted(near, key=lambda e: sum(away(e).values())))


@functools.cache
def entries(device: str) -> list[dict]:
    """All that was measured on a kind of device."""
    file = MEASURED / f"{device}.json"
    return json.loads(file.read_text()) if device and file.is_file() else []
