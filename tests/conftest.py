"""The environment of every test, set before jax is imported: eight CPU devices, no network, one compile cache, and
programs compiled without LLVM's optimizations, in two thirds of the time. A flag in XLA_FLAGS is heeded: CI compares
with transformers at the level that users have.

GLM_TEST_PLATFORM=cuda (or tpu) runs the suite on that platform instead; `pytest -m gpu` needs it."""

import os
import sys

import pytest

if "jax" in sys.modules:  # a plugin that imports jax would make the lines below come too late, and in silence
    raise RuntimeError("jax was imported before tests/conftest.py; the tests need to set its environment first")

os.environ["JAX_PLATFORMS"] = os.environ.get("GLM_TEST_PLATFORM", "cpu")
for flag, value in (("xla_force_host_platform_device_count", 8), ("xla_backend_optimization_level", 0)):
    if flag not in (given := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{given} --{flag}={value}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_configure(config: pytest.Config) -> None:
    # Compiling is most of a cold run. The cache lies in .pytest_cache, so `pytest --cache-clear` clears it; processes
    # that tests start inherit it. Workers share it.
    if cache := getattr(config, "cache", None):  # absent under -p no:cacheprovider
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("jax")))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
