"""From a converted folder back to a Hugging Face one."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from glm_jax.convert import native
from glm_jax.convert.conversion import (
    STAGING,
    WORKERS,
    Event,
    Journal,
    Watch,
    check_space,
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
from glm_jax.convert.streaming import made_of
from glm_jax.convert.table import file_order
from glm_jax.errors import BadInput, DestinationError, GLMError, MissingInput, UsageError

SHARD = 5_000_000_000  # bytes of tensors in a file, at most


def export(
    source: "str | Path",
    target: "str | Path",
    exact: bool = False,
    shard_bytes: int = SHARD,
    workers: int = WORKERS,
    on_event: Event = lambda event: None,
) -> list[Path]:
    """Writes a Hugging Face folder of a converted one: with `exact` the files that were converted, byte for byte, else
    shards of `shard_bytes`. Every tensor is compared with its digest, if that is known, as it goes by. The same call
    again goes on where an earlier one ended. Returns the files of weights.

    Raises UsageError for `exact` where the bytes are not the source's, BadInput for a tensor that was changed,
    DestinationError, NoSpace and Locked as `convert`."""
    folder, target = Path(source).expanduser(), Path(os.path.abspath(Path(target).expanduser()))
    if not native.is_native(folder):
        raise MissingInput(f"{folder}: no {SEAL}, so not made by glm-jax convert, or never finished")
    if shard_bytes < 1:
        raise UsageError(f"shard_bytes {shard_bytes}: at least 1")
    manifest, _ = native.read(folder)
    if exact and (manifest.mode == "repack" or manifest.dropped):
        was = f"--dtype {manifest.facts['dtype']}" if manifest.mode == "repack" else "--mtp drop"
        raise UsageError(f"--exact: {folder} was converted with {was}, so the source's bytes are not in it")
    tensors = read_folder(folder / HF)
    if wrong := misplaced(manifest, tensors):
        raise BadInput(f"{folder}: {', '.join(wrong[:3])}: not as the manifest says: glm-jax verify {folder}")
    beside = {name: read_small(folder / HF / name) for name in manifest.facts["beside"]}
    for name, data in beside.items():
        if sha256(data) != manifest.facts["beside"][name]:
            raise BadInput(f"{folder / HF / name}: was changed: glm-jax verify {folder}")
    if exact:
        outputs = []
        for file in sorted(manifest.files):
            held = [t for t in tensors.values() if t.file.name == file]
            parts = tuple(Part(t.name, t.dtype, t.shape, t.offset, t.nbytes) for t in held)
            outputs.append(Output(file, True, read_raw_header(folder / HF / file), parts))
    else:
        outputs = list(_shards(tensors, shard_bytes, target))
        beside.pop(INDEX, None)
        if len(outputs) > 1:
            where = {part.name: output.name for output in outputs for part in output.parts}
            index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
            index["weight_map"] = dict(sorted(where.items()))
            beside[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    return _write(folder, target, manifest, tensors, outputs, beside, exact, workers, on_event)


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


def _write(folder, target, manifest: Manifest, tensors, outputs, beside, exact, workers, on_event) -> list[Path]:
    names = [output.name for output in outputs]
    facts = {"export": manifest.facts, "exact": exact, "files": {o.name: [o.size, sha256(o.header)] for o in outputs}}
    if _is_there(target, outputs):
        on_event({"event": "done", "already": True, "files": len(names)})
        return [target / name for name in names]
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise DestinationError(f"{target}: is there already and not empty; give another folder, or remove it")
    make_parent(target)
    nbytes = sum(output.size for output in outputs)
    check_space(target.parent, nbytes, target)
    stamps = {t.file.name: list(t.stamp) for t in tensors.values()}
    with locked(target), staging(target, facts, stamps) as staged:
        assert staged is not None  # an export has no seal
        records = {p.name: Record(p.dtype, p.shape, o.name, p.offset, p.nbytes) for o in outputs for p in o.parts}
        journal = _Checked(staged, records, manifest)
        jobs = []
        for output in outputs:
            content = folder / HF / output.name if output.verbatim else made_of(output.header, output.parts, tensors)
            jobs.append((content, output.size, output.parts, staged / HF / output.name, None))
        run(jobs, journal, Watch(nbytes, on_event), workers, "record")
        write_small(staged, {f"{HF}/{name}": data for name, data in beside.items()})
        with blamed_on(target, nbytes):
            if target.is_dir():
                target.rmdir()
            os.rename(staged / HF, target)
            sync_folders([target.parent])
            shutil.rmtree(staged)
    on_event({"event": "done", "files": len(names)})
    return [target / name for name in names]


def _is_there(target: Path, outputs: list[Output]) -> bool:
    """Whether an export was finished: it gets its name when it is whole."""
    try:
        there = all(
            (target / o.name).stat().st_size == o.size and read_raw_header(target / o.name) == o.header for o in outputs
        )
    except (OSError, GLMError):
        return False
    staged = target.with_name(target.name + STAGING)
    if there and staged.is_dir():  # it ended before it had cleared up
        shutil.rmtree(staged)
    return there


class _Checked(Journal):
    """A journal that lets nothing by that is not what the manifest says."""

    def __init__(self, folder: Path, records, manifest: Manifest):
        super().__init__(folder, records)
        self.manifest = manifest

    def add(self, found) -> None:
        for part, digest, _ in found:
            if (want := self.manifest.tensors[part.name].sha256) is not None and want != digest:
                raise BadInput(f"{part.name}: is not what was recorded; nothing was exported: glm-jax verify says more")
        super().add(found)
