"""The command `glm-jax`: one verb, one short function. The answer goes to stdout, everything else to stderr."""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm_jax import __version__, cli_convert, console, processes
from glm_jax.errors import BadInput, GLMError, NoSpace, UsageError

INTERRUPTED, IO_ERROR = 130, 74


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0 done, 1 failed, 2 usage, or the error's own for a bad folder."""
    args = _parser().parse_args(argv)
    interrupted, quiet = False, args.quiet
    with contextlib.ExitStack() as stack:
        if args.quiet:  # XLA and absl write to the file descriptor, not to sys.stderr
            processes.stderr = stack.enter_context(_silent_stderr())
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = lambda message, *_: _say(args, f"warning: {message}")
        args.interrupts = stack.enter_context(_interrupts(args))
        try:
            _quiet_libraries()
            if hasattr(args, "processes"):  # inspect and plan are each machine's own affair
                processes.start(args.coordinator, args.processes, args.process, devices=hasattr(args, "mesh"))
            if processes.count() > 1:
                stack.enter_context(_one_of_several(args))
            code = args.run(args)
            processes.finish()
            return code
        except KeyboardInterrupt:
            interrupted, code, failure = True, INTERRUPTED, "" if quiet else "\nglm-jax: interrupted\n"
        except BrokenPipeError:  # the reader of our output has gone, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code, failure = 1, ""
        except (GLMError, OSError, MemoryError) as error:
            if args.debug:
                raise
            message = str(error) or type(error).__name__
            failure = f"glm-jax: {message}\n"
            code = getattr(error, "exit_code", IO_ERROR if isinstance(error, OSError) else 1)
        except Exception as error:  # not a user's mistake, but a trace is no answer either
            if args.debug:
                raise
            first = (str(error).splitlines() or [""])[0]
            code = NoSpace.exit_code if "RESOURCE_EXHAUSTED" in first else 1
            advice = "a shorter prompt, fewer --max-tokens, or a --mesh of more devices needs less"
            failure = f"glm-jax: the device's memory is full ({first[:200]}); {advice}\n" if code != 1 else ""
            failure = failure or f"glm-jax: {type(error).__name__}: {first} (--debug shows where; please report it)\n"
    if processes.count() > 1:
        own = "interrupted" if interrupted else failure.strip().removeprefix("glm-jax: ") or "its output was closed"
        words = processes.fail(own, interrupted)
        failure, code = ("" if words is None else failure, code) if words in (None, own) else (f"glm-jax: {words}\n", 1)
    sys.stderr.write(failure)  # also with --quiet: an error is not chatter
    processes.leave(code)  # if there are others
    return code


def generate(args: argparse.Namespace) -> int:
    """One answer, streamed, then three lines of numbers."""
    from glm_jax.generation import stream_generate

    text = _shared(sys.stdin.read) if args.prompt == "-" else args.prompt
    if text is None:
        raise UsageError("--prompt is missing: -p TEXT, or -p - to read it from stdin")
    if not text:
        raise UsageError("--prompt is empty: there is nothing to go on from")
    if args.raw and args.system:
        raise UsageError("--raw and --system exclude each other: a system turn is part of the chat template")
    prompt = [{"role": "system", "content": args.system}, {"role": "user", "content": text}] if args.system else text
    tools = _tools(args.tools)
    options = _sampling(args)
    model, tokenizer = _load(args)
    pieces, last = [], None
    stream = stream_generate(
        model, tokenizer, prompt, raw=args.raw, tools=tools, enable_thinking=not args.no_think, **options
    )
    try:
        for last in _watched(args, stream):
            pieces.append(last)
            if not args.json:
                print(last.text, end="", flush=True)
    except BaseException:
        if pieces and not args.json:
            print(flush=True)  # ends the line that was begun
        raise
    print(json.dumps(_as_json(pieces), ensure_ascii=False) if args.json else "", flush=True)
    if last:
        _numbers(args, last)
    return 0


