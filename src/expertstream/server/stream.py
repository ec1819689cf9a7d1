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
from math import isfinite
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
    _schemas: dict[str, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self._state = _State.REASONING if self.reasoning else _State.START
        functions = [tool.get("function", tool) for tool in self.tools]
        self._schemas = {f["name"]: f.get("parameters") or {} for f in functions}

    def feed(self, text: str) -> list[Event]:
        """The next piece of what the model writes, control tokens included."""
        self._text += text
        return self._drain(final=False)

    def finish(self) -> list[Event]:
        """The end. A call that is whole but for its closing tag counts; any other beginning of one is content, so that nothing is lost."""
        events = self._drain(final=True)
        if self._state is _State.CALL:
            events += self._call(self._text, closed=False)
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
        found = _xml_call(body) or _json_call(body)
        if found is None:
            self._fresh = False
            return [Content(_CALL + body + (_END_CALL if closed else ""))]
        name, given = found
        properties = self._schemas.get(name, {}).get("properties", {})
        typed = {
            key: typed_argument(value, properties.get(key, {})) if isinstance(value, str) else value
            for key, value in given.items()
        }
        return [FunctionCall(name, typed)]


def _xml_call(body: str) -> tuple[str, dict[str, Any]] | None:
    match = _XML.fullmatch(body)
    if match is None:
        return None
    inner, at, arguments = match[2], 0, {}
    while parameter := _PARAMETER.match(inner, at):
        # A value stands on lines of its own; the line ends around it are not part of it.
        arguments[parameter[1]] = parameter[2].removeprefix("\n").removesuffix("\n")
        at = parameter.end()
    return None if inner[at:].strip() else (match[1].strip(), arguments)


def _json_call(body: str) -> tuple[str, dict[str, Any]] | None:
    try:
        call = json.loads(body)
        arguments = call["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (call["name"], arguments) if isinstance(call.get("name"), str) and isinstance(arguments, dict) else None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def typed_argument(value: str, schema: dict[str, Any]) -> Any:
    """The value as its JSON schema wants it, where it can be read so; else the text, for the function to complain of."""
    kinds = _kinds(schema)
    if not kinds or ("string" in kinds and (len(kinds) == 1 or value != "null")):
        return value
    try:
        parsed = json.loads(_PYTHON.get(value.strip(), value), parse_constant=_no_number)
    except (ValueError, RecursionError):
        return value
    if isinstance(parsed, float) and not isfinite(parsed):
        return value
    kind = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", str: "string"}.get(
        type(parsed), "null"
    )
    if kind == "number" and "number" not in kinds and parsed == int(parsed):
        parsed, kind = int(parsed), "integer"
    return parsed if kind in kinds or (kind == "integer" and "number" in kinds) else value


def _kinds(schema: dict[str, Any]) -> set[str]:
    """The types that a schema allows; none if it does not say."""
    kind = schema.get("type")
    kinds = {kind} if isinstance(kind, str) else set(kind) if isinstance(kind, list) else set()
    for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        kinds |= _kinds(choice) if isinstance(choice, dict) else set()
    if not kinds:
        names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
        kinds = {names[type(v)] for v in schema.get("enum", ()) if type(v) in names}
    return kinds
