"""From a converted folder back to a Hugging Face one."""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glm_jax import processes
from glm_jax.convert import native
from glm_jax.convert.conversion import (
    HELD,
    MEMORY,
    STAGING,
    WORKERS,
    Event,
    Journal,
    Watch,
    apart,
    base_bytes,
    check_space,
    fitting,
    gc,
    in_parallel,
    locked,
    make_parent,
    run,
    staging,
)
from glm_jax.convert.native import HF, SEAL, Manifest, Record, misplaced, sync_folders, write_small
from glm_jax.convert.planning import Output, Part, sha256
from glm_jax.convert.safetensors import (
    INDEX,
    SINGLE,
    Tensor,
    blamed_on,
    header_bytes,
    read_folder,
    read_raw_header,
    read_small,
)
from glm_jax.convert.streaming import made_of, stream
from glm_jax.convert.table import file_order
from glm_jax.convert.trained import Trained, trained
from glm_jax.errors import BadInput, DestinationError, GLMError, MissingInput, UsageError

SHARD = 5_000_000_000  # bytes of tensors in a file, at most


def export(
    source: "str | Path",
    target: "str | Path",
    exact: bool = False,
    weights: "Mapping[str, Any] | str | Path | None" = None,
    shard_bytes: int = SHARD,
    workers: int = WORKERS,
    memory: int = MEMORY,
    on_event: Event = lambda event: None,
) -> list[Path]:
    """Writes a Hugging Face folder of a converted one: with `exact` the files that were converted, byte for byte, else
    shards of `shard_bytes`. Every tensor is compared with its digest, if that is known, as it goes by. The same call
    again goes on where an earlier one ended. Returns the files of weights.

    `weights` are what was trained: arrays by their path ("moe.mlp.gate_up" [L, E, 2, F, D]), or the Orbax checkpoint
    that holds them, of which a chunk at a time has to fit into `memory`. They take the place of the source's, in the
    dtype that these have. What is not among them stays as it was.

    Raises UsageError for `exact` where the bytes are not the source's, and for weights that the source does not have;
    BadInput for a tensor that was changed, or a trained one that is not finite; DestinationError, NoSpace and Locked as
    `convert`."""
    folder, target = Path(source).expanduser(), Path(os.path.abspath(Path(target).expanduser()))
    with processes.agreed():
        if not native.is_native(folder):
            raise MissingInput(f"{folder}: no {SEAL}, so not made by glm-jax convert, or never finished")
        if shard_bytes < 1:
            raise UsageError(f"shard_bytes {shard_bytes}: at least 1")
        manifest, _ = native.read(folder)
        if exact and (manifest.mode == "repack" or manifest.dropped):
            was = f"--dtype {manifest.facts['dtype']}" if manifest.mode == "repack" else "--mtp drop"
            raise UsageError(f"--exact: {folder} was converted with {was}, so the source's bytes are not in it")
        if exact and weights is not None:
            raise UsageError("--exact and --weights exclude each other: with other weights the bytes are others")
        workers = fitting(workers, memory, len(manifest.tensors))
        apart(target, folder)
        held = read_folder(folder / HF)
        if wrong := misplaced(manifest, held):
            raise BadInput(f"{folder}: {', '.join(wrong[:3])}: not as the manifest says: glm-jax verify {folder}")
        tensors: dict[str, Tensor | Trained] = {**held}
        stamps: dict[str, Any] = {t.file.name: list(t.stamp) for t in held.values()}
        changed: dict[str, Trained] = {}
        if weights is not None:
            spent = base_bytes(len(manifest.tensors)) + HELD
            changed, stamps["weights"], workers = trained(weights, manifest, memory, spent, workers)
            tensors |= changed
        beside = {name: read_small(folder / HF / name) for name in manifest.facts["beside"]}
        for name, data in beside.items():
            if sha256(data) != manifest.facts["beside"][name]:
                raise BadInput(f"{folder / HF / name}: was changed: glm-jax verify {folder}")
        if exact:
            outputs = []
            for file in sorted(manifest.files):
                here = [t for t in held.values() if t.file.name == file]
                parts = tuple(Part(t.name, t.dtype, t.shape, t.offset, t.nbytes) for t in here)
                outputs.append(Output(file, True, read_raw_header(folder / HF / file), parts))
        else:
            outputs = list(_shards(tensors, shard_bytes, target))
            beside.pop(INDEX, None)
            if len(outputs) > 1:
                where = {part.name: output.name for output in outputs for part in output.parts}
                index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
                index["weight_map"] = dict(sorted(where.items()))
                beside[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    facts = {"export": manifest.facts, "exact": exact, "files": {o.name: [o.size, sha256(o.header)] for o in outputs}}
    contents = [
        folder / HF / o.name if o.verbatim else made_of(o.header, o.parts, tensors)  # type: ignore[arg-type]
        for o in outputs
    ]
    records = {p.name: Record(p.dtype, p.shape, o.name, p.offset, p.nbytes) for o in outputs for p in o.parts}
    journal = lambda staged: _Checked(staged, records, manifest, changed)
    replaced = {array.path for array in manifest.arrays if set(array.tensors) & changed.keys()}
    told = {"files": len(outputs), "replaced": len(replaced), "arrays": len(manifest.arrays)}
    known = {name: None if name in changed else t.sha256 for name, t in manifest.tensors.items()}
    with processes.agreed():
        done = processes.index() == 0 and _is_there(target, outputs, contents, beside, known, workers, on_event)
    if processes.exchange(done)[0]:
        on_event({"event": "done", "already": True} | told)
        return [target / output.name for output in outputs]
    staged = target.with_name(target.name + STAGING)
    with contextlib.ExitStack() as held_open:
        with processes.agreed():
            if processes.index() == 0:
                _begin(target, sum(output.size for output in outputs), facts, stamps, held_open)
        jobs = [
            (content, output.size, output.parts, staged / HF / output.name, None)
            for content, output in zip(contents, outputs, strict=True)
        ]
        wrong = "in the arrays of --weights; nothing was exported" if changed else "record"
        run(jobs, lambda: journal(staged), on_event, workers, wrong)
        with processes.agreed():
            if processes.index() == 0:
                write_small(staged, {f"{HF}/{name}": data for name, data in beside.items()})
                with blamed_on(target, 0):
                    if target.is_dir():
                        target.rmdir()
                    os.rename(staged / HF, target)
                    sync_folders([target.parent])
                    shutil.rmtree(staged)
    on_event({"event": "done", "already": False} | told)
    return [target / output.name for output in outputs]


def _begin(target: Path, nbytes: int, facts, stamps, held: contextlib.ExitStack) -> None:
    make_parent(target)
    held.enter_context(locked(target))
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise DestinationError(f"{target}: is there already and not empty; give another folder, or remove it")
    check_space(target.parent, nbytes, target.with_name(target.name + STAGING))
    held.enter_context(staging(target, facts, stamps))


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int, target: Path) -> Iterator[Output]:
    shards: list[list[Tensor]] = [[]]
    for tensor in sorted(tensors.values(), key=lambda t: file_order(t.name)):
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        shard.sort(key=lambda t: -t.nbytes // max(1, _numbers(t)))  # wide numbers first, so that each is aligned
        header = header_bytes([(t.name, t.dtype, t.shape) for t in shard], {"format": "pt"}, target / name)
        parts, offset = [], len(header)
        for t in shard:
            parts.append(Part(t.name, t.dtype, t.shape, offset, t.nbytes))
            offset += t.nbytes
        yield Output(name, False, header, tuple(parts))


def _numbers(tensor: Tensor) -> int:
    count = 1
    for n in tensor.shape:
        count *= n
    return count


def _is_there(target: Path, outputs: list[Output], contents, beside, known, workers: int, on_event: Event) -> bool:
    """Whether this export was finished: every byte is compared, since other weights look the same from outside. Raises
    DestinationError for a folder of the same files with something else in them."""
    try:
        for o in outputs:
            if (target / o.name).stat().st_size != o.size or read_raw_header(target / o.name) != o.header:
                return False
    except (OSError, GLMError):
        return False
    differ = [name for name, data in beside.items() if not _holds(target / name, data)]
    watch, stop = Watch(sum(output.size for output in outputs), on_event), threading.Event()

    def one(at: int) -> None:
        there: dict[str, str] = {}
        want = {part.name: known[part.name] for part in outputs[at].parts}
        keep = lambda into: lambda done: into.update({part.name: digest for part, digest, _ in done})
        look = lambda content, into, passed: stream(
            content, outputs[at].size, outputs[at].parts, keep(into), passed, stop
        )
        look(target / outputs[at].name, there, watch.passed)
        if None in want.values():
            look(contents[at], want, lambda nbytes, tensor: None)
        differ.extend(name for name in want if there[name] != want[name])

    in_parallel(one, range(len(outputs)), workers, stop)
    if differ:
        raise DestinationError(
            f"{target}: is there already, with another {', '.join(sorted(differ)[:3])}"
            f"{f' and {len(differ) - 3} more' if len(differ) > 3 else ''}; give another folder, or remove it"
        )
    gc(target)  # it ended before it had cleared up
    return True


def _holds(path: Path, data: bytes) -> bool:
    try:
        return read_small(path) == data
    except GLMError:
        return False


class _Checked(Journal):
    """A journal that lets nothing by that is not what the manifest says, but for what was trained."""

    def __init__(self, folder: Path, records, manifest: Manifest, changed):
        super().__init__(folder, records)
        self.manifest, self.changed = manifest, changed

    def add(self, found) -> None:
        for part, digest, _ in found:
            want = self.manifest.tensors[part.name].sha256
            if part.name not in self.changed and want is not None and want != digest:
                raise BadInput(f"{part.name}: is not what was recorded; nothing was exported: glm-jax verify says more")
        # What the source had that is not finite was said when it was converted.
        super().add([(part, digest, wrong if part.name in self.changed else 0) for part, digest, wrong in found])
