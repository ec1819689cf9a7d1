"""Anthropic's wire format: an answer as a message, and as stream events."""

from __future__ import annotations

import uuid
from typing import Any

from ..text.family import Parser
from .answer import Answer

__all__ = ["MessageAnswer", "error_event"]


class MessageAnswer(Answer):
    """One answer; its events are the API's."""

    def __init__(self, model: str, prompt_tokens: int, parser: Parser, one_call: bool) -> None:
        super().__init__(parser, one_call)
        self.id, self.model, self._prompt_tokens = f"msg_{uuid.uuid4().hex[:24]}", model, prompt_tokens
        self._blocks: list[dict[str, Any]] = []
        self._open = False  # the last block is still open

    def begin(self) -> list[dict[str, Any]]:
        message = {**self.whole(), "content": [], "stop_reason": None, "stop_sequence": None}
        return [{"type": "message_start", "message": message}]

    def on_reasoning(self, text: str) -> list[dict[str, Any]]:
        return self._text(text, "thinking", "thinking_delta")

    def on_content(self, text: str) -> list[dict[str, Any]]:
        return self._text(text, "text", "text_delta")

    def on_call(self, name: str) -> list[dict[str, Any]]:
        found = self._close()
        block = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {}}
        self._blocks.append(block)
        self._open = True
        return [*found, self._start(dict(block))]

    def on_arguments(self, json: str) -> list[dict[str, Any]]:
        return [self._delta({"type": "input_json_delta", "partial_json": json})]

    def on_call_end(self, name: str, arguments: dict[str, Any], complete: bool) -> list[dict[str, Any]]:
        self._blocks[-1]["input"] = arguments
        return self._close()

    def on_end(self) -> list[dict[str, Any]]:
        whole = self.whole()
        delta = {"stop_reason": whole["stop_reason"], "stop_sequence": whole["stop_sequence"]}
        return [
            *self._close(), {"type": "message_delta", "delta": delta, "usage": whole["usage"]}, {"type": "message_stop"},
        ]  # fmt: skip

    def _text(self, text: str, kind: str, delta: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if not self._open or self._blocks[-1]["type"] != kind:
            found += self._close()
            block = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            self._blocks.append(block)
            found.append(self._start(dict(block)))
            self._open = True
        self._blocks[-1][kind] += text
        return [*found, self._delta({"type": delta, kind: text})]

    def _start(self, block: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        if not self._open:
            return []
        self._open = False
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def whole(self) -> dict[str, Any]:
        """The message so far, or the complete one."""
        stop, cached, generated = "", 0, 0
        if self.stats is not None:
            stop, cached, generated = self.stats.stop_string, self.stats.cached_tokens, self.stats.generated_tokens
        ended = {"stop": "stop_sequence" if stop else "end_turn", "length": "max_tokens"}[self.ended or "stop"]
        usage = {
            "input_tokens": self._prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": generated,
        }
        return {
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": self._blocks,
            "stop_reason": "tool_use" if self.called else ended, "stop_sequence": stop or None, "usage": usage,
        }  # fmt: skip


def error_event(message: str, kind: str, details: dict[str, Any] | None = None) -> dict[str, Any]:
    """An error in this API's format, as a body and as an event."""
    return {"type": "error", "error": {"type": kind, "message": message} | ({"details": details} if details else {})}
