"""Constrained decoding: which tokens may come next, by llguidance.

An answer has phases. Reasoning is free, within its budget. Then either the whole answer follows a grammar (a JSON schema, a call that is
required), or it is free until the model begins a call, and the call follows the grammar of its function to its end: whether to call stays
the model's choice, the call itself cannot go wrong.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np

from ..engine import LLM
from ..errors import RequestError
from ..ops import F32
from ..text.grammar import json_rule
from ..text.schema import UnsupportedSchemaError, normalize

__all__ = ["Grammars", "Guide", "OutputFormat", "Plan"]

_KEPT_GRAMMARS = 32
_SAYS_MORE = frozenset(("$ref", "additionalProperties", "allOf", "anyOf", "oneOf", "patternProperties"))
_TAIL = 64  # characters of what was written last; longer than any tag


@dataclass(frozen=True)
class OutputFormat:
    """The form of a whole answer. kind: json (value: a schema), regex, choice (a list of texts), grammar (llguidance's Lark).
    strict: refuse what cannot be guaranteed, instead of leaving it out."""

    kind: str
    value: Any
    strict: bool = False

    @classmethod
    def of_schema(cls, schema: dict[str, Any] | str, strict: bool) -> OutputFormat:
        """A JSON schema, or its text. Raises RequestError."""
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                raise RequestError("guided_json: not a JSON schema") from None
        return cls("json", schema, strict)


@dataclass
class Plan:
    """How the answers to one request are constrained."""

    grammars: Grammars
    whole: tuple[str, str] | None = (
        None  # a grammar for all that follows the reasoning: what it begins with, and its rules
    )
    call: str | None = None  # a grammar for what follows the opening tag of a call
    budget: int | None = None  # tokens of reasoning
    warnings: list[str] = field(default_factory=list)
    typed: frozenset[str] = frozenset()  # functions whose calls follow their schemas

    @property
    def holds_calls(self) -> bool:
        return self.call is not None

    def guide(self, reasoning: bool) -> Guide | None:
        """For one answer; None where nothing is to be guided. reasoning: the prompt ends inside <think>. Raises RequestError."""
        if self.whole is None and self.call is None and (self.budget is None or not reasoning):
            return None
        return Guide(self, reasoning)


class Grammars:
    """Of one model: its tokenizer, and the format in which its template has it write calls."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.vocab_size = llm.model_config.vocab_size
        self._tokenizer: Any = None
        self._lock = threading.RLock()
        self.family = llm.tokenizer.family
        self._control = llm.tokenizer.added_tokens()
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    @property
    def tokenizer(self) -> Any:
        """llguidance's, made when it is first needed: that takes a while for a large vocabulary."""
        with self._lock:
            if self._tokenizer is None:
                ends = [token for token in sorted(self.llm.tokenizer.eos_ids) if token < self.vocab_size]
                if not ends:
                    raise RequestError("this model has no end token, without which no answer can be constrained")
                self._tokenizer = llguidance.LLTokenizer(
                    str(self.llm.path / "tokenizer.json"),
                    n_vocab=self.vocab_size,
                    eos_token=ends,
                )
            return self._tokenizer

    def plan(
        self,
        functions: Sequence[dict[str, Any]],
        required: bool,
        several: bool,
        format_: OutputFormat | None,
        budget: int | None,
    ) -> Plan:
        """functions: that may be called. required: at least one must be. several: more than one may be. Raises RequestError for what
        cannot be guaranteed and has to be."""
        plan = Plan(self, budget=budget)
        calls = self._calls(functions, plan) if functions else []
        if calls:
            plan.call = self._call_grammar(calls)
            plan.typed = frozenset(name for name, schema in calls if schema is not None)
        form = self._format(format_, plan) if format_ is not None else ""
        rules = self.family.call_rules(calls, several, self._tag) if calls else ""
        answer = form + self.family.answer_rule(self._tag) if form else ""
        if required or (form and calls):
            plan.whole = ("calls" if required else "(calls | answer)", rules + ("" if required else answer))
        elif form:
            plan.whole = ("answer", answer)
        return plan

    def matcher(self, grammar: str) -> Any:
        """A matcher at the beginning of the grammar. Raises RequestError for a grammar that is none or too large."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is None:
                found = llguidance.LLMatcher(self.tokenizer, grammar, log_level=0)
                if found.get_error():
                    raise RequestError(f"the schema or grammar cannot be followed: {_short(found.get_error())}")
                self._compiled[grammar] = found
                if len(self._compiled) > _KEPT_GRAMMARS:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return found.deep_copy()

    def _calls(self, functions: Sequence[dict[str, Any]], plan: Plan) -> list[tuple[str, dict[str, Any] | None]]:
        """Names and normalized parameters. None for a function whose calls cannot be held to its schema, which is warned of. Raises
        RequestError if such a function is strict."""
        found: dict[str, dict[str, Any] | None] = {}
        strict = {f["name"] for f in functions if f.get("strict")}

        def leave_free(name: str, why: Exception) -> None:
            if name in strict:
                raise RequestError(f"the parameters of {name} cannot be guaranteed, as strict asks: {why}") from None
            plan.warnings.append(f"calls of {name} are not held to its schema: {why}")
            found[name] = None

        for function in functions:
            name = function["name"]
            try:
                parameters = normalize(_parameters(function), exact=name in strict)
                self._check_words(parameters.schema)
            except UnsupportedSchemaError as error:
                leave_free(name, error)
                continue
            if parameters.dropped:
                plan.warnings.append(f"calls of {name} are held to its schema but for {', '.join(parameters.dropped)}")
            found[name] = parameters.schema
        try:
            self.matcher(self._call_grammar(list(found.items())))
        except (RequestError, ValueError):
            for name, schema in list(found.items()):
                try:
                    self.matcher(self._call_grammar([(name, schema)]))
                except (RequestError, ValueError) as error:
                    leave_free(name, error)
        return list(found.items())

    def _call_grammar(self, calls: Sequence[tuple[str, dict[str, Any] | None]]) -> str:
        """One call, but for its opening tag: the model has written it."""
        return f"start: {self.family.call_lead}call\n" + self.family.call_rules(calls, False, self._tag)

    def _format(self, form: OutputFormat, plan: Plan) -> str:
        """Rules, of which `form` is one."""
        if form.kind == "regex":
            return f"form: /{llguidance.regex_to_lark(form.value)}/\n"
        if form.kind == "choice":
            if not form.value:
                raise RequestError("a choice must have at least one text")
            return f"form: {' | '.join(json.dumps(text, ensure_ascii=False) for text in form.value)}\n"
        if form.kind == "grammar":
            return f"form: %lark {{\n{form.value}\n}}\n"
        try:
            schema = normalize(form.value, exact=form.strict)
            self._check_words(schema.schema)
        except UnsupportedSchemaError as error:
            hint = " (without strict it is left out)" if form.strict else ""
            raise RequestError(f"the schema cannot be followed: {error}{hint}") from None
        if schema.dropped:
            plan.warnings.append(f"the answer is held to its schema but for {', '.join(schema.dropped)}")
        return json_rule("form", schema.schema)

    def _check_words(self, schema: Any) -> None:
        """Raises UnsupportedSchemaError for a schema with words that cannot be written without control tokens: as text they would be
        forced, and what is forced is written with the fewest tokens."""
        open_ = [schema]
        while open_:
            here = open_.pop()
            words = (
                [here.get("const"), *(here.get("enum") or ()), *(here.get("properties") or ())]
                if isinstance(here, dict)
                else []
            )
            for word in words:
                text = word if isinstance(word, str) else json.dumps(word)
                control = next((token for token in self._control if token in text), None)
                if control is not None:
                    raise UnsupportedSchemaError(f"{text!r:.100} contains the control token {control}")
            open_ += here.values() if isinstance(here, dict) else here if isinstance(here, list) else ()

    def _tag(self, text: str) -> str:
        """A control token, whatever the tokenizer thinks of it; else the text."""
        ids = self.tokenizer.tokenize_str(text, parse_special=True)
        return f"<[{ids[0]}]>" if len(ids) == 1 else json.dumps(text)


class Guide:
    """One answer's way through its phases: a sampling Constraint."""

    def __init__(self, plan: Plan, reasoning: bool) -> None:
        """Raises RequestError for a grammar that cannot be followed."""
        self._grammars = plan.grammars
        self._tokenizer = plan.grammars.llm.tokenizer
        self._reasoning = reasoning
        self._left = plan.budget if reasoning else None
        self._family = plan.grammars.family
        self._forced: list[int] = []  # tokens that begin the reasoning, or close it
        self._closing = False
        self._tail = ""
        self._matcher: Any = None
        self._whole: Any = None
        if plan.whole is not None:
            body, rules = plan.whole
            lead = self._family.answer_lead if reasoning else ""
            body = body if reasoning else body.replace("answer", "form")
            self._whole = plan.grammars.matcher(f"start: {lead}{body}\n{rules}")
        self._call = plan.grammars.matcher(plan.call) if plan.call is not None else None
        self._bits: Any = None
        if not reasoning:
            self._matcher = self._whole
        elif self._whole is not None or self._left is not None:
            self._forced = self._tokenizer.encode(self._family.reasoning_begin).tolist()

    def mask(self, logits: F32) -> F32:
        """Logits (vocab,) in which tokens that may not come are -inf; the same array where all may. Raises RequestError if the
        grammar has become too much to follow."""
        if self._reasoning:
            if self._left == 0 and not self._forced:
                self._forced = self._tokenizer.encode(self._family.reasoning_close).tolist()
                self._closing = True
            if self._forced:
                only = np.full_like(logits, -np.inf)
                only[self._forced[0]] = logits[self._forced[0]]
                return only
            if self._whole is not None:  # the answer is still to come
                masked = logits.copy()
                masked[[token for token in self._tokenizer.eos_ids if token < len(masked)]] = -np.inf
                return masked
        if self._matcher is None:
            return logits
        if self._bits is None:
            self._bits = llguidance.numpy.allocate_token_bitmask(1, self._grammars.vocab_size)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits, 0)
        if self._matcher.is_error():
            raise RequestError(f"the schema cannot be followed further: {_short(self._matcher.get_error())}")
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._grammars.vocab_size].astype(bool)
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Raises RequestError for a token that the mask did not allow."""
        if self._forced:
            self._forced.pop(0)
            if not self._forced and self._closing:
                self._end_reasoning("")
            return
        if self._left is not None and self._reasoning:
            self._left -= 1
        if self._matcher is not None:
            self._consume([token])
            if self._matcher.is_stopped() and self._matcher is not self._whole:
                self._matcher, self._tail = None, ""  # the call has ended; the text is free again
            return
        if token in self._tokenizer.eos_ids:
            return
        self._tail = (self._tail + self._tokenizer.token_text(token))[-_TAIL:]
        if self._call is not None and self._family.call_open in self._tail:
            # Also inside reasoning: small models forget to close it.
            rest = self._tail.partition(self._family.call_open)[2]
            self._reasoning, self._matcher = False, self._call.deep_copy()
            self._feed(rest)
        elif self._reasoning and self._family.reasoning_end in self._tail:
            self._end_reasoning(self._tail.partition(self._family.reasoning_end)[2])

    def _end_reasoning(self, rest: str) -> None:
        self._reasoning, self._tail = False, ""
        if self._whole is not None:
            self._matcher = self._whole
            self._feed(rest)

    def _feed(self, text: str) -> None:
        """Text that came in one token with the tag before it."""
        if text:
            self._consume(self._grammars.tokenizer.tokenize_str(text))

    def _consume(self, tokens: list[int]) -> None:
        for token in tokens:
            if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
                raise RequestError(f"the schema cannot be followed further: {_short(self._matcher.get_error())}")


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments; one that names none takes none."""
    schema: dict[str, Any] = function.get("parameters") or {}
    if schema.get("properties") or schema.keys() & _SAYS_MORE:
        return schema
    return {**schema, "type": "object", "additionalProperties": False}


def _short(error: str) -> str:
    return error.strip().split("\n")[0][:200]
