"""What a client wants, whatever API it speaks, and what the engine is given for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine import LLM
from ..errors import RequestError
from ..ops import I64
from ..sampling import Constraint, SamplingParams
from .constrain import Grammars
from .stream import Splitter

__all__ = ["Ask", "Prepared", "prepare"]


@dataclass
class Ask:
    """messages: as chat templates want them. functions: {"name", "description", "parameters", "strict"}. choice: none, auto, required,
    or named, and then `named` says which. begun: the beginning of the answer, which the model goes on from without reasoning first."""

    messages: list[dict[str, Any]]
    sampling: dict[str, Any]
    functions: list[dict[str, Any]] = field(default_factory=list)
    choice: str = "auto"
    named: str = ""
    parallel_calls: bool = True
    thinking: bool = False
    json_object: bool = False
    json_schema: dict[str, Any] | None = None
    begun: str = ""


@dataclass
class Prepared:
    """An Ask as the engine takes it. constraints: one for each answer. one_call: the answer ends after its first call."""

    tokens: I64
    params: SamplingParams
    constraints: Sequence[Constraint | None]
    tools: Sequence[dict[str, Any]]
    reasoning: bool
    one_call: bool

    @classmethod
    def of_text(cls, llm: LLM, prompt: str | list[int], sampling: dict[str, Any], answers: int) -> Prepared:
        """A text that is gone on from, or its tokens. Raises RequestError, UsageError."""
        if isinstance(prompt, str):
            tokens = llm.tokenizer.encode(prompt)
        elif all(0 <= t < llm.model_config.vocab_size for t in prompt):
            tokens = np.array(prompt, np.int64)
        else:
            raise RequestError(f"prompt: tokens are from 0 to {llm.model_config.vocab_size - 1}")
        return cls(tokens, llm.sampling_params(**sampling), [None] * answers, (), False, False)

    def splitter(self) -> Splitter:
        return Splitter(self.tools, self.reasoning)


def prepare(llm: LLM, grammars: Grammars, ask: Ask, answers: int) -> Prepared:
    """Renders, tokenizes, and finds the grammar. Takes a while for long texts: not for the event loop. Raises RequestError,
    UsageError."""
    names = [f["name"] for f in ask.functions]
    if len(set(names)) < len(names):
        raise RequestError("two functions have the same name")
    if ask.choice == "named" and ask.named not in names:
        raise RequestError(f"tool_choice names {ask.named!r}, which is not among the tools")
    if ask.choice == "required" and not names:
        raise RequestError("tool_choice is required, but there are no tools")
    offered = ask.functions if ask.choice != "none" else []
    wants_json = ask.json_object or ask.json_schema is not None
    if wants_json and offered:
        raise RequestError("response_format together with tools is not supported; set tool_choice to none")
    tools = [{"type": "function", "function": {k: v for k, v in f.items() if k != "strict"}} for f in offered]
    prompt = (
        llm.tokenizer.apply_chat_template(
            ask.messages, tools=tools or None, enable_thinking=ask.thinking and not ask.begun
        )
        + ask.begun
    )
    reasoning = not ask.begun and prompt.rstrip().endswith("<think>")
    grammar = None
    if wants_json:
        grammar = grammars.json(ask.json_schema, reasoning)
    elif ask.choice in ("required", "named"):
        callable_ = [f for f in offered if ask.choice == "required" or f["name"] == ask.named]
        grammar = grammars.calls(callable_, True, ask.parallel_calls, reasoning)
    elif any(f.get("strict") for f in offered):
        grammar = grammars.calls(offered, False, ask.parallel_calls, reasoning)
    sampling = {**ask.sampling}
    if offered:  # a penalty for what was read before would be one for the names that a call has to repeat
        sampling["repetition_penalty"] = 1.0
    if sampling.get("max_tokens") is None:
        sampling["max_tokens"] = llm.context_length
    tokens, params = llm.tokenizer.encode(prompt), llm.sampling_params(**sampling)
    constraints = [grammars.matcher(grammar) if grammar is not None else None for _ in range(answers)]
    return Prepared(tokens, params, constraints, tools, reasoning, not ask.parallel_calls)
