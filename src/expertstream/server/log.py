"""The access log (a line of JSON for each request on standard error), the request count, and the headers of every answer."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics

__all__ = ["AccessLog"]

_log = logging.getLogger("expertstream.access")
_ID = re.compile(r"[\w.:-]{1,128}")
_LONGEST = 300  # characters of a value from a client


class AccessLog:
    """Wraps an ASGI application. limits: how many requests are accepted at a time, and how many more are accepted now."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, paths: Collection[str], limits: Callable[[], tuple[int, int]]
    ) -> None:
        self._app, self.metrics, self._paths, self._limits = app, metrics, paths, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, sent = time.monotonic(), 499, 0
        given = Headers(scope=scope)
        asked = given.get("x-request-id", "")
        request_id = asked if _ID.fullmatch(asked) else f"req_{uuid.uuid4().hex[:24]}"
        notes: dict[str, Any] = {}
        scope["expertstream.log"] = notes  # errors.note() adds to it

        async def watch(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                if "content-length" in given and "transfer-encoding" in given:
                    headers["connection"] = "close"  # another reader may disagree on where the body ends
                headers["x-request-id"] = headers["request-id"] = request_id
                if scope["method"] == "POST":
                    self._tell_limits(headers)
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            status = notes.pop("status", status)
            # Only existing paths, so that clients cannot create labels.
            path = scope["path"] if scope["path"] in self._paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            line: dict[str, Any] = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "id": request_id,
                "client": (scope.get("client") or ("",))[0],
                "agent": given.get("user-agent", ""),
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "bytes": sent,
                "seconds": round(time.monotonic() - begin, 3),
                **notes,
            }
            _log.info(json.dumps({k: v[:_LONGEST] if isinstance(v, str) else v for k, v in line.items()}))

    def _tell_limits(self, headers: MutableHeaders) -> None:
        """Sets the limits under both APIs' names. A place in the queue is free again as soon as an answer ends."""
        limit, remaining = self._limits()
        for name, value in (("limit", str(limit)), ("remaining", str(remaining))):
            headers[f"x-ratelimit-{name}-requests"] = headers[f"anthropic-ratelimit-requests-{name}"] = value
        headers["x-ratelimit-reset-requests"] = "1s"
        headers["anthropic-ratelimit-requests-reset"] = time.strftime(
            "%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 1)
        )
