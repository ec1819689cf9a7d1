"""A conversation from any API as the messages that chat templates take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import RequestError
from ..text.arguments import complete_json, parse_json

__all__ = ["Conversation", "call_arguments", "not_shown"]


@dataclass
class Conversation:
    """Collects messages in order; messages() returns them for a template."""

    _entries: list[dict[str, Any]] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)  # names of the called functions, by call id

    def system(self, text: str) -> None:
        """Instructions of the system or the developer, at any position."""
        self._entries.append({"role": "system", "content": text})

    def user(self, text: str) -> None:
        self._entries.append({"role": "user", "content": text})

    def assistant(self, text: str, reasoning: str | None = None) -> None:
        """A message of the assistant; call() adds its calls."""
        entry: dict[str, Any] = {"role": "assistant", "content": text}
        if reasoning is not None:
            entry["reasoning_content"] = reasoning
        self._entries.append(entry)

    def extend(self, text: str = "", reasoning: str | None = None) -> None:
        """Adds to the assistant's current turn."""
        entry = self._turn()
        entry["content"] += text
        if reasoning is not None:
            entry["reasoning_content"] = entry.get("reasoning_content", "") + reasoning

    def call(self, call_id: str, name: str, arguments: Any) -> None:
        """Adds a function call to the assistant's current turn."""
        function = {"name": name, "arguments": call_arguments(arguments)}
        call = {"type": "function", "function": function} | ({"id": call_id} if call_id else {})
        self._turn().setdefault("tool_calls", []).append(call)
        if call_id:
            self._names[call_id] = name

    def tool(self, call_id: str, text: str) -> None:
        """Adds the result of a function call."""
        entry = {"role": "tool", "content": text}
        if call_id:
            entry["tool_call_id"] = call_id
        if call_id in self._names:
            entry["name"] = self._names[call_id]
        self._entries.append(entry)

    def _turn(self) -> dict[str, Any]:
        if not self._entries or self._entries[-1]["role"] != "assistant":
            self.assistant("")
        return self._entries[-1]

    def take_prefill(self) -> str:
        """If the last message is the assistant's, removes and returns it: the answer continues it. Raises RequestError if it has more than
        text, or is the only message."""
        if not self._entries or self._entries[-1]["role"] != "assistant":
            return ""
        last = self._entries.pop()
        if set(last) != {"role", "content"} or not self._entries:
            raise RequestError(
                "the last message is the assistant's and has more than text; end with a user message or a tool result"
            )
        return str(last["content"]).rstrip()

    def messages(self) -> list[dict[str, Any]]:
        return list(self._entries)


def call_arguments(value: Any) -> dict[str, Any]:
    """A call's arguments in history as an object, from whatever the client sent: an object, its JSON text, truncated JSON, or nothing.
    Anything else becomes an object with the single key "arguments"."""
    found = value
    if isinstance(value, str):
        if not value.strip():
            return {}
        try:
            found = parse_json(value)
        except (ValueError, RecursionError):
            try:
                found = complete_json(value)
            except (ValueError, RecursionError):
                found = value
        if isinstance(found, str) and found != value:  # JSON in JSON
            return call_arguments(found)
    if found is None:
        return {}
    return found if isinstance(found, dict) else {"arguments": found}


def not_shown(what: str, title: str = "") -> str:
    """The placeholder in history for content that a text model cannot read."""
    return f"[{what}{f' {title!r}' if title else ''} omitted: this model reads text only]"
