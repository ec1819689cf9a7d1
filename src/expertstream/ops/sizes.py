"""A backend of shapes: runs a model without data and counts the memory that it would take. Its arrays have a shape but no values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..formats.numbers import I64
from . import AttentionWeights, BySequence, DeltaWeights, Weight

__all__ = ["Meter", "SizedArray", "SizedOps"]

_GROUP = 32  # the smallest group, whose sums take the most memory
_PAIRS = 1024  # as in native/ops.cpp
_SEGMENT, _QUERY_ROWS, _KEYS, _CHUNK, _COLUMNS = 1024, 48, 64, 64, 64


class Meter:
    """Counts the bytes of live arrays, and the largest size of each buffer of the native engine."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._buffers: dict[str, int] = {}

    def take(self, count: int) -> None:
        self.live += count
        self.peak = max(self.peak, self.live)

    def buffer(self, name: str, count: int) -> None:
        """A buffer of the engine, which grows and is never freed."""
        self._buffers[name] = max(self._buffers.get(name, 0), count)

    @property
    def buffer_bytes(self) -> int:
        return sum(self._buffers.values())


class SizedArray:
    """An array of float32 (or of `width` bytes per value) that counts as long as it is referenced; slices do not count."""

    def __init__(self, meter: Meter, shape: Sequence[int], width: int = 4, base: SizedArray | None = None) -> None:
        self.shape, self._meter, self._base = tuple(shape), meter, base
        self._count = 0 if base is not None else math.prod(self.shape) * width
        meter.take(self._count)

    def __del__(self) -> None:
        self._meter.live -= self._count

    def __getitem__(self, rows: slice) -> SizedArray:
        begin, end, _ = rows.indices(self.shape[0])
        return SizedArray(self._meter, (end - begin, *self.shape[1:]), base=self)

    def __iadd__(self, other: SizedArray) -> SizedArray:
        return self


class SizedOps(BySequence):
    """The shapes of ops.Ops, with the buffers of the native engine. Weights need only a format."""

    fingerprint = description = "sizes"

    def __init__(self, meter: Meter, threads: int) -> None:
        self.meter, self.threads = meter, threads

    def _new(self, *shape: int, width: int = 4) -> Any:
        return SizedArray(self.meter, shape, width)

    def _activations(self, name: str, tokens: int, cols: int) -> None:
        """Two planes of int8, a scale and sums for each group: Engine::make_room."""
        self.meter.buffer(name, tokens * (2 * cols + 16 * -(-cols // _GROUP)) + 64)

    def embed(self, weight: Weight, tokens: I64) -> Any:
        return self._new(tokens.shape[0], weight.format.cols)

    def rotary(self, positions: I64, frequencies: Sequence[float], scale: float) -> Any:
        count = positions.shape[0], len(frequencies)
        passing = self._new(*count, width=4 + 8 + 2 * 8)  # the angle, also in float64, with its cos and sin
        found = self._new(*count), self._new(*count)
        del passing
        return found

    def concatenate(self, parts: list[Any]) -> Any:
        return parts[0] if len(parts) == 1 else self._new(sum(p.shape[0] for p in parts), *parts[0].shape[1:])

    def rows(self, x: Any, which: Sequence[int]) -> Any:
        return x if len(which) == x.shape[0] else self._new(len(which), *x.shape[1:])

    def host(self, x: Any) -> Any:
        return x

    def zeros_like(self, x: Any) -> Any:
        return self._new(*x.shape)

    def project(self, x: Any, weights: list[Weight]) -> Any:
        self._activations("input", x.shape[0], x.shape[1])
        return [self._new(x.shape[0], w.format.rows) for w in weights]

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return self._new(*x.shape)

    def attention(
        self,
        w: AttentionWeights,
        q: Any,
        k: Any,
        v: Any,
        cos: Any,
        sin: Any,
        keys: Any,
        values: Any,
        position: int,
        first: int = 0,
    ) -> Any:
        tokens, d, per_kv = q.shape[0], w.head_dim, w.heads // w.kv_heads
        together = min(max(_QUERY_ROWS // per_kv, 1), tokens)
        rows, blocks = together * per_kv, -(-tokens // together)
        state = rows * (d + 2)
        own = rows * d + 2 * state + 2 * _KEYS * d + rows * _KEYS
        seen = min(position + tokens, w.window + tokens + _KEYS) if w.window else position + tokens
        split = blocks * w.kv_heads < 2 * self.threads
        partials = blocks * w.kv_heads * (-(-seen // _SEGMENT) + 1) * state if split else 0
        self.meter.buffer("scratch", 4 * (tokens * w.heads * d + partials + self.threads * own))
        return self._new(tokens, w.heads * d)

    def delta_net(
        self, w: DeltaWeights, qkv: Any, z: Any, a: Any, b: Any, conv_state: Any, state: Any, chunked: bool
    ) -> Any:
        dk, dv = w.key_dim, z.shape[1] // w.value_heads
        own = 2 * _CHUNK * _CHUNK + dk * _CHUNK + _CHUNK * dv + 3 * _CHUNK
        self.meter.buffer("scratch", 4 * (self.threads * own + 2 * qkv.shape[0] * w.value_heads))
        return self._new(*z.shape)

    def route(self, x: Any, weight: Weight, top_k: int, renormalize: bool = True) -> Any:
        self._activations("input", x.shape[0], x.shape[1])
        self.meter.buffer("logits", 4 * x.shape[0] * weight.format.rows)
        return self._new(x.shape[0], top_k), self._new(x.shape[0], top_k, width=8)

    def shared_expert(self, x: Any, gate: Weight, up: Weight, down: Weight, scale: Weight) -> Any:
        tokens, inner = x.shape[0], gate.format.rows
        self.meter.buffer("scratch", 4 * tokens * (2 * inner + 1))
        self._activations("input", tokens, max(x.shape[1], inner))
        return self._new(*x.shape)

    def routed_experts(self, x: Any, selected: Any, inner: int) -> None:
        """The memory of RoutedExperts.apply() besides its result: the lists of pairs, and the buffers of moe()."""
        (tokens, hidden), top_k = x.shape, selected.shape[1]
        lists = self._new(tokens * top_k, width=4 * 8 + 4)  # order, tokens, sorted experts and their numbers; weights
        pairs = min(max(_PAIRS, tokens), tokens * top_k)
        self.meter.buffer("scratch", 4 * pairs * (2 * inner + hidden))
        self._activations("input", pairs, hidden)
        self._activations("inner", pairs, inner)
        self.meter.buffer("outputs", 4 * self.threads * tokens * _COLUMNS)
        del lists
