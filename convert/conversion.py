"""From a Hugging Face folder to one that Orbax restores, and whatever can happen on the way.

All is written to a folder beside the destination, which gets its name when it is whole: a conversion that is killed, at
any point, has made nothing that looks finished, and the same command goes on where it was."""

import concurrent.futures
import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_jax import processes
from glm_jax.convert import native
from glm_jax.convert.hub import fetch_whole
from glm_jax.convert.native import HF, SEAL, Manifest, Record, index_files, manifest_of, write_small
from glm_jax.convert.planning import SCALES, Output, Part, Plan, differences, plan, sha256
from glm_jax.convert.planning import digest as digest_of
from glm_jax.convert.safetensors import Tensor, blamed_on, opened, read_json, read_small
from glm_jax.convert.streaming import Stopped, made_of, stream, wrong_numbers
from glm_jax.errors import BadInput, DestinationError, GLMError, Locked, MissingInput, NoSpace, UsageError, show

STAGING, LOCK = ".glm-jax-staging", ".glm-jax-lock"
WORKERS = 3  # that read, digest and write: more than processors, since each waits for the disk
MEMORY = 256 << 20  # bytes that a process takes
HELD = 24 << 20  # of them what a worker holds: a piece, and what it is made of where that is of another dtype
SAMPLE = 256 << 20  # bytes that are read to learn how fast it goes
MODES = ("auto", "index", "copy", "repack")

Event = Callable[[dict[str, Any]], None]


def convert(
    source: "str | Path",
    target: "str | Path",
    mode: str = "auto",
    dtype: str | None = None,
    mtp: str = "keep",
    digest: bool = False,
    nonfinite: str = "error",
    workers: int = WORKERS,
    memory: int = MEMORY,
    dry_run: bool = False,
    on_event: Event = lambda event: None,
    *,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
) -> Manifest:
    """Makes of a Hugging Face folder, or Hub id, one that stock Orbax restores on any mesh, `load` reads, and Hugging
    Face's tools find their own folder in (state/hf). The same call again goes on where an earlier one ended. Of several
    processes (`processes.start(devices=False)`) all must call it, and each does its share of the files.

    `mode`: "index" links the shards and writes where the arrays lie in them; "copy" copies them, digesting every
    tensor; "repack" writes them in another `dtype` ("bf16", "f32"); "auto" is the first of these that can be. `digest`
    reads linked shards once, for their digests. `nonfinite`: "error" for NaN and infinities, or "record". `memory` is
    what a process may take, in bytes: of `workers`, files at once, there are as many as fit. `dry_run` writes nothing,
    and tells by a "plan" event what it would take. `on_event` is told dicts: {"event": "plan" | "progress" | "done",
    ...}.

    Raises BadInput and MissingInput for a source that is not whole, before a byte is written; NoSpace, DestinationError
    for a target that is not ours, of another plan or on a read-only disk, Locked."""
    if nonfinite not in ("error", "record"):
        raise UsageError(f"--nonfinite {nonfinite}: error or record")
    target = Path(os.path.abspath(Path(target).expanduser()))
    first = processes.index() == 0  # of several: it says what is done, and writes all but the weights
    with processes.agreed():
        folder = fetch_whole(source, revision=revision, token=token, offline=offline)
        made = plan(folder, dtype, mtp)
        apart(target, Path(source).expanduser(), made.source)
        workers = fitting(workers, memory, len(made.tensors))
        already = _finished(target, made.facts, mode) if first else None
        chosen = (already.mode, already.why) if already else _mode(made, mode, target, dry_run) if first else None
    chosen, why = processes.exchange(chosen)[0]
    manifest = manifest_of(made, chosen, why)
    _check_same(manifest)
    writes, staged = 0 if chosen == "index" else made.nbytes, target.with_name(target.name + STAGING)
    with processes.agreed():
        if first and already is None:
            _check_begun(staged, manifest.facts)
            check_space(target.parent, writes, staged)
    facts = {"mode": chosen, "why": why, "tensors": len(manifest.tensors), "bytes": made.nbytes, "writes": writes}
    if dry_run:
        facts["memory"] = base_bytes(len(made.tensors)) + workers * HELD * bool(writes or digest)
        facts["read_bytes_per_s"] = _speed(made) if writes or digest else None
    on_event({"event": "plan"} | facts)
    done = processes.exchange(already is not None)[0]
    if done or dry_run:
        already = already or (native.read(target)[0] if done else manifest)
        if done and digest and already.root is None and not dry_run:
            from glm_jax.convert.checking import verify

            verified = verify(target, workers=workers, memory=memory, on_event=on_event)
            assert verified is not None
            already = verified
            _refuse_wrong(already.tensors, nonfinite)
        if done:
            on_event({"event": "done", "already": True, "root": already.root})
        return already
    if not _make(made, manifest, target, digest, workers, nonfinite, on_event):
        manifest, done = native.read(target)[0], True
    on_event({"event": "done", "already": done, "root": manifest.root})
    return manifest


