"""MXFP4: four-bit floating point with one power of two per 32 values (OCP Microscaling Formats 1.0), gpt-oss's experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .matrix import Bytes, KernelFormat, MatrixFormat, Part
from .numbers import F32, to_f32

__all__ = ["E2M1", "MXFP4", "MXFP4_GROUP"]

MXFP4_GROUP = 32
# The values of the 16 codes: a sign, two bits of exponent, one of mantissa.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass(frozen=True)
class MXFP4(MatrixFormat):
    """w = E2M1[code]·2^(e − 127), one byte e per 32 columns; two codes per byte, lower bits first."""

    @property
    def kernel(self) -> KernelFormat:
        return KernelFormat(4, MXFP4_GROUP, "e8m0", "e2m1")

    @property
    def parts(self) -> tuple[Part, ...]:
        return Part("weight", self.cols // 2), Part("scales", self.cols // MXFP4_GROUP)

    def dequantize(self, parts: Sequence[Bytes]) -> F32:
        codes = np.ascontiguousarray(parts[0])
        values = E2M1[np.stack([codes & 15, codes >> 4], -1)].reshape(self.rows, -1, MXFP4_GROUP)
        return (values * to_f32(parts[1], "e8m0").reshape(self.rows, -1, 1)).reshape(self.rows, self.cols)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "mxfp4", "rows": self.rows, "cols": self.cols}

    def __str__(self) -> str:
        return "MXFP4"
