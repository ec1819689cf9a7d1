"""The format of gpt-oss: messages in channels, <|channel|>analysis<|message|>…<|end|>, and JSON calls to="functions.NAME"."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from .arguments import complete_json, parse_json
from .output_base import CallDelta, CallEnd, CallStart, Content, Event, Reasoning

__all__ = ["HarmonyParser", "harmony_messages"]

_MESSAGE = "<|message|>"
_MARKERS = (_MESSAGE, "<|start|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")
_MARK = re.compile("|".join(map(re.escape, _MARKERS)))
_CHANNEL, _RECIPIENT = re.compile(r"<\|channel\|>\s*(\w+)"), re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."
_HEADS = ("<|channel|>", "<|start|>", "to=", "assistant")  # how a header may begin


class HarmonyParser:
    """Parses model output after <|start|>assistant into events. in_answer: the prompt ends inside the final message. A call's arguments
    are emitted when it ends. Decisions depend only on the text, never on how it is split into pieces."""

    def __init__(self, in_answer: bool = False) -> None:
        self._text, self._header = "", True
        self._fresh = True  # nothing read yet
        self._kind: type[Reasoning | Content] | str = Content  # of the current message; a call's function name
        self._call: list[str] = []
        self._index = 0
        self._answered = False  # content was emitted: the next content message starts a new paragraph
        if in_answer:
            self._header = self._fresh = False

    def feed(self, text: str) -> list[Event]:
        """Takes the next piece of output, control tokens included."""
        self._text += text
        return self._read(final=False)

    def finish(self, cut: bool = False) -> list[Event]:
        """Ends the input. A call with complete arguments counts; unfinished parts are emitted as far as they go."""
        events = self._read(final=True)
        if self._header:
            rest, self._text = self._text, ""
            return events + (
                [Content(rest)] if rest.strip() and not cut and not rest.lstrip().startswith(_HEADS) else []
            )
        events += self._body(self._text)
        self._text = ""
        return events + self._end_message(cut)

    def _read(self, final: bool) -> list[Event]:
        events: list[Event] = []
        while True:
            if self._header:
                if self._fresh:
                    begin = self._text.lstrip()
                    if not begin.startswith(_HEADS):
                        if any(head.startswith(begin) for head in _HEADS) and not final:
                            return events
                        self._header = False  # the model ignores the format: everything is content
                        self._fresh = False
                        continue
                at = self._text.find(_MESSAGE)
                if at < 0:
                    return events
                self._begin_message(self._text[:at])
                self._text = self._text[at + len(_MESSAGE) :]
                continue
            mark = _MARK.search(self._text)
            if mark is None:
                kept = 0 if final else _partial(self._text)
                events += self._body(self._text[: len(self._text) - kept])
                self._text = self._text[len(self._text) - kept :]
                return events
            events += self._body(self._text[: mark.start()])
            events += self._end_message(False)
            self._text = self._text[mark.start() if mark[0] in _HEADS else mark.end() :]

    def _begin_message(self, header: str) -> None:
        self._header = self._fresh = False
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if recipient is not None and recipient[1] not in ("assistant", "user"):
            self._kind, self._call = recipient[1].removeprefix(_FUNCTIONS), []
        else:
            self._kind = Reasoning if channel is not None and channel[1] == "analysis" else Content

    def _body(self, text: str) -> list[Event]:
        if not text:
            return []
        if isinstance(self._kind, str):
            self._call.append(text)
            return []
        if self._kind is Reasoning:
            return [Reasoning(text)]
        if self._answered:
            text = "\n\n" + text
        self._answered = False
        return [Content(text)]

    def _end_message(self, cut: bool) -> list[Event]:
        kind, self._header = self._kind, True
        self._kind = Content
        if not isinstance(kind, str):
            self._answered = self._answered or kind is Content
            return []
        written, self._call = "".join(self._call), []
        arguments = _arguments(written)
        if arguments is None and not cut:
            return [Content(written)] if written.strip() else []
        index = self._index
        self._index += 1
        text = written if arguments is None else json.dumps(arguments, ensure_ascii=False)
        given: list[Event] = [CallDelta(index, text)] if text else []
        return [CallStart(index, kind), *given, CallEnd(index, kind, arguments or {}, arguments is not None)]


def _arguments(text: str) -> dict[str, Any] | None:
    """The arguments in a call's text, repaired if necessary; None if it is not an object."""
    if not text.strip():
        return {}
    for read in (parse_json, complete_json):
        with suppress(ValueError, RecursionError):
            found = read(text)
            if isinstance(found, dict):
                return found
    return None


def _partial(text: str) -> int:
    """The number of characters at the end that may begin a marker."""
    at = text.rfind("<")
    return len(text) - at if at >= 0 and any(marker.startswith(text[at:]) for marker in _MARKERS) else 0


def harmony_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the form of gpt-oss's template: reasoning is `thinking`, and each message has one call, followed by its result."""
    found: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        message = dict(messages[at])
        at += 1
        reasoning = message.pop("reasoning_content", None)
        if message.get("role") != "assistant":
            found.append(message)
            continue
        calls = message.pop("tool_calls", None) or []
        if not calls:
            found.append(message if reasoning is None else {**message, "thinking": reasoning})
            continue
        results = []
        while at < len(messages) and messages[at].get("role") == "tool":
            results.append(messages[at])
            at += 1
        said = message.get("content") or ""
        for i, call in enumerate(calls):
            # Before a call, the template takes content or reasoning, not both.
            before = (
                {"content": said} if said else {"content": "", "thinking": reasoning} if reasoning else {"content": ""}
            )
            found.append({**message, **(before if i == 0 else {"content": ""}), "tool_calls": [call]})
            found += results[i : i + 1]
        found += results[len(calls) :]
    return found
