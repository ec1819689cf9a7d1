"""OpenAI's wire format: requests for chat completions and for completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors import RequestError
from .constrain import OutputFormat
from .conversation import Conversation, not_shown
from .request import MAX_ANSWERS, GenerationRequest, thinking_variables
from .wire import Wire, check_part, ignored, refused

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "Content",
    "Function",
    "ReasoningSwitch",
    "Sampling",
    "choose_tools",
    "functions_of",
    "json_format",
    "read_thinking",
    "text_of",
]

MAX_PROMPTS = 128
MAX_STOPS, MAX_STOP_LENGTH = 16, 512
_ACCOUNTS = "this server has no user accounts"
_PREFIXES = "prefixes are always cached"
_UNSEEN = {
    "image_url": "image",
    "input_image": "image",
    "input_audio": "audio",
    "video_url": "video",
    "input_file": "file",
}


class Part(Wire):
    """A part of a message's content. Non-text parts have additional fields."""

    type: str = "text"
    text: str | None = None
    refusal: str | None = None
    file: dict[str, Any] | None = None
    filename: str | None = None
    cache_control: Any = ignored(_PREFIXES)
    prompt_cache_breakpoint: Any = ignored(_PREFIXES)
    annotations: Any = ignored("copied from earlier answers")
    logprobs: Any = ignored("copied from earlier answers")
    detail: Any = ignored("a placeholder replaces the image")
    file_data: Any = ignored("a placeholder replaces the file")
    file_id: Any = ignored("a placeholder replaces the file")
    image_url: Any = ignored("a placeholder replaces the image")
    input_audio: Any = ignored("a placeholder replaces the recording")


Content = str | Annotated[list[Part], Field(max_length=4096, fail_fast=True)]


class CalledFunction(Wire):
    name: str
    arguments: Any = None
    parsed_arguments: Any = ignored("added by client libraries")


class ToolCall(Wire):
    id: str = ""
    type: str = "function"
    function: CalledFunction | None = None
    custom: dict[str, Any] | None = None
    index: Any = ignored("calls are identified by order")
    provider_specific_fields: Any = ignored("added by client libraries")
    extra_content: Any = ignored("added by other servers")
    caller: Any = ignored("the model makes all calls")


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = ""
    name: str | None = Field(default=None, description="used for function results")
    tool_calls: Annotated[list[ToolCall], Field(max_length=1024, fail_fast=True)] = []
    tool_call_id: str = ""
    reasoning_content: str | None = None
    reasoning: Any = Field(default=None, description="used if reasoning_content is absent")
    function_call: CalledFunction | None = None
    refusal: Any = ignored("copied from earlier answers")
    annotations: Any = ignored("copied from earlier answers")
    audio: Any = ignored("copied from earlier answers")
    parsed: Any = ignored("added by client libraries")
    reasoning_details: Any = ignored("added by other servers")
    provider_specific_fields: Any = ignored("added by client libraries")
    thinking_blocks: Any = ignored("added by client libraries")
    cache_control: Any = ignored(_PREFIXES)


class Function(Wire):
    """A function that may be called; parameters is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[^\s<>\"'`=]{1,256}$")]
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: Any = ignored("streams are not padded")
    continuous_usage_stats: Any = ignored("usage comes at the end")


class NamedSchema(Wire):
    name: Any = ignored("only the schema is used")
    description: Any = ignored("only the schema is used")
    schema_: dict[str, Any] = Field(default={}, alias="schema")
    strict: bool = False


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class StructuredOutputs(Wire):
    """As in vLLM; only one of these may be given."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class ReasoningSwitch(Wire):
    """Variants of other servers of this API: DeepSeek's and GLM's `thinking`, OpenRouter's `reasoning`."""

    type: str | None = None
    enabled: bool | None = None
    effort: str | None = None
    budget_tokens: int | None = None
    max_tokens: int | None = None
    exclude: Any = ignored("reasoning is sent in its own field")
    summary: Any = ignored("reasoning is sent in full")


