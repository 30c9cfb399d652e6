"""Answers split into reasoning, content and tool calls: both formats, any way to cut the text, calls that are none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.errors import UsageError
from glm_jax.parsing import TAGS, ResponseStream, parse_response

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "zip": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "days": {"type": "integer"},
                "any": {"type": ["string", "integer"]},
            },
        },
    },
}
CALL = "<tool_call>f<arg_key>k</arg_key><arg_value>1</arg_value></tool_call>"


def call(**arguments):
    return {"name": "f", "arguments": arguments}


def streamed(pieces, *args, **kwargs):
    stream = ResponseStream(*args, **kwargs)
    new = [stream.add(piece) for piece in pieces] + [stream.finish()]
    return "".join(n.reasoning for n in new), "".join(n.content for n in new), [c for n in new for c in n.tool_calls]


def test_the_formats_of_4_5_and_4_7():
    days = {"name": "get_weather", "arguments": {"city": "Beijing", "days": 3}}
    text = (
        "\n<think>need it</think>\nLet me look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Beijing</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
    )
    assert parse_response(text, "glm-4.5") == ("need it", "Let me look.", [days])
    assert parse_response(text, "glm-4.6") == ("need it", "Let me look.", [days])
    text = (
        "need it</think>Let me look.<tool_call>get_weather<arg_key>city</arg_key><arg_value>Beijing</arg_value>"
        "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>"
    )
    assert parse_response(text, "glm-4.7") == ("need it", "Let me look.", [days])
    with pytest.raises(UsageError, match="glm-9"):
        parse_response(text, "glm-9")


@pytest.mark.parametrize(
    "text, format, in_thought, reasoning, content",
    [
        ("plain", "glm-4.5", None, "", "plain"),  # after /nothink the prompt holds the empty thought
        ("\nplain\n", "glm-4.5", None, "", "plain"),
        ("\n<think></think>\nplain", "glm-4.5", None, "", "plain"),
        ("\n<think>cut off", "glm-4.5", None, "cut off", ""),
        ("cut off", "glm-4.7", None, "cut off", ""),
        ("plain", "glm-4.7", False, "", "plain"),  # enable_thinking=False: the prompt holds </think>
        ("a</think>b", "glm-4.7", None, "a", "b"),
        ("<think>a</think>b", "glm-4.7", None, "a", "b"),  # the prompt's tag may be there too
        ("</think>b", "glm-4.7", None, "", "b"),
        ("</think>b", "glm-4.7", False, "", "b"),
        ("a</think>b", "glm-4.5", True, "a", "b"),
        ("\n\n<think>\n\n a \n</think>\n\n  b\n\nc \n", "glm-4.5", None, " a ", "  b\n\nc "),  # only newlines go
        ("a <think>b</think> c", "glm-4.5", None, "", "a <think>b</think> c"),  # a thought comes first
        ("<think>a</think>b</think>c<think>", "glm-4.5", None, "a", "b</think>c<think>"),
        ("a < b <th <tool_cal 3</arg_key>", "glm-4.5", None, "", "a < b <th <tool_cal 3</arg_key>"),
        ("", "glm-4.5", None, "", ""),
        ("", "glm-4.7", None, "", ""),
        (" ", "glm-4.5", None, "", " "),
        (" </think> ", "glm-4.7", None, " ", " "),
        ("a<thi", "glm-4.7", None, "a<thi", ""),
    ],
)
def test_thought_and_content(text, format, in_thought, reasoning, content):
    assert parse_response(text, format, in_thought=in_thought) == (reasoning, content, [])
    assert streamed(text, format, in_thought=in_thought) == (reasoning, content, [])


@pytest.mark.parametrize(
    "text, content, calls",
    [
        ("<tool_call>f</tool_call>", "", [call()]),  # no arguments
        ("<tool_call>f\n</tool_call>", "", [call()]),
        ("\n<tool_call> f \n <arg_key> k </arg_key> <arg_value>1</arg_value> </tool_call>\n", "", [call(k=1)]),
        (f"a\n{CALL}\nb{CALL}c\n", "a\n\nbc", [call(k=1), call(k=1)]),
        (
            "<tool_call>f<arg_key>k</arg_key><arg_value></tool_call></arg_value></tool_call>",
            "",
            [call(k="</tool_call>")],
        ),
        ("<tool_call>f<arg_key>k</arg_key><arg_value>\n x\n</arg_value></tool_call>", "", [call(k="\n x\n")]),
        ("<tool_call>f<arg_key>k</arg_key><arg_value></arg_value></tool_call>", "", [call(k="")]),
        # no call: all of it stays
        ("<tool_call></tool_call>", "<tool_call></tool_call>", []),
        ("<tool_call>two words</tool_call>", "<tool_call>two words</tool_call>", []),
        ('a\n<tool_call>{"name": "f"}</tool_call>', 'a\n<tool_call>{"name": "f"}</tool_call>', []),
        ("<tool_call>f<arg_key>k</arg_key><arg_value>1</arg_val", None, []),
        ("<tool_call>f<arg_key>k</arg_key></tool_call>", None, []),
        ("<tool_call>f<arg_value>1</arg_value></tool_call>", None, []),
        ("<tool_call>f<arg_key>k</arg_key>x<arg_value>1</arg_value></tool_call>", None, []),
        ("<tool_call>f<arg_key>k</arg_key><arg_value>1</arg_value>x</tool_call>", None, []),
        ("<tool_call>f<arg_key>k", None, []),
        # what follows one that is none is read again, but never what it held as a value
        (f"<tool_call>g{CALL}", "<tool_call>g", [call(k=1)]),
        (f"<tool_call>g<arg_key>k</arg_key><arg_value>{CALL[:-20]}", None, []),
        ("<tool_call>g<arg_key>k</arg_key><arg_value><tool_call>f</tool_call>", None, []),
    ],
)
def test_tool_calls(text, content, calls):
    content = text if content is None else content
    assert parse_response(text) == ("", content, calls)
    assert streamed(text) == ("", content, calls)


def test_a_call_within_a_thought_is_only_planned_unless_the_thought_never_ends():
    planned = f"I could {CALL}\nor not"
    assert parse_response(f"{planned}</think>b{CALL}", "glm-4.7") == (planned, "b", [call(k=1)])
    assert parse_response(f"do it\n{CALL}\n{CALL}", "glm-4.7") == ("do it", "", [call(k=1), call(k=1)])
    # neither a mention of the tag nor a call that is not finished swallows the end of the thought
    for planned in ("the <tool_call> tag", "<tool_call>f<arg_key>k</arg_key><arg_value>1", CALL[:-3]):
        assert parse_response(f"{planned}</think>b", "glm-4.7") == (planned, "b", [])


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("city", "3", "3"),  # typed string: verbatim
        ("city", "null", "null"),
        ("city", ' "x" ', ' "x" '),
        ("zip", "03", "03"),
        ("zip", "null", None),
        ("days", "3", 3),
        ("days", "three", "three"),
        ("any", "3", 3),
        ("any", "x", "x"),
        ("other", "true", True),
        ("other", "True", True),
        ("other", "None", None),
        ("other", '{"a": [1, 2.5, null]}', {"a": [1, 2.5, None]}),
        ("other", "{'a': (1, 2)}", {"a": [1, 2]}),
        ("other", "plain words", "plain words"),
        ("other", "", ""),
        # nothing that JSON cannot say, and nothing that breaks the reader
        ("other", "NaN", "NaN"),
        ("other", "1e999", "1e999"),
        ("other", "{1, 2}", "{1, 2}"),
        ("other", "b'x'", "b'x'"),
        ("other", r"'C:\d'", "C:\\d"),
        ("other", "9" * 5000, "9" * 5000),
        ("other", "[" * 100_000, "[" * 100_000),
        ("other", "-" * 100_000 + "1", "-" * 100_000 + "1"),
    ],
)
def test_values_have_the_type_of_the_schema(key, text, value):
    text = f"<tool_call>get_weather<arg_key>{key}</arg_key><arg_value>{text}</arg_value></tool_call>"
    for tools in ([WEATHER], [WEATHER["function"]]):
        (got,) = parse_response(text, tools=tools).tool_calls
        assert got["arguments"] == {key: value} and type(got["arguments"][key]) is type(value)


def test_without_tools_a_string_that_is_json_is_read():
    (got,) = parse_response("<tool_call>f<arg_key>city</arg_key><arg_value>3</arg_value></tool_call>").tool_calls
    assert got["arguments"] == {"city": 3}


FRAGMENTS = st.sampled_from(
    [*TAGS, CALL, "<tool_call>f", "\n", " ", "<", ">", "</", "<thi", "_call>", "f", "1", "é🙂", "a b"]
)
TEXTS = st.lists(FRAGMENTS, max_size=14).map("".join)
FORMATS = st.sampled_from(["glm-4.5", "glm-4.7"])


@settings(max_examples=400, deadline=None, database=None)
@given(TEXTS, FORMATS, st.sampled_from([None, True, False]), st.data())
def test_the_parts_do_not_depend_on_how_the_text_is_cut(text, format, in_thought, data):
    whole = parse_response(text, format, in_thought=in_thought)
    assert streamed(text, format, in_thought=in_thought) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert streamed(pieces, format, in_thought=in_thought) == whole


@settings(max_examples=300, deadline=None, database=None)
@given(TEXTS, FORMATS)
def test_nothing_is_lost(text, format):
    got = parse_response(text, format)
    if not got.tool_calls:
        rest = text.strip()  # what opens the answer, then one </think>: the only text that may be missing
        opened = rest.startswith("<think>") or (format == "glm-4.7" and not rest.startswith("</think>"))
        rest = rest.removeprefix("<think>") if rest.startswith("<think>") else rest
        before, end, after = rest.partition("</think>") if opened or rest.startswith("</think>") else ("", "", rest)
        expected = before + after
        assert "".join((got.reasoning + got.content).split()) == "".join(expected.split())


@settings(max_examples=200, deadline=None, database=None)
@given(st.text("ab <>/\n", max_size=20), st.text("ab <>/\n", max_size=20), FORMATS)
def test_no_piece_of_a_tag_leaks_while_streaming(reasoning, content, format):
    """What was given out so far is always a start of the true part, so no start of a tag ever was."""
    opening = "<think>" if format == "glm-4.5" else ""
    stream, seen, calls = ResponseStream(format), ["", ""], []
    for character in f"{opening}{reasoning}</think>{content}{CALL}":
        new = stream.add(character)
        seen[0] += new.reasoning
        seen[1] += new.content
        calls += new.tool_calls
        assert reasoning.strip("\n").startswith(seen[0]) and content.strip("\n").startswith(seen[1])
    assert calls == [call(k=1)]  # given out with its last character, before the end
    assert stream.finish() == ("", "", []) and seen == [reasoning.strip("\n"), content.strip("\n")]


def test_text_is_given_out_as_soon_as_it_is_certain():
    stream = ResponseStream("glm-4.7")
    assert stream.add("I see") == ("I see", "", [])
    assert stream.add(" <") == (" ", "", [])
    assert stream.add("b") == ("<b", "", [])
    assert stream.add("\n") == ("", "", [])  # may be the last newline of the thought
    assert stream.add("x</thin") == ("\nx", "", [])
    assert stream.add("k>\nHi") == ("", "Hi", [])
    assert stream.add("!<tool_call>f</tool_call>") == ("", "!", [{"name": "f", "arguments": {}}])


def test_what_is_read_again_for_each_piece_stays_short():
    """A parser that looks again at all it holds takes minutes for a file written through a tool."""
    stream = ResponseStream(tools=[WEATHER])
    stream.add("<tool_call>get_weather<arg_key>city</arg_key><arg_value>")
    for _ in range(3000):
        assert stream.add("<x></arg") == ("", "", []) and len(stream.tail) == len("</arg")
    (got,) = stream.add("</arg_value></tool_call>").tool_calls
    assert got["arguments"] == {"city": "<x></arg" * 3000}
