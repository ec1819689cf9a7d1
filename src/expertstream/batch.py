"""What goes through a model together: rows of one sequence, or of several, each with its own state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import RequestError
from .formats.numbers import I64
from .kv_cache import KVCache, SnapshotState, State

__all__ = ["Batch", "Segment"]


@dataclass(frozen=True)
class Segment:
    """Rows [begin, end) of a batch belong to one sequence, whose tokens they are from `position` on. cuts: ends of parts of these rows
    after which its state is to be kept, and `end`."""

    cache: KVCache
    begin: int
    end: int
    position: int
    cuts: tuple[int, ...]

    def parts(self, state: State) -> Iterator[tuple[slice, int]]:
        """Rows to take into a state one part after another, and the position of each part's first: no more than the state has room for,
        and up to each cut if it cannot be rewound. After a cut it is kept."""
        begin = self.begin
        for cut in self.cuts if isinstance(state, SnapshotState) else (self.end,):
            while begin < cut:
                position = self.position + begin - self.begin
                end = begin + state.reserve(position, cut - begin)
                yield slice(begin, end), position
                begin = end
            if isinstance(state, SnapshotState):
                state.keep_if_asked(self.cache, self.position + cut - self.begin)


class Batch:
    """tokens (T,) of one sequence or several. prompt: they are (a part of) a prompt, which is computed in its chunked form; both forms are
    one computation but for rounding, so which one is taken must not depend on how a prompt is cut: parts are multiples of 64 but for
    the last.

    Use as a context around the model's pass: inside it the sequences are in the middle of a token, and stay invalid if it fails."""

    def __init__(self, tokens: I64, caches: Sequence[KVCache], prompt: bool = False) -> None:
        """With one cache all tokens are its sequence's; with several, each has one."""
        self.tokens, self.caches, self.prompt = tokens, caches, prompt
        self.segments: list[Segment] = []

    def __enter__(self) -> Batch:
        """Raises RequestError if a sequence has no room, or stopped in the middle of a token."""
        each = self.tokens.shape[0] if len(self.caches) == 1 else 1
        self.segments = [self._segment(cache, i * each, each) for i, cache in enumerate(self.caches)]
        for cache in self.caches:
            cache.valid = False
        return self

    @staticmethod
    def _segment(cache: KVCache, begin: int, count: int) -> Segment:
        position, last = cache.position, cache.position + count
        if last > cache.capacity:
            raise RequestError(
                f"{last} tokens do not fit a context of {cache.capacity}; make --context at least {last}"
            )
        if not cache.valid:
            raise RequestError("this session stopped in the middle of a token; reset it")
        inside = sorted(at for at in cache.keep if position < at < last) if cache.keep else ()
        return Segment(
            cache, begin, begin + count, position, (*(begin + at - position for at in inside), begin + count)
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for segment in self.segments:
                segment.cache.position = segment.position + segment.end - segment.begin
                segment.cache.valid = True

    def positions(self) -> I64:
        """(T,): each row's place in its sequence."""
        return np.concatenate([np.arange(s.position, s.position + s.end - s.begin) for s in self.segments])

    def states(self, layer: int) -> list[Any]:
        """Each sequence's state of a layer."""
        return [segment.cache.layers[layer] for segment in self.segments]

    def between_layers(self) -> None:
        """What a model calls before each layer. Raises CancelledError; several sequences go on together."""
        if len(self.segments) == 1:
            self.segments[0].cache.between_layers()

    def last_rows(self) -> list[int]:
        """The last row of each sequence."""
        return [segment.end - 1 for segment in self.segments]