def _make(made: Plan, manifest: Manifest, target: Path, digest: bool, workers, nonfinite, on_event: Event) -> bool:
    """Does what was planned; whether there was anything left to do."""
    mode, first, staged = manifest.mode, processes.index() == 0, target.with_name(target.name + STAGING)
    sources = {t.file.name: (t.file, t.stamp) for t in made.tensors.values()}
    stamps = {name: list(stamp) for name, (_, stamp) in sources.items()} if mode != "index" or digest else {}
    with contextlib.ExitStack() as held:
        folder = None
        with processes.agreed():
            if first:
                make_parent(target)
                held.enter_context(locked(target))
                if _finished(target, manifest.facts, mode) is None:  # or another process has just done it
                    folder = held.enter_context(staging(target, manifest.facts, stamps))
                if folder:
                    write_small(folder, {f"{HF}/{n}": _beside(made, n) for n in made.beside})
        if processes.exchange(folder is None)[0]:  # or an earlier call was done, but for the name
            return False
        jobs = []
        with processes.agreed():
            for output in made.outputs:
                at, (path, stamp) = staged / HF / output.name, sources[output.name]
                if mode == "index":
                    if first:
                        _link(path, at, stamp)
                    if digest:
                        jobs.append((path, output.size, output.parts, None, stamp))
                elif output.verbatim:
                    jobs.append((path, output.size, output.parts, at, stamp))
                else:
                    content = made_of(output.header, output.parts, made.tensors, made.scales, made.blocks)
                    jobs.append((content, output.size, output.parts, at, None))
        scales = {name: made.tensors[scale] for name, scale in made.scales.items()}
        run(jobs, lambda: Journal(staged, manifest.tensors, scales), on_event, workers, nonfinite)
        with processes.agreed():
            if first:
                finish(staged, target, manifest)
    return True


