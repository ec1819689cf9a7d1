"""How models write reasoning and calls, and which messages they take: one class per family, selected by the chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from .grammar import XML_SHARED, json_call, json_call_value, xml_call
from .harmony import HarmonyParser, harmony_messages
from .output import OutputParser
from .output_base import CallEnd, Content, Event, Reasoning

__all__ = ["Calls", "Family", "HarmonyFamily", "Parser", "PlainText", "TagFamily", "family_of"]

Calls = Sequence[tuple[str, dict[str, Any] | None]]  # functions and their normalized parameters, None for any


class Parser(Protocol):
    """Turns streamed model output into events."""

    def feed(self, text: str) -> list[Event]: ...
    def finish(self, cut: bool = False) -> list[Event]: ...


class Family(Protocol):
    """A conversation format. Texts contain control tokens; `tag` returns the grammar expression for one."""

    message_start: str  # where a message begins
    call_open: str  # only a call follows it
    reasoning_end: str  # followed by the answer or a call
    reasoning_begin: str  # forced where constrained output follows the reasoning; "" if the prompt has it
    reasoning_close: str  # closes reasoning that exceeds its limit
    answer_open: str  # appended to a prompt that ends in reasoning, to skip to the answer
    plain: bool  # control tokens that matter are not hidden, so output can be shown as it is
    answer_lead: str  # grammar expression for text between the reasoning and the rules below
    call_lead: str  # likewise between call_open and the rule `call`

    def messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Converts messages to the form that the template takes."""

    def variables(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Converts the variables that clients may set to those of the template."""

    def reasons(self, prompt: str) -> bool:
        """Whether the output after this prompt begins with reasoning."""

    def parser(
        self,
        tools: Sequence[dict[str, Any]] = (),
        reasoning: bool = False,
        held: bool = False,
        typed: Collection[str] = (),
    ) -> Parser:
        """A parser for one answer. The arguments are those of OutputParser."""

    def call_rules(self, calls: Calls, several: bool, tag: Callable[[str], str]) -> str:
        """Grammar rules: `calls`, one or more calls, and `call`, one without its opener."""

    def answer_rule(self, tag: Callable[[str], str]) -> str:
        """The rule `answer`: the opener of an answer after reasoning, then the rule `form`."""


class TagFamily:
    """Reasoning in <think>…</think>, calls in <tool_call>…</tool_call>: the format of Qwen and many others."""

    message_start, call_open, reasoning_end = "<|im_start|>", "<tool_call>", "</think>"
    reasoning_begin, reasoning_close, answer_open = "", "\n</think>\n\n", "\n</think>\n\n"
    answer_lead, call_lead = r"/\n{0,2}/ ", "NEWLINE? "
    plain = True

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
    """gpt-oss: channels, see text.harmony. The model first reasons in the analysis channel, so every prompt ends there."""

    message_start, call_open, reasoning_end = "<|start|>", "commentary to=functions.", "<|end|><|start|>assistant"
    reasoning_begin, reasoning_close = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant"
    answer_open = "<|channel|>final<|message|>"
    answer_lead = call_lead = ""
    plain = False

    def messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return harmony_messages(messages)

    def variables(self, variables: dict[str, Any]) -> dict[str, Any]:
        if variables.get("enable_thinking") is False:  # reasoning cannot be disabled, only shortened
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


class PlainText:
    """Output of a family that is not plain, as text: reasoning in <think>…</think>, calls as JSON in <tool_call>…</tool_call>."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._thinking = False

    def feed(self, text: str) -> str:
        """The next piece, control tokens included."""
        return self._written(self._parser.feed(text))

    def finish(self, cut: bool) -> str:
        """The end; cut: at the greatest length."""
        return self._written(self._parser.finish(cut)) + self._closed()

    def _written(self, events: list[Event]) -> str:
        text = ""
        for event in events:
            if isinstance(event, Reasoning):
                text += ("" if self._thinking else "<think>\n") + event.text
                self._thinking = True
            elif isinstance(event, Content):
                text += self._closed() + event.text
            elif isinstance(event, CallEnd):
                call = json.dumps({"name": event.name, "arguments": event.arguments}, ensure_ascii=False)
                text += f"{self._closed()}<tool_call>\n{call}\n</tool_call>\n"
        return text

    def _closed(self) -> str:
        thinking, self._thinking = self._thinking, False
        return "\n</think>\n\n" if thinking else ""


def family_of(template: str) -> Family:
    """The family of a chat template; TagFamily if it is unknown."""
    if "<|channel|>" in template and "<|message|>" in template:
        return HarmonyFamily()
    return TagFamily(xml="<function=" in template or not template)
