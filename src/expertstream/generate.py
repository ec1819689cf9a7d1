"""The one decode loop: prefill in chunks, then one token a step. Everything that generates consumes it.

It does not run the model itself: it says which pass it needs next and is sent the logits. So one text can be driven to its end, and a
server can drive many, a pass of each in turn, or the single tokens of several in one pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from .errors import ReadError
from .kv_cache import KVCache
from .ops import F32, I64
from .sampling import Choice, Sampler

__all__ = ["Forward", "NotFiniteError", "Step", "drive", "prefill", "stream_generate"]

Result = TypeVar("Result")


class NotFiniteError(ReadError):
    """Logits with NaN or infinity among them."""


class CausalModel(Protocol):
    def __call__(self, tokens: I64, cache: KVCache, all_logits: bool = False, prompt: bool = False) -> F32:
        """(T,) → (1, vocab), moving the cache on by T."""


@dataclass(frozen=True)
class Forward:
    """A pass through the model that is needed to go on: tokens (T,) of a prompt, or one that was generated. The answer to it are the
    logits (vocab,) after the last."""

    tokens: I64
    cache: KVCache
    prompt: bool

    def run(self, model: CausalModel) -> F32:
        logits: F32 = model(self.tokens, self.cache, prompt=self.prompt)[0]
        return logits


@dataclass(frozen=True)
class Step:
    """One generated token and the seconds it took; the first one's include the prefill."""

    choice: Choice
    seconds: float


def drive(model: CausalModel, steps: Generator[Forward | Result, F32 | None, None]) -> Generator[Result, None, None]:
    """Runs every pass that is asked for, and yields the rest."""
    answer = None
    try:
        while True:
            step = steps.send(answer)
            if isinstance(step, Forward):
                answer = step.run(model)
            else:
                answer = None
                yield step
    except StopIteration:
        pass
    finally:
        steps.close()


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
    steps, answer = prefill_steps(cache, tokens, chunk, progress), None
    while True:
        try:
            answer = steps.send(answer).run(model)
        except StopIteration as end:
            logits: F32 = end.value
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

    Every token but the last is in the cache when its successor is asked for; the last never is.
    """
    begin = time.perf_counter()
    logits = yield from prefill_steps(cache, tokens, chunk, progress)
    for count in range(1, sampler.params.max_tokens + 1):
        if not np.isfinite(logits).all():
            raise NotFiniteError(
                f"the model gave logits that are not numbers at position {cache.position}; the checkpoint may be damaged"
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
