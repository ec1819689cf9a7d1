"""Building blocks independent of any model: each holds its bound weights and the ops that apply them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checkpoint.fields import Fields
from ..ops import F32, I64, Ops, Weight

__all__ = ["Embedding", "Linear", "RMSNorm", "Rotary", "RotaryScaling"]


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


@dataclass(frozen=True)
class RotaryScaling:
    """YaRN (Peng et al., YaRN: Efficient Context Window Extension of Large Language Models, 2023): slow dimensions are interpolated by
    `factor`, fast ones are not, with a ramp between them; cos and sin are multiplied by `attention_factor`."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool

    @classmethod
    def from_fields(cls, rope: Fields) -> RotaryScaling:
        """Reads config.json's rope_parameters or rope_scaling. Raises CheckpointError."""
        factor = rope.number("factor", 0.999, 1e6)
        fast, slow = rope.number("beta_fast", 0, 1e6, 32.0), rope.number("beta_slow", 0, 1e6, 1.0)
        if slow > fast:
            raise rope.error(f"beta_slow ({slow:g}) must be at most beta_fast ({fast:g})")
        default = 0.1 * math.log(factor) + 1.0
        return cls(
            factor=factor,
            original_context=rope.size("original_max_position_embeddings"),
            beta_fast=fast,
            beta_slow=slow,
            attention_factor=rope.number("attention_factor", 0, 1e3, default),
            truncate=rope.flag("truncate", True),
        )

    def frequencies(self, plain: list[float], dims: int, theta: float) -> list[float]:
        """The scaled frequencies of dims/2 pairs; plain: those without scaling."""

        def pair_with(rotations: float) -> float:
            """The pair that makes this many rotations within the original context."""
            return dims * math.log(self.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        span = high - low or 0.001
        ramp = [min(max((i - low) / span, 0.0), 1.0) for i in range(len(plain))]
        return [f / self.factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]


class Rotary:
    """cos and sin (T, dims/2) of positions; frequencies theta^(−2i/dims) (Su et al., RoFormer, 2021), optionally scaled."""

    def __init__(self, ops: Ops, dims: int, theta: float, scaling: RotaryScaling | None = None) -> None:
        plain = [theta ** (-i / dims) for i in range(0, dims, 2)]
        self.ops = ops
        self.frequencies = plain if scaling is None else scaling.frequencies(plain, dims, theta)
        self.scale = 1.0 if scaling is None else scaling.attention_factor

    def __call__(self, positions: I64) -> tuple[F32, F32]:
        return self.ops.rotary(positions, self.frequencies, self.scale)
