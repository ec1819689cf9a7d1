"""Building blocks without knowledge of any model: each holds its weights, which the ops have bound, and the ops to apply them."""

from __future__ import annotations

import numpy as np

from ..ops import F32, I64, Ops, Weight

__all__ = ["Embedding", "Linear", "RMSNorm", "Rotary", "joined"]


class Linear:
    """x (T, in) → (T, out); dense or quantized, as the weight is."""

    def __init__(self, weight: Weight, ops: Ops) -> None:
        self.weight, self.ops = weight, ops

    def __call__(self, x: F32) -> F32:
        return self.ops.project(x, [self.weight])[0]


class Embedding:
    """Tokens (T,) → rows (T, H). Where a model ties its embeddings, as_linear() is the output projection."""

    def __init__(self, weight: Weight, ops: Ops) -> None:
        self.weight, self.ops = weight, ops

    def __call__(self, tokens: I64) -> F32:
        return self.ops.embed(self.weight, tokens)

    def as_linear(self, x: F32) -> F32:
        return self.ops.project(x, [self.weight])[0]


class RMSNorm:
    """x·rsqrt(mean(x²) + eps)·weight over the last axis; the weight includes any +1."""

    def __init__(self, weight: F32, eps: float, ops: Ops) -> None:
        self.weight, self.eps, self.ops = weight, eps, ops

    def __call__(self, x: F32) -> F32:
        return self.ops.rms_norm(x, self.weight, self.eps)


class Rotary:
    """cos and sin (T, dims/2) of positions; frequencies theta^(−2i/dims) (Su et al., RoFormer, 2021)."""

    def __init__(self, dims: int, theta: float) -> None:
        self.inverse_frequency = theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)

    def __call__(self, positions: I64) -> tuple[F32, F32]:
        # The oracle takes the angle in float32; so do we, since at large positions the rounding is what differs most.
        angle = positions.astype(np.float32)[:, None] * self.inverse_frequency.astype(np.float32)
        # NumPy's float32 functions differ between processors; its float64 ones, rounded, do not.
        exact = angle.astype(np.float64)
        return np.cos(exact).astype(np.float32), np.sin(exact).astype(np.float32)


def joined(parts: list[F32]) -> F32:
    """Rows of several parts (Tᵢ, n), one after another."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
