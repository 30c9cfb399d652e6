"""Accelerators that need not be there: what one device of each kind has, and devices to compile for."""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from glm_jax.errors import UsageError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device. Memory is what a program may use; rates are the vendor's, for dense matrices, a second.

    A TPU v4 and a 7x show two devices a chip, so theirs are half a chip's. `link` is what a device can send to its
    neighbours: all links of a TPU's torus, NVLink. `network` is what it can send to another host or slice."""

    kind: str  # what it calls itself
    memory: int  # bytes
    bandwidth: float  # bytes a second, of the memory
    bf16: float  # FLOP a second
    fp8: float  # FLOP a second; bf16's where there is no faster one
    link: float  # bytes a second, one direction
    network: float  # bytes a second, one direction
    host: int  # devices a host


# GPU: NVIDIA's data sheets of the SXM modules; memory is what the driver leaves (an H100 reports 79.2 GiB of its 80 GB
# as usable, 84,978,434,048 bytes), a 400 Gb/s adapter for each device. TPU: Google's documentation of each generation;
# memory as the compiler says when a program is too large for it ("exceeds available HBM (15.75G)"), where it says so.
CHIPS = {
    "a100": Chip("NVIDIA A100-SXM4-80GB", 80 * 10**9, 2.04e12, 312e12, 312e12, 300e9, 25e9, 8),
    "h100": Chip("NVIDIA H100 80GB HBM3", 84_978_434_048, 3.35e12, 989e12, 1979e12, 450e9, 50e9, 8),
    "h200": Chip("NVIDIA H200", 141 * 10**9, 4.8e12, 989e12, 1979e12, 450e9, 50e9, 8),
    "b200": Chip("NVIDIA B200", 180 * 10**9, 8e12, 2250e12, 4500e12, 900e9, 50e9, 8),
    "v4": Chip("TPU v4", 16 * GIB, 0.615e12, 137e12, 137e12, 135e9, 3.1e9, 8),
    "v5e": Chip("TPU v5 lite", int(15.75 * GIB), 0.819e12, 197e12, 197e12, 200e9, 3.1e9, 4),
    "v5p": Chip("TPU v5", int(95.74 * GIB), 2.765e12, 459e12, 459e12, 600e9, 6.2e9, 4),
    "v6e": Chip("TPU v6 lite", int(31.25 * GIB), 1.64e12, 918e12, 918e12, 448e9, 12.5e9, 4),
    "7x": Chip("TPU7x", 96 * 10**9, 3.69e12, 1154e12, 2307e12, 600e9, 12.5e9, 8),
}
GPUS = {  # compute capability, multiprocessors, bytes of the L2 cache, and of shared memory for a block
    "a100": ((8, 0), 108, 40 << 20, 166_912),
    "h100": ((9, 0), 132, 50 << 20, 232_448),
    "h200": ((9, 0), 132, 50 << 20, 232_448),
    "b200": ((10, 0), 148, 126 << 20, 232_448),
}


def chip(name: str) -> Chip:
    """The facts of a device by name, of "h100:16" or "v5p:2x2x4" too. Raises UsageError for an unknown one."""
    kind = name.split(":", 1)[0].lower()
    if kind not in CHIPS:
        raise UsageError(f"{name}: unknown device, known are {', '.join(CHIPS)}")
    return CHIPS[kind]


def devices(name: str) -> int:
    """How many jax devices "v5p:2x2x4" or "h100:16" names. A TPU's numbers count chips."""
    chip(name)
    kind, _, shape = name.lower().partition(":")
    if not re.fullmatch(r"\d+" if kind in GPUS else r"\d+x\d+(x\d+)?", shape):
        example = "h100:16, a number of devices" if kind in GPUS else "v5p:2x2x4 or v6e:8x8, the chips along each side"
        raise UsageError(f"--topology {name}: write it as {example}")
    count = 1
    for n in shape.split("x"):
        count *= int(n)
    return count * (2 if kind in ("v4", "7x") else 1)


def topology(name: str) -> list[Any]:
    """Devices to compile for, as "v5p:2x2x4" (through libtpu) or "h100:16" (through jax's CUDA plugin, hosts of eight);
    none of them is there. Raises UsageError for an unknown name, or for a package that is missing.

    To be called in a process that runs on CPU (JAX_PLATFORMS=cpu): the plugins are loaded and never started."""
    from jax.experimental import topologies

    count, kind = devices(name), name.split(":", 1)[0].lower()
    if kind in GPUS:
        return list(_gpus(topologies, kind, count))
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(f'--topology {name} needs libtpu, which compiles for TPUs: pip install "jax[tpu]"')
    # What a TPU machine would say of itself; only where there is none.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-16",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    try:
        prefix = "tpu7x" if kind == "7x" else kind
        return list(topologies.get_topology_desc(f"{prefix}:{name.partition(':')[2]}", "tpu").devices)
    except Exception as error:
        raise UsageError(f"--topology {name}: libtpu does not take it ({str(error).splitlines()[0][:200]})") from None


def _gpus(topologies, kind: str, count: int):
    if not (importlib.util.find_spec("jax_cuda13_plugin") or importlib.util.find_spec("jax_plugins.xla_cuda13")):
        wheels = "jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm absl-py"
        raise UsageError(
            f"--topology {kind}:{count} needs jax's CUDA plugin, which compiles without a GPU: pip install --no-deps "
            f"{wheels} (the plugin's version is jax's, {jax.__version__})"
        )
    (major, minor), cores, cache, shared = GPUS[kind]
    hosts = -(-count // CHIPS[kind].host)
    if count % hosts:
        raise UsageError(f"--topology {kind}:{count}: more than {CHIPS[kind].host} devices come in whole hosts of them")
    target = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared + 1024}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(CHIPS[kind].bandwidth)} l2_cache_size: {cache} clock_rate_ghz: 1.98
  device_memory_size: {CHIPS[kind].memory} shared_memory_per_block_optin: {shared}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 patch: 1 }}
runtime_version {{ major: 13 }}
device_description_str: "{CHIPS[kind].kind}"
"""
    shape = f"1x{hosts}x{count // hosts}"
    try:
        return topologies.get_topology_desc("gpu", "cuda", target_config=target, topology=shape).devices
    except Exception as error:
        raise UsageError(f"--topology {kind}:{count}: the CUDA plugin does not take it ({str(error)[:200]})") from None


def platform(name: str) -> str:
    """What jax calls the platform of a device, to lower for it."""
    return "cuda" if name.split(":", 1)[0].lower() in GPUS else "tpu"
