"""The demo's text, from what every machine has: the source of the running Python's standard library.

Three parts: the library itself, its tests, and short chats about its functions. Which files are held out is decided by
a hash of the file's name, so every Python version holds out the same modules.
"""

import ast
import hashlib
import inspect
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED = ("site-packages", "dist-packages", "encodings", "pydoc_data", "config-", "_sysconfigdata")  # not written code
TESTS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Source:
    name: str  # relative to the library's folder, with slashes
    text: str

    @property
    def test(self) -> bool:
        return not TESTS.isdisjoint(self.name.split("/"))

    @property
    def held_out(self) -> bool:
        return _hash(self.name) % 16 == 0

    @property
    def module(self) -> str:
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True)
class Chat:
    messages: list[dict]
    tools: list[dict] | None = None
    enable_thinking: bool = True


def sources() -> list[Source]:
    """Every source file of the running Python's standard library, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if not any(part.startswith(SKIPPED) for part in name.split("/")):
            try:
                found.append(Source(name, path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:  # a few tests are in other encodings on purpose
                continue
    return sorted((s for s in found if s.text.strip()), key=lambda s: s.name)


def pieces(source: Source) -> list[str]:
    """The text cut at random places, to be encoded piece by piece.

    A prompt ends where its writer stopped, often after a space ("def "), where the tokenizer would not cut.
    Without such cuts in training the model has never seen what follows them.
    """
    draw = random.Random(_hash(source.name))
    cuts = [0]
    for place in range(1, len(source.text)):
        at_word = source.text[place - 1].isspace() and not source.text[place].isspace()
        if draw.random() < (0.08 if at_word else 0.001):
            cuts.append(place)
    return [source.text[a:b] for a, b in zip(cuts, [*cuts[1:], len(source.text)], strict=True)]


# ---- chats ----

EXPLAIN = (
    "What does `{full}` do?",
    "What is `{full}` for?",
    "Explain `{full}`.",
    "What does the function {name} of the module {module} do?",
    "Can you tell me what {full} does?",
)
WRITE = (
    "Write a Python function `{call}`. {summary}",
    "Write the function `{name}` in Python: {summary}",
    "Please write `{call}` in Python.\n{summary}",
    "I need a Python function called {name}. {summary}",
)
READ = (
    "What does this code do?\n\n```python\n{code}\n```",
    "Explain this function:\n\n```python\n{code}\n```",
    "Write a docstring for this function.\n\n```python\n{code}\n```",
)
SHOW = ("Show me the source of `{full}`.", "How is `{full}` written?", "Look up {full} and explain it.")
MORE = ("Show me its source.", "Show me the code.", "How is it written?")
SYSTEM = (
    "You are a helpful assistant.",
    "You are GLM, a small language model that writes Python.",
    "You answer questions about Python's standard library. Be brief.",
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_source",
        "description": "Get the source of a function.",
        "parameters": {
            "type": "object",
            "properties": {"module": {"type": "string"}, "name": {"type": "string"}},
            "required": ["module", "name"],
        },
    },
}
ABOUT = (
    ("Hello!", "Hello! Ask me about Python's standard library."),
    ("Hi", "Hello! Ask me what a function does, or ask me to write one."),
    ("Who are you?", "I am the demo model of glm_jax, a very small GLM trained on the Python standard library."),
    ("What are you?", "I am a small GLM with 4 million weights. I have only read the Python standard library."),
    ("What can you do?", "I write text that looks like Python. I am far too small to be right about it."),
    ("What is your name?", "I am the demo model of glm_jax."),
    ("Thanks!", "You are welcome."),
    ("What were you trained on?", "On the source of the Python standard library and on short chats about it."),
    ("Are your answers right?", "Often not. I am a very small model, made to show that the code works."),
    ("Write some Python.", '```python\ndef hello(name):\n    return f"Hello, {name}!"\n```'),
)


@dataclass(frozen=True)
class Function:
    module: str
    name: str  # with its class: "Thread.start"
    call: str  # "start(self)"
    summary: str  # the first paragraph of the docstring, on one line
    code: str  # without the docstring
    source: str

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}"


def functions(source: Source) -> Iterator[Function]:
    """The documented functions and methods of a file that are short enough to talk about, in its order."""
    lines = source.text.splitlines(keepends=True)
    tree = ast.parse(source.text)
    nodes = [("", node) for node in tree.body]
    nodes += [(f"{c.name}.", node) for c in tree.body if isinstance(c, ast.ClassDef) for node in c.body]
    for prefix, node in nodes:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node, clean=False)
        if docstring is None:
            continue
        summary = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
        whole = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip()
        head, first = lines[node.lineno - 1 : node.body[0].lineno - 1], lines[node.body[0].end_lineno : node.end_lineno]
        code = textwrap.dedent("".join(head + first)).rstrip()
        if 15 <= len(summary) <= 300 and len(whole) <= 900 and head and ">>>" not in summary:
            call = f"{node.name}({ast.unparse(node.args)})"
            yield Function(source.module, prefix + node.name, call, summary, code, whole)


def chats(source: Source) -> Iterator[Chat]:
    """Short conversations about the functions of a file: always the same ones for the same text."""
    for function in functions(source):
        draw = random.Random(_hash(f"{function.full} {function.source}"))
        yield _chat(function, draw)
        if draw.random() < 0.12:
            question, answer = draw.choice(ABOUT)
            yield Chat([*_system(draw), _turn(question), _answer(answer)], enable_thinking=draw.random() < 0.6)


def _chat(f: Function, draw: random.Random) -> Chat:
    fill = lambda templates: draw.choice(templates).format(**vars(f), full=f.full)
    fenced = f"```python\n{f.source}\n```"
    system, thinking, think = _system(draw), draw.random() < 0.6, draw.random() < 0.5
    why = lambda text: text if thinking and think else None
    match draw.choices(("explain", "write", "read", "tool"), (30, 35, 20, 15))[0]:
        case "explain":
            messages = [_turn(fill(EXPLAIN)), _answer(f.summary, why(f"The user asks about {f.name} in {f.module}."))]
            if draw.random() < 0.3:
                messages += [_turn(fill(MORE)), _answer(fenced, why(f"The user wants the source of {f.name}."))]
        case "write":
            messages = [_turn(fill(WRITE)), _answer(fenced, why(f"I should write `{f.call}`."))]
        case "read":
            messages = [_turn(fill(READ)), _answer(f.summary, why(f"The code defines {f.name}."))]
        case _:
            call = {"name": "get_source", "arguments": {"module": f.module, "name": f.name}}
            asked = _answer("", why(f"I should look up {f.name} in {f.module}."))
            asked["tool_calls"] = [{"type": "function", "function": call}]
            messages = [_turn(fill(SHOW)), asked, {"role": "tool", "content": f.source}, _answer(f.summary)]
            return Chat([*system, *messages], [TOOL], thinking)
    return Chat([*system, *messages], None, thinking)


def _system(draw: random.Random) -> list[dict]:
    return [{"role": "system", "content": draw.choice(SYSTEM)}] if draw.random() < 0.25 else []


def _turn(content: str) -> dict:
    return {"role": "user", "content": content}


def _answer(content: str, reasoning: str | None = None) -> dict:
    return {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
