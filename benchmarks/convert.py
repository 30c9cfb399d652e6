"""What `glm-jax convert` costs and survives, beside `cp` in the same minutes.

    PYTHONPATH=. python benchmarks/convert.py index      GLM-4.6 at full size, as sparse files: 714 GB
    PYTHONPATH=. python benchmarks/convert.py copy       copying with digests and a look at every number, against cp
    PYTHONPATH=. python benchmarks/convert.py kills      200 times kill -9, then the same command again
    PYTHONPATH=. python benchmarks/convert.py flips      1,000 times one bit, then verify

Each writes a line to benchmarks/results/convert.jsonl with commit and versions. `--at FOLDER` says where to work, which
should be an ordinary disk (default: the working directory); `copy` needs 3 x `--gb` there."""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
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


def glm_jax(*argv) -> dict:
    """A command in a process of its own: seconds with Python's start, peak memory, and its words."""
    begin = time.monotonic()
    argv = [sys.executable, "-c", MEASURED, *map(str, argv)]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
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


def fill(folder: Path, gb: float) -> int:
    """Real bytes in the shapes of GLM-4.6's expert layers; returns how many."""
    import dataclasses

    import numpy as np

    from glm_jax.config import preset
    from glm_jax.convert.safetensors import write_folder
    from glm_jax.convert.table import tensor_shapes

    layers = dict(num_hidden_layers=1 + max(1, round(gb / 2)), first_k_dense_replace=0, num_nextn_predict_layers=0)
    config = dataclasses.replace(preset("glm-4.6"), vocab_size=4096, n_routed_experts=32, **layers)
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(1 << 26, np.float32) * 0.02).astype(config.dtype)

    def entry(name, shape):
        count, start = int(np.prod(shape)), int(rng.integers(0, 1 << 20))
        if "e_score" in name:
            return "F32", shape, lambda: np.arange(count, dtype=np.float32).reshape(shape)
        return "BF16", shape, lambda: pool[start : start + count].reshape(shape)

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    files = write_folder(folder, {n: entry(n, s) for n, s in tensor_shapes(config).items()}, 1 << 30)
    return sum(f.stat().st_size for f in files)


def copy(at: Path, args) -> dict:
    nbytes = fill(at / "hf", args.gb)
    cp, ours, peaks = [], [], []
    for _ in range(args.rounds):
        for which in ("cp", "ours") if len(cp) % 2 else ("ours", "cp"):
            drop_caches(at / "hf")
            begin = time.monotonic()
            if which == "cp":
                subprocess.run(["cp", "-r", at / "hf", at / "copy"], check=True)
                for path in (at / "copy").iterdir():
                    fd = os.open(path, os.O_RDONLY)
                    os.fsync(fd)
                    os.close(fd)
                cp.append(time.monotonic() - begin)
                shutil.rmtree(at / "copy")
            else:
                run = glm_jax("convert", at / "hf", at / "to", "--mode", "copy", "--quiet")
                assert run["code"] == 0, run
                ours.append(time.monotonic() - begin)
                peaks.append(run["peak_mib"])
                shutil.rmtree(at / "to")
            time.sleep(1)
    ratios = sorted(a / b for a, b in zip(cp, ours, strict=True))
    return {
        "bytes": nbytes,
        "cp_mb_s": [round(nbytes / 1e6 / s) for s in cp],
        "ours_mb_s": [round(nbytes / 1e6 / s) for s in ours],
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "peak_mib": max(peaks),
    }


def kills(at: Path, args) -> dict:
    import test_convert as t

    from glm_jax.convert import convert

    folder, target = t.source(at / "hf"), at / "to"
    convert(folder, at / "want", "copy")
    want, same, died, rng = t.tree_of(at / "want"), 0, 0, random.Random(0)
    run = lambda n: subprocess.run(
        [sys.executable, "-c", t.KILL, str(ROOT), str(folder), str(target), str(n)], capture_output=True, text=True
    )
    total = int(run(10**6).stdout)
    for _ in range(args.count or 200):
        shutil.rmtree(target, ignore_errors=True)
        while run(rng.randint(1, total)).returncode == -signal.SIGKILL:  # and the next try may be killed too
            died += 1
            if rng.random() < 0.7:
                break
        convert(folder, target, "copy")
        same += t.tree_of(target) == want
    return {"conversions": args.count or 200, "kills": died, "identical": same}


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
    parser.add_argument("what", choices=("index", "copy", "kills", "flips"))
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
