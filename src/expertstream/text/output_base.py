"""What reading the formats of calls has in common: the text that is being read, the value in it, and the events of a call."""

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
    """A call ends. complete: the deltas add up to `arguments`, as json.dumps() writes them; else it broke off."""

    index: int
    name: str
    arguments: dict[str, Any]
    complete: bool


Event = Reasoning | Content | CallStart | CallDelta | CallEnd


def as_object(value: Any) -> dict[str, Any]:
    """What a client's schema says where an object belongs, or nothing."""
    return value if isinstance(value, dict) else {}


class CallReader(ABC):
    """A state machine over a text that comes in pieces. Each step is a method; what it cannot decide yet, it leaves for the next piece."""

    def __init__(self) -> None:
        self._schemas: dict[str, dict[str, Any]] = {}  # of each function's arguments
        self._step: Callable[[], bool] = self._prose  # does something, or returns False if it needs more text
        self._events: list[Event] = []
        self._text, self._at = "", 0  # what was not consumed yet begins at _at
        self._base = 0  # how many characters came before _text
        self._final = self._cut = False

        self._raw: list[str] = []  # of what may turn out to be no call: its text, without _value
        self._typed: Collection[str] = ()  # functions whose calls follow their schemas
        self._streaming = False  # the call's events are out already
        self._index, self._name, self._arguments, self._sent = 0, "", dict[str, Any](), 0
        self._key, self._schema = "", None  # of the value that is being read
        self._is_string = False  # whatever it is
        self._is_json = False  # it is streamed as it is written
        self._late = False  # arguments are told at the end of the call, since only all together say how each is read
        self._value: list[str] = []
        self._value_size = 0
        self._exit: int | None = None  # where in it the call may have ended, should no better end come

    @abstractmethod
    def _prose(self) -> bool:
        """The step outside of calls."""

    @abstractmethod
    def _call_failed(self, text: str) -> None:
        """What looked like a call is text."""

    @abstractmethod
    def _call_ended(self) -> None:
        """What follows is more calls or text."""

    # Reading

    def _ahead(self, tags: Collection[str], at: int | None = None) -> str | None:
        """The tag that comes next; "" if none does; None if the text ends before that is known."""
        at = self._at if at is None else at
        for tag in tags:
            if self._text.startswith(tag, at):
                return tag
        left = len(self._text) - at
        return None if any(left < len(t) and t.startswith(self._text[at:]) for t in tags) else ""

    def _named(self) -> str | None:
        """NAME of <tag=NAME>; "" if it is none; None if the text ends before that is known."""
        match = _NAMED.match(self._text, self._at)
        if match is None or match.end() == len(self._text):
            return None
        return match[1] if self._text[match.end()] == ">" else ""

    def _tail(self) -> int:
        """Where the beginning of a tag, cut off, begins at the end of the text."""
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
        """The value that is being read goes on up to there."""
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
        """The value ends after so many characters: the others are to be read again."""
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
        """is_json: a grammar holds it to JSON, so that it can be streamed as it is written."""
        self._key, self._schema, self._is_string, self._is_json = key, schema, is_string, is_json
        self._value, self._value_size, self._exit = [], 0, None
        if self._live and is_string:
            self._delta(self._head() + '"')

    @property
    def _live(self) -> bool:
        """Arguments are told as they are written."""
        return self._streaming and not self._late

    def _becomes_string(self) -> None:
        """What was written of the value is a string, and can be nothing else any more."""
        written = "".join(self._value)
        self._is_string = True
        self._delta(self._head() + json.dumps(written, ensure_ascii=False)[:-1])

    def _head(self) -> str:
        """The arguments' text between the value before and this one."""
        return ("{" if not self._arguments else ", ") + json.dumps(self._key, ensure_ascii=False) + ": "

    def _delta(self, text: str) -> None:
        if text:
            self._events.append(CallDelta(self._index, text))
            self._sent += len(text)

    def _give(self, value: Any) -> None:
        """The value is whole."""
        if self._live and not self._is_json:
            self._delta('"' if self._is_string else self._head() + json.dumps(value, ensure_ascii=False))
        elif not self._streaming:
            self._raw += self._value
        self._arguments[self._key] = value
        if self._live and self._is_json:  # it may be spelled in another way than ours
            self._sent = len(json.dumps(self._arguments, ensure_ascii=False)) - 1
        self._begin_value()

    def _end_part(self, text: str) -> None:
        """JSON that was streamed has not been ended: it stays as far as it came, or is closed."""
        if self._live and self._is_json:
            self._delta("" if self._cut else _closers(text))
            self._sent = len(json.dumps(self._arguments, ensure_ascii=False)) - 1

    def _end_call(self, complete: bool = True, in_string: bool = False) -> bool:
        """in_string: the last argument is a string that was not ended."""
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
        """Not a call after all: it is told as the text that it is. What was streamed already is ended."""
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
    """What closes JSON that was not ended: its string, its lists and objects."""
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
