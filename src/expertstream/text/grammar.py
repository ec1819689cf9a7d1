"""Grammars for model output, in llguidance's variant of Lark: JSON for a schema, and function calls in XML or JSON.

All schemas here are the output of `schema.normalize`. In an XML call, a value ends at the first "\\n</parameter>\\n" that is directly
followed by "<parameter=" or "</function>"; nothing else ends it, so a value may contain tags. Strings are raw text, also in a union with
null; their pattern and length limits apply to the raw text. A union of an unconstrained string and another type is raw text. Any other
value is JSON, on one line. `arguments.ArgumentSchemas` reads all of this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from .pattern import Pattern

__all__ = ["XML_SHARED", "json_call", "json_call_value", "json_rule", "xml_call"]

MAX_OTHERS = 64  # parameters of a map with a limit on their number


def json_rule(name: str, schema: dict[str, Any]) -> str:
    """One rule: JSON for a normalized schema, spaced as by json.dumps() (with free white space, a model might never stop)."""
    return f"{name}: {_json(schema, schema.get('$defs', {}))}\n"


def json_call(prefix: str, name: str, parameters: dict[str, Any] | None, begin: str, end: str) -> str:
    """The rule `prefix`: begin, a line with {"name": …, "arguments": {…}}, end. parameters: normalized, or None for any object."""
    arguments: dict[str, Any] = {"type": "object"} if parameters is None else parameters
    whole: dict[str, Any] = {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {k: v for k, v in arguments.items() if k != "$defs"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
    return f'{prefix}: {begin} "\\n" {_json(whole, arguments.get("$defs", {}))} "\\n" {end}\n'


def json_call_value(parameters: dict[str, Any] | None) -> str:
    """An expression for the arguments of a call as JSON. parameters: normalized, or None for any object."""
    arguments: dict[str, Any] = {"type": "object"} if parameters is None else parameters
    return _json({k: v for k, v in arguments.items() if k != "$defs"}, arguments.get("$defs", {}))


_KEY_END, _MORE, _LAST = ">\n", "\n</parameter>\n<parameter=", "\n</parameter>\n</function>"
_ENDS = re.compile(r"\n</parameter>\n(<parameter=|</function>)")
_REFERENCE = re.compile(r'"\$ref": "#/\$defs/(\w+)"')
_FEW = {"null": ["null"], "boolean": ["true", "false"]}

# Shared by the rules of xml_call(); append it once to a grammar that has any of them.
XML_SHARED = (
    f"xml_more[suffix={json.dumps(_MORE)}]: XML_TEXT\n"
    f"xml_last[suffix={json.dumps(_LAST)}]: XML_TEXT\n"
    "XML_TEXT: /(?s:.*)/ & ~/(?s:.*)\\n<\\/parameter>\\n(<parameter=|<\\/function>)(?s:.*)/\n"
)


def xml_call(prefix: str, name: str, parameters: dict[str, Any] | None, begin: str, end: str) -> str:
    """The rule `prefix` and its helpers, whose names begin with it: begin, <function=NAME> with its parameters, end, each on its own lines.

    parameters: a normalized schema of the arguments, or None for parameters of any name with any text. Parameters come in the order of the
    schema. begin, end: Lark expressions; "" if the opener has already been read. The grammar is as long as the schema. Raises ValueError if
    no object of the schema can be written this way: keys with "<", ">" or a line end, values that contain the end of a value.
    """
    call = _XmlCall(prefix, {"type": "object"} if parameters is None else parameters)
    head = f'{prefix}: {begin} {_quoted(f"{chr(10)}<function={name}>{chr(10)}")} ({call.body()}) "\\n" {end}\n'
    return head + "".join(call.rules)


class _XmlCall:
    """The rules of one call. `more`: a rule for what follows "<parameter=", or "" if nothing may; `done`: no required one is missing."""

    def __init__(self, prefix: str, schema: dict[str, Any]) -> None:
        self._prefix, self._schema = prefix, schema
        self._definitions: dict[str, Any] = schema.get("$defs", {})
        self.rules: list[str] = []

    def body(self) -> str:
        """From the first parameter to </function>, for any object that the schema allows."""
        kinds = [kind for kind in self._alternatives(self._schema) if kind.get("type", "object") == "object"]
        bodies = [body for kind in kinds if (body := self._object(kind))]
        if not bodies:
            raise ValueError("no object of the schema can be written as the arguments of an XML call")
        return " | ".join(bodies)

    def _alternatives(self, schema: Any, seen: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
        """The branches of the schema, with anyOf and references at the top expanded."""
        if isinstance(schema, dict) and "$ref" in schema:
            key = schema["$ref"].removeprefix("#/$defs/")
            if key not in seen:
                yield from self._alternatives(self._definitions[key], (*seen, key))
        elif isinstance(schema, dict) and "anyOf" in schema:
            for branch in schema["anyOf"]:
                yield from self._alternatives(branch, seen)
        elif schema is not False:
            yield schema if isinstance(schema, dict) else {}

    def _rule(self, body: str, terminal: bool = False) -> str:
        name = f"{self._prefix}_{len(self.rules)}"
        name = name.upper() if terminal else name
        self.rules.append(f"{name}: {body}\n")
        return name

    def _object(self, schema: dict[str, Any]) -> str:
        if any(not isinstance(value, dict) for value in schema.get("enum", ())):
            return ""
        if "enum" in schema:  # whole objects: each becomes a closed object
            choices = [{k: {"enum": [v]} for k, v in value.items()} for value in schema["enum"]]
            closed = [{"properties": c, "required": list(c), "additionalProperties": False} for c in choices]
            return " | ".join(filter(None, map(self._object, closed)))
        required, listed = schema.get("required", []), schema.get("properties", {})
        more, done = self._others(schema)
        for key, value in reversed(listed.items()):
            tail = self._value(value, more, done) if _writable(key) else ""
            if tail:
                one = f"{_quoted(key + '>' + chr(10))} ({tail})"
                more, done = (
                    (self._rule(one), False)
                    if key in required
                    else (self._rule(f"{one} | {more}" if more else one), done)
                )
            elif key in required:
                return ""
        return " | ".join([*(['"</function>"'] if done else []), *([f'"<parameter=" {more}'] if more else [])])

    def _others(self, schema: dict[str, Any]) -> tuple[str, bool]:
        """The parameters that the schema does not list, as many as it allows."""
        patterns, rest = schema.get("patternProperties", {}), schema.get("additionalProperties", True)
        least, most = (schema.get(key) for key in ("minProperties", "maxProperties"))
        least = max(0, (least or 0) - len(schema.get("required", [])))
        left = None if most is None else min(MAX_OTHERS, most - len(schema.get("required", [])))
        named = [f"~{_quoted(key)}" for key in schema.get("properties", {})]
        kinds = [([f"/{Pattern(pattern).body}/", *named], value) for pattern, value in patterns.items()]
        if rest is not False:
            kinds.append(([*(f"~/{Pattern(pattern).body}/" for pattern in patterns), *named], rest))
        if not kinds or left == 0:
            return "", least == 0
        keys = [self._rule(" & ".join(["/[^<>\\n]+/", *parts]), terminal=True) for parts, _ in kinds]
        if left is None:
            # Any number of them: the rule is recursive.
            name = f"{self._prefix}_others_{len(self.rules)}"
            ways = [(key, self._value(value, name, True)) for key, (_, value) in zip(keys, kinds, strict=True)]
            self.rules.append(
                f"{name}: {' | '.join(f'{key} {_quoted(_KEY_END)} ({way})' for key, way in ways if way)}\n"
            )
            more = name
        else:
            more, ways = "", []
            for _ in range(left):
                ways = [(key, self._value(value, more, True)) for key, (_, value) in zip(keys, kinds, strict=True)]
                more = self._rule(" | ".join(f"{key} {_quoted(_KEY_END)} ({way})" for key, way in ways if way))
        return more if any(way for _, way in ways) else "", least == 0

    def _value(self, schema: Any, more: str, done: bool) -> str:
        """A value with its terminator and all that follows, or "" if there is none."""
        texts: list[str] = []  # values written literally
        ways: list[str] = []
        rest: list[dict[str, Any]] = []
        for kind in self._alternatives(schema):
            kinds = kind.get("type")
            bounds = [key for key in ("pattern", "allOf", "minLength", "maxLength") if key in kind]
            if "enum" in kind:
                texts += [
                    v if isinstance(v, str) else json.dumps(v) for v in kind["enum"] if not isinstance(v, list | dict)
                ]
                rest += [{"enum": [v]} for v in kind["enum"] if isinstance(v, list | dict)]
            elif not bounds and (kinds is None or kinds == "string" or (isinstance(kinds, list) and "string" in kinds)):
                return " | ".join([*([f"xml_more {more}"] if more else []), *(["xml_last"] if done else [])])
            elif kinds == "string":
                ways += self._bounded_text(kind, more, done)
            else:
                texts += [text for name, names in _FEW.items() if kinds == name for text in names]
                rest += [kind] if kinds not in _FEW else []
        for text in dict.fromkeys(texts):
            if not _ENDS.search(text):
                ways += [f"{_quoted(text + _MORE)} {more}"] if more else []
                ways += [_quoted(text + _LAST)] if done else []
        if rest:
            value = self._rule(_json(rest[0] if len(rest) == 1 else {"anyOf": rest}, self._definitions))
            ways += [f"{value} {_quoted(_MORE)} {more}"] if more else []
            ways += [f"{value} {_quoted(_LAST)}"] if done else []
        return " | ".join(ways)

    def _bounded_text(self, schema: dict[str, Any], more: str, done: bool) -> list[str]:
        parts = [schema, *schema.get("allOf", [])]
        terms = [f"/{Pattern(part['pattern']).body}/" for part in parts if "pattern" in part]
        if schema.keys() & {"minLength", "maxLength"}:
            terms.append(f"/(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})/")
        text = self._rule(" & ".join(["XML_TEXT", *terms]), terminal=True)
        ways = []
        for follows, suffix in ((more, _MORE), ("", _LAST)):
            if follows or (suffix is _LAST and done):
                name = f"{self._prefix}_{len(self.rules)}"
                self.rules.append(f"{name}[suffix={_quoted(suffix)}]: {text}\n")
                ways.append(f"{name} {follows}")
        return ways


def _writable(key: str) -> bool:
    return not re.search("[<>\n]", key) and key != ""


def _json(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """JSON for a schema, with the definitions that it refers to, directly or indirectly."""
    found, new = dict[str, Any](), set(_REFERENCE.findall(json.dumps(schema)))
    while new:
        found |= {key: definitions[key] for key in new if key in definitions}
        new = set(_REFERENCE.findall(json.dumps(found))) - found.keys() & definitions.keys()
    style: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    whole = {key: value for key, value in schema.items() if key != "$defs"} | ({"$defs": found} if found else {})
    if _has_open_object(whole):
        # llguidance distinguishes other keys from the listed ones by their spelling: each character gets one spelling.
        style["json_allowed_escapes"] = 'nrbtf\\"'
    return f"%json {json.dumps({**whole, 'x-guidance': style})}"


def _has_open_object(schema: Any) -> bool:
    if isinstance(schema, list):
        return any(map(_has_open_object, schema))
    if not isinstance(schema, dict):
        return False
    named = isinstance(schema.get("properties"), dict) or isinstance(schema.get("patternProperties"), dict)
    return (named and schema.get("additionalProperties", True) is not False) or any(
        map(_has_open_object, schema.values())
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
