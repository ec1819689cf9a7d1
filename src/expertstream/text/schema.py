"""Rewrites a client's JSON Schema in the subset that llguidance can enforce, so that everything its grammar allows fits the schema.

A schema is split into alternatives: each of one type, with all constraints from `allOf`, references and siblings. The alternatives are then
written as a schema again. They may allow less than the original, never more, unless something was dropped: objects with listed properties
are closed, whole numbers have bounds, and lists of unique items keep the order of the values. Where the opposite is needed, for a branch
of a `oneOf` that must not hold, alternatives are computed that allow no less than the schema (`over`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .schema_document import ANY, Document, UnsupportedSchemaError
from .schema_write import Writer

__all__ = ["MAX_SCHEMA_BYTES", "MAX_SCHEMA_DEPTH", "NormalizedSchema", "UnsupportedSchemaError", "normalize"]

MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 32


@dataclass(frozen=True)
class NormalizedSchema:
    """schema: self-contained, references only to "#/$defs/NAME"; dropped: what it does not enforce, as "POINTER: KEYWORD"."""

    schema: dict[str, Any]
    dropped: tuple[str, ...]


def normalize(schema: Any, *, exact: bool) -> NormalizedSchema:
    """A schema whose grammar allows only instances of the given one. If `exact`, a constraint that cannot be enforced raises
    UnsupportedSchemaError; otherwise the smallest part around it is dropped. Schemas that are too large, too deep, invalid or
    unsatisfiable always raise it."""
    try:
        text = json.dumps(schema, allow_nan=False, ensure_ascii=False)
        size = len(text.encode())
    except (ValueError, TypeError, RecursionError) as error:
        raise UnsupportedSchemaError(f"#: not valid JSON: {str(error).splitlines()[0]}") from None
    if size > MAX_SCHEMA_BYTES:
        raise UnsupportedSchemaError(f"#: a schema must be at most {MAX_SCHEMA_BYTES >> 10} KiB")
    level: list[Any] = [schema] if isinstance(schema, dict | list) else []
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [v for x in level for v in (x.values() if isinstance(x, dict) else x) if isinstance(v, dict | list)]
    if level:
        raise UnsupportedSchemaError(f"#: a schema must be at most {MAX_SCHEMA_DEPTH} levels deep")
    try:
        return _normalized(json.loads(text), exact)
    except RecursionError:
        raise UnsupportedSchemaError("#: references are nested too deeply") from None


def _normalized(root: Any, exact: bool) -> NormalizedSchema:
    document = Document(root, exact)
    writer = Writer(document)
    found = writer.write((document.node(root, ANY, "root"),))
    if found is None:
        raise UnsupportedSchemaError("#: no value fits the schema: it contradicts itself")
    productive = set[str]()
    while new := {
        name for name in writer.definitions.keys() - productive if _ends(writer.definitions[name], productive)
    }:
        productive |= new
    if productive != writer.definitions.keys():
        raise UnsupportedSchemaError("#: $ref: every value that fits the schema would be infinite")
    return NormalizedSchema(
        {**found, **({"$defs": writer.definitions} if writer.definitions else {})}, tuple(document.dropped)
    )


def _ends(schema: Any, productive: set[str]) -> bool:
    """Whether a schema has a finite value, given that the productive definitions have one."""
    if not isinstance(schema, dict):
        return schema is not False
    if "$ref" in schema:
        return schema["$ref"].removeprefix("#/$defs/") in productive
    if "anyOf" in schema:
        return any(_ends(part, productive) for part in schema["anyOf"])
    needed = [schema["properties"][name] for name in schema.get("required", ())]
    first = schema.get("prefixItems", [])
    needed += first[: schema.get("minItems", 0)]
    needed += [schema.get("items", True)] if schema.get("minItems", 0) > len(first) else []
    needed += (
        [*schema.get("patternProperties", {}).values(), schema.get("additionalProperties", True)][:1]
        if "minProperties" in schema
        else []
    )
    return all(_ends(part, productive) for part in needed)
