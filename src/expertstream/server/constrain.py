"""Decoding that cannot go wrong: grammars of function calls and of JSON, and the tokens that they allow next (by llguidance).

A grammar is in llguidance's form of Lark. Strings in a call of the XML format are free text up to the closing tag, as the format has it;
numbers, booleans, lists and objects are JSON of their schemas; a string with an enum is one of its values.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np

from ..engine import LLM
from ..errors import RequestError
from ..ops import F32

__all__ = ["Grammars", "GuidedDecoding"]

MOST_SCHEMA_BYTES = 64 << 10
MOST_SCHEMA_DEPTH = 32


class Grammars:
    """Of one model: its tokenizer, and the format in which its template has it write calls."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._tokenizer: Any = None
        self._lock = threading.Lock()
        self._xml = llm.tokenizer.writes_xml_calls()

    @property
    def tokenizer(self) -> Any:
        """llguidance's, made when it is first needed: that takes a while for a large vocabulary."""
        with self._lock:
            if self._tokenizer is None:
                llm = self._llm
                self._tokenizer = llguidance.LLTokenizer(
                    str(llm.path / "tokenizer.json"),
                    n_vocab=llm.model_config.vocab_size,
                    eos_token=sorted(llm.tokenizer.eos_ids),
                )
            return self._tokenizer

    def json(self, schema: dict[str, Any] | None, reasoning: bool) -> str:
        """An answer that is one JSON object, or one of a schema. reasoning: the prompt ends inside <think>."""
        schema = check_schema({"type": "object"} if schema is None else schema, "response_format")
        return self._start("body", reasoning) + f"body: {_json(schema)}\n"

    def calls(self, functions: Sequence[dict[str, Any]], required: bool, several: bool, reasoning: bool) -> str:
        """An answer that is one of these functions' calls, or several; if not required, text may come instead or before."""
        rules = []
        for i, function in enumerate(functions):
            parameters = check_schema(function.get("parameters") or {}, f"the parameters of {function['name']}")
            rules.append(self._call(i, function["name"], parameters))
        one = " | ".join(f"call{i}" for i in range(len(functions)))
        more = r" (/\n{1,2}/ call)*" if several else ""
        start = f"calls: call{more}\ncall: {one}\n"
        if required:
            return self._start("calls", reasoning) + start + "".join(rules)
        # Text before a call has no opening tag in it, so that every call is one of ours.
        free = r"FREE: /(?s:.*)/ & ~/(?s:.*)<tool_call>(?s:.*)/"
        return self._start("FREE calls?", reasoning) + f"{free}\n" + start + "".join(rules)

    def matcher(self, grammar: str) -> GuidedDecoding:
        """Raises RequestError for a grammar that a client's schema makes impossible."""
        return GuidedDecoding(self.tokenizer, grammar, self._llm.model_config.vocab_size)

    def _start(self, body: str, reasoning: bool) -> str:
        if not reasoning:
            return f"start: {body}\n"
        return f"start: THINK {self._tag('</think>')} /\\n{{0,2}}/ {body}\nTHINK: /(?s:.*)/ & ~/(?s:.*)<\\/think>(?s:.*)/\n"

    def _tag(self, text: str) -> str:
        """A control token, whatever the tokenizer thinks of it; else the text."""
        ids = self.tokenizer.tokenize_str(text, parse_special=True)
        return f"<[{ids[0]}]>" if len(ids) == 1 else _quoted(text)

    def _call(self, index: int, name: str, schema: dict[str, Any]) -> str:
        begin, end = self._tag("<tool_call>"), self._tag("</tool_call>")
        definitions: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        if not self._xml:
            # References in a schema are to its root, so definitions go to the new one.
            arguments = {key: value for key, value in schema.items() if key not in definitions}
            whole = {
                **definitions,
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": {"type": "object", **arguments}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            return f'call{index}: {begin} "\\n" {_json(whole)} "\\n" {end}\n'
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        required = schema.get("required")
        required = required if isinstance(required, list) else []
        parts, rules = [], []
        for j, (key, value) in enumerate(properties.items()):
            rule = f"p{index}_{j}"
            parts.append(rule if key in required else f"{rule}?")
            rules.append(f"{rule}: {_quoted(f'<parameter={key}>')} NL {_value(value, definitions)}\n")
        inner = " ".join(parts)
        head = f'call{index}: {begin} NL {_quoted(f"<function={name}>")} NL {inner} "</function>" NL {end}\n'
        # Text ends where it is closed for the first time, so that nobody can read it otherwise.
        shared = 'NL: "\\n"\nvalue[suffix="\\n</parameter>\\n"]: TEXT\n'
        shared += "TEXT: /(?s:.*)/ & ~/(?s:.*)<\\/(parameter|function|tool_call)>(?s:.*)/\n"
        return head + "".join(rules) + (shared if index == 0 else "")


def _value(schema: Any, definitions: dict[str, Any]) -> str:
    """A parameter's value with the tag that ends it."""
    end = '"\\n</parameter>\\n"'
    if not isinstance(schema, dict):
        return "value"
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(v, str) for v in values):
        return "(" + " | ".join(map(_quoted, values)) + ") " + end
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    if kind is not None and "string" not in kinds:
        return f"{_json({**definitions, **schema})} {end}"
    if "$ref" in schema or (isinstance(values, list) and not any(isinstance(v, str) for v in values)):
        return f"{_json({**definitions, **schema})} {end}"
    return "value"


