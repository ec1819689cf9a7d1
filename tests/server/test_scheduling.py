"""Turns of several requests, and what becomes of those that nobody waits for any more."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from expertstream.engine import LLM

from .conftest import Server
from .test_serving import ENDLESS, STORY, ask


def test_a_client_that_gave_up_and_asks_again_goes_on_from_where_the_first_got(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    with LLM(context_length=4096, sequences=2, prefix_cache_bytes=32 << 20, prefill_chunk=256) as llm:
        server = Server(llm)
        original = llm.model.__class__.__call__

        def slow(self: Any, tokens: Any, cache: Any, *rest: Any, **more: Any) -> Any:
            if more.get("prompt"):
                passes.append(cache.position)
                if cache.position >= 1024:
                    while not cache.cancelled.is_set():  # the client's patience ends here
                        time.sleep(0.005)
            return original(self, tokens, cache, *rest, **more)

        monkeypatch.setattr(llm.model.__class__, "__call__", slow)
        body = {"messages": [{"role": "user", "content": "many words " * 1000}], "max_tokens": 4, "temperature": 0}
        try:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=2)
            server.wait_until_idle()
            monkeypatch.setattr(llm.model.__class__, "__call__", original)
            assert passes == [0, 256, 512, 768, 1024]
            again = ask(server, **body).json()
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 1024
        finally:
            server.stop()
        with LLM(context_length=4096) as alone:
            expected = "".join(p.text for p in alone.chat(body["messages"], max_tokens=4, temperature=0.0))  # type: ignore[arg-type]
        assert again["choices"][0]["message"]["content"] == expected.strip()


def test_others_get_tokens_between_the_layers_of_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a prompt that takes long, as from disk: the wait between two tokens of another client is a layer, not the part."""
    monkeypatch.setattr("expertstream.server.scheduler.MAX_SILENCE", 0.0)
    order: list[str] = []
    with LLM(context_length=2048, sequences=2) as llm:
        layer = llm.model.layers[0].__class__
        original = layer.__call__

        def seen(self: Any, h: Any, *rest: Any) -> None:
            order.append("prompt" if h.shape[0] > 100 else "token")
            original(self, h, *rest)

        def alone(messages: list[Any], count: int) -> str:
            return "".join(p.text for p in llm.chat(messages, max_tokens=count, temperature=0.0))

        long = [{"role": "user", "content": "What is the capital of France? " * 100}]
        expected = alone(STORY, 200).strip(), alone(long, 5).strip()
        monkeypatch.setattr(layer, "__call__", seen)
        server = Server(llm)
        try:
            with ThreadPoolExecutor(1) as pool:
                story = pool.submit(ask, server, messages=STORY, max_tokens=200, temperature=0)
                while "token" not in order:
                    time.sleep(0.002)
                answer = ask(server, messages=long, max_tokens=5, temperature=0)
                texts = [r.json()["choices"][0]["message"]["content"] for r in (story.result(), answer)]
        finally:
            server.stop()
    assert tuple(texts) == expected  # with the bits of each alone
    begin, end = order.index("prompt"), len(order) - order[::-1].index("prompt")
    during = order[begin:end]
    assert during.count("prompt") == 12 and during.count("token") >= 6 * 12


def test_a_request_that_waits_has_no_context_yet(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    original = llm.session

    def session() -> Any:
        made.append(time.monotonic())
        return original()

    monkeypatch.setattr(llm, "session", session)
    server = Server(llm, parallel=1)
    try:
        with ThreadPoolExecutor(8) as pool:
            running = pool.submit(ask, server, messages=STORY, max_tokens=400, **ENDLESS)
            while not made:
                time.sleep(0.001)
            waiting = [pool.submit(ask, server, max_tokens=1) for _ in range(6)]
            while server.waiting() < 7 and not running.done():
                time.sleep(0.001)
            assert running.done() or len(made) == 1
            assert all(answer.result().status_code == 200 for answer in [running, *waiting])
        assert len(made) == 7
    finally:
        server.stop()
