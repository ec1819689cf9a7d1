"""What clients of other servers expect of this one: names, headers, pages, extensions of the API, and words that they understand."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from expertstream.cli import main
from expertstream.engine import LLM
from expertstream.generate import drive

from .conftest import HELLO, TOOL, Server


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    server = Server(llm, aliases=("gpt-4o", "claude"), cors_origins=("http://localhost:3000",), only_local=True)
    yield server
    server.stop()


def chat(server: Server, **body: Any) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 3, **body}, timeout=60
    )


def test_a_model_answers_to_its_aliases(server: Server) -> None:
    assert [m.id for m in server.openai().models.list()] == ["small", "gpt-4o", "claude"]
    assert [m.id for m in server.anthropic().models.list()] == ["small", "gpt-4o", "claude"]
    assert server.anthropic().models.retrieve("claude").display_name == "claude"
    assert chat(server, model="gpt-4o").json()["model"] == "gpt-4o"
    refused = chat(server, model="gpt-5")
    assert refused.status_code == 404 and "--alias NAME or --any-model" in refused.json()["error"]["message"]
    assert httpx.get(f"{server.url}/v1/models/gpt-5").status_code == 404


def test_any_model_is_answered_where_that_is_asked_for(llm: LLM) -> None:
    server = Server(llm, any_model=True)
    try:
        assert chat(server, model="whatever").json()["model"] == "whatever"
        assert server.openai().models.retrieve("org/name").id == "org/name"
    finally:
        server.stop()


def test_requests_have_names_and_answers_say_what_is_left(server: Server) -> None:
    answer = chat(server)
    assert answer.headers["x-request-id"] == answer.headers["request-id"]
    assert answer.headers["x-ratelimit-limit-requests"] == answer.headers["anthropic-ratelimit-requests-limit"] == "36"
    assert 0 <= int(answer.headers["anthropic-ratelimit-requests-remaining"]) <= 36
    url = f"{server.url}/v1/models"
    assert httpx.get(url, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert httpx.get(url, headers={"x-request-id": "a b" * 99}).headers["x-request-id"].startswith("req_")
    assert server.anthropic().messages.create(model="small", max_tokens=1, messages=HELLO)._request_id


def test_pages_that_are_named_may_ask(server: Server) -> None:
    url = f"{server.url}/v1/chat/completions"
    asking = {"origin": "http://localhost:3000", "access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}  # fmt: skip
    assert httpx.options(url, headers=asking).headers["access-control-allow-origin"] == "http://localhost:3000"
    answer = httpx.post(
        url, json={"messages": HELLO, "max_tokens": 1}, headers={"origin": "http://localhost:3000"}, timeout=60
    )
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    other = httpx.post(
        url, json={"messages": HELLO, "max_tokens": 1}, headers={"origin": "http://evil.example"}, timeout=60
    )
    assert other.status_code == 403 and "access-control-allow-origin" not in other.headers


def test_unknown_fields_are_ignored_with_one_warning(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "expertstream"):
        for _ in range(3):
            assert chat(server, wish="\x1b[31mgold").status_code == 200
            assert chat(server, **{"\x1b[2J": 1}).status_code == 200
    warnings = [r.getMessage() for r in caplog.records if "unknown field" in r.getMessage()]
    assert len(warnings) == 2 and "'wish'" in warnings[0] and "\x1b" not in "".join(warnings)


def test_strict_servers_refuse_unknown_fields(llm: LLM) -> None:
    server = Server(llm, strict_requests=True)
    try:
        answer = chat(server, wish="gold")
        assert answer.status_code == 400 and "wish is not supported" in answer.json()["error"]["message"]
        assert chat(server, user="me", store=True).status_code == 200
    finally:
        server.stop()


def test_context_overflow_is_said_as_the_apis_say_it(server: Server) -> None:
    long = [{"role": "user", "content": "word " * 3000}]
    error = chat(server, messages=long).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is 2048 tokens.")
    assert "--context" in error["message"]  # it was trained for 8,192
    error = httpx.post(f"{server.url}/v1/responses", json={"input": long}, timeout=60).json()["error"]
    assert error["code"] == "context_length_exceeded"
    body = {"messages": [{"role": "user", "content": "word " * 9000}], "max_tokens": 3}
    error = httpx.post(f"{server.url}/v1/messages", json=body, timeout=60).json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"].startswith("prompt is too long: ")
    count, _, most = error["message"].partition(": ")[2].partition(" tokens > ")
    assert int(count) > int(most.split()[0]) == 2047
    assert "--context" not in chat(server, messages=body["messages"]).json()["error"]["message"]


def test_a_refused_request_is_logged_with_its_reason(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with server.access_log(caplog) as lines:
        body = {"messages": HELLO, "model": "claude", "temperature": -1}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"user-agent": "agent/1"})
    (line,) = [line for line in lines if line["agent"] == "agent/1"]
    assert line["status"] == 400 and line["agent"] == "agent/1" and line["model"] == "claude"
    assert "temperature" in line["error"] and line["id"].startswith("req_")


def test_a_bias_steers_the_choice_of_tokens(server: Server, llm: LLM) -> None:
    plain = chat(server, temperature=0).json()["choices"][0]["message"]["content"]
    first = int(llm.tokenizer.encode(plain)[0])
    biased = chat(server, temperature=0, logit_bias={str(first): -100}).json()["choices"][0]["message"]["content"]
    assert plain.startswith("The") and not biased.startswith("The")
    (token,) = llm.tokenizer.encode(" fox").tolist()
    assert (
        chat(server, temperature=0, logit_bias={str(token): 100}).json()["choices"][0]["message"]["content"]
        == "fox fox fox"
    )


def test_popular_sampling_names_have_their_effect(server: Server) -> None:
    """top_k 1 is the most likely token whatever the temperature; a repetition penalty changes a text that repeats."""
    greedy = chat(server, temperature=0, max_tokens=8).json()["choices"][0]["message"]["content"]
    assert chat(server, temperature=5, top_k=1, max_tokens=8).json()["choices"][0]["message"]["content"] == greedy
    assert chat(server, temperature=5, min_p=1, max_tokens=8).json()["choices"][0]["message"]["content"] == greedy
    prompt = {"prompt": "one two three one two three one two", "temperature": 0, "max_tokens": 8}
    texts = [
        httpx.post(f"{server.url}/v1/completions", json={**prompt, **more}, timeout=60).json()["choices"][0]["text"]
        for more in ({"repetition_penalty": 1.0}, {"repetition_penalty": 2.0}, {"repeat_penalty": 2.0})
    ]
    assert texts[0] != texts[1] == texts[2]


def test_thinking_is_switched_by_every_name(server: Server) -> None:
    """The embedded template begins its answer inside <think> only if asked to."""
    counts = {}
    for name, more in {
        "plain": {}, "kwargs": {"chat_template_kwargs": {"enable_thinking": True}}, "top": {"enable_thinking": True},
        "effort": {"reasoning_effort": "low"}, "none": {"reasoning_effort": "none"}, "thinking": {"thinking": {"type": "enabled"}},
        "reasoning": {"reasoning": {"effort": "high"}},
    }.items():  # fmt: skip
        counts[name] = chat(server, **more, max_tokens=1).json()["usage"]["prompt_tokens"]
    assert counts["plain"] == counts["none"]
    assert len({counts[n] for n in ("kwargs", "top", "effort", "thinking", "reasoning")}) == 1
    assert counts["kwargs"] < counts["plain"]
    refused = chat(server, chat_template_kwargs={"messages": []})
    assert refused.status_code == 400 and "chat_template_kwargs must not contain messages" in refused.text


def test_likelihoods_of_a_prompt_are_the_models(server: Server, llm: LLM) -> None:
    """As lm-eval's local-completions asks for them."""
    tokens = llm.tokenizer.encode("Once upon a time there was a little fox.").tolist()
    body = {
        "prompt": [tokens, tokens[:5]],
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "temperature": 0,
        "seed": 1234,
    }
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    logits = llm.model(np.array(tokens), llm.session().cache, all_logits=True, prompt=True).astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    for choice, given in zip(answer["choices"], body["prompt"], strict=True):  # type: ignore[call-overload]
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert len(found["tokens"]) == len(given) + 1
        expected = [log_probs[i, t] for i, t in enumerate(given[1:])]
        assert found["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
        assert (
            "".join(found["tokens"][:-1])
            == llm.tokenizer.decode(given)
            == choice["text"][: len(llm.tokenizer.decode(given))]
        )
        for i, top in enumerate(found["top_logprobs"][1:-1]):
            ((token, logprob),) = top.items()
            assert token == llm.tokenizer.token_text(int(log_probs[i].argmax())) and logprob == pytest.approx(
                log_probs[i].max(), abs=1e-4
            )
        assert [choice["text"][a:].startswith(t) for a, t in zip(found["text_offset"], found["tokens"], strict=True)]
    only = httpx.post(f"{server.url}/v1/completions", json={**body, "max_tokens": 0}, timeout=60).json()
    assert [len(c["logprobs"]["tokens"]) for c in only["choices"]] == [len(tokens), 5]
    assert only["usage"]["completion_tokens"] == 0 and only["choices"][0]["text"] == llm.tokenizer.decode(tokens)


def test_a_long_prompt_is_scored_alike_in_chunks_and_with_a_prefix_that_is_known(server: Server, llm: LLM) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 30
    body = {"prompt": text, "max_tokens": 1, "logprobs": 0, "echo": True, "temperature": 0}
    found = [httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json() for _ in range(2)]
    assert found[0]["choices"][0]["logprobs"] == found[1]["choices"][0]["logprobs"]
    session, tokens = llm.session(), llm.tokenizer.encode(text)
    params = llm.sampling_params(max_tokens=1, logprobs=0, temperature=0.0)
    (piece,) = drive(llm.model, session.steps(tokens, params, prompt_logprobs=0))
    assert piece.prompt_logprobs is not None
    total = sum(p.logprob or 0.0 for p in piece.prompt_logprobs)
    assert math.isclose(
        total, sum(x or 0 for x in found[0]["choices"][0]["logprobs"]["token_logprobs"][:-1]), abs_tol=1e-6
    )


def test_several_prompts_and_best_of(server: Server) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "best_of": 2, "max_tokens": 1}
    assert len(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"]) == 4
    refused = httpx.post(f"{server.url}/v1/completions", json={**body, "best_of": 3}, timeout=60)
    assert refused.status_code == 400 and "best_of must be equal to n (2); got 3" in refused.text


def test_a_tool_that_cannot_be_held_spoils_no_request(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    free: Any = {
        "type": "function",
        "function": {"name": "odd", "parameters": {"type": "object", "properties": {"a": {"type": "nonsense"}}}},
    }
    unique: Any = {"type": "function", "function": {"name": "set", "parameters": {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True, "items": {"type": "string"}}}}}}  # fmt: skip
    with caplog.at_level(logging.WARNING, "expertstream"):
        assert chat(server, tools=[TOOL, free, unique]).status_code == 200
    text = " ".join(r.getMessage() for r in caplog.records)
    assert (
        "calls of odd are not constrained to its schema" in text
        and "calls of set are constrained to its schema except for" in text
    )
    strict = {**free, "function": {**free["function"], "strict": True}}
    refused = chat(server, tools=[TOOL, strict])
    assert refused.status_code == 400 and "the parameters of odd cannot be guaranteed" in refused.text


def test_arguments_in_history_never_end_a_conversation(server: Server) -> None:
    for arguments in ({"city": "Paris"}, '{"city": "Paris"}', "", None, '{"city": "Par', "[1]", "nonsense"):
        call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        messages = [
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "sunny"},
        ]
        assert chat(server, messages=messages, tools=[TOOL]).status_code == 200, arguments


def test_a_context_beyond_training_is_asked_for_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--context", "9000", "--max-tokens", "2", "x"]) == 2
    assert "--beyond-trained-context" in capsys.readouterr().err
    with LLM(context_length=9000, beyond_trained_context=True) as llm:
        assert llm.lossy == "context of 9000 tokens, trained for 8192"
        prompt = llm.tokenizer.encode("word " * 8500)
        (piece,) = llm.session().generate(prompt, llm.sampling_params(max_tokens=1))
        assert piece.stats.prompt_tokens > 8192 and piece.stats.lossy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cors-origin", "localhost"], "--cors-origin must be like http://localhost:3000"),
        (["--alias", "a", "."], "give MODEL before --alias"),
    ],
)
def test_mistakes_in_options_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err
