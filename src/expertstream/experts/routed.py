"""A model's interface to its experts: sends tokens to the selected experts and returns the weighted sum of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np

from ..ops import F32, I64, ExpertBlock, GpuOps, Ops
from .cache import ExpertCache

__all__ = ["RoutedExperts"]


class RoutedExperts:
    """The experts of all layers. Neither their location nor their order of arrival changes a value: outputs are summed in ascending order
    of expert number."""

    def __init__(self, cache: ExpertCache, ops: Ops) -> None:
        self._cache, self._ops = cache, ops
        self._one: dict[int, tuple[I64, I64]] = {}  # by top-k: pairs of a single token

    def adapt(self) -> None:
        """Releases memory under pressure, or takes it back. Call between passes."""
        self._cache.adapt()

    @property
    def recordable(self) -> bool:
        """Whether a backend finds experts by itself, so that a pass may be recorded."""
        return self._cache.complete or self._cache.partial

    @property
    def partial(self) -> bool:
        """Whether it is the host that computes, in a recorded pass, what is not on the card."""
        return self._cache.partial

    def fetched(self, layer: int, experts: list[int], guess: list[int]) -> Iterator[tuple[list[int], ExpertBlock]]:
        """Experts (ascending) that are not on the card, for the host, as they arrive: positions in the list, and where they are. guess:
        what the next layer will probably select. Raises ReadError."""
        block = self._cache.block_here(layer, experts)
        if block is not None:
            if guess:
                self._cache.hint(layer + 1, guess)
            yield list(range(len(experts))), block
            return
        with self._cache.fetch(layer, experts, here=True) as fetch:
            if guess:
                self._cache.hint(layer + 1, guess)
            for part in fetch:
                yield part.positions, part.block

    def selected(self, experts: I64, computed: I64) -> None:
        """Counts what the layers' routers selected (layers, T, top_k) in a recorded pass, and the experts of each layer that the host
        computed (layers,)."""
        self._cache.count(experts, computed)

    def meanwhile(self) -> None:
        """Moves experts between memories as the last recorded pass suggests. Call while the next one runs."""
        self._cache.move()

    def expect(self, layer: int, weights: F32, selected: I64) -> None:
        """Prefetches experts of `layer`, the most likely first. weights, selected (T, k): what its router selects for the hidden states of
        the layer before."""
        if self._ops.recording is not None:
            cast(GpuOps, self._ops).guess(weights, selected)
            return
        likeliest_first = np.argsort(-self._ops.host(weights), axis=None, kind="stable")
        self._cache.hint(layer, list(dict.fromkeys(self._ops.host(selected).ravel()[likeliest_first].tolist())))

    def apply(
        self,
        layer: int,
        x: F32,
        weights: F32,
        selected: I64,
        prompt: bool,
        shared: Callable[[], F32] | None,
        ahead: Callable[[], None] | None = None,
    ) -> F32:
        """Σ weights·expert(x) for x (T, H) and a router's weights and selected experts (T, k), added to what `shared`
        returns (T, H), if given.

        prompt: the rows belong to one sequence and touch nearly every expert once. shared and ahead, which may call expect() for the next
        layer, run while missing experts are read. Raises ReadError."""
        ops = self._ops
        if ops.recording is not None or self._cache.complete:
            if ahead is not None and self._cache.partial and self._cache.prefetcher.most:
                cast(GpuOps, ops).ahead(ahead)
            acc = ops.zeros_like(x) if shared is None else shared()
            self._cache.table_routed(ops, layer, acc, x, weights, selected)
            if ops.recording is None:
                self._cache.count_found(layer, selected.shape[0] * selected.shape[1])
            return acc
        top_k = selected.shape[1]
        # Pairs of (token, expert), grouped by expert.
        if x.shape[0] == 1:
            if top_k not in self._one:
                self._one[top_k] = np.zeros(top_k, np.int64), np.arange(top_k + 1)
            pair_token, pair_start = self._one[top_k]
            weights, ids = weights[0], ops.host(selected)[0].tolist()
            block = self._cache.resident_block(layer, ids)
            if block is not None:  # nothing to wait for or to combine
                acc = ops.zeros_like(x) if shared is None else shared()
                ops.moe(acc, x, block, pair_start, pair_token, weights)
                return acc
        else:
            selected, weights = ops.host(selected), ops.host(weights)
            order = np.argsort(selected, axis=None, kind="stable")
            pair_token, weights = order // top_k, weights.ravel()[order]
            distinct, counts = np.unique(selected, return_counts=True)
            pair_start, ids = np.concatenate([[0], np.cumsum(counts)]), distinct.tolist()
        # The reads of all missing experts are started before anything is computed.
        with self._cache.fetch(layer, ids, prompt) as fetch:
            if ahead is not None and not prompt and self._cache.prefetcher.most:
                ahead()
            acc = ops.zeros_like(x) if shared is None else shared()
            # In order, each part is summed at once; otherwise outputs are kept until all have arrived.
            y = None if fetch.ordered else ops.empty_rows(pair_token.shape[0], x)
            for part in fetch:
                starts = pair_start[part.positions]
                lengths = pair_start[np.array(part.positions) + 1] - starts
                part_start = np.concatenate([[0], np.cumsum(lengths)])
                if y is None:  # consecutive: one run of pairs
                    run = slice(starts[0], starts[0] + part_start[-1])
                    ops.moe(acc, x, part.block, part_start, pair_token[run], weights[run])
                else:
                    pairs = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
                    ops.put_rows(y, pairs, ops.experts(x, part.block, part_start, pair_token[pairs]))
            if y is not None:
                ops.accumulate(acc, y, pair_token, weights)
        return acc
