"""The real `openai` client over a real socket, against the embedded model."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from expertstream.cli import main
from expertstream.engine import LLM
from expertstream.server.app import MOST_BODY, create_app

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "The city"}}, "required": ["city"]},
    },
}  # fmt: skip


class Server:
    """The app in a thread of its own, on a free port."""

    def __init__(self, llm: LLM, **options: Any) -> None:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(create_app(llm, "small", **options), log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def waiting(self) -> int:
        return int(httpx.get(f"{self.url}/health").json()["waiting"])

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(context_length=2048) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    server = Server(llm, most_waiting=3)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


HELLO: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


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
    assert [(f.name, f.arguments) for f in called] == [("get_weather", call.function.arguments)]
    messages += [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny"}'},
    ]
    said = client.chat.completions.create(messages=messages, **options).choices[0].message.content
    assert said and "<" not in said  # how good an answer it is, is the model's affair
    none = client.chat.completions.create(messages=messages[:1], **options, tool_choice="none")
    assert none.choices[0].message.tool_calls is None and none.choices[0].message.content


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({}, 400, "messages: Field required"),
        ({"messages": HELLO, "logit_bias": {"1": 2}}, 400, "logit_bias: is not supported"),
        ({"messages": HELLO, "n": 2}, 400, "n: Input should be 1"),
        ({"messages": HELLO, "tool_choice": "required", "tools": [TOOL]}, 400, "tool_choice"),
        ({"messages": HELLO, "temperature": -1}, 400, "temperature is a number"),
        ({"messages": HELLO, "max_tokens": 0}, 400, "max_tokens is a whole number"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "messages.0.content"),
        ({"messages": HELLO, "model": "other"}, 404, "no model 'other'"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "make --context at least"),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]}, 400, "not a JSON object"),
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
    assert httpx.post(url, content=b"{" * (MOST_BODY + 1)).status_code == 413
    assert httpx.post(url, content=b"\xff{").status_code == 400
    assert httpx.post(url, content=b"[" * 100_000).status_code == 400
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"] == "Not Found"


def test_more_than_may_wait_are_told_so_and_the_others_answered(server: Server, client: openai.OpenAI) -> None:
    def ask(i: int) -> int:
        body = {"messages": HELLO, "seed": i, "max_tokens": 60, "temperature": 1.5}
        return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code

    with ThreadPoolExecutor(12) as pool:
        codes = list(pool.map(ask, range(12)))
    assert set(codes) == {200, 429} and codes.count(200) >= 4
    assert server.waiting() == 0


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_costs_nothing_more(server: Server, client: openai.OpenAI, stream: bool) -> None:
    """A text of a thousand tokens is asked for and left; the next one is answered long before it could have ended."""
    body = {
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": 1500,
        "temperature": 5,
        "stream": stream,
    }
    with pytest.raises(httpx.ReadTimeout):
        if stream:
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
                next(response.iter_bytes())
                raise httpx.ReadTimeout("enough")
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.5)
    for _ in range(300):
        if server.waiting() == 0:
            break
        time.sleep(0.01)
    assert server.waiting() == 0


def test_a_key_is_asked_for(llm: LLM) -> None:
    server = Server(llm, key="secret")
    try:
        assert server.client("secret").chat.completions.create(model="small", messages=HELLO, max_tokens=1).choices
        for request in (lambda c: c.models.list(), lambda c: c.chat.completions.create(model="small", messages=HELLO)):
            with pytest.raises(openai.AuthenticationError):
                request(server.client("wrong"))
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "give a key"),
        (["--port", "70000"], "--port"),
        (["--queue", "-1"], "--queue"),
        (["--api-key-file", "/no/such"], "cannot be read"),
        (["/no/such/model"], "no such folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_served(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EXPERTSTREAM_API_KEY", raising=False)
    assert main(["serve", *arguments]) in (2, 3)
    assert message in capsys.readouterr().err
