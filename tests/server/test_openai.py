"""The real `openai` client over a real socket, against the embedded model."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from expertstream.engine import LLM
from expertstream.server.app import MAX_BODY

from .conftest import HELLO, TOOL, Server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.openai()


def test_an_answer_is_the_engines(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.chat.completions.create(model="small", messages=HELLO, temperature=0, max_tokens=30)
    pieces = list(llm.chat(HELLO, temperature=0.0, max_tokens=30))
    assert answer.choices[0].message.content == "".join(p.text for p in pieces) == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop" and answer.model == "small"
    assert answer.usage is not None and answer.usage.completion_tokens == len(pieces)
    assert answer.usage.prompt_tokens == pieces[-1].stats.prompt_tokens
    assert [m.id for m in client.models.list()] == ["small"]


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "small", "messages": HELLO, "seed": 3, "max_tokens": 40}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and len(chunks) > 4
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason and chunks[-1].usage == whole.usage


def test_stop_length_and_sampling_are_obeyed(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "small", "messages": HELLO, "temperature": 0}
    cut = client.chat.completions.create(**options, stop=[" France"])
    assert cut.choices[0].message.content == "The capital of" and cut.choices[0].finish_reason == "stop"
    short = client.chat.completions.create(**options, max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage is not None and short.usage.completion_tokens == 2
    story: list[Any] = [{"role": "user", "content": "Tell me a story."}]
    texts = [client.chat.completions.create(model="small", messages=story, seed=s, max_tokens=20).choices[0].message.content for s in (1, 1, 2)]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]


def test_a_function_is_called_and_answered(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Show me the weather in Paris, please."}]
    options: dict[str, Any] = {"model": "small", "tools": [TOOL], "temperature": 0, "max_tokens": 100}
    answer = client.chat.completions.create(messages=messages, **options)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None and choice.message.tool_calls
    call: Any = choice.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    streamed: Any = [
        c.choices[0].delta.tool_calls
        for c in client.chat.completions.create(messages=messages, **options, stream=True)
        if c.choices
    ]
    called = [delta[0].function for delta in streamed if delta]
    assert [f.name for f in called if f.name] == ["get_weather"] and len(called) > 2  # as they are written
    assert "".join(f.arguments for f in called) == call.function.arguments
    messages += [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny"}'},
    ]
    said = client.chat.completions.create(messages=messages, **options).choices[0].message.content
    assert said and "<" not in said  # how good an answer it is, is the model's affair
    none = client.chat.completions.create(messages=messages[:1], **options, tool_choice="none")
    assert none.choices[0].message.tool_calls is None and none.choices[0].message.content


def test_several_answers_to_one_prompt(client: openai.OpenAI) -> None:
    story: list[Any] = [{"role": "user", "content": "Tell me a story about a fox. " * 20}]
    options: dict[str, Any] = {"model": "small", "messages": story, "max_tokens": 12, "seed": 5, "temperature": 1.0}
    answer = client.chat.completions.create(**options, n=3)
    texts = [c.message.content for c in answer.choices]
    assert [c.index for c in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert answer.usage is not None and answer.usage.completion_tokens == 36
    single = client.chat.completions.create(**{**options, "seed": 6})
    assert single.choices[0].message.content == texts[1]  # a seed each, and the same bits whether alone or not
    assert single.usage is not None and single.usage.prompt_tokens_details is not None
    assert single.usage.prompt_tokens_details.cached_tokens == (single.usage.prompt_tokens - 1) // 64 * 64 > 0
    parts = ["", "", ""]
    for chunk in client.chat.completions.create(**options, n=3, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
    assert parts == texts


def test_log_probabilities(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "small",
        "messages": HELLO,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    choice = client.chat.completions.create(**options).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    tokens = choice.logprobs.content
    assert "".join(t.token for t in tokens).startswith(choice.message.content or "?")
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(**options, stream=True):
        for c in chunk.choices:
            streamed += (c.logprobs.content or []) if c.logprobs else []
    assert [t.token for t in streamed] == [t.token for t in tokens]


def test_completions_of_texts_and_tokens(client: openai.OpenAI, llm: LLM) -> None:
    options: dict[str, Any] = {"model": "small", "temperature": 0, "max_tokens": 8}
    text = client.completions.create(prompt="Once upon a time", **options).choices[0]
    expected = "".join(p.text for p in llm.generate("Once upon a time", temperature=0.0, max_tokens=8))
    assert text.text == expected and text.finish_reason == "length"
    tokens = llm.tokenizer.encode("Once upon a time").tolist()
    assert client.completions.create(prompt=tokens, **options).choices[0].text == expected
    several = client.completions.create(prompt=["Once upon a time", "The sky"], **options, n=2, logprobs=1)
    assert [c.index for c in several.choices] == [0, 1, 2, 3] and several.choices[1].text == expected
    assert several.choices[0].logprobs is not None and len(several.choices[0].logprobs.tokens or ()) == 8
    streamed = "".join(c.choices[0].text for c in client.completions.create(prompt="Once upon a time", **options, stream=True))  # fmt: skip
    assert streamed == expected


BOOKING: Any = {
    "type": "function",
    "function": {
        "name": "book_table",
        "parameters": {
            "type": "object",
            "properties": {"guests": {"type": "integer", "minimum": 1, "maximum": 20}, "where": {"type": "string", "enum": ["inside", "outside"]}},
            "required": ["guests", "where"],
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "book_table"}}])
def test_a_required_call_fits_its_schema_whatever_is_said(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    for seed in range(3):
        options: dict[str, Any] = {
            "model": "small", "messages": [{"role": "user", "content": "Sing me a song."}], "tools": [TOOL, BOOKING], "tool_choice": choice,
            "seed": seed, "temperature": 1.5, "max_tokens": 300, "parallel_tool_calls": False,
        }  # fmt: skip
        if stream:
            chunks = list(client.chat.completions.create(**options, stream=True))
            deltas: list[Any] = [d for c in chunks for d in c.choices[0].delta.tool_calls or ()]
            calls: list[Any] = [d.function for d in deltas if d.function.name]
            calls[0].arguments = "".join(d.function.arguments for d in deltas)
            assert chunks[-1].choices[0].finish_reason == "tool_calls"
        else:
            answer = client.chat.completions.create(**options).choices[0]
            assert answer.finish_reason == "tool_calls" and answer.message.content is None
            calls = [c.function for c in answer.message.tool_calls or ()]  # type: ignore[union-attr]
        assert len(calls) == 1
        if choice != "required":
            assert calls[0].name == "book_table"
        schema = {t["function"]["name"]: t["function"]["parameters"] for t in (TOOL, BOOKING)}[calls[0].name]
        jsonschema.validate(json.loads(calls[0].arguments), schema)


def test_answers_in_json(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"animal": {"type": "string", "enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["animal", "legs"], "additionalProperties": False,
    }  # fmt: skip
    options: dict[str, Any] = {"model": "small", "messages": HELLO, "max_tokens": 200, "temperature": 1.2}
    for seed in range(3):
        form: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema, "strict": True}}
        text = client.chat.completions.create(**options, seed=seed, response_format=form).choices[0].message.content
        jsonschema.validate(json.loads(text or ""), schema)
    some = client.chat.completions.create(**options, seed=1, response_format={"type": "json_object"}).choices[0]
    assert some.finish_reason == "length" or isinstance(json.loads(some.message.content or ""), dict)


def test_strict_functions_under_auto(client: openai.OpenAI) -> None:
    strict = {**BOOKING, "function": {**BOOKING["function"], "strict": True}}
    for seed in range(4):
        message = client.chat.completions.create(
            model="small", messages=[{"role": "user", "content": "Book a table outside for 4."}], tools=[strict], seed=seed,
            temperature=1.2, max_tokens=200,
        ).choices[0].message  # fmt: skip
        for call in message.tool_calls or ():
            jsonschema.validate(json.loads(call.function.arguments), BOOKING["function"]["parameters"])  # type: ignore[union-attr]
        assert "<tool_call>" not in (message.content or "")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({}, 400, "messages: Field required"),
        ({"messages": HELLO, "logit_bias": {"1": 200}}, 400, "the bias of token 1 must be between -100 and 100; got 200"),
        ({"messages": HELLO, "logit_bias": {"9999": 2}}, 400, "logit_bias: tokens must be below 8192; got 9999"),
        ({"messages": HELLO, "n": 0}, 400, "n: Input should be greater"),
        ({"messages": HELLO, "tool_choice": "required"}, 400, "no tools"),
        ({"messages": HELLO, "tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [TOOL]}, 400, "not among the tools"),
        ({"messages": HELLO, "tools": [TOOL, {**TOOL, "function": {"name": "get_weather"}}]}, 400, "two different functions are called 'get_weather'"),
        ({"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}}}, 400, "cannot be enforced"),
        ({"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs needs logprobs: true"),
        ({"messages": HELLO, "temperature": -1}, 400, "temperature must be a number from 0"),
        ({"messages": HELLO, "max_tokens": 0}, 400, "max_tokens must be an integer"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "messages.0.content.0: this model reads text only; got image_url"),
        ({"messages": HELLO, "model": "other"}, 404, "no model 'other'"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "This model's maximum context length is 2048 tokens."),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_the_apis_shape(
    server: Server, body: dict[str, Any], status: int, message: str
) -> None:
    for stream in (False, True):
        response = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "stream": stream})
        assert response.status_code == status and message in response.json()["error"]["message"], response.text


def test_a_body_that_is_too_large_or_no_json_is_refused(server: Server) -> None:
    url = f"{server.url}/v1/chat/completions"
    for content, status in (
        (b"{" * (MAX_BODY + 1), 413),
        (b"\xff{", 400),
        (b"[" * 100_000, 400),
        (b'{"messages":[' + b"{}," * 500_000, 400),
    ):
        assert httpx.post(url, content=content, headers={"content-type": "application/json"}).status_code == status
    assert httpx.post(url, content=b"{}").status_code == 415
    answer = httpx.post(f"{server.url}/v1/embeddings", json={})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 404 and message.startswith("there is no POST /v1/embeddings; available: ")
    assert "POST /v1/chat/completions" in message and "GET /v1/models/{name}" in message.replace(":path", "")
    assert httpx.get(f"{server.url}/v1/messages").status_code == 405
