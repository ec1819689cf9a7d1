"""Integers of 2, 4 or 8 bits with a scale and a bias for each group: MLX's affine quantization, and its form without biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .matrix import Bytes, KernelFormat, MatrixFormat, Part
from .numbers import DTYPE_BYTES, F32, to_f32

__all__ = ["AFFINE_BITS", "AFFINE_GROUPS", "Affine"]

AFFINE_BITS, AFFINE_GROUPS = (2, 4, 8), (32, 64, 128)


@dataclass(frozen=True)
class Affine(MatrixFormat):
    """w = q·scale + bias, or symmetric, w = (q − 2^(bits−1))·scale. q: unsigned, least significant bits first; dtype: of scales and
    biases."""

    bits: int
    group_size: int
    dtype: str
    symmetric: bool = False

    @property
    def kernel(self) -> KernelFormat:
        return KernelFormat(self.bits, self.group_size, self.dtype, "symmetric" if self.symmetric else "affine")

    @property
    def parts(self) -> tuple[Part, ...]:
        groups = self.cols // self.group_size * DTYPE_BYTES[self.dtype]
        parts = Part("weight", self.cols * self.bits // 8), Part("scales", groups), Part("biases", groups)
        return parts[:2] if self.symmetric else parts

    def dequantize(self, parts: Sequence[Bytes]) -> F32:
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)
        q = (np.ascontiguousarray(parts[0])[:, None] >> shifts) & ((1 << self.bits) - 1)
        q = q.reshape(self.rows, -1, self.group_size).astype(np.float32)
        scale = to_f32(parts[1], self.dtype).reshape(self.rows, -1, 1)
        if self.symmetric:
            return ((q - np.float32(1 << (self.bits - 1))) * scale).reshape(self.rows, self.cols)
        bias = to_f32(parts[2], self.dtype).reshape(self.rows, -1, 1)
        return (q * scale + bias).reshape(self.rows, self.cols)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "affine"
        return f"{self.bits}-bit {kind}, groups of {self.group_size}, {self.dtype} scales"
