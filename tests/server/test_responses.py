"""OpenAI's Responses API, by the real `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from expertstream.engine import LLM

from .conftest import HELLO, TOOL, Server
from .scripted import scripted

FLAT: Any = {"type": "function", "strict": False, **TOOL["function"]}
CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    server = Server(llm)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.openai()


def test_a_response_is_the_chats_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "small", "temperature": 0}
    chat = client.chat.completions.create(messages=HELLO, max_tokens=30, **options)
    for given in (HELLO[0]["content"], HELLO, [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": HELLO[0]["content"]}]}]):  # fmt: skip
        answer = client.responses.create(input=given, max_output_tokens=30, **options)
        assert answer.output_text == chat.choices[0].message.content and answer.status == "completed"
    assert answer.usage is not None and chat.usage is not None
    assert answer.usage.total_tokens == chat.usage.total_tokens
    cut = client.responses.create(input="Hi", max_output_tokens=1, **options)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"  # type: ignore[union-attr]


def test_a_stream_has_the_events_that_clients_count_on(client: openai.OpenAI, llm: LLM) -> None:
    with scripted(llm, f"I think.\n</think>\n\nI look.\n\n{CALL}"):
        events = list(
            client.responses.create(model="small", input="x", tools=[FLAT], stream=True, reasoning={"effort": "low"})
        )
        with client.responses.stream(model="small", input="x", tools=[FLAT], reasoning={"effort": "low"}) as stream:
            for _ in stream:
                pass
            final = stream.get_final_response()
    kinds = [e.type for e in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    done = [e.item.type for e in events if e.type == "response.output_item.done"]
    assert done == ["reasoning", "message", "function_call"] == [item.type for item in final.output]
    for kind in ("output_text", "reasoning_text", "function_call_arguments"):
        whole = "".join(e.delta for e in events if e.type == f"response.{kind}.delta")
        (end,) = [e for e in events if e.type == f"response.{kind}.done"]
        assert whole == (end.arguments if kind == "function_call_arguments" else end.text)
    added = [e.output_index for e in events if e.type == "response.output_item.added"]
    assert (
        added == [0, 1, 2]
        and kinds.count("response.content_part.added") == kinds.count("response.content_part.done") == 2
    )
    assert json.loads(final.output[2].arguments) == {"city": "Paris"}  # type: ignore[union-attr]
    assert final.usage is not None and final.usage.output_tokens_details.reasoning_tokens > 0


def test_a_conversation_goes_on_with_its_items(client: openai.OpenAI, llm: LLM) -> None:
    """As Codex and others send them: instructions, several developers' messages, reasoning, calls and results with pictures."""
    with scripted(llm, "Sunny.") as model:
        items: list[Any] = [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
            {"role": "user", "content": "Weather?"},
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "I look."}], "content": None, "encrypted_content": None},
            {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Paris"}', "id": "fc_1", "status": "completed"},
            {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": '{"city": "Oslo"}'},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "snow"}, {"type": "input_image", "image_url": "data:,x"}]},
            {"type": "function_call_output", "call_id": "c1", "output": "sun"},
            {"type": "web_search_call", "id": "w", "status": "completed", "action": {"type": "search"}},
            {"role": "user", "content": "So?"},
        ]  # fmt: skip
        tools: list[Any] = [
            FLAT,
            {"type": "web_search"},
            {"type": "namespace", "name": "n", "description": "d", "tools": []},
            {"type": "custom", "name": "c"},
        ]
        answer = client.responses.create(model="small", instructions="You know the weather.", input=items, tools=tools, include=["reasoning.encrypted_content"], store=True)  # fmt: skip
    assert answer.output_text == "Sunny." and answer.store is False
    (prompt,) = model.prompts
    assert "You know the weather.\n\nBe brief." in prompt and prompt.count("<|im_start|>system") == 1
    paris, oslo = prompt.index("\nParis\n"), prompt.index("\nOslo\n")
    sun, snow = prompt.index("\nsun\n"), prompt.index("snow[image omitted")
    assert paris < oslo < sun < snow  # results in the order of their calls
    assert "[web search call omitted" in prompt


def test_forms_of_answers(client: openai.OpenAI) -> None:
    class Pet(pydantic.BaseModel):
        kind: str = pydantic.Field(max_length=6)
        legs: int = pydantic.Field(ge=0, le=9)

    answer = client.responses.parse(model="small", input="A pet.", text_format=Pet, max_output_tokens=200)
    assert isinstance(answer.output_parsed, Pet)
    form: Any = {"format": {"type": "json_object"}, "verbosity": "low"}
    text = client.responses.create(model="small", input="A pet.", text=form, max_output_tokens=400)
    assert text.status == "incomplete" or isinstance(json.loads(text.output_text), dict)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id is not supported: this server does not store conversations"),
        ({"input": "x", "conversation": "c"}, "conversation is not supported"),
        ({"input": []}, "input must have at least one item"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0: item_reference is not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0: this model reads text only; got input_image"),
        ({"input": [{"type": "message", "role": "user"}]}, "input.0: a message must have a role and content"),
        ({"input": "x", "tool_choice": "required", "tools": [{"type": "web_search"}]}, "there are no functions among the tools"),
        ({"input": "x", "n": 2}, "n must be 1; got 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(server: Server, body: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        answer = httpx.post(f"{server.url}/v1/responses", json={**body, "stream": stream})
        assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text


def test_a_picture_in_an_earlier_turn_does_not_end_the_session(client: openai.OpenAI) -> None:
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:,x"}, {"type": "input_text", "text": "What is it?"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I cannot see it.", "annotations": [], "logprobs": []}]},
        {"role": "user", "content": "All right."},
    ]  # fmt: skip
    assert client.responses.create(model="small", input=items, max_output_tokens=2).status == "incomplete"


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="small", input="Hi", temperature=0, max_output_tokens=5, top_logprobs=2, include=["message.output_text.logprobs"]
    )  # fmt: skip
    part: Any = answer.output[0].content[0]  # type: ignore[union-attr, index]
    assert "".join(p.token for p in part.logprobs) == part.text and len(part.logprobs[0].top_logprobs) == 2
