"""Which implementation of the experts' matmuls a device gets, decided while tracing."""

import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from glm_jax.errors import UsageError
from glm_jax.kernels import megablox, mosaic, triton

# pallas: the platform's kernels, an error where it has none
IMPLEMENTATIONS = ("auto", "xla", "pallas", "triton", "mosaic", "megablox")
# Bytes of shared memory that a block may have, by compute capability, where it is more than the least.
LEAST_SHARED = 101_376
SHARED: dict[tuple[int, ...], int] = {
    (8, 0): 166_912,
    (8, 7): 166_912,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (10, 3): 232_448,
}
# Compute capability of kinds of GPU to compile for that are not here, by a word of their names; one that is here says
# its own.
CAPABILITY: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("A100", "A30", "A800"), (8, 0)),
    **dict.fromkeys(("A10", "A10G", "A40", "A2", "A16", "A6000", "A5000", "3090", "3080"), (8, 6)),
    **dict.fromkeys(("Ada", "L4", "L20", "L40", "L40S", "4090", "4080"), (8, 9)),
    **dict.fromkeys(("H100", "H200", "H20", "H800", "GH200"), (9, 0)),
    **dict.fromkeys(("B100", "B200", "GB200"), (10, 0)),
    **dict.fromkeys(("B300", "GB300"), (10, 3)),
    **dict.fromkeys(("5090", "5080", "Blackwell"), (12, 0)),
}


def kind_here(*arrays) -> str:
    """What the device that such arrays are computed on calls itself: of the mesh that is set, or where the arrays lie,
    or, while tracing without a mesh, what jax would take by default."""
    if device := getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None):
        return device.device_kind
    for a in arrays:
        if isinstance(a, jax.Array) and not isinstance(a, Tracer):
            return next(iter(a.devices())).device_kind
    default: Any = getattr(jax.config, "jax_default_device", None)  # a device, the name of a platform, or nothing
    return default.device_kind if hasattr(default, "device_kind") else jax.devices(default)[0].device_kind


def capability(kind: str) -> tuple[int, ...] | None:
    """The compute capability of an NVIDIA GPU of this kind; None for every other device, and for a kind that is neither
    here nor known."""
    if "NVIDIA" not in kind:
        return None
    for device in _gpus():
        if device.device_kind == kind:
            return tuple(map(int, device.compute_capability.split(".")))
    return next((found for word, found in CAPABILITY.items() if word in re.split(r"[ -]", kind)), None)


def _gpus():
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:  # there is none
        return []


def shared_memory(kind: str) -> int:
    """Bytes of shared memory that a block may have on a kind of GPU."""
    return SHARED.get(capability(kind) or (9, 0), LEAST_SHARED)


def cores(kind: str) -> int:
    """Multiprocessors of a GPU: of one that is here, or of an H100."""
    return next((d.core_count for d in _gpus() if d.device_kind == kind), 132)


def choose(implementation: str, kind: str, x: Any, weights: list, activations: Any = None) -> str:
    """ "xla", "triton", "mosaic" or "megablox": the one asked for, or with "auto" what is likely the fastest that can
    run. `x` and the weights [L, E, ...] are arrays or their shapes.

    Of those for GPUs that is "triton", which has been measured by others; "mosaic" multiplies FP8 activations, goes
    where Triton's offsets do not, and where a jax has no Triton lowering.

    Raises UsageError for an unknown name, and for one that cannot run, with the reason. "auto" says once in the log
    why a GPU or a TPU does without a kernel."""
    if implementation not in IMPLEMENTATIONS:
        raise UsageError(f"kernels {implementation!r}: they are one of {', '.join(IMPLEMENTATIONS)}")
    is_tpu = kind.startswith("TPU")
    if implementation == "xla" or (implementation == "auto" and not is_tpu and not _is_gpu(kind)):
        return "xla"
    able = {"triton": _why_not_triton, "mosaic": _why_not_mosaic, "megablox": _why_not_megablox}
    if implementation not in able:
        able = {name: able[name] for name in (("megablox",) if is_tpu else ("triton", "mosaic"))}
    if implementation in able:
        able = {implementation: able[implementation]}
    elif activations is not None:
        able = dict(reversed(able.items()))
    why = {name: reason(kind, x, weights) for name, reason in able.items()}
    if chosen := next((name for name, reason in why.items() if not reason), None):
        return chosen
    reason = why.get("triton") or next(iter(why.values()))
    if implementation != "auto":
        raise UsageError(f"kernels {implementation!r} cannot run here: {reason}; 'auto' takes what can")
    _say(kind, re.sub(r"[\d,.]+", "", reason), f"the experts' matmuls run without a kernel on {kind}: {reason}")
    return "xla"


