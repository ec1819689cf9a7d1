"""What a model writes, piece by piece, as reasoning, content and function calls. No HTTP here.

Reasoning lies in <think>…</think>. A call lies in <tool_call>…</tool_call>, in one of the family's two formats: XML,
<function=NAME><parameter=KEY>VALUE</parameter>…</function>, or JSON, {"name": …, "arguments": {…}}. Wherever the text is cut into pieces,
the events add up to the same: what could be the beginning of a tag is held back until it is one or cannot be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from math import copysign, isfinite
from sys import float_info
from typing import Any

__all__ = ["Content", "Event", "FunctionCall", "Reasoning", "Splitter", "typed_argument"]


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class FunctionCall:
    """A whole call; arguments have the types that the function's schema gives them."""

    name: str
    arguments: dict[str, Any]


Event = Reasoning | Content | FunctionCall

_THINK, _END_THINK, _CALL, _END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"
_XML = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.S)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>\s*", re.S)

_PYTHON = {"True": "true", "False": "false", "None": "null"}  # what models write that have read much Python


class _State(Enum):
    START = auto()  # nothing but white space so far
    REASONING = auto()
    CONTENT = auto()
    CALL = auto()


@dataclass
class Splitter:
    """`tools`: the request's schemas, by which arguments are typed. `reasoning`: the prompt ends inside <think>."""

    tools: Sequence[dict[str, Any]] = ()
    reasoning: bool = False
    _state: _State = field(init=False)
    _text: str = field(init=False, default="")  # not yet told: a tag may be in it, or a call is being written
    _fresh: bool = field(init=False, default=True)  # white space at the beginning of reasoning or content is dropped
    _space: str = field(init=False, default="")  # before a call, and dropped if it is one
    _schemas: dict[str, dict[str, Any]] = field(init=False)  # of each function's arguments

    def __post_init__(self) -> None:
        self._state = _State.REASONING if self.reasoning else _State.START
        functions = [tool.get("function", tool) for tool in self.tools]
        self._schemas = {f["name"]: _object(f.get("parameters")) for f in functions}

    def feed(self, text: str) -> list[Event]:
        """The next piece of what the model writes, control tokens included."""
        self._text += text
        return self._drain(final=False)

    def finish(self, cut: bool = False) -> list[Event]:
        """The end. A call that is whole but for its closing tag counts; any other beginning of one is content, so that nothing is lost,
        or nothing, if the text was cut at its greatest length."""
        events = self._drain(final=True)
        if self._state is _State.CALL:
            found = self._call(self._text, closed=False)
            events += [event for event in found if not (cut and isinstance(event, Content))]
            self._text = ""
        return events

    def _drain(self, final: bool) -> list[Event]:
        events: list[Event] = []
        while True:
            if self._state is _State.CALL:
                end = self._text.find(_END_CALL)
                if end < 0:
                    return events
                body, self._text = self._text[:end], self._text[end + len(_END_CALL) :]
                self._state, self._fresh = _State.CONTENT, True
                events += self._call(body, closed=True)
                continue
            tags = self._tags()
            places = [(at, tag) for tag in tags if (at := self._text.find(tag)) >= 0]
            if places:
                at, tag = min(places)
                before = self._text[:at]
                if tag == _THINK and before.strip():
                    # Too late to be reasoning: it is what somebody writes about tags.
                    self._state = _State.CONTENT
                    continue
                events += self._tell(before.rstrip())
                self._space = "" if self._fresh else before[len(before.rstrip()) :]
                self._text = self._text[at + len(tag) :]
                self._enter(tag)
                continue
            keep = 0 if final else self._held(tags)
            ready, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
            events += self._tell(ready.rstrip() if final else ready)
            return events

    def _tags(self) -> tuple[str, ...]:
        if self._state is _State.REASONING:
            return (_END_THINK,)
        return (_THINK, _CALL) if self._state is _State.START else (_CALL,)

    def _enter(self, tag: str) -> None:
        self._fresh = True
        self._state = {_THINK: _State.REASONING, _END_THINK: _State.CONTENT, _CALL: _State.CALL}[tag]

    def _held(self, tags: Sequence[str]) -> int:
        """How many characters at the end may belong to what comes: the beginning of a tag, and white space before it."""
        for at in range(max(0, len(self._text) - max(map(len, tags)) + 1), len(self._text)):
            if any(tag.startswith(self._text[at:]) for tag in tags):
                break
        else:
            at = len(self._text)
        return len(self._text) - len(self._text[:at].rstrip())

    def _tell(self, text: str) -> list[Event]:
        if self._fresh:
            text = text.lstrip()
        if not text:
            return []
        self._fresh = False
        if self._state is _State.REASONING:
            return [Reasoning(text)]
        self._state = _State.CONTENT
        return [Content(text)]

    def _call(self, body: str, closed: bool) -> list[Event]:
        """A call, or what was meant to be one as the text that it is."""
        found = self._xml_call(body) or _json_call(body)
        if found is None:
            self._fresh = False
            return [Content(self._space + _CALL + body + (_END_CALL if closed else ""))]
        return [FunctionCall(*found)]

    def _xml_call(self, body: str) -> tuple[str, dict[str, Any]] | None:
        match = _XML.fullmatch(body)
        if match is None:
            return None
        name, inner, at, arguments = match[1].strip(), match[2], 0, dict[str, Any]()
        schema = self._schemas.get(name, {})
        properties = _object(schema.get("properties"))
        while parameter := _PARAMETER.match(inner, at):
            # A value stands on lines of its own; the line ends around it are not part of it.
            value = parameter[2].removeprefix("\n").removesuffix("\n")
            arguments[parameter[1]] = typed_argument(value, properties.get(parameter[1]), schema)
            at = parameter.end()
        return None if inner[at:].strip() else (name, arguments)


