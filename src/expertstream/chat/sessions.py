"""Conversations that stay: one JSON file each, in the user's data folder."""

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
        """Takes the last thing that the user said, and what came of it, back; returns it."""
        for i in range(len(self.messages) - 1, -1, -1):
            if self.messages[i]["role"] == "user":
                said = str(self.messages[i]["content"])
                del self.messages[i:]
                return said
        return None

    def markdown(self) -> str:
        """For people to read."""
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
    """A folder of conversations. Several programs may use it: what one saved, another never overwrites unseen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[str, tuple[int, int]] = {}  # sessions as this store read or wrote them last

    def path(self, name: str) -> Path:
        """Raises RequestError for a name that is no file's."""
        if not re.fullmatch(r"[\w][\w .-]{0,79}", name):
            raise RequestError(
                f"a session's name is letters, digits, spaces, dots and dashes, 80 at most, not {name!r}"
            )
        return self.folder / f"{name}.json"

    def save(self, conversation: Conversation) -> str | None:
        """Returns the name that it had before, if another program went on with the session of that name: then that one stays as it is, and
        this one has a new name. Raises RequestError."""
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
                # Half of a surrogate pair becomes \udxxx, which is what JSON has for it.
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
        self._note(name)  # before it is read: what is written meanwhile has not been seen
        return self._read(name)

    def _read(self, name: str) -> Conversation:
        path = self.path(name)
        try:
            found = Conversation(**json.loads(read_text(path)))
            if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in found.messages):
                raise ValueError("messages are not messages")
            found.name = name  # whatever it was when the file was written
            return found
        except FileNotFoundError:
            raise RequestError(f"there is no session {name!r}; /sessions lists them") from None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise RequestError(f"{path}: not a session: {error}") from None

    def names(self) -> list[str]:
        """The newest first."""
        files = sorted(self.folder.glob("*.json"), key=lambda f: f.stat().st_mtime, reverse=True)
        return [f.stem for f in files]

    def listing(self) -> list[str]:
        """The newest first: name, how many messages, and how it begins, between tabs."""
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
        """Raises RequestError if there is one of that name already."""
        target, old = self.path(name), self.path(conversation.name)
        try:
            with self._locked():
                if target.exists():
                    raise RequestError(f"there is a session {name!r} already")
                ours = self._seen.pop(conversation.name, None)
                if ours is not None and _signature(old) == ours:  # otherwise it is another program's by now
                    old.replace(target)
                    self._note(name)
        except OSError as error:
            raise RequestError(f"{target}: cannot be written: {error.strerror}") from None
        conversation.name = name
        self.save(conversation)

    def delete(self, name: str) -> None:
        """Raises RequestError if there is none."""
        try:
            self.path(name).unlink()
        except FileNotFoundError:
            raise RequestError(f"there is no session {name!r}; /sessions lists them") from None


def _signature(path: Path) -> tuple[int, int] | None:
    """Of a file as it was written; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
