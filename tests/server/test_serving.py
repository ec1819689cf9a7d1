"""Many clients at once, rude ones among them, and what happens when the server stops or starts anew."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from expertstream.cli import main
from expertstream.engine import LLM
from expertstream.server import app as app_module
from expertstream.server.app import ServerSettings, create_app
from expertstream.server.scheduler import Scheduler

from .conftest import HELLO, Server

ENDLESS = {"temperature": 50, "seed": 3}  # the embedded model does not happen to end this text within 5,000 tokens
STORY: list[Any] = [{"role": "user", "content": "Tell me a story."}]


def ask(server: Server, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO, **body}, timeout=60)


def test_twenty_clients_get_what_each_would_get_alone(server: Server) -> None:
    def one(i: int) -> str:
        answer = ask(server, messages=STORY if i % 2 else HELLO, seed=i, max_tokens=20 + i, temperature=1.0)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    alone = [one(i) for i in range(20)]
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(one, range(20))) == alone
    server.wait_until_idle()


def test_more_than_may_wait_are_told_so_and_the_others_answered(llm: LLM) -> None:
    server = Server(llm, parallel=1, most_waiting=2)
    try:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda i: ask(server, seed=i, max_tokens=60, temperature=1.5), range(12)))
        codes = [a.status_code for a in answers]
        assert set(codes) == {200, 429} and codes.count(200) >= 3
        refused = next(a for a in answers if a.status_code == 429)
        assert refused.headers["retry-after"] == "1" and refused.json()["error"]["code"] == "queue_full"
        server.wait_until_idle()
    finally:
        server.stop()


def test_a_short_request_is_answered_while_a_long_prompt_is_read(llm: LLM) -> None:
    llm.prefill_chunk, before = 64, llm.prefill_chunk
    server = Server(llm, parallel=2)
    try:
        done: list[str] = []

        def long() -> None:
            ask(server, messages=[{"role": "user", "content": "some more words of a long text " * 250}], max_tokens=1)
            done.append("long")

        thread = threading.Thread(target=long)
        thread.start()
        while httpx.get(f"{server.url}/health").json()["active"] == 0:
            time.sleep(0.001)
        ask(server, max_tokens=3)
        done.append("short")
        thread.join()
        assert done == ["short", "long"]
    finally:
        server.stop()
        llm.prefill_chunk = before


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_costs_nothing_more(server: Server, stream: bool) -> None:
    """A text of a thousand tokens is asked for and left; the engine is idle long before it could have ended."""
    body = {"messages": STORY, "max_tokens": 1500, "stream": stream, **ENDLESS}
    with pytest.raises(httpx.ReadTimeout):
        if stream:
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
                next(response.iter_bytes())
                raise httpx.ReadTimeout("enough")
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.5)
    server.wait_until_idle(3)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_who_is_gone_before_the_answer_begins_costs_nothing_more(llm: LLM, path: str) -> None:
    body = json.dumps({"messages": STORY, "stream": True, "max_tokens": 1900, **ENDLESS} if "chat" in path else {"messages": STORY, "stream": True, "max_tokens": 1900}).encode()  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        raise OSError("gone")

    async def run() -> int:
        app = create_app(llm, ServerSettings("small"))
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST", "path": path,
            "raw_path": path.encode(), "query_string": b"", "headers": [(b"content-type", b"application/json")], "client": ("a", 1),
        }  # fmt: skip
        with contextlib.suppress(Exception):
            await app(scope, receive, send)
        scheduler = app.metrics._scheduler
        for _ in range(200):
            if scheduler.waiting == 0:
                break
            await asyncio.sleep(0.01)
        left = scheduler.waiting
        await asyncio.to_thread(scheduler.close, 0)
        return left

    assert asyncio.run(run()) == 0


def test_what_cannot_be_kept_is_only_not_kept(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("expertstream.prefix_cache.PrefixCache.insert", fail)
    server = Server(llm)
    try:
        assert ask(server, max_tokens=2).status_code == 200
    finally:
        server.stop()


def test_a_bug_in_a_turn_ends_those_texts_and_no_others(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(llm)
    original = Scheduler._pass
    monkeypatch.setattr(Scheduler, "_pass", lambda self, jobs: 1 / 0)
    try:
        assert ask(server, max_tokens=2).status_code == 500
        monkeypatch.setattr(Scheduler, "_pass", original)
        assert ask(server, max_tokens=2).status_code == 200
        assert httpx.get(f"{server.url}/health").json()["status"] == "ready"
    finally:
        server.stop()


def test_who_left_the_queue_leaves_its_place(llm: LLM) -> None:
    server = Server(llm, parallel=1, most_waiting=2)
    try:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(ask, server, messages=STORY, max_tokens=1900, **ENDLESS)
            while server.waiting() == 0:
                time.sleep(0.001)
            for _ in range(6):  # more than may wait, one after another
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO}, timeout=0.3)
            assert ask(server, max_tokens=1).status_code == 200
            assert running.result().status_code == 200
        too_many = ask(server, n=4)
        assert too_many.status_code == 400 and "n must be at most 3" in too_many.json()["error"]["message"]
    finally:
        server.stop()


def test_an_answer_that_takes_too_long_is_ended(llm: LLM) -> None:
    server = Server(llm, seconds=0.3)
    try:
        answer = ask(server, messages=STORY, max_tokens=1900, **ENDLESS)
        assert answer.status_code == 504 and "took longer" in answer.json()["error"]["message"]
        server.wait_until_idle()
    finally:
        server.stop()


def test_a_stopping_server_ends_what_runs(llm: LLM) -> None:
    server = Server(llm, shutdown_seconds=0.2)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, server, messages=STORY, max_tokens=30, temperature=1)
        while server.waiting() == 0:
            time.sleep(0.001)
        server.stop()
        assert running.result().status_code == 200  # short enough to be finished
    with pytest.raises(httpx.ConnectError):
        ask(server)


def test_a_slow_reader_a_half_sent_body_and_a_flood_leave_the_others_served(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "BODY_SECONDS", 1.0)
    sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]  # that never say anything
    try:
        half = sockets[0]
        half.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"
        )
        slow = sockets[1]
        body = b'{"messages": [{"role": "user", "content": "Tell me a story."}], "stream": true, "max_tokens": 400, "temperature": 50, "seed": 1}'
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % len(body)
            + body
        )
        for _ in range(3):
            assert ask(server, max_tokens=5).status_code == 200
        half.settimeout(10)
        assert b" 408 " in half.recv(100)
        slow.settimeout(10)
        assert slow.recv(1) == b"H"  # it reads a byte at a time, and nobody minds
    finally:
        for each in sockets:
            each.close()
    server.wait_until_idle()


def test_a_hundred_megabytes_are_refused_and_not_kept(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as rude:
        rude.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100000000\r\n\r\n"
        )
        try:
            for _ in range(100):
                rude.sendall(b" " * 1_000_000)
        except (BrokenPipeError, ConnectionResetError):
            pass
        else:
            assert b" 413 " in rude.recv(200)
    assert ask(server, max_tokens=2).status_code == 200


def test_requests_in_another_name_do_not_reach_a_local_server(llm: LLM) -> None:
    server = Server(llm, only_local=True)
    try:
        url = f"{server.url}/v1/models"
        assert httpx.get(url).status_code == 200
        for path in ("v1/models", "health", "status", "metrics", "openapi.json", ""):
            assert httpx.get(f"{server.url}/{path}", headers={"host": "evil.example"}).status_code == 403, path
        plain = httpx.post(f"{server.url}/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
        assert plain.status_code == 415  # what a web page may send without asking
        body = {"messages": HELLO, "max_tokens": 1}
        for origin, status in (("https://evil.example", 403), ("null", 403), (server.url, 200)):
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"origin": origin})
            assert answer.status_code == status, origin
    finally:
        server.stop()


def test_a_key_is_asked_for(llm: LLM) -> None:
    server = Server(llm, key="secret")
    try:
        assert server.openai("secret").chat.completions.create(model="small", messages=HELLO, max_tokens=1).choices
        for request in (lambda c: c.models.list(), lambda c: c.chat.completions.create(model="small", messages=HELLO)):
            with pytest.raises(openai.AuthenticationError):
                request(server.openai("wrong"))
        for path in ("metrics", "status"):
            assert httpx.get(f"{server.url}/{path}").status_code == 401
        for given, status in (
            ("bearer secret", 200),
            ("BEARER  secret", 200),
            ("secret", 200),
            ("Bearer s\xe9cret", 401),
            ("Basic secret", 401),
        ):
            assert (
                httpx.get(f"{server.url}/metrics", headers={"authorization": given.encode("latin-1")}).status_code
                == status
            ), given
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert server.anthropic("secret").messages.count_tokens(model="small", messages=HELLO).input_tokens > 0
    finally:
        server.stop()


def test_a_restarted_server_knows_its_prefixes(tmp_path: Path) -> None:
    long: list[Any] = [
        {"role": "system", "content": "You answer shortly. " * 60},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    texts, cached = [], []
    for _ in range(2):
        with LLM(context_length=2048, sequences=2, prefix_cache_bytes=32 << 20) as llm:
            llm.keep_prefixes(tmp_path, 1 << 30)
            server = Server(llm, parallel=2)
            try:
                answer = ask(server, messages=long, temperature=0, max_tokens=20).json()
            finally:
                server.stop()
        texts.append(answer["choices"][0]["message"]["content"])
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert texts[0] == texts[1] and cached[0] == 0 and cached[1] >= 192


def test_numbers_for_people_and_for_prometheus(server: Server) -> None:
    ask(server, max_tokens=4)
    text = httpx.get(f"{server.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["expertstream_generated_tokens_total"]) >= 4
    assert 0 <= float(values["expertstream_expert_hit_rate"]) <= 1
    assert float(values["expertstream_process_resident_bytes"]) > 10 << 20
    for name in ("queue_length", "ttft_seconds_count", "decode_tokens_per_second_count", "expert_bytes_read_total", "expert_stall_seconds_total"):  # fmt: skip
        assert f"expertstream_{name}" in values, name
    status = httpx.get(f"{server.url}/status?heat=1").json()
    assert status["model"] == "small" and status["generated_tokens"] >= 4
    assert len(status["heat"]["uses"]) == 12 and max(map(max, status["heat"]["uses"])) > 0
    page = httpx.get(server.url)
    assert (
        page.status_code == 200
        and "text/html" in page.headers["content-type"]
        and "http" not in page.text.split("<script>")[1]
    )


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_status_page_in_a_browser(server: Server, tmp_path: Path) -> None:
    ask(server, max_tokens=4)
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=4000", "--dump-dom", server.url,
    ]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert '<h1 id="model">small</h1>' in page and ">ready</span>" in page
    assert "expert slots" in page


def test_each_request_is_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with server.access_log(caplog) as lines:
        httpx.get(f"{server.url}/v1/models")
        httpx.get(f"{server.url}/no/such/path")
    assert [(line["path"], line["status"]) for line in lines] == [("/v1/models", 200), ("/no/such/path", 404)]
    httpx.get(f"{server.url}/health//")
    text = httpx.get(f"{server.url}/metrics").text
    assert "/no/such" not in text and "/health//" not in text and 'path="other"' in text


def test_an_address_that_is_taken_is_told_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "--port", str(taken.getsockname()[1]), "/no/such/model"]) == 2
    assert "choose another with --port" in capsys.readouterr().err


def test_the_command_serves_and_ends_in_order(tmp_path: Path) -> None:
    """Started as a user does; a prompt asked for just before the end is kept for the next start."""
    for signal_, cached in ((signal.SIGINT, 0), (signal.SIGTERM, 64)):
        command = [
            sys.executable,
            "-m",
            "expertstream",
            "serve",
            "--port",
            "0",
            "--cache-dir",
            str(tmp_path),
            "--memory",
            "300MiB",
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            url = ""
            while not url:
                line = process.stdout.readline()
                assert line, process.communicate()[1]
                found = re.search(r"http://\S+", line)
                url = found[0] if found else ""
            for _ in range(100):
                with contextlib.suppress(httpx.ConnectError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                time.sleep(0.05)
            body = {"messages": [{"role": "user", "content": "What is the capital of France? " * 12}], "max_tokens": 5}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
            process.send_signal(signal_)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == {signal.SIGINT: 0, signal.SIGTERM: -signal.SIGTERM}[signal_], errors
        assert "Traceback" not in errors, errors


def test_asked_twice_a_server_ends_at_once() -> None:
    command = [sys.executable, "-m", "expertstream", "serve", "--port", "0", "--memory", "300MiB"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = None
        while url is None:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            url = re.search(r"http://\S+", line)
        with ThreadPoolExecutor(1) as pool:
            body = {"messages": STORY, "max_tokens": 8000, **ENDLESS}
            running = pool.submit(httpx.post, f"{url[0]}/v1/chat/completions", json=body, timeout=60)
            time.sleep(1.5)
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
            assert isinstance(running.exception(), httpx.HTTPError)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in errors and "a second signal stops at once" in errors, errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "give a key"),
        (["--port", "70000"], "--port"),
        (["--queue", "-1"], "--queue"),
        (["--parallel", "0"], "--parallel"),
        (["--cache-memory", "much"], "not a size"),
        (["--cache-dir", "/proc/nowhere"], "prefixes cannot be stored there"),
        (["--api-key-file", "/no/such"], "cannot be read"),
        (["/no/such/model"], "no such folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_served(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EXPERTSTREAM_API_KEY", raising=False)
    assert main(["serve", *arguments]) in (2, 3)
    assert message in capsys.readouterr().err
