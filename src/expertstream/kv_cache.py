"""The state of a sequence: rows of keys and values for each token, or a state without history.

A state of the second kind cannot be rewound, so snapshots are taken when it passes the positions where a prompt may be resumed.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .formats.numbers import F32, KeyValues

__all__ = [
    "AttentionSpec",
    "AttentionState",
    "CancelledError",
    "DeltaSpec",
    "DeltaState",
    "KVCache",
    "SnapshotState",
    "State",
    "StateSpec",
    "WindowState",
    "make_cache",
    "state_bytes",
]

ArrayShape = tuple[str, tuple[int, ...]]  # dtype's name, shape
Zeros = Callable[[tuple[int, ...], str], KeyValues]  # shape, dtype's name
_BLOCK = 64  # positions; rows are dropped in whole blocks, the unit of the attention kernels
_SPARE = 1024  # rows of a window beyond those it needs, so that rows are moved to the front only now and then


class CancelledError(Exception):
    """The request was cancelled."""


class State(ABC):
    """One layer's state of a sequence."""

    @property
    @abstractmethod
    def arrays(self) -> list[KeyValues]:
        """The arrays that make up the state."""

    def reserve(self, position: int, count: int) -> int:
        """How many of `count` tokens from `position` on can be added now, at least one."""
        return count

    def reset(self) -> None:
        """Returns to an empty sequence."""
        return


@dataclass
class AttentionState(State):
    """keys, values (kv_heads, capacity, head_dim): float32, or bfloat16 bits as uint16; or (kv_heads, capacity, head_dim + 4) uint8,
    int8 values with their float32 scale at the end of each row. Row 0 is position `first`."""

    keys: KeyValues
    values: KeyValues
    first: int = 0

    @property
    def arrays(self) -> list[KeyValues]:
        return [self.keys, self.values]

    def rows(self, begin: int, end: int) -> list[KeyValues]:
        """Copies of the rows of tokens [begin, end)."""
        return [np.ascontiguousarray(a[:, begin:end]) for a in self.arrays]

    def put(self, begin: int, rows: Sequence[KeyValues]) -> None:
        """Stores what rows() returned."""
        for mine, given in zip(self.arrays, rows, strict=True):
            mine[:, begin : begin + given.shape[1]] = given

    def row_shapes(self, tokens: int) -> list[ArrayShape]:
        """The shapes of what rows() returns for so many tokens."""
        return [(a.dtype.name, (a.shape[0], tokens, *a.shape[2:])) for a in self.arrays]


class SnapshotState(State):
    """A state that is copied whole. kept: its snapshots by position, at the positions that the cache requests."""

    kept: dict[int, list[KeyValues]]

    @abstractmethod
    def copies(self, position: int) -> list[KeyValues]:
        """Copies of the state, which is at `position`."""

    @abstractmethod
    def restore(self, position: int, arrays: Sequence[KeyValues]) -> None:
        """Restores what copies() returned."""

    @abstractmethod
    def shapes(self) -> list[ArrayShape]:
        """The shapes of what copies() returns."""

    def keep_if_asked(self, cache: KVCache, position: int) -> None:
        """Takes a snapshot if the cache requests one at `position`, where the state is."""
        if position in cache.keep and position not in self.kept:
            self.kept[position] = self.copies(position)


@dataclass
class WindowState(SnapshotState):
    """Keys and values as in an AttentionState, of at least the last `window` positions: row 0 is position `first`, a multiple of 64.
    copies() returns the last `window` rows, the newest last, with zeros in place of those before the first token."""

    keys: KeyValues
    values: KeyValues
    window: int
    first: int = 0
    kept: dict[int, list[KeyValues]] = field(default_factory=dict)

    @property
    def arrays(self) -> list[KeyValues]:
        return [self.keys, self.values]

    def reserve(self, position: int, count: int) -> int:
        capacity = int(self.keys.shape[1])
        if position + count - self.first > capacity:
            first = max(0, position + 1 - self.window) // _BLOCK * _BLOCK
            if first > self.first:
                for rows in self.arrays:
                    rows[:, : position - first] = rows[:, first - self.first : position - self.first].copy()
                self.first = first
        return min(count, capacity - (position - self.first))

    def reset(self) -> None:
        self.first = 0
        self.kept.clear()

    def copies(self, position: int) -> list[KeyValues]:
        found = []
        for rows, (_, shape) in zip(self.arrays, self.shapes(), strict=True):
            copy = np.zeros(shape, rows.dtype)
            count = min(self.window, position)
            copy[:, self.window - count :] = rows[:, position - count - self.first : position - self.first]
            found.append(copy)
        return found

    def restore(self, position: int, arrays: Sequence[KeyValues]) -> None:
        begin = max(0, position - self.window)
        self.first = begin // _BLOCK * _BLOCK
        for rows, given in zip(self.arrays, arrays, strict=True):
            rows[:, : begin - self.first] = 0
            rows[:, begin - self.first : position - self.first] = given[:, self.window - (position - begin) :]

    def shapes(self) -> list[ArrayShape]:
        return [(a.dtype.name, (a.shape[0], self.window, *a.shape[2:])) for a in self.arrays]


