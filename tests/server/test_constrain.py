"""Whatever the model would like to say: under a grammar it can only say what parses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest

from expertstream import LLM, RequestError
from expertstream.engine import embedded_model
from expertstream.server.constrain import Grammars, Guide, OutputFormat
from expertstream.text.output import CallDelta, CallEnd, Content, Event, OutputParser, Reasoning

from .conftest import HELLO, Server

BOOK = {
    "name": "book",
    "parameters": {
        "type": "object",
        "properties": {
            "title": {"type": "string"},
            "pages": {"type": "integer", "minimum": 1},
            "price": {"type": "number"},
            "kind": {"type": "string", "enum": ["novel", "poems \"of\" <all>"]},
            "new": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
            "who": {"$ref": "#/$defs/person"},
        },
        "required": ["title", "kind", "who"],
        "$defs": {"person": {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False}},
    },
}  # fmt: skip
NOTHING: dict[str, Any] = {"name": "nothing-at.all", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(context_length=256) as llm:
        yield llm


@pytest.fixture(scope="module")
def grammars(llm: LLM) -> Grammars:
    return Grammars(llm)


def guided(grammars: Grammars, functions: Any, required: bool, several: bool = True, reasoning: bool = False) -> Guide:
    found = grammars.plan(functions, required, several, None, None).guide(reasoning)
    assert found is not None
    return found


def as_json(grammars: Grammars, schema: dict[str, Any] | None, reasoning: bool = False, strict: bool = True) -> Guide:
    form = OutputFormat("json", {"type": "object"} if schema is None else schema, strict)
    found = grammars.plan([], False, True, form, None).guide(reasoning)
    assert found is not None
    return found


def babble(llm: LLM, guide: Guide, seed: int, most: int = 600, said: str = "") -> str:
    """What a model of random taste says, which soon wants to come to an end: of the text, and before that of what it has begun."""
    rng, tokens = np.random.default_rng(seed), list[int]()
    vocabulary = [llm.tokenizer.token_text(i) for i in range(llm.model_config.vocab_size)]
    eos = sorted(llm.tokenizer.eos_ids)
    taste = rng.normal(size=len(vocabulary)).astype(np.float32) * 3
    for i in range(most):
        logits = taste + rng.normal(size=taste.shape).astype(np.float32)
        logits[eos] += i / 4
        thinking = "</think>" not in said and "<tool_call>" not in said
        closers = ("\n</parameter>\n<parameter=", "\n</parameter>\n</function>", '"', "}", "]")
        for closer in ("</think>",) if thinking else closers if i > 60 else ():
            begun = max(k for k in range(len(closer)) if said.endswith(closer[:k]))
            ahead = [t for t, text in enumerate(vocabulary) if text and closer[begun:].startswith(text)]
            logits[ahead] += 20 + 10 * begun + 3 * closer.endswith("=")
        masked = guide.mask(logits)
        token = int(masked.argmax())
        assert masked[token] > -np.inf
        guide.accept(token)
        if token in eos:
            return llm.tokenizer.decode(tokens, skip_special_tokens=False)
        tokens.append(token)
        said += llm.tokenizer.token_text(token)
        taste[token] -= 1
    raise AssertionError("it never ended: " + llm.tokenizer.decode(tokens, skip_special_tokens=False))


def parsed(text: str, functions: Any, reasoning: bool = False) -> list[Event]:
    """Parsed as a held answer: calls as their ends, after a look at what was streamed of them."""
    parser = OutputParser([{"function": f} for f in functions], reasoning, held=True)
    events, written = [], ""
    for event in [e for char in text for e in parser.feed(char)] + parser.finish():
        if isinstance(event, CallDelta):
            written += event.json
        elif isinstance(event, CallEnd):
            assert event.complete and json.loads(written) == event.arguments
            written = ""
        events.append(event)
    return [e for e in events if isinstance(e, CallEnd | Content | Reasoning)]


def check_call(call: Any) -> None:
    assert isinstance(call, CallEnd)
    schema = {f["name"]: f["parameters"] for f in (BOOK, NOTHING)}[call.name]
    jsonschema.validate(call.arguments, schema)


@pytest.mark.parametrize("reasoning", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_calls_parse_and_fit_their_schemas(llm: LLM, grammars: Grammars, seed: int, reasoning: bool) -> None:
    text = babble(llm, guided(grammars, [BOOK, NOTHING], True, reasoning=reasoning), seed)
    events = parsed(text, [BOOK, NOTHING], reasoning)
    calls = [e for e in events if not isinstance(e, Reasoning)]
    assert calls and (reasoning or len(calls) == len(events))
    for call in calls:
        check_call(call)


@pytest.mark.parametrize("seed", range(6))
def test_one_call_and_no_more(llm: LLM, grammars: Grammars, seed: int) -> None:
    (call,) = parsed(babble(llm, guided(grammars, [BOOK], True, several=False), seed), [BOOK])
    check_call(call)


@pytest.mark.parametrize("reasoning", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_free_text_until_a_call_begins(llm: LLM, grammars: Grammars, seed: int, reasoning: bool) -> None:
    """The opening tag is what the model chooses, wherever it stands; from there on it is held."""
    guide = guided(grammars, [BOOK, NOTHING], False, reasoning=reasoning)
    logits = np.zeros(llm.model_config.vocab_size, np.float32)
    assert guide.mask(logits) is logits  # free, and free of cost
    said = "Let me see <"
    for token in llm.tokenizer.encode(said).tolist():
        guide.accept(token)
    (opening,) = llm.tokenizer.encode("<tool_call>").tolist()
    guide.accept(opening)
    text = f"{said}<tool_call>{babble(llm, guide, seed, said='<tool_call>')}"
    found = parsed(text, [BOOK, NOTHING], reasoning)
    before = [e.text for e in found if isinstance(e, Reasoning if reasoning else Content)]
    assert "".join(before).startswith(said.strip())
    check_call(next(e for e in found if isinstance(e, CallEnd)))


def test_what_follows_a_call_is_free_and_the_next_one_held(llm: LLM, grammars: Grammars) -> None:
    guide = guided(grammars, [NOTHING], False)
    call = "<tool_call>\n<function=nothing-at.all>\n</function>\n</tool_call>"
    logits = np.zeros(llm.model_config.vocab_size, np.float32)
    for token in llm.tokenizer.encode(f"a{call}b{call}c").tolist():
        assert guide.mask(logits)[token] == 0
        guide.accept(token)
    assert guide.mask(logits) is logits


@pytest.mark.parametrize("seed", range(4))
def test_json_fits_its_schema(llm: LLM, grammars: Grammars, seed: int) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 5}}, "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
    jsonschema.validate(json.loads(babble(llm, as_json(grammars, schema), seed)), schema)
    assert isinstance(json.loads(babble(llm, as_json(grammars, None), seed)), dict)
    thought = babble(llm, as_json(grammars, schema, reasoning=True), seed)
    jsonschema.validate(json.loads(thought.split("</think>")[1]), schema)


@pytest.mark.parametrize("seed", range(4))
def test_calls_in_json(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded_model(), folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with LLM(folder, context_length=256) as llm:
        grammars = Grammars(llm)
        text = babble(llm, guided(grammars, [BOOK, NOTHING], True), seed)
    for call in parsed(text, [BOOK, NOTHING]):
        check_call(call)


def test_digits_come_to_an_end(llm: LLM, grammars: Grammars) -> None:
    """A model that likes nothing but nines."""
    guide = as_json(grammars, {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False})  # fmt: skip
    tokens: list[int] = []
    for _ in range(60):
        logits = np.zeros(llm.model_config.vocab_size, np.float32)
        logits[[i for i in range(len(logits)) if llm.tokenizer.token_text(i) == "9"]] = 50
        token = int(guide.mask(logits).argmax())
        guide.accept(token)
        if token in llm.tokenizer.eos_ids:
            break
        tokens.append(token)
    assert abs(json.loads(llm.tokenizer.decode(tokens))["n"]) <= 2**53


def test_what_a_client_cannot_be_given(grammars: Grammars) -> None:
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"properties": {"a": deep}}
    for schema, message in (
        (deep, "levels deep"),
        ({"enum": ["x" * 70_000]}, "at most 64 KiB"),
        ({"type": "nonsense"}, "cannot be enforced"),
        ({"$ref": "#/nowhere"}, "cannot be enforced"),
        ({"type": "string", "pattern": "(("}, "cannot be enforced"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "cannot be enforced"),
    ):
        with pytest.raises(RequestError, match=message):
            as_json(grammars, schema)


@pytest.mark.timeout(60)
def test_a_schema_made_to_hurt_neither_hangs_nor_crashes(llm: LLM, grammars: Grammars) -> None:
    for schema in (
        {"type": "string", "pattern": "^(a+)+$"},
        {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 3},
        {"anyOf": [{"type": "string", "pattern": f"a{{{i}}}b*"} for i in range(200)]},
        {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(1000)}},
        {"type": "string", "minLength": 10**9},
    ):
        try:
            guide = as_json(grammars, schema, strict=False)
            for _ in range(30):
                guide.accept(int(guide.mask(np.zeros(llm.model_config.vocab_size, np.float32)).argmax()))
        except RequestError as error:
            assert "cannot be enforced" in str(error)


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
def test_a_model_without_an_end_token_says_so_in_the_apis_shape(
    llm: LLM, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.tokenizer, "eos_ids", frozenset())
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "x", "schema": schema}
    body: dict[str, Any] = {
        "chat/completions": {"messages": HELLO, "response_format": {"type": "json_object"}},
        "responses": {"input": "x", "text": {"format": form}},
        "messages": {
            "messages": HELLO,
            "max_tokens": 5,
            "output_config": {"format": {"type": "json_schema", "schema": schema}},
        },
    }[path]
    server = Server(llm)
    try:
        answer = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)
        assert answer.status_code == 400 and "has no end token" in answer.json()["error"]["message"]
        assert answer.json()["error"]["type"] == "invalid_request_error"
        free = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 3}, timeout=60)
        assert free.json()["choices"][0]["finish_reason"] == "length"
    finally:
        server.stop()
