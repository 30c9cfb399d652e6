"""What a GLM answered: its text split into reasoning, content and tool calls, whole or while it streams.

GLM-4.5 and 4.6 write            GLM-4.7 writes
    \\n<think>reasoning</think>       reasoning</think>     (the prompt ends in <think>)
    \\ncontent                        content
    \\n<tool_call>name                <tool_call>name
    <arg_key>k</arg_key>             <arg_key>k</arg_key>
    <arg_value>v</arg_value>         <arg_value>v</arg_value>
    </tool_call>                     </tool_call>           (all of it without line breaks)

Rules, for both:
- Newlines at the start and the end of the reasoning and of the content are the template's and are dropped. Blanks are
  dropped only in front of a <think> that opens the answer. Nothing else is stripped: content is the text outside of the
  thought and the calls, joined.
- Only the start of the answer can be a thought: a later <think>, or a </think> with no thought before it, is content.
  A thought that never ends is reasoning to its end.
- In a tool call, white space around the name, around a key and between the tags does not matter, and a value is
  everything up to </arg_value>, verbatim.
- A call of another form, or one that is not finished, is no call: it stays where it stood, as text, tags and all.
- A call inside a thought is part of the thought when </think> follows, so what the model only planned is not run. If
  the thought never ends it is a call: the model forgot its </think>.
- The text is as Tokenizer.decode gives it, so <|user|>, <|observation|> and <|endoftext|> are not in it.
"""

import ast
import json
import re
import warnings
from typing import Any, NamedTuple

from glm_jax.errors import UsageError

STARTS_IN_THOUGHT = {"glm-4.5": False, "glm-4.6": False, "glm-4.7": True}  # with thinking on
IN_CALL = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")  # behind the name, in a ring
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", *IN_CALL)
SPLIT = re.compile(f"({'|'.join(TAGS)})")


class Parsed(NamedTuple):
    """An answer, or what a piece of text added to it."""

    reasoning: str
    content: str
    tool_calls: list[dict[str, Any]]  # {"name": str, "arguments": dict}, as a template takes them back


def parse_response(
    text: str, format: str = "glm-4.5", tools: list[dict] | None = None, in_thought: bool | None = None
) -> Parsed:
    """Split an answer into reasoning, content and tool calls; ResponseStream has the arguments."""
    stream = ResponseStream(format, tools, in_thought)
    first, last = stream.add(text), stream.finish()
    return Parsed(first.reasoning + last.reasoning, first.content + last.content, first.tool_calls + last.tool_calls)


