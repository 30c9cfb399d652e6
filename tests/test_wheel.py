"""The wheel alone is enough: built from this checkout, installed elsewhere, it writes text with the demo checkpoint."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import glm_jax

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--quiet"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools leaves build/ behind, and takes into the next wheel what lies there
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("glm_jax", "sharding", "convert"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    # Offline where this Python has a setuptools that pyproject.toml accepts; else pip fetches one for the build.
    here = importlib.util.find_spec("setuptools") and int(version("setuptools").split(".")[0]) >= 77
    pip("wheel", source, "--wheel-dir", folder, *["--no-build-isolation"] * bool(here))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """`python -m glm_jax ...` with the installed wheel, from another folder, on the devices a user would have."""
    target, elsewhere = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("elsewhere")
    pip("install", wheel, "--target", target)
    env = os.environ | {"PYTHONPATH": str(target)}
    env.pop("XLA_FLAGS", None)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=elsewhere, env=env)

    found = run("-c", "import glm_jax, glm_jax.sharding, glm_jax.convert as c; print(glm_jax.__file__, c.__file__)")
    assert all(Path(p).is_relative_to(target) for p in found.stdout.split()) and found.stdout, found
    return run


def test_wheel_has_everything_and_nothing_generic(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"glm_jax", f"glm_jax-{glm_jax.__version__}.dist-info"}
    shipped = {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, package in (
            ("glm_jax", "glm_jax"),
            ("sharding", "glm_jax/sharding"),
            ("convert", "glm_jax/convert"),
        )
        for kind in ("*.py", "*.jinja", "py.typed", "demo/*")
        for file in (ROOT / folder).rglob(kind)
        if file.is_file() and not {"__pycache__"} & set(file.parts)
    }
    assert shipped <= names, sorted(shipped - names)
    assert {
        "glm_jax/convert/__init__.py",
        "glm_jax/demo/config.json",
        "glm_jax/demo/model.safetensors",
        "glm_jax/demo/tokenizer.json",
        "glm_jax/py.typed",
        "glm_jax/sharding/__init__.py",
    } <= names
    assert any(re.fullmatch(r"glm_jax/templates/.+\.jinja", name) for name in names)


def test_wheel_knows_its_version(run):
    answer = run("-m", "glm_jax", "--version")
    assert answer.returncode == 0 and glm_jax.__version__ in answer.stdout, answer


def test_wheel_generates(run):
    answer = run("-m", "glm_jax", "generate", "-p", "def ", "--max-tokens", "8", "--quiet")
    assert answer.returncode == 0 and answer.stderr == "", answer
    assert answer.stdout.strip() and answer.stdout.endswith("\n"), answer
