"""The document's own lines: the server is started as it says, and clients talk to the embedded model with no script."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from expertstream.engine import LLM, embedded_model

from ..server.conftest import Server
from .conftest import Access
from .processes import Desk, needs
from .recipes import DOCUMENT, blocks
from .test_agents import claude_code, codex

pytestmark = pytest.mark.timeout(120)


def test_the_server_starts_as_the_document_says(tmp_path: Path) -> None:
    words = blocks("", "sh")[0].text.split()
    assert words[:3] == ["expertstream", "serve", "PATH"]
    command = [
        sys.executable,
        "-m",
        "expertstream",
        "serve",
        str(embedded_model()),
        *words[3:],
        "--port",
        "0",
        "--context",
        "512",
    ]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            said = "".join(line for _, line in zip(range(2), process.stdout, strict=False))
            address = re.search(r"http://127\.0\.0\.1:\d+", said)
            assert address is not None, said
            models = httpx.get(f"{address[0]}/v1/models").json()["data"]
            assert {"local": 512}.items() <= {model["id"]: model["max_model_len"] for model in models}.items()
            body = {"model": "local", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 5}
            answer = httpx.post(f"{address[0]}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] > 0
        finally:
            process.send_signal(signal.SIGINT)  # Ctrl-C
    assert process.returncode == 0, (tmp_path / "log").read_text()


@pytest.fixture
def brief(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of at most 64 tokens, the same in every run: no client gives a seed, and not all a length."""
    original = llm.sampling_params

    def sampling_params(**given: Any) -> Any:
        return original(**given | {"seed": 1, "max_tokens": min(64, given["max_tokens"])})

    monkeypatch.setattr(llm, "sampling_params", sampling_params)


@needs("claude")
def test_claude_code_and_a_model_without_a_script(server: Server, access: Access, desk: Desk, brief: None) -> None:
    """Whatever it makes of such an answer, no request was refused and no answer broke off."""
    desk.run("claude", claude_code(server, small=True))
    access.answered("/v1/messages")


@needs("codex")
def test_codex_and_a_model_without_a_script(server: Server, access: Access, desk: Desk, brief: None) -> None:
    result = desk.run("codex", codex(server, desk, small=True))
    access.answered("/v1/responses")
    assert not re.search("stream disconnected|unexpected status|failed to parse", result.errors), result


@pytest.mark.parametrize(
    ("client", "path", "told"),
    [
        pytest.param("claude", "/v1/messages", "[Pp]rompt is too long", marks=needs("claude")),
        pytest.param("codex", "/v1/responses", "ran out of room", marks=needs("codex")),
    ],
)
def test_a_context_that_is_too_short_is_told_to_the_user(
    caplog: pytest.LogCaptureFixture, desk: Desk, client: str, path: str, told: str
) -> None:
    """In the words that the client knows: it says what is wrong, and does not ask again and again."""
    caplog.set_level(logging.INFO, "expertstream.access")
    with LLM(context_length=256, memory="512MiB") as llm:
        server = Server(llm, aliases=("local",), parallel=1)
        try:
            script = claude_code(server, small=True) if client == "claude" else codex(server, desk, small=True)
            result = desk.run(client, script)
            lines = Access(server, caplog).lines()
        finally:
            server.stop()
    assert result.status != 0 and re.search(told, result.output + result.errors), result
    assert 1 <= len(lines) <= 3 and {(line["path"], line["status"]) for line in lines} == {(path, 400)}, lines


def test_every_client_of_the_document_is_tested() -> None:
    """A recipe that nobody runs is one that goes wrong."""
    described = set(re.findall(r"^## (.*)$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)) - {"What to know"}
    code = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py"))
    used = {client for client in described if f'"{client}", "' in code}
    assert used == described
    packages = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("*.txt"))
    packages += (Path(__file__).parent / "package.json").read_text(encoding="utf-8")
    for line in re.findall(r"`(?:npm install -g|pip install) ([^`]+)`", DOCUMENT.read_text(encoding="utf-8")):
        for name in line.replace("'", "").split():
            assert name.partition("[")[0] in packages, name
