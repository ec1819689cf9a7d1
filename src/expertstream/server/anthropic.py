"""Anthropic's wire format: requests, checked, and answers as a message or as a stream's events. What is not supported is refused."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors import RequestError
from ..responses import GenerationResponse, GenerationStats
from .asks import Ask
from .openai import Strict
from .stream import Content, Event, Reasoning, Splitter

__all__ = ["CountRequest", "MessageAnswer", "MessagesRequest", "error_event"]


class CacheControl(Strict):
    """Where a prefix may be cached: it always is."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Strict):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: None = None


class ThinkingBlock(Strict):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: dict[str, Any] | None = None


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[TextBlock], Field(max_length=4096, fail_fast=True)] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class Message(Strict):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Field(max_length=4096, fail_fast=True)]

    def blocks(self) -> list[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock]:
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class Tool(Strict):
    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str = ""
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl | None = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None


class AutoChoice(Strict):
    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool = False


class NoChoice(Strict):
    type: Literal["none"]


class ToolChoice(Strict):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool = False


class Thinking(Strict):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: SchemaFormat | None = None


class Metadata(Strict):
    user_id: str | None = None


class CountRequest(Strict):
    """POST /v1/messages/count_tokens."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    model: str = ""
    system: str | Annotated[list[TextBlock], Field(max_length=256, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Annotated[AutoChoice | NoChoice | ToolChoice, Field(discriminator="type")] | None = None
    thinking: Thinking | None = None
    cache_control: CacheControl | None = None
    output_config: OutputConfig | None = None
    context_management: dict[str, Any] | None = None

    def sampling(self) -> dict[str, Any]:
        """Keywords of LLM.sampling_params()."""
        return {"max_tokens": 1}

    def ask(self) -> Ask:
        """Raises RequestError."""
        choice = self.tool_choice
        kinds = {None: "auto", "auto": "auto", "any": "required", "none": "none", "tool": "named"}
        messages, begun = self._messages()
        return Ask(
            messages=messages,
            sampling=self.sampling(),
            functions=[
                {"name": t.name, "description": t.description, "parameters": t.input_schema, "strict": t.strict}
                for t in self.tools or ()
            ],
            choice=kinds[choice.type if choice is not None else None],
            named=choice.name if isinstance(choice, ToolChoice) else "",
            parallel_calls=not getattr(choice, "disable_parallel_tool_use", False),
            thinking=self.thinking is not None and self.thinking.type != "disabled",
            json_schema=self.output_config.format.schema_ if self.output_config and self.output_config.format else None,
            begun=begun,
        )

    def _messages(self) -> tuple[list[dict[str, Any]], str]:
        """As templates want them, and the beginning of the answer, if the last message is the assistant's."""
        found: list[dict[str, Any]] = []
        system = _text(self.system or "")
        if system:
            found.append({"role": "system", "content": system})
        for i, message in enumerate(self.messages):
            if message.role == "user":
                found += _user_messages(i, message)
                continue
            entry: dict[str, Any] = {"role": "assistant", "content": ""}
            for block in message.blocks():
                if isinstance(block, TextBlock):
                    entry["content"] += block.text
                elif isinstance(block, ThinkingBlock):
                    entry["reasoning_content"] = entry.get("reasoning_content", "") + block.thinking
                elif isinstance(block, ToolUseBlock):
                    call = {"type": "function", "function": {"name": block.name, "arguments": block.input}}
                    entry.setdefault("tool_calls", []).append(call)
                else:
                    raise RequestError(f"messages.{i}: a tool_result belongs into a user's message")
            found.append(entry)
        if self.messages[-1].role == "user":
            return found, ""
        last = found.pop()
        if set(last) != {"role", "content"} or not found:
            raise RequestError("the last message is the assistant's: it can only be a text to go on from")
        return found, last["content"].rstrip()


