"""What is left behind: by servers that do not start, by sessions that are deleted, by calls that are cut."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from expertstream import LLM, UsageError
from expertstream.chat.backends import FunctionCall, LocalBackend, RemoteBackend
from expertstream.chat.conversation import Chat
from expertstream.chat.history import TypedLines
from expertstream.chat.sessions import Conversation, SessionStore
from expertstream.chat.tools import McpTools
from expertstream.state_file import StateFile
from expertstream.text.output import Content

from ..server.conftest import Server
from ..server.scripted import scripted
from .parts import Recorder, Script, chat_of


def ended(pids: Path, count: int) -> bool:
    """Whether the processes that wrote their numbers there are gone, within some seconds."""
    end = time.monotonic() + 10
    numbers = pids.read_text().split()
    assert len(numbers) == count
    while (alive := [n for n in numbers if Path(f"/proc/{n}").exists()]) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive


@pytest.mark.parametrize("fault", ["says nothing", "says nonsense", "leaves", "second is missing"])
def test_mcp_servers_that_do_not_start_are_ended(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that had started before."""
    monkeypatch.setattr("expertstream.chat.tools.SECONDS", 1.0)
    pids = tmp_path / "pids"
    note = f"import os, sys, time; print(os.getpid(), file=open({str(pids)!r}, 'a'), flush=True)\n"
    body = {
        "says nothing": "time.sleep(100)",
        "says nonsense": "print('{' * 1000, flush=True); time.sleep(100)",
        "leaves": "sys.exit(3)",
        "second is missing": "time.sleep(100)",
    }[fault]
    (tmp_path / "server.py").write_text(note + body)
    servers = {"a": {"command": sys.executable, "args": [str(tmp_path / "server.py")]}}
    if fault == "second is missing":
        servers = {"b": {"command": "/no/such/program", "args": []}, **servers}
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": servers}))
    threads = threading.active_count()
    with pytest.raises(UsageError, match=r"did not start in time|does not start"):
        McpTools(file)
    assert fault == "second is missing" or ended(pids, 1)
    assert threading.active_count() == threads


def test_what_was_typed_is_private_and_goes_with_its_session(tmp_path: Path) -> None:
    file = tmp_path / "history"
    file.write_text("\n# 2026-01-01 00:00:00\n+of old\n+and more\n\n# 2026-01-01 00:00:01\n+the secret\n")
    file.chmod(0o644)
    session = "one"
    lines = TypedLines(file, lambda: session)
    assert file.stat().st_mode & 0o777 == 0o600
    for text in ("a word", "two\nlines"):
        lines.append_string(text)
    session = "two"
    lines.append_string("# of another")
    assert list(lines.load_history_strings()) == [
        "# of another",
        "two\nlines",
        "a word",
        "the secret",
        "of old\nand more",
    ]
    lines._loaded_strings = list(lines.load_history_strings())
    lines.forget("one", ["the secret"])
    assert lines.get_strings()[::-1] == list(lines.load_history_strings()) == ["# of another", "of old\nand more"]
    assert "secret" not in file.read_text() and "a word" not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    lines.append_string("later")
    assert next(iter(TypedLines(file, lambda: "x").load_history_strings())) == "later"
    (tmp_path / "link").symlink_to(file)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "link", tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match=path.name):
            TypedLines(path, lambda: "x")


def test_folders_are_private_whoever_made_them(tmp_path: Path) -> None:
    data = tmp_path / "share" / "expertstream"
    SessionStore(data / "sessions").save(Conversation("one"))
    assert {p.stat().st_mode & 0o777 for p in (data.parent, data, data / "sessions")} == {0o700}
    for folder in (data, data / "sessions"):
        folder.chmod(0o755)
    SessionStore(data / "sessions").save(Conversation("two"))
    TypedLines(data / "history", lambda: "x")
    assert {p.stat().st_mode & 0o777 for p in (data, data / "sessions")} == {0o700}


