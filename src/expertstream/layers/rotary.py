"""Rotary position embeddings, plain and scaled."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checkpoint.fields import Fields
from ..ops import F32, I64, Ops

__all__ = ["Rotary", "RotaryScaling", "RotaryShape"]


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
    def from_fields(cls, text: Fields, rope: Fields) -> RotaryScaling:
        """Reads config.json's rope_parameters or rope_scaling. Raises CheckpointError."""
        original = rope.size("original_max_position_embeddings")
        factor = rope.number("factor", 0.999, 1e6, text.size("max_position_embeddings") / original)
        fast, slow = rope.number("beta_fast", 0, 1e6, 32.0), rope.number("beta_slow", 0, 1e6, 1.0)
        if slow > fast:
            raise rope.error(f"beta_slow ({slow:g}) must be at most beta_fast ({fast:g})")

        def magnitude(scale: float) -> float:
            return 0.1 * scale * math.log(max(factor, 1.0)) + 1.0

        default = magnitude(1.0)
        if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
            default = magnitude(rope.number("mscale", 0, 1e3)) / magnitude(rope.number("mscale_all_dim", 0, 1e3))
        return cls(
            factor=factor,
            original_context=original,
            beta_fast=fast,
            beta_slow=slow,
            attention_factor=rope.number("attention_factor", 0, 1e3, default),
            truncate=rope.flag("truncate", True),
        )

    @property
    def context(self) -> int:
        """The context, in tokens, that the scaling is meant for."""
        return int(self.original_context * self.factor)

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


@dataclass(frozen=True)
class RotaryShape:
    """The first `dims` dimensions of each head are rotated, with frequencies theta^(−2i/dims) (Su et al., RoFormer, 2021)."""

    dims: int
    theta: float
    scaling: RotaryScaling | None = None

    @classmethod
    def from_fields(cls, text: Fields, head_dim: int, partial: float = 1.0) -> RotaryShape:
        """Reads config.json's rope_parameters, or what older configs have instead: rope_theta, partial_rotary_factor and rope_scaling.
        partial: the share of a head's dimensions that is rotated if the config does not say. Raises CheckpointError."""
        given = [name for name in ("rope_parameters", "rope_scaling") if text.values.get(name)]
        if len(given) == 2 and text.values["rope_parameters"] != text.values["rope_scaling"]:
            raise text.error("rope_parameters and rope_scaling differ; keep only one of them")
        rope = text.inner(given[0]) if given else text
        kind = next((rope.values[name] for name in ("rope_type", "type") if given and rope.values.get(name)), "default")
        if kind not in ("default", "yarn"):
            raise rope.error(f"rope_type must be default or yarn; got {kind!r}")
        theta = (rope if "rope_theta" in rope.values else text).number("rope_theta", 1, 1e12)
        share = rope.number("partial_rotary_factor", 0, 1, text.number("partial_rotary_factor", 0, 1, partial))
        dims = int(head_dim * share)
        if dims == 0 or dims % 2:
            named = "head_dim" if share == 1 else "partial_rotary_factor"
            raise text.error(
                f"{named} makes {dims} of {head_dim} dimensions rotate; their number must be even, and not 0"
            )
        return cls(dims, theta, RotaryScaling.from_fields(text, rope) if kind == "yarn" else None)


class Rotary:
    """cos and sin (T, dims/2) of positions."""

    def __init__(self, ops: Ops, shape: RotaryShape) -> None:
        plain = [shape.theta ** (-i / shape.dims) for i in range(0, shape.dims, 2)]
        scaling, self.ops = shape.scaling, ops
        self.frequencies = plain if scaling is None else scaling.frequencies(plain, shape.dims, shape.theta)
        self.scale = 1.0 if scaling is None else scaling.attention_factor

    def __call__(self, positions: I64) -> tuple[F32, F32]:
        return self.ops.rotary(positions, self.frequencies, self.scale)
