"""What `glm-jax convert` costs and survives, beside `cp` in the same minutes.

    PYTHONPATH=. python benchmarks/convert.py index      GLM-4.6 at full size, as sparse files: 714 GB
    PYTHONPATH=. python benchmarks/convert.py copy       copying with digests and a look at every number, against cp
    PYTHONPATH=. python benchmarks/convert.py repack     into another dtype, against cp of what is made
    PYTHONPATH=. python benchmarks/convert.py flat       the memory of both at two sizes, and with 512 MiB and no more
    PYTHONPATH=. python benchmarks/convert.py load       onto eight CPU devices, against reading; and two processes
    PYTHONPATH=. python benchmarks/convert.py kills      200 times kill -9, then the same command again
    PYTHONPATH=. python benchmarks/convert.py flips      1,000 times one bit, then verify

Each writes a line to benchmarks/results/convert.jsonl with commit and versions. `--at FOLDER` says where to work, which
should be an ordinary disk (default: the working directory); `copy` needs 3 x `--gb` there."""

import argparse
import concurrent.futures
import contextlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "convert.jsonl"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

MEASURED = """
import json, re, sys
from glm_jax.cli import main
code = main(sys.argv[1:])
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"code": code, "peak_mib": round(peak / 2**20, 1)}), file=sys.stderr)
"""


def glm_jax(*argv, **options) -> dict:
    """A command in a process of its own: seconds with Python's start, peak memory, and its words."""
    begin = time.monotonic()
    argv = [sys.executable, "-c", MEASURED, *map(str, argv)]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)
    *said, facts = done.stderr.strip().splitlines()
    return json.loads(facts) | {"wall_s": round(time.monotonic() - begin, 2), "said": said, "out": done.stdout.strip()}


def written(folder: Path) -> int:
    """Bytes of a folder that are not another name of the source's."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.stat().st_nlink == 1)


def index(at: Path, args) -> dict:
    import full_size

    claimed = full_size.write("glm-4.6", at / "hf")
    runs = []
    for i in range(5):
        runs.append(glm_jax("convert", at / "hf", at / f"to{i}", "--mode", "index"))
    shard = at / "hf" / "model-00090-of-00092.safetensors"  # one byte short
    os.truncate(shard, shard.stat().st_size - 1)
    bad = glm_jax("convert", at / "hf", at / "bad")
    return {
        "bytes": claimed,
        "seconds": [r["wall_s"] for r in runs],
        "peak_mib": max(r["peak_mib"] for r in runs),
        "bytes_written": written(at / "to0"),
        "first_error_s": bad["wall_s"],
        "first_error_code": bad["code"],
        "first_error": bad["said"][-1].replace(str(at), "..."),
        "nothing_made": not (at / "bad").exists(),
    }


def drop_caches(folder: Path) -> None:
    """Takes a folder's files out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def fill(folder: Path, gb: float, fp8: bool = False) -> int:
    """Real bytes in the shapes of GLM-4.6's expert layers; returns how many."""
    import dataclasses

    import numpy as np

    from glm_jax.config import preset
    from glm_jax.convert.safetensors import DTYPES, write_folder
    from glm_jax.convert.table import tensor_shapes

    layers = dict(num_hidden_layers=1 + max(1, round(gb / 2)), first_k_dense_replace=0, num_nextn_predict_layers=0)
    config = dataclasses.replace(preset("glm-4.6"), vocab_size=4096, n_routed_experts=32, **layers)
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(1 << 26, np.float32) * 0.02).astype(config.dtype)

    scale = np.full((12288, 1), 1 / 448, np.float32)
    codes = (rng.integers(0, 118, 1 << 26).astype(np.uint8) + np.uint8(8)).view(DTYPES["F8_E4M3"])

    def entry(name, shape):
        count, start = int(np.prod(shape)), int(rng.integers(0, 1 << 20))
        if "e_score" in name:
            return "F32", shape, lambda: np.arange(count, dtype=np.float32).reshape(shape)
        if fp8 and "_proj.weight" in name:
            entries[name + "_scale"] = "F32", (shape[0], 1), lambda: scale[: shape[0]]
            return "F8_E4M3", shape, lambda: codes[start : start + count].reshape(shape)
        return "BF16", shape, lambda: pool[start : start + count].reshape(shape)

    folder.mkdir()
    raw = config.to_dict() | ({"quantization_config": {"quant_method": "compressed-tensors"}} if fp8 else {})
    (folder / "config.json").write_text(json.dumps(raw))
    entries: dict = {}
    for name, shape in tensor_shapes(config).items():
        entries[name] = entry(name, shape)
    files = write_folder(folder, entries, 1 << 30)
    return sum(f.stat().st_size for f in files)


