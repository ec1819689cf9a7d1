"""What a model writes, split into events: the same wherever the stream is cut."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from expertstream.server.stream import Content, Event, FunctionCall, Reasoning, Splitter, typed_argument

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"}, "n": {"type": "integer"}, "x": {"type": "number"}, "yes": {"type": "boolean"},
                "list": {"type": "array"}, "maybe": {"type": ["integer", "null"]}, "any": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
            },
        },
    },
}  # fmt: skip


def events(*pieces: str, reasoning: bool = False) -> list[Event]:
    """With neighbours of a kind put together, as whoever reads a stream does."""
    splitter = Splitter([TOOL], reasoning)
    found = [event for piece in pieces for event in splitter.feed(piece)] + splitter.finish()
    merged: list[Event] = []
    for kind, group in groupby(found, type):
        if kind is FunctionCall:
            merged += group
        else:
            merged.append(kind("".join(event.text for event in group)))
    return merged


XML = "<tool_call>\n<function=f>\n<parameter=text>\na\nb\n</parameter>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>"
JSON = '<tool_call>\n{"name": "f", "arguments": {"text": "a\\nb", "n": 3}}\n</tool_call>'
CALL = FunctionCall("f", {"text": "a\nb", "n": 3})
TEXTS: list[tuple[str, bool, list[Event]]] = [
    ("Hello.", False, [Content("Hello.")]),
    ("<think>\nHm.\n</think>\n\nHello.\n", False, [Reasoning("Hm."), Content("Hello.")]),
    ("<think>\n\n</think>\n\nHello.", False, [Content("Hello.")]),
    ("Hm.\n</think>\n\nHello.", True, [Reasoning("Hm."), Content("Hello.")]),
    ("Hm, no end", True, [Reasoning("Hm, no end")]),
    (XML, False, [CALL]),
    (JSON, False, [CALL]),
    (f"<think>\n</think>\n\nI look.\n\n{XML}\n{JSON}", False, [Content("I look."), CALL, CALL]),
    (f"Hm.</think>{XML}", True, [Reasoning("Hm."), CALL]),
    (XML.removesuffix("\n</tool_call>"), False, [CALL]),  # it ended without its last tag
    (f"{XML} and more", False, [CALL, Content("and more")]),
    ("<tool_call>\nno call\n</tool_call>", False, [Content("<tool_call>\nno call\n</tool_call>")]),
    ("<tool_call>\n<function=f>\n<parameter=n>\n3", False, [Content("<tool_call>\n<function=f>\n<parameter=n>\n3")]),
    ("Write <tool_call> to call.", False, [Content("Write <tool_call> to call.")]),
    (
        f"Hm.</think>\n\nSo: <tool_call>no</tool_call>\n{XML}",
        True,
        [Reasoning("Hm."), Content("So: <tool_call>no</tool_call>"), CALL],
    ),
    (
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        False,
        [Content('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>')],
    ),
    (
        '<tool_call>{"name": "f", "arguments": {"maybe": "null"}}</tool_call>',
        False,
        [FunctionCall("f", {"maybe": "null"})],
    ),
    ("a < b, a <t and <tool", False, [Content("a < b, a <t and <tool")]),
    ("Tags are written <think>so</think>.", False, [Content("Tags are written <think>so</think>.")]),
    ("", False, []),
    (" \n ", False, []),
]


@pytest.mark.parametrize(("text", "reasoning", "expected"), TEXTS)
def test_every_cut_gives_the_same(text: str, reasoning: bool, expected: list[Event]) -> None:
    assert events(text, reasoning=reasoning) == expected
    assert events(*text, reasoning=reasoning) == expected
    for at in range(len(text)):
        assert events(text[:at], text[at:], reasoning=reasoning) == expected


TAGS = st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=n>", "</parameter>", "\n", " ", "x", "{", "3", "<", '{"name": "f", "arguments": {}}'])  # fmt: skip


@given(st.lists(TAGS, max_size=12), st.booleans(), st.data())
def test_any_text_is_split_alike_however_it_is_cut(parts: list[str], reasoning: bool, data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = events(text, reasoning=reasoning)
    assert events(*pieces, reasoning=reasoning) == whole == events(*text, reasoning=reasoning)


@given(st.dictionaries(st.sampled_from(["text", "n", "x", "yes", "list", "maybe"]), st.none(), min_size=1), st.data())
@example({"text": None}, None)
def test_arguments_come_back_with_their_types(keys: dict[str, None], data: st.DataObject | None) -> None:
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "text": st.text(st.characters(exclude_characters="<\r", exclude_categories=["Cs"])), "n": st.integers(), "x": st.floats(allow_nan=False, allow_infinity=False),
        "yes": st.booleans(), "list": st.lists(st.integers()), "maybe": st.none() | st.integers(),
    }  # fmt: skip
    arguments = {key: data.draw(kinds[key]) if data else "<b>3</b>\n\n" for key in keys}
    body = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in arguments.items()
    )
    assert events(f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>") == [FunctionCall("f", arguments)]


@pytest.mark.parametrize(
    ("value", "schema", "typed"),
    [
        ("3", {"type": "string"}, "3"), ("3", {}, "3"), ("3", {"type": "integer"}, 3), ("3.0", {"type": "integer"}, 3), ("3", {"type": "number"}, 3),
        ("3.5", {"type": "integer"}, "3.5"), ("True", {"type": "boolean"}, True), ("yes", {"type": "boolean"}, "yes"), ("None", {"type": ["null", "integer"]}, None),
        ("[1, 2]", {"type": "array"}, [1, 2]), ("{", {"type": "object"}, "{"), ("null", {"type": ["string", "null"]}, None), ("[" * 9999, {"type": "array"}, "[" * 9999),
        ("[-1e400]", {"type": "array"}, [-sys.float_info.max]), ("[NaN]", {"type": "array"}, "[NaN]"), ("3", True, "3"), ("3", {"anyOf": None, "enum": None}, "3"),
        ("2", {"enum": [1, 2]}, 2), ("a", {"enum": ["a", "b"]}, "a"), ("7", {"oneOf": [{"type": "integer"}]}, 7), ("1e400", {"type": "integer"}, "1e400"),
    ],
)  # fmt: skip
def test_an_argument_is_typed_by_its_schema(value: str, schema: Any, typed: Any) -> None:
    found = typed_argument(value, schema)
    assert found == typed and type(found) is type(typed)


@pytest.mark.parametrize(
    "parameters", [None, {}, {"properties": None}, {"properties": {"n": True}}, {"properties": []}]
)
def test_a_schema_that_says_little_leaves_arguments_as_text(parameters: Any) -> None:
    splitter = Splitter([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    text = "<tool_call><function=f><parameter=n>3</parameter></function></tool_call>"
    assert splitter.feed(text) + splitter.finish() == [FunctionCall("f", {"n": "3"})]


def test_half_of_a_character_does_not_leave() -> None:
    tool = {"function": {"name": "f", "parameters": {"properties": {"x": {"type": "array"}}}}}
    splitter = Splitter([tool])
    (call,) = splitter.feed(
        '<tool_call>\n<function=f>\n<parameter=x>\n["\\ud83d", "\\ud83d\\ude00"]\n</parameter>\n</function>\n</tool_call>'
    )
    assert isinstance(call, FunctionCall) and call.arguments["x"][1] == "\U0001f600"
    json.dumps(call.arguments, ensure_ascii=False).encode()
