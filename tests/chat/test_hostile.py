"""What a server, a model or a command may send to hurt the person at the terminal: any JSON, lines without end, commands that hide."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from expertstream.chat import backends
from expertstream.chat.backends import RemoteBackend, ServerError
from expertstream.chat.sessions import Conversation, SessionStore
from expertstream.chat.terminal import TerminalView
from expertstream.errors import ExpertStreamError, RequestError, UsageError
from expertstream.text.visible import excerpt, spelled_out, visible

MODELS = b'{"data": [{"id": "m"}]}'


@contextmanager
def says(answers: dict[str, bytes | tuple[int, bytes]]) -> Iterator[str]:
    """A server that gives the same bytes for a path, whatever it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            found = answers.get(self.path, (404, b"{}"))
            status, body = found if isinstance(found, tuple) else (200, found)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body)
            except OSError:
                self.close_connection = True

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def stream(*chunks: Any) -> bytes:
    return b"".join(b"data: " + (c if isinstance(c, bytes) else json.dumps(c).encode()) + b"\n\n" for c in chunks)


def delta(**given: Any) -> dict[str, Any]:
    return {"choices": [{"delta": given}]}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"null", b'{"data": {}}', b'{"data": [1]}', b'{"data": []}', b"\xff", b"[" * 100_000, b'"' + b"x" * (17 << 20),
        (500, b'{"error": 3}'), (500, b"\xff\x1b[2J"), (503, b"[" * 100_000), (400, b'{"error": {"message": ["x"]}}'),
    ],
)  # fmt: skip
def test_a_server_that_lists_no_models(body: Any) -> None:
    with says({"/v1/models": body}) as url, pytest.raises(ExpertStreamError) as caught:
        RemoteBackend(url, "", {})
    assert caught.type in (ServerError, RequestError) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "chunk",
    [
        b"{", b"[]", b"null", b"3", b"\xff", b"[" * 100_000, b'{"choices": ' + b"[" * 100_000, {"choices": {}}, {"choices": ["x"]},
        {"choices": [{"delta": []}]}, delta(content=3), delta(content=["x"]), delta(reasoning_content={}), delta(tool_calls={"a": 1}),
        delta(tool_calls=[3]), delta(tool_calls=[{"function": "f"}]), delta(tool_calls=[{"index": "0", "function": {}}]),
        delta(tool_calls=[{"function": {"name": 3}}]), delta(tool_calls=[{"function": {"arguments": {"a": 1}}}]),
        {"choices": [{"finish_reason": 3}]}, {"usage": []}, {"usage": {"prompt_tokens": "many"}}, {"error": {"message": {}}},
        {"error": []}, {"error": "broken"},
    ],
)  # fmt: skip
def test_a_server_that_streams_anything(chunk: Any) -> None:
    with says({"/v1/models": MODELS, "/v1/chat/completions": stream(delta(content="so far"), chunk)}) as url:
        backend = RemoteBackend(url, "", {})
        found = []
        with pytest.raises(ServerError) as caught:
            for event in backend.reply([{"role": "user", "content": "x"}], [], None, lambda *_: None):
                found.append(event)
        backend.close()
    assert found == [backends.Content("so far")] and len(str(caught.value)) < 500


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "delta",
                    "content",
                    "tool_calls",
                    "function",
                    "name",
                    "arguments",
                    "index",
                    "usage",
                    "error",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_no_event_is_a_surprise(value: Any) -> None:
    with suppress(ServerError, ValueError):
        backends._chunk(value)


def test_a_line_without_end() -> None:
    parts = (b"x" * (1 << 20) for _ in range(10_000))
    with pytest.raises(ValueError, match="16 MiB"):
        list(backends._lines(parts))
    assert next(parts, None) is not None  # it was not read to its end


