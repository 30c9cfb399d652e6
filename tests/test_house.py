"""Keeps the house in order: imports go up the ladder, every package ships, `import glm_jax` costs nothing, the public
names are what they say. Each checker is a function of a root folder, and is seen to fail on a small wrong tree."""

import ast
import configparser
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOPS = {"glm_jax": "glm_jax", "sharding": "glm_jax.sharding", "convert": "glm_jax.convert"}  # folder -> package

# A module imports from rungs above its own, or from its left on its own rung. A package counts as one module.
LADDER = [
    ["__init__"],
    ["errors", "processes", "sharding", "config"],
    ["weights", "kernels", "cache", "dispatch"],
    ["model"],
    ["convert", "checkpoint", "losses", "sample", "parsing", "tokenizer", "data"],
    ["targets", "hlo", "traffic", "costs", "planner", "loading", "generation", "steps", "linter", "inspect", "demo"],
    ["console", "cli_convert", "cli", "__main__"],
]
NEVER = {"kernels": {"sharding", "config"}}  # arrays in, arrays out

MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:home|Users|root|work)/[\w.]|(?:index-url|registry *=) *http")


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every Python file in the package; the two symlinks are not followed."""
    for top, package in TOPS.items():
        for folder, folders, files in os.walk(root / top):  # os.walk does not enter links
            folders[:] = sorted(f for f in folders if f != "__pycache__")
            inner = Path(folder).relative_to(root / top).parts
            for file in sorted(f for f in files if f.endswith(".py")):
                yield ".".join([package, *inner, file.removesuffix(".py")]), Path(folder, file)


def homes(root: Path) -> dict[str, str]:
    """Public name -> submodule, read from glm_jax/__init__.py without importing it."""
    for node in ast.parse((root / "glm_jax/__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOMES":
            return ast.literal_eval(node.value)
    raise AssertionError("glm_jax/__init__.py has no _HOMES")


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """ast.walk, function bodies included, `if TYPE_CHECKING:` bodies not."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from runtime_nodes(other)
        else:
            yield from runtime_nodes(child)


def imports(file: Path) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(line, module, names) of every import a file can run; a relative one keeps its dots."""
    for node in runtime_nodes(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or ""), tuple(a.name for a in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name, ()) for a in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value), ()


def ladder_faults(root: Path) -> list[str]:
    place = {name: (rung, i) for rung, row in enumerate(LADDER) for i, name in enumerate(row)}
    public, faults = homes(root), []
    for name, file in modules(root):
        me = name.split(".")[1]
        if me not in place:
            faults.append(f"{file.relative_to(root)}: {me!r} has no place on LADDER")
            continue
        for line, module, names in imports(file):
            where = f"{file.relative_to(root)}:{line}"
            first, *rest = module.split(".")
            if module.startswith(".") or first in ("sharding", "convert", "tests"):
                faults.append(f"{where}: {module!r} is not an absolute import from glm_jax")
            if module == "__future__" and "annotations" in names:
                faults.append(f"{where}: annotations must stay real, jaxtyping reads them")
            if first != "glm_jax":
                continue
            dunder = lambda n: "__init__" if n.startswith("__") else public.get(n, n)
            for other in [rest[0]] if rest else [dunder(n) for n in names] or ["__init__"]:
                if other == me:
                    continue
                if other not in place:
                    faults.append(f"{where}: {other!r} has no place on LADDER")
                elif place[other] >= place[me] or other in NEVER.get(me, ()):
                    faults.append(f"{where}: {me} may not import {other}")
    return faults


def package_faults(root: Path) -> list[str]:
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg")
    options = config["options"]
    listed = set(options["packages"].split())
    there = {name.rpartition(".")[0] for name, _ in modules(root)}
    faults = [f"{name} is not listed in setup.cfg" for name in sorted(there - listed)]
    faults += [f"setup.cfg lists {name}, which has no Python file" for name in sorted(listed - there)]
    mapped = dict(line.split(" = ") for line in options["package_dir"].strip().splitlines())
    if mapped != {package: folder for folder, package in TOPS.items()}:
        faults.append(f"package_dir is {mapped}")
    generic = [n for n in [*listed, *mapped, *options.get("py_modules", "").split()] if n.split(".")[0] != "glm_jax"]
    return faults + [f"{name} would be installed at top level" for name in generic]


def name_faults(root: Path) -> list[str]:
    """A submodule named like a public function would replace it on the package as soon as it is imported."""
    taken = {name.split(".")[1] for name, _ in modules(root)}
    return [f"glm_jax.{name} is both a public name and a submodule" for name in sorted(taken & homes(root).keys())]


def marker_faults(root: Path) -> list[str]:
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg")
    declared = {line.split(":")[0] for line in config["tool:pytest"]["markers"].strip().splitlines()}
    declared |= {"parametrize", "skip", "skipif", "xfail", "usefixtures", "filterwarnings"}
    return [
        f"{file.relative_to(root)}:{node.lineno}: marker {node.attr!r} is not declared in setup.cfg"
        for file in sorted((root / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark" and node.attr not in declared
    ]


def hook_faults(root: Path) -> list[str]:
    """Shapes and dtypes are checked in the modules that setup.cfg names to jaxtyping's hook, and in no other."""
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg")
    (option,) = re.findall(r"--jaxtyping-packages=(\S+)", config["tool:pytest"]["addopts"])
    hooked = option.split(",")[:-1]  # the last is the checker
    covers = lambda name: any(name == prefix or name.startswith(f"{prefix}.") for prefix in hooked)
    typed = {
        name
        for name, file in modules(root)
        if any(isinstance(n, ast.ImportFrom) and n.module == "jaxtyping" for n in ast.walk(ast.parse(file.read_text())))
    }
    faults = [
        f"{name} has array annotations, and setup.cfg does not name it" for name in sorted(typed) if not covers(name)
    ]
    idle = [p for p in hooked if not any(n == p or n.startswith(f"{p}.") for n in typed)]
    return faults + [f"setup.cfg names {prefix}, which has no array annotations" for prefix in idle]


