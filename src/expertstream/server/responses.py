"""OpenAI's Responses API, without state: every request carries the whole conversation."""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors import RequestError
from ..responses import GenerationResponse
from ..text.family import Parser
from .answer import Answer
from .completion import chat_logprob
from .constrain import OutputFormat
from .conversation import Conversation, not_shown
from .openai import Content, ReasoningSwitch, Sampling, choose_tools, functions_of, read_thinking, text_of
from .request import GenerationRequest
from .wire import Wire, check_part, ignored, refused

__all__ = ["ResponseAnswer", "ResponsesRequest"]

_STATELESS = "this server does not store conversations; send all items as input"
_LOGPROBS = "message.output_text.logprobs"


class ReasoningText(Wire):
    type: str = "summary_text"
    text: str = ""


class Item(Wire):
    """An item of the input; which fields it has depends on its type."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant", "tool"] | None = None
    content: Content | None = None
    summary: list[ReasoningText] = []
    call_id: str = ""
    name: str = ""
    namespace: Any = ignored("functions are identified by name")
    arguments: Any = None
    input: Any = None
    action: Any = None
    output: Any = None
    id: Any = ignored("items are identified by order")
    status: Any = ignored("all items are complete")
    encrypted_content: Any = ignored("reasoning is sent as text")
    phase: Any = ignored("the model does not see it")
    internal_chat_message_metadata_passthrough: Any = ignored("added by clients")


class TextFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    name: Any = ignored("only the schema is used")
    description: Any = ignored("only the schema is used")
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool = False


class TextOptions(Wire):
    format: TextFormat | None = None
    verbosity: Any = ignored("no chat template supports it")


class ResponsesRequest(Sampling):
    """POST /v1/responses."""

    input: str | Annotated[list[Item], Field(max_length=16384, fail_fast=True)] = []
    instructions: str | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=1024, fail_fast=True)] = []
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: ReasoningSwitch | None = None
    chat_template_kwargs: dict[str, Any] = {}
    max_output_tokens: int | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] = []
    truncation: Any = ignored("a prompt that is too long is refused")
    max_tool_calls: Any = ignored("the client runs the calls")
    context_management: Any = ignored("a prompt that is too long is refused")
    access_programs: Any = ignored("all requests are treated the same")
    client_metadata: Any = ignored("added by clients")
    image: Any = ignored("this model does not generate images")
    background: Any = refused("an answer does not outlive its request")
    background_options: Any = refused("an answer does not outlive its request")
    previous_response_id: Any = refused(_STATELESS)
    conversation: Any = refused(_STATELESS)
    prompt: Any = refused("this server does not store prompts; send the text as instructions or input")

    def generation_request(self) -> GenerationRequest:
        """Raises RequestError."""
        if self.n != 1:
            raise RequestError(f"n must be 1; got {self.n}")
        sampling = self.sampling()
        if self.max_output_tokens is not None:
            sampling["max_tokens"] = None if self.max_output_tokens == -1 else self.max_output_tokens
        if self.top_logprobs is not None or _LOGPROBS in self.include:
            sampling["logprobs"] = self.top_logprobs or 0
        functions, warnings = functions_of(self.tools)
        choice, named = choose_tools(self.tool_choice)
        if not functions and choice == "required":
            raise RequestError("tool_choice is required, but there are no functions among the tools")
        template, budget = read_thinking((self.reasoning,), variables=self.chat_template_kwargs)
        return GenerationRequest(
            messages=self._messages(),
            sampling=sampling,
            functions=functions,
            choice=choice,
            named=named,
            parallel_calls=self.parallel_tool_calls,
            template=template,
            reasoning_budget=budget,
            format=self._format() or self.format(),
            warnings=warnings,
        )

    def _format(self) -> OutputFormat | None:
        form = self.text.format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return OutputFormat("json", {"type": "object"})
        if form.schema_ is None:
            raise RequestError("text.format.schema: Field required")
        return OutputFormat("json", form.schema_, form.strict)

    def _messages(self) -> list[dict[str, Any]]:
        found = Conversation()
        if self.instructions:
            found.system(self.instructions)
        items = [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        if not items:
            raise RequestError("input must have at least one item")
        newest = max((i for i, item in enumerate(items) if item.role == "user"), default=-1)
        answered = any(item.role == "assistant" or item.type.endswith("_call") for item in items[newest + 1 :])
        for i, item in enumerate(items):
            _add(found, item, f"input.{i}", seen=i != newest or answered)
        return found.messages()


def _add(found: Conversation, item: Item, where: str, seen: bool) -> None:
    if item.type == "message":
        if item.role is None or (item.content is None and item.role != "assistant"):
            raise RequestError(f"{where}: a message must have a role and content")
        text = text_of(item.content or "", f"{where}.content", seen or item.role != "user")
        if item.role in ("system", "developer"):
            found.system(text)
        elif item.role == "assistant":
            found.extend(text)
        elif item.role == "tool":
            found.tool(item.call_id, text)
        else:
            found.user(text)
    elif item.type == "reasoning":
        content = item.content if isinstance(item.content, list) else []
        text = "".join(part.text or "" for part in content) or "\n".join(part.text for part in item.summary)
        if text:
            found.extend(reasoning=text)
    elif item.type in ("function_call", "custom_tool_call", "local_shell_call", "shell_call", "apply_patch_call"):
        arguments = item.arguments if item.type == "function_call" else {"input": item.input or item.action}
        found.call(item.call_id, item.name or item.type.removesuffix("_call"), arguments)
    elif item.type.endswith("_output"):
        output = item.output
        if isinstance(output, list):
            parts = check_part(Item, {"content": output}, where).content
            output = text_of(parts or "", f"{where}.output", seen=True)
        found.tool(item.call_id, output if isinstance(output, str) else json.dumps(output, ensure_ascii=False))
    elif item.type == "item_reference":
        raise RequestError(f"{where}: item_reference is not supported: {_STATELESS}")
    elif item.type.endswith("_call"):  # from a tool that the hosted API runs
        found.extend(not_shown(item.type.replace("_", " ")))
    else:
        raise RequestError(f"{where}: items of type {item.type!r} are not supported")


class ResponseAnswer(Answer):
    """The answer to one request; its events are the API's, with sequence numbers."""

    def __init__(self, model: str, prompt_tokens: int, parser: Parser, request: ResponsesRequest) -> None:
        super().__init__(parser, not request.parallel_tool_calls)
        self.id, self.model, self.created = f"resp_{uuid.uuid4().hex}", model, int(time.time())
        self._prompt_tokens, self._request = prompt_tokens, request
        self._output: list[dict[str, Any]] = []
        self._open: str | None = None  # the type of the open item
        self._number = 0
        self._logprobs: list[dict[str, Any]] = []  # of text not sent yet

    def begin(self) -> list[dict[str, Any]]:
        response = self.whole("in_progress")
        return [self._event("created", response=response), self._event("in_progress", response=response)]

    def heartbeat(self) -> list[dict[str, Any]]:
        """An in_progress event: for this API's clients, comments do not count as activity."""
        return [self._event("in_progress", response=self.whole("in_progress"))]

    def failed(self, error: dict[str, Any]) -> list[dict[str, Any]]:
        """The last event of a failed stream."""
        told = {"code": error.get("code") or error.get("type") or "server_error", "message": error["message"]}
        return [self._event("failed", response={**self.whole("failed"), "error": told})]

    def feed(self, piece: GenerationResponse) -> list[dict[str, Any]]:
        if piece.logprob is not None:
            self._logprobs.append(chat_logprob(piece.logprob))
        return super().feed(piece)

    def on_reasoning(self, text: str) -> list[dict[str, Any]]:
        found = self._begin("reasoning", "rs", summary=[], content=[{"type": "reasoning_text", "text": ""}])
        self._output[-1]["content"][0]["text"] += text
        self._logprobs.clear()
        return [*found, self._event("reasoning_text.delta", **self._place(), content_index=0, delta=text)]

    def on_content(self, text: str) -> list[dict[str, Any]]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        found = self._begin("message", "msg", role="assistant", content=[part])
        self._output[-1]["content"][0]["text"] += text
        logprobs, self._logprobs = self._logprobs, []
        self._output[-1]["content"][0]["logprobs"] += logprobs
        place = self._place()
        return [*found, self._event("output_text.delta", **place, content_index=0, delta=text, logprobs=logprobs)]

    def on_call(self, name: str) -> list[dict[str, Any]]:
        found = self._close()
        return found + self._begin(
            "function_call", "fc", call_id=f"call_{uuid.uuid4().hex[:24]}", name=name, arguments=""
        )

    def on_arguments(self, json: str) -> list[dict[str, Any]]:
        self._output[-1]["arguments"] += json
        return [self._event("function_call_arguments.delta", **self._place(), delta=json)]

    def on_call_end(self, name: str, arguments: dict[str, Any], complete: bool) -> list[dict[str, Any]]:
        return self._close("completed" if complete else "incomplete")

    def on_end(self) -> list[dict[str, Any]]:
        status = self.status
        return [*self._close(status), self._event(status, response=self.whole())]

    @property
    def status(self) -> str:
        return "incomplete" if self.ended == "length" and not self.complete else "completed"

    def _begin(self, kind: str, prefix: str, **fields: Any) -> list[dict[str, Any]]:
        """Opens an item of this kind, unless one is open."""
        if self._open == kind:
            return []
        found = self._close()
        item = {"id": f"{prefix}_{uuid.uuid4().hex[:24]}", "type": kind, "status": "in_progress", **fields}
        self._output.append(item)
        self._open = kind
        shown = {**item, "content": []} if "content" in item else dict(item)
        found.append(self._event("output_item.added", output_index=len(self._output) - 1, item=shown))
        if "content" in item:
            part = dict(item["content"][0])
            found.append(self._event("content_part.added", **self._place(), content_index=0, part=part))
        return found

    def _close(self, status: str = "completed") -> list[dict[str, Any]]:
        if self._open is None:
            return []
        item, place = self._output[-1], self._place()
        item["status"] = status
        found = []
        if self._open == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            found.append(self._event("function_call_arguments.done", **place, **done))
        else:
            part = item["content"][0]
            if self._open == "reasoning":
                found.append(self._event("reasoning_text.done", **place, content_index=0, text=part["text"]))
            else:
                told = {"text": part["text"], "logprobs": part["logprobs"]}
                found.append(self._event("output_text.done", **place, content_index=0, **told))
            found.append(self._event("content_part.done", **place, content_index=0, part=dict(part)))
        found.append(self._event("output_item.done", output_index=place["output_index"], item=dict(item)))
        self._open = None
        return found

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number - 1, **fields}

    def whole(self, status: str | None = None) -> dict[str, Any]:
        """The response so far, or the complete one."""
        request, status = self._request, status or self.status
        reasoning = request.reasoning or ReasoningSwitch()
        form = request.text.format
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "background": False, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions, "max_output_tokens": request.max_output_tokens, "max_tool_calls": None,
            "metadata": request.metadata if isinstance(request.metadata, dict) else {}, "model": self.model, "output": list(self._output),
            "parallel_tool_calls": request.parallel_tool_calls, "previous_response_id": None, "prompt_cache_key": None,
            "reasoning": {"effort": reasoning.effort, "summary": None}, "safety_identifier": None, "service_tier": "default",
            "store": False, "temperature": request.temperature, "text": {"format": {"type": form.type if form else "text"}},
            "tool_choice": request.tool_choice or "auto", "tools": request.tools, "top_logprobs": request.top_logprobs or 0,
            "top_p": request.top_p, "truncation": "disabled", "usage": self._usage() if status != "in_progress" else None, "user": None,
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        cached = self.stats.cached_tokens if self.stats is not None else 0
        generated = self.stats.generated_tokens if self.stats is not None else 0
        return {
            "input_tokens": self._prompt_tokens, "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": generated, "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self._prompt_tokens + generated,
        }  # fmt: skip