class Sampling(Wire):
    """The fields that all of OpenAI's requests have in common."""

    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    logit_bias: dict[int, float | None] = {}
    seed: int | None = None
    stop: str | list[str] = []
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    user: Any = ignored(_ACCOUNTS)
    service_tier: Any = ignored("all requests are treated the same")
    store: Any = ignored("answers are not stored")
    metadata: Any = ignored("answers are not stored")
    prompt_cache_key: Any = ignored(_PREFIXES)
    prompt_cache_retention: Any = ignored(_PREFIXES)
    prompt_cache_options: Any = ignored(_PREFIXES)
    safety_identifier: Any = ignored(_ACCOUNTS)
    moderation: Any = ignored("there is no moderation")

    def sampling(self) -> dict[str, Any]:
        """Keywords of LLM.sampling_params(). Raises RequestError."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        stops = [stop for stop in stops if stop]
        if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
            raise RequestError(f"stop must be at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters each")
        biases = {token: bias for token, bias in self.logit_bias.items() if bias is not None}
        penalty = self.repeat_penalty if self.repetition_penalty is None else self.repetition_penalty
        return {
            "max_tokens": _unless_negative(self.max_tokens), "temperature": self.temperature, "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k, "min_p": self.min_p, "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty, "repetition_penalty": penalty,
            "logit_bias": biases or None, "seed": _unless_negative(self.seed), "stop": stops or None,
        }  # fmt: skip

    def format(self) -> OutputFormat | None:
        """The required format of the answer. Raises RequestError."""
        found = []
        if self.response_format is not None:
            found.append(json_format(self.response_format))
        outputs = self.structured_outputs or StructuredOutputs()
        for schema in (outputs.json_, self.guided_json):
            if schema is not None:
                found.append(OutputFormat.of_schema(schema, strict=True))
        if outputs.json_object:
            found.append(OutputFormat("json", {"type": "object"}))
        for kind, value in (
            ("regex", outputs.regex), ("choice", outputs.choice), ("grammar", outputs.grammar),
            ("regex", self.guided_regex), ("choice", self.guided_choice), ("grammar", self.guided_grammar),
        ):  # fmt: skip
            if value is not None:
                found.append(OutputFormat(kind, value, strict=True))
        given = [form for form in found if form is not None]
        if len(given) > 1:
            raise RequestError(
                "the answer can have only one format; give one of response_format, structured_outputs and guided_*"
            )
        return given[0] if given else None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=1024, fail_fast=True)] = []
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    enable_thinking: bool | None = None
    thinking: ReasoningSwitch | None = None
    reasoning: ReasoningSwitch | None = None
    thinking_budget: int | None = None
    modalities: list[str] = []
    prediction: Any = ignored("it only affects speed")
    verbosity: Any = ignored("no chat template supports it")
    web_search_options: Any = ignored("this server has no web search", warn=True)
    audio: Any = refused("this model writes text only")
    functions: Any = refused("use tools")
    function_call: Any = refused("use tool_choice")

    def generation_request(self) -> GenerationRequest:
        """Raises RequestError."""
        if any(kind != "text" for kind in self.modalities):
            raise RequestError(f"modalities: this model writes text only; got {', '.join(self.modalities)}")
        sampling = self.sampling()
        if self.max_completion_tokens is not None:
            sampling["max_tokens"] = _unless_negative(self.max_completion_tokens)
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true")
        sampling["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        functions, warnings = functions_of(self.tools)
        choice, named = choose_tools(self.tool_choice)
        template, budget = self._thinking()
        return GenerationRequest(
            messages=self._messages(),
            sampling=sampling,
            functions=functions,
            choice=choice,
            named=named,
            parallel_calls=self.parallel_tool_calls,
            template=template,
            reasoning_budget=budget,
            format=self.format(),
            warnings=warnings,
        )

    def _thinking(self) -> tuple[dict[str, Any], int | None]:
        return read_thinking(
            (self.thinking, self.reasoning),
            self.reasoning_effort,
            self.enable_thinking,
            self.thinking_budget,
            self.chat_template_kwargs,
        )

    def _messages(self) -> list[dict[str, Any]]:
        found = Conversation()
        newest = max((i for i, m in enumerate(self.messages) if m.role == "user"), default=-1)
        answered = any(m.role == "assistant" for m in self.messages[newest + 1 :])
        for i, message in enumerate(self.messages):
            text = text_of(message.content, f"messages.{i}.content", seen=i != newest or answered)
            if message.role in ("system", "developer"):
                found.system(text)
            elif message.role == "user":
                found.user(text)
            elif message.role in ("tool", "function"):
                found.tool(message.tool_call_id or message.name or "", text)
            else:
                reasoning = message.reasoning_content
                if reasoning is None and isinstance(message.reasoning, str):
                    reasoning = message.reasoning
                found.assistant(text or (message.refusal if isinstance(message.refusal, str) else ""), reasoning)
                for call in message.tool_calls:
                    if call.function is not None:
                        found.call(call.id, call.function.name, call.function.arguments)
                    elif call.custom is not None:
                        found.call(call.id, str(call.custom.get("name", "")), {"input": call.custom.get("input", "")})
                if message.function_call is not None:
                    found.call(message.function_call.name, message.function_call.name, message.function_call.arguments)
        return found.messages()


class CompletionRequest(Sampling):
    """POST /v1/completions: a text to continue, or its tokens, or several of either."""

    prompt: (
        str
        | Annotated[list[int], Field(max_length=1 << 20, fail_fast=True)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: Any = refused("this model cannot fill in the middle of a text")

    def prompts(self) -> list[str | list[int]]:
        """Raises RequestError."""
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError(f"best_of must be equal to n ({self.n}); got {self.best_of}: every answer is returned")
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)

    def sampling(self) -> dict[str, Any]:
        given = super().sampling()
        if self.max_tokens is None:
            given["max_tokens"] = 16
        elif self.max_tokens == 0:
            if not self.echo:
                raise RequestError("max_tokens must be at least 1 unless echo is true; got 0")
            given["max_tokens"] = 1  # its logits come with the prompt's; it is not sent
        return {**given, "logprobs": self.logprobs}


def _unless_negative(value: int | None) -> int | None:
    """Several servers use -1 for "not given"."""
    return None if value == -1 else value


def text_of(content: Content, where: str, seen: bool) -> str:
    """Content as text. Non-text parts that the model has `seen`, earlier in the conversation or from a tool, become placeholders. Raises
    RequestError for the user's new ones."""
    if isinstance(content, str):
        return content
    found = []
    for i, part in enumerate(content):
        if part.type in ("text", "input_text", "output_text", "reasoning_text", "summary_text"):
            if part.text is None:
                raise RequestError(f"{where}.{i}.text: Field required")
            found.append(part.text)
        elif part.type == "refusal":
            found.append(part.refusal or "")
        elif not seen:
            raise RequestError(f"{where}.{i}: this model reads text only; got {part.type}")
        else:
            title = part.filename or (part.file or {}).get("filename") or ""
            found.append(not_shown(_UNSEEN.get(part.type, part.type.replace("_", " ")), str(title)))
    return "".join(found)


