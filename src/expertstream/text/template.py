"""Renders chat templates. They are untrusted code, so they run in a separate process with limits on memory and time: whatever a template
does, only its own rendering fails.

A process is started for the first template, reused for later ones, and replaced when it has ended.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import IO, Any

from ..errors import BudgetError, RequestError

__all__ = ["CPU_SECONDS", "encode", "read_message", "render_template"]

CPU_SECONDS = 10  # for one rendering; then the kernel kills the process
WALL_SECONDS = 60.0  # for one rendering, on a busy machine
KEPT_PROCESSES = 2
_LONGEST_MESSAGE = 1 << 30
_LONGEST_REASON = 1000  # characters of a template's error message
_START = "import sys; sys.path[:] = sys.argv[1:]; from expertstream.text.template_worker import serve; serve()"


def render_template(source: str, values: dict[str, Any]) -> str:
    """Renders a template with JSON values. Raises RequestError with the template's error message, or the limit that it exceeded;
    BudgetError if no process can be started."""
    try:
        request = encode({"source": source, "values": values, "seconds": CPU_SECONDS})
    except (TypeError, ValueError, RecursionError):
        raise RequestError("the chat template's variables must be JSON values") from None
    process = _idle.take()
    try:
        answer, last = _exchange(process, request)
    except BaseException:  # including Ctrl-C: a late answer must not go to the next request
        _end(process)
        raise
    if answer is None:
        answer = {"error": _end(process)}
    elif last:
        _end(process)
    else:
        _idle.give_back(process)
    if "error" in answer:
        raise RequestError(f"the chat template failed: {str(answer['error'])[:_LONGEST_REASON]}")
    return str(answer["text"])


def encode(message: dict[str, Any]) -> bytes:
    """A message to or from the process: the length of the JSON, 8 bytes little-endian, and the JSON. Raises TypeError, ValueError,
    RecursionError."""
    data = json.dumps(message).encode()
    return len(data).to_bytes(8, "little") + data


def read_message(stream: IO[bytes]) -> dict[str, Any] | None:
    """None if the stream ends, or its data is not a message."""
    head = stream.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > _LONGEST_MESSAGE:
        return None
    data = stream.read(length)
    try:
        found = json.loads(data) if len(data) == length else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> tuple[dict[str, Any] | None, bool]:
    """The answer, None if there is none, and whether the process ends after it."""
    assert process.stdin is not None and process.stdout is not None
    # A timer rather than a timeout on each read and write: it also kills a process that does not read.
    timer = threading.Timer(WALL_SECONDS, process.kill)
    timer.daemon = True
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # the process has ended; _end() reports how
            process.stdin.write(request)
            process.stdin.flush()
        answer = read_message(process.stdout)
        more = read_message(process.stdout) if answer is not None else None
    finally:
        timer.cancel()
    return answer, more is None or bool(more.get("last"))


class _Idle:
    """Processes waiting for a template, the most recently used one last."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()  # their parent: a fork must not talk to them

    def take(self) -> subprocess.Popen[bytes]:
        """A running process. Raises BudgetError."""
        with self._lock:
            if self._owner != os.getpid():
                for process in self.processes:
                    process.returncode = 0  # only its parent can wait for it
                self.processes, self._owner = [], os.getpid()
            while self.processes:
                process = self.processes.pop()
                if process.poll() is None:
                    return process
                _end(process)
        try:
            return subprocess.Popen(
                [sys.executable, "-I", "-c", _START, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # keeps Ctrl-C from this process
            )
        except OSError as error:
            raise BudgetError(f"the process for the chat template cannot be started: {error.strerror}") from None

    def give_back(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            if self._owner == os.getpid() and len(self.processes) < KEPT_PROCESSES:
                self.processes.append(process)
                return
        _end(process)

    def close(self) -> None:
        with self._lock:
            while self.processes and self._owner == os.getpid():
                _end(self.processes.pop())


def _end(process: subprocess.Popen[bytes]) -> str:
    """Stops a process; returns how it had ended before."""
    for stream in (process.stdout, process.stdin):
        with contextlib.suppress(OSError):
            stream.close()  # type: ignore[union-attr]
    if process.poll() is None and not _ends_soon(process):
        process.kill()
    code = process.wait()
    if code == -signal.SIGXCPU:
        return f"the template takes more than {CPU_SECONDS} seconds of processor time"
    if code == -signal.SIGKILL:
        return f"its process was killed: it needs too much memory, or more than {WALL_SECONDS:g} seconds"
    return f"its process ended unexpectedly (exit code {code})"


def _ends_soon(process: subprocess.Popen[bytes]) -> bool:
    """A process whose input is closed exits; one in the middle of a template does not."""
    try:
        process.wait(0.2)
    except subprocess.TimeoutExpired:
        return False
    return True


_idle = _Idle()
atexit.register(_idle.close)
