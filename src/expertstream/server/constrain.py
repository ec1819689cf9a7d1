"""Constrained decoding with llguidance: which tokens may come next.

An answer has phases. Reasoning is free, within its budget. Then either the whole answer follows a grammar (a JSON schema, a required call),
or it is free until the model begins a call, which follows the grammar of its function to the end: whether to call remains the model's
choice, but the call itself is always valid.
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
_TAIL = 64  # characters of the latest output; longer than any tag


@dataclass(frozen=True)
class OutputFormat:
    """The required format of a whole answer. kind: json (value: a schema), regex, choice (a list of strings), grammar (llguidance's Lark).
    strict: refuse what cannot be guaranteed instead of leaving it out."""

    kind: str
    value: Any
    strict: bool = False

    @classmethod
    def of_schema(cls, schema: dict[str, Any] | str, strict: bool) -> OutputFormat:
        """From a JSON schema, or its text. Raises RequestError."""
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                raise RequestError("guided_json must be a JSON schema") from None
        return cls("json", schema, strict)


@dataclass
class Plan:
    """How the answers to one request are constrained."""

    grammars: Grammars
    whole: tuple[str, str] | None = (
        None  # a grammar for everything after the reasoning: the body of its start rule, and the rules
    )
    call: str | None = None  # a grammar for what follows the opening tag of a call
    budget: int | None = None  # tokens of reasoning
    warnings: list[str] = field(default_factory=list)
    typed: frozenset[str] = frozenset()  # functions whose calls follow their schemas

    @property
    def holds_calls(self) -> bool:
        return self.call is not None

    def guide(self, reasoning: bool) -> Guide | None:
        """The guide of one answer; None if nothing is constrained. reasoning: the prompt ends inside <think>. Raises RequestError."""
        if self.whole is None and self.call is None and (self.budget is None or not reasoning):
            return None
        return Guide(self, reasoning)


class Grammars:
    """Grammars for one model: for its tokenizer, and the format in which its template writes calls."""

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
        """llguidance's tokenizer, created on first use: that takes a while for a large vocabulary."""
        with self._lock:
            if self._tokenizer is None:
                ends = [token for token in sorted(self.llm.tokenizer.eos_ids) if token < self.vocab_size]
                if not ends:
                    raise RequestError("this model has no end token, so its answers cannot be constrained")
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
        """functions: those that may be called. required: at least one must be. several: more than one may be. Raises RequestError if a
        strict schema cannot be guaranteed."""
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
        """A matcher at the start of the grammar. Raises RequestError if the grammar is invalid or too large."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is None:
                found = llguidance.LLMatcher(self.tokenizer, grammar, log_level=0)
                if found.get_error():
                    raise RequestError(f"the schema or grammar cannot be enforced: {_short(found.get_error())}")
                self._compiled[grammar] = found
                if len(self._compiled) > _KEPT_GRAMMARS:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            return found.deep_copy()

    def _calls(self, functions: Sequence[dict[str, Any]], plan: Plan) -> list[tuple[str, dict[str, Any] | None]]:
        """Names and normalized parameters; None, with a warning, for a function whose schema cannot be enforced. Raises RequestError if
        such a function is strict."""
        found: dict[str, dict[str, Any] | None] = {}
        strict = {f["name"] for f in functions if f.get("strict")}

        def leave_free(name: str, why: Exception) -> None:
            if name in strict:
                raise RequestError(
                    f"the parameters of {name} cannot be guaranteed, as strict requires: {why}"
                ) from None
            plan.warnings.append(f"calls of {name} are not constrained to its schema: {why}")
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
                plan.warnings.append(
                    f"calls of {name} are constrained to its schema except for {', '.join(parameters.dropped)}"
                )
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
        """The grammar of one call, without its opening tag: the model has written it."""
        return f"start: {self.family.call_lead}call\n" + self.family.call_rules(calls, False, self._tag)

    def _format(self, form: OutputFormat, plan: Plan) -> str:
        """Grammar rules that define `form`."""
        if form.kind == "regex":
            return f"form: /{llguidance.regex_to_lark(form.value)}/\n"
        if form.kind == "choice":
            if not form.value:
                raise RequestError("a choice must have at least one string")
            return f"form: {' | '.join(json.dumps(text, ensure_ascii=False) for text in form.value)}\n"
        if form.kind == "grammar":
            return f"form: %lark {{\n{form.value}\n}}\n"
        try:
            schema = normalize(form.value, exact=form.strict)
            self._check_words(schema.schema)
        except UnsupportedSchemaError as error:
            hint = " (without strict it is left out)" if form.strict else ""
            raise RequestError(f"the schema cannot be enforced: {error}{hint}") from None
        if schema.dropped:
            plan.warnings.append(f"the answer is constrained to its schema except for {', '.join(schema.dropped)}")
        return json_rule("form", schema.schema)

    def _check_words(self, schema: Any) -> None:
        """Raises UnsupportedSchemaError if a string of the schema contains a control token: the grammar would force that text, and forced
        text is written with the fewest tokens."""
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
        """The text as a single token, if it is one, whether or not the tokenizer counts it as special; else the text."""
        ids = self.tokenizer.tokenize_str(text, parse_special=True)
        return f"<[{ids[0]}]>" if len(ids) == 1 else json.dumps(text)


class Guide:
    """A sampling Constraint that takes one answer through its phases."""

    def __init__(self, plan: Plan, reasoning: bool) -> None:
        """Raises RequestError if the grammar cannot be enforced."""
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
        """Logits (vocab,) with -inf for tokens that are not allowed; the same array if all are. Raises RequestError if the grammar has
        become too complex."""
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
            raise RequestError(f"the schema cannot be enforced any further: {_short(self._matcher.get_error())}")
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
                self._matcher, self._tail = None, ""  # the call has ended; what follows is unconstrained
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
        """Consumes text that came in the same token as the tag before it."""
        if text:
            self._consume(self._grammars.tokenizer.tokenize_str(text))

    def _consume(self, tokens: list[int]) -> None:
        for token in tokens:
            if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
                raise RequestError(f"the schema cannot be enforced any further: {_short(self._matcher.get_error())}")


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments; a function that declares no arguments takes none."""
    schema: dict[str, Any] = function.get("parameters") or {}
    if schema.get("properties") or schema.keys() & _SAYS_MORE:
        return schema
    return {**schema, "type": "object", "additionalProperties": False}


def _short(error: str) -> str:
    return error.strip().split("\n")[0][:200]
