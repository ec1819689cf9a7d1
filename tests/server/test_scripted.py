"""What a server makes of what a model writes, with a model that writes what the test says."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from expertstream.engine import LLM
from expertstream.server import stream as stream_module
from expertstream.server.scheduler import Job
from expertstream.text.control import ChatPrompt

from .conftest import HELLO, TOOL, Server
from .scripted import scripted

EDIT: Any = {
    "type": "function",
    "function": {
        "name": "edit",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "text": {"type": "string"}, "lines": {"type": "array", "items": {"type": "integer"}}},
            "required": ["path", "text"],
        },
    },
}  # fmt: skip
EDIT_CALL = ChatPrompt(
    (
        "<tool_call>\n<function=edit>\n<parameter=path>\na.xml\n</parameter>\n<parameter=text>\n<a>\n</parameter>\n<",
        "/tool_call>é\n</a>\n</parameter>\n<parameter=lines>\n[1, 2]\n</parameter>\n</function>\n</tool_call>",
    )
)
EDIT_ARGUMENTS = {"path": "a.xml", "text": "<a>\n</parameter>\n</tool_call>é\n</a>", "lines": [1, 2]}


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    server = Server(llm)
    yield server
    server.stop()


def anthropic_tool(tool: Any) -> Any:
    return {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]}


def chat(server: Server, **body: Any) -> list[Any]:
    return list(server.openai().chat.completions.create(model="small", messages=HELLO, stream=True, **body))


def test_a_call_is_streamed_as_it_is_written(server: Server, llm: LLM) -> None:
    with scripted(llm, ChatPrompt(("I will edit it.\n\n",)) + EDIT_CALL):
        chunks = chat(server, tools=[EDIT], temperature=0)
        with server.anthropic().messages.stream(
            model="small", max_tokens=500, messages=HELLO, tools=[anthropic_tool(EDIT)]
        ) as events:
            kinds = [e.type for e in events]
            message: Any = events.get_final_message()
        response = list(
            server.openai().responses.create(model="small", input="x", tools=[{"type": "function", "strict": False, **EDIT["function"]}], stream=True)
        )  # fmt: skip
    deltas = [d for c in chunks if c.choices for d in c.choices[0].delta.tool_calls or ()]
    assert len(deltas) > 10 and deltas[0].function.name == "edit" and deltas[0].function.arguments == ""
    assert json.loads("".join(d.function.arguments for d in deltas)) == EDIT_ARGUMENTS
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert message.content[0].text == "I will edit it." and message.content[1].input == EDIT_ARGUMENTS
    assert message.stop_reason == "tool_use" and kinds.count("input_json") > 10
    arguments = [e.delta for e in response if e.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(arguments)) == EDIT_ARGUMENTS and len(arguments) > 10
    assert [e.sequence_number for e in response] == list(range(len(response)))
    assert response[-1].type == "response.completed"
    assert [item.type for item in response[-1].response.output] == ["message", "function_call"]


def test_a_free_call_is_held_to_its_schema_from_its_beginning(server: Server, llm: LLM) -> None:
    """Whether to call is the model's choice; a call of a function that there is not, or with arguments that do not fit, cannot come."""
    wrong = "<tool_call>\n<function=erase>\n<parameter=everything>\nyes\n</parameter>\n</function>\n</tool_call>"
    with scripted(llm, wrong):
        answer = server.openai().chat.completions.create(
            model="small", messages=HELLO, tools=[TOOL], max_tokens=400, seed=1
        )
    choice = answer.choices[0]
    if choice.finish_reason == "tool_calls":
        call: Any = choice.message.tool_calls[0]  # type: ignore[index]
        assert call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city"}
    else:  # it wrote the city's name until its length ended
        assert choice.finish_reason == "length" and choice.message.tool_calls[0].function.name == "get_weather"  # type: ignore[index, union-attr]
    with scripted(llm, "No call at all, and <function=x> is text."):
        said = server.openai().chat.completions.create(model="small", messages=HELLO, tools=[TOOL])
    assert said.choices[0].message.content == "No call at all, and <function=x> is text."


def test_a_call_inside_reasoning_is_a_call(server: Server, llm: LLM) -> None:
    call = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
    with scripted(llm, f"I should look.\n{call}"):
        answer = server.openai().chat.completions.create(
            model="small", messages=HELLO, tools=[TOOL], extra_body={"enable_thinking": True}
        )
    message: Any = answer.choices[0].message
    assert message.reasoning_content == "I should look." and json.loads(message.tool_calls[0].function.arguments) == {
        "city": "Paris"
    }


