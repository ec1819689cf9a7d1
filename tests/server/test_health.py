"""/health tells the truth, and no answer tells where files lie."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from expertstream.engine import LLM, embedded_model
from expertstream.errors import RequestError
from expertstream.server import app
from expertstream.server.errors import public_text

from ..test_template import BOMB
from .conftest import HELLO, Server


def ask(server: Server, **more: Any) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2, **more}, timeout=60
    )


def health(server: Server) -> httpx.Response:
    return httpx.get(f"{server.url}/health", timeout=10)


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[tuple[Path, Server]]:
    """A server of a model of its own, most of whose experts are not in memory."""
    folder = tmp_path / "a model"
    shutil.copytree(embedded_model(), folder)
    with LLM(folder, memory="24MiB", context_length=512) as llm:
        server = Server(llm)
        yield folder, server
        server.stop()


@pytest.mark.parametrize("how", ["replaced", "removed", "folder removed"])
def test_a_server_whose_files_have_changed_is_not_ready(copied: tuple[Path, Server], how: str) -> None:
    folder, server = copied
    assert health(server).json()["status"] == "ready" and ask(server).status_code == 200
    for file in folder.glob("experts-*.safetensors"):
        if how == "replaced":
            os.utime(file, (1, 1))
        elif how == "removed":
            file.unlink()
    if how == "folder removed":
        shutil.rmtree(folder)
    found = health(server)
    assert found.status_code == 503 and found.json()["status"] == "failed"
    assert found.json()["reason"].startswith("small: layer 0: ")
    whole, stream = ask(server), ask(server, stream=True)
    assert whole.status_code == 500 and whole.json()["error"]["message"].startswith("small: layer ")
    for answer in (found, whole, stream):
        assert str(folder) not in answer.text and folder.name not in answer.text


def test_a_server_that_cannot_prepare_requests_is_not_ready(
    server: Server, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Semaphore(0), threading.Event()

    def slow(*_: Any) -> Any:
        begun.release()
        go_on.wait(30)
        raise RequestError("enough")

    monkeypatch.setattr(app, "prepare", slow)
    monkeypatch.setattr(app, "PREPARING_SECONDS", 0.0)
    with ThreadPoolExecutor(app.PREPARED_TOGETHER) as pool:
        for _ in range(app.PREPARED_TOGETHER):
            assert health(server).status_code == 200
            pool.submit(ask, server)
            begun.acquire()
        found = health(server)
        assert found.status_code == 503 and "no request could be prepared" in found.json()["reason"]
        go_on.set()
    assert health(server).status_code == 200


def test_a_server_whose_engine_hangs_is_not_ready(server: Server, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go_on = threading.Event(), threading.Event()
    adapt = llm.experts.adapt

    def hang() -> None:
        reached.set()
        go_on.wait(30)
        adapt()

    monkeypatch.setattr(llm.experts, "adapt", hang)
    monkeypatch.setattr(app, "STALLED_SECONDS", 0.05)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server)
        assert reached.wait(30)
        time.sleep(0.1)
        found = health(server)
        go_on.set()
        assert found.status_code == 503 and "at one layer for" in found.json()["reason"]
        assert answer.result().status_code == 200
    monkeypatch.undo()
    assert health(server).status_code == 200


def test_two_bombs_do_not_stop_a_server(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that fills memory, but for one request."""
    bomb = "{% if big %}" + BOMB + "{% endif %}{{ messages[0].content }}"
    monkeypatch.setattr(llm.tokenizer, "_chat_template", bomb)
    server = Server(llm)
    try:
        with ThreadPoolExecutor(3) as pool:
            bombs = [pool.submit(ask, server, chat_template_kwargs={"big": True}) for _ in range(3)]
            assert ask(server).status_code == 200 and health(server).status_code == 200
        for each in bombs:
            assert each.result().status_code == 400
            assert "512 MiB" in each.result().json()["error"]["message"]
    finally:
        server.stop()


def test_paths_become_the_name_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my models" / "big"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    hide = public_text("big-model", folder)
    assert hide(f"{folder}/layer 0.experts: layer 0: replaced") == "big-model: layer 0: replaced"
    assert hide(f"{folder}: missing chat template") == "big-model: missing chat template"
    assert hide(f"cannot read {folder} at all") == "cannot read big-model at all"
    assert hide("nothing of it") == "nothing of it"
    assert public_text("m", tmp_path / "link")(f"{folder}/x: y") == "m: y"
    monkeypatch.chdir(tmp_path)
    hide = public_text("m", Path("link"))
    assert hide("link/config.json: no") == "m: no" and hide("link: Field required") == "link: Field required"
    assert hide(f"{tmp_path}/link/config.json: no") == "m: no"
