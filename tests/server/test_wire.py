"""Every field of the APIs is known here, and what becomes of it is said."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_create_params
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from expertstream.errors import RequestError
from expertstream.server.anthropic import CountRequest, MessagesRequest
from expertstream.server.openai import ChatRequest, CompletionRequest
from expertstream.server.responses import ResponsesRequest
from expertstream.server.wire import Wire, parse_request

HELLO = [{"role": "user", "content": "Hi"}]
OFFICIAL: list[tuple[type[Wire], Any]] = [
    (ChatRequest, chat_create_params.CompletionCreateParamsBase),
    (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
    (ResponsesRequest, response_create_params.ResponseCreateParamsBase),
    (MessagesRequest, message_create_params.MessageCreateParamsBase),
    (MessagesRequest, beta_create_params.MessageCreateParamsBase),
    (CountRequest, message_count_tokens_params.MessageCountTokensParams),
]


@pytest.mark.parametrize(("ours", "official"), OFFICIAL, ids=lambda kind: kind.__name__)
def test_every_official_field_is_declared(ours: type[Wire], official: Any) -> None:
    declared = {info.alias or name for name, info in ours.model_fields.items()}
    assert set(official.__annotations__) - declared == set()


def body(kind: type[Wire], **fields: Any) -> bytes:
    base: dict[str, Any] = {"messages": HELLO}
    if kind is CompletionRequest:
        base = {"prompt": "x"}
    elif kind is ResponsesRequest:
        base = {"input": "x"}
    elif kind is MessagesRequest:
        base["max_tokens"] = 5
    return json.dumps({**base, **fields}).encode()


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest, CountRequest])
def test_null_is_absence_for_every_optional_field(kind: type[Wire]) -> None:
    plain, *_ = parse_request(kind, body(kind))
    nulls = {info.alias or name: None for name, info in kind.model_fields.items() if not info.is_required()}
    required = {info.alias or name for name, info in kind.model_fields.items() if info.is_required()}
    nulls = {name: value for name, value in nulls.items() if name not in required and name != "input"}
    given, unknown, _ = parse_request(kind, body(kind, **nulls))
    assert given == plain and unknown == []


def test_null_is_absence_inside_messages_too() -> None:
    message = {
        "role": "assistant", "content": None, "name": None, "tool_calls": None, "tool_call_id": None, "reasoning_content": None, "refusal": None,
        "audio": None, "function_call": None, "annotations": None, "parsed": None, "reasoning": None, "reasoning_details": None,
    }  # fmt: skip
    request, unknown, _ = parse_request(ChatRequest, body(ChatRequest, messages=[*HELLO, message, *HELLO]))
    assert unknown == []
    assert request.generation_request().messages[1] == {"role": "assistant", "content": ""}


def test_what_cannot_change_the_text_is_taken() -> None:
    given = {
        "service_tier": "auto", "store": True, "prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "low", "metadata": {"a": "b"},
        "user": "u", "stream_options": {"include_obfuscation": True}, "prediction": {"type": "content", "content": "x"},
    }  # fmt: skip
    message = {
        "role": "assistant", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}], "parsed": {}, "refusal": None,
        "reasoning_details": [], "provider_specific_fields": {"a": 1},
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", "parsed_arguments": {}}}],
    }  # fmt: skip
    _, unknown, _ = parse_request(ChatRequest, body(ChatRequest, messages=[*HELLO, message], **given))
    assert unknown == []


def test_unknown_fields_are_named_once_at_every_depth() -> None:
    messages = [{"role": "user", "content": "x", "mood": "good"}, {"role": "user", "content": "y", "mood": "bad"}]
    _, unknown, _ = parse_request(ChatRequest, body(ChatRequest, messages=messages, wish=1))
    assert sorted(unknown) == ["messages.mood", "wish"]


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (CompletionRequest, {"suffix": "end"}, "suffix is not supported: this model cannot fill in"),
        (ChatRequest, {"functions": [{"name": "f"}]}, "functions is not supported: use tools"),
        (ChatRequest, {"audio": {"voice": "x"}}, "audio is not supported"),
        (ResponsesRequest, {"previous_response_id": "resp_1"}, "previous_response_id is not supported: this server does not store"),
        (ResponsesRequest, {"background": True}, "background is not supported"),
    ],
)  # fmt: skip
def test_what_would_change_the_text_is_refused_by_name(kind: type[Wire], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_request(kind, body(kind, **fields))
    for harmless in ("", [], {}, False, None):
        parse_request(kind, body(kind, **dict.fromkeys(fields, harmless)))


def test_minus_one_is_how_some_spell_not_given() -> None:
    request, *_ = parse_request(ChatRequest, body(ChatRequest, max_tokens=-1, seed=-1, top_k=-1))
    sampling = request.sampling()
    assert (sampling["max_tokens"], sampling["seed"], sampling["top_k"]) == (None, None, 0)


def test_stops_are_few_and_short() -> None:
    for stop in ("x" * 513, ["x"] * 17):
        request, *_ = parse_request(ChatRequest, body(ChatRequest, stop=stop))
        with pytest.raises(RequestError, match="stop must be at most 16 strings of at most 512"):
            request.sampling()
    request, *_ = parse_request(MessagesRequest, body(MessagesRequest, stop_sequences=["x" * 600]))
    with pytest.raises(RequestError, match="stop_sequences"):
        request.sampling()


@pytest.mark.parametrize(
    ("given", "choice", "named"),
    [
        (None, "auto", []), ("none", "none", []), ("required", "required", []), ("any", "required", []),
        ({"type": "function", "function": {"name": "f"}}, "named", ["f"]), ({"type": "function", "name": "f"}, "named", ["f"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}, "named", ["f"]),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}}, "auto", ["f"]),
    ],
)  # fmt: skip
def test_a_choice_of_tools_in_every_spelling(given: Any, choice: str, named: list[str]) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}, {"type": "custom", "custom": {"name": "g"}}]
    request, *_ = parse_request(ChatRequest, body(ChatRequest, tool_choice=given, tools=tools))
    asked = request.generation_request()
    assert (asked.choice, asked.named) == (choice, named)
    assert [f["name"] for f in asked.functions] == ["f"] and "'custom'" in asked.warnings[0]


def test_what_is_asked_for_and_not_done_is_warned_of() -> None:
    _, _, warnings = parse_request(
        MessagesRequest, body(MessagesRequest, mcp_servers=[{"name": "x"}], container="c", citations=None)
    )
    assert warnings == [
        "container is ignored: a service of the hosted API",
        "mcp_servers is ignored: a service of the hosted API",
    ]
    _, _, warnings = parse_request(MessagesRequest, body(MessagesRequest, mcp_servers=[], container=None))
    assert warnings == []


def test_the_table_in_the_documentation_is_the_code() -> None:
    root = Path(__file__).resolve().parents[2]
    written = runpy.run_path(str(root / "docs" / "generate_fields.py"))["written"]
    text = (root / "docs" / "serving.md").read_text(encoding="utf-8")
    assert text == written(text), "run `make docs`"
