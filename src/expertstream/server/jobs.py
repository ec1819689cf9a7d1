"""Generations for many clients by one engine: one after another, in the order in which they came, and no more than can wait."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

from ..engine import LLM, GenerationResponse
from ..ops import I64
from ..sampling import SamplingParams

__all__ = ["BusyError", "Job", "Jobs"]


class BusyError(Exception):
    """As many as may wait are waiting."""


class _CancelledError(Exception):
    pass


class Jobs:
    """Belongs to one event loop. `most_waiting` besides the one that runs."""

    def __init__(self, llm: LLM, most_waiting: int) -> None:
        self.llm, self._most = llm, most_waiting
        self._turn = asyncio.Lock()  # first come, first served
        self.waiting = 0  # the one that runs is one of them

    def admit(self, tokens: I64, params: SamplingParams) -> Job:
        """Raises BusyError, and before any work RequestError for what cannot fit."""
        if self.waiting > self._most:
            raise BusyError
        return Job(self, tokens, params)  # which counts itself


class Job:
    """One generation. `async with` it, so that a client that goes away costs nothing more than the token or chunk under way."""

    def __init__(self, jobs: Jobs, tokens: I64, params: SamplingParams) -> None:
        self._jobs = jobs
        self._gone = threading.Event()
        self._pieces = jobs.llm.session().generate(tokens, params, self._between_chunks, control_tokens=True)
        self._thread: asyncio.Future[None] | None = None
        self._running = False
        self._counted = True
        jobs.waiting += 1

    def __del__(self) -> None:
        self._uncount()  # never begun: the client went away before its answer did

    def _uncount(self) -> None:
        if self.__dict__.get("_counted"):
            self._counted = False
            self._jobs.waiting -= 1

    def _between_chunks(self, _: int) -> None:
        if self._gone.is_set():
            raise _CancelledError

    async def __aenter__(self) -> AsyncIterator[GenerationResponse]:
        try:
            await self._jobs._turn.acquire()
        except BaseException:
            self._uncount()
            raise
        self._running = True
        queue: asyncio.Queue[GenerationResponse | BaseException | None] = asyncio.Queue()
        self._thread = asyncio.ensure_future(asyncio.to_thread(self._work, asyncio.get_running_loop(), queue))
        return self._read(queue)

    async def __aexit__(self, *_: object) -> None:
        self._gone.set()
        try:
            if self._thread is not None:
                await asyncio.shield(self._thread)
        finally:
            if (
                self._thread is not None and not self._thread.done()
            ):  # cancelled while it ends: the next one waits for it
                self._thread.add_done_callback(lambda _: self._leave())
            else:
                self._leave()

    def _leave(self) -> None:
        if self._running:
            self._running = False
            self._uncount()
            self._jobs._turn.release()

    def _work(
        self,
        loop: asyncio.AbstractEventLoop,
        queue: asyncio.Queue[GenerationResponse | BaseException | None],
    ) -> None:
        end: BaseException | None = None
        try:
            for piece in self._pieces:
                if self._gone.is_set():
                    break
                loop.call_soon_threadsafe(queue.put_nowait, piece)
        except _CancelledError:
            pass
        except BaseException as error:  # told to the client, whatever it is
            end = error
        with contextlib.suppress(RuntimeError):  # the loop may be closed already
            loop.call_soon_threadsafe(queue.put_nowait, end)

    @staticmethod
    async def _read(
        queue: asyncio.Queue[GenerationResponse | BaseException | None],
    ) -> AsyncIterator[GenerationResponse]:
        while (item := await queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
