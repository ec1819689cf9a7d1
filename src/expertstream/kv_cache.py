"""What a model remembers of a text: keys and values of attention layers, conv window and state of gated-delta layers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .ops import F32

__all__ = [
    "AttentionSpec",
    "AttentionState",
    "CancelledError",
    "DeltaSpec",
    "DeltaState",
    "KVCache",
    "StateSpec",
    "make_cache",
    "state_bytes",
]


class CancelledError(Exception):
    """The request was cancelled."""


@dataclass
class AttentionState:
    """keys, values (kv_heads, capacity, head_dim): float32, or bfloat16 bits as uint16; or (kv_heads, capacity, head_dim + 4) uint8,
    int8 values with the float32 that they are times behind each row."""

    keys: Any
    values: Any

    def rows(self, begin: int, end: int) -> list[Any]:
        """Copies of what was kept of tokens [begin, end)."""
        return [np.ascontiguousarray(a[:, begin:end]) for a in self.arrays]

    def put(self, begin: int, rows: Sequence[Any]) -> None:
        for mine, given in zip(self.arrays, rows, strict=True):
            mine[:, begin : begin + given.shape[1]] = given

    @property
    def arrays(self) -> list[Any]:
        return [self.keys, self.values]


@dataclass
class DeltaState:
    """conv_state (kernel − 1, channels) holds the last inputs; recurrent_state (value_heads, key_dim, value_dim)."""

    conv_state: F32
    recurrent_state: F32
    # Copies of both as they were after some tokens, where the cache was asked to keep them.
    kept: dict[int, list[F32]] = field(default_factory=dict)

    def copies(self) -> list[F32]:
        return [self.conv_state.copy(), self.recurrent_state.copy()]

    def keep_if_asked(self, cache: KVCache, position: int) -> None:
        """Keeps copies if the cache is to keep this state as it is after `position` tokens."""
        if position in cache.keep and position not in self.kept:
            self.kept[position] = self.copies()

    def put(self, states: Sequence[F32]) -> None:
        self.conv_state[:], self.recurrent_state[:] = states


class KVCache:
    """The state of one text. `position` tokens have been seen; at most `capacity` can be.

    `keep`: positions, multiples of 64, at which the gated-delta states are kept on the way past, in each one's `kept`: they cannot be
    rewound, as keys and values can. A forward pass that fails leaves the cache in between two tokens: `valid` is False then, and it
    must be reset."""

    def __init__(self, layers: list[AttentionState | DeltaState], capacity: int) -> None:
        self.layers, self.capacity = layers, capacity
        self.position = 0
        self.valid = True
        self.keep: frozenset[int] = frozenset()
        self.cancelled: threading.Event | None = (
            None  # set by another thread: the pass under way ends with CancelledError
        )
        self.pause: Callable[[], None] | None = None  # called between the layers of a pass over a prompt
        self.each_logits: Callable[[F32], None] | None = (
            None  # is given the logits (n, vocab) of all tokens, in order, a few at a time
        )

    def between_layers(self) -> None:
        """What a model calls before each layer of a pass. Raises CancelledError."""
        if self.cancelled is not None and self.cancelled.is_set():
            raise CancelledError
        if self.pause is not None:
            self.pause()

    def reset(self) -> None:
        for layer in self.layers:
            if isinstance(layer, DeltaState):
                layer.conv_state[:] = 0
                layer.recurrent_state[:] = 0
                layer.kept.clear()
        self.position, self.valid, self.keep = 0, True, frozenset()


@dataclass(frozen=True)
class AttentionSpec:
    """Keys and values (kv_heads, head_dim) of every token."""

    kv_heads: int
    head_dim: int

    def nbytes(self, capacity: int, dtype: str) -> int:
        row = {"bf16": 2 * self.head_dim, "f32": 4 * self.head_dim, "int8": self.head_dim + 4}[dtype]
        return 2 * self.kv_heads * row * capacity

    def make(self, capacity: int, dtype: str) -> AttentionState:
        # Pages are touched only as the text grows.
        kind = {"bf16": np.uint16, "f32": np.float32, "int8": np.uint8}[dtype]
        shape = (self.kv_heads, capacity, self.head_dim + (4 if dtype == "int8" else 0))
        return AttentionState(np.zeros(shape, kind), np.zeros(shape, kind))


@dataclass(frozen=True)
class DeltaSpec:
    """The shapes of a DeltaState, whose size does not depend on how many tokens there were."""

    conv: tuple[int, int]
    recurrent: tuple[int, int, int]

    def nbytes(self, capacity: int, dtype: str) -> int:
        return 4 * (math.prod(self.conv) + math.prod(self.recurrent))

    def make(self, capacity: int, dtype: str) -> DeltaState:
        return DeltaState(np.zeros(self.conv, np.float32), np.zeros(self.recurrent, np.float32))


StateSpec = AttentionSpec | DeltaSpec


def make_cache(specs: Sequence[StateSpec], capacity: int, dtype: str) -> KVCache:
    """An empty cache for a sequence of up to `capacity` tokens. dtype: of keys and values, one of config.KV_DTYPES."""
    return KVCache([spec.make(capacity, dtype) for spec in specs], capacity)


def state_bytes(specs: Sequence[StateSpec], capacity: int, dtype: str) -> int:
    """What make_cache() allocates."""
    return sum(spec.nbytes(capacity, dtype) for spec in specs)
