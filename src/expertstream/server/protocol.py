"""Connections: idle and slow clients are disconnected, and there are never more connections than file descriptors."""

from __future__ import annotations

import asyncio
import logging
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["HEAD_SECONDS", "Protocol", "raise_file_limit"]

HEAD_SECONDS = 20.0  # from the start of a connection, or the previous answer, to the complete head of a request
OTHER_FILES = 128  # descriptors that are not connections: expert files, prefixes on disk, logs
_log = logging.getLogger("expertstream")


def raise_file_limit() -> int:
    """Raises the open file limit to the hard limit; returns the maximum number of connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):
            _log.debug("the open file limit stays at %d", soft)
    files = 1 << 20 if soft == resource.RLIM_INFINITY else soft
    return max(16, min(4096, files - OTHER_FILES))


class Protocol(H11Protocol):
    """HTTP/1.1 on one connection. max_connections: for the whole process; further ones are closed at once."""

    max_connections = 4096
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._waiting():
            if self._timer is None:
                self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)
        else:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _waiting(self) -> bool:
        """Whether the head of a request is awaited: none has arrived, or the previous one has been answered."""
        return self.cycle is None or self.cycle.response_complete

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self._waiting() and not self.transport.is_closing():
            self.transport.close()