def fitting(workers: int, memory: int, tensors: int) -> int:
    """How many of so many workers fit into memory, with what so many tensors take."""
    if workers < 1:
        raise UsageError(f"--workers {workers}: at least 1")
    base = base_bytes(tensors)
    if memory < base + HELD:
        raise UsageError(
            f"--memory {memory:,}: {base:,} bytes for the plan of {tensors:,} tensors and {HELD:,} for a worker are "
            f"needed: at least {base + HELD:,}"
        )
    return min(workers, (memory - base) // HELD)


def base_bytes(tensors: int) -> int:
    """Bytes of a process before it holds any weights: a little more than was measured, 92 MiB with 44,689 tensors and
    150 MiB with 88,542."""
    return (40 << 20) + 1400 * tensors


def _check_same(manifest: Manifest) -> None:
    """Processes that were told different things, or see different files, must not write into one folder."""
    digests = processes.exchange(digest_of(manifest.facts))
    if others := [i for i, other in enumerate(digests) if other != digests[0]]:
        raise BadInput(
            f"process {others[0]} sees another source than process 0, or was given other options: give all the same"
        )


def _speed(made: Plan) -> int:
    """Bytes a second at which a part of the largest file is read and digested, if it is not in the cache."""
    output = max(made.outputs, key=lambda o: o.size)
    path = next(t.file for t in made.tensors.values() if t.file.name == output.name)
    size, stop = path.stat().st_size, threading.Event()
    begin, seen = time.monotonic(), 0

    def passed(nbytes: int, tensor: str) -> None:
        nonlocal seen
        seen += nbytes
        if seen >= SAMPLE:
            stop.set()

    with contextlib.suppress(Stopped):
        with opened(path) as (fd, _):
            os.posix_fadvise(fd, 0, SAMPLE, os.POSIX_FADV_DONTNEED)
        held = sorted((t for t in made.tensors.values() if t.file == path), key=lambda t: t.offset)
        parts = [Part(t.name, t.dtype, t.shape, t.offset, t.nbytes) for t in held]
        stream(path, size, parts, lambda found: None, passed, stop)
    return round(seen / max(time.monotonic() - begin, 1e-9))


def _mode(made: Plan, mode: str, target: Path, dry_run: bool) -> tuple[str, str]:
    """The mode, and why."""
    if mode not in MODES:
        raise UsageError(f"--mode {mode}: one of {', '.join(MODES)}")
    if made.scales or not all(_keeps_dtypes(made, o) for o in made.outputs):
        if mode not in ("auto", "repack"):
            raise UsageError(f"--mode {mode} --dtype {made.dtype}: {mode} keeps every byte, another dtype needs repack")
        return "repack", f"weights are stored anew as {made.dtype}"
    if mode == "repack":
        raise UsageError("--mode repack: everything would stay as it is; give the --dtype that it should be stored in")
    if not all(o.verbatim for o in made.outputs):
        mixed = next(o.name for o in made.outputs if not o.verbatim)
        if mode == "index":
            raise DestinationError(f"--mode index --mtp drop: {mixed} holds the MTP layer beside others: --mode copy")
        return "copy", f"{mixed} holds the MTP layer, which is dropped, beside others"
    if mode == "copy":
        return "copy", "as asked for"
    if trouble := _cannot_link(made, target, dry_run):
        if mode == "index":
            raise DestinationError(f"--mode index: {trouble}: --mode copy, or a target beside the source")
        return "copy", trouble
    return "index", "the shards can be linked, so nothing is copied"


def _keeps_dtypes(made: Plan, output: Output) -> bool:
    return all(part.dtype == made.tensors[part.name].dtype for part in output.parts)


def _cannot_link(made: Plan, target: Path, dry_run: bool) -> str:
    """Why the shards cannot have a second name below the target's folder, "" if they can; tried, but in a dry run."""
    parent = next(p for p in target.parents if p.exists())
    tensor = next(iter(made.tensors.values()))
    path = tensor.file.resolve()
    if os.stat(path).st_dev != os.stat(parent).st_dev:
        return f"{parent} is on another file system than {path.parent}"
    if dry_run:
        return ""
    probe = parent / f".{target.name}.{secrets.token_hex(4)}.glm-jax-probe"
    try:
        os.link(path, probe)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES):
            raise DestinationError(f"{parent}: cannot be written: {error.strerror}") from None
        return f"{path.name} cannot be linked ({error.strerror})"
    os.unlink(probe)
    return ""


def make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DestinationError(f"{target.parent}: cannot be made: {error.strerror}") from None


def _beside(made: Plan, name: str) -> bytes:
    data = made.beside[name]
    data = read_small(made.source / name) if data is None else data
    if sha256(data) != made.facts["beside"][name]:
        raise BadInput(f"{made.source / name}: the file changed while it was converted: do it again")
    return data


def _link(path: Path, at: Path, stamp: tuple[int, int]) -> None:
    with blamed_on(at, 0):
        if not (at.exists() and os.path.samestat(os.lstat(at), os.stat(path))):
            at.unlink(missing_ok=True)
            os.link(path.resolve(), at)
        status = os.stat(at)
    if (status.st_size, status.st_mtime_ns) != stamp:
        raise BadInput(f"{path}: the file changed while it was converted: do it again when nothing writes to it")


def _finished(target: Path, facts: Mapping[str, Any], mode: str) -> Manifest | None:
    """The manifest of a target that is there, if it is of this plan and mode; DestinationError if it is anything
    else."""
    if not os.path.lexists(target):
        return None
    if target.is_symlink():
        raise DestinationError(f"{target}: is a symbolic link; give the folder that it leads to")
    if not native.is_native(target):
        if target.is_dir() and not any(target.iterdir()):
            return None
        raise DestinationError(f"{target}: is there already and was not made by convert; give another folder")
    there, _ = native.read(target)
    facts = {**facts, "mode": there.mode if mode == "auto" else mode}
    if there.facts != facts:
        told = "; ".join(differences(there.facts, facts))
        raise DestinationError(f"{target}: is a conversion of another plan ({told}); give another folder, or remove it")
    native.check_sizes(target, there)
    return there