def _json(schema: dict[str, Any]) -> str:
    """JSON as json.dumps() writes it: a model that may put white space anywhere may never stop doing so."""
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return f"%json {json.dumps({**_bounded(schema), 'x-guidance': style})}"


def _bounded(schema: Any) -> Any:
    """Whole numbers that have no bounds get those of what a double holds exactly: a model may never stop writing digits."""
    if isinstance(schema, list):
        return [_bounded(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {k: v if k in ("enum", "const", "default", "examples") else _bounded(v) for k, v in schema.items()}
    if schema.get("type") == "integer" and not schema.keys() & {"enum", "const", "multipleOf"}:
        if not schema.keys() & {"minimum", "exclusiveMinimum"}:
            found["minimum"] = -(2**53)
        if not schema.keys() & {"maximum", "exclusiveMaximum"}:
            found["maximum"] = 2**53
    return found


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def check_schema(schema: dict[str, Any], where: str) -> dict[str, Any]:
    """Raises RequestError for one that is larger or deeper than anybody needs."""
    if len(json.dumps(schema)) > MOST_SCHEMA_BYTES:
        raise RequestError(f"{where}: a schema is at most {MOST_SCHEMA_BYTES >> 10} KiB")
    level: list[Any] = [schema]
    for _ in range(MOST_SCHEMA_DEPTH):
        level = [v for x in level for v in (x.values() if isinstance(x, dict) else x) if isinstance(v, dict | list)]
        if not level:
            return schema
    raise RequestError(f"{where}: a schema is at most {MOST_SCHEMA_DEPTH} levels deep")


class GuidedDecoding:
    """One answer's way through a grammar: a sampling Constraint."""

    def __init__(self, tokenizer: Any, grammar: str, vocab_size: int) -> None:
        self._matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        error = self._matcher.get_error()
        if error:
            raise RequestError(f"the schema cannot be followed: {_short(error)}")
        self._bits = llguidance.numpy.allocate_token_bitmask(1, vocab_size)
        self._vocab_size = vocab_size

    def mask(self, logits: F32) -> F32:
        """Raises RequestError if the grammar has become too much to follow."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits, 0)
        if self._matcher.is_error():
            raise RequestError(f"the schema cannot be followed further: {_short(self._matcher.get_error())}")
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocab_size].astype(bool)
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Raises RequestError for a token that the mask did not allow."""
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            raise RequestError(f"the schema cannot be followed further: {_short(self._matcher.get_error())}")


def _short(error: str) -> str:
    return error.strip().split("\n")[0][:200]