@pytest.mark.parametrize(
    "url", ["http://[", "http://[::1", "http://a:b:c", "http://x:99999999", "ftp://x", "", "http://\n"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises((UsageError, ServerError)):
        RemoteBackend(url, "", {})


def test_commands_are_shown_as_they_are() -> None:
    assert spelled_out("a\\u202eb") == "a\\u202eb" and spelled_out("a\u202eb") == "a⟨U+202E⟩b"
    assert spelled_out("⟨U+202E⟩") == "⟨U+27E8⟩U+202E⟨U+27E9⟩"
    assert spelled_out("a\nb⏎") == "a⏎\nb⟨U+23CE⟩" and spelled_out("é ä\t") == "é ä⟨U+0009⟩"
    for char in "\x00\x1b\r\x85\u00a0\u00ad\u0301\u200b\u2028\u2800\u3164\ufe0f\U000e0041\ud800":
        assert spelled_out(f"a{char}") == f"a⟨U+{ord(char):04X}⟩"


@given(st.text(), st.text())
def test_two_commands_never_look_the_same(one: str, other: str) -> None:
    assert (spelled_out(one) == spelled_out(other)) == (one == other)


@given(st.text(alphabet="ab ⏎字\n", max_size=300), st.integers(1, 30), st.integers(1, 20))
def test_what_does_not_fit_is_counted(text: str, columns: int, rows: int) -> None:
    shown = excerpt(text, columns, rows)
    if shown != text:
        lines = shown.split("\n")
        note = next(line for line in lines if line.startswith("[… "))
        left_out = int(note.split()[1].replace(",", ""))
        kept = [line for line in lines if line is not note]
        assert 0 < left_out < len(text) and len(lines) <= max(rows, 5)
        assert text.startswith(kept[0]) and text.endswith(kept[-1])
        ends = text.count("\n")  # each of them may be in what is left out, or between two rows
        assert len(text) - ends <= left_out + sum(map(len, kept)) <= len(text)


def asked(command: str, *answers: str) -> tuple[bool, str]:
    out = io.StringIO()
    view = TerminalView(Console(file=out, force_terminal=True, width=60, height=16, color_system=None))
    said = iter(answers)
    view.console.input = lambda prompt="", **_: (view.console.print(prompt, end=""), next(said))[1]  # type: ignore[method-assign]
    return view.consent(command), out.getvalue()


def test_a_long_command_cannot_hide_its_end() -> None:
    command = "$ echo start\n" + "true\n" * 500 + "rm -rf important"
    consent, shown = asked(command, "y")
    assert consent and "$ echo start⏎" in shown and "rm -rf important" in shown and "in 502 lines" in shown
    assert len(shown.splitlines()) <= 16
    consent, shown = asked(command, "a", "n")
    assert not consent and shown.count("true⏎") >= 500


def test_a_command_in_one_line_is_no_other() -> None:
    consent, shown = asked("$ echo " + " " * 41 + "$ ls\x1b[2J\r\u202e", "")
    assert not consent and "⟨U+001B⟩[2J⟨U+000D⟩⟨U+202E⟩" in shown and "\x1b[2J" not in shown and "⏎" not in shown


def test_two_chats_on_one_session_lose_nothing(tmp_path: Path) -> None:
    first, second = SessionStore(tmp_path), SessionStore(tmp_path)
    begun = Conversation("talk", messages=[{"role": "user", "content": "0"}])
    assert first.save(begun) is None and first.save(begun) is None
    one, other = first.load("talk"), second.load("talk")
    one.messages.append({"role": "user", "content": "one"})
    other.messages.append({"role": "user", "content": "other"})
    assert first.save(one) is None
    assert second.listing() == ["talk\t2 messages\t0"]  # to list it is not to have gone on from it
    assert second.save(other) == "talk" and other.name == "talk 2"
    assert second.save(other) is None  # its own by now
    assert first.save(one) is None
    third = SessionStore(tmp_path)
    assert third.save(Conversation("talk", messages=[{"role": "user", "content": "third"}])) == "talk"
    said = {name: [m["content"] for m in third.load(name).messages] for name in third.names()}
    assert said == {"talk": ["0", "one"], "talk 2": ["0", "other"], "talk 3": ["third"]}


def test_a_rename_takes_no_other_chats_session_along(tmp_path: Path) -> None:
    first, second = SessionStore(tmp_path), SessionStore(tmp_path)
    first.save(Conversation("talk", messages=[{"role": "user", "content": "0"}]))
    one, other = first.load("talk"), second.load("talk")
    first.save(one)
    second.rename(other, "mine")
    assert sorted(first.names()) == ["mine", "talk"] and second.load("mine").messages == other.messages
    first.rename(one, "ours")
    assert sorted(first.names()) == ["mine", "ours"]
    with pytest.raises(RequestError, match="already"):
        first.rename(one, "mine")


def test_half_a_surrogate_pair_is_kept_and_shown_as_none(tmp_path: Path) -> None:
    store = SessionStore(tmp_path)
    store.save(Conversation("talk", messages=[{"role": "user", "content": "\ud83d x \U0001f600"}]))
    assert store.load("talk").messages[0]["content"] == "\ud83d x \U0001f600"
    assert visible("\ud83d\U0001f600") == "\ufffd\U0001f600"
    assert backends._chunk(json.loads('{"choices": [{"delta": {"content": "\\ud83d x"}}]}')).content == "\ufffd x"


def test_a_session_that_is_none(tmp_path: Path) -> None:
    for text in ("", "[]", "[" * 100_000, '{"name": "x", "messages": 3}', '{"name": "x", "messages": [3]}', '{"a": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(RequestError, match="not a session"):
            SessionStore(tmp_path).load("bad")
        assert SessionStore(tmp_path).listing() == ["bad\tcannot be read"]
