"""The tokenizer and the chat templates: renderings byte for byte, special tokens, text as it streams, bad messages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_tokenizer import SPECIAL_TOKENS, write_tokenizer

from glm_jax.errors import BadInput, UsageError
from glm_jax.parsing import parse_response
from glm_jax.tokenizer import Tokenizer

VECTORS = json.loads((Path(__file__).parent / "data" / "chat_template_vectors.json").read_text(encoding="utf-8"))
TEMPLATES = {"4.5": "glm-4.6", "4.6": "glm-4.6", "4.7": "glm-4.7"}
HELLO = [{"role": "user", "content": "hello"}]


def read(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.read(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp("tokenizer") for name in ("glm-4.6", "glm-4.7")}
    return {name: read(write_tokenizer(folder, name)) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def tokenizer(tokenizers):
    return tokenizers["glm-4.6"]


@pytest.mark.parametrize("version", TEMPLATES)
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_renderings_equal_the_published_templates(tokenizers, vector, version):
    ours, inputs = tokenizers[TEMPLATES[version]], dict(vector["inputs"])
    assert ours.render(**inputs) == vector["rendered"][version]
    theirs = ours.tokenizer.apply_chat_template(inputs.pop("messages"), tokenize=False, **inputs)
    assert theirs == vector["rendered"][version]


def test_there_are_45_renderings():
    assert sum(len(vector["rendered"]) for vector in VECTORS) == 45


@pytest.mark.parametrize("name", ["glm-4.6", "glm-4.7"])
def test_a_prompt_begins_with_its_prefix_once(tokenizers, name):
    ids = tokenizers[name].chat(HELLO)
    first, second = (tokenizers[name].tokenizer.convert_tokens_to_ids(token) for token in ("[gMASK]", "<sop>"))
    assert ids[:2] == [first, second] and ids.count(first) == ids.count(second) == 1


def test_a_tokenizer_that_adds_a_prefix_by_itself_does_not_double_it(tmp_path):
    """A post-processor that adds [gMASK]<sop>, as ChatGLM's has: encode with special tokens would double it."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    file = write_tokenizer(tmp_path) / "tokenizer.json"
    backend = Backend.from_file(str(file))
    prefix = [(token, backend.token_to_id(token)) for token in ("[gMASK]", "<sop>")]
    backend.post_processor = TemplateProcessing("[gMASK] <sop> $A", special_tokens=prefix)
    backend.save(str(file))
    ours = read(tmp_path)
    first, doubled = ours.chat(HELLO)[0], ours.tokenizer.encode(ours.render(HELLO))
    assert ours.chat(HELLO).count(first) == 1 and doubled.count(first) == 2


def test_format_and_size(tokenizers, tmp_path):
    assert [tokenizers[name].format for name in ("glm-4.6", "glm-4.7")] == ["glm-4.5", "glm-4.7"]
    assert tokenizers["glm-4.6"].size == 320 + 36
    bare = read(write_tokenizer(tmp_path, None))
    assert bare.format == "glm-4.5" and not bare.has_chat_template and tokenizers["glm-4.6"].has_chat_template
    with pytest.raises(UsageError, match="no chat template"):
        bare.chat(HELLO)


def test_tags_survive_decoding_and_role_tokens_vanish(tokenizer):
    for token, special in SPECIAL_TOKENS.items():
        ids = tokenizer.encode(f"a{token}b")
        assert len(ids) == 3 and tokenizer.decode(ids) == ("ab" if special else f"a{token}b")
        stream = tokenizer.stream()
        assert "".join(map(stream.add, ids)) + stream.finish() == tokenizer.decode(ids)


def test_special_tokens_in_a_raw_prompt_are_the_tokens(tokenizer):
    assert tokenizer.encode("[gMASK]<sop><|user|>\nhello<|assistant|>") == tokenizer.chat(HELLO)


def test_a_long_text_is_no_reason_for_a_warning(tokenizer):
    """transformers warns above model_max_length, which the files put at 128000, below what the models take."""
    assert tokenizer.tokenizer.model_max_length > 202_752
    assert len(tokenizer.encode("1 " * 70_000)) > 128_000


# ---- streaming text


@settings(max_examples=300, deadline=None, database=None)
@given(ids=st.lists(st.integers(0, 355) | st.integers(128, 260), max_size=40))
def test_streamed_text_is_the_decoded_text(tokenizer, ids):
    """Any ids at all, most of them pieces of characters that never become whole."""
    stream = tokenizer.stream()
    assert "".join(stream.add(id) for id in ids) + stream.finish() == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None, database=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40))
