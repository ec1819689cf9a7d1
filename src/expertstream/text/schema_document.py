"""A JSON Schema as a client sent it: its keywords, where each part of it stands, what its references are to, and what of it is given up."""

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
Conj = tuple[Node, ...]  # schemas that hold together
Alt = dict[str, Any]  # one type, with all that holds for it; or one value

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
    """A schema that is none, that nothing fits, or that cannot be held exactly: JSON pointer, keyword and reason in one line."""


class Document:
    """A schema whose parts are known by their identity. exact: what cannot be held is an error, else it is noted in `dropped`.

    over: while alternatives are computed that allow no less than the schema; what cannot be held is then left out, which loses nothing."""

    def __init__(self, root: Any, exact: bool) -> None:
        self.root, self.over = root, False
        self.dropped: dict[str, None] = {}
        self._exact = exact
        self._kept: list[Node] = []  # so that no identity is given twice
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
        """A node made here, in the place of the one that it was made of."""
        self._kept.append(node)
        self._places[id(node)] = self._places[id(source)]
        return node

    def error(self, node: Node, keyword: str, why: str) -> UnsupportedSchemaError:
        """What is wrong with a keyword of a node."""
        return UnsupportedSchemaError(f"{self.place(node)}: {keyword}: {why}")

    def lose(self, node: Node, keyword: str, why: str) -> None:
        """Gives up a keyword of a node; why: what is not supported."""
        if self.over:
            return
        if self._exact:
            raise self.error(node, keyword, f"{why} is not supported")
        self.dropped[f"{self.place(node)}: {keyword}"] = None

    def node(self, value: Any, parent: Node, keyword: str) -> Node:
        """A part of the parent, of which it is now known that it is a schema."""
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
        """What the reference of a node is to; None if it was given up."""
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
    """The first of the nodes that has one of the keywords, to say where something stands."""
    return next((node for node in conj if node.keys() & set(keys)), conj[0] if conj else ANY)


def excluded(node: Node) -> list[Any] | None:
    """The values that a node rules out with `not`, if that is all that its `not` says."""
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