def chat(args: argparse.Namespace) -> int:
    """A conversation: Ctrl-C stops an answer, Ctrl-D or /exit leaves, /clear starts anew. Of several processes the
    first reads what is typed."""
    from glm_jax.generation import stream_generate

    tools, options = _tools(args.tools), _sampling(args)
    model, tokenizer = _load(args)
    if not tokenizer.has_chat_template:
        raise UsageError("this folder has no chat template; use generate")
    first = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(first)
    _say(args, "Ctrl-C stops an answer, /clear forgets, /exit or Ctrl-D leaves.")
    while True:
        text = None
        try:
            if processes.index() == 0:
                text = _stdin(lambda: input("> " if sys.stdin.isatty() and not args.quiet else "")).strip()
        except UsageError as error:
            print(f"glm-jax: {error}", file=sys.stderr)
            continue
        except (EOFError, KeyboardInterrupt):
            print()
        text = processes.exchange(text)[0]
        if text is None:
            return 0
        if text in ("/exit", "/quit"):
            return 0
        if text == "/clear":
            messages = list(first)
        elif text.startswith("/") and " " not in text and text != "/nothink":
            _say(args, f"{text}: unknown; there are /clear and /exit")
        elif text:
            turn = [*messages, {"role": "user", "content": text}]
            reasoning, content, calls, last = "", "", [], None
            try:
                stream = stream_generate(
                    model, tokenizer, turn, tools=tools, enable_thinking=not args.no_think, **options
                )
                for last in _watched(args, stream, together=True):
                    print(last.text, end="", flush=True)
                    reasoning, content = reasoning + last.reasoning, content + last.content
                    calls += last.tool_calls
            except UsageError as error:  # the conversation has outgrown the context: say so and stay
                _say(args, f"glm-jax: {error}", always=processes.index() == 0)
                continue
            except _Stopped:
                pass
            except KeyboardInterrupt:
                if processes.count() > 1:  # the others know nothing of it
                    raise
            print(flush=True)
            answer: dict[str, Any] = {"role": "assistant", "content": content, "reasoning_content": reasoning}
            messages = [*turn, answer | ({"tool_calls": calls} if calls else {})]
            if last:
                _numbers(args, last)


def inspect(args: argparse.Namespace) -> int:
    """A table of the weights of a folder as they would lie on the mesh, and what is recorded of a converted one; reads
    no weights, and downloads no shards."""
    import jax

    from glm_jax.config import PRESETS, preset
    from glm_jax.convert import native, plan
    from glm_jax.convert.hub import fetch, fetch_weights
    from glm_jax.inspect import describe, stored
    from glm_jax.loading import DEMO, quantization, read_config, read_tensors
    from glm_jax.model import GLM
    from glm_jax.planner import default_mesh, first_layers
    from glm_jax.sharding import abstract, mesh, rules

    if args.path and args.model:
        raise UsageError(f"inspect {args.path} and --model {args.model}: one of them")
    name = args.path or args.model or str(DEMO)
    options = {key: getattr(args, key) for key in ("revision", "token", "offline")}
    record = native.read(Path(name).expanduser())[0].summary() if native.is_native(name) else None
    if name.lower() in PRESETS and not Path(name).exists():
        config = preset(name)
        if args.dtype:
            config = dataclasses.replace(config, dtype=jax.numpy.dtype(args.dtype))
        if args.layers is not None:
            config = first_layers(config, args.layers)
    else:
        folder = fetch(name, **options)
        if Path(name).expanduser().exists() and (folder / "config.json").is_file() and quantization(folder):
            return _inspected(args, stored(plan(folder).arrays), record)
        config, indexed, wanted = read_config(folder, args.dtype, args.layers)
        if Path(name).expanduser().exists() or indexed is None:  # of a Hub's shards the index says enough
            fetch_weights(name, folder, indexed, **options)
            config, _ = read_tensors(folder, config, wanted)
    made = abstract(args.mesh) if args.mesh else mesh(default_mesh(config, rules(args.rules), jax.devices()))
    return _inspected(args, describe(GLM(config, made, args.rules, seed=None)), record)