def apart(target: Path, *sources: Path) -> None:
    """Nothing is written into what is read, nor the other way round."""
    inner = target.resolve()
    for source in sources:
        outer = source.resolve()
        if inner == outer:
            raise DestinationError(f"{target}: this is the source; give another folder")
        if source.is_dir() and (inner.is_relative_to(outer) or outer.is_relative_to(inner)):
            raise DestinationError(f"{target}: and the source {source} lie in each other; give a folder apart from it")


def check_space(folder: Path, nbytes: int, staged: Path) -> None:
    folder = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        status = os.statvfs(folder)
    except OSError as error:
        raise DestinationError(f"{folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise DestinationError(f"{folder}: cannot be written")
    there = sum(f.lstat().st_blocks * 512 for f in (staged / HF).glob("*")) if staged.is_dir() else 0
    free = status.f_bavail * status.f_frsize + there
    if nbytes > free:
        raise NoSpace(f"{folder}: {nbytes:,} bytes are to be written, {free:,} are free: {nbytes - free:,} short")


# ---- what copying conversions and exports share


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the lock of a target. It goes with the process, however that ends."""
    path = target.with_name(target.name + LOCK)
    while True:
        with blamed_on(path, 0):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                os.close(fd)
                raise DestinationError(f"{path}: cannot be locked on this file system: {error.strerror}") from None
            who = os.read(fd, 200).decode(errors="replace").strip() or "another process"
            os.close(fd)
            raise Locked(f"{target}: {who} is writing it now: wait for its end") from None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(fd)):  # and not one that its owner has just removed
                break
        os.close(fd)
    try:
        with blamed_on(path, 0):
            os.ftruncate(fd, 0)
            os.write(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(fd)


@contextlib.contextmanager
def staging(target: Path, facts: Mapping[str, Any], stamps: Mapping[str, Any]) -> Iterator[Path | None]:
    """The folder in which a target is made, bound to what makes it; None if it was whole and has its name now. What was
    made of files with other stamps is not gone on with."""
    folder = target.with_name(target.name + STAGING)
    path, text = folder / "plan.json", json.dumps({"facts": facts, "stamps": stamps}, sort_keys=True).encode()
    facts, stamps = json.loads(text).values()
    if stamped := _check_begun(folder, facts):
        if (folder / SEAL).is_file():
            _rename(folder, target)
            yield None
            return
        if stamped != [stamps]:
            shutil.rmtree(folder)
    elif os.path.lexists(folder):
        if strange := sorted(set(os.listdir(folder)) - {"state", "plan.json", "plan.json.tmp", "journal-0.jsonl"}):
            raise DestinationError(f"{folder}: holds {show(strange[0])}, which is not ours: move it away")
        shutil.rmtree(folder)  # from before the plan was written, or changed by hand: nothing to go on with
    with blamed_on(folder, 0):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HF).mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            write_small(folder, {"plan.json": text})
    yield folder


def _check_begun(folder: Path, facts: Mapping[str, Any]) -> list[Any]:
    """[the stamps] of what a staging folder was begun with, [] without; DestinationError for one of another plan."""
    for inner in (folder, folder / "state", folder / HF):  # what is written there would be written somewhere else
        if inner.is_symlink() or os.path.lexists(inner) and not inner.is_dir():
            raise DestinationError(
                f"{inner}: is not a folder that a conversion makes: remove it, or give another target"
            )
    before, stamps = None, None
    if (folder / SEAL).is_file():
        before = native.read(folder)[0].facts
    else:
        with contextlib.suppress(GLMError):  # changed by hand: nothing that can be gone on with
            begun = read_json(folder / "plan.json", "the plan")
            before, stamps = begun.get("facts"), begun.get("stamps")
    if not isinstance(before, dict):
        return []
    if told := differences(before, json.loads(json.dumps(facts))):
        raise DestinationError(
            f"{folder}: was begun by another plan ({'; '.join(told)}): the same command as then goes on, "
            f"or glm-jax gc {folder.parent} removes it"
        )
    return [stamps]


class Journal:
    """Which tensors are done, on the disk before anything relies on it. Each of several processes writes its own, and
    knows what all had written before. `scales` go into tensors, and are looked at with them."""

    def __init__(self, folder: Path, tensors: Mapping[str, Record], scales: Mapping[str, Tensor] | None = None):
        self.folder, self.tensors, self.scales, self.lock = folder, tensors, scales or {}, threading.Lock()
        self.path = folder / f"journal-{processes.index()}.jsonl"
        self.read()
        with blamed_on(self.path, 0):
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            own = os.pread(self.fd, os.fstat(self.fd).st_size, 0)
            os.ftruncate(self.fd, own.rfind(b"\n") + 1)  # a last line may be torn
            os.lseek(self.fd, 0, os.SEEK_END)

    def read(self) -> None:
        """Takes in what all processes have written by now."""
        most = 1000 * (1000 + len(self.tensors))  # a name has 512 bytes at most, escaped more
        for path in sorted(self.folder.glob("journal-*.jsonl")):
            for number, line in enumerate(read_small(path, most).split(b"\n")[:-1], 1):
                name, digest, wrong = _entry(path, line, number)
                if name in self.tensors:
                    self.tensors[name].sha256, self.tensors[name].nonfinite = digest, wrong

    def add(self, found: Sequence[tuple[Part, str, int]]) -> None:
        found = [(part, digest, wrong + self._scale(part.name)) for part, digest, wrong in found]
        text = "".join(json.dumps([part.name, digest, wrong]) + "\n" for part, digest, wrong in found).encode()
        with self.lock:
            with blamed_on(self.path, len(text)):
                os.write(self.fd, text)
                os.fdatasync(self.fd)
            for part, digest, wrong in found:
                self.tensors[part.name].sha256, self.tensors[part.name].nonfinite = digest, wrong

    def _scale(self, name: str) -> int:
        """How many numbers of a tensor's scale are wrong."""
        scale = self.scales.get(name)
        return wrong_numbers(scale.read().tobytes(), scale.dtype, True) if scale else 0

    def close(self) -> None:
        os.close(self.fd)


def _entry(path: Path, line: bytes, number: int) -> tuple[str, str, int]:
    """What a line of a journal says: tensor, SHA-256, how many numbers are wrong."""
    try:
        name, digest, wrong = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        name = digest = wrong = None
    if type(name) is not str or not native.is_digest(digest) or not native.is_count(wrong):
        raise BadInput(f"{path}: line {number:,} is damaged: remove {path.parent}, and it begins anew")
    return name, digest, wrong


class Watch:
    """Says how far the work is, a few times a second."""

    def __init__(self, total: int, on_event: Event):
        self.total, self.done, self.on_event, self.lock = total, 0, on_event, threading.Lock()
        self.recent, self.said = [(time.monotonic(), 0)], 0.0

    def passed(self, nbytes: int, tensor: str) -> None:
        with self.lock:
            self.done += nbytes
            now = time.monotonic()
            if now - self.said < 0.2 and self.done < self.total:
                return
            self.said = now
            self.recent = [r for r in self.recent if now - r[0] < 10] or self.recent[-1:]
            self.recent.append((now, self.done))
            rate = (self.done - self.recent[0][1]) / max(now - self.recent[0][0], 1e-9)
            event = {"event": "progress", "done": min(self.done, self.total), "total": self.total, "tensor": tensor}
            event |= {"bytes_per_s": round(rate), "memory": resident()}
            self.on_event(event | {"eta_s": round((self.total - self.done) / rate, 1) if rate else None})


def resident() -> int:
    """Bytes of memory that this process has; 0 where /proc does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def run(jobs: Sequence[tuple], journal: Callable[[], Journal], on_event: Event, workers: int, nonfinite: str) -> None:
    """Streams every (content, size, parts, target, stamp) that the journal does not have as done; of several processes
    each does its share, and waits for the others."""
    with processes.agreed():
        log = journal()
    known = log.tensors
    with processes.agreed():
        try:
            _run(shares([size for _, size, *_ in jobs]), jobs, log, on_event, workers)
        finally:
            log.close()
    with processes.agreed():
        if processes.count() > 1:
            log.read()
        _refuse_wrong(known, nonfinite, log.scales)


def _refuse_wrong(tensors: Mapping[str, Record], nonfinite: str, scales: Mapping[str, Any] | None = None) -> None:
    """BadInput if numbers are not finite, or scales zero, and that is an error."""
    wrong = {name: t.nonfinite for name, t in tensors.items() if t.nonfinite}
    if wrong and nonfinite != "record":
        zero = lambda name: "zero or " if name.endswith(SCALES) else "zero scales or " if name in (scales or {}) else ""
        told = ", ".join(f"{name} ({n:,} {zero(name)}not finite)" for name, n in [*wrong.items()][:4])
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        advice = "--nonfinite record goes on from here and counts them; what was made stays beside the target"
        raise BadInput(f"{told}{more}: {advice if nonfinite == 'error' else nonfinite}")


def shares(sizes: Sequence[int]) -> list[int]:
    """Which of things of such sizes are this process's: the largest first, each to who has least."""
    load, mine = [0] * processes.count(), []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = load.index(min(load))
        load[least] += sizes[i]
        if least == processes.index():
            mine.append(i)
    return sorted(mine)


def _run(mine: Sequence[int], jobs: Sequence[tuple], log: Journal, on_event: Event, workers: int) -> None:
    watch, stop = Watch(sum(jobs[i][1] for i in mine), on_event), threading.Event()

    def one(i: int) -> None:
        content, size, parts, at, stamp = jobs[i]
        if at is not None and not (at.is_file() and not at.is_symlink() and at.stat().st_size == size):
            todo = list(parts)  # the journal may be of a file that is gone
        else:
            first = next((i for i, part in enumerate(parts) if log.tensors[part.name].sha256 is None), len(parts))
            todo = list(parts[first:])
        start = todo[0].offset if len(todo) < len(parts) and todo else 0  # the header was written with the first
        watch.passed(start if todo else size, parts[0].name if parts else "")
        stream(content, size, todo, log.add, watch.passed, stop, at, stamp, start)

    in_parallel(one, mine, workers, stop)


def in_parallel(one: Callable[[Any], None], those: Iterable[Any], workers: int, stop: threading.Event) -> None:
    """Calls `one` with each of those, some at once. What goes wrong in one sets `stop` for the others and is raised."""
    with _asked_to_end() as asked, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            # What is raised while a thread is started leaves one that the pool does not know of: `stop` ends it too.
            pending = {pool.submit(one, it) for it in those}
            while pending:
                done, pending = concurrent.futures.wait(pending, 0.1, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    future.result()
                if asked:
                    raise KeyboardInterrupt
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _asked_to_end():
    """A list that grows with every Ctrl-C, which raises nothing meanwhile: raised anywhere in a pool it could leave a
    lock taken, and in a destructor it is lost. For the main thread, which alone is sent signals."""
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield asked
        return
    signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def finish(folder: Path, target: Path, manifest: Manifest) -> None:
    """Writes what makes the folder whole, the seal last, and gives it its name."""
    small = index_files(manifest)
    data = manifest.to_bytes()
    small[native.manifest_name(data)] = data
    digests = {name: sha256(content) for name, content in small.items()}
    digests |= {f"{HF}/{name}": digest for name, digest in manifest.facts["beside"].items()}
    write_small(folder, small)
    write_small(folder, {SEAL: native.seal_bytes(native.manifest_name(data), digests)})
    _rename(folder, target)


def _rename(folder: Path, target: Path) -> None:
    sealed = json.loads(read_small(folder / SEAL))["files"]
    with blamed_on(folder, 0):
        for name in os.listdir(folder):  # what the way here needed, and manifests of tries that ended before the seal
            if name.startswith(("journal-", "plan.json", "glm_manifest-")) and name not in sealed:
                (folder / name).unlink()
        native.sync_folders([folder, folder / HF])
    with blamed_on(target, 0):
        if target.is_dir():
            target.rmdir()  # an empty one may be there
        os.rename(folder, target)
        native.sync_folders([target.parent])


def gc(folder: "str | Path") -> list[Path]:
    """Removes from a folder, or beside a target of this name, what conversions and exports have left that were begun
    and that nobody goes on with now. Returns what was removed. Raises MissingInput where there is no such folder."""
    folder, removed = Path(folder).expanduser(), []
    beside = [folder.with_name(folder.name + STAGING)] if folder.name else []
    if not folder.is_dir() and not any(path.is_dir() for path in beside):
        raise MissingInput(f"{folder}: no such folder, and nothing was begun beside it")
    for path in sorted([*beside, *folder.glob(f"*{STAGING}")]):
        if path.is_symlink() or not path.is_dir():  # made by nobody of ours
            continue
        with contextlib.suppress(Locked), locked(path.with_name(path.name.removesuffix(STAGING))):
            shutil.rmtree(path)
            removed.append(path)
    return removed
