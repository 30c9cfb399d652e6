"""Which tiles a Triton kernel takes: what was measured for the device's kind and the nearest shape, or a rule.

`measured/KIND.json` is a list of entries {"kernel": "gate_up", "weights": "bfloat16", "rows": 16, "N": 3072, "K": 5120,
"tile": [16, 64, 128, 4, 4]}, rows an expert's mean. There is none yet."""

import functools
import json
import math
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


def tile(kernel: str, device: str, shared: int, mean: "int | float", N: int, K: int, x, weights) -> Tile:
    """The tile of a kernel on a kind of device with so many bytes of shared memory a block, for experts with `mean`
    rows, whose matrices are [N, K]; x and weights are dtypes."""
    found = _measured(device, kernel, str(np.dtype(weights)))
    if found:
        far = lambda e: sum(
            abs(math.log2(max(e[n], 1e-9) / v)) for n, v in (("rows", max(mean, 0.1)), ("N", N), ("K", K))
        )
        made = Tile(*min(found, key=far)["tile"])
    else:
        made = Tile(*next(sizes for most, sizes in RULES[kernel] if mean <= most))
        narrow = np.dtype(weights).itemsize == 1 or shared < 232_448
        if narrow and made.m >= 128:
            made = Tile(*NARROW[kernel])
    made = made.within(N // 2 if kernel == "gate_up" else K if kernel == "outer" else N, K)
    return _fitting(made, kernel, shared, np.dtype(x).itemsize, np.dtype(weights).itemsize)


def _fitting(made: Tile, kernel: str, shared: int, x: int, weights: int) -> Tile:
    """With as many stages as shared memory has room for, then with fewer numbers at a time."""
    matrices = 2 if kernel == "gate_up" else 1
    used = lambda t: t.stages * t.k * (t.m * x + matrices * t.n * weights)
    while used(made) > shared and made.stages > 2:
        made = Tile(made.m, made.n, made.k, made.warps, made.stages - 1)
    while used(made) > shared and made.k > 16:
        made = Tile(made.m, made.n, made.k // 2, made.warps, made.stages)
    return made


@functools.cache
def _measured(device: str, kernel: str, weights: str) -> list:
    file = resources.files("glm_jax.kernels") / "measured" / f"{device}.json"
    entries = json.loads(file.read_text()) if device and file.is_file() else []
    return [e for e in entries if (e["kernel"], e["weights"]) == (kernel, weights)]
