"""Accelerators by name: facts, names, and devices that are not there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from glm_jax import targets
from glm_jax.errors import UsageError
from glm_jax.sharding import mesh

ROOT = Path(__file__).resolve().parents[1]


def test_facts_are_of_a_device():
    assert set(targets.CHIPS) == {"a100", "h100", "h200", "l4", "b200", "v4", "v5e", "v5p", "v6e", "7x"}
    assert set(targets.GPUS) == {name for name, c in targets.CHIPS.items() if c.platform == "cuda"}
    h100, seven = targets.chip("h100:16"), targets.chip("7x:2x2x1")
    assert h100 == targets.chip("H100") == targets.CHIPS["h100"]
    assert (h100.bf16, h100.fp8, h100.bandwidth, h100.link, h100.network) == (989e12, 1979e12, 3.35e12, 450e9, 50e9)
    assert (seven.bf16 * 2, seven.fp8 * 2, seven.bandwidth * 2, seven.link * 2) == (2307e12, 4614e12, 7.38e12, 600e9)
    for name, c in targets.CHIPS.items():
        assert 15 * 2**30 < c.memory < 180 * 2**30, name
        assert c.network < c.link < c.bandwidth < c.bf16 <= c.fp8, name
        assert c.host == {"v4": 4, "v5e": 4, "v5p": 4, "v6e": 4}.get(name, 8)


@pytest.mark.parametrize(
    "name, count, platform",
    [
        ("v5p:2x2x4", 16, "tpu"),
        ("v5e:16x16", 256, "tpu"),
        ("v4:2x2x2", 8, "tpu"),
        ("7x:2x2x2", 16, "tpu"),
        ("v5p:2x2x4:2", 32, "tpu"),
        ("7x:2x2x1:3", 24, "tpu"),
        ("h100:16", 16, "cuda"),
        ("B200:4", 4, "cuda"),
    ],
)
def test_names(name, count, platform):
    assert (targets.devices(name), targets.platform(name)) == (count, platform)


@pytest.mark.parametrize(
    "name, message",
    [
        ("v3:2x2", "v3:2x2: unknown device, known are a100, h100, h200, l4, b200, v4, v5e, v5p, v6e, 7x"),
        ("", "unknown device"),
        ("h100", "write it as h100:16"),
        ("h100:2x8", "write it as h100:16"),
        ("h100:0", "write it as h100:16"),
        ("v5e", "write it as v5p:2x2x4"),
        ("v5e:256", "write it as v5p:2x2x4"),
        ("v5e:0x4", "write it as v5p:2x2x4"),
        ("v5p:2x2x4x4", "write it as v5p:2x2x4"),
        ("v5p:2x2x4:0", "write it as v5p:2x2x4"),
        ("v5p:2", "write it as v5p:2x2x4"),
        ("h100:8:2", "write it as h100:16"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(UsageError, match=message):
        targets.topology(name)


def test_a_missing_package_is_named(monkeypatch):
    find = importlib.util.find_spec
    gone = lambda name, *rest: None if name in ("libtpu", "jax_plugins.xla_cuda13") else find(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    with pytest.raises(UsageError, match=r'v5e:2x2 needs libtpu, .*: pip install "jax\[tpu\]"'):
        targets.topology("v5e:2x2")
    with pytest.raises(UsageError, match=f"--no-deps jax-cuda13-plugin=={jax.__version__} .* nvidia-nvvm absl-py"):
        targets.topology("h100:16")


def test_a_tpu_machine_is_left_to_say_what_it_is(monkeypatch):
    """And elsewhere libtpu is told, before it is loaded, without overwriting what someone has set."""
    seen = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(targets.topologies, "get_topology_desc", lambda *a, **k: seen.append((a, k)) or Devices)
    for name in targets.NO_TPU:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(targets.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    targets.topology("v5e:2x2")
    assert not targets.NO_TPU.keys() & os.environ.keys()
    monkeypatch.setattr(targets.glob, "glob", lambda pattern: [])
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    targets.topology("v4:2x2x1")
    targets.topology("7x:2x2x1")
    told = {name: os.environ.get(name) for name in targets.NO_TPU}
    for name in targets.NO_TPU:
        monkeypatch.delenv(name)  # what topology set, monkeypatch would not take back
    assert told == targets.NO_TPU | {"TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    assert [(a[0], k) for a, k in seen] == [
        ("v5e:2x2", {}),
        ("v4:2x2x1", {"chip_config_name": "megacore"}),
        ("tpu7x:2x2x1", {}),
    ]


class Devices:
    devices = ()


@pytest.mark.aot
@pytest.mark.parametrize(
    "name, hosts",
    [
        ("v4:2x2x4", 4),
        ("v5e:2x2", 1),
        ("v5p:2x2x4", 4),
        ("v6e:2x4", 2),
        ("7x:2x2x2", 2),
        ("v5e:2x4:3", 6),
        ("v4:2x2x1:2", 2),
        ("a100:8", 1),
        ("h100:16", 2),
        ("b200:1", 1),
    ],
)
def test_devices_that_are_not_there(name, hosts):
    found = targets.topology(name)
    assert len(found) == targets.devices(name) == len(set(found))
    assert {d.device_kind for d in found} == {targets.chip(name).kind}
    assert len({d.process_index for d in found}) == hosts
    slices = {getattr(d, "slice_index", 0) for d in found}  # which devices of a single slice do not have
    assert len(slices) == (int(name.split(":")[2]) if name.count(":") == 2 else 1)


@pytest.mark.aot
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "7x:2x2x1"])
def test_memory_of_a_tpu_is_what_its_compiler_says(name):
    m = mesh("data=1", targets.topology(name))
    wide = lambda x: jnp.sort(jnp.broadcast_to(x, (13 << 27, 8)) * jnp.arange(8.0), axis=0)[:5]
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(m, P(None)))
    with pytest.raises(Exception, match="exceeds available HBM") as error:
        jax.jit(wide).trace(x).lower(lowering_platforms=("tpu",)).compile()
    said = float(str(error.value).split("available HBM (")[1].split("G)")[0])
    assert 0 <= said - targets.chip(name).memory / 2**30 < 0.011  # libtpu's versions differ by 0.01


@pytest.mark.aot
@pytest.mark.parametrize(
    "name, message",
    [
        ("v5p:3x3x3", "libtpu does not take it"),
        ("h100:9", "come in whole hosts"),
        ("h100:12", "come in whole hosts"),  # not two of six
    ],
)
def test_shapes_that_do_not_exist(name, message):
    with pytest.raises(UsageError, match=message):
        targets.topology(name)


@pytest.mark.aot
def test_no_variable_needs_to_be_set():
    """Without JAX_PLATFORMS jax drops a CUDA plugin that has no CUDA, unless it is asked first; its devices stay."""
    code = """
from glm_jax.targets import topology
print(len(topology("h100:16")), len(topology("v5e:2x2")))
import jax, os
print([d.platform for d in jax.devices()], "JAX_SKIP_CUDA_CONSTRAINTS_CHECK" in os.environ)
"""
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "16 4"
    if not os.path.exists("/dev/nvidia0") and not os.path.exists("/dev/accel0"):
        assert second == "['cpu'] False"
