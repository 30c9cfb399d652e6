"""The verbs of `glm-jax` that look after checkpoints. They import neither jax nor orbax, so they begin at once."""

import argparse
import contextlib
import gc as garbage
import json
import sys
from typing import Any

from glm_jax import console
from glm_jax.convert.conversion import MEMORY, MODES, WORKERS


def convert(args: argparse.Namespace) -> int:
    """A Hugging Face folder into one that Orbax restores on any mesh; the same command again resumes."""
    from glm_jax.convert import convert

    keys = ("mode", "dtype", "mtp", "digest", "nonfinite", "workers", "memory", "dry_run")
    options = {key: getattr(args, key) for key in (*keys, "revision", "token", "offline")}
    with _events(args, "converting") as (on_event, said):
        made = convert(args.source, args.target, **options, on_event=on_event)
    if made.left:
        _say(args, f"left behind: {', '.join(made.left)}")
    facts = {"mode": made.mode, "why": made.why, "tensors": len(made.tensors), "arrays": len(made.arrays)}
    facts |= {"aliases": made.aliases, "dropped": len(made.dropped), "left": made.left, "root": made.root}
    facts |= {"bytes": sum(f["size"] for f in made.files.values()), "dry_run": args.dry_run}
    if args.dry_run and not said.get("already"):
        facts |= {key: said[key] for key in ("writes", "memory", "read_bytes_per_s")}
    done = " is already complete" if said.get("already") else ""
    facts["already"] = bool(done)
    text = f"{'would convert' if args.dry_run and not done else args.target}{done}: {made.mode}, since {made.why}; "
    text += f"{len(made.tensors):,} tensors in {len(made.arrays)} arrays, {facts['bytes']:,} bytes"
    if args.dry_run and not said.get("already"):
        text += f"; {said['writes']:,} of them to be written, {said['memory'] / 2**20:.0f} MiB of memory"
        if speed := said["read_bytes_per_s"]:
            text += f", {_time(facts['bytes'] / speed)} to read and digest it by one worker ({speed / 1e6:,.0f} MB/s)"
    else:
        text += f"; root {made.root[:16]}" if made.root else "; not digested"
    _answer(args, facts, text)
    return 0


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def verify(args: argparse.Namespace) -> int:
    """Every byte of a converted folder against its digest, and its structure; exit 0 only if all match."""
    from glm_jax.convert import verify

    with _events(args, "checking") as (on_event, said):
        options = {"workers": args.workers, "memory": args.memory}
        made = verify(args.path, args.structure, args.source, **options, on_event=on_event)
    if made is None:
        facts = {key: said[key] for key in ("tensors", "files", "files_digested")} | {"root": None}
        text = f"{args.path}: headers, index and config.json agree on {said['tensors']:,} tensors; "
        text += f"{said['files_digested']} of {said['files']} files are what the Hub's cache calls them"
        text += "" if said["files_digested"] else " (only there has a file a digest before it is converted)"
        _answer(args, facts, text)
        return 0
    wrong = sum(t.nonfinite or 0 for t in made.tensors.values())
    facts = {"tensors": len(made.tensors), "root": made.root, "recorded": said["recorded"], "not_finite": wrong}
    text = f"{args.path}: structure{'' if args.structure or said['recorded'] else ' and every byte'} as recorded"
    if said["recorded"]:
        text += f"; the digests of {said['recorded']:,} tensors were not known, and are recorded now"
    _answer(args, facts, text + (f"; {wrong:,} numbers are not finite" if wrong else ""))
    return 0


def export(args: argparse.Namespace) -> int:
    """A converted folder back to a Hugging Face one; the same command again resumes."""
    from glm_jax.convert import export

    with _events(args, "exporting") as (on_event, said):
        options = {"workers": args.workers, "memory": args.memory}
        files = export(args.source, args.target, args.exact, args.weights, **options, on_event=on_event)
    facts = {"files": [f.name for f in files], "already": said.get("already", False), "replaced": said["replaced"]}
    text = f"{args.target}{' is already complete' if facts['already'] else ''}: {len(files)} files of weights"
    if args.weights:
        text += f", {facts['replaced']} of {said['arrays']} arrays from {args.weights}"
    _answer(args, facts, text)
    return 0


def gc(args: argparse.Namespace) -> int:
    """Removes what conversions and exports that were cut off have left in a folder."""
    from glm_jax.convert import gc

    removed = gc(args.path)
    text = "\n".join(f"removed {path}" for path in removed) or "nothing to remove"
    _answer(args, {"removed": [str(path) for path in removed]}, text)
    return 0


def add_verbs(add, hub_flags, process_flags) -> None:
    p = add("convert", convert, (_work_flags, process_flags))
    p.add_argument("source", metavar="SRC", help="a Hugging Face folder, a converted one, or a Hub id")
    p.add_argument("target", metavar="DST", help="the folder to make")
    hub_flags(p)
    p.add_argument("--mode", choices=MODES, default="auto", help="index: link the shards; copy; repack: another dtype")
    p.add_argument("--dtype", choices=("bf16", "f32"), help="to store weights in (default: as they are, FP8 too)")
    p.add_argument("--mtp", choices=("keep", "drop"), default="keep", help="the MTP layer (default keep)")
    p.add_argument("--digest", action="store_true", help="with index: read everything once, for its digests")
    p.add_argument("--nonfinite", choices=("error", "record"), default="error", help="what NaN and infinities are")
    p.add_argument("--dry-run", action="store_true", help="check the source and say what would be done")
    p = add("verify", verify, (_work_flags, process_flags))
    p.add_argument("path", metavar="PATH", help="a converted folder, or one of Hugging Face's")
    p.add_argument("--structure", action="store_true", help="headers, index and small files only")
    p.add_argument("--source", metavar="SRC", help="compare with the original too")
    p = add("export", export, (_work_flags, process_flags))
    p.add_argument("source", metavar="SRC", help="a converted folder")
    p.add_argument("target", metavar="DST", help="the Hugging Face folder to make")
    p.add_argument("--exact", action="store_true", help="the files that were converted, byte for byte")
    p.add_argument("--weights", metavar="PATH", help="an Orbax checkpoint whose arrays take the place of SRC's")
    p = add("gc", gc, ())
    p.add_argument("path", metavar="FOLDER", help="where the conversions were made")


def _work_flags(p: argparse.ArgumentParser):
    p.add_argument("--workers", type=int, default=WORKERS, metavar="N", help=f"files at once (default {WORKERS})")
    about = f"that it may take: fewer workers where it does not do (default {MEMORY >> 20}MiB)"
    p.add_argument("--memory", type=console.size, default=MEMORY, metavar="SIZE", help=about)
    p.add_argument("--progress", choices=("auto", "json", "none"), default="auto", help="on stderr (default auto)")


@contextlib.contextmanager
def _events(args: argparse.Namespace, what: str):
    """What is told of the work, as a bar or a line of JSON for each event; and a dict of what was told last."""
    garbage.set_threshold(100_000)  # a plan is many objects, of which none is garbage
    said: dict[str, Any] = {}
    bar = args.progress == "auto" and not args.quiet
    with console.progress(what, not bar) as progress:

        def on_event(event: dict[str, Any]) -> None:
            said.update(event)
            if args.progress == "json":
                print(json.dumps(event), file=sys.stderr, flush=True)
            elif progress and event["event"] == "progress":
                more = f"{event['memory'] / 2**20:.0f} MiB of memory, at {event['tensor']}"
                progress(event["done"], event["total"], more)

        yield on_event, said


def _answer(args: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    print(json.dumps(facts) if args.json else text)


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, file=sys.stderr)
