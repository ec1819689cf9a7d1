"""Splits a JSON Schema into alternatives: each one type with all constraints from `allOf`, references and siblings, or one value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .instances import canonical, matches
from .pattern import Pattern, other_than
from .schema_document import (
    ANY,
    ASSERTIONS,
    FORMATS,
    LIMITS,
    NUMBER,
    TYPES,
    UNEVALUATED,
    Alt,
    Conj,
    Document,
    Node,
    UnsupportedSchemaError,
    excluded,
)
from .schema_meet import Meet, is_any, is_found, type_of

__all__ = ["MAX_ALTERNATIVES", "Parts"]

MAX_ALTERNATIVES = 512


@dataclass
class _Group:
    """An open choice: any of the branches, or exactly one."""

    node: Node
    keyword: str
    branches: list[Conj]
    path: tuple[int, ...]


@dataclass
class _Together:
    """Schemas that must all hold, with their open choices."""

    nodes: list[Node] = field(default_factory=list)
    groups: list[_Group] = field(default_factory=list)
    closed: list[Node] = field(default_factory=list)  # with unevaluatedProperties or unevaluatedItems


class Parts:
    """The alternatives of a document's nodes; meet: their intersections and disjointness."""

    def __init__(self, document: Document) -> None:
        self.meet = Meet(document, lambda conj: self.alternatives(conj, over=True))
        self._document = document
        self._known: dict[tuple[Any, ...], list[Alt]] = {}

    def alternatives(self, conj: Conj, over: bool = False) -> list[Alt]:
        """The alternatives that fit all of the nodes; over: they may allow more."""
        before, self._document.over = self._document.over, over or self._document.over
        key = (self._document.over, *map(id, conj))
        if key not in self._known:
            together = _Together()
            for node in conj:
                self._gather(node, (), together)
            self._known[key] = self._expand(together)
        self._document.over = before
        return self._known[key]

    def _gather(self, node: Node, path: tuple[int, ...], into: _Together) -> None:
        """Adds a node and those that it implies."""
        if id(node) in path:
            raise self._document.error(node, "$ref", "refers to itself")
        if any(node is known for known in into.nodes):
            return
        path = (*path, id(node))
        if node.get("nullable") is True:
            rest = self._document.without(node, "nullable")
            into.groups.append(
                _Group(node, "nullable", [(self._document.derived({"type": "null"}, node),), (rest,)], path)
            )
            return
        for key in ("$dynamicRef", "$recursiveRef"):
            if key in node:
                self._document.lose(node, key, "a dynamic reference")
        if any(node.get(key, True) not in (True, {}) for key in UNEVALUATED):
            into.closed.append(node)
            return
        into.nodes.append(node)
        if "$ref" in node and (target := self._document.target(node)) is not None:
            self._gather(target, path, into)
        for part in node.get("allOf", ()):
            self._gather(self._document.node(part, node, "allOf"), path, into)
        for keyword in ("anyOf", "oneOf"):
            if keyword in node:
                branches: list[Conj] = [(self._document.node(part, node, keyword),) for part in node[keyword]]
                into.groups.append(_Group(node, keyword, branches, path))
        if "if" in node and ("then" in node or "else" in node):
            test = self._document.node(node["if"], node, "if")
            then, other = (self._document.node(node.get(key, True), node, key) for key in ("then", "else"))
            ways: list[Conj] = [(then,), (other,)]
            if not self._document.over:
                ways = [(test, then), (self._document.derived({"not": test}, node), other)]
            into.groups.append(_Group(node, "if", ways, path))
        needs = {
            **node.get("dependencies", {}),
            **node.get("dependentRequired", {}),
            **node.get("dependentSchemas", {}),
        }
        for name, need in needs.items():
            absent = self._document.derived({"properties": {name: False}}, node)
            present = self._document.derived({"required": [name, *(need if isinstance(need, list) else [])]}, node)
            then = ANY if isinstance(need, list) else self._document.node(need, node, "dependentSchemas")
            into.groups.append(_Group(node, "dependentRequired", [(absent,), (present, then)], path))
        if node.get("not") == {} or node.get("not") is True:
            into.groups.append(_Group(node, "not", [], path))
        elif "not" in node and not self._document.over and excluded(node) is None:
            inner = self._document.node(node["not"], node, "not")
            ways_out = self._opposite(inner, 0)
            if ways_out is None:
                self._document.lose(node, "not", "excluding a schema like this")
            else:
                into.groups.append(_Group(node, "not", ways_out, path))

    def _opposite(self, node: Node, depth: int) -> list[Conj] | None:
        """Branches of which one holds wherever a node does not; None if there is no way to write them."""
        ways: list[Node] = []
        for key, value in node.items():
            if key not in ASSERTIONS:
                continue
            if key == "type":
                names = {value} if isinstance(value, str) else set(value)
                left = [name for name in TYPES if name not in names and not (name == "number" and "integer" in names)]
                ways += [{"type": left}] if left else []
            elif key in ("const", "enum"):
                ways.append({"not": {"enum": [value] if key == "const" else value}})
            elif key == "required":
                ways += [{"type": "object", "properties": {name: False}} for name in value]
            elif key == "properties":
                ways += [
                    {"type": "object", "properties": {name: {"not": part}}, "required": [name]}
                    for name, part in value.items()
                ]
            elif key in LIMITS:
                kind, opposite, step = LIMITS[key]
                ways += [{"type": kind, opposite: value + step}] if value + step >= 0 or kind == "number" else []
            elif key == "not":
                ways += [self._document.node(value, node, "not")] if value is not False else []
            elif key == "anyOf":
                ways.append({"allOf": [{"not": part} for part in value]})
            elif key == "allOf":
                ways += [{"not": part} for part in value]
            elif key == "$ref" and (target := self._document.target(node)) is not None and depth < 8:
                more = self._opposite(target, depth + 1)
                if more is None:
                    return None
                ways += [way for conj in more for way in conj]
            else:
                return None
        return [
            (self._document.node(way if self._document.knows(way) else self._document.derived(way, node), node, "not"),)
            for way in ways
        ]

    def _expand(self, together: _Together) -> list[Alt]:
        listed = next((node for node in together.nodes if "const" in node or "enum" in node), None)
        if listed is not None:
            values = [listed["const"]] if "const" in listed else listed["enum"]
            nodes = [*together.nodes, *together.closed, *(group.node for group in together.groups)]
            kept = {canonical(v): v for v in values if all(self._holds(v, node) for node in nodes)}
            return [{"type": type_of(v), "value": v} for v in kept.values()]
        if not together.groups:
            return self._base(together)
        group = min(together.groups, key=lambda g: g.keyword == "oneOf")
        parts = []
        for branch in group.branches:
            part = _Together(
                list(together.nodes), [g for g in together.groups if g is not group], list(together.closed)
            )
            for node in branch:
                self._gather(node, group.path, part)
            parts.append(part)
        if group.keyword == "oneOf" and not self._document.over:
            return self._one_of(group, parts)
        return self._unique(alt for part in parts for alt in self._expand(part))

    def _holds(self, value: Any, node: Node) -> bool:
        try:
            return matches(value, node, self._document.root)
        except NotImplementedError:
            self._document.lose(node, "enum", "checking the listed values against a keyword next to them")
            return True
        except LookupError as error:
            raise self._document.error(node, "$ref", str(error.args[0])) from None
        except (ValueError, TypeError, AttributeError):
            raise self._document.error(node, "enum", "a keyword next to it has a value of the wrong type") from None

    def _one_of(self, group: _Group, parts: list[_Together]) -> list[Alt]:
        found: list[Alt] = []
        whole = [self._expand(part) for part in parts]
        # Each branch with its siblings only: more values, never fewer.
        beside = self._document.without(group.node, group.keyword)
        others = [self.alternatives((beside, *branch), over=True) for branch in group.branches]
        for i, alternatives in enumerate(whole):
            for alt in alternatives:
                narrow: Alt | None = alt
                for other in (b for j, part in enumerate(others) if j != i for b in part):
                    narrow = None if narrow is None else self.meet.apart(narrow, other)
                found += [] if narrow is None else [narrow]
        if not found and any(whole):
            self._document.lose(group.node, "oneOf", "telling overlapping branches apart")
            found = [alt for part in whole for alt in part]
        return self._unique(found)

    def _unique(self, alternatives: Iterable[Alt]) -> list[Alt]:
        found: list[Alt] = []
        for alt in alternatives:
            if alt not in found:
                found.append(alt)
            if len(found) > MAX_ALTERNATIVES:
                raise UnsupportedSchemaError(f"#: more than {MAX_ALTERNATIVES} alternatives in one place")
        return found

    def _base(self, together: _Together) -> list[Alt]:
        found: list[Alt] = [{"type": kind} for kind in TYPES]
        parts = [self._typed(node) for node in together.nodes] + [self._closed(node) for node in together.closed]
        for part in parts:
            found = self._unique(both for a in found for b in part if (both := self.meet.both(a, b)) is not None)
        return found

    def _closed(self, node: Node) -> list[Alt]:
        """Objects have only the properties, and lists only the items, that the node and its subschemas mention."""
        inner = self._document.without(node, *UNEVALUATED)
        if not self._document.over and not self._is_plain(inner, ()):
            self._document.lose(
                node, next(key for key in UNEVALUATED if key in node), "its use next to `not`, `if` or a dependency"
            )
            return self.alternatives((inner,))
        if any("value" in alt for alt in self.alternatives((inner,))):
            self._document.lose(
                node, next(key for key in UNEVALUATED if key in node), "its use next to `const` or `enum`"
            )
        found = []
        for alt in self.alternatives((inner,)):
            for kind, key, keyword in (("object", "additional", UNEVALUATED[0]), ("array", "items", UNEVALUATED[1])):
                if (
                    alt["type"] == kind
                    and "value" not in alt
                    and keyword in node
                    and not self._document.over
                    and is_any(alt.get(key, ()))
                ):
                    alt = {**alt, key: (self._document.node(node[keyword], node, keyword),)}  # noqa: PLW2901
            found.append(alt)
        return found

    def _is_plain(self, node: Any, path: tuple[int, ...]) -> bool:
        if not isinstance(node, dict) or id(node) in path:
            return True
        if node.keys() & {"not", "if", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"}:
            return False
        parts = [part for key in ("allOf", "anyOf", "oneOf") for part in node.get(key, ())]
        parts += [self._document.target(node)] if "$ref" in node else []
        return all(self._is_plain(part, (*path, id(node))) for part in parts)

    def _typed(self, node: Node) -> list[Alt]:
        """A node's own constraints, for each of its types."""
        kinds = node.get("type", list(TYPES))
        kinds = [kinds] if isinstance(kinds, str) else kinds
        kinds = [kind for kind in dict.fromkeys(kinds) if not (kind == "integer" and "number" in kinds)]
        out = [] if self._document.over else excluded(node) or []
        found = []
        for kind in kinds:
            alt: Alt = {"type": "number", "integer": True} if kind == "integer" else {"type": kind}
            banned = [value for value in out if type_of(value) == alt["type"]]
            if kind == "object":
                self._object(node, alt)
            elif kind == "array":
                self._array(node, alt)
            elif kind == "string":
                alt |= {key: int(node[key]) for key in ("minLength", "maxLength") if key in node}
                alt |= (
                    {"format": node["format"]}
                    if isinstance(node.get("format"), str) and node["format"] in FORMATS
                    else {}
                )
                patterns = [self._pattern(node, node["pattern"])] if "pattern" in node else []
                patterns += [other_than(banned)] if banned else []
                alt |= {"patterns": patterns} if any(patterns) else {}
            elif alt["type"] == "number":
                alt |= {key: node[key] for key in NUMBER if key in node}
            if banned and kind == "boolean":
                found += [{"type": kind, "value": value} for value in (True, False) if value not in banned]
                continue
            if banned and kind not in ("null", "string"):
                self._document.lose(node, "not", f"excluding values of type {kind}")
            if not banned or kind != "null":
                found.append(alt)
        return found

    def _pattern(self, node: Node, source: str) -> str:
        try:
            return Pattern(source).body
        except ValueError as error:
            raise self._document.error(node, "pattern", str(error)) from None
        except NotImplementedError as error:
            self._document.lose(node, "pattern", f"{error} in a pattern")
            return ""

    def _array(self, node: Node, alt: Alt) -> None:
        first, rest = node.get("prefixItems", []), node.get("items", True)
        if isinstance(rest, list):  # before 2020-12
            first, rest = rest, node.get("additionalItems", True)
        alt |= {key: int(node[key]) for key in ("minItems", "maxItems") if key in node}
        alt |= {"prefix": [(self._document.node(part, node, "prefixItems"),) for part in first]} if first else {}
        alt |= {"items": (self._document.node(rest, node, "items"),)} if rest not in (True, {}) else {}
        alt |= {"unique": True} if node.get("uniqueItems") else {}
        if "contains" in node:
            least, most = int(node.get("minContains", 1)), node.get("maxContains")
            alt["contains"] = [((self._document.node(node["contains"], node, "contains"),), least, most)]

    def _object(self, node: Node, alt: Alt) -> None:
        alt |= {key: int(node[key]) for key in ("minProperties", "maxProperties") if key in node}
        alt |= {"required": list(dict.fromkeys(node["required"]))} if node.get("required") else {}
        for key, name in (("additionalProperties", "additional"), ("propertyNames", "names")):
            if node.get(key, True) not in (True, {}):
                alt[name] = (self._document.node(node[key], node, key),)
        patterns: dict[str, Conj] = {}
        for source, part in node.get("patternProperties", {}).items():
            body = self._pattern(node, source)
            if body:
                patterns[body] = (*patterns.get(body, ()), self._document.node(part, node, "patternProperties"))
            else:
                alt["additional"] = (ANY,)
        alt |= {"patterns": patterns} if patterns else {}
        alt["properties"] = {
            name: (
                self._document.node(part, node, "properties"),
                *(n for body in patterns if is_found(body, name) for n in patterns[body]),
            )
            for name, part in node.get("properties", {}).items()
        }
        if not alt["properties"]:
            del alt["properties"]
