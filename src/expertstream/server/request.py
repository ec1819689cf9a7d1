"""Requests independent of their API, and their preparation for the engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine import LLM
from ..errors import RequestError
from ..ops import I64
from ..sampling import Constraint, SamplingParams
from ..text.control import ChatPrompt
from ..text.family import Family, Parser
from ..text.tokenizer import MAX_COUNTED
from .constrain import Grammars, OutputFormat

__all__ = [
    "MAX_ANSWERS",
    "GenerationRequest",
    "Prepared",
    "PromptOptions",
    "prepare",
    "prepare_text",
    "thinking_variables",
]

MAX_ANSWERS = 128


@dataclass(frozen=True)
class PromptOptions:
    """How the server renders prompts. parse_control_tokens: message text may contain control tokens."""

    parse_control_tokens: bool = False


@dataclass
class GenerationRequest:
    """messages: as chat templates take them. sampling: keywords of LLM.sampling_params(). functions: {"name", "description", "parameters",
    "strict"}. choice: none, auto, required, or named, and then `named` lists the functions. template: variables for the chat template, only
    those that the client asked for. reasoning_budget: tokens after which reasoning is closed. prefill: the beginning of the answer, which
    the model continues without reasoning first."""

    messages: list[dict[str, Any]]
    sampling: dict[str, Any]
    functions: list[dict[str, Any]] = field(default_factory=list)
    choice: str = "auto"
    named: list[str] = field(default_factory=list)
    parallel_calls: bool = True
    template: dict[str, Any] = field(default_factory=dict)
    reasoning_budget: int | None = None
    format: OutputFormat | None = None
    prefill: str = ""
    warnings: list[str] = field(default_factory=list)


@dataclass
class Prepared:
    """A request as the engine takes it. constraints: one for each answer. one_call: the answer ends after its first call. held: calls
    follow a grammar. typed: functions whose calls also follow their schemas. prompt_logprobs: how many alternatives to report with each
    token of the prompt."""

    tokens: I64
    params: SamplingParams
    family: Family
    constraints: Sequence[Constraint | None]
    tools: Sequence[dict[str, Any]] = ()
    reasoning: bool = False
    one_call: bool = False
    held: bool = False
    typed: Collection[str] = ()
    warnings: Sequence[str] = ()
    prompt_logprobs: int | None = None

    def parser(self) -> Parser:
        return self.family.parser(self.tools, self.reasoning, self.held, self.typed)


def prepare(llm: LLM, grammars: Grammars, request: GenerationRequest, answers: int, options: PromptOptions) -> Prepared:
    """Renders, tokenizes, and compiles the grammar. Slow for long texts: not for the event loop. Raises RequestError, UsageError."""
    functions = _distinct(request.functions)
    names = [f["name"] for f in functions]
    for name in request.named:
        if name not in names:
            raise RequestError(f"tool_choice names {name!r}, which is not among the tools")
    if request.choice == "required" and not names:
        raise RequestError("tool_choice is required, but there are no tools")
    offered = functions if request.choice != "none" else []
    tools = [{"type": "function", "function": {k: v for k, v in f.items() if k != "strict"}} for f in offered]
    prompt, warnings = _render(llm, request, tools, options)
    family = llm.tokenizer.family
    reasoning = family.reasons(prompt.text)
    if request.prefill:
        if reasoning:
            prompt, reasoning = prompt + ChatPrompt((family.answer_open,)), False
        prompt += llm.tokenizer.content(request.prefill, options.parse_control_tokens)
    if not answers and sum(map(len, prompt.parts)) > MAX_COUNTED:
        return Prepared(np.zeros(llm.tokenizer.count(prompt.parts)[0], np.int64), llm.sampling_params(), family, ())
    tokens = llm.tokenizer.encode(prompt, llm.context_length - 1 if answers else None)
    sampling = {**request.sampling}
    if offered:  # a repetition penalty would penalize the names that a call has to repeat
        sampling.setdefault("repetition_penalty", 1.0)
        if sampling["repetition_penalty"] is None:
            sampling["repetition_penalty"] = 1.0
    if sampling.get("max_tokens") is None:
        sampling["max_tokens"] = llm.context_length
    params = llm.sampling_params(**sampling)
    if not answers:
        return Prepared(tokens, params, family, ())
    callable_ = [f for f in offered if not request.named or f["name"] in request.named]
    plan = grammars.plan(
        callable_,
        request.choice in ("required", "named"),
        request.parallel_calls,
        request.format,
        request.reasoning_budget,
    )
    constraints = [plan.guide(reasoning) for _ in range(answers)]
    return Prepared(
        tokens,
        params,
        family,
        constraints,
        tools,
        reasoning,
        not request.parallel_calls,
        plan.holds_calls,
        plan.typed,
        [*request.warnings, *warnings, *plan.warnings],
    )


def _render(
    llm: LLM, request: GenerationRequest, tools: list[dict[str, Any]], options: PromptOptions
) -> tuple[ChatPrompt, list[str]]:
    """Renders the prompt. If the template refuses the requested reasoning effort, renders it without, and warns."""

    def render(variables: dict[str, Any]) -> ChatPrompt:
        return llm.tokenizer.chat_prompt(
            request.messages,
            parse_control_tokens=options.parse_control_tokens,
            template_variables=variables,
            tools=tools or None,
        )

    try:
        return render(request.template), []
    except RequestError as error:
        if "reasoning_effort" not in request.template:
            raise
        effort = request.template["reasoning_effort"]
        rest = {k: v for k, v in request.template.items() if k != "reasoning_effort"}
        return render(rest), [f"reasoning_effort {effort!r} is ignored: {error}"]


def prepare_text(
    llm: LLM,
    grammars: Grammars,
    prompt: str | list[int],
    sampling: dict[str, Any],
    answers: int,
    format_: OutputFormat | None = None,
    prompt_logprobs: int | None = None,
) -> Prepared:
    """Prepares a text to continue, or its tokens. Raises RequestError, UsageError."""
    if isinstance(prompt, str):
        tokens = llm.tokenizer.encode(prompt, llm.context_length - 1)
    elif all(0 <= t < llm.model_config.vocab_size for t in prompt):
        tokens = np.array(prompt, np.int64)
    else:
        raise RequestError(f"prompt: tokens must be from 0 to {llm.model_config.vocab_size - 1}")
    plan = grammars.plan([], False, True, format_, None)
    constraints = [plan.guide(False) for _ in range(answers)]
    return Prepared(
        tokens,
        llm.sampling_params(**sampling),
        llm.tokenizer.family,
        constraints,
        warnings=plan.warnings,
        prompt_logprobs=prompt_logprobs,
    )


def thinking_variables(
    effort: str | None = None, switch: bool | None = None, more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Only the template variables that a client asked for: templates have their own defaults, and some refuse a switch that others need.
    effort: none and minimal turn reasoning off. switch: an explicit choice. more: chat_template_kwargs."""
    found: dict[str, Any] = {}
    if effort in ("none", "minimal"):
        found = {"enable_thinking": False}
    elif effort is not None:
        found = {"enable_thinking": True, "reasoning_effort": effort}
    if switch is not None:
        found["enable_thinking"] = switch
    return found | (more or {})


def _distinct(functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Functions without duplicates. Raises RequestError if two functions of the same name differ."""
    found: dict[str, dict[str, Any]] = {}
    for function in functions:
        if found.setdefault(function["name"], function) != function:
            raise RequestError(f"tools: two different functions are called {function['name']!r}")
    return list(found.values())