def test_a_call_cut_by_its_length_is_given_as_far_as_it_came(server: Server, llm: LLM) -> None:
    options: dict[str, Any] = {"model": "small", "messages": HELLO, "max_tokens": 22}
    with scripted(llm, EDIT_CALL):
        choice = server.openai().chat.completions.create(tools=[EDIT], **options).choices[0]
        streamed = chat(server, tools=[EDIT], max_tokens=22)
        message: Any = server.anthropic().messages.create(tools=[anthropic_tool(EDIT)], **options)
    assert choice.finish_reason == "length" and not choice.message.content
    call: Any = choice.message.tool_calls[0]  # type: ignore[index]
    assert call.function.name == "edit" and call.function.arguments.startswith('{"path": "a.xml"')
    deltas = [d for c in streamed for d in c.choices[0].delta.tool_calls or ()]
    assert "".join(d.function.arguments for d in deltas) == call.function.arguments
    assert message.stop_reason == "max_tokens" and message.content[0].input["path"] == "a.xml"


def test_reasoning_is_closed_when_its_budget_is_spent(server: Server, llm: LLM) -> None:
    with scripted(llm, "hm " * 300 + "\n</think>\n\nDone."):
        message: Any = server.anthropic().messages.create(
            model="small", max_tokens=400, messages=HELLO, thinking={"type": "enabled", "budget_tokens": 20}
        )
    assert message.content[0].type == "thinking" and 5 <= message.content[0].thinking.count("hm") <= 20
    assert message.content[1].type == "text"
    with scripted(llm, "hm " * 10 + "\n</think>\n\nDone."):
        message = server.anthropic().messages.create(
            model="small", max_tokens=400, messages=HELLO, thinking={"type": "enabled", "budget_tokens": 200}
        )
    assert [b.type for b in message.content] == ["thinking", "text"] and message.content[1].text == "Done."


def test_tools_and_a_response_format_are_a_grammar_of_either(server: Server, llm: LLM) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    options: dict[str, Any] = {"model": "small", "messages": HELLO, "tools": [TOOL], "response_format": form}
    with scripted(llm, '{"n": 3}'):
        assert server.openai().chat.completions.create(**options).choices[0].message.content == '{"n": 3}'
    with scripted(llm, EDIT_CALL.text.replace("edit", "get_weather").replace("path", "city")):
        calls = server.openai().chat.completions.create(**options, max_tokens=300).choices[0].message.tool_calls
    assert calls and calls[0].function.name == "get_weather"  # type: ignore[union-attr]
    with scripted(llm, "Neither of them."):
        choice = server.openai().chat.completions.create(**options, max_tokens=300, seed=3).choices[0]
    assert choice.message.tool_calls or choice.message.content is None or choice.message.content.startswith("{")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"guided_choice": ["yes", "no"]}, "no"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no"),
        ({"guided_regex": "n[a-z]"}, "no"),
        ({"structured_outputs": {"regex": "^n[a-z]$"}}, "no"),
        ({"guided_json": {"enum": ["no"]}}, '"no"'),
        ({"guided_json": '{"enum": ["no"]}'}, '"no"'),
        ({"structured_outputs": {"json": {"enum": ["no"]}}}, '"no"'),
        ({"guided_grammar": 'start: "no" | "yes"'}, "no"),
    ],
)
def test_the_form_of_an_answer_under_its_popular_names(server: Server, llm: LLM, given: Any, expected: str) -> None:
    with scripted(llm, "no, never, " + expected):
        chats = server.openai().chat.completions.create(model="small", messages=HELLO, max_tokens=20, extra_body=given)
        text = server.openai().completions.create(model="small", prompt="x", max_tokens=20, extra_body=given)
    assert chats.choices[0].message.content == expected == text.choices[0].text


def test_two_forms_are_one_too_many(server: Server) -> None:
    body = {"messages": HELLO, "guided_regex": "a", "response_format": {"type": "json_object"}}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "the answer can have only one format" in answer.text
    for form in ({"guided_regex": "("}, {"guided_grammar": "start: nothing"}, {"guided_choice": []}):
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO, **form})
        assert answer.status_code == 400, answer.text


