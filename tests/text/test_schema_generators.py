"""Schemas as they are written by the tools that clients use: pydantic, MCP servers, zod, TypeBox, OpenAPI."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, TypeAdapter

from expertstream.text.schema import UnsupportedSchemaError, normalize

from .test_schema import accepts, matcher


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


class Everything(BaseModel):
    color: Color | None = None
    tags: set[Literal["a", "b", "c"]]
    mode: Literal["fast", 3]
    counts: dict[str, int]
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    code: Annotated[str, Field(pattern="^[A-Z]{3}$")]
    age: Annotated[int, Field(ge=0, lt=150)]
    at: datetime
    pair: tuple[int, str]
    tree: Tree | None = None


MCP = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "minLength": 1, "description": "Where"},
        "edits": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"oldText": {"type": "string"}, "newText": {"type": "string"}},
                "required": ["oldText", "newText"],
                "additionalProperties": False,
            },
        },
        "head": {"type": "number", "exclusiveMinimum": 0},
        "same": {"$ref": "#/properties/edits/items"},
    },
    "required": ["path"],
    "additionalProperties": False,
    "$schema": "http://json-schema.org/draft-07/schema#",
}
ZOD = {
    "type": "object",
    "properties": {
        "url": {"type": "string", "format": "uri"},
        "shape": {"oneOf": [{"type": "object", "properties": {"t": {"const": t}}, "required": ["t"]} for t in "xyz"]},
        "maybe": {"anyOf": [{"anyOf": [{"not": {}}, {"type": "string"}]}, {"type": "null"}]},
        "two": {"type": "array", "minItems": 2, "maxItems": 2, "items": [{"type": "string"}, {"type": "integer"}]},
    },
    "required": ["shape"],
}
TYPEBOX = {
    "$id": "T0",
    "type": "object",
    "properties": {"id": {"type": "string"}, "nodes": {"type": "array", "items": {"$ref": "T0"}}},
    "required": ["id", "nodes"],
}
OPENAPI = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "nullable": True},
        "b": {"allOf": [{"$ref": "#/definitions/B"}], "default": "x"},
    },
    "definitions": {"B": {"enum": ["x", "y"], "type": "string"}},
}


@pytest.mark.parametrize(
    ("schema", "dropped", "valid", "invalid"),
    [
        (
            Everything.model_json_schema(),
            (),
            '{"color": null, "tags": ["a", "c"], "mode": 3, "counts": {"x": 1}, "pet": {"kind": "dog", "name": "Rex"}, "code": "ABC", "age": 3, "at": "2026-01-31T10:00:00Z", "pair": [1, "x"], "tree": {"value": 1, "children": [{"value": 2}]}}',
            '{"tags": ["a", "a"], "mode": 3, "counts": {}, "pet": {"kind": "dog", "name": "Rex"}, "code": "ABC", "age": 3, "at": "2026-01-31T10:00:00Z", "pair": [1, "x"]}',
        ),
        (TypeAdapter(set[str]).json_schema(), ("#: uniqueItems",), '["a", "b"]', '["a", 1]'),
        (TypeAdapter(Decimal).json_schema(), None, "1.5", "[]"),
        (TypeAdapter(dict[Literal["a", "b"], int]).json_schema(), (), '{"b": 1}', '{"c": 1}'),
        (Tree.model_json_schema(), (), '{"value": 1, "children": [{"value": 2, "children": []}]}', '{"value": "x"}'),
        (MCP, (), '{"path": "x", "edits": [{"oldText": "a", "newText": "b"}], "head": 2.5, "same": {"oldText": "", "newText": ""}}', '{"path": ""}'),
        (ZOD, (), '{"url": "x", "shape": {"t": "y"}, "maybe": null, "two": ["a", 1]}', '{"shape": {"t": "w"}}'),
        (TYPEBOX, (), '{"id": "a", "nodes": [{"id": "b", "nodes": []}]}', '{"id": "a"}'),
        (OPENAPI, (), '{"a": null, "b": "y"}', '{"b": "z"}'),
        ({"type": "array", "items": {"type": "integer"}, "contains": {"const": 3}, "maxContains": 1}, ("#: maxContains",), "[3, 1]", '["x"]'),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, ("#/properties/a: pattern",), '{"a": "y"}', '{"a": 1}'),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, ("#: oneOf",), "1", "null"),
        ({"type": "integer"}, (), "9007199254740992", "9007199254740993"),
        ({"enum": ["a", 1, None], "type": ["string", "null"]}, (), "null", "1"),
        ({"required": ["x"], "type": "object", "properties": {"y": {"type": "integer"}}}, (), '{"y": 1, "x": [2]}', '{"y": 1}'),
    ],
)  # fmt: skip
def test_what_generators_write(schema: Any, dropped: tuple[str, ...] | None, valid: str, invalid: str) -> None:
    found = normalize(schema, exact=False)
    assert dropped is None or found.dropped == dropped
    if found.dropped:
        with pytest.raises(UnsupportedSchemaError):
            normalize(schema, exact=True)
    else:
        assert normalize(schema, exact=True) == found
    guide = matcher(found.schema)
    assert not guide.is_error(), guide.get_error()
    assert accepts(guide, valid) and not accepts(guide, invalid)
