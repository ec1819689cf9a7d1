"""Functions that a model may call with the user's consent: a shell, and the tools of MCP servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, Protocol

from ..errors import UsageError
from ..files import read_text

__all__ = ["McpTools", "Shell", "ToolSource"]

MAX_OUTPUT = 16 << 10  # bytes passed to the model
SECONDS = 60.0


class ToolSource(Protocol):
    """Provides functions and calls them."""

    def schemas(self) -> list[dict[str, Any]]:
        """In the format of OpenAI's API."""

    def describe(self, name: str, arguments: dict[str, Any]) -> str:
        """The text shown when asking for consent."""

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The result for the model; a failure is returned as text, too."""


class Shell:
    """Runs commands in the current folder, with empty standard input, for at most `seconds`."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds

    def schemas(self) -> list[dict[str, Any]]:
        properties = {"command": {"type": "string", "description": "The command, as for sh -c"}}
        parameters = {"type": "object", "properties": properties, "required": ["command"]}
        function = {
            "name": "shell",
            "description": "Runs a command in the user's shell",
            "parameters": parameters,
        }
        return [{"type": "function", "function": function}]

    def describe(self, name: str, arguments: dict[str, Any]) -> str:
        return f"$ {arguments.get('command', '')}"

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        command = arguments.get("command")
        if not isinstance(command, str) or not command.strip():
            return "error: no command given"
        output = bytearray()
        cut = False
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:  # a NUL character, or too long
            return f"error: {error}"
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        end, ended = time.monotonic() + self.seconds, "timeout"
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while time.monotonic() < end:
                    if selector.select(timeout=min(0.2, max(0.0, end - time.monotonic()))):
                        part = process.stdout.read(65536)
                        if part == b"":
                            ended = "closed"
                            break
                        output += part or b""
                        if len(output) > MAX_OUTPUT:
                            cut, output[MAX_OUTPUT:] = True, b""
                    elif process.poll() is not None:
                        ended = "closed"  # a background process keeps the pipe open
                        break
            if ended == "closed":
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, end - time.monotonic()))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
        text = output.decode("utf-8", "replace")
        notes = [f"(cut after {MAX_OUTPUT} bytes)"] if cut else []
        if ended == "timeout":
            notes.append(f"(stopped after {self.seconds:g} seconds)")
        elif process.returncode:
            notes.append(f"(exit code {process.returncode})")
        return "\n".join(part for part in (text.rstrip("\n"), *notes) if part) or "(no output)"


class McpTools:
    """Functions of MCP servers, from a file {"mcpServers": {name: {"command", "args", "env"}}} in the usual format. Each function is
    named server_function here. close() stops the servers."""

    def __init__(self, file: Path) -> None:
        """Raises UsageError for an invalid file, or a server that does not start."""
        try:
            servers = json.loads(read_text(file))["mcpServers"]
            commands = {}
            for name, server in servers.items():
                args = [str(a) for a in server.get("args", [])]
                commands[str(name)] = (str(server["command"]), args, server.get("env"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f'{file}: not a list of MCP servers such as {{"mcpServers": {{…}}}}: {error}') from None
        try:
            import mcp
        except ImportError:
            raise UsageError("MCP servers need the package mcp: pip install 'expertstream[mcp]'") from None
        self._mcp: Any = mcp
        self._sessions: dict[str, Any] = {}
        self._functions: dict[str, tuple[str, str, dict[str, Any]]] = {}  # name here → server, name there, schema
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._error = ""
        self._serving: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=lambda: self._run_servers(commands), daemon=True)
        self._thread.start()
        try:
            self._ready.wait(SECONDS)
            if self._error or not self._ready.is_set():
                raise UsageError(f"{file}: {self._error or 'the servers did not start in time'}")
        except BaseException:  # including Ctrl-C: a failed start leaves no server running
            self.close()
            raise

    def _run_servers(self, commands: dict[str, tuple[str, list[str], Any]]) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            try:
                asyncio.run(self._serve(commands))
            except Exception as error:  # stopping third-party programs can raise anything
                self._error = self._error or str(error)
            finally:
                self._ready.set()

    async def _serve(self, commands: dict[str, tuple[str, list[str], Any]]) -> None:
        """Starts the servers and keeps them running until close()."""
        from mcp.client.stdio import stdio_client

        self._loop, self._stop, self._serving = asyncio.get_running_loop(), asyncio.Event(), asyncio.current_task()
        async with contextlib.AsyncExitStack() as stack:
            for name, (command, args, env) in commands.items():
                try:
                    settings = self._mcp.StdioServerParameters(command=command, args=args, env=env)
                    read, write = await stack.enter_async_context(stdio_client(settings))
                    session = await stack.enter_async_context(self._mcp.ClientSession(read, write))
                    await session.initialize()
                    found = (await session.list_tools()).tools
                except Exception as error:  # third-party programs can fail in any way
                    self._error = f"the MCP server {name} does not start: {error or type(error).__name__}"
                    self._ready.set()
                    return
                self._sessions[name] = session
                for tool in found:
                    schema = getattr(tool, "inputSchema", None) or getattr(tool, "input_schema", {})
                    function = {"description": tool.description or "", "parameters": schema}
                    self._functions[f"{name}_{tool.name}"] = (name, tool.name, function)
            self._ready.set()
            await self._stop.wait()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(SECONDS)

    def schemas(self) -> list[dict[str, Any]]:
        return [{"type": "function", "function": {"name": n, **f}} for n, (_, _, f) in self._functions.items()]

    def describe(self, name: str, arguments: dict[str, Any]) -> str:
        server, function, _ = self._functions[name]
        return f"{server}: {function}({json.dumps(arguments, ensure_ascii=False)})"

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        server, function, _ = self._functions[name]
        try:
            result = self._run(self._sessions[server].call_tool(function, arguments))
        except FutureTimeoutError:
            return f"error: no answer within {SECONDS:g} seconds"
        except Exception as error:
            return f"error: {error or type(error).__name__}"
        text = "\n".join(getattr(part, "text", f"({part.type})") for part in result.content)
        return text[:MAX_OUTPUT] or "(no output)"

    def close(self) -> None:
        """Stops the servers, including those still starting."""
        ways = [self._stop.set] if self._stop is not None and self._ready.is_set() else []
        for end in (*ways, self._serving.cancel if self._serving is not None else None):
            with contextlib.suppress(RuntimeError):  # the loop is closed: the servers have stopped
                if self._loop is not None and end is not None:
                    self._loop.call_soon_threadsafe(end)
            self._thread.join(5)
            if not self._thread.is_alive():
                return
