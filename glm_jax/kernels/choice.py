"""Which implementation of the experts' matmuls a device gets, decided while tracing."""

import functools
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.errors import UsageError
from glm_jax.kernels import triton

IMPLEMENTATIONS = ("auto", "xla", "pallas", "triton")  # pallas: the platform's kernels, an error where it has none
# Compute capability and bytes of shared memory a block, of kinds to compile for that are not here; a GPU that is here
# says its own capability.
SHARED: dict[tuple[int, ...], int] = {
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 7): 166_912,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (10, 0): 232_448,
}
CAPABILITY: dict[str, tuple[int, ...]] = {
    "A100": (8, 0),
    "A10": (8, 6),
    "L4": (8, 9),
    "L40": (8, 9),
    "L40S": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "H20": (9, 0),
    "H800": (9, 0),
    "GH200": (9, 0),
    "B200": (10, 0),
    "GB200": (10, 0),
}


def kind_of_default_device() -> str:
    """What the device that jax would compute on calls itself."""
    default: Any = getattr(jax.config, "jax_default_device", None)  # a device, the name of a platform, or nothing
    return default.device_kind if hasattr(default, "device_kind") else jax.devices(default)[0].device_kind


@functools.cache
def capability(kind: str) -> tuple[int, ...] | None:
    """The compute capability of an NVIDIA GPU of this kind; None for every other device, and for a kind that is neither
    here nor known."""
    for device in jax.local_devices():
        if device.device_kind == kind and re.fullmatch(r"\d+\.\d+", getattr(device, "compute_capability", "")):
            return tuple(map(int, device.compute_capability.split(".")))
    words = re.split(r"[ -]", kind) if "NVIDIA" in kind else []
    return next((CAPABILITY[word] for word in words if word in CAPABILITY), None)


def shared_memory(kind: str) -> int:
    """Bytes of shared memory that a block may have on a kind of GPU."""
    return SHARED.get(capability(kind) or (9, 0), 101_376)


def choose(implementation: str, kind: str, x: Any, weights: list) -> str:
    """ "xla" or "triton": the one asked for, or with "auto" the fastest that can run. `x` and the weights [L, E, ...]
    are arrays or their shapes.

    Raises UsageError for an unknown name, and for one that cannot run, with the reason. "auto" says once in the log
    why a GPU does without a kernel."""
    if implementation not in IMPLEMENTATIONS:
        raise UsageError(f"kernels {implementation!r}: they are one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "xla" or (implementation == "auto" and not _is_gpu(kind)):
        return "xla"
    if not (reason := _why_not_triton(kind, x, weights)):
        return "triton"
    if implementation != "auto":
        raise UsageError(f"kernels {implementation!r} cannot run here: {reason}; 'auto' takes what can")
    _say(f"the experts' matmuls run without a kernel on {kind}: {reason}")
    return "xla"


def _is_gpu(kind: str) -> bool:
    return "NVIDIA" in kind or capability(kind) is not None


def _why_not_triton(kind, x, weights) -> str:
    found: Any = (9, 0) if triton.INTERPRET else capability(kind)
    if found is None or found < (8, 0):
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, the device is {kind or 'unknown'!r}"
    if x.dtype not in (jnp.bfloat16, jnp.float16) and not triton.INTERPRET:  # float32 has no tensor cores, and spills
        return f"it multiplies bfloat16 or float16, not {x.dtype}"
    for w in weights:
        if w.dtype not in (x.dtype, jnp.float8_e4m3fn):
            return f"weights of {w.dtype} with states of {x.dtype}; it takes the same, or float8_e4m3fn"
        if odd := [n for n in w.shape[-2:] if n % 16]:
            return f"a matrix has a side of {odd[0]}, which is no multiple of 16"
        if triton.offsets_overflow(w.shape, w.dtype):
            return (
                f"{w.size:,} numbers of one byte in one array, more than 2^31 and in no more than 2^32 bytes, are what "
                "it cannot address; more layers in the stack or fewer, or experts over other devices"
            )
    return ""


@functools.cache
def _say(text: str) -> None:
    logging.getLogger("glm_jax").warning(text)
