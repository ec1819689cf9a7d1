"""Matrices that are not quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .matrix import Bytes, KernelFormat, MatrixFormat, Part
from .numbers import DTYPE_BYTES, F32, to_f32

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(MatrixFormat):
    """float32, bfloat16 or float16, row by row. dtype: f32, bf16 or f16."""

    dtype: str

    @property
    def kernel(self) -> KernelFormat:
        return KernelFormat(8 * DTYPE_BYTES[self.dtype], 0, self.dtype, "dense")

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part("weight", self.cols * DTYPE_BYTES[self.dtype]),)

    def dequantize(self, parts: Sequence[Bytes]) -> F32:
        return to_f32(parts[0], self.dtype).reshape(self.rows, self.cols)

    def to_json(self) -> dict[str, Any]:
        bits = self.kernel.bits
        return {
            "rows": self.rows,
            "cols": self.cols,
            "bits": bits,
            "group_size": 0,
            "dtype": self.dtype,
            "symmetric": False,
        }

    def __str__(self) -> str:
        return self.dtype
