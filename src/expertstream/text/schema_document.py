"""A JSON Schema as the client sent it: its keywords, the location of each part, the targets of its references, and what is dropped."""

from __future__ import annotations

import json
from typing import Any

from .instances import resolve

__all__ = [
    "ANY",
    "ASSERTIONS",
    "COUNTS",
    "FORMATS",
    "LIMITS",
    "NONE",
    "NUMBER",
    "TYPES",
    "UNEVALUATED",
    "Alt",
    "Conj",
    "Document",
    "Node",
    "UnsupportedSchemaError",
    "excluded",
    "origin",
]

Node = dict[str, Any]  # a schema object, by identity
Conj = tuple[Node, ...]  # schemas that must all hold
Alt = dict[str, Any]  # one type with all its constraints, or one value

ANY: Node = {}
NONE: Node = {"not": {}}
TYPES = ("object", "array", "string", "number", "boolean", "null")
_IN_PLACE = (
    "$ref",
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "nullable",
)
_OBJECT = (
    "properties",
    "required",
    "additionalProperties",
    "patternProperties",
    "propertyNames",
    "minProperties",
    "maxProperties",
)
_ARRAY = (
    "items",
    "prefixItems",
    "additionalItems",
    "contains",
    "minContains",
    "maxContains",
    "minItems",
    "maxItems",
    "uniqueItems",
)
NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_STRING = ("minLength", "maxLength", "pattern")
UNEVALUATED = ("unevaluatedProperties", "unevaluatedItems")
ASSERTIONS = {
    "type",
    "const",
    "enum",
    *_IN_PLACE,
    *_OBJECT,
    *_ARRAY,
    *NUMBER,
    *_STRING,
    *UNEVALUATED,
    "$dynamicRef",
    "$recursiveRef",
}
_SHAPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("properties", "patternProperties", "dependentRequired", "dependentSchemas", "dependencies", "$defs"), dict),
    **dict.fromkeys(("required", "enum", "allOf", "anyOf", "oneOf", "prefixItems"), list),
    **dict.fromkeys(NUMBER, (int, float)), "pattern": str, "$ref": str, "uniqueItems": bool, "type": (str, list),
}  # fmt: skip
_SHAPE_NAMES: dict[type | tuple[type, ...], str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    (int, float): "a number",
    (str, list): "a string or a list of strings",
}
COUNTS = {
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "minContains",
    "maxContains",
}
LIMITS = {
    "minimum": ("number", "exclusiveMaximum", 0), "exclusiveMinimum": ("number", "maximum", 0),
    "maximum": ("number", "exclusiveMinimum", 0), "exclusiveMaximum": ("number", "minimum", 0),
    **{f"min{what}": (kind, f"max{what}", -1) for what, kind in (("Length", "string"), ("Items", "array"), ("Properties", "object"))},
    **{f"max{what}": (kind, f"min{what}", 1) for what, kind in (("Length", "string"), ("Items", "array"), ("Properties", "object"))},
}  # fmt: skip
_HOUR = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?"
_DAY = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])|[0-9]{4}-(0[13-9]|1[0-2])-(29|30)|[0-9]{4}-(0[13578]|1[02])-31"
FORMATS = {
    "date": f"^({_DAY})$",
    "time": f"^{_HOUR}(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$",
    "date-time": f"^({_DAY})T{_HOUR}(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$",
    "uuid": "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
}


class UnsupportedSchemaError(Exception):
    """An invalid or unsatisfiable schema, or one that cannot be enforced exactly: JSON pointer, keyword and reason on one line."""


