"""Whether a converted checkpoint is what it was: structure, index and every byte."""

import hashlib
import os
import re
import threading
import warnings
from pathlib import Path

from glm_jax import processes
from glm_jax.convert import native
from glm_jax.convert.conversion import MEMORY, WORKERS, Event, Watch, fitting, in_parallel, locked, shares
from glm_jax.convert.hub import fetch_whole
from glm_jax.convert.native import HF, SEAL, Manifest, index_files, manifest_name, misplaced, seal_bytes, write_small
from glm_jax.convert.planning import STORED, Output, Part, Plan, plan, sha256
from glm_jax.convert.safetensors import opened, read_raw_header
from glm_jax.convert.streaming import made_of, stream
from glm_jax.errors import BadInput, DestinationError, GLMError, MissingInput, show

_MOST_SMALL = 100_000_000  # bytes of a file that the seal names: Orbax's index may be as long


def verify(
    path: "str | Path",
    structure: bool = False,
    source: "str | Path | None" = None,
    workers: int = WORKERS,
    memory: int = MEMORY,
    on_event: Event = lambda event: None,
) -> Manifest | None:
    """Checks a converted folder: the seal, every small file, Orbax's index against what it should be, the headers of
    the shards, and, unless `structure`, every tensor against its SHA-256. A conversion that read nothing has none: the
    first check records them. With `source` the original too is compared, as far as it has been kept as it was.

    Of a Hugging Face folder it checks headers, index and config.json against each other, and the files that the Hub's
    cache holds under their SHA-256 against that, and returns None. Of several processes all must call it.

    Raises BadInput with all that is wrong, MissingInput for a folder that is not there."""
    folder = Path(path).expanduser()
    if not native.is_native(folder):
        if source is not None or (folder / HF).is_dir():
            raise MissingInput(f"{folder}: no {SEAL}, so not made by glm-jax convert, or never finished")
        _hugging_face(path, structure, workers, memory, on_event)
        return None
    with processes.agreed():
        manifest, small = native.read(folder)
        workers = fitting(workers, memory, len(manifest.tensors))
        if not structure and manifest.root is None and not os.access(folder, os.W_OK):
            raise DestinationError(
                f"{folder}: its digests are not known yet, and cannot be recorded since it cannot be written: "
                "--structure checks the rest"
            )
        problems, made = _structure(folder, manifest, small), None
        if source is not None:
            made = plan(fetch_whole(source), _asked(manifest.facts["dtype"]), manifest.facts["mtp"])
            facts = made.facts
            for key in ("files", "beside"):
                for name in sorted({*facts[key], *manifest.facts[key]}):
                    if facts[key].get(name) != manifest.facts[key].get(name):
                        problems.append(f"{source}: {name} is not the file that was converted")
        _refuse(folder, problems)
    new: dict[str, tuple[str, int]] = {}
    if not structure:
        with processes.agreed():
            mine, problems = _bytes(folder, manifest, workers, on_event)
            if made is not None and not problems:
                problems = _same_as_source(made, mine, workers, on_event)
        for found, wrong in processes.exchange([mine, problems]):
            new |= {name: (digest, count) for name, (digest, count) in found.items()}
            problems += [words for words in wrong if words not in problems]
        _refuse(folder, sorted(problems))
    unknown = sum(manifest.tensors[name].sha256 is None for name in new)
    with processes.agreed():
        if unknown:
            _record(folder, manifest, new)
    on_event({"event": "done", "tensors": len(manifest.tensors), "root": manifest.root, "recorded": unknown})
    return manifest


def _asked(stored: str | None) -> str | None:
    """The --dtype that stores weights so."""
    return next((dtype for dtype, name in STORED.items() if name == stored), None)


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise BadInput(f"{folder}: " + "; ".join(problems[:8]) + more)


def _hugging_face(path: "str | Path", structure: bool, workers: int, memory: int, on_event: Event) -> None:
    """Checks a folder that was not converted, as far as it can be: it has no digests but what the Hub's cache calls its
    files, of those that came through its large file storage."""
    made = plan(fetch_whole(path))
    workers = fitting(workers, memory, len(made.tensors))
    files = {t.file: t.stamp[0] for t in made.tensors.values()}
    named = {f: f.resolve().name for f in files if f.is_symlink() and re.fullmatch("[0-9a-f]{64}", f.resolve().name)}
    watch, problems, stop = Watch(sum(files[f] for f in named), on_event), [], threading.Event()

    def one(file: Path) -> None:
        whole = Part(file.name, "U8", (files[file],), 0, files[file])
        found = lambda done: problems.extend(
            f"{file.name} is not what the Hub has under its name" for _, digest, _ in done if digest != named[file]
        )
        stream(file, files[file], [whole], found, watch.passed, stop)

    if not structure:
        in_parallel(one, sorted(named), workers, stop)
        _refuse(made.source, sorted(problems))
    checked = 0 if structure else len(named)
    on_event({"event": "done", "tensors": len(made.tensors), "files": len(files), "files_digested": checked})


