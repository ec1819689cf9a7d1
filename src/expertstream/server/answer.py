"""What the answers of all APIs have in common: fed with the engine's pieces, they give their stream's events, and in the end the whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from ..responses import GenerationResponse, GenerationStats
from ..text.family import Parser
from ..text.output import CallDelta, CallEnd, CallStart, Content, Event, Reasoning

__all__ = ["Answer"]


class Answer(ABC):
    """One answer. Subclasses say what each of the parser's events is in their API: the on_… methods return wire events."""

    def __init__(self, parser: Parser, one_call: bool) -> None:
        self._parser, self._one_call = parser, one_call
        self.stats: GenerationStats | None = None
        self.ended: str | None = None  # "stop" or "length", once the engine has ended it
        self.complete = False  # nothing more is wanted, whatever the model would go on to say
        self.calls = 0  # function calls that are whole
        self.reasoning_tokens = 0

    def feed(self, piece: GenerationResponse) -> list[dict[str, Any]]:
        """The events that one piece of the engine's makes."""
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
        """The answer ended with function calls, not by its length."""
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
        """Reasoning goes on."""

    @abstractmethod
    def on_content(self, text: str) -> list[dict[str, Any]]:
        """The answer's text goes on."""

    @abstractmethod
    def on_call(self, name: str) -> list[dict[str, Any]]:
        """A call begins."""

    @abstractmethod
    def on_arguments(self, json: str) -> list[dict[str, Any]]:
        """The next part of its arguments."""

    @abstractmethod
    def on_call_end(self, name: str, arguments: dict[str, Any], complete: bool) -> list[dict[str, Any]]:
        """It ends; not complete if the answer's length cut it."""

    @abstractmethod
    def on_end(self) -> list[dict[str, Any]]:
        """The answer ends."""