def _is_gpu(kind: str) -> bool:
    return any(maker in kind for maker in ("NVIDIA", "AMD", "Radeon"))


def _unfit(x, weights, multiple: int) -> str:
    for w in weights:
        if w.dtype not in (x.dtype, jnp.float8_e4m3fn):
            return f"weights of {w.dtype} with states of {x.dtype}; it takes the same, or float8_e4m3fn"
        if odd := [n for n in w.shape[-2:] if n % multiple]:
            return f"a matrix has a side of {odd[0]}, which is no multiple of {multiple}"
    return ""


def _why_not_triton(kind, x, weights) -> str:
    found: Any = (9, 0) if triton.INTERPRET else capability(kind)
    if triton.plgpu is None:
        return f"jax {jax.__version__} has no Triton lowering"
    if found is None and "NVIDIA" in kind:
        return f"the compute capability of {kind!r} is not known here"
    if found is None or found < (8, 0):
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, the device is {kind or 'unknown'!r}"
    if x.dtype not in (jnp.bfloat16, jnp.float16) and not triton.INTERPRET:  # float32 has no tensor cores, and spills
        return f"it multiplies bfloat16 or float16, not {x.dtype}"
    if reason := _unfit(x, weights, 16):
        return reason
    for w in weights:
        if triton.offsets_overflow(w.shape, w.dtype):
            return (
                f"{w.size:,} numbers of one byte in one array, more than 2^31 and in no more than 2^32 bytes, are what "
                "it cannot address; more layers in the stack or fewer, or experts over other devices"
            )
    return ""


def _why_not_mosaic(kind, x, weights) -> str:
    found = (9, 0) if mosaic.INTERPRET else capability(kind)
    if mosaic.plgpu is None:
        return f"jax {jax.__version__} has no Mosaic lowering for GPUs"
    if found != (9, 0):
        return f"it needs an NVIDIA GPU of compute capability 9.0, the device is {kind or 'unknown'!r}"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 or float16, not {x.dtype}"
    return _unfit(x, weights, mosaic.HIGH)


def _why_not_megablox(kind, x, weights) -> str:
    if megablox.pltpu is None:
        return f"jax {jax.__version__} has no Mosaic lowering for TPUs"
    if not megablox.INTERPRET and (not kind.startswith("TPU") or kind in ("TPU v2", "TPU v3")):
        return f"it needs a TPU v4 or newer, the device is {kind or 'unknown'!r}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it multiplies bfloat16 or float32, not {x.dtype}"
    if reason := _unfit(x, weights, 16):
        return reason
    for w in weights:
        if max(w.shape[-2:]) > (most := megablox.widest(kind, x.dtype)):
            return f"a matrix has a side of {max(w.shape[-2:]):,}; of {x.dtype} its memory on the chip holds {most:,}"
    return ""


_SAID: set[tuple[str, str]] = set()


def _say(kind: str, what: str, text: str) -> None:
    """Once for each kind of device and reason, whatever its numbers."""
    if (kind, what) not in _SAID:
        _SAID.add((kind, what))
        logging.getLogger("glm_jax").warning(text)