def test_half_a_character_is_never_given_out(tokenizer, text):
    stream, given_out = tokenizer.stream(), ""
    for id in tokenizer.encode(text):
        given_out += stream.add(id)
        assert text.startswith(given_out)
    assert given_out + stream.finish() == text


def test_tokens_that_vanish_do_not_part_a_character(tokenizer):
    (user,) = tokenizer.encode("<|user|>")
    ids = [id for byte in tokenizer.encode("😀") for id in (byte, *[user] * 5)]
    stream = tokenizer.stream()
    assert "".join(map(stream.add, ids)) + stream.finish() == tokenizer.decode(ids) == "😀"


def test_each_character_comes_with_its_last_byte(tokenizer):
    ids = tokenizer.encode("é😀x")
    pieces = [tokenizer.decode([id]) for id in ids]
    assert "\ufffd" in "".join(pieces)  # the mistake: token by token
    stream = tokenizer.stream()
    assert "".join(map(stream.add, ids)) == "é😀x" and stream.finish() == ""


def test_a_step_of_the_stream_decodes_a_few_ids_however_long_the_text(tokenizer, monkeypatch):
    sizes = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: sizes.append(len(ids)) or decode(ids))
    half = tokenizer.encode("😀")[0]
    for ids in (tokenizer.encode("hello 北京 😀") * 50, [half] * 500):  # 500 characters that never become whole
        stream = tokenizer.stream()
        assert "".join(map(stream.add, ids)) + stream.finish() == decode(ids)
    assert max(sizes) <= 9 and len(sizes) < 2 * 1200


# ---- folders


def test_importing_does_not_import_transformers():
    code = "import sys, glm_jax.tokenizer, glm_jax.parsing; sys.exit(len({'transformers', 'jax'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_a_folder_without_a_tokenizer(tmp_path):
    assert Tokenizer.read(tmp_path) is None


