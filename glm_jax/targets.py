"""Accelerators that need not be there: what one device of each kind has, and devices to compile for."""

import dataclasses
import glob
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from glm_jax.errors import UsageError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device. Rates are the vendor's peaks, of dense matrices, a second.

    A TPU 7x chip is two devices, so its numbers are half a chip's. Both cores of a v4 chip are one device (megacore),
    as on the machines there are; every other chip is one device too. `memory` is what there is for a program: of it jax
    takes three quarters on a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. `link` is all that a device
    sends to its neighbours at once: NVLink, or every link of a TPU's torus, of which a collective along one axis of
    the torus uses a part."""

    kind: str  # what a device calls itself
    platform: str  # as jax says: cuda or tpu
    memory: int  # bytes
    bandwidth: float  # bytes a second, of the memory
    bf16: float  # FLOP a second
    fp8: float  # FLOP a second; bf16's where there is no faster one
    link: float  # bytes a second, sent, within a host of GPUs or a slice of TPUs
    network: float  # bytes a second, sent, between hosts of GPUs or slices of TPUs
    host: int  # devices a host
    slices: int = 1  # of TPUs, in the topology that was named


# GPU, the SXM modules. Memory: what XLA's own descriptions of these devices say (openxla/xla,
# xla/backends/gpu/target_config/specs). Rates: NVIDIA's data sheets; NVLink is half of the sheet's figure, which is of
# both directions. Network: one adapter a device, as in NVIDIA's DGX of each: 200 Gb/s with A100, 400 with the others.
# L4: its memory is what nvidia-smi says, its link PCIe 4.0 with 16 lanes, its network 100 Gb/s.
#
# TPU. Memory: what libtpu's compiler says when a program is too large ("exceeds available HBM (15.75G)"); where 0.0.42
# and 0.0.50 differ by 0.01G, the less. Rates: Google's page of each generation, per chip. A link is half of the page's
# figure, which is of both directions: v4 600, v5e 400, v5p 1200, v6e 800, 7x 1200 GB/s. Network: v4 50, v5e 25 (a pod
# of 256 has 6.4 Tb/s), v5p 50, v6e and 7x 100 Gb/s. v4's link and network could not be looked up again.
CHIPS = {
    "a100": Chip("NVIDIA A100-SXM4-80GB", "cuda", 85_100_068_864, 2.039e12, 312e12, 312e12, 300e9, 25e9, 8),
    "h100": Chip("NVIDIA H100 80GB HBM3", "cuda", 84_942_979_072, 3.35e12, 989e12, 1979e12, 450e9, 50e9, 8),
    "h200": Chip("NVIDIA H200", "cuda", 151_397_597_184, 4.8e12, 989e12, 1979e12, 450e9, 50e9, 8),
    "l4": Chip("NVIDIA L4", "cuda", 23_034 << 20, 0.3e12, 121e12, 242e12, 32e9, 12.5e9, 8),
    "b200": Chip("NVIDIA B200", "cuda", 191_514_411_008, 7.7e12, 2250e12, 4500e12, 900e9, 50e9, 8),
    "v4": Chip("TPU v4", "tpu", int(30.75 * GIB), 1.228e12, 275e12, 275e12, 300e9, 6.25e9, 4),
    "v5e": Chip("TPU v5 lite", "tpu", int(15.75 * GIB), 0.819e12, 197e12, 197e12, 200e9, 3.125e9, 4),
    "v5p": Chip("TPU v5", "tpu", int(95.73 * GIB), 2.765e12, 459e12, 459e12, 600e9, 6.25e9, 4),
    "v6e": Chip("TPU v6 lite", "tpu", int(31.24 * GIB), 1.638e12, 918e12, 918e12, 400e9, 12.5e9, 4),
    "7x": Chip("TPU7x", "tpu", int(94.74 * GIB), 3.69e12, 1153.5e12, 2307e12, 300e9, 6.25e9, 8),
}
GPUS = {  # compute capability, multiprocessors, L2 bytes, shared memory a block, float32 units, GHz
    "a100": ((8, 0), 108, 40 << 20, 166_912, 64, 1.41),
    "h100": ((9, 0), 132, 50 << 20, 232_448, 128, 1.98),
    "h200": ((9, 0), 132, 50 << 20, 232_448, 128, 1.98),
    "l4": ((8, 9), 58, 48 << 20, 101_376, 128, 2.04),
    "b200": ((10, 0), 148, 132_644_864, 232_448, 128, 1.98),
}
# How many sides a slice has, and how many chips at the most: Google's page of each generation.
SLICES = {"v4": (3, 4096), "v5e": (2, 256), "v5p": (3, 8960), "v6e": (2, 256), "7x": (3, 9216)}
SPELLED = {"7x": "tpu7x"}  # where libtpu's name is another
NO_TPU = {  # what a TPU machine says of itself
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-16",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device to hold, so no lock to take
}
SKIP = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"


def chip(name: str) -> Chip:
    """The facts of a device by name, of "h100:16" or "v5p:2x2x4:2" too. Raises UsageError for an unknown one."""
    kind, _, slices = name.lower().partition(":")
    if kind not in CHIPS:
        raise UsageError(f"{name}: unknown device, known are {', '.join(CHIPS)}")
    slices = slices.partition(":")[2]
    return dataclasses.replace(CHIPS[kind], slices=int(slices)) if slices.isdecimal() else CHIPS[kind]


def devices(name: str) -> int:
    """How many jax devices "v5p:2x2x4" or "h100:16" names. A TPU's numbers are chips, along each side of the slice;
    "v5p:2x2x4:2" is two such slices."""
    facts, (kind, _, shape) = chip(name), name.lower().partition(":")
    if not re.fullmatch(r"[1-9]\d*" if facts.platform == "cuda" else r"[1-9]\d*(x[1-9]\d*){1,2}(:[1-9]\d*)?", shape):
        example = "h100:16, a number of devices" if facts.platform == "cuda" else "v5p:2x2x4 or v6e:8x8, chips a side"
        raise UsageError(f"--topology {name}: write it as {example}")
    if facts.platform == "cuda":
        if int(shape) > facts.host and int(shape) % facts.host:
            raise UsageError(f"--topology {name}: more than {facts.host} devices come in whole hosts of them")
        return int(shape)
    (sides, most), found = SLICES[kind], [int(n) for n in shape.partition(":")[0].split("x")]
    if len(found) != sides or math.prod(found) > most:
        text = f"a slice of {kind} has {sides} sides, as {'x'.join('2' * sides)}, and {most:,} chips at most"
        raise UsageError(f"--topology {name}: {text}")
    return math.prod(map(int, re.split("[x:]", shape))) * (2 if kind == "7x" else 1)


def platform(name: str) -> str:
    """What jax calls the platform of a device, to lower for it: "cuda" or "tpu"."""
    return chip(name).platform


def topology(name: str) -> list[Any]:
    """Devices to make a mesh of and to compile for, none of which is there: "v5p:2x2x4" (chips along each side, through
    libtpu; "v5p:2x2x4:2" is two slices) or "h100:16" (a number of devices, on hosts of eight; through jax's CUDA
    plugin).

    Raises UsageError for an unknown name, a shape that libtpu refuses (its hosts are 2x2 chips, or single ones), and a
    package that is missing. Needs no JAX_PLATFORMS, but for GPUs this process must not have asked for its own devices
    before without it. Nothing is started: jax.devices() is afterwards what it would have been."""
    count, (kind, _, shape) = devices(name), name.lower().partition(":")
    if platform(name) == "tpu":
        return _tpus(name, kind, shape)
    return _gpus(name, kind, count)


def _tpus(name: str, kind: str, shape: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(f'--topology {name} needs libtpu, which compiles for TPUs: pip install "jax[tpu]"')
    if not glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"):
        # Where there is a TPU libtpu knows better. Elsewhere it would ask a metadata server that does not answer.
        for variable, value in NO_TPU.items():
            os.environ.setdefault(variable, value)
    # Both cores of a v4 chip are one device, as on a real one; libtpu's own choice here would be two.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    sides, _, slices = shape.partition(":")
    options |= {"num_slices": int(slices)} if slices else {}
    try:
        return list(topologies.get_topology_desc(f"{SPELLED.get(kind, kind)}:{sides}", "tpu", **options).devices)
    except Exception as error:  # libtpu's own, of several types
        raise UsageError(f"--topology {name}: libtpu does not take it ({str(error).splitlines()[0][:200]})") from None


def _gpus(name: str, kind: str, count: int) -> list[Any]:
    if not (importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")):
        plugin = " ".join(f"{wheel}=={jax.__version__}" for wheel in ("jax-cuda13-plugin", "jax-cuda13-pjrt"))
        raise UsageError(
            f"--topology {name} needs jax's CUDA plugin, which compiles without a GPU: pip install --no-deps {plugin} "
            "nvidia-cuda-nvcc nvidia-nvvm absl-py"
        )
    hosts = -(-count // CHIPS[kind].host)
    (major, minor), cores, cache, shared, units, clock = GPUS[kind]
    target = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared + 1024}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(CHIPS[kind].bandwidth)} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {CHIPS[kind].memory} shared_memory_per_block_optin: {shared}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 patch: 1 }}
runtime_version {{ major: 13 }}
device_description_str: "{CHIPS[kind].kind}"
"""
    # The plugin looks for CUDA's libraries, and without them is not there at all, unless it is told not to look.
    if new := SKIP not in os.environ:
        os.environ[SKIP] = "1"
    try:
        # slices x hosts x devices a host
        return list(
            topologies.get_topology_desc(
                "gpu", "cuda", target_config=target, topology=f"1x{hosts}x{count // hosts}"
            ).devices
        )
    except NotImplementedError:
        raise UsageError(
            f"--topology {name}: jax has looked for its devices already and dropped the CUDA plugin; "
            "start with JAX_PLATFORMS=cpu"
        ) from None
    except Exception as error:
        raise UsageError(f"--topology {name}: the CUDA plugin does not take it ({str(error)[:200]})") from None
    finally:
        if new:
            del os.environ[SKIP]
