"""OpenAI's wire format: requests checked, answers put together. What is not supported is refused, never ignored."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import RequestError
from .stream import Content, Event, FunctionCall, Reasoning

__all__ = ["ChatRequest", "Completion", "error_body", "parse_request"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class CalledFunction(_Strict):
    name: str
    arguments: str


class ToolCall(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(_Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: Literal[False] | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class StreamOptions(_Strict):
    include_usage: bool = False


class TextFormat(_Strict):
    type: Literal["text"]


class TemplateOptions(_Strict):
    enable_thinking: bool = False


class ChatRequest(_Strict):
    """POST /v1/chat/completions. `user` and `metadata` say who asks and change nothing, as they do there."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    model: str = ""
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Literal[1] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: TextFormat | None = None
    chat_template_kwargs: TemplateOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    def template_messages(self) -> list[dict[str, Any]]:
        """As chat templates want them. Raises RequestError."""
        found = []
        for i, message in enumerate(self.messages):
            content = message.content
            text = content if isinstance(content, str) else "".join(part.text for part in content or ())
            role = "system" if message.role == "developer" else message.role
            entry: dict[str, Any] = {"role": role, "content": text}
            if message.reasoning_content is not None:
                entry["reasoning_content"] = message.reasoning_content
            if message.tool_calls:
                entry["tool_calls"] = [
                    {"type": "function", "function": {"name": c.function.name, "arguments": _arguments(i, c)}}
                    for c in message.tool_calls
                ]
            found.append(entry)
        return found

    def schemas(self) -> list[dict[str, Any]]:
        """The functions that may be called."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude={"function": {"strict"}}) for tool in self.tools or ()]

    def sampling(self) -> dict[str, Any]:
        """Keywords of LLM.sampling_params()."""
        return {
            "max_tokens": self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens,
            "temperature": self.temperature, "top_p": self.top_p, "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty, "seed": self.seed, "stop": self.stop,
        }  # fmt: skip


def _arguments(message: int, call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(f"messages.{message}: the arguments of {call.function.name} are not a JSON object")
    return arguments


def parse_request(body: bytes) -> ChatRequest:
    """Raises RequestError that names the field."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "function-")))
        what = "is not supported" if first["type"] == "extra_forbidden" else first["msg"]
        raise RequestError(f"{where or 'body'}: {what}") from None


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error in the API's shape."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Completion:
    """One answer, as a whole and as chunks."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self.id, self.created, self.model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def deltas(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """Notes the events, and returns what each adds to the message."""
        found: list[dict[str, Any]] = []
        for event in events:
            if isinstance(event, Content):
                self._content.append(event.text)
                found.append({"content": event.text})
            elif isinstance(event, Reasoning):
                self._reasoning.append(event.text)
                found.append({"reasoning_content": event.text})
            else:
                call = self._call(event)
                found.append({"tool_calls": [{"index": len(self._calls), **call}]})
                self._calls.append(call)
        return found

    def _call(self, event: FunctionCall) -> dict[str, Any]:
        arguments = json.dumps(event.arguments, ensure_ascii=False)
        return {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": event.name, "arguments": arguments},
        }

    def finish_reason(self, ended: str) -> str:
        return "tool_calls" if self._calls and ended == "stop" else ended

    @property
    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage}

    def whole(self, ended: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._content) or None, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = self._calls
        else:
            message["content"] = message["content"] or ""
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason(ended)}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}
