"""The server of the embedded model that clients talk to, and what it logs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expertstream.engine import LLM

from ..server.conftest import Server
from .processes import Desk
from .scripts import SECRET


class Access:
    """The lines of the server's access log."""

    def __init__(self, server: Server, caplog: pytest.LogCaptureFixture) -> None:
        self._server, self._caplog = server, caplog

    def lines(self) -> list[dict[str, Any]]:
        """Of this test, when all requests have ended."""
        self._server.wait_until_answered()
        found = [json.loads(r.getMessage()) for r in self._caplog.records if r.name == "expertstream.access"]
        return [line for line in found if line["path"] != "/health"]

    def answered(self, path: str, least: int = 1) -> list[dict[str, Any]]:
        """The requests of this path. None of any path was refused or failed."""
        lines = self.lines()
        assert all(200 <= line["status"] < 300 for line in lines), lines
        found = [line for line in lines if line["path"] == path]
        assert len(found) >= least, lines
        return found


@pytest.fixture(scope="package")
def llm() -> Iterator[LLM]:
    """The whole of a client's own prompt fits; it is longer than what this model was trained for."""
    with LLM(
        context_length=65536, beyond_trained_context=True, sequences=2, memory="512MiB", prefix_cache_bytes=64 << 20
    ) as llm:
        yield llm


@pytest.fixture(scope="package")
def server(llm: LLM) -> Iterator[Server]:
    server = Server(llm, aliases=("local",), parallel=2, only_local=True)
    yield server
    server.stop()


@pytest.fixture
def access(server: Server, caplog: pytest.LogCaptureFixture) -> Access:
    caplog.set_level(logging.INFO, "expertstream.access")
    return Access(server, caplog)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """With a file that has a secret."""
    desk = Desk(tmp_path)
    desk.write("notes.txt", f"The secret word is {SECRET}.\n")
    return desk