@pytest.mark.parametrize(
    "file, text", [("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("tokenizer_config.json", "[")]
)
def test_a_broken_file_is_bad_input(tmp_path, file, text):
    (write_tokenizer(tmp_path) / file).write_text(text)
    with pytest.raises(BadInput, match="cannot be read") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_broken_template_is_bad_input_and_one_that_refuses_is_the_users_mistake(tmp_path):
    (write_tokenizer(tmp_path) / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(BadInput, match="template is broken"):
        read(tmp_path).chat(HELLO)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no such thing') }}")
    with pytest.raises(UsageError, match="no such thing"):
        read(tmp_path).chat(HELLO)


def test_config_json_is_not_read_and_code_in_the_folder_does_not_run(tmp_path, capfd):
    config = json.loads((write_tokenizer(tmp_path) / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "theirs.Tokenizer"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text("print('ran')\nclass Tokenizer: pass\n")
    (tmp_path / "config.json").write_text("{")
    try:
        assert read(tmp_path).size == 356
    except BadInput:  # a refusal is as good
        pass
    assert "ran" not in capfd.readouterr().out


# ---- messages


@pytest.mark.parametrize(
    "message, said",
    [
        ({"role": "robot", "content": "x"}, "message 1 has role 'robot'"),
        ({"content": "x"}, "message 1 has role None"),
        ("hello", "message 1 has str"),
        ({"role": "user"}, r"message 1 \(user\) has no content"),
        ({"role": "user", "content": None}, "has no content"),
        ({"role": "tool"}, r"\(tool\) has no content"),
        ({"role": "assistant"}, r"\(assistant\) has no content"),
        ({"role": "user", "content": 3}, "must be text"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "must be text or a list of text parts"),
        ({"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}, "in a message of the assistant"),
        ({"role": "assistant", "content": "x", "reasoning_content": 3}, "reasoning_content must be text"),
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "tool call 0 has no name"),
        ({"role": "assistant", "tool_calls": ["f"]}, "tool call 0 has no name"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, r"\(f\): arguments are not JSON"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}, "an object, not list"),
    ],
)
def test_a_message_that_is_wrong_is_named(tokenizer, message, said):
    with pytest.raises(UsageError, match=said):
        tokenizer.render([*HELLO, message])


def test_no_messages_and_wrong_tools(tokenizer):
    with pytest.raises(UsageError, match="at least one message"):
        tokenizer.render([])
    with pytest.raises(UsageError, match="tools"):
        tokenizer.render(HELLO, tools=["f"])


@pytest.mark.parametrize("name", ["glm-4.6", "glm-4.7"])
def test_arguments_may_be_json_text_or_nothing(tokenizers, name):
    def rendered(arguments, wrap):
        function = {"name": "f"} if arguments == "absent" else {"name": "f", "arguments": arguments}
        called = {"id": "1", "type": "function", "function": function} if wrap else function
        return tokenizers[name].render([*HELLO, {"role": "assistant", "content": None, "tool_calls": [called]}])

    for wrap in (True, False):
        assert rendered({"a": 1, "b": "x"}, wrap) == rendered('{"a": 1, "b": "x"}', True)
        assert "<arg_value>x</arg_value>" in rendered('{"b": "x"}', wrap)
        assert len({rendered(nothing, wrap) for nothing in ({}, None, "", "{}", "absent")}) == 1


@pytest.mark.parametrize("name", ["glm-4.6", "glm-4.7"])
def test_our_templates_take_what_transformers_passes_them_without_our_checks(tokenizers, name):
    for nothing in ({"content": None}, {}, {"content": ""}):
        message = {"role": "assistant", **nothing, "tool_calls": [{"name": "f", "arguments": None}]}
        text = tokenizers[name].tokenizer.apply_chat_template([*HELLO, message], tokenize=False)
        assert "None" not in text and text == tokenizers[name].render([*HELLO, message], add_generation_prompt=False)


def test_a_template_that_needs_a_dict_gets_one(tmp_path):
    """The published templates of 4.5 and 4.7 fail on arguments that are None or text."""
    strict = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments.items() | list }}{% endfor %}"
    )
    (write_tokenizer(tmp_path) / "chat_template.jinja").write_text(strict + "{% endfor %}")
    calls = [{"name": "f"}, {"function": {"name": "f", "arguments": None}}, {"name": "f", "arguments": '{"a": 1}'}]
    assert read(tmp_path).render([*HELLO, {"role": "assistant", "tool_calls": calls}]) == "[][][('a', 1)]"


def test_text_parts_of_a_tool_are_one_result(tokenizer):
    parts = {"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert tokenizer.render([*HELLO, parts]) == tokenizer.render([*HELLO, {"role": "tool", "content": "ab"}])


def test_kept_thoughts_keep_the_prefix_of_the_prompt(tokenizers):
    """With thoughts cleared (the default) the prompt of the second turn parts from the first at the first answer."""
    ours = tokenizers["glm-4.7"]
    sofar = ours.render(HELLO) + "easy</think>hi"
    turns = [*HELLO, {"role": "assistant", "reasoning_content": "easy", "content": "hi"}, *HELLO]
    assert ours.render(turns, clear_thinking=False).startswith(sofar)
    assert not ours.render(turns).startswith(sofar)


# ---- there and back

TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"s": {"type": "string"}}}},
    }
]
TEXT = st.text("ab <>&'\"é\n", max_size=12).map(str.strip)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)
)
CALLS = st.fixed_dictionaries(
    {
        "name": st.just("f"),
        "arguments": st.fixed_dictionaries({}, optional={"s": st.text("ab<>\n1", max_size=9), "v": VALUES}),
    }
)


@pytest.mark.parametrize("name", ["glm-4.6", "glm-4.7"])
@settings(max_examples=100, deadline=None, database=None)
@given(reasoning=TEXT, content=TEXT, calls=st.lists(CALLS, max_size=3))
def test_an_answer_comes_back_from_its_rendering(tokenizers, name, reasoning, content, calls):
    ours = tokenizers[name]
    message = {"role": "assistant", "reasoning_content": reasoning, "content": content, "tool_calls": calls}
    before = ours.render(HELLO, TOOLS, add_generation_prompt=False) + "<|assistant|>"
    text = ours.render([*HELLO, message], TOOLS, add_generation_prompt=False)
    assert text.startswith(before)
    assert parse_response(text[len(before) :], ours.format, TOOLS) == (reasoning, content, calls)
    if reasoning:  # and as the model writes it, behind the generation prompt
        answer = text.removeprefix(ours.render(HELLO, TOOLS))
        assert answer != text and parse_response(answer, ours.format, TOOLS) == (reasoning, content, calls)
    # through ids and the text stream as well
    stream = ours.stream()
    assert "".join(map(stream.add, ours.encode(text[len(before) :]))) + stream.finish() == text[len(before) :]