def _json_call(body: str) -> tuple[str, dict[str, Any]] | None:
    try:
        call = _loads(body)
        arguments = call["arguments"]
        if isinstance(arguments, str):
            arguments = _loads(arguments)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (call["name"], arguments) if isinstance(call.get("name"), str) and isinstance(arguments, dict) else None


def _object(value: Any) -> dict[str, Any]:
    """What a client's schema says where an object belongs, or nothing."""
    return value if isinstance(value, dict) else {}


def _loads(text: str) -> Any:
    """JSON, without Python's NaN and Infinity; a number that is too large for a double becomes the largest. Raises ValueError,
    RecursionError."""
    found = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    if "\\ud" in text.lower():  # half of a surrogate pair is no text that could be sent on
        whole = json.dumps(found, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        found = json.loads(whole)
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if isfinite(number) else copysign(float_info.max, number)


def typed_argument(value: str, schema: Any, root: Any = None) -> Any:
    """The value as its JSON schema wants it, where it can be read so; else the text, for the function to complain of. root: what
    references in the schema are to."""
    kinds = _kinds(schema, _object(root))
    if not kinds or ("string" in kinds and (len(kinds) == 1 or value != "null")):
        return value
    try:
        parsed = _loads(_PYTHON.get(value.strip(), value))
    except (ValueError, RecursionError):
        return value
    kind = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", str: "string"}.get(
        type(parsed), "null"
    )
    if kind == "number" and "number" not in kinds and abs(parsed) < 2**53 and parsed == int(parsed):
        parsed, kind = int(parsed), "integer"
    return parsed if kind in kinds or (kind == "integer" and "number" in kinds) else value


def _kinds(schema: Any, root: dict[str, Any], depth: int = 0) -> set[str]:
    """The types that a schema allows; none if it does not say."""
    schema = _object(schema)
    if depth > 16:  # references in a circle
        return set()
    if isinstance(schema.get("$ref"), str):
        target: Any = root
        for part in schema["$ref"].removeprefix("#").split("/")[1:]:
            target = _object(target).get(part.replace("~1", "/").replace("~0", "~"))
        return _kinds(target, root, depth + 1)
    kind = schema.get("type")
    kinds = {kind} if isinstance(kind, str) else {k for k in _list(kind) if isinstance(k, str)}
    for choice in (*_list(schema.get("anyOf")), *_list(schema.get("oneOf"))):
        kinds |= _kinds(choice, root, depth + 1)
    if not kinds:
        names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
        kinds = {names[type(v)] for v in _list(schema.get("enum")) if type(v) in names}
    return kinds


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