def _inspected(args: argparse.Namespace, found, record: dict[str, Any] | None) -> int:
    totals = {key: sum(getattr(w, key) for w in found) for key in ("parameters", "bytes", "device_bytes")}
    if args.json:
        converted = {"converted": record} if record else {}
        print(json.dumps({"weights": [dataclasses.asdict(w) for w in found], "total": totals} | converted))
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("weight", "dtype", "shape @ mesh axis", box=box.SIMPLE_HEAD)
    for heading in ("parameters", "MiB", "MiB/device"):
        table.add_column(heading, justify="right")
    mib = lambda n: f"{n / 2**20:,.2f}"
    for w in found:
        row = (w.name, w.dtype, w.sharding.replace("[", r"\["))
        table.add_row(*row, f"{w.parameters:,}", mib(w.bytes), mib(w.device_bytes))
    table.add_section()
    table.add_row(
        f"{len(found)} weights", "", "", f"{totals['parameters']:,}", mib(totals["bytes"]), mib(totals["device_bytes"])
    )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for key, value in (record or {}).items():
        print(f"{key}: {value}")
    return 0


def plan(args: argparse.Namespace) -> int:
    """Will it fit: GiB a device by part, what is replicated, what moves; exit 1 if it does not. Needs no devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # plans are made without the devices, which may be busy with something else
    from glm_jax import planner
    from glm_jax.linter import axes_table, lint
    from glm_jax.sharding import DEVICES, abstract, rules
    from glm_jax.targets import chip, devices

    device = args.topology or args.device
    if args.topology and args.device:
        raise UsageError(f"--topology {args.topology} and --device {args.device}: one of them")
    count = devices(args.topology) if args.topology and ":" in args.topology else args.devices
    if args.device and ":" in args.device:
        raise UsageError(f"--device {args.device}: a kind of device; --topology {args.device} is so many")
    if count is not None and not 1 <= count <= DEVICES:
        raise UsageError(f"--devices {count:,}: 1 to {DEVICES:,}")
    if args.topology and args.devices and count != args.devices:
        raise UsageError(f"--topology {args.topology} has {count} devices, --devices says {args.devices}")
    if args.compile and not (args.topology and ":" in args.topology):
        raise UsageError("--compile needs --topology, as v5p:2x2x4 or h100:16, to compile for")
    if args.search and args.mesh:
        raise UsageError(f"--search --mesh {args.mesh}: one of them")
    config, name, fp8 = _config(args)
    for flag, value in (("--search", args.search), ("--train", args.train), (f"of {name} in FP8", fp8)):
        if args.compile and value:
            raise UsageError(
                f"--compile {flag}: what it compiles is one mesh's steps of generation, in --dtype bfloat16 or float32"
            )
    by = rules(args.rules)
    options = {"batch": args.batch, "context": args.context, "device": device, "train": args.train}
    options |= {"fp8": fp8, "name": name}
    if args.search:
        if not count:
            raise UsageError("--search needs --devices N, or a --topology that says how many")
        if not (found := planner.search(config, count, args.rules, **options)):
            raise UsageError(f"no mesh of {count} devices divides {name} under --rules {args.rules}")
        if args.json:
            print(json.dumps([p.to_json() for p in found]))
        else:
            _plans(found)
        return 0 if device is None or any(p.fits for p in found) else 1
    kind = chip(device).kind if device else None
    asked = abstract(args.mesh, kind) if args.mesh else None
    if asked and count and asked.size != count:
        raise UsageError(
            f"--mesh {args.mesh} has {asked.size} devices, "
            + (f"--topology {args.topology} {count}" if args.topology else f"--devices says {count}")
        )
    if asked and (errors := [f for f in lint(config, asked, by) if f.kind == "error"]):  # with what would divide
        raise UsageError(f"--mesh {args.mesh}: " + "; ".join(str(e).removeprefix("error: ") for e in errors))
    at: Any = args.mesh or count or 1
    planned = planner.plan(config, at, args.rules, **options)
    layout = abstract(planned.mesh, kind)
    findings = lint(config, layout, by, args.batch, planned.context, device=device, fp8=fp8)
    if args.train:  # its steps are others, whose collectives no formula has yet
        findings = [f for f in findings if f.kind not in ("moved", "hosts")]
    table, compiled = axes_table(config, layout, by, fp8), []
    if args.compile and planned.fits:
        from glm_jax.steps import compile_steps

        compiled = compile_steps(config, planned.mesh, by, args.topology, planned.rows, planned.context)
    if args.json:
        axes = [dict(zip(("axis", "mesh_axes", "size", "divides", "bytes"), row, strict=True)) for row in table]
        found = [dataclasses.asdict(f) | {"severity": f.severity} for f in findings]
        steps = {"compiled": [step.to_json() for step in compiled]} if args.compile else {}
        print(json.dumps(planned.to_json() | {"axes": axes, "findings": found} | steps))
        return 1 if planned.fits is False else 0
    _table(
        ("logical axis", "mesh axes", "size", "what it divides", "GiB of weights a device"),
        [(*row[:2], str(row[2]), row[3], f"{row[4] / 2**30:.2f}") for row in table],
    )
    print(planned, end="\n\n")
    if not args.mesh and planned.devices > 1:
        print(f"--search: every mesh of {planned.devices} devices, the fastest that fit first\n")
    not_compiled = ["\nnot compiled: XLA refuses what does not fit"] if args.compile and not planned.fits else []
    for finding in [*findings, *(f"\n{step}" for step in compiled), *not_compiled]:
        print(finding)
    return 1 if planned.fits is False else 0


def _plans(found) -> None:
    """A table over meshes."""
    rows = []
    for p in found:
        fits = {True: "fits", False: "no", None: ""}[p.fits]
        step = f"{1e3 * p.cost.seconds:.2f}" if p.cost else ""
        rest = p.total - p.part("weights") - p.part("KV cache")
        gib = [f"{n / 2**30:.2f}" for n in (p.part("weights"), p.part("KV cache"), rest, p.total)]
        rows.append((p.mesh, *gib, fits, step))
    headings = ("mesh", "weights", "KV cache", "the rest", "GiB a device", "", "ms a token at the least")
    _table(headings, rows)


def _table(headings, rows) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _config(args: argparse.Namespace):
    """The Config that --model names, a preset, a folder, a config.json or a Hub id, with --dtype and --layers; its
    name; and whether it is in FP8, as stored or by --dtype."""
    import jax

    from glm_jax.config import PRESETS, Config, preset
    from glm_jax.convert.hub import fetch
    from glm_jax.loading import DEMO, quantization, read_config
    from glm_jax.planner import first_layers

    name = args.model or str(DEMO)
    dtype, path = None if args.dtype == "fp8" else args.dtype, Path(name).expanduser()
    if not path.is_file() and (path.exists() or name.lower() not in PRESETS):
        path = fetch(name, **{key: getattr(args, key) for key in ("revision", "token", "offline")})
    config = Config.read(path) if path.exists() else preset(name)
    stored = quantization(path) if path.exists() else None
    if path.is_dir() and stored is None:  # the folder's index has more to say
        config = read_config(path, dtype, args.layers)[0]
        return config, name if args.model else "the demo model", args.dtype == "fp8"
    fp8 = args.dtype == "fp8" or args.dtype is None and _is_fp8(stored)
    if stored is not None and args.dtype is None and not fp8:
        raise UsageError(f"{path}: quantised, and not to FP8, which is what a plan knows: give the --dtype to plan for")
    config = dataclasses.replace(config, dtype=jax.numpy.dtype(dtype)) if dtype else config
    return (first_layers(config, args.layers) if args.layers is not None else config), name, fp8


def _is_fp8(quantization: Any) -> bool:
    """Of config.json's quantization_config: the two forms in which GLM's FP8 checkpoints are published."""
    said = quantization if isinstance(quantization, dict) else {}
    return said.get("quant_method") == "fp8" or said.get("format") == "float-quantized"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one line, as every other error; argparse would print the usage too
        self.exit(UsageError.exit_code, f"glm-jax: {message} ({self.prog} --help shows the flags)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="glm-jax",
        description="GLM-4.5, 4.6 and 4.7 in JAX.",
        epilog="glm-jax VERB --help shows the flags of a verb.",
    )
    parser.add_argument("--version", action="version", version=f"glm-jax {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    add = lambda verb, run, groups: _verb(verbs, verb, run, groups)
    p = add(
        "generate", generate, (_model_flags, _kernels_flag, _memory_flag, _process_flags, _sampling_flags, _chat_flags)
    )
    p.add_argument("--prompt", "-p", metavar="TEXT", help="what to go on from, or to answer; - reads stdin")
    p.add_argument("--raw", action="store_true", help="no chat template: the text is the prompt")
    p = add("chat", chat, (_model_flags, _kernels_flag, _memory_flag, _process_flags, _sampling_flags, _chat_flags))
    p = add("inspect", inspect, (_model_flags,))
    p.add_argument("path", nargs="?", help="a folder, a Hub id, or glm-4.5, glm-4.5-air, glm-4.6, glm-4.7")
    p = add("plan", plan, (_model_flags,))
    next(a for a in p._actions if a.dest == "dtype").choices = ("bfloat16", "float32", "fp8")
    p.add_argument("--devices", type=int, metavar="N", help="so many devices, with the mesh that load would take")
    p.add_argument("--device", metavar="NAME", help="whose memory must hold it: h100, h200, b200, a100, v5p, v6e, ...")
    p.add_argument("--topology", metavar="T", help="device and number: v5p:2x2x4, v6e:8x8 (chips), h100:16")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="rows at once (default 1)")
    p.add_argument("--context", type=int, metavar="N", help="tokens a row (default 4096, or the model's most)")
    p.add_argument("--train", action="store_true", help="training, not generating")
    p.add_argument("--search", action="store_true", help="a table over all meshes of so many devices")
    p.add_argument("--compile", action="store_true", help="compile the steps for --topology and show XLA's own account")
    cli_convert.add_verbs(add, _hub_flags, _process_flags)
    return parser


def _verb(verbs, verb: str, run: Callable[[argparse.Namespace], int], groups) -> argparse.ArgumentParser:
    about = (run.__doc__ or "").strip()
    p = verbs.add_parser(verb, help=about.split("\n")[0], description=about)
    p.set_defaults(run=run)
    for group in groups:
        group(p)
    if verb != "chat":
        p.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    p.add_argument("--quiet", action="store_true", help="stdout is the answer and one newline, stderr is empty")
    p.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    return p


def _model_flags(p: argparse.ArgumentParser):
    p.add_argument("--model", "-m", metavar="PATH", help="a Hugging Face folder or Hub id (default: the demo)")
    p.add_argument("--mesh", metavar="M", help="as expert=4,tensor=2 (default: all devices, as the model fits)")
    p.add_argument(
        "--rules", default="ep", metavar="NAME", help="sharding rules: ep, latency, tp, fsdp or long (default ep)"
    )
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="of weights and compute (default: as stored)")
    p.add_argument("--layers", type=int, metavar="N", help="only the first N layers")
    _hub_flags(p)


def _hub_flags(p: argparse.ArgumentParser):
    p.add_argument("--revision", help="of a Hub id: branch, tag or commit")
    p.add_argument("--token", help="for the Hub (default: the one you logged in with)")
    p.add_argument("--offline", action="store_true", help="never go to the Hub, use what is downloaded")


def _kernels_flag(p: argparse.ArgumentParser):
    p.add_argument(
        "--kernels",
        default="auto",
        choices=("auto", "xla", "pallas", "triton", "mosaic", "megablox"),
        help="of the experts' matmuls: the device's fastest, none, or these and no other (default auto)",
    )


def _memory_flag(p: argparse.ArgumentParser):
    p.add_argument(
        "--memory", type=console.size, metavar="SIZE", help="of the host, on the way to devices (default 1GiB)"
    )


def _process_flags(p: argparse.ArgumentParser):
    several = "of several processes; Slurm, Open MPI and TPU slices tell it by themselves"
    p.add_argument("--coordinator", metavar="HOST:PORT", help=f"where process 0 is, {several}")
    p.add_argument("--processes", type=int, metavar="N", help="how many there are (default 1)")
    p.add_argument("--process", type=int, metavar="I", help="which this is, from 0")


def _sampling_flags(p: argparse.ArgumentParser):
    p.add_argument("--max-tokens", type=int, default=200, metavar="N")
    p.add_argument("--temperature", default="0", metavar="T", help="0 is greedy; auto: as the folder says (default 0)")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is all")
    p.add_argument("--min-p", type=float, default=0.0, metavar="P")
    p.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is none")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")


def _chat_flags(p: argparse.ArgumentParser):
    p.add_argument("--system", metavar="TEXT", help="a system turn before the prompt")
    p.add_argument("--no-think", action="store_true", help="ask for an answer without reasoning")
    p.add_argument("--tools", metavar="FILE", help="a JSON file with a list of tool schemas")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The options of stream_generate, checked before anything slow begins."""
    names = ("max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "seed")
    options = {name: getattr(args, name) for name in names}
    if args.temperature == "auto":
        from glm_jax.convert.hub import fetch
        from glm_jax.loading import DEMO, generation_defaults

        folder = fetch(args.model or DEMO, revision=args.revision, token=args.token, offline=args.offline)
        value = generation_defaults(folder).get("temperature")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise BadInput(f"{folder / 'generation_config.json'}: temperature is {value!r}, not a number or null")
        options["temperature"] = 1.0 if value is None else float(value)
    else:
        try:
            options["temperature"] = float(args.temperature)
        except ValueError:
            raise UsageError(f"--temperature {args.temperature}: must be a number, or auto") from None
    if args.max_tokens < 0:
        raise UsageError(f"--max-tokens {args.max_tokens}: must be 0 or more")
    from glm_jax.sample import Sampling

    Sampling.of(options["temperature"], args.top_k, args.top_p, args.min_p, args.repetition_penalty, 1)
    return options


def _stdin(read: Callable[[], str]) -> str:
    """What is read from stdin, if it is text."""
    try:
        text = read()
        text.encode()  # bytes that are no text come as lone surrogates, or not at all
    except UnicodeError:
        raise UsageError("--prompt: what comes from stdin is not UTF-8") from None
    return text


def _tools(path: str | None) -> list[dict] | None:
    if path is None:
        return None
    try:
        tools = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--tools {path}: {error}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UsageError(f"--tools {path}: must hold a list of tool schemas")
    return tools


def _load(args: argparse.Namespace):
    from glm_jax.loading import DEMO, load

    names = ("mesh", "rules", "dtype", "layers", "kernels", "revision", "token", "offline")
    options = {key: getattr(args, key) for key in names}
    options |= {"memory": args.memory} if args.memory is not None else {}
    with console.progress("loading", args.quiet) as progress:
        model, tokenizer = load(args.model or DEMO, **options, progress=progress)
    if tokenizer is None:
        raise UsageError(
            f"{args.model}: this folder has no tokenizer.json, so there is no text; use generate_ids in Python"
        )
    return model, tokenizer


def _shared(read: Callable[[], str]) -> str:
    """What process 0 reads from stdin, in every process."""
    text = ""
    with processes.agreed():
        if processes.index() == 0:
            text = _stdin(read)
    return processes.exchange(text)[0]


@contextlib.contextmanager
def _one_of_several(args: argparse.Namespace):
    """Process 0 alone prints, and only what Python does: libraries' chatter on stdout would be in the answer."""
    # How they met may be said by flag or by variable; that they met says that it agrees.
    ignored = ("run", "interrupts", "coordinator", "processes", "process", "token", "quiet", "debug")
    flags = processes.exchange({k: v for k, v in vars(args).items() if k not in ignored})
    for i, theirs in enumerate(flags):
        for name in (name for name in theirs if theirs[name] != flags[0][name]):
            raise UsageError(
                f"process {i} was started with --{name.replace('_', '-')} {theirs[name]}, process 0 with "
                f"{flags[0][name]}: give all the same"
            )
    processes.catch_signals()
    before, kept = sys.stdout, os.dup(1)
    before.flush()
    with open(os.devnull, "w") as nowhere:
        os.dup2(2 if "NCCL_DEBUG" in os.environ else nowhere.fileno(), 1)
    if processes.index():
        args.quiet = True
    sys.stdout = open(os.devnull if processes.index() else kept, "w", encoding="utf-8", closefd=processes.index() > 0)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = before
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def _interrupts(args: argparse.Namespace):
    """A list that grows with every Ctrl-C. It raises KeyboardInterrupt too, which is lost where Python runs a library's
    destructor or callback."""
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    # Signals are the main thread's; and who started us in the background may have had them ignored.
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield pressed
        return

    def interrupt(number, _):
        pressed.append(number)
        if number != signal.SIGINT or not getattr(args, "held", False):
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


class _Stopped(KeyboardInterrupt):
    """A Ctrl-C that all processes know of."""


def _watched(args: argparse.Namespace, stream, together: bool = False):
    """The stream, ended by a Ctrl-C that was lost; and a note if nothing comes for some seconds. `together`: a Ctrl-C
    at process 0 stops all processes after the same token."""
    together = together and processes.count() > 1
    args.held = together and processes.index() == 0
    seen = len(args.interrupts)
    note = threading.Timer(3.0, _say, (args, "no token yet: compiling (kept for the next run) or reading the prompt"))
    note.daemon = True
    try:
        note.start()
        for response in stream:
            note.cancel()
            yield response
            if together and processes.exchange(len(args.interrupts) > seen)[0]:
                raise _Stopped
            if not together and len(args.interrupts) > seen:
                raise KeyboardInterrupt
    finally:
        args.held = False
        note.cancel()


def _cache_dir() -> str:
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path.home() / ".cache" / "glm_jax" / "xla")


