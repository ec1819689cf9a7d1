"""Writes alternatives for values, strings and numbers as JSON Schema, within what llguidance reads without errors."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor, log10
from typing import Any

from .instances import with_short_numbers
from .pattern import Pattern
from .schema_document import FORMATS, NUMBER, Alt, Conj, Document, origin
from .schema_meet import number_range

__all__ = ["is_exact", "write_number", "write_string", "write_value"]

MAX_STEP = 10_000  # of multipleOf, in units of its last digit: llguidance has a state for each remainder
MAX_LENGTH = 1 << 30
MAX_INTEGER = 2**53  # exact in a double; without a bound, a model may never stop writing digits
MAX_BOUND = 10**15  # of numbers with a fraction


def write_value(value: Any, conj: Conj, document: Document) -> list[dict[str, Any]]:
    """The schema of one value."""
    value = with_short_numbers(value)
    if is_exact(value):
        return [{"enum": [value]}]
    document.lose(origin(conj, "const", "enum"), "enum", "a number with this many digits")
    return [{"type": "number"}]


def write_string(alt: Alt, conj: Conj, document: Document) -> list[dict[str, Any]]:
    """The schema of a string; empty if nothing fits the alternative."""
    least, most = alt.get("minLength", 0), alt.get("maxLength")
    patterns = [f"^{body}$" for body in alt.get("patterns", ()) if body]
    if least > MAX_LENGTH:
        document.lose(origin(conj, "minLength"), "minLength", f"a length of more than {MAX_LENGTH}")
        least = 0
    if most is not None and least > most:
        return []
    found: dict[str, Any] = {"type": "string"}
    found |= ({"minLength": least} if least else {}) | (
        {"maxLength": most} if most is not None and most < MAX_LENGTH else {}
    )
    if len(found) == 1 and not patterns and "format" in alt:
        patterns = [f"^{Pattern(FORMATS[alt['format']]).body}$"]
    found |= {"pattern": patterns[0]} if patterns else {}
    return [found | ({"allOf": [{"pattern": pattern} for pattern in patterns[1:]]} if patterns[1:] else {})]


def write_number(alt: Alt, conj: Conj, document: Document) -> list[dict[str, Any]]:
    """The schema of a number; empty if nothing fits the alternative."""
    bounds, step = number_range(alt), Fraction(str(alt.get("multipleOf", 0)))
    if bounds is None:
        return []
    low, low_open, high, high_open = bounds
    if alt.get("integer"):
        low = None if low is None else floor(low) + 1 if low_open else ceil(low)
        high = None if high is None else ceil(high) - 1 if high_open else floor(high)
        low_open = high_open = False
        step = Fraction(step.numerator)
    limit = MAX_INTEGER if alt.get("integer") else MAX_BOUND
    if (low is not None and low > limit) or (high is not None and high < -limit):
        document.lose(
            origin(conj, *NUMBER),
            "minimum" if low is not None and low > limit else "maximum",
            "a bound this large",
        )
        low = high = None
    low, high = None if low is None else max(low, -limit), None if high is None else min(high, limit)
    if alt.get("integer") and step in (0, 1):
        low, high = -limit if low is None else low, limit if high is None else high
    if low is not None and high is not None:
        first = ceil(Fraction(str(low)) / step) * step if step else low
        if first > high or (first == high and high_open):
            return []
    if low is not None and high is not None and not alt.get("integer") and (low_open or high_open):
        near = _between(low, low_open, high, high_open)
        if near is not None:
            if not step and high - low >= 9e-4:
                return [near]
            keyword = "exclusiveMinimum" if low_open else "exclusiveMaximum"
            document.lose(origin(conj, *NUMBER), keyword, "a bound this close to the other")
    found: dict[str, Any] = {"type": "integer" if alt.get("integer") else "number"}
    found |= {} if low is None else {"exclusiveMinimum" if low_open else "minimum": with_short_numbers(low)}
    found |= {} if high is None else {"exclusiveMaximum" if high_open else "maximum": with_short_numbers(high)}
    if step and not (step == 1 and alt.get("integer")):
        factor = _exact_step(step)
        if factor is None:
            document.lose(origin(conj, "multipleOf"), "multipleOf", "a step this large or with this many digits")
        else:
            found["multipleOf"] = factor
    return [found]


def _between(low: float, low_open: bool, high: float, high_open: bool) -> dict[str, Any] | None:
    """The schema of numbers between bounds at most 1 apart, one of them whole and exclusive: llguidance would let that bound through.
    Leaving it out also excludes a thousandth of the numbers between them. None if the bounds are not like this."""
    if not ((low_open and low == floor(low)) or (high_open and high == floor(high))) or high - low > 1:
        return None
    step = 10.0 ** floor(log10((high - low) / 100))
    least = round(low + step, 12) if low_open else low
    most = round(high - step, 12) if high_open else high
    return {"type": "number", "minimum": with_short_numbers(least), "maximum": with_short_numbers(most)}


def _exact_step(step: Fraction) -> float | None:
    """The step as a number that llguidance reads exactly, digit by digit, or None."""
    scaled, digits = float(step), 0
    while scaled != int(scaled) and digits < 20:
        scaled, digits = scaled * 10, digits + 1
    if Fraction(int(scaled), 10**digits) != step or scaled > MAX_STEP:
        return None
    return int(step) if step.denominator == 1 else float(step)


def is_exact(value: Any) -> bool:
    """Whether llguidance writes all numbers of a value exactly."""
    if isinstance(value, list | dict):
        return all(map(is_exact, value.values() if isinstance(value, dict) else value))
    if isinstance(value, float):
        return 1e-5 < abs(value) < MAX_BOUND
    return not isinstance(value, int) or abs(value) <= MAX_INTEGER
