"""OpenAI's wire format: requests, checked. What is not supported is refused, never ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import RequestError
from .asks import Ask

__all__ = ["ChatRequest", "CompletionRequest", "Strict", "parse_request"]

MOST_ANSWERS = 16


class Strict(BaseModel):
    """Refuses what it does not know."""

    model_config = ConfigDict(extra="forbid")


Request = TypeVar("Request", bound=Strict)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # as streams have it; some clients send it back


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=4096, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    audio: None = None
    function_call: None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedChoice(Strict):
    type: Literal["function"]
    function: NamedFunction


class StreamOptions(Strict):
    include_usage: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class JsonFormat(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class TemplateOptions(Strict):
    enable_thinking: bool = False


class _Sampling(Strict):
    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # says who asks, and changes nothing, as there

    def sampling(self) -> dict[str, Any]:
        """Keywords of LLM.sampling_params()."""
        return {
            "max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p,
            "presence_penalty": self.presence_penalty, "frequency_penalty": self.frequency_penalty, "seed": self.seed,
            "stop": self.stop or None,
        }  # fmt: skip

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    def sampling(self) -> dict[str, Any]:
        given = super().sampling()
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs: only with logprobs set to true")
        return {**given, "logprobs": (self.top_logprobs or 0) if self.logprobs else None}

    def ask(self) -> Ask:
        """Raises RequestError."""
        thinking = self.reasoning_effort not in (None, "none", "minimal")
        if self.chat_template_kwargs is not None:
            thinking = self.chat_template_kwargs.enable_thinking
        choice = self.tool_choice
        form = self.response_format
        return Ask(
            messages=self._messages(),
            sampling=self.sampling(),
            functions=[tool.function.model_dump() for tool in self.tools or ()],
            choice="named" if isinstance(choice, NamedChoice) else choice or "auto",
            named=choice.function.name if isinstance(choice, NamedChoice) else "",
            parallel_calls=self.parallel_tool_calls is not False,
            thinking=thinking,
            json_object=isinstance(form, JsonFormat),
            json_schema=form.json_schema.schema_ if isinstance(form, SchemaFormat) else None,
        )

    def _messages(self) -> list[dict[str, Any]]:
        found = []
        for i, message in enumerate(self.messages):
            role = "system" if message.role == "developer" else message.role
            entry: dict[str, Any] = {"role": role, "content": message.text()}
            if message.reasoning_content is not None:
                entry["reasoning_content"] = message.reasoning_content
            if message.tool_calls:
                entry["tool_calls"] = [
                    {"type": "function", "function": {"name": c.function.name, "arguments": _arguments(i, c)}}
                    for c in message.tool_calls
                ]
            found.append(entry)
        return found


class CompletionRequest(_Sampling):
    """POST /v1/completions: a text to go on from, or its tokens."""

    prompt: (
        str
        | Annotated[list[int], Field(max_length=1 << 20, fail_fast=True)]
        | Annotated[list[str], Field(min_length=1, max_length=16, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    def sampling(self) -> dict[str, Any]:
        given = super().sampling()
        return {**given, "max_tokens": 16 if self.max_tokens is None else self.max_tokens, "logprobs": self.logprobs}


def _arguments(message: int, call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(f"messages.{message}: the arguments of {call.function.name} are not a JSON object")
    return arguments


def parse_request(kind: type[Request], body: bytes) -> Request:
    """Raises RequestError that names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # Of what may be one thing or another, the error that lies deepest is the one that was meant.
        first = max(error.errors(include_url=False), key=lambda e: len(e["loc"]))
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "function-")))
        what = "is not supported" if first["type"] == "extra_forbidden" else first["msg"]
        raise RequestError(f"{where or 'body'}: {what}") from None
    except RecursionError:
        raise RequestError("body: too deeply nested") from None