def _quiet_libraries():
    """What must be set before jax and transformers are imported: the compile cache, and no chatter."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _cache_dir())
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


@contextlib.contextmanager
def _silent_stderr():
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield kept
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _say(args: argparse.Namespace, text: str, always: bool = False):
    if always or not args.quiet:
        print(text, file=sys.stderr, flush=True)


def _numbers(args: argparse.Namespace, r):
    _say(args, f"prompt:      {r.prompt_tokens} tokens, {r.prompt_tps:.1f} tok/s")
    _say(args, f"generation:  {r.generation_tokens} tokens, {r.generation_tps:.1f} tok/s")
    _say(args, f"peak memory: {r.peak_memory / 2**30:.2f} GiB")


def _as_json(responses) -> dict[str, Any]:
    last = responses[-1] if responses else None  # with --max-tokens 0
    joined = {key: "".join(getattr(r, key) for r in responses) for key in ("text", "reasoning", "content")}
    numbers = {key: getattr(last, key, None) for key in ("finish_reason", "prompt_tokens", "generation_tokens")}
    return {
        **joined,
        "tool_calls": [call for r in responses for call in r.tool_calls],
        "tokens": [r.token for r in responses],
        "logprobs": [r.logprob for r in responses],
        **numbers,
        "prompt_tok_per_s": getattr(last, "prompt_tps", None),
        "generation_tok_per_s": getattr(last, "generation_tps", None),
        "peak_memory_bytes": getattr(last, "peak_memory", None),
    }


if __name__ == "__main__":
    sys.exit(main())