def _user_messages(index: int, message: Message) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for block in message.blocks():
        if isinstance(block, ToolResultBlock):
            text = _text(block.content or "")
            found.append({"role": "tool", "content": f"Error: {text}" if block.is_error else text})
        elif not isinstance(block, TextBlock):
            raise RequestError(f"messages.{index}: a {block.type} block belongs into the assistant's message")
        elif found and found[-1]["role"] == "user":
            found[-1]["content"] += "\n" + block.text
        else:
            found.append({"role": "user", "content": block.text})
    return found


def _text(content: str | Sequence[TextBlock]) -> str:
    if isinstance(content, str):
        return content
    # A program of Anthropic's own puts a number before its system prompt that is another one in every request: not for models, and no
    # prompt would begin like the one before it.
    return "\n".join(block.text for block in content if not block.text.startswith("x-anthropic-billing-header:"))


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: Annotated[list[str], Field(max_length=16)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def sampling(self) -> dict[str, Any]:
        return {
            "max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k,
            "stop": self.stop_sequences or None,
        }  # fmt: skip


class MessageAnswer:
    """One answer: fed with pieces, it gives a stream's events, and in the end the message."""

    def __init__(self, model: str, prompt_tokens: int, splitter: Splitter, one_call: bool) -> None:
        self.id, self.model, self._prompt_tokens = f"msg_{uuid.uuid4().hex[:24]}", model, prompt_tokens
        self._splitter, self._one_call = splitter, one_call
        self.stats: GenerationStats | None = None
        self._ended: str | None = None
        self._blocks: list[dict[str, Any]] = []
        self._open = False  # the last block may go on
        self.complete = False

    def begin(self) -> list[dict[str, Any]]:
        message = {**self.whole(), "content": [], "stop_reason": None, "stop_sequence": None}
        return [{"type": "message_start", "message": message}]

    def feed(self, piece: GenerationResponse) -> list[dict[str, Any]]:
        self.stats = piece.stats
        self._ended = piece.finish_reason or self._ended
        return self._events(self._splitter.feed(piece.text))

    def finish(self) -> list[dict[str, Any]]:
        found = [] if self.complete else self._events(self._splitter.finish(self._ended == "length"))
        found += self._close()
        whole = self.whole()
        delta = {"stop_reason": whole["stop_reason"], "stop_sequence": whole["stop_sequence"]}
        return [*found, {"type": "message_delta", "delta": delta, "usage": whole["usage"]}, {"type": "message_stop"}]

    def _events(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for event in events:
            if self.complete:
                break
            if isinstance(event, Content):
                found += self._text(event.text, "text", "text_delta")
            elif isinstance(event, Reasoning):
                found += self._text(event.text, "thinking", "thinking_delta")
            else:
                found += self._close()
                block = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": event.name}
                self._blocks.append({**block, "input": event.arguments})
                found.append(self._start({**block, "input": {}}))
                arguments = json.dumps(event.arguments, ensure_ascii=False)
                found.append(self._delta({"type": "input_json_delta", "partial_json": arguments}))
                self._open = True
                found += self._close()
                self.complete = self._one_call
        return found

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
        stop, cached, generated = "", 0, 0
        if self.stats is not None:
            stop, cached, generated = self.stats.stop_string, self.stats.cached_tokens, self.stats.generated_tokens
        calls = any(block["type"] == "tool_use" for block in self._blocks)
        reason = "tool_use" if calls and (self._ended == "stop" or self.complete) else {
            "stop": "stop_sequence" if stop else "end_turn", "length": "max_tokens"
        }.get(self._ended or "stop")  # fmt: skip
        usage = {
            "input_tokens": self._prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": generated,
        }
        return {
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": self._blocks,
            "stop_reason": reason, "stop_sequence": stop or None, "usage": usage,
        }  # fmt: skip


def error_event(message: str, kind: str) -> dict[str, Any]:
    """An error in this API's shape, as a body and as an event."""
    return {"type": "error", "error": {"type": kind, "message": message}}
