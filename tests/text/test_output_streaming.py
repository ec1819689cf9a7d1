"""Arguments of every kind, streamed as they are written where a grammar holds the call to its schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from expertstream.text.output import CallDelta, CallEnd, CallStart, OutputParser

VALUES: list[tuple[Any, str, Any]] = [
    ({"type": "array", "items": {"type": "string"}}, '["a", "b\\u00e9\\"]", "c"]', ["a", 'bé"]', "c"]),
    ({"type": "object"}, '{"a": {"b": [1, 2.50, 1e2]}}', {"a": {"b": [1, 2.5, 100.0]}}),
    ({"type": "integer"}, "12345", 12345),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "nullify it", "nullify it"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, '"quoted"', "quoted"),
    ({"type": ["string", "null"]}, "a\nb", "a\nb"),
    ({"type": "string"}, "text", "text"),
]


def fed_by_character(tools: Any, whole: str, arguments: dict[str, Any]) -> tuple[str, list[int]]:
    """The arguments as they were streamed, and how much of them was there after each character."""
    parser = OutputParser(tools, held=True, typed=["f"])
    written, seen, ends = "", [], []
    for char in whole:
        for event in parser.feed(char):
            written += event.json if isinstance(event, CallDelta) else ""
            ends += [event] if isinstance(event, CallEnd) else []
        seen.append(len(written))
    assert ends == [CallEnd(0, "f", arguments, True)]
    assert json.loads(written) == arguments and parser.finish() == []
    return written, seen


@pytest.mark.parametrize(("schema", "text", "value"), VALUES)
def test_values_are_streamed_as_they_are_written(schema: Any, text: str, value: Any) -> None:
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {"v": schema, "w": {"type": "string"}}}}]
    whole = f"<tool_call>\n<function=f>\n<parameter=v>\n{text}\n</parameter>\n<parameter=w>\nx\n</parameter>\n</function>\n</tool_call>"
    written, seen = fed_by_character(tools, whole, {"v": value, "w": "x"})
    if text[0] != '"' and text != "null":  # before the value is whole
        assert seen[whole.index(text) + len(text) - 1] > len('{"v": ')
    for at in range(whole.index(text) + 1, len(whole)):  # cut: never more than was written
        parser = OutputParser(tools, held=True, typed=["f"])
        found = parser.feed(whole[:at]) + parser.finish(cut=True)
        said = "".join(e.json for e in found if isinstance(e, CallDelta))
        assert written.startswith(said) or json.loads(said + "}"), (at, said)


def test_a_call_that_only_all_arguments_explain_has_its_name_at_once() -> None:
    ways = [
        {"properties": {"k": {"const": "a"}, "v": {"type": "integer"}}},
        {"properties": {"k": {"const": "b"}, "v": {"type": "string"}}},
    ]
    tools = [{"name": "f", "parameters": {"type": "object", "anyOf": ways}}]
    for kind, value in (("a", 3), ("b", "3")):
        parser = OutputParser(tools, held=True, typed=["f"])
        assert parser.feed("<tool_call>\n<function=f>\n<parameter=v>") == [CallStart(0, "f")]
        found = (
            parser.feed(f"\n3\n</parameter>\n<parameter=k>\n{kind}\n</parameter>\n</function>\n</tool_call>")
            + parser.finish()
        )
        assert found == [
            CallDelta(0, json.dumps({"v": value, "k": kind})),
            CallEnd(0, "f", {"v": value, "k": kind}, True),
        ]


def test_an_argument_that_was_only_named_is_left_out() -> None:
    tools = [{"name": "f", "parameters": {"properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}}]
    for held in (False, True):
        parser = OutputParser(tools, held=held, typed=["f"])
        found = parser.feed(
            "<tool_call>\n<function=f>\n<parameter=s>\nx\n</parameter>\n<parameter=n>\n"
        ) + parser.finish(cut=True)
        assert found[-1] == CallEnd(0, "f", {"s": "x"}, False)


@pytest.mark.parametrize("value", [["a", 'b"]', {"c": [1, 2]}], {"a": {"b": "}"}}, 12.5, True, None, "text", []])
def test_values_of_calls_in_json_are_streamed_too(value: Any) -> None:
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {"v": {}, "w": {"type": "string"}}}}]
    arguments = {"v": value, "w": "x"}
    whole = f'<tool_call>\n{{"name": "f", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
    written, seen = fed_by_character(tools, whole, arguments)
    if isinstance(value, list | dict) and value:
        text = json.dumps(value)
        assert seen[whole.index(text) + len(text) // 2] > len('{"v": ')
    for at in range(whole.index('"v"') + 5, len(whole)):
        parser = OutputParser(tools, held=True, typed=["f"])
        found = parser.feed(whole[:at]) + parser.finish(cut=True)
        said = "".join(e.json for e in found if isinstance(e, CallDelta))
        assert written.startswith(said) or json.loads(said + "}"), (at, said)
