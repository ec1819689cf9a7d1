"""The one decode loop: prefill in chunks, then one token per step. All generation uses it.

It does not run the model itself: it yields the pass that it needs next and receives the logits. So a caller can run one sequence to its
end, and a server can run many, a pass of each in turn, or one pass over single tokens of several.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from .errors import ReadError
from .kv_cache import KVCache
from .ops import F32, I64
from .sampling import Choice, Sampler

__all__ = ["Driver", "Forward", "NotFiniteError", "Step", "drive", "prefill", "stream_generate"]

Result = TypeVar("Result")


class NotFiniteError(ReadError):
    """Logits that contain NaN or infinity."""


class CausalModel(Protocol):
    def __call__(self, tokens: I64, cache: KVCache, all_logits: bool = False, prompt: bool = False) -> F32:
        """(T,) → (1, vocab); advances the cache by T."""


@dataclass(frozen=True)
class Forward:
    """The next pass through the model: tokens (T,) of a prompt, or one generated token. To be answered with the logits (vocab,) after
    the last."""

    tokens: I64
    cache: KVCache
    prompt: bool

    def run(self, model: CausalModel) -> F32:
        logits: F32 = model(self.tokens, self.cache, prompt=self.prompt)[0]
        return logits


@dataclass(frozen=True)
class Step:
    """One generated token and the seconds it took; for the first, they include the prefill."""

    choice: Choice
    seconds: float


class Driver(Iterator[Forward | Result]):
    """Advances a generation. Each item is a result or a Forward, whose logits must be passed to answer() before the next item."""

    def __init__(self, steps: Generator[Forward | Result, F32 | None, object]) -> None:
        self._steps = steps
        self._logits: F32 | None = None

    def answer(self, logits: F32) -> None:
        """Passes on the logits (vocab,) of the last Forward."""
        self._logits = logits

    def __next__(self) -> Forward | Result:
        logits, self._logits = self._logits, None
        return self._steps.send(logits)

    def close(self) -> None:
        """Ends the generation."""
        self._steps.close()


def drive(model: CausalModel, steps: Generator[Forward | Result, F32 | None, object]) -> Generator[Result, None, None]:
    """Runs every pass that a generation requests, and yields its results."""
    with closing(Driver(steps)) as driver:
        for step in driver:
            if isinstance(step, Forward):
                driver.answer(step.run(model))
            else:
                yield step


def prefill_steps(
    cache: KVCache, tokens: I64, chunk: int, progress: Callable[[int], None] | None = None
) -> Generator[Forward, F32 | None, F32]:
    """The passes over a prompt, `chunk` tokens at a time; returns the logits after the last. progress: tokens done."""
    logits: F32 | None = None
    for begin in range(0, tokens.shape[0], chunk):
        logits = yield Forward(tokens[begin : begin + chunk], cache, prompt=True)
        if progress is not None:
            progress(min(begin + chunk, tokens.shape[0]))
    assert logits is not None
    return logits


def prefill(
    model: CausalModel, cache: KVCache, tokens: I64, chunk: int, progress: Callable[[int], None] | None = None
) -> F32:
    """Runs all tokens through the model, `chunk` at a time; returns the logits (vocab,) after the last."""
    driver: Driver[Forward] = Driver(prefill_steps(cache, tokens, chunk, progress))
    logits: F32 | None = None
    for step in driver:
        logits = step.run(model)
        driver.answer(logits)
    assert logits is not None
    return logits


def stream_generate(
    cache: KVCache,
    tokens: I64,
    sampler: Sampler,
    eos_ids: Collection[int],
    chunk: int,
    progress: Callable[[int], None] | None = None,
) -> Generator[Forward | Step, F32 | None, None]:
    """Yields tokens until one of eos_ids (which is yielded too) or max_tokens, and before each the passes that it needs. tokens: at
    least one, not yet in the cache.

    A token enters the cache when its successor is requested; the last one never does.
    """
    begin = time.perf_counter()
    logits = yield from prefill_steps(cache, tokens, chunk, progress)
    for count in range(1, sampler.params.max_tokens + 1):
        if not np.isfinite(logits).all():
            raise NotFiniteError(
                f"the logits at position {cache.position} are not finite; the checkpoint may be damaged"
            )
        choice = sampler(logits)
        now = time.perf_counter()
        yield Step(choice, now - begin)
        if choice.token in eos_ids or count == sampler.params.max_tokens:
            return
        begin = time.perf_counter()
        answer = yield Forward(np.array([choice.token], np.int64), cache, prompt=False)
        assert answer is not None
        logits = answer