def _structure(folder: Path, manifest: Manifest, small: dict[str, str]) -> list[str]:
    problems = []
    known = {*small, SEAL, *(f"{HF}/{name}" for name in manifest.files)}
    for at, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(Path(at) / name)]
        for name in [*files, *links]:
            inside = str((Path(at) / name).relative_to(folder))
            if native.is_leftover(inside, small) and name not in links:
                continue
            if inside not in known or name in links:
                problems.append(f"{inside if inside.isprintable() else show(inside)} does not belong here")
        if links:  # nothing is read behind them
            return problems
    for name, want in small.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name} is missing")
        elif _digest(path) != want:
            problems.append(f"{name} was changed")
    for name, data in index_files(manifest).items():
        if small.get(name) != sha256(data):
            problems.append(f"{name} is not the index of these shards")
    for name, facts in manifest.files.items():
        path = folder / HF / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{HF}/{name} is missing")
        elif path.stat().st_size != facts["size"]:
            problems.append(f"{HF}/{name} has {path.stat().st_size:,} bytes, not {facts['size']:,}")
        else:
            try:
                same = sha256(read_raw_header(path)) == facts["header"]
            except GLMError:
                same = False
            problems += [] if same else [f"the header of {HF}/{name} was changed"]
    return problems or _as_planned(folder, manifest)


def _digest(path: Path) -> str | None:
    """The SHA-256 of a small file, None of one that is not small."""
    with opened(path) as (fd, (size, _)), open(fd, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if size <= _MOST_SMALL else None


def _as_planned(folder: Path, manifest: Manifest) -> list[str]:
    """Whether tensors, arrays and aliases are those of the model in state/hf, as a plan of it has them: a seal and a
    manifest that fit each other may still show Orbax another model than Hugging Face's tools."""
    with warnings.catch_warnings():  # the conversion has said it
        warnings.simplefilter("ignore")
        made = plan(folder / HF)
    if wrong := misplaced(manifest, made.tensors):
        return [f"{len(wrong)} tensors are not where the manifest says: {', '.join(wrong[:3])}"]
    there, told = ({a.path: a for a in arrays} for arrays in (made.arrays, manifest.arrays))
    wrong = sorted(path for path in {*there, *told} if there.get(path) != told.get(path))
    problems = [f"array {path} is not the stack of tensors that it should be" for path in wrong]
    return problems + (["aliases are not this model's"] if made.aliases != manifest.aliases else [])


def _bytes(folder: Path, manifest: Manifest, workers: int, on_event: Event):
    """({tensor: (SHA-256, wrong numbers)}, problems) of all shards."""
    problems, new = [], {}

    def found(done):
        for part, digest, wrong in done:
            new[part.name] = digest, wrong
            if (want := manifest.tensors[part.name].sha256) is not None and want != digest:
                problems.append(f"{part.name} in {manifest.tensors[part.name].file} is not what was recorded")

    _stream_all(folder / HF, manifest, _share(manifest, sorted(manifest.files)), found, workers, on_event)
    return new, sorted(problems)


def _same_as_source(made: Plan, new, workers: int, on_event: Event) -> list[str]:
    """Tensors of the source, made as they were made, that differ from those that are there."""
    problems: list[str] = []
    watch, stop = Watch(made.nbytes, on_event), threading.Event()
    files = {t.file.name: t.file for t in made.tensors.values()}

    def found(done):
        wrong = (part.name for part, digest, _ in done if new.get(part.name, (digest,))[0] != digest)
        problems.extend(f"{name} differs from {made.source}" for name in wrong)

    def one(output: Output) -> None:
        content = files[output.name]
        if not output.verbatim:
            content = made_of(output.header, output.parts, made.tensors, made.scales, made.blocks)
        stream(content, output.size, output.parts, found, watch.passed, stop)

    outputs = sorted(made.outputs, key=lambda output: output.name)
    in_parallel(one, [outputs[i] for i in shares([output.size for output in outputs])], workers, stop)
    return sorted(problems)


def _share(manifest: Manifest, files: list[str]) -> list[str]:
    return [files[i] for i in shares([manifest.files[file]["size"] for file in files])]


def _stream_all(folder: Path, manifest: Manifest, files: list[str], found, workers: int, on_event: Event) -> None:
    """The tensors of these shards, in a folder."""
    parts: dict[str, list[Part]] = {file: [] for file in files}
    for name, t in manifest.tensors.items():
        if t.file in parts:
            parts[t.file].append(Part(name, t.dtype, t.shape, t.offset, t.nbytes))
    watch = Watch(sum(manifest.files[file]["size"] for file in parts), on_event)
    stop = threading.Event()
    in_order = lambda file: sorted(parts[file], key=lambda p: (p.offset, p.nbytes))
    one = lambda file: stream(folder / file, manifest.files[file]["size"], in_order(file), found, watch.passed, stop)
    in_parallel(one, sorted(parts), workers, stop)


def _record(folder: Path, manifest: Manifest, new) -> None:
    """Writes the digests: a new manifest beside the old one, then the seal that names it, then the old one goes."""
    for name, (digest, wrong) in new.items():
        manifest.tensors[name].sha256, manifest.tensors[name].nonfinite = digest, wrong
    if processes.index():
        return
    with locked(folder.resolve()):
        there, small = native.read(folder)  # another check may have been faster
        for name, t in there.tensors.items():
            if t.sha256 not in (None, manifest.tensors[name].sha256):
                raise BadInput(f"{folder}: {name} is not what another check has just recorded: glm-jax verify {folder}")
        data = manifest.to_bytes()
        name = manifest_name(data)
        digests = {n: d for n, d in small.items() if not n.startswith("glm_manifest-")} | {name: sha256(data)}
        write_small(folder, {name: data})
        write_small(folder, {SEAL: seal_bytes(name, digests)})
        for leftover in os.listdir(folder):
            if native.is_leftover(leftover, digests):
                (folder / leftover).unlink(missing_ok=True)