class ResponseStream:
    """Splits an answer that arrives in pieces; the pieces' parts, joined, are the same however the text was cut.

    format: "glm-4.5", "glm-4.6" or "glm-4.7" (Tokenizer.format).
    tools: their JSON schemas. An argument that is typed "string" is kept verbatim; any other, and all of them without
        tools, is read as JSON, else as a Python literal, else kept verbatim.
    in_thought: whether the text begins inside a thought, that is, whether the prompt ended in <think>. By default it
        does for glm-4.7, which is wrong for enable_thinking=False. Where the text itself begins with <think> or
        </think>, that counts.
    """

    def __init__(self, format: str = "glm-4.5", tools: list[dict] | None = None, in_thought: bool | None = None):
        if format not in STARTS_IN_THOUGHT:
            raise UsageError(f"response format {format!r} is not known: it is one of {', '.join(STARTS_IN_THOUGHT)}")
        functions = [tool.get("function", tool) for tool in tools or []]
        self.schemas = {f.get("name"): (f.get("parameters") or {}).get("properties") or {} for f in functions}
        self.in_thought = STARTS_IN_THOUGHT[format] if in_thought is None else in_thought
        self.tail = ""  # may turn out to be the start of a tag
        self.lead: str | None = ""  # white space before anything else; None once the answer has begun
        self.call: list[str] | None = None  # the pieces of the tool call we are in
        self.fields: list[list[str]] = []  # the same, as name, key, blank, value, blank, key, ...
        self.drafts: list[tuple[str, dict | None]] = []  # since a tool call in the thought: its texts and its calls
        self.reasoning, self.content = _Trimmed(), _Trimmed()
        self.tool_calls: list[dict] = []

    def add(self, text: str) -> Parsed:
        """Take the next piece of text and return what is now certain: new reasoning, new content, finished calls."""
        text = self.tail + text
        cut = text.rfind("<")
        if cut < 0 or not any(tag.startswith(text[cut:]) and tag != text[cut:] for tag in TAGS):
            cut = len(text)
        self.tail = text[cut:]
        for piece in SPLIT.split(text[:cut]):
            if piece:
                self._piece(piece)
        return self._new()

    def finish(self) -> Parsed:
        """Say that the text has ended, and return what was still held back."""
        if self.tail:
            self._piece(self.tail)
        self._text(self.lead or "")
        self._no_call()
        for text, call in self.drafts:  # the thought never ended: they were calls
            if call is None:
                self.reasoning.add(text)
            else:
                self.tool_calls.append(call)
        return self._new()

    def _new(self) -> Parsed:
        new = Parsed(self.reasoning.take(), self.content.take(), self.tool_calls)
        self.tool_calls = []
        return new

    def _piece(self, piece: str):
        """Take one whole tag, or text with no tag in it (which may be a part of a longer text)."""
        if self.lead is not None:
            if piece.isspace():
                self.lead += piece
                return
            lead, self.lead = self.lead, None
            if piece == "<think>" or (piece == "</think>" and not self.in_thought):
                self.in_thought = piece == "<think>"
                return
            self._text(lead)
        if piece == "</think>" and self.in_thought:
            self._no_call()
            self.reasoning.add("".join(text for text, _ in self.drafts))
            self.drafts, self.in_thought = [], False
        elif self.call is not None:
            self._in_call(self.call, piece)
        elif piece == "<tool_call>":
            self.call, self.fields = [piece], [[]]
        else:
            self._text(piece)

    def _text(self, text: str):
        if self.drafts:
            self.drafts.append((text, None))
        else:
            (self.reasoning if self.in_thought else self.content).add(text)

    def _in_call(self, call: list[str], piece: str):
        place = (len(self.fields) - 1) % 4  # name or blank, key, blank, value
        if piece == IN_CALL[place]:
            self.fields.append([])
        elif place == 3 or piece not in TAGS:
            self.fields[-1].append(piece)
        elif piece != "</tool_call>" or place != 0:  # no form of ours: read on behind what we have
            self._no_call()
            return self._piece(piece)
        call.append(piece)
        if place == 0 and piece == "</tool_call>":
            self._end_call()

    def _end_call(self):
        name, *rest = ["".join(field) for field in self.fields]
        keys, values, blanks = rest[0::4], rest[2::4], rest[1::2]
        if len(name.split()) != 1 or any(blank.strip() for blank in blanks):
            return self._no_call()
        name, keys = name.strip(), [key.strip() for key in keys]
        types = self.schemas.get(name, {})
        arguments = {key: _value(value, types.get(key)) for key, value in zip(keys, values, strict=True)}
        raw, self.call, call = "".join(self.call or []), None, {"name": name, "arguments": arguments}
        if self.in_thought:
            self.drafts.append((raw, call))
        else:
            self.tool_calls.append(call)

    def _no_call(self):
        """The tool call we are in, if any, is none: its text goes where it would have gone without it."""
        raw, self.call = "".join(self.call or []), None
        self._text(raw)


class _Trimmed:
    """Text that arrives in pieces, without the newlines at its start and its end."""

    def __init__(self):
        self.ready: list[str] = []
        self.begun, self.newlines = False, 0

    def add(self, text: str):
        text = text if self.begun else text.lstrip("\n")
        kept = text.rstrip("\n")
        if kept:
            self.ready += ["\n" * self.newlines, kept]
            self.begun, self.newlines = True, 0
        self.newlines += len(text) - len(kept)

    def take(self) -> str:
        text, self.ready = "".join(self.ready), []
        return text


def _value(text: str, schema: dict | None) -> Any:
    """An argument's value, from its text and the JSON schema of its parameter."""
    types = _types(schema)
    if "string" in types and types <= {"string", "null"}:
        return None if "null" in types and text == "null" else text
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():  # "\d" in a literal warns
                warnings.simplefilter("ignore")
                return json.loads(json.dumps(read(text), allow_nan=False))  # what JSON has: no tuple, set, bytes, NaN
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            pass
    return text


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type", [])
    return {*([named] if isinstance(named, str) else named)}.union(*map(_types, schema.get("anyOf", [])))
