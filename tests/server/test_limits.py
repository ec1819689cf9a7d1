"""What one client can take from the others: connections, time to prepare, memory."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from expertstream.engine import LLM
from expertstream.errors import ContextLengthError, RequestError
from expertstream.server import protocol
from expertstream.text.tokenizer import Tokenizer

from .conftest import HELLO, Server


@pytest.fixture
def server(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    server = Server(llm)
    yield server
    server.stop()


def closed(connection: socket.socket) -> bool:
    connection.settimeout(5)
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def test_connections_that_say_nothing_are_closed(server: Server) -> None:
    """At their beginning, in the middle of a head, and in the middle of the next request's head."""
    with (
        socket.create_connection(("127.0.0.1", server.port)) as silent,
        socket.create_connection(("127.0.0.1", server.port)) as slow,
    ):
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        assert closed(silent) and closed(slow)
    with socket.create_connection(("127.0.0.1", server.port)) as second:
        second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while b"ready" not in answer:
            answer += second.recv(4000)
        second.sendall(b"GET /health HTTP/1.1\r\n")
        assert closed(second)


def test_an_answer_that_takes_long_is_not_cut(server: Server) -> None:
    body = {"messages": HELLO, "max_tokens": 1200, "temperature": 50, "seed": 3}
    began = time.monotonic()
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200 and time.monotonic() - began > 0.3


def test_there_are_no_more_connections_than_descriptors(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol.Protocol, "max_connections", 5)
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 30)
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
    try:
        time.sleep(0.1)
        with socket.create_connection(("127.0.0.1", server.port)) as sixth:
            assert closed(sixth)
    finally:
        for connection in held:
            connection.close()
    time.sleep(0.1)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_limit_of_files_is_raised_and_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
        protocol.raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
        monkeypatch.setattr(resource, "getrlimit", lambda _: (300, 300))
        assert protocol.raise_file_limit() == 172
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_body_with_two_lengths_ends_its_connection(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as rude:
        rude.sendall(
            b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 4\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        found = b""
        rude.settimeout(5)
        while part := rude.recv(4000):
            found += part
    assert found.startswith(b"HTTP/1.1 400") and found.count(b"HTTP/1.1") == 1


def test_a_text_far_too_long_is_not_tokenized_to_its_end(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    original = Tokenizer._ids

    def counted(self: Tokenizer, text: str) -> list[int]:
        done.append(len(text))
        return original(self, text)

    monkeypatch.setattr(Tokenizer, "_ids", counted)
    with pytest.raises(ContextLengthError, match=r"about \d+ tokens"):
        llm.tokenizer.encode("a b " * 2_000_000, 2047)
    assert sum(done) < 1_200_000
    done.clear()
    text = "Once upon a time. " * 400
    assert llm.tokenizer.encode(text, 100_000).tolist() == llm.tokenizer.encode(text).tolist()
    server = Server(llm)
    try:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "a" * 7_000_000}], "max_tokens": 1}
        for path in ("messages", "chat/completions"):
            answer = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)
            assert answer.status_code == 400 and "maximum" in answer.text
    finally:
        server.stop()


def test_a_panic_of_the_tokenizer_is_an_error_of_the_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Panicking:
        def encode(self, *_: object, **__: object) -> None:
            raise PanicException("index out of bounds")

    monkeypatch.setattr(llm.tokenizer, "_tokenizer", Panicking())
    with pytest.raises(RequestError, match="the tokenizer failed on this text: PanicException"):
        llm.tokenizer.encode("x")


def test_requests_that_wait_to_be_prepared_are_bounded_and_dropped_when_their_clients_go(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = [], threading.Event()

    def slow(*_: Any) -> Any:
        begun.append(1)
        go_on.wait(30)
        raise RequestError("enough")

    monkeypatch.setattr("expertstream.server.app.prepare", slow)
    server = Server(llm, parallel=2, most_waiting=2)
    try:
        url, body = f"{server.url}/v1/chat/completions", {"messages": HELLO}
        with ThreadPoolExecutor(3) as pool:
            first = [pool.submit(httpx.post, url, json=body, timeout=60) for _ in range(2)]
            while len(begun) < 2:
                time.sleep(0.005)
            leaving = pool.submit(httpx.post, url, json=body, timeout=0.5)
            with pytest.raises(httpx.ReadTimeout):
                leaving.result()
            waiting = pool.submit(httpx.post, url, json=body, timeout=60)
            time.sleep(0.2)
            assert httpx.post(url, json=body, timeout=60).status_code == 429
            go_on.set()
            assert [f.result().status_code for f in [*first, waiting]] == [400] * 3
        assert len(begun) == 3  # not the one that had gone
    finally:
        go_on.set()
        server.stop()
