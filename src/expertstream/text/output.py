"""Parses streamed model output into reasoning, content and function calls.

Reasoning is in <think>…</think>, a call in <tool_call>…</tool_call>, in one of two formats, XML or JSON. Every decision depends only on the
text, never on how it is split into pieces: if it depends on the text that follows, the parser waits for that.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from enum import Enum, auto
from typing import Any

from .output_base import CallDelta, CallEnd, CallStart, Content, Event, Reasoning, as_object
from .output_json import JsonReader
from .output_xml import XmlReader

__all__ = ["CallDelta", "CallEnd", "CallStart", "Content", "Event", "OutputParser", "Reasoning"]

_TEXT_TAG = re.compile(r"</?think>|<tool_call>|<function=")


class _State(Enum):
    START = auto()  # only white space so far
    REASONING = auto()
    CONTENT = auto()


class OutputParser(XmlReader, JsonReader):
    """`tools`: the request's schemas, which give arguments their types. `reasoning`: the prompt ends inside <think>. `held`: a grammar
    constrains the model to well-formed calls, so they can be streamed as they are written. `typed`: the functions whose values it also
    constrains to their schemas: values that are not strings are JSON, and streamed as well."""

    def __init__(
        self,
        tools: Sequence[dict[str, Any]] = (),
        reasoning: bool = False,
        held: bool = False,
        typed: Collection[str] = (),
    ) -> None:
        super().__init__()
        self._typed = typed
        functions = [tool.get("function", tool) for tool in tools]
        self._schemas = {f["name"]: as_object(f.get("parameters")) for f in functions}
        self._openers = tuple(f"<function={name}>" for name in self._schemas)
        self._starts = tuple(t + o for o in self._openers or ("<function=",) for t in ("", "<tool_call>\n"))
        self._held = held
        self._pieces: list[str] = []  # not parsed yet
        self._pieces_size, self._patience = 0, 0

        self._state = _State.REASONING if reasoning else _State.START
        self._fresh = True  # white space at the beginning of reasoning or content is dropped
        self._space: list[str] = []  # white space that is dropped unless text follows
        self._unclosed = False  # a call occurred inside reasoning

    def feed(self, text: str) -> list[Event]:
        """Takes the next piece of output, control tokens included."""
        self._pieces.append(text)
        self._pieces_size += len(text)
        return self._drain() if self._pieces_size >= self._patience else []

    def finish(self, cut: bool = False) -> list[Event]:
        """Ends the input. A call that lacks only its closing tags counts. Other unfinished parts are emitted as far as they go if the text
        was cut at its maximum length; otherwise they are content, so that nothing is lost."""
        events = self._drain()  # of pieces not parsed yet
        self._final, self._cut = True, cut
        return events + self._drain()

    def _drain(self) -> list[Event]:
        self._text, self._at = self._text + "".join(self._pieces), 0
        self._pieces, self._pieces_size = [], 0
        while self._step():
            pass
        self._base += self._at
        self._text, self._at = self._text[self._at :], 0
        # A long undecided text is parsed again when it has doubled: linear time, however small the pieces.
        self._patience = len(self._text) if len(self._text) > 1024 else 0
        events, self._events = self._events, []
        return events

    def _prose(self) -> bool:
        mark = _TEXT_TAG.search(self._text, self._at)
        end = mark.start() if mark else self._tail()
        self._emit(self._text[self._at : end])
        self._at = end
        if mark is None:
            if self._final:
                rest, self._at = self._text[end:], len(self._text)
                self._emit("" if self._cut and len(rest) > 2 else rest)
            return False
        tag, reasoning = mark[0], self._state is _State.REASONING
        if tag == "<tool_call>":  # also inside reasoning: small models forget to close it
            self._block, self._step = True, self._block_start
            self._take(mark.end())
            return True
        if tag == "<function=" and not reasoning and (self._fresh or "".join(self._space[-1:]).endswith("\n")):
            found = self._ahead(self._openers)
            if found:
                self._block, self._step = False, self._function
                return True
            if found is None and (self._cut or not self._final):
                self._at = len(self._text) if self._final else self._at
                return False
        self._at = mark.end()
        if tag == "</think>" and (self._state is not _State.CONTENT or self._fresh):
            self._enter(_State.CONTENT)
        elif tag == "</think>" and self._unclosed:
            self._unclosed = False
        elif tag == "<think>" and self._fresh and self._state is not _State.CONTENT:
            self._enter(_State.REASONING)
        else:
            self._emit(tag)
        return True

    def _enter(self, state: _State) -> None:
        self._state, self._fresh, self._space = state, True, []

    def _emit(self, text: str) -> None:
        body = text.rstrip()
        if not body:
            if text and not self._fresh:
                self._space.append(text)
            return
        space = text[len(body) :]
        body = body.lstrip() if self._fresh else "".join([*self._space, body])
        self._fresh, self._space = False, [space] if space else []
        if self._state is _State.START:
            self._state = _State.CONTENT
        self._events.append(Reasoning(body) if self._state is _State.REASONING else Content(body))

    def _block_start(self) -> bool:
        self._skip_space()
        tag = self._ahead(("<function=", "{", "["))
        if tag is None:
            return self._final and self._nameless()
        if not tag:
            return self._fail()
        if tag == "<function=":
            self._step = self._function
        else:
            self._begin_json(may_stream=self._held and tag == "{")
        return True

    def _call_ended(self) -> None:
        self._unclosed |= self._state is _State.REASONING
        self._enter(_State.CONTENT)
        self._step = self._after

    def _call_failed(self, text: str) -> None:
        end = text.find("</think>") if self._state is _State.REASONING else -1
        if end >= 0:
            self._unread(text[end:])
        self._emit(text[:end] if end >= 0 else text)

    def _after(self) -> bool:
        self._skip_space()
        more = ("<function=", "{", "[", ",", "}", "]") if self._block else ()
        tag = self._ahead(("</tool_call>", "</function>", *more))
        if tag is None and not self._final:
            return False
        if tag in ("<function=", "{", "["):
            self._step = self._block_start
        elif tag == "</tool_call>":
            self._at += len(tag)
            self._leave()
        elif tag:  # a superfluous closing tag
            self._take(self._at + len(tag))
        else:
            self._fail()
        return True
