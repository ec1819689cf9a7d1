"""Token mixers: attention over the rows of all tokens, or of a window, and linear attention with a state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..batch import Batch
from ..kv_cache import AttentionSpec, DeltaSpec, State, StateSpec
from ..ops import F32, AttentionWeights, DeltaWeights, Weight
from .weights import Weights

__all__ = ["Attention", "AttentionShape", "DeltaShape", "GatedDeltaNet", "Mixer"]

Angles = tuple[F32, F32]


class Mixer(Protocol):
    """Lets each token see those before it."""

    def __call__(self, x: F32, states: Sequence[State], batch: Batch, angles: Angles) -> F32:
        """x (T, H) → (T, H). states: one per sequence, of this layer; angles: cos and sin of the rows' positions."""


@dataclass(frozen=True)
class AttentionShape:
    """Grouped-query attention. eps: of the query and key norms, 0 for none; plus_one: as in Weights.norm(); gated: q_proj gives each head's
    query and then its output gate; bias: of all projections; window: positions that a query sees, 0 for all."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float = 0.0
    plus_one: bool = False
    gated: bool = False
    bias: bool = False
    sinks: bool = False
    window: int = 0

    @property
    def state(self) -> StateSpec:
        return AttentionSpec(self.kv_heads, self.head_dim, self.window)


class Attention:
    """Weights q_proj, k_proj, v_proj, o_proj and, if the shape has them, q_norm, k_norm and sinks under `name`."""

    def __init__(self, w: Weights, name: str, hidden: int, shape: AttentionShape) -> None:
        s, self.ops = shape, w.ops
        queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.in_proj = [
            w.matrix(f"{name}.{part}_proj", n, hidden, s.bias)
            for part, n in (("q", queries * (2 if s.gated else 1)), ("k", keys), ("v", keys))
        ]
        self.o_proj = w.linear(f"{name}.o_proj", hidden, queries, s.bias)
        q_norm, k_norm = (
            w.norm(f"{name}.{part}_norm", s.head_dim, s.eps, s.plus_one).weight if s.eps else None
            for part in ("q", "k")
        )
        sinks = w.vector(f"{name}.sinks", s.heads) if s.sinks else None
        self.weights = AttentionWeights(
            s.heads, s.kv_heads, s.head_dim, s.eps, q_norm, k_norm, s.gated, sinks, s.window
        )

    def __call__(self, x: F32, states: Sequence[State], batch: Batch, angles: Angles) -> F32:
        q, k, v = self.ops.project(x, self.in_proj)
        return self.o_proj(self.ops.attend(self.weights, q, k, v, angles, states, batch))


@dataclass(frozen=True)
class DeltaShape:
    """A gated-delta layer: C = 2·key_heads·key_dim + value_heads·value_dim channels."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    eps: float

    @property
    def keys(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        return 2 * self.keys + self.values

    @property
    def state(self) -> StateSpec:
        return DeltaSpec((self.kernel - 1, self.channels), (self.value_heads, self.key_dim, self.value_dim))


class GatedDeltaNet:
    """Linear attention with a gated delta rule (Yang et al., Gated Delta Networks, 2024)."""

    def __init__(self, w: Weights, name: str, hidden: int, shape: DeltaShape, in_proj: Sequence[Weight]) -> None:
        """in_proj: qkv (C, H), z (values, H), a and b (value_heads, H); all read the same input, so they are multiplied together."""
        s, self.ops, self.in_proj = shape, w.ops, list(in_proj)
        self.weights = DeltaWeights(
            conv=w.vector(f"{name}.conv1d.weight", s.channels, 1, s.kernel, kind="conv"),
            a_log=w.vector(f"{name}.A_log", s.value_heads),
            dt_bias=w.vector(f"{name}.dt_bias", s.value_heads),
            norm=w.vector(f"{name}.norm.weight", s.value_dim),
            key_heads=s.key_heads,
            value_heads=s.value_heads,
            key_dim=s.key_dim,
            eps=s.eps,
        )
        self.out_proj = w.linear(f"{name}.out_proj", hidden, s.values)

    def __call__(self, x: F32, states: Sequence[State], batch: Batch, angles: Angles) -> F32:
        qkv, z, a, b = self.ops.project(x, self.in_proj)
        return self.out_proj(self.ops.gated_delta(self.weights, qkv, z, a, b, states, batch))
