"""The real `anthropic` client over a real socket, against the embedded model."""

from __future__ import annotations

import json
from typing import Any, Literal

import anthropic
import httpx
import jsonschema
import pytest

from expertstream.engine import LLM

from .conftest import HELLO, TOOL, Server
from .scripted import scripted

WEATHER: Any = {
    "name": "get_weather",
    "description": TOOL["function"]["description"],
    "input_schema": TOOL["function"]["parameters"],
}

GREEDY = {"temperature": 0}  # the newest clients know no such option


@pytest.fixture(scope="module")
def client(server: Server) -> anthropic.Anthropic:
    return server.anthropic()


def test_a_message(client: anthropic.Anthropic, server: Server) -> None:
    options: dict[str, Any] = {"model": "small", "max_tokens": 30, "extra_body": GREEDY}
    answer = client.messages.create(messages=HELLO, **options)
    expected = server.openai().chat.completions.create(model="small", messages=HELLO, temperature=0, max_tokens=30)
    assert [b.type for b in answer.content] == ["text"]
    assert answer.content[0].text == expected.choices[0].message.content  # type: ignore[union-attr]
    assert answer.stop_reason == "end_turn" and answer.role == "assistant" and answer.model == "small"
    count = client.messages.count_tokens(model="small", messages=HELLO).input_tokens
    assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) == count
    with_system = client.messages.create(messages=HELLO, system=[{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}], **options)  # fmt: skip
    assert with_system.usage.input_tokens > count


def test_a_stream_adds_up_to_the_message(client: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {"model": "small", "max_tokens": 25, "extra_body": GREEDY, "messages": HELLO}
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    assert [b.text for b in final.content] == [b.text for b in whole.content]  # type: ignore[union-attr]
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert events[0] == "message_start" and events[-1] == "message_stop" and "text" in events


def test_lengths_and_stop_sequences(client: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {"model": "small", "extra_body": GREEDY, "messages": HELLO}
    short = client.messages.create(max_tokens=2, **options)
    assert short.stop_reason == "max_tokens" and short.usage.output_tokens == 2
    cut = client.messages.create(max_tokens=30, stop_sequences=["nothing", " France"], **options)
    assert cut.stop_reason == "stop_sequence" and cut.stop_sequence == " France"
    assert cut.content[0].text == "The capital of"  # type: ignore[union-attr]


def test_an_answer_goes_on_from_its_beginning(client: anthropic.Anthropic) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The capital of France"}]
    answer = client.messages.create(model="small", max_tokens=20, extra_body=GREEDY, messages=messages)
    assert answer.content[0].text == "is Paris."  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_answered(client: anthropic.Anthropic, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "Show me the weather in Paris, please."}]
    options: dict[str, Any] = {
        "model": "small", "max_tokens": 200, "extra_body": GREEDY, "tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }  # fmt: skip
    if stream:
        with client.messages.stream(messages=messages, **options) as events:
            answer: Any = events.get_final_message()
    else:
        answer = client.messages.create(messages=messages, **options)
    assert answer.stop_reason == "tool_use"
    (call,) = [b for b in answer.content if b.type == "tool_use"]
    assert call.name == "get_weather"
    jsonschema.validate(call.input, WEATHER["input_schema"])
    messages += [
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}]},
    ]  # fmt: skip
    said = client.messages.create(messages=messages, **{**options, "tool_choice": {"type": "none"}})
    assert said.content and said.content[0].type == "text"


