"""What Open WebUI sends, sent by the test: it is too large to be installed here."""

from __future__ import annotations

import json

import httpx

from expertstream.engine import LLM

from ..server.conftest import Server
from ..server.scripted import scripted
from .conftest import Access
from .recipes import blocks

QUESTION = {"role": "user", "content": "What is the capital of France?"}
HEADERS = {
    "Authorization": "Bearer sk-local", "Content-Type": "application/json", "X-OpenWebUI-User-Id": "1", "X-OpenWebUI-Chat-Id": "2",
}  # fmt: skip


def test_what_open_webui_sends_is_answered(server: Server, llm: LLM, access: Access) -> None:
    assert "OPENAI_API_BASE_URL=http://127.0.0.1:8080/v1" in blocks("Open WebUI", "sh")[0].text
    with httpx.Client(base_url=f"{server.url}/v1", headers=HEADERS, timeout=60) as client:
        models = client.get("/models").json()  # to list them, and to verify the connection
        assert models["object"] == "list" and "local" in [model["id"] for model in models["data"]]
        body = {
            "stream": True, "model": "local", "messages": [{"role": "system", "content": "Be brief."}, QUESTION],
            "stream_options": {"include_usage": True}, "temperature": 0.7, "max_tokens": 50,
        }  # fmt: skip
        with scripted(llm, "Paris it is."), client.stream("POST", "/chat/completions", json=body) as answer:
            lines = [line for line in answer.iter_lines() if line]
        with scripted(llm, '{"title": "Capital of France"}'):
            task = {"role": "user", "content": "### Task:\nGenerate a concise title as JSON for the chat."}
            body = {"model": "local", "messages": [task], "stream": False, "max_completion_tokens": 1000}
            title = client.post("/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert json.loads(title) == {"title": "Capital of France"}
    assert answer.headers["content-type"].startswith("text/event-stream") and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["model"] == "local" for chunk in chunks)
    told = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(told) == "Paris it is." and chunks[-1]["usage"]["completion_tokens"] > 0
    assert len(access.answered("/v1/chat/completions")) == 2
