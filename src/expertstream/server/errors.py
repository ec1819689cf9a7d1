"""Errors in the format of the requested API, in words that its clients know."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ..errors import ContextLengthError, ExpertStreamError, RequestError, UsageError
from .anthropic import ThreadsUnsupportedError
from .completion import error_body
from .message import error_event
from .scheduler import BusyError, ClosingError, TimeLimitError

__all__ = ["HANDLERS", "RefusedError", "note", "public_text", "stream_error"]

_log = logging.getLogger("expertstream")


class RefusedError(Exception):
    """A request that is refused before it reaches the engine."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code


def note(request: Request, **what: Any) -> None:
    """Adds to the request's line in the access log."""
    request.scope.setdefault("expertstream.log", {}).update(what)


def public_text(name: str, *folders: Path) -> Callable[[str], str]:
    """A function that replaces these folders, and every file in them, with the model's name: clients need not know where files are on the
    server. The log has the unchanged messages."""
    paths = {str(p) for folder in folders for p in (folder, folder.absolute(), folder.resolve())}
    # A relative path of one word may be an ordinary word of a message, unless a slash follows.
    ends = {path: r"(?:/[^:\n]*|(?=:|\s|$))" if "/" in path else r"/[^:\n]*" for path in paths}
    found = sorted((p for p in paths if p != "/"), key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<![\w./-]){re.escape(path)}{ends[path]}" for path in found) or "(?!)")
    return lambda text: pattern.sub(lambda _: name, text)


def stream_error(request: Request, error: BaseException) -> dict[str, Any]:
    """An error after a stream has begun, as the body of its last event. The access log has the error's status, not the 200 that was
    sent."""
    found = error if isinstance(error, ExpertStreamError) else ExpertStreamError("the server failed; see its log")
    if found is not error:
        _log.error("a stream failed", exc_info=error)
    status, message, kind, code, _ = _described(request, found)
    note(request, status=status, error=message)
    message = request.app.state.public_text(message)
    if _is_anthropic(request):
        return error_event(message, _anthropic_kind(kind))
    return error_body(message, kind, code)


def _is_anthropic(request: Request) -> bool:
    return request.url.path.startswith("/v1/messages")


def _described(request: Request, error: ExpertStreamError) -> tuple[int, str, str, str | None, dict[str, Any] | None]:
    """Status, message, kind, code and details."""
    if isinstance(error, ContextLengthError):
        if _is_anthropic(request):
            return (
                400,
                f"prompt is too long: {error.tokens} tokens > {error.limit} maximum",
                "invalid_request_error",
                None,
                None,
            )
        longest = error.limit + 1
        text = (
            f"This model's maximum context length is {longest} tokens. However, your prompt has {error.tokens} tokens, and an answer "
            "needs at least one. Shorten the prompt."
        )
        if error.tokens < error.trained:
            text += f" The server can be started with --context {error.tokens + 1} or more."
        return 400, text, "invalid_request_error", "context_length_exceeded", None
    if isinstance(error, ThreadsUnsupportedError):
        details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        return 400, str(error), "invalid_request_error", None, details
    if isinstance(error, RequestError | UsageError):
        return 400, str(error), "invalid_request_error", None, None
    status = {ClosingError: 503, TimeLimitError: 504}.get(type(error), 500)
    return status, str(error), "server_error", None, None


def _anthropic_kind(kind: str) -> str:
    return {"server_error": "api_error", "rate_limit_exceeded": "rate_limit_error"}.get(kind, kind)


def _error(
    request: Request,
    status: int,
    message: str,
    kind: str,
    code: str | None = None,
    headers: Any = None,
    details: dict[str, Any] | None = None,
) -> Response:
    note(request, error=message)
    message = request.app.state.public_text(message)
    if _is_anthropic(request):
        return JSONResponse(error_event(message, _anthropic_kind(kind), details), status, headers)
    return JSONResponse(error_body(message, kind, code), status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _error(request, error.status, str(error), error.kind, error.code)


async def _busy(request: Request, error: Exception) -> Response:
    text = "too many requests are waiting; try again later"
    return _error(request, 429, text, "rate_limit_exceeded", "queue_full", {"retry-after": "1"})


async def _engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ExpertStreamError)
    status, message, kind, code, details = _described(request, error)
    return _error(request, status, message, kind, code, details=details)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    message = error.detail
    if error.status_code in (404, 405):
        routes = [f"{' '.join(sorted((r.methods or set()) - {'HEAD'}))} {r.path}" for r in request.app.routes]
        message = f"there is no {request.method} {request.url.path}; available: {', '.join(routes)}".replace(
            ":path}", "}"
        )
    return _error(request, error.status_code, message, kind, headers=error.headers)


async def _went_away(request: Request, error: Exception) -> Response:
    note(request, error="the client disconnected")
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    return _error(request, 500, "the server failed; see its log", "server_error")


HANDLERS: dict[Any, Any] = {
    RefusedError: _refused,
    BusyError: _busy,
    ExpertStreamError: _engine_error,
    HTTPException: _http_error,
    ClientDisconnect: _went_away,
    500: _failed,
}
