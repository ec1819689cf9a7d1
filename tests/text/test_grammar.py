"""Calls in both formats: what the grammar lets through is read back as arguments that fit the function's schema."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertstream.text.grammar import XML_SHARED, json_call, xml_call
from expertstream.text.schema import UnsupportedSchemaError, normalize

from .test_arguments import typed_arguments
from .test_schema import SCALARS, TOKENIZER, accepts, combined, objects, walk

BEGIN, END = '"<tool_call>"', '"</tool_call>"'
END_OF_VALUE = re.compile(r"\n</parameter>\n(?=<parameter=|</function>)")


def guide(schema: Any, name: str = "f", begin: str = BEGIN, end: str = END) -> llguidance.LLMatcher:
    parameters = None if schema is None else normalize(schema, exact=True).schema
    text = "start: call\n" + xml_call("call", name, parameters, begin, end) + XML_SHARED
    found = llguidance.LLMatcher(TOKENIZER, text, log_level=0)
    assert not found.is_error() or "nsatisfiable" in found.get_error(), found.get_error()
    return found


def read(text: str) -> tuple[str, dict[str, str]]:
    """A strict reader of the format."""
    head = re.match(r"<tool_call>\n<function=([^>\n]+)>\n", text)
    assert head, text
    at, found = head.end(), dict[str, str]()
    while not text.startswith("</function>", at):
        opening = re.compile(r"<parameter=([^<>\n]+)>\n").match(text, at)
        assert opening, text[at:]
        closing = END_OF_VALUE.search(text, opening.end())
        assert closing, text[at:]
        found[opening[1]] = text[opening.end() : closing.start()]
        at = closing.end()
    assert text[at:] == "</function>\n</tool_call>"
    return head[1], found


def written(**texts: str) -> str:
    body = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())
    return f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"


def walks(found: llguidance.LLMatcher, seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    texts = [walk(found.deep_copy(), lambda n: int(rng.integers(n)), 1500) for _ in range(count)]
    return [text for text in texts if text is not None]


@settings(deadline=None)
@given(
    objects(SCALARS | combined(SCALARS))
    | st.lists(objects(SCALARS), min_size=1, max_size=2).map(lambda x: {"anyOf": x}),
    st.integers(0, 2**32),
)
def test_what_the_grammar_allows_is_read_back_as_the_schema_wants_it(schema: Any, seed: int) -> None:
    whole = {"$defs": {"leaf": {"enum": ["x", "y"]}}, **schema}
    try:
        found = guide(whole)
    except (UnsupportedSchemaError, ValueError):
        return
    for text in walks(found, seed, 3) if not found.is_error() else ():
        name, texts = read(text)
        assert name == "f"
        jsonschema.validate(typed_arguments(texts, whole), whole)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "mode": {"anyOf": [{"$ref": "#/$defs/Mode"}, {"type": "null"}]},
        "code": {"type": "string", "pattern": "^[A-Z]+$", "maxLength": 3},
        "lines": {"type": "array", "items": {"type": "integer"}},
        "note": {"type": ["string", "null"]},
        "size": {"anyOf": [{"type": "integer"}, {"enum": ["small", "large"]}]},
    },
    "required": ["path", "mode"],
    "$defs": {"Mode": {"enum": ["read", "write it"]}},
}
XML = "<a>\n</parameter>\n</tool_call>\n</function>\n<parameter=b>\n</parameter> x"


@pytest.mark.parametrize(
    ("texts", "typed"),
    [
        ({"path": "/a", "mode": "read"}, {"path": "/a", "mode": "read"}),
        ({"path": "", "mode": "null", "note": "null"}, {"path": "", "mode": None, "note": None}),
        ({"path": XML, "mode": "write it", "code": "ABC"}, {"path": XML, "mode": "write it", "code": "ABC"}),
        ({"path": "\n\n", "mode": "read", "lines": "[1, 2]"}, {"path": "\n\n", "mode": "read", "lines": [1, 2]}),
        ({"path": "x\n</parameter>", "mode": "read", "note": XML}, {"path": "x\n</parameter>", "mode": "read", "note": XML}),
        ({"path": "é😀", "mode": "read", "size": "3"}, {"path": "é😀", "mode": "read", "size": 3}),
        ({"path": "3", "mode": "read", "size": "large"}, {"path": "3", "mode": "read", "size": "large"}),
        ({"path": "3"}, None), ({"mode": "read", "path": "3"}, None), ({"path": "3", "mode": "none"}, None), ({"path": "3", "mode": '"read"'}, None),
        ({"path": "x", "mode": "read", "code": "ABCD"}, None), ({"path": "x", "mode": "read", "code": "aB"}, None), ({"path": "x", "mode": "read", "size": "tiny"}, None),
        ({"path": "x", "mode": "read", "other": "1"}, None), ({"path": "x", "mode": "read", "lines": "[1,2]"}, None),
    ],
)  # fmt: skip
def test_a_call_in_xml(texts: dict[str, str], typed: dict[str, Any] | None) -> None:
    text = written(**texts)
    assert accepts(guide(SCHEMA), text) == (typed is not None)
    if typed is not None:
        assert read(text) == ("f", texts)
        assert typed_arguments(texts, SCHEMA) == typed


@pytest.mark.parametrize(
    ("schema", "allowed", "refused"),
    [
        (None, [{}, {"a": "1", "b": XML}], []),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"a": "1", "b-c d": "-2"}], [{"a": "x"}, {"a>": "1"}]),
        ({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}}, [{"a": "1", "b": "true"}, {"ab": "true"}], [{"a": "true"}, {"b": "1"}]),
        ({"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": 2, "minProperties": 1}, [{"a": "x"}, {"a": "x", "b": "y"}], [{}, {"a": "", "b": "", "c": ""}]),
        ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False}, [{"x1": "1"}], [{"y": "1"}, {"x": "a"}]),
        ({"type": "object", "required": ["a"], "properties": {"b": {"type": "null"}}}, [{"b": "null", "a": "any"}, {"a": "x"}], [{"b": "null"}, {"b": "x", "a": "y"}]),
        ({"$ref": "#/$defs/T", "$defs": {"T": {"type": "object", "properties": {"v": {"type": "integer"}, "t": {"$ref": "#/$defs/T"}}, "required": ["v"]}}}, [{"v": "1"}, {"v": "1", "t": '{"v": 2, "t": {"v": 3}}'}], [{"t": '{"v": 2}'}]),
        ({"anyOf": [{"type": "object", "properties": {"k": {"const": k}, k: {"type": "integer"}}, "required": ["k", k]} for k in "ab"]}, [{"k": "a", "a": "1"}, {"k": "b", "b": "2"}], [{"k": "a", "b": "1"}, {"k": "a"}]),
        ({"const": {"a": 1}}, [{"a": "1"}], [{}, {"a": "2"}]),
        ({"type": "object", "properties": {"a": {"enum": ["", "x\n</parameter>\n</function>", None]}}}, [{"a": ""}, {"a": "null"}, {}], [{"a": "x"}]),
        ({"type": "object", "properties": {"a": {"type": "string", "minLength": 2}}, "required": ["a"]}, [{"a": "é😀"}, {"a": XML}], [{"a": "x"}, {}]),
    ],
)  # fmt: skip
def test_objects_of_all_kinds(schema: Any, allowed: list[dict[str, str]], refused: list[dict[str, str]]) -> None:
    found = guide(schema)
    for texts in allowed:
        assert accepts(found, written(**texts)), texts
        if schema is not None:
            jsonschema.validate(typed_arguments(texts, schema), schema)
    for texts in refused:
        assert not accepts(found, written(**texts)), texts


def test_what_cannot_be_written_in_xml_is_said() -> None:
    for schema in ({"type": "array"}, {"type": "object", "properties": {"a>b": {}}, "required": ["a>b"]}):
        with pytest.raises(ValueError, match="no object"):
            xml_call("call", "f", normalize(schema, exact=True).schema, BEGIN, END)


def test_an_opener_that_was_read_before() -> None:
    assert accepts(guide(SCHEMA, begin=""), written(path="x", mode="read").removeprefix("<tool_call>"))


def test_several_calls_share_their_terminals() -> None:
    rules = [xml_call(f"call{i}", f"f{i}", normalize(SCHEMA, exact=True).schema, BEGIN, END) for i in range(3)]
    found = llguidance.LLMatcher(TOKENIZER, "start: call0 | call1 | call2\n" + "".join(rules) + XML_SHARED, log_level=0)
    assert accepts(found, written(path=XML, mode="read").replace("=f>", "=f2>"))
    assert not accepts(found, written(path=XML, mode="read"))


@pytest.mark.parametrize(
    "schema",
    [
        SCHEMA,
        None,
        {"$ref": "#/$defs/T", "$defs": {"T": {"type": "object", "properties": {"t": {"$ref": "#/$defs/T"}}}}},
    ],
)
def test_a_call_in_json(schema: Any) -> None:
    parameters = None if schema is None else normalize(schema, exact=True).schema
    found = llguidance.LLMatcher(
        TOKENIZER, "start: call\n" + json_call("call", "f", parameters, BEGIN, END), log_level=0
    )
    assert not found.is_error(), found.get_error()
    texts = walks(found, 1, 10)
    assert texts
    for text in texts:
        call = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
        assert call["name"] == "f"
        jsonschema.validate(call["arguments"], schema or {"type": "object"})


def test_a_key_has_one_spelling_in_an_object_with_further_keys() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    found = llguidance.LLMatcher(
        TOKENIZER,
        "start: call\n" + json_call("call", "f", normalize(schema, exact=True).schema, BEGIN, END),
        log_level=0,
    )
    text = '<tool_call>\n{"name": "f", "arguments": {"%s": "x"}}\n</tool_call>'
    assert accepts(found, text % "b") and not accepts(found, text % "a") and not accepts(found, text % "\\u0061")