class Document:
    """A schema whose parts are known by their identity. exact: what cannot be enforced is an error; otherwise it is listed in `dropped`.

    over: set while computing alternatives that allow no less than the schema; they may simply leave out what cannot be enforced."""

    def __init__(self, root: Any, exact: bool) -> None:
        self.root, self.over = root, False
        self.dropped: dict[str, None] = {}
        self._exact = exact
        self._kept: list[Node] = []  # keeps nodes alive, so that no id is reused
        self._places: dict[int, str] = {id(ANY): "#", id(NONE): "#"}
        self._targets: dict[str, Any] = {}
        self._find_places(root, "#")

    def _find_places(self, value: Any, place: str) -> None:
        if isinstance(value, dict):
            self._places[id(value)] = place
        for key, part in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        ):
            self._find_places(part, f"{place}/{str(key).replace('~', '~0').replace('/', '~1')}")

    def derived(self, node: Node, source: Node) -> Node:
        """Registers a new node at the location of the node that it is derived from."""
        self._kept.append(node)
        self._places[id(node)] = self._places[id(source)]
        return node

    def error(self, node: Node, keyword: str, why: str) -> UnsupportedSchemaError:
        """An error in a keyword of a node."""
        return UnsupportedSchemaError(f"{self.place(node)}: {keyword}: {why}")

    def lose(self, node: Node, keyword: str, why: str) -> None:
        """Drops a keyword of a node; why: what is not supported."""
        if self.over:
            return
        if self._exact:
            raise self.error(node, keyword, f"{why} is not supported")
        self.dropped[f"{self.place(node)}: {keyword}"] = None

    def node(self, value: Any, parent: Node, keyword: str) -> Node:
        """A part of the parent, checked to be a schema."""
        if isinstance(value, bool):
            return ANY if value else NONE
        if not isinstance(value, dict):
            raise self.error(parent, keyword, "a schema must be an object or a boolean")
        for key in filter(ASSERTIONS.__contains__, value):
            self._check(value, key)
        return value

    def _check(self, node: Node, key: str) -> None:
        value = node[key]
        if key in _SHAPES and (not isinstance(value, _SHAPES[key]) or (key in NUMBER and isinstance(value, bool))):
            raise self.error(node, key, f"must be {_SHAPE_NAMES[_SHAPES[key]]}")
        if key in COUNTS and (
            isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value)
        ):
            raise self.error(node, key, "must be a whole number of at least 0")
        if key == "type" and not (
            value and all(name in (*TYPES, "integer") for name in ([value] if isinstance(value, str) else value))
        ):
            raise self.error(node, key, f"{json.dumps(value)} is not a type or a list of types")
        if key == "multipleOf" and value <= 0:
            raise self.error(node, key, "must be greater than 0")
        if key == "required" and not all(isinstance(name, str) for name in value):
            raise self.error(node, key, "must be a list of strings")

    def without(self, node: Node, *keys: str) -> Node:
        """A node without some of its keywords."""
        return self.derived({key: value for key, value in node.items() if key not in keys}, node)

    def target(self, node: Node) -> Node | None:
        """The target of a node's reference; None if the reference was dropped."""
        reference = node["$ref"]
        if reference not in self._targets:
            try:
                self._targets[reference] = self.node(resolve(reference, self.root), node, "$ref")
            except LookupError as error:
                raise self.error(node, "$ref", str(error.args[0])) from None
            except NotImplementedError as error:
                self.lose(node, "$ref", str(error))
                return None
        return self._targets[reference]  # type: ignore[no-any-return]

    def place(self, node: Node) -> str:
        """A JSON pointer to a node."""
        return self._places.get(id(node), "#")

    def knows(self, node: Node) -> bool:
        """Whether a node is part of the schema, or derived from a part of it."""
        return id(node) in self._places


def origin(conj: Conj, *keys: str) -> Node:
    """The first of the nodes that has one of the keywords, to locate an error."""
    return next((node for node in conj if node.keys() & set(keys)), conj[0] if conj else ANY)


def excluded(node: Node) -> list[Any] | None:
    """The values that a node excludes with `not`, if its `not` does nothing else."""
    inner = node.get("not")
    if (
        not isinstance(inner, dict)
        or not inner.keys() & {"const", "enum"}
        or inner.keys() & ASSERTIONS - {"const", "enum"}
    ):
        return None
    if "const" in inner:
        return [inner["const"]] if "enum" not in inner else None
    return inner["enum"] if isinstance(inner["enum"], list) else None
