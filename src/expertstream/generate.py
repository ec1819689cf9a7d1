"""The one decode loop: prefill in chunks, then one token a step. Everything that generates consumes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .errors import ReadError
from .kv_cache import KVCache
from .ops import F32, I64
from .sampling import Choice, Sampler

__all__ = ["Step", "prefill", "stream_generate"]


class CausalModel(Protocol):
    def __call__(self, tokens: I64, cache: KVCache, all_logits: bool = False, prompt: bool = False) -> F32:
        """(T,) → (1, vocab), moving the cache on by T."""


@dataclass(frozen=True)
class Step:
    """One generated token and the seconds it took; the first one's include the prefill."""

    choice: Choice
    seconds: float


def prefill(
    model: CausalModel, cache: KVCache, tokens: I64, chunk: int, progress: Callable[[int], None] | None = None
) -> F32:
    """Runs all tokens through the model, `chunk` at a time; returns the logits (vocab,) after the last. progress: tokens done."""
    logits = None
    for begin in range(0, tokens.shape[0], chunk):
        logits = model(tokens[begin : begin + chunk], cache, prompt=True)
        if progress is not None:
            progress(min(begin + chunk, tokens.shape[0]))
    assert logits is not None
    last: F32 = logits[0]
    return last


def stream_generate(
    model: CausalModel,
    cache: KVCache,
    tokens: I64,
    sampler: Sampler,
    eos_ids: frozenset[int],
    chunk: int,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Step]:
    """Yields tokens until one of eos_ids (which is yielded too) or max_tokens. tokens: at least one, not yet in the cache.

    Every token but the last is in the cache when its successor is asked for; the last never is.
    """
    begin = time.perf_counter()
    logits = prefill(model, cache, tokens, chunk, progress)
    for count in range(1, sampler.params.max_tokens + 1):
        if not np.isfinite(logits).all():
            raise ReadError(
                f"the model gave logits that are not numbers at position {cache.position}; the checkpoint may be damaged"
            )
        choice = sampler(logits)
        now = time.perf_counter()
        yield Step(choice, now - begin)
        if choice.token in eos_ids or count == sampler.params.max_tokens:
            return
        begin = time.perf_counter()
        logits = model(np.array([choice.token], np.int64), cache)[0]