def test_a_deleted_session_leaves_nothing(tmp_path: Path) -> None:
    typed: list[Any] = []
    backend = Script([Content("Paris")], [Content("Rome")], [Content("Oslo")])
    chat, view = chat_of(tmp_path, backend)
    chat.forget_typed = lambda session, texts: typed.append((session, list(texts)))
    chat.run("the first secret")
    assert chat.store is not None and (chat.store.folder / "one.json").stat().st_mode & 0o777 == 0o600
    chat.run("/delete one")
    assert typed == [("one", ["the first secret"])] and chat.store.names() == []
    assert backend.forgotten == [
        [{"role": "user", "content": "the first secret"}, {"role": "assistant", "content": "Paris"}]
    ]
    assert chat.conversation.messages == [] and view.notes[-2:] == ["deleted one", "new session"]
    chat.run("again")  # the session that was open does not come back
    (name,) = chat.store.names()
    assert "secret" not in (chat.store.folder / f"{name}.json").read_text()
    (chat.store.folder / "broken.json").write_text("{")
    chat.run("/delete broken")
    assert chat.store.names() == [name] and chat.conversation.name == name
    chat.run("/delete broken")
    assert "there is no session 'broken'" in view.notes[-1]


def test_what_was_computed_of_a_deleted_session_goes_too(tmp_path: Path) -> None:
    with LLM(context_length=1024, prefix_cache_bytes=32 << 20) as llm:
        llm.keep_prefixes(tmp_path / "kept", 1 << 30)
        backend = LocalBackend(llm, {"max_tokens": 4, "temperature": 0.0})
        system = {"role": "system", "content": "You answer in a friendly and short way. " * 12}
        for name, text in (("one", "the first secret " * 20), ("two", "something else " * 20)):
            view = Recorder()
            chat = Chat(backend, SessionStore(tmp_path / "sessions"), Conversation(name, system["content"]), view)
            chat.run(text)
        assert llm.prefixes is not None
        llm.prefixes.flush()
        before = len(list((tmp_path / "kept").rglob("*.state")))
        chat.run("/delete one")
        left = [StateFile.open(f).header["position"] for f in (tmp_path / "kept").rglob("*.state")]
        assert len(left) == before - 1 and min(left) < 200  # that of the system prompt is the other session's too
        chat.run("/delete two")


def test_a_call_that_is_cut_looks_the_same_here_and_from_a_server(tmp_path: Path) -> None:
    tool = {
        "type": "function",
        "function": {"name": "shell", "description": "Runs a command", "parameters": {
            "type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}},
    }  # fmt: skip
    written = "Well. <tool_call>\n<function=shell>\n<parameter=command>\necho one two three four five six seven"
    with LLM(context_length=1024) as llm, scripted(llm, written):
        found = []
        server = Server(llm)
        try:
            sampling = {"max_tokens": 24, "temperature": 0.0}
            with closing(RemoteBackend(server.url, "", sampling)) as remote:
                for backend in (LocalBackend(llm, sampling), remote):
                    events = list(
                        backend.reply([{"role": "user", "content": "go"}], [tool], None, lambda done, total: None)
                    )
                    text = "".join(e.text for e in events if isinstance(e, Content))
                    assert not any(isinstance(e, FunctionCall) for e in events)
                    found.append((text, events[-1].ended))
        finally:
            server.stop()
    assert found[0] == found[1] and "echo one" in found[0][0] and found[0][1] == "length"


@pytest.mark.parametrize("where", ["~nobody-of-this-name/x", "/no/such/folder/x", "/", "a\0b", "x" * 5000])
def test_an_export_that_cannot_be_written_is_told(tmp_path: Path, where: str) -> None:
    chat, view = chat_of(tmp_path, Script([Content("Paris")]))
    chat.run("hi")
    chat.run(f"/export {where}")
    assert view.notes[-1].startswith("✗ ")