def copy(at: Path, args) -> dict:
    nbytes = fill(at / "hf", args.gb)
    found = {"bytes": nbytes} | against_cp(at, args, nbytes, at / "hf", "--mode", "copy")
    run, checks = glm_jax("convert", at / "hf", at / "to", "--mode", "copy"), []
    assert run["code"] == 0, run
    for _ in range(args.rounds):
        read = read_all(at / "to/state/hf", False)
        drop_caches(at / "to")
        run = glm_jax("verify", at / "to")
        assert run["code"] == 0, run
        checks.append((read / run["wall_s"], nbytes / 1e6 / run["wall_s"]))
    ratios, rates = (sorted(column) for column in zip(*checks, strict=True))
    verified = {"mb_s": [round(rate) for rate in rates], "of_cold_read": round(statistics.median(ratios), 2)}
    return found | {"verify": verified | {"range": [round(ratios[0], 2), round(ratios[-1], 2)]}}


def repack(at: Path, args) -> dict:
    """Of FP8 into BF16 and of BF16 into F32, with cp of the folder that is made."""
    found = {}
    for name, fp8, dtype in (("fp8_to_bf16", True, "bf16"), ("bf16_to_f32", False, "f32")):
        fill(at / "hf", args.gb / 2, fp8)
        run = glm_jax("convert", at / "hf", at / "made", "--dtype", dtype)
        assert run["code"] == 0, run
        nbytes = sum(p.stat().st_size for p in (at / "made/state/hf").glob("*.safetensors"))
        found[name] = {"bytes_written": nbytes} | against_cp(
            at, args, nbytes, at / "made/state/hf", "--mode", "repack", "--dtype", dtype
        )
        shutil.rmtree(at / "hf")
        shutil.rmtree(at / "made")
    return found


def against_cp(at: Path, args, nbytes: int, copied: Path, *options) -> dict:
    """Conversions of `at`/hf with these options, in turn with cp of a folder."""
    cp, ours, peaks = [], [], []
    for _ in range(args.rounds):
        for which in ("cp", "ours") if len(cp) % 2 else ("ours", "cp"):
            drop_caches(at / "hf")
            drop_caches(copied)
            begin = time.monotonic()
            if which == "cp":
                subprocess.run(["cp", "-r", copied, at / "copy"], check=True)
                for path in (at / "copy").iterdir():
                    fd = os.open(path, os.O_RDONLY)
                    os.fsync(fd)
                    os.close(fd)
                cp.append(time.monotonic() - begin)
                shutil.rmtree(at / "copy")
            else:
                run = glm_jax("convert", at / "hf", at / "to", *options, "--quiet")
                assert run["code"] == 0, run
                ours.append(time.monotonic() - begin)
                peaks.append(run["peak_mib"])
                shutil.rmtree(at / "to")
            time.sleep(1)
    ratios = sorted(a / b for a, b in zip(cp, ours, strict=True))
    return {
        "cp_mb_s": [round(nbytes / 1e6 / s) for s in cp],
        "ours_mb_s": [round(nbytes / 1e6 / s) for s in ours],
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "peak_mib": max(peaks),
    }


def flat(at: Path, args) -> dict:
    """Peak memory at a size and at twice that; and in a cgroup of 512 MiB, the page cache counted."""
    found: dict = {}
    for name, fp8, options in (("copy", False, ("--mode", "copy")), ("repack", True, ("--dtype", "bf16"))):
        peaks = {}
        for gb in (args.gb * (1 + fp8), args.gb * (1 + fp8) * 2):  # at least as many files as workers
            nbytes = fill(at / "hf", gb, fp8)
            run = glm_jax("convert", at / "hf", at / "to", *options)
            assert run["code"] == 0, run
            peaks[nbytes] = run["peak_mib"]
            shutil.rmtree(at / "to")
            if len(peaks) == 2:
                with cgroup(512 << 20) as enter:
                    run = glm_jax("convert", at / "hf", at / "to", *options, preexec_fn=enter)
                assert run["code"] == 0, run
                shutil.rmtree(at / "to")
            shutil.rmtree(at / "hf")
        (small, a), (large, b) = peaks.items()
        slope = round((b - a) / ((large - small) / 1e9), 2)
        found[name] = {
            "bytes": [small, large],
            "peak_mib": [a, b],
            "mib_per_gb": slope,
            "in_512_mib": True,
        }
    return found


