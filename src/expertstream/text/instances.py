"""Validates values against a JSON Schema, and resolves its references."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from .pattern import compiled

__all__ = ["MAX_REFERENCES", "UNDECIDED", "canonical", "kind_of", "matches", "resolve", "with_short_numbers"]

MAX_REFERENCES = 64  # nested, for one value

_NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_UNKNOWN = ("$dynamicRef", "$recursiveRef", "unevaluatedProperties", "unevaluatedItems")


def kind_of(value: Any) -> str:
    """The JSON Schema type of a Python value."""
    return _NAMES.get(type(value), "null")


def canonical(value: Any) -> str:
    """The same text for values that JSON Schema considers equal: 1 and 1.0, objects in any order."""
    return json.dumps(with_short_numbers(value), sort_keys=True)


def with_short_numbers(value: Any) -> Any:
    """The same value, with whole numbers as integers."""
    if isinstance(value, list):
        return [with_short_numbers(part) for part in value]
    if isinstance(value, dict):
        return {key: with_short_numbers(part) for key, part in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Raised by resolve() and matches() if a schema is broken, or a value cannot be decided.
UNDECIDED = (
    ValueError, TypeError, AttributeError, LookupError, RecursionError, MemoryError, OverflowError, NotImplementedError,
)  # fmt: skip


def resolve(reference: str, root: Any) -> Any:
    """The target of a reference within a document: a JSON pointer, an anchor, or the $id of a subschema. Raises LookupError if there is no
    such target, NotImplementedError for references to other documents, and for pointers in documents whose subschemas have an $id."""
    parts = list(_subschemas(root, top=True))
    inner = [part for part in parts if part is not root and isinstance(part.get("$id"), str)]
    if not reference.startswith("#"):
        found = [part for part in parts if part.get("$id") == reference]
        if len(found) != 1:
            raise NotImplementedError(f"a reference to another document, {reference}")
        return found[0]
    if inner:
        raise NotImplementedError("a reference in a document whose subschemas have an $id")
    target, pointer = root, unquote(reference[1:])
    if pointer and not pointer.startswith("/"):
        found = [part for part in parts if pointer in (part.get("$anchor"), part.get("$dynamicAnchor"))]
        if len(found) != 1:
            raise LookupError(f"the reference {reference} does not point to anything")
        return found[0]
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, dict) and key in target:
            target = target[key]
        elif isinstance(target, list) and key.isdecimal() and int(key) < len(target):
            target = target[int(key)]
        else:
            raise LookupError(f"the reference {reference} does not point to anything")
    if not isinstance(target, dict | bool):
        raise LookupError(f"the reference {reference} does not point to a schema")
    return target


def _subschemas(value: Any, top: bool = False) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for key, part in value.items():
            if key not in ("enum", "const", "default", "examples"):
                yield from _subschemas(part)
    elif isinstance(value, list):
        for part in value:
            yield from _subschemas(part)


def matches(value: Any, schema: Any, root: Any, depth: int = 0) -> bool:
    """Whether a value is an instance of a schema (draft 2020-12; draft-07's `definitions` and lists of items; OpenAPI's nullable).

    Raises LookupError and NotImplementedError as resolve() does, NotImplementedError also for unsupported keywords, and ValueError,
    TypeError or AttributeError for invalid schemas."""
    if isinstance(schema, bool):
        return schema
    if depth > MAX_REFERENCES:
        raise NotImplementedError("a circular reference")
    if any(schema.get(key, True) is not True for key in _UNKNOWN):
        raise NotImplementedError("a schema with unevaluated parts or dynamic references")
    if value is None and schema.get("nullable") is True:
        return True
    values = [schema["const"]] if "const" in schema else []
    if values and canonical(value) != canonical(values[0]):
        return False
    if "enum" in schema and canonical(value) not in map(canonical, schema["enum"]):
        return False
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    own = {kind_of(value)} | ({"number"} if kind_of(value) == "integer" else set())
    if isinstance(value, float) and value.is_integer():
        own.add("integer")
    if kinds and not own & set(kinds):
        return False

    def fits(part: Any, inner: Any = value, step: int = 1) -> bool:
        return matches(inner, part, root, depth + step)

    if "$ref" in schema and not fits(resolve(schema["$ref"], root)):
        return False
    if not all(map(fits, schema.get("allOf", ()))):
        return False
    if "anyOf" in schema and not any(map(fits, schema["anyOf"])):
        return False
    if "oneOf" in schema and sum(map(fits, schema["oneOf"])) != 1:
        return False
    if "not" in schema and fits(schema["not"]):
        return False
    if "if" in schema and not fits(schema.get("then" if fits(schema["if"]) else "else", True)):
        return False
    if isinstance(value, dict):
        return _object_matches(value, schema, fits)
    if isinstance(value, list):
        return _list_matches(value, schema, fits)
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            return False
        return "pattern" not in schema or compiled(schema["pattern"]).matches(value)
    return isinstance(value, bool) or value is None or _number_matches(value, schema)


def _number_matches(value: float, schema: dict[str, Any]) -> bool:
    """Numbers are taken exactly as their decimal digits."""
    if "multipleOf" in schema and Fraction(str(value)) % Fraction(str(schema["multipleOf"])):
        return False
    inside = schema.get("minimum", value) <= value <= schema.get("maximum", value)
    return inside and not (
        ("exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"])
        or ("exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"])
    )


def _object_matches(value: dict[str, Any], schema: dict[str, Any], fits: Callable[..., bool]) -> bool:
    if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value)):
        return False
    if any(key not in value for key in schema.get("required", ())):
        return False
    listed, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for key, part in value.items():
        parts = [listed[key]] if key in listed else []
        parts += [patterns[pattern] for pattern in patterns if compiled(pattern).matches(key)]
        if not all(fits(s, part, 0) for s in parts or [schema.get("additionalProperties", True)]):
            return False
        if not fits(schema.get("propertyNames", True), key, 0):
            return False
    dependencies = {**schema.get("dependencies", {}), **schema.get("dependentRequired", {})}
    needs = [*dependencies.items(), *schema.get("dependentSchemas", {}).items()]
    return all(
        all(k in value for k in need) if isinstance(need, list) else fits(need) for key, need in needs if key in value
    )


def _list_matches(value: list[Any], schema: dict[str, Any], fits: Callable[..., bool]) -> bool:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        return False
    first, rest = schema.get("prefixItems", []), schema.get("items", True)
    if isinstance(rest, list):  # before 2020-12
        first, rest = rest, schema.get("additionalItems", True)
    if not all(fits(first[i] if i < len(first) else rest, part, 0) for i, part in enumerate(value)):
        return False
    if schema.get("uniqueItems") and len(set(map(canonical, value))) < len(value):
        return False
    if "contains" not in schema:
        return True
    count = sum(fits(schema["contains"], part, 0) for part in value)
    return bool(schema.get("minContains", 1) <= count <= schema.get("maxContains", count))
