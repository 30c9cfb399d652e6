"""Text to token ids and back, and chats to prompts: transformers' AutoTokenizer, with checks and streaming added.

transformers is imported when a folder is read, not before."""

import json
import os
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from glm_jax.errors import BadInput, UsageError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
ROLES = ("system", "user", "assistant", "tool")


class Tokenizer:
    """The tokenizer and the chat template of a model folder.

    stop_ids: the ids that end an answer; the loader fills them in from the folder's generation config.
    """

    def __init__(self, tokenizer: Any, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.tokenizer = tokenizer  # transformers' own, for what this class does not do
        self.stop_ids: tuple[int, ...] = ()
        self._hidden = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Tokenizer | None":
        """Read the tokenizer of a local folder, or return None if it has none.

        No network, no code from the folder, and config.json is not read. BadInput: the files do not make a tokenizer.
        """
        if not (Path(folder) / "tokenizer.json").is_file():
            return None
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it tells users to install PyTorch
        from transformers import AutoTokenizer, PretrainedConfig

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), config=PretrainedConfig(), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # tokenizers raises bare Exceptions
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadInput(f"{folder}: the tokenizer cannot be read: {reason}") from error
        tokenizer.model_max_length = 1 << 62  # the files say 128000, the models take 202752: the config knows, not this
        return cls(tokenizer, folder)

    def save(self, folder: str | os.PathLike) -> None:
        """Copy the tokenizer's files, the chat template among them, as they are."""
        for name in FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, Path(folder) / name)

    @property
    def size(self) -> int:
        """The number of ids that exist. The model's head is padded: ids from here on are never to be sampled."""
        return len(self.tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder has a chat template."""
        return bool(self.tokenizer.chat_template)

    @property
    def continues_text(self) -> bool:
        """Whether a prompt given as text is to be continued, not answered: "prompt_form": "text" in the folder's
        tokenizer_config.json, as a base model may have it though it has a chat template."""
        return self.tokenizer.init_kwargs.get("prompt_form") == "text"

    @cached_property
    def format(self) -> str:
        """The form of the answers, for parse_response: "glm-4.7" where the prompt opens the thought, else "glm-4.5"."""
        opened = self.has_chat_template and self.render([{"role": "user", "content": "?"}]).endswith("<think>")
        return "glm-4.7" if opened else "glm-4.5"

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with nothing put in front or behind.

        A special token spelled out in the text ("<|user|>") becomes that token, in a raw prompt and in the messages of
        a chat: prompts can be written by hand, and whoever does not trust a text has to take them out of it first.
        """
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. <think>, <tool_call> and the other tags of an answer stay; role and end tokens vanish."""
        return self.tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)

    def stream(self) -> "TextStream":
        """A decoder that takes one id at a time."""
        return TextStream(self)

    def chat(
        self,
        messages: list,
        tools: list | None = None,
        enable_thinking: bool = True,
        add_generation_prompt: bool = True,
        clear_thinking: bool = True,
    ) -> list[int]:
        """The prompt of a chat as ids; render has the arguments."""
        return self.encode(self.render(messages, tools, enable_thinking, add_generation_prompt, clear_thinking))

    def render(
        self,
        messages: list,
        tools: list | None = None,
        enable_thinking: bool = True,
        add_generation_prompt: bool = True,
        clear_thinking: bool = True,
    ) -> str:
        """The prompt of a chat as text, by the folder's chat template. UsageError: a message that is not well formed.

        messages: {"role", "content"} with role "system", "user", "assistant" or "tool"; content is text or a list of
            text parts. An assistant's may have "reasoning_content" and "tool_calls" instead of or beside content. A
            call is {"name", "arguments"}, or that under "function"; arguments are a dict, its JSON text, or None.
        clear_thinking: False shows the model its thoughts before the last user turn again (GLM-4.7 only), which also
            leaves the prefix of the prompt as it was in the turn before.
        """
        from jinja2 import TemplateError, TemplateSyntaxError

        if not self.has_chat_template:
            raise UsageError("the folder has no chat template: give the prompt as raw text (--raw)")
        if not all(isinstance(tool, dict) for tool in tools or []):
            raise UsageError("tools must be JSON schemas, as dicts")
        try:
            return self.tokenizer.apply_chat_template(
                _checked(messages),
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=enable_thinking,
                clear_thinking=clear_thinking,
            )
        except TemplateSyntaxError as error:
            raise BadInput(f"the folder's chat template is broken: {error}") from error
        except TemplateError as error:
            raise UsageError(f"the folder's chat template refuses these messages: {error}") from error


class TextStream:
    """Ids one at a time to text; all that add and finish return, joined, is decode of all the ids.

    Only the last few ids are decoded again for each new one: a character has at most 4 bytes, so the last 4 tokens hold
    the last character whole, or its unfinished start, which decodes to one U+FFFD and is held back.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.window: list[int] = []
        self.given = 0  # the characters of the window's text that were returned

    def add(self, token: int) -> str:
        """Take the next id and return the text that is now certain, which may be none."""
        if int(token) in self.tokenizer._hidden:
            return ""
        if len(self.window) > 8:
            self.window = self.window[-4:]
            self.given = _whole(self.tokenizer.decode(self.window))
        self.window.append(int(token))
        text = self.tokenizer.decode(self.window)
        start, self.given = self.given, _whole(text)
        return text[start : self.given]

    def finish(self) -> str:
        """Return what was held back: the U+FFFD of a character that never came whole, or nothing."""
        return self.tokenizer.decode(self.window)[self.given :]


def _whole(text: str) -> int:
    return len(text) - text.endswith("\ufffd")


def _checked(messages: Any) -> list[dict]:
    """The messages in the form every template takes, or a UsageError that names the first that is wrong."""
    if not isinstance(messages, list) or not messages:
        raise UsageError("messages must be a list of at least one message")
    return [_message(message, f"message {i}") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = f"role {message.get('role')!r}" if isinstance(message, dict) else type(message).__name__
        raise UsageError(f"{where} has {role}: it must be a dict whose role is one of {', '.join(ROLES)}")
    role, content = message["role"], message.get("content")
    where += f" ({role})"
    calls, thought = message.get("tool_calls"), message.get("reasoning_content")
    if thought is not None and not isinstance(thought, str):
        raise UsageError(f"{where}: reasoning_content must be text, not {type(thought).__name__}")
    if calls and not (isinstance(calls, list) and role == "assistant"):
        raise UsageError(f"{where}: tool_calls must be a list, in a message of the assistant")
    if content is None:
        if role != "assistant" or not (calls or thought is not None):
            raise UsageError(f"{where} has no content")
        content = ""
    texts = [_part(part) for part in content] if isinstance(content, list) else [content]
    if not all(isinstance(text, str) for text in texts):
        if role != "tool" or not isinstance(content, list):  # a tool may give a list of results, {"output": ...} each
            raise UsageError(f"{where}: content must be text or a list of text parts")
    else:
        content = "".join(texts)
    message = {**message, "content": content}
    if calls:
        message["tool_calls"] = [_call(call, f"{where}: tool call {i}") for i, call in enumerate(calls)]
    return message


def _part(part: Any) -> Any:
    return part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part


def _call(call: Any, where: str) -> dict:
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError(f"{where} has no name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise UsageError(f"{where} ({function['name']}): arguments are not JSON: {error}") from error
    if not isinstance(arguments, dict | None):
        raise UsageError(f"{where} ({function['name']}): arguments must be an object, not {type(arguments).__name__}")
    return {**call, "function": {**function, "arguments": arguments or {}}}
