"""Converts messages to a form that the chat templates of all families accept.

Templates refuse, or silently drop, a system message that is not the first; some refuse a conversation without a user message. Clients
send both. No text is dropped, and each change depends only on the messages before it, so that the prompt of a later turn begins like the
prompt of this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["standard_messages"]

_SEPARATOR = "\n\n"
Message = dict[str, Any]


def standard_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages with at most one system message, the first: those at the beginning are joined, later ones become user text in their place
    (after the results, if they are between calls and their results). Results are in the order of their calls, because templates do not
    name them, and clients send them as they arrive. There is always a user message. Messages whose content is not text are left
    unchanged."""
    messages, leading = _in_order_of_calls(messages), 0
    while leading < len(messages) and messages[leading].get("role") == "system":
        leading += 1
    found: list[Message] = []
    if leading == 1:
        found.append(messages[0])
    elif leading:
        found.append(
            {**messages[0], "content": _SEPARATOR.join(str(m.get("content") or "") for m in messages[:leading])}
        )
    rest = messages[leading:]
    if all(message.get("role") not in ("user", "system") for message in rest):
        found.append({"role": "user", "content": ""})
    waiting: list[str] = []  # system texts, until they can be placed
    late = False  # the last message consists of them
    open_calls = 0
    for message in rest:
        role = message.get("role")
        if role == "system":
            waiting.append(str(message.get("content") or ""))
        elif role == "user" and late and isinstance(message.get("content"), str):
            found[-1] = {**message, "content": found[-1]["content"] + _SEPARATOR + message["content"]}
            late = False
        else:
            found.append(message)
            late = False
            open_calls = open_calls - 1 if role == "tool" else len(message.get("tool_calls") or ())
        if waiting and open_calls <= 0:
            late = _place(found, _SEPARATOR.join(waiting)) or late
            waiting.clear()
    if waiting:
        _place(found, _SEPARATOR.join(waiting))
    return found


def _in_order_of_calls(messages: Sequence[Message]) -> list[Message]:
    found: list[Message] = []
    order: dict[Any, int] = {}  # ids of the calls that are being answered
    for message in messages:
        if message.get("role") == "assistant":
            order = {call["id"]: i for i, call in enumerate(message.get("tool_calls") or ()) if call.get("id")}
        at = len(found)
        if message.get("role") == "tool" and message.get("tool_call_id") in order:
            mine = order[message["tool_call_id"]]
            while (
                at and found[at - 1].get("role") == "tool" and order.get(found[at - 1].get("tool_call_id"), -1) > mine
            ):
                at -= 1
        found.insert(at, message)
    return found


def _place(found: list[Message], text: str) -> bool:
    """Adds system text to the end of the user message before it, or as a new user message, which returns True."""
    last = found[-1] if found else {}
    if last.get("role") == "user" and isinstance(last.get("content"), str):
        found[-1] = {**last, "content": last["content"] + (_SEPARATOR if last["content"] else "") + text}
        return False
    found.append({"role": "user", "content": text})
    return True
