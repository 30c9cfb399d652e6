"""The command line: what goes to stdout, what to stderr, every exit code, and that no mistake shows a stack trace."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from folders import SMALL, write_model, write_text_model

import glm_jax
from glm_jax.cli import main
from glm_jax.config import tiny
from glm_jax.convert.safetensors import Tensor, read_header
from glm_jax.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
CHATTER = r"(loading .*\n)*(no token yet.*\n)?"  # on a slow day, and on the first run
NUMBERS = r"prompt: +\d+ tokens, [\d.]+ tok/s\ngeneration: +\d+ tokens, [\d.]+ tok/s\npeak memory: [\d.]+ GiB\n"
ONE = ("--mesh", "data=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer and a chat template; never written to."""
    return write_text_model(tmp_path_factory.mktemp("text"))


@pytest.fixture
def copy(folder, tmp_path):
    """A model to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def tell(capfd, *argv: object) -> tuple[int, str, str]:
    """Runs a command in this process: exit code, stdout, stderr. From argparse too."""
    capfd.readouterr()
    try:
        code = main([str(a) for a in argv])
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capfd.readouterr()


def process(*argv: object, **options) -> subprocess.Popen:
    """Starts a command of its own process, on one CPU device."""
    one = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": one} | options.pop("env", {})
    command = [sys.executable, "-m", "glm_jax", *map(str, argv)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # A shell that runs the tests in the background has SIGINT ignored, and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes | options)
    finally:
        signal.signal(signal.SIGINT, before)


def tell_process(*argv: object, stdin: str = "", **options) -> tuple[int, str, str]:
    with process(*argv, **options) as child:
        out, err = child.communicate(stdin, timeout=240)
    return child.returncode, out, err


def stdin(monkeypatch, text: str):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# ---- generate


def test_text_to_stdout_three_lines_of_numbers_to_stderr(folder, capfd):
    code, out, err = tell(capfd, "generate", "-m", folder, "-p", "the tool", "--max-tokens", 8, *ONE)
    assert code == 0
    assert re.fullmatch(CHATTER + NUMBERS, err), err
    model, tokenizer = glm_jax.load(folder, mesh="data=1")
    assert out == glm_jax.generate(model, tokenizer, "the tool", max_tokens=8) + "\n"
    assert "generation:  8 tokens" in err


def test_json(folder, capfd):
    argv = ("generate", "-m", folder, "-p", "the tool", "--max-tokens", 5, "--raw", "--json", *ONE)
    code, out, err = tell(capfd, *argv)
    assert code == 0 and out.count("\n") == 1
    said = json.loads(out)
    assert set(said) == {
        *("text", "reasoning", "content", "tool_calls", "tokens", "logprobs", "finish_reason", "prompt_tokens"),
        *("generation_tokens", "prompt_tok_per_s", "generation_tok_per_s", "peak_memory_bytes"),
    }
    assert len(said["tokens"]) == len(said["logprobs"]) == said["generation_tokens"] == 5
    assert said["finish_reason"] == "length" and said["tool_calls"] == [] and said["peak_memory_bytes"] > 1 << 20
    tokenizer = Tokenizer.read(folder)
    assert tokenizer is not None and said["prompt_tokens"] == len(tokenizer.encode("the tool"))
    assert said["text"] == tokenizer.decode(said["tokens"])
    code, out, err = tell(capfd, *argv[:5], "--max-tokens", 0, "--json", *ONE)
    assert code == 0 and json.loads(out)["tokens"] == []


def test_a_prompt_from_stdin(folder, capfd, monkeypatch):
    argv = ("generate", "-m", folder, "--max-tokens", 4, "--raw", "--json", *ONE)
    stdin(monkeypatch, "the model\nthinks")
    _, piped, _ = tell(capfd, *argv, "-p", "-")
    _, given, _ = tell(capfd, *argv, "-p", "the model\nthinks")
    assert json.loads(piped)["tokens"] == json.loads(given)["tokens"]


def test_flags_reach_the_model(folder, capfd):
    def tokens(*flags):
        code, out, err = tell(
            capfd, "generate", "-m", folder, "-p", "the", "--max-tokens", 6, "--raw", "--json", *ONE, *flags
        )
        assert code == 0, err
        return json.loads(out)["tokens"]

    greedy, warm = tokens(), tokens("--temperature", 1.5)
    assert tokens("--temperature", 1.5, "--seed", 1) != warm == tokens("--temperature", 1.5) != greedy
    assert tokens("--temperature", 1.5, "--top-k", 1) == greedy == tokens("--temperature", 1.5, "--top-p", 1e-6)
    assert tokens("--temperature", 1.5, "--min-p", 0.999) == greedy
    assert tokens("--repetition-penalty", 0.01) != greedy
    assert tokens("--layers", 1) != greedy


def test_a_stop_string(folder, capfd):
    argv = ("generate", "-m", folder, "-p", "the tool", "--max-tokens", 8, "--quiet", *ONE)
    _, out, _ = tell(capfd, *argv)
    text = out[:-1]
    stop = text[len(text) // 2 :][:2]
    _, out, _ = tell(capfd, *argv, "--stop", "none of this", "--stop", stop)
    assert out == text[: text.index(stop)] + "\n"


def test_temperature_auto_is_the_folders(copy, capfd):
    argv = ("generate", "-m", copy, "-p", "the", "--max-tokens", 6, "--quiet", *ONE)
    (copy / "generation_config.json").write_text('{"temperature": 0.7}')
    assert tell(capfd, *argv, "--temperature", "auto") == tell(capfd, *argv, "--temperature", "0.7")
    (copy / "generation_config.json").write_text('{"temperature": "warm"}')
    assert failed(65, "temperature is 'warm', not a number or null", tell(capfd, *argv, "--temperature", "auto"))


# ---- mistakes


def spoil(kind: str, copy: Path) -> Path:
    """Makes a folder wrong in one way."""
    weights = copy / "model.safetensors"
    config = json.loads((copy / "config.json").read_text())
    if kind == "no folder":
        return copy / "nowhere"
    if kind == "a file":
        return weights
    if kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        (copy / "config.json").unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif kind == "truncated header":
        weights.write_bytes(weights.read_bytes()[:100])
    elif kind == "empty":
        weights.write_bytes(b"")
    elif kind == "foreign":
        weights.write_bytes(b"PK\x03\x04" * 400)
    elif kind == "pickles":
        weights.rename(copy / "pytorch_model.bin")
    elif kind == "a lost shard":
        where = dict.fromkeys(read_header(weights)[0], "model-00001-of-00001.safetensors")
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    elif kind == "bad tokenizer":
        (copy / "tokenizer.json").write_text("{}")
    elif kind == "not JSON":
        (copy / "config.json").write_text("{,}")
    elif kind == "another model":
        (copy / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    elif kind == "a missing field":
        del config["head_dim"]
        (copy / "config.json").write_text(json.dumps(config))
    elif kind == "a bad field":
        (copy / "config.json").write_text(json.dumps(config | {"num_attention_heads": -8}))
    elif kind == "another shape":
        (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    elif kind == "yarn":
        (copy / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "yarn", "factor": 4}}))
    elif kind == "fp8":
        (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    return copy


SPOILT = {
    "no folder": (66, "nowhere: no such folder"),
    "a file": (65, "model.safetensors: this is a file; give the folder"),
    "no weights": (66, "no model.safetensors and no model.safetensors.index.json"),
    "no config": (66, "config.json: no such file"),
    "a lost shard": (66, "model-00001-of-00001.safetensors"),
    "truncated": (65, "truncated by 7"),
    "truncated header": (65, "truncated, or no safetensors file"),
    "empty": (65, "0 bytes are too few"),
    "foreign": (65, "truncated, or no safetensors file"),
    "pickles": (65, "no safetensors, only 'pytorch_model.bin'"),
    "bad tokenizer": (65, "the tokenizer cannot be read"),
    "not JSON": (65, "config.json: not JSON"),
    "another model": (65, "model_type is 'llama'"),
    "a missing field": (65, "no head_dim"),
    "a bad field": (65, "num_attention_heads is -8, not an integer >= 1"),
    "another shape": (65, "model.embed_tokens.weight is [384, 32], the config implies [400, 32]"),
    "yarn": (65, "rope_scaling is {'factor': 4, 'type': 'yarn'}"),
    "fp8": (65, "quantised (fp8)"),
}


def failed(code: int, said: str, answer: tuple[int, str, str]) -> bool:
    """Whether an answer is that exit code and one line on stderr, with nothing on stdout."""
    found, out, err = answer
    assert "Traceback" not in err and err.startswith("glm-jax: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert (found, out) == (code, "") and said in err, err
    return True


@pytest.mark.parametrize("kind", SPOILT)
def test_a_wrong_folder(kind, copy, capfd):
    code, said = SPOILT[kind]
    where = spoil(kind, copy)
    assert failed(code, said, tell(capfd, "generate", "-m", where, "-p", "x", *ONE))
    if kind == "fp8":  # can be looked at
        assert tell(capfd, "inspect", where)[0] == 0
    elif kind != "bad tokenizer":
        assert failed(code, said, tell(capfd, "inspect", where))
    assert failed(code, said, tell(capfd, "chat", "-m", where, "--quiet", *ONE))


@pytest.mark.parametrize(
    "argv, said",
    [
        (("generate", "-p", ""), "--prompt is empty"),
        (("generate",), "--prompt is missing: -p TEXT, or -p - to read it from stdin"),
        (("generate", "-p"), "expected one argument"),
        (
            ("generate", "-p", "x", "--mesh", "expert=3"),
            "n_routed_experts 8 does not divide over expert=3, the next that do are 2 or 4",
        ),
        (("generate", "-p", "x", "--mesh", "expert=64"), "needs 64 devices, there are 8"),
        (("generate", "-p", "x", "--mesh", "pipeline=2"), "no axis 'pipeline'"),
        (("generate", "-p", "x", "--mesh", "expert=two"), "expert='two' is not a size"),
        (("generate", "-p", "x", "--mesh", "expert=2,expert=4"), "--mesh expert=2,expert=4: expert is named twice"),
        (
            ("generate", "-p", "x", "--rules", "zero"),
            "--rules zero: unknown, the presets are ep, latency, tp, fsdp, long",
        ),
        (("generate", "-p", "x", "--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        (("generate", "-p", "x", "--kernels", "pallas"), "kernels 'pallas' cannot run here: it needs an NVIDIA GPU"),
        (("generate", "-p", "x", "--layers", "0"), "--layers 0: this model has 1 to 3"),
        (("generate", "-p", "x", "--layers", "four"), "argument --layers: invalid int value: 'four'"),
        (("generate", "-p", "x", "--temperature", "warm"), "--temperature warm: must be a number, or auto"),
        (("generate", "-p", "x", "--temperature", "-1"), "--temperature -1"),
        (("generate", "-p", "x", "--temperature", "nan"), "--temperature nan: must be 0 or more"),
        (("generate", "-p", "x", "--top-p", "1.5"), "--top-p 1.5: must be above 0, up to 1"),
        (("generate", "-p", "x", "--top-k", "-3"), "--top-k -3"),
        (("generate", "-p", "x", "--min-p", "1"), "--min-p 1.0: must be from 0, below 1"),
        (("generate", "-p", "x", "--repetition-penalty", "0"), "--repetition-penalty 0.0: must be above 0"),
        (("generate", "-p", "x", "--max-tokens", "-1"), "--max-tokens -1: must be 0 or more"),
        (("generate", "-p", "x", "--stop", ""), "--stop: a stop string must not be empty"),
        (("generate", "-p", "x", "--raw", "--system", "y"), "--raw and --system exclude each other"),
        (("generate", "-p", "x", "--tools", "/nowhere/tools.json"), "--tools /nowhere/tools.json: "),
        (("generate", "-p", "word " * 300), "tokens, this model's context is 512: shorten it"),
        (("generate", "-p", "x", "--revision", "main"), "has no revision 'main'"),
        (("inspect", "--mesh", "tensor=3"), "num_attention_heads 8 does not divide over tensor=3"),
        (("inspect", "--layers", "0"), "--layers 0: this model has 1 to 3"),
        (("generate", "-p", "x", "--no-such-flag"), "unrecognized arguments: --no-such-flag"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_a_wrong_flag(argv, said, folder, capfd):
    mesh = () if "--mesh" in argv or argv[0] == "inspect" else ONE
    assert failed(2, said, tell(capfd, *argv, "-m", folder, *mesh))


@pytest.mark.parametrize("errors", ["surrogateescape", "strict"])
def test_input_that_is_no_text(folder, capfd, monkeypatch, errors):
    def give(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors=errors))

    give(b"\xff\xfe")
    answer = tell(capfd, "generate", "-m", folder, "-p", "-", *ONE)
    assert failed(2, "--prompt: what comes from stdin is not UTF-8", answer)
    give(b"h\xff\n")
    code, out, err = tell(capfd, "chat", "-m", folder, "--quiet", *ONE)
    assert (code, out) == (0, "\n") and err == "glm-jax: --prompt: what comes from stdin is not UTF-8\n"


def test_a_disk_that_cannot_be_read(folder, capfd, monkeypatch):
    def broken(*args):
        raise OSError(errno.EIO, "Input/output error", "model.safetensors")

    monkeypatch.setattr(Tensor, "read", broken)
    assert failed(74, "Input/output error: 'model.safetensors'", tell(capfd, "generate", "-m", folder, "-p", "x", *ONE))


def test_a_wrong_verb(capfd):
    assert failed(2, "invalid choice: 'generat'", tell(capfd, "generat"))
    assert failed(2, "VERB", tell(capfd))


def test_no_tokenizer_no_template(copy, capfd):
    (copy / "chat_template.jinja").unlink()
    assert failed(2, "no chat template; use generate", tell(capfd, "chat", "-m", copy, "--quiet", *ONE))
    answer = tell(capfd, "generate", "-m", copy, "-p", "x", "--system", "y", *ONE)
    assert failed(2, "no chat template", answer)
    (copy / "tokenizer.json").unlink()
    assert failed(2, "no tokenizer.json, so there is no text", tell(capfd, "generate", "-m", copy, "-p", "x", *ONE))


def test_a_model_that_does_not_fit(folder, capfd, monkeypatch):
    monkeypatch.setattr("glm_jax.planner.device_bytes", lambda device: 1)
    assert failed(28, "GiB (weights", tell(capfd, "generate", "-m", folder, "-p", "x", *ONE))


def test_a_cache_that_does_not_fit(folder, capfd, monkeypatch):
    monkeypatch.setattr("glm_jax.planner.device_bytes", lambda device: 2**10)
    monkeypatch.setattr("glm_jax.loading.refuse_if_too_large", lambda *args: None)
    answer = tell(capfd, "generate", "-m", folder, "-p", "x", "--max-tokens", 10**20, *ONE)
    assert failed(28, "1 x 512 tokens need", answer) and "a smaller --max-tokens" in answer[2]


def test_an_error_of_ours_is_one_line_too(folder, capfd, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("glm_jax.loading.load", broken)
    answer = tell(capfd, "generate", "-m", folder, "-p", "x")
    assert failed(1, "RuntimeError: first line (--debug shows where; please report it)", answer)


def test_debug_raises(copy):
    with pytest.raises(glm_jax.errors.BadInput):
        main(["generate", "-m", str(spoil("truncated", copy)), "-p", "x", "--debug", *ONE])


# ---- inspect


def test_inspect_one_thing(folder, capfd):
    assert failed(2, "inspect glm-4.6 and --model", tell(capfd, "inspect", "glm-4.6", "-m", folder))


def test_inspect_a_folder(folder, capfd):
    code, out, err = tell(capfd, "inspect", folder, "--mesh", "expert=2,tensor=2", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    weights, total = said["weights"], said["total"]
    held = glm_jax.load(folder, mesh="expert=2,tensor=2")[0]
    assert weights == [vars(w) | {"shape": list(w.shape)} for w in glm_jax.inspect.describe(held)]
    assert total == {key: sum(w[key] for w in weights) for key in ("parameters", "bytes", "device_bytes")}
    assert total["bytes"] == 4 * total["parameters"] > total["device_bytes"] > total["bytes"] / 4
    (experts,) = (w for w in weights if w["name"] == "moe.mlp.gate_up")
    assert experts["sharding"] == "[2, 8@expert, 2, 32@tensor, 32]" and experts["device_bytes"] * 4 == experts["bytes"]
    code, out, err = tell(capfd, "inspect", folder, "--mesh", "expert=2,tensor=2")
    assert (code, err) == (0, "")
    assert re.search(r"moe\.mlp\.gate_up +float32 +\[2, 8@expert, 2, 32@tensor, 32\] +32,768", out)
    assert re.search(rf"{len(weights)} weights +{total['parameters']:,}", out)


def test_inspect_a_preset(capfd):
    code, out, err = tell(capfd, "inspect", "GLM-4.6", "--mesh", "expert=8,tensor=2", "--json")
    assert (code, err) == (0, "")
    total = json.loads(out)["total"]
    assert total["parameters"] == 356785898816
    assert 54 < total["device_bytes"] / 2**30 < 56  # 54.8 without the MTP layer
    _, out, _ = tell(capfd, "inspect", "glm-4.6", "--mesh", "expert=8,tensor=2", "--layers", 4, "--json")
    assert json.loads(out)["total"]["parameters"] < total["parameters"] / 20
    _, out, _ = tell(capfd, "inspect", "glm-4.6", "--mesh", "expert=8,tensor=2", "--dtype", "float32", "--json")
    assert 1.99 < json.loads(out)["total"]["bytes"] / total["bytes"] < 2.01


def test_inspect_reads_no_weights_and_no_file_it_does_not_need(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("glm_jax.convert.safetensors.Tensor.read", None)
    late = lambda name: f"model-0000{2 if 'layers.2.' in name or 'layers.3.' in name else 1}-of-00002.safetensors"
    source = write_model(tmp_path / "two", tiny(**SMALL), file_of=late)
    assert tell(capfd, "inspect", source)[0] == 0
    (source / "model-00002-of-00002.safetensors").unlink()
    assert failed(66, "model-00002-of-00002.safetensors", tell(capfd, "inspect", source))
    assert tell(capfd, "inspect", source, "--layers", 2)[0] == 0


# ---- chat


def test_chat(folder, capfd, monkeypatch):
    """Two turns, a command, an unknown one, an empty line; the answers are those of generate."""
    stdin(monkeypatch, "the tool\n\n/help\nthe model\n/clear\nthe tool\n/exit\nnever read\n")
    code, out, err = tell(capfd, "chat", "-m", folder, "--max-tokens", 6, *ONE)
    assert code == 0
    assert "/help: unknown; there are /clear and /exit" in err and len(re.findall(NUMBERS, err)) == 3
    model, tokenizer = glm_jax.load(folder, mesh="data=1")
    assert tokenizer is not None
    first = glm_jax.generate(model, tokenizer, "the tool", max_tokens=6)
    parsed = glm_jax.parse_response(first, tokenizer.format)
    turns = [
        {"role": "user", "content": "the tool"},
        {"role": "assistant", "content": parsed.content, "reasoning_content": parsed.reasoning},
        {"role": "user", "content": "the model"},
    ]
    second = glm_jax.generate(model, tokenizer, turns, max_tokens=6)
    assert out == f"{first}\n{second}\n{first}\n"


def test_chat_ends_with_its_input(folder, capfd, monkeypatch):
    stdin(monkeypatch, "the tool")
    code, out, err = tell(capfd, "chat", "-m", folder, "--max-tokens", 3, "--quiet", *ONE)
    assert code == 0 and err == "" and out.endswith("\n\n")


def test_a_conversation_that_outgrows_the_context_goes_on(folder, capfd, monkeypatch):
    stdin(monkeypatch, f"{'word ' * 300}\nthe tool\n/exit\n")
    code, out, err = tell(capfd, "chat", "-m", folder, "--max-tokens", 3, *ONE)
    assert code == 0 and "this model's context is 512: shorten it" in err
    assert len(re.findall(NUMBERS, err)) == 1


# ---- processes


def test_version(capfd):
    assert tell(capfd, "--version") == (0, f"glm-jax {glm_jax.__version__}\n", "")


@pytest.mark.slow
def test_quiet_and_the_compile_cache(folder, tmp_path):
    """Quiet: the text and one newline, and not a byte on stderr. The second run finds all its programs compiled."""
    env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    argv = ("generate", "-m", folder, "-p", "-", "--max-tokens", 4, "--layers", 1)
    code, out, err = tell_process(*argv, "--quiet", stdin="the tool", env=env)
    entries = {p.name for p in tmp_path.glob("*-cache")}
    assert (code, err) == (0, "") and out.endswith("\n") and entries
    code, again, err = tell_process(*argv, stdin="the tool", env=env)
    assert (code, again) == (0, out) and re.fullmatch(CHATTER + NUMBERS, err), err
    assert {p.name for p in tmp_path.glob("*-cache")} == entries


@pytest.mark.slow
def test_a_mistake_in_a_process(copy):
    wrong = spoil("truncated", copy)
    assert failed(65, "truncated by 7", tell_process("generate", "-m", wrong, "-p", "x", "--quiet"))


@pytest.mark.slow
def test_debug_shows_the_trace(copy):
    code, out, err = tell_process("generate", "-m", spoil("truncated", copy), "-p", "x", "--debug", "--quiet")
    assert code == 1 and out == "" and err.startswith("Traceback") and "truncated by 7" in err.splitlines()[-1]


@pytest.mark.slow
def test_ctrl_c_ends_a_stream_cleanly(copy):
    endless = json.loads((copy / "config.json").read_text()) | {"eos_token_id": None, "max_position_embeddings": 10**5}
    (copy / "config.json").write_text(json.dumps(endless))
    with process("generate", "-m", copy, "-p", "the tool", "--max-tokens", 20000) as child:
        assert child.stdout and child.stderr
        try:
            first = child.stdout.read(4)  # the stream has begun
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 130
    assert (first + out).endswith("\n") and "Traceback" not in err
    assert err.endswith("glm-jax: interrupted\n")


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_trace(folder):
    with process("generate", "-m", folder, "-p", "the tool", "--max-tokens", 400) as child:
        assert child.stdout and child.stderr
        child.stdout.read(1)
        child.stdout.close()
        err = child.stderr.read()
        assert child.wait(60) in (0, 1) and "Traceback" not in err and "Exception" not in err
