"""HTTP: routes, limits, keys, errors in each API's own shape."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..engine import LLM
from ..errors import ExpertStreamError, RequestError, UsageError
from .anthropic import CountRequest, MessageAnswer, MessagesRequest, error_event
from .asks import Prepared, prepare
from .completion import ChatAnswer, Completion, TextAnswer, error_body
from .constrain import Grammars
from .log import AccessLog
from .metrics import Metrics
from .openai import ChatRequest, CompletionRequest, Strict, parse_request
from .openapi import document
from .scheduler import BusyError, ClosingError, Job, Scheduler, TimeLimitError

__all__ = ["MOST_BODY", "ServerSettings", "create_app"]

MOST_BODY = 8 << 20
MOST_BUFFERED = 64 << 20  # of all bodies that are being received
BODY_SECONDS = 30.0  # from the first byte to the last
PING_SECONDS = 10.0  # without an event in a stream
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")

Asked = TypeVar("Asked", bound=Strict)
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServerSettings:
    """name: what the model is called. key: what clients must send, "" for nothing. seconds: how long an answer may take. only_local:
    answers only to requests that name this machine, or what it listens on, so that no web page can reach it through a name of its
    own. host: that address."""

    name: str
    key: str = ""
    parallel: int = 4
    most_waiting: int = 32
    seconds: float = 3600.0
    shutdown_seconds: float = 30.0
    only_local: bool = False
    host: str = "127.0.0.1"


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code


class _EventStream(StreamingResponse):
    """Server-sent events. Its jobs end with it, also when the client has gone before the first of them."""

    def __init__(self, events: AsyncIterator[str], jobs: Sequence[Job]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for job in self._jobs:
                job.cancel()


class _Server:
    """What the handlers share."""

    def __init__(self, llm: LLM, settings: ServerSettings) -> None:
        self.llm, self.settings, self.started = llm, settings, int(time.time())
        self.scheduler = Scheduler(llm, settings.parallel, settings.most_waiting, settings.seconds)
        self.metrics = Metrics(llm, self.scheduler, settings.name)
        self.grammars = Grammars(llm)
        self.buffered = 0
        # Templates, tokenizing and grammars of long requests, while the loop goes on answering others.
        self.workers = ThreadPoolExecutor(2, thread_name_prefix="prepare")

    def check(self, request: Request) -> None:
        """Raises _RefusedError for who may not ask."""
        if self.settings.only_local:
            names = (*LOCAL_HOSTS, self.settings.host)
            host = re.sub(r":\d+$", "", request.headers.get("host", ""))
            origin = re.sub(r":\d+$", "", request.headers.get("origin", "").partition("://")[2])
            if host not in names or (origin or request.headers.get("origin")) not in (*names, None, ""):
                raise _RefusedError(403, "this server answers requests to this machine's own name only")
        key = self.settings.key
        given = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            raise _RefusedError(401, "the API key is missing or wrong", "authentication_error", "invalid_api_key")

    def check_model(self, asked: str) -> None:
        if asked not in ("", self.settings.name):
            raise _RefusedError(
                404,
                f"there is no model {asked!r} here, only {self.settings.name!r}",
                "not_found_error",
                "model_not_found",
            )

    async def parse(self, request: Request, kind: type[Asked]) -> Asked:
        self.check(request)
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json" and not media.endswith("+json"):
            raise _RefusedError(415, "the body must be JSON, with content-type application/json")
        found = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    found += part
                    self.buffered += len(part)
                    if len(found) > MOST_BODY:
                        raise _RefusedError(413, f"a request is at most {MOST_BODY} bytes")
                    if self.buffered > MOST_BUFFERED:
                        raise BusyError
        except TimeoutError:
            raise _RefusedError(408, f"the body did not arrive within {BODY_SECONDS:g} seconds") from None
        else:
            return await self.aside(lambda: parse_request(kind, bytes(found)))
        finally:
            self.buffered -= len(found)  # until it is parsed, it is held

    async def aside(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.workers, work)

    async def prepare(self, asked: Any, answers: int) -> Prepared:
        return await self.aside(lambda: prepare(self.llm, self.grammars, asked.ask(), answers))

    def admit(self, prepared: Prepared) -> list[Job]:
        """One job for each answer; the others begin when the first has read the prompt. Raises BusyError, RequestError."""
        most = self.settings.parallel + self.settings.most_waiting
        if len(prepared.constraints) > most:
            raise RequestError(f"n: {len(prepared.constraints)} answers are more than may wait here, {most}")
        if self.scheduler.room() < len(prepared.constraints):
            raise BusyError
        jobs: list[Job] = []
        try:
            for i, constraint in enumerate(prepared.constraints):
                params = prepared.params
                if i and params.seed is not None:
                    params = replace(params, seed=params.seed + i)
                jobs.append(self.scheduler.admit(prepared.tokens, params, constraint, jobs[0] if jobs else None))
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
        return jobs

    async def run(self, jobs: Sequence[Job], answers: Sequence[Any]) -> AsyncGenerator[list[dict[str, Any]] | None]:
        """What pieces make of the answers, in the order in which they come; None when nothing has come for a while."""
        queue: asyncio.Queue[list[dict[str, Any]] | BaseException | None] = asyncio.Queue()

        async def pump(job: Job, answer: Any) -> None:
            try:
                async with job as pieces:
                    async for piece in pieces:
                        queue.put_nowait(answer.feed(piece))
                        if answer.complete:
                            break
                queue.put_nowait(answer.finish())
                queue.put_nowait(None)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(pump(job, answer)) for job, answer in zip(jobs, answers, strict=True)]
        left = len(tasks)
        try:
            while left:
                try:
                    async with asyncio.timeout(PING_SECONDS):
                        item = await queue.get()
                except TimeoutError:
                    yield None
                    continue
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                elif item:
                    yield item
        finally:
            for job in jobs:
                job.cancel()
            for task in tasks:
                task.cancel()
            for answer in answers:
                self.metrics.count(answer.stats)

    async def whole(self, request: Request, jobs: Sequence[Job], answers: Sequence[Any]) -> None:
        """Runs to the end, as long as the client waits: who hangs up ends it, in the queue or between two tokens."""

        async def all_of_it() -> None:
            async with contextlib.aclosing(self.run(jobs, answers)) as events:
                async for _ in events:
                    pass

        task = asyncio.ensure_future(all_of_it())
        try:
            while not (await asyncio.wait({task}, timeout=0.2))[0]:
                if await request.is_disconnected():
                    raise ClientDisconnect
            task.result()
        finally:
            task.cancel()

    # The routes.

    async def chat(self, request: Request) -> Response:
        asked = await self.parse(request, ChatRequest)
        self.check_model(asked.model)
        count = asked.n or 1
        prepared = await self.prepare(asked, count)
        answers = [ChatAnswer(i, prepared.splitter(), prepared.one_call) for i in range(count)]
        completion = Completion(self.settings.name, int(prepared.tokens.shape[0]), chat=True)
        jobs = self.admit(prepared)
        if asked.stream:
            first = [completion.chunk(answer.begin()) for answer in answers]
            return self._stream(jobs, answers, completion, first, asked.include_usage)
        await self.whole(request, jobs, answers)
        return JSONResponse(completion.whole(answers))

    async def completions(self, request: Request) -> Response:
        asked = await self.parse(request, CompletionRequest)
        self.check_model(asked.model)
        several = isinstance(asked.prompt, list) and asked.prompt and isinstance(asked.prompt[0], str)
        prompts: list[Any] = asked.prompt if several else [asked.prompt]  # type: ignore[assignment]
        count = asked.n or 1
        if len(prompts) * count > self.settings.parallel + self.settings.most_waiting:
            raise RequestError(f"prompt: {len(prompts)} prompts with n={count} are more than may wait here")
        every = await self.aside(lambda: [Prepared.of_text(self.llm, p, asked.sampling(), count) for p in prompts])
        completion = Completion(self.settings.name, sum(int(p.tokens.shape[0]) for p in every), chat=False)
        jobs: list[Job] = []
        try:
            for prepared in every:
                jobs += self.admit(prepared)
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
        answers = [TextAnswer(i) for i in range(len(jobs))]
        if asked.stream:
            return self._stream(jobs, answers, completion, [], asked.include_usage)
        await self.whole(request, jobs, answers)
        return JSONResponse(completion.whole(answers))

    def _stream(
        self, jobs: Sequence[Job], answers: Sequence[Any], completion: Completion, first: Sequence[Any], usage: bool
    ) -> Response:
        async def chunks() -> AsyncIterator[str]:
            for chunk in first:
                yield _event(chunk)
            try:
                async with contextlib.aclosing(self.run(jobs, answers)) as found:
                    async for choices in found:
                        if choices is None:
                            yield ": still at it\n\n"
                        for choice in choices or ():
                            yield _event(completion.chunk(choice))
                if usage:
                    yield _event(completion.usage_chunk([a.stats for a in answers if a.stats is not None]))
                yield "data: [DONE]\n\n"
            except ExpertStreamError as error:  # the status is sent already: the stream says it, in the API's shape
                yield _event(error_body(str(error), _kind(error)))

        return _EventStream(chunks(), jobs)

    async def messages(self, request: Request) -> Response:
        asked = await self.parse(request, MessagesRequest)
        self.check_model(asked.model)
        prepared = await self.prepare(asked, 1)
        answer = MessageAnswer(
            self.settings.name, int(prepared.tokens.shape[0]), prepared.splitter(), prepared.one_call
        )
        jobs = self.admit(prepared)
        if not asked.stream:
            await self.whole(request, jobs, [answer])
            return JSONResponse(answer.whole())

        async def events() -> AsyncIterator[str]:
            for event in answer.begin():
                yield _event(event, event["type"])
            try:
                async with contextlib.aclosing(self.run(jobs, [answer])) as found:
                    async for some in found:
                        for event in [{"type": "ping"}] if some is None else some:
                            yield _event(event, event["type"])
            except ExpertStreamError as error:
                yield _event(error_event(str(error), "api_error"), "error")

        return _EventStream(events(), jobs)

    async def count_tokens(self, request: Request) -> Response:
        asked = await self.parse(request, CountRequest)
        self.check_model(asked.model)
        prepared = await self.prepare(asked, 1)
        return JSONResponse({"input_tokens": int(prepared.tokens.shape[0])})

    async def models(self, request: Request) -> Response:
        self.check(request)
        return JSONResponse({"object": "list", "data": [self._model()], "has_more": False})

    async def model(self, request: Request) -> Response:
        self.check(request)
        self.check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        name = self.settings.name
        return {
            "id": name, "object": "model", "created": self.started, "owned_by": "expertstream",
            "type": "model", "display_name": name, "context_length": self.llm.context_length,
        }  # fmt: skip

    async def health(self, _: Request) -> Response:
        body = {"model": self.settings.name, "active": self.scheduler.active, "waiting": self.scheduler.waiting}
        if not self.scheduler.alive:
            return JSONResponse({"status": "failed", **body}, 503)
        return JSONResponse({"status": "ready", **body})

    async def prometheus(self, request: Request) -> Response:
        self.check(request)
        return Response(self.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status(self, request: Request) -> Response:
        self.check(request)
        return JSONResponse(self.metrics.status() | ({"heat": self.metrics.heat()} if "heat" in request.query_params else {}))  # fmt: skip

    async def page(self, _: Request) -> Response:
        policy = "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
        return HTMLResponse(_page(), headers={"content-security-policy": policy})

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(document(self.settings.name))


def create_app(llm: LLM, settings: ServerSettings) -> AccessLog:
    """An ASGI application."""
    server = _Server(llm, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.scheduler.close, settings.shutdown_seconds)
        if llm.prefixes is not None:  # a signal may end the process as soon as this is over
            await asyncio.to_thread(llm.prefixes.flush)
        server.workers.shutdown(wait=False)

    app = Starlette(
        lifespan=lifespan,
        routes=[
            Route("/", server.page),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/messages", server.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", server.count_tokens, methods=["POST"]),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.model),
            Route("/health", server.health),
            Route("/metrics", server.prometheus),
            Route("/status", server.status),
            Route("/openapi.json", server.openapi),
        ],
        exception_handlers={
            _RefusedError: _refused,
            BusyError: _busy,
            ExpertStreamError: _engine_error,
            HTTPException: _http_error,
            ClientDisconnect: _went_away,
        },
    )
    app.router.redirect_slashes = False
    return AccessLog(app, server.metrics, {str(getattr(route, "path", "")) for route in app.routes})


def _page() -> str:
    return (Path(__file__).parent / "status.html").read_text(encoding="utf-8")


def _event(data: dict[str, Any], name: str = "") -> str:
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _kind(error: ExpertStreamError) -> str:
    return "invalid_request_error" if isinstance(error, RequestError | UsageError) else "server_error"


def _error(
    request: Request, status: int, message: str, kind: str, code: str | None = None, headers: Any = None
) -> Response:
    """In the shape of the API that was asked."""
    if request.url.path.startswith("/v1/messages"):
        kind = {"server_error": "api_error", "rate_limit_exceeded": "rate_limit_error"}.get(kind, kind)
        return JSONResponse(error_event(message, kind), status, headers)
    return JSONResponse(error_body(message, kind, code), status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, _RefusedError)
    return _error(request, error.status, str(error), error.kind, error.code)


async def _busy(request: Request, error: Exception) -> Response:
    text = "too many requests are waiting; try again later"
    return _error(request, 429, text, "rate_limit_exceeded", "queue_full", {"retry-after": "1"})


async def _engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ExpertStreamError)
    status = 400 if isinstance(error, RequestError | UsageError) else 500
    status = {ClosingError: 503, TimeLimitError: 504}.get(type(error), status)
    return _error(request, status, str(error), _kind(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    return _error(request, error.status_code, error.detail, kind, headers=error.headers)


async def _went_away(_: Request, error: Exception) -> Response:
    return Response(status_code=499)
