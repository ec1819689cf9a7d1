"""A client that is interrupted in the middle of an answer: the server hears of it, and works for nobody."""

from __future__ import annotations

import signal
import threading
import time

import httpx
import pytest

from expertstream.engine import LLM

from ..server.conftest import Server
from ..server.scripted import Written, scripted
from .conftest import Access
from .processes import Desk, needs
from .recipes import blocks
from .scripts import is_whole, say
from .test_agents import claude_code, codex

pytestmark = pytest.mark.timeout(120)


def recipe(client: str, server: Server, desk: Desk) -> str:
    if client == "claude":
        return claude_code(server, small=True)
    if client == "codex":
        return codex(server, desk, small=True)
    desk.write("~/.config/io.datasette.llm/extra-openai-models.yaml", blocks("llm", "yaml")[0].at(server.port))
    return blocks("llm", "sh")[0].text


@pytest.mark.parametrize(
    ("client", "path"),
    [
        pytest.param("claude", "/v1/messages", marks=needs("claude")),
        pytest.param("codex", "/v1/responses", marks=needs("codex")),
        pytest.param("llm", "/v1/chat/completions", marks=needs("llm")),
    ],
)
def test_an_interrupted_client_leaves_an_idle_server(
    server: Server, llm: LLM, access: Access, desk: Desk, client: str, path: str
) -> None:
    is_read = threading.Event()

    def write(prompt: str) -> Written:
        """More than anyone waits for."""
        if is_whole(prompt):
            is_read.set()
        return say(prompt, "word " * 30_000)

    with scripted(llm, write, seconds_per_token=0.002), desk.start(client, recipe(client, server, desk)) as running:
        assert is_read.wait(60), "no request came"
        time.sleep(0.5)  # some of the answer is on its way
        assert httpx.get(f"{server.url}/health").json()["active"] == 1
        running.signal(signal.SIGINT)
        running.wait(20)
        server.wait_until_idle()
    assert httpx.get(f"{server.url}/health").json()["active"] == 0
    lines = access.lines()
    assert [(line["path"], line["status"]) for line in lines] == [(path, 499)], lines
    assert lines[0]["bytes"] > 0
