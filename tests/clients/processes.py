"""Runs clients where `make client-test` has installed them, each with a home of its own and no way out of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["Desk", "Result", "needs"]

INSTALLED = Path(__file__).parents[2] / "build" / "clients"
_FOLDERS = {
    "claude": "node/node_modules/.bin", "codex": "node/node_modules/.bin", "opencode": "node/node_modules/.bin", "aider": "aider/bin",
    "llm": "python/bin", "python": "python/bin",
}  # fmt: skip
# Nothing that a recipe needs: no updates, no reports, no downloads of price lists, and no second attempts that would hide a failure.
_QUIET = {
    "DISABLE_AUTOUPDATER": "1", "DISABLE_TELEMETRY": "1", "DISABLE_ERROR_REPORTING": "1", "CLAUDE_CODE_MAX_RETRIES": "0",
    "OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
    "OPENCODE_DISABLE_LSP_DOWNLOAD": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false",
    "AIDER_ANALYTICS": "false", "AIDER_CHECK_UPDATE": "false", "AIDER_PRETTY": "false",
}  # fmt: skip
# Whoever wants to leave the machine is refused at once.
_INSIDE = {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1,localhost"}
_PROXIES = {**_INSIDE, **{name.lower(): value for name, value in _INSIDE.items()}}


def needs(program: str) -> pytest.MarkDecorator:
    """Skips a test where the program is not installed."""
    absent = not (INSTALLED / _FOLDERS[program] / program).exists()
    return pytest.mark.skipif(absent, reason=f"{program} is not installed in build/clients; `make client-test` does it")


@dataclass(frozen=True)
class Result:
    status: int
    output: str
    errors: str

    def __str__(self) -> str:
        return f"exit code {self.status}\n{self.output}\n{self.errors}"


class Desk:
    """A folder to work in, and a home."""

    def __init__(self, folder: Path) -> None:
        self.home, self.project, self._logs = folder / "home", folder / "project", folder / "logs"
        for each in (self.home, self.project, self._logs):
            each.mkdir()

    def write(self, path: str, text: str) -> Path:
        """A file of the project, or with ~/ of the home."""
        file = self.home / path[2:] if path.startswith("~/") else self.project / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    def start(self, program: str, script: str) -> Running:
        """bash with the script, which finds the program."""
        path = f"{INSTALLED / _FOLDERS[program]}:{os.environ['PATH']}"
        given = {"PATH": path, "HOME": str(self.home), "LANG": "C.UTF-8", "TERM": "dumb", "TMPDIR": str(self._logs)}
        return Running(script, given | _QUIET | _PROXIES, self.project, self._logs)

    def run(self, program: str, script: str, seconds: float = 100) -> Result:
        with self.start(program, script) as running:
            return running.wait(seconds)

    def run_task(self, task: str, recipe: str) -> Result:
        """A program of tests/clients/tasks, which finds the recipe as the module `recipe`."""
        self.write("recipe.py", recipe)
        shutil.copy(Path(__file__).parent / "tasks" / f"{task}.py", self.project / "task.py")
        return self.run("python", "python task.py")


class Running:
    """A client under way. Leaving the context ends it and all that it started."""

    def __init__(self, script: str, environment: dict[str, str], folder: Path, logs: Path) -> None:
        self._files = logs / "output", logs / "errors"
        with self._files[0].open("wb") as output, self._files[1].open("wb") as errors:
            self.process = subprocess.Popen(
                ["bash", "-euc", script], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
                start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def signal(self, number: int) -> None:
        """To the whole group, as a terminal does on Ctrl-C."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def wait(self, seconds: float) -> Result:
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.process.wait()
            pytest.fail(f"did not end within {seconds:g} seconds\n{self._result(-1)}")
        return self._result(status)

    def _result(self, status: int) -> Result:
        return Result(status, *(file.read_text(encoding="utf-8", errors="replace") for file in self._files))
