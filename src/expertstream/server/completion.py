"""OpenAI's wire format: answers, as a whole and as chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..responses import GenerationResponse, GenerationStats, TokenLogprob
from .stream import Content, Event, Reasoning, Splitter

__all__ = ["ChatAnswer", "Completion", "TextAnswer", "error_body"]


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error in the API's shape."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Completion:
    """What the answers to one request have in common: of a chat, or of a text that is gone on from."""

    def __init__(self, model: str, prompt_tokens: int, chat: bool) -> None:
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created, self.model, self.prompt_tokens = int(time.time()), model, prompt_tokens
        self._whole, self._chunk = ("chat.completion", "chat.completion.chunk") if chat else ("text_completion",) * 2

    def usage(self, stats: Sequence[GenerationStats]) -> dict[str, Any]:
        """Of all answers to one request; the prompt counts once."""
        completion = sum(s.generated_tokens for s in stats)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": stats[0].cached_tokens if stats else 0},
        }

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(self._chunk), "choices": [choice]}

    def usage_chunk(self, stats: Sequence[GenerationStats]) -> dict[str, Any]:
        return {**self._head(self._chunk), "choices": [], "usage": self.usage(stats)}

    def whole(self, answers: Sequence[ChatAnswer | TextAnswer]) -> dict[str, Any]:
        usage = self.usage([a.stats for a in answers if a.stats is not None])
        return {**self._head(self._whole), "choices": [a.choice() for a in answers], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class ChatAnswer:
    """One answer of a chat: fed with pieces, it gives chunks' choices, and in the end the whole."""

    def __init__(self, index: int, splitter: Splitter, one_call: bool) -> None:
        self.index, self._splitter, self._one_call = index, splitter, one_call
        self.stats: GenerationStats | None = None
        self._ended = "stop"
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._untold: list[dict[str, Any]] = []  # log-probabilities of tokens whose text is still held back
        self.complete = False  # nothing more is wanted, whatever the model would go on to say

    def begin(self) -> dict[str, Any]:
        return self._choice({"role": "assistant", "content": ""})

    def feed(self, piece: GenerationResponse) -> list[dict[str, Any]]:
        self.stats = piece.stats
        self._ended = piece.finish_reason or self._ended
        if piece.logprob is not None:
            entry = _chat_logprob(piece.logprob)
            self._logprobs.append(entry)
            self._untold.append(entry)
        return self._events(self._splitter.feed(piece.text))

    def finish(self) -> list[dict[str, Any]]:
        found = [] if self.complete else self._events(self._splitter.finish(self._ended == "length"))
        return [*found, self._choice({}, self.finish_reason)]

    def _events(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        found = []
        for event in events:
            if self.complete:
                break
            if isinstance(event, Content):
                self._content.append(event.text)
                found.append(self._choice({"content": event.text}))
            elif isinstance(event, Reasoning):
                self._reasoning.append(event.text)
                found.append(self._choice({"reasoning_content": event.text}))
            else:
                call = {
                    "id": f"call_{uuid.uuid4().hex[:24]}",
                    "type": "function",
                    "function": {"name": event.name, "arguments": json.dumps(event.arguments, ensure_ascii=False)},
                }
                found.append(self._choice({"tool_calls": [{"index": len(self._calls), **call}]}))
                self._calls.append(call)
                self.complete = self._one_call
        return found

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self._calls and (self._ended == "stop" or self.complete) else self._ended

    def _choice(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        untold, self._untold = self._untold, []
        logprobs = {"content": untold, "refusal": None} if untold else None
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def choice(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._content), "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = self._calls
            message["content"] = message["content"] or None
        logprobs = {"content": self._logprobs, "refusal": None} if self._logprobs else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}


class TextAnswer:
    """One continuation of a text."""

    complete = False

    def __init__(self, index: int) -> None:
        self.index = index
        self.stats: GenerationStats | None = None
        self._ended = "stop"
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    def feed(self, piece: GenerationResponse) -> list[dict[str, Any]]:
        self.stats = piece.stats
        self._ended = piece.finish_reason or self._ended
        self._text.append(piece.text)
        fresh = [piece.logprob] if piece.logprob is not None else []
        self._logprobs += fresh
        return [self._choice(piece.text, fresh, None)] if piece.text or fresh else []

    def finish(self) -> list[dict[str, Any]]:
        return [self._choice("", [], self._ended)]

    def choice(self) -> dict[str, Any]:
        return self._choice("".join(self._text), self._logprobs, self._ended)

    def _choice(self, text: str, logprobs: Sequence[TokenLogprob], ended: str | None) -> dict[str, Any]:
        return {"index": self.index, "text": text, "logprobs": _text_logprobs(logprobs), "finish_reason": ended}


def _chat_logprob(found: TokenLogprob) -> dict[str, Any]:
    def entry(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": max(logprob, -9999.0), "bytes": list(token.encode())}

    return {**entry(found.token, found.logprob), "top_logprobs": [entry(*top) for top in found.top_logprobs]}


def _text_logprobs(found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not found:
        return None
    return {
        "tokens": [p.token for p in found],
        "token_logprobs": [max(p.logprob, -9999.0) for p in found],
        "top_logprobs": [{text: max(logprob, -9999.0) for text, logprob in p.top_logprobs} for p in found],
        "text_offset": None,
    }
