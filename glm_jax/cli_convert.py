"""The verbs of `glm-jax` that look after checkpoints. They import neither jax nor orbax, so they begin at once."""

import argparse
import contextlib
import json
import sys
from typing import Any

from glm_jax import console
from glm_jax.convert.conversion import MODES, WORKERS


def convert(args: argparse.Namespace) -> int:
    """A Hugging Face folder into one that Orbax restores on any mesh; the same command again resumes."""
    from glm_jax.convert import convert

    options = {key: getattr(args, key) for key in ("mode", "dtype", "mtp", "digest", "nonfinite", "workers", "dry_run")}
    with _events(args, "converting") as on_event:
        made = convert(args.source, args.target, **options, on_event=on_event)
    if made.left:
        _say(args, f"left behind: {', '.join(made.left)}")
    facts = {"mode": made.mode, "why": made.why, "tensors": len(made.tensors), "arrays": len(made.arrays)}
    facts |= {"aliases": made.aliases, "dropped": len(made.dropped), "left": made.left, "root": made.root}
    facts |= {"bytes": sum(f["size"] for f in made.files.values()), "dry_run": args.dry_run}
    text = f"{'would convert' if args.dry_run else args.target}: {made.mode}, since {made.why}; "
    text += f"{len(made.tensors):,} tensors in {len(made.arrays)} arrays, {facts['bytes']:,} bytes"
    _answer(args, facts, text + (f"; root {made.root[:16]}" if made.root else "; not digested"))
    return 0


def verify(args: argparse.Namespace) -> int:
    """Every byte of a converted folder against its digest, and its structure; exit 0 only if all match."""
    from glm_jax.convert import verify

    with _events(args, "checking") as on_event:
        made = verify(args.path, args.structure, args.source, args.workers, on_event)
    what = "structure" if args.structure else "structure and every byte"
    _answer(args, {"tensors": len(made.tensors), "root": made.root}, f"{args.path}: {what} as recorded")
    return 0


def export(args: argparse.Namespace) -> int:
    """A converted folder back to a Hugging Face one; the same command again resumes."""
    from glm_jax.convert import export

    with _events(args, "exporting") as on_event:
        files = export(args.source, args.target, args.exact, workers=args.workers, on_event=on_event)
    _answer(args, {"files": [f.name for f in files]}, f"{args.target}: {len(files)} files of weights")
    return 0


def gc(args: argparse.Namespace) -> int:
    """Removes what conversions and exports that were cut off have left in a folder."""
    from glm_jax.convert import gc

    removed = gc(args.path)
    text = "\n".join(f"removed {path}" for path in removed) or "nothing to remove"
    _answer(args, {"removed": [str(path) for path in removed]}, text)
    return 0


def add_verbs(add) -> None:
    p = add("convert", convert, (_work_flags,))
    p.add_argument("source", metavar="SRC", help="a Hugging Face folder")
    p.add_argument("target", metavar="DST", help="the folder to make")
    p.add_argument("--mode", choices=MODES, default="auto", help="index: link the shards; copy; repack: another dtype")
    p.add_argument("--dtype", choices=("bf16", "f32"), help="to store weights in (default: as they are, FP8 too)")
    p.add_argument("--mtp", choices=("keep", "drop"), default="keep", help="the MTP layer (default keep)")
    p.add_argument("--digest", action="store_true", help="with index: read everything once, for its digests")
    p.add_argument("--nonfinite", choices=("error", "record"), default="error", help="what NaN and infinities are")
    p.add_argument("--dry-run", action="store_true", help="check the source and say what would be done")
    p = add("verify", verify, (_work_flags,))
    p.add_argument("path", metavar="PATH", help="a converted folder")
    p.add_argument("--structure", action="store_true", help="headers, index and small files only")
    p.add_argument("--source", metavar="SRC", help="compare with the original too")
    p = add("export", export, (_work_flags,))
    p.add_argument("source", metavar="SRC", help="a converted folder")
    p.add_argument("target", metavar="DST", help="the Hugging Face folder to make")
    p.add_argument("--exact", action="store_true", help="the files that were converted, byte for byte")
    p = add("gc", gc, ())
    p.add_argument("path", metavar="FOLDER", help="where the conversions were made")


def _work_flags(p: argparse.ArgumentParser):
    p.add_argument("--workers", type=int, default=WORKERS, metavar="N", help=f"files at once (default {WORKERS})")
    p.add_argument("--progress", choices=("auto", "json", "none"), default="auto", help="on stderr (default auto)")


@contextlib.contextmanager
def _events(args: argparse.Namespace, what: str):
    """What is told of the work: a bar, or a line of JSON for each event."""
    if args.progress == "json":
        yield lambda event: print(json.dumps(event), file=sys.stderr, flush=True)
        return
    with console.progress(what, args.quiet or args.progress == "none") as progress:

        def on_event(event: dict[str, Any]):
            if progress and event["event"] == "progress":
                progress(event["done"], event["total"])

        yield on_event


def _answer(args: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    print(json.dumps(facts) if args.json else text)


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text, file=sys.stderr)