def tracked(root: Path) -> list[Path]:
    """The files git has or would take; everything that is not hidden if git cannot say (an unpacked archive)."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(command, capture_output=True, text=True)
    names = answer.stdout.split("\0") if answer.returncode == 0 else [str(p.relative_to(root)) for p in root.rglob("*")]
    hidden = lambda n: answer.returncode != 0 and any(part.startswith(".") for part in Path(n).parts)
    return [root / n for n in names if n and not hidden(n) and (root / n).is_file() and not (root / n).is_symlink()]


def path_faults(root: Path) -> list[str]:
    faults = []
    for file in tracked(root):
        for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
            if b"\0" in line:
                break  # not text
            if found := MACHINE_PATH.search(line.decode("utf-8", "replace")):
                faults.append(f"{file.relative_to(root)}:{number}: {found[0]!r} names a machine")
    return faults


def run_python(code: str) -> str:
    """A fresh interpreter, so that what these tests have imported does not count."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.parametrize("check", [ladder_faults, package_faults, name_faults, marker_faults, hook_faults, path_faults])
def test_house_is_in_order(check):
    assert check(ROOT) == []


def test_links_are_tracked_as_links():
    for name in ("sharding", "convert"):
        link = ROOT / "glm_jax" / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}"


def test_public_names_agree():
    tree = ast.parse((ROOT / "glm_jax/__init__.py").read_text())
    listed = next(n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("glm_jax.")
        for alias in node.names
    }
    assert ast.literal_eval(listed) == sorted(homes(ROOT))
    assert typed == {name: f"glm_jax.{home}" for name, home in homes(ROOT).items()}


def test_import_is_lazy():
    code = "import importlib, sys, typing; had = {*sys.modules}; import glm_jax; print(*sorted({*sys.modules} - had))"
    assert run_python(code).split() == ["glm_jax"]


@pytest.mark.parametrize("first", ["import glm_jax", "import glm_jax.generation, glm_jax.loading, glm_jax.losses"])
def test_public_names_in_every_import_order(first):
    code = f"""
{first}
import json, glm_jax
from glm_jax import *
public = glm_jax.__all__
wrong = [name for name in public if not callable(getattr(glm_jax, name))]
print(json.dumps([wrong, sorted({{*public}} - {{*dir(glm_jax)}}), sorted({{*public}} - {{*globals()}})]))
"""
    assert json.loads(run_python(code)) == [[], [], []]  # modules are not callable


def test_unknown_names_are_attribute_errors():
    import glm_jax

    assert glm_jax.errors.GLMError.__module__ == "glm_jax.errors"  # a submodule nobody imported
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = glm_jax.nonsense
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec("from glm_jax import nonsense")


# ------------------------------------------------------------------------- the checkers can fail, on small wrong trees

SOUND_CFG = """
[options]
package_dir =
    glm_jax = glm_jax
    glm_jax.sharding = sharding
    glm_jax.convert = convert
packages =
    glm_jax
    glm_jax.sharding
    glm_jax.convert
[tool:pytest]
markers =
    slow: long
addopts = -q --jaxtyping-packages=glm_jax.kernels,beartype.beartype
"""


@pytest.fixture
def tree(tmp_path: Path):
    """Writes a sound little house; the returned function adds or replaces one file."""

    def write(name: str, text: str) -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path

    write("glm_jax/__init__.py", '_HOMES = {"load": "loading"}\n')
    write("glm_jax/model.py", "from glm_jax.config import Config\nfrom glm_jax import __version__\n")
    write("glm_jax/config.py", "import dataclasses\n")
    write("sharding/__init__.py", "from glm_jax.errors import UsageError\n")
    write("convert/__init__.py", "")
    write("tests/test_a.py", "import pytest\n\n@pytest.mark.slow\ndef test(): ...\n")
    write("setup.cfg", SOUND_CFG)
    (tmp_path / "glm_jax/sharding").symlink_to("../sharding")
    return write