@contextlib.contextmanager
def cgroup(nbytes: int):
    """What a child calls to be in a group with so much memory; where there are no groups, with so much data."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root) / f"glm-jax-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(nbytes))
        except OSError:
            continue
        break
    else:
        yield lambda: resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))
        return
    yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    group.rmdir()


LOADED = """
import json, os, sys, threading, time
import jax, jax.numpy as jnp, numpy as np
from glm_jax import load, processes
from glm_jax.convert import hf, table
from glm_jax.convert.safetensors import read_folder
from glm_jax.config import Config
import glm_jax.loading as loading
processes.start()
folder, what, mesh, rules = sys.argv[1:]
loading.refuse_if_too_large = lambda *a: None  # whether there is room to generate too is not the question
jax.block_until_ready(jnp.zeros(8))
now = lambda key: int(next(x for x in open("/proc/self/" + key[0]) if x.startswith(key[1])).split()[1])
rss = lambda: now(("status", "VmRSS")) << 10
base, peak, over = rss(), [0], threading.Event()
def sample():
    while not over.wait(0.005):
        peak[0] = max(peak[0], rss())
threading.Thread(target=sample, daemon=True).start()
before, begin = now(("io", "rchar")), time.monotonic()
if what == "load":
    model, _ = load(folder, mesh=mesh, rules=rules)
    leaves = jax.tree.leaves(model)
else:  # one weight, cut along one of its axes
    import concurrent.futures
    from pathlib import Path
    row = table.Row.of("moe.mlp.gate_up", Config.read(Path(folder)))
    spec = {"experts": (None, "x"), "rows": (None, None, None, "x"), "columns": (None, None, None, None, "x")}[what]
    at = jax.sharding.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P(*spec))
    leaf = jax.ShapeDtypeStruct(row.shape, jnp.bfloat16, sharding=at)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        leaves = [hf._place(row, leaf, read_folder(folder), pool, lambda n: None, hf.MEMORY, hf.PIECE)]
jax.block_until_ready(leaves)
seconds, read = time.monotonic() - begin, now(("io", "rchar")) - before
over.set()
owned = sum(b.nbytes for a in leaves for b in {str(s.index): s.data for s in a.addressable_shards}.values())
print(json.dumps({"seconds": seconds, "owned": owned, "rss": max(peak[0], rss()) - base, "read": read}))
"""


def loaded(folder: Path, *argv, count: int = 1, port: int = 0) -> list[dict]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // count}"
    many = lambda i: {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(i),
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", LOADED, folder, *argv],
            env=env | (many(i) if count > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    said = [child.communicate()[0] for child in children]
    assert not any(child.returncode for child in children)
    return [json.loads(text.splitlines()[-1]) for text in said]


def read_all(folder: Path, keep: bool) -> float:
    """Seconds to read a folder's weights, by as many threads as `load` has, and to keep or forget them."""
    import numpy as np

    from glm_jax.convert.hf import WORKERS

    files, step, own = sorted(folder.glob("*.safetensors")), 16 << 20, threading.local()
    drop_caches(folder)
    begin = time.monotonic()
    kept = {f: memoryview(np.empty(f.stat().st_size, np.uint8)) for f in files} if keep else {}

    def one(job):
        if not keep:
            own.buffer = getattr(own, "buffer", None) or bytearray(step)
        fd = os.open(job[0], os.O_RDONLY)
        os.preadv(fd, [kept[job[0]][job[1] : job[1] + step] if keep else own.buffer], job[1])
        os.close(fd)

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(one, [(f, o) for f in files for o in range(0, f.stat().st_size, step)]))
    return time.monotonic() - begin


