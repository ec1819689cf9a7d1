"""Requests that a sceptical client sent: none is a server error, none is lost silently."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from expertstream.engine import LLM

from .conftest import HELLO, TOOL, Server
from .scripted import scripted


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    server = Server(llm, aliases=("gpt-4",))
    yield server
    server.stop()


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    base: dict[str, Any] = (
        {"input": "x", "max_output_tokens": 2} if path == "responses" else {"messages": HELLO, "max_tokens": 2}
    )
    return httpx.post(f"{server.url}/v1/{path}", json={**base, **body}, timeout=60)


@pytest.mark.parametrize("key", ["$<expr>", "", "a>b", "a\nb", "<|im_end|>"])
def test_a_key_that_cannot_be_written_leaves_its_function_free(server: Server, key: str) -> None:
    odd = {"name": "odd", "parameters": {"type": "object", "properties": {key: {"type": "string"}}, "required": [key]}}
    assert post(server, "chat/completions", tools=[TOOL, {"type": "function", "function": odd}]).status_code == 200
    strict = post(server, "chat/completions", tools=[{"type": "function", "function": {**odd, "strict": True}}])
    assert strict.status_code == 400 and "cannot be guaranteed" in strict.text


@pytest.mark.parametrize("word", ["<|im_end|>", "a<|im_end|>b", "<think>", "<tool_call>\n"])
def test_words_that_are_control_tokens_are_told_before_the_answer(server: Server, word: str) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [word]}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    refused = post(server, "chat/completions", response_format=form)
    assert refused.status_code == 400 and "contains the control token" in refused.text
    function = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert post(server, "chat/completions", tools=[function]).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"chat_template_kwargs": {"parse_control_tokens": True, "self": 1, "messages_": 2}}),
        ("responses", {"chat_template_kwargs": {"parse_control_tokens": True, "self": 1}}),
        ("chat/completions", {"tools": [TOOL], "response_format": {"type": "json_object"}}),
        ("chat/completions", {"tools": [{"type": None, "function": TOOL["function"]}], "tool_choice": "required"}),
        ("chat/completions", {"logit_bias": {"5": None}}),
        ("responses", {"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]}, {"role": "user", "content": "x"}]}),
        ("responses", {"input": [{"role": "user", "content": "x"}, {"type": "message", "role": "assistant", "content": None}, {"role": "user", "content": "y"}]}),
        ("messages", {"messages": [*HELLO, {"role": "assistant", "content": None}, *HELLO]}),
    ],
)  # fmt: skip
def test_what_does_no_harm_is_taken(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = post(server, path, **body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("responses", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs must not contain messages; use the request's own messages"),
        ("responses", {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs must not contain tools; use the request's own tools"),
        *(("responses", {"input": [{"type": "function_call_output", "call_id": "c", "output": output}]}, "input.0.content") for output in (["text"], [1], [None], [[]], [{"type": 5}])),
        *(("chat/completions", {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", **more}}, "tool_choice.tools: must be a list") for more in ({"allowed_tools": None}, {"allowed_tools": 3}, {"tools": 5}, {})),
        ("responses", {"input": [{"type": "input_text", "text": "LOST?"}]}, "items of type 'input_text' are not supported"),
        ("responses", {"input": [{"type": "compaction"}]}, "items of type 'compaction' are not supported"),
        ("chat/completions", {"model": "zz"}, "there is no model 'zz'; available: 'small', 'gpt-4'; start the server with --alias"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_said(server: Server, path: str, body: dict[str, Any], message: str) -> None:
    answer = post(server, path, **body)
    assert answer.status_code in (400, 404) and message in answer.json()["error"]["message"], answer.text


def test_results_reach_the_model_as_they_are(server: Server, llm: LLM) -> None:
    items = [
        {"role": "user", "content": "x"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "output": {"a": True, "b": None}},
    ]
    with scripted(llm, "ok") as model:
        assert post(server, "responses", input=items).status_code == 200
    assert '{"a": true, "b": null}' in model.prompts[0]


def test_an_image_before_the_last_answer_is_history(server: Server) -> None:
    image = {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}
    said: list[Any] = [image, {"role": "assistant", "content": "I cannot see it."}]
    assert post(server, "messages", messages=[*said, {"role": "system", "content": "note"}]).status_code == 200
    assert post(server, "messages", messages=said).status_code == 200


def test_half_of_a_character_does_not_end_a_session(server: Server) -> None:
    body = b'{"messages": [{"role": "user", "content": "cut \\ud83d here \\ud83d\\ude00"}], "max_tokens": 2}'
    for path in ("chat/completions", "messages"):
        answer = httpx.post(
            f"{server.url}/v1/{path}", content=body, headers={"content-type": "application/json"}, timeout=60
        )
        assert answer.status_code == 200, answer.text
    assert (
        httpx.post(
            f"{server.url}/v1/messages", content=b'{"\\u', headers={"content-type": "application/json"}
        ).status_code
        == 400
    )


def test_lines_end_only_where_the_protocol_ends_them(server: Server, llm: LLM) -> None:
    text = "a\u2028b\u2029c\x85d"
    with (
        scripted(llm, text),
        httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json={"messages": HELLO, "stream": True}, timeout=60
        ) as answer,
    ):
        lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
    assert "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines) == text


def test_the_model_of_a_request_that_does_not_validate_is_logged(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with server.access_log(caplog) as lines:
        post(server, "chat/completions", model="small", temperature="hot")
    assert [line["model"] for line in lines if line["status"] == 400] == ["small"]


def test_tokens_are_counted_also_of_what_does_not_fit(server: Server) -> None:
    for words in (3000, 60_000):
        body = {"messages": [{"role": "user", "content": "word " * words}]}
        counted = httpx.post(f"{server.url}/v1/messages/count_tokens", json=body, timeout=60).json()["input_tokens"]
        assert abs(counted - words) < 0.02 * words + 40
        refused = httpx.post(f"{server.url}/v1/messages", json={**body, "max_tokens": 1}, timeout=60).json()["error"][
            "message"
        ]
        said = int(refused.partition(": ")[2].partition(" tokens")[0])
        assert abs(said - words) < 0.02 * words + 40


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_a_budget_of_nothing_closes_reasoning_at_once(server: Server, llm: LLM, path: str) -> None:
    more: dict[str, Any] = {"reasoning": {"effort": "low", "budget_tokens": 0}}
    with scripted(llm, "hm hm hm\n</think>\n\nDone."):
        answer = post(server, path, **more, max_tokens=40, max_output_tokens=40).json()
    assert "hm hm" not in json.dumps(answer.get("choices", [{}])[0].get("message", {}).get("reasoning_content") or "")
    usage = answer["usage"]
    details = usage.get("completion_tokens_details") or usage["output_tokens_details"]
    assert details["reasoning_tokens"] <= 3
