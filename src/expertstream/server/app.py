"""HTTP: routes, limits, keys. POST /v1/chat/completions, GET /v1/models, GET /health."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..engine import LLM
from ..errors import ExpertStreamError, RequestError, UsageError
from .jobs import BusyError, Job, Jobs
from .openai import ChatRequest, Completion, error_body, parse_request
from .stream import Splitter

__all__ = ["MOST_BODY", "create_app"]

MOST_BODY = 8 << 20


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        self.status, self.body = status, error_body(message, kind, code)


def create_app(llm: LLM, name: str, key: str = "", most_waiting: int = 32) -> Starlette:
    """`name`: what the model is called; `key`: what clients must send as a bearer token, "" if nothing."""
    jobs = Jobs(llm, most_waiting)
    started = int(time.time())

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            raise _RefusedError(401, "the API key is missing or wrong", "authentication_error", "invalid_api_key")

    async def chat(request: Request) -> Response:
        check_key(request)
        asked = parse_request(await _body(request))
        if asked.model not in ("", name):
            raise _RefusedError(404, f"there is no model {asked.model!r} here, only {name!r}", code="model_not_found")
        thinking = bool(asked.chat_template_kwargs and asked.chat_template_kwargs.enable_thinking)
        prompt = llm.tokenizer.apply_chat_template(
            asked.template_messages(), tools=asked.schemas() or None, enable_thinking=thinking
        )
        tokens = llm.tokenizer.encode(prompt)
        params = llm.sampling_params(**asked.sampling())
        job = jobs.admit(tokens, params)
        splitter = Splitter(asked.schemas(), reasoning=prompt.rstrip().endswith("<think>"))
        completion = Completion(name, int(tokens.shape[0]))
        if asked.stream:
            return StreamingResponse(_chunks(asked, job, splitter, completion), media_type="text/event-stream")
        return JSONResponse(await _unless_gone(request, _whole(job, splitter, completion)))

    async def models(request: Request) -> Response:
        check_key(request)
        model = {"id": name, "object": "model", "created": started, "owned_by": "expertstream"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ready", "model": name, "waiting": jobs.waiting})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        exception_handlers={
            _RefusedError: _refused,
            BusyError: _busy,
            ExpertStreamError: _engine_error,
            HTTPException: _http_error,
            ClientDisconnect: _went_away,
        },
    )


async def _body(request: Request) -> bytes:
    """The whole body, as long as it is no longer than it may be."""
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > MOST_BODY:
            raise _RefusedError(413, f"a request is at most {MOST_BODY} bytes")
    return bytes(found)


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """The answer, as long as somebody waits for it: a client that hangs up ends it, in the queue or between two tokens."""
    task = asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait({task}, timeout=0.2))[0]:
            if await request.is_disconnected():
                raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()


async def _whole(job: Job, splitter: Splitter, completion: Completion) -> dict[str, Any]:
    ended = "stop"
    async with job as pieces:
        async for piece in pieces:
            completion.completion_tokens = piece.stats.generated_tokens
            completion.deltas(splitter.feed(piece.text))
            ended = piece.finish_reason or ended
    completion.deltas(splitter.finish())
    return completion.whole(ended)


async def _chunks(asked: ChatRequest, job: Job, splitter: Splitter, completion: Completion) -> AsyncIterator[str]:
    """Server-sent events. A client that goes away ends this generator, and with it the job."""
    yield _event(completion.chunk({"role": "assistant", "content": ""}))
    try:
        ended = "stop"
        async with job as pieces:
            async for piece in pieces:
                completion.completion_tokens = piece.stats.generated_tokens
                for delta in completion.deltas(splitter.feed(piece.text)):
                    yield _event(completion.chunk(delta))
                ended = piece.finish_reason or ended
        for delta in completion.deltas(splitter.finish()):
            yield _event(completion.chunk(delta))
        yield _event(completion.chunk({}, completion.finish_reason(ended)))
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield _event(completion.usage_chunk())
        yield "data: [DONE]\n\n"
    except ExpertStreamError as error:  # the status is sent already: the stream says it, in the API's shape
        yield _event(error_body(str(error), "server_error"))


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, _RefusedError)
    return JSONResponse(error.body, error.status)


async def _busy(_: Request, error: Exception) -> Response:
    body = error_body("too many requests are waiting; try again later", "rate_limit_error", "queue_full")
    return JSONResponse(body, 429, {"retry-after": "1"})


async def _engine_error(_: Request, error: Exception) -> Response:
    mistake = isinstance(error, RequestError | UsageError)
    return JSONResponse(
        error_body(str(error), "invalid_request_error" if mistake else "server_error"), 400 if mistake else 500
    )


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(error.detail, "invalid_request_error"), error.status_code, error.headers)


async def _went_away(_: Request, error: Exception) -> Response:
    return Response(status_code=499)
