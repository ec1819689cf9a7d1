"""Saved conversations: one JSON file each, in the user's data folder."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from ..errors import RequestError
from ..files import private_folder, read_text, write_private

__all__ = ["Conversation", "SessionStore"]


@dataclass
class Conversation:
    """messages: as in OpenAI's API, without the system prompt."""

    name: str
    system: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    model: str = ""
    begun: float = field(default_factory=time.time)
    changed: float = 0.0

    def prompt(self) -> list[dict[str, Any]]:
        """All messages, the system prompt first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def undo(self) -> str | None:
        """Removes the last user message and everything after it; returns its text."""
        for i in range(len(self.messages) - 1, -1, -1):
            if self.messages[i]["role"] == "user":
                said = str(self.messages[i]["content"])
                del self.messages[i:]
                return said
        return None

    def markdown(self) -> str:
        """The conversation as Markdown."""
        parts = [f"# {self.name}\n"]
        if self.system:
            parts.append(f"*{self.system}*\n")
        for message in self.messages:
            parts.append(f"**{message['role']}**\n\n{message.get('content') or ''}\n")
            for call in message.get("tool_calls") or ():
                function = call["function"]
                parts.append(f"```\n{function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})\n```\n")
        return "\n".join(parts)


class SessionStore:
    """A folder of conversations. Several processes may use it: none overwrites changes that it has not loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[str, tuple[int, int]] = {}  # files as this store last read or wrote them

    def path(self, name: str) -> Path:
        """Raises RequestError for an invalid name."""
        if not re.fullmatch(r"[\w][\w .-]{0,79}", name):
            raise RequestError(
                f"a session name must be at most 80 letters, digits, spaces, dots and dashes; got {name!r}"
            )
        return self.folder / f"{name}.json"

    def save(self, conversation: Conversation) -> str | None:
        """Returns the previous name if another process has changed the session of that name: that file is left alone, and this conversation
        gets a new name. Raises RequestError."""
        before = conversation.name
        conversation.changed = time.time()
        path = self.path(before)
        try:
            with self._locked():
                for number in range(2, 1000):
                    path = self.path(conversation.name)
                    if (found := _signature(path)) is None or found == self._seen.get(conversation.name):
                        break
                    conversation.name = f"{before[:75]} {number}"
                temporary = path.with_name(f".{path.name}.{os.getpid()}")
                # A lone surrogate becomes \udxxx, its JSON escape.
                text = json.dumps(asdict(conversation), ensure_ascii=False, indent=1)
                write_private(temporary, text.encode("utf-8", "backslashreplace"))
                temporary.replace(path)
                self._note(conversation.name)
        except OSError as error:
            raise RequestError(f"{path}: cannot be written: {error.strerror}") from None
        return before if conversation.name != before else None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        private_folder(self.folder)
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _note(self, name: str) -> None:
        if (found := _signature(self.path(name))) is not None:
            self._seen[name] = found

    def load(self, name: str) -> Conversation:
        """Raises RequestError."""
        self._note(name)  # before reading: a concurrent write counts as not seen
        return self._read(name)

    def _read(self, name: str) -> Conversation:
        path = self.path(name)
        try:
            found = Conversation(**json.loads(read_text(path)))
            if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in found.messages):
                raise ValueError("invalid messages")
            found.name = name  # the file may have been renamed
            return found
        except FileNotFoundError:
            raise RequestError(f"there is no session {name!r}; /sessions lists them") from None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise RequestError(f"{path}: not a session: {error}") from None

    def names(self) -> list[str]:
        """Newest first."""
        files = sorted(self.folder.glob("*.json"), key=lambda f: f.stat().st_mtime, reverse=True)
        return [f.stem for f in files]

    def listing(self) -> list[str]:
        """Newest first: name, number of messages and first words, separated by tabs."""
        lines = []
        for name in self.names():
            try:
                messages = self._read(name).messages
            except RequestError:
                lines.append(f"{name}\tcannot be read")
                continue
            begin = next((str(m.get("content")) for m in messages if m["role"] == "user"), "")
            lines.append(f"{name}\t{len(messages)} messages\t{shorten(begin, 60, placeholder='…')}")
        return lines

    def rename(self, conversation: Conversation, name: str) -> None:
        """Raises RequestError if the name is taken."""
        target, old = self.path(name), self.path(conversation.name)
        try:
            with self._locked():
                if target.exists():
                    raise RequestError(f"a session {name!r} already exists")
                seen = self._seen.pop(conversation.name, None)
                if seen is not None and _signature(old) == seen:  # otherwise another process has changed it
                    old.replace(target)
                    self._note(name)
        except OSError as error:
            raise RequestError(f"{target}: cannot be written: {error.strerror}") from None
        conversation.name = name
        self.save(conversation)

    def delete(self, name: str) -> None:
        """Raises RequestError if there is no such session."""
        try:
            self.path(name).unlink()
        except FileNotFoundError:
            raise RequestError(f"there is no session {name!r}; /sessions lists them") from None


def _signature(path: Path) -> tuple[int, int] | None:
    """Identifies a version of a file; None if there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
