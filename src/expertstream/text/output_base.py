"""The common base of the call parsers: the text being parsed, the current value, and the events of a call."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

__all__ = ["TAGS", "CallDelta", "CallEnd", "CallReader", "CallStart", "Content", "Event", "Reasoning", "as_object"]

TAGS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>"
)  # fmt: skip
_SPACE = re.compile(r"\s*")
_NAMED = re.compile(r"<\w+=([^>\n]*)")


@dataclass(frozen=True)
class Reasoning:
    """The next part of the reasoning."""

    text: str


@dataclass(frozen=True)
class Content:
    """The next part of the answer."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins; calls are numbered from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class CallDelta:
    """The next part of the arguments' JSON text."""

    index: int
    json: str


@dataclass(frozen=True)
class CallEnd:
    """A call ends. complete: the deltas add up to `arguments`, as json.dumps() writes them; otherwise the call was cut off."""

    index: int
    name: str
    arguments: dict[str, Any]
    complete: bool


Event = Reasoning | Content | CallStart | CallDelta | CallEnd


def as_object(value: Any) -> dict[str, Any]:
    """The value if it is an object, otherwise an empty one; schemas of clients are not validated."""
    return value if isinstance(value, dict) else {}


class CallReader(ABC):
    """A state machine over streamed text. Each step is a method, which leaves what it cannot decide yet for the next piece."""

    def __init__(self) -> None:
        self._schemas: dict[str, dict[str, Any]] = {}  # of each function's arguments
        self._step: Callable[[], bool] = self._prose  # makes progress, or returns False if it needs more text
        self._events: list[Event] = []
        self._text, self._at = "", 0  # unconsumed text begins at _at
        self._base = 0  # the number of characters before _text
        self._final = self._cut = False

        self._raw: list[str] = []  # the text of a call that may turn out not to be one, without _value
        self._typed: Collection[str] = ()  # functions whose calls are constrained to their schemas
        self._streaming = False  # the call's events are emitted as it is written
        self._index, self._name, self._arguments, self._sent = 0, "", dict[str, Any](), 0
        self._key, self._schema = "", None  # of the current value
        self._is_string = False  # whatever its text is
        self._is_json = False  # streamed as it is written
        self._late = False  # arguments are emitted at the end of the call, because their types depend on each other
        self._value: list[str] = []
        self._value_size = 0
        self._exit: int | None = None  # where in it the call may have ended, if no better end follows

    @abstractmethod
    def _prose(self) -> bool:
        """The step outside calls."""

    @abstractmethod
    def _call_failed(self, text: str) -> None:
        """Handles text that only looked like a call."""

    @abstractmethod
    def _call_ended(self) -> None:
        """Prepares for more calls or text."""

    # Reading

    def _ahead(self, tags: Collection[str], at: int | None = None) -> str | None:
        """The next tag; "" if there is none; None if the text ends before that is known."""
        at = self._at if at is None else at
        for tag in tags:
            if self._text.startswith(tag, at):
                return tag
        left = len(self._text) - at
        return None if any(left < len(t) and t.startswith(self._text[at:]) for t in tags) else ""

    def _named(self) -> str | None:
        """NAME of <tag=NAME>; "" if it is not a tag; None if the text ends before that is known."""
        match = _NAMED.match(self._text, self._at)
        if match is None or match.end() == len(self._text):
            return None
        return match[1] if self._text[match.end()] == ">" else ""

    def _tail(self) -> int:
        """Where an incomplete tag begins at the end of the text."""
        at = self._text.rfind("<", max(self._at, len(self._text) - 12))
        return at if at >= 0 and any(tag.startswith(self._text[at:]) for tag in TAGS) else len(self._text)

    def _take(self, end: int) -> None:
        if not self._streaming:
            self._raw.append(self._text[self._at : end])
        self._at = end

    def _skip_space(self) -> None:
        match = _SPACE.match(self._text, self._at)
        if match and match[0]:
            self._take(match.end())

    def _grow(self, end: int) -> None:
        """Extends the current value up to `end`."""
        if end > self._at:
            self._add(self._text[self._at : end])
            self._at = end

    def _add(self, piece: str) -> None:
        self._value.append(piece)
        self._value_size += len(piece)
        if self._live and self._is_string:
            self._delta(json.dumps(piece, ensure_ascii=False)[1:-1])
        elif self._live and self._is_json:
            self._delta((self._head() if len(self._value) == 1 else "") + piece)

    def _go_back(self, size: int) -> None:
        """Ends the value after `size` characters; the others are read again."""
        value = "".join(self._value)
        self._value = [value[:size]]
        self._unread(value[size:])

    def _unread(self, last: str) -> None:
        if self._at >= len(last):
            self._at -= len(last)
        else:
            self._base += self._at - len(last)
            self._text, self._at = last + self._text[self._at :], 0

    # Calls

    def _begin_call(self, name: str, streaming: bool, late: bool = False) -> None:
        self._name, self._arguments, self._sent, self._streaming, self._late = name, {}, 0, streaming, late
        if streaming:
            self._events.append(CallStart(self._index, name))

    def _begin_value(self, key: str = "", schema: Any = None, is_string: bool = False, is_json: bool = False) -> None:
        """is_json: a grammar constrains it to JSON, so it can be streamed as it is written."""
        self._key, self._schema, self._is_string, self._is_json = key, schema, is_string, is_json
        self._value, self._value_size, self._exit = [], 0, None
        if self._live and is_string:
            self._delta(self._head() + '"')

    @property
    def _live(self) -> bool:
        """Whether arguments are emitted as they are written."""
        return self._streaming and not self._late

    def _becomes_string(self) -> None:
        """The value so far can only be a string."""
        written = "".join(self._value)
        self._is_string = True
        self._delta(self._head() + json.dumps(written, ensure_ascii=False)[:-1])

    def _head(self) -> str:
        """The arguments' text between the previous value and this one."""
        return ("{" if not self._arguments else ", ") + json.dumps(self._key, ensure_ascii=False) + ": "

    def _delta(self, text: str) -> None:
        if text:
            self._events.append(CallDelta(self._index, text))
            self._sent += len(text)

    def _give(self, value: Any) -> None:
        """The value is complete."""
        if self._live and not self._is_json:
            self._delta('"' if self._is_string else self._head() + json.dumps(value, ensure_ascii=False))
        elif not self._streaming:
            self._raw += self._value
        self._arguments[self._key] = value
        if self._live and self._is_json:  # it may be spelled differently than by json.dumps()
            self._sent = len(json.dumps(self._arguments, ensure_ascii=False)) - 1
        self._begin_value()

    def _end_part(self, text: str) -> None:
        """Streamed JSON is incomplete: it is left as it is, or closed."""
        if self._live and self._is_json:
            self._delta("" if self._cut else _closers(text))
            self._sent = len(json.dumps(self._arguments, ensure_ascii=False)) - 1

    def _end_call(self, complete: bool = True, in_string: bool = False) -> bool:
        """in_string: the last argument is an unterminated string."""
        text = json.dumps(self._arguments, ensure_ascii=False)
        if self._cut and not complete:
            text = text[: -2 if in_string else -1] if self._arguments else ""
        if not self._streaming:
            self._events.append(CallStart(self._index, self._name))
        self._delta(text[self._sent :])
        self._events.append(CallEnd(self._index, self._name, self._arguments, complete))
        self._index, self._sent, self._streaming, self._raw = self._index + 1, 0, False, []
        self._begin_value()
        self._call_ended()
        return True

    def _fail(self) -> bool:
        """Not a call: it is emitted as plain text. If it has been streamed, it is ended."""
        if self._streaming:
            return self._end_call(False)
        text = "".join([*self._raw, *self._value])
        self._leave()
        self._call_failed(text)
        return True

    def _nameless(self) -> bool:
        """The text ended before the call had a name."""
        self._grow(len(self._text))
        if not self._cut:
            return self._fail()
        self._leave()
        return True

    def _leave(self) -> None:
        self._raw, self._step = [], self._prose
        self._begin_value()


def _closers(text: str) -> str:
    """The text that closes incomplete JSON: its string, its lists and objects."""
    closers, in_string, escaped = list[str](), False, False
    for char in text:
        if in_string:
            in_string, escaped = escaped or char != '"', char == "\\" and not escaped
        elif char == '"':
            in_string = True
        elif char in "[{":
            closers.append("]" if char == "[" else "}")
        elif char in "]}" and closers:
            closers.pop()
    return '"' * in_string + "".join(reversed(closers))
