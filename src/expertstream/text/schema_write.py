"""Writes alternatives as JSON Schema again, in the subset that llguidance can enforce."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import combinations, islice
from math import comb
from typing import Any

from .instances import canonical, with_short_numbers
from .pattern import Pattern, compiled
from .schema_document import ASSERTIONS, NONE, TYPES, Alt, Conj, Document, Node, UnsupportedSchemaError, origin
from .schema_meet import is_any, is_found, joined, lists_properties, of_property, type_of
from .schema_parts import Parts
from .schema_scalars import is_exact, write_number, write_string, write_value

__all__ = ["Writer"]

MAX_NORMALIZED_BYTES = 512 << 10  # references that are not recursive are inlined
MAX_NORMALIZED_DEPTH = 100
MAX_CHOICES = 256  # ways to choose properties or list items, each written out
MAX_ITEMS = 1000


class Writer:
    """Writes schemas for nodes of a document; definitions: the targets of their references."""

    def __init__(self, document: Document) -> None:
        self.definitions: dict[str, Any] = {}
        self._document, self._parts = document, Parts(document)
        self._written: dict[tuple[int, ...], dict[str, Any] | None] = {}
        self._names: dict[tuple[int, ...], str] = {}
        self._open: list[tuple[int, ...]] = []

    def write(self, conj: Conj) -> dict[str, Any] | None:
        """The schema of the values that fit all of the nodes; None if there are none."""
        conj = self._direct(conj)
        if not conj:
            return {}
        key = tuple(map(id, conj))
        if key in self._open:
            self._names.setdefault(key, self._name(conj))
            return {"$ref": f"#/$defs/{self._names[key]}"}
        if key not in self._written:
            if len(self._open) > MAX_NORMALIZED_DEPTH:
                raise UnsupportedSchemaError("#: references are nested too deeply")
            self._open.append(key)
            alternatives = self._parts.alternatives(conj)
            found = _merged([part for alt in alternatives for part in self._one(alt, conj)], len(alternatives))
            self._open.pop()
            if found is not None and len(json.dumps(found)) > MAX_NORMALIZED_BYTES:
                raise UnsupportedSchemaError(
                    f"#: with its references inlined, a schema must be at most {MAX_NORMALIZED_BYTES >> 10} KiB"
                )
            if found is not None and key in self._names:
                self.definitions[self._names[key]] = found
                found = {"$ref": f"#/$defs/{self._names[key]}"}
            self._written[key] = found
        return self._written[key]

    def _direct(self, conj: Conj) -> Conj:
        """Replaces nodes that are only a reference by its target."""
        found: list[Node] = []
        for node in conj:
            path: list[Node] = []
            while node.keys() & ASSERTIONS == {"$ref"} and (target := self._document.target(node)) is not None:
                if any(node is known for known in path):
                    raise self._document.error(node, "$ref", "refers to itself")
                path.append(node)
                node = target  # noqa: PLW2901
            if node.keys() & ASSERTIONS and not any(node is known for known in found):
                found.append(node)
        return tuple(found)

    def _name(self, conj: Conj) -> str:
        place = self._document.place(conj[0]).rsplit("/", 1)[-1] if conj else ""
        stem = "".join(char if char.isascii() and char.isalnum() else "_" for char in place.replace("#", "root"))
        taken = set(self._names.values())
        return next(name for i in range(len(taken) + 1) if (name := f"{stem}{i or ''}") not in taken)

    def _one(self, alt: Alt, conj: Conj) -> list[dict[str, Any]]:
        """The schemas of one alternative: empty if nothing fits it, several if choices are written out."""
        if "value" in alt:
            return write_value(alt["value"], conj, self._document)
        kind = alt["type"]
        if kind == "object":
            return self._objects(alt, conj)
        if kind == "array":
            return self._arrays(alt, conj)
        if kind == "string":
            return write_string(alt, conj, self._document)
        return write_number(alt, conj, self._document) if kind == "number" else [{"type": kind}]

    def _arrays(self, alt: Alt, conj: Conj) -> list[dict[str, Any]]:
        least, most, prefix = alt.get("minItems", 0), alt.get("maxItems"), list(alt.get("prefix", ()))
        rest = alt.get("items", ())
        for wanted, count, limit in alt.get("contains", ()):
            # Required items come first, after those with a fixed position.
            if limit is not None:
                self._document.lose(origin(conj, "maxContains"), "maxContains", "an upper limit")
            start = 0 if rest and self.write(rest) is None else len(alt.get("prefix", ()))
            places = range(start, start + count) if not is_any(wanted) else ()
            prefix += [rest] * (max([*places, -1]) + 1 - len(prefix))
            for i in places:
                prefix[i] = joined(prefix[i], wanted)
            least = max(least, count, *(i + 1 for i in places)) if count else least
        items = [self.write(item) for item in prefix]
        most = min(
            [i for i, item in enumerate(items) if item is None]
            + ([most] if most is not None else [MAX_ITEMS + len(prefix) + least])
        )
        tail = self.write(rest)
        most = min(most, len(prefix)) if tail is None else most
        if least > most:
            return []
        if least > MAX_ITEMS:
            self._document.lose(origin(conj, "minItems"), "minItems", f"requiring more than {MAX_ITEMS} items")
            least = 0
        if alt.get("unique") and most > 1:
            found = None if prefix else self._distinct(rest, least, most)
            if found is not None:
                return found
            self._document.lose(origin(conj, "uniqueItems"), "uniqueItems", "keeping items like these different")
        schema: dict[str, Any] = {"type": "array"}
        schema |= {"prefixItems": items[:most]} if items[:most] else {}
        schema |= {"minItems": least} if least else {}
        schema |= {"maxItems": most} if most < MAX_ITEMS and ("maxItems" in alt or most <= len(prefix)) else {}
        return [schema | ({"items": False} if tail is None or most <= len(prefix) else {"items": tail} if tail else {})]

    def _distinct(self, conj: Conj, least: int, most: int) -> list[dict[str, Any]] | None:
        """Lists of distinct values in the order of the schema: for every split of the values into runs, at most one value of each run."""
        values: list[Any] = []
        for alt in self._parts.alternatives(conj):
            if "value" not in alt and alt["type"] not in ("boolean", "null"):
                return None
            values += [alt["value"]] if "value" in alt else [True, False] if alt["type"] == "boolean" else [None]
        values = list({canonical(value): with_short_numbers(value) for value in values}.values())
        count, most = len(values), min(most, len(values))
        if least > count:
            return []
        if sum(comb(count - 1, size - 1) for size in range(max(1, least), most + 1)) > MAX_CHOICES or not all(
            map(is_exact, values)
        ):
            return None
        found = []
        for size in range(max(1, least), most + 1):
            for cuts in combinations(range(1, count), size - 1):
                runs = [values[a:b] for a, b in zip((0, *cuts), (*cuts, count), strict=True)]
                schema = {"type": "array", "prefixItems": [{"enum": run} for run in runs], "items": False}
                found.append(schema | ({"minItems": least} if least else {}))
        return found

    def _objects(self, alt: Alt, conj: Conj) -> list[dict[str, Any]]:
        alt = self._named(alt, conj)
        properties, patterns = dict(alt.get("properties", {})), alt.get("patterns", {})
        required = list(dict.fromkeys(alt.get("required", ())))
        rest = alt.get("additional", ())
        properties |= {name: of_property(alt, name) for name in required if name not in properties}
        least, most = alt.get("minProperties", 0), alt.get("maxProperties")
        if is_any(rest) and ((lists_properties(alt) and least <= len(properties)) or patterns):
            rest = (NONE,)
        if _may_overlap(patterns):
            self._document.lose(
                origin(conj, "patternProperties"), "patternProperties", "a pattern that may overlap another"
            )
            patterns, rest = {}, ()
        written = {name: self.write(part) for name, part in properties.items()}
        if any(written[name] is None for name in required):
            return []
        others = {f"^{body}$": schema for body, part in patterns.items() if (schema := self.write(part)) is not None}
        tail = self.write(rest)
        is_open = tail is not None or bool(others)
        optional = [name for name in written if name not in required and written[name] is not None]
        needed = max(0, least - len(required))
        room = None if most is None else most - len(required)
        if (room is not None and room < 0) or (not is_open and needed > len(optional)):
            return []
        bounds: dict[str, Any] = {}
        choices: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
            (tuple(optional), ())
        ]  # those that may be present, and those that must
        if room is not None and is_open:
            bounds["maxProperties"] = most
            if optional:
                self._document.lose(
                    origin(conj, "maxProperties"), "maxProperties", "a limit next to optional properties"
                )
                bounds = {}
        elif room is not None and room < len(optional):
            choices = [(some, ()) for some in islice(combinations(optional, room), MAX_CHOICES + 1)]
        if needed and needed <= len(optional):
            choices = [
                (some, must) for some, _ in choices for must in islice(combinations(some, needed), MAX_CHOICES + 1)
            ]
        elif needed == 1:
            bounds["minProperties"] = least
        elif needed:
            self._document.lose(
                origin(conj, "minProperties"), "minProperties", "requiring several properties that are not listed"
            )
        if len(choices) > MAX_CHOICES:
            self._document.lose(
                origin(conj, "minProperties", "maxProperties"),
                "minProperties",
                "choosing among this many properties",
            )
            choices = [(tuple(optional), ())]
        found = []
        for some, must in choices:
            kept: dict[str, Any] = {}
            for name, part in written.items():
                if is_open or name in required or name in some:
                    kept[name] = False if part is None else part
            must_be = [name for name in kept if name in required or name in must]
            one: dict[str, Any] = {"type": "object", **({"properties": kept} if kept else {})}
            one |= {"required": must_be} if must_be else {}
            one |= {"patternProperties": others} if others else {}
            one |= {"additionalProperties": False if tail is None else tail} if tail != {} else {}
            found.append(one | bounds)
        return found

    def _named(self, alt: Alt, conj: Conj) -> Alt:
        """Replaces propertyNames: listed names become properties, a pattern becomes patternProperties."""
        names = alt.get("names", ())
        if is_any(names):
            return alt
        kinds = [kind for kind in self._parts.alternatives(names) if kind["type"] == "string"]
        properties = {
            name: part if any(self._parts.meet.may_be(name, kind) for kind in kinds) else (NONE,)
            for name, part in alt.get("properties", {}).items()
        }
        if any(set(kind) <= {"type", "format"} for kind in kinds):
            return alt
        if all("value" in kind for kind in kinds):
            listed = {kind["value"]: of_property(alt, kind["value"]) for kind in kinds}
            return {**alt, "properties": {**properties, **listed}, "patterns": {}, "additional": (NONE,)}
        bodies = list(kinds[0].get("patterns", ()))
        if kinds[0].keys() & {"minLength", "maxLength"}:
            bodies.append(Pattern(f"^[^]{{{kinds[0].get('minLength', 0)},{kinds[0].get('maxLength', '')}}}$").body)
        if len(kinds) > 1 or len(bodies) != 1 or alt.get("patterns"):
            self._document.lose(origin(conj, "propertyNames"), "propertyNames", "combining several conditions on names")
            return alt
        listed = {name: part for name, part in properties.items()}
        absent = {
            name: (NONE,) for name in alt.get("required", ()) if name not in listed and not is_found(bodies[0], name)
        }
        rest = alt.get("additional", ())
        return {**alt, "properties": {**listed, **absent}, "patterns": {bodies[0]: rest}, "additional": (NONE,)}


def _may_overlap(bodies: Iterable[str]) -> bool:
    """Whether two of the patterns may match the same name, judging by their first characters."""
    starts = [compiled(f"^{body}$").start() for body in bodies]
    return any(a.startswith(b) or b.startswith(a) for a, b in combinations(starts, 2))


def _merged(parts: list[dict[str, Any]], count: int) -> dict[str, Any] | None:
    """Merges schemas into one; {} allows anything."""
    plain = {part["type"] for part in parts if part.keys() == {"type"}}
    if count == len(TYPES) and len(parts) == count and {*TYPES} - plain in ({"object"}, {"array"}):
        (shaped,) = (part for part in parts if part.keys() != {"type"})
        if shaped.keys() & {"properties", "items", "prefixItems"}:
            return shaped  # the schema has no type, but means this one
    if plain >= set(TYPES):
        return {}
    values = {canonical(part["enum"][0]): part["enum"][0] for part in parts if "enum" in part}
    values = {key: value for key, value in values.items() if type_of(value) not in plain}
    found: list[dict[str, Any]] = []
    for part in parts:
        if "enum" in part:
            one: dict[str, Any] = {"enum": list(values.values())}
        elif part["type"] in plain or (part["type"] == "integer" and "number" in plain):
            one = {"type": "number" if "number" in plain and part["type"] == "integer" else part["type"]}
        else:
            one = part
        if one not in found and one.get("enum") != []:
            found.append(one)
    return None if not found else found[0] if len(found) == 1 else {"anyOf": found}
