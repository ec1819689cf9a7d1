"""Anthropic's wire format: requests for messages, and for counting their tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors import RequestError
from .constrain import OutputFormat
from .conversation import Conversation, not_shown
from .openai import MAX_STOP_LENGTH, MAX_STOPS
from .request import GenerationRequest, thinking_variables
from .wire import Wire, check_part, ignored

__all__ = ["CountRequest", "MessagesRequest", "ThreadsUnsupportedError"]

_PREFIXES = "prefixes are always cached"
_HOSTED = "a service of the hosted API"
_THREADS = "with thread_unsupported_request; client libraries then send all messages"
_BILLING = "x-anthropic-billing-header:"


class ThreadsUnsupportedError(RequestError):
    """The client asked for a server-side conversation; on this error, its library sends all messages instead."""


class Block(Wire):
    """A block of a message's content; which fields it has depends on its type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str = ""
    name: str = ""
    input: Any = None
    tool_use_id: str = ""
    content: Any = None
    is_error: bool = False
    title: str | None = None
    context: str | None = None
    source: Any = None
    tool_name: str = ""
    server_name: str = ""
    cache_control: Any = ignored(_PREFIXES)
    citations: Any = ignored("documents are passed as text")
    signature: Any = ignored("reasoning is not signed")
    data: Any = ignored("only its author can read redacted_thinking")
    caller: Any = ignored("the model makes all calls")
    toolset: Any = ignored("the model makes all calls")


Content = str | Annotated[list[Block], Field(max_length=4096, fail_fast=True)]


class Message(Wire):
    role: Literal["user", "assistant", "system"]
    content: Content = ""
    cache_control: Any = ignored(_PREFIXES)


class Tool(Wire):
    """A function. Tools without a schema are skipped: the hosted API runs them (web_search_20250305) or defines their schema."""

    type: str = "custom"
    name: Annotated[str, Field(pattern=r"^[^\s<>\"'`=]{1,256}$")]
    description: str = ""
    input_schema: dict[str, Any]
    strict: bool = False
    cache_control: Any = ignored(_PREFIXES)
    defer_loading: Any = ignored("every tool is shown to the model")
    eager_input_streaming: Any = ignored("arguments are always streamed")
    input_examples: Any = ignored("the model sees the description instead")
    allowed_callers: Any = ignored("the model makes all calls")


class ToolChoice(Wire):
    type: Literal["auto", "any", "none", "tool"]
    name: str = ""
    disable_parallel_tool_use: bool = False


class Thinking(Wire):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Any = ignored("reasoning is sent in full")


class Format(Wire):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Wire):
    effort: str | None = None
    format: Format | None = None
    task_budget: Any = ignored(_HOSTED)


class CountRequest(Wire):
    """POST /v1/messages/count_tokens."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    model: str = ""
    max_tokens: int | None = None
    system: Content = ""
    tools: Annotated[list[dict[str, Any]], Field(max_length=1024, fail_fast=True)] = []
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: Format | None = None
    stream: bool = False
    stop_sequences: list[str] = []
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    thread: Any = Field(default=None, json_schema_extra={"x-effect": "declined", "x-why": _THREADS})
    cache_control: Any = ignored(_PREFIXES)
    metadata: Any = ignored("this server has no user accounts")
    service_tier: Any = ignored("all requests are treated the same")
    speed: Any = ignored("all requests are treated the same")
    container: Any = ignored(_HOSTED, warn=True)
    mcp_servers: Any = ignored(_HOSTED, warn=True)
    context_management: Any = ignored(_HOSTED)
    compaction: Any = ignored(_HOSTED, warn=True)
    inference_geo: Any = ignored(_HOSTED)
    diagnostics: Any = ignored(_HOSTED)
    user_profile_id: Any = ignored(_HOSTED)
    workspace_id: Any = ignored(_HOSTED)
    billing_policy: Any = ignored(_HOSTED)
    fallbacks: Any = ignored(_HOSTED, warn=True)
    fallback_credit_token: Any = ignored(_HOSTED)
    betas: Any = ignored("no feature of this server needs a beta header")

    def generation_request(self) -> GenerationRequest:
        """Raises RequestError."""
        if self.thread is not None:
            raise ThreadsUnsupportedError("thread: this server does not store conversations; send all messages")
        choice = self.tool_choice or ToolChoice(type="auto")
        messages, prefill = self._messages()
        functions, warnings = self._functions()
        config = self.output_config or OutputConfig()
        form = config.format or self.output_format
        thinking = self.thinking
        switch = None if thinking is None else thinking.type != "disabled"
        budget = thinking.budget_tokens if thinking is not None and thinking.type == "enabled" else None
        if budget is not None and budget < 1:
            raise RequestError(f"thinking.budget_tokens must be greater than 0; got {budget}")
        template = thinking_variables(None, switch)
        if config.effort is not None and switch is not False:
            template["reasoning_effort"] = config.effort
        return GenerationRequest(
            messages=messages,
            sampling=self.sampling(),
            functions=functions,
            choice={"auto": "auto", "any": "required", "none": "none", "tool": "named"}[choice.type],
            named=[choice.name] if choice.type == "tool" else [],
            parallel_calls=not choice.disable_parallel_tool_use,
            template=template,
            reasoning_budget=budget,
            format=OutputFormat("json", form.schema_) if form is not None else None,
            prefill=prefill,
            warnings=warnings,
        )

    def sampling(self) -> dict[str, Any]:
        """Keywords of LLM.sampling_params(). Raises RequestError."""
        stops = [stop for stop in self.stop_sequences if stop]
        if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
            raise RequestError(
                f"stop_sequences must be at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters each"
            )
        return {
            "max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k,
            "stop": stops or None,
        }  # fmt: skip

    def _functions(self) -> tuple[list[dict[str, Any]], list[str]]:
        found, skipped = [], dict[str, None]()
        for i, given in enumerate(self.tools):
            kind = given.get("type") or "custom"
            if kind != "custom" and "input_schema" not in given:
                skipped[str(kind)] = None
                continue
            tool = check_part(Tool, given, f"tools.{i}")
            found.append(
                {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                    "strict": tool.strict,
                }
            )
        return found, [f"tools of type {kind!r} are skipped: they have no input_schema" for kind in skipped]

    def _messages(self) -> tuple[list[dict[str, Any]], str]:
        """The messages for the chat template, and the beginning of the answer if the last message is the assistant's."""
        found = Conversation()
        # One of Anthropic's own clients puts a number that changes with every request before its system prompt. It is not meant for
        # the model, and would prevent prefix reuse.
        system = self.system if isinstance(self.system, str) else _join(self.system, "system", _BILLING)
        if system:
            found.system(system)
        newest = max((i for i, m in enumerate(self.messages) if m.role == "user"), default=-1)
        answered = any(m.role == "assistant" for m in self.messages[newest + 1 :])
        for i, message in enumerate(self.messages):
            where = f"messages.{i}.content"
            blocks = message.content
            if isinstance(blocks, str):
                blocks = [Block(type="text", text=blocks)]
            if message.role == "system":
                found.system(_join(blocks, where))
            elif message.role == "user":
                _add_user(found, blocks, where, seen=i != newest or answered)
            else:
                found.assistant("")
                for j, block in enumerate(blocks):
                    _add_assistant(found, block, f"{where}.{j}")
        prefill = found.take_prefill() if self.messages[-1].role == "assistant" else ""
        return found.messages(), prefill


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: int


