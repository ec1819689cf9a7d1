"""Reads values that a model writes according to their JSON schemas: call arguments, and JSON that may be truncated."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import copysign, isfinite
from sys import float_info
from typing import Any

from .instances import MAX_REFERENCES, UNDECIDED, kind_of, matches, resolve
from .pattern import compiled

__all__ = ["ArgumentSchemas", "complete_json", "parse_json", "typed_argument"]

MAX_LITERAL_BYTES = 1 << 20
MAX_LITERAL_DEPTH = 100

_PYTHON = {"True": "true", "False": "false", "None": "null"}  # models trained on Python write these
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*')
_KEYWORDS = {
    "object": ("properties", "required", "additionalProperties", "patternProperties"),
    "array": ("items", "prefixItems"),
}


@dataclass(frozen=True)
class ArgumentSchemas:
    """A function's argument schemas, with references and combinations expanded: one way, or several mutually exclusive ways."""

    root: Any
    ways: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, schema: Any) -> ArgumentSchemas:
        """schema: of the arguments object, as the client sent it. Never raises."""
        try:
            return cls(schema, tuple(_objects(schema, schema, 0)) or ({},))
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return cls(schema, ({},))

    @property
    def several(self) -> bool:
        """Whether the type of an argument depends on the others."""
        return len(self.ways) > 1

    @property
    def names(self) -> list[str]:
        """The names of the listed arguments."""
        listed = (
            part.get("properties") for way in self.ways for part in way.get("allOf", ()) if isinstance(part, dict)
        )
        return list(dict.fromkeys(name for found in listed if isinstance(found, dict) for name in found))

    def of_one(self, name: str) -> Any:
        """The schema of one argument; None if it has none."""
        return _property(self.ways[0], name)

    def kinds(self, name: str) -> set[str]:
        """The types that one argument may have; empty if unknown."""
        try:
            return set(_allowed(self.of_one(name), self.root, 0).kinds)
        except UNDECIDED:
            return set()

    def typed(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """All arguments of a call, read in the first way that fits. Never raises: see typed_argument."""
        found = [
            {k: typed_argument(text, _property(way, k), self.root) for k, text in texts.items()} for way in self.ways
        ]
        fitting = (arguments for arguments in found if _fits(arguments, self.root, self.root) is True)
        return found[0] if len(found) == 1 else next(fitting, found[0])


def typed_argument(text: str, schema: Any, root: Any = None) -> Any:
    """An argument's text as a value of its JSON schema; if it cannot be read as one, the text itself, for the function to reject.

    A string is the unchanged text. "null" is null where null is allowed, and a quoted JSON string is decoded where the schema lists its
    strings or also allows null. Lists and objects may be written in Python syntax. root: the document that references refer to.
    Never raises.
    """
    if not isinstance(schema, dict):
        return text
    try:
        return _typed(text, schema, schema if root is None else root)
    except UNDECIDED:
        return text


def _typed(text: str, schema: dict[str, Any], root: Any) -> Any:
    allowed = _allowed(schema, root, 0)
    kinds, free = allowed.kinds, not allowed.kinds or ("string" in allowed.kinds and allowed.strings is None)
    if allowed.strings is not None and text in allowed.strings:
        return text
    parsed = list(_parsed(text, kinds))
    if free and kinds != {"string", "null"}:
        null = [] if text != "null" or "null" not in kinds else [None]
        candidates = [*null, text, *parsed]
    elif free:
        candidates = [*(value for value in parsed if value is not None or text == "null"), text]
    else:
        candidates = [*parsed, *(value for value in (text.strip(),) if allowed.strings and value in allowed.strings)]
    for value in candidates:
        if _fits(value, schema, root) is not False:
            return value
    for value in _parsed(text, set()) if free else ():  # part of the schema may not name its types
        if _fits(value, schema, root):
            return value
    return text if free or not parsed or allowed.strings else parsed[0]


def _parsed(text: str, kinds: set[str]) -> Iterator[Any]:
    """The text read as JSON and as Python, if the result has one of the kinds."""
    for read in (parse_json, _python_literal):
        try:
            value = read(_PYTHON.get(text.strip(), text))
        except (ValueError, RecursionError, MemoryError, SyntaxError):
            continue
        if isinstance(value, float) and "number" not in kinds and abs(value) < 2**53 and value == int(value):
            value = int(value)
        kind = kind_of(value)
        if not kinds or kind in kinds or (kind == "integer" and "number" in kinds):
            yield value


def _fits(value: Any, schema: Any, root: Any) -> bool | None:
    """None if undecided."""
    try:
        return matches(value, schema, root)
    except UNDECIDED:
        return None


def _python_literal(text: str) -> Any:
    if len(text) > MAX_LITERAL_BYTES or not text.lstrip().startswith(("[", "{", "(")):
        raise ValueError("neither a list nor an object")
    depth = most = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        most = max(most, depth)
    if most > MAX_LITERAL_DEPTH:
        raise ValueError("nested too deeply")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _as_json(ast.literal_eval(text.strip()))


def _as_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _as_json(part) for key, part in value.items()}
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, str):
        return _whole(value)
    if value is None or isinstance(value, bool | int):
        return value
    raise ValueError("not a JSON value")


