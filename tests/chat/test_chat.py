"""Conversations: turns, commands, functions with consent, sessions that stay, and the whole on a terminal driven by tmux."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from expertstream import LLM, RequestError, UsageError
from expertstream.chat.backends import FunctionCall, LocalBackend, RemoteBackend, ServerError, _lines, _object
from expertstream.chat.conversation import COMMANDS
from expertstream.chat.sessions import SessionStore
from expertstream.chat.terminal import TerminalView, _whole_blocks
from expertstream.chat.tools import McpTools, Shell
from expertstream.cli import main
from expertstream.text.output import Content, Reasoning

from ..server.conftest import Server
from .parts import Recorder, Script, chat_of


def test_turns_and_what_is_taken_back(tmp_path: Path) -> None:
    backend = Script([Content("Hel"), Content("lo")], [Reasoning("hm"), Content("Fine")], [Content("Better")])
    chat, view = chat_of(tmp_path, backend)
    assert chat.run("Hi") and view.text == "Hello"
    chat.run("/system Be short.")
    chat.run("How are you?")
    assert view.text == "Fine" and view.thought == "hm"
    assert [m["content"] for m in backend.heard[1][0]] == ["Be short.", "Hi", "Hello", "How are you?"]
    chat.run("/retry")
    assert view.text == "Better" and [m["content"] for m in chat.conversation.messages] == [
        "Hi",
        "Hello",
        "How are you?",
        "Better",
    ]
    chat.run("/undo")
    assert [m["content"] for m in chat.conversation.messages] == ["Hi", "Hello"]
    chat.run("/undo")
    chat.run("/undo")
    assert chat.conversation.messages == [] and "nothing to undo" in view.notes[-1]
    chat.run("/stats")
    assert "5.0 tokens/s" in view.notes[-1] and "prompt 10, 4 cached" in view.notes[-1]
    assert not chat.run("/quit")


def test_a_failed_answer_loses_nothing_else(tmp_path: Path) -> None:
    chat, view = chat_of(tmp_path, Script([Content("ok")], [RequestError("too long")], [Content("ok again")]))
    chat.run("one")
    chat.run("two")
    assert view.notes[-1] == "✗ too long" and [m["content"] for m in chat.conversation.messages] == ["one", "ok"]
    chat.run("three")
    assert len(chat.conversation.messages) == 4


def test_a_retry_that_fails_leaves_the_answer_that_was_there(tmp_path: Path) -> None:
    chat, view = chat_of(tmp_path, Script([Content("first")], [ServerError("gone")]))
    chat.run("Hi")
    chat.run("/retry")
    assert view.notes[-1] == "✗ gone" and [m["content"] for m in chat.conversation.messages] == ["Hi", "first"]
    assert chat.store is not None and len(chat.store.load("one").messages) == 2


def test_ctrl_c_keeps_what_was_said(tmp_path: Path) -> None:
    chat, view = chat_of(tmp_path, Script([Content("Once upon"), KeyboardInterrupt()], [Content("ok")]))
    chat.run("A story")
    assert chat.conversation.messages[-1]["content"] == "Once upon …" and view.notes[-1] == "stopped"
    chat.run("Go on")
    assert view.text == "ok"


@pytest.mark.parametrize("consents", [True, False])
def test_a_command_runs_only_with_consent(tmp_path: Path, consents: bool) -> None:
    file = tmp_path / "made"
    call = FunctionCall("shell", {"command": f"touch {file}; echo out; false"})
    backend = Script([call], [Content("Done.")])
    chat, view = chat_of(tmp_path, backend, tools=[Shell()], view=Recorder(consents))
    chat.run("Do it")
    assert view.asked == [f"$ touch {file}; echo out; false"] and file.exists() == consents
    told = backend.heard[1][0][-1]
    assert told["role"] == "tool" and told["content"] == (
        "out\n(exit code 1)" if consents else "the user does not want this to be done"
    )
    assert told["tool_call_id"] == backend.heard[1][0][-2]["tool_calls"][0]["id"]
    assert chat.conversation.messages[-1]["content"] == "Done." and backend.heard[0][1] == ["shell"]


def test_a_function_that_is_not_there_and_one_that_never_ends(tmp_path: Path) -> None:
    call = FunctionCall("nothing", {})
    backend = Script(*[[call]] * 16)
    chat, view = chat_of(tmp_path, backend, tools=[Shell()], ask_consent=False)
    chat.run("Do it")
    assert "error: there is no function nothing" in str(backend.heard[1][0][-1]) and "16 rounds" in view.notes[-1]


def test_the_shell_is_bounded() -> None:
    shell = Shell(seconds=1.0)
    run = lambda command: shell.call("shell", {"command": command})  # noqa: E731
    assert run("echo hi") == "hi" and run("true") == "(no output)"
    assert run("cat") == "(no output)"  # nothing on standard input
    begin = time.monotonic()
    assert run("echo a; sleep 100") == "a\n(stopped after 1 seconds)"
    assert run("sleep 100 & echo b").startswith("b")
    assert time.monotonic() - begin < 20
    long = run("yes")
    assert "(cut after 16384 bytes)" in long and len(long) < 17_000
    assert shell.call("shell", {"cmd": "x"}) == "error: no command given"
    assert run("echo \x00").startswith("error:") and run("echo '\ud800'").startswith("error:")


def test_sessions_stay_and_are_found(tmp_path: Path) -> None:
    chat, view = chat_of(tmp_path, Script([Content("a")], [Content("b")]))
    chat.run("Hi")
    for line in ("/save my first", "/new", "Hello", "/sessions"):
        chat.run(line)
    assert (
        "  my first\t2 messages\tHi" in view.notes[-1]
        and "* " in view.notes[-1]
        and chat.store is not None
        and len(chat.store.names()) == 2
    )
    chat.run("/resume my first")
    assert view.notes[-1] == "replayed 2" and chat.conversation.messages[0]["content"] == "Hi"
    chat.run(f"/export {tmp_path}/out.md")
    assert "**user**\n\nHi" in (tmp_path / "out.md").read_text()
    for line, told in (
        (f"/export {tmp_path}/out.md", "already exists"), ("/resume nobody", "no session"), ("/save ../x", "letters, digits"),
        ("/rename my first", "already"), ("/nonsense", "/help lists"), ("/think maybe", "on, off"), ("/export", "give a file"), ("/save", "give a name"),
    ):  # fmt: skip
        chat.run(line)
        assert told in view.notes[-1] and view.notes[-1].startswith("✗"), line
    (tmp_path / "sessions" / "broken.json").write_text('{"name": 3')
    chat.run("/sessions")
    assert "  broken\tcannot be read" in view.notes[-1]
    chat.run("/resume broken")
    assert "not a session" in view.notes[-1]
    chat.run("/delete broken")
    assert "broken" not in chat.store.names()
    chat.run("/help")
    assert all(name.split()[0] in view.notes[-1] for name in COMMANDS)


@given(st.text(max_size=300), st.integers(0, 300))
def test_blocks_are_cut_where_markdown_may_be(text: str, at: int) -> None:
    place = _whole_blocks(text)
    assert 0 <= place <= len(text)
    assert place == 0 or text[:place].endswith("\n")
    fenced = "```\n" + text.replace("```", "").replace("~~~", "")
    assert _whole_blocks(fenced) == 0


def test_nothing_that_is_said_commands_the_terminal() -> None:
    evil = "a\x1b]0;title\x07b\x9b2Jc\td\ne\r\nf"
    out = io.StringIO()
    view = TerminalView(Console(file=out, force_terminal=True, width=80, color_system=None))
    view.note(evil)
    view.output(evil)
    view.replay([{"role": "user", "content": evil}, {"role": "assistant", "content": evil}])
    with view.answer(True) as shown:
        shown.reasoning(evil)
        shown.content(evil)
    assert "\x07" not in out.getvalue() and "\x9b" not in out.getvalue() and "\x1b]0" not in out.getvalue()


def test_the_model_in_this_process_answers(tmp_path: Path) -> None:
    with LLM(context_length=1024, prefix_cache_bytes=16 << 20) as llm:
        chat, view = chat_of(tmp_path, LocalBackend(llm, {"temperature": 0.0}))
        chat.conversation.system = "You are a helpful assistant. " * 20
        chat.run("What is the capital of France?")
        assert "Paris" in view.text and chat.last is not None and chat.last.generated_tokens > 3
        chat.run("Thank you!")
        assert chat.last.cached_tokens >= 64
        with pytest.raises(UsageError):
            LocalBackend(llm, {"temperature": -1})


def test_a_server_answers_the_same(tmp_path: Path) -> None:
    with LLM(context_length=1024) as llm:
        server = Server(llm)
        try:
            texts = []
            remote = RemoteBackend(server.url, "", {"seed": 3, "max_tokens": 30})
            for backend in (LocalBackend(llm, {"seed": 3, "max_tokens": 30}), remote):
                chat, view = chat_of(tmp_path, backend, tools=[Shell()])
                chat.run("Tell me a story.")
                texts.append(view.text)
                assert chat.last is not None and chat.last.generated_tokens == 30
            assert texts[0] == texts[1] != ""
            assert chat.last.hit_rate is not None
            chat.run("word " * 2000)
            assert "can be started with --context" in view.notes[-1]
            remote.close()
        finally:
            server.stop()
    with pytest.raises(ServerError):
        RemoteBackend(server.url, "", {})


def test_a_model_that_a_server_does_not_have() -> None:
    with LLM(context_length=256) as llm:
        server = Server(llm)
        try:
            with pytest.raises(UsageError, match="no model 'gpt'"):
                RemoteBackend(server.url, "", {}, "gpt")
        finally:
            server.stop()


def test_lines_of_a_stream_end_with_line_feeds_only() -> None:
    text = 'data: {"a": "x\u2028y\x85z"}\n\ndata: [DONE]\n'.encode()
    for cut in range(len(text)):
        assert list(_lines([text[:cut], text[cut:]])) == [*text.split(b"\n")]
    assert _object("[1]") is None and _object('{"a"') is None and _object('{"a": 1}') == {"a": 1}


MCP_SERVER = '''
from mcp.server.fastmcp import FastMCP
server = FastMCP("test")
@server.tool()
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b
server.run()
'''


def test_mcp_servers(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    try:
        from mcp.server.fastmcp import FastMCP  # noqa: F401

        script.write_text(MCP_SERVER)
    except ImportError:
        script.write_text(
            MCP_SERVER.replace("mcp.server.fastmcp", "mcp.server.mcpserver").replace("FastMCP", "MCPServer")
        )
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"math": {"command": sys.executable, "args": [str(script)]}}}))
    tools = McpTools(file)
    try:
        assert [s["function"]["name"] for s in tools.schemas()] == ["math_add"]
        assert tools.schemas()[0]["function"]["parameters"]["required"] == ["a", "b"]
        assert tools.call("math_add", {"a": 2, "b": 3}) == "5"
        assert "error" in tools.call("math_add", {"a": "x"}).lower()
        assert tools.describe("math_add", {"a": 2}) == 'math: add({"a": 2})'
    finally:
        tools.close()
    file.write_text("[]")
    with pytest.raises(UsageError, match="not a list of MCP servers"):
        McpTools(file)
    file.write_text(json.dumps({"mcpServers": {"gone": {"command": "/no/such/program"}}}))
    with pytest.raises(UsageError, match="does not start"):
        McpTools(file)


def run_chat(tmp_path: Path, *arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "data"), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    command = [sys.executable, "-m", "expertstream", "chat", *arguments]
    return subprocess.run(command, input=said, capture_output=True, text=True, env=environment, timeout=120)


def test_a_pipe_gets_the_answers_alone(tmp_path: Path) -> None:
    (tmp_path / "config" / "expertstream").mkdir(parents=True)
    (tmp_path / "config" / "expertstream" / "system.md").write_text("You are a kind helper.\n")
    result = run_chat(tmp_path, "--temperature", "0", said="What is the capital of France?\n/nonsense\n/system\n")
    assert result.returncode == 0 and result.stdout == "The capital of France is Paris.\n", result.stderr
    assert "✗ unknown command /nonsense" in result.stderr and "You are a kind helper." in result.stderr
    (line,) = run_chat(tmp_path, "--sessions").stdout.splitlines()
    name, count, begin = line.split("\t")
    assert (count, begin) == ("2 messages", "What is the capital of France?")
    again = run_chat(tmp_path, "--resume", name, said="/export /dev/stdout\n")
    assert "already exists" in again.stderr and "2 messages" in again.stderr


def test_a_resumed_session_is_not_read_again(tmp_path: Path) -> None:
    long = ["--temperature", "0", "--max-tokens", "20", "--system", "You are a kind helper. " * 60]
    first = run_chat(tmp_path, *long, said="What is the capital of France?\n/save paris\n")
    assert first.returncode == 0, first.stderr
    again = run_chat(tmp_path, *long, "--resume", "paris", said="Thank you.\n/stats\n")
    known = re.search(r"prompt (\d+), (\d+) cached", again.stderr)
    assert known is not None and int(known[2]) >= 256 > int(known[1]) - int(known[2]) > 0, again.stderr
    saved = SessionStore(tmp_path / "data" / "expertstream" / "sessions").load("paris")
    assert len(saved.messages) == 4 and saved.system.startswith("You are a kind helper.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "ftp://x"], "--url must be an address"),
        (["--url", "http://127.0.0.1:9", "--memory", "1GiB"], "cannot be combined"),
        (["--url", "http://127.0.0.1:9"], "no server answers at"),
        (["--resume"], "no session to resume"),
        (["--resume", "nobody"], "expertstream chat --sessions"),
        (["--resume", "x", "--no-save"], "cannot be combined"),
        (["--name", "x"], "--name needs --url"),
        (["--yes"], "--yes needs"),
        (["--temperature", "-1"], "temperature must be a number"),
        (["/no/such/model"], "no such folder"),
        (["--mcp", "/no/such/file"], "not a list of MCP servers"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["chat", *arguments]) in (2, 3, 6)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_on_a_terminal(tmp_path: Path) -> None:
    name = f"expertstream-test-{os.getpid()}"

    def tmux(*arguments: str) -> str:
        return subprocess.run(["tmux", "-L", name, *arguments], capture_output=True, text=True, timeout=20).stdout

    def wait_for(text: str, seconds: float = 60) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            seen = tmux("capture-pane", "-p", "-t", name)
            if text in seen:
                return seen
            time.sleep(0.1)
        raise AssertionError(f"{text!r} did not come:\n{seen}")

    environment = f"XDG_DATA_HOME={tmp_path}/data XDG_CONFIG_HOME={tmp_path}/config TERM=xterm-256color"
    command = f"env {environment} {sys.executable} -m expertstream chat --temperature 0"
    tmux("new-session", "-d", "-s", name, "-x", "100", "-y", "40", command)
    try:
        wait_for("/help lists commands")
        tmux("send-keys", "-t", name, "What is the capital of France?", "Enter")
        wait_for("The capital of France is Paris.")
        wait_for("tokens/s")  # the footer
        tmux("send-keys", "-t", name, "/think show", "Enter")
        wait_for("reasoning is off, and shown")
        tmux("send-keys", "-t", name, "Tell me a very long story.", "Enter")
        time.sleep(0.3)
        tmux("send-keys", "-t", name, "C-c")
        tmux("send-keys", "-t", name, "/save after the interruption", "Enter")
        wait_for("saved as after the interruption")
        tmux("send-keys", "-t", name, "C-d")
        end = time.monotonic() + 20
        while name in tmux("list-sessions") and time.monotonic() < end:
            time.sleep(0.1)
        assert name not in tmux("list-sessions")
    finally:
        tmux("kill-server")
    saved = json.loads((tmp_path / "data" / "expertstream" / "sessions" / "after the interruption.json").read_text())
    assert [m["role"] for m in saved["messages"][:2]] == ["user", "assistant"] and len(saved["messages"]) == 4
