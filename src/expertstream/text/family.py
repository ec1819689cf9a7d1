"""How the models of a chat template write reasoning and calls, and what they read: one class a family, found by the template."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from .grammar import XML_SHARED, json_call, json_call_value, xml_call
from .harmony import HarmonyParser, harmony_messages
from .output import OutputParser
from .output_base import Event

__all__ = ["Calls", "Family", "HarmonyFamily", "Parser", "TagFamily", "family_of"]

Calls = Sequence[tuple[str, dict[str, Any] | None]]  # functions and their normalized parameters, None for any


class Parser(Protocol):
    """Turns what a model writes, piece by piece, into events."""

    def feed(self, text: str) -> list[Event]: ...
    def finish(self, cut: bool = False) -> list[Event]: ...


class Family(Protocol):
    """A format of conversations. Texts contain control tokens. `tag` gives a grammar's expression for one."""

    message_start: str  # where a message begins
    call_open: str  # follows nothing but a call
    reasoning_end: str  # the answer, or a call, comes after it
    reasoning_begin: (
        str  # has to be forced where reasoning is to be followed by something certain; "" if the prompt has it
    )
    reasoning_close: str  # ends reasoning that took too long
    answer_open: str  # appended to a prompt that ends in reasoning, to begin the answer at once
    answer_lead: str  # a grammar's expression for what may stand between reasoning and the rules below
    call_lead: str  # and between call_open and the rule `call`

    def messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """In the form that the template takes."""

    def variables(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The template's variables, of those that every client may set."""

    def reasons(self, prompt: str) -> bool:
        """Whether what follows the prompt begins with reasoning."""

    def parser(
        self,
        tools: Sequence[dict[str, Any]] = (),
        reasoning: bool = False,
        held: bool = False,
        typed: Collection[str] = (),
    ) -> Parser:
        """For one answer. The arguments are those of OutputParser."""

    def call_rules(self, calls: Calls, several: bool, tag: Callable[[str], str]) -> str:
        """Rules of a grammar: `calls`, one or more of them, and `call`, one without what opens it."""

    def answer_rule(self, tag: Callable[[str], str]) -> str:
        """The rule `answer`: what opens an answer after reasoning, and the rule `form`."""


class TagFamily:
    """Reasoning in <think>…</think>, calls in <tool_call>…</tool_call>: Qwen's and many others' formats."""

    message_start, call_open, reasoning_end = "<|im_start|>", "<tool_call>", "</think>"
    reasoning_begin, reasoning_close, answer_open = "", "\n</think>\n\n", "\n</think>\n\n"
    answer_lead, call_lead = r"/\n{0,2}/ ", "NEWLINE? "

    def __init__(self, xml: bool) -> None:
        """xml: calls are <function=NAME><parameter=KEY>…, not JSON."""
        self._xml = xml

    def messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return list(messages)

    def variables(self, variables: dict[str, Any]) -> dict[str, Any]:
        return variables

    def reasons(self, prompt: str) -> bool:
        return prompt.rstrip().endswith("<think>")

    def parser(
        self,
        tools: Sequence[dict[str, Any]] = (),
        reasoning: bool = False,
        held: bool = False,
        typed: Collection[str] = (),
    ) -> Parser:
        return OutputParser(tools, reasoning, held, typed)

    def call_rules(self, calls: Calls, several: bool, tag: Callable[[str], str]) -> str:
        end, opening = tag("</tool_call>"), tag(self.call_open)
        write = xml_call if self._xml else json_call
        rules = "".join(write(f"call{i}_", name, parameters, "", end) for i, (name, parameters) in enumerate(calls))
        one = " | ".join(f"call{i}_" for i in range(len(calls)))
        more = f" (NEWLINE NEWLINE? {opening} NEWLINE call)*" if several else ""
        shared = XML_SHARED if self._xml else ""
        return f'calls: {opening} NEWLINE call{more}\ncall: {one}\nNEWLINE: "\\n"\n{rules}{shared}'

    def answer_rule(self, tag: Callable[[str], str]) -> str:
        return "answer: form\n"


class HarmonyFamily:
    """gpt-oss: channels, text.harmony. A model reasons in the channel analysis before anything else, so a prompt always ends there."""

    message_start, call_open, reasoning_end = "<|start|>", "commentary to=functions.", "<|end|><|start|>assistant"
    reasoning_begin, reasoning_close = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"
    answer_open = "<|channel|>final<|message|>"
    answer_lead = call_lead = ""

    def messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return harmony_messages(messages)

    def variables(self, variables: dict[str, Any]) -> dict[str, Any]:
        if variables.get("enable_thinking") is False:  # it cannot be switched off, only be made short
            return {"reasoning_effort": "low", **variables}
        return variables

    def reasons(self, prompt: str) -> bool:
        return prompt.rstrip().endswith("<|start|>assistant")

    def parser(
        self,
        tools: Sequence[dict[str, Any]] = (),
        reasoning: bool = False,
        held: bool = False,
        typed: Collection[str] = (),
    ) -> Parser:
        return HarmonyParser(in_answer=not reasoning)

    def call_rules(self, calls: Calls, several: bool, tag: Callable[[str], str]) -> str:
        lead = f"{tag('<|channel|>')} {json.dumps(self.call_open)}"
        head = f'" " {tag("<|constrain|>")} "json" {tag("<|message|>")}'
        rules = "".join(
            f"call{i}_: {json.dumps(name)} {head} {json_call_value(parameters)}\n"
            for i, (name, parameters) in enumerate(calls)
        )
        one = " | ".join(f"call{i}_" for i in range(len(calls)))
        return f"calls: {lead} call\ncall: {one}\n{rules}"  # an answer ends with its call

    def answer_rule(self, tag: Callable[[str], str]) -> str:
        return f'answer: {tag("<|channel|>")} "final" {tag("<|message|>")} form\n'


def family_of(template: str) -> Family:
    """The family whose chat template this is; the tags' for one that is not known."""
    if "<|channel|>" in template and "<|message|>" in template:
        return HarmonyFamily()
    return TagFamily(xml="<function=" in template or not template)