def parse_json(text: str) -> Any:
    """JSON, without Python's NaN and Infinity; a number too large for a double becomes the largest double, and a lone surrogate becomes
    the replacement character. Raises ValueError, RecursionError."""
    found = json.loads(text, parse_constant=_no_number, parse_float=lambda digits: _finite(float(digits)))
    return json.loads(_whole(json.dumps(found, ensure_ascii=False))) if "\\ud" in text.lower() else found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite(number: float) -> float:
    return number if isfinite(number) else copysign(float_info.max, number)


def _whole(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def complete_json(text: str) -> Any:
    """Reads truncated JSON: open strings, lists and objects are closed, a word is completed, a key without a value is dropped.
    Raises ValueError if the text is not the beginning of JSON, or only white space."""
    try:
        try:
            return parse_json(text)
        except ValueError:
            return parse_json(_completed(text))
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _completed(text: str) -> str:
    closers, at, key = list[str](), 0, False  # key: the next string is an object's key
    whole = ""  # the longest beginning that closers turn into JSON
    while at < len(text):
        char, start = text[at], at
        at += 1
        if char in "{[":
            closers.append("}" if char == "{" else "]")
            key = char == "{"
        elif char in "}]":
            closers.pop() if closers else None
            key = False
        elif char in ",:":
            key = char == "," and bool(closers) and closers[-1] == "}"
            continue
        elif char == '"':
            match = _STRING.match(text, start)
            at = match.end() if match else at
            if text[at : at + 1] == '"':
                at += 1
            elif not key and re.fullmatch(r"(\\(u[0-9a-fA-F]{0,3})?)?", text[at:]):
                return re.sub(r"\\u[dD][89abAB]..$", "", text[:at]) + '"' + "".join(reversed(closers))
            else:
                break
            if key:
                key = False
                continue
        elif not char.isspace():
            match = re.compile(r'[^\s,:"{}\[\]]+').match(text, start)
            at = match.end() if match else at
            if at == len(text):
                word = text[start:]
                word = next((name for name in ("true", "false", "null") if name.startswith(word)), word.rstrip("+-.eE"))
                if not word:
                    break
                return text[:start] + word + "".join(reversed(closers))
        else:
            continue
        whole = text[:at] + "".join(reversed(closers))
    return whole


@dataclass(frozen=True)
class _Allowed:
    """kinds: the types that a schema allows, empty if it names none; strings: the strings that it lists, None if it lists none."""

    kinds: set[str]
    strings: set[str] | None = None


def _allowed(schema: Any, root: Any, depth: int) -> _Allowed:
    if not isinstance(schema, dict) or depth > MAX_REFERENCES:  # circular references
        return _Allowed(set())
    kind = schema.get("type")
    parts = [_Allowed({kind} if isinstance(kind, str) else {k for k in _list(kind) if isinstance(k, str)})]
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values:
        parts.append(_Allowed({kind_of(v) for v in values}, {v for v in values if isinstance(v, str)}))
    if isinstance(schema.get("$ref"), str):
        parts.append(_allowed(_target(schema["$ref"], root), root, depth + 1))
    parts += [_allowed(part, root, depth + 1) for part in _list(schema.get("allOf"))]
    for choices in (_list(schema.get("anyOf")), _list(schema.get("oneOf"))):
        found = [_allowed(choice, root, depth + 1) for choice in choices]
        listed = [choice.strings for choice in found if choice.strings is not None]
        plain = any("string" in choice.kinds and choice.strings is None for choice in found)
        kinds = {kind for choice in found for kind in choice.kinds}
        parts.append(_Allowed(kinds, set().union(*listed) if listed and not plain else None))
    if not any(part.kinds for part in parts):
        parts += [_Allowed({kind}) for kind, keys in _KEYWORDS.items() if schema.keys() & set(keys)]
    whole = _Allowed(set())
    for part in parts:
        whole = _Allowed(_common(whole.kinds, part.kinds), _common_strings(whole.strings, part.strings))
    return _Allowed(whole.kinds | {"null"}, whole.strings) if whole.kinds and schema.get("nullable") is True else whole


def _common(a: set[str], b: set[str]) -> set[str]:
    if not a or not b:
        return a or b
    return (a & b) | (
        {"integer"} if ("integer" in a and "number" in b) or ("number" in a and "integer" in b) else set()
    )


def _common_strings(a: set[str] | None, b: set[str] | None) -> set[str] | None:
    return (b if a is None else a) if a is None or b is None else a & b


def _objects(schema: Any, root: Any, depth: int) -> Iterator[dict[str, Any]]:
    """The ways in which an object may fit a schema, each as schemas that must all hold."""
    if not isinstance(schema, dict) or depth > MAX_REFERENCES:
        return
    ways: list[list[Any]] = [[schema]]
    for part in [
        *_list(schema.get("allOf")),
        *([_target(schema["$ref"], root)] if isinstance(schema.get("$ref"), str) else []),
    ]:
        ways = [
            [*way, *more["allOf"]]
            for way in ways
            for more in list(_objects(part, root, depth + 1))[:64] or [{"allOf": []}]
        ]
    for choices in (_list(schema.get("anyOf")), _list(schema.get("oneOf"))):
        more = [part for choice in choices for part in _objects(choice, root, depth + 1)][:64]
        ways = [[*way, *part["allOf"]] for way in ways for part in more] if more else ways
    yield from ({"allOf": way} for way in ways[:64])


def _property(way: dict[str, Any], key: str) -> Any:
    found: list[Any] = []
    for schema in way.get("allOf", ()):
        values = [schema["const"]] if "const" in schema else _list(schema.get("enum"))
        values = [value[key] for value in values if isinstance(value, dict) and key in value]
        if values:
            found.append({"enum": values})
            continue
        listed, patterns = schema.get("properties"), schema.get("patternProperties")
        parts = [listed[key]] if isinstance(listed, dict) and key in listed else []
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            try:
                parts += [value] if compiled(pattern).matches(key) else []
            except (ValueError, NotImplementedError):
                continue
        found += parts or [schema.get("additionalProperties")]
    found = [part for part in found if isinstance(part, dict)]
    return found[0] if len(found) == 1 else {"allOf": found} if found else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _target(reference: str, root: Any) -> Any:
    try:
        return resolve(reference, root)
    except (LookupError, NotImplementedError):
        return None
