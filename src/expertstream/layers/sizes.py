"""Measures the memory of a model's activations by running it on shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..formats import Dense
from ..kv_cache import KVCache, State
from ..ops import Weight
from ..ops.sizes import Meter, SizedOps
from .config import DecoderConfig
from .decoder import Decoder
from .moe import Experts
from .weights import Weights

__all__ = ["activation_bytes"]


class _Shapes(Weights):
    """Weights with a format but no bytes."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops

    def matrices(
        self, module: str, rows: int, cols: int, parts: Sequence[Sequence[int]] | None, bias: bool, sensitive: bool
    ) -> list[Weight]:
        return [Weight(Dense(n, cols, "bf16"), ()) for n in ([rows] if parts is None else map(len, parts))]

    def vector(self, name: str, *shape: int, kind: str = "vector") -> Any:
        return None


class _Experts:
    """The sizes of experts.routed.RoutedExperts."""

    def __init__(self, ops: SizedOps, config: DecoderConfig) -> None:
        self._ops, self._config = ops, config

    recordable = partial = False

    def adapt(self) -> None:
        pass

    def selected(self, experts: Any, computed: Any) -> None:
        pass

    def fetched(self, layer: int, experts: Any, guess: Any) -> Any:
        return iter(())

    def meanwhile(self) -> None:
        pass

    def expect(self, layer: int, weights: Any, selected: Any) -> None:
        pass

    def apply(
        self, layer: int, x: Any, weights: Any, selected: Any, prompt: bool, shared: Any, ahead: Any = None
    ) -> Any:
        acc = self._ops.zeros_like(x) if shared is None else shared()
        self._ops.routed_experts(x, selected, self._config.experts[layer].inner)
        return acc


class _Nothing(State):
    """A state without memory: states are counted elsewhere."""

    keys = values = conv_state = recurrent_state = None
    first = 0
    arrays: list[Any] = []  # noqa: RUF012


def activation_bytes(
    build: Callable[[Weights, Experts], Decoder], config: DecoderConfig, tokens: int, capacity: int, threads: int
) -> int:
    """Peak memory while the last `tokens` of `capacity` prompt tokens go through a model, plus the buffers that the engine keeps between
    passes and the logits of a few rows."""
    meter = Meter()
    ops: Any = SizedOps(meter, threads)
    model = build(_Shapes(ops), _Experts(ops, config))
    cache = KVCache([_Nothing() for _ in model.layers], max(capacity, tokens))
    cache.position = max(0, capacity - tokens)
    model(np.zeros(tokens, np.int64), cache, prompt=True)
    return meter.peak + meter.buffer_bytes + 2 * 4 * config.vocab_size
