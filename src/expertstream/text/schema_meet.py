"""Intersections of alternatives of a JSON Schema, and whether they are disjoint."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from math import lcm
from typing import Any

from .instances import canonical, kind_of, matches
from .pattern import compiled
from .schema_document import ANY, ASSERTIONS, COUNTS, NONE, NUMBER, Alt, Conj, Document

__all__ = [
    "Meet",
    "is_any",
    "is_found",
    "joined",
    "lists_properties",
    "number_range",
    "of_item",
    "of_property",
    "type_of",
]


class Meet:
    """Intersections and disjointness. wider: returns alternatives that allow no less than all of the nodes together."""

    def __init__(self, document: Document, wider: Callable[[Conj], list[Alt]]) -> None:
        self._document, self._wider = document, wider

    def both(self, a: Alt, b: Alt) -> Alt | None:
        """The intersection of two alternatives; None if it is known to be empty before it is written."""
        if a["type"] != b["type"]:
            return None
        for one, other in ((a, b), (b, a)):
            if "value" in one:
                return one if self.may_be(one["value"], other) else None
        found = {**b, **a}
        for key in a.keys() & b.keys() - {"type", "integer", "unique", "format"}:
            x, y = a[key], b[key]
            if key in ("additional", "items", "names"):
                found[key] = joined(x, y)
            elif key in ("required", "contains") or (key == "patterns" and a["type"] == "string"):
                found[key] = [*x, *(part for part in y if part not in x)]
            elif key in NUMBER or key in COUNTS:
                found[key] = (
                    _common_multiple(x, y)
                    if key == "multipleOf"
                    else (max if key.lower().find("min") >= 0 else min)(x, y)
                )
        if a["type"] == "object":
            names = [
                *a.get("properties", {}),
                *(name for name in b.get("properties", {}) if name not in a.get("properties", {})),
            ]
            properties = {name: joined(of_property(a, name), of_property(b, name)) for name in names}
            found |= {"properties": properties} if properties else {}
            if "patterns" in a or "patterns" in b:
                found["patterns"] = self._both_patterns(a, b)
        if a["type"] == "array" and ("prefix" in a or "prefix" in b):
            count = max(len(a.get("prefix", ())), len(b.get("prefix", ())))
            found["prefix"] = [joined(of_item(a, i), of_item(b, i)) for i in range(count)]
        return found

    def _both_patterns(self, a: Alt, b: Alt) -> dict[str, Conj]:
        found: dict[str, Conj] = {}
        for one, other in ((a, b), (b, a)):
            for body, conj in one.get("patterns", {}).items():
                elsewhere = other.get("patterns", {})
                if body not in elsewhere and elsewhere:
                    self._document.lose(conj[0], "patternProperties", "combining different patterns")
                found[body] = joined(conj, elsewhere.get(body, other.get("additional", (ANY,))))
        return found

    def apart(self, a: Alt, b: Alt) -> Alt | None:
        """`a`, or a part of it that is disjoint from `b`; None if there is none."""
        if self._disjoint(a, b, 0):
            return a
        if a["type"] == b["type"] == "object" and "value" not in a and "value" not in b:
            for name, conj in a.get("properties", {}).items():
                if name in b.get("properties", {}) and self._disjoint_all(conj, b["properties"][name], 0):
                    return {**a, "required": [*a.get("required", ()), name]}
            closed = {**a, "additional": (NONE,)}
            if lists_properties(a) and is_any(a.get("additional", ())) and self._disjoint(closed, b, 0):
                return closed
        return None

    def _disjoint_all(self, a: Conj, b: Conj, depth: int) -> bool:
        xs, ys = self._wider(a), self._wider(b)
        return depth < 4 and all(self._disjoint(x, y, depth + 1) for x in xs for y in ys)

    def _disjoint(self, a: Alt, b: Alt, depth: int) -> bool:
        if a["type"] != b["type"]:
            return True
        if "value" in a or "value" in b:
            return not self.may_be(a["value"], b) if "value" in a else not self.may_be(b["value"], a)
        for kind in ("Length", "Items", "Properties"):
            if any(x.get(f"min{kind}", 0) > y.get(f"max{kind}", float("inf")) for x, y in ((a, b), (b, a))):
                return True
        if a["type"] == "number":
            both = {key: value for key, value in (self.both(a, b) or {}).items() if key != "multipleOf"}
            return number_range(both) is None
        names = [*a.get("required", ()), *b.get("required", ())] if a["type"] == "object" else []
        return any(self._disjoint_all(of_property(a, name), of_property(b, name), depth) for name in names)

    def may_be(self, value: Any, alt: Alt) -> bool:
        """Whether a value may fit an alternative: False only if it certainly does not."""
        if "value" in alt:
            return canonical(alt["value"]) == canonical(value)
        kind = type_of(value)
        if kind != alt["type"]:
            return False
        if kind == "object":
            parts = [(part, of_property(alt, name)) for name, part in value.items()]
            return all(name in value for name in alt.get("required", ())) and all(self._may_all(v, c) for v, c in parts)
        if kind == "array":
            count = len(value)
            inside = alt.get("minItems", 0) <= count <= alt.get("maxItems", count)
            return inside and all(self._may_all(part, of_item(alt, i)) for i, part in enumerate(value))
        if kind == "string":
            inside = alt.get("minLength", 0) <= len(value) <= alt.get("maxLength", len(value))
            return inside and all(is_found(body, value) for body in alt.get("patterns", ()) if body)
        return alt["type"] != "number" or matches(value, {key: alt[key] for key in NUMBER if key in alt}, True)

    def _may_all(self, value: Any, conj: Conj) -> bool:
        return any(self.may_be(value, alt) for alt in self._wider(conj))


def is_found(body: str, text: str) -> bool:
    """Whether the pattern with this body matches the whole text."""
    return compiled(f"^{body}$").matches(text)


def joined(a: Conj, b: Conj) -> Conj:
    """The nodes of both, each once."""
    return (*a, *(node for node in b if not any(node is known for known in a)))


def is_any(conj: Conj) -> bool:
    """Whether the nodes have no constraints."""
    return not any(node.keys() & ASSERTIONS for node in conj)


def lists_properties(alt: Alt) -> bool:
    """Whether an alternative lists properties that may be present."""
    return any(conj != (NONE,) for conj in alt.get("properties", {}).values())


def of_property(alt: Alt, name: str) -> Conj:
    """The schemas of a property."""
    if name in alt.get("properties", {}):
        return alt["properties"][name]  # type: ignore[no-any-return]
    conj: Conj = alt.get("additional", ())
    found = [conj for body, conj in alt.get("patterns", {}).items() if is_found(body, name)]
    return reduce(joined, found) if found else conj


def of_item(alt: Alt, index: int) -> Conj:
    """The schemas of an item of a list."""
    prefix: list[Conj] = alt.get("prefix", [])
    rest: Conj = alt.get("items", ())
    return prefix[index] if index < len(prefix) else rest


def type_of(value: Any) -> str:
    """The type of the alternatives that a value may fit."""
    return "number" if kind_of(value) == "integer" else kind_of(value)


def _common_multiple(a: float, b: float) -> float:
    x, y = Fraction(str(a)), Fraction(str(b))
    common = Fraction(lcm(x.numerator * y.denominator, y.numerator * x.denominator), x.denominator * y.denominator)
    return int(common) if common.denominator == 1 else float(common)


def number_range(alt: Alt) -> tuple[float | None, bool, float | None, bool] | None:
    """Minimum and maximum, each with whether it is exclusive; None if there is no number between them."""
    lows = [(alt[key], key != "minimum") for key in ("minimum", "exclusiveMinimum") if key in alt]
    highs = [(-alt[key], key != "maximum") for key in ("maximum", "exclusiveMaximum") if key in alt]
    (low, low_open), (high, high_open) = max(lows, default=(None, False)), max(highs, default=(None, False))
    high = None if high is None else -high
    if low is not None and high is not None and (low > high or (low == high and (low_open or high_open))):
        return None
    return low, low_open, high, high_open
