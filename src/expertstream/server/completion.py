"""OpenAI's wire format: completions, whole or as a stream of chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..responses import GenerationResponse, GenerationStats, TokenLogprob
from ..text.family import Parser
from .answer import Answer

__all__ = ["ChatAnswer", "Completion", "TextAnswer", "chat_logprob", "error_body"]


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in the API's format."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Completion:
    """The common parts of the answers to one chat or completion request: id, time, model and usage."""

    def __init__(self, model: str, prompt_tokens: int, chat: bool) -> None:
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created, self.model, self.prompt_tokens = int(time.time()), model, prompt_tokens
        self._whole, self._chunk = ("chat.completion", "chat.completion.chunk") if chat else ("text_completion",) * 2

    def usage(self, answers: Sequence[ChatAnswer | TextAnswer]) -> dict[str, Any]:
        """Usage of all answers to one request; the prompt counts once."""
        stats = [a.stats for a in answers if a.stats is not None]
        completion = sum(a.generated_tokens for a in answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": stats[0].cached_tokens if stats else 0},
            "completion_tokens_details": {"reasoning_tokens": sum(a.reasoning_tokens for a in answers)},
        }

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(self._chunk), "choices": [choice]}

    def heartbeat(self, answers: Sequence[ChatAnswer | TextAnswer]) -> dict[str, Any]:
        """An empty chunk, so that clients do not time out."""
        return self.chunk(answers[0].nothing())

    def usage_chunk(self, answers: Sequence[ChatAnswer | TextAnswer]) -> dict[str, Any]:
        return {**self._head(self._chunk), "choices": [], "usage": self.usage(answers)}

    def whole(self, answers: Sequence[ChatAnswer | TextAnswer]) -> dict[str, Any]:
        return {**self._head(self._whole), "choices": [a.choice() for a in answers], "usage": self.usage(answers)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class ChatAnswer(Answer):
    """One answer of a chat; its events are choices of chunks."""

    def __init__(self, index: int, parser: Parser, one_call: bool) -> None:
        super().__init__(parser, one_call)
        self.index = index
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._unsent: list[dict[str, Any]] = []  # log-probabilities of tokens whose text is still held back

    def begin(self) -> dict[str, Any]:
        return self._choice({"role": "assistant", "content": ""})

    def nothing(self) -> dict[str, Any]:
        return {"index": self.index, "delta": {}, "logprobs": None, "finish_reason": None}

    @property
    def generated_tokens(self) -> int:
        return self.stats.generated_tokens if self.stats is not None else 0

    def feed(self, piece: GenerationResponse) -> list[dict[str, Any]]:
        if piece.logprob is not None:
            entry = chat_logprob(piece.logprob)
            self._logprobs.append(entry)
            self._unsent.append(entry)
        return super().feed(piece)

    def on_reasoning(self, text: str) -> list[dict[str, Any]]:
        self._reasoning.append(text)
        return [self._choice({"reasoning_content": text})]

    def on_content(self, text: str) -> list[dict[str, Any]]:
        self._content.append(text)
        return [self._choice({"content": text})]

    def on_call(self, name: str) -> list[dict[str, Any]]:
        head = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        self._calls.append({**head, "function": {"name": name, "arguments": ""}})
        started = {"index": len(self._calls) - 1, **head, "function": {"name": name, "arguments": ""}}
        return [self._choice({"tool_calls": [started]})]

    def on_arguments(self, json: str) -> list[dict[str, Any]]:
        self._calls[-1]["function"]["arguments"] += json
        part = {"index": len(self._calls) - 1, "function": {"arguments": json}}
        return [self._choice({"tool_calls": [part]})]

    def on_call_end(self, name: str, arguments: dict[str, Any], complete: bool) -> list[dict[str, Any]]:
        return []

    def on_end(self) -> list[dict[str, Any]]:
        return [self._choice({}, self.finish_reason)]

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self.called else self.ended or "stop"

    def _choice(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        unsent, self._unsent = self._unsent, []
        logprobs = {"content": unsent, "refusal": None} if unsent else None
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
    """One continuation of a text. echo: the prompt's text, repeated before it. only_prompt: the engine had to generate a token that the
    client did not ask for."""

    reasoning_tokens = 0

    def __init__(self, index: int, echo: str = "", only_prompt: bool = False) -> None:
        self.index, self._echo, self._only_prompt = index, echo, only_prompt
        self.stats: GenerationStats | None = None
        self.complete = False
        self.ended: str | None = None
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._sent = 0  # characters of the text whose tokens have been reported

    @property
    def generated_tokens(self) -> int:
        return self.stats.generated_tokens if self.stats is not None and not self._only_prompt else 0

    def nothing(self) -> dict[str, Any]:
        return {"index": self.index, "text": "", "logprobs": None, "finish_reason": None}

    def feed(self, piece: GenerationResponse) -> list[dict[str, Any]]:
        """The choice of a chunk, or an empty list."""
        self.stats = piece.stats
        echo, self._echo = self._echo, ""
        fresh = list(piece.prompt_logprobs or ())
        text = echo
        if self._only_prompt:
            self.ended, self.complete = "length", True
        else:
            self.ended = piece.finish_reason or self.ended
            text += piece.text
            fresh += [piece.logprob] if piece.logprob is not None else []
        self._text.append(text)
        begin = len(self._logprobs)
        self._logprobs += fresh
        return [self._choice(text, begin, None)] if text or fresh else []

    def finish(self) -> list[dict[str, Any]]:
        return [self._choice("", len(self._logprobs), self.ended or "stop")]

    def choice(self) -> dict[str, Any]:
        return self._choice("".join(self._text), 0, self.ended or "stop")

    def _choice(self, text: str, begin: int, ended: str | None) -> dict[str, Any]:
        logprobs = _text_logprobs(self._logprobs, begin)
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": ended}


def chat_logprob(found: TokenLogprob) -> dict[str, Any]:
    """A token's entry in the chat API's format; `bytes` are the token's own, even if they are only part of a character."""

    def entry(token: str, logprob: float | None, raw: bytes) -> dict[str, Any]:
        return {"token": token, "logprob": _finite(logprob), "bytes": list(raw)}

    top = [entry(*likely, raw) for likely, raw in zip(found.top_logprobs, found.top_raw, strict=True)]
    return {**entry(found.token, found.logprob, found.raw), "top_logprobs": top}


def _text_logprobs(found: Sequence[TokenLogprob], begin: int) -> dict[str, Any] | None:
    """Log-probabilities of the tokens from `begin` on."""
    if begin >= len(found):
        return None
    offsets, raw = [], b""
    for token in found:
        # A token that ends a character begins where the character does.
        offsets.append(len(raw.decode("utf-8", "ignore")))
        raw += token.raw
    part = found[begin:]
    return {
        "tokens": [_shown(p.raw) for p in part],
        "token_logprobs": [None if p.logprob is None else _finite(p.logprob) for p in part],
        "top_logprobs": [
            {_shown(raw): _finite(logprob) for raw, (_, logprob) in zip(p.top_raw, p.top_logprobs, strict=True)} or None
            for p in part
        ],
        "text_offset": offsets[begin:],
    }


def _shown(raw: bytes) -> str:
    """A token's text; if it is only part of a character, its bytes as OpenAI's API writes them, so that all tokens look different."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float | None) -> float:
    return max(logprob if logprob is not None else 0.0, -9999.0)
