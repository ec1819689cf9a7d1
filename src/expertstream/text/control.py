"""Keeps control tokens out of message content.

A tokenizer turns `<|im_end|>` into a control token wherever it occurs, so a message that contains these characters could end its own turn
and begin another one. Content is therefore marked before a template sees it: a break is inserted after the first character of everything
that would be read as a control token. The rendered prompt is split at the breaks and its parts are tokenized separately, so no control
token is found across them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["REASONING_TAGS", "ChatPrompt", "ControlText"]

# Templates look for these in earlier assistant messages, to leave out the reasoning.
REASONING_TAGS = frozenset(["<think>", "</think>"])
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # never assigned to a character


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered prompt. No control token spans two of its parts."""

    parts: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def __add__(self, other: ChatPrompt) -> ChatPrompt:
        """One prompt; tokens may span the boundary between the two."""
        return ChatPrompt((*self.parts[:-1], self.parts[-1] + other.parts[0], *other.parts[1:]))


class ControlText:
    """Marks content for a tokenizer with these control tokens. One instance per prompt: `content` is everything that will be marked, so
    that a break that does not occur in it can be chosen."""

    def __init__(self, tokens: Collection[str], content: Any) -> None:
        texts = list(_strings(content))
        used = {char for text in texts for char in _NONCHARACTERS if char in text}
        free = [char for char in _NONCHARACTERS if char not in used]
        # Content with all 32 of them is not text: removing one of them does no harm.
        self._break, self._strip = (free[0], False) if free else (_NONCHARACTERS[0], True)
        self._tokens = [t for t in tokens if len(t) > 1]
        self._patterns: dict[frozenset[str], re.Pattern[str] | None] = {}
        self._beginnings = {t[:n] for t in self._tokens for n in range(1, len(t))}
        self._longest = max(map(len, self._tokens), default=0)

    def mark(self, value: Any, exempt: frozenset[str] = frozenset()) -> Any:
        """The value with a break in every control token, including dict keys; `exempt` tokens are left unchanged."""
        if isinstance(value, str):
            return self._mark(value, exempt)
        if isinstance(value, dict):
            return {self.mark(k, exempt): self.mark(v, exempt) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(v, exempt) for v in value]
        return value

    def mark_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message with everything marked but its role, which is left to the template."""
        exempt = REASONING_TAGS if message.get("role") == "assistant" else frozenset[str]()
        return {
            k: v if k == "role" else self.mark(v, exempt if k == "content" else frozenset()) for k, v in message.items()
        }

    def cut(self, rendered: str) -> ChatPrompt:
        return ChatPrompt(tuple(part for part in rendered.split(self._break) if part) or ("",))

    def _mark(self, text: str, exempt: frozenset[str]) -> str:
        if self._strip:
            text = text.replace(self._break, "")
        if exempt not in self._patterns:
            tokens = sorted((t for t in self._tokens if t not in exempt), key=len, reverse=True)
            self._patterns[exempt] = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        pattern = self._patterns[exempt]
        if pattern is None:
            return text
        pieces, begin = [], 0
        while match := pattern.search(text, begin):
            # Continue at the second character: the rest of one token may begin another.
            pieces.append(text[begin : match.start() + 1])
            begin = match.start() + 1
        pieces.append(text[begin:])
        marked = self._break.join(pieces)
        # The text that follows may complete a token that begins here.
        tail = text[-self._longest :]
        if any(tail[at:] in self._beginnings for at in range(len(tail))):
            marked += self._break
        return marked


def _strings(value: Any) -> Iterable[str]:
    open_ = [value]
    while open_:
        here = open_.pop()
        if isinstance(here, str):
            yield here
        elif isinstance(here, dict):
            open_ += [*here.keys(), *here.values()]
        elif isinstance(here, list | tuple):
            open_ += here
