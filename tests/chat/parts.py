"""What the tests of chat share: a view that notes, a backend with a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expertstream.chat.backends import Answered
from expertstream.chat.conversation import Chat
from expertstream.chat.sessions import Conversation, SessionStore


class Recorder:
    """A view that notes what it is shown."""

    def __init__(self, consents: bool = True) -> None:
        self.notes: list[str] = []
        self.asked: list[str] = []
        self.outputs: list[str] = []
        self.text = self.thought = ""
        self._consents = consents

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def answer(self, fold: bool) -> Iterator[Recorder]:
        self.text = self.thought = ""
        yield self

    def progress(self, done: int, total: int) -> None:
        assert 0 < done <= total

    def reasoning(self, text: str) -> None:
        self.thought += text

    def content(self, text: str) -> None:
        self.text += text

    def consent(self, what: str) -> bool:
        self.asked.append(what)
        return self._consents

    def output(self, text: str) -> None:
        self.outputs.append(text)

    def replay(self, messages: Any) -> None:
        self.notes.append(f"replayed {len(messages)}")


class Script:
    """A backend that says what it is told to."""

    name, about = "script", "a script"

    def __init__(self, *turns: list[Any]) -> None:
        self.turns, self.heard = list(turns), list[Any]()
        self.forgotten: list[Any] = []

    def forget(self, messages: Any) -> None:
        self.forgotten.append(messages)

    def reply(self, messages: Any, tools: Any, thinking: bool, progress: Any) -> Iterator[Any]:
        self.heard.append((json.loads(json.dumps(messages)), [t["function"]["name"] for t in tools], thinking))
        for event in self.turns.pop(0):
            if isinstance(event, BaseException):
                raise event
            yield event
        yield Answered(10, 4, 3, 0.1, 5.0, 0.5)


def chat_of(tmp_path: Path, backend: Any, **options: Any) -> tuple[Chat, Recorder]:
    view = options.pop("view", None) or Recorder()
    return Chat(backend, SessionStore(tmp_path / "sessions"), Conversation("one"), view, **options), view
