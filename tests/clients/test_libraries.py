"""Libraries for Python: tools at once and as streams, and answers of a form, by every API that each has."""

from __future__ import annotations

import json
from typing import Any

import pytest

from expertstream.engine import LLM

from ..server.conftest import Server
from ..server.scripted import Written, scripted
from .conftest import Access
from .processes import Desk, needs
from .recipes import blocks
from .scripts import SECRET, call, round_trip, say

pytestmark = [pytest.mark.timeout(120), needs("python")]

CITY = {"name": "Paris", "population": 2100000}
FUNCTIONS = ("final_result", "json_tool_call", "City")  # what libraries call the function that stands for a type
read = round_trip("read_file", path="notes.txt")


def write(prompt: str) -> Written:
    """Reads the file, describes the city as a call if there is a function for that, or says hello."""
    if "Describe Paris" in prompt:
        for name in FUNCTIONS:
            if f'"name": "{name}"' in prompt:
                return say(prompt, call(name, name="Paris", population="2100000"))
        return say(prompt, json.dumps(CITY))
    return say(prompt, "Hello.") if "Say hello." in prompt else read(prompt)


def run(server: Server, llm: LLM, desk: Desk, client: str, task: str) -> dict[str, Any]:
    """What the task prints."""
    with scripted(llm, write):
        result = desk.run_task(task, blocks(client, "python")[0].at(server.port))
    assert result.status == 0, result
    found: dict[str, Any] = json.loads(result.output.splitlines()[-1])
    return found


def check(found: dict[str, Any]) -> None:
    told = f"The word is {SECRET}, says the file."
    assert found["text"] == found["streamed"] == told
    assert found["pieces"] > 8  # token by token
    assert found["city"] == CITY


def test_langchain(server: Server, llm: LLM, access: Access, desk: Desk) -> None:
    found = run(server, llm, desk, "LangChain", "langchain")
    for name, path in (("chat", "chat/completions"), ("responses", "responses"), ("claude", "messages")):
        check(found[name])
        assert len(access.answered(f"/v1/{path}")) == 5


def test_litellm(server: Server, llm: LLM, access: Access, desk: Desk) -> None:
    desk.write("config.yaml", blocks("LiteLLM", "yaml")[0].at(server.port))
    found = run(server, llm, desk, "LiteLLM", "litellm")
    assert found["hello"] == found["proxy"] == "Hello."
    for name, path, requests in (("chat", "chat/completions", 7), ("messages", "messages", 5)):
        check(found[name])
        assert len(access.answered(f"/v1/{path}")) == requests


def test_pydantic_ai(server: Server, llm: LLM, access: Access, desk: Desk) -> None:
    found = run(server, llm, desk, "pydantic-ai", "pydantic_ai")
    for name, path in (("chat", "chat/completions"), ("responses", "responses")):
        check(found[name])
        assert found[name]["native"] == CITY
        assert len(access.answered(f"/v1/{path}")) == 6


def test_openai_agents(server: Server, llm: LLM, access: Access, desk: Desk) -> None:
    found = run(server, llm, desk, "openai-agents", "openai_agents")
    for name, path in (("responses", "responses"), ("chat", "chat/completions")):
        check(found[name])
        assert len(access.answered(f"/v1/{path}")) == 5