def test_thinking_comes_in_a_block_of_its_own(client: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {"model": "small", "max_tokens": 1500, "extra_body": GREEDY, "messages": HELLO, "thinking": {"type": "enabled", "budget_tokens": 1024}}  # fmt: skip
    answer = client.messages.create(**options)
    assert answer.content and answer.content[-1].type == "text"
    with client.messages.stream(**options) as stream:
        assert [b.type for b in stream.get_final_message().content] == [b.type for b in answer.content]


def test_what_programs_send_along_is_taken(server: Server) -> None:
    """And what changes with every request does not keep a prompt from being known."""
    cached = []
    for number in range(2):
        body = {
            "model": "small", "max_tokens": 3, "messages": HELLO, "context_management": {"edits": []},
            "system": [{"type": "text", "text": f"x-anthropic-billing-header: cch={number};"}, {"type": "text", "text": "You are kind. " * 60}],
            "tools": [{**WEATHER, "defer_loading": False, "eager_input_streaming": True}], "output_config": {"effort": "low"},
        }  # fmt: skip
        answer = httpx.post(f"{server.url}/v1/messages", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        cached.append(answer.json()["usage"]["cache_read_input_tokens"])
    assert cached[0] < cached[1]


def test_a_begun_answer_is_gone_on_with_without_reasoning_first(client: anthropic.Anthropic) -> None:
    messages: Any = [*HELLO, {"role": "assistant", "content": "The capital of France"}]
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    answer = client.messages.create(
        model="small", max_tokens=1100, extra_body=GREEDY, messages=messages, thinking=thinking
    )
    assert "</think>" not in answer.content[0].text  # type: ignore[union-attr]


def test_json_by_a_schema(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99}},
        "required": ["n"],
        "additionalProperties": False,
    }
    body = {"messages": HELLO, "max_tokens": 60, "output_config": {"format": {"type": "json_schema", "schema": schema}}}
    text = httpx.post(f"{server.url}/v1/messages", json=body, timeout=60).json()["content"][0]["text"]
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"messages": HELLO}, 400, "max_tokens: Field required"),
        ({"messages": [], "max_tokens": 1}, 400, "messages"),
        ({"messages": HELLO, "max_tokens": 1, "model": "other"}, 404, "no model 'other'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}], "max_tokens": 1}, 400, "this model reads text only; got image"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}], "max_tokens": 1}, 400, "must be in an assistant's message"),
        ({"messages": [{"role": "assistant", "content": "x"}], "max_tokens": 1}, 400, "the last message"),
        ({"messages": HELLO, "max_tokens": 1, "tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, 400, "not among the tools"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_the_apis_shape(
    server: Server, body: dict[str, Any], status: int, message: str
) -> None:
    for stream in (False, True):
        response = httpx.post(f"{server.url}/v1/messages", json={**body, "stream": stream})
        assert response.status_code == status, response.text
        found = response.json()
        assert found["type"] == "error" and message in found["error"]["message"]


def test_errors_are_the_clients_own(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="small", max_tokens=1, messages=[{"role": "user", "content": "word " * 3000}])
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=1, messages=HELLO)


def test_a_system_message_in_the_middle_is_users_text_in_its_place(server: Server, llm: LLM) -> None:
    """As Claude Code sends it: a list of blocks at first, a plain string in the next turn."""
    blocks = [
        {
            "type": "text",
            "text": "The date is today.",
            "cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "global"},
        }
    ]
    with scripted(llm, "Fine.") as model:
        for content in (blocks, "The date is today."):
            messages = [{"role": "user", "content": "Hi"}, {"role": "system", "content": content}]
            answer = httpx.post(
                f"{server.url}/v1/messages",
                json={"messages": messages, "max_tokens": 9, "system": "Be kind."},
                timeout=60,
            )
            assert answer.status_code == 200, answer.text
    assert model.prompts[0] == model.prompts[1]
    assert "<|im_start|>user\nHi\n\nThe date is today.<|im_end|>" in model.prompts[0]


def test_what_a_model_cannot_see_is_named_in_history_and_refused_when_new(server: Server, llm: LLM) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}
    pdf = {
        "type": "document",
        "title": "a.pdf",
        "source": {"type": "base64", "media_type": "application/pdf", "data": "x"},
    }
    text = {
        "type": "document",
        "title": "notes",
        "source": {"type": "text", "media_type": "text/plain", "data": "It says so."},
        "citations": {"enabled": True},
    }
    found = {
        "type": "search_result",
        "source": "http://x",
        "title": "Found",
        "content": [{"type": "text", "text": "There."}],
        "citations": {"enabled": False},
    }
    assistant = [
        {"type": "thinking", "thinking": "hm", "signature": "", "cache_control": {"type": "ephemeral"}}, {"type": "redacted_thinking", "data": "x"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}, {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
        {"type": "tool_use", "id": "t", "name": "get_weather", "input": {"city": "Paris"}, "cache_control": {"type": "ephemeral"}, "caller": {"type": "direct"}},
    ]  # fmt: skip
    result = {
        "type": "tool_result",
        "tool_use_id": "t",
        "content": [image, {"type": "tool_reference", "tool_name": "other"}, found],
        "cache_control": {"type": "ephemeral"},
    }
    messages: list[Any] = [
        {"role": "user", "content": [image, pdf, text, {"type": "text", "text": "Look.", "citations": []}]},
        {"role": "assistant", "content": assistant},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    tools: list[Any] = [
        {**WEATHER, "input_examples": [{"city": "Rome"}], "allowed_callers": ["direct"], "defer_loading": True},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 3},
    ]
    body = {
        "messages": messages,
        "tools": tools,
        "max_tokens": 9,
        "container": None,
        "mcp_servers": [],
        "model": "small",
    }
    with scripted(llm, "Yes.") as model:
        answer = httpx.post(f"{server.url}/v1/messages", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    (prompt,) = model.prompts
    for part in ("[image omitted: this model reads text only]", "[document 'a.pdf' omitted", "notes\nIt says so.", "[tool other]", "Found\nhttp://x\nThere.", "[web_search was called]"):  # fmt: skip
        assert part in prompt, part
    assert '"web_search"' not in prompt
    refused = httpx.post(
        f"{server.url}/v1/messages", json={**body, "messages": [*messages, {"role": "user", "content": [pdf]}]}
    )
    assert refused.status_code == 400 and "this model reads text only; got document" in refused.text


def test_the_sdks_tool_runner_goes_on_without_threads(client: anthropic.Anthropic, llm: LLM) -> None:
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Get the weather of a city.

        Args:
            city: The city
        """
        return f"{city}: sunny"

    call = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
    with scripted(llm, lambda prompt: "It is sunny." if "Paris: sunny" in prompt else call) as model:
        runner = client.beta.messages.tool_runner(
            model="small", max_tokens=300, messages=[{"role": "user", "content": "How is Paris?"}], tools=[get_weather]
        )
        last = runner.until_done()
    assert last.content[0].text == "It is sunny."  # type: ignore[union-attr]
    assert len(model.prompts) == 2 and "How is Paris?" in model.prompts[1]


def test_threads_are_declined_as_the_sdk_knows_it(server: Server) -> None:
    body = {"messages": HELLO, "max_tokens": 1, "thread": {"type": "create"}}
    error = httpx.post(f"{server.url}/v1/messages", json=body).json()["error"]
    assert error["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def test_tokens_of_a_whole_request_are_counted(client: anthropic.Anthropic, server: Server) -> None:
    body = {"messages": HELLO, "max_tokens": 9, "stream": True, "temperature": 0, "tools": [WEATHER], "metadata": {"user_id": "u"}, "stop_sequences": ["x"]}  # fmt: skip
    counted = httpx.post(f"{server.url}/v1/messages/count_tokens", json=body).json()["input_tokens"]
    answer = httpx.post(f"{server.url}/v1/messages", json={**body, "stream": False}, timeout=60).json()["usage"]
    assert counted == answer["input_tokens"] + answer["cache_read_input_tokens"]


def test_structured_output_by_the_sdks_helper(client: anthropic.Anthropic) -> None:
    import pydantic

    class Pet(pydantic.BaseModel):
        kind: Literal["cat", "dog"]
        tame: bool

    answer = client.messages.parse(model="small", max_tokens=100, messages=HELLO, output_format=Pet)
    assert answer.parsed_output is not None and answer.parsed_output.kind in ("cat", "dog")