@dataclass
class DeltaState(SnapshotState):
    """conv_state (kernel − 1, channels) holds the last inputs; recurrent_state (value_heads, key_dim, value_dim)."""

    conv_state: F32
    recurrent_state: F32
    kept: dict[int, list[KeyValues]] = field(default_factory=dict)

    @property
    def arrays(self) -> list[KeyValues]:
        return [self.conv_state, self.recurrent_state]

    def reset(self) -> None:
        self.conv_state[:] = 0
        self.recurrent_state[:] = 0
        self.kept.clear()

    def copies(self, position: int) -> list[F32]:
        return [self.conv_state.copy(), self.recurrent_state.copy()]

    def restore(self, position: int, arrays: Sequence[F32]) -> None:
        self.conv_state[:], self.recurrent_state[:] = arrays

    def shapes(self) -> list[ArrayShape]:
        return [(a.dtype.name, a.shape) for a in self.arrays]


class KVCache:
    """The state of one sequence, after `position` tokens of at most `capacity`.

    `keep`: positions, multiples of 64, at which states that cannot be rewound are to take a snapshot, stored in their `kept`. A forward
    pass that fails leaves the cache between two tokens: `valid` is then False, and it must be reset."""

    def __init__(self, layers: list[State], capacity: int) -> None:
        self.layers, self.capacity = layers, capacity
        self.position = 0
        self.valid = True
        self.keep: frozenset[int] = frozenset()
        self.cancelled: threading.Event | None = None  # set by another thread; the current pass raises CancelledError
        self.pause: Callable[[], None] | None = None  # called between the layers of a pass over a prompt
        self.each_logits: Callable[[F32], None] | None = None  # receives all tokens' logits in order, as (n, vocab)

    def between_layers(self) -> None:
        """Called by the model before each layer of a pass. Raises CancelledError."""
        if self.cancelled is not None and self.cancelled.is_set():
            raise CancelledError
        if self.pause is not None:
            self.pause()

    @property
    def rows(self) -> list[AttentionState]:
        """The layers that have rows for each token."""
        return [layer for layer in self.layers if isinstance(layer, AttentionState)]

    @property
    def snapshots(self) -> list[SnapshotState]:
        """The layers whose state is copied whole."""
        return [layer for layer in self.layers if isinstance(layer, SnapshotState)]

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()
        self.position, self.valid, self.keep = 0, True, frozenset()


@dataclass(frozen=True)
class AttentionSpec:
    """Keys and values (kv_heads, head_dim) of every token, or, with a window, of the last `window` tokens."""

    kv_heads: int
    head_dim: int
    window: int = 0

    def _rows(self, capacity: int) -> int:
        needed = -(-self.window // _BLOCK) * _BLOCK + _BLOCK + _SPARE
        return min(needed, capacity) if self.window else capacity

    def nbytes(self, capacity: int, dtype: str) -> int:
        row = {"bf16": 2 * self.head_dim, "f32": 4 * self.head_dim, "int8": self.head_dim + 4}[dtype]
        return 2 * self.kv_heads * row * self._rows(capacity)

    def make(self, capacity: int, dtype: str, zeros: Zeros = np.zeros) -> State:
        # Pages are touched only as the sequence grows.
        kind = {"bf16": "uint16", "f32": "float32", "int8": "uint8"}[dtype]
        shape = (self.kv_heads, self._rows(capacity), self.head_dim + (4 if dtype == "int8" else 0))
        keys, values = zeros(shape, kind), zeros(shape, kind)
        return WindowState(keys, values, self.window) if self.window else AttentionState(keys, values)


@dataclass(frozen=True)
class DeltaSpec:
    """The shapes of a DeltaState, whose size does not depend on the number of tokens."""

    conv: tuple[int, int]
    recurrent: tuple[int, int, int]

    def nbytes(self, capacity: int, dtype: str) -> int:
        return 4 * (math.prod(self.conv) + math.prod(self.recurrent))

    def make(self, capacity: int, dtype: str, zeros: Zeros = np.zeros) -> DeltaState:
        return DeltaState(zeros(self.conv, "float32"), zeros(self.recurrent, "float32"))


StateSpec = AttentionSpec | DeltaSpec


def make_cache(specs: Sequence[StateSpec], capacity: int, dtype: str, zeros: Zeros = np.zeros) -> KVCache:
    """An empty cache for a sequence of up to `capacity` tokens. dtype: of keys and values, one of config.KV_DTYPES. zeros: allocates,
    such as Ops.state()."""
    return KVCache([spec.make(capacity, dtype, zeros) for spec in specs], capacity)


def state_bytes(specs: Sequence[StateSpec], capacity: int, dtype: str) -> int:
    """The bytes that make_cache() allocates."""
    return sum(spec.nbytes(capacity, dtype) for spec in specs)