def functions_of(tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The functions among a request's tools, and warnings about the other tools. Raises RequestError."""
    found, skipped = [], dict[str, None]()
    for i, tool in enumerate(tools):
        if (tool.get("type") or "function") != "function":
            skipped[str(tool.get("type"))] = None
            continue
        # Chat completions nest the function in an object, responses put its fields beside the type.
        nested = isinstance(tool.get("function"), dict)
        function = check_part(Function, tool["function"] if nested else tool, f"tools.{i}" + ".function" * nested)
        found.append({k: getattr(function, k) for k in ("name", "description", "parameters", "strict")})
    return found, [f"tools of type {kind!r} are skipped: they are not functions" for kind in skipped]


def read_thinking(
    switches: Iterable[ReasoningSwitch | None],
    effort: str | None = None,
    switch: bool | None = None,
    budget: int | None = None,
    variables: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], int | None]:
    """Template variables, and the limit of reasoning tokens. Raises RequestError."""
    for name in ("messages", "tools"):
        if name in (variables or {}):
            raise RequestError(f"chat_template_kwargs must not contain {name}; use the request's own {name}")
    for given in switches:
        if given is None:
            continue
        effort = given.effort or effort
        switch = given.enabled if given.enabled is not None else switch
        switch = given.type != "disabled" if given.type is not None else switch
        for found in (given.max_tokens, given.budget_tokens):
            budget = found if found is not None else budget
    return thinking_variables(effort, switch, variables), budget if budget is not None and budget >= 0 else None


def choose_tools(given: Any) -> tuple[str, list[str]]:
    """tool_choice as (none, auto, required or named; which ones). Raises RequestError."""
    if given is None or given in ("auto", "none", "required"):
        return given or "auto", []
    if given == "any":
        return "required", []
    if isinstance(given, dict):
        kind, function = given.get("type"), given.get("function", given)
        if kind in ("auto", "none", "required", "any"):
            return choose_tools(kind)
        if kind == "allowed_tools":
            allowed = given.get("allowed_tools", given)
            listed = allowed.get("tools") if isinstance(allowed, dict) else None
            if not isinstance(listed, list):
                raise RequestError("tool_choice.tools: must be a list of tools")
            functions = [t.get("function", t) for t in listed if isinstance(t, dict)]
            names = [f.get("name") for f in functions if isinstance(f, dict)]
            return "named" if allowed.get("mode") == "required" else "auto", [n for n in names if isinstance(n, str)]
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return "named", [function["name"]]
    raise RequestError(
        f"tool_choice must be none, auto, required or a function's name in an object; got {given!r:.100}"
    )


def json_format(given: ResponseFormat) -> OutputFormat | None:
    """response_format, in the forms of OpenAI's API and of llama.cpp's server."""
    if given.type == "text":
        return None
    if given.json_schema is not None:
        return OutputFormat("json", given.json_schema.schema_, given.json_schema.strict)
    if given.type == "json_schema" and given.schema_ is None:
        raise RequestError("response_format.json_schema: Field required")
    return OutputFormat("json", {"type": "object"} if given.schema_ is None else given.schema_)
