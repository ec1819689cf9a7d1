"""Building blocks independent of any model: each holds its bound weights and the ops that apply them."""

from __future__ import annotations

from ..ops import F32, I64, Ops, Weight

__all__ = ["Embedding", "Linear", "RMSNorm"]


class Linear:
    """x (T, in) → (T, out); dense or quantized, depending on the weight."""

    def __init__(self, weight: Weight, ops: Ops) -> None:
        self.weight, self.ops = weight, ops

    def __call__(self, x: F32) -> F32:
        return self.ops.project(x, [self.weight])[0]


class Embedding:
    """Tokens (T,) → rows (T, H). If a model ties its embeddings, as_linear() is the output projection."""

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
