"""Whatever the bytes, checkpoints are read or refused: mutated headers, indexes, configurations, manifests under seals
that fit, journals, plans and whole folders, a million by default, and no exception but the project's own.

    PYTHONPATH=. python benchmarks/fuzz.py [--cases 1000000] [--seed 0] [--at FOLDER]

The corpus begins with what tests/test_hostile.py and tests/test_safetensors.py refuse. Of some cases the lines of
convert/ that run are traced, and a mutant that reaches a new one joins the corpus. What escapes is saved in FOLDER
(default: the working directory) with the bytes that did it. Writes a line to benchmarks/results/fuzz.jsonl."""

import argparse
import gzip
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.jsonl"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from glm_jax.config import Config  # noqa: E402
from glm_jax.convert import conversion, native, plan, planning, verify  # noqa: E402
from glm_jax.convert.safetensors import INDEX, read_header, read_index  # noqa: E402
from glm_jax.errors import GLMError  # noqa: E402

TRACED = 16  # of so many cases one is traced, which is some ten times as slow
LARGE = 200_000  # bytes beyond which the tables' own are cases once, not what others are made of
NUMBERS = (0, 1, -1, 7, 8, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**30, -(2**63), 1.5, 1e308)
WORDS = ("", "a", "\n", "\0", "\ud800", "..", "../x", "/etc/passwd", "F32", "BF16", "F8_E4M3", "x" * 600, "%99999999d")
TOKENS = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"-", b"0", b"1e999", b"true", b"null", b"NaN", b"9" * 400, b"\xff"]


# ---- mutations


