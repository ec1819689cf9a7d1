"""Chat templates are programs that came with somebody's model. They run in a process of their own, which has limits on memory and time:
whatever a template does, it can fail alone.

A process is started when the first template is rendered, kept for the next ones, and replaced when it was ended.
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

from .errors import BudgetError, RequestError

__all__ = ["CPU_SECONDS", "encode", "read_message", "render_template"]

CPU_SECONDS = 10  # of one rendering; then the kernel ends the process
WALL_SECONDS = 60.0  # of one rendering, on a machine that is busy with other things
KEPT_PROCESSES = 2
_LONGEST_MESSAGE = 1 << 30
_LONGEST_REASON = 1000  # characters of what a template says when it fails
_START = "import sys; sys.path[:] = sys.argv[1:]; from expertstream.template_worker import serve; serve()"


def render_template(source: str, values: dict[str, Any]) -> str:
    """The text that a template makes of values, which are JSON. Raises RequestError with what the template says, or with the limit that
    it exceeded; BudgetError where no process can be started."""
    try:
        request = encode({"source": source, "values": values, "seconds": CPU_SECONDS})
    except (TypeError, ValueError, RecursionError):
        raise RequestError("the chat template's variables must be JSON values") from None
    process = _idle.take()
    try:
        answer, last = _exchange(process, request)
    except BaseException:  # also Ctrl-C: what the process would say next is not what the next one asks
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
    """A message to or from the process: the length of what follows, 8 bytes little-endian, and JSON. Raises TypeError, ValueError,
    RecursionError."""
    data = json.dumps(message).encode()
    return len(data).to_bytes(8, "little") + data


def read_message(stream: IO[bytes]) -> dict[str, Any] | None:
    """None if the stream ends, or what it has is no message."""
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
    """The answer, None if there is none, and whether the process ends with it."""
    assert process.stdin is not None and process.stdout is not None
    # A timer rather than a time limit on each read and write: it also ends a process that does not read.
    timer = threading.Timer(WALL_SECONDS, process.kill)
    timer.daemon = True
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended; how, is told by _end()
            process.stdin.write(request)
            process.stdin.flush()
        answer = read_message(process.stdout)
        more = read_message(process.stdout) if answer is not None else None
    finally:
        timer.cancel()
    return answer, more is None or bool(more.get("last"))


class _Idle:
    """Processes that wait for a template, the one that was used last at the end."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._owner = os.getpid()  # whose children they are: a fork must not talk to them

    def take(self) -> subprocess.Popen[bytes]:
        """One that is running. Raises BudgetError."""
        with self._lock:
            if self._owner != os.getpid():
                for process in self.processes:
                    process.returncode = 0  # another's child is not waited for
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
                start_new_session=True,  # Ctrl-C is for the command that waits for the template
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
    """Ends a process, and says how it had ended before that."""
    for stream in (process.stdout, process.stdin):
        with contextlib.suppress(OSError):
            stream.close()  # type: ignore[union-attr]
    if process.poll() is None and not _ends_soon(process):
        process.kill()
    code = process.wait()
    if code == -signal.SIGXCPU:
        return f"the template takes more than {CPU_SECONDS} seconds of the processor"
    if code == -signal.SIGKILL:
        return f"its process was ended: it needs too much memory, or more than {WALL_SECONDS:g} seconds"
    return f"its process ended unexpectedly (exit code {code})"


def _ends_soon(process: subprocess.Popen[bytes]) -> bool:
    """A process whose input has ended, ends; one in the middle of a template does not."""
    try:
        process.wait(0.2)
    except subprocess.TimeoutExpired:
        return False
    return True


_idle = _Idle()
atexit.register(_idle.close)
