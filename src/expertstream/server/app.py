"""HTTP: routes, limits, API keys, and answers that are cancelled when their client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..engine import LLM
from ..errors import ExpertStreamError, RequestError
from .anthropic import CountRequest, MessagesRequest
from .completion import ChatAnswer, Completion, TextAnswer
from .constrain import Grammars
from .errors import HANDLERS, RefusedError, note, public_text
from .log import AccessLog
from .message import MessageAnswer
from .metrics import Metrics
from .openai import ChatRequest, CompletionRequest
from .openapi import document
from .request import Prepared, PromptOptions, prepare, prepare_text
from .responses import ResponseAnswer, ResponsesRequest
from .scheduler import BusyError, Job, Scheduler
from .stream import Dialect, event_stream, run_to_end
from .wire import Wire, parse_request

__all__ = ["MAX_BODY", "ServerSettings", "create_app"]

MAX_BODY = 8 << 20
MAX_BUFFERED = 64 << 20  # of all bodies being received
BODY_SECONDS = 30.0  # from the first byte to the last
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
PREPARED_TOGETHER = 2
PREPARING_SECONDS = 90.0  # longer than any request takes; after that, something hangs
STALLED_SECONDS = 300.0  # longer than any disk takes for a layer
_KEPT_WARNINGS = 1000
_log = logging.getLogger("expertstream")

Asked = TypeVar("Asked", bound=Wire)
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServerSettings:
    """name: the model's name. aliases: additional names; any_model: accept every name. key: the key that clients must send, "" for none.
    seconds: the time limit of an answer. only_local: accept only requests addressed to this machine or to `host`, the address it listens
    on, so that a web page cannot reach the server through a domain name of its own. cors_origins: pages that may use it from a browser.
    strict_requests: refuse unknown fields. parse_control_tokens: message text may contain control tokens."""

    name: str
    aliases: tuple[str, ...] = ()
    any_model: bool = False
    key: str = ""
    parallel: int = 4
    most_waiting: int = 32
    seconds: float = 3600.0
    shutdown_seconds: float = 30.0
    only_local: bool = False
    host: str = "127.0.0.1"
    cors_origins: tuple[str, ...] = ()
    strict_requests: bool = False
    parse_control_tokens: bool = False


class _Server:
    """State shared by the handlers."""

    def __init__(self, llm: LLM, settings: ServerSettings) -> None:
        self.llm, self.settings, self.started = llm, settings, int(time.time())
        self.scheduler = Scheduler(llm, settings.parallel, settings.most_waiting, settings.seconds)
        self.metrics = Metrics(llm, self.scheduler, settings.name)
        self.grammars = Grammars(llm)
        self.options = PromptOptions(settings.parse_control_tokens)
        self.buffered = 0
        self._warned: set[str] = set()
        # For the templates, tokenization and grammars of long requests, while the event loop serves others.
        self.workers = ThreadPoolExecutor(PREPARED_TOGETHER, thread_name_prefix="prepare")
        self.preparing = asyncio.Semaphore(PREPARED_TOGETHER)
        self.unprepared = 0
        self.public_text = public_text(settings.name, llm.path)
        self.begun: dict[Request, float] = {}  # start times of the preparations in progress

    def check(self, request: Request) -> None:
        """Raises RefusedError if the request is not authorized."""
        self.check_host(request)
        key = self.settings.key
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = request.headers.get("x-api-key") or (token.strip() if scheme.lower() == "bearer" else scheme)
        # Headers are decoded as Latin-1; the client sent the raw bytes of the key.
        if key and not hmac.compare_digest(given.encode("latin-1"), key.encode()):
            raise RefusedError(401, "the API key is missing or wrong", "authentication_error", "invalid_api_key")

    def check_host(self, request: Request) -> None:
        """Raises RefusedError if the Host header names another host, or the request comes from a page that is not allowed."""
        if self.settings.only_local:
            names = (*LOCAL_HOSTS, self.settings.host)
            host = re.sub(r":\d+$", "", request.headers.get("host", ""))
            given = request.headers.get("origin")
            origin = re.sub(r":\d+$", "", (given or "").partition("://")[2]) or given
            allowed = origin in (*names, None, "") or given in self.settings.cors_origins
            if host not in names or not (allowed or "*" in self.settings.cors_origins):
                raise RefusedError(
                    403, "this server accepts only requests addressed to this machine; --cors-origin allows a web page"
                )

    def model_name(self, asked: str) -> str:
        """The model's name in the answer. Raises RefusedError."""
        settings = self.settings
        if asked in ("", settings.name):
            return settings.name
        if settings.any_model or asked in settings.aliases:
            return asked
        raise RefusedError(
            404,
            f"there is no model {asked!r}; available: {', '.join(map(repr, (settings.name, *settings.aliases)))}; start the server "
            "with --alias NAME or --any-model to accept other names",
            "not_found_error",
            "model_not_found",
        )

    async def parse(self, request: Request, kind: type[Asked]) -> tuple[Asked, str]:
        """The request, and the name of its model."""
        self.check(request)
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json" and not media.endswith("+json"):
            raise RefusedError(415, "the body must be JSON, with content-type application/json")
        found = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    found += part
                    self.buffered += len(part)
                    if len(found) > MAX_BODY:
                        raise RefusedError(413, f"the request body must be at most {MAX_BODY} bytes")
                    if self.buffered > MAX_BUFFERED:
                        raise BusyError
        except TimeoutError:
            raise RefusedError(408, f"the body did not arrive within {BODY_SECONDS:g} seconds") from None
        else:
            named = re.search(rb'"model"\s*:\s*"([^"\\]{1,200})"', found)  # even if the body is refused
            note(request, model=named[1].decode("utf-8", "replace") if named else "")
            asked, unknown, warnings = await asyncio.to_thread(parse_request, kind, bytes(found))
        finally:
            self.buffered -= len(found)  # the body stays in memory until it is parsed
        model = str(getattr(asked, "model", ""))
        note(request, model=model)
        if unknown and self.settings.strict_requests:
            raise RefusedError(400, f"{unknown[0]} is not supported (the server was started with --strict-requests)")
        self.warn(request, [*(f"unknown field {name!r} is ignored" for name in unknown), *warnings])
        return asked, self.model_name(model)

    def warn(self, request: Request, warnings: Sequence[str]) -> None:
        """Logs each warning once."""
        for warning in warnings:
            line = f"{request.url.path}: {warning}"
            if line not in self._warned and len(self._warned) < _KEPT_WARNINGS:
                self._warned.add(line)
                _log.warning("%s", line.encode("ascii", "backslashreplace").decode()[:400])

    async def in_turn(self, request: Request, work: Callable[[], Result]) -> Result:
        """Runs work that takes time and memory for long texts, unless the client disconnects before it starts. Raises BusyError,
        ClientDisconnect."""
        if self.unprepared >= self.settings.parallel + self.settings.most_waiting:
            raise BusyError
        self.unprepared += 1
        try:
            async with self.preparing:
                if await request.is_disconnected():
                    raise ClientDisconnect
                self.begun[request] = time.monotonic()
                return await asyncio.get_running_loop().run_in_executor(self.workers, work)
        finally:
            self.begun.pop(request, None)
            self.unprepared -= 1

    async def prepare(self, request: Request, asked: Any, answers: int) -> Prepared:
        """answers: how many to generate; 0 to prepare the prompt only."""
        prepared = await self.in_turn(
            request, lambda: prepare(self.llm, self.grammars, asked.generation_request(), answers, self.options)
        )
        self.warn(request, prepared.warnings)
        return prepared

    def admit(self, prepared: Prepared) -> list[Job]:
        """Queues one job for each answer; the others start when the first has read the prompt. Raises BusyError, RequestError."""
        most = self.settings.parallel + self.settings.most_waiting
        if len(prepared.constraints) > most:
            raise RequestError(f"n must be at most {most} (--parallel plus --queue); got {len(prepared.constraints)}")
        if self.scheduler.room() < len(prepared.constraints):
            raise BusyError
        jobs: list[Job] = []
        try:
            for i, constraint in enumerate(prepared.constraints):
                params = prepared.params
                if i and params.seed is not None:
                    params = replace(params, seed=params.seed + i)
                first = jobs[0] if jobs else None
                jobs.append(self.scheduler.admit(prepared.tokens, params, constraint, first, prepared.prompt_logprobs))
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
        return jobs

    async def respond(
        self, request: Request, jobs: Sequence[Job], answers: Sequence[Any], dialect: Dialect, stream: bool
    ) -> Response:
        """A stream of events, or the complete answer."""
        done = self.metrics.count
        if stream:
            return event_stream(request, jobs, answers, dialect, done)
        await run_to_end(request, jobs, answers, done)
        return JSONResponse(dialect.whole())

    # The routes.

    async def chat(self, request: Request) -> Response:
        asked, model = await self.parse(request, ChatRequest)
        prepared = await self.prepare(request, asked, asked.n)
        answers = [ChatAnswer(i, prepared.parser(), prepared.one_call) for i in range(asked.n)]
        completion = Completion(model, int(prepared.tokens.shape[0]), chat=True)
        dialect = _completion_dialect(completion, answers, asked.stream_options.include_usage)
        return await self.respond(request, self.admit(prepared), answers, dialect, asked.stream)

    async def completions(self, request: Request) -> Response:
        asked, model = await self.parse(request, CompletionRequest)
        prompts = asked.prompts()
        if len(prompts) * asked.n > self.settings.parallel + self.settings.most_waiting:
            raise RequestError(f"prompt: {len(prompts)} prompts with n={asked.n} do not fit in the queue; send fewer")
        scores = asked.logprobs if asked.echo else None

        def every() -> list[Prepared]:
            sampling, form = asked.sampling(), asked.format()
            return [prepare_text(self.llm, self.grammars, p, sampling, asked.n, form, scores) for p in prompts]

        prepared = await self.in_turn(request, every)
        for each in prepared:
            self.warn(request, each.warnings)
        echoes = (
            [p if isinstance(p, str) else self.llm.tokenizer.decode(p, False) for p in prompts] if asked.echo else []
        )
        jobs: list[Job] = []
        try:
            for each in prepared:
                jobs += self.admit(each)
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
        only_prompt = asked.max_tokens == 0
        answers = [TextAnswer(i, echoes[i // asked.n] if echoes else "", only_prompt) for i in range(len(jobs))]
        completion = Completion(model, sum(int(p.tokens.shape[0]) for p in prepared), chat=False)
        dialect = _completion_dialect(completion, answers, asked.stream_options.include_usage)
        return await self.respond(request, jobs, answers, dialect, asked.stream)

    async def responses(self, request: Request) -> Response:
        asked, model = await self.parse(request, ResponsesRequest)
        prepared = await self.prepare(request, asked, 1)
        answer = ResponseAnswer(model, int(prepared.tokens.shape[0]), prepared.parser(), asked)
        dialect = Dialect(
            begin=answer.begin, heartbeat=answer.heartbeat, whole=answer.whole, failed=lambda error: answer.failed(error["error"]),
            named=True,
        )  # fmt: skip
        return await self.respond(request, self.admit(prepared), [answer], dialect, asked.stream)

    async def messages(self, request: Request) -> Response:
        asked, model = await self.parse(request, MessagesRequest)
        prepared = await self.prepare(request, asked, 1)
        answer = MessageAnswer(model, int(prepared.tokens.shape[0]), prepared.parser(), prepared.one_call)
        dialect = Dialect(
            begin=answer.begin, heartbeat=lambda: [{"type": "ping"}], whole=answer.whole, failed=lambda error: [error], named=True
        )  # fmt: skip
        return await self.respond(request, self.admit(prepared), [answer], dialect, asked.stream)

    async def count_tokens(self, request: Request) -> Response:
        asked, _ = await self.parse(request, CountRequest)
        prepared = await self.prepare(request, asked, 0)
        return JSONResponse({"input_tokens": int(prepared.tokens.shape[0])})

    async def models(self, request: Request) -> Response:
        self.check(request)
        names = [self.settings.name, *self.settings.aliases]
        listing = {"first_id": names[0], "last_id": names[-1], "has_more": False}
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names], **listing})

    async def model(self, request: Request) -> Response:
        self.check(request)
        return JSONResponse(self._model(self.model_name(request.path_params["name"])))

    def _model(self, name: str) -> dict[str, Any]:
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started))
        return {
            "id": name, "object": "model", "created": self.started, "owned_by": "expertstream", "type": "model",
            "display_name": name, "created_at": created, "context_length": self.llm.context_length,
            "max_model_len": self.llm.context_length, "max_input_tokens": self.llm.context_length,
            "lossy": self.llm.lossy,
        }  # fmt: skip

    async def health(self, request: Request) -> Response:
        self.check_host(request)
        body = {"model": self.settings.name, "active": self.scheduler.active, "waiting": self.scheduler.waiting}
        reason = self._unready()
        if reason:
            return JSONResponse({"status": "failed", "reason": reason, **body}, 503)
        return JSONResponse({"status": "ready", **body})

    def _unready(self) -> str:
        """Why requests cannot be answered; "" if they can."""
        now = time.monotonic()
        if not self.scheduler.alive:
            return "the engine has stopped; restart the server"
        if self.scheduler.closing:
            return "the server is shutting down"
        if now - self.scheduler.progress > STALLED_SECONDS:
            return f"the engine has been at one layer for {now - self.scheduler.progress:.0f} seconds; check the disk"
        if len(self.begun) >= PREPARED_TOGETHER and now - max(self.begun.values()) > PREPARING_SECONDS:
            return f"no request could be prepared for {now - max(self.begun.values()):.0f} seconds"
        try:
            self.llm.experts.check_readable()
        except ExpertStreamError as error:
            return self.public_text(str(error))
        return ""

    async def prometheus(self, request: Request) -> Response:
        self.check(request)
        return Response(self.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status(self, request: Request) -> Response:
        self.check(request)
        return JSONResponse(self.metrics.status() | ({"heat": self.metrics.heat()} if "heat" in request.query_params else {}))  # fmt: skip

    async def page(self, request: Request) -> Response:
        self.check_host(request)
        policy = "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
        return HTMLResponse(_page(), headers={"content-security-policy": policy})

    async def openapi(self, request: Request) -> Response:
        self.check_host(request)
        return JSONResponse(document(self.settings.name))


def create_app(llm: LLM, settings: ServerSettings) -> AccessLog:
    """An ASGI application."""
    server = _Server(llm, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.scheduler.close, settings.shutdown_seconds)
        if llm.prefixes is not None:  # a signal may end the process right after this
            await asyncio.to_thread(llm.prefixes.flush)
        server.workers.shutdown(wait=False)

    cors = Middleware(
        CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"],
        expose_headers=["x-request-id", "request-id", "retry-after"],
    )  # fmt: skip
    app = Starlette(
        lifespan=lifespan,
        routes=[
            Route("/", server.page),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/responses", server.responses, methods=["POST"]),
            Route("/v1/messages", server.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", server.count_tokens, methods=["POST"]),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.model),
            Route("/health", server.health),
            Route("/metrics", server.prometheus),
            Route("/status", server.status),
            Route("/openapi.json", server.openapi),
        ],
        middleware=[cors] if settings.cors_origins else [],
        exception_handlers=HANDLERS,
    )
    app.router.redirect_slashes = False
    app.state.public_text = server.public_text
    paths = {str(getattr(route, "path", "")) for route in app.routes}
    limit = settings.parallel + settings.most_waiting
    return AccessLog(app, server.metrics, paths, lambda: (limit, max(0, limit - server.scheduler.waiting)))


def _completion_dialect(completion: Completion, answers: Sequence[ChatAnswer | TextAnswer], usage: bool) -> Dialect:
    """The dialect of chat completions and completions: choices in chunks."""
    begun = [completion.chunk(a.begin()) for a in answers if isinstance(a, ChatAnswer)]
    return Dialect(
        begin=lambda: begun,
        event=completion.chunk,
        heartbeat=lambda: [completion.heartbeat(answers)],
        end=lambda: [completion.usage_chunk(answers)] if usage else [],
        whole=lambda: completion.whole(answers),
        failed=lambda error: [error],
        last="data: [DONE]\n\n",
    )


def _page() -> str:
    return (Path(__file__).parent / "status.html").read_text(encoding="utf-8")