def bytes_of(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A few edits of bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at, n = rng.randrange(len(data) + 1), rng.choice((0, 1, 1, 2, 4, 8, 64))
        kind = rng.randrange(6)
        if kind == 0:
            new = rng.choice(TOKENS)
        elif kind == 1:
            new = rng.randbytes(n)
        elif kind == 2:
            new = b""
        elif kind == 3:  # a piece of it again
            start = rng.randrange(len(data) + 1)
            new = data[start : start + rng.choice((8, 40, 200))]
        elif kind == 4:  # a piece of another
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            new = other[start : start + rng.choice((8, 40, 200))]
        else:
            new = bytes([data[at] ^ 1 << rng.randrange(8)]) if at < len(data) else b""
            n = 1
        data = data[:at] + new + data[at + n :]
    return data


def value_of(rng: random.Random, old: object) -> object:
    """Another JSON value where there was one."""
    kind = rng.randrange(9)
    if kind < 3 and type(old) is int:
        return old + rng.choice((-1, 1, 8, -8, old, -2 * old))
    if kind < 2 and type(old) is str:
        at = rng.randrange(len(old) + 1)
        return old[:at] + rng.choice(WORDS) + old[at + rng.randrange(3) :]
    if kind == 3:
        return rng.choice(WORDS)
    if kind == 4:
        return rng.choice((None, True, False, [], {}, float("nan"), float("inf")))
    if kind == 5:
        return [old] * rng.choice((1, 2, 40))
    if kind == 6:
        return {rng.choice(WORDS): old}
    return rng.choice(NUMBERS)


def json_of(rng: random.Random, value: object, depth: int = 0) -> object:
    """One change somewhere in a JSON value, which is changed in place where it can be."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.85):
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.08:
            del value[key]
        elif kind < 0.14:
            value[rng.choice((*WORDS, rng.choice(list(value)) + "x"))] = value[key]
        elif kind < 0.2:
            other = rng.choice(list(value))
            value[key], value[other] = value[other], value[key]
        else:
            value[key] = json_of(rng, value[key], depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.85:
        at, kind = rng.randrange(len(value)), rng.random()
        if kind < 0.1:
            del value[at]
        elif kind < 0.2:
            value.insert(at, value[rng.randrange(len(value))])
        else:
            value[at] = json_of(rng, value[at], depth + 1)
        return value
    return value_of(rng, value)


def text_of(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A change of a JSON text: of its structure if it has one, of its bytes now and then."""
    if rng.random() < 0.6:
        try:
            value = json.loads(data)
            for _ in range(rng.choice((1, 1, 2, 4))):
                value = json_of(rng, value)
            return json.dumps(value).encode()
        except (ValueError, RecursionError):
            pass
    return bytes_of(rng, data, others)


# ---- targets: what is fed with bytes, and what they begin with


class Target:
    """`run` is given bytes; `seeds` are what they come from, the first a good one, `share` how many of a thousand cases
    they are."""

    def __init__(self, name: str, share: int, run: Callable[[bytes], object], seeds: list[bytes]):
        self.name, self.share, self.run = name, share, run
        self.first = seeds[::-1]
        self.corpus = [seed for seed in seeds if len(seed) <= LARGE]
        self.mutate = text_of

    def case(self, rng: random.Random) -> bytes:
        if self.first:
            return self.first.pop()
        old = self.corpus[0] if rng.random() < 0.4 else rng.choice(self.corpus)
        return self.mutate(rng, old, self.corpus)


def tables() -> dict[str, list[bytes]]:
    """The bytes of the tests' tables, by what they are."""
    import test_hostile as hostile
    import test_safetensors as headers

    found: dict[str, list[bytes]] = {
        "header": [headers.struct.pack("<Q", len(headers.GOOD)) + headers.GOOD + bytes(12)]
    }
    with tempfile.TemporaryDirectory() as scratch:
        for i, (make, _) in enumerate(headers.HOSTILE.values()):
            make(path := Path(scratch) / f"{i}.safetensors")
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 10_000_000:
                found["header"].append(path.read_bytes())
    as_text = lambda what: what if isinstance(what, bytes) else json.dumps(hostile.RAW | what).encode()
    configs = [what for table in (hostile.CONFIGS, hostile.PLANNED, hostile.BLOCKS) for what, _ in table.values()]
    found["config"] = [json.dumps(hostile.RAW).encode(), *map(as_text, configs)]
    found["journal"] = [hostile.line("a") * 3, *(text + hostile.line("a") for text in hostile.LINES.values())]
    return found


def small_native(folder: Path) -> tuple[dict, dict]:
    """A converted folder of one layer with two experts; its manifest and seal."""
    from folders import write_model

    from glm_jax.config import tiny
    from glm_jax.convert import convert

    layers = dict(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, attention_bias=False)
    config = tiny(**layers, n_routed_experts=2, num_experts_per_tok=1, hidden_size=4, vocab_size=8, head_dim=4)
    where = lambda name: "a.safetensors" if "mlp" in name else "b.safetensors"
    convert(write_model(folder / "hf", config, None, where), folder / "to", "copy")
    seal = json.loads((folder / "to" / native.SEAL).read_bytes())
    return json.loads(gzip.decompress((folder / "to" / seal["manifest"]).read_bytes())), seal


def targets(at: Path) -> list[Target]:
    import test_hostile as hostile

    begins = tables()
    raw, seal = small_native(at)
    source, to = at / "hf", at / "to"
    shard, header, config = at / "x.safetensors", at / "index", at / "config.json"
    header.mkdir()

    def headers(data: bytes) -> None:
        shard.write_bytes(data)
        read_header(shard)

    def index(data: bytes) -> None:
        (header / INDEX).write_bytes(data)
        read_index(header)

    def configs(data: bytes) -> None:
        config.write_bytes(data)
        Config.read(config)

    def manifest(data: bytes) -> None:
        native.Manifest.of_bytes(data if data[:2] == b"\x1f\x8b" else gzip.compress(data, 1), to / "manifest")

    def seals(data: bytes) -> None:
        (to / native.SEAL).write_bytes(data)
        native.read(to)

    def sealed(data: bytes) -> None:
        """The manifest is these bytes, and the seal fits."""
        facts = {name: digest for name, digest in seal["files"].items() if name != seal["manifest"]}
        packed = gzip.compress(data, 1)
        name = native.manifest_name(packed)
        (to / seal["manifest"]).rename(at / "manifest")  # or it would not belong there
        (to / name).write_bytes(packed)
        facts[name] = native.sha256(packed)
        (to / native.SEAL).write_bytes(native.seal_bytes(name, facts))
        try:
            native.hf_folder(to)
            verify(to, structure=True)
        finally:
            (to / name).unlink()
            (at / "manifest").rename(to / seal["manifest"])

    staged = at / "new.glm-jax-staging"
    names = dict.fromkeys(("a", hostile.EMBED))

    def journal(data: bytes) -> None:
        (header / "journal-0.jsonl").write_bytes(data)
        records = {name: native.Record("F32", (1,), "a.safetensors", 8, 4) for name in names}
        conversion.Journal(header, records).close()
        assert all(native.is_digest(r.sha256) for r in records.values() if r.sha256 is not None)

    facts = {"format": 1, "dtype": None, "mtp": "keep", "files": {"a.safetensors": [1, "0"]}, "beside": {}}
    stamps = {"a.safetensors": [1, 2]}

    def plans(data: bytes) -> None:
        staged.mkdir(exist_ok=True)
        (staged / "plan.json").write_bytes(data)
        with conversion.staging(at / "new", facts, stamps) as folder:
            assert folder == staged

    files = {name: (source / name).read_bytes() for name in ("config.json", INDEX, "a.safetensors", "b.safetensors")}

    def whole(data: bytes) -> None:
        """One file of a source, whose number is the first byte, is the others."""
        name = list(files)[data[0] % len(files)] if data else INDEX
        (source / name).write_bytes(data[1:])
        try:
            plan(source)
        finally:
            (source / name).write_bytes(files[name])

    text = lambda value: json.dumps(value).encode()
    changed = []
    for change, _, _ in hostile.MANIFESTS.values():  # those that fit this smaller one too
        value = json.loads(json.dumps(raw))
        try:
            value = hostile._instead_of(value, change(value))
        except (KeyError, StopIteration):
            continue
        changed.append(text(value))
    sealings = [native.seal_bytes(seal["manifest"], seal["files"])]
    for change, _ in hostile.SEALS.values():
        value = json.loads(json.dumps(seal))
        value = hostile._instead_of(value, change(value))
        sealings.append(value if isinstance(value, bytes) else (json.dumps(value, indent=1) + "\n").encode())
    made = [
        Target("header", 300, headers, begins["header"] + [files["a.safetensors"]]),
        Target("index", 180, index, [files[INDEX], text({"weight_map": {"a": "a.safetensors"}})]),
        Target("config", 200, configs, begins["config"]),
        Target("journal", 130, journal, begins["journal"]),
        Target("plan.json", 60, plans, [text({"facts": facts, "stamps": stamps})]),
        Target("seal", 60, seals, sealings),
        Target("manifest", 50, manifest, [text(raw), gzip.compress(text(raw)), *changed]),
        Target("manifest, sealed", 8, sealed, [text(raw), *changed]),
        Target("folder", 12, whole, [bytes([i]) + data for i, data in enumerate(files.values())]),
    ]
    for target in made:
        target.mutate = {"header": of_header, "journal": of_lines, "folder": of_folder}.get(target.name, text_of)
    return made


def of_header(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """The JSON of a file changes, and its length goes along, most of the time."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.1 or len(data) < 8 + size:
        return bytes_of(rng, data, others)
    head, rest = text_of(rng, data[8 : 8 + size], others), data[8 + size :]
    if rng.random() < 0.05:
        rest = rest[: rng.randrange(len(rest) + 1)] + bytes(rng.choice((0, 1, 8)))
    return len(head).to_bytes(8, "little") + head + rest


def of_lines(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    lines = data.splitlines(keepends=True) or [b"\n"]
    at = rng.randrange(len(lines))
    lines[at] = text_of(rng, lines[at], others) + b"\n" * (rng.random() < 0.9)
    return b"".join(lines)


def of_folder(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    return data[:1] + (of_header if data[:1] >= b"\2" else text_of)(rng, data[1:], [o[1:] for o in others])


# ---- the run


class Lines:
    """Which lines of convert/ and config.py have run."""

    def __init__(self):
        self.seen: set[tuple] = set()
        self.new = 0
        self.own = {os.path.realpath(planning.__file__).rpartition(os.sep)[0], str(ROOT / "glm_jax" / "convert")}
        self.wanted: dict = {}

    def _wants(self, code) -> bool:
        if code not in self.wanted:
            folder, _, name = code.co_filename.rpartition(os.sep)
            self.wanted[code] = folder in self.own or name == "config.py" and "glm_jax" in folder
        return self.wanted[code]

    def __call__(self, frame, event, argument):
        return self._line if self._wants(frame.f_code) else None

    def _line(self, frame, event, argument):
        if event == "line" and (key := (frame.f_code, frame.f_lineno)) not in self.seen:
            self.seen.add(key)
            self.new += 1
        return self._line


def fuzz(cases: int, seed: int, keep: Path) -> dict:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # files that are gone in a moment need no disk
    with tempfile.TemporaryDirectory(prefix="glm-jax-fuzz-", dir=memory) as scratch:
        return _fuzz(cases, seed, Path(scratch), keep)


def _fuzz(cases: int, seed: int, at: Path, keep: Path) -> dict:
    rng, lines = random.Random(seed), Lines()
    every = targets(at)
    count, ended, taken, slowest, escaped, joined = Counter(), Counter(), Counter(), (0.0, ""), 0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chosen = rng.choices(every, [t.share for t in every], k=cases)
    warnings.simplefilter("ignore")  # of a config without its MTP layer
    for i, target in enumerate(chosen):
        data = target.case(rng)
        traced = i % TRACED == 0
        lines.new = 0
        begin = time.perf_counter()
        if traced:
            sys.settrace(lines)
        try:
            target.run(data)
            kind = "taken"
        except GLMError as error:
            kind = type(error).__name__
            told = str(error)
            if not told.isprintable() or len(told) > 8000:
                kind = f"{kind} of several lines"
        except Exception as error:  # MemoryError too
            kind = f"{type(error).__name__}, which is not ours"
        finally:
            sys.settrace(None)
        seconds = time.perf_counter() - begin
        if "," in kind or "several" in kind:
            escaped += 1
            if escaped <= 100:
                stem = keep / f"fuzz-{seed}-{i}-{re.sub('[^a-z]+', '-', target.name)}"
                stem.with_suffix(".bytes").write_bytes(data)
                stem.with_suffix(".txt").write_text(f"{target.name}: {kind}\n{_trace(target, data)}", errors="replace")
        if traced and lines.new and len(data) <= LARGE:
            target.corpus.append(data)
            joined += 1
        if not traced and seconds > slowest[0]:
            slowest = (seconds, f"{target.name}, case {i}, {len(data):,} bytes, {kind}")
        count[target.name] += 1
        ended[kind] += 1
        taken[target.name] += kind == "taken"
        if i and i % 50_000 == 0:
            print(f"{i:,} cases, {len(lines.seen):,} lines, {joined} joined, {escaped} escaped", file=sys.stderr)
    return {
        "cases": cases,
        "by_target": dict(count),
        "taken": dict(taken),
        "ended": dict(ended.most_common()),
        "escaped": escaped,
        "lines_reached": len(lines.seen),
        "joined": joined,
        "slowest_s": round(slowest[0], 3),
        "slowest": slowest[1],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "before_mib": before >> 10,  # with the tests' modules and jax, and all that the corpus begins with
    }


def _trace(target: Target, data: bytes) -> str:
    try:
        target.run(data)
    except Exception:
        return traceback.format_exc()
    return "not the second time"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", type=Path, default=Path.cwd(), help="where what escapes is saved")
    parser.add_argument("--dry", action="store_true", help="write no line of results")
    args = parser.parse_args()
    begin = time.monotonic()
    found = fuzz(args.cases, args.seed, args.at)
    git = lambda *a: subprocess.run(["git", *a], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = {"what": "fuzz", "commit": git("rev-parse", "--short", "HEAD"), "python": platform.python_version()}
    about |= {"cpus": os.cpu_count(), "seed": args.seed, "seconds": round(time.monotonic() - begin, 1)}
    line = json.dumps(about | found)
    print(line)
    if not args.dry:
        same = lambda x: (json.loads(x)["seed"], json.loads(x)["python"]) == (args.seed, about["python"])
        lines = [x for x in RESULTS.read_text().splitlines() if not same(x)] if RESULTS.exists() else []
        RESULTS.write_text("\n".join([*lines, line]) + "\n")
    return 1 if found["escaped"] else 0


if __name__ == "__main__":
    sys.exit(main())