def _add_user(found: Conversation, blocks: list[Block], where: str, seen: bool) -> None:
    """Adds tool results first, where the calls expect them, then the user's text."""
    said: list[str] = []
    for i, block in enumerate(blocks):
        if block.type.endswith("tool_result"):
            text = _result(block.content, f"{where}.{i}.content")
            found.tool(block.tool_use_id, f"Error: {text}" if block.is_error else text)
        elif block.type in ("tool_use", "thinking", "redacted_thinking"):
            raise RequestError(f"{where}.{i}: a {block.type} block must be in an assistant's message")
        else:
            shown = _text(block, f"{where}.{i}", seen)
            said += [shown] if shown is not None else []
    if said:
        found.user("\n".join(said))


def _add_assistant(found: Conversation, block: Block, where: str) -> None:
    if block.type == "thinking":
        found.extend(reasoning=block.thinking or "")
    elif block.type == "redacted_thinking":
        return
    elif block.type == "tool_use":
        if not block.name:
            raise RequestError(f"{where}.name: Field required")
        found.call(block.id, block.name, block.input)
    elif block.type == "tool_result":
        raise RequestError(f"{where}: a tool_result block must be in a user's message")
    elif block.type.endswith("tool_use"):
        found.extend(f"[{block.name or block.type} was called]")
    elif block.type.endswith("tool_result"):
        found.extend(_result(block.content, f"{where}.content"))
    else:
        found.extend(_text(block, where, seen=True) or "")


def _join(blocks: list[Block], where: str, without: str = "") -> str:
    texts = [_text(block, f"{where}.{i}", seen=True) for i, block in enumerate(blocks)]
    return "\n".join(text for text in texts if text is not None and not (without and text.startswith(without)))


def _result(content: Any, where: str) -> str:
    """A tool's result as text. Images become placeholders, even in the newest message: the model can say that it does not see them, and the
    session continues."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise RequestError(f"{where}: must be text or a list of blocks")
    return _join([check_part(Block, part, f"{where}.{i}") for i, part in enumerate(content)], where)


def _text(block: Block, where: str, seen: bool) -> str | None:
    """A block as text; None if it has none. Raises RequestError for a non-text block that the model has not `seen` in an earlier turn."""
    if block.type == "text":
        if block.text is None:
            raise RequestError(f"{where}.text: Field required")
        return block.text
    if block.type == "tool_reference":
        return f"[tool {block.tool_name or block.name}]"
    if block.type == "search_result":
        head = "\n".join(part for part in (block.title, block.source) if isinstance(part, str) and part)
        return f"{head}\n{_result(block.content, where)}"
    source = block.source if isinstance(block.source, dict) else {}
    if block.type == "document" and source.get("type") in ("text", "content"):
        body = source.get("data") if source["type"] == "text" else _result(source.get("content"), f"{where}.source")
        return "\n".join(part for part in (block.title, block.context, body) if isinstance(part, str) and part)
    if not seen and block.type in ("image", "document", "container_upload", "audio", "video", "file"):
        raise RequestError(f"{where}: this model reads text only; got {block.type}")
    if isinstance(block.text, str):
        return block.text
    return not_shown(block.type.replace("_", " "), block.title or "")
