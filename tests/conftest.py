"""The environment of every test, set before jax is imported: eight CPU devices, no network, one compile cache, and
programs compiled without LLVM's optimizations and by XLA's older emitters, in a third of the time. An
xla_backend_optimization_level in XLA_FLAGS is heeded and leaves the emitters as users have them: so CI compares with
transformers. Newer jax than 0.10 has the new emitters only, and CI's Python 3.12 runs those.

GLM_TEST_PLATFORM=cuda (or tpu) runs the suite on that platform instead; `pytest -m gpu` needs it."""

import gc
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

if "jax" in sys.modules:  # a plugin that imports jax would make the lines below come too late, and in silence
    raise RuntimeError("jax was imported before tests/conftest.py; the tests need to set its environment first")

os.environ["JAX_PLATFORMS"] = os.environ.get("GLM_TEST_PLATFORM", "cpu")
flags = {"xla_force_host_platform_device_count": 8}
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    flags["xla_backend_optimization_level"] = 0
    if version("jaxlib").startswith("0.10."):  # a flag that jaxlib does not know ends the process
        flags["xla_cpu_use_fusion_emitters"] = "false"
for flag, value in flags.items():
    if flag not in (given := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{given} --{flag}={value}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # which line made which operation is written down for nobody


def pytest_configure(config: pytest.Config) -> None:
    # Compiling is most of a cold run. The cache lies in .pytest_cache, so `pytest --cache-clear` clears it; processes
    # that tests start inherit it. Workers share it.
    if cache := getattr(config, "cache", None):  # absent under -p no:cacheprovider
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("jax")))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """test_oracle.py imports torch and transformers, eight seconds of every worker, and -m often leaves it out."""
    if collection_path.name == "test_oracle.py" and re.search(r"\bnot (\((\w+ or )*)?oracle\b", config.option.markexpr):
        return True
    return None  # as others say


def pytest_collection_finish() -> None:
    """What is imported by now stays: Python's collector no longer walks it, and comes more rarely. Tracing woke it so
    often that it was a sixth of a warm run."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
