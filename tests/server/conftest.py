"""A server of the embedded model on a socket of its own."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import openai
import pytest
import uvicorn

from expertstream.engine import LLM
from expertstream.server.app import ServerSettings, create_app
from expertstream.server.protocol import Protocol

# What openai's and anthropic's clients return is typed by unions that tests would have to take apart.
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "The city"}}, "required": ["city"]},
    },
}  # fmt: skip
HELLO: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


class Server:
    """The app in a thread of its own, on a free port."""

    def __init__(self, llm: LLM, **options: Any) -> None:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._clients: list[openai.OpenAI | anthropic.Anthropic] = []
        app = create_app(llm, ServerSettings("small", **options))
        self.server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=10, http=Protocol)
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def openai(self, key: str = "none") -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)
        self._clients.append(client)
        return client

    def anthropic(self, key: str = "none") -> anthropic.Anthropic:
        client = anthropic.Anthropic(base_url=self.url, api_key=key, max_retries=0, timeout=60)
        self._clients.append(client)
        return client

    def waiting(self) -> int:
        return int(httpx.get(f"{self.url}/health").json()["waiting"])

    def wait_until_idle(self, seconds: float = 5) -> None:
        end = time.monotonic() + seconds
        while self.waiting() and time.monotonic() < end:
            time.sleep(0.01)
        assert self.waiting() == 0

    def wait_until_answered(self) -> None:
        """Until every request has ended: its line of the access log is written after its client has read the answer."""
        end = time.monotonic() + 20
        while self.server.server_state.tasks:
            assert time.monotonic() < end, "a request does not end"
            time.sleep(0.01)

    @contextmanager
    def access_log(self, caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
        """A list that is given the lines of the requests in here when they have ended, and no line of a request from before."""
        self.wait_until_answered()
        caplog.clear()
        lines: list[dict[str, Any]] = []
        with caplog.at_level(logging.INFO, "expertstream.access"):
            yield lines
            self.wait_until_answered()
        lines += [json.loads(r.getMessage()) for r in caplog.records if r.name == "expertstream.access"]

    def stop(self) -> None:
        for client in self._clients:  # one that is only collected may leave its socket to the garbage collector
            client.close()
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


@pytest.fixture(scope="package")
def llm() -> Iterator[LLM]:
    with LLM(context_length=2048, sequences=4, prefix_cache_bytes=64 << 20) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    server = Server(llm, most_waiting=40)
    yield server
    server.stop()
