"""Sends the answers of jobs to a client, as a stream or when complete. A client that disconnects cancels its jobs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..responses import GenerationStats
from .errors import note, stream_error
from .scheduler import Job

__all__ = ["Dialect", "event_stream", "run_to_end"]

HEARTBEAT_SECONDS = 5.0  # without a byte in the stream
Events = list[dict[str, Any]]
Done = Callable[[GenerationStats | None], None]


@dataclass
class Dialect:
    """The stream format of an API. begin, heartbeat, end: additional events. event: converts one of an answer's events. whole: the answer
    without a stream. failed: the last events of a failed stream, from the error's body. last: text after all events. named: events have
    their type as a name."""

    begin: Callable[[], Events]
    heartbeat: Callable[[], Events]
    whole: Callable[[], dict[str, Any]]
    failed: Callable[[dict[str, Any]], Events]
    event: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda event: event)
    end: Callable[[], Events] = field(default=list)
    last: str = ""
    named: bool = False

    def lines(self, events: Events) -> str:
        return "".join(
            (f"event: {event['type']}\n" if self.named else "") + f"data: {_line(event)}\n\n" for event in events
        )


def event_stream(
    request: Request, jobs: Sequence[Job], answers: Sequence[Any], dialect: Dialect, done: Done
) -> StreamingResponse:
    """Server-sent events of all answers; `done` is called with the stats of each answer at the end."""

    async def lines() -> AsyncIterator[str]:
        yield dialect.lines(dialect.begin())
        try:
            async with contextlib.aclosing(_run(jobs, answers, done)) as found:
                async for events in found:
                    told = dialect.heartbeat() if events is None else [dialect.event(event) for event in events]
                    yield dialect.lines(told)
            yield dialect.lines(dialect.end()) + dialect.last
        except Exception as error:  # the status has been sent already: reported in the stream, in the API's format
            yield dialect.lines(dialect.failed(stream_error(request, error)))
        response.whole = True

    response = _EventStream(request, lines(), jobs)
    return response


async def run_to_end(request: Request, jobs: Sequence[Job], answers: Sequence[Any], done: Done) -> None:
    """Runs the jobs to their end. If the client disconnects, cancels them and raises ClientDisconnect."""

    async def all_of_it() -> None:
        async with contextlib.aclosing(_run(jobs, answers, done)) as events:
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


def _line(event: dict[str, Any]) -> str:
    """JSON without the characters that some clients, unlike the protocol, treat as line ends."""
    text = json.dumps(event, ensure_ascii=False)
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")


class _EventStream(StreamingResponse):
    """Server-sent events. Cancels its jobs when it ends, even if the client disconnected before the first event."""

    def __init__(self, request: Request, events: AsyncIterator[str], jobs: Sequence[Job]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._request, self._jobs = request, jobs
        self.whole = False  # everything has been sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self.whole:
                note(self._request, status=499, error="the client disconnected")
            for job in self._jobs:
                job.cancel()


async def _run(jobs: Sequence[Job], answers: Sequence[Any], done: Done) -> AsyncGenerator[Events | None]:
    """The answers' events, in the order in which they come; None if no event has come for a while."""
    queue: asyncio.Queue[Events | BaseException | None] = asyncio.Queue()

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
    left, sent = len(tasks), time.monotonic()
    try:
        while left:
            try:
                async with asyncio.timeout(max(0.0, sent + HEARTBEAT_SECONDS - time.monotonic())):
                    item = await queue.get()
            except TimeoutError:
                yield None
                sent = time.monotonic()
                continue
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            elif item:
                yield item
                sent = time.monotonic()
    finally:
        for job in jobs:
            job.cancel()
        for task in tasks:
            task.cancel()
        for answer in answers:
            done(answer.stats)
