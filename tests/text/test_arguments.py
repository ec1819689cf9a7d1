"""The texts of arguments and the values that their schemas make of them."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertstream.text.arguments import ArgumentSchemas, complete_json, parse_json, typed_argument

from .test_schema import SCHEMAS

ROOT = {
    "$defs": {"E": {"enum": ["a", "b c"]}, "C": {"$ref": "#/$defs/C"}, "N": {"type": "integer"}},
    "properties": {"x": {"items": {"type": "boolean"}}},
}
OPTIONAL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
ENUM = {"$ref": "#/$defs/E"}


def typed_arguments(texts: dict[str, str], schema: Any) -> dict[str, Any]:
    return ArgumentSchemas.of(schema).typed(texts)


@pytest.mark.parametrize(
    ("text", "schema", "typed"),
    [
        ("3", {"type": "string"}, "3"), ("3", {}, "3"), ("3", {"type": "integer"}, 3), ("3.0", {"type": "integer"}, 3), ("3", {"type": "number"}, 3),
        ("3.5", {"type": "integer"}, "3.5"), ("True", {"type": "boolean"}, True), ("yes", {"type": "boolean"}, "yes"), ("None", {"type": ["null", "integer"]}, None),
        ("[1, 2]", {"type": "array"}, [1, 2]), ("{", {"type": "object"}, "{"), ("null", {"type": ["string", "null"]}, None), ("[" * 9999, {"type": "array"}, "[" * 9999),
        ("[-1e400]", {"type": "array"}, [-sys.float_info.max]), ("[NaN]", {"type": "array"}, "[NaN]"), ("3", True, "3"), ("3", {"anyOf": None, "enum": None}, "3"),
        ("2", {"enum": [1, 2]}, 2), ("a", {"enum": ["a", "b"]}, "a"), ("7", {"oneOf": [{"type": "integer"}]}, 7), ("1e400", {"type": "integer"}, "1e400"),
        # what may be listed, wherever the list stands
        ("a", ENUM, "a"), ('"a"', ENUM, "a"), ("a", {"allOf": [ENUM]}, "a"), ("b c", {"anyOf": [ENUM, {"type": "null"}]}, "b c"), ('"b c"', {"anyOf": [ENUM, {"type": "null"}]}, "b c"),
        ("null", {"anyOf": [ENUM, {"type": "null"}]}, None), (" a", ENUM, "a"), ("c", ENUM, "c"), ("null", {"enum": ["null", None]}, "null"), ("x", {"const": "x"}, "x"), ("3", {"enum": ["3", 3]}, "3"),
        # strings
        ('"banana"', {"type": "string"}, '"banana"'), ('"banana"', OPTIONAL, "banana"), ("banana", OPTIONAL, "banana"), ("3", OPTIONAL, "3"), ("None", OPTIONAL, "None"), ("[1]", OPTIONAL, "[1]"),
        ('"a"', {"anyOf": [{"type": "string", "minLength": 3}, {"type": "null"}]}, '"a"'), ("12", {"anyOf": [{"type": "string", "pattern": "^x"}, {"type": "integer"}]}, 12),
        ("x12", {"anyOf": [{"type": "string", "pattern": "^x"}, {"type": "integer"}]}, "x12"), ("a", {"type": "string", "nullable": True}, "a"), ("null", {"type": "string", "nullable": True}, None),
        # as in Python
        ("['a', True, None]", {"type": "array"}, ["a", True, None]), ("{'a': (1, 2)}", {"type": "object"}, {"a": [1, 2]}), ("{1: 2}", {"type": "object"}, "{1: 2}"), ("{1, 2}", {"type": "array"}, "{1, 2}"),
        ("[1, 2,]", {"type": "array"}, [1, 2]), ("[b'x']", {"type": "array"}, "[b'x']"), ("[f()]", {"type": "array"}, "[f()]"), ("['\\d']", {"type": "array"}, ["\\d"]), ("TRUE", {"type": "boolean"}, "TRUE"),
        ("[1e999]", {"type": "array"}, [sys.float_info.max]), ("['\\ud83d']", {"type": "array"}, ["\ufffd"]),
        # references, and what belongs together
        ("5", {"$ref": "#/$defs/C"}, "5"), ("5", {"$ref": "#/$defs/none"}, "5"), ("true", {"$ref": "#/properties/x/items"}, True), ("5", {"allOf": [{"type": ["integer", "string"]}, {"$ref": "#/$defs/N"}]}, 5),
        ('{"a": 1}', {"properties": {"a": {}}}, {"a": 1}), ("[1]", {"items": {}}, [1]), ("1" * 50, {"type": "integer"}, int("1" * 50)), ("1" * 9999, {"type": "integer"}, "1" * 9999),
        ("3", {"type": 7, "$ref": 3, "allOf": 3, "enum": 4, "pattern": 5}, "3"), ("12", {"minLength": 3}, 12), ("3", {"oneOf": [True, {"type": "string"}]}, 3), ("-" * 9, {"type": "array"}, "-" * 9), ("[" + "-" * 10**5 + "1]", {"type": "array"}, "[" + "-" * 10**5 + "1]"),
    ],
)  # fmt: skip
def test_an_argument_is_typed_by_its_schema(text: str, schema: Any, typed: Any) -> None:
    found = typed_argument(text, schema, ROOT)
    assert found == typed and type(found) is type(typed)


@settings(deadline=None)
@given(
    st.text() | st.sampled_from(["null", "[", '{"a"', "1e999", "\ud83d", "[1+1]"]),
    SCHEMAS
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(st.sampled_from(["type", "$ref", "anyOf", "allOf", "enum", "properties", "pattern"]), x)
        ),
    ),
)
def test_nothing_makes_it_raise(text: str, schema: Any) -> None:
    typed_argument(text, schema)
    typed_arguments({"a": text}, schema)


def test_arguments_of_a_choice_of_objects() -> None:
    schema = {
        "anyOf": [
            {"properties": {"k": {"const": "a"}, "v": {"type": "integer"}}},
            {"allOf": [{"properties": {"k": {"const": "b"}, "v": {"type": "string"}}}]},
        ]
    }
    assert typed_arguments({"k": "a", "v": "3"}, schema) == {"k": "a", "v": 3}
    assert typed_arguments({"k": "b", "v": "3"}, schema) == {"k": "b", "v": "3"}
    assert typed_arguments(
        {"x": "3", "y1": "4"},
        {"additionalProperties": {"type": "integer"}, "patternProperties": {"^y": {"type": "string"}}},
    ) == {"x": 3, "y1": "4"}
    for nothing in (None, True, [], {"properties": None}):
        assert typed_arguments({"x": "3"}, nothing) == {"x": "3"}


def test_numbers_and_characters_that_json_does_not_have() -> None:
    assert parse_json("[1e400, -1e400]") == [sys.float_info.max, -sys.float_info.max]
    assert parse_json('["\\ud83d", "\\ud83d\\ude00"]') == ["\ufffd", "\U0001f600"]
    for text in ("NaN", "[Infinity]", "", "{'a': 1}"):
        with pytest.raises(ValueError):
            parse_json(text)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ('{"a": 1, "b": "x', {"a": 1, "b": "x"}), ('{"a": [1, 2', {"a": [1, 2]}), ('{"a": {"b": tr', {"a": {"b": True}}), ('{"a": 1, "b"', {"a": 1}), ('{"a": 1, "b":', {"a": 1}),
        ('{"a": "x\\', {"a": "x"}), ('{"a": "x\\u12', {"a": "x"}), ('{"a": "x\\ud83d', {"a": "x"}), ("[1, 2.", [1, 2]), ("[", []), ('{"a": 1,', {"a": 1}), ('"abc', "abc"), ('[{"a":"x"},{', [{"a": "x"}, {}]),
        ("nul", None), ('{"key', {}), ('{"a": -', {}), ("[1, -", [1]), ("[1, 2]", [1, 2]), ('{"a": "\\\\', {"a": "\\"}), ('{"a": "\\"', {"a": '"'}),
    ],
)  # fmt: skip
def test_json_that_was_cut_off(text: str, whole: Any) -> None:
    assert complete_json(text) == whole


@pytest.mark.parametrize(
    "text", ["", " ", "-", "]", "[1}", '{"a" 1', '{"a": "b" "c', "{'a': 1", "[" * 100_000, "x", "[NaN"]
)
def test_what_is_no_beginning_of_json(text: str) -> None:
    with pytest.raises(ValueError):
        complete_json(text)


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    ),
    st.data(),
)
def test_every_beginning_of_a_list_is_completed(value: Any, data: st.DataObject) -> None:
    text = json.dumps([value], ensure_ascii=data.draw(st.booleans()))
    assert isinstance(complete_json(text[: data.draw(st.integers(1, len(text)))]), list)