def test_a_sound_tree_passes(tree):
    root = tree("README.md", "see ~/home/notes and https://example.org/root/x\n")
    assert [f for check in (ladder_faults, package_faults, name_faults, marker_faults) for f in check(root)] == []
    assert [f for f in path_faults(root)] == []


@pytest.mark.parametrize(
    "file, text, fault",
    [
        ("glm_jax/model.py", "from glm_jax.convert.table import TABLE", "model may not import convert"),
        ("glm_jax/model.py", "def f():\n    import glm_jax.cli", "model may not import cli"),
        ("glm_jax/model.py", "from glm_jax import generation", "model may not import generation"),
        ("glm_jax/model.py", "from glm_jax import load", "model may not import loading"),
        ("glm_jax/model.py", "import importlib\nimportlib.import_module('glm_jax.cli')", "model may not import cli"),
        ("glm_jax/model.py", "from glm_jax.misc import f", "'misc' has no place"),
        ("glm_jax/model.py", "from .config import Config", "not an absolute import"),
        ("glm_jax/model.py", "from sharding import Rules", "not an absolute import"),
        ("glm_jax/model.py", "from __future__ import annotations", "annotations must stay real"),
        ("glm_jax/misc.py", "", "'misc' has no place"),
        ("glm_jax/kernels/gmm.py", "from glm_jax.config import Config", "kernels may not import config"),
        ("glm_jax/errors.py", "from glm_jax.sharding import Rules", "errors may not import sharding"),
        ("sharding/rules.py", "from glm_jax.config import Config", "sharding may not import config"),
        ("glm_jax/__init__.py", "_HOMES = {}\nfrom glm_jax.config import Config", "__init__ may not import config"),
    ],
)
def test_ladder_faults_are_seen(tree, file, text, fault):
    faults = ladder_faults(tree(file, text))
    assert len(faults) == 1 and fault in faults[0], faults


def test_type_checking_imports_do_not_count(tree):
    text = "if TYPE_CHECKING:\n    from glm_jax.cli import main\nelse:\n    from glm_jax.loading import load"
    assert [f.split(": ")[1] for f in ladder_faults(tree("glm_jax/model.py", text))] == ["model may not import loading"]


def test_package_faults_are_seen(tree):
    root = tree("glm_jax/kernels/__init__.py", "")
    assert package_faults(root) == ["glm_jax.kernels is not listed in setup.cfg"]
    tree("setup.cfg", SOUND_CFG.replace("packages =\n", "packages =\n    glm_jax.kernels\n    sharding\n"))
    assert package_faults(root) == [
        "setup.cfg lists sharding, which has no Python file",
        "sharding would be installed at top level",
    ]
    tree("setup.cfg", SOUND_CFG.replace("glm_jax.convert = convert", "glm_jax.convert = tools"))
    assert any(fault.startswith("package_dir is") for fault in package_faults(root))


def test_name_faults_are_seen(tree):
    assert name_faults(tree("glm_jax/load.py", "")) == ["glm_jax.load is both a public name and a submodule"]


def test_marker_faults_are_seen(tree):
    root = tree("tests/test_b.py", "import pytest\npytestmark = pytest.mark.sloow\n")
    assert marker_faults(root) == ["tests/test_b.py:2: marker 'sloow' is not declared in setup.cfg"]


def test_hook_faults_are_seen(tree):
    root = tree("glm_jax/kernels/tiles.py", "from jaxtyping import Array\n")
    assert hook_faults(root) == []
    tree("sharding/mesh.py", "from jaxtyping import Array\n")
    assert hook_faults(root) == ["glm_jax.sharding.mesh has array annotations, and setup.cfg does not name it"]
    tree("glm_jax/kernels/tiles.py", "")
    assert hook_faults(root)[-1] == "setup.cfg names glm_jax.kernels, which has no array annotations"


@pytest.mark.parametrize("text", ["see /" + "home/ann/x", "pip --index-" + "url http" + "s://x", "'/" + "root/.cache'"])
def test_path_faults_are_seen(tree, text):
    faults = path_faults(tree("docs/a.md", f"one\n{text}\n"))
    assert len(faults) == 1 and faults[0].startswith("docs/a.md:2:"), faults


@pytest.mark.slow
def test_the_accelerators_benchmark_runs_dry():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--dry"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    parts = "golden_logits", "demo_text", "experts_error", "experts_speed", "model_speed"
    assert all(f"\n{part} {{" in done.stdout for part in parts)
    assert any(line.startswith("mosaic ") and "none: Mosaic's" in line for line in done.stdout.splitlines())