def load(at: Path, args) -> dict:
    """The whole model, its experts or its matrices cut over eight devices; and its largest weight, along each axis."""
    folder, found = at / "hf", {}
    nbytes = fill(folder, args.gb)
    ways = [("load", "expert=8", "latency"), ("load", "tensor=8", "tp")]
    ways += [(what, "", "") for what in ("experts", "rows", "columns")]
    seconds: dict = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way in ways:
            forgotten, kept = nbytes / read_all(folder, False), nbytes / read_all(folder, True)
            drop_caches(folder)
            (run,) = loaded(folder, *way)
            rate = run["owned"] / run["seconds"]
            seconds[way].append((rate / forgotten, rate / kept, rate / 1e9, run["rss"] / run["owned"]))
    for way, runs in seconds.items():
        of_read, of_kept, rates, rss = (sorted(column) for column in zip(*runs, strict=True))
        found[" ".join(way).strip()] = {
            "of_cold_read": round(statistics.median(of_read), 2),
            "range": [round(of_read[0], 2), round(of_read[-1], 2)],
            "of_cold_read_into_new_memory": round(statistics.median(of_kept), 2),
            "range_of_that": [round(of_kept[0], 2), round(of_kept[-1], 2)],
            "gb_s": [round(rate, 2) for rate in rates],
            "rss_of_owned": round(rss[-1], 3),
        }
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    both = loaded(folder, "load", "expert=8", "ep", count=2, port=port)
    found["two processes"] = {"read_of_owned": [round(run["read"] / run["owned"], 3) for run in both]}
    return {"bytes": nbytes} | found


def kills(at: Path, args) -> dict:
    """Copies, repackings, linked folders with digests, checks that record them, and exports, in turn."""
    import test_convert as t

    from glm_jax.convert import convert

    folder, target, rng = t.source(at / "hf"), at / "to", random.Random(0)
    convert(folder, at / "hf-native", "copy")
    want, calls, same, died = {}, {}, dict.fromkeys(t.KILLED, 0), 0
    for what in t.KILLED:
        calls[what] = int(t.killed_at(10**6, folder, target, what).stdout)
        want[what] = t.tree_of(target)
        shutil.rmtree(target)
    count = args.count or 200
    for i in range(count):
        what = list(t.KILLED)[i % len(t.KILLED)]
        while t.killed_at(rng.randint(1, calls[what]), folder, target, what).returncode == -signal.SIGKILL:
            died += 1
            if rng.random() < 0.7:  # and the next try may be killed too
                break
        t.killed_at(10**6, folder, target, what)
        same[what] += t.without_leftovers(t.tree_of(target)) == want[what]
        shutil.rmtree(target)
    return {"runs": count, "kills": died, "identical": sum(same.values()), "of_each": same}


def flips(at: Path, args) -> dict:
    import test_convert as t

    from glm_jax.convert import convert, verify
    from glm_jax.errors import GLMError

    folder = t.source(at / "hf")
    rng, found, where = random.Random(0), 0, {}
    for mode in ("copy", "index"):
        convert(folder, at / mode, mode, digest=True)
    count = args.count or 1000
    for i in range(count):
        root = at / ("copy", "index")[i % 2]
        files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.stat().st_size]
        path = rng.choice(files)
        bit = rng.randrange(8 * path.stat().st_size)
        t.flip(path, bit)
        try:
            verify(root)
        except GLMError:
            found += 1
            where[path.name] = where.get(path.name, 0) + 1
        t.flip(path, bit)
    return {"flips": count, "found": found, "files": dict(sorted(where.items()))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("index", "copy", "repack", "flat", "load", "kills", "flips"))
    parser.add_argument("--at", type=Path, default=Path.cwd())
    parser.add_argument("--gb", type=float, default=7)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.at, prefix="glm-jax-bench-") as scratch:
        found = globals()[args.what](Path(scratch), args)
    git = lambda *a: subprocess.run(["git", *a], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = {"what": args.what, "commit": git("rev-parse", "--short", "HEAD"), "python": platform.python_version()}
    line = json.dumps(about | {"cpus": os.cpu_count()} | found)
    print(line)
    lines = (
        [x for x in RESULTS.read_text().splitlines() if json.loads(x)["what"] != args.what] if RESULTS.exists() else []
    )
    RESULTS.write_text("\n".join([*lines, line]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
