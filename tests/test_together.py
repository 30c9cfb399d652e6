"""Several processes convert, check and export one checkpoint: each file once, and one result."""

import json
import signal
import sys
import time

import pytest
from test_convert import source, tree_of
from test_processes import ended, flags, glm_jax, started

from glm_jax.convert import conversion, convert
from glm_jax.convert.conversion import LOCK, STAGING

# As `glm-jax`, in small pieces and slowly enough to be met on the way; it says what it did.
SLOW = """
import os, sys, time
from glm_jax.convert import streaming
streaming.PIECE, streaming.SYNCED, real = 4096, 1, streaming.read_exactly
def read(fd, into, offset, path, what):
    time.sleep(float(os.environ.get("PAUSE", 0)))
    seen.add(os.path.basename(path))
    real(fd, into, offset, path, what)
seen, streaming.read_exactly = set(), read
from glm_jax.cli import main
code = main(sys.argv[1:])
print(sorted(seen), "jax" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


def slow(*argv, count: int = 2, flags_of=None):
    return started(*([sys.executable, "-c", SLOW, *argv, *f] for f in flags_of or flags(count)))


@pytest.fixture
def folder(tmp_path):
    return source(tmp_path / "hf")


@pytest.mark.slow
def test_each_copies_its_files_and_the_result_is_that_of_one(folder, tmp_path):
    convert(folder, tmp_path / "one", "copy")
    with slow("convert", folder, tmp_path / "two", "--mode", "copy", "--json") as children:
        (code, out, err), (other, nothing, second) = ended(children)
    assert (code, other) == (0, 0), err + second
    assert json.loads(out)["mode"] == "copy" and nothing == ""
    mine, theirs = (eval(text.splitlines()[-1].rsplit(" ", 1)[0]) for text in (err, second))
    assert not set(mine) & set(theirs) and len(mine) and len(theirs)
    assert sorted(mine + theirs) == sorted(p.name for p in folder.glob("*.safetensors"))
    assert err.endswith(" False\n") and second.endswith(" False\n")  # without jax
    assert tree_of(tmp_path / "two") == tree_of(tmp_path / "one")
    assert not (tmp_path / ("two" + LOCK)).exists() and not (tmp_path / ("two" + STAGING)).exists()


@pytest.mark.slow
def test_index_with_digests_then_checked_and_exported_by_two(folder, tmp_path):
    convert(folder, tmp_path / "one", "index", digest=True)
    for argv in (
        ("convert", folder, tmp_path / "two", "--mode", "index"),
        ("verify", tmp_path / "two"),  # records the digests
        ("verify", tmp_path / "two", "--source", folder),
        ("export", tmp_path / "two", tmp_path / "back", "--exact"),
        ("export", tmp_path / "two", tmp_path / "back", "--exact"),  # is there already
    ):
        (code, _, err), (other, nothing, second) = glm_jax(*argv)
        assert (code, other, nothing) == (0, 0, ""), err + second
    assert tree_of(tmp_path / "two") == tree_of(tmp_path / "one")
    assert tree_of(tmp_path / "back") == tree_of(folder)
    shard = tmp_path / "two/state/hf/mtp.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    first, second = glm_jax("verify", tmp_path / "two")
    assert (first[0], second[0]) == (65, 65) and "is not what was recorded" in first[2] and not second[2]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("by", [1, 2, 3])
def test_one_is_killed_and_any_number_goes_on(folder, tmp_path, victim, by, monkeypatch):
    convert(folder, tmp_path / "one", "copy")
    monkeypatch.setenv("PAUSE", "0.02")
    journals = lambda: sum(p.stat().st_size > 0 for p in (tmp_path / ("two" + STAGING)).glob("journal-*.jsonl"))
    with slow("convert", folder, tmp_path / "two", "--mode", "copy") as children:
        while journals() < 2:
            assert children[0].poll() is None, children[0].communicate()
            time.sleep(0.01)
        children[victim].send_signal(signal.SIGKILL)
        codes = ended(children)
    assert codes[victim][0] == -signal.SIGKILL and codes[1 - victim][0] == 1
    assert f"process {victim} " in codes[1 - victim][2] and "has gone" in codes[1 - victim][2]
    assert (tmp_path / ("two" + STAGING)).is_dir() and not (tmp_path / "two").exists()
    monkeypatch.delenv("PAUSE")
    with slow(
        "convert", folder, tmp_path / "two", "--mode", "copy", count=by, flags_of=flags(by) if by > 1 else [[]]
    ) as c:
        for code, _, err in ended(c):
            assert code == 0, err
    assert tree_of(tmp_path / "two") == tree_of(tmp_path / "one")


@pytest.mark.slow
def test_what_is_wrong_is_said_by_one(folder, tmp_path):
    (folder / "mtp.safetensors").unlink()
    first, second = glm_jax("convert", folder, tmp_path / "to")
    assert first[0] == second[0] == 66 and "mtp.safetensors" in first[2] and second[2] == ""
    assert not list(tmp_path.glob("to*"))


@pytest.mark.slow
def test_two_that_see_different_sources(folder, tmp_path):
    other = source(tmp_path / "other")
    (other / "LICENSE").write_text("another file beside the weights\n")
    code = "import sys; from glm_jax import processes; processes.start(devices=False); "
    code += "from glm_jax.convert import convert; convert(sys.argv[1 + processes.index()], sys.argv[3], 'copy')"
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    envs = [dict(zip(names, map(str, f[1::2]), strict=True)) for f in flags()]
    with started(*2 * [[sys.executable, "-c", code, folder, other, tmp_path / "to"]], envs=envs) as children:
        for code, _, err in ended(children):
            assert code == 1 and "process 1 sees another source than process 0" in err, err
    assert not list(tmp_path.glob("to*"))


def test_shares_are_even_and_all(monkeypatch):
    sizes = [5, 9, 1, 1, 1, 7, 3, 3]
    for count in (1, 2, 3, 5, 20):
        monkeypatch.setattr(conversion.processes, "count", lambda count=count: count)
        every = []
        for i in range(count):
            monkeypatch.setattr(conversion.processes, "index", lambda i=i: i)
            every.append(conversion.shares(sizes))
        assert sorted(sum(every, [])) == list(range(8))
        loads = [sum(sizes[i] for i in mine) for mine in every]
        assert max(loads) <= max(max(sizes), -(-sum(sizes) // count) + max(sizes) // 2)
