"""What a model remembers of a text: keys and values of attention layers, conv window and state of gated-delta layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .ops import F32

__all__ = ["AttentionState", "DeltaState", "KVCache"]


@dataclass
class AttentionState:
    """keys, values (kv_heads, capacity, head_dim): float32, or bfloat16 bits as uint16."""

    keys: Any
    values: Any


@dataclass
class DeltaState:
    """conv_state (kernel − 1, channels) holds the last inputs; recurrent_state (value_heads, key_dim, value_dim)."""

    conv_state: F32
    recurrent_state: F32


class KVCache:
    """The state of one text. `position` tokens have been seen; at most `capacity` can be.

    A forward pass that fails leaves it in between two tokens: `valid` is False then, and it must be reset."""

    def __init__(self, layers: list[AttentionState | DeltaState], capacity: int) -> None:
        self.layers, self.capacity = layers, capacity
        self.position = 0
        self.valid = True

    def reset(self) -> None:
        for layer in self.layers:
            if isinstance(layer, DeltaState):
                layer.conv_state[:] = 0
                layer.recurrent_state[:] = 0
        self.position, self.valid = 0, True


def attention_state(kv_heads: int, capacity: int, head_dim: int, dtype: str) -> AttentionState:
    # Pages are touched only as the text grows.
    shape, kind = (kv_heads, capacity, head_dim), np.uint16 if dtype == "bf16" else np.float32
    return AttentionState(np.zeros(shape, kind), np.zeros(shape, kind))


def delta_state(kernel: int, channels: int, value_heads: int, key_dim: int, value_dim: int) -> DeltaState:
    return DeltaState(
        np.zeros((kernel - 1, channels), np.float32), np.zeros((value_heads, key_dim, value_dim), np.float32)
    )