def test_heartbeats_are_events_of_each_api(server: Server, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a long prompt is read, and counted from the last byte that was sent, not from the last token."""
    monkeypatch.setattr(stream_module, "HEARTBEAT_SECONDS", 0.05)
    bodies: dict[str, Any] = {
        "chat/completions": {"messages": HELLO}, "completions": {"prompt": "a " * 30}, "responses": {"input": "a " * 30},
        "messages": {"messages": HELLO, "max_tokens": 9},
    }  # fmt: skip
    for path, body in bodies.items():
        with scripted(llm, "ok", seconds_per_token=0.02):
            text = httpx.post(f"{server.url}/v1/{path}", json={**body, "stream": True}, timeout=30).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert not any(line.startswith(":") for line in text.splitlines())
        if path == "messages":
            beats = [e for e in events if e["type"] == "ping"]
        elif path == "responses":
            beats = [e for e in events if e["type"] == "response.in_progress"][1:]
        elif path == "completions":
            beats = [e for e in events if e["choices"][0]["text"] == "" and not e["choices"][0]["finish_reason"]]
        else:
            beats = [e for e in events if e["choices"][0]["delta"] == {} and not e["choices"][0]["finish_reason"]]
        assert len(beats) >= 3, (path, text)


def test_silence_is_counted_in_bytes_not_in_tokens(server: Server, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that is no string is held back until it is whole; its tokens are no news for the client."""
    monkeypatch.setattr(stream_module, "HEARTBEAT_SECONDS", 0.1)
    numbers = json.dumps(list(range(100, 140)))
    call = f"<tool_call>\n<function=edit>\n<parameter=path>\na\n</parameter>\n<parameter=text>\nb\n</parameter>\n<parameter=lines>\n{numbers}\n</parameter>\n</function>\n</tool_call>"
    times, kinds = [], []
    with scripted(llm, call, seconds_per_token=0.01):
        body = {"messages": HELLO, "max_tokens": 900, "tools": [anthropic_tool(EDIT)], "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/messages", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("event: "):
                    times.append(time.monotonic())
                    kinds.append(line[7:])
    assert kinds.count("ping") >= 3 and kinds[-1] == "message_stop"
    assert max(b - a for a, b in itertools.pairwise(times)) < 2


def test_bytes_of_a_token_are_its_own(server: Server, llm: LLM) -> None:
    with scripted(llm, "a 🦊é"):
        choice = (
            server.openai()
            .chat.completions.create(model="small", messages=HELLO, logprobs=True, top_logprobs=2)
            .choices[0]
        )
        text = server.openai().completions.create(model="small", prompt="x", logprobs=2).choices[0]
    tokens = choice.logprobs.content  # type: ignore[union-attr]
    assert b"".join(bytes(t.bytes or ()) for t in tokens or ())[: len("a 🦊é".encode())].decode() == "a 🦊é"
    assert text.text == "a 🦊é"
    logprobs: Any = text.logprobs
    assert logprobs.text_offset[:2] == [0, 1] and any(t.startswith("bytes:\\x") for t in logprobs.tokens)
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_a_broken_stream_ends_with_the_apis_error_and_is_logged_as_one(
    server: Server, llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: str) -> str:
        raise ZeroDivisionError

    with server.access_log(caplog) as lines:
        with scripted(llm, fail):
            for path, body in (
                ("chat/completions", {"messages": HELLO}), ("messages", {"messages": HELLO, "max_tokens": 3}), ("responses", {"input": "x"}),
            ):  # fmt: skip
                answer = httpx.post(
                    f"{server.url}/v1/{path}", json={**body, "stream": True, "model": "small"}, timeout=30
                )
                last = json.loads([line for line in answer.text.splitlines() if line.startswith("data: {")][-1][6:])
                assert "the server failed" in json.dumps(last), answer.text
                assert path != "responses" or last["type"] == "response.failed"
        with pytest.raises(openai.APIError), scripted(llm, fail):
            chat(server)
        with pytest.raises(anthropic.APIStatusError), scripted(llm, fail):
            server.anthropic().messages.create(model="small", messages=HELLO, max_tokens=3)
    assert [line["status"] for line in lines] == [500] * 5
    assert all("the server failed" in line["error"] and line["model"] == "small" for line in lines)


@pytest.mark.parametrize("path", ["chat/completions", "messages", "responses"])
def test_a_stream_that_its_client_leaves_is_logged_as_that(
    server: Server, llm: LLM, path: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the engine has ended the job before the response looks."""
    original = Job.cancel

    def cancel(self: Job) -> None:
        original(self)
        for _ in range(200):
            if self.ended:
                return
            time.sleep(0.005)

    monkeypatch.setattr(Job, "cancel", cancel)
    body = {"input": "x"} if path == "responses" else {"messages": HELLO, "max_tokens": 900}
    with server.access_log(caplog) as lines, scripted(llm, "word " * 500, seconds_per_token=0.01):
        with httpx.stream("POST", f"{server.url}/v1/{path}", json={**body, "stream": True}, timeout=30) as answer:
            read = answer.iter_lines()
            for _ in range(12):
                next(read)
        server.wait_until_idle()
    (line,) = [line for line in lines if line["method"] == "POST"]
    assert line["status"] == 499 and line["error"] == "the client disconnected"
