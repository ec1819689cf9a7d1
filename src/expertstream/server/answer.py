"""The base of answers in all APIs: it turns the engine's pieces into stream events and collects the complete answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from ..responses import GenerationResponse, GenerationStats
from ..text.family import Parser
from ..text.output import CallDelta, CallEnd, CallStart, Content, Event, Reasoning

__all__ = ["Answer"]


class Answer(ABC):
    """One answer. Subclasses translate the parser's events to their API: the on_… methods return wire events."""

    def __init__(self, parser: Parser, one_call: bool) -> None:
        self._parser, self._one_call = parser, one_call
        self.stats: GenerationStats | None = None
        self.ended: str | None = None  # "stop" or "length", once the engine has finished
        self.complete = False  # further output of the model is ignored
        self.calls = 0  # complete function calls
        self.reasoning_tokens = 0

    def feed(self, piece: GenerationResponse) -> list[dict[str, Any]]:
        """The events for one piece from the engine."""
        self.stats = piece.stats
        self.ended = piece.finish_reason or self.ended
        events = self._parser.feed(piece.text)
        self.reasoning_tokens += bool(events) and isinstance(events[0], Reasoning)
        return self._wire(events)

    def finish(self) -> list[dict[str, Any]]:
        """The last events."""
        found = [] if self.complete else self._wire(self._parser.finish(self.ended == "length"))
        return [*found, *self.on_end()]

    @property
    def called(self) -> bool:
        """Whether the answer ended with function calls rather than at the length limit."""
        return self.calls > 0 and (self.ended != "length" or self.complete)

    def _wire(self, events: list[Event]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for event in events:
            if self.complete:
                break
            match event:
                case Reasoning(text):
                    found += self.on_reasoning(text)
                case Content(text):
                    found += self.on_content(text)
                case CallStart(_, name):
                    found += self.on_call(name)
                case CallDelta(_, json):
                    found += self.on_arguments(json)
                case CallEnd(_, name, arguments, complete):
                    found += self.on_call_end(name, arguments, complete)
                    self.calls += complete
                    self.complete = self._one_call and complete
        return found

    @abstractmethod
    def on_reasoning(self, text: str) -> list[dict[str, Any]]:
        """More reasoning text."""

    @abstractmethod
    def on_content(self, text: str) -> list[dict[str, Any]]:
        """More of the answer's text."""

    @abstractmethod
    def on_call(self, name: str) -> list[dict[str, Any]]:
        """A call begins."""

    @abstractmethod
    def on_arguments(self, json: str) -> list[dict[str, Any]]:
        """The next part of the call's arguments."""

    @abstractmethod
    def on_call_end(self, name: str, arguments: dict[str, Any], complete: bool) -> list[dict[str, Any]]:
        """The call ends; `complete` is false if the length limit cut it off."""

    @abstractmethod
    def on_end(self) -> list[dict[str, Any]]:
        """The answer ends."""
