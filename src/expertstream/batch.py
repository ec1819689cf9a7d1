"""Batches: rows that go through a model together, of one sequence or of several, each with its own state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import RequestError
from .formats.numbers import I64
from .kv_cache import KVCache, SnapshotState, State

__all__ = ["Batch", "Segment"]


@dataclass(frozen=True)
class Segment:
    """Rows [begin, end) of a batch: tokens of one sequence, from `position` on. cuts: where parts of these rows end because a
    snapshot is requested there, and `end`."""

    cache: KVCache
    begin: int
    end: int
    position: int
    cuts: tuple[int, ...]

    def parts(self, state: State) -> Iterator[tuple[slice, int]]:
        """The rows in parts to add to a state one after another, with the position of each part's first row. A part is no longer than the
        state has room for; if the state cannot be rewound, parts also end at cuts, where requested snapshots are taken."""
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
    """tokens (T,) of one sequence or several. prompt: they are (a part of) a prompt, which is computed in chunked form. The two forms
    differ only in rounding, but the choice must not depend on how a prompt is split: all parts but the last are multiples of 64.

    Use as a context manager around the model's pass: inside it, the sequences are between two tokens; if it fails, they stay invalid."""

    def __init__(self, tokens: I64, caches: Sequence[KVCache], prompt: bool = False) -> None:
        """With one cache, all tokens belong to its sequence; with several, one token to each."""
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
                f"{last} tokens do not fit in a context of {cache.capacity}; set context_length={last} or more"
            )
        if not cache.valid:
            raise RequestError("this session stopped in the middle of a token; call reset()")
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
        """(T,): each row's position in its sequence."""
        return np.concatenate([np.arange(s.position, s.position + s.end - s.begin) for s in self.segments])

    def states(self, layer: int) -> list[State]:
        """The state of a layer, for each sequence."""
        return [segment.cache.layers[layer] for segment in self.segments]

    def between_layers(self) -> None:
        """Called by the model before each layer. Raises CancelledError; a batch of several sequences is not interrupted."""
        if len(self.segments) == 1:
            self.segments[0].cache.between_layers()

    def last_rows(self) -> list[int]:
        """The last row of each sequence."""
        return [segment.end - 1 for segment in self.segments]
